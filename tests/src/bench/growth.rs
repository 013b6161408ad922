//! How cost grows: memory with connections that stand open, CPU per request with services, endpoints and rules.

use std::fmt::Write as _;
use std::ops::Range;
use std::time::Duration;

use super::figures::{Figures, Metric};
use super::subjects::{CLIENT, Stage, Subject, Way};
use super::workloads::{self, Load, SMALL_BODY, Workload};
use super::{TOOL_MAX, usage};
use crate::agent::{Agent, Owner};
use crate::binary;
use crate::control::{Control, TokenOptions};
use crate::host::Host;
use crate::process::Process;
use crate::servers;
use crate::site::Site;
use crate::wait::{check, wait_until};

/// How many connections stand open.
const OPEN: u32 = 1_000;
/// The server of these connections keeps them for 75 s.
const OPEN_MAX: Duration = Duration::from_secs(60);
/// So many services one workload gets, of the 64 that it may have.
const SERVICES_OF_WORKLOAD: u16 = 50;
/// So many rules one policy gets, of the 256 that it may have.
const RULES_OF_POLICY: u16 = 100;
/// Services listen here and on the following ports, each on its own.
const PORT: u16 = 10_000;
/// A thousand services are registered, listed and called once, on a busy machine.
const BUILT_MAX: Duration = Duration::from_secs(180);

/// What stands open when memory is read.
#[derive(Clone, Copy, Debug)]
pub(super) enum Open {
    Nothing,
    /// HTTP connections that wait for their next request: no stream of the mesh is open for them.
    Http,
    /// TCP connections: each is a stream.
    Tcp,
}

impl Open {
    pub(super) const ALL: [Self; 3] = [Self::Nothing, Self::Http, Self::Tcp];

    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Nothing => "none",
            Self::Http => "http1000",
            Self::Tcp => "tcp1000",
        }
    }
}

/// Memory of the larger side with that much open.
pub(super) fn memory(stage: &Stage, subject: Subject, open: Open) -> Option<Figures> {
    let way = match open {
        Open::Nothing => None,
        Open::Http => Some(Way::Http),
        Open::Tcp => Some(Way::Tcp),
    };
    let _held = way.map(|way| {
        let line = format!(
            "ulimit -n {}; exec {} hold --url http://{}/ --connections {OPEN}",
            OPEN * 2,
            binary("meshwork-site").display(),
            stage.authority(subject, way)
        );
        let mut held = stage.client(&line).spawn("hold");
        let name = format!("{OPEN} open connections through {}", subject.name());
        let words = format!("{OPEN} open to {}", stage.authority(subject, way));
        wait_until(&name, OPEN_MAX, || {
            held.is_alive().unwrap_or_else(|e| panic!("{e}"));
            check(held.log().contains(&words), held.log())
        });
        held
    });
    let rss = stage.rss_mib(subject)?;
    Some(Figures::from([(Metric::Rss, rss)]))
}

/// A mesh of its own with so many services, an endpoint of each that the client knows, and so many rules for the service
/// that is measured, of which the last one allows the call.
#[derive(Debug)]
pub(super) struct Grown {
    count: u16,
    client: Host,
    agents: [Agent; 2],
    _control: Control,
    _servers: Vec<Process>,
}

impl Grown {
    pub(super) const COUNTS: [u16; 3] = [1, 100, 1_000];

    pub(super) fn new(site: &Site, count: u16) -> Self {
        let control = Control::start(site);
        let [server, client] = ["server", "client"].map(|name| site.host(name));
        let agents = [&server, &client].map(|host| control.join(host, &TokenOptions::default()));
        agents[1].serve(CLIENT, &Owner::Cgroup(CLIENT.to_owned()), &[]);
        let mut servers = Vec::new();
        let mut urls = String::new();
        for first in (0..count).step_by(SERVICES_OF_WORKLOAD.into()) {
            let services = first..count.min(first + SERVICES_OF_WORKLOAD);
            let account = format!("web{first}");
            servers.push(web(&server, &account, services.clone()));
            let owner = agents[0].owner_line(&Owner::Cgroup(account.clone()));
            let mut file = format!("namespace = \"shop\"\n[owner]\n{owner}\n");
            for service in services {
                let port = PORT + service;
                // Writing to memory does not fail.
                let _ = write!(
                    file,
                    "[[service]]\nname = \"s{service}\"\nports = [{{ port = {port}, protocol = \"http\" }}]\n"
                );
                let _ = write!(
                    urls,
                    "url = \"http://s{service}.shop.mesh.internal:{port}/\"\noutput = \"/dev/null\"\n"
                );
            }
            agents[0].write_file(&format!("{account}.toml"), &file);
        }
        control.apply(&rules(count)).ok();
        let grown = Self {
            count,
            client,
            agents,
            _control: control,
            _servers: servers,
        };
        grown.call_each(&urls);
        grown
    }

    /// So that the client's agent knows the endpoints of all.
    fn call_each(&self, urls: &str) {
        let list = self.client.dir().join("urls");
        std::fs::write(&list, urls).expect("a file");
        let line = format!("curl -sS --fail -m 20 -K {}", list.display());
        wait_until("every service to answer", BUILT_MAX, || {
            let output = self
                .client
                .cmd(&line)
                .cgroup(CLIENT)
                .deadline(BUILT_MAX)
                .output();
            check(output.status.success(), output.stderr)
        });
    }

    pub(super) fn load(&self) -> String {
        format!("n{}", self.count)
    }

    pub(super) fn measure(&self, cell: Duration) -> Figures {
        let scratch = self.client.dir();
        let authority = format!("s0.shop.mesh.internal:{PORT}");
        let (workload, load) = (Workload::Http, Load::C32);
        let line = workloads::command(workload, load, &authority, cell, &scratch);
        let cgroups = [0, 1].map(|side: usize| self.agents[side].host.cgroup("agent"));
        let used = || {
            cgroups
                .iter()
                .map(|cgroup| usage::cpu_us(cgroup))
                .sum::<f64>()
        };
        let before = used();
        let command = self.client.cmd(&line).cgroup(CLIENT);
        let output = command.deadline(cell + TOOL_MAX).ok();
        let used = used() - before;
        let (requests, mut figures) = workloads::read(workload, load, &output, &scratch);
        figures.insert(Metric::CpuPerRequest, used / requests);
        let rss = cgroups.iter().map(|cgroup| usage::rss_mib(cgroup));
        figures.insert(Metric::Rss, rss.fold(0.0, f64::max));
        figures
    }
}

/// One server for all services of a workload.
fn web(server: &Host, name: &str, services: Range<u16>) -> Process {
    let body = "x".repeat(SMALL_BODY);
    let more = services.clone().skip(1);
    let listen: String = more.map(|s| format!("listen {};", PORT + s)).collect();
    let locations = format!("{listen} access_log off; location = / {{ return 200 \"{body}\"; }}");
    servers::nginx(server, name, PORT + services.start, &locations)
}

/// So many rules for the first service; the others keep the one that `init` wrote.
fn rules(count: u16) -> String {
    let mut text = String::new();
    for number in 0..count {
        if number % RULES_OF_POLICY == 0 {
            // Writing to memory does not fail.
            let _ = write!(
                text,
                "---\napiVersion: meshwork.io/v1alpha1\nkind: Policy\n\
                 metadata: {{name: many{:03}, namespace: shop}}\nspec:\n  service: s0\n  rules:\n",
                number / RULES_OF_POLICY
            );
        }
        let caller = match number + 1 == count {
            true => CLIENT.to_owned(),
            false => format!("other{number}"),
        };
        let _ = writeln!(
            text,
            "  - {{name: r{number}, from: [{{identity: shop/{caller}}}]}}"
        );
    }
    text
}
