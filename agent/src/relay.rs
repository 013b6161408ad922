//! Bytes between a local connection and a stream, both ways, until both ends are through.

use std::cell::Cell;
use std::future::poll_fn;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use mesh_core::reason::Reason;
use mesh_runtime::mux::{MuxStream, StreamError};
use prometheus_client::metrics::gauge::Gauge;
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

/// Relays until both directions ended, or nothing moved for `idle`.
///
/// # Errors
/// The side that failed. Nothing is hidden: what had arrived is delivered first.
pub(crate) async fn relay(
    socket: &mut TcpStream,
    stream: &MuxStream,
    local: Local,
    flow: &Flow,
    (activity, idle): (&Activity, Duration),
) -> Result<(), StreamError> {
    let (to_stream, to_socket) = match local {
        Local::Caller => (&flow.sent, &flow.received),
        Local::Service => (&flow.received, &flow.sent),
    };
    let mut reading = true;
    let mut writing = true;
    let mut reset = None;
    let both = poll_fn(|cx| {
        if writing
            && let Poll::Ready(done) = poll_in(cx, socket, stream, |n| {
                to_socket.inc_by(n);
                activity.note();
            })
        {
            done?;
            writing = false;
        }
        if reading
            && let Poll::Ready(done) = poll_out(cx, socket, stream, |n| {
                to_stream.inc_by(n);
                activity.note();
            })
        {
            match done {
                // What came before the reset is still to be delivered.
                Err(StreamError::Reset(reason)) => reset = Some(reason),
                other => other?,
            }
            reading = false;
        }
        if reading || writing {
            return Poll::Pending;
        }
        Poll::Ready(reset.map_or(Ok(()), |reason| Err(StreamError::Reset(reason))))
    });
    tokio::select! {
        biased;
        outcome = both => outcome,
        () = activity.ceased(idle) => Err(StreamError::Reset(Reason::Timeout)),
    }
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

/// From now on the other end of a local connection sees a reset when the connection is dropped, or its process
/// dies: never an end that looks whole.
pub(crate) fn guard(socket: &TcpStream) {
    linger(socket, Some(Duration::ZERO));
}

/// All that was to be said is said: the other end sees a proper end.
pub(crate) fn settle(socket: &TcpStream) {
    linger(socket, None);
}

fn linger(socket: &TcpStream, linger: Option<Duration>) {
    if let Err(error) = socket2::SockRef::from(socket).set_linger(linger) {
        log::debug!("a connection is gone already: {error}");
    }
}

/// Closes a connection so that its other end sees a reset.
pub(crate) fn abort(socket: TcpStream) {
    guard(&socket);
    drop(socket);
}

/// Counts a call as open while it lives.
#[derive(Debug)]
pub(crate) struct Open<'a>(&'a Gauge);

impl<'a> Open<'a> {
    pub(crate) fn count(gauge: &'a Gauge) -> Self {
        gauge.inc();
        Self(gauge)
    }
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        self.0.dec();
    }
}
