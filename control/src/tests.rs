//! A whole control in this process, with agents and operators that speak to it over real TLS.

mod edges;
mod fields;
mod harness;
mod hostile;
mod trust;

use std::sync::Arc;

use http::{Method, StatusCode};
use mesh_api::proto;
use mesh_api::proto::from_agent::Message as Say;
use mesh_api::proto::from_control::Message as Hear;
use mesh_core::reason::Reason;
use mesh_runtime::tls::pin::PinVerifier;
use mesh_runtime::tls::{self, leaf};
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;
use tonic::{Code, Status};

use harness::{Agent, SOON, Site, reason};

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
    let shown = [&thief, &thief, &agent];
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
    for (n, acceptor) in acceptors.iter().enumerate() {
        if n == 2 {
            // The first failure is no news.
            while session.problems().await != [unproven] {}
        }
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
