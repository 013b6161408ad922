//! Whether the host at the other end of a connection went away without a word, with something still to be delivered.
//!
//! The kernel's keep-alive asks only when nothing is under way; what is, it sends again for a quarter of an hour. A
//! bound on that (TCP_USER_TIMEOUT) would also end connections whose other end lives and does not read.

use std::mem::{MaybeUninit, size_of};
use std::os::fd::RawFd;

/// How long nothing may be acknowledged: seven retransmissions, as long as another agent may be silent.
const SILENT_MAX_MS: u32 = 30_000;
/// Unanswered questions for a window that is closed; one that lives answers each.
const PROBES_MIN: u8 = 3;

/// States of TCP, as the kernel numbers them.
const FIN_WAIT1: u8 = 4;
const LAST_ACK: u8 = 9;
const CLOSING: u8 = 11;

/// Looks at a connection of this process. A descriptor that is none, or not TCP's, has not vanished.
pub(crate) fn has_vanished(fd: RawFd) -> bool {
    info(fd).is_some_and(|info| is_lost(&info))
}

/// Whether its other end has acknowledged all that was written, and our end with it.
pub(crate) fn has_all(fd: RawFd) -> bool {
    // What still waits for that is in one of these states.
    const WAITING: [u8; 3] = [FIN_WAIT1, CLOSING, LAST_ACK];
    info(fd).is_none_or(|info| !WAITING.contains(&info.tcpi_state))
}

fn is_lost(info: &libc::tcp_info) -> bool {
    let waits = info.tcpi_unacked > 0 || info.tcpi_probes >= PROBES_MIN;
    waits && info.tcpi_last_ack_recv >= SILENT_MAX_MS
}

#[expect(unsafe_code, reason = "no library reads TCP_INFO")]
fn info(fd: RawFd) -> Option<libc::tcp_info> {
    let mut info = MaybeUninit::<libc::tcp_info>::zeroed();
    let mut length = size_of::<libc::tcp_info>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes, which `info` has; it judges the descriptor itself.
    let outcome = unsafe {
        libc::getsockopt(
            fd,
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            info.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    // SAFETY: plain numbers, which may be zero; what the kernel did not write is.
    (outcome == 0).then(|| unsafe { info.assume_init() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsRawFd as _;

    #[test]
    fn an_end_waits_for_what_was_written_before() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut reader = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut writer, _) = listener.accept().unwrap();
        writer.set_nonblocking(true).unwrap();
        // More than both sockets hold.
        while writer.write(&[0; 65_536]).is_ok() {}
        writer.shutdown(std::net::Shutdown::Write).unwrap();
        assert!(!has_all(writer.as_raw_fd()));
        std::io::copy(&mut reader, &mut std::io::sink()).unwrap();
        while !has_all(writer.as_raw_fd()) {
            std::thread::yield_now();
        }
    }

    #[test]
    fn who_answers_has_not_vanished() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        client.write_all(b"x").unwrap();
        let info = info(client.as_raw_fd()).unwrap();
        assert!(!is_lost(&info));
        assert!(!has_vanished(-1), "no descriptor");
        let file = std::fs::File::open("/dev/null").unwrap();
        assert!(!has_vanished(file.as_raw_fd()), "no socket");
        for (unacked, probes, last_ack, expected) in [
            (1, 0, SILENT_MAX_MS, true),
            (1, 0, SILENT_MAX_MS - 1, false),
            // Nothing is under way: keep-alive asks.
            (0, 0, SILENT_MAX_MS * 9, false),
            // It does not read, and says so.
            (0, 1, SILENT_MAX_MS * 4, false),
            (0, PROBES_MIN, SILENT_MAX_MS * 4, true),
        ] {
            let mut info = info;
            info.tcpi_unacked = unacked;
            info.tcpi_probes = probes;
            info.tcpi_last_ack_recv = last_ack;
            assert_eq!(is_lost(&info), expected, "{unacked} {probes} {last_ack}");
        }
    }
}
