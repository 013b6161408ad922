//! The connection to a local app, made in the name of the mesh peer: the app sees the peer's address.
//!
//! Local ports come from our own allocator, below the range from which hosts take theirs, so that our (address, port)
//! never meets a connection that the peer itself makes to the same app. The packet filter knows the same range.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU32, Ordering};

use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};
use tokio::net::{TcpSocket, TcpStream};

/// The least port that needs no privilege on an unchanged host.
pub(crate) const FIRST_PORT: u16 = 1024;
/// The last below Linux's default range of ephemeral ports.
pub(crate) const LAST_PORT: u16 = 32_767;
const PORTS: u32 = LAST_PORT as u32 - FIRST_PORT as u32 + 1;
/// Ports that are taken lie together (servers, connections just closed); this many in a row means that a whole region
/// is, and the next call starts behind it.
const TRIES: u32 = 256;

/// Gives ports in turn. Shared by all threads of a worker.
#[derive(Debug)]
pub(crate) struct PortAllocator(AtomicU32);

impl PortAllocator {
    /// `seed` should differ between processes: two workers (one draining) share the ports.
    pub(crate) const fn new(seed: u32) -> Self {
        Self(AtomicU32::new(seed))
    }

    /// The next port. Every port comes once in 31,744 calls.
    pub(crate) fn next(&self) -> u16 {
        let turn = self.0.fetch_add(1, Ordering::Relaxed);
        // The remainder is below 31,744.
        FIRST_PORT + u16::try_from(turn % PORTS).unwrap_or(0)
    }
}

/// Makes connections to local apps.
#[derive(Debug)]
pub(crate) struct AppDialer {
    mark: u32,
    keepalive: TcpKeepalive,
    ports: PortAllocator,
}

impl AppDialer {
    /// `mark` is [`super::Marks::app`]. Needs CAP_NET_RAW (before Linux 5.17: CAP_NET_ADMIN).
    /// `keepalive` asks often enough that the packet filter does not forget a silent flow.
    pub(crate) fn new(mark: u32, keepalive: TcpKeepalive) -> Self {
        // The order of ports is no secret; it shall only not begin at the same place after each start.
        let mut seed = std::process::id();
        if let Ok(since) = std::time::UNIX_EPOCH.elapsed() {
            seed = seed.wrapping_add(since.subsec_nanos());
        }
        Self {
            mark,
            keepalive,
            ports: PortAllocator::new(seed),
        }
    }

    /// Connects to `target`, an address of this host, as if from `shown`. The caller bounds the time.
    pub(crate) async fn connect(&self, target: SocketAddr, shown: IpAddr) -> io::Result<TcpStream> {
        let shown = shown.to_canonical();
        if shown.is_ipv4() != target.is_ipv4() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("{target} can not be shown {shown}: the families differ"),
            ));
        }
        for _ in 0..TRIES {
            let source = SocketAddr::new(shown, self.ports.next());
            let attempt = match self.bound_socket(source) {
                Ok(socket) => socket.connect(target).await,
                Err(error) => Err(error),
            };
            match attempt {
                // The port is a local server's, or the same four numbers are still known from an earlier connection.
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::AddrInUse | io::ErrorKind::AddrNotAvailable
                    ) => {}
                other => return other,
            }
        }
        Err(io::Error::new(
            io::ErrorKind::AddrInUse,
            format!("no free port to show {shown} to {target} in {TRIES} tries"),
        ))
    }

    fn bound_socket(&self, source: SocketAddr) -> io::Result<TcpSocket> {
        let socket = Socket::new(
            Domain::for_address(source),
            Type::STREAM.nonblocking().cloexec(),
            Some(Protocol::TCP),
        )?;
        if crate::limits::is_reserved(&socket) {
            return Err(io::Error::from_raw_os_error(libc::EMFILE));
        }
        if source.is_ipv4() {
            socket.set_ip_transparent_v4(true)?;
        } else {
            socket.set_ip_transparent_v6(true)?;
        }
        socket.set_mark(self.mark)?;
        // The same (address, port) may go to several apps at once; the four numbers together are unique.
        socket.set_reuse_address(true)?;
        socket.bind(&source.into())?;
        let socket = TcpSocket::from_std_stream(socket.into());
        socket.set_nodelay(true)?;
        crate::relay::prepare_near(&SockRef::from(&socket), &self.keepalive)?;
        Ok(socket)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn every_port_of_the_range_comes_once_a_round() {
        let ports = PortAllocator::new(u32::MAX - 100);
        let round: BTreeSet<u16> = (0..200).map(|_| ports.next()).collect();
        assert!(round.iter().all(|p| (FIRST_PORT..=LAST_PORT).contains(p)));
        let ports = PortAllocator::new(7);
        let round: BTreeSet<u16> = (0..PORTS).map(|_| ports.next()).collect();
        assert_eq!(round.len(), PORTS as usize);
        assert_eq!(round.first(), Some(&FIRST_PORT));
        assert_eq!(round.last(), Some(&LAST_PORT));
    }

    #[tokio::test]
    async fn families_are_not_mixed() {
        let error = AppDialer::new(1, TcpKeepalive::new())
            .connect("127.0.0.1:1".parse().unwrap(), "::1".parse().unwrap())
            .await
            .unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    }
}
