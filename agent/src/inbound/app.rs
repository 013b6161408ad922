//! Connections to the local app: made as if from the peer's address, only to a listener of the workload itself,
//! and kept for further HTTP requests of the same peer address while provably clean.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::rc::Rc;
use std::time::{Duration, Instant};

use mesh_core::identity::SpiffeId;
use mesh_core::names::Account;
use mesh_core::reason::Reason;
use tokio::net::TcpStream;

use super::{Admitted, Peer, front};
use crate::capture::sockdiag::Listener;
use crate::data::Thread;
use crate::limits::{self, Limit};
use crate::relay;

/// Kept connections for one (port, shown address), and in all. What is more is closed.
const KEPT_PER_KEY_MAX: usize = 512;
pub(crate) const KEPT_MAX: usize = 1024;
/// Below the shortest keep-alive timeout that servers have by default (5 s with Apache httpd and Node).
const KEPT_FOR: Duration = Duration::from_secs(4);

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Key {
    /// Some apps take a connection for a login (NTLM, Negotiate): it stays with its caller.
    caller: SpiffeId,
    server: Account,
    port: u16,
    shown: IpAddr,
    /// The server without an agent at the other end; `None`: an app of this host.
    beyond: Option<SocketAddr>,
}

/// A connection that waits for a request. Whoever closes it closes it properly; one that is cut off by the end of
/// this process had nothing to say.
#[derive(Debug)]
struct Kept {
    socket: Option<TcpStream>,
    since: Instant,
}

impl Kept {
    /// Anything to read, be it an end, says that the app is not just waiting for a request.
    fn is_clean(&self) -> bool {
        let would_block = |socket: &TcpStream| matches!(socket.try_read(&mut [0]), Err(error) if error.kind() == std::io::ErrorKind::WouldBlock);
        self.since.elapsed() < KEPT_FOR && self.socket.as_ref().is_some_and(would_block)
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        self.socket.as_ref().inspect(|socket| relay::settle(socket));
    }
}

/// What is kept for one [`Key`].
#[derive(Debug, Default)]
struct Shelf(RefCell<Vec<Kept>>);

/// The shelves of one admitted target, by the server beyond: found once, and not for each request.
#[derive(Debug, Default)]
pub(super) struct Shelves(RefCell<Vec<(Option<SocketAddr>, Rc<Shelf>)>>);

/// The kept connections of one thread.
#[derive(Debug)]
pub(crate) struct AppPool {
    shelves: RefCell<HashMap<Key, Rc<Shelf>>>,
    /// Connections on all shelves.
    kept: Cell<usize>,
    max: usize,
}

impl AppPool {
    /// Keeps at most `max`.
    pub(crate) fn new(max: usize) -> Self {
        Self {
            shelves: RefCell::default(),
            kept: Cell::new(0),
            max,
        }
    }

    /// Closes all; whether there were any.
    pub(crate) fn clear(&self) -> bool {
        for shelf in self.shelves.borrow().values() {
            shelf.0.take();
        }
        self.kept.take() > 0
    }

    /// Closes what waited too long.
    pub(crate) fn sweep(&self) {
        let mut left = 0;
        self.shelves.borrow_mut().retain(|_, shelf| {
            let mut kept = shelf.0.borrow_mut();
            kept.retain(|kept| kept.since.elapsed() < KEPT_FOR);
            left += kept.len();
            !kept.is_empty() || Rc::strong_count(shelf) > 1
        });
        self.kept.set(left);
    }

    fn take(&self, shelf: &Shelf) -> Option<TcpStream> {
        let mut kept = shelf.0.borrow_mut();
        while let Some(mut last) = kept.pop() {
            self.kept.set(self.kept.get() - 1);
            if last.is_clean() {
                return last.socket.take();
            }
        }
        None
    }

    /// Whether it is kept.
    fn give(&self, shelf: &Shelf, socket: TcpStream) -> bool {
        let fresh = Kept {
            socket: Some(socket),
            since: Instant::now(),
        };
        let mut kept = shelf.0.borrow_mut();
        if self.kept.get() >= self.max || kept.len() >= KEPT_PER_KEY_MAX {
            return false;
        }
        kept.push(fresh);
        self.kept.set(self.kept.get() + 1);
        true
    }
}

/// Where connections of this peer to the target wait.
fn shelf(peer: &Peer, admitted: &Admitted, beyond: Option<SocketAddr>) -> Rc<Shelf> {
    let mut known = admitted.shelves.0.borrow_mut();
    if let Some((_, shelf)) = known.iter().find(|(server, _)| *server == beyond) {
        return Rc::clone(shelf);
    }
    let key = Key {
        caller: peer.id.clone(),
        server: admitted.server.clone(),
        port: admitted.permit.target().port,
        shown: peer.address,
        beyond,
    };
    let mut shelves = peer.thread().apps.shelves.borrow_mut();
    let shelf = Rc::clone(shelves.entry(key).or_default());
    known.push((beyond, Rc::clone(&shelf)));
    shelf
}

/// A kept connection for another request, if there is one.
pub(super) fn reuse(peer: &Peer, admitted: &Admitted) -> Option<TcpStream> {
    let thread = peer.thread();
    let beyond = front::turn(thread, admitted);
    let socket = thread.apps.take(&shelf(peer, admitted, beyond))?;
    front::took(thread, admitted, beyond);
    thread.metrics.app_reused.inc();
    Some(socket)
}

/// Keeps a connection on which an exchange ended cleanly.
pub(super) fn keep(peer: &Peer, admitted: &Admitted, socket: TcpStream) {
    let thread = peer.thread();
    let shelf = shelf(peer, admitted, front::server_of(admitted, &socket));
    if !thread.apps.give(&shelf, socket) {
        thread.metrics.limits.reached(Limit::KeptApps);
    }
}

/// Connects to the app of a permitted target as if from `shown`; where servers without an agent serve it, to one of
/// them, which sees this host.
///
/// # Errors
/// Why the app can not be had.
pub(super) async fn connect(
    thread: &Rc<Thread>,
    admitted: &Admitted,
    shown: IpAddr,
) -> Result<TcpStream, Reason> {
    if !admitted.beyond.is_empty() {
        return front::connect(thread, admitted).await;
    }
    let outcome = connect_here(thread, admitted, shown).await;
    let (target, server) = (admitted.permit.target(), &admitted.server);
    match &outcome {
        Ok(_) => thread.calls.taken(server, &target.service, target.port),
        Err(Reason::AppUnreachable) => {
            thread.calls.failed(server, &target.service, target.port);
        }
        // No word on the program.
        Err(_) => {}
    }
    outcome
}

async fn connect_here(
    thread: &Thread,
    admitted: &Admitted,
    shown: IpAddr,
) -> Result<TcpStream, Reason> {
    let port = admitted.permit.target().port;
    let target = listener(thread, &admitted.server, port, shown)?;
    let connect = thread.dialer.connect(target, shown);
    match tokio::time::timeout(thread.settings.connect, connect).await {
        Ok(Ok(socket)) => {
            relay::guard(&socket);
            thread.metrics.app_connections.inc();
            Ok(socket)
        }
        Ok(Err(error)) => {
            log::info!(app:% = target, shown:% = shown, account:% = admitted.server; "cannot connect to an app: {error}");
            if limits::is_shortage(&error) {
                return Err(thread.short_of(&error));
            }
            Err(Reason::AppUnreachable)
        }
        Err(_) => {
            thread.metrics.limits.reached(Limit::Connect);
            Err(Reason::AppUnreachable)
        }
    }
}

/// Where the workload listens on `port`. Another program there is refused, and both are named: what asks for a
/// service must never reach a stranger.
fn listener(
    thread: &Thread,
    server: &Account,
    port: u16,
    shown: IpAddr,
) -> Result<SocketAddr, Reason> {
    let listeners = thread.diag.borrow_mut().listeners(port).map_err(|error| {
        log::warn!("the kernel can not be asked who listens on port {port}: {error}");
        Reason::Internal
    })?;
    let view = thread.view();
    let mut stranger = None;
    let mut family = false;
    let owner_of = |listener: &Listener| {
        // Whose it is can not be told: then it is nobody's.
        view.owners
            .find(listener.uid, listener.cgroup)
            .unwrap_or(None)
    };
    for listener in &listeners {
        let owner = owner_of(listener);
        if owner != Some(server) {
            stranger = Some((listener, owner.cloned()));
            continue;
        }
        match target(listener, shown) {
            // Two programs may share a port by SO_REUSEPORT or by different addresses: whoever would answer
            // there must be the workload.
            Some(target)
                if listeners.iter().all(|other| {
                    !takes_over(other, listener, target) || owner_of(other) == Some(server)
                }) =>
            {
                return Ok(target);
            }
            Some(_) => stranger = Some((listener, None)),
            None => family = true,
        }
    }
    if let Some((listener, owner)) = stranger {
        let owner = owner.map_or_else(
            || "no workload".to_owned(),
            |account| format!("workload {account}"),
        );
        log::warn!(
            address:% = listener.address, uid = listener.uid, owner, expected:% = server;
            "another program listens on a service's port: calls are refused"
        );
        return Err(Reason::AppNotOwner);
    }
    Err(if family {
        Reason::AppFamily
    } else {
        Reason::AppUnreachable
    })
}

/// Whether `other` would get a connection to `target` before or instead of `own`.
fn takes_over(other: &Listener, own: &Listener, target: SocketAddr) -> bool {
    let specific = |listener: &Listener| !listener.address.ip().is_unspecified();
    other.answers(target) && (specific(other) || !specific(own))
}

/// An address that reaches `listener` in the family of `shown`.
fn target(listener: &Listener, shown: IpAddr) -> Option<SocketAddr> {
    let own = listener.address.ip();
    let own = match own {
        IpAddr::V6(v6) => v6.to_ipv4_mapped().map_or(own, IpAddr::V4),
        IpAddr::V4(_) => own,
    };
    let loopback = match shown {
        IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::LOCALHOST),
    };
    let ip = if own.is_unspecified() { loopback } else { own };
    let reached = ip.is_ipv4() == shown.is_ipv4()
        && listener.answers(SocketAddr::new(ip, listener.address.port()));
    reached.then(|| SocketAddr::new(ip, listener.address.port()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listening(address: &str, v6only: bool) -> Listener {
        Listener {
            address: address.parse().unwrap(),
            uid: 1,
            inode: 1,
            cgroup: None,
            v6only,
        }
    }

    #[test]
    fn an_app_is_reached_in_the_family_of_its_caller() {
        let v4: IpAddr = "10.0.0.1".parse().unwrap();
        let v6: IpAddr = "fd00::1".parse().unwrap();
        for (address, v6only, shown, expected) in [
            ("0.0.0.0:80", false, v4, Some("127.0.0.1:80")),
            ("127.0.0.1:80", false, v4, Some("127.0.0.1:80")),
            ("10.0.0.9:80", false, v4, Some("10.0.0.9:80")),
            ("[::]:80", false, v4, Some("127.0.0.1:80")),
            ("[::]:80", true, v4, None),
            ("[::1]:80", false, v4, None),
            ("[::]:80", true, v6, Some("[::1]:80")),
            ("0.0.0.0:80", false, v6, None),
        ] {
            let found = target(&listening(address, v6only), shown);
            assert_eq!(
                found,
                expected.map(|e| e.parse().unwrap()),
                "{address} {shown}"
            );
        }
    }

    #[test]
    fn a_more_specific_listener_takes_over() {
        let own = listening("0.0.0.0:80", false);
        let target = "127.0.0.1:80".parse().unwrap();
        assert!(takes_over(&listening("127.0.0.1:80", false), &own, target));
        assert!(
            takes_over(&listening("0.0.0.0:80", false), &own, target),
            "shared by SO_REUSEPORT"
        );
        assert!(!takes_over(&listening("10.0.0.1:80", false), &own, target));
        let specific = listening("127.0.0.1:80", false);
        assert!(!takes_over(&own, &specific, target));
    }
}
