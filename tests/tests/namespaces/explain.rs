//! `mesh-agent explain`: each outcome is said before a call has it, and a real call then has it.

use meshwork_tests::process::Output;
use meshwork_tests::wait::{SOON, check, wait_until};

use crate::pair::{Pair, mesh_name, owner};

fn explain(pair: &Pair, words: &str) -> Output {
    pair.client.command(&format!("explain {words}"))
}

/// The page has these parts, and the command ends as the outcome is.
#[track_caller]
fn says(output: &Output, carried: bool, parts: &[&str]) {
    assert_eq!(output.status.success(), carried, "{output}");
    for part in parts {
        assert!(output.stdout.contains(part), "{part} is missing: {output}");
    }
    let lines = output.stdout.lines().count();
    assert!(lines <= 24, "{lines} lines are no screen: {output}");
}

fn policy(enforce: &str) -> String {
    format!(
        "apiVersion: meshwork.io/v1alpha1\nkind: Policy\nmetadata: {{name: web, namespace: shop}}\n\
         spec: {{service: web, enforce: {enforce}, rules: [{{name: front, from: [{{identity: shop/front}}]}}]}}\n"
    )
}

#[test]
fn each_outcome_is_foretold() {
    let mut pair = Pair::new("explain_outcomes");
    let _web = pair.web("http", "");
    let name = mesh_name("web");
    let call = format!("curl -sS -m 5 -o /dev/null -D - http://{name}/");
    let client = pair.client.host.clone();
    let answers = |expected: &str| {
        wait_until(&format!("a call that has {expected}"), SOON, || {
            let text = client.cmd(&call).cgroup("client").output().stdout;
            check(text.contains(expected), text)
        });
    };
    answers(" 200 ");
    let [vip, vip6] = pair.vips("web");
    for destination in [
        name.clone(),
        format!("http://{name}/a"),
        "shop/web:80".to_owned(),
        format!("{vip}:80"),
        format!("[{vip6}]:80"),
    ] {
        let parts = [
            "shop/web (web.shop.mesh.internal) at",
            "as shop/web, healthy; answers in ",
            "spiffe://corp.test/ns/shop/sa/client",
            "spiffe://corp.test/host/client",
            "allowed by everyone/",
            "carried by mTLS to 1 of 1 endpoints",
        ];
        says(&explain(&pair, &destination), true, &parts);
    }
    let only = explain(&pair, &format!("{name} --as shop/client"));
    assert!(!only.stdout.contains("host/client"), "{only}");
    let refused = |words: &str, reason: &str| {
        says(
            &explain(&pair, words),
            false,
            &[&format!("refused, {reason}: ")],
        );
    };
    refused(&format!("{name}:81"), "no_such_port");
    refused("shop/nothing", "no_such_service");
    let past = ["in plaintext and without identity"];
    says(&explain(&pair, "example.com"), true, &past);
    let real = format!("{}:80", pair.server.host.v4());
    says(&explain(&pair, &real), true, &past);
    let typed = explain(&pair, "'shop/web --as shop/other'");
    assert!(typed.stderr.contains("is no destination"), "{typed}");
    let stranger = explain(&pair, "shop/web --as shop/other");
    assert!(
        stranger.stderr.contains("no workload of this host"),
        "{stranger}"
    );

    pair.control.apply(&policy("on")).ok();
    answers("x-meshwork-reason: not_allowed");
    let denied = ["denied by web", "refused, not_allowed: "];
    says(&explain(&pair, &name), false, &denied);
    pair.control.apply(&policy("audit")).ok();
    answers(" 200 ");
    let audited = ["audited by web", "`enforce: audit` lets it pass"];
    says(&explain(&pair, &name), true, &audited);

    pair.server.kill9();
    answers("x-meshwork-reason: peer_unreachable");
    let gone = ["healthy; peer_unreachable", "refused, peer_unreachable: "];
    let output = explain(&pair, &name);
    let output = match output.stdout.contains("stale") {
        true => output.stdout.replace("stale", "healthy"),
        false => output.stdout,
    };
    assert!(gone.iter().all(|part| output.contains(part)), "{output}");
}

#[test]
fn what_control_would_say_is_not_made_up() {
    let mut pair = Pair::new("explain_without_control");
    let _web = pair.web("http", "");
    assert_eq!(
        pair.ok(&format!("curl -sS http://{}/", mesh_name("web"))),
        "hello\n"
    );
    pair.server.serve("other", &owner("other"), &[(81, "tcp")]);
    pair.wait_name("other");
    pair.control.kill9();
    wait_until(
        "the agent to miss control",
        meshwork_tests::control::Control::NOTICED,
        || {
            let output = explain(&pair, "shop/web");
            check(output.stdout.contains("NOT REACHED"), output.to_string())
        },
    );
    let parts = [
        "not known",
        "carried by mTLS to 1 of 1 endpoints, if the called agent allows it",
    ];
    says(&explain(&pair, "shop/web"), true, &parts);
    says(
        &explain(&pair, "shop/other"),
        false,
        &["refused, endpoints_unknown: "],
    );
    pair.client.stop();
    let output = explain(&pair, "shop/web");
    assert!(output.stderr.contains("the agent does not run"), "{output}");
    assert_eq!(output.status.code(), Some(1), "{output}");
}
