//! Capabilities: the holder keeps what writing rules needs, a worker what its sockets to apps need.
#![expect(
    unsafe_code,
    reason = "capset, prctl and setrlimit have no safe form in our libraries"
)]

use std::io;

const CAP_SETPCAP: u32 = 8;
const CAP_NET_ADMIN: u32 = 12;
const CAP_NET_RAW: u32 = 13;
/// More than any kernel has; asking for one that it has not ends the loop.
const CAP_END: u32 = 64;
/// `_LINUX_CAPABILITY_VERSION_3`: 64 bits in two halves.
const VERSION: u32 = 0x2008_0522;

#[repr(C)]
struct Header {
    version: u32,
    pid: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Half {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// Takes away all but CAP_NET_ADMIN in use and CAP_NET_RAW at hand, which only goes to workers.
pub(super) fn confine_holder() -> io::Result<()> {
    nix::sys::prctl::set_dumpable(false)?;
    let mut caps = current()?;
    if caps.permitted & bit(CAP_SETPCAP) != 0 {
        for cap in (0..CAP_END).filter(|cap| ![CAP_NET_ADMIN, CAP_NET_RAW].contains(cap)) {
            // SAFETY: takes numbers only.
            if unsafe { libc::prctl(libc::PR_CAPBSET_DROP, cap, 0, 0, 0) } != 0 {
                break;
            }
        }
    }
    caps.permitted &= bit(CAP_NET_ADMIN) | bit(CAP_NET_RAW);
    caps.effective = caps.permitted & bit(CAP_NET_ADMIN);
    caps.inheritable = 0;
    set(caps)
}

/// Leaves the process that is about to become a worker nothing but CAP_NET_RAW, whatever its user, and for good.
/// Only makes system calls, as is needed between fork and exec.
pub(super) fn confine_worker() -> io::Result<()> {
    let caps = current()?;
    let raw = caps.permitted & bit(CAP_NET_RAW);
    set(Half {
        effective: raw,
        permitted: raw,
        inheritable: raw,
    })?;
    if raw != 0 {
        let raise = libc::PR_CAP_AMBIENT_RAISE;
        // SAFETY: takes numbers only.
        if unsafe { libc::prctl(libc::PR_CAP_AMBIENT, raise, CAP_NET_RAW, 0, 0) } != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    // Without it, root would get everything back at exec.
    nix::sys::prctl::set_no_new_privs().map_err(io::Error::from)
}

/// Each workload takes two descriptors and each call some: the hard limit is the operator's.
pub(super) fn raise_open_files() -> io::Result<()> {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: the pointer is to a live `rlimit`.
    if unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) } != 0 {
        return Err(io::Error::last_os_error());
    }
    limit.rlim_cur = limit.rlim_max;
    // SAFETY: the pointer is to a live `rlimit`.
    if unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Capabilities beyond the 32nd are never kept, so the lower half says all.
const fn bit(cap: u32) -> u32 {
    1 << cap
}

fn current() -> io::Result<Half> {
    let header = Header {
        version: VERSION,
        pid: 0,
    };
    let mut halves = [Half::default(); 2];
    // SAFETY: version 3 reads one header and writes two halves; both live here.
    let result = unsafe { libc::syscall(libc::SYS_capget, &raw const header, halves.as_mut_ptr()) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(halves[0])
}

fn set(caps: Half) -> io::Result<()> {
    let header = Header {
        version: VERSION,
        pid: 0,
    };
    let halves = [caps, Half::default()];
    // SAFETY: version 3 reads one header and two halves; both live here.
    let result = unsafe { libc::syscall(libc::SYS_capset, &raw const header, halves.as_ptr()) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
