//! The worker's end of the link to its holder.

use std::io;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::sync::Arc;

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use tokio::io::Interest;
use tokio::net::UnixStream;

use super::protocol::{Desired, FrameReader, FromHolder, ToHolder, encode};
use super::worker_process::LINK_DESCRIPTOR;

/// Receives from the holder.
#[derive(Debug)]
pub(crate) struct HolderLink {
    stream: Arc<UnixStream>,
    reader: FrameReader,
}

/// Sends to the holder.
#[derive(Debug)]
pub(crate) struct HolderSender {
    stream: Arc<UnixStream>,
}

impl HolderLink {
    /// Takes descriptor 3, which the holder has put there. To be called once, on a tokio runtime, before anything
    /// else opens descriptors. From here on the process can not be dumped: it will hold keys.
    pub(crate) fn connect_from_fd3() -> io::Result<(Self, HolderSender)> {
        nix::sys::prctl::set_dumpable(false)?;
        // It was started as /proc/self/exe, and `ps` would call it `exe`.
        nix::sys::prctl::set_name(c"mesh-worker")?;
        let stream = std::os::unix::net::UnixStream::from(inherited()?);
        // Fails on what is no unix socket: the worker was started by hand.
        stream.peer_addr().map_err(|source| {
            io::Error::new(
                source.kind(),
                "descriptor 3 is no link to a holder; `mesh-agent worker` is started by `mesh-agent run` only",
            )
        })?;
        stream.set_nonblocking(true)?;
        Self::new(stream)
    }

    fn new(stream: std::os::unix::net::UnixStream) -> io::Result<(Self, HolderSender)> {
        let stream = Arc::new(UnixStream::from_std(stream)?);
        let sender = HolderSender {
            stream: Arc::clone(&stream),
        };
        let reader = FrameReader::default();
        Ok((Self { stream, reader }, sender))
    }

    /// The next message. `UnexpectedEof` means that the holder is gone: so should the worker. Cancel safe.
    pub(crate) async fn recv(&mut self) -> io::Result<FromHolder> {
        loop {
            self.stream.readable().await?;
            let Self { stream, reader } = self;
            match stream.try_io(Interest::READABLE, || reader.read(stream.as_fd())) {
                Ok(frame) => return FromHolder::read(frame),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
    }
}

impl HolderSender {
    /// Says what the kernel should know, one generation at a time: the next may follow when this one was answered. The
    /// answer, `Applied` or `Failed`, comes by [`HolderLink::recv`]. Not cancel safe: a message that was cut ends the link.
    /// `InvalidData`: it is too large, and nothing of it was sent.
    pub(crate) async fn send(&mut self, desired: Desired) -> io::Result<()> {
        self.say(&ToHolder::Desired(desired)).await
    }

    /// Asks for plaintext callers. The answer is `Looked`. Not cancel safe.
    pub(crate) async fn look(&mut self) -> io::Result<()> {
        self.say(&ToHolder::Look).await
    }

    /// Says that control was reached with what was applied. Not cancel safe.
    pub(crate) async fn reached(&mut self, generation: u64) -> io::Result<()> {
        self.say(&ToHolder::Reached { generation }).await
    }

    /// Says that this worker takes over when it is told. Not cancel safe.
    pub(crate) async fn stands_by(&mut self) -> io::Result<()> {
        self.say(&ToHolder::StandsBy).await
    }

    async fn say(&mut self, message: &ToHolder) -> io::Result<()> {
        let bytes = encode(message)?;
        let mut sent = 0;
        while let Some(rest) = bytes.get(sent..).filter(|rest| !rest.is_empty()) {
            self.stream.writable().await?;
            match self.stream.try_write(rest) {
                Ok(count) => sent += count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

#[expect(unsafe_code, reason = "a descriptor that was inherited by number")]
fn inherited() -> io::Result<OwnedFd> {
    // SAFETY: the holder puts the link at this number before exec, and this is the only place that takes it.
    let link = unsafe { OwnedFd::from_raw_fd(LINK_DESCRIPTOR) };
    match fcntl(&link, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)) {
        Ok(_) => Ok(link),
        Err(error) => {
            // Nothing is open there, so nothing must be closed.
            std::mem::forget(link);
            Err(error.into())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::protocol::{Wire, send};
    use super::*;

    #[tokio::test]
    async fn both_ways_and_the_end() {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let (mut link, mut sender) = HolderLink::new(ours).unwrap();
        let desired = Desired {
            generation: 1,
            workloads: vec![],
            doors: None,
            kept_doors: vec![],
            reals: None,
            // Larger than the socket's buffer, so that the sender has to wait.
            vip4: "x".repeat(900_000),
            vip6: String::new(),
        };
        let reading = std::thread::spawn(move || {
            let mut reader = FrameReader::default();
            loop {
                match reader.read(theirs.as_fd()) {
                    Ok(frame) => {
                        let answer = Wire::Applied {
                            generation: 1,
                            trial: false,
                        };
                        send(theirs.as_fd(), &answer, &[], |_| panic!("it fits")).unwrap();
                        return frame.message::<ToHolder>().unwrap();
                    }
                    Err(error) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock),
                }
                std::thread::yield_now();
            }
        });
        sender.send(desired.clone()).await.unwrap();
        let answer = link.recv().await.unwrap();
        assert!(matches!(answer, FromHolder::Applied { generation: 1, .. }));
        assert_eq!(reading.join().unwrap(), ToHolder::Desired(desired));
        let end = link.recv().await.unwrap_err();
        assert_eq!(end.kind(), io::ErrorKind::UnexpectedEof);
    }
}
