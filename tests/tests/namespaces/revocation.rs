//! What the operator revokes is cut off at once, wherever it is, and stays so.

use std::net::SocketAddr;
use std::time::Instant;

use mesh_api::token::JoinToken;
use meshwork_tests::agent::{Agent, MESH_PORT};
use meshwork_tests::control::TRUST_DOMAIN;
use meshwork_tests::mesh::{Authority, Credential, knock};
use meshwork_tests::process::Process;
use meshwork_tests::wait::{SOON, check, wait_until};

use crate::pair::{Pair, mesh_name};

/// Answers each byte, and says how each connection ended.
const ECHO: &str = "
import socket, threading
listener = socket.create_server(('', 9000))
def serve(client):
    try:
        while data := client.recv(65536):
            client.sendall(data)
        print('closed', flush=True)
    except OSError as error:
        print('reset', flush=True)
while True:
    threading.Thread(target=serve, args=listener.accept()[:1]).start()
";

/// Takes a request and never answers.
const SILENT: &str = "
import socket
listener = socket.create_server(('', 8080))
held = []
while True:
    held.append(listener.accept()[0])
    held[-1].recv(1)
    print('asked', flush=True)
";

/// A program with an open call that says how it ends.
pub(crate) fn held(name: &str) -> String {
    format!(
        "
import socket
call = socket.create_connection(('{}', 9000))
call.sendall(b'x')
call.recv(1)
print('open', flush=True)
try:
    print('data' if call.recv(1) else 'closed', flush=True)
except OSError:
    print('reset', flush=True)
",
        mesh_name(name)
    )
}

#[track_caller]
pub(crate) fn wait_log(process: &Process, word: &str) {
    wait_until(&format!("`{word}` of a program"), SOON, || {
        let log = process.log();
        check(log.contains(word), log)
    });
}

struct Scene {
    pair: Pair,
    echo: Process,
    held: Process,
}

/// A call from `shop/client` to `shop/echo` stands open.
fn scene(name: &str) -> Scene {
    let pair = Pair::new(name);
    let echo = pair.server.host.python("echo", ECHO);
    let echo = echo.cgroup("echo").spawn("echo");
    pair.server.host.wait_listening(9000, SOON);
    pair.declare("echo", 9000, "tcp");
    let held = pair.client.host.python("held", &held("echo"));
    let held = held.cgroup("client").spawn("held");
    wait_log(&held, "open");
    Scene { pair, echo, held }
}

fn port(pair: &Pair) -> SocketAddr {
    SocketAddr::from((pair.server.host.v4(), MESH_PORT))
}

/// A certificate that the client's agent really has, in the hands of somebody who does what he likes.
fn stolen(pair: &Pair) -> Credential {
    Credential::of_leaf(&pair.client.host.dir().join("state"), "shop.client")
}

#[track_caller]
fn refused_at_the_port(pair: &Pair, credential: &Credential, reason: &str) {
    let sni = format!("echo.shop.{TRUST_DOMAIN}");
    let before = pair.server.refused(reason);
    let end = pair
        .client
        .host
        .inside(|| knock(port(pair), &sni, Some(credential)));
    assert_ne!(end, "accepted", "{reason}");
    pair.server.wait_refused(reason, before);
}

#[test]
#[expect(clippy::print_stderr, reason = "a figure for people")]
fn a_revoked_host_is_cut_off_at_once_and_after_a_restart() {
    let mut scene = scene("a_revoked_host_is_cut_off");
    let credential = stolen(&scene.pair);
    let sni = format!("echo.shop.{TRUST_DOMAIN}");
    let pair = &mut scene.pair;
    let address = port(pair);
    let end = pair
        .client
        .host
        .inside(|| knock(address, &sni, Some(&credential)));
    assert_eq!(
        end, "accepted",
        "the thief gets in while nothing is revoked"
    );
    let before = pair.server.refused("peer_revoked");
    let begun = Instant::now();
    let told = pair.control.meshctl("revoke host client").ok();
    assert!(told.contains("host client revoked"), "{told}");
    wait_log(&scene.echo, "reset");
    eprintln!(
        "from the operator's word to the end of the call: {:?}",
        begun.elapsed()
    );
    wait_log(&scene.held, "reset");
    pair.server.wait_refused("peer_revoked", before);
    refused_at_the_port(pair, &credential, "peer_revoked");
    // The host's own agent has no session, and gets no certificate.
    wait_until("control to refuse the host", SOON, || {
        let count = pair.control.refused("host_revoked");
        check(0.0 < count, count.to_string())
    });
    let listed = pair.control.get("revocations");
    assert_eq!(listed.len(), 1, "{listed:?}");
    assert_eq!(listed[0]["spec"]["host"], "client");
    wait_until("the server to acknowledge", SOON, || {
        let listed = pair.control.get("revocations");
        let acknowledged = &listed[0]["status"]["acknowledged"];
        check(*acknowledged == 1, listed[0].to_string())
    });
    // Neither control nor the old process is there to say it.
    pair.control.stop();
    pair.server.kill9();
    pair.server.start();
    refused_at_the_port(pair, &credential, "peer_revoked");
}

#[test]
fn a_revoked_workload_is_cut_off_and_its_host_goes_on() {
    let scene = scene("a_revoked_workload");
    let pair = &scene.pair;
    let silent = pair.server.host.python("silent", SILENT);
    let silent = silent.cgroup("silent").spawn("silent");
    pair.server.host.wait_listening(8080, SOON);
    pair.declare("silent", 8080, "http");
    let url = format!("http://{}:8080/", mesh_name("silent"));
    let asking = pair.cmd(&format!("curl -sS -i {url}")).spawn("asking");
    wait_log(&silent, "asked");
    pair.control
        .meshctl("revoke workload shop/silent --host server")
        .ok();
    // `peer_revoked`; or, where the called agent heard of it before the caller, what becomes of the next try.
    wait_log(&asking, "x-meshwork-reason: ");
    let cut = asking.log();
    let reasons = ["peer_revoked", "no_endpoints", "peer_handshake"];
    assert!(reasons.iter().any(|reason| cut.contains(reason)), "{cut}");
    pair.control.wait_endpoints("shop/silent", 0);
    wait_until("the host to hear why", SOON, || {
        let status = pair.server.command("status").stdout;
        check(status.contains("identity_revoked"), status)
    });
    // The other workload of that host is as before, and its caller too, until that is revoked on its own host.
    assert!(!scene.held.log().contains("reset"), "{}", scene.held.log());
    let before = pair.client.refused("identity_revoked");
    pair.control
        .meshctl("revoke workload shop/client --host client")
        .ok();
    wait_log(&scene.held, "reset");
    wait_log(&scene.echo, "reset");
    refused_at_the_port(pair, &stolen(pair), "peer_revoked");
    let again = pair.cmd(&format!("curl -sS -m 10 {url}")).output();
    assert!(!again.status.success(), "{again}");
    pair.client.wait_refused("identity_revoked", before);
    let unknown = pair
        .control
        .meshctl("revoke workload data/db --host client");
    assert!(unknown.stderr.contains("not_found"), "{unknown}");
}

/// Who joined with a stolen token is cut off with it, and nobody joins by it again.
#[test]
fn the_hosts_of_a_revoked_token_are_cut_off_with_it() {
    let scene = scene("the_hosts_of_a_revoked_token");
    let pair = &scene.pair;
    let stolen_token = pair.control.token("--namespace shop --uses 2");
    let id = JoinToken::parse(&stolen_token).unwrap().id;
    let thief = Agent::new(&pair.site.host("thief"));
    thief.join(&stolen_token).ok();
    let thief = thief.started();
    thief.serve("client", &crate::pair::owner("client"), &[]);
    let script = held("echo");
    let call = wait_until("a call of the thief", SOON, || {
        let call = thief.host.python("held", &script).cgroup("client");
        let call = call.spawn("held");
        wait_until("it to stand or to end", SOON, || {
            let log = call.log();
            check(!log.is_empty(), "it says nothing")
        });
        let log = call.log();
        check(log.contains("open"), log).map(|()| call)
    });
    let credential = Credential::of_leaf(&thief.host.dir().join("state"), "shop.client");
    let sni = format!("echo.shop.{TRUST_DOMAIN}");
    let end = thief
        .host
        .inside(|| knock(port(pair), &sni, Some(&credential)));
    assert_eq!(
        end, "accepted",
        "the thief gets in while nothing is revoked"
    );
    pair.control
        .meshctl(&format!("revoke token {id} --hosts"))
        .ok();
    wait_log(&call, "reset");
    refused_at_the_port(pair, &credential, "peer_revoked");
    let late = Agent::new(&pair.site.host("late"));
    let refused = late.join(&stolen_token);
    assert!(refused.stderr.contains("token_revoked"), "{refused}");
    // Who joined with another token goes on.
    assert!(!scene.held.log().contains("reset"), "{}", scene.held.log());
    refused_nowhere(pair);
}

/// The client's own certificate is as good as before.
#[track_caller]
fn refused_nowhere(pair: &Pair) {
    let sni = format!("echo.shop.{TRUST_DOMAIN}");
    let credential = stolen(pair);
    let host = &pair.client.host;
    let end = host.inside(|| knock(port(pair), &sni, Some(&credential)));
    assert_eq!(end, "accepted");
}

/// A damaged file is not an empty one: without control nobody is believed, in either direction.
#[test]
fn nobody_is_believed_while_the_list_can_not_be_read() {
    let mut pair = Pair::new("the_list_can_not_be_read");
    let _web = pair.web("http", "");
    let call = format!("curl -sS -m 10 -i http://{}/", mesh_name("web"));
    let served = |pair: &Pair| {
        wait_until("a served call", SOON, || {
            let answer = pair.cmd(&call).output();
            check(answer.stdout.ends_with("hello\n"), answer.to_string())
        });
    };
    served(&pair);
    let file = |agent: &Agent| agent.host.dir().join("state/revocations");
    for agent in [&pair.server, &pair.client] {
        wait_until("the list on disk", SOON, || {
            check(file(agent).exists(), "it is not there".to_owned())
        });
    }
    pair.control.stop();
    // With a list that is whole a restart without control costs nothing.
    pair.server.stop();
    pair.server.start();
    served(&pair);
    let refused = |pair: &Pair, agent: &Agent| {
        let before = agent.refused("revocations_unknown");
        let answer = pair.cmd(&call).output();
        assert!(answer.stdout.contains(" 503 "), "{answer}");
        agent.wait_refused("revocations_unknown", before);
    };
    pair.server.stop();
    std::fs::write(file(&pair.server), "meshwk1\nnothing").unwrap();
    pair.server.spawn();
    wait_until("the agent to take handshakes", SOON, || {
        let status = pair.server.command("status").stdout;
        check(status.contains("revocations  CAN NOT BE READ"), status)
    });
    refused(&pair, &pair.server);
    pair.control.run();
    served(&pair);
    pair.server.wait_ready();
    // And a caller's agent, which is the one to believe a server.
    pair.control.stop();
    pair.client.stop();
    std::fs::write(file(&pair.client), "").unwrap();
    pair.client.spawn();
    wait_until("the agent to refuse a call", SOON, || {
        let answer = pair.cmd(&call).output();
        assert!(!answer.status.success(), "it was served: {answer}");
        let counted = pair.client.refused("revocations_unknown");
        check(0.0 < counted, answer.to_string())
    });
    pair.control.run();
    served(&pair);
}

/// The backup is older than the revocation, and nothing else is left of control's own: agents know it.
#[test]
fn a_restored_control_hears_from_agents_what_was_revoked() {
    let scene = scene("a_restored_control_hears");
    let Scene { mut pair, held, .. } = scene;
    let unused = pair.control.token("--namespace shop");
    let file = pair.control.host.dir().join("backup");
    pair.control
        .meshctl(&format!("backup --out {}", file.display()))
        .ok();
    pair.control
        .meshctl("revoke workload shop/client --host client")
        .ok();
    wait_log(&held, "reset");
    pair.control.stop();
    let state = pair.control.state_dir();
    std::fs::remove_dir_all(state.join("store")).unwrap();
    std::fs::remove_dir_all(state.join("exports")).unwrap();
    let restored = pair.control.host.ok(&format!(
        "{} restore {} --state-dir {}",
        meshwork_tests::binary("mesh-control").display(),
        file.display(),
        state.display()
    ));
    assert!(
        restored.contains("0 revocations") && restored.contains("1 join tokens"),
        "{restored}"
    );
    pair.control.run();
    wait_until("agents to tell", SOON, || {
        let listed = pair.control.get("revocations");
        let told = listed.iter().any(|r| r["spec"]["account"] == "shop/client");
        check(told, format!("{listed:?}"))
    });
    refused_at_the_port(&pair, &stolen(&pair), "peer_revoked");
    let late = Agent::new(&pair.site.host("late"));
    let refused = late.join(&unused);
    assert!(refused.stderr.contains("token_revoked"), "{refused}");
}

/// The backup is older than the revocation; the store that it replaces knows it, and so do that one's exports. No agent says it.
#[test]
fn a_restore_keeps_what_the_store_or_its_exports_had_revoked() {
    let scene = scene("a_restore_keeps");
    let Scene { mut pair, held, .. } = scene;
    let file = pair.control.host.dir().join("backup");
    pair.control
        .meshctl(&format!("backup --out {}", file.display()))
        .ok();
    pair.control
        .meshctl("revoke workload shop/client --host client")
        .ok();
    wait_log(&held, "reset");
    pair.client.stop();
    pair.server.stop();
    pair.control.stop();
    let (host, state) = (&pair.control.host, pair.control.state_dir());
    let restored = |left: &str, gone: &str, more: &str| {
        let copy = host.dir().join(left).display().to_string();
        host.ok(&format!(
            "cp -a {} {copy} && rm -r {copy}/{gone}",
            state.display()
        ));
        let restored = host.ok(&format!(
            "{} restore {} --state-dir {copy} {more}",
            meshwork_tests::binary("mesh-control").display(),
            file.display(),
        ));
        assert!(restored.contains("1 revocations"), "{left}: {restored}");
        copy
    };
    restored("exports", "store", "");
    let copy = restored("store", "exports", "--force");
    host.ok(&format!("rm -r {0} && mv {copy} {0}", state.display()));
    pair.control.run();
    let listed = pair.control.get("revocations");
    let kept = listed.iter().any(|r| r["spec"]["account"] == "shop/client");
    assert!(kept, "{listed:?}");
}

/// The credential of its agent has ended, and so have its certificates; the key is the one that joined.
#[test]
fn a_host_that_was_off_for_forty_days_comes_back_without_a_token() {
    let mut pair = Pair::new("off_for_forty_days");
    let _web = pair.web("http", "");
    let url = format!("http://{}/", mesh_name("web"));
    assert_eq!(pair.ok(&format!("curl -sS -m 10 {url}")), "hello\n");
    pair.client.stop();
    let state = pair.client.host.dir().join("state");
    let uid = pair.control.get("hosts client")[0]["spec"]["uid"].clone();
    let uid = uid.as_str().unwrap();
    let ours = Authority::of_control(&pair.control.state_dir());
    let id = format!("spiffe://{TRUST_DOMAIN}/agent/{uid}");
    ours.age_agent(&state, &id, (-40, -10), uid);
    std::fs::remove_dir_all(state.join("leaves")).unwrap();
    pair.client.start();
    assert_eq!(pair.ok(&format!("curl -sS -m 10 {url}")), "hello\n");
    let audit = pair.control.get("audit");
    let again = |e: &&serde_json::Value| e["action"] == "rejoin" && e["outcome"] == "ok";
    assert_eq!(audit.iter().filter(again).count(), 1, "{audit:?}");
    let left = |agent: &Agent| {
        let identity = format!("agent/{uid}");
        let labels = [("identity", identity.as_str())];
        agent
            .metrics()
            .sum("mesh_certificate_remaining_seconds", &labels)
    };
    assert!(
        29.0 * 86_400.0 < left(&pair.client),
        "{}",
        left(&pair.client)
    );

    // A host that was removed meanwhile stays out.
    pair.client.stop();
    ours.age_agent(&state, &id, (-40, -10), uid);
    pair.control.meshctl("revoke host client").ok();
    pair.client.spawn();
    wait_until("the removed host to be refused", SOON, || {
        let audit = pair.control.get("audit");
        let refused =
            |e: &&serde_json::Value| e["action"] == "rejoin" && e["reason"] == "host_revoked";
        let count = audit.iter().filter(refused).count();
        check(0 < count, format!("{audit:?}"))
    });
}

/// What people must replace is counted down where they look.
#[test]
fn the_life_of_root_and_issuer_and_the_bundle_in_use_are_shown() {
    let pair = Pair::new("the_life_of_root_and_issuer");
    let metrics = pair.control.metrics();
    for (certificate, days) in [("root", 3649.0), ("issuer", 364.0)] {
        let labels = [("certificate", certificate)];
        let left = metrics.sum("mesh_control_certificate_remaining_seconds", &labels);
        assert!(days * 86_400.0 < left, "{certificate}: {left}");
    }
    let status = pair.control.meshctl("status -o json").ok();
    let status: serde_json::Value = serde_json::from_str(&status).unwrap();
    assert_eq!(status["certificates"][0]["alarm"], serde_json::Value::Null);
    let bundle = &status["bundle"];
    wait_until("both hosts to acknowledge the bundle", SOON, || {
        let hosts = pair.control.get("hosts");
        let in_use = |h: &&serde_json::Value| h["status"]["acknowledged"]["bundle"] == *bundle;
        let count = hosts.iter().filter(in_use).count();
        check(count == 2, format!("{hosts:?}"))
    });
}
