//! One worker as a child process: started confined, told things, listened to, ended.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus};
use std::time::Instant;

use nix::sys::signal::{SigSet, Signal, kill};
use nix::unistd::Pid;
use serde::Serialize;

use super::privileges;
use super::protocol::{self, Frame, FrameReader, ToHolder, malformed};

/// Where a worker finds its end of the socket pair.
pub(crate) const LINK_DESCRIPTOR: RawFd = 3;

/// Messages that come while we send: a worker asks once for each of three things and waits for the answer, so more than a
/// few are an attack.
const INBOX_MAX: usize = 8;

/// A running worker.
#[derive(Debug)]
pub(super) struct WorkerProcess {
    child: Child,
    link: UnixStream,
    reader: FrameReader,
    inbox: VecDeque<Frame>,
    pub(super) started: Instant,
    /// Set when nothing more is to be heard of it: when it is killed, if it has not ended by itself.
    pub(super) kill_at: Option<Instant>,
}

impl WorkerProcess {
    /// Starts this same program with `arguments`. Its end of the link is descriptor 3; it dies with us.
    pub(super) fn start(arguments: &[OsString]) -> io::Result<Self> {
        let (link, theirs) = UnixStream::pair()?;
        link.set_nonblocking(true)?;
        // Not the path: after an upgrade that is another program, and it may speak another protocol.
        let mut command = Command::new("/proc/self/exe");
        command.arg0("mesh-agent").args(arguments);
        let holder = Pid::this();
        let descriptor = theirs.as_raw_fd();
        prepare(&mut command, move || become_worker(descriptor, holder));
        let child = command.spawn()?;
        Ok(Self {
            child,
            link,
            reader: FrameReader::default(),
            inbox: VecDeque::new(),
            started: Instant::now(),
            kill_at: None,
        })
    }

    pub(super) fn id(&self) -> u32 {
        self.child.id()
    }

    pub(super) fn link(&self) -> BorrowedFd<'_> {
        self.link.as_fd()
    }

    /// Sends a message. Both sides may be sending much at once, so what comes meanwhile is taken in.
    pub(super) fn send(
        &mut self,
        message: &impl Serialize,
        descriptors: &[BorrowedFd<'_>],
    ) -> io::Result<()> {
        let Self {
            link,
            reader,
            inbox,
            ..
        } = self;
        protocol::send(link.as_fd(), message, descriptors, |deadline| {
            if !protocol::wait_for_room(link.as_fd(), deadline)? {
                return Ok(());
            }
            match reader.read(link.as_fd()) {
                Ok(_) if inbox.len() >= INBOX_MAX => Err(malformed("messages come unasked")),
                Ok(frame) => {
                    inbox.push_back(frame);
                    Ok(())
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
                Err(error) => Err(error),
            }
        })
    }

    /// Whether something was taken in that [`Self::receive`] will give.
    pub(super) fn has_mail(&self) -> bool {
        self.kill_at.is_none() && !self.inbox.is_empty()
    }

    /// The next message, or `WouldBlock`. Any other error means that the worker is gone or speaks nonsense.
    pub(super) fn receive(&mut self) -> io::Result<ToHolder> {
        let frame = match self.inbox.pop_front() {
            Some(frame) => frame,
            None => self.reader.read(self.link.as_fd())?,
        };
        if !frame.descriptors.is_empty() {
            return Err(malformed("a worker sends no descriptors"));
        }
        frame.message()
    }

    /// Whether it has ended, and how.
    pub(super) fn ended(&mut self) -> io::Result<Option<ExitStatus>> {
        self.child.try_wait()
    }

    pub(super) fn signal(&self, signal: Signal) {
        let Ok(id) = i32::try_from(self.child.id()) else {
            return;
        };
        // It is our child and not yet waited for, so the number is still its own.
        if let Err(error) = kill(Pid::from_raw(id), signal) {
            log::warn!(worker = id, signal:% = signal, error:% = error; "could not signal the worker");
        }
    }
}

#[expect(unsafe_code, reason = "code between fork and exec")]
fn prepare(command: &mut Command, step: impl FnMut() -> io::Result<()> + Send + Sync + 'static) {
    // SAFETY: `become_worker`, the only step there is, makes system calls and allocates nothing.
    unsafe {
        command.pre_exec(step);
    }
}

/// Runs in the child, between fork and exec: system calls only.
fn become_worker(link: RawFd, holder: Pid) -> io::Result<()> {
    // The holder waits for its signals by descriptor and has them blocked; that is inherited.
    SigSet::empty().thread_set_mask()?;
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
    // It may have died before the line above.
    if nix::unistd::getppid() != holder {
        return Err(io::ErrorKind::BrokenPipe.into());
    }
    place_link(link)?;
    privileges::confine_worker()
}

#[expect(unsafe_code, reason = "a descriptor is wanted at a number")]
fn place_link(link: RawFd) -> io::Result<()> {
    let result = if link == LINK_DESCRIPTOR {
        // SAFETY: takes numbers only; the descriptor stays open over exec.
        unsafe { libc::fcntl(link, libc::F_SETFD, 0) }
    } else {
        // SAFETY: takes numbers only; what was at 3 is the holder's and closed in the child by this.
        unsafe { libc::dup2(link, LINK_DESCRIPTOR) }
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
