//! The end of a body (RFC 9112 §6 and §7), found as its bytes pass.

use super::Framing;
use crate::reason::Reason;

/// Longest chunk-size line and longest trailer section, in bytes.
const CHUNK_LINE_MAX: usize = 1024;
const TRAILERS_MAX: usize = 16 * 1024;

/// Measures a body as its bytes pass.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Body(State);

#[derive(Clone, Debug, PartialEq, Eq)]
enum State {
    Done,
    Length(u64),
    UntilClose,
    /// In a chunk-size line: the size so far, its digits, whether an extension began, bytes of the line.
    Size {
        size: u64,
        digits: u8,
        extension: bool,
        line: usize,
    },
    SizeLf(u64),
    Data(u64),
    DataCr,
    DataLf,
    /// In the trailer section: bytes of it, bytes of its line.
    Trailer {
        section: usize,
        line: usize,
    },
    TrailerLf {
        section: usize,
        line: usize,
    },
}

impl Body {
    pub const fn new(framing: Framing) -> Self {
        Self(match framing {
            Framing::None => State::Done,
            Framing::Length(length) => State::Length(length),
            Framing::Chunked => State::SIZE,
            Framing::UntilClose | Framing::Tunnel => State::UntilClose,
        })
    }

    /// Whether the body is whole.
    pub const fn is_done(&self) -> bool {
        matches!(self.0, State::Done)
    }

    /// Whether the end of the connection is a proper end here.
    pub const fn may_close(&self) -> bool {
        matches!(self.0, State::Done | State::UntilClose)
    }

    /// Takes the next bytes and says how many of them belong to the body.
    ///
    /// # Errors
    /// [`Reason::HttpMalformed`] when the chunks can not be read, or could be read in two ways.
    pub fn advance(&mut self, bytes: &[u8]) -> Result<usize, Reason> {
        let mut at = 0;
        while at < bytes.len() {
            match &mut self.0 {
                State::Done => break,
                State::UntilClose => return Ok(bytes.len()),
                State::Length(left) | State::Data(left) => {
                    let take = (*left).min((bytes.len() - at) as u64);
                    *left -= take;
                    at += take as usize;
                    if *left == 0 {
                        self.0 = if matches!(self.0, State::Length(_)) {
                            State::Done
                        } else {
                            State::DataCr
                        };
                    }
                }
                _ => {
                    self.0 = self.0.step(bytes[at])?;
                    at += 1;
                }
            }
        }
        Ok(at)
    }
}

impl State {
    const SIZE: Self = Self::Size {
        size: 0,
        digits: 0,
        extension: false,
        line: 0,
    };

    /// One byte of a chunked body that is not data.
    fn step(&self, byte: u8) -> Result<Self, Reason> {
        Ok(match (self, byte) {
            (Self::Size { .. }, _) => return self.size_line(byte),
            (Self::SizeLf(0), b'\n') => Self::Trailer {
                section: 0,
                line: 0,
            },
            (Self::SizeLf(size), b'\n') => Self::Data(*size),
            (Self::DataCr, b'\r') => Self::DataLf,
            (Self::DataLf, b'\n') => Self::SIZE,
            (Self::Trailer { section, line }, b'\r') => Self::TrailerLf {
                section: *section,
                line: *line,
            },
            // A trailer line is a header line: no folding, no control characters.
            (Self::Trailer { line: 0, .. }, b' ' | b'\t') => return Err(Reason::HttpMalformed),
            (Self::Trailer { section, line }, b'\t' | 0x20..=0x7e | 0x80..) => Self::Trailer {
                section: bounded(*section, TRAILERS_MAX)?,
                line: line + 1,
            },
            (Self::TrailerLf { line: 0, .. }, b'\n') => Self::Done,
            (Self::TrailerLf { section, .. }, b'\n') => Self::Trailer {
                section: *section,
                line: 0,
            },
            _ => return Err(Reason::HttpMalformed),
        })
    }

    /// One byte of a chunk-size line.
    fn size_line(&self, byte: u8) -> Result<Self, Reason> {
        let Self::Size {
            size,
            digits,
            extension,
            line,
        } = *self
        else {
            return Err(Reason::HttpMalformed);
        };
        if byte == b'\r' && digits > 0 {
            return Ok(Self::SizeLf(size));
        }
        let begins = digits > 0 && byte == b';';
        if begins || extension && matches!(byte, b'\t' | b' '..=b'~' | 0x80..) {
            return Ok(Self::Size {
                size,
                digits,
                extension: true,
                line: bounded(line, CHUNK_LINE_MAX)?,
            });
        }
        let digit = (byte as char).to_digit(16).filter(|_| !extension);
        let digit = digit.ok_or(Reason::HttpMalformed)?;
        if digits >= 15 {
            return Err(Reason::HttpMalformed);
        }
        Ok(Self::Size {
            size: size << 4 | u64::from(digit),
            digits: digits + 1,
            extension: false,
            line,
        })
    }
}

fn bounded(count: usize, max: usize) -> Result<usize, Reason> {
    if count >= max {
        Err(Reason::HttpMalformed)
    } else {
        Ok(count + 1)
    }
}
