//! A whole control in this process, with agents and operators that speak to it over real TLS.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use http::{Method, Request, StatusCode};
use http_body_util::BodyExt as _;
use hyper_util::rt::TokioIo;
use mesh_api::proto::from_agent::Message as Say;
use mesh_api::proto::from_control::Message as Hear;
use mesh_api::proto::mesh_client::MeshClient;
use mesh_api::{proto, token::JoinToken};
use mesh_core::reason::Reason;
use mesh_runtime::tls::pin::PinVerifier;
use mesh_runtime::tls::trust::TrustStore;
use mesh_runtime::tls::verify::{Accept, Verifier};
use mesh_runtime::tls::{self, leaf};
use rcgen::{CertificateParams, KeyPair};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_rustls::{TlsAcceptor, TlsConnector};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status, Streaming};
use tower::ServiceExt as _;

use crate::auth::Peer;
use crate::config::Config;
use crate::control::{Control, Opened};
use crate::prover::Prover;
use crate::refusal::REASON_HEADER;
use crate::server::{Bound, Own};
use crate::{api, init};

/// Long enough for a loaded machine: nothing waits for it to pass.
const SOON: Duration = Duration::from_secs(20);

struct Site {
    dir: PathBuf,
    bearer: String,
    control: Arc<Control>,
    address: SocketAddr,
    tasks: JoinSet<()>,
    writer: std::thread::JoinHandle<()>,
}

impl Site {
    async fn new(name: &str) -> Self {
        let dir = std::env::temp_dir().join(format!("meshwork-site-{name}-{}", std::process::id()));
        drop(std::fs::remove_dir_all(&dir));
        let plan = init::Plan {
            state_dir: dir.clone(),
            trust_domain: "corp.example.com".parse().unwrap(),
            dns_suffix: "mesh.internal".to_owned(),
            vip4_range: None,
            vip6_range: None,
            addresses: vec!["127.0.0.1:7440".to_owned()],
            origin: crate::ca::Origin::New,
        };
        init::init(&plan).unwrap();
        assert!(init::init(&plan).is_err(), "a mesh is made once");
        Self::open(dir, true).await
    }

    async fn open(dir: PathBuf, trusting: bool) -> Self {
        let config = Config {
            state_dir: dir.clone(),
            listen: vec!["127.0.0.1:0".parse().unwrap()],
            ..Config::default()
        };
        let Opened {
            control,
            writer_loop,
            lease_loop,
        } = Control::open(&config).unwrap();
        let own = Arc::new(Own::new(&control, vec!["localhost".to_owned()]).unwrap());
        let bound = Bound::bind(Arc::clone(&control), Arc::clone(&own), &config.listen);
        let bound = bound.await.unwrap();
        let address = bound.addresses()[0];
        let prover = Prover::new(Arc::clone(&control), own, bound.trust(), trusting);
        let mut tasks = JoinSet::new();
        tasks.spawn(async move { bound.run().await.unwrap() });
        tasks.spawn(lease_loop.run());
        tasks.spawn(prover.run());
        let writer = std::thread::spawn(move || writer_loop.run().unwrap());
        let admin = std::fs::read_to_string(dir.join("admin.yaml")).unwrap();
        let admin: Value = serde_norway::from_str(&admin).unwrap();
        Self {
            dir,
            bearer: admin["token"].as_str().unwrap().to_owned(),
            control,
            address,
            tasks,
            writer,
        }
    }

    /// Ends all and starts again on what was stored.
    async fn restart(self) -> Self {
        let dir = self.dir.clone();
        self.stop().await;
        Self::open(dir, true).await
    }

    async fn stop(mut self) {
        self.control.stopping.cancel();
        self.control.sessions.close();
        self.control.sessions.wait().await;
        self.tasks.shutdown().await;
        drop(self.control);
        tokio::task::spawn_blocking(move || self.writer.join().unwrap())
            .await
            .unwrap();
    }

    async fn end(self) {
        let dir = self.dir.clone();
        self.stop().await;
        std::fs::remove_dir_all(dir).unwrap();
    }

    async fn call(&self, method: Method, path: &str, body: Value) -> (StatusCode, Value) {
        let bearer = format!("Bearer {}", self.bearer);
        self.call_as(&bearer, method, path, body).await
    }

    async fn call_as(
        &self,
        authorization: &str,
        method: Method,
        path: &str,
        body: Value,
    ) -> (StatusCode, Value) {
        let peer = Peer {
            address: "192.0.2.1:1".parse().unwrap(),
            leaf: None,
        };
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("authorization", authorization)
            .extension(peer)
            .body(Body::from(body.to_string()))
            .unwrap();
        let response = api::router(&self.control).oneshot(request).await.unwrap();
        let status = response.status();
        let body = response.into_body().collect().await.unwrap().to_bytes();
        let value = serde_json::from_slice(&body);
        (
            status,
            value.unwrap_or_else(|_| Value::String(String::from_utf8_lossy(&body).into())),
        )
    }

    async fn token(&self, request: Value) -> JoinToken {
        let (status, answer) = self.call(Method::POST, "/v1/tokens", request).await;
        assert_eq!(status, StatusCode::OK, "{answer}");
        JoinToken::parse(answer["token"].as_str().unwrap()).unwrap()
    }

    async fn shop_token(&self) -> JoinToken {
        self.token(json!({"identities": ["shop/*"]})).await
    }

    async fn agent(&self, name: &str, address: &str) -> Agent {
        let token = self.shop_token().await;
        let mut agent = Agent::new(name, address);
        agent.join(self, &token).await.unwrap();
        agent
    }

    async fn channel(
        &self,
        config: rustls::ClientConfig,
    ) -> Result<Channel, tonic::transport::Error> {
        let (address, connector) = (self.address, TlsConnector::from(Arc::new(config)));
        let connect = tower::service_fn(move |_| {
            let connector = connector.clone();
            async move {
                let tcp = TcpStream::connect(address).await?;
                let name = ServerName::try_from("localhost").unwrap();
                let tls = connector.connect(name, tcp).await?;
                Ok::<_, std::io::Error>(TokioIo::new(tls))
            }
        });
        let endpoint = Endpoint::from_static("http://control");
        endpoint.connect_with_connector(connect).await
    }
}

struct Agent {
    name: String,
    address: String,
    key: KeyPair,
    joined: Option<proto::JoinResponse>,
}

impl Agent {
    fn new(name: &str, address: &str) -> Self {
        Self {
            name: name.to_owned(),
            address: address.to_owned(),
            key: KeyPair::generate().unwrap(),
            joined: None,
        }
    }

    fn csr(key: &KeyPair) -> bytes::Bytes {
        let csr = CertificateParams::default().serialize_request(key).unwrap();
        csr.der().to_vec().into()
    }

    async fn join(&mut self, site: &Site, token: &JoinToken) -> Result<(), Status> {
        let pins = PinVerifier::new(token.pins.clone());
        let config = tls::pinned_client_config(pins, &[b"h2"]).unwrap();
        let mut client = MeshClient::new(site.channel(config).await.unwrap());
        let request = proto::JoinRequest {
            token_id: token.id.clone(),
            token_secret: token.secret_text(),
            csr: Self::csr(&self.key),
            host_name: self.name.clone(),
            address: self.address.clone(),
            ..proto::JoinRequest::default()
        };
        self.joined = Some(client.join(request).await?.into_inner());
        Ok(())
    }

    fn joined(&self) -> &proto::JoinResponse {
        self.joined.as_ref().unwrap()
    }

    async fn client(&self, site: &Site) -> MeshClient<Channel> {
        let chain = self.joined().certificate_chain.iter();
        let chain = chain
            .map(|der| CertificateDer::from(der.to_vec()))
            .collect();
        let key = PrivateKeyDer::Pkcs8(self.key.serialize_der().into());
        let key = Arc::new(tls::certified_key(chain, key).unwrap());
        let trust = TrustStore::from_bundle(self.joined().bundle.as_ref().unwrap());
        let accept = Accept::Control("corp.example.com".parse().unwrap());
        let verifier = Verifier::new(trust.unwrap().shared(), accept);
        let config = tls::client_config(Some(key), verifier, &[b"h2"]).unwrap();
        MeshClient::new(site.channel(config).await.unwrap())
    }

    async fn renew(&self, site: &Site, ids: &[String]) -> Vec<proto::LeafResponse> {
        let leaves = ids.iter().map(|id| proto::LeafRequest {
            spiffe_id: id.clone(),
            csr: Self::csr(&self.key),
        });
        let request = proto::RenewRequest {
            leaves: leaves.collect(),
        };
        let mut client = self.client(site).await;
        client.renew(request).await.unwrap().into_inner().leaves
    }

    async fn session(&self, site: &Site, boot_id: &str, have: (u64, u64)) -> Session {
        let (say, said) = mpsc::channel(16);
        let mut client = self.client(site).await;
        let (epoch, index_revision) = have;
        let hello = proto::Hello {
            boot_id: boot_id.to_owned(),
            version: "0.1.0".to_owned(),
            epoch,
            index_revision,
            ..proto::Hello::default()
        };
        let mut session = Session {
            say,
            hear: None,
            seen: Vec::new(),
        };
        session.say(Say::Hello(hello)).await;
        let hear = client.sync(ReceiverStream::new(said)).await.unwrap();
        session.hear = Some(hear.into_inner());
        session
    }
}

struct Session {
    say: mpsc::Sender<proto::FromAgent>,
    hear: Option<Streaming<proto::FromControl>>,
    seen: Vec<&'static str>,
}

impl Session {
    async fn say(&self, message: Say) {
        let message = proto::FromAgent {
            message: Some(message),
        };
        self.say.send(message).await.unwrap();
    }

    async fn next(&mut self) -> Result<Hear, Status> {
        let hear = self.hear.as_mut().unwrap();
        let message = tokio::time::timeout(SOON, hear.message());
        let message = message.await.expect("control said nothing")?;
        let message = message.ok_or_else(|| Status::ok("ended"))?.message.unwrap();
        self.seen.push(match &message {
            Hear::Welcome(_) => "welcome",
            Hear::Beat(_) => "beat",
            Hear::Index(_) => "index",
            Hear::Endpoints(_) => "endpoints",
            Hear::Policies(_) => "policies",
            Hear::Bundle(_) => "bundle",
            Hear::ReportStatus(_) => "status",
        });
        Ok(message)
    }

    /// The first message from here on of which `pick` makes something.
    async fn wait<T>(&mut self, pick: impl Fn(Hear) -> Option<T>) -> T {
        loop {
            if let Some(found) = pick(self.next().await.unwrap()) {
                return found;
            }
        }
    }

    async fn index(&mut self) -> proto::IndexUpdate {
        self.wait(|m| match m {
            Hear::Index(index) => Some(index),
            _ => None,
        })
        .await
    }

    async fn endpoints(&mut self, count: usize) -> proto::EndpointsUpdate {
        self.wait(|m| match m {
            Hear::Endpoints(e) if e.endpoints.len() == count => Some(e),
            _ => None,
        })
        .await
    }

    async fn problems(&mut self) -> Vec<u32> {
        self.wait(|m| match m {
            Hear::ReportStatus(status) => Some(status.problems.iter().map(|p| p.reason).collect()),
            _ => None,
        })
        .await
    }

    async fn welcome(&mut self) -> proto::Welcome {
        self.wait(|m| match m {
            Hear::Welcome(welcome) => Some(welcome),
            _ => None,
        })
        .await
    }

    async fn report(&self, generation: u64, namespace: &str, port: u32) {
        let service = proto::ReportedService {
            name: "web".to_owned(),
            ports: vec![proto::ReportedPort {
                number: port,
                protocol: "http".to_owned(),
            }],
            transport: String::new(),
            healthy: true,
        };
        let workload = proto::ReportedWorkload {
            namespace: namespace.to_owned(),
            account: "web".to_owned(),
            services: vec![service],
        };
        let workloads = vec![workload];
        self.say(Say::Report(proto::Report {
            generation,
            workloads,
        }))
        .await;
    }

    async fn subscribe(&self) {
        let service = proto::ServiceRef {
            namespace: "shop".to_owned(),
            name: "web".to_owned(),
        };
        let services = vec![service];
        self.say(Say::Subscribe(proto::Subscribe { services }))
            .await;
    }

    /// Why control ended the session.
    async fn ended(&mut self) -> Status {
        loop {
            if let Err(status) = self.next().await {
                return status;
            }
        }
    }
}

fn reason(status: &Status) -> String {
    let reason = status.metadata().get(REASON_HEADER);
    let reason = reason.map(|r| r.to_str().unwrap().to_owned());
    reason.unwrap_or_else(|| format!("no reason: {status}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_joins_renews_and_has_a_session() {
    let site = Site::new("session").await;
    let agent = site.agent("vm-1", "10.0.0.1").await;
    let joined = agent.joined();
    assert_eq!(joined.host_name, "vm-1");
    assert_eq!(joined.address, "10.0.0.1");
    assert_eq!(joined.mesh.as_ref().unwrap().dns_suffix, "mesh.internal");
    let facts = leaf::read_leaf(&joined.certificate_chain[0]).unwrap();
    assert_eq!(
        facts.id.identity.to_string(),
        format!("agent/{}", joined.host_uid)
    );

    let id = |path: &str| format!("spiffe://corp.example.com/{path}");
    let asked = [
        id("ns/shop/sa/web"),
        id("host/vm-1"),
        id(&format!("agent/{}", joined.host_uid)),
        id("ns/data/sa/db"),
        id("host/vm-2"),
        id("control"),
        id("operator/admin"),
        "spiffe://evil.example.com/ns/shop/sa/web".to_owned(),
        "nonsense".to_owned(),
    ];
    let leaves = agent.renew(&site, &asked).await;
    for (asked, leaf) in asked.iter().zip(&leaves).take(3) {
        let facts = leaf::read_leaf(&leaf.certificate_chain[0]).unwrap();
        assert_eq!(facts.id.to_string(), *asked);
        assert_eq!(facts.host.unwrap().as_str(), joined.host_uid);
    }
    let refused = leaves.iter().skip(3).map(|leaf| {
        assert!(leaf.certificate_chain.is_empty());
        leaf.refusal.as_ref().unwrap().reason
    });
    let (scope, invalid) = (Reason::OutOfScope.to_wire(), Reason::Invalid.to_wire());
    let expected = [scope, scope, scope, scope, scope, invalid].map(u32::from);
    assert_eq!(refused.collect::<Vec<_>>(), expected);

    let mut session = agent.session(&site, "boot-1", (0, 0)).await;
    assert_eq!(session.welcome().await.host_name, "vm-1");
    let index = session.index().await;
    assert!(index.snapshot && index.services.is_empty());
    session.report(1, "shop", 80).await;
    let index = session.index().await;
    assert!(!index.snapshot);
    assert_eq!(index.services[0].vip4, "252.64.0.2");
    session.subscribe().await;
    let endpoints = session.endpoints(1).await;
    assert_eq!(endpoints.endpoints[0].host_uid, joined.host_uid);
    assert!(!endpoints.endpoints[0].stale);
    assert!(session.seen.contains(&"bundle") && session.seen.contains(&"policies"));
    session.report(2, "data", 5432).await;
    let scope = u32::from(Reason::OutOfScope.to_wire());
    while session.problems().await != [scope] {}
    session.endpoints(0).await;
    session
        .say(Say::Beat(proto::Beat {
            sequence: 9,
            time_ms: 0,
        }))
        .await;
    let beat = session.wait(|m| match m {
        Hear::Beat(beat) => Some(beat),
        _ => None,
    });
    let beat = beat.await;
    assert!(beat.sequence == 9 && 0 < beat.time_ms);

    let (status, host) = site
        .call(Method::GET, "/v1/hosts/-/vm-1", Value::Null)
        .await;
    assert_eq!(status, StatusCode::OK);
    assert_eq!(host["status"]["lease"], "live");
    assert_eq!(host["status"]["problems"][0]["reason"], "out_of_scope");
    let (status, _) = site
        .call(Method::DELETE, "/v1/hosts/-/vm-1", Value::Null)
        .await;
    assert_eq!(status, StatusCode::OK);
    assert_eq!(reason(&session.ended().await), "host_revoked");
    let mut client = agent.client(&site).await;
    let refused = client
        .renew(proto::RenewRequest::default())
        .await
        .unwrap_err();
    assert_eq!(reason(&refused), "host_revoked");
    site.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn joins_are_refused_by_reason_and_a_lost_answer_is_given_again() {
    let site = Site::new("join").await;
    let token = site.shop_token().await;
    let mut agent = Agent::new("vm-1", "10.0.0.1");
    agent.join(&site, &token).await.unwrap();
    let first = agent.joined().clone();
    agent.join(&site, &token).await.unwrap();
    assert_eq!(agent.joined().host_uid, first.host_uid);

    let mut other = Agent::new("vm-2", "10.0.0.2");
    let refused = |result: Result<(), Status>| reason(&result.unwrap_err());
    assert_eq!(refused(other.join(&site, &token).await), "token_used");
    let mut wrong = token.clone();
    wrong.secret[0] ^= 1;
    assert_eq!(refused(other.join(&site, &wrong).await), "token_unknown");
    let token = site.shop_token().await;
    other.name = "vm-1".to_owned();
    assert_eq!(refused(other.join(&site, &token).await), "host_name_taken");
    other.name = "VM 2".to_owned();
    assert_eq!(refused(other.join(&site, &token).await), "invalid");
    other.name = "vm-2".to_owned();
    other.address = String::new();
    assert_eq!(
        refused(other.join(&site, &token).await),
        "invalid",
        "loopback"
    );
    other.address = "10.0.0.1".to_owned();
    assert_eq!(refused(other.join(&site, &token).await), "address_taken");
    other.address = "10.0.0.2".to_owned();
    let path = format!("/v1/tokens/-/{}", token.id);
    let (status, _) = site.call(Method::DELETE, &path, Value::Null).await;
    assert_eq!(status, StatusCode::OK);
    assert_eq!(refused(other.join(&site, &token).await), "token_revoked");
    let pins = vec![[0; 32]];
    let unpinned = PinVerifier::new(pins);
    let config = tls::pinned_client_config(unpinned, &[b"h2"]).unwrap();
    assert!(
        site.channel(config).await.is_err(),
        "another control is noticed"
    );
    for _ in 0..40 {
        drop(other.join(&site, &wrong).await);
    }
    assert_eq!(refused(other.join(&site, &wrong).await), "rate_limited");

    let (_, audit) = site
        .call(Method::GET, "/v1/audit?limit=1000", Value::Null)
        .await;
    let entries = audit["items"].as_array().unwrap();
    for reason in [
        "token_used",
        "token_unknown",
        "token_revoked",
        "rate_limited",
    ] {
        let noted = |e: &&Value| e["reason"] == reason && e["from"] == "127.0.0.1";
        assert!(entries.iter().any(|e| noted(&e)), "{reason}");
    }
    let text = site.control.metrics.render(&site.control.writer.now());
    assert!(
        text.contains("mesh_control_refused_total{reason=\"token_used\"} 1"),
        "{text}"
    );
    site.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clone_is_refused_and_a_newer_session_of_the_same_boot_replaces() {
    let site = Site::new("clone").await;
    let agent = site.agent("vm-1", "10.0.0.1").await;
    let mut first = agent.session(&site, "boot-1", (0, 0)).await;
    first.welcome().await;
    let mut clone = agent.session(&site, "boot-2", (0, 0)).await;
    let status = clone.ended().await;
    assert_eq!(
        (status.code(), reason(&status).as_str()),
        (Code::AlreadyExists, "host_cloned")
    );
    assert!(status.message().contains("boot-1") && status.message().contains("boot-2"));
    let mut second = agent.session(&site, "boot-1", (0, 0)).await;
    second.welcome().await;
    assert_eq!(reason(&first.ended().await), "draining");
    second.say(Say::Hello(proto::Hello::default())).await;
    assert_eq!(reason(&second.ended().await), "invalid");
    site.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_keeps_addresses_and_resumes_by_delta() {
    let site = Site::new("restart").await;
    let agent = site.agent("vm-1", "10.0.0.1").await;
    let mut session = agent.session(&site, "boot-1", (0, 0)).await;
    let epoch = session.welcome().await.epoch;
    session.report(1, "shop", 80).await;
    let index = session.index().await;
    let index = if index.services.is_empty() {
        session.index().await
    } else {
        index
    };
    let vip = index.services[0].vip4.clone();
    drop(session);

    let site = site.restart().await;
    let mut session = agent
        .session(&site, "boot-1", (epoch, index.revision))
        .await;
    assert_eq!(session.welcome().await.epoch, epoch);
    // Endpoints survived, and the index was not sent again.
    session.subscribe().await;
    session.endpoints(1).await;
    assert!(!session.seen.contains(&"index"), "{:?}", session.seen);
    let yaml = json!([{
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"name": "api", "namespace": "shop"},
        "spec": {"ports": [{"port": 443}]},
    }]);
    let (status, results) = site.call(Method::POST, "/v1/apply", yaml).await;
    assert_eq!(
        (status, &results[0]["action"]),
        (StatusCode::OK, &json!("created"))
    );
    let delta = session.index().await;
    assert!(!delta.snapshot && index.revision < delta.revision);
    assert_eq!(delta.services.len(), 1);
    let (_, web) = site
        .call(Method::GET, "/v1/services/shop/web", Value::Null)
        .await;
    assert_eq!(web["status"]["vip4"], vip.as_str());
    assert_eq!(web["status"]["source"], "host/vm-1");
    assert_eq!(web["status"]["endpoints"][0]["state"], "healthy");
    site.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_listed_before_its_address_is_proven() {
    let site = Site::new("proof").await;
    let dir = site.dir.clone();
    site.stop().await;
    let site = Site::open(dir, false).await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut agent = Agent::new("vm-1", "127.0.0.1");
    agent.join(&site, &site.shop_token().await).await.unwrap();
    let mut thief = Agent::new("vm-2", "127.0.0.2");
    thief.join(&site, &site.shop_token().await).await.unwrap();
    let web = "spiffe://corp.example.com/ns/shop/sa/web".to_owned();

    // Another host's agent answers at first, with the right identity; then the right one.
    let shown = [&thief, &agent];
    let mut acceptors = Vec::new();
    for owner in shown {
        let chain = owner.renew(&site, std::slice::from_ref(&web)).await;
        let chain = chain[0].certificate_chain.iter();
        let chain = chain
            .map(|der| CertificateDer::from(der.to_vec()))
            .collect();
        let key = PrivateKeyDer::Pkcs8(owner.key.serialize_der().into());
        let config = rustls::ServerConfig::builder_with_provider(tls::provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(chain, key)
            .unwrap();
        let mut config = config;
        config.alpn_protocols = vec![tls::ALPN_MESH.to_vec()];
        acceptors.push(TlsAcceptor::from(Arc::new(config)));
    }
    let mut session = agent.session(&site, "boot-1", (0, 0)).await;
    let hello = crate::catalogue::command::Command::Hello {
        uid: agent.joined().host_uid.parse().unwrap(),
        version: String::new(),
        address: None,
        mesh_port: Some(listener.local_addr().unwrap().port()),
    };
    let actor = crate::audit::Actor::control();
    session.welcome().await;
    site.control.writer.ask(actor, hello).await.unwrap();
    session.report(1, "shop", 80).await;
    session.subscribe().await;
    let unproven = u32::from(Reason::AddressUnproven.to_wire());
    while session.problems().await != [unproven] {}
    for acceptor in &acceptors {
        let (tcp, _) = tokio::time::timeout(SOON, listener.accept())
            .await
            .unwrap()
            .unwrap();
        drop(acceptor.accept(tcp).await.unwrap());
    }
    while session.problems().await != [] as [u32; 0] {}
    session.endpoints(1).await;
    site.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn operators_are_told_apart_and_see_what_there_is() {
    let site = Site::new("api").await;
    for bad in ["", "Bearer x", "Basic x"] {
        let (status, body) = site
            .call_as(bad, Method::GET, "/v1/status", Value::Null)
            .await;
        assert_eq!(status, StatusCode::UNAUTHORIZED);
        assert_eq!(body["reason"], "not_authenticated");
    }
    let agent = site.agent("vm-1", "10.0.0.1").await;
    let session = agent.session(&site, "boot-1", (0, 0)).await;
    session.report(1, "shop", 80).await;
    let mut session = session;
    while session.problems().await != [] as [u32; 0] {}
    for (path, pointer, expected) in [
        ("/v1/status", "/trustDomain", json!("corp.example.com")),
        ("/v1/status", "/hosts/live", json!(1)),
        (
            "/v1/services?namespace=shop",
            "/items/0/metadata/name",
            json!("web"),
        ),
        ("/v1/services?namespace=data", "/items", json!([])),
        ("/v1/workloads", "/items/0/spec/host/0", json!("vm-1")),
        ("/v1/workloads/shop/web", "/spec/services/0", json!("web")),
        ("/v1/hosts", "/items/0/spec/address", json!("10.0.0.1")),
        ("/v1/policies/-/everyone", "/kind", json!("Policy")),
        ("/v1/tokens", "/items/0/status/state", json!("used")),
        ("/v1/services/shop/none", "/reason", json!("not_found")),
        ("/v1/nonsense", "/reason", json!("not_found")),
    ] {
        let (_, body) = site.call(Method::GET, path, Value::Null).await;
        assert_eq!(body.pointer(pointer), Some(&expected), "{path}: {body}");
    }
    let (_, backup) = site.call(Method::GET, "/v1/backup", Value::Null).await;
    let restored = crate::export::parse(backup.as_str().unwrap()).unwrap();
    assert_eq!(restored.hosts.len(), 1);
    assert!(!backup.as_str().unwrap().contains(&site.bearer));
    for (path, body) in [
        ("/v1/tokens", json!({"identities": ["shop"]})),
        (
            "/v1/tokens",
            json!({"identities": ["shop/*"], "colour": "red"}),
        ),
        (
            "/v1/tokens",
            json!({"identities": ["shop/*"], "addresses": ["x"]}),
        ),
        ("/v1/apply", json!([{"apiVersion": "v1", "kind": "Pod"}])),
    ] {
        let (status, answer) = site.call(Method::POST, path, body).await;
        assert_eq!(status, StatusCode::BAD_REQUEST, "{answer}");
        assert_eq!(answer["reason"], "invalid");
    }
    site.end().await;
}
