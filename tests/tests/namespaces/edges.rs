//! `meshctl edges`: who really calls is listed with its identity or as plaintext, with since when.

use meshwork_tests::control::Control;
use meshwork_tests::wait::{check, wait_until};
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
