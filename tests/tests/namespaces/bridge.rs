//! Containers on a bridge of a host, as podman of Debian makes them.

use meshwork_tests::container::{Container, network};
use meshwork_tests::host::Host;
use meshwork_tests::process::Process;
use meshwork_tests::servers;
use meshwork_tests::wait::{SOON, check, wait_until};

use crate::pair::{Pair, mesh_name};
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
        .serve("beside", &crate::pair::owner("beside"), &[(81, "http")]);
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
