//! Our HTTP/1 framing beside hyper's and Node's: what agents pass is read by the app as we read it, or refused by it. Never two
//! readings of one input.

use meshwork_tests::fuzz::{self, by_node, grammar, reading};

use super::seeds;

/// Inputs of each direction: some seconds.
const CASES: u64 = 40_000;

#[test]
fn requests_that_we_pass_are_read_alike_by_hyper() {
    let alike = seeds(CASES, |seed| {
        fuzz::requests_against_hyper(&grammar::requests(seed))
    });
    assert_mostly(alike);
}

#[test]
fn responses_that_we_pass_are_read_alike_by_hyper() {
    let alike = seeds(CASES, |seed| {
        fuzz::responses_against_hyper(&grammar::response(seed))
    });
    assert_mostly(alike);
}

/// Inputs that go to Node: all at once, since to start it costs more than to ask it.
const CASES_OF_NODE: u64 = 12_000;

#[test]
fn requests_that_we_pass_are_read_alike_by_node() {
    let passed: Vec<_> = (0..CASES_OF_NODE)
        .map(|seed| reading::requests(&grammar::requests(seed)))
        .collect();
    let inputs: Vec<_> = passed
        .iter()
        .map(|passed| ("requests", passed.bytes.clone()))
        .collect();
    let seen = by_node::read(&inputs);
    let alike: usize = passed
        .iter()
        .zip(&seen)
        .map(|(passed, seen)| fuzz::compare_requests(passed, seen))
        .sum();
    assert!(
        CASES_OF_NODE as usize / 4 < alike,
        "only {alike} requests were read by both"
    );
}

#[test]
fn responses_that_we_pass_are_read_alike_by_node() {
    let mut passed = Vec::new();
    let mut inputs = Vec::new();
    for seed in 0..CASES_OF_NODE / 2 {
        // Node's client takes every answer to CONNECT, a refusal too, for a tunnel.
        for (method, request) in fuzz::asked().filter(|(method, _)| *method != "CONNECT") {
            let response = reading::response(&grammar::response(seed), &request);
            inputs.push((method, response.bytes.clone()));
            passed.push(response);
        }
    }
    let seen = by_node::read(&inputs);
    let alike: usize = passed
        .iter()
        .zip(&seen)
        .map(|(passed, seen)| fuzz::compare_response(passed, seen.first()))
        .sum();
    assert!(
        CASES_OF_NODE as usize / 4 < alike,
        "only {alike} responses were read by both"
    );
}

/// A grammar so wild that all of it is refused would prove nothing.
fn assert_mostly(alike: usize) {
    let alone = std::env::var_os("MESHWORK_SEED").is_some();
    assert!(
        alone || CASES as usize / 4 < alike,
        "only {alike} messages were read by both"
    );
}
