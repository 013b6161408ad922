//! HTTP/2 as the agents treat it beyond single requests: undeclared ports, heads that never end, silence, servers
//! without an agent.

use std::net::SocketAddr;

use mesh_api::header::{Header, StreamKind};
use mesh_core::reason::Reason;
use meshwork_tests::agent::MESH_PORT;
use meshwork_tests::control::TRUST_DOMAIN;
use meshwork_tests::mesh::{Authority, begin_on_stream, begin_streams};
use meshwork_tests::wait::{SOON, check, wait_until};

use crate::http2::{pair, run, serve};
use crate::pair::{Pair, spiffe};
use crate::unjoined::declare;

/// What a peer sees of a stream of this kind that begins so and goes no further.
#[track_caller]
fn begun(pair: &Pair, kind: StreamKind, bytes: &[u8]) -> Option<Reason> {
    let ours = Authority::of_control(&pair.control.state_dir());
    let uid = "00112233445566778899aabbccddeeff";
    let client = ours.leaf(&[&spiffe("client")], (-1, 1), Some(uid));
    let address = SocketAddr::from((pair.server.host.v4(), MESH_PORT));
    let sni = format!("h2.shop.{TRUST_DOMAIN}");
    let mut header = Vec::new();
    Header {
        kind,
        service: "h2".parse().unwrap(),
        port: 8080,
    }
    .encode(&mut header);
    let host = &pair.client.host;
    host.inside(|| begin_on_stream(address, &sni, &client, &header, bytes))
}

/// On a port of unknown protocol HTTP/2 is what it is by its preface, though this app speaks first: each request is
/// balanced, counted and told who calls, and nobody passes a forged identity as bytes.
#[test]
fn http2_is_known_where_the_protocol_is_not_declared() {
    let pair = Pair::new("h2_auto");
    let server = serve(&pair.server.host, &[]);
    pair.declare("h2", 8080, "auto");
    let text = run(
        &pair,
        "\
c = Client()
for _ in range(20): c.get('/number')
more = [('x-meshwork-client-id', 'spiffe://boss')]
print(c.get('/fields', more=more)[1].decode())
# Slowly, byte by byte, and with the app's own settings under way.
sock = dial()
for byte in PREFACE:
    sock.sendall(bytes([byte]))
    time.sleep(0.01)
sock.sendall(frame(4, 0, 0) + frame(1, 5, 1, hpack.Encoder().encode(
    [(':method', 'GET')] + HEAD[1:3] + [(':path', '/fields'), ('x-meshwork-client-id', 'spiffe://boss')])))
got = b''
while b'ours=' not in got: got += sock.recv(65536)
print(got[got.index(b'ours='):].split()[0].decode())
",
    );
    let ours = format!("ours=x-meshwork-client-id={}", spiffe("client"));
    assert_eq!(text, format!("never= {ours} notes=\n{ours}\n"));
    wait_until("each request to be counted", SOON, || {
        let labels = [("direction", "Inbound"), ("status", "2xx")];
        let count = pair.server.metrics().sum("mesh_requests_total", &labels);
        check(count == 22.0, format!("{count} requests"))
    });
    let log = server.log();
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
    let refused = begun(&pair, StreamKind::Auto, preface);
    assert_eq!(refused, Some(Reason::HttpMalformed));
    assert_eq!(server.log(), log, "nothing of it reached the app");
}

#[test]
fn a_head_from_another_agent_that_never_ends_is_given_up() {
    let (mut pair, _server) = pair("h2_slow_head");
    pair.server.stop();
    pair.server.configure("[timeouts]\nhead_s = 1\n");
    pair.server.start();
    pair.control.wait_endpoints("shop/h2", 1);
    let refused = begun(&pair, StreamKind::Http2, &[0, 0, 100, 0, 0, 0, 3, b'G']);
    assert_eq!(refused, Some(Reason::Timeout));
    let labels = [("limit", "head")];
    let metrics = pair.server.metrics();
    assert_eq!(metrics.sum("mesh_limit_reached_total", &labels), 1.0);
}

/// Whose heads never end has half of what there is for them, and others go on.
#[test]
fn unfinished_heads_of_other_agents_hold_a_bounded_amount() {
    let (pair, _server) = pair("h2_many_heads");
    let script = "\
c = Client()
print(c.get('/')[1])
";
    // A head of 60,000 bytes that says it has one more.
    let length = 60_001_u32.to_be_bytes();
    let mut bytes = vec![length[1], length[2], length[3], 0];
    bytes.resize(bytes.len() + 60_000, 0);
    let ours = Authority::of_control(&pair.control.state_dir());
    let uid = "00112233445566778899aabbccddeeff";
    let hostile = ours.leaf(&[&spiffe("hostile")], (-1, 1), Some(uid));
    let address = SocketAddr::from((pair.server.host.v4(), MESH_PORT));
    let sni = format!("h2.shop.{TRUST_DOMAIN}");
    let mut header = Vec::new();
    Header {
        kind: StreamKind::Http2,
        service: "h2".parse().unwrap(),
        port: 8080,
    }
    .encode(&mut header);
    let begin = || begin_streams(address, &sni, &hostile, &header, &bytes, 700);
    let refused = pair.client.host.inside(begin);
    assert_eq!(refused, Reason::Overloaded);
    let labels = [("limit", "heads")];
    let reached = pair
        .server
        .metrics()
        .sum("mesh_limit_reached_total", &labels);
    assert!(reached >= 1.0, "counted {reached} times");
    assert_eq!(run(&pair, script), "b'hello'\n");
}

/// A connection is not idle while a call is open on it, however little that says.
#[test]
fn an_open_call_is_no_idle_connection() {
    let (mut pair, _server) = pair("h2_idle");
    for agent in [&mut pair.client, &mut pair.server] {
        agent.stop();
        agent.configure("[timeouts]\nidle_s = 2\n");
        agent.start();
    }
    pair.control.wait_endpoints("shop/h2", 1);
    pair.wait_name("h2");
    let text = run(
        &pair,
        "\
c = Client()
stream = c.h2.get_next_available_stream_id()
c.h2.send_headers(stream, [(':method', 'CONNECT'), (':authority', 'other:80')])
c.flush()
c.read(stream, lambda event: isinstance(event, ev.ResponseReceived))
for _ in range(12):
    time.sleep(0.5)
    c.h2.send_data(stream, b'x')
    c.flush()
    assert c.read(stream, lambda event: isinstance(event, ev.DataReceived))[1] == b'X'
c.h2.end_stream(stream)
c.flush()
print(c.read(stream)[4])
",
    );
    assert_eq!(text, "end\n");
    let labels = [("limit", "idle")];
    for agent in [&pair.client, &pair.server] {
        let reached = agent.metrics().sum("mesh_limit_reached_total", &labels);
        assert_eq!(reached, 0.0, "nothing was cut");
    }
    let text = run(&pair, "c = Client()\nc.get('/')\nprint(c.read(None)[4])\n");
    assert_eq!(text, "closed\n", "an idle connection is");
    let reached = pair
        .client
        .metrics()
        .sum("mesh_limit_reached_total", &labels);
    assert_eq!(reached, 1.0);
}

#[test]
fn requests_of_one_connection_take_turns_among_servers_without_an_agent() {
    let pair = Pair::new("h2_fronted");
    let [one, two] = ["one", "two"].map(|name| pair.site.host(name));
    let first = serve(&one, &[]);
    let _second = serve(&two, &[]);
    let endpoints = [one.v4(), two.v4()].map(|ip| format!("{ip}:8080"));
    declare(
        &pair,
        "h2",
        "port = 8080, protocol = \"http2\"",
        &endpoints,
        "",
    );
    let ask = "c = Client()\nfor _ in range(20): print(c.get('/number')[1].decode())\n";
    let text = run(&pair, ask);
    let of = |name: &str| text.lines().filter(|line| line.starts_with(name)).count();
    assert_eq!((of("one "), of("two ")), (10, 10), "{text}");
    // One connection to each carries them all.
    assert!(text.lines().all(|line| line.ends_with(" 1")), "{text}");
    drop(first);
    let text = run(&pair, ask);
    assert_eq!(text.matches("two ").count(), 20, "{text}");
}
