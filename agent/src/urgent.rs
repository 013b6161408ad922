//! Urgent data of TCP (RFC 6093), which stays among a connection's other bytes.
//!
//! A read ends before the byte that is marked as urgent, with less than there was room for, and tokio takes such a read for
//! all that there is (it asks the kernel for edges): what lies behind the mark would wait for bytes that may never come.
//! The kernel tells of a mark by EPOLLPRI, which tokio's connections do not ask for. So each thread has an epoll instance
//! that asks for nothing else.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::socket::{MsgFlags, recv};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, Interest, ReadBuf};
use tokio::net::TcpStream;
use tokio::net::tcp::ReadHalf;

use crate::data::Thread;

/// Marks that are taken note of in one turn.
const EVENTS: usize = 32;

/// The connections of a thread in which there may be urgent data.
#[derive(Debug)]
pub(crate) struct Urgent {
    epoll: AsyncFd<Instance>,
    watched: RefCell<HashMap<RawFd, Rc<Mark>>>,
}

#[derive(Debug)]
struct Instance(Epoll);

impl AsRawFd for Instance {
    fn as_raw_fd(&self) -> RawFd {
        self.0.0.as_raw_fd()
    }
}

/// Whether there is a mark in a connection.
#[derive(Debug, Default)]
struct Mark {
    seen: Cell<bool>,
    waker: RefCell<Option<Waker>>,
}

/// Watches the marks of a thread's connections, for ever.
pub(crate) async fn heed(thread: Rc<Thread>) {
    if let Err(error) = thread.urgent.run().await {
        log::error!("urgent data of programs may wait for the bytes that follow it: {error}");
    }
}

impl Urgent {
    /// # Errors
    /// When the process can have no more descriptors.
    #[expect(unsafe_code, reason = "tokio wants a promise about the descriptor")]
    pub(crate) fn new() -> io::Result<Self> {
        let epoll = Instance(Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?);
        // SAFETY: the instance owns its descriptor, gives always the same, and is not changed within.
        let epoll = unsafe { AsyncFd::register_with_interest(epoll, Interest::READABLE) };
        Ok(Self {
            epoll: epoll.map_err(io::Error::from)?,
            watched: RefCell::default(),
        })
    }

    /// Wakes who reads a connection in which a mark has come, for ever.
    ///
    /// # Errors
    /// What the kernel says against it.
    async fn run(&self) -> io::Result<()> {
        let mut events = [EpollEvent::empty(); EVENTS];
        loop {
            let mut ready = self.epoll.readable().await?;
            let count = match self.epoll.get_ref().0.wait(&mut events, EpollTimeout::ZERO) {
                Err(Errno::EINTR) => continue,
                count => count?,
            };
            for event in &events[..count] {
                // A number that is another connection's by now does no harm: it is read once more than needed.
                let watched = RawFd::try_from(event.data()).ok();
                let watched = watched.and_then(|fd| self.watched.borrow().get(&fd).cloned());
                if let Some(mark) = watched {
                    mark.seen.set(true);
                    if let Some(waker) = mark.waker.take() {
                        waker.wake();
                    }
                }
            }
            if count < events.len() {
                ready.clear_ready();
            }
        }
    }

    /// What reads `half` past marks. The kernel forgets the connection when it is closed.
    ///
    /// # Errors
    /// When the kernel has no memory for it, or its bound is reached (`fs.epoll.max_user_watches`).
    pub(crate) fn reader<'a>(&'a self, half: ReadHalf<'a>) -> io::Result<Reader<'a>> {
        let connection: &TcpStream = half.as_ref();
        let fd = connection.as_raw_fd();
        let number = u64::try_from(fd).map_err(io::Error::other)?;
        let asked = EpollFlags::EPOLLPRI | EpollFlags::EPOLLET;
        let event = EpollEvent::new(asked, number);
        match self.epoll.get_ref().0.add(connection, event) {
            Ok(()) | Err(Errno::EEXIST) => {}
            Err(error) => return Err(error.into()),
        }
        let mark = Rc::new(Mark::default());
        self.watched.borrow_mut().insert(fd, Rc::clone(&mark));
        Ok(Reader {
            half,
            mark,
            urgent: self,
        })
    }
}

/// Reads a connection past marks.
#[derive(Debug)]
pub(crate) struct Reader<'a> {
    half: ReadHalf<'a>,
    mark: Rc<Mark>,
    urgent: &'a Urgent,
}

impl Drop for Reader<'_> {
    fn drop(&mut self) {
        let connection: &TcpStream = self.half.as_ref();
        let fd = connection.as_raw_fd();
        self.urgent.watched.borrow_mut().remove(&fd);
    }
}

impl AsyncRead for Reader<'_> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        // What tokio believes of the socket says nothing until it has run dry.
        while this.mark.seen.get() {
            let connection: &TcpStream = this.half.as_ref();
            let free = buffer.initialize_unfilled();
            match recv(connection.as_raw_fd(), free, MsgFlags::MSG_DONTWAIT) {
                Ok(bytes) => {
                    buffer.advance(bytes);
                    return Poll::Ready(Ok(()));
                }
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => this.mark.seen.set(false),
                Err(error) => return Poll::Ready(Err(error.into())),
            }
        }
        let read = Pin::new(&mut this.half).poll_read(cx, buffer);
        if read.is_pending() {
            let mut waker = this.mark.waker.borrow_mut();
            if !waker.as_ref().is_some_and(|w| w.will_wake(cx.waker())) {
                *waker = Some(cx.waker().clone());
            }
        }
        read
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::net;
    use std::os::fd::AsFd as _;
    use std::time::Duration;

    use nix::sys::socket::send;
    use socket2::SockRef;
    use tokio::io::AsyncReadExt as _;

    use super::*;

    /// A connection to which all of `before!after` was sent, with the mark at `!`, and its other end.
    fn marked() -> (TcpStream, net::TcpStream) {
        let listener = net::TcpListener::bind("127.0.0.1:0").unwrap();
        let keepalive = socket2::TcpKeepalive::new();
        crate::relay::prepare(&SockRef::from(&listener), &keepalive).unwrap();
        let mut program = net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (near, _) = listener.accept().unwrap();
        program.write_all(b"before").unwrap();
        send(program.as_fd().as_raw_fd(), b"!", MsgFlags::MSG_OOB).unwrap();
        program.write_all(b"after").unwrap();
        near.set_nonblocking(true).unwrap();
        (TcpStream::from_std(near).unwrap(), program)
    }

    async fn read_all(mut reader: impl AsyncRead + Unpin) -> Vec<u8> {
        let mut got = Vec::new();
        let whole = async {
            while got.len() < 12 {
                assert_ne!(reader.read_buf(&mut got).await.unwrap(), 0);
            }
        };
        // What comes within a moment comes; nothing else is sent.
        let _ = tokio::time::timeout(Duration::from_secs(1), whole).await;
        got
    }

    #[tokio::test(flavor = "current_thread")]
    async fn what_lies_behind_a_mark_is_read() {
        let urgent = Rc::new(Urgent::new().unwrap());
        let watch = Rc::clone(&urgent);
        let local = tokio::task::LocalSet::new();
        local.spawn_local(async move { watch.run().await });
        local
            .run_until(async {
                for _ in 0..20 {
                    let (mut near, _program) = marked();
                    let (half, _) = near.split();
                    let reader = urgent.reader(half).unwrap();
                    assert_eq!(read_all(reader).await, b"before!after");
                }
                let (near, _program) = marked();
                assert_eq!(read_all(near).await, b"before", "without it");
                assert!(urgent.watched.borrow().is_empty());
            })
            .await;
    }
}
