//! Who is at the other end of a unix socket: the process that connected, as the kernel noted it then.

use std::io;
use std::os::fd::{AsFd, AsRawFd as _, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::fs::MetadataExt as _;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};

use super::cgroup::CgroupTree;

/// `SO_PEERPIDFD` (Linux 6.5).
const PEER_PIDFD: libc::c_int = 77;

/// User and cgroup of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Process {
    pub(crate) uid: u32,
    /// `None` on a host without cgroup2, where only users count.
    pub(crate) cgroup: Option<u64>,
}

/// The process that connected. `None` where it is gone, or the kernel can not say for sure: another one may have its
/// number by now.
pub(crate) fn connected(
    socket: &impl AsFd,
    tree: Option<&CgroupTree>,
) -> io::Result<Option<Process>> {
    let credentials = getsockopt(&socket.as_fd(), PeerCredentials)?;
    let uid = credentials.uid();
    let Some(tree) = tree else {
        return Ok(Some(Process { uid, cgroup: None }));
    };
    let Ok(process) = pidfd(socket.as_fd().as_raw_fd()) else {
        return Ok(None);
    };
    let found = cgroup_of(credentials.pid(), tree);
    // While it lives its number is its own: what was read is of this process.
    let cgroup = found.filter(|_| lives(&process));
    Ok(cgroup.map(|cgroup| Process {
        uid,
        cgroup: Some(cgroup),
    }))
}

#[expect(unsafe_code, reason = "SO_PEERPIDFD has no safe form in our libraries")]
fn pidfd(socket: RawFd) -> io::Result<OwnedFd> {
    let mut found: RawFd = -1;
    let mut length = libc::socklen_t::try_from(size_of::<RawFd>()).unwrap_or(0);
    // SAFETY: both pointers are to live values, and `length` is the size of the first.
    let result = unsafe {
        libc::getsockopt(
            socket,
            libc::SOL_SOCKET,
            PEER_PIDFD,
            (&raw mut found).cast(),
            &raw mut length,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us, and nobody else has its number.
    Ok(unsafe { OwnedFd::from_raw_fd(found) })
}

/// A process that ended makes its descriptor readable.
fn lives(process: &OwnedFd) -> bool {
    let mut wanted = [PollFd::new(process.as_fd(), PollFlags::POLLIN)];
    matches!(poll(&mut wanted, PollTimeout::ZERO), Ok(0))
}

fn cgroup_of(pid: libc::pid_t, tree: &CgroupTree) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    let path = text.lines().find_map(|line| line.strip_prefix("0::/"))?;
    let directory = std::fs::metadata(tree.root().join(path)).ok()?;
    Some(directory.ino())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_living_process_is_told_by_user_and_cgroup() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let own = nix::unistd::geteuid().as_raw();
        let found = connected(&ours, None).unwrap();
        assert_eq!(
            found,
            Some(Process {
                uid: own,
                cgroup: None
            })
        );
        let Ok(tree) = CgroupTree::find() else {
            return;
        };
        // Kernels before 6.5 can not tell: then it is nobody.
        if let Some(process) = connected(&ours, Some(&tree)).unwrap() {
            let own = cgroup_of(std::process::id().cast_signed(), &tree);
            assert_eq!(process.cgroup, own);
        }
    }
}
