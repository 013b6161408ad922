//! HTTP/2 and gRPC under torture: Go's net/http2 and grpc-go at both ends (`tests/go/torture`), which compare each byte
//! with what it must be; nginx and curl with digests.

use std::time::Duration;

use meshwork_tests::agent::Agent;
use meshwork_tests::process::{Cmd, Process};
use meshwork_tests::servers::{self, golang};

use crate::pair::{Pair, mesh_name, owner};
use crate::torture::{BUFFERS_KIB, GIB, Rig, TASK_MAX, wait_said};
use crate::torture_cuts::all_cut;

const HTTP2: u16 = 8082;
const GRPC: u16 = 50051;
/// A body of a gibibyte each way with curl, its files and digests, on a busy machine.
const CURL_MAX: Duration = Duration::from_secs(400);

/// The Go server as `shop/calls` beside the app of a rig.
pub(crate) struct Calls {
    pub(crate) rig: Rig,
    pub(crate) server: Process,
    to: String,
}

impl Calls {
    #[track_caller]
    pub(crate) fn new(name: &str) -> Self {
        Self::beside(Rig::new(name, "http"))
    }

    #[track_caller]
    pub(crate) fn beside(rig: Rig) -> Self {
        let pair = &rig.pair;
        let server = servers::torture_go(&pair.server.host, "calls", HTTP2, GRPC);
        let ports = [(HTTP2, "http2"), (GRPC, "grpc")];
        pair.server.serve("calls", &owner("calls"), &ports);
        pair.control.wait_endpoints("shop/calls", 1);
        pair.wait_name("calls");
        let [vip, _] = pair.vips("calls");
        let to = format!("--http2={vip}:{HTTP2} --grpc={vip}:{GRPC}");
        Self { rig, server, to }
    }

    /// A task of the caller, as workload `shop/client`.
    pub(crate) fn task(&self, words: &str) -> Cmd {
        let program = golang::program("torture").display().to_string();
        let words = format!("{words} {}", self.to);
        let words = words.split(' ').map(str::to_owned);
        let host = &self.rig.pair.client.host;
        let task = host.program(std::iter::once(program).chain(words));
        task.cgroup("client").deadline(TASK_MAX)
    }

    #[track_caller]
    fn run(&self, words: &str) -> String {
        self.task(words).ok()
    }

    /// Waits until nothing is left, and shows that the server took nothing that was not sent so.
    #[track_caller]
    pub(crate) fn settled(&self) {
        self.rig.settled();
        let server = self.server.log();
        assert!(!server.contains("UPLOAD WRONG"), "{server}");
    }
}

/// Both ways at once; with an eighth of it where the length is not announced, and as messages of gRPC.
#[test]
fn a_gibibyte_passes_each_way_over_http2_and_grpc_and_each_byte_is_its_own() {
    let calls = Calls::new("a_gibibyte_over_http2");
    let before = calls.rig.memory();
    let text = calls.run(&format!("bodies --bytes={GIB}"));
    let expected = format!(
        "both ways http2, length true: {GIB}\nboth ways http2, length false: {part}\n\
         both ways grpc, length false: {part}\n",
        part = GIB / 8
    );
    assert_eq!(text, expected);
    let grown = calls.rig.grown(before);
    assert!(
        grown.iter().all(|kib| *kib < BUFFERS_KIB),
        "KiB more: {grown:?}"
    );
    calls.settled();
}

/// One file goes up to nginx and comes down from it by curl, over HTTP/1.1 and HTTP/2.
#[test]
fn curl_and_nginx_pass_a_gibibyte_each_way_with_its_digest() {
    let pair = Pair::new("curl_and_nginx_pass");
    let locations = "listen 8080 http2; location / { dav_methods PUT; }";
    let _nginx = servers::nginx(&pair.server.host, "web", 80, locations);
    let ports = [(80, "http"), (8080, "http2")];
    pair.server.serve("web", &owner("web"), &ports);
    pair.control.wait_endpoints("shop/web", 1);
    pair.wait_name("web");
    let sent = pair.client.host.dir().join("sent");
    let sent = sent.display();
    let digest = pair.cmd(&format!(
        "head -c {GIB} /dev/urandom | tee {sent} | sha256sum"
    ));
    let digest = digest.deadline(CURL_MAX).ok();
    for (port, version, name) in [
        (80, "--http1.1", "1"),
        (8080, "--http2-prior-knowledge", "2"),
    ] {
        let url = format!("http://{}:{port}/{name}", mesh_name("web"));
        let curl = format!(
            "curl -sS -f -m 390 {version} -w '%{{stderr}}%{{http_version}} %{{http_code}}'"
        );
        let put = pair.cmd(&format!("{curl} -T {sent} {url}"));
        let put = put.deadline(CURL_MAX).output();
        assert!(put.status.success(), "{put}");
        assert!(
            put.stderr.starts_with(name) && put.stderr.ends_with(" 201"),
            "{put}"
        );
        let stored = pair.server.host.dir().join("web/www").join(name);
        let stored = pair
            .server
            .host
            .cmd(&format!("sha256sum < {}", stored.display()));
        assert_eq!(stored.deadline(CURL_MAX).ok(), digest, "up by {version}");
        let got = pair.cmd(&format!("{curl} {url} | sha256sum"));
        let got = got.deadline(CURL_MAX).output();
        assert!(
            got.stderr.starts_with(name) && got.stderr.ends_with(" 200"),
            "{got}"
        );
        assert_eq!(got.ok(), digest, "down by {version}");
    }
}

#[test]
fn an_agent_that_is_killed_leaves_no_http2_body_and_no_grpc_call_that_looks_whole() {
    let mut calls = Calls::new("an_agent_killed_http2");
    type Kill = fn(&mut Agent);
    let again: Kill = |agent| {
        agent.kill9();
        agent.start();
    };
    for (number, (who, kill)) in [
        ("server", again),
        ("client", again),
        ("server", Agent::kill_worker),
        ("client", Agent::kill_worker),
    ]
    .into_iter()
    .enumerate()
    {
        let mut task = calls.task("endless").spawn(&format!("endless-{number}"));
        wait_said(&mut task, "flowing");
        let pair = &mut calls.rig.pair;
        kill(if who == "server" {
            &mut pair.server
        } else {
            &mut pair.client
        });
        all_cut(&mut task, 18, who);
        // A call of gRPC is over with a status, which is never OK.
        let text = task.log();
        let statuses = text.matches(" cut: rpc error: code = ").count();
        assert_eq!(statuses, 6, "{who}: {text}");
        calls.settled();
    }
}

#[test]
fn random_resets_leave_the_other_streams_of_their_connection_exact() {
    let calls = Calls::new("random_resets_http2");
    for seed in [1, 2] {
        let text = calls.run(&format!("resets --seed={seed} --times=3000"));
        assert!(text.contains("whole ") && text.contains("cut "), "{text}");
        calls.settled();
    }
    let served = calls.rig.agents().map(Agent::log);
    assert!(served.iter().all(|log| !log.contains("broke the rules")));
}

/// On one connection: callers that do not read, servers that do not take, both ends writing single bytes; small calls
/// beside them go on.
#[test]
fn streams_that_stand_still_hold_back_no_other_of_their_connection() {
    let calls = Calls::new("streams_that_stand_still");
    let go = calls.rig.pair.client.host.dir().join("go");
    let before = calls.rig.memory();
    let words = format!("slow --until={}", go.display());
    let mut task = calls.task(&words).spawn("slow");
    assert_eq!(wait_said(&mut task, "answered "), "600");
    let grown = calls.rig.grown(before);
    assert!(
        grown.iter().all(|kib| *kib < BUFFERS_KIB),
        "40 streams of 8 MiB stand still; KiB more: {grown:?}"
    );
    std::fs::write(&go, "").unwrap();
    assert_eq!(wait_said(&mut task, "whole "), "60");
    calls.settled();
}

#[test]
fn small_calls_go_on_beside_bulk_on_their_own_connection() {
    let calls = Calls::new("small_calls_beside_bulk_http2");
    let text = calls.run(&format!("fair --bytes={}", GIB / 8));
    let answered: Vec<u64> = text
        .lines()
        .filter_map(|line| line.rsplit(' ').next()?.parse().ok())
        .collect();
    // Half a gibibyte passes beside those of each protocol. One that waited for a share of it would be answered once or twice.
    let enough = answered.iter().all(|answered| 20 <= *answered);
    assert!(answered.len() == 2 && enough, "{text}");
    calls.settled();
}

/// Two thousand streams of few connections, then one of each of two thousand connections: all in the middle of an
/// exchange at once.
#[test]
fn two_thousand_streams_and_two_thousand_connections_are_served_at_once() {
    let calls = Calls::new("two_thousand_streams");
    let text = calls.run("crowd --connections=10 --streams=100 --requests=6");
    assert_eq!(text, "open 2000\nanswered 12000\n");
    let text = calls.run("crowd --connections=1000 --streams=1 --requests=3");
    assert_eq!(text, "open 2000\nanswered 6000\n");
    calls.settled();
}

/// Connections that carry a few calls each.
#[test]
fn fifty_thousand_streams_come_and_go() {
    let calls = Calls::new("fifty_thousand_streams");
    let words = "--streams=5 --requests=2 --parallel=16";
    let text = calls.run(&format!("churn --connections=500 {words}"));
    assert_eq!(text, "closed 5000\n");
    let before = calls.rig.memory();
    let text = calls.run(&format!("churn --connections=4500 {words}"));
    assert_eq!(text, "closed 45000\n");
    let grown = calls.rig.grown(before);
    assert!(
        grown.iter().all(|kib| *kib < 16 * 1024),
        "KiB more: {grown:?}"
    );
    calls.settled();
}
