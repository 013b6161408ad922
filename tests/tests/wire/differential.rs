//! Our HTTP/1 framing beside hyper's: what agents pass is read by the app as we read it, or refused by it. Never two
//! readings of one input.

use meshwork_tests::fuzz::{self, grammar};

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

/// A grammar so wild that all of it is refused would prove nothing.
fn assert_mostly(alike: usize) {
    let alone = std::env::var_os("MESHWORK_SEED").is_some();
    assert!(
        alone || CASES as usize / 4 < alike,
        "only {alike} messages were read by both"
    );
}
