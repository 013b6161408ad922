//! The header that begins each stream: which service and port of the server's identity the caller wants.
//!
//! ```text
//! version u8 = 1 | kind u8 | port u16 | name length u8 | service name | extensions: (type u8, length u16, value)*
//! ```
//!
//! Unknown extensions with the top bit of their type set are refused, others skipped, so that an old agent never
//! ignores what it must heed.

use mesh_core::names::Label;
use mesh_core::reason::Reason;

/// The version that this build writes and reads.
pub const VERSION: u8 = 1;
/// Longest header, in bytes: a name and room for extensions.
pub const HEADER_MAX: usize = 1024;

/// How the bytes of the stream are to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StreamKind {
    /// Bytes of a TCP connection.
    Tcp,
    /// One HTTP/1.1 request and its response.
    Http1,
    /// Not known before the first bytes: HTTP/1.1 if they are a request and the app did not speak first, else
    /// bytes. Both agents look at the same bytes in the same way ([`mesh_core::http1::sniff`]).
    Auto,
    /// One HTTP/2 request and its response, as messages ([`crate::message`]).
    Http2,
}

/// What the caller wants. There is no address in it: a target is always a declared port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    pub kind: StreamKind,
    /// In the namespace of the server's identity.
    pub service: Label,
    pub port: u16,
}

impl Header {
    /// Appends the header's bytes.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let name = self.service.as_str().as_bytes();
        out.push(VERSION);
        out.push(match self.kind {
            StreamKind::Tcp => 0,
            StreamKind::Http1 => 1,
            StreamKind::Auto => 2,
            StreamKind::Http2 => 3,
        });
        out.extend_from_slice(&self.port.to_be_bytes());
        // A label has at most 63 bytes.
        out.push(name.len() as u8);
        out.extend_from_slice(name);
    }

    /// Reads a header, which must end where `bytes` ends.
    pub fn decode(bytes: &[u8]) -> Result<Self, Reason> {
        if bytes.len() > HEADER_MAX {
            return Err(Reason::HeaderMalformed);
        }
        let [version, kind, high, low, length, rest @ ..] = bytes else {
            return Err(Reason::HeaderMalformed);
        };
        if *version != VERSION {
            return Err(Reason::HeaderVersion);
        }
        let kind = match kind {
            0 => StreamKind::Tcp,
            1 => StreamKind::Http1,
            2 => StreamKind::Auto,
            3 => StreamKind::Http2,
            _ => return Err(Reason::HeaderMalformed),
        };
        let (name, mut rest) = rest
            .split_at_checked(usize::from(*length))
            .ok_or(Reason::HeaderMalformed)?;
        let name = std::str::from_utf8(name).map_err(|_| Reason::HeaderMalformed)?;
        while !rest.is_empty() {
            let [kind, high, low, value @ ..] = rest else {
                return Err(Reason::HeaderMalformed);
            };
            let length = usize::from(u16::from_be_bytes([*high, *low]));
            if *kind & 0x80 != 0 {
                return Err(Reason::HeaderVersion);
            }
            rest = value.get(length..).ok_or(Reason::HeaderMalformed)?;
        }
        Ok(Self {
            kind,
            service: name.parse().map_err(|_| Reason::HeaderMalformed)?,
            port: u16::from_be_bytes([*high, *low]),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes() -> Vec<u8> {
        let mut bytes = Vec::new();
        let service = "web".parse().unwrap();
        Header {
            kind: StreamKind::Http1,
            service,
            port: 8080,
        }
        .encode(&mut bytes);
        bytes
    }

    #[test]
    fn golden() {
        assert_eq!(bytes(), [1, 1, 0x1f, 0x90, 3, b'w', b'e', b'b']);
        assert_eq!(Header::decode(&bytes()).unwrap().port, 8080);
    }

    #[test]
    fn each_kind_has_its_golden_bytes() {
        for (kind, byte) in [
            (StreamKind::Tcp, 0),
            (StreamKind::Http1, 1),
            (StreamKind::Auto, 2),
            (StreamKind::Http2, 3),
        ] {
            let golden = [1, byte, 0x14, 0x38, 2, b'd', b'b'];
            let read = Header::decode(&golden).unwrap();
            assert_eq!((read.kind, read.port), (kind, 5176));
            assert_eq!(read.service.as_str(), "db");
            let mut out = Vec::new();
            read.encode(&mut out);
            assert_eq!(out, golden);
        }
        let unknown = [1, 0xff, 0x14, 0x38, 2, b'd', b'b'];
        assert_eq!(Header::decode(&unknown), Err(Reason::HeaderMalformed));
    }

    /// What a newer peer adds changes nothing for who need not know it, up to the header's bound.
    #[test]
    fn extensions_that_may_be_skipped_leave_the_header_as_it_is() {
        let plain = Header::decode(&bytes()).unwrap();
        let room = HEADER_MAX - bytes().len() - 2 * 3;
        let mut long = bytes();
        long.extend([0x7f, 0, 0, 0x7e]);
        long.extend((room as u16).to_be_bytes());
        long.resize(HEADER_MAX, 0xff);
        assert_eq!(Header::decode(&long), Ok(plain));
        long.extend([0x7f, 0, 0]);
        assert_eq!(Header::decode(&long), Err(Reason::HeaderMalformed));
        // The skipped ones do not hide one that must be understood.
        let hidden = [bytes().as_slice(), &[0x7f, 0, 1, 0, 0xff, 0, 0]].concat();
        assert_eq!(Header::decode(&hidden), Err(Reason::HeaderVersion));
    }

    #[test]
    fn every_cut_and_every_change_is_an_answer_not_a_panic() {
        let bytes = bytes();
        for end in 0..bytes.len() {
            assert!(Header::decode(&bytes[..end]).is_err(), "{end}");
        }
        for at in 0..bytes.len() {
            for value in 0..=255 {
                let mut changed = bytes.clone();
                changed[at] = value;
                let _ = Header::decode(&changed);
            }
        }
    }

    #[test]
    fn extensions_say_whether_they_may_be_skipped() {
        let with = |tail: &[u8]| [bytes().as_slice(), tail].concat();
        assert!(Header::decode(&with(&[0x01, 0, 2, 9, 9])).is_ok());
        assert_eq!(
            Header::decode(&with(&[0x81, 0, 0])),
            Err(Reason::HeaderVersion)
        );
        assert_eq!(
            Header::decode(&with(&[0x01, 0, 3, 9])),
            Err(Reason::HeaderMalformed)
        );
        let mut newer = bytes();
        newer[0] = 2;
        assert_eq!(Header::decode(&newer), Err(Reason::HeaderVersion));
    }
}
