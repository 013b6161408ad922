//! What happens to a machine that is nobody's fault: it gets another address, it sleeps.

use std::fs;

use meshwork_tests::agent::Agent;
use meshwork_tests::control::{Control, TokenOptions};
use meshwork_tests::host::Host;
use meshwork_tests::servers;
use meshwork_tests::site::Site;
use meshwork_tests::wait::{SOON, check, wait_until};
use serde_json::Value;

use crate::pair::{Pair, mesh_name, owner};

/// Joins as most do: control sees the address.
#[track_caller]
fn joined_as_seen(control: &Control, host: &Host) -> Agent {
    let agent = Agent::new(host);
    let token = control.token(&TokenOptions::default().0);
    let name = host.name();
    agent
        .command(&format!("join {token} --host-name {name}"))
        .ok();
    agent.started()
}

fn host_of(control: &Control, name: &str) -> Value {
    let hosts = control.get("hosts");
    let host = hosts.iter().find(|h| h["metadata"]["name"] == name);
    host.cloned().unwrap_or_default()
}

#[track_caller]
fn wait_answer(client: &Agent, name: &str) {
    let call = format!("curl -sS -m 5 http://{}/", mesh_name(name));
    wait_until(&format!("an answer of {name}"), SOON, || {
        let answer = client.host.cmd(&call).cgroup("client").output();
        check(answer.stdout.contains("hello"), answer.to_string())
    });
}

/// As when a lease of DHCP ends in another address.
#[test]
fn a_host_that_moves_is_found_at_its_new_address() {
    let site = Site::new("mishap_moves");
    let control = Control::start(&site);
    let server = joined_as_seen(&control, &site.host("server"));
    let client = joined_as_seen(&control, &site.host("client"));
    client.serve("client", &owner("client"), &[]);
    let locations = "location / { return 200 \"hello\\n\"; }";
    let _web = servers::nginx(&server.host, "web", 80, locations);
    server.serve("web", &owner("web"), &[(80, "http")]);
    control.wait_endpoints("shop/web", 1);
    wait_answer(&client, "web");

    let before = server.host.v4();
    server.host.ok("ip addr add 10.77.0.201/24 dev eth0");
    server.host.ok(&format!("ip addr del {before}/24 dev eth0"));
    // The first address of a subnet takes the others of it along.
    server.host.ok("ip addr replace 10.77.0.201/24 dev eth0");
    wait_until("control to hear of it", SOON, || {
        let host = host_of(&control, "server");
        check(host.to_string().contains("10.77.0.201"), host.to_string())
    });
    control.wait_endpoints("shop/web", 1);
    wait_answer(&client, "web");
    let status = server.command("status").ok();
    assert!(status.contains("10.77.0.201"), "{status}");
    assert!(!status.contains(&before.to_string()), "{status}");
    assert!(
        server.log().contains("this host's address changed"),
        "{}",
        server.log()
    );

    // A further address is no move.
    let also = "ip addr add 10.77.0.202/24 dev eth0";
    server.host.ok(also);
    let mut server = server;
    server.stop();
    server.start();
    control.wait_endpoints("shop/web", 1);
    wait_answer(&client, "web");
    let host = host_of(&control, "server").to_string();
    assert!(host.contains("10.77.0.201"), "{host}");
}

/// Stops all processes of a host's cgroup, or lets them go on.
fn freeze(host: &Host, cgroup: &str, frozen: bool) {
    let file = host.cgroup(cgroup).join("cgroup.freeze");
    fs::write(file, if frozen { "1" } else { "0" }).expect("the cgroup is there");
}

/// As a laptop's lid, or a hypervisor that pauses a guest: nothing runs, nothing arrives, and all goes on later.
#[test]
fn a_host_that_slept_goes_on() {
    let pair = Pair::new("mishap_sleeps");
    let _web = pair.web("http", "");
    wait_answer(&pair.client, "web");
    for (agent, other) in [(&pair.server, "web"), (&pair.client, "client")] {
        let host = &agent.host;
        let name = host.name().to_owned();
        let sleep = |asleep: bool| {
            host.set_link(!asleep);
            for cgroup in ["agent", other] {
                freeze(host, cgroup, asleep);
            }
        };
        sleep(true);
        wait_until("control to miss it", Control::NOTICED, || {
            let host = host_of(&pair.control, &name);
            check(host["status"]["lease"] == "stale", host.to_string())
        });
        sleep(false);
        wait_answer(&pair.client, "web");
        pair.control.wait_endpoints("shop/web", 1);
        wait_until("its checks to pass", SOON, || {
            let page = agent.command("check").to_string();
            check(page.contains("0 failed"), page)
        });
    }
}
