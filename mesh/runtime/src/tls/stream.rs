//! A TLS 1.3 connection after its handshake: records on a socket. The buffers that bytes pass through belong to the
//! thread and are lent for one call; a connection keeps only what was cut in the middle.

use std::cell::RefCell;
use std::fmt;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use rustls::client::ClientConnectionData;
use rustls::kernel::KernelConnection;
use rustls::server::ServerConnectionData;
use rustls::{ConnectionTrafficSecrets, Error, ExtractedSecrets};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

use super::handshake::broken;
use super::record::{
    CONTENT_MAX, OVERHEAD, Opened, Opener, RECORD_MAX, Sealer, content_room, record_len,
};
use crate::buffers;

/// One read of the socket, at the most: fewer system calls than with 16 KiB, measurably.
const READ_MAX: usize = 64 * 1024;
/// Sealed and written at once, at the most: what a buffer of the thread's holds with its overhead.
const WRITE_MAX: usize = 4 * CONTENT_MAX;
const _: () = assert!(WRITE_MAX + 8 * OVERHEAD <= buffers::LEN);
/// Records under one key. AES-GCM is safe for 2^24.5 (RFC 8446 §5.5).
const KEY_MAX: u64 = 1 << 23;
/// Records without data one after the other: more is an attack.
const EMPTY_MAX: u32 = 32;

thread_local! {
    static INPUT: RefCell<Box<[u8]>> =
        RefCell::new(vec![0; READ_MAX + RECORD_MAX].into_boxed_slice());
}

/// What rustls still does: the next keys.
pub(super) enum Keys {
    Client(KernelConnection<ClientConnectionData>),
    Server(KernelConnection<ServerConnectionData>),
}

impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Keys")
    }
}

type Secrets = (u64, ConnectionTrafficSecrets);

impl Keys {
    fn next_tx(&mut self) -> Result<Secrets, Error> {
        match self {
            Self::Client(keys) => keys.update_tx_secret(),
            Self::Server(keys) => keys.update_tx_secret(),
        }
    }

    fn next_rx(&mut self) -> Result<Secrets, Error> {
        match self {
            Self::Client(keys) => keys.update_rx_secret(),
            Self::Server(keys) => keys.update_rx_secret(),
        }
    }
}

/// An authenticated, encrypted connection.
#[derive(Debug)]
pub struct TlsStream {
    socket: TcpStream,
    keys: Box<Keys>,
    sealer: Sealer,
    opener: Opener,
    /// Read, and not opened: mostly a part of a record.
    unopened: Vec<u8>,
    /// Opened, and not taken: what did not fit where it was asked for.
    untaken: Vec<u8>,
    /// Sealed, and from `written` on not written: the socket is full.
    unsent: Vec<u8>,
    written: usize,
    /// Records without data since the last with some.
    empty: u32,
    /// The peer asked for a key of ours.
    update: bool,
    key_max: u64,
    received_close: bool,
    sent_close: bool,
}

impl TlsStream {
    pub(super) fn new(
        socket: TcpStream,
        secrets: ExtractedSecrets,
        keys: Keys,
        unopened: Vec<u8>,
        untaken: Vec<u8>,
    ) -> Result<Self, Error> {
        Ok(Self {
            socket,
            keys: Box::new(keys),
            sealer: Sealer::new(secrets.tx)?,
            opener: Opener::new(secrets.rx)?,
            unopened,
            untaken,
            unsent: Vec::new(),
            written: 0,
            empty: 0,
            update: false,
            key_max: KEY_MAX,
            received_close: false,
            sent_close: false,
        })
    }

    /// Opens the record at the front of `bytes` into `out`.
    fn open(&mut self, record: &[u8], out: &mut [u8]) -> Result<usize, Error> {
        match self.opener.open(record, out)? {
            Opened::Data(bytes) if bytes > 0 => {
                self.empty = 0;
                return Ok(bytes);
            }
            Opened::Data(_) => (),
            Opened::KeyUpdate(answer) => {
                self.opener = Opener::new(self.keys.next_rx()?)?;
                self.update |= answer;
            }
            Opened::CloseNotify => self.received_close = true,
        }
        self.empty += 1;
        if self.empty > EMPTY_MAX {
            return Err(Error::PeerMisbehaved(
                rustls::PeerMisbehaved::TooManyKeyUpdateRequests,
            ));
        }
        Ok(0)
    }

    /// Opens the whole records of `input` into `buf` and says how much of `input` is used up.
    fn open_all(&mut self, input: &[u8], buf: &mut ReadBuf<'_>) -> Result<usize, Error> {
        let before = buf.filled().len();
        let mut used = 0;
        while !self.received_close {
            let Some(length) = record_len(&input[used..])? else {
                break;
            };
            let Some(record) = input.get(used..used + length) else {
                break;
            };
            let room = content_room(length);
            if room <= buf.remaining() {
                let bytes = self.open(record, buf.initialize_unfilled_to(room))?;
                buf.advance(bytes);
            } else if buf.filled().len() == before {
                let mut content = vec![0; room];
                let bytes = self.open(record, &mut content)?;
                content.truncate(bytes);
                self.untaken = content;
                self.take_rest(buf);
                return Ok(used + length);
            } else {
                break;
            }
            used += length;
        }
        Ok(used)
    }

    fn take_rest(&mut self, buf: &mut ReadBuf<'_>) {
        let bytes = self.untaken.len().min(buf.remaining());
        buf.put_slice(&self.untaken[..bytes]);
        self.untaken.drain(..bytes);
    }

    /// Reads and opens until there is data, or no more to read. `input` holds `filled` bytes at first; what is left
    /// is returned.
    fn poll_open<'i>(
        &mut self,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
        input: &'i mut [u8],
        mut filled: usize,
    ) -> (Poll<io::Result<()>>, &'i [u8]) {
        let before = buf.filled().len();
        loop {
            let used = match self.open_all(&input[..filled], buf) {
                Ok(used) => used,
                Err(error) => return (Poll::Ready(Err(broken(error))), &[]),
            };
            if buf.filled().len() > before || self.received_close {
                return (Poll::Ready(Ok(())), &input[used..filled]);
            }
            input.copy_within(used..filled, 0);
            filled -= used;
            let end = input.len().min(filled + READ_MAX);
            let mut room = ReadBuf::new(&mut input[filled..end]);
            match Pin::new(&mut self.socket).poll_read(cx, &mut room) {
                Poll::Pending => return (Poll::Pending, &input[..filled]),
                Poll::Ready(Err(error)) => return (Poll::Ready(Err(error)), &[]),
                // Not said by the peer itself, an end may be somebody else's work.
                Poll::Ready(Ok(())) if room.filled().is_empty() => {
                    return (Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into())), &[]);
                }
                Poll::Ready(Ok(())) => filled += room.filled().len(),
            }
        }
    }

    /// Seals as much of `data` as is written at once, new keys before it where they are due.
    fn seal(&mut self, data: &[u8], out: &mut Vec<u8>) -> Result<usize, Error> {
        if self.update || self.sealer.sealed() >= self.key_max {
            // Asked back only by us: two that answer each other would never end.
            self.sealer.seal_key_update(false, out)?;
            self.sealer = Sealer::new(self.keys.next_tx()?)?;
            self.update = false;
        }
        let bytes = data.len().min(WRITE_MAX);
        for content in data[..bytes].chunks(CONTENT_MAX) {
            self.sealer.seal_data(content, out)?;
        }
        Ok(bytes)
    }

    fn poll_unsent(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.written < self.unsent.len() {
            let rest = &self.unsent[self.written..];
            let written = ready!(Pin::new(&mut self.socket).poll_write(cx, rest))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.written += written;
        }
        self.written = 0;
        buffers::give(std::mem::take(&mut self.unsent));
        Poll::Ready(Ok(()))
    }
}

impl AsyncRead for TlsStream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if !this.untaken.is_empty() {
            this.take_rest(buf);
            return Poll::Ready(Ok(()));
        }
        if this.received_close || buf.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        INPUT.with_borrow_mut(|input| {
            let mut unopened = std::mem::take(&mut this.unopened);
            input[..unopened.len()].copy_from_slice(&unopened);
            let (outcome, rest) = this.poll_open(cx, buf, input, unopened.len());
            unopened.clear();
            unopened.extend_from_slice(rest);
            this.unopened = if unopened.is_empty() {
                Vec::new()
            } else {
                unopened
            };
            outcome
        })
    }
}

impl AsyncWrite for TlsStream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        ready!(this.poll_unsent(cx))?;
        let mut sealed = buffers::take();
        let bytes = this.seal(data, &mut sealed).map_err(broken)?;
        this.unsent = sealed;
        // What the socket does not take now is the first that it gets.
        if let Poll::Ready(written) = this.poll_unsent(cx) {
            written?;
        }
        Poll::Ready(Ok(bytes))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.get_mut().poll_unsent(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if !this.sent_close {
            this.sent_close = true;
            let sealed = this.sealer.seal_close_notify(&mut this.unsent);
            sealed.map_err(broken)?;
        }
        ready!(this.poll_unsent(cx))?;
        Pin::new(&mut this.socket).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests;
