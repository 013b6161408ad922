//! The data path never passes through control: it may be down, killed, and come back.

use std::time::Duration;

use meshwork_tests::control::Control;
use meshwork_tests::servers;
use meshwork_tests::wait::{SOON, check, wait_until};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::pair::{Pair, mesh_name, owner};

fn web(name: &str) -> (Pair, meshwork_tests::process::Process, String) {
    let pair = Pair::new(name);
    let web = pair.web("http", "");
    let line = format!("curl -sS -m 10 http://{}/", mesh_name("web"));
    assert_eq!(pair.ok(&line), "hello\n");
    (pair, web, line)
}

#[test]
fn calls_go_on_while_control_is_killed_and_changes_arrive_when_it_is_back() {
    let (mut pair, _web, line) = web("calls_go_on_while_control_is_killed");
    pair.control.kill9();
    for _ in 0..20 {
        assert_eq!(pair.ok(&line), "hello\n");
    }
    let _redis = servers::redis(&pair.server.host, "cache", 6379);
    pair.server
        .serve("cache", &owner("cache"), &[(6379, "tcp")]);
    pair.control.run();
    pair.control.wait_endpoints("shop/cache", 1);
    pair.wait_name("cache");
    assert_eq!(
        pair.ok(&format!("redis-cli -h {} ping", mesh_name("cache"))),
        "PONG\n"
    );
    assert_eq!(pair.ok(&line), "hello\n");
    wait_until("every lease to be live again", Control::NOTICED, || {
        let hosts = pair.control.get("hosts");
        let live = hosts
            .iter()
            .filter(|host| host["status"]["lease"] == "live")
            .count();
        check(live == 2, format!("{hosts:?}"))
    });
}

/// A service keeps its virtual address and a policy its word over a restart.
#[test]
fn what_control_decided_is_the_same_after_its_restart() {
    let (mut pair, _web, line) = web("what_control_decided_is_the_same");
    let vips = pair.vips("web");
    let denied = "\
apiVersion: meshwork.io/v1alpha1
kind: Policy
metadata: {name: nobody, namespace: shop}
spec: {rules: [{name: r, from: [{identity: shop/nobody}]}]}
";
    pair.control.apply(denied).ok();
    let status = "-o /dev/null -w '%{http_code}'";
    let line = line.replace("-sS", &format!("-sS {status}"));
    let wait_denied = || {
        wait_until("the denial", SOON, || {
            let text = pair.ok(&line);
            check(text == "403", text)
        });
    };
    wait_denied();
    pair.control.stop();
    pair.control.run();
    pair.control.wait_endpoints("shop/web", 1);
    assert_eq!(pair.vips("web"), vips);
    let text = pair.ok(&line);
    assert_eq!(text, "403");
}

#[test]
fn agents_that_restart_without_control_serve_from_disk_and_say_so() {
    let now = || OffsetDateTime::now_utc().unix_timestamp();
    let begun = now();
    let (mut pair, _web, line) = web("agents_that_restart_without_control");
    pair.control.kill9();
    let killed = now();
    pair.server.stop();
    pair.server.start();
    pair.client.kill9();
    pair.client.start();
    wait_until("the call to be answered again", SOON, || {
        let output = pair.cmd(&line).output();
        check(output.stdout == "hello\n", output.to_string())
    });
    let status = pair.client.command("status -o json").ok();
    let status: serde_json::Value = serde_json::from_str(&status).unwrap();
    let since = status["control"]["stale_since_s"].as_i64().unwrap();
    assert!(
        (begun..=killed).contains(&since),
        "control was heard between {begun} and {killed}: {status}"
    );
    let since = OffsetDateTime::from_unix_timestamp(since).unwrap();
    let said = format!("({})", since.format(&Rfc3339).unwrap());
    let page = pair.client.command("status").ok();
    assert!(
        page.contains("stale since") && page.contains(&said),
        "no `{said}`: {page}"
    );
    pair.control.run();
    wait_until("the client's lease", Control::NOTICED, || {
        let hosts = pair.control.get("hosts");
        let live = hosts
            .iter()
            .filter(|host| host["status"]["lease"] == "live")
            .count();
        check(live == 2, format!("{hosts:?}"))
    });
}

#[test]
fn a_worker_that_is_killed_is_replaced_and_nobody_is_refused() {
    let (mut pair, _web, line) = web("a_worker_that_is_killed");
    pair.server.kill_worker();
    assert_eq!(pair.ok(&line), "hello\n");
    // Those who come meanwhile wait in the accept queue.
    const CALLS: usize = 60;
    let calls = format!("for i in $(seq {CALLS}); do {line}; done");
    let running = pair.cmd(&calls);
    std::thread::scope(|scope| {
        let calls = scope.spawn(move || running.output());
        pair.client.kill_worker();
        let output = calls.join().unwrap();
        // The one whose connection was in the worker that died is lost with it.
        let answered = output.stdout.matches("hello").count();
        assert!(CALLS - 1 <= answered, "{answered} of {CALLS}: {output}");
    });
    assert_eq!(pair.ok(&line), "hello\n");
}

/// The host of the service is cut off without a word, in the middle of kept connections. Callers are told, and are
/// served again when it is back.
#[test]
fn a_host_that_is_cut_off_is_an_answer_and_not_a_hang() {
    /// Longer than any timeout of the data path that may pass before the answer.
    const ANSWER_MAX: Duration = Duration::from_secs(50);
    let (pair, _web, line) = web("a_host_that_is_cut_off");
    let line = line.replace("-m 10", "-m 45 -i");
    pair.server.host.set_link(false);
    let answer = pair.cmd(&line).deadline(ANSWER_MAX).ok();
    let lower = answer.to_lowercase();
    assert!(lower.contains("x-meshwork-reason:"), "{answer}");
    let reason = lower.split("x-meshwork-reason: ").nth(1).unwrap();
    let reason = reason.split_whitespace().next().unwrap();
    let known = ["peer_unreachable", "peer_lost", "timeout"];
    assert!(known.contains(&reason), "{answer}");
    assert!(0.0 < pair.client.refused(reason));
    pair.server.host.set_link(true);
    wait_until("the call to be answered again", ANSWER_MAX, || {
        let output = pair.cmd(&line).deadline(ANSWER_MAX).output();
        check(output.stdout.ends_with("hello\n"), output.to_string())
    });
}
