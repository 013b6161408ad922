//! What our two agents make of the bytes of a connection: the requests that they pass, and the bytes that the app gets
//! of them.

use std::fmt;

use mesh_core::http1::{
    Body, Framing, HEAD_MAX, Method, Request, parse_request, parse_response, rewrite,
};

/// What the receiving agent adds to each request.
const CLIENT_ID: &str = "x-meshwork-client-id: spiffe://mesh.test/ns/a/sa/b";

/// A message as a reader of bytes understands it.
#[derive(Clone, PartialEq, Eq)]
pub struct Message {
    /// Method and target, or the status alone; each byte a character.
    pub line: Vec<String>,
    /// Lower-case names, trimmed values, sorted by name; equal names stay in their order.
    pub headers: Vec<(String, Vec<u8>)>,
    pub body: Vec<u8>,
}

impl fmt::Debug for Message {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = |bytes: &[u8]| bytes.escape_ascii().to_string();
        write!(f, "{:?} ", self.line)?;
        f.debug_map()
            .entries(self.headers.iter().map(|(name, value)| (name, text(value))))
            .finish()?;
        write!(f, " {:?}", text(&self.body))
    }
}

/// What another reader understood, and whether its body came to a proper end.
#[derive(Debug)]
pub struct Seen {
    pub message: Message,
    pub whole: bool,
}

/// What passed.
#[derive(Debug, Default)]
pub struct Passed {
    /// Messages that came whole.
    pub whole: Vec<Message>,
    /// One whose body did not: who reads it must notice.
    pub begun: Option<Message>,
    /// What the other side gets.
    pub bytes: Vec<u8>,
}

/// Reads as agents read what a caller sends, until something is refused or the connection is no longer HTTP.
pub fn requests(input: &[u8]) -> Passed {
    let mut passed = Passed::default();
    let mut rest = input;
    while let Ok(Some(head)) = parse_request(rest, HEAD_MAX) {
        let (mut message, taken) = body(&rest[head.len..], head.framing);
        let mut line = Vec::new();
        rewrite(&rest[..head.len], Some(CLIENT_ID), &mut line);
        message.message.headers = headers(&line);
        message.message.line = first_line(&line).take(2).collect();
        passed.bytes.extend(line);
        passed.bytes.extend(&rest[head.len..head.len + taken]);
        rest = &rest[head.len + taken..];
        if !message.whole {
            passed.begun = Some(message.message);
            break;
        }
        passed.whole.push(message.message);
        // What follows CONNECT waits for its answer, and is then a tunnel's or another connection's.
        if !head.keep_alive || head.method == Method::Connect {
            break;
        }
    }
    passed
}

/// Reads as agents read an app's answer to `request`. Interim answers are passed and skipped.
pub fn response(input: &[u8], request: &Request) -> Passed {
    let mut passed = Passed::default();
    let mut rest = input;
    while let Ok(Some(head)) = parse_response(rest, request, HEAD_MAX) {
        let mut line = Vec::new();
        rewrite(&rest[..head.len], None, &mut line);
        passed.bytes.extend(&line);
        rest = &rest[head.len..];
        if head.is_interim() {
            continue;
        }
        let (mut read, taken) = body(rest, head.framing);
        passed.bytes.extend(&rest[..taken]);
        read.message.headers = headers(&line);
        read.message.line = vec![head.status.to_string()];
        if read.whole || head.framing == Framing::UntilClose {
            passed.whole.push(read.message);
        } else {
            passed.begun = Some(read.message);
        }
        break;
    }
    passed
}

struct Read {
    message: Message,
    whole: bool,
}

/// The body at the start of `bytes`, and how many bytes of it pass: byte by byte, so that all that may have been
/// sent on before an error is.
fn body(bytes: &[u8], framing: Framing) -> (Read, usize) {
    // What a tunnel carries is nobody's body.
    let mut state = Body::new(if framing == Framing::Tunnel {
        Framing::None
    } else {
        framing
    });
    let mut taken = 0;
    while taken < bytes.len() && !state.is_done() {
        match state.advance(&bytes[taken..=taken]) {
            Ok(more) => taken += more,
            Err(_) => break,
        }
    }
    let data = if framing == Framing::Chunked {
        dechunked(&bytes[..taken])
    } else {
        bytes[..taken].to_vec()
    };
    let message = Message {
        line: Vec::new(),
        headers: Vec::new(),
        body: data,
    };
    (
        Read {
            message,
            whole: state.is_done(),
        },
        taken,
    )
}

/// The data of chunks that were accepted.
fn dechunked(mut bytes: &[u8]) -> Vec<u8> {
    let mut data = Vec::new();
    while let Some(end) = bytes.iter().position(|b| *b == b'\n') {
        let digits = bytes.iter().take_while(|b| b.is_ascii_hexdigit()).count();
        let text = std::str::from_utf8(&bytes[..digits]).unwrap_or_default();
        let Ok(size @ 1..) = usize::from_str_radix(text, 16) else {
            break;
        };
        let rest = &bytes[end + 1..];
        data.extend(&rest[..size.min(rest.len())]);
        bytes = rest.get(size + 2..).unwrap_or_default();
    }
    data
}

fn first_line(head: &[u8]) -> impl Iterator<Item = String> {
    let line = head.split(|b| *b == b'\r').next().unwrap_or_default();
    line.split(|b| *b == b' ').map(latin1)
}

fn headers(head: &[u8]) -> Vec<(String, Vec<u8>)> {
    let lines = head.split(|b| *b == b'\n').skip(1);
    let mut headers: Vec<_> = lines
        .filter_map(|line| {
            let colon = line.iter().position(|b| *b == b':')?;
            let name = latin1(&line[..colon]).to_ascii_lowercase();
            Some((name, line[colon + 1..].trim_ascii().to_vec()))
        })
        .collect();
    headers.sort_by(|a, b| a.0.cmp(&b.0));
    headers
}

/// Bytes as text, each a character of its own.
pub(super) fn latin1(bytes: &[u8]) -> String {
    bytes.iter().copied().map(char::from).collect()
}
