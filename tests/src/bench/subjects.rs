//! What is measured: a pair of agents and the pairs of proxies they are compared with, all between the same two hosts and
//! in front of the same servers.

use std::fs;
use std::path::PathBuf;

use clap::ValueEnum;

use super::certificates::{self, Files};
use super::workloads::{BULK_BODY, SMALL_BODY};
use super::{envoy, haproxy, relay, usage};
use crate::agent::{Agent, Owner};
use crate::control::{Control, TokenOptions};
use crate::host::Host;
use crate::process::{Cmd, Process};
use crate::servers;
use crate::site::Site;
use crate::wait::SOON;

/// The cgroup of the tools that make load, and the workload of that name.
pub(super) const CLIENT: &str = "client";

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Subject {
    /// No proxy
    Direct,
    /// Two agents
    Meshwork,
    /// Two HAProxy
    Haproxy,
    /// Two Envoy
    Envoy,
    /// Two relays of bytes that do nothing else
    Relay,
}

/// How the proxies are told to read the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    Http,
    Tcp,
    Grpc,
}

/// The two hosts and their certificates for the proxies.
#[derive(Debug)]
pub(super) struct Sides {
    pub(super) client: Host,
    pub(super) server: Host,
    pub(super) client_files: Files,
    pub(super) server_files: Files,
}

/// Everything that runs while the figures are taken.
#[derive(Debug)]
pub(super) struct Stage {
    sides: Sides,
    _control: Control,
    _agents: [Agent; 2],
    _processes: Vec<Process>,
}

impl Subject {
    pub const ALL: [Self; 5] = [
        Self::Direct,
        Self::Meshwork,
        Self::Haproxy,
        Self::Envoy,
        Self::Relay,
    ];

    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Meshwork => "meshwork",
            Self::Haproxy => "haproxy",
            Self::Envoy => "envoy",
            Self::Relay => "relay",
        }
    }

    /// The cgroup of its processes on either host.
    const fn cgroup(self) -> Option<&'static str> {
        match self {
            Self::Direct => None,
            Self::Meshwork => Some("agent"),
            Self::Haproxy => Some(haproxy::CGROUP),
            Self::Envoy => Some(envoy::CGROUP),
            Self::Relay => Some(relay::CGROUP),
        }
    }
}

impl Way {
    pub(super) const ALL: [Self; 3] = [Self::Http, Self::Tcp, Self::Grpc];

    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Http => "http",
            Self::Tcp => "tcp",
            Self::Grpc => "grpc",
        }
    }

    /// Where the server listens.
    pub(super) const fn app_port(self) -> u16 {
        match self {
            Self::Http => 80,
            Self::Tcp => 81,
            Self::Grpc => 82,
        }
    }
}

impl Stage {
    pub(super) fn new(site: &Site, subjects: &[Subject]) -> Self {
        let control = Control::start(site);
        let [server, client] = ["server", "client"].map(|name| site.host(name));
        let agents = [&server, &client].map(|host| control.join(host, &TokenOptions::default()));
        let ports = [Way::Http, Way::Tcp].map(|way| (way.app_port(), way.name()));
        agents[0].serve("web", &Owner::Cgroup("web".to_owned()), &ports);
        agents[1].serve(CLIENT, &Owner::Cgroup(CLIENT.to_owned()), &[]);
        let calls = [(Way::Grpc.app_port(), Way::Grpc.name())];
        agents[0].serve("calls", &Owner::Cgroup("calls".to_owned()), &calls);
        let mut processes = vec![web(&server), calls_server(&server)];
        for service in ["shop/web", "shop/calls"] {
            control.wait_endpoints(service, 1);
        }
        let dirs = [&client, &server].map(|host| host.dir().join("certificates"));
        let [client_files, server_files] = certificates::make([&dirs[0], &dirs[1]]);
        let sides = Sides {
            client,
            server,
            client_files,
            server_files,
        };
        if subjects.contains(&Subject::Haproxy) {
            processes.extend(haproxy::start(&sides));
        }
        if subjects.contains(&Subject::Envoy) {
            processes.extend(envoy::start(&sides));
        }
        if subjects.contains(&Subject::Relay) {
            processes.extend(relay::start(&sides));
        }
        Self {
            sides,
            _control: control,
            _agents: agents,
            _processes: processes,
        }
    }

    /// Where the client finds a subject, as `host:port`.
    pub(super) fn authority(&self, subject: Subject, way: Way) -> String {
        let (host, port) = match subject {
            Subject::Direct => (self.sides.server.v4().to_string(), way.app_port()),
            Subject::Meshwork => {
                let service = match way {
                    Way::Http | Way::Tcp => "web",
                    Way::Grpc => "calls",
                };
                (format!("{service}.shop.mesh.internal"), way.app_port())
            }
            Subject::Haproxy => (self.sides.client.v4().to_string(), haproxy::port(way)),
            Subject::Envoy => (self.sides.client.v4().to_string(), envoy::port(way)),
            Subject::Relay => (self.sides.client.v4().to_string(), relay::port(way)),
        };
        format!("{host}:{port}")
    }

    /// A command line of the client.
    pub(super) fn client(&self, line: &str) -> Cmd {
        self.sides.client.cmd(line).cgroup(CLIENT)
    }

    /// A directory for what the client's tools read and write.
    pub(super) fn scratch(&self) -> PathBuf {
        self.sides.client.dir()
    }

    /// User and system time of both sides' processes so far, in microseconds.
    pub(super) fn cpu_us(&self, subject: Subject) -> Option<f64> {
        let cgroups = self.cgroups(subject)?;
        Some(cgroups.iter().map(|cgroup| usage::cpu_us(cgroup)).sum())
    }

    /// Resident memory of the side that has more, in MiB, of all its processes together.
    pub(super) fn rss_mib(&self, subject: Subject) -> Option<f64> {
        let cgroups = self.cgroups(subject)?;
        let sizes = cgroups.iter().map(|cgroup| usage::rss_mib(cgroup));
        Some(sizes.fold(0.0, f64::max))
    }

    fn cgroups(&self, subject: Subject) -> Option<[PathBuf; 2]> {
        let name = subject.cgroup()?;
        Some([&self.sides.client, &self.sides.server].map(|host| host.cgroup(name)))
    }
}

/// nginx on the ports of HTTP and TCP alike.
fn web(server: &Host) -> Process {
    let www = server.subdir("web/www", None);
    fs::write(www.join("bulk"), vec![b'x'; BULK_BODY]).expect("a body");
    let body = "x".repeat(SMALL_BODY);
    let tcp = Way::Tcp.app_port();
    servers::nginx(
        server,
        "web",
        Way::Http.app_port(),
        &format!(
            "listen {tcp}; access_log off; sendfile on; location = / {{ return 200 \"{body}\"; }}"
        ),
    )
}

/// nghttpd, which sends back what it was sent, closed by gRPC's trailer: a unary call to whom only the frames matter.
fn calls_server(server: &Host) -> Process {
    let port = Way::Grpc.app_port();
    let www = server.subdir("calls/www", None);
    let line = format!(
        "exec nghttpd --no-tls --echo-upload --trailer='grpc-status: 0' -d {} {port}",
        www.display()
    );
    let process = server.cmd(&line).cgroup("calls").spawn("calls");
    server.wait_listening(port, SOON);
    process
}
