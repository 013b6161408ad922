//! A control in this process, and agents that speak to it.

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
use mesh_runtime::tls;
use mesh_runtime::tls::pin::PinVerifier;
use mesh_runtime::tls::trust::TrustStore;
use mesh_runtime::tls::verify::{Accept, Verifier};
use rcgen::{CertificateParams, KeyPair};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_rustls::TlsConnector;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Status, Streaming};
use tower::ServiceExt as _;

use crate::auth::Peer;
use crate::config::Config;
use crate::control::{Control, Opened};
use crate::prover::Prover;
use crate::refusal::REASON_HEADER;
use crate::server::{Bound, Own};
use crate::{api, init};

/// Long enough for a loaded machine: nothing waits for it to pass.
pub(super) const SOON: Duration = Duration::from_secs(20);

pub(super) struct Site {
    pub(super) dir: PathBuf,
    pub(super) bearer: String,
    pub(super) control: Arc<Control>,
    pub(super) address: SocketAddr,
    pub(super) tasks: JoinSet<()>,
    pub(super) writer: std::thread::JoinHandle<()>,
}

impl Site {
    pub(super) async fn new(name: &str) -> Self {
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

    pub(super) async fn open(dir: PathBuf, trusting: bool) -> Self {
        let config = Config {
            state_dir: dir.clone(),
            listen: vec!["127.0.0.1:0".parse().unwrap()],
            ..Config::default()
        };
        let Opened {
            control,
            mut writer_loop,
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
    pub(super) async fn restart(self) -> Self {
        let dir = self.dir.clone();
        self.stop().await;
        Self::open(dir, true).await
    }

    pub(super) async fn stop(mut self) {
        self.control.stopping.cancel();
        self.control.sessions.close();
        self.control.sessions.wait().await;
        self.tasks.shutdown().await;
        drop(self.control);
        tokio::task::spawn_blocking(move || self.writer.join().unwrap())
            .await
            .unwrap();
    }

    pub(super) async fn end(self) {
        let dir = self.dir.clone();
        self.stop().await;
        std::fs::remove_dir_all(dir).unwrap();
    }

    pub(super) async fn call(
        &self,
        method: Method,
        path: &str,
        body: Value,
    ) -> (StatusCode, Value) {
        let bearer = format!("Bearer {}", self.bearer);
        self.call_as(&bearer, method, path, body).await
    }

    pub(super) async fn call_as(
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

    pub(super) async fn token(&self, request: Value) -> JoinToken {
        let (status, answer) = self.call(Method::POST, "/v1/tokens", request).await;
        assert_eq!(status, StatusCode::OK, "{answer}");
        JoinToken::parse(answer["token"].as_str().unwrap()).unwrap()
    }

    pub(super) async fn shop_token(&self) -> JoinToken {
        self.token(json!({"identities": ["shop/*"]})).await
    }

    pub(super) async fn agent(&self, name: &str, address: &str) -> Agent {
        let token = self.shop_token().await;
        let mut agent = Agent::new(name, address);
        agent.join(self, &token).await.unwrap();
        agent
    }

    pub(super) async fn channel(
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

pub(super) struct Agent {
    pub(super) name: String,
    pub(super) address: String,
    pub(super) key: KeyPair,
    pub(super) joined: Option<proto::JoinResponse>,
}

impl Agent {
    pub(super) fn new(name: &str, address: &str) -> Self {
        Self {
            name: name.to_owned(),
            address: address.to_owned(),
            key: KeyPair::generate().unwrap(),
            joined: None,
        }
    }

    pub(super) fn csr(key: &KeyPair) -> bytes::Bytes {
        let csr = CertificateParams::default().serialize_request(key).unwrap();
        csr.der().to_vec().into()
    }

    pub(super) async fn join(&mut self, site: &Site, token: &JoinToken) -> Result<(), Status> {
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

    pub(super) fn joined(&self) -> &proto::JoinResponse {
        self.joined.as_ref().unwrap()
    }

    pub(super) async fn client(&self, site: &Site) -> MeshClient<Channel> {
        MeshClient::new(self.channel(site).await)
    }

    /// A connection that shows its certificate.
    pub(super) async fn channel(&self, site: &Site) -> Channel {
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
        site.channel(config).await.unwrap()
    }

    pub(super) async fn renew(&self, site: &Site, ids: &[String]) -> Vec<proto::LeafResponse> {
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

    pub(super) async fn session(&self, site: &Site, boot_id: &str, have: (u64, u64)) -> Session {
        let (epoch, index_revision) = have;
        self.session_with(site, |hello| {
            boot_id.clone_into(&mut hello.boot_id);
            (hello.epoch, hello.index_revision) = (epoch, index_revision);
        })
        .await
    }

    pub(super) async fn session_with(
        &self,
        site: &Site,
        change: impl FnOnce(&mut proto::Hello),
    ) -> Session {
        let (say, said) = mpsc::channel(16);
        let mut client = self.client(site).await;
        let mut hello = proto::Hello {
            boot_id: "boot-1".to_owned(),
            version: "0.1.0".to_owned(),
            ..proto::Hello::default()
        };
        change(&mut hello);
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

pub(super) struct Session {
    pub(super) say: mpsc::Sender<proto::FromAgent>,
    pub(super) hear: Option<Streaming<proto::FromControl>>,
    pub(super) seen: Vec<&'static str>,
}

impl Session {
    pub(super) async fn say(&self, message: Say) {
        let message = proto::FromAgent {
            message: Some(message),
        };
        self.say.send(message).await.unwrap();
    }

    pub(super) async fn next(&mut self) -> Result<Hear, Status> {
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
            Hear::Revocations(_) => "revocations",
        });
        Ok(message)
    }

    /// The first message from here on of which `pick` makes something.
    pub(super) async fn wait<T>(&mut self, pick: impl Fn(Hear) -> Option<T>) -> T {
        loop {
            if let Some(found) = pick(self.next().await.unwrap()) {
                return found;
            }
        }
    }

    pub(super) async fn index(&mut self) -> proto::IndexUpdate {
        self.wait(|m| match m {
            Hear::Index(index) => Some(index),
            _ => None,
        })
        .await
    }

    pub(super) async fn endpoints(&mut self, count: usize) -> proto::EndpointsUpdate {
        self.wait(|m| match m {
            Hear::Endpoints(e) if e.endpoints.len() == count => Some(e),
            _ => None,
        })
        .await
    }

    pub(super) async fn problems(&mut self) -> Vec<u32> {
        self.wait(|m| match m {
            Hear::ReportStatus(status) => Some(status.problems.iter().map(|p| p.reason).collect()),
            _ => None,
        })
        .await
    }

    pub(super) async fn welcome(&mut self) -> proto::Welcome {
        self.wait(|m| match m {
            Hear::Welcome(welcome) => Some(welcome),
            _ => None,
        })
        .await
    }

    pub(super) async fn report(&self, generation: u64, namespace: &str, port: u32) {
        let service = proto::ReportedService {
            name: "web".to_owned(),
            ports: vec![proto::ReportedPort {
                number: port,
                protocol: "http".to_owned(),
            }],
            transport: String::new(),
            healthy: true,
            plaintext_endpoints: Vec::new(),
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
            bypass: None,
        }))
        .await;
    }

    pub(super) async fn subscribe(&self) {
        let service = proto::ServiceRef {
            namespace: "shop".to_owned(),
            name: "web".to_owned(),
        };
        let services = vec![service];
        self.say(Say::Subscribe(proto::Subscribe { services }))
            .await;
    }

    /// Why control ended the session.
    pub(super) async fn ended(&mut self) -> Status {
        loop {
            if let Err(status) = self.next().await {
                return status;
            }
        }
    }
}

pub(super) fn reason(status: &Status) -> String {
    let reason = status.metadata().get(REASON_HEADER);
    let reason = reason.map(|r| r.to_str().unwrap().to_owned());
    reason.unwrap_or_else(|| format!("no reason: {status}"))
}
