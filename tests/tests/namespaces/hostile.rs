//! What a hostile caller, a hostile peer or a dying process must not achieve.

use std::fs;
use std::net::SocketAddr;

use mesh_api::header::{Header, StreamKind};
use mesh_core::reason::Reason;
use meshwork_tests::agent::{Agent, MESH_PORT};
use meshwork_tests::control::TRUST_DOMAIN;
use meshwork_tests::mesh::{Authority, open_stream};
use meshwork_tests::site::Site;
use meshwork_tests::wait::{SOON, check, wait_until};

use crate::pair::{Pair, spiffe};

/// Sends bytes to a service by its name and shows what comes back.
const RAW: &str = r#"
import socket, sys
s = socket.create_connection(("NAME", 80), 10)
s.sendall(b"TEXT")
s.settimeout(10)
try:
    while True:
        b = s.recv(4096)
        if not b: break
        sys.stdout.write(b.decode("latin-1"))
except OSError as e:
    print("broken:", e)
"#;

/// An app that counts the POSTs it gets, closes after each without an answer, and hangs at /slow.
const APP: &str = r#"
import socket, threading
posts = 0
def serve(c):
    global posts
    data = b""
    while True:
        while b"\r\n\r\n" not in data:
            b = c.recv(4096)
            if not b: return c.close()
            data += b
        head, data = data.split(b"\r\n\r\n", 1)
        if head.startswith(b"POST"):
            posts += 1
            print("posts", posts, flush=True)
            return c.close()
        if b"/slow" in head:
            print("slow", flush=True)
            if not c.recv(1): return c.close()
        c.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
s = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
s.bind(("0.0.0.0", 80)); s.listen(512)
while True:
    c, _ = s.accept()
    threading.Thread(target=serve, args=(c,), daemon=True).start()
"#;

fn descriptors(agent: &Agent) -> usize {
    fs::read_dir(format!("/proc/{}/fd", agent.worker())).map_or(0, Iterator::count)
}

/// However a program writes its request on a port of unknown protocol, the server never reads an identity that the
/// mesh did not write.
#[test]
fn no_form_of_a_request_carries_a_forged_identity() {
    let pair = Pair::new("no_form_of_a_request_carries");
    let _web = pair.web("auto", "");
    let forged = r"Host: a\r\nConnection: close\r\nX-Meshwork-Client-Id: spiffe://corp.test/ns/shop/sa/boss\r\n\r\n";
    let long = format!("GET /{} HTTP/1.1", "x".repeat(9_000));
    for line in [
        r"GET / HTTP/1.1",
        r"\r\nGET / HTTP/1.1",
        r"\n\n\r\nGET / HTTP/1.1",
        r"GET /\xc3\xa9 HTTP/1.1",
        r"A_METHOD_LONGER_THAN_ANY_THAT_IS_KNOWN / HTTP/1.1",
        r"GET http://a/ HTTP/1.0",
        long.as_str(),
    ] {
        let text = format!(r"{line}\r\n{forged}");
        let name = crate::pair::mesh_name("web");
        let script = RAW.replace("NAME", &name).replace("TEXT", &text);
        let answer = pair
            .client
            .host
            .python("raw", &script)
            .cgroup("client")
            .output();
        let log = meshwork_tests::servers::access_log(&pair.server.host, "web");
        assert!(!log.contains("boss"), "{line}: {log}\n{}", answer.stdout);
    }
    let log = meshwork_tests::servers::access_log(&pair.server.host, "web");
    assert!(
        log.contains(&spiffe("client")),
        "no request came through at all: {log}"
    );
}

/// How the bytes of a port are read is said where it is declared: a peer can not choose.
#[test]
fn a_peer_can_not_pass_requests_as_bytes() {
    let pair = Pair::new("a_peer_can_not_pass_requests");
    let _web = pair.web("http", "");
    let ours = Authority::of_control(&pair.control.state_dir());
    let uid = "00112233445566778899aabbccddeeff";
    let client = ours.leaf(&[&spiffe("client")], (-1, 1), Some(uid));
    let address = SocketAddr::from((pair.server.host.v4(), MESH_PORT));
    let sni = format!("web.shop.{TRUST_DOMAIN}");
    for kind in [StreamKind::Tcp, StreamKind::Auto] {
        let mut header = Vec::new();
        Header {
            kind,
            service: "web".parse().unwrap(),
            port: 80,
        }
        .encode(&mut header);
        let asked = pair
            .client
            .host
            .inside(|| open_stream(address, &sni, &client, &header));
        assert_eq!(asked, Some(Reason::HeaderMalformed), "{kind:?}");
    }
}

/// Calls whose callers went away hold nothing at either agent, however long the app would have taken.
#[test]
fn callers_that_go_away_leave_nothing_behind() {
    let pair = Pair::new("callers_that_go_away");
    let app = pair
        .server
        .host
        .python("app", APP)
        .cgroup("web")
        .spawn("web");
    pair.declare("web", 80, "http");
    let before = [&pair.server, &pair.client].map(descriptors);
    let script = r#"
import os, socket, struct, time
all = []
for _ in range(100):
    s = socket.create_connection(("NAME", 80), 10)
    s.sendall(b"GET /slow HTTP/1.1\r\nHost: a\r\n\r\n")
    all.append(s)
while not os.path.exists("GO"): time.sleep(0.01)
for s in all:
    s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    s.close()
print("gone")
"#;
    let go = pair.client.host.dir().join("go");
    let script = script
        .replace("NAME", &crate::pair::mesh_name("web"))
        .replace("GO", &go.display().to_string());
    let callers = pair
        .client
        .host
        .python("leave", &script)
        .cgroup("client")
        .spawn("leave");
    wait_until("the app to have all requests", SOON, || {
        let asked = app.log().matches("slow").count();
        if asked == 100 {
            Ok(())
        } else {
            Err(format!("{asked} of 100; {}", callers.log()))
        }
    });
    assert!(
        descriptors(&pair.server) >= before[0] + 100,
        "the calls hold nothing to begin with"
    );
    fs::write(&go, "").unwrap();
    wait_until("the callers to go", SOON, || {
        if callers.log().contains("gone") {
            Ok(())
        } else {
            Err(callers.log())
        }
    });
    wait_until("the agents to let go", SOON, || {
        let now = [&pair.server, &pair.client].map(descriptors);
        let kept = now
            .iter()
            .zip(before)
            .map(|(now, before)| now.saturating_sub(before))
            .max();
        if kept < Some(20) {
            Ok(())
        } else {
            Err(format!("{before:?} before, {now:?} now"))
        }
    });
    drop(app);
}

/// A kept connection to an app closes under a request: what may not be done twice is not done twice.
#[test]
fn a_post_is_never_done_twice() {
    let pair = Pair::new("a_post_is_never_done_twice");
    let app = pair
        .server
        .host
        .python("app", APP)
        .cgroup("web")
        .spawn("web");
    pair.declare("web", 80, "http");
    let url = format!("http://{}", crate::pair::mesh_name("web"));
    pair.ok(&format!("curl -sS -m 20 {url}/"));
    let answer = pair.ok(&format!(
        "curl -sS -m 20 -o /dev/null -w %{{http_code}}:%header{{x-meshwork-reason}} -X POST -H Content-Length:0 {url}/pay"
    ));
    assert_eq!(answer.trim(), "502:app_reset");
    wait_until("the app to count", SOON, || {
        let log = app.log();
        if log.contains("posts 1") {
            Ok(())
        } else {
            Err(log)
        }
    });
    assert!(!app.log().contains("posts 2"), "{}", app.log());
    assert!(
        pair.server.metrics().sum("mesh_app_reused_total", &[]) >= 1.0,
        "no kept connection was used"
    );
}

/// Handshakes that never end, from a host that has no identity, cost the others nothing.
#[test]
fn half_open_handshakes_lock_nobody_out() {
    let pair = Pair::new("half_open_handshakes");
    let _web = pair.web("http", "");
    let rogue = pair.site.host("rogue");
    let script = r#"
import socket, threading
all = []
for _ in range(2000):
    try:
        s = socket.create_connection(("HOST", 7441), 2)
        all.append(s)
        s.sendall(b"\x16\x03\x01")
    except OSError as e:
        last = e
print("open", flush=True)
threading.Event().wait()
"#;
    let script = script.replace("HOST", &pair.server.host.v4().to_string());
    let flood = rogue.python("flood", &script).spawn("flood");
    wait_until("the flood to stand", SOON, || {
        if flood.log().contains("open") {
            Ok(())
        } else {
            Err(flood.log())
        }
    });
    // A new connection of a peer, and the flooded host's own calls.
    let url = format!("http://{}/", crate::pair::mesh_name("web"));
    assert_eq!(pair.ok(&format!("curl -sS -m 5 {url}")).trim(), "hello");
    assert!(
        pair.server.refused("overloaded") > 500.0,
        "nothing was shed"
    );
}

/// What spares others is that handshakes are counted by address: who has many addresses takes all places, for as long as a
/// handshake may last. (The last quarter is for addresses with few, so it takes more than thirty of them.)
#[test]
fn half_open_handshakes_of_many_addresses_take_all_places() {
    let mut pair = Pair::new("half_open_of_many_addresses");
    let _web = pair.web("http", "");
    pair.server.stop();
    pair.server
        .configure("[timeouts]\nhandshake_s = 600\n[limits]\nthreads = 1\n");
    pair.server.start();
    pair.control.wait_endpoints("shop/web", 1);
    let rogue = pair.site.host("rogue");
    rogue.ok("for n in $(seq 100 145); do ip address add 10.77.0.$n/24 dev eth0; done");
    let script = r#"
import socket, threading
all = []
for n in range(100, 146):
    for _ in range(260 if n < 103 else 10):
        s = socket.socket()
        s.settimeout(2)
        s.bind(("10.77.0.%d" % n, 0))
        try:
            s.connect(("HOST", 7441))
            s.sendall(b"\x16\x03\x01")
            all.append(s)
        except OSError: pass
print("open", flush=True)
threading.Event().wait()
"#;
    let script = script.replace("HOST", &pair.server.host.v4().to_string());
    let flood = rogue.python("flood", &script).spawn("flood");
    wait_until("the flood to stand", SOON, || {
        check(flood.log().contains("open"), flood.log())
    });
    // It has no connection from before.
    pair.client.kill_worker();
    let call = format!("curl -sS -m 20 http://{}/", crate::pair::mesh_name("web"));
    let output = pair.cmd(&call).output();
    assert!(!output.stdout.contains("hello"), "{output}");
    assert!(pair.server.refused("overloaded") > 0.0);
    flood.kill9();
    wait_until("a call when the flood is gone", SOON, || {
        let output = pair.cmd(&call).output();
        check(output.stdout == "hello\n", output.to_string())
    });
}

/// What `cargo xtask demo --attack` shows: each attack fails, and an operator can see it.
#[test]
fn the_attacks_of_the_demonstration_fail() {
    let site = Site::new("attacks_of_the_demonstration");
    meshwork_tests::attack::run(&site);
}
