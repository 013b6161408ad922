//! Frames of the stream layer as bytes: `length u24 | type u8 | stream u32 | payload`, big endian.
//!
//! | type | frame | payload |
//! |---|---|---|
//! | 0 | hello | version u8, max_streams, stream_credit, connection_credit, max_frame: u32 each |
//! | 1 | open | the stream's header ([`crate::header`]) |
//! | 2 | accepted | |
//! | 3 | data | bytes |
//! | 4 | data, then the end | bytes |
//! | 5 | reset | reason u16, the app's own code u32 |
//! | 6 | credit | bytes u32; stream 0 is the connection |
//! | 7, 8 | ping, pong | nonce u64 |
//! | 9 | go-away | last u32, reason u16 |
//!
//! What is the connection's (hello, ping, pong, go-away) says stream 0; what is a stream's never does.
//! Other types are an error: both sides agree on the version in their hellos. What an HTTP/2 message is made of lies
//! inside the stream's data ([`crate::message`]).

use mesh_core::reason::Reason;
use mesh_core::stream::{Frame, Limits};

use crate::header::HEADER_MAX;

/// Bytes before each payload.
pub const PREFIX_LEN: usize = 8;
/// Where in it the type stands.
const KIND_AT: usize = 3;

/// Why bytes are not a frame. The connection can not go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    #[error("frame type {0} is not known")]
    Type(u8),
    #[error("a frame of type {kind} has {length} bytes of payload")]
    Length { kind: u8, length: usize },
    #[error("a frame of type {kind} can not be of stream {stream}")]
    Stream { kind: u8, stream: u32 },
}

/// The first eight bytes of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prefix {
    pub length: usize,
    kind: u8,
    stream: u32,
}

/// Writes the prefix of a data frame; its payload of `length` bytes follows.
pub fn data_prefix(stream: u32, length: usize, end: bool) -> [u8; PREFIX_LEN] {
    prefix(if end { 4 } else { 3 }, stream, length)
}

/// Lets the data frame at the start of `frame` be its stream's last.
pub fn set_end(frame: &mut [u8]) {
    if let Some(kind) = frame.get_mut(KIND_AT) {
        debug_assert!(matches!(*kind, 3 | 4), "it is a data frame");
        *kind = 4;
    }
}

fn prefix(kind: u8, stream: u32, length: usize) -> [u8; PREFIX_LEN] {
    let [_, a, b, c] = (length as u32).to_be_bytes();
    let [d, e, f, g] = stream.to_be_bytes();
    [a, b, c, kind, d, e, f, g]
}

/// Appends a frame's bytes.
pub fn encode(frame: &Frame<'_>, out: &mut Vec<u8>) {
    match *frame {
        Frame::Hello { version, limits } => {
            out.extend(prefix(0, 0, 17));
            out.push(version);
            for number in [
                limits.max_streams,
                limits.stream_credit,
                limits.connection_credit,
                limits.max_frame,
            ] {
                out.extend(number.to_be_bytes());
            }
        }
        Frame::Open { stream, header } => {
            out.extend(prefix(1, stream, header.len()));
            out.extend_from_slice(header);
        }
        Frame::Accepted { stream } => out.extend(prefix(2, stream, 0)),
        Frame::Data { stream, data, end } => {
            out.extend(data_prefix(stream, data.len(), end));
            out.extend_from_slice(data);
        }
        Frame::Reset {
            stream,
            reason,
            code,
        } => {
            out.extend(prefix(5, stream, 6));
            out.extend(reason.to_wire().to_be_bytes());
            out.extend(code.to_be_bytes());
        }
        Frame::Credit { stream, bytes } => {
            out.extend(prefix(6, stream, 4));
            out.extend(bytes.to_be_bytes());
        }
        Frame::Ping { nonce } => {
            out.extend(prefix(7, 0, 8));
            out.extend(nonce.to_be_bytes());
        }
        Frame::Pong { nonce } => {
            out.extend(prefix(8, 0, 8));
            out.extend(nonce.to_be_bytes());
        }
        Frame::GoAway { last, reason } => {
            out.extend(prefix(9, 0, 6));
            out.extend(last.to_be_bytes());
            out.extend(reason.to_wire().to_be_bytes());
        }
    }
}

impl Prefix {
    /// Reads a prefix and checks the payload's length against its type and `max_frame`, so that a reader never
    /// waits for more than it said it would bear.
    pub fn decode(bytes: [u8; PREFIX_LEN], max_frame: u32) -> Result<Self, FrameError> {
        let [a, b, c, kind, d, e, f, g] = bytes;
        let length = u32::from_be_bytes([0, a, b, c]) as usize;
        let fits = match kind {
            0 => length == 17,
            1 => length <= HEADER_MAX,
            2 => length == 0,
            3 | 4 => length <= max_frame as usize,
            5 => length == 6,
            6 => length == 4,
            7 | 8 => length == 8,
            9 => length == 6,
            _ => return Err(FrameError::Type(kind)),
        };
        if !fits {
            return Err(FrameError::Length { kind, length });
        }
        let stream = u32::from_be_bytes([d, e, f, g]);
        let belongs = match kind {
            0 | 7..=9 => stream == 0,
            6 => true,
            _ => stream != 0,
        };
        if !belongs {
            return Err(FrameError::Stream { kind, stream });
        }
        Ok(Self {
            length,
            kind,
            stream,
        })
    }

    /// Of a data frame: its stream, and whether that ends with it.
    pub fn data(&self) -> Option<(u32, bool)> {
        matches!(self.kind, 3 | 4).then_some((self.stream, self.kind == 4))
    }

    /// The frame with its payload of [`Self::length`] bytes.
    pub fn frame(self, payload: &[u8]) -> Result<Frame<'_>, FrameError> {
        let Self {
            length,
            kind,
            stream,
        } = self;
        let short = FrameError::Length { kind, length };
        let u32_at = |at: usize| {
            let bytes = payload.get(at..at + 4).and_then(|b| b.try_into().ok());
            bytes.map(u32::from_be_bytes).ok_or(short)
        };
        let u64_of = || {
            payload
                .try_into()
                .map(u64::from_be_bytes)
                .map_err(|_| short)
        };
        let reason_at = |at: usize| {
            let bytes = payload.get(at..at + 2).and_then(|b| b.try_into().ok());
            bytes
                .map(|b| Reason::from_wire(u16::from_be_bytes(b)))
                .ok_or(short)
        };
        Ok(match kind {
            0 => Frame::Hello {
                version: *payload.first().ok_or(short)?,
                limits: Limits {
                    max_streams: u32_at(1)?,
                    stream_credit: u32_at(5)?,
                    connection_credit: u32_at(9)?,
                    max_frame: u32_at(13)?,
                },
            },
            1 => Frame::Open {
                stream,
                header: payload,
            },
            2 => Frame::Accepted { stream },
            3 | 4 => Frame::Data {
                stream,
                data: payload,
                end: kind == 4,
            },
            5 => Frame::Reset {
                stream,
                reason: reason_at(0)?,
                code: u32_at(2)?,
            },
            6 => Frame::Credit {
                stream,
                bytes: u32_at(0)?,
            },
            7 => Frame::Ping { nonce: u64_of()? },
            8 => Frame::Pong { nonce: u64_of()? },
            9 => Frame::GoAway {
                last: u32_at(0)?,
                reason: reason_at(4)?,
            },
            _ => return Err(FrameError::Type(kind)),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_core::rng::Rng;

    /// Golden bytes: a change here is a change of the wire, and of docs/protocol.md.
    const GOLDEN: &[(Frame<'static>, &[u8])] = &[
        (
            Frame::Hello {
                version: 1,
                limits: Limits {
                    max_streams: 1,
                    stream_credit: 2,
                    connection_credit: 3,
                    max_frame: 4,
                },
            },
            &[
                0, 0, 17, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, 4,
            ],
        ),
        (
            Frame::Open {
                stream: 1,
                header: &[9],
            },
            &[0, 0, 1, 1, 0, 0, 0, 1, 9],
        ),
        (Frame::Accepted { stream: 3 }, &[0, 0, 0, 2, 0, 0, 0, 3]),
        (
            Frame::Data {
                stream: 1,
                data: b"hi",
                end: false,
            },
            &[0, 0, 2, 3, 0, 0, 0, 1, b'h', b'i'],
        ),
        (
            Frame::Data {
                stream: 1,
                data: b"",
                end: true,
            },
            &[0, 0, 0, 4, 0, 0, 0, 1],
        ),
        (
            Frame::Reset {
                stream: 5,
                reason: Reason::NotAllowed,
                code: 0,
            },
            &[0, 0, 6, 5, 0, 0, 0, 5, 0, 43, 0, 0, 0, 0],
        ),
        (
            Frame::Reset {
                stream: 5,
                reason: Reason::StreamReset,
                code: 8,
            },
            &[0, 0, 6, 5, 0, 0, 0, 5, 0, 51, 0, 0, 0, 8],
        ),
        (
            Frame::Credit {
                stream: 0,
                bytes: 256,
            },
            &[0, 0, 4, 6, 0, 0, 0, 0, 0, 0, 1, 0],
        ),
        (
            Frame::Ping { nonce: 7 },
            &[0, 0, 8, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7],
        ),
        (
            Frame::Pong { nonce: 7 },
            &[0, 0, 8, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7],
        ),
        (
            Frame::GoAway {
                last: 9,
                reason: Reason::Draining,
            },
            &[0, 0, 6, 9, 0, 0, 0, 0, 0, 0, 0, 9, 0, 14],
        ),
    ];

    fn decode(bytes: &[u8]) -> Result<Frame<'_>, FrameError> {
        let (head, payload) = bytes.split_first_chunk().unwrap();
        Prefix::decode(*head, 16_384)?.frame(payload)
    }

    #[test]
    fn every_frame_has_its_golden_bytes_and_reads_back() {
        for (frame, bytes) in GOLDEN {
            let mut out = Vec::new();
            encode(frame, &mut out);
            assert_eq!(out, *bytes, "{frame:?}");
            assert_eq!(decode(bytes).as_ref(), Ok(frame));
        }
    }

    #[test]
    fn lengths_are_bounded_by_type() {
        let long = [1, 0, 0, 3, 0, 0, 0, 1];
        assert_eq!(
            Prefix::decode(long, 16_384),
            Err(FrameError::Length {
                kind: 3,
                length: 65_536
            })
        );
        assert_eq!(
            Prefix::decode([0, 0, 0, 10, 0, 0, 0, 0], 16_384),
            Err(FrameError::Type(10))
        );
        assert!(
            Prefix::decode([0, 4, 1, 1, 0, 0, 0, 1], 16_384).is_err(),
            "a header over its bound"
        );
    }

    #[test]
    fn what_is_the_connections_is_no_streams() {
        for (kind, length) in [(0, 17), (7, 8), (8, 8), (9, 6)] {
            let of = |stream| Prefix::decode([0, 0, length, kind, 0, 0, 0, stream], 16_384);
            assert!(of(0).is_ok(), "{kind}");
            assert_eq!(of(1), Err(FrameError::Stream { kind, stream: 1 }));
        }
        for (kind, length) in [(1, 9), (2, 0), (3, 1), (4, 0), (5, 6)] {
            let of = |stream| Prefix::decode([0, 0, length, kind, 0, 0, 0, stream], 16_384);
            assert!(of(1).is_ok(), "{kind}");
            assert_eq!(of(0), Err(FrameError::Stream { kind, stream: 0 }));
        }
    }

    #[test]
    fn no_bytes_make_it_panic() {
        let mut rng = Rng::new(1);
        for _ in 0..200_000 {
            let length = 8 + rng.below(24) as usize;
            let mut bytes: Vec<u8> = (0..length).map(|_| rng.below(256) as u8).collect();
            bytes[..3].copy_from_slice(&[0, 0, (length - 8) as u8]);
            bytes[3] %= 12;
            let _ = decode(&bytes);
        }
    }
}
