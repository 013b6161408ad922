//! Policy at the receiver: what is denied, with what words, and where it is counted.

use meshwork_tests::process::Process;
use meshwork_tests::servers;
use meshwork_tests::wait::{SOON, check, wait_until};

use crate::pair::{Pair, mesh_name, owner, spiffe, spiffe_host};

const ONLY_BOSS: &str = "\
apiVersion: meshwork.io/v1alpha1
kind: Policy
metadata: {name: only-boss, namespace: shop}
spec:
  rules:
  - name: boss
    from: [{identity: shop/boss}]
";

const TRY: &str = "\
import socket
try:
    c = socket.create_connection(('cache.shop.mesh.internal', 6379), 20)
    c.sendall(b'PING\\r\\n')
    print('got', c.recv(100))
except ConnectionResetError:
    print('reset')
";

#[test]
fn a_denied_http_call_says_why_and_is_counted_and_logged() {
    let pair = Pair::new("a_denied_http_call");
    let _web = pair.web("http", "");
    let line = format!("curl -sS -m 10 -i http://{}/", mesh_name("web"));
    assert!(pair.ok(&line).contains("hello"));
    let before = pair.server.refused("not_allowed");
    pair.control.apply(ONLY_BOSS).ok();
    let answer = wait_until("the denial", SOON, || {
        let answer = pair.ok(&line);
        check(answer.contains(" 403 "), answer.clone()).map(|()| answer)
    });
    let lower = answer.to_lowercase();
    assert!(lower.contains("x-meshwork-reason: not_allowed"), "{answer}");
    assert!(!answer.contains("hello"), "{answer}");
    pair.server.wait_refused("not_allowed", before);
    let log = servers::access_log(&pair.server.host, "web");
    assert_eq!(
        log.matches(" 200 ").count(),
        1,
        "the app saw a denied call: {log}"
    );
    let log = pair.server.log();
    let told = log.lines().any(|line| {
        line.contains(&spiffe("client")) && line.contains("shop/web") && line.contains("only-boss")
    });
    assert!(told, "no line names both and the policy:\n{log}");
}

#[test]
fn a_denied_connection_is_reset_and_counted() {
    let pair = Pair::new("a_denied_connection_is_reset");
    let _redis = servers::redis(&pair.server.host, "cache", 6379);
    pair.declare("cache", 6379, "tcp");
    let attempt = || pair.client.host.python("try", TRY).cgroup("client").ok();
    assert!(attempt().contains("PONG"));
    let before = pair.server.refused("not_allowed");
    pair.control.apply(ONLY_BOSS).ok();
    wait_until("the reset", SOON, || {
        let text = attempt();
        check(text == "reset\n", text)
    });
    pair.server.wait_refused("not_allowed", before);
}

/// A policy counts for what is open, too: sessions of databases last for weeks.
#[test]
fn an_open_connection_is_cut_when_it_is_denied_and_others_go_on() {
    const SESSION: &str = "\
import socket
c = socket.create_connection(('cache.shop.mesh.internal', 6379), 20)
c.settimeout(60)
c.sendall(b'PING\\r\\n')
print('first', c.recv(100), flush=True)
c.sendall(b'BLPOP go 60\\r\\n')
try: print('then', c.recv(100), flush=True)
except ConnectionResetError: print('reset', flush=True)
";
    let pair = Pair::new("an_open_connection_is_cut");
    let _redis = servers::redis(&pair.server.host, "cache", 6379);
    pair.declare("cache", 6379, "tcp");
    pair.client.serve("boss", &owner("boss"), &[]);
    let ping = format!("redis-cli -h {} ping", mesh_name("cache"));
    wait_until("the boss to be known", SOON, || {
        drop(pair.client.host.cmd(&ping).cgroup("boss").output());
        let count = pair.calls(&spiffe("boss"), "shop/cache");
        check(0.0 < count, format!("{count} calls"))
    });
    let sessions = ["client", "boss"].map(|who| {
        let name = format!("session-{who}");
        let session = pair.client.host.python(&name, SESSION);
        session.cgroup(who).spawn(&name)
    });
    let wait_said = |session: &Process, words: &str| {
        wait_until(words, SOON, || {
            let log = session.log();
            check(log.contains(words), log)
        });
    };
    for session in &sessions {
        wait_said(session, "PONG");
    }
    let [client, boss] = &sessions;
    let before = [&pair.server, &pair.client].map(|agent| agent.refused("not_allowed"));
    pair.control.apply(ONLY_BOSS).ok();
    wait_said(client, "reset");
    pair.server.wait_refused("not_allowed", before[0]);
    pair.client.wait_refused("not_allowed", before[1]);
    pair.server.host.ok("redis-cli rpush go on");
    wait_said(boss, "then");
    assert!(!boss.log().contains("reset"), "{}", boss.log());
}

#[test]
fn the_nearest_level_decides_and_audit_lets_pass() {
    let pair = Pair::new("the_nearest_level_decides");
    let _web = pair.web("http", "");
    let line = format!(
        "curl -sS -m 10 -o /dev/null -w '%{{http_code}}' http://{}/",
        mesh_name("web")
    );
    let wait_status = |status: &str| {
        wait_until(&format!("status {status}"), SOON, || {
            let text = pair.ok(&line);
            check(text == status, text)
        });
    };
    wait_status("200");
    pair.control.apply(ONLY_BOSS).ok();
    wait_status("403");
    let service = "\
apiVersion: meshwork.io/v1alpha1
kind: Policy
metadata: {name: web-for-clients, namespace: shop}
spec:
  service: web
  rules:
  - name: clients
    from: [{identity: 'shop/cli*'}]
";
    pair.control.apply(service).ok();
    wait_status("200");
    pair.control
        .meshctl("delete policy web-for-clients -n shop")
        .ok();
    wait_status("403");
    let audit = ONLY_BOSS.replace("spec:\n", "spec:\n  enforce: audit\n");
    pair.control.apply(&audit).ok();
    wait_status("200");
    pair.control.meshctl("delete policy only-boss -n shop").ok();
    // Nothing is left but `everyone`; without it nobody may.
    pair.control.meshctl("delete policy everyone").ok();
    wait_status("403");
}

#[test]
fn a_process_that_is_no_workload_is_its_host_and_no_more() {
    let pair = Pair::new("a_process_that_is_no_workload");
    let _web = pair.web("http", "");
    let line = format!("curl -sS -m 10 -i http://{}/", mesh_name("web"));
    assert!(pair.client.host.ok(&line).contains("hello"));
    let host = spiffe_host(&pair.client.host);
    wait_until("its identity", SOON, || {
        let count = pair.calls(&host, "shop/web");
        check(count == 1.0, format!("{count}"))
    });
    let clients = "\
apiVersion: meshwork.io/v1alpha1
kind: Policy
metadata: {name: clients, namespace: shop}
spec: {rules: [{name: r, from: [{namespace: shop}]}]}
";
    pair.control.apply(clients).ok();
    wait_until("the denial", SOON, || {
        let answer = pair.client.host.ok(&line);
        check(
            answer
                .to_lowercase()
                .contains("x-meshwork-reason: not_allowed"),
            answer,
        )
    });
    assert!(pair.ok(&line).contains("hello"));
}

/// One connection between the agents carries all calls while policies change: each call is counted once, by the rule that
/// lets it pass, and what is judged anew is no call.
#[test]
fn calls_are_counted_by_the_rule_of_now_and_nothing_else_is() {
    let pair = Pair::new("calls_are_counted_by_the_rule");
    let _web = pair.web("http", "");
    let client = spiffe("client");
    let counted = |rule: &str, decision: &str| {
        let labels = [
            ("src", client.as_str()),
            ("rule", rule),
            ("decision", decision),
        ];
        pair.server.metrics().sum("mesh_decisions_total", &labels)
    };
    let all = || {
        let labels = [("src", client.as_str())];
        pair.server.metrics().sum("mesh_decisions_total", &labels)
    };
    let revision = || {
        let state: serde_json::Value = serde_json::from_str(&pair.server.admin("/state")).unwrap();
        state["policies"].clone()
    };
    let apply = |enforce: &str, rule: &str, caller: &str| {
        let before = revision();
        let policy = format!(
            "apiVersion: meshwork.io/v1alpha1\nkind: Policy\nmetadata: {{name: web, namespace: shop}}\n\
             spec: {{service: web, enforce: {enforce}, rules: [{{name: {rule}, from: [{{identity: {caller}}}]}}]}}\n"
        );
        pair.control.apply(&policy).ok();
        wait_until("the policy to be in force", SOON, || {
            let now = revision();
            check(now != before, now.to_string())
        });
    };
    let call = || {
        let line = format!("curl -sS -m 10 http://{}/", mesh_name("web"));
        assert_eq!(pair.ok(&line), "hello\n");
    };
    apply("on", "first", "shop/client");
    call();
    assert_eq!((counted("web/first", "allowed"), all()), (1.0, 1.0));
    apply("on", "second", "shop/client");
    call();
    assert_eq!(counted("web/first", "allowed"), 1.0);
    assert_eq!((counted("web/second", "allowed"), all()), (1.0, 2.0));
    apply("audit", "boss", "shop/boss");
    call();
    assert_eq!((counted("web", "audited"), all()), (1.0, 3.0));
    let said = "would be refused if enforce were on";
    wait_until("that to be logged", SOON, || {
        check(pair.server.log().contains(said), pair.server.log())
    });
    for rule in ["third", "fourth", "fifth"] {
        apply("on", rule, "shop/client");
    }
    assert_eq!(all(), 3.0, "nobody called");
    call();
    assert_eq!((counted("web/fifth", "allowed"), all()), (1.0, 4.0));
    let connections = pair.server.metrics().sum("mesh_peer_connections", &[]);
    assert_eq!(connections, 1.0, "they took more than one connection");
}
