//! HTTP/1.1 as real clients and servers speak it.

use std::fs;
use std::time::Duration;

use meshwork_tests::servers;
use meshwork_tests::wait::{SOON, check, wait_until};

use crate::pair::{Pair, mesh_name, spiffe};

const MIB: u64 = 1024 * 1024;
/// A body that no buffer holds.
const LARGE: u64 = 100 * MIB;
/// Both ways, digests included, on a busy machine.
const LARGE_MAX: Duration = Duration::from_secs(120);

#[test]
fn a_kept_connection_carries_many_requests() {
    let pair = Pair::new("a_kept_connection_carries_many_requests");
    let _web = pair.web("http", "");
    let url = format!("http://{}/", mesh_name("web"));
    let text = pair.ok(&format!(
        "curl -sS -m 20 -w '%{{num_connects}}\\n' {url} {url} {url}"
    ));
    assert_eq!(text, "hello\n1\nhello\n0\nhello\n0\n");
    wait_until("the calls to be counted", SOON, || {
        let count = pair.calls(&spiffe("client"), "shop/web");
        check(count == 3.0, format!("{count} calls"))
    });
}

#[test]
fn the_server_is_told_who_calls_and_nobody_can_say_it_for_another() {
    let pair = Pair::new("the_server_is_told_who_calls");
    let _web = pair.web("http", "");
    pair.ok(&format!(
        "curl -sS -m 20 -H 'X-Meshwork-Client-Id: spiffe://corp.test/ns/shop/sa/boss' http://{}/",
        mesh_name("web")
    ));
    let log = servers::access_log(&pair.server.host, "web");
    assert!(log.contains(&spiffe("client")), "{log}");
    assert!(
        !log.contains("boss"),
        "a header of the caller's came through: {log}"
    );
    assert!(
        log.starts_with(&pair.client.host.v4().to_string()),
        "not the caller's address: {log}"
    );
}

#[test]
fn a_large_body_passes_both_ways_unchanged() {
    for protocol in ["http", "auto"] {
        let pair = Pair::new(&format!("a_large_body_passes_both_ways_{protocol}"));
        // The body is stored when it is handed on, so nginx hands it to itself.
        let _web = pair.web(
            protocol,
            "location = /up { client_body_in_file_only on; proxy_pass http://127.0.0.1:80/; proxy_set_header Host x; }",
        );
        let sent = pair.client.host.dir().join("large");
        let served = pair.server.host.dir().join("web/www/large");
        for file in [&sent, &served] {
            let file = file.display();
            pair.client
                .host
                .ok(&format!("head -c {LARGE} /dev/urandom > {file}"));
        }
        let name = mesh_name("web");
        let digest = pair
            .cmd(&format!("curl -sS -m 100 http://{name}/large | sha256sum"))
            .deadline(LARGE_MAX)
            .ok();
        assert_eq!(
            digest_of(&digest),
            sha256(&pair, &served),
            "down, {protocol}"
        );
        let up = format!(
            "curl -sS -m 100 -f --data-binary @{} http://{name}/up",
            sent.display()
        );
        assert_eq!(pair.cmd(&up).deadline(LARGE_MAX).ok(), "hello\n");
        let stored = fs::read_dir(pair.server.host.dir().join("web/body")).unwrap();
        let stored = stored
            .map(|e| e.unwrap().path())
            .find(|path| path.is_file());
        let stored = stored.expect("nginx stored the body");
        assert_eq!(
            sha256(&pair, &stored),
            sha256(&pair, &sent),
            "up, {protocol}"
        );
    }
}

fn sha256(pair: &Pair, file: &std::path::Path) -> String {
    digest_of(
        &pair
            .client
            .host
            .ok(&format!("sha256sum < {}", file.display())),
    )
}

fn digest_of(line: &str) -> String {
    line.split_whitespace()
        .next()
        .unwrap_or_default()
        .to_owned()
}

#[test]
fn forms_of_http_that_are_easily_got_wrong() {
    let pair = Pair::new("forms_of_http_that_are_easily_got_wrong");
    let _web = pair.web(
        "http",
        "location = /none { return 204; }\n\
         location = /moved { return 301 /; }\n\
         location = /chunked { proxy_http_version 1.1; proxy_pass http://127.0.0.1:9; }",
    );
    let url = format!("http://{}", mesh_name("web"));
    let head = pair.ok(&format!("curl -sS -m 10 -I {url}/ {url}/none"));
    assert_eq!(head.matches("HTTP/1.1 2").count(), 2, "{head}");
    let none = pair.ok(&format!("curl -sS -m 10 -i {url}/none {url}/"));
    assert!(none.contains("204") && none.ends_with("hello\n"), "{none}");
    let moved = pair.ok(&format!("curl -sS -m 10 -L {url}/moved"));
    assert_eq!(moved, "hello\n");
    let expected = format!("curl -sS -m 10 -H 'Expect: 100-continue' -d x -i {url}/");
    let expected = pair.ok(&expected);
    assert!(expected.contains("hello"), "{expected}");
    let old = pair.ok(&format!("curl -sS -m 10 -0 {url}/"));
    assert_eq!(old, "hello\n");
    // An answer of the server's own stays the server's.
    let bad = pair.ok(&format!("curl -sS -m 10 -i {url}/chunked"));
    assert!(
        bad.contains("502") && !bad.contains("x-meshwork-reason"),
        "{bad}"
    );
}

#[test]
fn messages_that_could_be_read_in_two_ways_are_refused_with_their_reason() {
    let pair = Pair::new("messages_that_could_be_read_in_two_ways");
    let _web = pair.web("http", "");
    let url = format!("http://{}/", mesh_name("web"));
    let refused = |options: &str, status: &str, reason: &str| {
        let before = pair.client.refused(reason) + pair.server.refused(reason);
        let answer = pair.ok(&format!("curl -sS -m 10 -i {options} {url}"));
        assert!(
            answer.contains(&format!(" {status} ")),
            "{options}: {answer}"
        );
        let header = format!("x-meshwork-reason: {reason}");
        assert!(
            answer.to_lowercase().contains(&header),
            "{options}: {answer}"
        );
        let after = pair.client.refused(reason) + pair.server.refused(reason);
        assert!(before < after, "{reason} was not counted");
    };
    refused(
        "-H 'Content-Length: 1' -H 'Transfer-Encoding: chunked' -d x",
        "400",
        "http_malformed",
    );
    let large = "x".repeat(70_000);
    let file = pair.client.host.dir().join("large-header");
    fs::write(&file, format!("X-Large: {large}\n")).unwrap();
    refused(
        &format!("-H @{}", file.display()),
        "431",
        "http_head_too_large",
    );
    assert_eq!(pair.ok(&format!("curl -sS -m 10 {url}")), "hello\n");
}

#[test]
fn an_upgraded_connection_becomes_bytes_both_ways() {
    const SERVER: &str = "\
import socket, threading
def serve(c):
    data = b''
    while b'\\r\\n\\r\\n' not in data: data += c.recv(4096)
    c.sendall(b'HTTP/1.1 101 Switching Protocols\\r\\nConnection: Upgrade\\r\\nUpgrade: echo\\r\\n\\r\\n')
    rest = data.split(b'\\r\\n\\r\\n', 1)[1]
    while True:
        if rest: c.sendall(rest[::-1])
        rest = c.recv(4096)
        if not rest: break
    c.close()
s = socket.create_server(('0.0.0.0', 8080))
while True: threading.Thread(target=serve, args=(s.accept()[0],), daemon=True).start()
";
    const CLIENT: &str = "\
import socket, sys
c = socket.create_connection(('echo.shop.mesh.internal', 8080), 20)
c.sendall(b'GET /ws HTTP/1.1\\r\\nHost: e\\r\\nConnection: Upgrade\\r\\nUpgrade: echo\\r\\n\\r\\n')
data = b''
while b'\\r\\n\\r\\n' not in data: data += c.recv(4096)
assert b' 101 ' in data, data
for word in (b'abc', b'\\x00\\xff\\r\\n'):
    c.sendall(word)
    got = b''
    while len(got) < len(word): got += c.recv(4096)
    assert got == word[::-1], got
c.shutdown(socket.SHUT_WR)
assert c.recv(1) == b''
print('ok')
";
    let pair = Pair::new("an_upgraded_connection_becomes_bytes_both_ways");
    let server = &pair.server.host;
    let _echo = server.python("echo", SERVER).cgroup("echo").spawn("echo");
    server.wait_listening(8080, SOON);
    pair.declare("echo", 8080, "http");
    let text = pair
        .client
        .host
        .python("upgrade", CLIENT)
        .cgroup("client")
        .ok();
    assert_eq!(text, "ok\n");
}

#[test]
fn requests_go_to_both_instances_and_to_the_one_that_is_left() {
    let pair = Pair::new("requests_go_to_both_instances");
    let second = pair.control.join(
        &pair.site.host("second"),
        &meshwork_tests::control::TokenOptions::default(),
    );
    let web = pair.web("http", "location = /who { return 200 \"first\\n\"; }");
    let _other = servers::nginx(
        &second.host,
        "web",
        80,
        "location = /who { return 200 \"second\\n\"; }",
    );
    second.serve("web", &crate::pair::owner("web"), &[(80, "http")]);
    pair.control.wait_endpoints("shop/web", 2);
    let many = |count: u32| {
        let line = format!(
            "seq {count} | xargs -P 8 -I % curl -sS -m 10 'http://{}/who?%'",
            mesh_name("web")
        );
        pair.cmd(&line).deadline(Duration::from_secs(60)).ok()
    };
    wait_until("both instances to answer", SOON, || {
        let text = many(20);
        check(text.contains("first") && text.contains("second"), text)
    });
    web.kill9();
    // At once, before control knows: the data path sees it first. GET is repeated elsewhere.
    let text = many(30);
    assert_eq!(text.matches("second").count(), 30, "{text}");
}
