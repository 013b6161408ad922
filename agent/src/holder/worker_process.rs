//! One worker as a child process: started confined, told things, listened to, ended.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};
use std::time::Instant;

use nix::errno::Errno;
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use serde::Serialize;

use super::handover::forget_handover;
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
    pid: Pid,
    link: UnixStream,
    reader: FrameReader,
    inbox: VecDeque<Frame>,
    pub(super) started: Instant,
    /// Set when nothing more is to be heard of it: when it is killed, if it has not ended by itself.
    pub(super) kill_at: Option<Instant>,
}

/// How a child ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ended {
    With(i32),
    By(Signal),
    /// Another part of this program has waited for it.
    Unseen,
}

impl Ended {
    pub(super) fn is_success(self) -> bool {
        self == Self::With(0)
    }
}

impl std::fmt::Display for Ended {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::With(code) => write!(f, "exit code {code}"),
            Self::By(signal) => write!(f, "{signal}"),
            Self::Unseen => f.write_str("unseen"),
        }
    }
}

/// Whether our child has ended, and how.
pub(super) fn ended(pid: Pid) -> io::Result<Option<Ended>> {
    match waitpid(pid, Some(WaitPidFlag::WNOHANG)) {
        Ok(WaitStatus::Exited(_, code)) => Ok(Some(Ended::With(code))),
        Ok(WaitStatus::Signaled(_, signal, _)) => Ok(Some(Ended::By(signal))),
        Ok(_) | Err(Errno::EINTR) => Ok(None),
        Err(Errno::ECHILD) => Ok(Some(Ended::Unseen)),
        Err(error) => Err(error.into()),
    }
}

impl WorkerProcess {
    /// Starts this same program with `arguments`. Its end of the link is descriptor 3; it dies with us.
    pub(super) fn start(arguments: &[OsString]) -> io::Result<Self> {
        let (link, theirs) = UnixStream::pair()?;
        link.set_nonblocking(true)?;
        // Not the path: after an upgrade that is another program, and it may speak another protocol.
        let mut command = Command::new("/proc/self/exe");
        command.arg0("mesh-agent").args(arguments);
        forget_handover(&mut command);
        let holder = Pid::this();
        let descriptor = theirs.as_raw_fd();
        prepare(&mut command, move || become_worker(descriptor, holder));
        let child = command.spawn()?;
        let pid = i32::try_from(child.id()).map_err(io::Error::other)?;
        Ok(Self::of(Pid::from_raw(pid), link, Instant::now()))
    }

    /// One that the program before this one has started: it is our child all the same.
    pub(super) fn handed_over(pid: i32, link: OwnedFd, started: Instant) -> Self {
        Self::of(Pid::from_raw(pid), link.into(), started)
    }

    fn of(pid: Pid, link: UnixStream, started: Instant) -> Self {
        Self {
            pid,
            link,
            reader: FrameReader::default(),
            inbox: VecDeque::new(),
            started,
            kill_at: None,
        }
    }

    pub(super) fn id(&self) -> i32 {
        self.pid.as_raw()
    }

    /// Whether nothing that it said is half read: then another program can go on reading.
    pub(super) fn is_between_messages(&self) -> bool {
        self.inbox.is_empty() && self.reader.is_between_frames()
    }

    /// Whether its end of the link is closed. What it still said is of no interest.
    pub(super) fn has_let_go(&mut self) -> bool {
        loop {
            match self.reader.read(self.link.as_fd()) {
                Ok(_) => {}
                Err(error) => return error.kind() != io::ErrorKind::WouldBlock,
            }
        }
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
    pub(super) fn ended(&self) -> io::Result<Option<Ended>> {
        ended(self.pid)
    }

    pub(super) fn signal(&self, signal: Signal) {
        // It is our child and not yet waited for, so the number is still its own.
        if let Err(error) = kill(self.pid, signal) {
            log::warn!(worker = self.id(), signal:% = signal, error:% = error; "could not signal the worker");
        }
    }
}

/// Starts a program that is asked whether it could take our place: with no privileges, and it dies with us.
pub(super) fn ask(mut command: Command) -> io::Result<Child> {
    let holder = Pid::this();
    prepare(&mut command, move || {
        confine_child(holder)?;
        privileges::confine_worker()
    });
    command.spawn()
}

#[expect(unsafe_code, reason = "code between fork and exec")]
fn prepare(command: &mut Command, step: impl FnMut() -> io::Result<()> + Send + Sync + 'static) {
    // SAFETY: both steps that there are make system calls and allocate nothing.
    unsafe {
        command.pre_exec(step);
    }
}

/// Runs in the child, between fork and exec: system calls only.
fn become_worker(link: RawFd, holder: Pid) -> io::Result<()> {
    confine_child(holder)?;
    place_link(link)?;
    privileges::confine_worker()
}

/// The same.
fn confine_child(holder: Pid) -> io::Result<()> {
    // The holder waits for its signals by descriptor and has them blocked; that is inherited.
    SigSet::empty().thread_set_mask()?;
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
    // It may have died before the line above.
    if nix::unistd::getppid() != holder {
        return Err(io::ErrorKind::BrokenPipe.into());
    }
    Ok(())
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
