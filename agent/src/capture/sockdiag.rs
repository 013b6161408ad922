//! Whose is a socket? One netlink socket asks the kernel; an answer takes microseconds and needs no privilege.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::netlink::{
    Attributes, Connection, DUMP, Message, attributes, errno_of, read_u32, read_u64,
};

const NETLINK_SOCK_DIAG: isize = 4;
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const INET_DIAG_SKV6ONLY: u16 = 11;
const INET_DIAG_CGROUP_ID: u16 = 21;
const INET_DIAG_NOCOOKIE: u32 = u32::MAX;
/// `inet_diag_msg` before its attributes.
const ANSWER_BYTES: usize = 72;
const V4: u8 = 2;
const V6: u8 = 10;

const TCP_ESTABLISHED: u8 = 1;
const TCP_FIN_WAIT_1: u8 = 4;
const TCP_FIN_WAIT_2: u8 = 5;
const TCP_CLOSE_WAIT: u8 = 8;
const TCP_LISTEN: u8 = 10;

/// Whose the client's end of a connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Owner {
    Known(SocketOwner),
    /// The socket is gone or half gone: what the kernel then answers (user 0, no inode, no cgroup) is nobody's.
    Unknown,
}

/// User and cgroup as they were when the socket was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SocketOwner {
    pub(crate) uid: u32,
    pub(crate) inode: u32,
    /// The id of the cgroup's directory.
    pub(crate) cgroup: u64,
}

/// A socket that listens. `inode` is 0 for none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Listener {
    pub(crate) address: SocketAddr,
    pub(crate) uid: u32,
    pub(crate) inode: u32,
    /// None on kernels before 5.8, where nobody can be told apart by cgroup.
    pub(crate) cgroup: Option<u64>,
    /// Listens on an IPv6 address and takes no IPv4 connections.
    pub(crate) v6only: bool,
}

impl Listener {
    /// Whether a connection to `target` would be answered by this socket.
    pub(crate) fn answers(&self, target: SocketAddr) -> bool {
        self.address.port() == target.port()
            && match (self.address.ip(), target.ip()) {
                (IpAddr::V6(own), IpAddr::V4(to)) => {
                    own.to_ipv4_mapped() == Some(to) || (own.is_unspecified() && !self.v6only)
                }
                (own, to) => own == to || (own.is_unspecified() && own.is_ipv4() == to.is_ipv4()),
            }
    }
}

/// An open door to `sock_diag`. Not shared between threads: each opens its own.
#[derive(Debug)]
pub(crate) struct SockDiag(Connection);

impl SockDiag {
    pub(crate) fn open() -> io::Result<Self> {
        Connection::open(NETLINK_SOCK_DIAG).map(Self)
    }

    /// The owner of the local socket that is `local` and connected to `remote`, as that socket sees it.
    pub(crate) fn owner_of(&mut self, local: SocketAddr, remote: SocketAddr) -> io::Result<Owner> {
        let (local, remote) = (canonical(local), canonical(remote));
        let request = request(family_of(local), u32::MAX, local, Some(remote), 0);
        let mut owner = Owner::Unknown;
        let outcome = self.0.query(&request, |_, body| {
            if let Some(found) = Answer::read(body) {
                owner = found.owner(local, remote);
            }
        });
        match outcome {
            Ok(()) => Ok(owner),
            Err(error) if errno_of(&error) == Some(libc::ENOENT) => Ok(Owner::Unknown),
            Err(error) => Err(error),
        }
    }

    /// All sockets that listen on a TCP port, of both families; port 0: on any.
    pub(crate) fn listeners(&mut self, port: u16) -> io::Result<Vec<Listener>> {
        let mut found = Vec::new();
        for any in [
            IpAddr::from(Ipv4Addr::UNSPECIFIED),
            Ipv6Addr::UNSPECIFIED.into(),
        ] {
            let local = SocketAddr::new(any, port);
            let states = 1 << TCP_LISTEN;
            let request = request(family_of(local), states, local, None, DUMP);
            let outcome = self.0.query(&request, |_, body| {
                if let Some(answer) = Answer::read(body)
                    && answer.state == TCP_LISTEN
                    && (port == 0 || answer.local.port() == port)
                {
                    found.push(answer.listener());
                }
            });
            match outcome {
                // The kernel has no IPv6.
                Err(error) if any.is_ipv6() && errno_of(&error) == Some(libc::ENOENT) => {}
                other => other?,
            }
        }
        Ok(found)
    }
}

/// An IPv6 socket that talks IPv4 is found by its IPv4 addresses.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

const fn family_of(address: SocketAddr) -> u8 {
    if address.is_ipv4() { V4 } else { V6 }
}

fn address_words(address: Option<SocketAddr>) -> [u8; 16] {
    let mut words = [0; 16];
    match address.map(|a| a.ip()) {
        Some(IpAddr::V4(v4)) => words[..4].copy_from_slice(&v4.octets()),
        Some(IpAddr::V6(v6)) => words = v6.octets(),
        None => {}
    }
    words
}

/// `inet_diag_req_v2`: what to look for.
fn request(
    family: u8,
    states: u32,
    local: SocketAddr,
    remote: Option<SocketAddr>,
    flags: u16,
) -> Message {
    let protocol = 6;
    let mut header = vec![family, protocol, 0, 0];
    header.extend_from_slice(&states.to_ne_bytes());
    header.extend_from_slice(&local.port().to_be_bytes());
    header.extend_from_slice(&remote.map_or(0, |r| r.port()).to_be_bytes());
    header.extend_from_slice(&address_words(Some(local)));
    header.extend_from_slice(&address_words(remote));
    header.extend_from_slice(&0_u32.to_ne_bytes());
    header.extend_from_slice(&INET_DIAG_NOCOOKIE.to_ne_bytes());
    header.extend_from_slice(&INET_DIAG_NOCOOKIE.to_ne_bytes());
    Message::new(SOCK_DIAG_BY_FAMILY, flags, &header, &Attributes::default())
}

/// `inet_diag_msg` and the attributes that we know.
#[derive(Clone, Copy, Debug)]
struct Answer {
    state: u8,
    local: SocketAddr,
    remote: SocketAddr,
    uid: u32,
    inode: u32,
    cgroup: Option<u64>,
    v6only: bool,
}

impl Answer {
    fn read(body: &[u8]) -> Option<Self> {
        let family = *body.first()?;
        let state = *body.get(1)?;
        let port = |at: usize| Some(u16::from_be_bytes(body.get(at..at + 2)?.try_into().ok()?));
        let address = |at: usize| -> Option<IpAddr> {
            let words: [u8; 16] = body.get(at..at + 16)?.try_into().ok()?;
            let [a, b, c, d, ..] = words;
            Some(match family {
                V4 => Ipv4Addr::new(a, b, c, d).into(),
                V6 => Ipv6Addr::from(words).into(),
                _ => return None,
            })
        };
        let mut answer = Self {
            state,
            local: SocketAddr::new(address(8)?, port(4)?),
            remote: SocketAddr::new(address(24)?, port(6)?),
            uid: read_u32(body, 64)?,
            inode: read_u32(body, 68)?,
            cgroup: None,
            v6only: false,
        };
        for (kind, value) in attributes(body.get(ANSWER_BYTES..)?) {
            match kind {
                INET_DIAG_CGROUP_ID => answer.cgroup = read_u64(value, 0),
                INET_DIAG_SKV6ONLY => answer.v6only = value.first() == Some(&1),
                _ => {}
            }
        }
        Some(answer)
    }

    fn owner(&self, local: SocketAddr, remote: SocketAddr) -> Owner {
        // A listener on the same port answers too when the connection is gone.
        let alive = matches!(
            self.state,
            TCP_ESTABLISHED | TCP_FIN_WAIT_1 | TCP_FIN_WAIT_2 | TCP_CLOSE_WAIT
        );
        let same = canonical(self.local) == local && canonical(self.remote) == remote;
        match self.cgroup {
            Some(cgroup) if alive && same && self.inode != 0 && cgroup != 0 => {
                Owner::Known(SocketOwner {
                    uid: self.uid,
                    inode: self.inode,
                    cgroup,
                })
            }
            _ => Owner::Unknown,
        }
    }

    const fn listener(&self) -> Listener {
        Listener {
            address: self.local,
            uid: self.uid,
            inode: self.inode,
            cgroup: self.cgroup,
            v6only: self.v6only,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};

    #[test]
    fn a_living_client_is_known_and_a_gone_one_is_nobody() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let remote = listener.local_addr().unwrap();
        let client = TcpStream::connect(remote).unwrap();
        let local = client.local_addr().unwrap();
        let (server, _) = listener.accept().unwrap();
        let mut diag = SockDiag::open().unwrap();
        let Owner::Known(owner) = diag.owner_of(local, remote).unwrap() else {
            panic!("the client lives");
        };
        assert_eq!(owner.uid, nix::unistd::geteuid().as_raw());
        let mapped = |a: SocketAddr| match a.ip() {
            IpAddr::V4(v4) => SocketAddr::new(v4.to_ipv6_mapped().into(), a.port()),
            IpAddr::V6(_) => a,
        };
        let again = diag.owner_of(mapped(local), mapped(remote)).unwrap();
        assert_eq!(again, Owner::Known(owner));
        // The client closes first and stays behind as a mini-socket without owner.
        drop(client);
        assert_eq!(diag.owner_of(local, remote).unwrap(), Owner::Unknown);
        drop(server);
        assert_eq!(diag.owner_of(local, remote).unwrap(), Owner::Unknown);
        // Only a listener is left on the port.
        assert_eq!(diag.owner_of(remote, local).unwrap(), Owner::Unknown);
    }

    #[test]
    fn listeners_of_a_port_are_found_with_their_family() {
        let v4 = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = v4.local_addr().unwrap().port();
        let found = SockDiag::open().unwrap().listeners(port).unwrap();
        let ours = found
            .iter()
            .find(|l| l.address == v4.local_addr().unwrap())
            .unwrap();
        assert_ne!(ours.inode, 0);
        assert!(ours.answers(v4.local_addr().unwrap()));
        assert!(!ours.answers(SocketAddr::new(Ipv4Addr::new(127, 0, 0, 2).into(), port)));
    }

    #[test]
    fn a_dual_listener_answers_both_families_and_a_v6only_one() {
        let mut listener = Listener {
            address: "[::]:80".parse().unwrap(),
            uid: 0,
            inode: 1,
            cgroup: None,
            v6only: false,
        };
        let v4 = "10.0.0.1:80".parse().unwrap();
        assert!(listener.answers(v4) && listener.answers("[::1]:80".parse().unwrap()));
        listener.v6only = true;
        assert!(!listener.answers(v4));
        assert!(!listener.answers("[::1]:81".parse().unwrap()));
    }

    #[test]
    fn a_cut_answer_is_none() {
        for length in 0..ANSWER_BYTES {
            assert!(Answer::read(&vec![2; length]).is_none());
        }
    }
}
