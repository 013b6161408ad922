//! The way of an incoming connection: authenticate; then for each stream: what is asked, may the peer, connect,
//! relay. Read down.

use std::cell::{Cell, RefCell};
use std::net::{IpAddr, SocketAddr};
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ::http::HeaderValue;
use mesh_api::header::{Header, StreamKind};
use mesh_core::edge::EdgeVerdict;
use mesh_core::identity::{Identity, SpiffeId};
use mesh_core::names::Account;
use mesh_core::policy::{Permit, PolicySet, Target, authorize};
use mesh_core::reason::Reason;
use mesh_core::service::Protocol;
use mesh_core::stream::Side;
use mesh_runtime::mux::{self, Mux, MuxStream, StreamError};
use mesh_runtime::tls::handshake::{self, Handshaken};
use mesh_runtime::tls::leaf::{LeafFacts, read_leaf};
use mesh_runtime::tls::verify::handshake_reason;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use tokio::net::TcpStream;
use tokio::task::spawn_local;

use attended::Attended;
pub(crate) use hands::Hands;
use hands::Job;
pub(crate) use shares::Shares;
use shares::{Serving, Share};

use crate::data::Thread;
use crate::limits::Limit;
use crate::live::{self, Ends};
use crate::metrics::{DecisionCount, Direction, Flow, FlowLabels};
use crate::peers::unix_now_s;
use crate::relay::{self, Activity, Local, Open};
use crate::view::ViewReader;
use crate::workloads::WorkloadSet;

pub(crate) mod app;
mod attended;
mod auto;
pub(crate) mod front;
mod hands;
mod http;
pub(crate) mod http2;
mod shares;

/// Refusals that one connection may log; the rest is only counted, so that a peer can not fill the log.
const LOGGED_MAX: u32 = 20;

/// A connection that carried nothing for so long is closed. The calling side closes after 45 s at most.
const IDLE: Duration = Duration::from_secs(120);

/// An authenticated peer: one TLS connection.
pub(crate) struct Peer {
    thread: Rc<Thread>,
    pub(crate) id: SpiffeId,
    client_id: HeaderValue,
    /// The address of the connection: what the app sees.
    pub(crate) address: IpAddr,
    /// The workload of this host that the peer's SNI asked for.
    server: Account,
    server_id: String,
    /// The header line that tells an app who calls.
    client_line: String,
    /// The end of the peer's leaf, Unix seconds: it closes no connection, but opens no stream.
    not_after_s: i64,
    /// What was asked and admitted. As many as there are declared ports, at most.
    decided: RefCell<Vec<Rc<Admitted>>>,
    /// What the decisions rest on.
    basis: RefCell<(Option<Arc<PolicySet>>, Arc<WorkloadSet>)>,
    logged: Cell<u32>,
    /// Streams were opened since the last look.
    used: Cell<bool>,
    /// What its host may have of this one.
    share: Rc<Share>,
}

/// What a stream asked for and may have, good while policies and workloads are the same.
pub(crate) struct Admitted {
    /// The bytes of [`Self::header`]: another stream that asks with the same is not read again.
    asked: Vec<u8>,
    header: Header,
    pub(crate) permit: Permit,
    pub(crate) server: Account,
    /// Servers without an agent that serve it; none where an app of this host does.
    beyond: Rc<[SocketAddr]>,
    /// Where its connections to the app wait between two requests.
    shelves: app::Shelves,
    pub(crate) flow: Arc<Flow>,
    decision: DecisionCount,
    /// Policy changed its mind.
    revoked: Rc<Cell<bool>>,
}

/// A refusal by policy, for who counts and logs it.
struct Denied {
    target: Target,
    /// Which policies decided.
    by: String,
}

impl Admitted {
    /// A connection to what serves it, if that is another host.
    fn far<'a>(&self, socket: &'a TcpStream) -> Option<&'a TcpStream> {
        (!self.beyond.is_empty()).then_some(socket)
    }
}

/// Picks the certificate of the workload that the SNI names.
pub(crate) fn certificates(view: ViewReader) -> Arc<dyn ResolvesServerCert> {
    Arc::new(ByServerName(view))
}

#[derive(Debug)]
struct ByServerName(ViewReader);

impl ResolvesServerCert for ByServerName {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let view = self.0.borrow();
        let account = SpiffeId::account_of_sni(hello.server_name()?, &view.host.trust_domain)?;
        let identity = Identity::Workload(account);
        let leaf = match view.leaf(&identity) {
            // Whoever calls is refused by our verifier, with that reason; control is let in and finds the host there.
            Err(Reason::RevocationsUnknown) => view.leaves.of(&identity)?,
            found => found.ok()?,
        };
        Some(Arc::clone(&leaf.key))
    }
}

/// Serves one connection of a peer until it is over.
pub(crate) async fn serve(thread: &Rc<Thread>, socket: TcpStream, from: SocketAddr) {
    let Some(tls) = shake_hands(thread, socket, from).await else {
        return;
    };
    let (leaf, server) = match authenticated(thread, &tls) {
        Ok(both) => both,
        Err(reason) => return not_authenticated(thread, from, reason, &"after the handshake"),
    };
    let server_id = SpiffeId {
        trust_domain: id_domain(thread),
        identity: Identity::Workload(server.clone()),
    };
    // An id is an URI.
    let (id, not_after_s) = (leaf.id, leaf.not_after_s);
    let Ok(client_id) = HeaderValue::try_from(id.to_string()) else {
        return not_authenticated(thread, from, Reason::CertificateMalformed, &"its id");
    };
    let peer = Rc::new(Peer {
        thread: Rc::clone(thread),
        client_line: format!("{}: {id}", http::CLIENT_ID),
        client_id,
        id,
        address: canonical(from.ip()),
        server,
        server_id: server_id.to_string(),
        not_after_s,
        decided: RefCell::default(),
        basis: RefCell::default(),
        logged: Cell::new(0),
        used: Cell::new(true),
        share: thread.shares.of(leaf.host.as_ref()),
    });
    let settings = thread.mux_settings(peer.share.budget());
    let (mux, mut incoming, driver) = mux::connection(tls.stream, Side::Server, settings);
    let connected = peer.share.connected(thread);
    if connected.is_none() {
        thread.shed(Limit::Peers, Direction::Inbound);
        mux.end(Reason::Overloaded);
    }
    let driver = spawn_local(driver);
    // Control's own certificate is of no host.
    let entered = leaf.host.map(|host| {
        let ends = Ends {
            direction: Direction::Inbound,
            ours: Identity::Workload(peer.server.clone()),
            theirs: peer.id.identity.clone(),
            host,
        };
        live::enter(thread, &mux, ends)
    });
    thread.metrics.mesh_connections.inc();
    let live = Rc::new(Cell::new(0));
    let mut watched = pin!(peer.watch(&mux));
    loop {
        let next = tokio::select! {
            biased;
            next = incoming.next() => next,
            () = &mut watched => None,
        };
        let Some((stream, header)) = next else { break };
        peer.used.set(true);
        let Some(serving) = Serving::begin(&peer, &live) else {
            peer.refuse(stream, Reason::Overloaded, "a stream");
            continue;
        };
        match peer.admit(&header) {
            Ok(admitted) => hands::serve(
                thread,
                Job {
                    peer: Rc::clone(&peer),
                    stream,
                    admitted,
                    serving,
                },
            ),
            Err((reason, what)) => peer.refuse(stream, reason, &what),
        }
    }
    thread.metrics.mesh_connections.dec();
    drop(entered);
    let outcome = driver.await;
    drop(connected);
    thread.metrics.limits.note_end(&mux);
    if let Ok(reason) = outcome {
        log::debug!(peer:% = peer.id, reason:% = reason; "a peer's connection is over");
    }
}

/// The TLS handshake, which is bounded for each address; `None` when it failed, which is said.
async fn shake_hands(
    thread: &Rc<Thread>,
    socket: TcpStream,
    from: SocketAddr,
) -> Option<Handshaken> {
    crate::peers::watch_silence(&socket);
    let address = canonical(from.ip());
    if !thread.handshakes.borrow_mut().begin(address) {
        thread.shed(Limit::Handshakes, Direction::Inbound);
        relay::abort(socket);
        return None;
    }
    let handshake = handshake::accept(&thread.mesh_tls, socket);
    let shaken = tokio::time::timeout(thread.settings.handshake, handshake).await;
    thread.handshakes.borrow_mut().end(address);
    match shaken {
        Ok(Ok(tls)) => return Some(tls),
        Ok(Err(error)) => {
            let reason = handshake_reason(&error);
            // Of what our verifier refused, the library can only say in which of its variants it came.
            match reason {
                Reason::NotTls | Reason::PeerHandshake | Reason::PeerUnreachable => {
                    not_authenticated(thread, from, reason, &error)
                }
                known => not_authenticated(thread, from, known, &known.text()),
            }
        }
        Err(_) => {
            thread.metrics.limits.reached(Limit::Handshake);
            not_authenticated(thread, from, Reason::Timeout, &"no handshake in time");
        }
    }
    None
}

fn id_domain(thread: &Thread) -> mesh_core::names::TrustDomain {
    thread.view.borrow().host.trust_domain.clone()
}

/// Who the peer is, and which workload it asked for. The chain was verified in the handshake.
fn authenticated(thread: &Thread, tls: &Handshaken) -> Result<(LeafFacts, Account), Reason> {
    let leaf = tls.peer.as_ref().ok_or(Reason::NoCertificate)?;
    let facts = read_leaf(leaf)?;
    let name = tls
        .server_name
        .as_deref()
        .ok_or(Reason::UnknownServerName)?;
    let server =
        SpiffeId::account_of_sni(name, &id_domain(thread)).ok_or(Reason::UnknownServerName)?;
    Ok((facts, server))
}

fn not_authenticated(
    thread: &Thread,
    from: SocketAddr,
    reason: Reason,
    detail: &dyn std::fmt::Display,
) {
    thread.metrics.refused(Direction::Inbound, reason);
    if thread.refusals.borrow_mut().passes() {
        log::info!(from:% = from, reason:% = reason; "refused a connection at the mesh port: {detail}");
    }
}

impl Peer {
    /// Heeds what else bears on the connection: changes of policy, draining, silence. Never completes.
    async fn watch(&self, mux: &Mux) {
        let mut draining = self.thread.draining.subscribe();
        let mut view = self.thread.view.clone();
        let mut idle = tokio::time::interval(IDLE);
        let mut retired = false;
        loop {
            tokio::select! {
                Ok(()) = view.changed() => self.decide_again(),
                _ = draining.wait_for(|draining| *draining), if !retired => {
                    retired = true;
                    mux.retire(Reason::Draining);
                }
                _ = idle.tick(), if !retired => {
                    if mux.open_streams() == 0 && !self.used.replace(false) {
                        retired = true;
                        mux.retire(Reason::Draining);
                    }
                }
            }
        }
    }

    async fn serve_stream(
        self: &Rc<Self>,
        stream: MuxStream,
        admitted: &Rc<Admitted>,
        activity: &Activity,
        buffers: &mut http::Buffers,
    ) {
        let attended = Attended {
            peer: self,
            stream: &stream,
            admitted,
            activity,
        };
        // The task has room for a request; what other kinds of stream keep is in a box of its own.
        let outcome = match admitted.header.kind {
            StreamKind::Http1 => {
                let way = http::serve(self, admitted, &stream, (None, buffers), activity);
                attended.run(pin!(way), true).await
            }
            StreamKind::Auto => {
                let way = auto::serve(self, admitted, &stream, activity);
                attended.run(Box::pin(way).as_mut(), true).await
            }
            StreamKind::Tcp => {
                let way = self.serve_tcp(&stream, admitted, activity);
                attended.run(Box::pin(way).as_mut(), false).await
            }
            StreamKind::Http2 => {
                let way = http2::serve(self, admitted, &stream, activity);
                attended.run(Box::pin(way).as_mut(), false).await
            }
        };
        if let Err(reason) = outcome {
            let what = admitted.header.service.to_string();
            self.refuse(stream, reason, &what);
        }
    }

    /// What is asked, and may the peer have it?
    fn admit(&self, asked: &[u8]) -> Result<Rc<Admitted>, (Reason, String)> {
        let valid = self.not_after_s > unix_now_s();
        self.decide_again();
        let known = |is: &dyn Fn(&Admitted) -> bool| {
            let decided = self.decided.borrow();
            let known = decided.iter().find(|known| is(known))?;
            known.decision.count();
            Some(Rc::clone(known))
        };
        if valid && let Some(known) = known(&|known| known.asked == asked) {
            return Ok(known);
        }
        let header = Header::decode(asked).map_err(|reason| (reason, "a header".to_owned()))?;
        if !valid {
            return Err((Reason::CertificateExpired, self.what(&header)));
        }
        // The same question may be asked in many forms.
        if let Some(known) = known(&|known| known.header == header) {
            return Ok(known);
        }
        let admitted = Rc::new(self.decide(&header, asked).map_err(|(reason, denial)| {
            let mut what = self.what(&header);
            if let Some(denied) = denial {
                let metrics = &self.thread.metrics;
                metrics
                    .decision(&self.id, &denied.target, &denied.by, EdgeVerdict::Refused)
                    .count();
                what = format!("{what} (decided by {})", denied.by);
            }
            (reason, what)
        })?);
        admitted.decision.count();
        self.decided.borrow_mut().push(Rc::clone(&admitted));
        Ok(admitted)
    }

    fn what(&self, header: &Header) -> String {
        format!(
            "{}/{}:{}",
            self.server.namespace, header.service, header.port
        )
    }

    /// When policies or workloads are others, all that was admitted is judged anew; what is no longer allowed ends.
    fn decide_again(&self) {
        let view = self.thread.view();
        {
            let (policies, workloads) = &*self.basis.borrow();
            let same = match (policies, &view.policies) {
                (Some(old), Some(new)) => Arc::ptr_eq(old, new),
                (None, None) => true,
                _ => false,
            };
            if same && Arc::ptr_eq(workloads, &view.workloads) {
                return;
            }
        }
        *self.basis.borrow_mut() = (view.policies.clone(), Arc::clone(&view.workloads));
        let mut revoked_some = false;
        self.decided.borrow_mut().retain_mut(|known| {
            match self.decide(&known.header, &known.asked) {
                Ok(now) => {
                    // Another rule decides, or it is served elsewhere now: new calls are counted and go by that. What is open
                    // stays as it began, and is cut with the rest if need be.
                    if now.beyond != known.beyond || now.permit != known.permit {
                        let revoked = Rc::clone(&known.revoked);
                        *known = Rc::new(Admitted { revoked, ..now });
                    }
                    true
                }
                Err(_) => {
                    known.revoked.set(true);
                    revoked_some = true;
                    false
                }
            }
        });
        if revoked_some {
            self.thread.quiet.wake_all();
        }
    }

    /// Judges by the policies of now, and counts nothing: what is open is judged too. With a refusal comes which policy
    /// decided.
    fn decide(&self, header: &Header, asked: &[u8]) -> Result<Admitted, (Reason, Option<Denied>)> {
        let view = self.thread.view();
        let policies = view
            .policies
            .as_ref()
            .ok_or((Reason::PolicyUnknown, None))?;
        let workload = view
            .workloads
            .workloads
            .iter()
            .find(|w| w.account == self.server);
        let services = workload.map(|w| w.services.as_slice()).unwrap_or_default();
        let service = services.iter().find(|s| s.name.name == header.service);
        let port = service.and_then(|service| Some((service, service.port(header.port)?)));
        let (service, port) = port.ok_or((Reason::NoSuchPort, None))?;
        // How the bytes are read is the declaration's to say: a peer that could choose would pass HTTP as bytes.
        let fits = match header.kind {
            StreamKind::Tcp => port.protocol == Protocol::Tcp,
            StreamKind::Http2 => {
                matches!(
                    port.protocol,
                    Protocol::Http2 | Protocol::Grpc | Protocol::Auto
                )
            }
            StreamKind::Http1 => matches!(port.protocol, Protocol::Http | Protocol::Auto),
            StreamKind::Auto => port.protocol == Protocol::Auto,
        };
        if !fits {
            return Err((Reason::HeaderMalformed, None));
        }
        let target = Target {
            service: service.name.clone(),
            port: port.number,
        };
        let metrics = &self.thread.metrics;
        let (src, dst) = (self.id.to_string(), service.name.to_string());
        let permit = authorize(policies, &self.id, target.clone()).map_err(|denial| {
            let (target, by) = (target.clone(), denial.decided_by);
            (denial.reason, Some(Denied { target, by }))
        })?;
        let verdict = if permit.audited() {
            EdgeVerdict::Audited
        } else {
            EdgeVerdict::Passed
        };
        if permit.audited() {
            log::info!(src:% = self.id, dst = self.what(header), rule = permit.rule(); "would be refused if enforce were on");
        }
        let decision = metrics.decision(&self.id, &target, permit.rule(), verdict);
        let flow = metrics.flow(&FlowLabels {
            direction: Direction::Inbound,
            src,
            dst,
            port: port.number,
            tls: self.server_id.clone(),
            protocol: port.protocol.as_str(),
        });
        Ok(Admitted {
            asked: asked.to_vec(),
            header: header.clone(),
            permit,
            server: self.server.clone(),
            beyond: service.endpoints.as_slice().into(),
            shelves: app::Shelves::default(),
            flow,
            decision,
            revoked: Rc::default(),
        })
    }

    async fn serve_tcp(
        &self,
        stream: &MuxStream,
        admitted: &Admitted,
        activity: &Activity,
    ) -> Result<(), Reason> {
        let begun = Instant::now();
        let app = app::connect(&self.thread, admitted, self.address).await?;
        stream.accept();
        admitted.flow.connected(begun.elapsed().as_secs_f64());
        carry(app, stream, admitted, activity).await
    }

    fn refuse(&self, stream: MuxStream, reason: Reason, what: &str) {
        self.thread.metrics.refused(Direction::Inbound, reason);
        stream.reset(reason);
        let logged = self.logged.get();
        if logged < LOGGED_MAX {
            self.logged.set(logged + 1);
            log::info!(
                src:% = self.id, dst = self.server_id.as_str(), what, reason:% = reason;
                "refused a call: {}", reason.text()
            );
        }
    }

    /// What the app learns of the caller.
    pub(crate) fn client_id(&self) -> &HeaderValue {
        &self.client_id
    }

    pub(crate) fn thread(&self) -> &Rc<Thread> {
        &self.thread
    }
}

/// Relays between an app and a stream until both ends are through.
async fn carry(
    mut app: TcpStream,
    stream: &MuxStream,
    admitted: &Admitted,
    activity: &Activity,
) -> Result<(), Reason> {
    let open = Open::count(&admitted.flow.open);
    activity.look_at(admitted.far(&app));
    let outcome = relay::relay(&mut app, stream, Local::Service, &admitted.flow, activity).await;
    drop(open);
    admitted.flow.connection(outcome.is_ok());
    match outcome {
        Ok(()) => {
            relay::settle(&app);
            Ok(())
        }
        // The caller's side ended it; the app must not take that for a proper end.
        Err(StreamError::Reset(reason)) => {
            log::debug!("a caller's stream was reset: {reason}");
            relay::abort(app);
            Ok(())
        }
        Err(StreamError::Local(error)) => {
            log::debug!("an app's connection broke: {error}");
            Err(Reason::AppReset)
        }
    }
}

fn canonical(ip: IpAddr) -> IpAddr {
    match ip {
        IpAddr::V6(v6) => v6.to_ipv4_mapped().map_or(ip, IpAddr::V4),
        IpAddr::V4(_) => ip,
    }
}
