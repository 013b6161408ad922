//! The sockets that the holder binds and every worker shares: they outlive a worker, and connections wait in them.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};

use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::RcvBufForce;
use socket2::{Domain, Protocol, Socket, Type};
use thiserror::Error;

use super::protocol::{Sockets, WorkloadListener};
use super::stored::Stored;
use crate::capture::VipRanges;

/// Connections that may wait while a worker is replaced; the host's `somaxconn` bounds it too.
const BACKLOG: i32 = 4096;
/// Room for questions that wait while the worker is busy or replaced. The kernel doubles it, and counts about 768 bytes for
/// each: twice what the packet filter lets users send together at once and in a second.
const NAMES_BYTES: usize = 12 * 1024 * 1024;

/// A socket that could not be bound: this host's fault.
#[derive(Debug, Error)]
pub(crate) enum BindError {
    #[error("could not listen on the mesh port {address}{}", taken(.source))]
    Mesh {
        address: SocketAddr,
        #[source]
        source: io::Error,
    },
    #[error("could not answer DNS at {address}{}{}", taken(.source), instead(.source, address))]
    Dns {
        address: SocketAddr,
        #[source]
        source: io::Error,
    },
    #[error("could not make the listeners of workload {number}{}", limit(.source))]
    Workload {
        number: u16,
        #[source]
        source: io::Error,
    },
    #[error("no mesh port is set that this host's address families can listen on")]
    NoMeshPort,
    #[error(
        "DNS can be answered at none of the link's addresses; were they taken away while the agent started?"
    )]
    NoDns,
}

fn taken(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::AddrInUse => "; another program has it: `ss -lnp` shows which",
        io::ErrorKind::PermissionDenied => "; the agent needs CAP_NET_BIND_SERVICE",
        _ => "",
    }
}

/// One that listens at all addresses is in the way at the port of names only.
fn instead(error: &io::Error, address: &SocketAddr) -> &'static str {
    match (error.kind(), address.port()) {
        (io::ErrorKind::AddrInUse, 53) => {
            "; if it is this host's resolver, set `dns.wiring` to it, so that names are answered at another port"
        }
        _ => "",
    }
}

fn limit(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EMFILE | libc::ENFILE) => "; raise LimitNOFILE of the agent's unit",
        _ => "",
    }
}

/// Binds what every worker needs: the mesh port and, where there is the link with these ranges, port `names` of its addresses.
/// What is `stored` of that is taken on.
pub(super) fn bind(
    mesh: &[SocketAddr],
    ranges: Option<&VipRanges>,
    names: u16,
    stored: &mut Stored,
) -> Result<Sockets, BindError> {
    let mut sockets = Sockets {
        mesh: Vec::new(),
        dns_udp: Vec::new(),
        dns_tcp: Vec::new(),
    };
    for address in mesh.iter().copied() {
        let bound = match stored.mesh(address) {
            Some(socket) => Some(socket),
            None => present(listen(address, false))
                .map_err(|source| BindError::Mesh { address, source })?,
        };
        sockets.mesh.extend(bound);
    }
    if sockets.mesh.is_empty() {
        return Err(BindError::NoMeshPort);
    }
    let Some(ranges) = ranges else {
        return Ok(sockets);
    };
    for ip in ranges.own_addresses() {
        let address = SocketAddr::new(ip, names);
        let failed = |source| BindError::Dns { address, source };
        let tcp = match stored.names_tcp(address) {
            Some(socket) => Some(socket),
            None => present(listen(address, false)).map_err(failed)?,
        };
        let udp = match stored.names_udp(address) {
            Some(socket) => Some(socket),
            None => present(datagrams(address)).map_err(failed)?,
        };
        sockets.dns_tcp.extend(tcp);
        sockets.dns_udp.extend(udp);
    }
    if sockets.dns_udp.is_empty() || sockets.dns_tcp.is_empty() {
        return Err(BindError::NoDns);
    }
    Ok(sockets)
}

/// The transparent listeners of one workload, on loopback, at ports that the kernel picks; none where nothing `captures`.
pub(super) fn workload(
    number: u16,
    label: &str,
    captures: bool,
) -> Result<WorkloadListener, BindError> {
    let open = |ip: IpAddr| {
        if !captures {
            return Ok(None);
        }
        present(listen(SocketAddr::new(ip, 0), true))
            .map_err(|source| BindError::Workload { number, source })
    };
    Ok(WorkloadListener {
        number,
        label: label.to_owned(),
        v4: open(Ipv4Addr::LOCALHOST.into())?,
        v6: open(Ipv6Addr::LOCALHOST.into())?,
    })
}

/// A family that the host has not, or an address of it, is no error.
fn present<T>(bound: io::Result<T>) -> io::Result<Option<T>> {
    match bound {
        Ok(socket) => Ok(Some(socket)),
        Err(error)
            if matches!(
                error.raw_os_error(),
                Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL)
            ) =>
        {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

fn listen(address: SocketAddr, transparent: bool) -> io::Result<TcpListener> {
    let socket = socket(address, Type::STREAM, Protocol::TCP)?;
    if transparent && address.is_ipv4() {
        socket.set_ip_transparent_v4(true)?;
    } else if transparent {
        socket.set_ip_transparent_v6(true)?;
    }
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

fn datagrams(address: SocketAddr) -> io::Result<UdpSocket> {
    let socket = socket(address, Type::DGRAM, Protocol::UDP)?;
    // Past the host's limit, which is made for one program's own questions.
    setsockopt(&socket, RcvBufForce, &NAMES_BYTES)?;
    socket.bind(&address.into())?;
    Ok(socket.into())
}

fn socket(address: SocketAddr, kind: Type, protocol: Protocol) -> io::Result<Socket> {
    let socket = Socket::new(
        Domain::for_address(address),
        kind.nonblocking().cloexec(),
        Some(protocol),
    )?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    if kind == Type::STREAM {
        // After a restart old connections still stand in TIME_WAIT.
        socket.set_reuse_address(true)?;
    }
    Ok(socket)
}
