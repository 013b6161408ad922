//! HTTP/1.1 framing (RFC 9112), as strict as it must be so that two agents and an app never read one input in
//! two ways. Bytes are not changed here: a head is judged, a body is measured.

mod body;

pub use body::Body;

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
    /// GET, OPTIONS, TRACE, PUT, DELETE: doing it twice is doing it once (RFC 9110 §9.2.2).
    Idempotent,
    Other,
}

impl Method {
    /// Whether a request may be repeated when it is not known what became of it.
    pub const fn is_idempotent(self) -> bool {
        matches!(self, Self::Head | Self::Idempotent)
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
}

/// A judged response head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Response {
    pub len: usize,
    pub status: u16,
    pub framing: Framing,
    pub keep_alive: bool,
    pub has_ours: bool,
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
    Other,
    /// Not decided yet.
    More,
}

/// Tells whether bytes begin what a lenient server might take for an HTTP/1 request: then it must be judged as one,
/// for as bytes it would carry whatever headers its sender likes. Decided by the first line at the latest, mostly
/// by the first byte. HTTP/2's preface is not HTTP/1.
pub fn sniff(bytes: &[u8]) -> Sniff {
    /// A longer first line is a request if it is text and begins like one.
    const LINE_MAX: usize = 8192;
    // Servers skip empty lines before a request (RFC 9112 §2.2).
    let blank = bytes
        .iter()
        .take_while(|b| matches!(b, b'\r' | b'\n' | b' ' | b'\t'))
        .count();
    let line = &bytes[blank..];
    let Some(first) = line.first() else {
        return if bytes.len() > LINE_MAX {
            Sniff::Other
        } else {
            Sniff::More
        };
    };
    if !is_token(*first) {
        return Sniff::Other;
    }
    let end = line.iter().position(|b| *b == b'\n');
    let text = &line[..end.unwrap_or(line.len())];
    if text
        .iter()
        .any(|b| *b < 0x20 && !matches!(b, b'\t' | b'\r'))
    {
        return Sniff::Other;
    }
    if end.is_some() {
        let version = |part: &[u8]| part.eq_ignore_ascii_case(b"HTTP/1");
        return if text.windows(6).any(version) {
            Sniff::Http1
        } else {
            Sniff::Other
        };
    }
    if bytes.len() <= LINE_MAX {
        return Sniff::More;
    }
    let method = text.iter().take_while(|b| is_token(**b)).count();
    if matches!(text.get(method), Some(b' ' | b'\t')) {
        Sniff::Http1
    } else {
        Sniff::Other
    }
}

/// Judges the request head at the start of `bytes`. `None`: it is not whole yet.
///
/// # Errors
/// [`Reason::HttpMalformed`] or [`Reason::HttpHeadTooLarge`] (above `max` bytes).
pub fn parse_request(bytes: &[u8], max: usize) -> Result<Option<Request>, Reason> {
    let Some((len, line, lines)) = split_head(bytes, max, Reason::HttpMalformed)? else {
        return Ok(None);
    };
    let malformed = Reason::HttpMalformed;
    let mut words = line.split(|b| *b == b' ');
    let (Some(method), Some(target), Some(version), None) =
        (words.next(), words.next(), words.next(), words.next())
    else {
        return Err(malformed);
    };
    if method.is_empty() || !method.iter().all(|b| is_token(*b)) {
        return Err(malformed);
    }
    // A fragment is no part of a request (RFC 9112 §3.2): some cut it off, others take it for a path.
    let is_target = |b: &u8| *b > b' ' && !matches!(b, 0x7f | b'#');
    if target.is_empty() || !target.iter().all(is_target) {
        return Err(malformed);
    }
    let old = is_old(version).ok_or(malformed)?;
    let facts = Facts::read(lines, malformed)?;
    if facts.hosts > 1 || (facts.hosts == 0 && !old) {
        return Err(malformed);
    }
    let method = match method {
        b"HEAD" => Method::Head,
        b"CONNECT" => Method::Connect,
        b"GET" | b"OPTIONS" | b"TRACE" | b"PUT" | b"DELETE" => Method::Idempotent,
        _ => Method::Other,
    };
    let framing = match (facts.chunked, facts.length) {
        (Some(true), None) if !old => Framing::Chunked,
        (Some(_), _) => return Err(malformed),
        (None, Some(0) | None) => Framing::None,
        (None, Some(length)) => Framing::Length(length),
    };
    // CONNECT has no body (RFC 9110 §9.3.6): some servers take it for the tunnel's first bytes.
    if method == Method::Connect && framing != Framing::None {
        return Err(malformed);
    }
    let keep_alive = facts.keep_alive(old);
    Ok(Some(Request {
        len,
        method,
        framing,
        keep_alive,
        upgrade: facts.upgrade,
        has_ours: facts.has_ours,
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
    let Some((len, line, lines)) = split_head(bytes, max, malformed)? else {
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
        ] if tail.is_empty() || tail[0] == b' ' => [a, b, c]
            .iter()
            .fold(0, |n, d| n * 10 + u16::from(**d - b'0')),
        _ => return Err(malformed),
    };
    let facts = Facts::read(lines, malformed)?;
    // HTTP/1.0 knows no transfer coding: its readers part here (RFC 9112 §6.1).
    if facts.chunked.is_some() && (facts.length.is_some() || old) {
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

/// Splits a whole head into its first line and the rest, which ends in an empty line.
#[expect(clippy::type_complexity, reason = "three slices of one head")]
fn split_head(
    bytes: &[u8],
    max: usize,
    malformed: Reason,
) -> Result<Option<(usize, &[u8], &[u8])>, Reason> {
    let Some(end) = find(bytes, b"\r\n\r\n") else {
        if bytes.len() >= max {
            return Err(if malformed == Reason::HttpMalformed {
                Reason::HttpHeadTooLarge
            } else {
                malformed
            });
        }
        // A bare line feed or a NUL is never completed to something good.
        let seen = bytes.iter().enumerate();
        let bad = seen
            .filter(|(at, b)| **b == 0 || (**b == b'\n' && (*at == 0 || bytes[at - 1] != b'\r')));
        return if bad.count() > 0 {
            Err(malformed)
        } else {
            Ok(None)
        };
    };
    if end + 4 > max {
        return Err(if malformed == Reason::HttpMalformed {
            Reason::HttpHeadTooLarge
        } else {
            malformed
        });
    }
    let head = &bytes[..end];
    let line_end = find(head, b"\r\n").unwrap_or(head.len());
    let lines = head.get(line_end + 2..).unwrap_or_default();
    if head[..line_end]
        .iter()
        .any(|b| matches!(b, b'\r' | b'\n' | 0))
    {
        return Err(malformed);
    }
    Ok(Some((end + 4, &head[..line_end], lines)))
}

fn find(bytes: &[u8], what: &[u8]) -> Option<usize> {
    let first = what.first()?;
    let mut from = 0;
    while let Some(at) = bytes[from..].iter().position(|b| b == first) {
        if bytes[from + at..].starts_with(what) {
            return Some(from + at);
        }
        from += at + 1;
    }
    None
}

/// `tchar` of RFC 9110 §5.6.2.
fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

#[derive(Default)]
struct Facts {
    hosts: usize,
    length: Option<u64>,
    /// Whether Transfer-Encoding ends in chunked, if there is one.
    chunked: Option<bool>,
    close: bool,
    keep: bool,
    connection_upgrade: bool,
    upgrade: bool,
    has_ours: bool,
}

impl Facts {
    fn read(lines: &[u8], malformed: Reason) -> Result<Self, Reason> {
        let mut facts = Self::default();
        let mut has_upgrade = false;
        for line in Lines(lines) {
            let colon = line.iter().position(|b| *b == b':').ok_or(malformed)?;
            let (name, value) = (&line[..colon], trim(&line[colon + 1..]));
            // This also refuses folded lines and spaces before the colon.
            if name.is_empty() || !name.iter().all(|b| is_token(*b)) {
                return Err(malformed);
            }
            if value
                .iter()
                .any(|b| (*b < 0x20 && *b != b'\t') || *b == 0x7f)
            {
                return Err(malformed);
            }
            match name.len() {
                4 if name.eq_ignore_ascii_case(b"host") => facts.hosts += 1,
                14 if name.eq_ignore_ascii_case(b"content-length") => {
                    let length = parse_length(value).ok_or(malformed)?;
                    if facts.length.replace(length).is_some() {
                        return Err(malformed);
                    }
                }
                17 if name.eq_ignore_ascii_case(b"transfer-encoding") => {
                    let last = value
                        .rsplit(|b| *b == b',')
                        .next()
                        .map(trim)
                        .unwrap_or_default();
                    let codings = value.split(|b| *b == b',').map(trim);
                    // Empty elements, parameters and quotes are split by others in other places.
                    let is_plain = |c: &[u8]| !c.is_empty() && c.iter().all(|b| is_token(*b));
                    let plain = codings.clone().all(is_plain);
                    let chunked = codings
                        .filter(|c| c.eq_ignore_ascii_case(b"chunked"))
                        .count();
                    let ends = last.eq_ignore_ascii_case(b"chunked");
                    if !plain
                        || chunked > 1
                        || (chunked == 1) != ends
                        || facts.chunked.replace(ends).is_some()
                    {
                        return Err(malformed);
                    }
                }
                10 if name.eq_ignore_ascii_case(b"connection") => {
                    for option in value.split(|b| *b == b',').map(trim) {
                        // A proxy behind the app's door would remove our header.
                        if is_ours(option) {
                            return Err(malformed);
                        }
                        facts.close |= option.eq_ignore_ascii_case(b"close");
                        facts.keep |= option.eq_ignore_ascii_case(b"keep-alive");
                        facts.connection_upgrade |= option.eq_ignore_ascii_case(b"upgrade");
                    }
                }
                7 if name.eq_ignore_ascii_case(b"upgrade") => {
                    has_upgrade |= !is_h2c(value);
                    facts.has_ours |= is_h2c(value);
                }
                _ => facts.has_ours |= is_ours(name),
            }
        }
        facts.upgrade = has_upgrade && facts.connection_upgrade;
        Ok(facts)
    }

    fn keep_alive(&self, old: bool) -> bool {
        !self.close && (!old || self.keep)
    }
}

/// Digits only: no sign, no list, no white space within.
fn parse_length(value: &[u8]) -> Option<u64> {
    if value.is_empty() || value.len() > 19 || !value.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(value).ok()?.parse().ok()
}

fn trim(bytes: &[u8]) -> &[u8] {
    let start = bytes
        .iter()
        .position(|b| !matches!(b, b' ' | b'\t'))
        .unwrap_or(bytes.len());
    let end = bytes
        .iter()
        .rposition(|b| !matches!(b, b' ' | b'\t'))
        .map_or(start, |at| at + 1);
    &bytes[start..end]
}

/// Lines that end in CRLF; the last one may end with the text.
struct Lines<'a>(&'a [u8]);

impl<'a> Iterator for Lines<'a> {
    type Item = &'a [u8];

    fn next(&mut self) -> Option<&'a [u8]> {
        if self.0.is_empty() {
            return None;
        }
        let end = find(self.0, b"\r\n").unwrap_or(self.0.len());
        let line = &self.0[..end];
        self.0 = self.0.get(end + 2..).unwrap_or_default();
        Some(line)
    }
}

/// Whether a header's name is ours, or becomes ours in a server that makes `_` of `-` (CGI, RFC 3875 §4.1.18).
fn is_ours(name: &[u8]) -> bool {
    let same = |(a, b): (&u8, &u8)| a.eq_ignore_ascii_case(b) || (*a == b'_' && *b == b'-');
    name.len() >= OUR_PREFIX.len() && name.iter().zip(OUR_PREFIX).all(same)
}

/// Whether an Upgrade asks for HTTP/2 in the clear, which is ignored by all (RFC 9113 §3.1).
fn is_h2c(value: &[u8]) -> bool {
    value
        .split(|b| *b == b',')
        .any(|part| trim(part).eq_ignore_ascii_case(b"h2c"))
}

/// Appends `head` without headers of ours and without an Upgrade to HTTP/2, and with the header line `insert` (without CRLF) if there is one. The
/// rest stays byte for byte.
pub fn rewrite(head: &[u8], insert: Option<&str>, out: &mut Vec<u8>) {
    let body = head.strip_suffix(b"\r\n\r\n").unwrap_or(head);
    for (at, line) in Lines(body).enumerate() {
        let colon = line.iter().position(|b| *b == b':').unwrap_or(line.len());
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

#[cfg(test)]
mod tests;
