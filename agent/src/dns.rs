//! The agent's DNS: answers the names of the mesh itself and hands everything else on unchanged.
//!
//! The life of a query: received → decided (`dns/answer.rs`) → answered, or forwarded (`dns/forward.rs`) to the
//! servers that stood in resolv.conf before the agent (`dns/resolv_conf.rs`). Names under the suffix never
//! leave the host. The index is kept on disk, so answering them never waits for control.
//!
//! How queries come here: `dns/wiring.rs` chooses a way, `dns/keeper.rs` keeps to it.

mod answer;
mod command;
mod counters;
mod dnsmasq;
mod forward;
pub(crate) mod keeper;
mod resolv_conf;
mod resolved;
pub(crate) mod wiring;
mod zones;

use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use mesh_core::service::Index;
use mesh_core::vip::VipRanges;
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::handing::Handing;

pub(crate) use answer::ZoneError;
use answer::{Decision, Zone};
pub(crate) use counters::Counters;
use counters::count;

/// Queries being forwarded at once, over all sockets: each holds a socket and at most a few KiB.
const IN_FLIGHT_MAX: usize = 1_000;
/// Open TCP connections of clients: stubs use TCP for truncated answers only, one query each.
const TCP_CLIENTS_MAX: usize = 100;
/// How long a TCP client may be silent, and a whole message may take.
const TCP_IDLE: Duration = Duration::from_secs(10);
/// Largest DNS message (RFC 1035 §4.2.2: a 16-bit length), in bytes.
const MESSAGE_MAX: usize = 65_535;
/// How long accepting pauses when the process is out of descriptors: the cause passes by itself.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What the responder answers for and whom it asks for the rest.
#[derive(Clone, Debug)]
pub(crate) struct Config {
    /// The suffix of mesh names, e.g. `mesh.internal`.
    pub(crate) suffix: String,
    /// Addresses whose reverse names are ours.
    pub(crate) ranges: VipRanges,
    /// Tried in this order; one that is ourselves is left out.
    pub(crate) upstreams: Vec<SocketAddr>,
}

/// The servers that the host's resolver has beside the agent.
pub(crate) fn upstreams(resolv_conf: &Path) -> Vec<SocketAddr> {
    resolv_conf::upstreams(resolv_conf).unwrap_or_else(|error| {
        log::warn!("whom to ask for other names is not known: {error}");
        Vec::new()
    })
}

/// The sockets to answer on, each bound to one address: the answer leaves from where the query came to.
#[derive(Debug, Default)]
pub(crate) struct Sockets {
    pub(crate) udp: Vec<std::net::UdpSocket>,
    pub(crate) tcp: Vec<std::net::TcpListener>,
}

/// The index as it is now: `None` until one was loaded from disk or came from control. Mesh names are
/// answered by SERVFAIL until then, since "no such name" would be believed.
pub(crate) type CurrentIndex = Box<dyn Fn() -> Option<Arc<Index>> + Send + Sync>;

/// The responder, before it has its sockets.
pub(crate) struct Dns {
    shared: Shared,
}

struct Shared {
    zone: Zone,
    index: CurrentIndex,
    upstreams: Vec<SocketAddr>,
    counters: Arc<Counters>,
    in_flight: Arc<Semaphore>,
    clients: Arc<Semaphore>,
}

impl Dns {
    pub(crate) fn new(config: Config, index: CurrentIndex) -> Result<Self, ZoneError> {
        let zone = Zone::new(&config.suffix, config.ranges)?;
        Ok(Self {
            shared: Shared {
                zone,
                index,
                upstreams: config.upstreams,
                counters: Arc::default(),
                in_flight: Arc::new(Semaphore::new(IN_FLIGHT_MAX)),
                clients: Arc::new(Semaphore::new(TCP_CLIENTS_MAX)),
            },
        })
    }

    pub(crate) fn counters(&self) -> Arc<Counters> {
        Arc::clone(&self.shared.counters)
    }

    /// Answers until `stop`. Fails when one of the sockets does.
    /// When another worker takes over, it reads on in the sockets, and what was asked here is answered here.
    pub(crate) async fn run(
        self,
        sockets: Sockets,
        handing: Handing,
        stop: CancellationToken,
    ) -> io::Result<()> {
        let mut shared = self.shared;
        let mut servers = JoinSet::new();
        let (mut udp, mut tcp) = (Vec::new(), Vec::new());
        for socket in sockets.udp {
            socket.set_nonblocking(true)?;
            let own = socket.local_addr()?;
            shared.upstreams.retain(|upstream| *upstream != own);
            udp.push(UdpSocket::from_std(socket)?);
        }
        for listener in sockets.tcp {
            listener.set_nonblocking(true)?;
            tcp.push(TcpListener::from_std(listener)?);
        }
        let shared = Arc::new(shared);
        for socket in udp {
            let served = serve_udp(Arc::clone(&shared), socket, handing.clone(), stop.clone());
            servers.spawn(served);
        }
        for listener in tcp {
            let served = serve_tcp(Arc::clone(&shared), listener, handing.clone(), stop.clone());
            servers.spawn(served);
        }
        while let Some(ended) = servers.join_next().await {
            ended.map_err(io::Error::other)??;
        }
        Ok(())
    }
}

async fn serve_udp(
    shared: Arc<Shared>,
    socket: UdpSocket,
    handing: Handing,
    stop: CancellationToken,
) -> io::Result<()> {
    let socket = Arc::new(socket);
    let mut forwards = JoinSet::new();
    let mut buffer = vec![0; MESSAGE_MAX];
    loop {
        let received = tokio::select! {
            () = stop.cancelled() => return Ok(()),
            () = handing.begun() => {
                finish(forwards, &stop).await;
                return Ok(());
            }
            Some(_) = forwards.join_next() => continue,
            received = socket.recv_from(&mut buffer) => received,
        };
        let (length, client) = match received {
            Ok(received) => received,
            Err(error) if is_passing(&error) => continue,
            Err(error) => return Err(error),
        };
        let query = &buffer[..length];
        match shared.decide(query) {
            Decision::Drop => (),
            // A client that went away, or a full socket buffer: it asks again.
            Decision::Answer(answer) => drop(socket.try_send_to(&answer, client)),
            Decision::Forward => match Arc::clone(&shared.in_flight).try_acquire_owned() {
                Err(_) => {
                    count(&shared.counters.overloaded);
                    if let Some(answer) = answer::server_failure(query) {
                        drop(socket.try_send_to(&answer, client));
                    }
                }
                Ok(permit) => {
                    let (shared, socket) = (Arc::clone(&shared), Arc::clone(&socket));
                    let query = query.to_vec();
                    forwards.spawn(async move {
                        let answer = forward::by_udp(&query, &shared.upstreams).await;
                        if let Some(answer) = shared.forwarded(&query, answer) {
                            drop(socket.send_to(&answer, client).await);
                        }
                        drop(permit);
                    });
                }
            },
        }
    }
}

async fn serve_tcp(
    shared: Arc<Shared>,
    listener: TcpListener,
    handing: Handing,
    stop: CancellationToken,
) -> io::Result<()> {
    let mut clients = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => return Ok(()),
            () = handing.begun() => {
                finish(clients, &stop).await;
                return Ok(());
            }
            Some(_) = clients.join_next() => continue,
            accepted = listener.accept() => accepted,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) if is_passing(&error) => continue,
            Err(error) => {
                log::warn!("accepting DNS clients by TCP failed: {error}; trying on");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let Ok(permit) = Arc::clone(&shared.clients).try_acquire_owned() else {
            count(&shared.counters.overloaded);
            continue;
        };
        let shared = Arc::clone(&shared);
        clients.spawn(async move {
            // Errors are the client's: it went away.
            drop(serve_client(&shared, stream).await);
            drop(permit);
        });
    }
}

/// Lets what was asked be answered; each has its own bound.
async fn finish(mut asked: JoinSet<()>, stop: &CancellationToken) {
    let all = async { while asked.join_next().await.is_some() {} };
    tokio::select! {
        () = all => (),
        () = stop.cancelled() => (),
    }
}

/// Answers the queries of one TCP connection, in their order (RFC 7766 §6.2.1.1 allows that).
async fn serve_client(shared: &Shared, mut stream: TcpStream) -> io::Result<()> {
    loop {
        let query = timeout(TCP_IDLE, forward::read_message(&mut stream)).await??;
        let answer = match shared.decide(&query) {
            Decision::Drop => return Ok(()),
            Decision::Answer(answer) => Some(answer),
            Decision::Forward => match shared.in_flight.try_acquire() {
                Err(_) => {
                    count(&shared.counters.overloaded);
                    answer::server_failure(&query)
                }
                Ok(_permit) => {
                    let answer = forward::by_tcp(&query, &shared.upstreams).await;
                    shared.forwarded(&query, answer)
                }
            },
        };
        let Some(answer) = answer else { return Ok(()) };
        timeout(TCP_IDLE, forward::write_message(&mut stream, &answer)).await??;
    }
}

impl Shared {
    fn decide(&self, query: &[u8]) -> Decision {
        let index = (self.index)();
        self.zone.decide(query, index.as_deref(), &self.counters)
    }

    /// The upstream's answer, or our own that there was none.
    fn forwarded(&self, query: &[u8], answer: Option<Vec<u8>>) -> Option<Vec<u8>> {
        count(&self.counters.forwarded);
        answer.or_else(|| {
            count(&self.counters.upstream_failed);
            answer::server_failure(query)
        })
    }
}

/// Errors that belong to one packet or client, not to the socket.
fn is_passing(error: &io::Error) -> bool {
    use io::ErrorKind as Kind;
    matches!(
        error.kind(),
        Kind::ConnectionRefused
            | Kind::ConnectionReset
            | Kind::ConnectionAborted
            | Kind::HostUnreachable
            | Kind::NetworkUnreachable
            | Kind::Interrupted
            | Kind::WouldBlock
    )
}

#[cfg(test)]
mod tests;
