//! Hostile input for every parser of ours, and a second implementation beside ours where there is one. All of it is
//! seeded: a failure names the seed that replays it. Golden bytes stand beside the forms themselves, in `mesh/api`.

use mesh_api::frame::{PREFIX_LEN, Prefix, encode};
use mesh_api::header::Header;
use mesh_api::resource::parse_all;
use mesh_api::token::JoinToken;
use mesh_api::workload_file::Workload;
use mesh_core::http1::{self, Body, Framing, HEAD_MAX};
use mesh_core::identity::SpiffeId;
use mesh_core::rng::Rng;
use mesh_core::stream::Limits;

/// Mutants of each corpus: enough that each byte is changed several times, and seconds in all.
const MUTANTS: u64 = 20_000;

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

#[test]
fn any_bytes_are_a_frame_that_writes_itself_back_or_an_error() {
    let max = Limits::DEFAULT.max_frame;
    let mut read = 0;
    for seed in 0..MUTANTS {
        let mut rng = Rng::new(seed);
        let mut prefix = [0; PREFIX_LEN];
        prefix.fill_with(|| rng.next_u64() as u8);
        // Mostly short frames of types that exist: the rest is refused by its prefix.
        if rng.below(8) != 0 {
            prefix[..2].fill(0);
            prefix[2] = [0, 2, 4, 6, 8, 17][rng.below(6) as usize];
            prefix[3] = rng.below(10) as u8;
        }
        let Ok(decoded) = Prefix::decode(prefix, max) else {
            continue;
        };
        let payload: Vec<u8> = (0..decoded.length).map(|_| rng.next_u64() as u8).collect();
        for cut in 0..payload.len().min(20) {
            // A short payload is the reader's mistake; it must not become another frame or a panic.
            let _ = decoded.frame(&payload[..cut]);
        }
        let Ok(frame) = decoded.frame(&payload) else {
            continue;
        };
        let mut out = Vec::new();
        encode(&frame, &mut out);
        let mut again = Vec::new();
        let (head, rest) = out.split_at(PREFIX_LEN);
        let reread = Prefix::decode(head.try_into().unwrap(), max).unwrap();
        encode(&reread.frame(rest).unwrap(), &mut again);
        assert_eq!(out, again, "seed {seed}: {frame:?}");
        read += 1;
    }
    assert!(MUTANTS / 20 < read, "only {read} frames were read");
}

#[test]
fn stream_headers_of_any_bytes_are_read_or_refused() {
    let mut golden = Vec::new();
    Header::decode(&[1, 1, 0x1f, 0x90, 3, b'w', b'e', b'b'])
        .unwrap()
        .encode(&mut golden);
    for (seed, bytes) in byte_mutants(&[golden]) {
        let Ok(header) = Header::decode(&bytes) else {
            continue;
        };
        let mut out = Vec::new();
        header.encode(&mut out);
        assert!(
            bytes.starts_with(&out),
            "seed {seed}: {bytes:?} became {out:?}"
        );
    }
}

/// A token that was mistyped is refused; it never becomes another token.
#[test]
fn a_changed_token_is_refused() {
    let token = JoinToken {
        addresses: vec!["10.0.0.1:7440".to_owned()],
        pins: vec![[7; 32]],
        id: "abcdefgh".to_owned(),
        secret: [9; 32],
    };
    let text = token.reveal();
    assert!(JoinToken::parse(&text).is_ok_and(|read| read == token));
    for end in 0..text.len() {
        assert!(JoinToken::parse(&text[..end]).is_err(), "cut at {end}");
    }
    for (seed, bytes) in mutants(&[&text]) {
        let changed = String::from_utf8_lossy(&bytes);
        if changed.trim() != text {
            let read = JoinToken::parse(&changed);
            assert!(read.is_err(), "seed {seed}: {changed}");
        }
    }
}

#[test]
fn files_of_any_text_are_read_or_refused() {
    const WORKLOAD: &str = "namespace = \"shop\"\n[owner]\nuser = \"www-data\"\n[[service]]\n\
        ports = [{ port = 80, protocol = \"http\" }]\ncheck = { http = \"/\", interval_s = 5 }\n";
    const POLICY: &str = "apiVersion: meshwork.io/v1alpha1\nkind: Policy\nmetadata: {name: p, namespace: shop}\n\
        spec: {service: web, rules: [{name: r, from: [{identity: a/b}, {cidr: 10.0.0.0/8}], ports: [80]}]}\n";
    const SERVICE: &str = "apiVersion: v1\nkind: Service\nmetadata: {name: web, namespace: shop}\n\
        spec: {ports: [{port: 80, appProtocol: http}]}\n---\n";
    for (_, bytes) in mutants(&[WORKLOAD]).take(MUTANTS as usize / 4) {
        drop(Workload::parse("web", &String::from_utf8_lossy(&bytes)));
    }
    for (_, bytes) in mutants(&[POLICY, SERVICE]).take(MUTANTS as usize / 4) {
        drop(parse_all(&String::from_utf8_lossy(&bytes)));
    }
    assert!(Workload::parse("web", WORKLOAD).is_ok());
    assert_eq!(
        parse_all(&format!("{SERVICE}{POLICY}"))
            .map(|all| all.len())
            .unwrap(),
        2
    );
}

#[test]
fn an_identity_that_is_read_is_written_as_it_was() {
    const IDS: &[&str] = &[
        "spiffe://corp.example.com/ns/shop/sa/web",
        "spiffe://corp.example.com/agent/00112233445566778899aabbccddeeff",
        "spiffe://corp.example.com/host/vm-1",
    ];
    for (seed, bytes) in mutants(IDS) {
        let text = String::from_utf8_lossy(&bytes);
        if let Ok(id) = SpiffeId::parse(&text) {
            assert_eq!(id.to_string(), text, "seed {seed}");
        }
    }
}

/// The corpus with one to four random changes each, by seed.
fn mutants(corpus: &[&str]) -> impl Iterator<Item = (u64, Vec<u8>)> + use<> {
    let corpus: Vec<Vec<u8>> = corpus.iter().map(|text| text.as_bytes().to_vec()).collect();
    byte_mutants(&corpus)
}

fn byte_mutants(corpus: &[Vec<u8>]) -> impl Iterator<Item = (u64, Vec<u8>)> + use<> {
    /// Bytes that mean something to a parser come more often than others.
    const MEANT: &[u8] = b"\r\n \t:;,.-_/*0159azAZ\"'[]{}=\0\x7f\xff";
    let corpus = corpus.to_vec();
    (0..MUTANTS).map(move |seed| {
        let mut rng = Rng::new(seed);
        let mut bytes = corpus[rng.below(corpus.len() as u64) as usize].clone();
        for _ in 0..=rng.below(4) {
            let at = rng.below(bytes.len().max(1) as u64) as usize;
            let byte = match rng.below(3) {
                0 => rng.next_u64() as u8,
                _ => MEANT[rng.below(MEANT.len() as u64) as usize],
            };
            match rng.below(5) {
                0 => bytes.insert(at, byte),
                1 if at < bytes.len() => drop(bytes.remove(at)),
                2 => bytes.truncate(at.max(1)),
                3 => {
                    let end = (at + rng.below(12) as usize).min(bytes.len());
                    let part = bytes[at.min(end)..end].to_vec();
                    bytes.splice(at..at, part);
                }
                _ if at < bytes.len() => bytes[at] = byte,
                _ => bytes.push(byte),
            }
        }
        (seed, bytes)
    })
}
