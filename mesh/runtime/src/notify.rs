//! What a service manager is told: ready, stopping, alive; and what it keeps for the next process. Without one nothing is
//! said.

use std::io::{self, IoSlice};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::{Duration, Instant};

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use sd_notify::NotifyState;

/// Everything is bound and served.
pub fn ready() {
    tell(NotifyState::Ready);
}

/// No new work is taken from now on.
pub fn stopping() {
    tell(NotifyState::Stopping);
}

fn tell(state: NotifyState<'_>) {
    if let Err(error) = sd_notify::notify(&[state]) {
        log::warn!(
            "the service manager can not be told how we are: {error}; it may take us for dead"
        );
    }
}

/// The sign of life that `WatchdogSec` of the unit asks for.
#[derive(Debug)]
pub struct Watchdog {
    /// `None`: nobody asks.
    every: Option<Duration>,
    next: Instant,
}

impl Watchdog {
    /// Half of the time that we are given, as sd_watchdog_enabled(3) advises.
    #[must_use]
    pub fn new(now: Instant) -> Self {
        Self {
            every: sd_notify::watchdog_enabled().map(|given| given / 2),
            next: now,
        }
    }

    /// How often a sign is due.
    #[must_use]
    pub fn every(&self) -> Option<Duration> {
        self.every
    }

    /// To be called by what must not hang, at least every [`Self::every`]; gives the sign when it is due.
    pub fn alive(&mut self, now: Instant) {
        let Some(every) = self.every else { return };
        if self.next <= now {
            tell(NotifyState::Watchdog);
            // Called a bit before it is due, it must not be late by a whole turn.
            self.next = now + every / 2;
        }
    }
}

/// Leaves copies of descriptors with the service manager, which gives them to the next process of this service if this one
/// dies. Several may have one name. Without a service manager nothing is left.
pub fn store(name: &str, descriptors: &[BorrowedFd<'_>]) {
    // Nobody asks whether a socket still has its other end: netlink sockets say no for reasons of their own.
    let text = format!("FDSTORE=1\nFDNAME={name}\nFDPOLL=0");
    if let Err(error) = send(&text, descriptors) {
        log::warn!(
            "the service manager takes no copy of `{name}`: {error}; what waits in it is lost if this process dies"
        );
    }
}

/// Takes all copies of this name back.
pub fn unstore(name: &str) {
    if let Err(error) = send(&format!("FDSTOREREMOVE=1\nFDNAME={name}"), &[]) {
        log::warn!("the service manager does not give up its copy of `{name}`: {error}");
    }
}

/// What a process of this service before this one has [stored](store), by name. To be called once.
#[must_use]
pub fn stored() -> Vec<(String, OwnedFd)> {
    match sd_notify::listen_fds_with_names() {
        Ok(given) => given.map(|(fd, name)| (name, own(fd))).collect(),
        Err(error) => {
            log::warn!("what the service manager gives can not be used: {error}");
            Vec::new()
        }
    }
}

#[expect(unsafe_code, reason = "descriptors come as numbers")]
fn own(number: RawFd) -> OwnedFd {
    // SAFETY: the service manager has opened it for this process, and the library has just found it open; it is taken once.
    unsafe { OwnedFd::from_raw_fd(number) }
}

fn send(text: &str, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else {
        return Ok(());
    };
    let socket = UnixDatagram::unbound()?;
    match path.as_encoded_bytes().strip_prefix(b"@") {
        Some(name) => socket.connect_addr(&SocketAddr::from_abstract_name(name)?)?,
        None => socket.connect(&path)?,
    }
    let raw: Vec<RawFd> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let rights = if raw.is_empty() { &[][..] } else { &rights };
    let parts = [IoSlice::new(text.as_bytes())];
    sendmsg::<()>(
        socket.as_raw_fd(),
        &parts,
        rights,
        MsgFlags::MSG_NOSIGNAL,
        None,
    )?;
    Ok(())
}
