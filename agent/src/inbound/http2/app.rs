//! HTTP/2 connections to local apps: few for each caller, each carrying many requests at once.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::future::{Future as _, poll_fn};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsRawFd as _;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

use bytes::Bytes;
use h2::SendStream;
use h2::client::{ResponseFuture, SendRequest};
use http::Request;
use mesh_core::identity::SpiffeId;
use mesh_core::names::Account;
use mesh_core::reason::Reason;
use tokio::sync::{Mutex, Notify};
use tokio::task::spawn_local;

use super::super::app::connect;
use super::super::{Admitted, Peer, front};
use crate::http2::{self, APP_STREAMS_MAX, Begins, Watch, Watched};
use crate::limits::Limit;
use crate::metrics::{Direction, Metrics};
use crate::relay;

/// Connections to one app for one caller: an app that allows few requests on each gets more of them.
const CONNECTIONS_MAX: usize = 8;
/// Connections of one thread to apps. Above it those that carry nothing are closed before another is made.
const ALL_MAX: usize = 1024;
/// Requests that wait for a place in them; a caller that has more is refused.
const WAITING_MAX: usize = 1024;
/// A connection that carried nothing for so long is closed: less than the shortest idle time of servers (60 s).
const KEPT_FOR: Duration = Duration::from_secs(45);

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Key {
    /// The app may hold what it learns of a caller for true of the whole connection.
    caller: SpiffeId,
    server: Account,
    port: u16,
    shown: IpAddr,
    /// The server without an agent at the other end; `None`: an app of this host.
    beyond: Option<SocketAddr>,
}

/// The connections of one thread.
#[derive(Debug, Default)]
pub(crate) struct Connections(RefCell<HashMap<Key, Rc<Slot>>>);

/// The connections of one caller to one app, or to one server without an agent.
#[derive(Debug, Default)]
struct Slot {
    all: RefCell<Vec<Rc<Connection>>>,
    making: Mutex<()>,
    /// A request ended.
    freed: Notify,
    waiting: Cell<usize>,
}

#[derive(Debug)]
struct Connection {
    requests: SendRequest<Bytes>,
    watch: Rc<Watch>,
    live: Cell<usize>,
    /// Takes no more requests.
    retired: Cell<bool>,
    used: Cell<Instant>,
    state: Rc<State>,
}

/// What the task that drives a connection says of it.
#[derive(Debug, Default)]
struct State {
    /// The app's settings are known.
    ready: Cell<bool>,
    over: Cell<bool>,
    waiting: RefCell<Option<Waker>>,
}

/// A place for one request. Dropped, it is free for another.
#[derive(Debug)]
pub(super) struct Lease {
    connection: Rc<Connection>,
    slot: Rc<Slot>,
}

impl Connections {
    /// Closes what carried nothing for a while.
    pub(crate) fn sweep(&self) {
        self.close_idle(KEPT_FOR);
    }

    pub(crate) fn close_idle(&self, since: Duration) {
        self.0.borrow_mut().retain(|_, slot| {
            // Dropped, a connection without streams says farewell and ends.
            slot.all.borrow_mut().retain(|connection| {
                !connection.is_over()
                    && (connection.live.get() > 0 || connection.used.get().elapsed() < since)
            });
            Rc::strong_count(slot) > 1 || !slot.all.borrow().is_empty()
        });
    }

    fn slot(&self, key: Key) -> Rc<Slot> {
        Rc::clone(self.0.borrow_mut().entry(key).or_default())
    }

    /// Whether another connection may be made.
    fn has_room(&self) -> bool {
        let count = || -> usize { self.0.borrow().values().map(|s| s.all.borrow().len()).sum() };
        if count() < ALL_MAX {
            return true;
        }
        self.close_idle(Duration::ZERO);
        count() < ALL_MAX
    }
}

impl Connection {
    fn is_over(&self) -> bool {
        self.retired.get() || self.state.over.get()
    }

    fn has_room(&self) -> bool {
        let max = self.requests.current_max_send_streams();
        self.live.get() < max.min(APP_STREAMS_MAX)
    }
}

impl Slot {
    fn usable(self: &Rc<Self>) -> Option<Lease> {
        let mut all = self.all.borrow_mut();
        all.retain(|connection| !connection.is_over());
        let connection = all.iter().find(|connection| connection.has_room())?;
        Some(Lease::new(connection, self))
    }
}

impl Lease {
    fn new(connection: &Rc<Connection>, slot: &Rc<Slot>) -> Self {
        connection.live.set(connection.live.get() + 1);
        Self {
            connection: Rc::clone(connection),
            slot: Rc::clone(slot),
        }
    }

    /// Sends a request's head. `last`: it is all.
    pub(super) fn send(
        &self,
        request: Request<()>,
        last: bool,
    ) -> Result<(ResponseFuture, SendStream<Bytes>), h2::Error> {
        self.connection.watch.answered();
        self.connection.requests.clone().send_request(request, last)
    }

    /// Whether the app takes extended CONNECT.
    pub(super) fn takes_extended(&self) -> bool {
        self.connection
            .requests
            .is_extended_connect_protocol_enabled()
    }

    pub(super) fn watch(&self) -> &Rc<Watch> {
        &self.connection.watch
    }

    /// The connection takes no more requests; those that it has go on.
    pub(super) fn retire(&self) {
        self.connection.retired.set(true);
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.connection.live.set(self.connection.live.get() - 1);
        self.connection.used.set(Instant::now());
        self.slot.freed.notify_one();
    }
}

/// A place on a connection to the app.
///
/// # Errors
/// Why there is none.
pub(super) async fn lease(peer: &Peer, admitted: &Admitted) -> Result<Lease, Reason> {
    let thread = peer.thread();
    // Whose turn it is, is decided for each request.
    let beyond = front::turn(thread, admitted);
    let slot = thread.http2_apps.slot(key(peer, admitted, beyond));
    if let Some(lease) = slot.usable() {
        front::took(thread, admitted, beyond);
        thread.metrics.app_reused.inc();
        return Ok(lease);
    }
    if slot.waiting.get() >= WAITING_MAX {
        thread.reached(Limit::Http2Apps);
        return Err(Reason::Overloaded);
    }
    let _waiting = Waiting::begin(&slot);
    // Twice: a connection is made, and a place on another becomes free.
    let bound = thread.settings.connect * 2;
    let found = tokio::time::timeout(bound, find(peer, admitted, &slot)).await;
    found.unwrap_or_else(|_| {
        thread.reached(Limit::Http2Apps);
        Err(Reason::Overloaded)
    })
}

fn key(peer: &Peer, admitted: &Admitted, beyond: Option<SocketAddr>) -> Key {
    Key {
        caller: peer.id.clone(),
        server: admitted.server.clone(),
        port: admitted.permit.target().port,
        shown: peer.address,
        beyond,
    }
}

struct Waiting<'a>(&'a Slot);

impl<'a> Waiting<'a> {
    fn begin(slot: &'a Slot) -> Self {
        slot.waiting.set(slot.waiting.get() + 1);
        Self(slot)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.waiting.set(self.0.waiting.get() - 1);
    }
}

async fn find(peer: &Peer, admitted: &Admitted, slot: &Rc<Slot>) -> Result<Lease, Reason> {
    loop {
        let freed = slot.freed.notified();
        if let Some(lease) = slot.usable() {
            return Ok(lease);
        }
        if slot.all.borrow().len() >= CONNECTIONS_MAX {
            freed.await;
            continue;
        }
        let _making = slot.making.lock().await;
        // Another that waited here may have made one.
        if let Some(lease) = slot.usable() {
            return Ok(lease);
        }
        if slot.all.borrow().len() < CONNECTIONS_MAX {
            let (connection, beyond) = open(peer, admitted).await?;
            let connection = Rc::new(connection);
            // Not the server whose turn it was, if that did not take the connection.
            let made = &peer.thread().http2_apps.slot(key(peer, admitted, beyond));
            made.all.borrow_mut().push(Rc::clone(&connection));
            // The first on it has a place, whatever the app allows.
            return Ok(Lease::new(&connection, made));
        }
    }
}

/// Connects, and waits for the app's settings: they say how many requests it takes, and of which kind. With it comes
/// which server without an agent it leads to.
async fn open(
    peer: &Peer,
    admitted: &Admitted,
) -> Result<(Connection, Option<SocketAddr>), Reason> {
    let thread = peer.thread();
    if !thread.http2_apps.has_room() {
        thread.reached(Limit::Http2Apps);
        return Err(Reason::Overloaded);
    }
    let socket = connect(thread, admitted, peer.address).await?;
    let beyond = front::server_of(admitted, &socket);
    // A message says itself where it ends: an end of the connection never makes it look whole.
    relay::settle(&socket);
    // A server of another host may vanish; none of its calls knows the connection.
    let far = thread.quiet.watch();
    far.look_at(beyond.map(|_| socket.as_raw_fd()));
    let watch = Watch::new(Begins::Frames);
    let io = Watched::new(socket, Vec::new(), Rc::clone(&watch));
    let builder = http2::client(thread.settings.head_max);
    let (requests, mut connection) = builder.handshake(io).await.map_err(|error| {
        log::info!(account:% = admitted.server; "an app does not speak HTTP/2: {error}");
        Reason::AppReset
    })?;
    let state = Rc::<State>::default();
    let (driven, watched) = (Rc::clone(&state), Rc::clone(&watch));
    let (metrics, account) = (thread.metrics.clone(), admitted.server.clone());
    spawn_local(async move {
        let outcome = poll_fn(|cx| {
            let polled = Pin::new(&mut connection).poll(cx);
            if watched.has_settings() && !driven.ready.replace(true) {
                driven.wake();
            }
            let given_up =
                far.poll_over(cx, None).is_ready() || far.has_vanished() || watched.is_flooded();
            match polled {
                Poll::Pending if given_up => Poll::Ready(Ok(())),
                other => other,
            }
        })
        .await;
        driven.over.set(true);
        driven.wake();
        if watched.is_flooded() || outcome.as_ref().is_err_and(is_flood) {
            note_flood(&metrics, &account);
        } else if let Err(error) = outcome {
            log::debug!("an app's HTTP/2 connection is over: {error}");
        }
    });
    let settled = poll_fn(|cx| {
        if state.ready.get() || state.over.get() {
            return Poll::Ready(());
        }
        state.waiting.replace(Some(cx.waker().clone()));
        Poll::Pending
    });
    let settled = tokio::time::timeout(thread.settings.connect, settled).await;
    if settled.is_err() || state.over.get() {
        log::info!(account:% = admitted.server; "an app on an HTTP/2 port did not say its settings");
        return Err(Reason::HttpResponseMalformed);
    }
    let connection = Connection {
        requests,
        watch,
        live: Cell::new(0),
        retired: Cell::new(false),
        used: Cell::new(Instant::now()),
        state,
    };
    Ok((connection, beyond))
}

fn is_flood(error: &h2::Error) -> bool {
    error.is_library() && error.reason() == Some(h2::Reason::ENHANCE_YOUR_CALM)
}

fn note_flood(metrics: &Metrics, account: &Account) {
    metrics.limits.reached(Limit::Floods);
    metrics.refused(Direction::Inbound, Reason::HttpFlood);
    log::warn!(account:% = account, reason:% = Reason::HttpFlood; "an app's connection is ended: {}", Reason::HttpFlood.text());
}

impl State {
    fn wake(&self) {
        if let Some(waker) = self.waiting.take() {
            waker.wake();
        }
    }
}
