//! `meshctl edges`: who really calls is listed with its identity or as plaintext, with since when.

use std::fs;

use mesh_api::proto;
use mesh_api::stored::{seal, unseal};
use meshwork_tests::control::Control;
use meshwork_tests::wait::{SOON, check, wait_until};
use serde_json::Value;

use crate::pair::{Pair, mesh_name, owner, spiffe, spiffe_host};

/// The edges that control lists now.
fn edges(control: &Control, words: &str) -> Vec<Value> {
    let text = control.meshctl(&format!("edges -o json {words}")).ok();
    let value: Value = serde_json::from_str(&text).expect("JSON");
    value["items"].as_array().expect("items").clone()
}

/// Waits until there is an edge of this caller and verdict, and returns it.
#[track_caller]
fn wait_edge(control: &Control, caller: &str, tls: &str, verdict: &str) -> Value {
    wait_until(
        &format!("the edge {caller} {tls} {verdict}"),
        Control::NOTICED,
        || {
            let all = edges(control, "");
            let found = all
                .iter()
                .find(|e| e["caller"] == caller && e["tls"] == tls && e["verdict"] == verdict);
            found.cloned().ok_or_else(|| format!("{all:?}"))
        },
    )
}

#[test]
fn every_edge_has_identities_or_is_plaintext() {
    let pair = Pair::new("edges_listed");
    let _web = pair.web("http", "");
    pair.client.serve("other", &owner("other"), &[]);
    let call = format!("curl -sS -m 5 http://{}/", mesh_name("web"));
    assert_eq!(pair.ok(&call), "hello\n");
    let client = &pair.client.host;
    client.ok(&call);
    let own = wait_edge(&pair.control, &spiffe("client"), "mTLS", "passed");
    assert_eq!(
        (&own["service"], &own["port"]),
        (&"shop/web".into(), &80.into()),
        "{own}"
    );
    assert_eq!(own["hosts"][0], "server", "{own}");
    wait_edge(&pair.control, &spiffe_host(client), "mTLS", "passed");
    assert_eq!(edges(&pair.control, "--plaintext"), Vec::<Value>::new());

    // Past the mesh, straight to the program's port.
    let straight = format!("curl -sS -m 5 http://{}/", pair.server.host.v4());
    assert_eq!(client.ok(&straight), "hello\n");
    let from = client.v4().to_string();
    let first = wait_edge(&pair.control, &from, "plaintext", "passed");
    client.ok(&straight);
    let again = wait_until("one more call", Control::NOTICED, || {
        let edge = wait_edge(&pair.control, &from, "plaintext", "passed");
        let more = first["calls"].as_u64() < edge["calls"].as_u64();
        check(more, edge.to_string()).map(|()| edge)
    });
    assert_eq!(first["since"], again["since"], "since when is kept");
    let page = pair.control.meshctl("edges --plaintext").ok();
    assert!(
        page.contains(&from) && !page.contains("spiffe://"),
        "{page}"
    );
    let found = pair.control.meshctl("check").ok();
    let line = format!("shop/web:80 is called in plaintext from {from} since ");
    assert!(found.contains(&line), "{found}");

    let policy = |enforce: &str| {
        format!(
            "apiVersion: meshwork.io/v1alpha1\nkind: Policy\nmetadata: {{name: web, namespace: shop}}\n\
             spec: {{service: web, enforce: {enforce}, rules: [{{name: r, from: [{{identity: shop/client}}]}}]}}\n"
        )
    };
    pair.control.apply(&policy("audit")).ok();
    let other = || client.cmd(&call).cgroup("other").output();
    wait_until("an audited call", Control::NOTICED, || {
        let output = other();
        check(output.stdout == "hello\n", output.to_string())?;
        let all = edges(&pair.control, "");
        let audited = all
            .iter()
            .any(|e| e["verdict"] == "audited" && e["caller"] == spiffe("other").as_str());
        check(audited, format!("{all:?}"))
    });
    pair.control.apply(&policy("on")).ok();
    wait_until("a refused call", Control::NOTICED, || {
        let output = other();
        check(output.stdout != "hello\n", output.to_string())?;
        let all = edges(&pair.control, "");
        let refused = all
            .iter()
            .any(|e| e["verdict"] == "refused" && e["caller"] == spiffe("other").as_str());
        check(refused, format!("{all:?}"))
    });
    let nothing = pair.control.meshctl("edges shop/nothing").ok();
    assert_eq!(nothing.lines().count(), 1, "{nothing}");
}

const DAY_MS: u64 = 86_400_000;

/// Ports at which nobody called in plaintext for long are proposed for `strict`, and others are not.
#[test]
fn strict_is_proposed_where_it_would_refuse_nobody() {
    let mut pair = Pair::new("strict_is_proposed");
    let _web = pair.web("http", "");
    let old = pair
        .server
        .host
        .cmd("exec /usr/bin/python3 -m http.server 81");
    let _old = old.cgroup("old").spawn("old");
    pair.server.host.wait_listening(81, SOON);
    pair.declare("old", 81, "http");
    let listed = |pair: &Pair| pair.control.meshctl("edges");
    // Both are watched, for minutes only.
    let kept = pair.server.host.dir().join("state/edges");
    let watched = || -> Result<proto::Edges, String> {
        let bytes = fs::read(&kept).map_err(|e| e.to_string())?;
        let edges: proto::Edges = unseal(&bytes).map_err(|e| e.to_string())?;
        let count = edges.watched.len();
        check(count == 2, format!("{count} are watched")).map(|()| edges)
    };
    let mut edges = wait_until("both ports to be watched", Control::NOTICED, watched);
    assert!(!listed(&pair).stderr.contains("would refuse nobody"));
    // As they are on its disk after nine days, in the last two of which somebody called one of them.
    pair.server.stop();
    let now_ms = edges.watched[0].since_ms;
    for port in &mut edges.watched {
        port.since_ms -= 9 * DAY_MS;
    }
    edges.edges.push(proto::Edge {
        service: Some(proto::ServiceRef {
            namespace: "shop".to_owned(),
            name: "old".to_owned(),
        }),
        port: 81,
        address: pair.client.host.v4().to_string(),
        verdict: "passed".to_owned(),
        calls: 1,
        first_ms: now_ms - 8 * DAY_MS,
        last_ms: now_ms - 2 * DAY_MS,
        ..proto::Edge::default()
    });
    fs::write(&kept, seal(&edges)).unwrap();
    pair.server.start();
    let proposed = "shop/web port 80 saw no plaintext caller since ";
    wait_until("the proposal", Control::NOTICED, || {
        let output = listed(&pair);
        check(output.stderr.contains(proposed), output.to_string())
    });
    let output = listed(&pair);
    assert!(!output.stderr.contains("shop/old"), "{output}");
    assert!(output.stdout.contains("shop/old"), "{output}");
    let found = pair.control.meshctl("check").stdout;
    assert!(found.contains("shop/web:80, since "), "{found}");
    let strict = "apiVersion: v1\nkind: Service\nmetadata: {name: web, namespace: shop, annotations: \
        {meshwork.io/transport: strict}}\nspec: {ports: [{port: 80, appProtocol: http}]}\n";
    pair.control.apply(strict).ok();
    wait_until("the proposal to be heeded", SOON, || {
        let output = listed(&pair);
        let heeded = !output.stderr.contains(proposed);
        check(heeded, output.to_string())
    });
    let call = format!("curl -sS -m 5 http://{}/", mesh_name("web"));
    assert_eq!(pair.ok(&call), "hello\n");
}
