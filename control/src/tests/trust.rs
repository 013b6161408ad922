//! Revocation, restore, rejoin and what a host may write, over the wire that agents use.

use mesh_api::sync;
use mesh_core::revocation::KEPT_S;
use rcgen::{KeyPair, SigningKey as _};

use super::harness::Session;
use super::*;

impl Session {
    /// The next list of revocations of which `count` are named.
    async fn revocations(&mut self, count: usize) -> proto::Revocations {
        self.wait(|m| match m {
            Hear::Revocations(r) if r.revoked.len() == count => Some(r),
            _ => None,
        })
        .await
    }
}

async fn revoke(site: &Site, path: &str) -> Value {
    let (status, answer) = site.call(Method::POST, path, Value::Null).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    answer
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revocation_reaches_every_session_and_is_acknowledged() {
    let site = Site::new("revocation").await;
    let agent = site.agent("vm-1", "10.0.0.1").await;
    let victim = site.agent("vm-2", "10.0.0.2").await;
    let uid = &victim.joined().host_uid;
    let mut session = agent.session(&site, "boot-1", (0, 0)).await;
    let epoch = session.welcome().await.epoch;
    assert!(
        session.revocations(0).await.snapshot,
        "that there is none is said"
    );
    revoke(&site, "/v1/workloads/shop/web:revoke?host=vm-2").await;
    let first = session.revocations(1).await;
    assert!(!first.snapshot && !first.more);
    assert_eq!(
        (
            &first.revoked[0].host_uid,
            first.revoked[0].account.as_str()
        ),
        (uid, "web")
    );
    // It can not have it again, and has all else.
    let id = |path: &str| format!("spiffe://corp.example.com/{path}");
    let leaves = victim
        .renew(&site, &[id("ns/shop/sa/web"), id("ns/shop/sa/api")])
        .await;
    let refusal = leaves[0].refusal.as_ref().unwrap();
    assert_eq!(refusal.reason, u32::from(Reason::IdentityRevoked.to_wire()));
    assert!(!leaves[1].certificate_chain.is_empty());
    let answer = revoke(&site, "/v1/hosts/-/vm-2:revoke").await;
    assert_eq!(answer["agents"], json!({"connected": 1, "away": 0}));
    let second = session.revocations(1).await;
    assert_eq!(
        (
            &second.revoked[0].host_uid,
            second.revoked[0].account.as_str()
        ),
        (uid, "")
    );
    let ack = proto::Ack {
        bundle_number: 1,
        revocations_revision: first.revision,
        ..proto::Ack::default()
    };
    session.say(Say::Ack(ack)).await;
    session.say(Say::Beat(proto::Beat::default())).await;
    session
        .wait(|m| matches!(m, Hear::Beat(_)).then_some(()))
        .await;
    let (_, listed) = site.call(Method::GET, "/v1/revocations", Value::Null).await;
    let acknowledged = |n: usize| &listed["items"][n]["status"]["acknowledged"];
    assert_eq!((acknowledged(0), acknowledged(1)), (&json!(0), &json!(1)));
    let (_, host) = site
        .call(Method::GET, "/v1/hosts/-/vm-1", Value::Null)
        .await;
    assert_eq!(host["status"]["acknowledged"]["bundle"], 1);
    // The bundle that was never sent, said by an agent that lies.
    let lie = proto::Ack {
        bundle_number: 99,
        ..proto::Ack::default()
    };
    session.say(Say::Ack(lie)).await;
    assert_eq!(reason(&session.ended().await), "invalid");

    // A restart keeps them; who has the first of this epoch gets the second only.
    let site = site.restart().await;
    let (_, host) = site
        .call(Method::GET, "/v1/hosts/-/vm-1", Value::Null)
        .await;
    assert_eq!(host["status"]["acknowledged"], json!({"bundle": 1}));
    let mut session = agent
        .session_with(&site, |hello| {
            hello.revocations_epoch = epoch;
            hello.revocations_revision = first.revision;
        })
        .await;
    assert!(!session.revocations(1).await.snapshot);
    site.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_control_of_an_older_backup_believes_what_it_signed_itself() {
    let site = Site::new("merge").await;
    let agent = site.agent("vm-1", "10.0.0.1").await;
    let victim = site.agent("vm-2", "10.0.0.2").await;
    let unused = site.shop_token().await;
    let (_, backup) = site.call(Method::GET, "/v1/backup", Value::Null).await;
    let mut session = agent.session(&site, "boot-1", (0, 0)).await;
    revoke(&site, "/v1/hosts/-/vm-2:revoke").await;
    let known = session.revocations(1).await;
    drop(session);
    let dir = site.dir.clone();
    site.stop().await;
    let file = dir.join("old-backup");
    std::fs::write(&file, backup.as_str().unwrap()).unwrap();
    // Neither the store nor an export is left: only the agent knows.
    std::fs::remove_dir_all(dir.join("store")).unwrap();
    drop(std::fs::remove_dir_all(dir.join("exports")));
    let told = crate::restore::restore(&file, &dir, false).unwrap();
    assert!(
        told.contains("0 revocations") && told.contains("1 join tokens"),
        "{told}"
    );
    let site = Site::open(dir, true).await;
    assert_eq!(site.control.writer.now().hosts.len(), 2, "it came back");
    let mut late = Agent::new("vm-3", "10.0.0.3");
    let refused = late.join(&site, &unused).await.unwrap_err();
    assert_eq!(reason(&refused), "token_revoked");

    let mut session = agent.session(&site, "boot-1", (0, 0)).await;
    assert!(session.revocations(0).await.snapshot);
    let mut forged = known.clone();
    forged.revoked[0]
        .host_uid
        .clone_from(&agent.joined().host_uid);
    session.say(Say::Revocations(forged)).await;
    session.say(Say::Revocations(known.clone())).await;
    session.say(Say::Beat(proto::Beat::default())).await;
    session
        .wait(|m| matches!(m, Hear::Beat(_)).then_some(()))
        .await;
    assert!(
        site.control.writer.now().revoked.is_empty(),
        "after a lie nothing is believed"
    );
    drop(session);
    let mut session = agent.session(&site, "boot-1", (0, 0)).await;
    session.revocations(0).await;
    let mut over = known.clone();
    over.revoked[0].at_s -= KEPT_S + 3600;
    session.say(Say::Revocations(over)).await;
    session.say(Say::Revocations(known)).await;
    session.revocations(1).await;
    let mut client = victim.client(&site).await;
    let refused = client.renew(proto::RenewRequest::default()).await;
    assert_eq!(reason(&refused.unwrap_err()), "host_revoked");
    site.end().await;
}

/// What an issuer signed outlives it: the root vouches for it, whoever is the issuer now, and nobody else does.
#[tokio::test(flavor = "multi_thread")]
async fn another_issuer_of_the_same_root_believes_what_the_old_one_revoked() {
    let site = Site::new("issuer").await;
    let agent = site.agent("vm-1", "10.0.0.1").await;
    let victim = site.agent("vm-2", "10.0.0.2").await;
    let (_, backup) = site.call(Method::GET, "/v1/backup", Value::Null).await;
    let mut session = agent.session(&site, "boot-1", (0, 0)).await;
    revoke(&site, "/v1/hosts/-/vm-2:revoke").await;
    let known = session.revocations(1).await;
    assert_eq!(known.issuers[..], [site.control.ca.issuer().to_vec()]);
    drop(session);
    let running = crate::issuer::renew(&site.dir, &by_root(&site.dir)).unwrap_err();
    assert!(format!("{running:#}").contains("is mesh-control stopped?"));
    let dir = site.dir.clone();
    site.stop().await;
    let file = dir.join("old-backup");
    std::fs::write(&file, backup.as_str().unwrap()).unwrap();
    // A key that is not the root's changes nothing.
    let root_key = dir.join("ca/issuer.key");
    let wrong = crate::ca::NewIssuer::Signed { root_key };
    let refused = crate::issuer::renew(&dir, &wrong).unwrap_err().to_string();
    assert!(refused.contains("not signed by the root"), "{refused}");
    let told = crate::issuer::renew(&dir, &by_root(&dir)).unwrap();
    assert!(told.contains("the issuer lives until"), "{told}");
    std::fs::remove_dir_all(dir.join("store")).unwrap();
    drop(std::fs::remove_dir_all(dir.join("exports")));
    crate::restore::restore(&file, &dir, false).unwrap();

    let site = Site::open(dir, true).await;
    assert_ne!(known.issuers[..], [site.control.ca.issuer().to_vec()]);
    // Neither an authority of one's own, nor one's own leaf, is an issuer.
    let (own, key) = authority();
    let leaf = agent.joined().certificate_chain[0].clone();
    for (issuer, key) in [(own, &key), (leaf, &agent.key)] {
        let mut forged = known.clone();
        let subject = mesh_core::revocation::Subject {
            host: agent.joined().host_uid.parse().unwrap(),
            account: None,
        };
        let domain = "corp.example.com".parse().unwrap();
        let one = &mut forged.revoked[0];
        one.host_uid.clone_from(&agent.joined().host_uid);
        let statement = subject.statement(&domain, one.at_s);
        one.signature = key.sign(statement.as_bytes()).unwrap().into();
        forged.issuers = vec![issuer];
        let mut session = agent.session(&site, "boot-1", (0, 0)).await;
        session.say(Say::Revocations(forged)).await;
        session.say(Say::Beat(proto::Beat::default())).await;
        session
            .wait(|m| matches!(m, Hear::Beat(_)).then_some(()))
            .await;
        assert!(site.control.writer.now().revoked.is_empty());
    }
    // It has leaves of the old issuer, and what that one revoked is revoked.
    let mut session = agent.session(&site, "boot-1", (0, 0)).await;
    session.revocations(0).await;
    session.say(Say::Revocations(known)).await;
    let again = session.revocations(1).await;
    assert_eq!(again.issuers[..], [site.control.ca.issuer().to_vec()]);
    let mut client = victim.client(&site).await;
    let refused = client.renew(proto::RenewRequest::default()).await;
    assert_eq!(reason(&refused.unwrap_err()), "host_revoked");
    site.end().await;
}

fn by_root(dir: &std::path::Path) -> crate::ca::NewIssuer {
    let root_key = dir.join("ca/root.key");
    crate::ca::NewIssuer::Signed { root_key }
}

/// An authority that signed itself, in the name of the mesh.
fn authority() -> (bytes::Bytes, KeyPair) {
    let key = KeyPair::generate().unwrap();
    let mut params = rcgen::CertificateParams::default();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let made = params.self_signed(&key).unwrap();
    (made.der().to_vec().into(), key)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_host_asks_and_how_often_it_is_refused_is_bounded() {
    let site = Site::new("questions").await;
    let agent = site.agent("vm-1", "10.0.0.1").await;
    let mut client = agent.client(&site).await;
    let question = proto::ExplainRequest {
        service: Some(proto::ServiceRef {
            namespace: "shop".to_owned(),
            name: "web".to_owned(),
        }),
        port: 80,
        callers: vec!["spiffe://corp.example.com/host/vm-1".to_owned()],
    };
    let mut limited = None;
    for _ in 0..200 {
        if let Err(status) = client.explain(question.clone()).await {
            limited = Some(status);
            break;
        }
    }
    assert_eq!(reason(&limited.expect("no limit")), "rate_limited");
    // Another host is not slowed down by it.
    let other = site.agent("vm-2", "10.0.0.2").await;
    let mut question = question;
    question.callers = vec!["spiffe://corp.example.com/host/vm-2".to_owned()];
    let mut client = other.client(&site).await;
    let answer = client.explain(question).await.unwrap().into_inner();
    assert_eq!(answer.decisions[0].outcome, "allowed");
    // Who is refused without end is counted, and does not rotate the audit log away.
    let actor = crate::audit::Actor {
        who: "host/vm-1".to_owned(),
        from: "10.0.0.1:5555".to_owned(),
    };
    for _ in 0..5_000 {
        let refusal = Reason::OutOfScope.into();
        site.control.refused(&actor, "renew", "", &refusal);
    }
    let written = site.control.audit.tail(10_000).unwrap();
    let written = written.iter().filter(|e| e["from"] == "10.0.0.1:5555");
    assert!((1_000..2_000).contains(&written.count()));
    let page = site.control.metrics.render(&site.control.writer.now());
    assert!(page.contains("reason=\"out_of_scope\"} 5000"), "{page}");
    site.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_was_away_comes_back_by_the_key_that_joined() {
    let site = Site::new("rejoin").await;
    let agent = site.agent("vm-1", "10.0.0.1").await;
    let uid = agent.joined().host_uid.parse().unwrap();
    // Without a certificate, as its own has ended.
    let trust = tls::trust::TrustStore::from_bundle(agent.joined().bundle.as_ref().unwrap());
    let accept = tls::verify::Accept::Control("corp.example.com".parse().unwrap());
    let verifier = tls::verify::Verifier::new(trust.unwrap().shared(), accept);
    let config = tls::client_config(None, verifier, &[b"h2"]).unwrap();
    let mut client = proto::mesh_client::MeshClient::new(site.channel(config).await.unwrap());
    let host_uid = agent.joined().host_uid.clone();
    let mut ask = async |key: &KeyPair, host_uid: &str, change: fn(&mut Vec<u8>)| {
        let request = proto::ChallengeRequest {
            host_uid: host_uid.to_owned(),
        };
        let nonce = client.challenge(request).await?.into_inner().nonce;
        let statement = sync::rejoin_statement(&uid, &nonce);
        let mut nonce = nonce.to_vec();
        change(&mut nonce);
        let request = proto::RejoinRequest {
            host_uid: host_uid.to_owned(),
            nonce: nonce.into(),
            csr: Agent::csr(key),
            signature: key.sign(statement.as_bytes()).unwrap().into(),
        };
        let answer = client.rejoin(request).await?;
        Ok::<_, Status>(answer.into_inner().certificate_chain)
    };
    let chain = ask(&agent.key, &host_uid, |_| {}).await.unwrap();
    let facts = leaf::read_leaf(&chain[0]).unwrap();
    assert_eq!(facts.id.identity.to_string(), format!("agent/{host_uid}"));
    let other = KeyPair::generate().unwrap();
    let refused = ask(&other, &host_uid, |_| {}).await.unwrap_err();
    assert_eq!(reason(&refused), "not_authenticated");
    let stale = ask(&agent.key, &host_uid, |nonce| nonce[7] ^= 0x80).await;
    assert_eq!(reason(&stale.unwrap_err()), "not_authenticated");
    let nobody = ask(&agent.key, &"0".repeat(32), |_| {}).await;
    assert_eq!(reason(&nobody.unwrap_err()), "host_revoked");
    revoke(&site, "/v1/hosts/-/vm-1:revoke").await;
    let revoked = ask(&agent.key, &host_uid, |_| {}).await;
    assert_eq!(reason(&revoked.unwrap_err()), "host_revoked");
    site.end().await;
}
