//! Instances and hosts that fail: others answer in their place, and when none is left the caller is told what failed.

use meshwork_tests::agent::Agent;
use meshwork_tests::control::TokenOptions;
use meshwork_tests::process::Process;
use meshwork_tests::servers;
use meshwork_tests::wait::{SOON, check, wait_until};

use crate::pair::{Pair, mesh_name, owner};

/// Calls of a client beside a dead instance.
const CALLS: usize = 40;
/// Of these may be tried at a dead instance before its turn comes no more: those that eject it, and a probe or two.
const ASKED_MAX: f64 = 8.0;

/// A protocol that is nobody's: the answer to a line names who answers.
const ECHO: &str = "\
import os, socket, threading
def serve(c):
    try:
        c.sendall(os.environ['NAME'].encode() + b' ' + c.recv(100))
    except OSError: pass
    c.close()
s = socket.create_server(('0.0.0.0', 9000))
while True: threading.Thread(target=serve, args=(s.accept()[0],), daemon=True).start()
";

const CALL: &str = "\
import os, socket
for i in range(int(os.environ['CALLS'])):
    got = b''
    try:
        c = socket.create_connection(('echo.shop.mesh.internal', 9000), 20)
        c.sendall(b'\\0call\\n')
        while True:
            part = c.recv(100)
            if not part: break
            got += part
    except ConnectionResetError: got += b'reset'
    print(got, flush=True)
";

/// Declares `shop/<name>` without a health check: control goes on listing it, and only a call can tell.
fn declare_unchecked(agent: &Agent, name: &str, port: u16, protocol: &str) {
    let line = agent.owner_line(&owner(name));
    let file = format!(
        "namespace = \"shop\"\n[owner]\n{line}\n[[service]]\nports = [{{ port = {port}, protocol = \"{protocol}\" }}]\n"
    );
    agent.write_file(&format!("{name}.toml"), &file);
}

fn has_reason(answer: &str, reason: &str) -> bool {
    let header = format!("x-meshwork-reason: {reason}\r\n");
    answer.contains(" 503 ") && answer.to_lowercase().contains(&header)
}

/// `name` or `name:port` as a URL.
fn url(service: &str) -> String {
    let (name, port) = service.split_once(':').unwrap_or((service, "80"));
    format!("http://{}:{port}/", mesh_name(name))
}

/// Calls over HTTP until the answer is this refusal, which must be counted at the caller.
#[track_caller]
fn wait_refused(pair: &Pair, service: &str, reason: &str) {
    let before = pair.client.refused(reason);
    let line = format!("curl -sS -m 25 -i {}", url(service));
    wait_until(&format!("the refusal for {reason}"), SOON, || {
        let output = pair.cmd(&line).output();
        check(has_reason(&output.stdout, reason), output.to_string())
    });
    pair.client.wait_refused(reason, before);
}

#[track_caller]
fn wait_answered(pair: &Pair, service: &str) {
    let line = format!("curl -sS -m 10 {}", url(service));
    wait_until("the call to be answered", SOON, || {
        let output = pair.cmd(&line).output();
        check(output.stdout == "hello\n", output.to_string())
    });
}

/// Calls of the client, one after the other; what each got is a line.
#[track_caller]
fn calls(pair: &Pair, count: usize) -> String {
    let call = pair.client.host.python("call", CALL);
    let call = call.env("CALLS", &count.to_string());
    call.cgroup("client").ok()
}

/// The app of one instance is dead, and nobody but the calls finds out. Returns with its agent and the other's app.
fn a_dead_app_beside_a_living_one(protocol: &str) -> (Pair, Agent, Process) {
    let pair = Pair::new(&format!("a_dead_app_beside_a_living_one_{protocol}"));
    let token = TokenOptions::default();
    let second = pair.control.join(&pair.site.host("second"), &token);
    let [living, dead] = [&pair.server, &second].map(|agent| {
        let host = &agent.host;
        let echo = host.python("echo", ECHO).env("NAME", host.name());
        let echo = echo.cgroup("echo").spawn("echo");
        host.wait_listening(9000, SOON);
        declare_unchecked(agent, "echo", 9000, protocol);
        echo
    });
    pair.control.wait_endpoints("shop/echo", 2);
    pair.wait_name("echo");
    dead.kill9();
    let text = calls(&pair, CALLS);
    let answered = text.matches("server").count();
    assert_eq!(answered, CALLS, "{protocol}: {text}");
    let asked = second.refused("app_unreachable");
    assert!(
        (1.0..=ASKED_MAX).contains(&asked),
        "the dead instance was asked {asked} times"
    );
    (pair, second, living)
}

/// One instance is dead, then both: calls are answered by the other, and at the end the caller is told what failed.
fn passed_over(protocol: &str) {
    let (pair, _second, living) = a_dead_app_beside_a_living_one(protocol);
    living.kill9();
    let before = [&pair.client, &pair.server].map(|agent| agent.refused("app_unreachable"));
    assert!(calls(&pair, 1).contains("reset"));
    pair.client.wait_refused("app_unreachable", before[0]);
    pair.server.wait_refused("app_unreachable", before[1]);
}

#[test]
fn a_dead_app_is_passed_over_on_a_tcp_port() {
    passed_over("tcp");
}

#[test]
fn a_dead_app_is_passed_over_on_an_auto_port() {
    passed_over("auto");
}

#[test]
fn an_app_that_is_gone_is_app_unreachable() {
    let pair = Pair::new("an_app_that_is_gone");
    let hello = "location / { return 200 \"hello\\n\"; }";
    let web = servers::nginx(&pair.server.host, "web", 80, hello);
    declare_unchecked(&pair.server, "web", 80, "http");
    pair.control.wait_endpoints("shop/web", 1);
    pair.wait_name("web");
    wait_answered(&pair, "web");
    web.kill9();
    let before = pair.server.refused("app_unreachable");
    wait_refused(&pair, "web", "app_unreachable");
    pair.server.wait_refused("app_unreachable", before);
    let _web = servers::nginx(&pair.server.host, "web", 80, hello);
    wait_answered(&pair, "web");
}

#[test]
fn a_host_whose_agent_is_gone_is_peer_unreachable() {
    let mut pair = Pair::new("a_host_whose_agent_is_gone");
    let _web = pair.web("http", "");
    wait_answered(&pair, "web");
    pair.server.kill9();
    wait_refused(&pair, "web", "peer_unreachable");
    pair.server.start();
    wait_answered(&pair, "web");
}

/// Its packets go nowhere, and there is no kept connection that could be lost.
#[test]
fn a_host_whose_link_is_down_is_peer_unreachable() {
    let pair = Pair::new("a_host_whose_link_is_down");
    let _web = pair.web("http", "");
    pair.server.host.set_link(false);
    wait_refused(&pair, "web", "peer_unreachable");
    pair.server.host.set_link(true);
    wait_answered(&pair, "web");
}

/// The name is known from the index; where it is, nobody has asked before control was gone.
#[test]
fn a_service_that_was_never_asked_for_is_endpoints_unknown_without_control() {
    let mut pair = Pair::new("a_service_that_was_never_asked_for");
    let _web = pair.web("http", "");
    let location = "location / { return 200 \"hello\\n\"; }";
    let _other = servers::nginx(&pair.server.host, "other", 81, location);
    pair.declare("other", 81, "http");
    wait_answered(&pair, "web");
    pair.control.kill9();
    wait_refused(&pair, "other:81", "endpoints_unknown");
    // What was asked for before goes on.
    wait_answered(&pair, "web");
    pair.control.run();
    wait_answered(&pair, "other:81");
}
