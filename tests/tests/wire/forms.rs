//! The forms of our own: frames, stream headers, tokens, files, identities.

use mesh_api::frame::{PREFIX_LEN, Prefix, encode};
use mesh_api::header::Header;
use mesh_api::message::{BlockWriter, Field, Kind, RequestLine, prefix};
use mesh_api::resource::parse_all;
use mesh_api::token::JoinToken;
use mesh_api::workload_file::Workload;
use mesh_core::identity::SpiffeId;
use mesh_core::rng::Rng;
use mesh_core::stream::Limits;
use meshwork_tests::{fuzz, root};

use super::{MUTANTS, byte_mutants, mutants};

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
fn http2_messages_of_any_bytes_are_read_alike_in_any_pieces() {
    let field = Field {
        name: b"cookie",
        value: b"x",
        never_indexed: true,
    };
    let line = RequestLine {
        method: b"POST",
        scheme: b"http",
        authority: b"a",
        path: b"/",
        protocol: b"",
    };
    let (mut request, mut response) = (Vec::new(), Vec::new());
    let mut block = BlockWriter::request(&mut request, false, &line);
    block.field(&field);
    block.finish();
    request.extend(prefix(Kind::Data, true, 5));
    request.extend(b"hello");
    BlockWriter::response(&mut response, Kind::Interim, false, 103).finish();
    BlockWriter::response(&mut response, Kind::Head, false, 200).finish();
    response.extend(prefix(Kind::Data, false, 2));
    response.extend(b"hi");
    let mut trailers = BlockWriter::trailers(&mut response);
    trailers.field(&field);
    trailers.finish();
    assert_eq!((fuzz::message(&request), fuzz::message(&response)), (1, 3));
    let read: usize = byte_mutants(&[request, response])
        .map(|(_, bytes)| fuzz::message(&bytes))
        .sum();
    assert!(read > MUTANTS as usize / 4, "{read} blocks were read");
}

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

/// Questions that are damaged are answered as questions, or not at all; a name of the mesh never leaves the host.
#[test]
fn questions_for_names_of_any_bytes_are_answered_here() {
    let seeds = root().join("fuzz/corpus/dns");
    let files = std::fs::read_dir(seeds).unwrap();
    let questions: Vec<Vec<u8>> = files
        .map(|file| std::fs::read(file.unwrap().path()).unwrap())
        .collect();
    let answers: usize = byte_mutants(&questions)
        .map(|(_, bytes)| fuzz::names::dns(&bytes))
        .sum();
    assert!(answers > MUTANTS as usize / 4, "{answers} answers");
}
