//! Urgent data of TCP (RFC 6093), which stays among a connection's other bytes.
//!
//! A read ends before the byte that is marked as urgent, with less than there was room for, and tokio takes such a read for
//! all that there is (it asks the kernel for edges): what lies behind the mark would wait for bytes that may never come.
//! So whoever gets less than there was room for asks whether it stands before a mark. EPOLLPRI would tell of it, but wakes at each
//! segment: a tenth of what a call over TCP costs, where the question takes a fiftieth.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::pin::Pin;
use std::task::{Context, Poll};

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv};
use tokio::io::{AsyncRead, ReadBuf};
use tokio::net::TcpStream;
use tokio::net::tcp::ReadHalf;

/// Reads a connection past marks.
#[derive(Debug)]
pub(crate) struct Reader<'a> {
    half: ReadHalf<'a>,
    /// It stood before a mark, and has not run dry since.
    marked: bool,
}

impl<'a> Reader<'a> {
    pub(crate) fn new(half: ReadHalf<'a>) -> Self {
        // Whoever read it before may have stopped there.
        let marked = at_mark(fd_of(&half));
        Self { half, marked }
    }
}

fn fd_of(half: &ReadHalf<'_>) -> RawFd {
    let connection: &TcpStream = half.as_ref();
    connection.as_raw_fd()
}

impl AsyncRead for Reader<'_> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        // What tokio believes of the socket says nothing until it has run dry.
        while this.marked {
            match recv(
                fd_of(&this.half),
                buffer.initialize_unfilled(),
                MsgFlags::MSG_DONTWAIT,
            ) {
                Ok(bytes) => {
                    buffer.advance(bytes);
                    return Poll::Ready(Ok(()));
                }
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => this.marked = false,
                Err(error) => return Poll::Ready(Err(error.into())),
            }
        }
        let before = buffer.filled().len();
        let read = Pin::new(&mut this.half).poll_read(cx, buffer);
        let some = buffer.filled().len() > before;
        if read.is_ready() && some && buffer.remaining() > 0 {
            this.marked = at_mark(fd_of(&this.half));
        }
        read
    }
}

/// Whether the next byte of a connection is marked as urgent.
#[expect(unsafe_code, reason = "SIOCATMARK has no safe form in our libraries")]
fn at_mark(fd: RawFd) -> bool {
    /// tcp(7); the libraries do not have its number.
    const SIOCATMARK: libc::Ioctl = 0x8905;
    let mut answer: libc::c_int = 0;
    // SAFETY: the kernel judges the descriptor and writes one number, to a live value.
    let outcome = unsafe { libc::ioctl(fd, SIOCATMARK, &raw mut answer) };
    outcome == 0 && answer != 0
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

    #[tokio::test]
    async fn what_lies_behind_a_mark_is_read() {
        for _ in 0..20 {
            let (mut near, _program) = marked();
            let (half, _) = near.split();
            assert_eq!(read_all(Reader::new(half)).await, b"before!after");
        }
        let (near, _program) = marked();
        assert_eq!(read_all(near).await, b"before", "without it");
    }

    #[tokio::test]
    async fn who_goes_on_where_another_stopped_at_a_mark_reads_on() {
        let (mut near, _program) = marked();
        let mut got = Vec::new();
        assert_eq!(near.read_buf(&mut got).await.unwrap(), 6);
        let (half, _) = near.split();
        assert_eq!(read_all(Reader::new(half)).await, b"!after");
    }
}
