//! Bytes between a local connection and a stream, both ways, until both ends are through.

use std::cell::Cell;
use std::future::{Future as _, poll_fn};
use std::io;
use std::net::{self, Shutdown};
use std::os::fd::AsRawFd as _;
use std::pin::pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use mesh_runtime::mux::{MuxStream, StreamError};
use prometheus_client::metrics::gauge::Gauge;
use socket2::{SockRef, TcpKeepalive};
use tokio::io::Interest;
use tokio::net::TcpStream;

use crate::data::Thread;
use crate::limits::Limit;
use crate::metrics::Flow;
use crate::quiet::Watched;
use crate::urgent::Reader;

/// Turns of a direction before the other and other tasks have theirs.
const TURNS: usize = 16;

/// Which end of the call the local connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Local {
    Caller,
    Service,
}

/// Notes that something moved in a call, so that it is seen when nothing does.
#[derive(Debug)]
pub(crate) struct Activity {
    thread: Rc<Thread>,
    watched: Watched,
    /// The connection is bytes now, whose silence has a bound of its own.
    bytes: Cell<bool>,
}

impl Activity {
    pub(crate) fn new(thread: &Rc<Thread>) -> Self {
        Self {
            thread: Rc::clone(thread),
            watched: thread.quiet.watch(),
            bytes: Cell::new(false),
        }
    }

    /// Begins anew, for another call.
    pub(crate) fn renew(&self) {
        self.bytes.set(false);
        self.watched.renew();
    }

    pub(crate) fn note(&self) {
        self.watched.note();
    }

    /// How long a head may take from its first byte to its last.
    pub(crate) fn head_timeout(&self) -> Duration {
        self.thread.settings.head
    }

    /// Counts that a time was over.
    pub(crate) fn ran_out(&self, limit: Limit) {
        self.thread.metrics.limits.reached(limit);
    }

    fn become_bytes(&self) {
        self.bytes.set(true);
        self.watched.restart();
    }

    /// Ready when nothing was noted for `idle`; of what is bytes by then, when nothing was for `tcp_idle`, which may
    /// be never. One task only may wait for it.
    pub(crate) fn poll_ceased(&self, cx: &Context<'_>, idle: Duration) -> Poll<()> {
        let (bound, limit) = if self.bytes.get() {
            (self.thread.settings.tcp_idle, Limit::TcpIdle)
        } else {
            (Some(idle), Limit::Idle)
        };
        ready!(self.watched.poll_over(cx, bound));
        self.ran_out(limit);
        Poll::Ready(())
    }

    /// Watches whether the other end of this connection, which is another host, vanishes; `None`: it is closed.
    pub(crate) fn look_at(&self, connection: Option<&TcpStream>) {
        self.watched.look_at(connection.map(TcpStream::as_raw_fd));
    }

    /// Whether it did. Who waits for the silence is woken then.
    pub(crate) fn has_vanished(&self) -> bool {
        self.watched.has_vanished()
    }

    /// Completes when nothing was noted for `idle`, and counts nothing: whether a bound bit is for the caller to say.
    pub(crate) async fn silent(&self, idle: Duration) {
        poll_fn(|cx| self.watched.poll_over(cx, Some(idle))).await;
    }

    pub(crate) async fn ceased(&self, idle: Duration) {
        poll_fn(|cx| self.poll_ceased(cx, idle)).await;
    }
}

/// How a direction stands after its turns.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Turn {
    /// Its end has passed.
    Done,
    /// Nothing more can be done now.
    Blocked,
    /// There is more to do, after others.
    Again,
}

/// Relays until both directions ended. When nothing may move for how long is for the owner of `activity` to watch.
///
/// A reset of either side is carried at once: it waits neither for a reader nor for credit. What had arrived before
/// it is delivered as far as the other side takes it without waiting, as between two programs without us.
///
/// # Errors
/// The side that failed.
pub(crate) async fn relay(
    socket: &mut TcpStream,
    stream: &MuxStream,
    local: Local,
    flow: &Flow,
    activity: &Activity,
) -> Result<(), StreamError> {
    activity.become_bytes();
    let (to_stream, to_socket) = match local {
        Local::Caller => (&flow.sent, &flow.received),
        Local::Service => (&flow.received, &flow.sent),
    };
    let (reader, writer) = socket.split();
    let mut reader = Reader::new(reader);
    let socket: &TcpStream = writer.as_ref();
    // While there is no credit nobody reads the socket, and after its end nobody does: an error is heard here.
    let mut broken = pin!(socket.ready(Interest::ERROR));
    let mut reading = true;
    let mut writing = true;
    poll_fn(|cx| {
        let mut again = false;
        if writing {
            let turn = receive(cx, stream, socket, |n| {
                to_socket.inc_by(n);
                activity.note();
            })?;
            writing = turn != Turn::Done;
            again = turn == Turn::Again;
        }
        if !again && let Poll::Ready(reason) = stream.poll_reset(cx) {
            return Poll::Ready(Err(StreamError::Reset(reason)));
        }
        if reading {
            let turn = send(cx, &mut reader, stream, |n| {
                to_stream.inc_by(n);
                activity.note();
            })?;
            reading = turn != Turn::Done;
            again |= turn == Turn::Again;
        }
        if !reading && !writing {
            return Poll::Ready(Ok(()));
        }
        if !again && broken.as_mut().poll(cx).is_ready() {
            let error = socket.take_error().ok().flatten();
            let error = error.unwrap_or_else(|| io::ErrorKind::ConnectionReset.into());
            return Poll::Ready(Err(StreamError::Local(error)));
        }
        Poll::Pending
    })
    .await
}

/// From the local connection to the stream.
fn send(
    cx: &mut Context<'_>,
    reader: &mut Reader<'_>,
    stream: &MuxStream,
    count: impl Fn(u64),
) -> Result<Turn, StreamError> {
    for _ in 0..TURNS {
        match stream.poll_send_from(cx, reader)? {
            Poll::Pending => return Ok(Turn::Blocked),
            Poll::Ready(0) => {
                stream.end();
                return Ok(Turn::Done);
            }
            Poll::Ready(bytes) => count(bytes as u64),
        }
    }
    cx.waker().wake_by_ref();
    Ok(Turn::Again)
}

/// From the stream to the local connection.
fn receive(
    cx: &mut Context<'_>,
    stream: &MuxStream,
    socket: &TcpStream,
    count: impl Fn(u64),
) -> Result<Turn, StreamError> {
    for _ in 0..TURNS {
        match stream.poll_recv_with(cx, |cx, bytes| poll_write(cx, socket, bytes))? {
            Poll::Pending => return Ok(Turn::Blocked),
            Poll::Ready(None) => {
                // The other end may be gone already: then there is nobody left to tell.
                let _ = SockRef::from(socket).shutdown(Shutdown::Write);
                return Ok(Turn::Done);
            }
            Poll::Ready(Some(bytes)) => count(bytes as u64),
        }
    }
    cx.waker().wake_by_ref();
    Ok(Turn::Again)
}

/// Writes once. By reference, unlike tokio's: somebody else waits for the socket's errors.
fn poll_write(cx: &mut Context<'_>, socket: &TcpStream, bytes: &[u8]) -> Poll<io::Result<usize>> {
    loop {
        ready!(socket.poll_write_ready(cx))?;
        match socket.try_write(bytes) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            written => return Poll::Ready(written),
        }
    }
}

/// From now on the other end of a local connection sees a reset when the connection is dropped, or its process
/// dies: never an end that looks whole.
pub(crate) fn guard(socket: &TcpStream) {
    linger(socket, Some(Duration::ZERO));
}

/// What the kernel takes of a program on this host before we read it, in bytes. Each time it is full the program stops,
/// and is woken when it is read. The kernel's own tuning begins with 64 KiB and goes by round trips, which say nothing
/// within a host: bulk cost a third more.
const ROOM: libc::c_int = 1024 * 1024;

/// Sets what a connection to a program of this host has: what [`prepare`] sets, and [`ROOM`].
pub(crate) fn prepare_near(socket: &SockRef<'_>, keepalive: &TcpKeepalive) -> io::Result<()> {
    make_room(socket);
    prepare(socket, keepalive)
}

/// A low-water mark makes the kernel have room for as much, whatever `net.core.rmem_max` says; from there its own tuning
/// goes on. The mark itself is taken back.
#[expect(unsafe_code, reason = "SO_RCVLOWAT has no safe form in our libraries")]
fn make_room(socket: &SockRef<'_>) {
    for mark in [ROOM, 1] {
        // SAFETY: the descriptor is open as long as `socket` lives, and the kernel reads as much as `mark` has.
        let result = unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_RCVLOWAT,
                (&raw const mark).cast(),
                size_of_val(&mark) as libc::socklen_t,
            )
        };
        if let Err(error) = nix::errno::Errno::result(result) {
            log::debug!("a program's connections keep the room that they have: {error}");
        }
    }
}

/// Sets what a program's connection has: the kernel asks whether the other end lives, and urgent data (RFC 6093) stays
/// at its place among the rest, where it is not lost.
pub(crate) fn prepare(socket: &SockRef<'_>, keepalive: &TcpKeepalive) -> io::Result<()> {
    socket.set_out_of_band_inline(true)?;
    socket.set_tcp_keepalive(keepalive)
}

/// The same for a listener of callers. What it accepts is guarded before anybody has it.
pub(crate) fn prepare_listener(
    listener: &net::TcpListener,
    keepalive: &TcpKeepalive,
) -> io::Result<()> {
    let socket = SockRef::from(listener);
    socket.set_linger(Some(Duration::ZERO))?;
    prepare_near(&socket, keepalive)
}

/// All that was to be said is said: the other end sees a proper end.
pub(crate) fn settle(socket: &TcpStream) {
    linger(socket, None);
}

fn linger(socket: &TcpStream, linger: Option<Duration>) {
    if let Err(error) = SockRef::from(socket).set_linger(linger) {
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

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::time::Instant;

    use super::*;

    /// What the kernel has of a program that writes 4 MiB to a listener's child which nobody reads, once it has `enough` or
    /// `deadline` is over.
    fn taken_unread(prepared: bool, enough: usize, deadline: Duration) -> usize {
        let listener = net::TcpListener::bind("127.0.0.1:0").unwrap();
        if prepared {
            prepare_near(&SockRef::from(&listener), &TcpKeepalive::new()).unwrap();
        }
        let mut program = net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (near, _) = listener.accept().unwrap();
        // It ends with an error when `near` is gone.
        let writer = std::thread::spawn(move || program.write_all(&vec![7; 4 * 1024 * 1024]));
        let mut seen = vec![0; enough];
        let until = Instant::now() + deadline;
        let mut taken = 0;
        while taken < enough && Instant::now() < until {
            taken = near.peek(&mut seen).unwrap();
        }
        drop(near);
        let _ = writer.join().unwrap();
        taken
    }

    #[test]
    fn a_program_can_send_much_before_it_is_read() {
        let enough = ROOM as usize / 2;
        assert_eq!(taken_unread(true, enough, Duration::from_secs(20)), enough);
        assert!(taken_unread(false, enough, Duration::from_secs(1)) < enough);
    }
}
