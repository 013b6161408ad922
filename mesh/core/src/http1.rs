//! HTTP/1.1 framing (RFC 9112), as strict as it must be so that two agents and an app never read one input in
//! two ways. Bytes are not changed here: a head is judged, a body is measured.

mod body;
mod fields;
mod target;

use fields::{Bad, Facts, Lines, is_h2c, is_name, is_text, is_token};
use memchr::{memchr, memchr2_iter};

pub use body::Body;
pub use fields::{is_ours, is_trailer};

use crate::reason::Reason;

/// Default bound of a head, in bytes.
pub const HEAD_MAX: usize = 64 * 1024;
/// Headers that begin so are ours: what an app or a peer says in them is removed.
pub const OUR_PREFIX: &[u8] = b"x-meshwork-";

/// How the end of a body is found (RFC 9112 §6.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    /// No body.
    None,
    Length(u64),
    Chunked,
    /// A response that ends with its connection.
    UntilClose,
    /// After CONNECT or an upgrade: bytes both ways until both ends close.
    Tunnel,
}

/// What of a request decides how its response is framed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    Head,
    Connect,
    /// GET, OPTIONS, TRACE, DELETE: doing it twice is doing it once (RFC 9110 §9.2.2), and mostly there is no body.
    Idempotent,
    /// Idempotent too, with a body.
    Put,
    Other,
}

impl Method {
    /// Whether a request may be repeated when it is not known what became of it.
    pub const fn is_idempotent(self) -> bool {
        matches!(self, Self::Head | Self::Idempotent | Self::Put)
    }
}

/// A judged request head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Bytes of the head, empty line included.
    pub len: usize,
    pub method: Method,
    pub framing: Framing,
    /// Whether the client lets the connection live after this request.
    pub keep_alive: bool,
    pub upgrade: bool,
    /// Whether it has headers that [`rewrite`] removes.
    pub has_ours: bool,
    /// Whether it logs its connection in (NTLM, Negotiate): then all that follows on the caller's connection belongs on
    /// the same connection to the app, and nobody else's does.
    pub binds: bool,
}

impl Request {
    /// Whether a server might overlook this body, and take it for a next request.
    pub fn has_odd_body(&self) -> bool {
        self.framing != Framing::None && matches!(self.method, Method::Head | Method::Idempotent)
    }
}

/// A judged response head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Response {
    pub len: usize,
    pub status: u16,
    pub framing: Framing,
    pub keep_alive: bool,
    pub has_ours: bool,
    /// Whether it asks for a login of its connection (NTLM, Negotiate): nobody else may use that.
    pub binds: bool,
}

impl Response {
    /// 1xx but 101: another head follows.
    pub const fn is_interim(&self) -> bool {
        self.status < 200 && self.status != 101
    }
}

/// What the first bytes of a caller are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sniff {
    Http1,
    /// The whole preface of an HTTP/2 client.
    Http2,
    Other,
    /// Not decided yet.
    More,
}

/// Tells whether bytes begin what a lenient server might take for an HTTP/1 request: then it must be judged as one,
/// for as bytes it would carry whatever headers its sender likes. Decided by the first line at the latest, mostly
/// by the first byte. HTTP/2's preface, which nobody takes for anything else, is told apart.
pub fn sniff(bytes: &[u8]) -> Sniff {
    /// A longer first line is a request if it is text and begins like one.
    const LINE_MAX: usize = 8192;
    /// RFC 9113 §3.4.
    const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    // Servers skip empty lines before a request (RFC 9112 §2.2), and some all that their language calls a blank.
    let blank = bytes.iter().take_while(|b| is_blank(**b)).count();
    let line = &bytes[blank..];
    let Some(first) = line.first() else {
        return if bytes.len() > LINE_MAX {
            Sniff::Http1
        } else {
            Sniff::More
        };
    };
    if !is_token(*first) {
        return Sniff::Other;
    }
    let end = line.iter().position(|b| *b == b'\n');
    let text = &line[..end.unwrap_or(line.len())];
    if text.iter().any(|b| *b < 0x20 && !is_blank(*b)) {
        return Sniff::Other;
    }
    if end.is_some() {
        if PREFACE.starts_with(&bytes[..bytes.len().min(PREFACE.len())]) {
            return if bytes.len() < PREFACE.len() {
                Sniff::More
            } else {
                Sniff::Http2
            };
        }
        // Whatever version it claims; without one it is a request of HTTP/0.9, if it gets something.
        let version = |part: &[u8]| part.eq_ignore_ascii_case(b"HTTP/");
        let old = text.starts_with(b"GET") && text.get(3).is_some_and(|b| is_blank(*b));
        return if old || text.windows(5).any(version) {
            Sniff::Http1
        } else {
            Sniff::Other
        };
    }
    if bytes.len() <= LINE_MAX {
        return Sniff::More;
    }
    let method = text.iter().take_while(|b| is_token(**b)).count();
    if text.get(method).is_some_and(|b| is_blank(*b)) {
        Sniff::Http1
    } else {
        Sniff::Other
    }
}

/// What some server takes for a blank: of ASCII, and of Latin-1.
const fn is_blank(byte: u8) -> bool {
    matches!(byte, b'\t'..=b'\r' | 0x1c..=0x1f | b' ' | 0x85 | 0xa0)
}

/// Judges the request head at the start of `bytes`. `None`: it is not whole yet.
///
/// # Errors
/// [`Reason::HttpMalformed`] or [`Reason::HttpHeadTooLarge`] (above `max` bytes).
pub fn parse_request(bytes: &[u8], max: usize) -> Result<Option<Request>, Reason> {
    let malformed = Reason::HttpMalformed;
    let Some(Head { len, line, facts }) = read_head(bytes, max, malformed)? else {
        return Ok(None);
    };
    let mut words = line.split(|b| *b == b' ');
    let (Some(method), Some(target), Some(version), None) =
        (words.next(), words.next(), words.next(), words.next())
    else {
        return Err(malformed);
    };
    let old = is_old(version).ok_or(malformed)?;
    if facts.hosts > 1 || (facts.hosts == 0 && !old) {
        return Err(malformed);
    }
    let host = (facts.hosts == 1).then_some(facts.host);
    if !is_name(method) || !target::is_proper(method, target, host) {
        return Err(malformed);
    }
    // Methods have a case; whoever ignores it frames the answer to another request.
    let almost = |name: &[u8]| method != name && method.eq_ignore_ascii_case(name);
    if almost(b"HEAD") || almost(b"CONNECT") {
        return Err(malformed);
    }
    // Neither has a body (RFC 9110 §9.3.6 and §9.3.8): some servers take CONNECT's for the tunnel's first bytes.
    let bodiless = matches!(method, b"CONNECT" | b"TRACE");
    let method = match method {
        b"HEAD" => Method::Head,
        b"CONNECT" => Method::Connect,
        b"GET" | b"OPTIONS" | b"TRACE" | b"DELETE" => Method::Idempotent,
        b"PUT" => Method::Put,
        _ => Method::Other,
    };
    let framing = match (facts.chunked, facts.length) {
        (Some(true), None) if !old => Framing::Chunked,
        (Some(_), _) => return Err(malformed),
        (None, Some(0) | None) => Framing::None,
        (None, Some(length)) => Framing::Length(length),
    };
    if bodiless && framing != Framing::None {
        return Err(malformed);
    }
    Ok(Some(Request {
        len,
        method,
        framing,
        keep_alive: facts.keep_alive(old),
        // HTTP/1.0 knows no upgrade (RFC 9110 §7.8).
        upgrade: facts.upgrade && !old,
        has_ours: facts.has_ours,
        binds: facts.login,
    }))
}

/// Judges the response head at the start of `bytes`, an answer to `request`. `None`: it is not whole yet.
///
/// # Errors
/// [`Reason::HttpResponseMalformed`].
pub fn parse_response(
    bytes: &[u8],
    request: &Request,
    max: usize,
) -> Result<Option<Response>, Reason> {
    let malformed = Reason::HttpResponseMalformed;
    let Some(Head { len, line, facts }) = read_head(bytes, max, malformed)? else {
        return Ok(None);
    };
    let (version, rest) = line.split_at_checked(8).ok_or(malformed)?;
    let old = is_old(version).ok_or(malformed)?;
    let status = match rest {
        [
            b' ',
            a @ b'1'..=b'9',
            b @ b'0'..=b'9',
            c @ b'0'..=b'9',
            tail @ ..,
        ] if tail.is_empty() || (tail[0] == b' ' && tail.iter().all(|b| is_text(*b))) => [a, b, c]
            .iter()
            .fold(0, |n, d| n * 10 + u16::from(**d - b'0')),
        _ => return Err(malformed),
    };
    // HTTP/1.0 knows no transfer coding: its readers part here (RFC 9112 §6.1).
    if facts.chunked.is_some() && (facts.length.is_some() || old) {
        return Err(malformed);
    }
    // These never have a body (RFC 9110 §8.6, RFC 9112 §6.1); whoever believes the header waits for one.
    let says_body = facts.chunked.is_some() || facts.length.is_some_and(|length| length > 0);
    if says_body && (status < 200 || status == 204) {
        return Err(malformed);
    }
    let tunnel = (status == 101 && request.upgrade)
        || (request.method == Method::Connect && (200..300).contains(&status));
    if status == 101 && !request.upgrade {
        return Err(malformed);
    }
    let framing = if tunnel {
        Framing::Tunnel
    } else if status < 200 || status == 204 || status == 304 || request.method == Method::Head {
        Framing::None
    } else {
        match (facts.chunked, facts.length) {
            (Some(true), _) => Framing::Chunked,
            (Some(false), _) | (None, None) => Framing::UntilClose,
            (None, Some(0)) => Framing::None,
            (None, Some(length)) => Framing::Length(length),
        }
    };
    // A server that was asked to leave HTTP may have, whatever it answered: nothing else is sent to it.
    let asked = request.upgrade || request.method == Method::Connect;
    let keep_alive = facts.keep_alive(old) && framing != Framing::UntilClose && !asked;
    Ok(Some(Response {
        len,
        status,
        framing,
        keep_alive,
        has_ours: facts.has_ours,
        binds: facts.challenge,
    }))
}

/// HTTP/1.0 is old; anything but 1.0 and 1.1 is not spoken.
fn is_old(version: &[u8]) -> Option<bool> {
    match version {
        b"HTTP/1.1" => Some(false),
        b"HTTP/1.0" => Some(true),
        _ => None,
    }
}

/// A head that is whole.
struct Head<'a> {
    len: usize,
    /// Its first line.
    line: &'a [u8],
    /// What its header lines say.
    facts: Facts<'a>,
}

/// The head at the start of `bytes`, if it is whole.
fn read_head(bytes: &[u8], max: usize, malformed: Reason) -> Result<Option<Head<'_>>, Reason> {
    let too_large = if malformed == Reason::HttpMalformed {
        Reason::HttpHeadTooLarge
    } else {
        malformed
    };
    let seen = &bytes[..bytes.len().min(max)];
    if let Some(end) = memchr(b'\n', seen) {
        let line = seen[..end].strip_suffix(b"\r").ok_or(malformed)?;
        if line.is_empty() {
            return Err(malformed);
        }
        let (facts, lines_len) = Facts::read(&seen[end + 1..]).map_err(|bad| match bad {
            Bad::Malformed => malformed,
            Bad::TooMany => too_large,
        })?;
        if let Some(lines_len) = lines_len {
            let len = end + 1 + lines_len;
            return Ok(Some(Head { len, line, facts }));
        }
    }
    if end_of_head(seen, 0) == End::Spoiled {
        Err(malformed)
    } else if bytes.len() >= max {
        Err(too_large)
    } else {
        Ok(None)
    }
}

/// Whether the bytes behind the first `seen` complete a head, or spoil it for good: until then [`parse_request`] and
/// [`parse_response`] need not look again, and each byte is looked at once.
pub fn is_decided(bytes: &[u8], seen: usize) -> bool {
    end_of_head(bytes, seen) != End::Missing
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    Missing,
    /// Behind the empty line.
    At(usize),
    /// A bare line feed or a NUL is never completed to something good.
    Spoiled,
}

fn end_of_head(bytes: &[u8], seen: usize) -> End {
    for at in memchr2_iter(b'\n', 0, &bytes[seen..]) {
        let (before, byte) = (&bytes[..seen + at], bytes[seen + at]);
        if byte == 0 || !before.ends_with(b"\r") {
            return End::Spoiled;
        }
        if before.ends_with(b"\r\n\r") || before == b"\r" {
            return End::At(seen + at + 1);
        }
    }
    End::Missing
}

/// Appends `head` without headers of ours and without an Upgrade to HTTP/2, and with the header line `insert` (without CRLF) if there is one. The
/// rest stays byte for byte.
pub fn rewrite(head: &[u8], insert: Option<&str>, out: &mut Vec<u8>) {
    let body = head.strip_suffix(b"\r\n\r\n").unwrap_or(head);
    for (at, line) in Lines(body).enumerate() {
        let colon = memchr(b':', line).unwrap_or(line.len());
        let (name, value) = (&line[..colon], line.get(colon + 1..).unwrap_or_default());
        let ours = is_ours(name) || (name.eq_ignore_ascii_case(b"upgrade") && is_h2c(value));
        if at == 0 || !ours {
            out.extend_from_slice(line);
            out.extend_from_slice(b"\r\n");
        }
    }
    if let Some(line) = insert {
        out.extend_from_slice(line.as_bytes());
        out.extend_from_slice(b"\r\n");
    }
    out.extend_from_slice(b"\r\n");
}

/// Appends a head that has nothing for [`rewrite`] to remove, with the header line `line` (without CRLF).
pub fn insert(head: &[u8], line: &str, out: &mut Vec<u8>) {
    out.extend_from_slice(head.strip_suffix(b"\r\n").unwrap_or(head));
    out.extend_from_slice(line.as_bytes());
    out.extend_from_slice(b"\r\n\r\n");
}

#[cfg(test)]
mod tests;
