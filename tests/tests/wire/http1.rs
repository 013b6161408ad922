//! HTTP/1 heads and bodies, changed at every byte, and httparse beside ours.

use mesh_core::http1::{self, Body, Framing, HEAD_MAX};
use mesh_core::rng::Rng;
use meshwork_tests::fuzz::{self, grammar};

use super::{MUTANTS, mutants, seeds};

const REQUESTS: &[&str] = &[
    "GET / HTTP/1.1\r\nHost: a\r\n\r\n",
    "GET http://a.b/c?d HTTP/1.1\r\nHost: a.b\r\nConnection: close, Upgrade\r\nUpgrade: websocket\r\n\r\n",
    "POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello",
    "POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    "POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\nTrailer: t\r\n\r\n0\r\nt: 1\r\n\r\n",
    "GET / HTTP/1.0\r\nConnection: keep-alive\r\nX-Meshwork-Peer: spiffe://x/y\r\n\r\n",
    "CONNECT a:443 HTTP/1.1\r\nHost: a:443\r\n\r\n",
];

const RESPONSES: &[&str] = &[
    "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
    "HTTP/1.1 200\r\nTransfer-Encoding: chunked\r\n\r\n",
    "HTTP/1.1 100 Continue\r\n\r\n",
    "HTTP/1.0 404 Not Found\r\nX-Meshwork-Reason: x\r\nServer: y\r\n\r\n",
];

/// What httparse, an implementation that others rely on, would let pass.
#[test]
fn a_request_head_that_we_accept_is_read_alike_by_httparse() {
    let mut accepted = 0;
    for (seed, bytes) in mutants(REQUESTS).filter(has_plain_line) {
        let Ok(Some(ours)) = http1::parse_request(&bytes, HEAD_MAX) else {
            continue;
        };
        let mut headers = [httparse::EMPTY_HEADER; 64];
        let mut theirs = httparse::Request::new(&mut headers);
        let status = theirs.parse(&bytes);
        let shown = String::from_utf8_lossy(&bytes);
        assert_eq!(
            status,
            Ok(httparse::Status::Complete(ours.len)),
            "seed {seed}: {shown:?}"
        );
        let value = |name: &str| {
            let of_name = |h: &&httparse::Header<'_>| h.name.eq_ignore_ascii_case(name);
            let found: Vec<&[u8]> = theirs
                .headers
                .iter()
                .filter(of_name)
                .map(|h| h.value)
                .collect();
            found
        };
        match ours.framing {
            Framing::Length(length) => {
                let text = std::str::from_utf8(value("content-length")[0]).unwrap();
                assert_eq!(text.trim().parse(), Ok(length), "seed {seed}: {shown:?}");
            }
            Framing::Chunked => assert!(
                value("content-length").is_empty(),
                "seed {seed}: two framings: {shown:?}"
            ),
            _ => assert!(
                value("transfer-encoding").is_empty(),
                "seed {seed}: a body was missed: {shown:?}"
            ),
        }
        accepted += 1;
    }
    assert!(
        MUTANTS / 20 < accepted,
        "only {accepted} mutants were accepted"
    );
}

/// httparse wants UTF-8 in targets and no control characters in reasons. We pass them on as they came: they frame nothing.
fn has_plain_line((_, bytes): &(u64, Vec<u8>)) -> bool {
    let mut line = bytes
        .split(|b| *b == b'\n')
        .next()
        .unwrap_or_default()
        .iter();
    line.all(|b| matches!(b, b'\r' | b' '..=b'~'))
}

#[test]
fn a_response_head_that_we_accept_is_read_alike_by_httparse() {
    let request = http1::parse_request(REQUESTS[0].as_bytes(), HEAD_MAX)
        .unwrap()
        .unwrap();
    let mut accepted = 0;
    for (seed, bytes) in mutants(RESPONSES).filter(has_plain_line) {
        let Ok(Some(ours)) = http1::parse_response(&bytes, &request, HEAD_MAX) else {
            continue;
        };
        let mut headers = [httparse::EMPTY_HEADER; 64];
        let mut theirs = httparse::Response::new(&mut headers);
        let status = theirs.parse(&bytes);
        let shown = String::from_utf8_lossy(&bytes);
        assert_eq!(
            status,
            Ok(httparse::Status::Complete(ours.len)),
            "seed {seed}: {shown:?}"
        );
        assert_eq!(theirs.code, Some(ours.status), "seed {seed}: {shown:?}");
        accepted += 1;
    }
    assert!(
        MUTANTS / 20 < accepted,
        "only {accepted} mutants were accepted"
    );
}

/// A head that is cut anywhere is waited for, or refused for what is there already; never accepted early.
#[test]
fn a_head_is_accepted_when_it_is_whole_and_not_before() {
    for text in REQUESTS {
        let bytes = text.as_bytes();
        let whole = http1::parse_request(bytes, HEAD_MAX).unwrap().unwrap();
        for end in 0..whole.len {
            assert_eq!(
                http1::parse_request(&bytes[..end], HEAD_MAX),
                Ok(None),
                "{text:?} at {end}"
            );
        }
    }
}

/// The end of a body is where it is, however its bytes arrive.
#[test]
fn a_body_ends_at_the_same_byte_in_whatever_pieces_it_comes() {
    const BODIES: &[&str] = &[
        "5\r\nhello\r\n0\r\n\r\nNEXT",
        "5;a=b\r\nhello\r\nA\r\n0123456789\r\n0\r\nt: 1\r\nu: 2\r\n\r\nNEXT",
        "00\r\n\r\nGET / HTTP/1.1",
    ];
    for (seed, bytes) in mutants(BODIES) {
        let mut whole = Body::new(Framing::Chunked);
        let expected = whole.advance(&bytes);
        let mut rng = Rng::new(seed);
        let mut pieces = Body::new(Framing::Chunked);
        let mut at = 0;
        let mut failed = false;
        while at < bytes.len() && !pieces.is_done() && !failed {
            let end = (at + 1 + rng.below(4) as usize).min(bytes.len());
            match pieces.advance(&bytes[at..end]) {
                Ok(taken) => at += taken,
                Err(_) => failed = true,
            }
        }
        let shown = String::from_utf8_lossy(&bytes);
        match expected {
            Ok(taken) => assert_eq!((taken, &whole), (at, &pieces), "seed {seed}: {shown:?}"),
            Err(_) => assert!(
                failed,
                "seed {seed}: refused whole, accepted in pieces: {shown:?}"
            ),
        }
    }
}

/// What a peer or an app says in our headers never passes.
#[test]
fn our_headers_are_removed_and_nothing_else_changes() {
    for (seed, bytes) in mutants(REQUESTS) {
        let Ok(Some(before)) = http1::parse_request(&bytes, HEAD_MAX) else {
            continue;
        };
        let mut out = Vec::new();
        http1::rewrite(&bytes[..before.len], Some("x-meshwork-peer: us"), &mut out);
        let after = http1::parse_request(&out, 2 * HEAD_MAX).unwrap().unwrap();
        let text = String::from_utf8_lossy(&out).to_lowercase();
        assert_eq!(
            text.matches("\r\nx-meshwork-").count(),
            1,
            "seed {seed}: {text:?}"
        );
        assert_eq!(
            (before.framing, before.method, before.keep_alive),
            (after.framing, after.method, after.keep_alive),
            "seed {seed}"
        );
    }
}

/// The targets over what the grammar makes: `fuzz/` runs the same for as long as one likes.
#[test]
fn heads_and_bodies_by_the_grammar_keep_their_rules() {
    seeds(MUTANTS, |seed| {
        fuzz::http1_request_head(&grammar::requests(seed));
        fuzz::http1_response_head(&grammar::response(seed));
        fuzz::chunked_body(&grammar::chunked_body(seed));
        1
    });
}
