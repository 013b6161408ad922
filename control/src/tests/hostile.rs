//! An agent whose host was taken over: it has a good credential and says what it likes, in any order. It gets refusals,
//! changes nothing of others, leaves a trail, and control goes on. Control runs within this test, over its real gRPC.

use std::sync::{Mutex, Once, PoisonError};

use axum::body::Body;
use http::Request;
use mesh_api::proto;
use mesh_api::proto::from_agent::Message as Say;
use mesh_api::proto::mesh_client::MeshClient;
use mesh_core::rng::Rng;
use serde_json::Value;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Code, Status};
use tower::ServiceExt as _;

use super::fields::{Fields, Tried, messages, methods};
use super::harness::{Agent, SOON, Session, Site};
use super::*;
use crate::refusal::REASON_HEADER;

/// Calls and sessions of one run.
const STEPS: u64 = 40;
/// Runs, each with the next seed. `MESHWORK_SEED` replays a failed one.
const RUNS: u64 = 8;
const SEED: u64 = 0x7a11_5eed;
/// Routes are read from where they are served: one more is tried too.
const OPERATOR_API: &str = include_str!("../api.rs");

/// The routes of the operator API, about a host that is there.
fn routes() -> Vec<(Method, String)> {
    let mut routes = Vec::new();
    for rest in OPERATOR_API.split(".route(").skip(1) {
        let mut depth = 1;
        let end = rest.find(|c| {
            depth += match c {
                '(' => 1,
                ')' => -1,
                _ => 0,
            };
            depth == 0
        });
        let route = &rest[..end.unwrap()];
        let path = route.split('"').nth(1).unwrap();
        let path = path.replace("{kind}", "hosts");
        let path = path.replace("{namespace}", "-").replace("{name}", "vm-2");
        let known = [
            ("get(", Method::GET),
            ("post(", Method::POST),
            ("delete(", Method::DELETE),
            ("put(", Method::PUT),
            ("patch(", Method::PATCH),
        ];
        let served = known.into_iter().filter(|(word, _)| route.contains(word));
        routes.extend(served.map(|(_, method)| (method, path.clone())));
    }
    routes
}

/// Where code that is no test's panicked: a task that does takes down its session only, which from outside looks like an end.
static PANICS: Mutex<Vec<String>> = Mutex::new(Vec::new());

fn watch_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if let Some(at) = info.location()
                && !at.file().contains("tests")
            {
                let mut panics = PANICS.lock().unwrap_or_else(PoisonError::into_inner);
                panics.push(at.to_string());
            }
            before(info);
        }));
    });
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

/// Called last: who has left can try nothing more.
const LEAVE: &str = "Leave";

async fn step(fields: &mut Fields, site: &Site, evil: &Agent) -> Result<(), Status> {
    let mut client = evil.client(site).await;
    let mut known = methods();
    known.retain(|method| *method != LEAVE);
    // Most is in the session.
    let method = match fields.rng.below(4) {
        0 => "Sync",
        _ => known[fields.rng.below(known.len() as u64) as usize],
    };
    fields.tried.calls.insert(method);
    match method {
        "Join" => {
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
        "Renew" => {
            let most = [5, 5, 5, 300][fields.rng.below(4) as usize];
            let leaves = fields.many(most, |f| proto::LeafRequest {
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
        "Challenge" => {
            let host_uid = fields.uid();
            client
                .challenge(proto::ChallengeRequest { host_uid })
                .await
                .map(drop)
        }
        "Rejoin" => {
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
        "Explain" => ask(fields, client).await,
        "Sync" => talk(fields, client).await,
        unknown => panic!("no attack calls `{unknown}`"),
    }
}

/// What may it and others do?
async fn ask(fields: &mut Fields, mut client: MeshClient<Channel>) -> Result<(), Status> {
    let most = [3, 3, 3, 600][fields.rng.below(4) as usize];
    // A question that can be read is answered or refused for its callers.
    let (service, port) = match fields.rng.below(8) {
        0 => (None, 80),
        1..4 => (Some(fields.service_ref()), fields.port()),
        _ => {
            let (namespace, name) = (fields.namespace(), "web".to_owned());
            (Some(proto::ServiceRef { namespace, name }), 80)
        }
    };
    let request = proto::ExplainRequest {
        service,
        port,
        callers: fields.many(most, Fields::identity),
    };
    let asked = request.callers.clone();
    let answer = client.explain(request).await?.into_inner();
    assert_eq!(answer.decisions.len(), asked.len());
    for caller in asked {
        let own = caller.starts_with("spiffe://corp.example.com/ns/shop/sa/");
        assert!(own, "it was told what {caller} may do");
    }
    Ok(())
}

/// A session, from its first word to its end.
async fn talk(fields: &mut Fields, mut client: MeshClient<Channel>) -> Result<(), Status> {
    let (say, said) = mpsc::channel(16);
    let first = match fields.rng.below(8) {
        0 => fields.message(),
        1..4 => Some(Say::Hello(fields.hello())),
        // A session that begins well is heard longer.
        _ => Some(Say::Hello(proto::Hello {
            boot_id: "boot-1".to_owned(),
            version: "0.1.0".to_owned(),
            ..proto::Hello::default()
        })),
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

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_says_anything_in_any_order_changes_nothing_of_others() {
    watch_panics();
    let seed = std::env::var("MESHWORK_SEED").ok();
    let seed = seed.and_then(|text| text.parse::<u64>().ok());
    let seeds = seed.map_or(SEED..SEED + RUNS, |seed| seed..seed + 1);
    let runs: Vec<_> = seeds.map(|seed| (seed, tokio::spawn(run(seed)))).collect();
    let mut all = Tried::default();
    for (again, run) in runs {
        let tried = run
            .await
            .unwrap_or_else(|_| panic!("MESHWORK_SEED={again} replays what is said above"));
        all.calls.extend(tried.calls);
        all.messages.extend(tried.messages);
        all.refused += tried.refused;
        all.trail.extend(tried.trail);
    }
    {
        let panics = PANICS.lock().unwrap_or_else(PoisonError::into_inner);
        assert_eq!(*panics, Vec::<String>::new(), "panics");
    }
    if seed.is_some() {
        return;
    }
    assert_eq!(all.calls, methods().into_iter().collect());
    assert_eq!(all.messages, messages().into_iter().collect());
    let refused = all.refused;
    assert!(RUNS * STEPS / 4 < refused, "only {refused} were refused");
    // Each kind of attempt is in the audit under its own name.
    let actions = [
        "explain",
        "join",
        "leave",
        "merge revocations",
        "rejoin",
        "sign",
        "sync",
    ];
    for action in actions {
        assert!(all.trail.contains(action), "no trail of `{action}`");
    }
}

async fn run(seed: u64) -> Tried {
    let site = Site::new(&format!("hostile-{seed}")).await;
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
        tried: Tried::default(),
    };
    for number in 0..STEPS {
        // The other host goes on beating meanwhile.
        session.say(Say::Beat(proto::Beat::default())).await;
        let step = step(&mut fields, &site, &evil);
        let outcome = tokio::time::timeout(SOON, step)
            .await
            .unwrap_or_else(|_| panic!("step {number} hangs"));
        if let Err(status) = outcome {
            assert!(is_refusal(&status), "step {number}: {status:?}");
            fields.tried.refused += 1;
        }
    }

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

    // Who leaves takes nobody with him.
    let mut client = evil.client(&site).await;
    client.leave(proto::LeaveRequest {}).await.unwrap();
    fields.tried.calls.insert(LEAVE);
    let again = client.leave(proto::LeaveRequest {}).await.unwrap_err();
    assert!(is_refusal(&again), "{again:?}");
    let now = site.control.writer.now();
    let left: Vec<&str> = now.hosts.values().map(|host| host.name.as_str()).collect();
    assert_eq!(left, ["vm-2"]);
    assert_eq!(host().await, host_before);
    drop(now);
    let (_, audit) = site
        .call(Method::GET, "/v1/audit?limit=10000", Value::Null)
        .await;
    let mut tried = fields.tried;
    for entry in audit["items"].as_array().unwrap() {
        if entry["outcome"] == "refused" {
            let action = entry["action"].as_str().unwrap();
            tried.trail.insert(action.to_owned());
        }
    }
    site.end().await;
    tried
}

/// The certificate that opens the session opens nothing of the operators', though both are behind one port.
#[tokio::test(flavor = "multi_thread")]
async fn an_agents_certificate_is_no_operators() {
    let site = Site::new("agent-as-operator").await;
    site.agent("vm-2", "10.0.0.2").await;
    let evil = site.agent("vm-1", "10.0.0.1").await;
    let channel = evil.channel(&site).await;
    let ask = |method: &Method, path: &str, authorization: Option<&str>| {
        let mut request = Request::builder().method(method).uri(path);
        if let Some(value) = authorization {
            request = request.header("authorization", value);
        }
        // What would make a token for everything, were it read.
        let body = Body::from(json!({"identities": ["*"]}).to_string());
        let request = request.body(tonic::body::Body::new(body)).unwrap();
        let answer = channel.clone().oneshot(request);
        async {
            let answer = answer.await.unwrap();
            let reason = answer.headers().get(REASON_HEADER);
            let reason = reason.map(|r| r.to_str().unwrap().to_owned());
            (answer.status(), reason.unwrap_or_default())
        }
    };
    let revision = site.control.writer.now().revision;
    let mut routes = routes();
    assert!(10 < routes.len(), "{routes:?}");
    routes.push((Method::GET, "/v1/none/of/these/paths".to_owned()));
    let refused = (StatusCode::UNAUTHORIZED, "not_authenticated".to_owned());
    for (method, path) in &routes {
        let guess = "Bearer guess";
        assert_eq!(ask(method, path, None).await, refused, "{method} {path}");
        if path == "/v1/tokens" {
            assert_eq!(ask(method, path, Some(guess)).await, refused, "{guess}");
        }
    }
    let now = site.control.writer.now();
    assert_eq!(now.revision, revision, "something was changed");
    drop(now);
    // By an operator's own token the same connection serves.
    let bearer = format!("Bearer {}", site.bearer);
    let (status, _) = ask(&Method::GET, "/v1/status", Some(&bearer)).await;
    assert_eq!(status, StatusCode::OK);
    let (_, audit) = site
        .call(Method::GET, "/v1/audit?limit=1000", Value::Null)
        .await;
    let audit = audit["items"].as_array().unwrap();
    for (method, path) in &routes {
        let noted = |e: &&Value| {
            e["action"] == method.as_str()
                && e["object"] == path.as_str()
                && e["outcome"] == "refused"
                && e["reason"] == "not_authenticated"
                && e["from"] == "127.0.0.1"
        };
        assert!(audit.iter().any(|e| noted(&e)), "{method} {path}");
    }
    site.end().await;
}
