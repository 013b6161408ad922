//! Bytes between a local connection and a stream, both ways, until both ends are through.

use std::cell::Cell;
use std::future::poll_fn;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use mesh_runtime::mux::{MuxStream, StreamError};
use tokio::io::AsyncWrite as _;
use tokio::net::TcpStream;

use crate::metrics::Flow;

/// Turns of a direction before the other and other tasks have theirs.
const TURNS: usize = 16;

/// Which end of the call the local connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Local {
    Caller,
    Service,
}

/// Notes that something moved, so that one coarse timer a connection sees when nothing does.
#[derive(Debug, Default)]
pub(crate) struct Activity(Cell<bool>);

impl Activity {
    pub(crate) fn note(&self) {
        self.0.set(true);
    }

    /// Completes when nothing was noted for `idle`, at the latest after twice as long.
    pub(crate) async fn ceased(&self, idle: Duration) {
        loop {
            tokio::time::sleep(idle).await;
            if !self.0.replace(false) {
                return;
            }
        }
    }
}

/// Relays until both directions ended.
///
/// # Errors
/// The side that failed. Nothing is hidden: what had arrived is delivered first.
pub(crate) async fn relay(
    socket: &mut TcpStream,
    stream: &MuxStream,
    local: Local,
    flow: &Flow,
    activity: &Activity,
) -> Result<(), StreamError> {
    let (to_stream, to_socket) = match local {
        Local::Caller => (&flow.sent, &flow.received),
        Local::Service => (&flow.received, &flow.sent),
    };
    let mut reading = true;
    let mut writing = true;
    poll_fn(|cx| {
        if reading
            && let Poll::Ready(done) = poll_out(cx, socket, stream, |n| {
                to_stream.inc_by(n);
                activity.note();
            })
        {
            done?;
            reading = false;
        }
        if writing
            && let Poll::Ready(done) = poll_in(cx, socket, stream, |n| {
                to_socket.inc_by(n);
                activity.note();
            })
        {
            done?;
            writing = false;
        }
        if reading || writing {
            Poll::Pending
        } else {
            Poll::Ready(Ok(()))
        }
    })
    .await
}

fn poll_out(
    cx: &mut Context<'_>,
    socket: &mut TcpStream,
    stream: &MuxStream,
    count: impl Fn(u64),
) -> Poll<Result<(), StreamError>> {
    for _ in 0..TURNS {
        match std::task::ready!(stream.poll_send_from(cx, socket))? {
            0 => {
                stream.end();
                return Poll::Ready(Ok(()));
            }
            bytes => count(bytes as u64),
        }
    }
    cx.waker().wake_by_ref();
    Poll::Pending
}

fn poll_in(
    cx: &mut Context<'_>,
    socket: &mut TcpStream,
    stream: &MuxStream,
    count: impl Fn(u64),
) -> Poll<Result<(), StreamError>> {
    for _ in 0..TURNS {
        match std::task::ready!(stream.poll_recv_into(cx, socket))? {
            None => {
                // The other end may be gone already: then there is nobody left to tell.
                let _ = Pin::new(&mut *socket).poll_shutdown(cx);
                return Poll::Ready(Ok(()));
            }
            Some(bytes) => count(bytes as u64),
        }
    }
    cx.waker().wake_by_ref();
    Poll::Pending
}

/// Closes a connection so that its peer sees a reset, not an end that looks whole.
pub(crate) fn abort(socket: TcpStream) {
    if let Err(error) = socket.set_zero_linger() {
        log::debug!("cannot set a connection up for its reset: {error}");
    }
}
