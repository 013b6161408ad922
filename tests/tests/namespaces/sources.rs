//! What a host may say of itself and of services: an address is believed when it is proven, a service's ports are its
//! owner's, its transport is the operator's.

use meshwork_tests::agent::Agent;
use meshwork_tests::control::{Control, TokenOptions};
use meshwork_tests::servers;
use meshwork_tests::site::Site;
use meshwork_tests::wait::{SOON, check, wait_until};
use serde_json::Value;

use crate::pair::{Pair, mesh_name, owner};

/// A host that gives another machine's address for its own gets no calls led there. What spares the other machine is that
/// nobody answers there for that host: where somebody leads its port to the host, the same claim is believed.
#[test]
fn an_address_is_listed_when_its_host_answers_there() {
    let site = Site::new("an_address_is_listed_when_proven");
    let control = Control::start(&site);
    let everything = TokenOptions::default();
    let [server, client] =
        ["server", "client"].map(|name| control.join(&site.host(name), &everything));
    client.serve("client", &owner("client"), &[]);
    let hello = |text: &str| format!("location = / {{ return 200 \"{text}\\n\"; }}");
    let _web = servers::nginx(&server.host, "web", 80, &hello("hello"));
    server.serve("web", &owner("web"), &[(80, "http")]);
    control.wait_endpoints("shop/web", 1);

    let evil = Agent::new(&site.host("evil"));
    let join = |address: &str| {
        let token = control.token(&everything.0);
        evil.command(&format!(
            "join {token} --host-name evil --address {address}"
        ))
    };
    let taken = join(&server.host.v4().to_string());
    assert!(
        !taken.status.success() && taken.stderr.contains("address_taken"),
        "{taken}"
    );
    // No host of the mesh has this one: only asking there tells.
    let victim = site.host("victim");
    let _victim = servers::nginx(&victim, "web", 80, &hello("gotcha"));
    join(&victim.v4().to_string()).ok();
    let mut evil = evil.started();
    let _evil = servers::nginx(&evil.host, "web", 80, &hello("evil"));
    evil.serve("web", &owner("web"), &[(80, "http")]);
    wait_until("the address to be told unproven", SOON, || {
        let status = evil.command("status").ok();
        check(status.contains("address_unproven"), status)?;
        let hosts = format!("{:?}", control.get("hosts"));
        check(hosts.contains("address_unproven"), hosts)
    });
    let call = format!("curl -sS -m 10 http://{}/", mesh_name("web"));
    let call = || client.host.cmd(&call).cgroup("client").ok();
    for _ in 0..10 {
        assert_eq!(call(), "hello\n");
    }
    control.wait_endpoints("shop/web", 1);

    // Somebody who may do that on the other machine leads the mesh's port to the liar: its certificate is there then.
    let (from, to) = (victim.v4(), evil.host.v4());
    victim.ok(&format!(
        "sysctl -q -w net.ipv4.ip_forward=1 && \
         nft 'add table ip lead; add chain ip lead in {{ type nat hook prerouting priority -100; }}; \
         add chain ip lead out {{ type nat hook postrouting priority 100; }}; \
         add rule ip lead in ip daddr {from} tcp dport 7441 dnat to {to}; add rule ip lead out masquerade'"
    ));
    evil.stop();
    evil.start();
    control.wait_endpoints("shop/web", 2);
    wait_until("a call to it", SOON, || {
        let text = call();
        check(text == "evil\n", text)
    });
    victim.ok("nft delete table ip lead");

    // The same host by its own address is called.
    evil.stop();
    evil.command("leave").ok();
    let token = control.token(&everything.0);
    let join = format!(
        "join {token} --host-name honest --address {}",
        evil.host.v4()
    );
    evil.command(&join).ok();
    evil.start();
    evil.serve("web", &owner("web"), &[(80, "http")]);
    control.wait_endpoints("shop/web", 2);
    wait_until("a call to it", SOON, || {
        let text = call();
        check(text == "evil\n", text)
    });
}

fn service(control: &Control) -> Value {
    let all = control.get("services");
    let web = all.iter().find(|s| s["metadata"]["name"] == "web");
    web.cloned().unwrap_or_default()
}

fn ports(control: &Control) -> Vec<u64> {
    let service = service(control);
    let ports = service["spec"]["ports"].as_array().cloned();
    let ports = ports.unwrap_or_default();
    ports.iter().filter_map(|p| p["port"].as_u64()).collect()
}

#[track_caller]
fn wait_ports(control: &Control, expected: &[u64]) {
    wait_until(&format!("the ports {expected:?}"), SOON, || {
        check(ports(control) == expected, service(control).to_string())
    });
}

/// What the operator made strict no file makes permissive again, whoever serves it; ports are the first host's until it
/// serves no more.
#[test]
fn ports_are_the_owners_and_the_transport_is_the_operators() {
    const STRICT: &str = "apiVersion: v1\nkind: Service\nmetadata: {name: web, namespace: shop, annotations: \
                          {meshwork.io/transport: strict}}\nspec: {ports: [{port: 80, appProtocol: http}]}\n";
    let pair = Pair::new("ports_are_the_owners");
    let _web = pair.web("http", "");
    let control = &pair.control;
    let stranger = pair.site.host("stranger");
    let plaintext = |host: std::net::Ipv4Addr, port: u16| {
        let line = format!("curl -sS -m 5 http://{host}:{port}/; echo $?");
        stranger.run(&line).stdout
    };
    let server = pair.server.host.v4();
    assert_eq!(plaintext(server, 80), "hello\n0\n");
    control.apply(STRICT).ok();
    let refused = |host: std::net::Ipv4Addr, port: u16| {
        wait_until("plaintext to be refused", SOON, || {
            let got = plaintext(host, port);
            check(got == "7\n", got)
        });
    };
    refused(server, 80);

    // The file says otherwise now; its other change shows that control has heard it.
    let line = pair.server.owner_line(&owner("web"));
    let file = |ports: &str| {
        format!(
            "namespace = \"shop\"\n[owner]\n{line}\n[[service]]\nports = [{ports}]\ntransport = \"permissive\"\n"
        )
    };
    let http = |port: u16| format!("{{ port = {port}, protocol = \"http\" }}");
    pair.server
        .write_file("web.toml", &file(&format!("{}, {}", http(80), http(81))));
    wait_ports(control, &[80, 81]);
    assert!(service(control).to_string().contains("strict"));
    assert_eq!(plaintext(server, 80), "7\n");

    // Another host has other ports: they are not the service's, and both are told.
    let other = control.join(&pair.site.host("other"), &TokenOptions::default());
    let hello = "location = / { return 200 \"other\\n\"; }";
    let _other = servers::nginx(&other.host, "web", 8080, hello);
    let of_other = file(&http(8080)).replace(&line, &other.owner_line(&owner("web")));
    other.write_file("web.toml", &of_other);
    wait_until("the conflict to be told", SOON, || {
        let status = other.command("status").ok();
        check(status.contains("service_conflict"), status)?;
        let hosts = format!("{:?}", control.get("hosts"));
        check(hosts.contains("service_conflict"), hosts)
    });
    assert_eq!(ports(control), [80, 81]);
    control.wait_endpoints("shop/web", 1);

    // Once the first serves no more they are the other's to say. Strict it stays.
    std::fs::remove_file(pair.server.host.dir().join("services.d/web.toml")).unwrap();
    wait_ports(control, &[8080]);
    control.wait_endpoints("shop/web", 1);
    assert!(service(control).to_string().contains("strict"));
    refused(other.host.v4(), 8080);
    let call = format!("curl -sS -m 10 http://{}:8080/", mesh_name("web"));
    wait_until("a call by the mesh", SOON, || {
        let output = pair.cmd(&call).output();
        check(output.stdout == "other\n", output.to_string())
    });
}

/// Two machines from one disk: the second is refused and both are named, and the first goes on. What tells them apart is the
/// boot: a copy that has that too takes the host's place, which the host sees.
#[test]
fn a_clone_is_refused_and_both_are_named() {
    const OTHER_BOOT: &str = "5c0ffee0-0000-4000-8000-000000000000";
    let pair = Pair::new("a_clone_is_refused");
    let _web = pair.web("http", "");
    let control = &pair.control;
    let sessions = || control.log().matches("session opened host=client").count();
    let before = sessions();
    let mut clone = pair.client.cloned(&pair.site.host("copy"));
    clone.spawn_in_boot(OTHER_BOOT);
    wait_until("the clone to be refused", SOON, || {
        let refused = control.refused("host_cloned");
        check(refused >= 1.0, control.log())
    });
    let boot = pair.client.host.ok("cat /proc/sys/kernel/random/boot_id");
    let log = control.log();
    let both = |line: &&str| {
        let all = ["host_cloned", OTHER_BOOT, boot.trim()];
        all.iter().all(|part| line.contains(part))
    };
    assert!(log.lines().any(|line| both(&line)), "{log}");
    assert_eq!(sessions(), before, "it had the host's session");
    let call = format!("curl -sS -m 10 http://{}/", mesh_name("web"));
    assert_eq!(pair.ok(&call), "hello\n");
    clone.kill9();
    // The same boot, as far as control can see.
    clone.spawn();
    wait_until("the copy to have the host's session", SOON, || {
        check(before < sessions(), control.log())
    });
    clone.kill9();
}
