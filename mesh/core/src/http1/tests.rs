//! Heads and bodies, good and hostile.

use super::*;
use crate::rng::Rng;

fn request(text: &str) -> Result<Option<Request>, Reason> {
    parse_request(text.as_bytes(), HEAD_MAX)
}

const GET: &str = "GET / HTTP/1.1\r\nHost: a\r\n\r\n";

#[expect(clippy::unwrap_in_result, reason = "the request is the test's own")]
fn answer(text: &str, to: &str) -> Result<Option<Response>, Reason> {
    parse_response(text.as_bytes(), &request(to).unwrap().unwrap(), HEAD_MAX)
}

#[test]
fn a_plain_request_is_read() {
    let head = request(GET).unwrap().unwrap();
    assert_eq!(
        (head.len, head.framing, head.keep_alive),
        (GET.len(), Framing::None, true)
    );
    for end in 0..GET.len() {
        assert_eq!(request(&GET[..end]), Ok(None), "cut at {end}");
    }
}

#[test]
fn framing_of_requests() {
    for (headers, framing, keep) in [
        ("Content-Length: 5", Framing::Length(5), true),
        ("Transfer-Encoding: chunked", Framing::Chunked, true),
        ("Transfer-Encoding: gzip, Chunked", Framing::Chunked, true),
        ("Connection: foo, Close", Framing::None, false),
        ("X: y", Framing::None, true),
    ] {
        let head = request(&format!("POST /x HTTP/1.1\r\nHost: a\r\n{headers}\r\n\r\n"))
            .unwrap()
            .unwrap();
        assert_eq!(
            (head.framing, head.keep_alive),
            (framing, keep),
            "{headers}"
        );
    }
}

/// Header lines.
const ODD_LINES: &[&str] = &[
    "Content-Length: 5\r\nContent-Length: 5",
    "Content-Length: 5, 5",
    "Content-Length: +5",
    "Content-Length: -1",
    "Content-Length: 0x5",
    "Content-Length: 5 5",
    "Content-Length:",
    "Content-Length: 99999999999999999999",
    "Content-Length: 5\r\nTransfer-Encoding: chunked",
    "Transfer-Encoding: chunked, gzip",
    "Transfer-Encoding: chunked, chunked",
    "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
    "Transfer-Encoding: identity",
    "Transfer-Encoding: , chunked",
    "Transfer-Encoding: chunked\t",
    "Transfer-Encoding: x;a=\"b, chunked",
    "Transfer-Encoding: xchunked",
    "Transfer-Encoding : chunked",
    "Transfer-Encoding: chunked, identity",
    "Transfer-Encoding: gzip;q=1, chunked",
    "Transfer-Encoding: \x0bchunked",
    "Transfer-Encoding:",
    "Transfer-Encoding\t: chunked",
    "Transfer-Encoding: chunked\r\nContent-Length: 5",
    "Content-Length: 5\r\nContent-Length: 6",
    "Content-Length : 5",
    "Content-Length: 5\x0b",
    "Content-Length: 5;",
    "Content-Length: 9223372036854775808",
    "Content-Length: \u{661}",
    "Connection: Content-Length\r\nContent-Length: 5",
    "Connection: close, transfer-encoding",
    "Connection: Host",
    "Connection: X_Meshwork_Client_Id",
    "Host: a",
    "Host: b",
    " folded: x",
    "X: a\r\n b",
    "X: a\rb",
    "X: a\nY: b",
    "X: a\0b",
    "X\0: a",
    "no colon",
    "Connection: close, x-meshwork-client-id",
    ": empty",
    "X y: a",
    "X : a",
    "X(: a",
    "X: a\x7f",
    "\u{e9}: a",
];

/// Whole requests.
const ODD_REQUESTS: &[&str] = &[
    "GET / HTTP/1.1\r\n\r\n",
    "GET /\r\nHost: a\r\n\r\n",
    "GET  / HTTP/1.1\r\nHost: a\r\n\r\n",
    "GET / HTTP/2.0\r\nHost: a\r\n\r\n",
    "GET / http/1.1\r\nHost: a\r\n\r\n",
    "GET /a b HTTP/1.1\r\nHost: a\r\n\r\n",
    "GET /  HTTP/1.1\r\nHost: a\r\n\r\n",
    "GET / HTTP/1.1 \r\nHost: a\r\n\r\n",
    " GET / HTTP/1.1\r\nHost: a\r\n\r\n",
    "GET\t/\tHTTP/1.1\r\nHost: a\r\n\r\n",
    "GET /\ta HTTP/1.1\r\nHost: a\r\n\r\n",
    "GET /\x7f HTTP/1.1\r\nHost: a\r\n\r\n",
    "GET /\0 HTTP/1.1\r\nHost: a\r\n\r\n",
    "GET / HTTP/1.1\r\r\nHost: a\r\n\r\n",
    "GET / HTTP/1.1\rHost: a\r\n\r\n",
    "GET / HTTP/1.2\r\nHost: a\r\n\r\n",
    "GET / HTTP/1\r\nHost: a\r\n\r\n",
    "GET / HTTP/01.1\r\nHost: a\r\n\r\n",
    "GET / HTTP/1.1x\r\nHost: a\r\n\r\n",
    "PRI * HTTP/2.0\r\n\r\n",
    "\u{e9} / HTTP/1.1\r\nHost: a\r\n\r\n",
    "head / HTTP/1.1\r\nHost: a\r\n\r\n",
    "Connect a:1 HTTP/1.1\r\nHost: a\r\n\r\n",
    "TRACE / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\nx",
    "\n\nGET / HTTP/1.1\r\nHost: a\r\n\r\n",
    "G(T / HTTP/1.1\r\nHost: a\r\n\r\n",
    "GET / HTTP/1.1\nHost: a\n\n",
    "\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n",
    "POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n",
    "GET /a#b HTTP/1.1\r\nHost: a\r\n\r\n",
    "CONNECT a:1 HTTP/1.1\r\nHost: a:1\r\nContent-Length: 5\r\n\r\nhello",
    "CONNECT a:1 HTTP/1.1\r\nHost: a:1\r\nTransfer-Encoding: chunked\r\n\r\n",
];

#[test]
fn what_could_be_read_in_two_ways_is_refused() {
    for headers in ODD_LINES {
        let text = format!("POST /x HTTP/1.1\r\nHost: a\r\n{headers}\r\n\r\n");
        assert_eq!(request(&text), Err(Reason::HttpMalformed), "{headers:?}");
    }
    for text in ODD_REQUESTS {
        assert_eq!(request(text), Err(Reason::HttpMalformed), "{text:?}");
    }
}

#[test]
fn whom_a_request_is_for_is_read_in_one_way() {
    for (method, target, host, good) in [
        ("GET", "/", "a", true),
        ("GET", "//a/b?c=http://d", "a:80", true),
        ("GET", "/", "", true),
        ("GET", "/", "[fd00::1]:8080", true),
        ("GET", "/", "web_1.shop.mesh.internal:", true),
        ("GET", "/", "a b", false),
        ("GET", "/", "a,b", false),
        ("GET", "/", "a/b", false),
        ("GET", "/", "u@a", false),
        ("GET", "/", "a:80:80", false),
        ("GET", "/", "a:x", false),
        ("GET", "/", "\u{e9}", false),
        ("GET", "http://a/x", "a", true),
        ("GET", "HTTP://A:80/x", "a", true),
        ("GET", "http://a?x", "a:80", true),
        ("GET", "https://a:443", "a", true),
        ("GET", "http://[::1]:81/", "[::1]:81", true),
        ("GET", "http://a/x", "b", false),
        ("GET", "http://a:81/x", "a", false),
        ("GET", "http://a/x", "", false),
        ("GET", "http://u@a/x", "a", false),
        ("GET", "http:///x", "", false),
        ("GET", "http:a", "a", false),
        ("GET", "://a/", "a", false),
        ("GET", "a", "a", false),
        ("GET", "*", "a", false),
        ("OPTIONS", "*", "a", true),
        ("CONNECT", "a:1", "a", true),
        ("CONNECT", "a:1", "A:2", true),
        ("CONNECT", "a:1", "", true),
        ("CONNECT", "[::1]:1", "[::1]", true),
        ("CONNECT", "a:1", "b", false),
        ("CONNECT", "a", "a", false),
        ("CONNECT", "a:", "a", false),
        ("CONNECT", ":1", "", false),
        ("CONNECT", "/", "a", false),
        ("CONNECT", "http://a:1", "a", false),
    ] {
        let text = format!("{method} {target} HTTP/1.1\r\nHost: {host}\r\n\r\n");
        assert_eq!(request(&text).is_ok(), good, "{text:?}");
    }
    let old = "GET http://a/ HTTP/1.0\r\n\r\n";
    assert!(request(old).is_ok(), "1.0 needs no Host");
}

#[test]
fn a_login_of_a_connection_is_seen_by_both_sides() {
    for (line, binds) in [
        ("Authorization: NTLM TlRM", true),
        ("authorization: negotiate", true),
        ("Proxy-Authorization: Negotiate\tx", true),
        ("Authorization: Basic NTLM", false),
        ("Authorization: NTLMv3 x", false),
        ("WWW-Authenticate: NTLM", false),
    ] {
        let head = request(&format!("GET / HTTP/1.1\r\nHost: a\r\n{line}\r\n\r\n"));
        assert_eq!(head.unwrap().unwrap().binds, binds, "{line}");
    }
    for (line, binds) in [
        ("WWW-Authenticate: NTLM", true),
        ("WWW-Authenticate: Basic realm=\"a, b\", Negotiate", true),
        ("Proxy-Authenticate: ntlm TlRM", true),
        ("WWW-Authenticate: Basic realm=\"NTLM\"", false),
        ("Authorization: NTLM", false),
    ] {
        let text = format!("HTTP/1.1 401 No\r\nContent-Length: 0\r\n{line}\r\n\r\n");
        assert_eq!(answer(&text, GET).unwrap().unwrap().binds, binds, "{line}");
    }
}

#[test]
fn odd_bodies_are_known() {
    for (method, odd) in [
        ("GET", true),
        ("DELETE", true),
        ("POST", false),
        ("PUT", false),
    ] {
        let text = format!("{method} / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\n");
        assert_eq!(
            request(&text).unwrap().unwrap().has_odd_body(),
            odd,
            "{method}"
        );
    }
    assert!(!request(GET).unwrap().unwrap().has_odd_body());
}

#[test]
fn a_head_has_so_many_lines_at_most() {
    let lines = |count: usize| {
        let text = format!(
            "GET / HTTP/1.1\r\nHost: a\r\n{}\r\n",
            "a:\r\n".repeat(count)
        );
        request(&text)
    };
    assert!(lines(fields::LINES_MAX - 1).is_ok());
    assert_eq!(lines(fields::LINES_MAX), Err(Reason::HttpHeadTooLarge));
}

#[test]
fn a_head_is_looked_at_when_it_may_be_whole_or_spoiled() {
    for (text, seen, expected) in [
        ("GET / HTTP/1.1\r\nHost: a\r\n", 0, false),
        ("GET / HTTP/1.1\r\nHost: a\r\n\r\n", 0, true),
        ("GET / HTTP/1.1\r\nHost: a\r\n\r\n", 26, true),
        ("GET / HTTP/1.1\r\nHost: a\r\n\r\nbody", 29, false),
        ("GET / HTTP/1.1\n", 0, true),
        ("\n", 0, true),
        ("\r\n", 0, true),
        ("GET /\0", 0, true),
        ("xxxxxxxxxx", 0, false),
    ] {
        assert_eq!(
            is_decided(text.as_bytes(), seen),
            expected,
            "{text:?} from {seen}"
        );
    }
}

#[test]
fn a_head_is_bounded() {
    let text = format!(
        "GET / HTTP/1.1\r\nHost: a\r\nX: {}\r\n\r\n",
        "x".repeat(HEAD_MAX)
    );
    assert_eq!(request(&text), Err(Reason::HttpHeadTooLarge));
    assert_eq!(request(&text[..HEAD_MAX]), Err(Reason::HttpHeadTooLarge));
}

const ODD_RESPONSES: &[&str] = &[
    "HTTP/1.1 101 Switching\r\n\r\n",
    "HTTP/1.1 20 OK\r\n\r\n",
    "HTTP/1.1 2000 OK\r\n\r\n",
    "HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n",
    "HTTP/2 200 OK\r\n\r\n",
    "HTTP/1.1 204 No\r\nContent-Length: 3\r\n\r\nabc",
    "HTTP/1.1 204 No\r\nTransfer-Encoding: chunked\r\n\r\n",
    "HTTP/1.1 100 Go\r\nContent-Length: 3\r\n\r\nabc",
    "HTTP/1.1 200 OK\r\nTransfer-Encoding: xchunked\r\n\r\n",
    "HTTP/1.1 200 OK\r\nTransfer-Encoding: identity\r\n\r\n",
    "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked, chunked\r\n\r\n",
    "HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 3\r\n\r\n",
    "HTTP/1.1 200 OK\r\nContent-Length: +3\r\n\r\n",
    "HTTP/1.1 200 OK\r\nX: a\r\n b\r\n\r\n",
    "HTTP/1.1 200 OK\r\nX : a\r\n\r\n",
    "HTTP/1.1 200 O\rK\r\n\r\n",
    "HTTP/1.1 200 O\0K\r\n\r\n",
    "HTTP/1.1 200 OK\nX: a\n\n",
    "HTTP/1.1  200 OK\r\n\r\n",
    "HTTP/1.1 200\tOK\r\n\r\n",
    "\r\nHTTP/1.1 200 OK\r\n\r\n",
    "hello\r\n\r\n",
    "HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
];

#[test]
fn framing_of_responses() {
    let head = "HEAD / HTTP/1.1\r\nHost: a\r\n\r\n";
    let upgrade = "GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n";
    let connect = "CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n";
    for (text, to, framing) in [
        (
            "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n",
            GET,
            Framing::Length(3),
        ),
        (
            "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n",
            head,
            Framing::None,
        ),
        (
            "HTTP/1.1 304 Not Modified\r\nContent-Length: 3\r\n\r\n",
            GET,
            Framing::None,
        ),
        ("HTTP/1.1 204\r\n\r\n", GET, Framing::None),
        (
            "HTTP/1.1 204 \r\nContent-Length: 0\r\n\r\n",
            GET,
            Framing::None,
        ),
        ("HTTP/1.1 200 OK\r\n\r\n", GET, Framing::UntilClose),
        (
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n",
            GET,
            Framing::UntilClose,
        ),
        ("HTTP/1.1 100 Continue\r\n\r\n", GET, Framing::None),
        ("HTTP/1.1 101 Switching\r\n\r\n", upgrade, Framing::Tunnel),
        ("HTTP/1.1 200 OK\r\n\r\n", connect, Framing::Tunnel),
    ] {
        assert_eq!(
            answer(text, to).unwrap().unwrap().framing,
            framing,
            "{text}"
        );
    }
    for text in ODD_RESPONSES {
        assert_eq!(
            answer(text, GET),
            Err(Reason::HttpResponseMalformed),
            "{text}"
        );
    }
}

#[test]
fn a_connection_that_was_asked_to_leave_http_is_not_used_again() {
    let upgrade = "GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n";
    let connect = "CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n";
    let refused = "HTTP/1.1 403 No\r\nContent-Length: 0\r\n\r\n";
    for (to, keep) in [(GET, true), (upgrade, false), (connect, false)] {
        let head = answer(refused, to).unwrap().unwrap();
        assert_eq!(
            (head.framing, head.keep_alive),
            (Framing::None, keep),
            "{to}"
        );
    }
}

#[test]
fn chunks_are_measured_wherever_they_are_cut() {
    let body =
        b"5\r\nhello\r\n1A;name=\"v\"\r\nabcdefghijklmnopqrstuvwxyz\r\n0\r\nX-Sum: 7 \r\nY:\r\n\r\n";
    let with_next = [body.as_slice(), b"GET"].concat();
    for cut in 0..=body.len() {
        let mut state = Body::new(Framing::Chunked);
        let first = state.advance(&with_next[..cut]).unwrap();
        assert_eq!(first, cut);
        let second = state.advance(&with_next[cut..]).unwrap();
        assert_eq!(first + second, body.len(), "cut at {cut}");
        assert!(state.is_done());
    }
}

#[test]
fn hostile_chunks_are_refused() {
    for body in [
        "\r\n",
        "g\r\n",
        "-1\r\n",
        "+1\r\n",
        "0x1\r\n",
        " 1\r\n",
        "1 \r\n",
        "1\n",
        "1;a\nb\r\n",
        "1\r\nab\r\n",
        "1\r\na\n",
        "1\r\na\r0",
        "0\r\n x\r\n",
        "0\r\na\nb\r\n",
        "0\r\n\n",
        "1;\0\r\n",
        "1000000000000000\r\n",
        "ffffffffffffffff\r\n",
        "1 ;a\r\n",
        "1;a\rb\r\n",
        "1;a\x7f\r\n",
        "0\r\nno colon\r\n",
        "0\r\n: x\r\n",
        "0\r\nX : x\r\n",
        "0\r\nX: a\x01\r\n",
        "0\r\nX: a\r\n b\r\n",
        "0\r\nContent-Length: 5\r\n",
        "0\r\ntransfer-encoding: chunked\r\n",
        "0\r\nHOST: b\r\n",
        "0\r\nConnection: close\r\n",
        "0\r\nAuthorization: x\r\n",
        "0\r\nX-Meshwork-Client-Id: boss\r\n",
        "0\r\nx_meshwork.client_id: boss\r\n",
        "0\r\nX: y\r\nX-Meshwork-Anything-That-Is-Longer-Than-What-Is-Kept: boss\r\n",
    ] {
        let mut state = Body::new(Framing::Chunked);
        assert_eq!(
            state.advance(body.as_bytes()),
            Err(Reason::HttpMalformed),
            "{body:?}"
        );
    }
    let mut endless = Body::new(Framing::Chunked);
    assert!(
        endless
            .advance(format!("1;{}", "x".repeat(4096)).as_bytes())
            .is_err()
    );
    let mut endless = Body::new(Framing::Chunked);
    assert!(
        endless
            .advance(format!("0\r\n{}", "x: y\r\n".repeat(5000)).as_bytes())
            .is_err()
    );
}

#[test]
fn a_rewritten_head_keeps_all_but_ours() {
    let head =
        b"GET / HTTP/1.1\r\nhOsT:  a \r\nX-Meshwork-Client-Id: forged\r\nB: 1\r\nB: 2\r\n\r\n";
    assert!(parse_request(head, HEAD_MAX).unwrap().unwrap().has_ours);
    let mut out = Vec::new();
    rewrite(head, Some("x-meshwork-client-id: true"), &mut out);
    let expected: &[u8] =
        b"GET / HTTP/1.1\r\nhOsT:  a \r\nB: 1\r\nB: 2\r\nx-meshwork-client-id: true\r\n\r\n";
    assert_eq!(out, expected);
}

#[test]
fn sniffing_takes_for_http_what_a_server_might() {
    let long = format!("GET /{}", "x".repeat(9000));
    let blanks = "\r\n".repeat(5000);
    for (bytes, expected) in [
        ("", Sniff::More),
        ("GE", Sniff::More),
        ("\r\n", Sniff::More),
        ("GET / HTTP/1.1\r", Sniff::More),
        ("GET / HTTP/1.1\r\n", Sniff::Http1),
        ("\r\nGET / HTTP/1.1\r\n", Sniff::Http1),
        ("GET /\u{e9} HTTP/1.1\r\n", Sniff::Http1),
        ("get / http/1.0\n", Sniff::Http1),
        (
            "A_VERY_LONG_METHOD_THAT_NOBODY_KNOWS / HTTP/1.1\r\n",
            Sniff::Http1,
        ),
        ("GET\t/\tHTTP/1.1\r\n", Sniff::Http1),
        (long.as_str(), Sniff::Http1),
        ("GET / HTTP/2.0\r\n", Sniff::Http1),
        // What some servers read as a request though it is none.
        (blanks.as_str(), Sniff::Http1),
        ("\x0b\x0cGET\x0b/\x0bHTTP/1.1\r\n", Sniff::Http1),
        ("GET /\r\n", Sniff::Http1),
        ("PRI * HTTP/2.0\r\n", Sniff::More),
        ("PRI * HTTP/2.0\r\nHost: a\r\n", Sniff::Http1),
        ("\r\nPRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", Sniff::Http1),
        ("PRI * HTTP/2.0\r\n\r\nSM\r\n\r", Sniff::More),
        ("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", Sniff::Http2),
        ("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0", Sniff::Http2),
        ("*1\r\n$4\r\nPING\r\n", Sniff::Other),
        ("\x16\x03\x01", Sniff::Other),
        ("\0\0\0\x08\x04", Sniff::Other),
        ("EHLO example.com\r\n", Sniff::Other),
        ("SSH-2.0-x\r\n", Sniff::Other),
    ] {
        assert_eq!(sniff(bytes.as_bytes()), expected, "{bytes:?}");
    }
}

#[test]
fn no_bytes_make_it_panic() {
    let pieces = [
        "GET ",
        "/ ",
        "HTTP/1.1",
        "\r\n",
        "\r",
        "\n",
        ":",
        " ",
        "Content-Length",
        "5",
        "chunked",
        "Transfer-Encoding",
        "Host",
        "\0",
        ";",
        "0",
        "A",
    ];
    let mut rng = Rng::new(7);
    for _ in 0..50_000 {
        let mut text = String::new();
        for _ in 0..rng.below(24) {
            text += pieces[rng.below(pieces.len() as u64) as usize];
        }
        let _ = request(&text);
        let _ = answer(&text, GET);
        let _ = sniff(text.as_bytes());
        let _ = Body::new(Framing::Chunked).advance(text.as_bytes());
    }
}
