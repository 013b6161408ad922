//! The way of an incoming connection: authenticate; then for each stream: what is asked, may the peer, connect,
//! relay. Read down.

use std::cell::{Cell, RefCell};
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_api::header::{Header, StreamKind};
use mesh_core::identity::{Identity, SpiffeId};
use mesh_core::names::Account;
use mesh_core::policy::{Permit, PolicySet, Target, authorize};
use mesh_core::reason::Reason;
use mesh_core::stream::{Limits, Side};
use mesh_runtime::mux::{self, MuxStream, StreamError};
use mesh_runtime::tls::leaf::read_leaf;
use mesh_runtime::tls::verify::handshake_reason;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use tokio::net::TcpStream;
use tokio::task::spawn_local;
use tokio_rustls::TlsAcceptor;

use crate::data::Thread;
use crate::metrics::{Direction, Flow, FlowLabels};
use crate::relay::{self, Activity, Local};
use crate::view::ViewReader;
use crate::workloads::WorkloadSet;

pub(crate) mod app;
mod auto;
mod http;

/// Refusals that one connection may log; the rest is only counted, so that a peer can not fill the log.
const LOGGED_MAX: u32 = 20;

/// How often a draining connection is looked at: its last stream's end closes it.
const DRAIN_LOOK: Duration = Duration::from_millis(20);

/// An authenticated peer: one TLS connection.
pub(crate) struct Peer {
    thread: Rc<Thread>,
    pub(crate) id: SpiffeId,
    /// The address of the connection: what the app sees.
    pub(crate) address: IpAddr,
    /// The workload of this host that the peer's SNI asked for.
    server: Account,
    server_id: String,
    /// The last decision: mostly the next one's too.
    decided: RefCell<Option<Decided>>,
    logged: Cell<u32>,
}

/// A decision, good while policies and workloads are the same.
struct Decided {
    header: Header,
    policies: Arc<PolicySet>,
    workloads: Arc<WorkloadSet>,
    admitted: Rc<Admitted>,
}

/// A stream that may go on to its app.
pub(crate) struct Admitted {
    pub(crate) permit: Permit,
    pub(crate) server: Account,
    pub(crate) flow: Arc<Flow>,
    allowed: prometheus_client::metrics::counter::Counter,
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
        view.leaves
            .workloads
            .get(&account)
            .map(|leaf| Arc::clone(&leaf.key))
    }
}

/// Serves one connection of a peer until it is over.
pub(crate) async fn serve(thread: &Rc<Thread>, socket: TcpStream, from: SocketAddr) {
    let handshake = TlsAcceptor::from(Arc::clone(&thread.mesh_tls)).accept(socket);
    let tls = match tokio::time::timeout(thread.settings.handshake, handshake).await {
        Ok(Ok(tls)) => tls,
        Ok(Err(error)) => return not_authenticated(thread, from, handshake_reason(&error), &error),
        Err(_) => return not_authenticated(thread, from, Reason::Timeout, &"no handshake in time"),
    };
    let (id, server) = match authenticated(thread, tls.get_ref().1) {
        Ok(both) => both,
        Err(reason) => return not_authenticated(thread, from, reason, &"after the handshake"),
    };
    let server_id = SpiffeId {
        trust_domain: id_domain(thread),
        identity: Identity::Workload(server.clone()),
    };
    let peer = Rc::new(Peer {
        thread: Rc::clone(thread),
        id,
        address: canonical(from.ip()),
        server,
        server_id: server_id.to_string(),
        decided: RefCell::new(None),
        logged: Cell::new(0),
    });
    let (mux, mut incoming, driver) = mux::connection(tls, Side::Server, Limits::DEFAULT);
    let driver = spawn_local(driver);
    thread.metrics.mesh_connections.inc();
    let mut draining = thread.draining.subscribe();
    let mut gone_away = false;
    loop {
        tokio::select! {
            stream = incoming.next() => {
                let Some((stream, header)) = stream else { break };
                let peer = Rc::clone(&peer);
                spawn_local(async move { peer.serve_stream(stream, &header).await });
            }
            _ = draining.wait_for(|draining| *draining), if !gone_away => {
                gone_away = true;
                mux.go_away(Reason::Draining);
            }
            () = tokio::time::sleep(DRAIN_LOOK), if gone_away => {
                if mux.open_streams() == 0 {
                    mux.close();
                }
            }
        }
    }
    thread.metrics.mesh_connections.dec();
    if let Ok(reason) = driver.await {
        log::debug!(peer:% = peer.id, reason:% = reason; "a peer's connection is over");
    }
}

fn id_domain(thread: &Thread) -> mesh_core::names::TrustDomain {
    thread.view.borrow().host.trust_domain.clone()
}

/// Who the peer is, and which workload it asked for. The chain was verified in the handshake.
fn authenticated(
    thread: &Thread,
    tls: &rustls::ServerConnection,
) -> Result<(SpiffeId, Account), Reason> {
    let leaf = tls
        .peer_certificates()
        .and_then(|chain| chain.first())
        .ok_or(Reason::NoCertificate)?;
    let facts = read_leaf(leaf)?;
    let name = tls.server_name().ok_or(Reason::UnknownServerName)?;
    let server =
        SpiffeId::account_of_sni(name, &id_domain(thread)).ok_or(Reason::UnknownServerName)?;
    Ok((facts.id, server))
}

fn not_authenticated(
    thread: &Thread,
    from: SocketAddr,
    reason: Reason,
    detail: &dyn std::fmt::Display,
) {
    thread.metrics.refused(Direction::Inbound, reason);
    log::info!(from:% = from, reason:% = reason; "refused a connection at the mesh port: {detail}");
}

impl Peer {
    async fn serve_stream(self: Rc<Self>, stream: MuxStream, header: &[u8]) {
        let (header, admitted) = match self.admit(header) {
            Ok(admitted) => admitted,
            Err((reason, what)) => return self.refuse(stream, reason, &what),
        };
        let activity = Activity::default();
        let way = async {
            match header.kind {
                StreamKind::Tcp => self.serve_tcp(&stream, &admitted, &activity).await,
                StreamKind::Http1 => {
                    http::serve(&self, &admitted, &stream, http::Begun::default(), &activity).await
                }
                StreamKind::Auto => auto::serve(&self, &admitted, &stream, &activity).await,
            }
        };
        let outcome = tokio::select! {
            outcome = Box::pin(way) => outcome,
            () = activity.ceased(self.thread.settings.idle) => Err(Reason::Timeout),
        };
        if let Err(reason) = outcome {
            let what = header.service.to_string();
            self.refuse(stream, reason, &what);
        }
    }

    /// What is asked, and may the peer have it?
    fn admit(&self, header: &[u8]) -> Result<(Header, Rc<Admitted>), (Reason, String)> {
        let header = Header::decode(header).map_err(|reason| (reason, "a header".to_owned()))?;
        let view = self.thread.view();
        let what = || {
            format!(
                "{}/{}:{}",
                self.server.namespace, header.service, header.port
            )
        };
        let policies = view
            .policies
            .as_ref()
            .ok_or_else(|| (Reason::PolicyUnknown, what()))?;
        if let Some(decided) = self.decided.borrow().as_ref()
            && decided.header == header
            && Arc::ptr_eq(&decided.policies, policies)
            && Arc::ptr_eq(&decided.workloads, &view.workloads)
        {
            decided.admitted.allowed.inc();
            return Ok((header, Rc::clone(&decided.admitted)));
        }
        let workload = view
            .workloads
            .workloads
            .iter()
            .find(|w| w.account == self.server);
        let services = workload.map(|w| w.services.as_slice()).unwrap_or_default();
        let service = services.iter().find(|s| s.name.name == header.service);
        let port = service.and_then(|service| Some((service, service.port(header.port)?)));
        let (service, port) = port.ok_or_else(|| (Reason::NoSuchPort, what()))?;
        let target = Target {
            service: service.name.clone(),
            port: port.number,
        };
        let metrics = &self.thread.metrics;
        let (src, dst) = (self.id.to_string(), service.name.to_string());
        let permit = authorize(policies, &self.id, target).map_err(|denial| {
            metrics
                .decision(&src, &dst, &denial.decided_by, "denied")
                .inc();
            (
                denial.reason,
                format!("{} (decided by {})", what(), denial.decided_by),
            )
        })?;
        let decision = if permit.audited() {
            "audited"
        } else {
            "allowed"
        };
        if permit.audited() {
            log::info!(src:% = self.id, dst:% = what(), rule = permit.rule(); "would be refused if enforce were on");
        }
        let allowed = metrics.decision(&src, &dst, permit.rule(), decision);
        allowed.inc();
        let flow = metrics.flow(&FlowLabels {
            direction: Direction::Inbound,
            src,
            dst,
            port: port.number,
            tls: self.server_id.clone(),
            protocol: port.protocol.as_str(),
        });
        let admitted = Rc::new(Admitted {
            permit,
            server: self.server.clone(),
            flow,
            allowed,
        });
        let (policies, workloads) = (Arc::clone(policies), Arc::clone(&view.workloads));
        let decided = Decided {
            header: header.clone(),
            policies,
            workloads,
            admitted: Rc::clone(&admitted),
        };
        *self.decided.borrow_mut() = Some(decided);
        Ok((header, admitted))
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
    admitted.flow.open.inc();
    let outcome = relay::relay(&mut app, stream, Local::Service, &admitted.flow, activity).await;
    admitted.flow.open.dec();
    admitted.flow.connection(outcome.is_ok());
    match outcome {
        Ok(()) => Ok(()),
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
