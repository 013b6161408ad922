//! `mesh-agent check`: where all is well nothing fails, and whatever is broken on a host is named by its check.

use std::collections::BTreeMap;

use meshwork_tests::agent::Agent;
use meshwork_tests::control::{Control, TokenOptions};
use meshwork_tests::servers;
use meshwork_tests::site::Site;
use meshwork_tests::wait::{SOON, check, wait_until};
use serde_json::Value;

use crate::pair::{Pair, mesh_name, owner};

/// The verdict of each check, and what it found.
fn checks(agent: &Agent) -> BTreeMap<String, (String, String)> {
    let output = agent.command("check -o json");
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
fn wait_only(agent: &Agent, expected: &[(&str, &str, &str)]) {
    wait_until(&format!("{expected:?}"), SOON, || {
        let all = checks(agent);
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

#[track_caller]
fn called(pair: &Pair) {
    let call = format!("curl -sS -m 10 http://{}/", mesh_name("web"));
    assert_eq!(pair.ok(&call), "hello\n");
}

#[test]
fn what_is_broken_on_a_host_is_named() {
    let mut pair = Pair::new("check_broken");
    let web = pair.web("http", "");
    called(&pair);
    wait_only(&pair.client, &[]);
    wait_only(&pair.server, &[]);
    let page = pair.client.command("check").ok();
    let lines = [
        "ok       agent ",
        "ok       peers         1 of 1 agents that are in use answer\n",
        "ok       names         web.shop.mesh.internal is resolved to ",
        "\n0 failed, 0 warnings, 0 skipped, 21 ok\n",
    ];
    for line in lines {
        assert!(page.contains(line), "{line} is missing:\n{page}");
    }
    let client = &pair.client.host.clone();

    client.ok("ip rule add priority 100 fwmark 0x1/0x1 lookup 100");
    wait_only(&pair.client, &[("clashes", "failed", "before ours does")]);
    client.ok("ip rule del priority 100");
    client.ok("ip route add 192.0.2.0/24 dev lo table 7441");
    wait_only(&pair.client, &[("clashes", "failed", "not ours")]);
    client.ok("ip route del 192.0.2.0/24 dev lo table 7441");

    // The holder puts it back.
    client.ok("ip rule del priority 744");
    wait_until("the repair", SOON, || {
        let (verdict, found) = checks(&pair.client)["door"].clone();
        check(
            found.contains("was put back"),
            format!("{verdict}: {found}"),
        )
    });
    wait_only(&pair.client, &[]);

    let resolver = client.resolv_conf();
    let wired = std::fs::read_to_string(&resolver).unwrap();
    std::fs::write(
        &resolver,
        "nameserver 127.0.0.9\noptions timeout:1 attempts:1\n",
    )
    .unwrap();
    wait_only(&pair.client, &[("names", "failed", "is not resolved")]);
    std::fs::write(&resolver, wired).unwrap();
    wait_only(&pair.client, &[]);

    pair.client
        .write_file("wrong.toml", "nmespace = \"shop\"\n");
    wait_only(&pair.client, &[("files", "failed", "wrong.toml")]);
    std::fs::remove_file(client.dir().join("services.d/wrong.toml")).unwrap();
    wait_only(&pair.client, &[]);

    // A stranger takes the port of a service whose program is gone.
    drop(web);
    let stranger = pair
        .server
        .host
        .cmd("exec /usr/bin/python3 -m http.server 80");
    let stranger = stranger.cgroup("stranger").spawn("stranger");
    pair.server.host.wait_listening(80, SOON);
    wait_only(
        &pair.server,
        &[("ports", "failed", "held by another program")],
    );
    drop(stranger);
    let locations = "location / { return 200 \"hello\\n\"; }";
    let _web = servers::nginx(&pair.server.host, "web", 80, locations);

    pair.server.kill9();
    wait_until("the loss of the peer", SOON, || {
        let (verdict, found) = checks(&pair.client)["peers"].clone();
        check(
            found.contains("peer_unreachable"),
            format!("{verdict}: {found}"),
        )
    });
    let alone = checks(&pair.server);
    assert_eq!(alone["agent"].0, "failed", "{alone:?}");
    assert_eq!(alone["control"].0, "skipped", "{alone:?}");
    assert_eq!(
        alone["routes"].0, "failed",
        "its table went with it: {alone:?}"
    );
    // It waits for the agent that somebody starts meanwhile.
    let again = std::thread::scope(|scope| {
        let server = &pair.server;
        let waits = scope.spawn(|| server.command("check --wait 60s"));
        let mut again = Agent::new(&server.host);
        again.start();
        let output = waits.join().expect("the command");
        assert!(output.ok().contains("ok       agent "));
        again
    });
    wait_only(&again, &[]);
}

#[test]
fn a_lost_control_and_an_old_index_are_named() {
    let mut pair = Pair::new("check_control_lost");
    let _web = pair.web("http", "");
    called(&pair);
    wait_only(&pair.client, &[]);
    pair.control.kill9();
    wait_until("the agent to miss control", Control::NOTICED, || {
        let all = checks(&pair.client);
        let (control, index) = (&all["control"], &all["index"]);
        check(
            control.0 == "failed" && index.0 == "warning" && index.1.contains(" old"),
            format!("{all:?}"),
        )
    });
    pair.control.run();
    wait_only(&pair.client, &[]);
}

/// Clocks that differ are named before certificates are judged wrongly.
#[test]
fn a_clock_that_is_off_is_named() {
    let mut pair = Pair::new("check_clock");
    let _web = pair.web("http", "");
    for (seconds, verdict, words) in [
        (10, "warning", "10."),
        (-10, "warning", "behind control's"),
        (120, "failed", "ahead of control's"),
    ] {
        pair.client.stop();
        pair.client.start_off_clock(seconds);
        called(&pair);
        wait_only(&pair.client, &[("clock", verdict, words)]);
        // And at control, by the beats of the host.
        wait_until("control to name it", SOON, || {
            let output = pair.control.meshctl("check -o json");
            let value: Value = serde_json::from_str(&output.stdout).map_err(|e| e.to_string())?;
            let all = value["checks"].as_array().cloned().unwrap_or_default();
            let found = all.iter().find(|c| c["name"] == "host_clocks");
            let same = found.is_some_and(|c| {
                c["verdict"] == verdict && c["details"].to_string().contains("client is ")
            });
            check(same, value.to_string())
        });
    }
    pair.client.stop();
    pair.client.start();
    wait_only(&pair.client, &[]);
}

/// The firewall drops what comes in: control can not prove the address, and both are said.
#[test]
fn a_firewall_before_the_mesh_port_is_named() {
    let site = Site::new("check_firewall");
    let control = Control::start(&site);
    let host = site.host("closed");
    host.ok(
        "nft add table inet filter && \
         nft 'add chain inet filter input { type filter hook input priority 0 ; policy drop ; }' && \
         nft add rule inet filter input iif lo accept && \
         nft add rule inet filter input ct state established accept && \
         nft add rule inet filter input meta l4proto ipv6-icmp accept",
    );
    let agent = control.join(&host, &TokenOptions::default());
    let nginx = servers::nginx(&host, "web", 80, "location / { return 200 \"x\"; }");
    agent.serve("web", &owner("web"), &[(80, "http")]);
    wait_until("the doubt of control", Control::NOTICED, || {
        let all = checks(&agent);
        let failed = |name: &str| all[name].0 == "failed";
        check(
            failed("mesh_port") && failed("firewall"),
            format!("{all:?}"),
        )
    });
    let all = checks(&agent);
    assert!(
        all["firewall"]
            .1
            .contains("chain `input` of table `filter`"),
        "{all:?}"
    );
    // Its rules track connections, which is said, and is no fault.
    assert!(all["conntrack"].1.contains("are tracked"), "{all:?}");
    host.ok("nft insert rule inet filter input tcp dport 7441 accept");
    wait_until("the proof", Control::NOTICED, || {
        let all = checks(&agent);
        check(
            all["mesh_port"].0 == "ok" && all["firewall"].0 == "ok",
            format!("{all:?}"),
        )
    });
    drop(nginx);
}

/// What people must replace is told where they look, in time, and more pressingly as the end comes near.
#[test]
fn an_authority_near_its_end_is_named() {
    const DAY: i64 = 24 * 3600;
    let site = Site::new("check_authority");
    let mut control = Control::start(&site);
    // The issuer lives for a year.
    for (days, alarm, verdict) in [
        (300, None, "ok"),
        (306, Some("plan"), "warning"),
        (336, Some("act"), "warning"),
        (359, Some("urgent"), "failed"),
    ] {
        control.stop();
        control.run_off_clock(days * DAY);
        let left = |certificate: &str| {
            let labels = [("certificate", certificate)];
            let metrics = control.metrics();
            let seconds = metrics.sum("mesh_control_certificate_remaining_seconds", &labels);
            (seconds / DAY as f64).round() as i64
        };
        assert_eq!((left("issuer"), left("root")), (365 - days, 3650 - days));
        let status = control.meshctl_off_clock("status -o json").ok();
        let status: Value = serde_json::from_str(&status).unwrap();
        let certificates = status["certificates"].as_array().unwrap();
        let issuer = certificates.iter().find(|c| c["name"] == "issuer").unwrap();
        assert_eq!(issuer["alarm"].as_str(), alarm, "{days}: {status}");
        let output = control.meshctl_off_clock("check -o json");
        let value: Value = serde_json::from_str(&output.stdout).unwrap();
        let checks = value["checks"].as_array().unwrap();
        let found = checks.iter().find(|c| c["name"] == "certificates").unwrap();
        assert_eq!(found["verdict"], verdict, "{days}: {found}");
        let named = found["details"].to_string().contains("the issuer ends ");
        assert_eq!(named, alarm.is_some(), "{days}: {found}");
        assert_eq!(output.status.success(), verdict != "failed", "{output}");
    }
}

/// A leaf that should have been renewed and was not.
#[test]
fn a_leaf_near_its_end_is_named() {
    let mut pair = Pair::new("check_leaf");
    let _web = pair.web("http", "");
    called(&pair);
    wait_only(&pair.client, &[]);
    pair.age_the_clients_leaf();
    wait_until("the leaf to be named", SOON, || {
        let (verdict, found) = &checks(&pair.client)["certificates"];
        let named = found.contains("little life is left") && found.contains("shop.client");
        check(verdict == "warning" && named, format!("{verdict}: {found}"))
    });
    pair.control.run();
    pair.wait_for_the_clients_second_leaf();
    wait_only(&pair.client, &[]);
}

/// What another program has is left to it: ours get other numbers.
#[test]
fn numbers_that_another_program_has_are_left_to_it() {
    let mut pair = Pair::new("check_numbers");
    let _web = pair.web("http", "");
    called(&pair);
    let client = pair.client.host.clone();
    client.ok("ip route add 192.0.2.0/24 dev lo table 7441");
    wait_only(&pair.client, &[("clashes", "failed", "not ours")]);
    pair.client.stop();
    pair.client
        .configure("[capture]\nroute_table = 7450\nrule_priority = 760\nmark_base = 0x5d000000\n");
    pair.client.start();
    called(&pair);
    wait_only(&pair.client, &[]);
    let rules = client.ok("ip rule");
    assert!(
        rules.contains("760:") && rules.contains("lookup 7450"),
        "{rules}"
    );
    assert!(!rules.contains("lookup 7441"), "{rules}");
    let theirs = client.ok("ip route show table 7441");
    assert!(theirs.contains("192.0.2.0/24"), "{theirs}");
}
