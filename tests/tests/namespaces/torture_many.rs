//! Many connections: at once, in silence, and one after the other.

use meshwork_tests::agent::Agent;
use meshwork_tests::control::TokenOptions;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::pair::owner;
use crate::torture::{HTTP, Rig, TASK_MAX, TCP, app, serve, wait_said};

/// What one idle connection may cost an agent, and what an agent at rest has.
const IDLE_KIB: u64 = 16;
const AT_REST_KIB: u64 = 60 * 1024;
/// Idle connections in all.
const IDLE: u64 = 10_200;
/// An agent gives a quarter of its descriptors to each of callers, peers, calls and apps, and keeps some: with so many one
/// pair has all of them.
const DESCRIPTORS_FOR_ONE_PAIR: u64 = 65_536;
/// Pairs where this process may not raise its limit, which may be 20,000.
const PAIRS: u64 = 3;

#[test]
fn two_thousand_connections_are_served_at_once() {
    let rig = Rig::new("two_thousand_connections", "http");
    let text = rig.run("crowd --connections 2000 --requests 6");
    assert_eq!(text, "answered 12000\n");
    rig.settled();
}

#[test]
fn fifty_thousand_connections_come_and_go() {
    let rig = Rig::new("fifty_thousand_connections", "http");
    assert_eq!(rig.run("churn --times 5000 --parallel 64"), "closed 5000\n");
    let before = rig.memory();
    assert_eq!(
        rig.run("churn --times 45000 --parallel 64"),
        "closed 45000\n"
    );
    let grown = rig.grown(before);
    assert!(
        grown.iter().all(|kib| *kib < 16 * 1024),
        "KiB more: {grown:?}"
    );
    rig.settled();
}

#[test]
fn ten_thousand_idle_connections_live_and_cost_little() {
    let many = DESCRIPTORS_FOR_ONE_PAIR;
    let pairs = match getrlimit(Resource::RLIMIT_NOFILE) {
        Ok((_, hard)) if hard >= many => 1,
        // What is started from here on has it too.
        _ if setrlimit(Resource::RLIMIT_NOFILE, many, many).is_ok() => 1,
        _ => PAIRS,
    };
    let each = IDLE / pairs;
    let rig = Rig::new("ten_thousand_idle", "http");
    let pair = &rig.pair;
    let everything = TokenOptions::default();
    let go = pair.client.host.dir().join("go");
    let words = format!("idle --connections {each} --until {}", go.display());
    let mut tasks = vec![rig.task(&words).spawn("idle")];
    let mut apps = Vec::new();
    let mut others = Vec::new();
    for number in 2..=pairs {
        let [server, client] = ["server", "client"].map(|name| {
            let host = pair.site.host(&format!("{name}{number}"));
            pair.control.join(&host, &everything)
        });
        client.serve("client", &owner("client"), &[]);
        apps.push(serve(&server.host));
        let line = server.owner_line(&owner("app"));
        // The same account, another service: each pair has its own.
        server.write_file(
            "app.toml",
            &format!(
                "namespace = \"shop\"\naccount = \"app\"\n[owner]\n{line}\n[[service]]\nname = \"app{number}\"\n\
                 ports = [{{ port = {HTTP}, protocol = \"http\" }}, {{ port = {TCP}, protocol = \"tcp\" }}]\n"
            ),
        );
        let service = format!("app{number}");
        pair.control.wait_endpoints(&format!("shop/{service}"), 1);
        pair.wait_name(&service);
        let [vip, _] = pair.vips(&service);
        let words = format!("{words} --http {vip}:{HTTP} --tcp {vip}:{TCP}");
        let task = app(&client.host, &words)
            .cgroup("client")
            .deadline(TASK_MAX);
        tasks.push(task.spawn("idle"));
        others.extend([client, server]);
    }
    for task in &mut tasks {
        assert_eq!(wait_said(task, "open "), each.to_string());
    }
    let mut agents = vec![&pair.client, &pair.server];
    agents.extend(&others);
    for agent in &agents {
        let kib = agent.rss_kib();
        assert!(
            kib < AT_REST_KIB + each * IDLE_KIB,
            "{} has {kib} KiB with {each} idle connections",
            agent.host.name()
        );
    }
    let open: f64 = agents
        .iter()
        .map(|agent| agent.metrics().sum("mesh_open_connections", &[]))
        .sum();
    assert_eq!(open, (2 * IDLE) as f64);
    std::fs::write(&go, "").unwrap();
    for task in &mut tasks {
        assert_eq!(wait_said(task, "alive "), each.to_string());
    }
    let client_open = |agent: &Agent| agent.metrics().sum("mesh_open_connections", &[]);
    for agent in agents {
        meshwork_tests::wait::wait_until("all to be closed", meshwork_tests::wait::SOON, || {
            let open = client_open(agent);
            meshwork_tests::wait::check(open == 0.0, format!("{open} are open"))
        });
    }
    rig.settled();
}
