//! `meshctl authz` and `meshctl check`: what is said of policies is what calls meet, and whatever is wrong in the mesh is
//! named by its check.

use std::collections::BTreeMap;

use meshwork_tests::control::Control;
use meshwork_tests::wait::{SOON, check, wait_until};
use serde_json::Value;

use crate::pair::{Pair, mesh_name, owner};

fn policy(name: &str, enforce: &str, caller: &str) -> String {
    format!(
        "apiVersion: meshwork.io/v1alpha1\nkind: Policy\nmetadata: {{name: {name}, namespace: shop}}\n\
         spec: {{service: {name}, enforce: {enforce}, rules: [{{name: r, from: [{{identity: {caller}}}]}}]}}\n"
    )
}

/// The line of the table that begins so, its cells parted by one blank.
#[track_caller]
fn line(page: &str, begins: &str) -> String {
    let mut lines = page
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "));
    let found = lines.find(|line| line.starts_with(begins));
    found.unwrap_or_else(|| panic!("no line `{begins}`:\n{page}"))
}

#[test]
fn what_is_said_of_policies_is_what_calls_meet() {
    let pair = Pair::new("authz_says");
    let _web = pair.web("http", "");
    pair.client.serve("other", &owner("other"), &[]);
    let meshctl = |words: &str| pair.control.meshctl(words).ok();
    let decided = |caller: &str, expected: &str| {
        let page = meshctl(&format!("authz shop/web --from {caller}"));
        let line = line(&page, "shop/web 80 ");
        assert!(line.ends_with(expected), "{line}");
    };
    let met = |cgroup: &str, expected: &str| {
        let call = format!("curl -sS -m 5 -D - http://{}/", mesh_name("web"));
        wait_until(&format!("{expected} for {cgroup}"), SOON, || {
            let text = pair.client.host.cmd(&call).cgroup(cgroup).output().stdout;
            check(text.contains(expected), text)
        });
    };
    let table = meshctl("authz");
    let rule = line(&table, "shop/web all mesh everyone/");
    assert!(rule.contains(" on everyone of corp.test"), "{rule}");
    decided("shop/other", "allowed everyone/mesh");
    decided("host:client", "allowed everyone/mesh");
    decided("10.77.0.99", "allowed everyone");
    met("other", " 200 ");

    pair.control.apply(&policy("web", "on", "shop/client")).ok();
    let rule = line(&meshctl("authz shop/web"), "shop/web ");
    assert_eq!(
        rule,
        "shop/web all service shop/web web/r on shop/client of corp.test"
    );
    decided("shop/client", "allowed web/r");
    decided("shop/other", "denied web");
    decided("host:client", "denied web");
    decided("spiffe://evil.test/ns/shop/sa/client", "denied web");
    decided("10.77.0.99", "denied web");
    met("client", " 200 ");
    met("other", "x-meshwork-reason: not_allowed");

    pair.control
        .apply(&policy("web", "audit", "shop/client"))
        .ok();
    decided("shop/other", "audited web");
    decided("10.77.0.99", "audited web");
    met("other", " 200 ");

    for (words, said) in [
        ("authz shop/nothing", "not_found"),
        ("authz shop/web --from 'a b'", "characters that no name has"),
        ("authz shop/web --from web", "is no caller"),
    ] {
        let output = pair.control.meshctl(words);
        assert!(
            !output.status.success() && output.stderr.contains(said),
            "{output}"
        );
    }
}

/// The verdict of each check, and what it found.
fn checks(control: &Control) -> BTreeMap<String, (String, String)> {
    let output = control.meshctl("check -o json");
    let value: Value =
        serde_json::from_str(&output.stdout).unwrap_or_else(|e| panic!("{e}: {output}"));
    let all = value["checks"].as_array().expect("checks").iter();
    let text = |check: &Value, field: &str| check[field].as_str().unwrap_or_default().to_owned();
    let all: BTreeMap<_, _> = all
        .map(|c| {
            let details = c.get("details").map(Value::to_string).unwrap_or_default();
            let found = format!("{} {details}", text(c, "found"));
            (text(c, "name"), (text(c, "verdict"), found))
        })
        .collect();
    let failed = all.values().any(|(verdict, _)| verdict == "failed");
    assert_eq!(output.status.code(), Some(i32::from(failed)), "{output}");
    all
}

/// Waits until exactly these checks came out so; all others are ok.
#[track_caller]
fn wait_only(control: &Control, expected: &[(&str, &str, &str)]) {
    wait_until(&format!("{expected:?}"), Control::NOTICED, || {
        let all = checks(control);
        for (name, (verdict, found)) in &all {
            let wanted = expected.iter().find(|(wanted, ..)| wanted == name);
            let (wanted, word) = wanted.map_or(("ok", ""), |(_, verdict, word)| (*verdict, *word));
            check(
                verdict == wanted && found.contains(word),
                format!("{name} is {verdict}: {found}, of {all:?}"),
            )?;
        }
        Ok(())
    });
}

const SHOP: &str = "apiVersion: meshwork.io/v1alpha1\nkind: Policy\nmetadata: {name: shop, namespace: shop}\n\
     spec: {rules: [{name: all, from: [{namespace: shop}]}]}\n";

#[test]
fn what_is_wrong_in_the_mesh_is_named() {
    let mut pair = Pair::new("meshctl_check");
    let web = pair.web("http", "");
    let everyone = (
        "policy_everyone",
        "warning",
        "1 of 1 services [\"shop/web\"]",
    );
    wait_only(&pair.control, &[everyone]);
    let page = pair.control.meshctl("check").ok();
    for part in [
        "WARNING  policy_everyone ",
        "do: give each namespace",
        "ok       hosts  ",
    ] {
        assert!(page.contains(part), "{part} is missing:\n{page}");
    }
    pair.control.apply(SHOP).ok();
    pair.control.meshctl("delete policy /everyone").ok();
    wait_only(&pair.control, &[]);

    pair.control.apply(&policy("wbe", "on", "shop/client")).ok();
    wait_only(
        &pair.control,
        &[("policy_unmatched", "warning", "no shop/wbe")],
    );
    pair.control.meshctl("delete policy shop/wbe").ok();
    pair.control
        .apply(&policy("web", "audit", "shop/client"))
        .ok();
    wait_only(
        &pair.control,
        &[("policy_audit", "warning", "web of service shop/web")],
    );
    pair.control.meshctl("delete policy shop/web").ok();
    pair.control.meshctl("delete policy shop/shop").ok();
    let none = ("policies", "failed", "all calls are denied");
    wait_only(&pair.control, &[none]);
    pair.control.apply(SHOP).ok();
    wait_only(&pair.control, &[]);

    // A service whose program is gone, and one with other ports than its owner's.
    drop(web);
    let unhealthy = ("reports", "failed", "unhealthy");
    let unserved = ("endpoints", "warning", "shop/web");
    wait_only(&pair.control, &[unhealthy, unserved]);
    let locations = "location / { return 200 \"hello\\n\"; }";
    let _web = meshwork_tests::servers::nginx(&pair.server.host, "web", 80, locations);
    wait_only(&pair.control, &[]);
    pair.client.serve("web", &owner("web"), &[(81, "http")]);
    wait_only(&pair.control, &[("reports", "failed", "service_conflict")]);
    std::fs::remove_file(pair.client.host.dir().join("services.d/web.toml")).unwrap();
    wait_only(&pair.control, &[]);

    pair.client.kill9();
    wait_only(&pair.control, &[("hosts", "warning", "client (")]);
    pair.client.start();
    wait_only(&pair.control, &[]);

    pair.control.kill9();
    let output = pair.control.meshctl("check");
    assert_eq!(output.status.code(), Some(3), "{output}");
    assert!(output.stdout.contains("FAILED   control"), "{output}");
    // It waits for the control that somebody starts meanwhile.
    std::thread::scope(|scope| {
        let mut again = pair.control.same();
        let control = &pair.control;
        let waits = scope.spawn(|| control.meshctl("check --wait 25s"));
        again.run();
        let output = waits.join().expect("the command");
        assert!(output.ok().contains("ok       control "));
        again.stop();
    });
}
