//! The one port: TLS 1.3 with optional client certificates, and behind it gRPC for agents and JSON for
//! operators.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use axum::Router;
use http::Request;
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use mesh_api::proto::mesh_server::MeshServer;
use mesh_core::identity::{Identity, SpiffeId};
use mesh_core::reason::Reason;
use mesh_runtime::tls;
use mesh_runtime::tls::leaf::read_leaf;
use mesh_runtime::tls::trust::{SharedTrust, TrustStore};
use mesh_runtime::tls::verify::{Accept, Verifier, handshake_reason, unix_now};
use rcgen::KeyPair;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls_pki_types::PrivateKeyDer;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_util::task::TaskTracker;
use tonic::server::NamedService;
use tower::ServiceExt as _;

use crate::auth::Peer;
use crate::ca::LeafOrder;
use crate::control::Control;
use crate::rpc::{MESSAGE_MAX, MeshService};
use crate::{api, clock};

/// Connections at once: one an agent, and room for operators. More wait in the accept queue.
const CONNECTIONS_MAX: usize = 24_000;
/// How long a handshake, and the head of a request, may take.
const HANDSHAKE_MAX: Duration = Duration::from_secs(10);
/// How long a connection without a certificate may live: for a join, or an operator's call.
const ANONYMOUS_MAX: Duration = Duration::from_secs(300);
/// Calls at once on one connection: a session and some renewals.
const STREAMS_MAX: u32 = 64;
/// A connection that says nothing is asked after this long, and given up after as long again.
const PING_EVERY: Duration = Duration::from_secs(10);
/// How long open calls may take to end when control stops.
const DRAIN_MAX: Duration = Duration::from_secs(5);

/// How often the wall clock is compared with the life of control's own certificate: a machine that slept has
/// a timer that did too.
const RENEW_LOOK: Duration = Duration::from_secs(60);
/// Connections without a certificate at once: whoever has none must not take the room of agents.
const ANONYMOUS_CONNECTIONS_MAX: usize = 1024;

/// Control's own certificate, exchanged while it runs.
#[derive(Debug)]
struct OwnKey(ArcSwap<CertifiedKey>);

impl ResolvesServerCert for OwnKey {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.0.load_full())
    }
}

/// Control's own identity: signs itself, and signs again in time.
#[derive(Debug)]
pub(crate) struct Own {
    key: Arc<OwnKey>,
    names: Vec<String>,
}

impl Own {
    pub(crate) fn new(control: &Control, names: Vec<String>) -> anyhow::Result<Self> {
        let key = Arc::new(make_key(control, &names)?);
        let key = Arc::new(OwnKey(ArcSwap::new(key)));
        Ok(Self { key, names })
    }

    /// The certificate in force.
    pub(crate) fn now(&self) -> Arc<CertifiedKey> {
        self.key.0.load_full()
    }

    /// Renews at a third of its life, for ever.
    pub(crate) async fn renew(&self, control: &Control) {
        let third_s = control.leaves.workload().as_secs() / 3;
        let mut made_s = clock::now_s();
        loop {
            tokio::time::sleep(RENEW_LOOK).await;
            // A clock that went back makes a certificate that is not valid yet: renewed too.
            if clock::now_s().abs_diff(made_s) < third_s {
                continue;
            }
            match make_key(control, &self.names) {
                Ok(key) => {
                    self.key.0.store(Arc::new(key));
                    made_s = clock::now_s();
                }
                Err(error) => log::error!("cannot renew control's own certificate: {error:#}"),
            }
        }
    }
}

fn make_key(control: &Control, names: &[String]) -> anyhow::Result<CertifiedKey> {
    let key = KeyPair::generate()?;
    let id = SpiffeId {
        trust_domain: control.settings.trust_domain.clone(),
        identity: Identity::Control,
    };
    let order = LeafOrder {
        id: &id,
        source: None,
        names,
        life_s: control.leaves.workload().as_secs(),
    };
    let mut chain = control.ca.sign(&order, &key, clock::now_s())?;
    // Who joins knows nothing but a pin of the root, so the root is sent too.
    chain.push(control.ca.root.clone());
    let key = PrivateKeyDer::Pkcs8(key.serialize_der().into());
    Ok(tls::certified_key(chain, key)?)
}

/// What control shows must be what hosts accept: a root or issuer that ended, or that may not sign this, is
/// noticed here and not at the first host.
fn check_own(control: &Control, own: &Own, trust: &SharedTrust) -> anyhow::Result<()> {
    let accept = Accept::Control(control.settings.trust_domain.clone());
    let verifier = Verifier::new(Arc::clone(trust), accept);
    let key = own.now();
    let judged = match key.cert.split_first() {
        Some((leaf, chain)) => verifier.judge(leaf, chain, None, unix_now()),
        None => Err(Reason::NoCertificate),
    };
    judged.map(drop).map_err(|reason| {
        anyhow::anyhow!(
            "no host would accept control's certificate: {}; look at the files in ca/ and at the clock",
            reason.text()
        )
    })
}

/// Everything bound, nothing served yet.
#[derive(Debug)]
pub(crate) struct Bound {
    control: Arc<Control>,
    own: Arc<Own>,
    trust: SharedTrust,
    listeners: Vec<TcpListener>,
}

impl Bound {
    pub(crate) async fn bind(
        control: Arc<Control>,
        own: Arc<Own>,
        listen: &[SocketAddr],
    ) -> anyhow::Result<Self> {
        let mut listeners = Vec::new();
        for address in listen {
            let listener = TcpListener::bind(address).await.map_err(|e| {
                anyhow::anyhow!("cannot listen on {address}: {e}; set `listen` or --listen")
            })?;
            listeners.push(listener);
        }
        let trust = TrustStore::from_bundle(&control.bundle)?.shared();
        check_own(&control, &own, &trust)?;
        Ok(Self {
            control,
            own,
            trust,
            listeners,
        })
    }

    pub(crate) fn addresses(&self) -> Vec<SocketAddr> {
        let addresses = self.listeners.iter().map(TcpListener::local_addr);
        addresses.filter_map(Result::ok).collect()
    }

    pub(crate) fn trust(&self) -> SharedTrust {
        Arc::clone(&self.trust)
    }

    /// Serves until control is told to stop, then lets open calls end.
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        let accept = Accept::AgentsAndOperators(self.control.settings.trust_domain.clone());
        let verifier = Verifier::new(Arc::clone(&self.trust), accept);
        let key = Arc::clone(&self.own.key);
        let config = tls::server_config(key, verifier, &[b"h2", b"http/1.1"])?;
        let port = Port {
            acceptor: TlsAcceptor::from(Arc::new(config)),
            router: router(&self.control),
            slots: Arc::new(Semaphore::new(CONNECTIONS_MAX)),
            anonymous: Arc::new(Semaphore::new(ANONYMOUS_CONNECTIONS_MAX)),
            control: Arc::clone(&self.control),
            connections: TaskTracker::new(),
        };
        let accepting = self.listeners.into_iter().map(|l| port.clone().accept(l));
        let accepting = futures_util::future::join_all(accepting);
        tokio::select! {
            _ = accepting => {}
            () = self.control.stopping.cancelled() => {}
        }
        port.connections.close();
        if timeout(DRAIN_MAX, port.connections.wait()).await.is_err() {
            log::warn!("{} connections did not end in time", port.connections.len());
        }
        Ok(())
    }
}

fn router(control: &Arc<Control>) -> Router {
    let mesh = MeshServer::new(MeshService::new(Arc::clone(control)));
    let mesh = mesh
        .max_decoding_message_size(MESSAGE_MAX)
        .max_encoding_message_size(MESSAGE_MAX * 4);
    let mesh =
        mesh.map_request(|request: axum::extract::Request| request.map(tonic::body::Body::new));
    let path = format!(
        "/{}/{{*method}}",
        <MeshServer<MeshService> as NamedService>::NAME
    );
    api::router(control).route_service(&path, mesh)
}

#[derive(Clone)]
struct Port {
    acceptor: TlsAcceptor,
    router: Router,
    slots: Arc<Semaphore>,
    anonymous: Arc<Semaphore>,
    control: Arc<Control>,
    connections: TaskTracker,
}

impl Port {
    async fn accept(self, listener: TcpListener) {
        loop {
            let Ok(slot) = Arc::clone(&self.slots).acquire_owned().await else {
                return;
            };
            let (stream, address) = match listener.accept().await {
                Ok(accepted) => accepted,
                Err(error) => {
                    // Mostly too many open files: others must end first.
                    log::warn!("cannot accept: {error}");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let port = self.clone();
            self.connections.spawn(async move {
                let _slot = slot;
                port.serve(stream, address).await;
            });
        }
    }

    async fn serve(self, stream: TcpStream, address: SocketAddr) {
        // Small messages both ways: waiting to fill packets only delays.
        let _ = stream.set_nodelay(true);
        let accepted = timeout(HANDSHAKE_MAX, self.acceptor.accept(stream)).await;
        let stream = match accepted {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => {
                let reason = handshake_reason(&error);
                self.control.metrics.refused(reason);
                log::info!(from:% = address, reason = reason.code(); "handshake failed: {error}");
                return;
            }
            Err(_) => return,
        };
        let leaf = stream.get_ref().1.peer_certificates();
        // The verifier read it already, so it can be read.
        let leaf = leaf.and_then(|chain| read_leaf(chain.first()?).ok());
        let anonymous = leaf.is_none();
        let _slot = if anonymous {
            let Ok(slot) = Arc::clone(&self.anonymous).try_acquire_owned() else {
                self.control.metrics.refused(Reason::Overloaded);
                log::warn!(from:% = address; "too many connections without a certificate");
                return;
            };
            Some(slot)
        } else {
            None
        };
        let peer = Peer {
            address,
            leaf: leaf.map(Arc::new),
        };
        let router = self.router.clone();
        let service = hyper::service::service_fn(move |mut request: Request<Incoming>| {
            request.extensions_mut().insert(peer.clone());
            let router = router.clone();
            async move { router.oneshot(request).await }
        });
        self.speak(stream, service, anonymous, address).await;
    }

    async fn speak<S>(
        &self,
        stream: tokio_rustls::server::TlsStream<TcpStream>,
        service: S,
        anonymous: bool,
        address: SocketAddr,
    ) where
        S: hyper::service::Service<
                Request<Incoming>,
                Response = axum::response::Response,
                Error = Infallible,
            > + Send
            + 'static,
        S::Future: Send,
    {
        let mut builder = auto::Builder::new(TokioExecutor::new());
        builder
            .http1()
            .timer(TokioTimer::new())
            .header_read_timeout(HANDSHAKE_MAX);
        builder
            .http2()
            .timer(TokioTimer::new())
            .max_concurrent_streams(STREAMS_MAX)
            .keep_alive_interval(PING_EVERY)
            .keep_alive_timeout(PING_EVERY);
        let connection = builder.serve_connection(TokioIo::new(stream), service);
        tokio::pin!(connection);
        let too_long = async {
            if anonymous {
                tokio::time::sleep(ANONYMOUS_MAX).await;
            } else {
                std::future::pending::<()>().await;
            }
        };
        let ended = tokio::select! {
            ended = connection.as_mut() => ended,
            () = too_long => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
            () = self.control.stopping.cancelled() => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
        };
        if let Err(error) = ended {
            log::debug!(from:% = address; "connection ended: {error}");
        }
    }
}
