//! Names of the mesh through the resolver that a host has: systemd-resolved, or dnsmasq. All other names go where they
//! went, and nothing of it is left when the host leaves.

use meshwork_tests::machine::Machine;
use meshwork_tests::process::Output;
use meshwork_tests::wait::{SOON, check, wait_until};

use meshwork_tests::booted::{
    Mesh, declare_client, declare_web, install_deb, join, run_client, serve_web, wait_answer,
};

const WEB: &str = "web.shop.mesh.internal";
/// A name of the site and its address, which are the site's server's to know.
const SITE: &str = "www.site.test";
const SITE_ADDRESS: &str = "100.64.0.7";
const DROP_IN: &str = "/etc/dnsmasq.d/meshwork.conf";
/// What an operator has in files, and what stands in the directories of resolvers.
const FILES: &str = "find /etc -type f -exec sha256sum {} + | sort -k2; ls -l /etc/resolv.conf; ls -A /etc/dnsmasq.d";

/// A server of names for the site, on control's machine, that writes down what it is asked.
fn site_server(mesh: &Mesh) -> String {
    let address = mesh.control.host.v4();
    mesh.control.ok(&format!(
        "systemd-run --quiet --unit=site-names dnsmasq --keep-in-foreground --conf-file=/dev/null --no-resolv --no-hosts \
         --bind-interfaces --listen-address={address} --address=/{SITE}/{SITE_ADDRESS} --log-queries \
         --log-facility=/run/site-names.log"
    ));
    address.to_string()
}

/// A host that will call and one that will serve, with nothing of ours yet.
fn machines(mesh: &Mesh) -> (Machine, Machine) {
    let (client, server) = (mesh.machine("client"), mesh.machine("server"));
    run_client(&client);
    serve_web(&server);
    (client, server)
}

#[track_caller]
fn join_both(mesh: &Mesh, client: &Machine, server: &Machine) {
    install_deb(client);
    install_deb(server);
    declare_web(server);
    declare_client(client);
    for machine in [server, client] {
        join(machine, &mesh.token()).ok();
    }
}

fn lookup(machine: &Machine, name: &str) -> Output {
    machine.run(&format!("getent ahostsv4 {name}"))
}

#[track_caller]
fn wait_name(machine: &Machine, name: &str, address: &str) {
    wait_until(&format!("{name} to be {address}"), SOON, || {
        let found = lookup(machine, name);
        check(found.stdout.starts_with(address), found.to_string())
    });
}

#[track_caller]
fn wait_no_name(machine: &Machine, name: &str) {
    wait_until(&format!("{name} to be no name"), SOON, || {
        let found = lookup(machine, name);
        check(!found.status.success(), found.to_string())
    });
}

/// Both kinds of names, and calls, work; and the site's server was never asked for one of the mesh.
#[track_caller]
fn works(mesh: &Mesh, client: &Machine, server: &Machine) {
    wait_name(client, WEB, "252.64.");
    wait_name(client, SITE, SITE_ADDRESS);
    wait_answer(client, server);
    let asked = mesh.control.ok("cat /run/site-names.log");
    assert!(asked.contains(SITE), "{asked}");
    assert!(!asked.contains("mesh.internal"), "{asked}");
}

/// The same after a time in which names of the mesh went where all do.
#[track_caller]
fn works_again(mesh: &Mesh, client: &Machine, server: &Machine) {
    wait_name(client, WEB, "252.64.");
    mesh.control.ok(": > /run/site-names.log");
    works(mesh, client, server);
}

#[track_caller]
fn is_wired_by(machine: &Machine, wiring: &str) {
    let status = machine.ok("mesh-agent status");
    let line = status.lines().find(|line| line.starts_with("names "));
    assert!(
        line.is_some_and(|line| line.contains(&format!("by {wiring} at 252.64.0.1:7453"))),
        "{status}"
    );
    let checked = machine.run("mesh-agent check").stdout;
    let names = checked.lines().find(|line| line.contains("names "));
    assert!(
        names.is_some_and(|line| line.contains("ok") && line.contains(wiring)),
        "{checked}"
    );
}

/// How often the agent of a host put back what others took.
fn repairs(machine: &Machine) -> u64 {
    let metrics =
        machine.ok("curl -sS --unix-socket /run/meshwork-agent/agent.sock http://agent/metrics");
    let line = metrics
        .lines()
        .find(|line| line.starts_with("mesh_capture_repairs "));
    let number = line.and_then(|line| line.rsplit(' ').next()?.parse().ok());
    number.unwrap_or_else(|| panic!("{metrics}"))
}

#[test]
fn resolved_asks_the_agent_for_names_of_the_mesh_only() {
    let mesh = Mesh::new("resolved_asks_the_agent");
    let site = site_server(&mesh);
    let (client, server) = machines(&mesh);
    let text = format!("[Resolve]\nDNS={site}\nDNSSEC=no\n");
    client.write("etc/systemd/resolved.conf.d/site.conf", &text);
    client.ok("systemctl enable --now systemd-resolved");
    client.ok("ln -sf ../run/systemd/resolve/stub-resolv.conf /etc/resolv.conf");
    wait_name(&client, SITE, SITE_ADDRESS);
    let before = client.ok(FILES);

    join_both(&mesh, &client, &server);
    works(&mesh, &client, &server);
    is_wired_by(&client, "resolved");
    // Who has no such resolver has the line as ever.
    assert!(server.ok("cat /etc/resolv.conf").starts_with("# meshwork:"));
    let link = client.ok("resolvectl status mesh0");
    assert!(
        link.contains("-DefaultRoute") && link.contains("~mesh.internal"),
        "{link}"
    );
    let vip = lookup(&client, WEB).ok();
    let vip = vip.split_whitespace().next().expect("an address");
    assert!(client.ok(&format!("getent hosts {vip}")).contains(WEB));

    // It starts anew, and somebody makes it forget.
    client.ok("systemctl restart systemd-resolved");
    works(&mesh, &client, &server);
    let repaired = repairs(&client);
    client.ok("resolvectl revert mesh0");
    wait_until("the domain to be put back", SOON, || {
        let domains = client.ok("resolvectl domain mesh0");
        check(domains.contains("~mesh.internal"), domains)
    });
    wait_until("that to be counted", SOON, || {
        let now = repairs(&client);
        check(now == repaired + 1, now.to_string())
    });
    works(&mesh, &client, &server);

    // As udev does with links that it was not told to leave alone: nothing is asked there any more, which is said.
    client.ok("ip link set mesh0 address 02:00:00:00:00:02");
    wait_until("the check to tell", SOON, || {
        let checked = client.run("mesh-agent check").stdout;
        check(checked.contains("has no carrier"), checked)
    });
    client.ok("systemctl stop mesh-agent mesh-guard && systemctl start mesh-agent");
    works_again(&mesh, &client, &server);

    // Stopped: the link stays, and nobody is asked there.
    client.ok("systemctl stop mesh-agent");
    assert!(
        !client
            .ok("resolvectl domain mesh0")
            .contains("mesh.internal")
    );
    client.ok("systemctl start mesh-agent");
    works(&mesh, &client, &server);

    // It is killed, and all of it goes with the host's leave.
    client.ok("systemctl kill --signal=KILL mesh-agent; mesh-agent leave");
    let left = client.ok("resolvectl status");
    assert!(!left.contains("mesh"), "{left}");
    wait_name(&client, SITE, SITE_ADDRESS);
    client.ok("dpkg --purge meshwork-agent");
    assert_eq!(client.ok(FILES), before);
}

#[test]
fn dnsmasq_asks_the_agent_for_names_of_the_mesh_only() {
    let mesh = Mesh::new("dnsmasq_asks_the_agent");
    let site = site_server(&mesh);
    let (client, server) = machines(&mesh);
    // It listens at all addresses, as it does by itself, and lets no name be an address of a private range.
    let text = format!("no-resolv\nserver={site}\nstop-dns-rebind\n");
    client.write("etc/dnsmasq.d/site.conf", &text);
    client.ok("systemctl enable --now dnsmasq");
    client.write("etc/resolv.conf", "nameserver 127.0.0.1\n");
    wait_name(&client, SITE, SITE_ADDRESS);
    let before = client.ok(FILES);

    // It would not take its own configuration any more: it is left to run with what it has.
    client.write("etc/dnsmasq.d/broken.conf", "no-such-option\n");
    join_both(&mesh, &client, &server);
    let status = client.ok("mesh-agent status");
    assert!(status.contains("NOT WIRED IN by dnsmasq"), "{status}");
    assert!(status.contains("broken.conf"), "{status}");
    client.ok("systemctl is-active dnsmasq");
    wait_name(&client, SITE, SITE_ADDRESS);
    client.ok("rm /etc/dnsmasq.d/broken.conf");
    works_again(&mesh, &client, &server);
    is_wired_by(&client, "dnsmasq");
    let vip = lookup(&client, WEB).ok();
    let vip = vip.split_whitespace().next().expect("an address");
    assert!(client.ok(&format!("getent hosts {vip}")).contains(WEB));

    // The agent starts anew, and dnsmasq does not.
    let started = "systemctl show --property=ExecMainStartTimestampMonotonic dnsmasq";
    let since = client.ok(started);
    client.ok("systemctl restart mesh-agent");
    works(&mesh, &client, &server);
    client.ok("systemctl reload mesh-agent");
    works(&mesh, &client, &server);
    assert_eq!(client.ok(started), since);

    // Somebody takes the file away.
    let repaired = repairs(&client);
    client.ok(&format!("rm {DROP_IN}"));
    wait_until("the file to be put back", SOON, || {
        let there = client.run(&format!("cat {DROP_IN}"));
        check(there.status.success(), there.to_string())
    });
    wait_until("that to be counted", SOON, || {
        let now = repairs(&client);
        check(now == repaired + 1, now.to_string())
    });
    works_again(&mesh, &client, &server);

    // Another wiring undoes it, and comes back.
    client.ok("cp /etc/meshwork/agent.toml /root/agent.toml");
    client.ok("sed -i 's/^wiring = .*/wiring = \"off\"/' /etc/meshwork/agent.toml");
    client.ok("systemctl reload mesh-agent");
    wait_no_name(&client, WEB);
    assert!(!client.run(&format!("cat {DROP_IN}")).status.success());
    client.ok("cp /root/agent.toml /etc/meshwork/agent.toml && systemctl reload mesh-agent");
    let status = client.ok("mesh-agent status");
    assert!(status.contains("by dnsmasq"), "{status}");
    wait_name(&client, WEB, "252.64.");

    // It is killed, and all of it goes with the host's leave.
    client.ok("systemctl kill --signal=KILL mesh-agent; mesh-agent leave");
    assert!(!client.run(&format!("cat {DROP_IN}")).status.success());
    wait_no_name(&client, WEB);
    wait_name(&client, SITE, SITE_ADDRESS);

    // So it does with the package.
    join(&client, &mesh.token()).ok();
    wait_name(&client, WEB, "252.64.");
    client.ok("dpkg --purge meshwork-agent");
    wait_no_name(&client, WEB);
    wait_name(&client, SITE, SITE_ADDRESS);
    assert_eq!(client.ok(FILES), before);
}
