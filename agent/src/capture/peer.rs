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
    /// Whether it lived when its cgroup was read. If that is not known the cgroup may be of a process that came after it.
    pub(crate) held: bool,
}

/// The process that connected. `None` where it is gone.
pub(crate) fn connected(
    socket: &impl AsFd,
    tree: Option<&CgroupTree>,
) -> io::Result<Option<Process>> {
    let credentials = getsockopt(&socket.as_fd(), PeerCredentials)?;
    let uid = credentials.uid();
    let Some(tree) = tree else {
        return Ok(Some(Process {
            uid,
            cgroup: None,
            held: true,
        }));
    };
    let process = pidfd(socket.as_fd().as_raw_fd());
    Ok(look(process, uid, credentials.pid(), tree))
}

fn look(
    process: io::Result<OwnedFd>,
    uid: u32,
    pid: libc::pid_t,
    tree: &CgroupTree,
) -> Option<Process> {
    let cgroup = cgroup_of(pid, tree)?;
    let held = match process {
        // While it lives its number is its own: what was read is of this process.
        Ok(process) if lives(&process) => true,
        Err(error) if error.raw_os_error() == Some(libc::ENOPROTOOPT) => false,
        _ => return None,
    };
    Some(Process {
        uid,
        cgroup: Some(cgroup),
        held,
    })
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
                cgroup: None,
                held: true,
            })
        );
        let Ok(tree) = CgroupTree::find() else {
            return;
        };
        let process = connected(&ours, Some(&tree)).unwrap().unwrap();
        let pid = std::process::id().cast_signed();
        assert_eq!(process.cgroup, cgroup_of(pid, &tree));
        // As kernels before 6.5 answer: the process is told, but not for sure.
        let old = || Err(io::Error::from_raw_os_error(libc::ENOPROTOOPT));
        let found = look(old(), own, pid, &tree).unwrap();
        assert!(!found.held);
        assert_eq!((found.uid, found.cgroup), (own, process.cgroup));
        // One that is gone is nobody, on any kernel.
        let gone = Err(io::Error::from_raw_os_error(libc::ESRCH));
        assert_eq!(look(gone, own, pid, &tree), None);
        assert_eq!(look(old(), own, libc::pid_t::MAX, &tree), None);
    }
}
