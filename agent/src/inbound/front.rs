//! The way on to servers without an agent, for services that this host fronts: in plaintext, from the host's own
//! address, to one of the addresses that the workload file lists. Only calls that were authorized here come by.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_core::names::ServiceName;
use mesh_core::reason::Reason;
use mesh_core::rotation::Rotation;
use socket2::{SockRef, TcpKeepalive};
use tokio::net::{TcpSocket, TcpStream};

use super::Admitted;
use crate::data::Thread;
use crate::health::Served;
use crate::limits;
use crate::relay;
use crate::workloads::WorkloadSet;

/// So many attempts share the time that is left, and no more: a third of the connect timeout outlives one lost SYN.
const SHARES: usize = 3;

/// Whose turn it is among the servers of each service, for one thread. As many as the host has services.
#[derive(Debug, Default)]
pub(crate) struct Fronts(RefCell<BTreeMap<Served, Rotation<SocketAddr>>>);

impl Fronts {
    /// Forgets services that are gone.
    pub(crate) fn sweep(&self, set: &WorkloadSet) {
        self.0.borrow_mut().retain(|(account, service), _| {
            let workload = set.workloads.iter().find(|w| w.account == *account);
            workload.is_some_and(|w| {
                w.services
                    .iter()
                    .any(|s| s.name == *service && s.is_fronted())
            })
        });
    }

    fn with<T>(&self, served: &Served, act: impl FnOnce(&mut Rotation<SocketAddr>) -> T) -> T {
        act(self.0.borrow_mut().entry(served.clone()).or_default())
    }
}

/// The server whose turn it is; `None` where an app of this host serves.
pub(super) fn turn(thread: &Thread, admitted: &Admitted) -> Option<SocketAddr> {
    if admitted.beyond.is_empty() {
        return None;
    }
    let served = served(admitted);
    let unfit = Arc::clone(&thread.view().unfit);
    thread.fronts.with(&served, |rotation| {
        let is_unfit = |server: &SocketAddr| unfit.contains(&(served.clone(), *server));
        rotation.turn(&admitted.beyond, is_unfit, Instant::now())
    })
}

/// A kept connection to `server` carries another call.
pub(super) fn took(thread: &Thread, admitted: &Admitted, server: Option<SocketAddr>) {
    if let Some(server) = server {
        let fronts = &thread.fronts;
        fronts.with(&served(admitted), |rotation| {
            rotation.took(&admitted.beyond, server);
        });
    }
}

/// Which server a connection goes to; `None` where an app of this host serves.
pub(super) fn server_of(admitted: &Admitted, socket: &TcpStream) -> Option<SocketAddr> {
    let fronted = !admitted.beyond.is_empty();
    fronted.then(|| socket.peer_addr().ok()).flatten()
}

fn served(admitted: &Admitted) -> Served {
    let service = admitted.permit.target().service.clone();
    (admitted.server.clone(), service)
}

/// Connects to one of the servers; the next one when it fails, until the connect timeout.
///
/// # Errors
/// When none takes the connection.
pub(super) async fn connect(thread: &Rc<Thread>, admitted: &Admitted) -> Result<TcpStream, Reason> {
    let served = served(admitted);
    let limit = thread.settings.connect;
    let until = Instant::now() + limit;
    let order = {
        let unfit = Arc::clone(&thread.view().unfit);
        thread.fronts.with(&served, |rotation| {
            let is_unfit = |server: &SocketAddr| unfit.contains(&(served.clone(), *server));
            rotation.order(&admitted.beyond, is_unfit, limit, Instant::now())
        })
    };
    for (tried, server) in order.iter().copied().enumerate() {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            break;
        }
        let attempt = attempt(
            server,
            &thread.settings.keepalive,
            share(left, order.len() - tried),
        )
        .await;
        thread.metrics.plaintext(&served.1, server, attempt.is_ok());
        match attempt {
            Ok(socket) => {
                thread
                    .fronts
                    .with(&served, |rotation| rotation.answered(server));
                relay::guard(&socket);
                thread.metrics.app_connections.inc();
                return Ok(socket);
            }
            Err(Failed::Here(error)) => {
                log::warn!(service:% = served.1; "no socket for a connection to a plaintext endpoint: {error}");
                return Err(thread.short_of(&error));
            }
            Err(Failed::There(error)) => {
                thread
                    .fronts
                    .with(&served, |rotation| rotation.failed(server, Instant::now()));
                tell(thread, &served.1, server, &error);
            }
        }
    }
    Err(Reason::AppUnreachable)
}

/// The time of one attempt, so that a server that does not answer leaves some to the others.
fn share(left: Duration, servers: usize) -> Duration {
    let shares = servers.clamp(1, SHARES);
    // At most three.
    left / u32::try_from(shares).unwrap_or(1)
}

fn tell(thread: &Thread, service: &ServiceName, server: SocketAddr, error: &io::Error) {
    if thread.refusals.borrow_mut().passes() {
        log::info!(service:% = service, endpoint:% = server; "cannot connect to a plaintext endpoint: {error}");
    }
}

/// Whose fault it is that there is no connection.
enum Failed {
    /// This process can have no socket.
    Here(io::Error),
    There(io::Error),
}

async fn attempt(
    server: SocketAddr,
    keepalive: &TcpKeepalive,
    limit: Duration,
) -> Result<TcpStream, Failed> {
    let socket = match server {
        SocketAddr::V4(_) => TcpSocket::new_v4(),
        SocketAddr::V6(_) => TcpSocket::new_v6(),
    };
    let socket = socket.map_err(Failed::Here)?;
    if limits::is_reserved(&socket) {
        return Err(Failed::Here(io::Error::from_raw_os_error(libc::EMFILE)));
    }
    let set = socket.set_nodelay(true);
    set.and_then(|()| relay::prepare(&SockRef::from(&socket), keepalive))
        .map_err(Failed::Here)?;
    let connected = tokio::time::timeout(limit, socket.connect(server)).await;
    let socket = connected
        .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
        .map_err(Failed::There)?;
    // The address came to this host after the file was read: whoever listens here was not checked to be the workload.
    if socket.local_addr().map_err(Failed::There)?.ip() == server.ip() {
        let message =
            "it is an address of this host now; name the program's owner instead of endpoints";
        return Err(Failed::There(io::Error::other(message)));
    }
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::TcpListener;

    #[test]
    fn no_server_uses_up_the_time_of_the_others() {
        let limit = Duration::from_secs(6);
        assert_eq!(share(limit, 1), limit);
        assert_eq!(share(limit, 2), limit / 2);
        for many in [3, 16] {
            assert_eq!(share(limit, many), limit / 3);
        }
    }

    #[tokio::test]
    async fn a_server_that_is_this_host_is_refused() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let refused = attempt(address, &TcpKeepalive::new(), Duration::from_secs(30)).await;
        match refused {
            Err(Failed::There(error)) => {
                assert!(error.to_string().contains("this host"), "{error}")
            }
            _ => panic!("it was taken"),
        }
    }
}
