//! A service manager, as far as an agent knows one: it hears what the agent says of itself, and keeps descriptors for the next
//! process.

use std::io::IoSliceMut;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};

use crate::host::Host;

/// The manager of one service.
#[derive(Debug)]
pub struct Manager {
    path: PathBuf,
    kept: Arc<Mutex<Vec<(String, OwnedFd)>>>,
}

impl Manager {
    #[track_caller]
    pub fn new(host: &Host) -> Self {
        let path = host.dir().join("notify.sock");
        drop(std::fs::remove_file(&path));
        let socket = UnixDatagram::bind(&path).expect("a socket");
        let kept = Arc::<Mutex<Vec<_>>>::default();
        let keeps = Arc::clone(&kept);
        std::thread::spawn(move || {
            while let Some((text, descriptors)) = receive(&socket) {
                let mut kept = keeps.lock().unwrap_or_else(PoisonError::into_inner);
                let lines: Vec<&str> = text.lines().collect();
                let name = lines.iter().find_map(|line| line.strip_prefix("FDNAME="));
                let name = name.unwrap_or("stored").to_owned();
                if lines.contains(&"FDSTORE=1") {
                    kept.extend(descriptors.into_iter().map(|fd| (name.clone(), fd)));
                } else if lines.contains(&"FDSTOREREMOVE=1") {
                    kept.retain(|(kept, _)| *kept != name);
                }
            }
        });
        Self { path, kept }
    }

    pub fn socket(&self) -> &std::path::Path {
        &self.path
    }

    /// Copies of what is kept, with the names.
    #[track_caller]
    pub fn kept(&self) -> Vec<(String, OwnedFd)> {
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let copies = kept.iter();
        let copies = copies.map(|(name, fd)| (name.clone(), fd.try_clone().expect("a descriptor")));
        copies.collect()
    }
}

/// `None` when the socket is gone.
fn receive(socket: &UnixDatagram) -> Option<(String, Vec<OwnedFd>)> {
    let mut space = nix::cmsg_space!([RawFd; 64]);
    let mut bytes = [0; 4096];
    let mut parts = [IoSliceMut::new(&mut bytes)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let received = recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut space), flags).ok()?;
    let mut descriptors = Vec::new();
    for control in received.cmsgs().ok()? {
        if let ControlMessageOwned::ScmRights(raw) = control {
            descriptors.extend(raw.into_iter().map(own));
        }
    }
    let length = received.bytes;
    Some((
        String::from_utf8_lossy(&bytes[..length]).into_owned(),
        descriptors,
    ))
}

#[expect(unsafe_code, reason = "descriptors come as numbers")]
fn own(raw: RawFd) -> OwnedFd {
    // SAFETY: the kernel has just made this descriptor for us, and nobody else has its number.
    unsafe { OwnedFd::from_raw_fd(raw) }
}
