//! Which ports are proposed for `strict`, by what the hosts that serve them say.

use super::harness::Session;
use super::*;
use crate::clock;

const DAY_MS: u64 = 86_400_000;

fn web() -> Option<proto::ServiceRef> {
    Some(proto::ServiceRef {
        namespace: "shop".to_owned(),
        name: "web".to_owned(),
    })
}

/// The port is watched since so many days, and was called in plaintext so many days ago.
fn said(watched: &[u64], called: Option<u64>) -> proto::Edges {
    let now_ms = clock::now_ms();
    let watched = watched.iter().map(|days| proto::WatchedPort {
        service: web(),
        port: 80,
        since_ms: now_ms - days * DAY_MS,
    });
    let edges = called.map(|days| proto::Edge {
        service: web(),
        port: 80,
        address: "192.0.2.7".to_owned(),
        verdict: "passed".to_owned(),
        calls: 3,
        first_ms: now_ms - 20 * DAY_MS,
        last_ms: now_ms - days * DAY_MS,
        ..proto::Edge::default()
    });
    proto::Edges {
        edges: edges.into_iter().collect(),
        watched: watched.collect(),
        overflowed: false,
    }
}

impl Session {
    /// Says who calls; control has taken it by the time this returns.
    async fn tell(&mut self, edges: proto::Edges) {
        self.say(Say::Edges(edges)).await;
        self.say(Say::Beat(proto::Beat::default())).await;
        self.wait(|m| matches!(m, Hear::Beat(_)).then_some(()))
            .await;
    }
}

async fn proposed(site: &Site) -> usize {
    let (_, answer) = site.call(Method::GET, "/v1/edges", Value::Null).await;
    let proposals = answer["proposals"].as_array().expect("a list");
    assert!(proposals.iter().all(|p| p["service"] == "shop/web"));
    proposals.len()
}

#[tokio::test(flavor = "multi_thread")]
async fn strict_is_proposed_when_all_that_serve_a_port_saw_nobody_for_days() {
    let site = Site::new("edges").await;
    let (a, b) = (
        site.agent("vm-1", "10.0.0.1").await,
        site.agent("vm-2", "10.0.0.2").await,
    );
    let mut first = a.session(&site, "boot-1", (0, 0)).await;
    let mut second = b.session(&site, "boot-2", (0, 0)).await;
    for session in [&first, &second] {
        session.report(1, "shop", 80).await;
    }
    second.tell(proto::Edges::default()).await;
    first.tell(said(&[9], None)).await;
    assert_eq!(proposed(&site).await, 0, "the other host watches nothing");
    for (other, expected) in [
        (said(&[9], None), 1),
        (said(&[7], None), 0),
        (said(&[30], Some(2)), 0),
        (said(&[30], Some(9)), 1),
        (
            proto::Edges {
                overflowed: true,
                ..said(&[30], None)
            },
            0,
        ),
        (said(&[9], None), 1),
    ] {
        second.tell(other.clone()).await;
        assert_eq!(proposed(&site).await, expected, "{other:?}");
    }
    second.tell(proto::Edges::default()).await;
    assert_eq!(proposed(&site).await, 0);
    // One host can not speak for two: who says it twice is refused, and what it said is not taken.
    first.say(Say::Edges(said(&[9, 30], None))).await;
    assert_eq!(reason(&first.ended().await), "invalid");
    assert_eq!(proposed(&site).await, 0);
    second.tell(said(&[9], None)).await;
    assert_eq!(proposed(&site).await, 1);
    let strict = json!([{"apiVersion": "v1", "kind": "Service",
        "metadata": {"name": "web", "namespace": "shop", "annotations": {"meshwork.io/transport": "strict"}},
        "spec": {"ports": [{"port": 80, "appProtocol": "http"}]}}]);
    let (status, answer) = site.call(Method::POST, "/v1/apply", strict).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    assert_eq!(proposed(&site).await, 0, "it is strict now");
    site.end().await;
}
