//! What to do about errors of the kernel.

use std::io;

use super::netlink::errno_of;

pub(super) fn advice(error: &io::Error) -> &'static str {
    match errno_of(error) {
        Some(libc::EPERM) => "; the agent needs CAP_NET_ADMIN",
        Some(libc::EOPNOTSUPP) => "; is the kernel's module `bridge` missing?",
        _ => "",
    }
}

pub(super) fn table_advice(error: &io::Error) -> &'static str {
    match errno_of(error) {
        Some(libc::EEXIST | libc::EPERM) => {
            "; does another agent run here? else the name is taken: set `table` or delete it"
        }
        Some(libc::ENOENT | libc::EOPNOTSUPP) => {
            "; the kernel lacks nf_tables with `socket` and `tproxy` (Linux 5.13 or newer)"
        }
        _ => "",
    }
}

pub(super) fn delete_advice(error: &io::Error) -> &'static str {
    match errno_of(error) {
        Some(libc::EPERM) => "; a running agent owns it: stop that first",
        _ => "",
    }
}
