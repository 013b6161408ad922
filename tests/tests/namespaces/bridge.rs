//! Containers on a bridge of a host, as podman of Debian makes them.

use meshwork_tests::container::{Container, network};
use meshwork_tests::host::Host;
use meshwork_tests::process::{Output, Process};
use meshwork_tests::servers;
use meshwork_tests::wait::{SOON, check, wait_until};

use crate::door::{STRICT, service};
use crate::pair::{Pair, mesh_name, owner, spiffe};
use crate::removal::{lead_by, watch_gateway};

/// Says one word to each who comes by HTTP, on all addresses.
const SAY: &str = r#"
import http.server, socket, sys
class Say(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write((sys.argv[2] + "\n").encode())
class Server(http.server.ThreadingHTTPServer):
    address_family = socket.AF_INET6
    def server_bind(self):
        self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()
Server(("::", int(sys.argv[1])), Say).serve_forever()
"#;

/// Shell words of a server that says `word` on `port`.
fn say(port: u16, word: &str) -> String {
    format!("exec /usr/bin/python3 -c '{SAY}' {port} {word}")
}

/// A host that runs containers and is no more than that yet.
struct Site {
    pair: Pair,
    /// Not in the mesh.
    outside: Host,
    gateway: Host,
    _servers: [Process; 2],
}

impl Site {
    /// The client's host, with networks of these bridges, an `/etc` and a `/run` of its own, and a default route.
    #[track_caller]
    fn new(name: &str, bridges: &[&str]) -> Self {
        let pair = Pair::new(name);
        let host = pair.client.host.clone();
        host.own_etc_and_run();
        let (outside, gateway) = (pair.site.host("outside"), pair.site.host("gateway"));
        lead_by(&gateway, &host);
        // As strict about ways back as hosts are.
        host.ok("echo 1 > /proc/sys/net/ipv4/conf/all/rp_filter");
        for (bridge, number) in bridges.iter().zip(88..) {
            network(&host, bridge, number);
        }
        let servers = [
            outside.cmd(&say(80, "outside")).spawn("outside"),
            host.cmd(&say(9000, "host")).spawn("host"),
        ];
        outside.wait_listening(80, SOON);
        host.wait_listening(9000, SOON);
        Self {
            pair,
            outside,
            gateway,
            _servers: servers,
        }
    }

    fn host(&self) -> &Host {
        &self.pair.client.host
    }

    /// All that a container has without a mesh, in both families.
    #[track_caller]
    fn assert_all_goes_on(&self, container: &Container, word: &str, published: u16, when: &str) {
        let (host, outside) = (self.host(), &self.outside);
        let outwards = [
            format!("http://{}/", outside.v4()),
            format!("http://[{}]/", outside.v6()),
        ];
        for url in outwards {
            let answer = container.cmd(&format!("curl -sS -m 10 {url}")).ok();
            assert_eq!(answer, "outside\n", "{when}: a container to {url}");
        }
        for url in [
            format!("http://{}:9000/", host.v4()),
            format!("http://[{}]:9000/", host.v6()),
        ] {
            let answer = container.cmd(&format!("curl -sS -m 10 {url}")).ok();
            assert_eq!(answer, "host\n", "{when}: a container to its host at {url}");
        }
        for url in [
            format!("http://{}/", container.address(4)),
            format!("http://[{}]/", container.address(6)),
        ] {
            let answer = host.ok(&format!("curl -sS -m 10 {url}"));
            assert_eq!(answer, format!("{word}\n"), "{when}: the host to {url}");
        }
        for url in [
            format!("http://{}:{published}/", host.v4()),
            format!("http://[{}]:{published}/", host.v6()),
        ] {
            let answer = outside.ok(&format!("curl -sS -m 10 {url}"));
            assert_eq!(
                answer,
                format!("{word}\n"),
                "{when}: a published port, {url}"
            );
        }
    }

    /// Nothing of a call to a virtual address leaves the host, and nobody answers it.
    #[track_caller]
    fn assert_closed(&self, container: &Container, when: &str) {
        for vip in self.pair.vips("web") {
            let url = if vip.contains(':') {
                format!("http://[{vip}]/")
            } else {
                format!("http://{vip}/")
            };
            let call = container.cmd(&format!("curl -sS -m 2 {url}"));
            assert!(
                !watch_gateway(&self.gateway, call),
                "{when}: a call to {url} left the host"
            );
        }
        for url in ["http://192.0.2.1/", "http://[2001:db8::1]/"] {
            let call = container.cmd(&format!("curl -sS -m 2 {url}"));
            assert!(
                watch_gateway(&self.gateway, call),
                "{when}: this test sees nothing leave"
            );
        }
    }
}

#[test]
fn containers_of_a_bridge_that_is_not_named_go_on_and_reach_no_virtual_address() {
    let mut site = Site::new("containers_of_a_bridge", &["podman0"]);
    let _web = site.pair.web("http", "");
    let container = Container::run(
        site.host(),
        "ctr",
        "podman0",
        &["--publish=8080:80"],
        &say(80, "container"),
    );
    container.wait_listening(80);
    site.assert_all_goes_on(&container, "container", 8080, "while the agent captures");
    site.assert_closed(&container, "while the agent captures");
    // The host's own programs are served, beside the address translation that podman has set up.
    let call = format!("curl -sS -m 10 http://{}/", mesh_name("web"));
    assert_eq!(site.pair.ok(&call), "hello\n");
    // A container that begins while the agent runs.
    let second = Container::run(
        site.host(),
        "second",
        "podman0",
        &["--publish=8081:80"],
        &say(80, "second"),
    );
    second.wait_listening(80);
    site.assert_all_goes_on(&second, "second", 8081, "begun while the agent captures");
    let vips = site.pair.vips("web");
    site.pair.client.kill9();
    site.assert_all_goes_on(&container, "container", 8080, "when the agent is dead");
    site.pair.client.start();
    site.assert_all_goes_on(&container, "container", 8080, "when it is back");
    site.pair.client.stop();
    site.assert_all_goes_on(&container, "container", 8080, "when it was stopped");
    for vip in vips.iter().map(|vip| match vip.contains(':') {
        true => format!("[{vip}]"),
        false => vip.clone(),
    }) {
        let call = container.cmd(&format!("curl -sS -m 2 http://{vip}/"));
        assert!(
            !watch_gateway(&site.gateway, call),
            "a call to {vip} left the host"
        );
    }
}

/// podman marks packets that it translates, by a bit of the marks' lower half.
#[test]
fn a_host_with_published_ports_serves_the_mesh() {
    let site = Site::new("a_host_with_published_ports", &["podman0"]);
    let host = site.host().clone();
    let container = Container::run(
        &host,
        "ctr",
        "podman0",
        &["--publish=8080:80"],
        &say(80, "container"),
    );
    container.wait_listening(80);
    // Beside it a program of the host serves the mesh, and sees its callers' addresses.
    let who = servers::nginx(
        &host,
        "beside",
        81,
        "location / { return 200 \"$remote_addr\\n\"; }",
    );
    site.pair
        .client
        .serve("beside", &owner("beside"), &[(81, "http")]);
    site.pair.control.wait_endpoints("shop/beside", 1);
    let server = &site.pair.server.host;
    let url = format!("http://{}:81/", mesh_name("beside"));
    let call = |from: &Host| from.cmd(&format!("curl -sSf -m 10 {url}")).output();
    wait_until("an answer", SOON, || {
        let output = call(server);
        check(output.status.success(), output.to_string())
    });
    assert_eq!(call(server).stdout.trim(), server.v4().to_string());
    assert_eq!(call(&host).stdout.trim(), host.v4().to_string());
    drop(who);
}

/// Bridges of the host call the packet filter, or do not. False: they never can.
fn call_filter(host: &Host, on: bool) -> bool {
    let line = format!(
        "cd /proc/sys/net/bridge && for f in bridge-nf-call-iptables bridge-nf-call-ip6tables; do echo {} > $f || exit; done",
        u8::from(on)
    );
    host.run(&line).status.success()
}

/// What a call from a container is at the server: the caller's identity there.
fn who(container: &Container, family: u8) -> Output {
    let url = format!("http://{}/who", mesh_name("web"));
    container
        .cmd(&format!("curl -sSf -m 10 -{family} {url}"))
        .output()
}

impl Site {
    /// The agent captures on the bridge `named0`, and a server says who calls.
    #[track_caller]
    fn capturing(name: &str, bridges: &[&str]) -> (Self, Process) {
        let mut site = Self::new(name, bridges);
        call_filter(site.host(), false);
        let client = &mut site.pair.client;
        client.configure("[capture]\nbridges = [\"named0\"]\n");
        client.stop();
        client.start();
        let locations = "location = /who { return 200 \"$http_x_meshwork_client_id\\n\"; }";
        let web = site.pair.web("http", locations);
        (site, web)
    }

    /// A container on `network` that says its name.
    #[track_caller]
    fn container(&self, name: &str, network: &str, options: &[&str]) -> Container {
        let container = Container::run(self.host(), name, network, options, &say(80, name));
        container.wait_listening(80);
        container
    }

    /// Declares the cgroup in which a container of that name runs as a workload.
    fn workload(&self, name: &str) {
        self.pair.client.serve(name, &owner(name), &[]);
    }

    #[track_caller]
    fn wait_called_as(&self, container: &Container, account: &str) {
        for family in [4, 6] {
            wait_until(&format!("a call by {account}"), SOON, || {
                let output = who(container, family);
                let expected = format!("{}\n", spiffe(account));
                check(output.stdout == expected, output.to_string())
            });
        }
    }

    /// It is refused since nobody can tell who it is.
    #[track_caller]
    fn wait_unknown(&self, container: &Container) {
        for family in [4, 6] {
            wait_until("a refusal", SOON, || {
                let before = self.pair.client.refused("caller_unknown");
                let output = who(container, family);
                // A reset, before or after the request; not silence.
                let reset = [35, 52, 56].contains(&output.code());
                check(reset && output.stdout.is_empty(), output.to_string())?;
                let now = self.pair.client.refused("caller_unknown");
                check(before < now, format!("not counted: {now}"))
            });
        }
    }

    fn status(&self) -> String {
        self.pair.client.command("status").stdout
    }
}

/// Sends a word by UDP and says what comes of it.
const ASK: &str = r#"
import socket, sys
s = socket.socket(socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET, socket.SOCK_DGRAM)
s.settimeout(10)
try:
    s.connect((sys.argv[1], 5353)); s.send(b"word"); s.recv(100)
    print("answered")
except TimeoutError: print("silence")
except OSError as e: print("refused at once:", e)
"#;

#[test]
fn a_container_of_a_named_bridge_calls_as_its_workload() {
    let (mut site, _web) = Site::capturing("a_container_of_a_named_bridge", &["named0", "other0"]);
    site.workload("ctr");
    let container = site.container("ctr", "named0", &["--publish=8080:80"]);
    site.wait_called_as(&container, "ctr");
    assert!(0.0 < site.pair.calls(&spiffe("ctr"), "shop/web"));
    // It has processes now.
    site.pair.ok("true");
    let checked = site.pair.client.command("check");
    assert!(checked.status.success(), "{checked}");
    // One that is no workload's is nobody, and no process of the host.
    let stranger = site.container("stranger", "named0", &[]);
    site.wait_unknown(&stranger);
    // A workload whose container is on another bridge gets nowhere.
    site.workload("other");
    let other = site.container("other", "other0", &[]);
    site.assert_closed(&other, "on a bridge that is not named");
    // What is no TCP is not carried, from nobody.
    for vip in site.pair.vips("web") {
        let answer = container
            .cmd(&format!("/usr/bin/python3 -c '{ASK}' {vip}"))
            .ok();
        assert!(answer.starts_with("refused at once"), "{vip}: {answer}");
    }
    site.assert_all_goes_on(&container, "ctr", 8080, "while the agent captures");
    site.pair.client.reload().ok();
    site.wait_called_as(&container, "ctr");
    site.wait_unknown(&stranger);
    let vips = site.pair.vips("web");
    site.pair.client.stop();
    site.assert_all_goes_on(&container, "ctr", 8080, "when the agent was stopped");
    for vip in vips {
        let host = if vip.contains(':') {
            format!("[{vip}]")
        } else {
            vip
        };
        let call = container.cmd(&format!("curl -sS -m 2 http://{host}/"));
        assert!(
            !watch_gateway(&site.gateway, call),
            "a call to {host} left the host"
        );
    }
    site.pair.client.start();
    site.wait_called_as(&container, "ctr");
}

#[test]
fn a_container_is_told_by_an_address_that_is_its_own() {
    let (site, _web) = Site::capturing("a_container_is_told_by_an_address", &["named0"]);
    for name in ["ctr", "twin", "pretender", "late"] {
        site.workload(name);
    }
    let container = site.container("ctr", "named0", &[]);
    site.wait_called_as(&container, "ctr");
    let old = container.address(4);
    // A namespace that hangs on no bridge proves nothing.
    let line = format!(
        "ip link set lo up && ip address add {old}/24 dev lo && echo done && exec sleep 1000"
    );
    let pretend = site.host().program(["unshare", "--net", "sh", "-c", &line]);
    let pretender = pretend.cgroup("pretender").spawn("pretender");
    wait_until("a pretender", SOON, || {
        check(pretender.log().contains("done"), pretender.log())
    });
    // The agent has looked when it knows what came later.
    let late = site.container("late", "named0", &[]);
    site.wait_called_as(&late, "late");
    site.wait_called_as(&container, "ctr");
    assert!(
        !site.status().contains("of its containers"),
        "{}",
        site.status()
    );
    drop(pretender);
    // A process of another workload in the same namespace: then it is neither's.
    let twin = container.beside().cgroup("twin").spawn("twin");
    site.wait_unknown(&container);
    let status = site.status();
    assert!(
        status.contains(&old) && status.contains("shop/twin"),
        "{status}"
    );
    drop(twin);
    site.wait_called_as(&container, "ctr");
    assert!(
        !site.status().contains("of its containers"),
        "{}",
        site.status()
    );
    // Who has its address after it is nobody.
    container.end();
    let heir = site.container("heir", "named0", &["--ip", &old]);
    assert_eq!(heir.address(4), old);
    site.wait_unknown(&heir);
    let again = site.container("ctr", "named0", &[]);
    assert_ne!(again.address(4), old);
    site.wait_called_as(&again, "ctr");
}

#[test]
fn the_door_of_the_host_does_not_judge_calls_of_containers() {
    let (site, _web) = Site::capturing("the_door_of_the_host_does_not_judge", &["named0"]);
    let (host, pair) = (site.host(), &site.pair);
    site.workload("ctr");
    let container = site.container("ctr", "named0", &[]);
    // The host's own service has the port that the container calls.
    let _local = servers::nginx(host, "local", 80, "location / { return 200 \"local\\n\"; }");
    pair.client.serve("local", &owner("local"), &[(80, "http")]);
    pair.control.wait_endpoints("shop/local", 1);
    let plaintext = |expected: &str| {
        wait_until("plaintext to the host's own service", SOON, || {
            let call = format!("curl -sS -m 5 http://{}/; echo $?", host.v4());
            let outputs = [site.outside.run(&call), container.cmd(&call).output()];
            let so = outputs.iter().all(|output| output.stdout == expected);
            check(so, format!("{} {}", outputs[0], outputs[1]))
        });
    };
    plaintext("local\n0\n");
    let strict = service(STRICT).replace("name: web", "name: local");
    pair.control.apply(&strict).ok();
    // To the host's own port a container is a caller from elsewhere.
    plaintext("7\n");
    site.wait_called_as(&container, "ctr");
    // Where bridges call the packet filter nobody is served, and not by the host's own program either.
    if !call_filter(host, true) {
        return;
    }
    for vip in pair.vips("web") {
        let name = if vip.contains(':') {
            format!("[{vip}]")
        } else {
            vip
        };
        let output = container
            .cmd(&format!("curl -sS -m 10 http://{name}/"))
            .output();
        assert_eq!(output.code(), 7, "{output}");
    }
    let checked = pair.client.command("check");
    assert!(
        checked.stdout.contains("bridge-nf-call-ip6tables"),
        "{checked}"
    );
    call_filter(host, false);
    site.wait_called_as(&container, "ctr");
}
