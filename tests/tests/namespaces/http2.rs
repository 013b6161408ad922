//! HTTP/2 by prior knowledge: each request its own stream, as real and as hostile programs speak it.

use std::time::Duration;

use meshwork_tests::control::TokenOptions;
use meshwork_tests::host::Host;
use meshwork_tests::process::{Cmd, Process};
use meshwork_tests::servers;
use meshwork_tests::wait::{SOON, check, wait_until};

use crate::bounds::reached;
use crate::pair::{Pair, mesh_name, owner, spiffe};

/// The server and client of these tests; what follows is the script.
pub(crate) const PEER: &str = include_str!("http2/peer.py");
/// A body that no buffer holds.
const LARGE: u64 = 100 * 1024 * 1024;
/// Both ways, digests included, on a busy machine.
const LARGE_MAX: Duration = Duration::from_secs(180);

/// A pair whose `shop/h2` is the server of `peer.py`.
pub(crate) fn pair(name: &str) -> (Pair, Process) {
    let pair = Pair::new(name);
    let server = serve(&pair.server.host, &[]);
    pair.declare("h2", 8080, "http2");
    (pair, server)
}

pub(crate) fn serve(host: &Host, environment: &[(&str, &str)]) -> Process {
    let script = format!("{PEER}\nserve()\n");
    let command = host.python("peer", &script).env("NAME", host.name());
    let command = environment
        .iter()
        .fold(command, |command, (name, value)| command.env(name, value));
    let server = command.cgroup("h2").spawn("peer");
    host.wait_listening(8080, SOON);
    server
}

/// A script of the workload `shop/client`.
pub(crate) fn script(pair: &Pair, name: &str, text: &str) -> Cmd {
    let text = format!("{PEER}\n{text}");
    pair.client.host.python(name, &text).cgroup("client")
}

#[track_caller]
pub(crate) fn run(pair: &Pair, text: &str) -> String {
    script(pair, "run", text).deadline(SOON * 2).ok()
}

#[test]
fn large_bodies_pass_both_ways_at_once_unchanged() {
    let pair = Pair::new("h2_large_bodies");
    let _server = servers::nghttpd(&pair.server.host, "web", 8080);
    pair.declare("web", 8080, "http2");
    let sent = pair.client.host.dir().join("large");
    let sent = sent.display();
    pair.client
        .host
        .ok(&format!("head -c {LARGE} /dev/urandom > {sent}"));
    // The server echoes while it is still being sent.
    let line = format!(
        "curl -sS -m 160 -f --http2-prior-knowledge --data-binary @{sent} http://{}:8080/ | cmp - {sent}",
        mesh_name("web")
    );
    assert_eq!(pair.cmd(&line).deadline(LARGE_MAX).ok(), "");
}

#[test]
fn many_requests_share_a_connection_and_each_is_counted() {
    let pair = Pair::new("h2_many_requests");
    let _server = servers::nghttpd(&pair.server.host, "web", 8080);
    let file = pair.server.host.dir().join("web/www/index.html");
    std::fs::write(file, "over h2\n").unwrap();
    pair.declare("web", 8080, "http2");
    let url = format!("http://{}:8080/", mesh_name("web"));
    let text = pair.ok(&format!("curl -sS -m 20 --http2-prior-knowledge {url}"));
    assert_eq!(text, "over h2\n");
    let text = pair.ok(&format!("nghttp -v {url}"));
    assert!(text.contains("x-sum: 7"), "the trailer was lost: {text}");
    let text = pair.ok(&format!("h2load -n 2000 -c 4 -m 100 {url}"));
    assert!(text.contains("2000 succeeded, 0 failed"), "{text}");
    wait_until("the requests to be counted", SOON, || {
        let count = pair.calls(&spiffe("client"), "shop/web");
        check(count == 2002.0, format!("{count} requests"))
    });
}

#[test]
fn interim_answers_fields_and_trailers_are_kept_and_ours_cannot_be_forged() {
    let (pair, _server) = pair("h2_fields");
    let text = run(
        &pair,
        "\
c = Client()
head, data, interim, trailers, end = c.get('/hints')
print([i['link'] for i in interim], data, end)
head, data, interim, trailers, end = c.get('/trailers')
print(data, trailers, end)
more = [('authorization', 's'), ('cookie', 'c'), ('x-note', 'b'), ('x-note', 'a'),
        ('x-meshwork-client-id', 'spiffe://boss'), ('x-meshwork-other', '1')]
head, data, interim, trailers, end = c.get('/fields', more=more)
print(data.decode(), head.get('x-a'), head.get('x-meshwork-reason'), end)
",
    );
    let expected = format!(
        "['</a>', '</b>'] b'done' end\nb'x' {{'x-sum': '7'}} end\n\
         never=authorization,cookie ours=x-meshwork-client-id={} notes=b,a 2 None end\n",
        spiffe("client")
    );
    assert_eq!(text, expected);
}

#[test]
fn resets_keep_their_codes_both_ways() {
    let (pair, server) = pair("h2_resets");
    let text = run(
        &pair,
        "\
c = Client()
for code in (2, 5, 8, 11, 99):
    print(c.get('/early/%d' % code)[4], end=' ')
    head, data, _, _, end = c.get('/late/%d' % code)
    print(head[':status'], data, end)
stream = c.open('/wait')
c.read(stream, lambda event: isinstance(event, ev.DataReceived))
c.h2.reset_stream(stream, 5)
c.flush()
print(c.get('/')[1])
",
    );
    let expected: String = [2, 5, 8, 11, 99]
        .map(|code| format!("{code} 200 b'part' {code}\n"))
        .concat();
    assert_eq!(text, format!("{expected}b'hello'\n"));
    wait_until("the app to see the caller's reset", SOON, || {
        check(server.log().contains("reset 5\n"), server.log())
    });
}

#[test]
fn a_websocket_and_a_tunnel_pass_both_ways() {
    let (pair, _server) = pair("h2_websocket");
    let text = run(
        &pair,
        "\
c = Client()
def talk(stream, words):
    head = c.read(stream, lambda event: isinstance(event, ev.ResponseReceived))[0]
    print(head[':status'], head['x-said'], end=' ')
    for word in words:
        c.h2.send_data(stream, word)
        c.flush()
        print(c.read(stream, lambda event: isinstance(event, ev.DataReceived))[1], end=' ')
    c.h2.end_stream(stream)
    c.flush()
    print(c.read(stream)[4])
more = [(':protocol', 'websocket')]
stream = c.h2.get_next_available_stream_id()
c.h2.send_headers(stream, [(':method', 'CONNECT'), (':protocol', 'websocket'), (':scheme', 'http'),
    (':authority', 'h2.shop'), (':path', '/chat'), ('sec-websocket-version', '13')])
c.flush()
talk(stream, [b'one', b'two'])
stream = c.h2.get_next_available_stream_id()
c.h2.send_headers(stream, [(':method', 'CONNECT'), (':authority', 'other:80')])
c.flush()
talk(stream, [b'three'])
",
    );
    assert_eq!(
        text,
        "200 websocket b'ONE' b'TWO' end\n200 other:80 b'THREE' end\n"
    );
}

#[test]
fn requests_of_one_connection_go_to_all_endpoints() {
    let (pair, _server) = pair("h2_balance");
    let token = TokenOptions::default();
    let second = pair.control.join(&pair.site.host("second"), &token);
    let _other = serve(&second.host, &[]);
    second.serve("h2", &owner("h2"), &[(8080, "http2")]);
    pair.control.wait_endpoints("shop/h2", 2);
    wait_until("both to answer on one connection", SOON, || {
        let text = run(
            &pair,
            "c = Client()\nfor _ in range(40): print(c.get('/number')[1].decode())\n",
        );
        assert_eq!(text.lines().count(), 40, "{text}");
        let both = text.contains("server ") && text.contains("second ");
        check(both, text)
    });
}

#[test]
fn an_app_that_leaves_or_refuses_is_asked_again_on_another_connection() {
    let (pair, _server) = pair("h2_leaves");
    let text = run(
        &pair,
        "\
c = Client()
print(c.get('/number')[1], c.get('/leave')[1], c.get('/number')[1], c.get('/refuse')[1])
",
    );
    assert_eq!(text, "b'server 1' b'bye' b'server 2' b'second'\n");
}

#[test]
fn an_app_that_takes_few_requests_gets_more_connections_and_no_more_than_it_takes() {
    let pair = Pair::new("h2_few_streams");
    let _server = serve(&pair.server.host, &[("STREAMS", "2")]);
    pair.declare("h2", 8080, "http2");
    let text = run(
        &pair,
        "\
c = Client()
waiting = [c.open('/wait') for _ in range(6)]
begun = 0
for event in c.events():
    begun += isinstance(event, ev.DataReceived)
    if begun == 6: break
c.flush()
print(c.get('/number')[1])
",
    );
    assert_eq!(text, "b'server 4'\n");
}

#[test]
fn a_caller_is_told_to_go_when_its_agent_drains_and_its_requests_finish() {
    let (mut pair, _server) = pair("h2_drain");
    let caller = script(
        &pair,
        "caller",
        "\
c = Client()
stream = c.h2.get_next_available_stream_id()
c.h2.send_headers(stream, [(':method', 'CONNECT'), (':authority', 'echo:80')])
c.flush()
c.read(stream, lambda event: isinstance(event, ev.ResponseReceived))
print('open', flush=True)
for event in c.events():
    if isinstance(event, ev.ConnectionTerminated): break
print('told to go', int(event.error_code), flush=True)
c.h2.send_data(stream, b'still here', end_stream=True)
c.flush()
print(*c.read(stream)[1::3], flush=True)
",
    );
    let mut caller = caller.spawn("caller");
    wait_until("the stream to be open", SOON, || {
        caller.is_alive()?;
        check(caller.log().contains("open\n"), caller.log())
    });
    pair.client.stop();
    let log = caller.log();
    assert_eq!(log, "open\ntold to go 0\nb'STILL HERE' end\n");
}

#[test]
fn an_app_that_dies_in_the_middle_is_a_reset_and_never_a_short_body() {
    let (pair, server) = pair("h2_dies");
    let caller = script(
        &pair,
        "caller",
        "\
c = Client()
stream = c.open('/wait')
print(c.read(stream, lambda event: isinstance(event, ev.DataReceived))[1], flush=True)
print(c.read(stream)[4], flush=True)
",
    );
    let mut caller = caller.spawn("caller");
    wait_until("the body to begin", SOON, || {
        caller.is_alive()?;
        check(caller.log() == "b'begun'\n", caller.log())
    });
    let before = pair.server.refused("app_reset");
    server.kill9();
    wait_until("the reset", SOON, || {
        check(caller.log() == "b'begun'\n2\n", caller.log())
    });
    pair.server.wait_refused("app_reset", before);
}

#[test]
fn refusals_are_answers_with_their_reason() {
    let (pair, server) = pair("h2_refusals");
    drop(server);
    let line = format!(
        "curl -sS -m 20 -i --http2-prior-knowledge http://{}:8080/",
        mesh_name("h2")
    );
    wait_until("the refusal", SOON, || {
        let answer = pair.cmd(&line).output().to_string().to_lowercase();
        let said = answer.contains("http/2 503") && answer.contains("x-meshwork-reason: ");
        check(said, answer)
    });
    let head = pair.ok(&line.replace(" -i ", " -I "));
    assert!(head.starts_with("HTTP/2 503"), "{head}");
}

#[test]
fn what_breaks_the_rules_never_reaches_the_app() {
    let (pair, server) = pair("h2_malformed");
    let before = pair.client.refused("http_malformed");
    let text = run(
        &pair,
        "\
BASE = [(':method', 'GET'), (':scheme', 'http'), (':authority', 'h2.shop'), (':path', '/bad')]
def attempt(head, data=None):
    c = Client()
    stream = c.h2.get_next_available_stream_id()
    block = hpack.Encoder().encode(head)
    c.h2.send_headers(stream, BASE, end_stream=data is None)
    c.h2.clear_outbound_data_buffer()
    parts = [block[at:at + 16000] for at in range(0, len(block), 16000)]
    out = b''
    for n, part in enumerate(parts):
        end = 4 * (n == len(parts) - 1)
        out += frame(9, end, stream, part) if n else frame(1, end | (data is None), stream, part)
    if data is not None: out += frame(0, 1, stream, data)
    c.sock.sendall(out)
    head, _, _, _, end = c.read(stream)
    return (head or {}).get(':status', end)
for more in [('connection', 'close'), ('transfer-encoding', 'chunked'), ('te', 'gzip'), ('upgrade', 'h2c'),
             ('x-a', 'b\\r\\nc: d'), ('x-a', 'b\\0c'), ('x-a', ' b'), ('x-a', 'b '), ('X-A', 'b'), ('x a', 'b'), ('', 'b'),
             ('content-length', '5'), ('content-length', '+0'), ('host', 'other'), (':path', '/again'), (':other', 'x')]:
    print(more, attempt(BASE + [more]))
print('short', attempt(BASE + [('content-length', '5')], b'123'))
print('long', attempt(BASE + [('content-length', '2')], b'123'))
print('twice', attempt(BASE + [('content-length', '3'), ('content-length', '3')], b'123'))
print('no path', attempt(BASE[:3]))
print('no authority', attempt(BASE[:2] + BASE[3:]))
print('user', attempt([(':authority', 'me@h2.shop')] + BASE[:2] + BASE[3:]))
print('large', attempt(BASE + [('x-%d' % n, 'y' * 1000) for n in range(80)]))
print(Client().get('/good')[1])
",
    );
    for line in text.lines() {
        let refused = ["400", "431", "1", "closed"];
        let good = refused
            .iter()
            .any(|code| line.ends_with(&format!(" {code}")))
            || line == "b'hello'";
        assert!(good, "{line}\n{text}");
    }
    assert!(text.ends_with("b'hello'\n"), "{text}");
    assert!(!server.log().contains("request bad"), "{}", server.log());
    assert!(before < pair.client.refused("http_malformed"));
}

/// Frames that cost work and bring none, at a caller's connection.
#[test]
fn a_caller_that_floods_is_told_to_calm_down_and_counted() {
    let (pair, _server) = pair("h2_floods");
    for (name, pieces) in [
        (
            "pings",
            "for _ in range(200): yield frame(6, 0, 0, b'12345678') * 50",
        ),
        ("settings", "for _ in range(200): yield frame(4, 0, 0) * 50"),
        (
            "priorities",
            "for n in range(200): yield frame(2, 0, 1, b'\\0\\0\\0\\0\\1') * 50",
        ),
        (
            "empty data",
            "yield frame(1, 4, 1, hpack.Encoder().encode(HEAD))\n    for _ in range(200): yield frame(0, 0, 1) * 50",
        ),
        (
            "rapid reset",
            "e = hpack.Encoder()\n    for n in range(1, 8001, 2): yield frame(1, 5, n, e.encode(HEAD)) + frame(3, 0, n, b'\\0\\0\\0\\10')",
        ),
        (
            "continuation",
            "yield frame(1, 0, 1, hpack.Encoder().encode(HEAD))\n    for _ in range(2000): yield frame(9, 0, 1, b'\\x40\\x01a\\x01b' * 200)",
        ),
        (
            "a small block that is large",
            "e = hpack.Encoder()\n    yield frame(1, 4, 1, e.encode(HEAD + [('x-a', 'y' * 3900)]))\n    \
             for n in range(3, 9, 2): yield frame(1, 5, n, e.encode(HEAD) + b'\\xbe' * 10000)",
        ),
    ] {
        let before = pair.client.refused("http_flood");
        let text = run(
            &pair,
            &format!("def pieces():\n    {pieces}\nflood(pieces)\n"),
        );
        assert_eq!(text, "ended by 11\n", "{name}");
        pair.client.wait_refused("http_flood", before);
        let floods = reached(&pair.client, "floods");
        assert_eq!(floods, pair.client.refused("http_flood"), "{name}");
        let text = run(&pair, "print(Client().get('/')[1])");
        assert_eq!(text, "b'hello'\n", "after {name}");
    }
}

#[test]
fn an_app_that_floods_loses_its_connection_and_is_counted() {
    let (pair, _server) = pair("h2_app_floods");
    for path in ["/flood", "/interims"] {
        let before = pair.server.refused("http_flood");
        let text = run(
            &pair,
            &format!("print((Client().get('{path}')[0] or {{}}).get('x-meshwork-reason'))"),
        );
        assert!(
            ["app_reset\n", "None\n"].contains(&text.as_str()),
            "{path}: {text}"
        );
        pair.server.wait_refused("http_flood", before);
        let floods = reached(&pair.server, "floods");
        assert_eq!(floods, pair.server.refused("http_flood"), "{path}");
        let text = run(&pair, "print(Client().get('/')[1])");
        assert_eq!(text, "b'hello'\n", "after {path}");
    }
}

/// A caller that gives no window holds back its own streams only.
#[test]
fn a_caller_that_takes_nothing_holds_nobody_back() {
    let pair = Pair::new("h2_stalls");
    let _server = servers::nghttpd(&pair.server.host, "h2", 8080);
    let www = pair.server.host.dir().join("h2/www");
    std::fs::write(www.join("index.html"), "hello\n").unwrap();
    std::fs::write(www.join("large"), vec![b'x'; 8 << 20]).unwrap();
    pair.declare("h2", 8080, "http2");
    let stalled = script(
        &pair,
        "stalled",
        "\
c = Client()
c.h2.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 0})
c.flush()
for _ in range(200): c.open('/large')
heads = 0
for event in c.events():
    heads += isinstance(event, ev.ResponseReceived)
    if heads == 100: print('stalled', flush=True)
",
    );
    let mut stalled = stalled.spawn("stalled");
    wait_until("the answers to begin", SOON, || {
        stalled.is_alive()?;
        check(stalled.log().contains("stalled"), stalled.log())
    });
    for _ in 0..5 {
        let text = pair.ok(&format!(
            "curl -sS -m 20 --http2-prior-knowledge http://{}:8080/",
            mesh_name("h2")
        ));
        assert_eq!(text, "hello\n");
    }
}
