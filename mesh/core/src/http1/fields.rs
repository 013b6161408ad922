//! The header lines of a head: what of them decides about framing, connection and identity.

use memchr::memchr;

use super::OUR_PREFIX;
use crate::reason::Reason;

/// Header lines of one head. Servers stop at 100 to 2,000 by default; a head of 64 KiB of empty ones would be 20,000.
pub(super) const LINES_MAX: usize = 1_000;

/// Codings that a body may be transferred in (RFC 9112 §7). Of another nobody knows who reads it how.
const CODINGS: &[&[u8]] = &[
    b"chunked",
    b"gzip",
    b"deflate",
    b"compress",
    b"x-gzip",
    b"x-compress",
];
/// As an option of Connection these are removed by a proxy behind the app's door, and the message is another one.
const NEVER_HOP_BY_HOP: &[&[u8]] = &[b"host", b"content-length", b"transfer-encoding"];

/// What a head says that decides something.
#[derive(Debug, Default)]
pub(super) struct Facts<'a> {
    pub(super) hosts: usize,
    pub(super) host: &'a [u8],
    pub(super) length: Option<u64>,
    /// Whether Transfer-Encoding ends in chunked, if there is one.
    pub(super) chunked: Option<bool>,
    close: bool,
    keep: bool,
    pub(super) upgrade: bool,
    pub(super) has_ours: bool,
    /// Authorization with a scheme that logs the connection in.
    pub(super) login: bool,
    /// A challenge for such a login.
    pub(super) challenge: bool,
}

/// Why a head's lines are refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Bad {
    Malformed,
    TooMany,
}

impl<'a> Facts<'a> {
    /// Reads the header lines at the start of `bytes`, and says how long they are with the empty line behind them, if
    /// that has come. Each byte is looked at once.
    pub(super) fn read(bytes: &'a [u8]) -> Result<(Self, Option<usize>), Bad> {
        let mut facts = Self::default();
        let (mut has_upgrade, mut wants_upgrade) = (false, false);
        let mut rest = bytes;
        for at in 0.. {
            if let Some(behind) = rest.strip_prefix(b"\r\n") {
                facts.upgrade = has_upgrade && wants_upgrade;
                return Ok((facts, Some(bytes.len() - behind.len())));
            }
            let Some([name, raw]) = take_line(&mut rest)? else {
                break;
            };
            if at >= LINES_MAX {
                return Err(Bad::TooMany);
            }
            let value = trim(raw);
            let is = |other: &[u8]| name.eq_ignore_ascii_case(other);
            match name.len() {
                4 if is(b"host") => {
                    facts.hosts += 1;
                    facts.host = value;
                }
                7 if is(b"upgrade") => {
                    has_upgrade |= !is_h2c(value);
                    facts.has_ours |= is_h2c(value);
                }
                10 if is(b"connection") => wants_upgrade |= facts.connection(value)?,
                13 if is(b"authorization") => facts.login |= binds(value),
                14 if is(b"content-length") => {
                    let length = parse_length(value).ok_or(Bad::Malformed)?;
                    if facts.length.replace(length).is_some() {
                        return Err(Bad::Malformed);
                    }
                }
                16 if is(b"www-authenticate") => facts.challenge |= list(value).any(binds),
                17 if is(b"transfer-encoding") => facts.transfer_encoding(raw)?,
                18 if is(b"proxy-authenticate") => facts.challenge |= list(value).any(binds),
                19 if is(b"proxy-authorization") => facts.login |= binds(value),
                _ => facts.has_ours |= is_ours(name),
            }
        }
        Ok((facts, None))
    }

    /// Returns whether an upgrade is wanted.
    fn connection(&mut self, value: &[u8]) -> Result<bool, Bad> {
        let mut upgrade = false;
        for option in list(value) {
            if is_ours(option) || is_one_of(option, NEVER_HOP_BY_HOP) {
                return Err(Bad::Malformed);
            }
            self.close |= option.eq_ignore_ascii_case(b"close");
            self.keep |= option.eq_ignore_ascii_case(b"keep-alive");
            upgrade |= option.eq_ignore_ascii_case(b"upgrade");
        }
        Ok(upgrade)
    }

    /// Chunked at most once, at the end, and nothing of which it is not known how it is read: empty elements,
    /// parameters and quotes are split by others in other places, and to llhttp `chunked` and a tab is another coding.
    fn transfer_encoding(&mut self, value: &[u8]) -> Result<(), Bad> {
        if value.contains(&b'\t') {
            return Err(Bad::Malformed);
        }
        let mut chunked = false;
        for coding in list(value) {
            if chunked || !is_one_of(coding, CODINGS) {
                return Err(Bad::Malformed);
            }
            chunked = coding.eq_ignore_ascii_case(b"chunked");
        }
        if self.chunked.replace(chunked).is_some() {
            return Err(Bad::Malformed);
        }
        Ok(())
    }

    pub(super) fn keep_alive(&self, old: bool) -> bool {
        !self.close && (!old || self.keep)
    }
}

/// Takes a header line off `rest`: its name, and its value with the spaces around it. `None`: it is not whole yet. That
/// a name is a token also refuses folded lines and spaces before the colon.
fn take_line<'a>(rest: &mut &'a [u8]) -> Result<Option<[&'a [u8]; 2]>, Bad> {
    let bytes = *rest;
    let Some(colon) = bytes.iter().position(|b| !is_token(*b)) else {
        return Ok(None);
    };
    // The last line's end may have come in part.
    if bytes == b"\r" {
        return Ok(None);
    }
    if colon == 0 || bytes[colon] != b':' {
        return Err(Bad::Malformed);
    }
    let value = &bytes[colon + 1..];
    let Some(end) = value.iter().position(|b| !is_text(*b)) else {
        return Ok(None);
    };
    match &value[end..] {
        [b'\r'] => Ok(None),
        [b'\r', b'\n', behind @ ..] => {
            *rest = behind;
            Ok(Some([&bytes[..colon], &value[..end]]))
        }
        _ => Err(Bad::Malformed),
    }
}

/// The elements of a list of tokens, without the spaces around them.
fn list(value: &[u8]) -> impl Iterator<Item = &[u8]> {
    value.split(|b| *b == b',').map(trim)
}

fn is_one_of(token: &[u8], known: &[&[u8]]) -> bool {
    known.iter().any(|k| token.eq_ignore_ascii_case(k))
}

/// Whether credentials or a challenge begin with a scheme that logs in the connection, not the request (RFC 4559).
fn binds(value: &[u8]) -> bool {
    let scheme = value.split(|b| matches!(b, b' ' | b'\t')).next();
    scheme.is_some_and(|scheme| is_one_of(scheme, &[b"ntlm", b"negotiate"]))
}

/// Digits only: no sign, no list, no white space within; not more than a server's signed 64 bits hold.
fn parse_length(value: &[u8]) -> Option<u64> {
    if value.is_empty() || value.len() > 19 || !value.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let length: i64 = std::str::from_utf8(value).ok()?.parse().ok()?;
    u64::try_from(length).ok()
}

fn trim(bytes: &[u8]) -> &[u8] {
    let is_space = |b: &u8| matches!(b, b' ' | b'\t');
    let start = bytes.iter().position(|b| !is_space(b));
    let start = start.unwrap_or(bytes.len());
    let end = bytes.iter().rposition(|b| !is_space(b));
    &bytes[start..end.map_or(start, |at| at + 1)]
}

/// Lines that end in CRLF; the last one may end with the text.
pub(super) struct Lines<'a>(pub(super) &'a [u8]);

impl<'a> Iterator for Lines<'a> {
    type Item = &'a [u8];

    fn next(&mut self) -> Option<&'a [u8]> {
        if self.0.is_empty() {
            return None;
        }
        let mut from = 0;
        while let Some(at) = memchr(b'\n', &self.0[from..]) {
            let at = from + at;
            if at > 0 && self.0[at - 1] == b'\r' {
                let line = &self.0[..at - 1];
                self.0 = &self.0[at + 1..];
                return Some(line);
            }
            from = at + 1;
        }
        Some(std::mem::take(&mut self.0))
    }
}

/// `tchar` of RFC 9110 §5.6.2.
const TOKEN: [bool; 256] = {
    let mut table = [false; 256];
    let mut byte = 0;
    while byte < 128 {
        table[byte] = (byte as u8).is_ascii_alphanumeric();
        byte += 1;
    }
    let others = b"!#$%&'*+-.^_`|~";
    let mut at = 0;
    while at < others.len() {
        table[others[at] as usize] = true;
        at += 1;
    }
    table
};

pub(super) const fn is_token(byte: u8) -> bool {
    TOKEN[byte as usize]
}

/// Whether this may be a header's name or a method.
pub(super) fn is_name(bytes: &[u8]) -> bool {
    !bytes.is_empty() && bytes.iter().all(|b| is_token(*b))
}

/// Whether a byte may stand in a header's value or a reason phrase.
pub(super) const fn is_text(byte: u8) -> bool {
    byte == b'\t' || (byte >= b' ' && byte != 0x7f)
}

/// Whether a header's name is ours, or becomes ours in a server that makes `_` of `-` or of all that is neither letter nor
/// digit (CGI, RFC 3875 §4.1.18).
pub fn is_ours(name: &[u8]) -> bool {
    let same = |(a, b): (&u8, &u8)| {
        a.eq_ignore_ascii_case(b) || (*b == b'-' && !a.is_ascii_alphanumeric())
    };
    name.len() >= OUR_PREFIX.len() && name.iter().zip(OUR_PREFIX).all(same)
}

/// Whether an Upgrade asks for HTTP/2 in the clear, which is ignored by all (RFC 9113 §3.1).
pub(super) fn is_h2c(value: &[u8]) -> bool {
    list(value).any(|part| part.eq_ignore_ascii_case(b"h2c"))
}

/// Whether a field may stand behind a body. What frames a message, leads it or says who sent it may not: whoever
/// merges trailers into headers would read another message (RFC 9110 §6.5.1).
pub fn is_trailer(name: &[u8]) -> Result<(), Reason> {
    const NEVER: &[&[u8]] = &[
        b"authorization",
        b"connection",
        b"content-length",
        b"expect",
        b"host",
        b"keep-alive",
        b"proxy-authorization",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    ];
    if !is_name(name) || is_ours(name) || is_one_of(name, NEVER) {
        return Err(Reason::HttpMalformed);
    }
    Ok(())
}
