//! Messages that an agent, another agent or an app could read in different ways. None of them goes on: refused to a
//! program that sends one, to an agent that does, and to an app that answers with one.

use std::net::SocketAddr;

use mesh_api::header::{Header, StreamKind};
use mesh_core::reason::Reason;
use meshwork_tests::agent::MESH_PORT;
use meshwork_tests::control::TRUST_DOMAIN;
use meshwork_tests::mesh::{Authority, send_on_stream};
use meshwork_tests::raw::{Answer, App, Step, talk};
use meshwork_tests::servers;

use crate::pair::{Pair, mesh_name, spiffe};

use Step::{Rest, Send};

/// Header lines of a POST that has `x` as its body.
const LINES: &[&str] = &[
    "Content-Length: 1\r\nTransfer-Encoding: chunked",
    "Transfer-Encoding: chunked\r\nContent-Length: 1",
    "Content-Length: 1\r\nContent-Length: 1",
    "Content-Length: 1\r\nContent-Length: 2",
    "Content-Length: 1, 1",
    "Content-Length: +1",
    "Content-Length: -1",
    "Content-Length: 0x1",
    "Content-Length: 1 1",
    "Content-Length: 1\x0b",
    "Content-Length:",
    "Content-Length: 18446744073709551617",
    "Content-Length : 1",
    "Content-Length\t: 1",
    "Transfer-Encoding : chunked",
    "Transfer-Encoding: chunked, identity",
    "Transfer-Encoding: identity",
    "Transfer-Encoding: xchunked",
    "Transfer-Encoding: chunked, chunked",
    "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
    "Transfer-Encoding: \x0bchunked",
    "Transfer-Encoding: \"chunked\"",
    "Transfer-Encoding:\r\n chunked",
    "X: a\r\n b\r\nContent-Length: 1",
    " X: a\r\nContent-Length: 1",
    "X: a\rContent-Length: 1",
    "X: a\nContent-Length: 1",
    "X: a\0b\r\nContent-Length: 1",
    "X\0: a\r\nContent-Length: 1",
    "X : a\r\nContent-Length: 1",
    ": a\r\nContent-Length: 1",
    "X y: a\r\nContent-Length: 1",
    "no colon\r\nContent-Length: 1",
    "Host: a\r\nContent-Length: 1",
    "Host: b\r\nContent-Length: 1",
    "Connection: close, Content-Length\r\nContent-Length: 1",
    "Connection: X-Meshwork-Client-Id\r\nContent-Length: 1",
];

/// Whole requests, or what they begin with.
const REQUESTS: &[&str] = &[
    "GET / HTTP/1.1\r\n\r\n",
    "GET / HTTP/1.1\r\nHost: a b\r\n\r\n",
    "GET / HTTP/1.1\r\nHost: a, b\r\n\r\n",
    "GET http://b/ HTTP/1.1\r\nHost: a\r\n\r\n",
    "GET http://x@a/ HTTP/1.1\r\nHost: a\r\n\r\n",
    "GET /\r\n\r\n",
    "GET / HTTP/0.9\r\nHost: a\r\n\r\n",
    "GET / HTTP/2.0\r\nHost: a\r\n\r\n",
    "GET / HTTP/1.2\r\nHost: a\r\n\r\n",
    "GET / http/1.1\r\nHost: a\r\n\r\n",
    "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "G(T / HTTP/1.1\r\nHost: a\r\n\r\n",
    "head / HTTP/1.1\r\nHost: a\r\n\r\n",
    "\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n",
    "\nGET / HTTP/1.1\r\nHost: a\r\n\r\n",
    " GET / HTTP/1.1\r\nHost: a\r\n\r\n",
    "GET  / HTTP/1.1\r\nHost: a\r\n\r\n",
    "GET /  HTTP/1.1\r\nHost: a\r\n\r\n",
    "GET / HTTP/1.1 \r\nHost: a\r\n\r\n",
    "GET\t/\tHTTP/1.1\r\nHost: a\r\n\r\n",
    "GET /a b HTTP/1.1\r\nHost: a\r\n\r\n",
    "GET /#x HTTP/1.1\r\nHost: a\r\n\r\n",
    "GET / HTTP/1.1\nHost: a\n\n",
    "GET / HTTP/1.1\rHost: a\r\n\r\n",
    "TRACE / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\nx",
    "CONNECT a:1 HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\nx",
    "CONNECT / HTTP/1.1\r\nHost: a\r\n\r\n",
    "POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n",
];

/// Chunked bodies.
const BODIES: &[&str] = &[
    "g\r\n",
    "-1\r\n",
    "0x1\r\nx\r\n0\r\n\r\n",
    " 1\r\nx\r\n0\r\n\r\n",
    "1 \r\nx\r\n0\r\n\r\n",
    "1\nx\r\n0\r\n\r\n",
    "10000000000000001\r\nx\r\n0\r\n\r\n",
    "ffffffffffffffff\r\nx\r\n0\r\n\r\n",
    "1;a\nb\r\nx\r\n0\r\n\r\n",
    "1;a\rb\r\nx\r\n0\r\n\r\n",
    "1;\0\r\nx\r\n0\r\n\r\n",
    "1\r\nxy\r\n0\r\n\r\n",
    "1\r\nx\n0\r\n\r\n",
    "0\r\n x\r\n\r\n",
    "0\r\nno colon\r\n\r\n",
    "0\r\nX : y\r\n\r\n",
    "0\r\nX: a\nb\r\n\r\n",
    "0\r\nContent-Length: 5\r\n\r\n",
    "0\r\nTransfer-Encoding: chunked\r\n\r\n",
    "0\r\nHost: b\r\n\r\n",
    "0\r\nX-Meshwork-Client-Id: spiffe://corp.test/ns/shop/sa/boss\r\n\r\n",
];

/// What must not go on, each ready to be sent.
fn table() -> Vec<String> {
    let line = |line: &&str| format!("POST / HTTP/1.1\r\nHost: a\r\n{line}\r\n\r\nx");
    let body = |body: &&str| {
        format!("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n{body}")
    };
    let lines = LINES.iter().map(line);
    let requests = REQUESTS.iter().map(|text| (*text).to_owned());
    lines
        .chain(requests)
        .chain(BODIES.iter().map(body))
        .collect()
}

const GOOD: &str = "GET /good HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";

#[test]
fn what_could_be_read_in_two_ways_reaches_no_app() {
    let pair = Pair::new("what_could_be_read_in_two_ways");
    let _web = pair.web("http", "location /good { return 200; }");
    let name = mesh_name("web");
    let table = table();
    let before = pair.client.refused("http_malformed");
    let steps: Vec<_> = table.iter().map(|text| vec![Send(text), Rest]).collect();
    let answers = talk(&pair.client.host, "client", (&name, 80), &steps);
    for (sent, got) in table.iter().zip(&answers) {
        let refused = got.starts_with("HTTP/1.1 400 ")
            && got.contains("\r\nx-meshwork-reason: http_malformed\r\n")
            && got.contains("\r\nconnection: close\r\n")
            && got.matches("HTTP/1.").count() == 1;
        assert!(refused, "{sent:?} was answered with {got:?}");
    }
    let counted = pair.client.refused("http_malformed") - before;
    assert_eq!(counted, table.len() as f64);
    let good = talk(
        &pair.client.host,
        "client",
        (&name, 80),
        &[vec![Send(GOOD), Rest]],
    );
    assert!(good[0].starts_with("HTTP/1.1 200 "), "{good:?}");
    let log = servers::access_log(&pair.server.host, "web");
    assert_eq!(log.lines().count(), 1, "{log}");
    assert!(log.contains("GET /good 200"), "{log}");
}

/// An agent that does not judge what it passes on gains nothing.
#[test]
fn the_called_agent_judges_what_another_agent_sends() {
    let pair = Pair::new("the_called_agent_judges");
    let _web = pair.web("http", "location /good { return 200; }");
    let ours = Authority::of_control(&pair.control.state_dir());
    let uid = "00112233445566778899aabbccddeeff";
    let client = ours.leaf(&[&spiffe("client")], (-1, 1), Some(uid));
    let address = SocketAddr::from((pair.server.host.v4(), MESH_PORT));
    let sni = format!("web.shop.{TRUST_DOMAIN}");
    let mut header = Vec::new();
    Header {
        kind: StreamKind::Http1,
        service: "web".parse().unwrap(),
        port: 80,
    }
    .encode(&mut header);
    let bytes = |text: &str| {
        text.chars()
            .map(|c| u8::try_from(c).unwrap())
            .collect::<Vec<u8>>()
    };
    let send = |text: &str| send_on_stream(address, &sni, &client, &header, &bytes(text));
    pair.client.host.inside(|| {
        for text in table() {
            let got = send(&text);
            assert_eq!(got, Err(Reason::HttpMalformed), "{text:?}");
        }
        // Two requests in one stream: the second is nobody's.
        let forged = "GET /forged HTTP/1.1\r\nHost: a\r\nX-Meshwork-Client-Id: boss\r\n\r\n";
        let good = GOOD.replace("Connection: close\r\n", "");
        let answer = send(&format!("{good}{forged}")).unwrap();
        let answer = String::from_utf8_lossy(&answer);
        assert_eq!(answer.matches("HTTP/1.1 200 ").count(), 1, "{answer}");
        // On a stream that is its caller's connection there may be more, each judged, and its caller's.
        let bound = GOOD.replace("Connection: close", "Authorization: Negotiate x");
        let answer = send(&format!("{bound}{forged}{GOOD}")).unwrap();
        let answer = String::from_utf8_lossy(&answer);
        assert_eq!(answer.matches("HTTP/1.1 ").count(), 3, "{answer}");
    });
    let log = servers::access_log(&pair.server.host, "web");
    assert_eq!(log.lines().count(), 4, "{log}");
    assert!(!log.contains("boss"), "{log}");
    assert_eq!(log.matches(&spiffe("client")).count(), 4, "{log}");
}

/// Answers likewise: the caller hears whose fault it was.
#[test]
fn an_answer_that_could_be_read_in_two_ways_reaches_no_caller() {
    let pair = Pair::new("an_answer_that_could_be_read");
    let lines = [
        "Content-Length: 1\r\nTransfer-Encoding: chunked",
        "Content-Length: 1\r\nContent-Length: 1",
        "Content-Length: 1, 1",
        "Content-Length: +1",
        "Content-Length : 1",
        "Transfer-Encoding: xchunked",
        "Transfer-Encoding: chunked, chunked",
        "X: a\r\n b\r\nContent-Length: 1",
        "X: a\nContent-Length: 1",
        "X: a\rContent-Length: 1",
        "X: a\0\r\nContent-Length: 1",
        ": a\r\nContent-Length: 1",
        "no colon\r\nContent-Length: 1",
    ];
    let lines = lines
        .iter()
        .map(|line| format!("HTTP/1.1 200 OK\r\n{line}\r\n\r\nx"));
    let whole = [
        "HTTP/1.1 20 OK\r\n\r\n",
        "HTTP/1.1 2000 OK\r\n\r\n",
        "HTTP/2.0 200 OK\r\n\r\n",
        "http/1.1 200 OK\r\n\r\n",
        "hello\r\n\r\n",
        "\r\nHTTP/1.1 200 OK\r\n\r\n",
        "HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "HTTP/1.1 101 Switching\r\n\r\n",
        "HTTP/1.1 204 No\r\nContent-Length: 1\r\n\r\nx",
        "HTTP/1.1 100 Go\r\nContent-Length: 1\r\n\r\nx",
    ];
    let whole = whole.iter().map(|text| (*text).to_owned());
    let body = |body: &&str| format!("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n{body}");
    let table: Vec<String> = lines.chain(whole).chain(BODIES.iter().map(body)).collect();
    let paths: Vec<String> = (0..table.len()).map(|n| format!("/{n}")).collect();
    let answer = |text| Answer {
        then: text,
        close: true,
        ..Answer::default()
    };
    let answers: Vec<(&str, Answer<'_>)> = paths
        .iter()
        .zip(&table)
        .map(|(path, text)| (path.as_str(), answer(text.as_str())))
        .collect();
    let app = App::start(&pair.server.host, "web", 80, &answers);
    pair.declare("web", 80, "http");
    let requests: Vec<String> = paths
        .iter()
        .map(|path| {
            format!(
                "POST {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: 1\r\n\r\nx"
            )
        })
        .collect();
    let steps: Vec<_> = requests.iter().map(|text| vec![Send(text), Rest]).collect();
    let got = talk(&pair.client.host, "client", (&mesh_name("web"), 80), &steps);
    for (sent, got) in table.iter().zip(&got) {
        let refused = got.starts_with("HTTP/1.1 502 ")
            && got.contains("\r\nx-meshwork-reason: http_response_malformed\r\n")
            && got.matches("HTTP/1.").count() == 1;
        assert!(refused, "{sent:?} reached the caller as {got:?}");
    }
    // Each was asked once: an answer that can not be read is no reason to ask again.
    assert_eq!(app.requests().len(), table.len());
}
