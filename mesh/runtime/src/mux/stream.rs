//! One stream of a connection.

use std::cell::RefCell;
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use bytes::BufMut as _;
use mesh_api::frame::{self, PREFIX_LEN};
use mesh_core::reason::Reason;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_util::io::poll_read_buf;

use super::Shared;

/// A stream. Dropping it before both ends are through resets it.
#[derive(Debug)]
pub struct MuxStream {
    shared: Rc<RefCell<Shared>>,
    id: u32,
    /// What a drop tells the peer.
    on_drop: Reason,
}

/// Which side of a relay failed.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// The stream was reset by the peer, or its connection is over.
    #[error("the stream was reset: {0}")]
    Reset(Reason),
    /// The local socket failed.
    #[error("the local connection failed: {0}")]
    Local(#[from] io::Error),
}

impl MuxStream {
    pub(super) fn new(shared: Rc<RefCell<Shared>>, id: u32) -> Self {
        Self {
            shared,
            id,
            on_drop: Reason::Cancelled,
        }
    }

    /// Reads once from `source` straight into the output. 0 is the source's end; the stream is not ended by it.
    pub fn poll_send_from<R: AsyncRead + Unpin>(
        &self,
        cx: &mut Context<'_>,
        source: &mut R,
    ) -> Poll<Result<usize, StreamError>> {
        let mut shared = self.shared.borrow_mut();
        let capacity = ready!(self.poll_allowance(&mut shared, cx))?;
        shared.take_control();
        let at = shared.output.len();
        shared.output.reserve(PREFIX_LEN + capacity);
        shared.output.put_bytes(0, PREFIX_LEN);
        let read = {
            let mut target = (&mut shared.output).limit(capacity);
            poll_read_buf(Pin::new(source), cx, &mut target)
        };
        let bytes = match read {
            Poll::Ready(Ok(bytes)) if bytes > 0 => bytes,
            other => {
                shared.output.truncate(at);
                return other.map_err(StreamError::Local);
            }
        };
        let prefix = frame::data_prefix(self.id, bytes, false);
        shared.output[at..at + PREFIX_LEN].copy_from_slice(&prefix);
        shared.note_sent(self.id, bytes, at);
        Poll::Ready(Ok(bytes))
    }

    /// Sends a part of `data`, at least one byte of it.
    pub fn poll_send(&self, cx: &mut Context<'_>, data: &[u8]) -> Poll<Result<usize, StreamError>> {
        let mut shared = self.shared.borrow_mut();
        let capacity = ready!(self.poll_allowance(&mut shared, cx))?;
        let bytes = capacity.min(data.len());
        shared.take_control();
        let at = shared.output.len();
        let prefix = frame::data_prefix(self.id, bytes, false);
        shared.output.reserve(prefix.len() + bytes);
        shared.output.extend_from_slice(&prefix);
        shared.output.extend_from_slice(&data[..bytes]);
        shared.note_sent(self.id, bytes, at);
        Poll::Ready(Ok(bytes))
    }

    /// Sends all of `data`.
    ///
    /// # Errors
    /// When the stream is reset first.
    pub async fn send(&self, mut data: &[u8]) -> Result<(), StreamError> {
        while !data.is_empty() {
            let sent = poll_fn(|cx| self.poll_send(cx, data)).await?;
            data = &data[sent..];
        }
        Ok(())
    }

    fn poll_allowance(
        &self,
        shared: &mut Shared,
        cx: &Context<'_>,
    ) -> Poll<Result<usize, StreamError>> {
        let allowance = shared.allowance(self.id);
        let Some(slot) = shared.slots.get(&self.id) else {
            return Poll::Ready(Err(StreamError::Reset(Reason::PeerLost)));
        };
        if let Some(reason) = slot.reset {
            return Poll::Ready(Err(StreamError::Reset(reason)));
        }
        if allowance == 0 {
            shared.wait_to_write(self.id, cx.waker());
            return Poll::Pending;
        }
        Poll::Ready(Ok(allowance))
    }

    /// Ends our direction, after all that was sent.
    pub fn end(&self) {
        self.shared.borrow_mut().end(self.id);
    }

    /// Tells the caller that the app took the connection.
    pub fn accept(&self) {
        let mut shared = self.shared.borrow_mut();
        shared.machine.accept(self.id);
        shared.wake_driver();
    }

    /// Waits until the peer accepted the stream, sent data or ended.
    ///
    /// # Errors
    /// The reason of the refusal.
    pub async fn accepted(&self) -> Result<(), Reason> {
        poll_fn(|cx| {
            let mut shared = self.shared.borrow_mut();
            let Some(slot) = shared.slots.get_mut(&self.id) else {
                return Poll::Ready(Err(Reason::PeerLost));
            };
            if slot.accepted || !slot.received.is_empty() || slot.ended {
                return Poll::Ready(Ok(()));
            }
            if let Some(reason) = slot.reset {
                return Poll::Ready(Err(reason));
            }
            slot.reader = Some(cx.waker().clone());
            Poll::Pending
        })
        .await
    }

    /// Ready when there is something to receive: bytes, the end, or a reset.
    pub fn poll_readable(&self, cx: &Context<'_>) -> Poll<()> {
        let mut shared = self.shared.borrow_mut();
        let Some(slot) = shared.slots.get_mut(&self.id) else {
            return Poll::Ready(());
        };
        if !slot.received.is_empty() || slot.ended || slot.reset.is_some() {
            return Poll::Ready(());
        }
        slot.reader = Some(cx.waker().clone());
        Poll::Pending
    }

    /// Ready when the stream was reset; others may wait to receive meanwhile.
    pub fn poll_reset(&self, cx: &Context<'_>) -> Poll<Reason> {
        let mut shared = self.shared.borrow_mut();
        let Some(slot) = shared.slots.get_mut(&self.id) else {
            return Poll::Ready(Reason::PeerLost);
        };
        if let Some(reason) = slot.reset {
            return Poll::Ready(reason);
        }
        slot.watcher = Some(cx.waker().clone());
        Poll::Pending
    }

    /// Why the stream was reset, if it was and all that came before is read.
    pub fn reset_reason(&self) -> Option<Reason> {
        let shared = self.shared.borrow();
        let slot = shared.slots.get(&self.id)?;
        if slot.received.is_empty() {
            slot.reset
        } else {
            None
        }
    }

    /// Hands what was received to `take`, which says how much of it is used up. `None` is the stream's end. What
    /// came before a reset is handed out first.
    pub fn poll_recv_with(
        &self,
        cx: &mut Context<'_>,
        mut take: impl FnMut(&mut Context<'_>, &[u8]) -> Poll<io::Result<usize>>,
    ) -> Poll<Result<Option<usize>, StreamError>> {
        let mut shared = self.shared.borrow_mut();
        let Some(slot) = shared.slots.get_mut(&self.id) else {
            return Poll::Ready(Err(StreamError::Reset(Reason::PeerLost)));
        };
        if slot.received.is_empty() {
            if slot.ended {
                return Poll::Ready(Ok(None));
            }
            if let Some(reason) = slot.reset {
                return Poll::Ready(Err(StreamError::Reset(reason)));
            }
            slot.reader = Some(cx.waker().clone());
            return Poll::Pending;
        }
        let bytes = ready!(take(cx, slot.received.front()))?;
        slot.received.take(bytes);
        shared.machine.consumed(self.id, bytes);
        shared.unread -= bytes;
        shared.note_held();
        if shared.machine.has_control() {
            shared.wake_driver();
        }
        Poll::Ready(Ok(Some(bytes)))
    }

    /// Writes once to `sink` from what was received. `None` is the stream's end.
    pub fn poll_recv_into<W: AsyncWrite + Unpin>(
        &self,
        cx: &mut Context<'_>,
        sink: &mut W,
    ) -> Poll<Result<Option<usize>, StreamError>> {
        self.poll_recv_with(cx, |cx, bytes| Pin::new(&mut *sink).poll_write(cx, bytes))
    }

    /// Appends what was received to `out`, at most `max` bytes. `None` is the stream's end.
    ///
    /// # Errors
    /// When the stream is reset first.
    pub async fn recv(&self, out: &mut Vec<u8>, max: usize) -> Result<Option<usize>, StreamError> {
        poll_fn(|cx| {
            self.poll_recv_with(cx, |_, bytes| {
                let bytes = &bytes[..bytes.len().min(max)];
                out.extend_from_slice(bytes);
                Poll::Ready(Ok(bytes.len()))
            })
        })
        .await
    }

    /// What the app at the other end said with [`Reason::StreamReset`].
    pub fn reset_code(&self) -> u32 {
        let shared = self.shared.borrow();
        shared.slots.get(&self.id).map_or(0, |slot| slot.code)
    }

    /// Ends the stream at once, both ways, with the code of the app at this end.
    pub fn reset_with_code(&self, code: u32) {
        let mut shared = self.shared.borrow_mut();
        let reason = Reason::StreamReset;
        shared.machine.reset_with(self.id, reason, code);
        if let Some(slot) = shared.slots.get_mut(&self.id) {
            slot.end_by(reason);
        }
        shared.give_turns();
        shared.wake_driver();
    }

    /// Ends the stream at once, both ways.
    pub fn reset(mut self, reason: Reason) {
        self.on_drop = reason;
    }
}

impl Drop for MuxStream {
    fn drop(&mut self) {
        self.shared.borrow_mut().drop_stream(self.id, self.on_drop);
    }
}
