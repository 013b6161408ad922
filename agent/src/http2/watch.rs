//! Counts the frames of a local program that cost work and bring none: h2 bounds what it keeps of them, but answers
//! them without an end. A connection that floods is ended.

use std::cell::Cell;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Frames beyond those that requests and data pay for, within [`WINDOW`]: pings, settings, priorities, continuations,
/// empty data, unknown ones; of an app also heads. A gRPC client that measures its path pings once a message.
const IDLE_FRAMES_MAX: u32 = 1_000;
/// Requests given up within [`WINDOW`] beyond those that were answered.
const RESETS_MAX: u32 = 1_000;
/// After it a connection has a clean sheet.
const WINDOW: Duration = Duration::from_secs(10);

/// A frame's head (RFC 9113 §4.1).
pub(crate) const FRAME_HEAD_LEN: usize = 9;
/// What a client says first (RFC 9113 §3.4).
const PREFACE_LEN: usize = 24;

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const WINDOW_UPDATE: u8 = 8;
/// END_STREAM of data; ACK of settings and pings.
const FLAG_ONE: u8 = 1;

/// Whether an app that speaks first speaks HTTP/2: its first frame is its settings (RFC 9113 §3.4), which need no word
/// of the client.
pub(crate) fn begins_as_server(bytes: &[u8]) -> bool {
    /// An identifier and a value (RFC 9113 §6.5.1).
    const SETTING_LEN: u32 = 6;
    let Some((&[a, b, c, kind, flags, stream @ ..], _)) =
        bytes.split_first_chunk::<FRAME_HEAD_LEN>()
    else {
        return false;
    };
    let length = u32::from_be_bytes([0, a, b, c]);
    kind == SETTINGS && flags == 0 && stream == [0; 4] && length.is_multiple_of(SETTING_LEN)
}

/// What a connection's first bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Begins {
    /// A client's preface.
    Preface,
    /// Frames, of a server.
    Frames,
}

/// What is known of a connection. Shared by its socket and its streams.
#[derive(Debug)]
pub(crate) struct Watch {
    begins: Begins,
    idle: Cell<u32>,
    resets: Cell<u32>,
    since: Cell<Instant>,
    flooded: Cell<bool>,
    settings: Cell<bool>,
}

impl Watch {
    pub(crate) fn new(begins: Begins) -> Rc<Self> {
        Rc::new(Self {
            begins,
            idle: Cell::new(0),
            resets: Cell::new(0),
            since: Cell::new(Instant::now()),
            flooded: Cell::new(false),
            settings: Cell::new(false),
        })
    }

    /// The connection must be ended.
    pub(crate) fn is_flooded(&self) -> bool {
        self.flooded.get()
    }

    /// The peer's settings were read.
    pub(crate) fn has_settings(&self) -> bool {
        self.settings.get()
    }

    /// Something useful went out: a head or data.
    pub(crate) fn pay(&self) {
        self.idle.set(self.idle.get().saturating_sub(2));
    }

    /// A request was answered.
    pub(crate) fn answered(&self) {
        self.pay();
        self.resets.set(self.resets.get().saturating_sub(1));
    }

    fn count(&self, counter: &Cell<u32>, max: u32) {
        counter.set(counter.get() + 1);
        if counter.get() <= max {
            return;
        }
        let now = Instant::now();
        if now - self.since.get() < WINDOW {
            self.flooded.set(true);
            return;
        }
        self.since.set(now);
        self.idle.set(0);
        self.resets.set(0);
    }

    /// A frame's head was read.
    fn frame(&self, length: usize, kind: u8, flags: u8) {
        let server = self.begins == Begins::Preface;
        match kind {
            DATA if length > 0 => self.idle.set(self.idle.get().saturating_sub(1)),
            DATA if flags & FLAG_ONE != 0 => (),
            // An app says two for a request, and any number of interim ones.
            HEADERS if !server => self.count(&self.idle, IDLE_FRAMES_MAX),
            HEADERS => self.idle.set(self.idle.get().saturating_sub(1)),
            RST_STREAM if server => self.count(&self.resets, RESETS_MAX),
            SETTINGS | PING if flags & FLAG_ONE != 0 => (),
            // They keep no memory and get no answer, and each piece of a download has some.
            WINDOW_UPDATE => (),
            _ => {
                if kind == SETTINGS {
                    self.settings.set(true);
                }
                self.count(&self.idle, IDLE_FRAMES_MAX);
            }
        }
    }
}

/// A local program's connection that is watched.
#[derive(Debug)]
pub(crate) struct Watched<S> {
    socket: S,
    /// Read from the socket before it was known that this is HTTP/2.
    early: Vec<u8>,
    watch: Rc<Watch>,
    head: [u8; FRAME_HEAD_LEN],
    have: usize,
    /// Bytes to pass over: of the preface, or of a payload.
    skip: usize,
}

impl<S> Watched<S> {
    /// `early` was read already.
    pub(crate) fn new(socket: S, early: Vec<u8>, watch: Rc<Watch>) -> Self {
        let skip = match watch.begins {
            Begins::Preface => PREFACE_LEN,
            Begins::Frames => 0,
        };
        Self {
            socket,
            early,
            watch,
            head: [0; FRAME_HEAD_LEN],
            have: 0,
            skip,
        }
    }

    fn look(&mut self, mut bytes: &[u8]) {
        loop {
            let passed = self.skip.min(bytes.len());
            self.skip -= passed;
            bytes = &bytes[passed..];
            if bytes.is_empty() {
                return;
            }
            let take = (FRAME_HEAD_LEN - self.have).min(bytes.len());
            self.head[self.have..self.have + take].copy_from_slice(&bytes[..take]);
            self.have += take;
            bytes = &bytes[take..];
            if self.have < FRAME_HEAD_LEN {
                return;
            }
            let [a, b, c, kind, flags, ..] = self.head;
            self.skip = u32::from_be_bytes([0, a, b, c]) as usize;
            self.have = 0;
            self.watch.frame(self.skip, kind, flags);
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Watched<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.watch.is_flooded() {
            // The owner says farewell; nothing more is read for it.
            return Poll::Pending;
        }
        let before = buffer.filled().len();
        let read = if self.early.is_empty() {
            Pin::new(&mut self.socket).poll_read(cx, buffer)
        } else {
            let bytes = self.early.len().min(buffer.remaining());
            buffer.put_slice(&self.early[..bytes]);
            self.early.drain(..bytes);
            Poll::Ready(Ok(()))
        };
        if read.is_ready() {
            self.look(&buffer.filled()[before..]);
            if self.watch.is_flooded() {
                cx.waker().wake_by_ref();
            }
        }
        read
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Watched<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.socket.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_settings_begin_a_server() {
        for (bytes, expected) in [
            (b"\0\0\x12\x04\0\0\0\0\0\0\x03".as_slice(), true),
            (b"\0\0\0\x04\0\0\0\0\0", true),
            (b"\0\0\0\x04\0\0\0\0", false),
            (b"\0\0\0\x04\x01\0\0\0\0", false),
            (b"\0\0\x05\x04\0\0\0\0\0", false),
            (b"\0\0\x06\x04\0\0\0\0\x01", false),
            (b"220 mail.example.com ESMTP\r\n", false),
            (b"", false),
        ] {
            assert_eq!(begins_as_server(bytes), expected, "{bytes:?}");
        }
    }
}
