//! Connections to other agents: one a (client identity, endpoint), made at first use and kept while it is used.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::future::poll_fn;
use std::net::SocketAddr;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use futures_util::TryFutureExt as _;
use futures_util::future::select_ok;
use mesh_core::identity::Identity;
use mesh_core::reason::Reason;
use mesh_core::stream::Side;
use mesh_runtime::mux::{self, Mux, MuxStream, Room};
use mesh_runtime::tls::handshake;
use mesh_runtime::tls::leaf::read_leaf;
use mesh_runtime::tls::verify::handshake_reason;
use rustls_pki_types::ServerName;
use socket2::SockRef;
use tokio::net::TcpStream;
use tokio::sync::Mutex;
use tokio::task::spawn_local;

use crate::call::EndpointKey;
use crate::data::Thread;
use crate::limits::{self, Limit};
use crate::live::{self, Ends};
use crate::metrics::Direction;
use crate::view::Leaf;

/// Connections to one endpoint as one identity. A second one is made when the first has as many streams as the peer
/// bears, or when readers that stand still hold its credit, so that they hold back nobody else.
const CONNECTIONS_MAX: usize = 4;
/// Data that a peer does not acknowledge for so long ends the connection: its host is gone without a word.
const SILENT_MAX: Duration = Duration::from_secs(10);

/// Sweeps that a connection without streams survives: at least 30 s of quiet.
const IDLE_SWEEPS: u32 = 3;

/// Who calls, and where.
type PeerKey = (Identity, Rc<EndpointKey>);

/// The connections of one thread.
#[derive(Debug, Default)]
pub(crate) struct Peers {
    places: RefCell<HashMap<PeerKey, Place>>,
    open: Cell<usize>,
}

/// Where the connections to one endpoint as one identity are. Who calls often keeps it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Place(Rc<Slot>);

impl Place {
    /// Nobody used it for a while: another takes its place.
    pub(crate) fn is_gone(&self) -> bool {
        self.0.gone.get()
    }
}

/// Those who need a connection while it is being made wait on `making`.
#[derive(Debug, Default)]
struct Slot {
    live: RefCell<Vec<Live>>,
    making: Mutex<()>,
    /// When making it failed last, and why: those who waited for it share the answer.
    failed: Cell<Option<(Instant, Reason)>>,
    idle_sweeps: Cell<u32>,
    gone: Cell<bool>,
}

#[derive(Debug)]
struct Live {
    mux: Mux,
    leaf: Arc<Leaf>,
}

impl Slot {
    /// The best connection that was made with the leaf of today, unless another one should be made.
    fn usable(&self, leaf: &Arc<Leaf>) -> Option<Usable> {
        let mut live = self.live.borrow_mut();
        live.retain(|current| {
            let good = current.mux.room() != Room::Over && Arc::ptr_eq(&current.leaf, leaf);
            if !good {
                // Renewed, or told to go: it carries its streams to their end.
                current.mux.retire(Reason::Draining);
            }
            good
        });
        let best = live.iter().min_by_key(|current| current.mux.room())?;
        let room = best.mux.room();
        if room != Room::Free && live.len() < CONNECTIONS_MAX {
            return None;
        }
        self.idle_sweeps.set(0);
        Some(match room {
            Room::Full => Usable::Full(live.iter().map(|live| live.mux.clone()).collect()),
            _ => Usable::One(best.mux.clone()),
        })
    }
}

/// Where a stream can be opened.
#[derive(Debug)]
pub(crate) enum Usable {
    One(Mux),
    /// All have as many streams as their peer bears: the first that has room again takes it.
    Full(Vec<Mux>),
}

impl Usable {
    /// Opens a stream; waits for room for as long as making a connection may take.
    pub(crate) async fn open(&self, thread: &Thread, header: &[u8]) -> Result<MuxStream, Reason> {
        let limit = thread.settings.connect;
        let opened = match self {
            Self::One(mux) => within(limit, mux.open(header)).await,
            Self::Full(all) => {
                let opening = all.iter().map(|mux| Box::pin(mux.open(header)));
                let first = select_ok(opening).map_ok(|(stream, _)| stream);
                within(limit, first).await
            }
        };
        opened.unwrap_or_else(|| Err(self.why_stuck(thread)))
    }

    /// Why none took a stream in time.
    fn why_stuck(&self, thread: &Thread) -> Reason {
        let all = match self {
            Self::One(mux) => std::slice::from_ref(mux),
            Self::Full(all) => all,
        };
        if all.iter().all(|mux| !mux.is_ready()) {
            thread.metrics.limits.reached(Limit::Handshake);
            Reason::PeerHandshake
        } else if all.iter().any(|mux| mux.room() == Room::Full) {
            thread.metrics.limits.reached(Limit::Streams);
            Reason::Overloaded
        } else {
            // What is written does not leave.
            thread.metrics.limits.reached(Limit::Connect);
            Reason::PeerLost
        }
    }
}

/// What `future` gives within `limit`. What is ready at once costs no timer.
async fn within<T>(limit: Duration, future: impl Future<Output = T>) -> Option<T> {
    let mut future = pin!(future);
    let at_once = poll_fn(|cx| Poll::Ready(future.as_mut().poll(cx))).await;
    match at_once {
        Poll::Ready(ready) => Some(ready),
        Poll::Pending => tokio::time::timeout(limit, future).await.ok(),
    }
}

/// A connection to `endpoint`, whose place this is, as the identity of `leaf`.
///
/// # Errors
/// Why there is none.
pub(crate) async fn connection(
    thread: &Rc<Thread>,
    place: &Place,
    leaf: &Arc<Leaf>,
    endpoint: &Rc<EndpointKey>,
) -> Result<Usable, Reason> {
    if leaf.not_after_s <= unix_now_s() {
        return Err(Reason::NoIdentity);
    }
    let slot = &place.0;
    if let Some(usable) = slot.usable(leaf) {
        return Ok(usable);
    }
    let asked = Instant::now();
    let _making = slot.making.lock().await;
    if let Some(usable) = slot.usable(leaf) {
        return Ok(usable);
    }
    if let Some((at, reason)) = slot.failed.get()
        && at >= asked
    {
        return Err(reason);
    }
    match dial(thread, leaf, endpoint).await {
        Ok(mux) => {
            slot.live.borrow_mut().push(Live {
                mux: mux.clone(),
                leaf: Arc::clone(leaf),
            });
            Ok(Usable::One(mux))
        }
        Err(reason) => {
            slot.failed.set(Some((Instant::now(), reason)));
            Err(reason)
        }
    }
}

impl Peers {
    /// Where connections to `endpoint` as `identity` are, or will be.
    pub(crate) fn place(&self, identity: &Identity, endpoint: &Rc<EndpointKey>) -> Place {
        let key = (identity.clone(), Rc::clone(endpoint));
        self.places.borrow_mut().entry(key).or_default().clone()
    }

    /// Closes connections that carried nothing for some sweeps, and forgets those that are over.
    pub(crate) fn sweep(&self) {
        self.places.borrow_mut().retain(|_, Place(slot)| {
            if slot.making.try_lock().is_err() {
                return true;
            }
            let mut live = slot.live.borrow_mut();
            live.retain(|live| live.mux.closed().is_none());
            if live.iter().any(|live| live.mux.open_streams() > 0) {
                slot.idle_sweeps.set(0);
                return true;
            }
            slot.idle_sweeps.set(slot.idle_sweeps.get() + 1);
            if !live.is_empty() && slot.idle_sweeps.get() < IDLE_SWEEPS {
                return true;
            }
            live.iter().for_each(|live| live.mux.close());
            slot.gone.set(true);
            false
        });
    }

    /// Closes what carries no stream.
    pub(crate) fn close_idle(&self) {
        for place in self.places.borrow().values() {
            for live in place
                .0
                .live
                .borrow()
                .iter()
                .filter(|live| live.mux.is_idle())
            {
                live.mux.close();
            }
        }
    }
}

async fn dial(
    thread: &Rc<Thread>,
    leaf: &Arc<Leaf>,
    endpoint: &Rc<EndpointKey>,
) -> Result<Mux, Reason> {
    let address = SocketAddr::new(endpoint.address, endpoint.mesh_port);
    let log_failure = |reason: Reason, detail: &dyn std::fmt::Display| {
        log::debug!(
            peer:% = address, client:% = leaf.id, server:% = endpoint.account, reason:% = reason;
            "cannot reach a peer: {detail}"
        );
        reason
    };
    let dialled = Dialled::begin(thread).ok_or(Reason::Overloaded)?;
    let connected =
        tokio::time::timeout(thread.settings.connect, TcpStream::connect(address)).await;
    let socket = match connected {
        Ok(Ok(socket)) if limits::is_reserved(&socket) => {
            let error = std::io::Error::from_raw_os_error(libc::EMFILE);
            return Err(log_failure(thread.short_of(&error), &error));
        }
        Ok(Ok(socket)) => socket,
        Ok(Err(error)) if limits::is_shortage(&error) => {
            return Err(log_failure(thread.short_of(&error), &error));
        }
        Ok(Err(error)) => {
            let reason = match error.kind() {
                // It took the connection, and sheds it: whoever does not listen refuses instead.
                std::io::ErrorKind::ConnectionReset => Reason::PeerHandshake,
                _ => Reason::PeerUnreachable,
            };
            return Err(log_failure(reason, &error));
        }
        Err(_) => {
            thread.metrics.limits.reached(Limit::Connect);
            return Err(log_failure(Reason::PeerUnreachable, &"no answer in time"));
        }
    };
    socket
        .set_nodelay(true)
        .map_err(|error| log_failure(Reason::PeerUnreachable, &error))?;
    watch_silence(&socket);
    let name = endpoint.sni(&leaf.id.trust_domain);
    let name =
        ServerName::try_from(name).map_err(|error| log_failure(Reason::PeerIdentity, &error))?;
    let handshake = handshake::connect(Arc::clone(&leaf.client), name, socket);
    let tls = match tokio::time::timeout(thread.settings.handshake, handshake).await {
        Ok(Ok(tls)) => tls,
        Ok(Err(error)) => {
            let reason = match handshake_reason(&error) {
                reason @ (Reason::PeerIdentity
                | Reason::PeerRevoked
                | Reason::CertificateExpired) => reason,
                _ => Reason::PeerHandshake,
            };
            return Err(log_failure(reason, &error));
        }
        Err(_) => {
            thread.metrics.limits.reached(Limit::Handshake);
            return Err(log_failure(Reason::PeerHandshake, &"no handshake in time"));
        }
    };
    let facts = tls.peer.as_ref().map(|leaf| read_leaf(leaf)).transpose()?;
    if facts.and_then(|facts| facts.host).as_ref() != Some(&endpoint.host) {
        return Err(log_failure(
            Reason::PeerIdentity,
            &"the leaf was given to another host",
        ));
    }
    let settings = thread.mux_settings(&thread.metrics.limits.budget);
    let (mux, _, driver) = mux::connection(tls.stream, Side::Client, settings);
    let ends = Ends {
        direction: Direction::Outbound,
        ours: leaf.id.identity.clone(),
        theirs: Identity::Workload(endpoint.account.clone()),
        host: endpoint.host.clone(),
    };
    let entered = live::enter(thread, &mux, ends);
    let (metrics, ended) = (Arc::clone(&thread.metrics), mux.clone());
    metrics.mesh_connections.inc();
    spawn_local(async move {
        driver.await;
        metrics.mesh_connections.dec();
        metrics.limits.note_end(&ended);
        drop((entered, dialled));
    });
    Ok(mux)
}

/// A connection to another agent, counted from its first packet to its end.
#[derive(Debug)]
struct Dialled(Rc<Thread>);

impl Dialled {
    /// `None` when there are as many as may be, and idle ones were given up for the next call.
    fn begin(thread: &Rc<Thread>) -> Option<Self> {
        let open = &thread.peers.open;
        if open.get() >= thread.share {
            thread.give_up_idle();
            thread.reached(Limit::Dialled);
            return None;
        }
        open.set(open.get() + 1);
        thread.metrics.limits.dialled.inc();
        Some(Self(Rc::clone(thread)))
    }
}

impl Drop for Dialled {
    fn drop(&mut self) {
        let open = &self.0.peers.open;
        open.set(open.get() - 1);
        self.0.metrics.limits.dialled.dec();
    }
}

/// Lets the kernel end a mesh connection whose other host went away without a word.
pub(crate) fn watch_silence(socket: &TcpStream) {
    let set = SockRef::from(socket).set_tcp_user_timeout(Some(SILENT_MAX));
    if let Err(error) = set {
        log::debug!("cannot bound a peer's silence: {error}");
    }
}

/// Unix time, seconds, as certificates count it.
pub(crate) fn unix_now_s() -> i64 {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    i64::try_from(now.as_secs()).unwrap_or(i64::MAX)
}
