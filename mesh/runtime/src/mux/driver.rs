//! The task that owns a connection's carrier.

use std::cell::RefCell;
use std::future::Future;
use std::io;
use std::ops::Range;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;

use mesh_api::frame::{PREFIX_LEN, Prefix};
use mesh_core::reason::Reason;
use mesh_core::stream::Frame;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Interval, MissedTickBehavior, Sleep, interval, sleep};

use super::{Bound, Shared};

/// One read takes at most this much, and what the carrier has of it more: fewer system calls than with 16 KiB,
/// measurably.
const INPUT_LEN: usize = 128 * 1024;
/// Reads in one turn, so that a connection that never runs dry leaves the thread to others.
const READS_PER_TURN: usize = 8;

/// How long the peer may take to end a connection that we ended.
const FAREWELL: Duration = Duration::from_secs(2);

thread_local! {
    /// Lent to one connection of the thread for one turn.
    static INPUT: RefCell<Box<[u8]>> = RefCell::new(vec![0; INPUT_LEN].into_boxed_slice());
}

/// Runs a connection until it is over and says why. Must be polled on the thread of its [`super::Mux`].
#[derive(Debug)]
pub struct Driver<C> {
    carrier: C,
    shared: Rc<RefCell<Shared>>,
    /// Read, and not handled: a part of a frame.
    unhandled: Vec<u8>,
    /// The data frame that is read next, where only its begin has come.
    cut: Option<Cut>,
    keepalive_every: Duration,
    keepalive: Option<Interval>,
    asked: bool,
    shutting: bool,
    farewell: Option<Pin<Box<Sleep>>>,
}

/// A data frame that comes in pieces.
#[derive(Debug)]
struct Cut {
    stream: u32,
    /// Whether the stream ends with it.
    end: bool,
    missing: usize,
}

impl<C> Driver<C> {
    pub(super) fn new(carrier: C, shared: Rc<RefCell<Shared>>, keepalive_every: Duration) -> Self {
        Self {
            carrier,
            shared,
            unhandled: Vec::new(),
            cut: None,
            keepalive_every,
            keepalive: None,
            asked: false,
            shutting: false,
            farewell: None,
        }
    }
}

impl<C: AsyncRead + AsyncWrite + Unpin> Driver<C> {
    fn poll_input(&mut self, cx: &mut Context<'_>) -> Poll<Reason> {
        INPUT.with_borrow_mut(|input| {
            let unhandled = self.unhandled.len();
            input[..unhandled].copy_from_slice(&self.unhandled);
            let mut pending = 0..unhandled;
            let outcome = self.poll_frames(cx, input, &mut pending);
            self.unhandled.clear();
            self.unhandled.extend_from_slice(&input[pending]);
            if self.unhandled.is_empty() {
                self.unhandled = Vec::new();
            }
            outcome
        })
    }

    /// Reads and handles while there is something. Of `input`, `pending` is read and not handled.
    fn poll_frames(
        &mut self,
        cx: &mut Context<'_>,
        input: &mut [u8],
        pending: &mut Range<usize>,
    ) -> Poll<Reason> {
        for _ in 0..READS_PER_TURN {
            input.copy_within(pending.clone(), 0);
            *pending = 0..pending.len();
            let mut buffer = ReadBuf::new(&mut input[pending.end..]);
            match Pin::new(&mut self.carrier).poll_read(cx, &mut buffer) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Ok(())) if buffer.filled().is_empty() => {
                    return Poll::Ready(Reason::PeerLost);
                }
                Poll::Ready(Ok(())) => pending.end += buffer.filled().len(),
                Poll::Ready(Err(error)) => return Poll::Ready(self.lost(&error)),
            }
            match self.handle_frames(&input[pending.clone()]) {
                Ok(handled) => pending.start += handled,
                Err(reason) => return Poll::Ready(reason),
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// Handles what is there of frames and says how long that is. Data need not wait for the rest of its frame.
    fn handle_frames(&mut self, input: &[u8]) -> Result<usize, Reason> {
        let mut shared = self.shared.borrow_mut();
        shared.heard = true;
        let mut handled = 0;
        loop {
            if let Some(cut) = &mut self.cut {
                let bytes = cut.missing.min(input.len() - handled);
                cut.missing -= bytes;
                let frame = Frame::Data {
                    stream: cut.stream,
                    data: &input[handled..handled + bytes],
                    end: cut.end && cut.missing == 0,
                };
                handled += bytes;
                if bytes > 0 {
                    shared.handle(&frame)?;
                }
                if cut.missing > 0 {
                    return Ok(handled);
                }
                self.cut = None;
            }
            let Some((head, rest)) = input[handled..].split_first_chunk::<PREFIX_LEN>() else {
                return Ok(handled);
            };
            let broken = |error| {
                log::warn!("the peer's frames can not be read: {error}");
                Reason::ProtocolError
            };
            let prefix = Prefix::decode(*head, shared.max_frame).map_err(broken)?;
            match (rest.get(..prefix.length), prefix.data()) {
                (Some(payload), _) => {
                    let frame = prefix.frame(payload).map_err(broken)?;
                    shared.handle(&frame)?;
                    handled += PREFIX_LEN + prefix.length;
                }
                (None, Some((stream, end))) => {
                    handled += PREFIX_LEN;
                    self.cut = Some(Cut {
                        stream,
                        end,
                        missing: prefix.length,
                    });
                }
                (None, None) => return Ok(handled),
            }
        }
    }

    fn poll_output(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut shared = self.shared.borrow_mut();
        loop {
            // While a peer takes nothing, what it asks for waits in the machine, where its number is bounded.
            if shared.output.len() - shared.written < super::OUTPUT_MAX {
                shared.take_control();
            }
            if shared.written == shared.output.len() {
                return Pin::new(&mut self.carrier).poll_flush(cx);
            }
            let output = &shared.output[shared.written..];
            match Pin::new(&mut self.carrier).poll_write(cx, output) {
                Poll::Ready(Ok(0)) => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                Poll::Ready(Ok(bytes)) => shared.note_written(bytes),
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Pending => return Poll::Pending,
            }
        }
    }

    fn poll_keepalive(&mut self, cx: &mut Context<'_>) -> Result<(), Reason> {
        let every = self.keepalive_every;
        let timer = self.keepalive.get_or_insert_with(|| {
            let mut timer = interval(every);
            timer.set_missed_tick_behavior(MissedTickBehavior::Delay);
            timer.reset();
            timer
        });
        while timer.poll_tick(cx).is_ready() {
            let mut shared = self.shared.borrow_mut();
            // A burst must not be paid for by a connection's whole life.
            if shared.output.is_empty() {
                shared.output = Vec::new();
            }
            if std::mem::take(&mut shared.heard) {
                self.asked = false;
            } else if self.asked {
                shared.ended_by = Some(Bound::Silence);
                return Err(Reason::PeerLost);
            } else {
                self.asked = true;
                shared.machine.ping(0);
                cx.waker().wake_by_ref();
            }
        }
        Ok(())
    }

    fn lost(&self, error: &io::Error) -> Reason {
        log::debug!("a mesh connection broke: {error}");
        // TCP_USER_TIMEOUT: what was sent is not acknowledged.
        if error.kind() == io::ErrorKind::TimedOut {
            self.shared.borrow_mut().ended_by = Some(Bound::Silence);
            return Reason::PeerLost;
        }
        // A TLS alert of the peer arrives here: it refused our certificate after its own handshake was through.
        match crate::tls::verify::handshake_reason(error) {
            Reason::PeerUnreachable => Reason::PeerLost,
            reason => reason,
        }
    }

    fn poll_turn(&mut self, cx: &mut Context<'_>) -> Poll<Reason> {
        if let Poll::Ready(reason) = self.poll_input(cx) {
            return Poll::Ready(reason);
        }
        if let Err(reason) = self.poll_keepalive(cx) {
            return Poll::Ready(reason);
        }
        match self.poll_output(cx) {
            Poll::Ready(Err(error)) => Poll::Ready(self.lost(&error)),
            Poll::Ready(Ok(())) if self.shared.borrow().is_over() => Poll::Ready(Reason::Cancelled),
            _ => Poll::Pending,
        }
    }
}

impl<C: AsyncRead + AsyncWrite + Unpin> Driver<C> {
    /// Says the end and waits for the peer's, but not for long: a socket that is closed while the peer still says
    /// something is reset by the kernel, and what it has not sent yet is lost.
    fn poll_farewell(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let timer = self
            .farewell
            .get_or_insert_with(|| Box::pin(sleep(FAREWELL)));
        if timer.as_mut().poll(cx).is_ready() {
            return Poll::Ready(());
        }
        if let Poll::Ready(Err(_)) = Pin::new(&mut self.carrier).poll_shutdown(cx) {
            return Poll::Ready(());
        }
        INPUT.with_borrow_mut(|input| {
            for _ in 0..READS_PER_TURN {
                let mut buffer = ReadBuf::new(input);
                let read = Pin::new(&mut self.carrier).poll_read(cx, &mut buffer);
                match std::task::ready!(read) {
                    Ok(()) if !buffer.filled().is_empty() => (),
                    _ => return Poll::Ready(()),
                }
            }
            cx.waker().wake_by_ref();
            Poll::Pending
        })
    }
}

impl<C: AsyncRead + AsyncWrite + Unpin> Future for Driver<C> {
    type Output = Reason;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Reason> {
        let this = self.get_mut();
        if !this.shutting {
            {
                let mut shared = this.shared.borrow_mut();
                let same = shared
                    .driver
                    .as_ref()
                    .is_some_and(|waker| waker.will_wake(cx.waker()));
                if !same {
                    shared.driver = Some(cx.waker().clone());
                }
            }
            let turn = if this.shared.borrow().ended {
                // Why it ends is said as far as the peer takes it at once: who does not read is not waited for.
                let _ = this.poll_output(cx);
                Poll::Ready(Reason::Cancelled)
            } else {
                this.poll_turn(cx)
            };
            {
                let mut shared = this.shared.borrow_mut();
                if shared.note_held() && !shared.ended {
                    shared.ended_by = Some(Bound::Buffers);
                    shared.end_all(Reason::Overloaded);
                }
            }
            match turn {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(reason) => {
                    this.shared.borrow_mut().close(reason);
                    this.shutting = true;
                }
            }
        }
        let reason = this.shared.borrow().closed.unwrap_or(Reason::PeerLost);
        // We end it: what has left may still be under way.
        if reason == Reason::Cancelled || this.shared.borrow().ended {
            std::task::ready!(this.poll_farewell(cx));
        } else {
            let _ = Pin::new(&mut this.carrier).poll_shutdown(cx);
        }
        Poll::Ready(reason)
    }
}

impl<C> Drop for Driver<C> {
    fn drop(&mut self) {
        // A driver that is dropped in the middle leaves no stream waiting for ever.
        self.shared.borrow_mut().close(Reason::PeerLost);
    }
}
