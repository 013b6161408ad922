//! The end of a body (RFC 9112 §6 and §7), found as its bytes pass.

use super::Framing;
use super::fields::{is_text, is_token, is_trailer};
use crate::reason::Reason;

/// Longest chunk-size line and longest trailer section, in bytes.
const CHUNK_LINE_MAX: usize = 1024;
const TRAILERS_MAX: usize = 16 * 1024;
/// Bytes of a trailer's name that are looked at: more than any name has that may not stand there.
const NAME_MAX: usize = 32;

/// Measures a body as its bytes pass.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Body {
    state: State,
    /// The name of the trailer that is being read.
    name: Vec<u8>,
}

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
    /// In the trailer section, of which so many bytes are read: in a line's name.
    TrailerName(usize),
    /// In its value.
    TrailerValue(usize),
    TrailerLf(usize),
    EndLf,
}

impl Body {
    pub const fn new(framing: Framing) -> Self {
        let state = match framing {
            Framing::None => State::Done,
            Framing::Length(length) => State::Length(length),
            Framing::Chunked => State::SIZE,
            Framing::UntilClose | Framing::Tunnel => State::UntilClose,
        };
        Self {
            state,
            name: Vec::new(),
        }
    }

    /// Whether the body is whole.
    pub const fn is_done(&self) -> bool {
        matches!(self.state, State::Done)
    }

    /// Whether the end of the connection is a proper end here.
    pub const fn may_close(&self) -> bool {
        matches!(self.state, State::Done | State::UntilClose)
    }

    /// Takes the next bytes and says how many of them belong to the body.
    ///
    /// # Errors
    /// [`Reason::HttpMalformed`] when the chunks can not be read, or could be read in two ways.
    pub fn advance(&mut self, bytes: &[u8]) -> Result<usize, Reason> {
        let mut at = 0;
        while at < bytes.len() {
            match &mut self.state {
                State::Done => break,
                State::UntilClose => return Ok(bytes.len()),
                State::Length(left) | State::Data(left) => {
                    let take = (*left).min((bytes.len() - at) as u64);
                    *left -= take;
                    at += take as usize;
                    if *left == 0 {
                        self.state = if matches!(self.state, State::Length(_)) {
                            State::Done
                        } else {
                            State::DataCr
                        };
                    }
                }
                _ => {
                    self.state = self.step(bytes[at])?;
                    at += 1;
                }
            }
        }
        Ok(at)
    }

    /// One byte of a chunked body that is not data.
    fn step(&mut self, byte: u8) -> Result<State, Reason> {
        Ok(match (&self.state, byte) {
            (State::Size { .. }, _) => return self.state.size_line(byte),
            (State::SizeLf(0), b'\n') => State::TrailerName(0),
            (State::SizeLf(size), b'\n') => State::Data(*size),
            (State::DataCr, b'\r') => State::DataLf,
            (State::DataLf, b'\n') => State::SIZE,
            (State::TrailerName(_), b'\r') if self.name.is_empty() => State::EndLf,
            (State::EndLf, b'\n') => State::Done,
            (State::TrailerName(section), b':') => {
                // A trailer line is a header line: no folding, no spaces before the colon.
                is_trailer(&self.name)?;
                self.name.clear();
                State::TrailerValue(bounded(*section, TRAILERS_MAX)?)
            }
            (State::TrailerName(section), _) if is_token(byte) => {
                if self.name.len() < NAME_MAX {
                    self.name.push(byte);
                }
                State::TrailerName(bounded(*section, TRAILERS_MAX)?)
            }
            (State::TrailerValue(section), b'\r') => State::TrailerLf(*section),
            (State::TrailerValue(section), _) if is_text(byte) => {
                State::TrailerValue(bounded(*section, TRAILERS_MAX)?)
            }
            (State::TrailerLf(section), b'\n') => State::TrailerName(*section),
            _ => return Err(Reason::HttpMalformed),
        })
    }
}

impl State {
    const SIZE: Self = Self::Size {
        size: 0,
        digits: 0,
        extension: false,
        line: 0,
    };

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
        if begins || (extension && is_text(byte)) {
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
