//! The framings of a body: how it is sent, and taken without believing an end that is none.

use std::cell::Cell;
use std::io::{self, Error, ErrorKind};
use std::rc::Rc;

use tokio::io::{
    AsyncBufRead, AsyncBufReadExt as _, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _,
};

use super::seeded::{Digest, Seeded, Sum};

/// What one write of a body carries.
const STEP: usize = 64 * 1024;
/// A line of a chunk's size or of a trailer.
const LINE_MAX: usize = 1024;

/// Where a body ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Framing {
    Length(u64),
    Chunked,
    /// With the connection.
    Close,
}

/// What is to be sent.
#[derive(Clone, Copy, Debug)]
pub(super) struct Body {
    pub(super) bytes: u64,
    pub(super) seed: u64,
    /// So many bytes a write; 1 is the slowest writer.
    pub(super) step: usize,
    /// After so many bytes nothing more comes.
    pub(super) stop: Option<u64>,
}

impl Body {
    pub(super) const fn new(bytes: u64, seed: u64) -> Self {
        Self {
            bytes,
            seed,
            step: STEP,
            stop: None,
        }
    }
}

/// How far a transfer is, for those who watch it.
#[derive(Clone, Debug, Default)]
pub(super) struct Progress(Rc<Cell<u64>>);

impl Progress {
    pub(super) fn get(&self) -> u64 {
        self.0.get()
    }

    pub(super) fn add(&self, bytes: usize) {
        self.0.set(self.0.get() + bytes as u64);
    }
}

/// Sends a body. One that stops early returns its sum so far and leaves the message unfinished.
pub(super) async fn give<W: AsyncWrite + Unpin>(
    writer: &mut W,
    framing: Framing,
    body: Body,
) -> io::Result<Sum> {
    let (mut seeded, mut digest) = (Seeded::new(body.seed), Digest::new());
    let end = body.stop.unwrap_or(body.bytes).min(body.bytes);
    let mut sent = 0;
    let mut data = vec![0; STEP];
    let mut out = Vec::with_capacity(STEP + 32);
    // The bytes of a seed come in words, however few of them a write takes.
    let (mut from, mut filled) = (0, 0);
    while sent < end {
        if from == filled {
            filled = usize::try_from(end - sent).map_or(STEP, |left| left.min(STEP));
            from = 0;
            seeded.fill(&mut data[..filled]);
        }
        let until = filled.min(from + body.step);
        let part = &data[from..until];
        digest.add(part);
        if framing == Framing::Chunked {
            out.clear();
            out.extend_from_slice(format!("{:x}\r\n", part.len()).as_bytes());
            out.extend_from_slice(part);
            out.extend_from_slice(b"\r\n");
            writer.write_all(&out).await?;
        } else {
            writer.write_all(part).await?;
        }
        if body.step == 1 {
            // So that each byte is a write, and a packet, of its own.
            writer.flush().await?;
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        }
        sent += part.len() as u64;
        from = until;
    }
    if framing == Framing::Chunked && end == body.bytes {
        writer.write_all(b"0\r\n\r\n").await?;
    }
    writer.flush().await?;
    Ok(digest.finish())
}

/// Takes a body to its end.
///
/// # Errors
/// When it ends before it is whole.
pub(super) async fn take<R: AsyncBufRead + Unpin>(
    reader: &mut R,
    framing: Framing,
    progress: &Progress,
) -> io::Result<Sum> {
    let mut digest = Digest::new();
    match framing {
        Framing::Length(bytes) => exactly(reader, bytes, &mut digest, progress).await?,
        Framing::Close => loop {
            let part = reader.fill_buf().await?;
            if part.is_empty() {
                break;
            }
            digest.add(part);
            let bytes = part.len();
            reader.consume(bytes);
            progress.add(bytes);
        },
        Framing::Chunked => loop {
            let size = line(reader).await?;
            let size = u64::from_str_radix(&size, 16)
                .map_err(|_| Error::new(ErrorKind::InvalidData, format!("chunk size {size:?}")))?;
            exactly(reader, size, &mut digest, progress).await?;
            // After a chunk its line's end; after the last one the trailers' end.
            let rest = line(reader).await?;
            if !rest.is_empty() {
                return Err(Error::new(ErrorKind::InvalidData, "a chunk too long"));
            }
            if size == 0 {
                break;
            }
        },
    }
    Ok(digest.finish())
}

async fn exactly<R: AsyncBufRead + Unpin>(
    reader: &mut R,
    bytes: u64,
    digest: &mut Digest,
    progress: &Progress,
) -> io::Result<()> {
    let mut left = bytes;
    while left > 0 {
        let part = reader.fill_buf().await?;
        if part.is_empty() {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        let part = &part[..usize::try_from(left).map_or(part.len(), |left| left.min(part.len()))];
        digest.add(part);
        let bytes = part.len();
        reader.consume(bytes);
        progress.add(bytes);
        left -= bytes as u64;
    }
    Ok(())
}

/// One line without its end.
pub(super) async fn line<R: AsyncBufRead + Unpin>(reader: &mut R) -> io::Result<String> {
    let mut text = Vec::new();
    let mut limited = reader.take(LINE_MAX as u64);
    limited.read_until(b'\n', &mut text).await?;
    match text
        .strip_suffix(b"\r\n")
        .or_else(|| text.strip_suffix(b"\n"))
    {
        Some(line) => Ok(String::from_utf8_lossy(line).into_owned()),
        None => Err(ErrorKind::UnexpectedEof.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn passed(framing: Framing, body: Body, cut: usize) -> (Sum, io::Result<Sum>) {
        let mut wire = Vec::new();
        let sent = give(&mut wire, framing, body).await.unwrap();
        wire.truncate(wire.len() - cut);
        let taken = take(&mut wire.as_slice(), framing, &Progress::default()).await;
        (sent, taken)
    }

    #[tokio::test]
    async fn a_whole_body_is_taken_and_a_cut_one_is_not() {
        for bytes in [0, 1, 65_536, 200_001] {
            for framing in [Framing::Length(bytes), Framing::Chunked] {
                let body = Body::new(bytes, 7);
                let (sent, taken) = passed(framing, body, 0).await;
                assert_eq!(sent, taken.unwrap());
                assert_eq!(sent, super::super::seeded::sum_of(7, bytes));
                if bytes > 0 {
                    assert!(passed(framing, body, 1).await.1.is_err(), "{framing:?}");
                    let stop = Some(bytes - 1);
                    let stopped = Body { stop, ..body };
                    assert!(passed(framing, stopped, 0).await.1.is_err(), "{framing:?}");
                }
            }
        }
    }
}
