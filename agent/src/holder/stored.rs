//! Copies of the holder's sockets with the service manager: if the holder dies, connections wait in them, and the packet
//! filter's table stays, until the next holder takes them.

use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use mesh_runtime::notify;
use socket2::SockRef;

use super::protocol::{Sockets, WorkloadListener};

const MESH: &str = "mesh";
const NAMES_UDP: &str = "names-udp";
const NAMES_TCP: &str = "names-tcp";
/// The socket that owns the table.
pub(super) const RULES: &str = "rules";
/// Of a workload: `callers`, its number and its label.
const CALLERS: &str = "callers";

/// What the holder before this one had.
#[derive(Debug, Default)]
pub(super) struct Stored(Vec<(String, OwnedFd)>);

impl Stored {
    pub(super) fn take() -> Self {
        let stored = Self(notify::stored());
        if !stored.0.is_empty() {
            log::info!(sockets = stored.0.len(); "the holder before this one died; its sockets are taken on");
        }
        stored
    }

    /// The socket that owns the table.
    pub(super) fn rules(&mut self) -> Option<OwnedFd> {
        let at = self.0.iter().position(|(name, _)| name == RULES)?;
        Some(self.0.swap_remove(at).1)
    }

    pub(super) fn mesh(&mut self, address: SocketAddr) -> Option<TcpListener> {
        self.find(MESH, address).map(TcpListener::from)
    }

    pub(super) fn names_tcp(&mut self, address: SocketAddr) -> Option<TcpListener> {
        self.find(NAMES_TCP, address).map(TcpListener::from)
    }

    pub(super) fn names_udp(&mut self, address: SocketAddr) -> Option<UdpSocket> {
        self.find(NAMES_UDP, address).map(UdpSocket::from)
    }

    fn find(&mut self, wanted: &str, address: SocketAddr) -> Option<OwnedFd> {
        let is_it = |(name, socket): &(String, OwnedFd)| {
            let local = SockRef::from(socket).local_addr().ok();
            name == wanted && local.and_then(|local| local.as_socket()) == Some(address)
        };
        let at = self.0.iter().position(is_it)?;
        Some(self.0.swap_remove(at).1)
    }

    /// The listeners of workloads.
    pub(super) fn listeners(&mut self) -> BTreeMap<u16, WorkloadListener> {
        let mut listeners = BTreeMap::new();
        for (name, socket) in std::mem::take(&mut self.0) {
            let Some((number, label)) = callers(&name) else {
                self.0.push((name, socket));
                continue;
            };
            let listener = listeners.entry(number).or_insert_with(|| WorkloadListener {
                number,
                label: label.to_owned(),
                v4: None,
                v6: None,
            });
            let socket = TcpListener::from(socket);
            match socket.local_addr() {
                Ok(SocketAddr::V4(_)) => listener.v4 = Some(socket),
                Ok(SocketAddr::V6(_)) => listener.v6 = Some(socket),
                Err(_) => {}
            }
        }
        listeners
    }
}

/// What the name of a stored listener says.
fn callers(name: &str) -> Option<(u16, &str)> {
    let (number, label) = name
        .strip_prefix(CALLERS)?
        .strip_prefix('-')?
        .split_once('-')?;
    Some((number.parse().ok()?, label))
}

fn name_of(listener: &WorkloadListener) -> String {
    format!("{CALLERS}-{}-{}", listener.number, listener.label)
}

/// All but those of workloads. What was stored before is replaced.
pub(super) fn store(sockets: &Sockets, rules: Option<BorrowedFd<'_>>) {
    replace(MESH, &descriptors(&sockets.mesh));
    replace(NAMES_TCP, &descriptors(&sockets.dns_tcp));
    replace(NAMES_UDP, &descriptors(&sockets.dns_udp));
    replace(RULES, rules.as_slice());
}

pub(super) fn store_listener(listener: &WorkloadListener) {
    let sockets = [&listener.v4, &listener.v6].into_iter().flatten();
    let sockets: Vec<_> = sockets.map(AsFd::as_fd).collect();
    replace(&name_of(listener), &sockets);
}

pub(super) fn unstore_listener(listener: &WorkloadListener) {
    notify::unstore(&name_of(listener));
}

/// Before an orderly end: nobody may wait in them any more.
pub(super) fn unstore<'a>(listeners: impl Iterator<Item = &'a WorkloadListener>) {
    for name in [MESH, NAMES_TCP, NAMES_UDP, RULES] {
        notify::unstore(name);
    }
    listeners.for_each(unstore_listener);
}

fn descriptors(all: &[impl AsFd]) -> Vec<BorrowedFd<'_>> {
    all.iter().map(AsFd::as_fd).collect()
}

fn replace(name: &str, sockets: &[BorrowedFd<'_>]) {
    notify::unstore(name);
    if !sockets.is_empty() {
        notify::store(name, sockets);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::holder::sockets;

    #[test]
    fn what_is_stored_is_found_by_name_and_address() {
        let socket = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = socket.local_addr().unwrap();
        let of_web = sockets::workload(3, "shop/web", true);
        let mut stored = vec![(MESH.to_owned(), OwnedFd::from(socket))];
        if let Ok(listener) = &of_web {
            let v4 = listener.v4.as_ref().unwrap().try_clone().unwrap();
            stored.push((name_of(listener), v4.into()));
        }
        let mut stored = Stored(stored);
        assert!(stored.mesh(([127, 0, 0, 2], 1).into()).is_none());
        assert!(stored.names_tcp(address).is_none());
        assert!(stored.mesh(address).is_some());
        assert!(stored.mesh(address).is_none(), "once");
        // Transparent sockets need privileges.
        if of_web.is_ok() {
            let listeners = stored.listeners();
            assert_eq!(
                (listeners[&3].number, &*listeners[&3].label),
                (3, "shop/web")
            );
        }
        assert_eq!(callers("callers-0-"), Some((0, "")));
        assert_eq!(callers("callers-x-y"), None);
    }
}
