//! Hosts of other shapes: one address family, several addresses, small packets, caller and server on one host.

use std::net::{IpAddr, SocketAddr};

use meshwork_tests::agent::Agent;
use meshwork_tests::control::{Control, TokenOptions};
use meshwork_tests::host::Host;
use meshwork_tests::servers;
use meshwork_tests::site::Site;
use meshwork_tests::wait::{SOON, check, wait_until};

use crate::pair::{Pair, calls, mesh_name, owner, spiffe};
use crate::real_addresses::{service, wait_taken};

const HELLO: &str = "location = / { return 200 \"hello $remote_addr\\n\"; }";
const STRICT: &str = "apiVersion: v1\nkind: Service\nmetadata: {name: web, namespace: shop, annotations: \
                      {meshwork.io/transport: strict}}\nspec: {ports: [{port: 80, appProtocol: http}]}\n";

fn without_v6(host: &Host) {
    host.ok("sysctl -q -w net.ipv6.conf.all.disable_ipv6=1 net.ipv6.conf.default.disable_ipv6=1");
    let left = host.ok("ip -6 -o address");
    assert_eq!(left, "", "IPv6 is not off");
}

fn without_v4(host: &Host) {
    host.ok(&format!("ip address delete {}/24 dev eth0", host.v4()));
    let left = host.ok("ip -4 -o address show dev eth0");
    assert_eq!(left, "");
}

/// Joins over IPv6 and starts.
#[track_caller]
fn join_over_v6(control: &Control, host: &Host) -> Agent {
    let agent = Agent::new(host);
    let options = format!("--namespace shop --address [{}]:7440", control.host.v6());
    let token = control.token(&options);
    let words = format!(
        "join {token} --host-name {} --address {}",
        host.name(),
        host.v6()
    );
    agent.command(&words).ok();
    agent.started()
}

/// The workload `shop/client` of `host` calls `shop/web` by name.
#[track_caller]
fn wait_hello(host: &Host, seen: &str) {
    let line = format!("curl -sS -m 10 http://{}/", mesh_name("web"));
    wait_until("the call to be answered", SOON, || {
        let output = host.cmd(&line).cgroup("client").output();
        check(
            output.stdout == format!("hello {seen}\n"),
            output.to_string(),
        )
    });
}

#[test]
fn hosts_without_ipv4_call_and_serve() {
    let site = Site::new("hosts_without_ipv4");
    let control = Control::start(&site);
    let [server, client] = ["server", "client"].map(|name| site.host(name));
    for host in [&server, &client] {
        without_v4(host);
    }
    let [server, client] = [&server, &client].map(|host| join_over_v6(&control, host));
    client.serve("client", &owner("client"), &[]);
    let _web = servers::nginx(&server.host, "web", 80, HELLO);
    server.serve("web", &owner("web"), &[(80, "http")]);
    control.wait_endpoints("shop/web", 1);
    wait_hello(&client.host, &client.host.v6().to_string());
    control.apply(STRICT).ok();
    let plaintext = format!("curl -sS -m 5 http://[{}]/; echo $?", server.host.v6());
    wait_until("plaintext to be refused", SOON, || {
        let got = control.host.run(&plaintext).stdout;
        check(got == "7\n", got)
    });
    wait_hello(&client.host, &client.host.v6().to_string());
    let own = client.host.v6().to_string();
    by_real_address(&control, [&server, &client], server.host.v6().into(), &own);
}

/// The service asks for its real addresses too, strict as it is: the call there is the workload's.
#[track_caller]
fn by_real_address(control: &Control, hosts: [&Agent; 2], address: IpAddr, seen: &str) {
    let [server, client] = hosts;
    let both = "meshwork.io/capture: vip+real, meshwork.io/transport: strict";
    control
        .apply(&service("web", "{port: 80, appProtocol: http}", both))
        .ok();
    wait_taken(&client.host, &address.to_string(), true);
    let count = || calls(&server.metrics(), &spiffe("client"), "shop/web");
    let before = count();
    let line = format!("curl -sS -m 10 http://{}/", SocketAddr::new(address, 80));
    let answer = client.host.cmd(&line).cgroup("client").ok();
    assert_eq!(answer, format!("hello {seen}\n"));
    wait_until("the call to be counted", SOON, || {
        check(count() == before + 1.0, count().to_string())
    });
}

#[test]
fn hosts_without_ipv6_call_and_serve_and_call_hosts_with_both() {
    let site = Site::new("hosts_without_ipv6");
    let control = Control::start(&site);
    let everything = TokenOptions::default();
    let [server, client] = ["server", "client"].map(|name| site.host(name));
    without_v6(&client);
    let [server, client] = [&server, &client].map(|host| control.join(host, &everything));
    client.serve("client", &owner("client"), &[]);
    let _web = servers::nginx(&server.host, "web", 80, HELLO);
    server.serve("web", &owner("web"), &[(80, "http")]);
    control.wait_endpoints("shop/web", 1);
    wait_hello(&client.host, &client.host.v4().to_string());
    let own = client.host.v4().to_string();
    by_real_address(&control, [&server, &client], server.host.v4().into(), &own);
    // The other way round: it serves, and its door and guard stand in the family that it has.
    let here = servers::nginx_at(
        &client.host,
        "here",
        &[[0, 0, 0, 0].into()],
        80,
        "location = / { return 200 \"here\\n\"; }",
    );
    client.serve("here", &owner("here"), &[(80, "http")]);
    control.wait_endpoints("shop/here", 1);
    let line = format!("curl -sS -m 10 http://{}/", mesh_name("here"));
    wait_until("the call to be answered", SOON, || {
        let output = server.host.run(&line);
        check(output.stdout == "here\n", output.to_string())
    });
    control
        .apply(&STRICT.replace("name: web", "name: here"))
        .ok();
    let plaintext = format!("curl -sS -m 5 http://{}/; echo $?", client.host.v4());
    wait_until("plaintext to be refused", SOON, || {
        let got = control.host.run(&plaintext).stdout;
        check(got == "7\n", got)
    });
    drop(here);
}

/// Everything twice: each address of a host is behind the same door, and small packets carry large answers.
#[test]
fn several_addresses_and_small_packets() {
    let pair = Pair::new("several_addresses_and_small_packets");
    for host in [&pair.server.host, &pair.client.host] {
        host.ok("ip link set eth0 mtu 1280");
    }
    pair.server
        .host
        .ok("ip address add 10.77.0.250/24 dev eth0");
    let _web = pair.web(
        "http",
        "location = /seen { return 200 \"$remote_addr\\n\"; }",
    );
    a_default_source_is_what_the_server_sees(&pair);
    let body = "head -c 3000000 /dev/urandom | tee";
    let file = pair.server.host.dir().join("web/www/large");
    pair.server
        .host
        .ok(&format!("{body} {} | wc -c", file.display()));
    let sum = pair
        .server
        .host
        .ok(&format!("sha256sum < {}", file.display()));
    let got = pair.ok(&format!(
        "curl -sS -m 30 http://{}/large | sha256sum",
        mesh_name("web")
    ));
    assert_eq!(got, sum);
    let addresses = [pair.server.host.v4().to_string(), "10.77.0.250".to_owned()];
    let stranger = pair.site.host("stranger");
    let ask = |address: &str| {
        stranger
            .run(&format!("curl -sS -m 5 http://{address}/; echo $?"))
            .stdout
    };
    for address in &addresses {
        assert_eq!(ask(address), "hello\n0\n", "{address}");
    }
    pair.control.apply(STRICT).ok();
    for address in &addresses {
        wait_until(
            &format!("plaintext to {address} to be refused"),
            SOON,
            || {
                let got = ask(address);
                check(got == "7\n", got)
            },
        );
    }
    let got = pair.ok(&format!(
        "curl -sS -m 30 http://{}/large | sha256sum",
        mesh_name("web")
    ));
    assert_eq!(got, sum);
}

/// The client has a second address, and the host's routes say by which of them it calls: no other is shown to the app, by name
/// as in plaintext.
#[track_caller]
fn a_default_source_is_what_the_server_sees(pair: &Pair) {
    let host = &pair.client.host;
    host.ok("ip address add 10.77.0.251/24 dev eth0");
    host.ok("ip route change 10.77.0.0/24 dev eth0 src 10.77.0.251");
    let server = pair.server.host.v4();
    let plaintext = format!("curl -sS -m 10 http://{server}/seen");
    assert_eq!(pair.ok(&plaintext), "10.77.0.251\n");
    let count = || pair.calls(&spiffe("client"), "shop/web");
    assert_eq!(count(), 0.0);
    let url = format!("http://{}/seen", mesh_name("web"));
    assert_eq!(pair.ok(&format!("curl -sS -m 10 {url}")), "10.77.0.251\n");
    // A program that takes another of them has no say in it.
    let from = format!("curl -sS -m 10 --interface {} {url}", host.v4());
    assert_eq!(pair.ok(&from), "10.77.0.251\n");
    wait_until("the calls to be counted", SOON, || {
        check(count() == 2.0, count().to_string())
    });
}

/// The same decisions are made without the wire.
#[test]
fn caller_and_server_on_one_host() {
    let pair = Pair::new("caller_and_server_on_one_host");
    let _web = pair.web("http", "");
    pair.control.apply(STRICT).ok();
    let host = &pair.server.host;
    pair.server.serve("neighbour", &owner("neighbour"), &[]);
    let line = format!("curl -sS -m 10 -i http://{}/", mesh_name("web"));
    let call = || host.cmd(&line).cgroup("neighbour").output().stdout;
    wait_until("the neighbour's call", SOON, || {
        let got = call();
        let count = pair.calls(&spiffe("neighbour"), "shop/web");
        check(
            got.contains("hello") && 0.0 < count,
            format!("{count}: {got}"),
        )
    });
    // At the host's own address a program is reached without the mesh, whatever the service asks for. Others are taken over.
    let count = || pair.calls(&spiffe("neighbour"), "shop/web");
    let before = count();
    let both = "meshwork.io/capture: vip+real, meshwork.io/transport: strict";
    pair.control
        .apply(&service("web", "{port: 80, appProtocol: http}", both))
        .ok();
    let own = host.v4().to_string();
    wait_taken(&pair.client.host, &own, true);
    let direct = format!("curl -sS -m 10 http://{own}/");
    assert_eq!(host.cmd(&direct).cgroup("neighbour").ok(), "hello\n");
    call();
    wait_until("the call by name to be counted", SOON, || {
        check(count() == before + 1.0, count().to_string())
    });
    let nobody = "apiVersion: meshwork.io/v1alpha1\nkind: Policy\nmetadata: {name: p, namespace: shop}\n\
                  spec: {rules: [{name: r, from: [{identity: shop/client}]}]}\n";
    pair.control.apply(nobody).ok();
    wait_until("the denial", SOON, || {
        let got = call().to_lowercase();
        check(got.contains("x-meshwork-reason: not_allowed"), got)
    });
    assert_eq!(
        pair.ok(&format!("curl -sS -m 10 http://{}/", mesh_name("web"))),
        "hello\n"
    );
}
