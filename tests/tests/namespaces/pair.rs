//! What most tests begin with: control, a host that serves, and a host that calls.

use std::path::PathBuf;

use meshwork_tests::agent::{Agent, Owner};
use meshwork_tests::control::{Control, TRUST_DOMAIN, TokenOptions};
use meshwork_tests::host::Host;
use meshwork_tests::mesh::Authority;
use meshwork_tests::metrics::Metrics;
use meshwork_tests::process::{Cmd, Process};
use meshwork_tests::servers;
use meshwork_tests::site::Site;
use meshwork_tests::wait::{SOON, check, wait_until};

pub(crate) struct Pair {
    pub(crate) control: Control,
    pub(crate) server: Agent,
    pub(crate) client: Agent,
    pub(crate) site: Site,
}

impl Pair {
    /// Hosts `server` and `client`; on the latter the cgroup `client` is the workload `shop/client`.
    #[track_caller]
    pub(crate) fn new(name: &str) -> Self {
        let site = Site::new(name);
        let control = Control::start(&site);
        let everything = TokenOptions::default();
        let server = control.join(&site.host("server"), &everything);
        let client = control.join(&site.host("client"), &everything);
        client.serve("client", &owner("client"), &[]);
        Self {
            control,
            server,
            client,
            site,
        }
    }

    /// nginx as the service `shop/web`, answering `hello` at `/`; `locations` come beside it.
    #[track_caller]
    pub(crate) fn web(&self, protocol: &str, locations: &str) -> Process {
        let locations = format!("location = / {{ return 200 \"hello\\n\"; }}\n{locations}");
        let nginx = servers::nginx(&self.server.host, "web", 80, &locations);
        self.declare("web", 80, protocol);
        nginx
    }

    /// Declares the cgroup `name` of the server as `shop/<name>` and waits until the client knows it.
    #[track_caller]
    pub(crate) fn declare(&self, name: &str, port: u16, protocol: &str) {
        self.server.serve(name, &owner(name), &[(port, protocol)]);
        self.control.wait_endpoints(&format!("shop/{name}"), 1);
        self.wait_name(name);
    }

    /// Waits until the client resolves a service's name.
    #[track_caller]
    pub(crate) fn wait_name(&self, name: &str) {
        wait_until(&format!("the name of {name}"), SOON, || {
            let output = self
                .client
                .host
                .run(&format!("getent ahostsv4 {}", mesh_name(name)));
            if output.status.success() {
                Ok(())
            } else {
                Err(output.to_string())
            }
        });
    }

    /// A command line of the workload `shop/client`.
    pub(crate) fn cmd(&self, line: &str) -> Cmd {
        self.client.host.cmd(line).cgroup("client")
    }

    /// Runs a command line of `shop/client`, which must succeed.
    #[track_caller]
    pub(crate) fn ok(&self, line: &str) -> String {
        self.cmd(line).ok()
    }

    /// The virtual addresses of a service, v4 then v6.
    #[track_caller]
    pub(crate) fn vips(&self, name: &str) -> [String; 2] {
        ["ahostsv4", "ahostsv6"].map(|database| {
            let text = self
                .client
                .host
                .ok(&format!("getent {database} {}", mesh_name(name)));
            text.split_whitespace()
                .next()
                .expect("an address")
                .to_owned()
        })
    }

    /// Control is down, and the client's agent runs anew with a certificate of `shop/client` that is past a third of its
    /// life: it is renewed when control is back. Returns its file.
    #[track_caller]
    pub(crate) fn age_the_clients_leaf(&mut self) -> PathBuf {
        let state = self.client.host.dir().join("state");
        let membership = std::fs::read_to_string(state.join("agent.json")).unwrap();
        let membership: serde_json::Value = serde_json::from_str(&membership).unwrap();
        let uid = membership["host_uid"].as_str().unwrap();
        let authority = Authority::of_control(&self.control.state_dir());
        let aged = authority.leaf(&[&spiffe("client")], (-2, 1), Some(uid));
        self.control.kill9();
        self.client.stop();
        aged.replace_leaf(&state, "shop.client");
        self.client.start();
        state.join("leaves/shop.client.crt")
    }

    /// The first one was given before the agent's restart.
    #[track_caller]
    pub(crate) fn wait_for_the_clients_second_leaf(&self) {
        wait_until("the renewal", Control::NOTICED, || {
            let log = self.client.log();
            let of_client = |line: &&str| {
                line.contains("a new certificate is in use") && line.contains("ns/shop/sa/client")
            };
            check(log.lines().filter(of_client).count() >= 2, log)
        });
    }

    /// Calls that ended at the server's agent, from this caller to this service.
    #[track_caller]
    pub(crate) fn calls(&self, src: &str, dst: &str) -> f64 {
        calls(&self.server.metrics(), src, dst)
    }
}

pub(crate) fn owner(name: &str) -> Owner {
    Owner::Cgroup(name.to_owned())
}

pub(crate) fn mesh_name(service: &str) -> String {
    format!("{service}.shop.mesh.internal")
}

/// The SPIFFE id of an account of namespace `shop`.
pub(crate) fn spiffe(account: &str) -> String {
    format!("spiffe://{TRUST_DOMAIN}/ns/shop/sa/{account}")
}

/// The SPIFFE id of a host's processes that are no workload.
pub(crate) fn spiffe_host(host: &Host) -> String {
    format!("spiffe://{TRUST_DOMAIN}/host/{}", host.name())
}

pub(crate) fn calls(metrics: &Metrics, src: &str, dst: &str) -> f64 {
    let labels = [("direction", "Inbound"), ("src", src), ("dst", dst)];
    metrics.sum("mesh_requests_total", &labels)
}
