//! The bodies of the fuzz targets: each takes any bytes and panics where a parser of ours breaks its word. `fuzz/` runs
//! them under libFuzzer, the wire tier with seeded inputs.

// By path, since `fuzz/` takes this file into a crate of its own, where it stands elsewhere.
#[path = "fuzz/by_hyper.rs"]
pub mod by_hyper;
#[path = "fuzz/by_node.rs"]
pub mod by_node;
#[path = "fuzz/grammar.rs"]
pub mod grammar;
#[path = "fuzz/names.rs"]
pub mod names;
#[path = "fuzz/reading.rs"]
pub mod reading;
#[path = "fuzz/reports.rs"]
pub mod reports;

use mesh_api::frame::{PREFIX_LEN, Prefix, encode};
use mesh_api::header::Header;
use mesh_api::message::{
    self, BlockWriter, Fields, Kind, MessageError, Part, Reader, read_request, read_response,
};
use mesh_api::proto::{Edges, FromAgent, FromControl, Revocations, from_agent, from_control};
use mesh_api::stored::{StoredRevocations, unseal};
use mesh_api::sync::{self, EndpointsChange, IndexChange};
use mesh_api::token::JoinToken;
use mesh_api::workload_file::Workload;
use mesh_core::edge::EdgeReport;
use mesh_core::http1::{Body, Framing, HEAD_MAX, Request, parse_request, parse_response, rewrite};
use mesh_core::stream::{Limits, Machine, Side};
use mesh_core::vip::VipRanges;
use mesh_runtime::tls::record::{
    CONTENT_MAX, HEADER_LEN, OVERHEAD, Opened, RECORD_MAX, content, content_room, record_len,
};
use prost::Message as _;

use reading::{Message, Passed, Seen};

/// Longest block of an HTTP/2 message: short, so that the bound is met.
const BLOCK_MAX: usize = 4096;

/// Frames as a peer may send them: each reads back as what it was, and none breaks the machine behind.
pub fn frames(mut bytes: &[u8]) {
    let mut machine = Machine::new(Side::Server, Limits::DEFAULT);
    while let Some((head, rest)) = bytes.split_first_chunk::<PREFIX_LEN>() {
        let Ok(prefix) = Prefix::decode(*head, Limits::DEFAULT.max_frame) else {
            return;
        };
        let Some(payload) = rest.get(..prefix.length) else {
            return;
        };
        let Ok(frame) = prefix.frame(payload) else {
            return;
        };
        let mut out = Vec::new();
        encode(&frame, &mut out);
        // A reason that we do not know becomes the one for that; all else is written as it was.
        let again = out.split_first_chunk::<PREFIX_LEN>().map(|(head, rest)| {
            Prefix::decode(*head, Limits::DEFAULT.max_frame).and_then(|prefix| prefix.frame(rest))
        });
        assert_eq!(again, Some(Ok(frame)), "{bytes:?} became {out:?}");
        if machine.handle(&frame).is_err() {
            return;
        }
        while machine.poll_control().is_some() {}
        bytes = &rest[prefix.length..];
    }
}

/// TLS records of a peer: where each ends, and what its text says once it is opened. The cipher is not ours, so the text
/// is taken as it is: a peer with its key may have sealed any.
pub fn tls_records(mut bytes: &[u8]) {
    while let Ok(Some(length)) = record_len(bytes) {
        assert!((OVERHEAD..=RECORD_MAX).contains(&length), "{length}");
        let Some((record, rest)) = bytes.split_at_checked(length) else {
            return;
        };
        let text = &record[HEADER_LEN..][..content_room(length)];
        if let Ok(opened) = content(text) {
            assert_eq!(opened, said(text), "{text:?}");
        }
        bytes = rest;
    }
}

/// The one reading of a text: its last byte that is not zero says what those before it are.
fn said(text: &[u8]) -> Opened {
    let mut kept = text.to_vec();
    while kept.last() == Some(&0) {
        kept.pop();
    }
    let kind = kept.pop();
    assert!(kept.len() <= CONTENT_MAX, "{} bytes", kept.len());
    match (kind, kept.as_slice()) {
        (Some(23), data) => Opened::Data(data.len()),
        (Some(22), [24, 0, 0, 1, 0]) => Opened::KeyUpdate(false),
        (Some(22), [24, 0, 0, 1, 1]) => Opened::KeyUpdate(true),
        (Some(21), [_, 0]) => Opened::CloseNotify,
        _ => panic!("{text:?} says nothing"),
    }
}

/// A stream's header: what is read is written so that it reads as the same.
pub fn header(bytes: &[u8]) {
    if let Ok(header) = Header::decode(bytes) {
        let mut out = Vec::new();
        header.encode(&mut out);
        assert_eq!(Header::decode(&out), Ok(header), "{bytes:?} became {out:?}");
    }
}

/// An HTTP/2 exchange inside its stream: read alike in whatever pieces it comes, and what is read is written as it was.
/// Returns how many blocks were read.
pub fn message(bytes: &[u8]) -> usize {
    let sides = [message::Side::Request, message::Side::Response];
    let read = sides.map(|side| {
        let whole = messages(side, bytes, |reader, rest| match reader.prefix_left() {
            // As the agents do: a prefix by itself, so that no data is taken before there is room for it.
            0 => rest,
            left => left,
        });
        for size in [1, 2 + bytes.len() % 7, usize::MAX] {
            let pieces = messages(side, bytes, |_, _| size);
            assert_eq!(pieces, whole, "in pieces of {size}");
        }
        let blocks = whole.0.iter().filter(|message| message.0 != Kind::Data);
        blocks
            .filter(|(kind, block, last)| written_as_read(side, *kind, block, *last))
            .count()
    });
    read.iter().sum()
}

/// What a direction says, data that follows data as one; whether it came to its end; why it can not be read on.
type Direction = (Vec<(Kind, Vec<u8>, bool)>, bool, Option<MessageError>);

/// Reads a direction; `take` says how many bytes the reader is handed, of so many that are there.
fn messages(
    side: message::Side,
    mut bytes: &[u8],
    take: impl Fn(&Reader, usize) -> usize,
) -> Direction {
    let mut reader = Reader::new(side, BLOCK_MAX);
    let mut all: Vec<(Kind, Vec<u8>, bool)> = Vec::new();
    while !bytes.is_empty() {
        let there = take(&reader, bytes.len()).min(bytes.len());
        let (used, part) = match reader.read(&bytes[..there]) {
            Ok(read) => read,
            Err(error) => return (all, reader.is_over(), Some(error)),
        };
        match part {
            None => assert!(used > 0, "neither bytes taken nor a part given"),
            Some(Part::Block { kind, block, last }) => all.push((kind, block.to_vec(), last)),
            Some(Part::Data { data, last }) => match all.last_mut() {
                Some((Kind::Data, before, ended)) => {
                    before.extend_from_slice(data);
                    *ended = last;
                }
                _ => all.push((Kind::Data, data.to_vec(), last)),
            },
        }
        bytes = &bytes[used..];
    }
    (all, reader.is_over(), None)
}

/// Whether a block can be read; if so it must be the only form of what it says.
fn written_as_read(side: message::Side, kind: Kind, block: &[u8], last: bool) -> bool {
    let mut out = Vec::new();
    let read = match (kind, side) {
        (Kind::Trailers, _) => Some((
            BlockWriter::trailers(&mut out),
            Fields::new(block, BLOCK_MAX),
        )),
        (_, message::Side::Request) => read_request(block, BLOCK_MAX)
            .ok()
            .map(|(line, fields)| (BlockWriter::request(&mut out, last, &line), fields)),
        (_, message::Side::Response) => read_response(block, BLOCK_MAX)
            .ok()
            .map(|(status, fields)| (BlockWriter::response(&mut out, kind, last, status), fields)),
    };
    let Some((mut writer, fields)) = read else {
        return false;
    };
    let Ok(fields) = fields.collect::<Result<Vec<_>, _>>() else {
        return false;
    };
    fields.iter().for_each(|field| writer.field(field));
    writer.finish();
    let expected = [&message::prefix(kind, last, block.len()), block].concat();
    assert_eq!(out, expected, "{kind:?} became another");
    true
}

/// A join token: what is read is the only text of what it says.
pub fn token(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    if let Ok(token) = JoinToken::parse(&text) {
        assert_eq!(JoinToken::parse(&token.reveal()).as_ref(), Ok(&token));
    }
}

/// A message of a Sync session, as the other side reads it, or what an agent has on disk of them: what is taken is
/// written again as it was.
pub fn sync(bytes: &[u8]) {
    if let Ok(FromControl {
        message: Some(said),
    }) = FromControl::decode(bytes)
    {
        from_control(&said);
    }
    if let Ok(FromAgent {
        message: Some(said),
    }) = FromAgent::decode(bytes)
    {
        match said {
            from_agent::Message::Edges(wire) => {
                if let Ok(report) = EdgeReport::try_from(&wire) {
                    let again = EdgeReport::try_from(&Edges::from(&report));
                    assert_eq!(again.as_ref(), Ok(&report));
                }
            }
            from_agent::Message::Revocations(wire) => revocations(&wire),
            from_agent::Message::Report(wire) => reports::report(&wire),
            _ => {}
        }
    }
    let _ = unseal::<StoredRevocations>(bytes);
}

fn from_control(said: &from_control::Message) {
    use from_control::Message;
    match said {
        Message::Index(wire) => {
            let vips = VipRanges::default();
            let read = |wire| IndexChange::read(wire, &vips).and_then(|change| change.apply(None));
            if let Ok(index) = read(wire) {
                let kept = sync::index_snapshot(&index, wire.revision);
                let again = read(&kept).expect("what was kept is read");
                assert_eq!(sync::index_snapshot(&again, wire.revision), kept);
            }
        }
        Message::Endpoints(wire) => drop(EndpointsChange::try_from(wire)),
        Message::Policies(wire) => {
            let own = "corp.test".parse().expect("a trust domain");
            drop(sync::policy_set(wire, &own));
        }
        Message::ReportStatus(wire) => drop(sync::report_status(wire)),
        Message::Revocations(wire) => revocations(wire),
        Message::Welcome(_) | Message::Beat(_) | Message::Bundle(_) => {}
    }
}

fn revocations(wire: &Revocations) {
    if let Ok(all) = sync::revocations(wire) {
        let (revoked, issuers) = sync::revocations_to_wire(&all);
        let again = Revocations {
            revoked,
            issuers,
            ..Revocations::default()
        };
        assert_eq!(sync::revocations(&again), Ok(all));
    }
}

/// A file of services.d: whatever is wrong with it, it is said where and what to do.
pub fn workload_file(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    match Workload::parse("web", &text) {
        Ok(workload) => assert!(!workload.account.to_string().is_empty()),
        Err(error) => assert!(!error.message.is_empty() && !error.remedy.is_empty()),
    }
}

/// A request's head: never accepted before it is whole, and still a head without what is ours.
pub fn http1_request_head(bytes: &[u8]) {
    let Ok(Some(head)) = parse_request(bytes, HEAD_MAX) else {
        return;
    };
    assert_eq!(
        parse_request(&bytes[..head.len - 1], HEAD_MAX),
        Ok(None),
        "accepted before its end"
    );
    let mut out = Vec::new();
    rewrite(
        &bytes[..head.len],
        Some("x-meshwork-client-id: us"),
        &mut out,
    );
    let again = parse_request(&out, 2 * HEAD_MAX)
        .ok()
        .flatten()
        .expect("our own rewriting is refused");
    let facts = |head: &Request| (head.method, head.framing, head.keep_alive, head.upgrade);
    assert_eq!((facts(&again), again.len), (facts(&head), out.len()));
    let text = String::from_utf8_lossy(&out)
        .to_lowercase()
        .replace('_', "-");
    assert_eq!(
        text.matches("\r\nx-meshwork-").count(),
        1,
        "a header of ours passed: {text:?}"
    );
}

/// A response's head, to each kind of request.
pub fn http1_response_head(bytes: &[u8]) {
    for (_, request) in asked() {
        let Ok(Some(head)) = parse_response(bytes, &request, HEAD_MAX) else {
            continue;
        };
        let cut = parse_response(&bytes[..head.len - 1], &request, HEAD_MAX);
        assert_eq!(cut, Ok(None), "accepted before its end");
        let mut out = Vec::new();
        rewrite(&bytes[..head.len], None, &mut out);
        let again = parse_response(&out, &request, HEAD_MAX)
            .ok()
            .flatten()
            .expect("our own rewriting is refused");
        assert_eq!((again.status, again.framing), (head.status, head.framing));
    }
}

/// A chunked body ends at the same byte in whatever pieces it comes.
pub fn chunked_body(bytes: &[u8]) {
    let mut whole = Body::new(Framing::Chunked);
    let expected = whole.advance(bytes);
    let mut pieces = Body::new(Framing::Chunked);
    let mut at = 0;
    while at < bytes.len() && !pieces.is_done() {
        match pieces.advance(&bytes[at..=at]) {
            Ok(more) => at += more,
            Err(reason) => {
                assert_eq!(expected, Err(reason), "refused in pieces only");
                return;
            }
        }
    }
    assert_eq!(
        (expected, whole),
        (Ok(at), pieces),
        "accepted in pieces only"
    );
}

/// The requests that agents pass, hyper reads as the same, or refuses. Returns how many it read alike.
pub fn requests_against_hyper(bytes: &[u8]) -> usize {
    let passed = reading::requests(bytes);
    let whole = compare_requests(&passed, &by_hyper::requests(&passed.bytes, usize::MAX));
    // In pieces it must not be another reading either.
    let seen = by_hyper::requests(&passed.bytes, 1 + bytes.len() % 7);
    assert_eq!(compare_requests(&passed, &seen), whole);
    whole
}

/// The response that agents pass, hyper reads as the same, or refuses. Returns how many it read alike.
pub fn responses_against_hyper(bytes: &[u8]) -> usize {
    let read = asked().map(|(method, request)| {
        let passed = reading::response(bytes, &request);
        let seen = by_hyper::response(&passed.bytes, 1 + bytes.len() % 7, method);
        compare_response(&passed, seen.as_ref())
    });
    read.sum()
}

/// Panics where another reader understood requests that agents did not pass so.
pub fn compare_requests(passed: &Passed, seen: &[Seen]) -> usize {
    let show = || shown(passed, &seen);
    for (at, theirs) in seen.iter().enumerate() {
        match passed.whole.get(at) {
            Some(ours) if theirs.whole => {
                assert!(alike(ours, &theirs.message), "read in two ways: {}", show())
            }
            // It refused the body that we passed: then it reads nothing behind it.
            Some(_) => assert_eq!(at + 1, seen.len(), "read on behind an error: {}", show()),
            None => {
                let begun = passed.begun.is_some() && at == passed.whole.len();
                assert!(
                    begun && !theirs.whole,
                    "a request that we did not pass: {}",
                    show()
                );
            }
        }
    }
    seen.iter().filter(|seen| seen.whole).count()
}

/// Panics where another reader understood a response that agents did not pass so.
pub fn compare_response(passed: &Passed, seen: Option<&Seen>) -> usize {
    let Some(theirs) = seen.filter(|seen| seen.whole) else {
        return 0;
    };
    match passed.whole.first() {
        Some(ours) => assert!(
            alike(ours, &theirs.message),
            "read in two ways: {}",
            shown(passed, &seen)
        ),
        None => panic!(
            "a response that we did not pass as whole: {}",
            shown(passed, &seen)
        ),
    }
    1
}

fn shown(passed: &Passed, seen: &impl std::fmt::Debug) -> String {
    let sent = passed.bytes.escape_ascii();
    format!(
        "\nsent {sent}\nours {:?}\nand {:?}\nseen {seen:?}",
        passed.whole, passed.begun
    )
}

/// Requests whose answers are framed differently.
pub fn asked() -> impl Iterator<Item = (&'static str, Request)> {
    ["GET", "HEAD", "CONNECT"].into_iter().filter_map(|method| {
        let head = format!("{method} / HTTP/1.1\r\nHost: a\r\n\r\n");
        Some((method, parse_request(head.as_bytes(), HEAD_MAX).ok()??))
    })
}

/// hyper writes an absolute target without a path with one.
fn alike(ours: &Message, theirs: &Message) -> bool {
    let lines = ours.line == theirs.line
        || matches!((ours.line.as_slice(), theirs.line.as_slice()), ([a, b], [c, d]) if a == c && *d == format!("{b}/"));
    lines && ours.headers == theirs.headers && ours.body == theirs.body
}
