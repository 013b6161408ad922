//! An agent whose host was taken over: it has a good credential and says what it likes, in any order. It gets refusals,
//! changes nothing of others, leaves a trail, and control goes on.

use mesh_api::proto;
use mesh_api::proto::from_agent::Message as Say;
use mesh_core::rng::Rng;
use serde_json::Value;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status};

use super::harness::{Agent, SOON, Session, Site};
use super::*;

/// Calls and sessions of one run. `MESHWORK_SEED` replays a failed one.
const STEPS: u64 = 150;
const SEED: u64 = 0x7a11_5eed;

/// Everything that a field can be: what is right for somebody else, and what is right for nobody.
struct Fields {
    rng: Rng,
    own: String,
    other: String,
}

impl Fields {
    fn pick<'a>(&mut self, all: &[&'a str]) -> &'a str {
        all[self.rng.below(all.len() as u64) as usize]
    }

    fn text(&mut self) -> String {
        let long = "x".repeat(300);
        let huge = "y".repeat(70_000);
        let all = [
            "",
            "shop",
            "data",
            "web",
            "db",
            "-",
            "*",
            "shop/*",
            "..",
            "\0",
            "\n",
            "é",
            "UP",
            "a.b",
            "10.0.0.1",
            "10.0.0.2",
            "127.0.0.1",
            "::",
            "255.255.255.255",
            "252.64.0.2",
            "strict",
            "permissive",
            "http",
            "tcp",
            "control",
            &long,
            &huge,
        ];
        self.pick(&all).to_owned()
    }

    fn uid(&mut self) -> String {
        match self.rng.below(4) {
            0 => self.own.clone(),
            1 => self.other.clone(),
            2 => "0".repeat(32),
            _ => self.text(),
        }
    }

    fn number(&mut self) -> u64 {
        let all = [
            0,
            1,
            80,
            5432,
            65_535,
            65_536,
            u64::from(u32::MAX),
            u64::MAX - 1,
            u64::MAX,
        ];
        match self.rng.below(2) {
            0 => all[self.rng.below(all.len() as u64) as usize],
            _ => self.rng.next_u64() >> self.rng.below(64),
        }
    }

    fn port(&mut self) -> u32 {
        self.number() as u32
    }

    fn bytes(&mut self) -> bytes::Bytes {
        let len = self.rng.below(200);
        (0..len).map(|_| self.rng.next_u64() as u8).collect()
    }

    fn many<T>(&mut self, most: u64, mut make: impl FnMut(&mut Self) -> T) -> Vec<T> {
        let count = self.rng.below(most + 1);
        (0..count).map(|_| make(self)).collect()
    }

    fn namespace(&mut self) -> String {
        match self.rng.below(3) {
            0 => "shop".to_owned(),
            1 => "data".to_owned(),
            _ => self.text(),
        }
    }

    fn service(&mut self) -> proto::ReportedService {
        proto::ReportedService {
            name: ["web", "db"].map(str::to_owned)[self.rng.below(2) as usize].clone(),
            ports: self.many(3, |f| proto::ReportedPort {
                number: f.port(),
                protocol: f.text(),
            }),
            transport: self.text(),
            healthy: self.rng.below(2) == 0,
            plaintext_endpoints: self.many(20, |f| match f.rng.below(2) {
                0 => "10.9.0.5:80".to_owned(),
                _ => f.text(),
            }),
        }
    }

    fn message(&mut self) -> Option<Say> {
        Some(match self.rng.below(9) {
            0 => Say::Hello(self.hello()),
            1 => Say::Beat(proto::Beat {
                sequence: self.number(),
                time_ms: self.number(),
            }),
            2 | 3 => Say::Report(proto::Report {
                generation: self.number(),
                workloads: self.many(300, |f| proto::ReportedWorkload {
                    namespace: f.namespace(),
                    account: f.namespace(),
                    services: f.many(3, Self::service),
                }),
            }),
            4 => Say::Subscribe(proto::Subscribe {
                services: self.many(30, Self::service_ref),
            }),
            5 => Say::Ack(proto::Ack {
                index_revision: self.number(),
                bundle_number: self.number(),
                policy_revision: self.number(),
                revocations_revision: self.number(),
            }),
            6 => Say::Revocations(proto::Revocations {
                revision: self.number(),
                snapshot: self.rng.below(2) == 0,
                more: self.rng.below(2) == 0,
                // Such as can be read: it is the signature that is to refuse them.
                revoked: self.many(2, |f| proto::Revocation {
                    host_uid: [&f.own, &f.other][f.rng.below(2) as usize].clone(),
                    namespace: "shop".to_owned(),
                    account: "web".to_owned(),
                    at_s: f.number(),
                    signature: f.bytes(),
                    issuer: 0,
                }),
                issuers: vec![],
            }),
            7 => Say::Edges(proto::Edges {
                edges: self.many(30, Self::edge),
                watched: self.many(30, |f| proto::WatchedPort {
                    service: Some(f.service_ref()),
                    port: f.port(),
                    since_ms: f.number(),
                }),
                overflowed: self.rng.below(2) == 0,
            }),
            _ => return None,
        })
    }

    fn service_ref(&mut self) -> proto::ServiceRef {
        proto::ServiceRef {
            namespace: self.namespace(),
            name: self.text(),
        }
    }

    fn edge(&mut self) -> proto::Edge {
        proto::Edge {
            service: (self.rng.below(8) != 0).then(|| self.service_ref()),
            port: self.port(),
            identity: self.identity(),
            address: self.text(),
            verdict: self.text(),
            calls: self.number(),
            first_ms: self.number(),
            last_ms: self.number(),
        }
    }

    fn hello(&mut self) -> proto::Hello {
        proto::Hello {
            boot_id: self.text(),
            version: self.text(),
            capabilities: self.many(5, Self::text),
            epoch: self.number(),
            index_revision: self.number(),
            address: self.text(),
            mesh_port: self.port(),
            revocations_epoch: self.number(),
            revocations_revision: self.number(),
        }
    }

    fn identity(&mut self) -> String {
        let uid = self.uid();
        let (namespace, name) = (self.namespace(), self.text());
        let path = match self.rng.below(6) {
            0 => format!("agent/{uid}"),
            1 => format!("ns/{namespace}/sa/{name}"),
            2 => "host/vm-2".to_owned(),
            3 => "operator/admin".to_owned(),
            4 => "control".to_owned(),
            _ => name,
        };
        format!("spiffe://corp.example.com/{path}")
    }
}

/// A refusal that says whose fault it is. What is none of these was a fault of control's.
fn is_refusal(status: &Status) -> bool {
    matches!(
        status.code(),
        Code::InvalidArgument
            | Code::Unauthenticated
            | Code::PermissionDenied
            | Code::NotFound
            | Code::AlreadyExists
            | Code::ResourceExhausted
            // A session that another of the same host replaced; the message was larger than it may be.
            | Code::Unavailable
            | Code::OutOfRange
    )
}

async fn step(fields: &mut Fields, site: &Site, evil: &Agent) -> Result<(), Status> {
    let mut client = evil.client(site).await;
    match fields.rng.below(6) {
        0 => {
            let request = proto::JoinRequest {
                token_id: fields.text(),
                token_secret: fields.text(),
                csr: match fields.rng.below(2) {
                    0 => Agent::csr(&evil.key),
                    _ => fields.bytes(),
                },
                host_name: fields.text(),
                network: fields.text(),
                address: fields.text(),
                mesh_port: fields.port(),
                version: fields.text(),
            };
            client.join(request).await.map(drop)
        }
        1 => {
            let leaves = fields.many(300, |f| proto::LeafRequest {
                spiffe_id: f.identity(),
                csr: match f.rng.below(4) {
                    0 => f.bytes(),
                    _ => Agent::csr(&evil.key),
                },
            });
            let asked: Vec<String> = leaves.iter().map(|l| l.spiffe_id.clone()).collect();
            let answer = client.renew(proto::RenewRequest { leaves }).await?;
            for (asked, leaf) in asked.iter().zip(&answer.into_inner().leaves) {
                let own = asked.starts_with("spiffe://corp.example.com/ns/shop/sa/")
                    || asked.ends_with(&format!("agent/{}", evil.joined().host_uid));
                assert!(own || leaf.certificate_chain.is_empty(), "it got {asked}");
            }
            Ok(())
        }
        2 => {
            let host_uid = fields.uid();
            client
                .challenge(proto::ChallengeRequest { host_uid })
                .await
                .map(drop)
        }
        3 => {
            let host_uid = fields.uid();
            let (random, signature) = (fields.bytes(), fields.bytes());
            let fresh = fields.rng.below(2) == 0;
            let asked = client.challenge(proto::ChallengeRequest {
                host_uid: host_uid.clone(),
            });
            let nonce = match asked.await {
                Ok(answer) if fresh => answer.into_inner().nonce,
                _ => random,
            };
            let request = proto::RejoinRequest {
                host_uid,
                nonce,
                csr: Agent::csr(&evil.key),
                signature: signature.clone(),
            };
            let answer = client.rejoin(request).await;
            assert!(answer.is_err(), "a signature was guessed");
            answer.map(drop)
        }
        _ => {
            let (say, said) = mpsc::channel(16);
            let first = match fields.rng.below(8) {
                0 => fields.message(),
                _ => Some(Say::Hello(fields.hello())),
            };
            let messages = fields.many(8, Fields::message);
            let mut session = Session {
                say,
                hear: None,
                seen: Vec::new(),
            };
            let from_agent = |message| proto::FromAgent { message };
            session.say.send(from_agent(first)).await.unwrap();
            let hear = client.sync(ReceiverStream::new(said)).await?;
            session.hear = Some(hear.into_inner());
            for message in messages {
                // Fails once control has ended the session.
                if session.say.send(from_agent(message)).await.is_err() {
                    break;
                }
            }
            // All was said: what control has to say comes, then the end.
            let Session { say, hear, .. } = session;
            drop(say);
            let mut hear = hear.unwrap();
            while hear.message().await?.is_some() {}
            Ok(())
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
#[expect(clippy::print_stderr, reason = "a test says how to run it again")]
async fn an_agent_that_says_anything_in_any_order_changes_nothing_of_others() {
    let seed = std::env::var("MESHWORK_SEED").ok();
    let seed = seed.and_then(|text| text.parse().ok()).unwrap_or(SEED);
    eprintln!("MESHWORK_SEED={seed}");
    let site = Site::new("hostile").await;
    let good = site.agent("vm-2", "10.0.0.2").await;
    let mut session = good.session(&site, "boot-1", (0, 0)).await;
    session.welcome().await;
    session.report(1, "shop", 80).await;
    session.subscribe().await;
    session.endpoints(1).await;
    let web = || async {
        let (_, web) = site
            .call(Method::GET, "/v1/services/shop/web", Value::Null)
            .await;
        web
    };
    let host = || async {
        let (_, host) = site
            .call(Method::GET, "/v1/hosts/-/vm-2", Value::Null)
            .await;
        (host["spec"].clone(), host["status"]["lease"].clone())
    };
    let (service_before, host_before) = (web().await, host().await);
    let evil = site.agent("vm-1", "10.0.0.1").await;
    let mut fields = Fields {
        rng: Rng::new(seed),
        own: evil.joined().host_uid.clone(),
        other: good.joined().host_uid.clone(),
    };
    let mut refused = 0;
    for number in 0..STEPS {
        // The other host goes on beating meanwhile.
        session.say(Say::Beat(proto::Beat::default())).await;
        let step = step(&mut fields, &site, &evil);
        let outcome = tokio::time::timeout(SOON, step)
            .await
            .unwrap_or_else(|_| panic!("step {number} hangs"));
        if let Err(status) = outcome {
            assert!(is_refusal(&status), "step {number}: {status:?}");
            refused += 1;
        }
    }
    assert!(
        STEPS / 4 < refused,
        "only {refused} of {STEPS} were refused"
    );

    // The other host's session went on, and what it owns is as it was.
    session.say(Say::Beat(proto::Beat::default())).await;
    session
        .wait(|m| matches!(m, Hear::Beat(_)).then_some(()))
        .await;
    assert_eq!(host().await, host_before);
    let service_after = web().await;
    for field in [
        "/spec",
        "/metadata/annotations",
        "/status/source",
        "/status/vip4",
    ] {
        assert_eq!(
            service_after.pointer(field),
            service_before.pointer(field),
            "{field}"
        );
    }
    let now = site.control.writer.now();
    assert_eq!(now.hosts.len(), 2, "no host came or went");
    assert!(now.revoked.is_empty(), "nobody was revoked");
    let others = now
        .services
        .keys()
        .filter(|s| s.namespace.as_str() != "shop");
    assert_eq!(others.count(), 0, "a service outside the token's scope");
    drop(now);
    // Each kind of attempt is in the audit under its own name.
    let (_, audit) = site
        .call(Method::GET, "/v1/audit?limit=10000", Value::Null)
        .await;
    let trail = |action: &str| {
        let entries = audit["items"].as_array().unwrap();
        let ours = |e: &&Value| e["action"] == action && e["outcome"] == "refused";
        entries.iter().filter(ours).count()
    };
    for action in ["sign", "join", "rejoin", "sync", "merge revocations"] {
        assert!(0 < trail(action), "no trail of `{action}`");
    }
    site.end().await;
}
