//! Meshes of hosts that boot, as the booted tier and the demonstration begin: control on a host of its own, installed, and
//! hosts that are not yet.

pub mod demo;
pub mod load;
pub mod package;

use std::collections::BTreeSet;
use std::time::Duration;

use crate::control::{TRUST_DOMAIN, has_endpoints};
use crate::facts;
use crate::machine::{Machine, PACKAGES};
use crate::process::{Cmd, Output};
use crate::site::Site;
use crate::wait::{SOON, check, wait_until};

/// Answers with the name of its host.
const NGINX: &str =
    "server { listen 80 default_server; location / { return 200 \"hello from $hostname\\n\"; } }\n";
const WEB: &str = "\
namespace = \"shop\"
[owner]
unit = \"nginx.service\"
[[service]]
ports = [{ port = 80, protocol = \"http\" }]
check = { tcp = true, interval_s = 1 }
";
const CLIENT: &str = "namespace = \"shop\"\n[owner]\nunit = \"client.service\"\n";
/// It waits until the agent serves and the host's checks are good.
const JOIN_MAX: Duration = Duration::from_secs(120);
/// Whose programs call.
const CLIENT_UNIT: &str = "\
[Service]
ExecStart=sleep infinity
[Install]
WantedBy=multi-user.target
";
/// An unchanged curl, by name.
pub const CALL: &str = "curl -sS -m 10 http://web.shop.mesh.internal/";

#[derive(Debug)]
pub struct Mesh {
    pub control: Machine,
    pub site: Site,
}

impl Mesh {
    #[track_caller]
    pub fn new(name: &str) -> Self {
        let mesh = Self::on(Site::new(name));
        mesh.start_control();
        mesh
    }

    /// A host for control, which booted.
    #[track_caller]
    pub fn on(site: Site) -> Self {
        let control = Machine::booted(&site.host("control"));
        Self { control, site }
    }

    /// Installs control and begins a mesh.
    #[track_caller]
    fn start_control(&self) {
        for line in self.control_lines() {
            self.control.ok(&line);
        }
        self.wait_control();
    }

    /// The command lines for that, as an operator types them.
    fn control_lines(&self) -> [String; 3] {
        [
            format!("sh {PACKAGES}/install.sh {PACKAGES} meshwork-control meshwork-cli"),
            format!(
                "mesh-control init --trust-domain {TRUST_DOMAIN} --address {}:7440",
                self.control.host.v4()
            ),
            "systemctl enable --now mesh-control".to_owned(),
        ]
    }

    #[track_caller]
    pub fn wait_control(&self) {
        wait_until("control to answer", SOON, || {
            let status = self.meshctl("status");
            check(status.status.success(), status.to_string())
        });
    }

    /// Waits until control lists this many answering endpoints of a service.
    #[track_caller]
    pub fn wait_endpoints(&self, service: &str, count: usize) {
        wait_until(&format!("{count} endpoints of {service}"), SOON, || {
            has_endpoints(
                &self.meshctl(&format!("get services {service} -o json")),
                count,
            )
        });
    }

    /// A host that booted and has nothing of ours.
    #[track_caller]
    pub fn machine(&self, name: &str) -> Machine {
        Machine::booted(&self.site.host(name))
    }

    #[track_caller]
    pub fn meshctl(&self, words: &str) -> Output {
        self.control.run(&format!(
            "meshctl --context /var/lib/meshwork-control/admin.yaml {words}"
        ))
    }

    #[track_caller]
    pub fn token(&self) -> String {
        let token = self.meshctl("token create --namespace shop").ok();
        token.trim().to_owned()
    }

    /// A host that will serve `shop/web` and one whose unit `client` will call it, both from the deb; neither has joined.
    #[track_caller]
    pub fn installed(&self) -> (Machine, Machine) {
        let (client, server) = (self.machine("client"), self.machine("server"));
        for machine in [&client, &server] {
            install_deb(machine);
        }
        run_client(&client);
        serve_web(&server);
        declare_web(&server);
        declare_client(&client);
        (client, server)
    }

    /// These two, joined.
    #[track_caller]
    pub fn pair(&self) -> (Machine, Machine) {
        let (client, server) = self.installed();
        for machine in [&client, &server] {
            join(machine, &self.token()).ok();
        }
        wait_answer(&client, &server);
        (client, server)
    }
}

/// Joins an installed host, as an operator does.
#[track_caller]
pub fn join(machine: &Machine, token: &str) -> Output {
    machine
        .cmd(&format!("mesh-agent join {token}"))
        .deadline(JOIN_MAX)
        .output()
}

#[track_caller]
pub fn install_deb(machine: &Machine) {
    machine.ok(&format!("sh {PACKAGES}/install.sh {PACKAGES}"));
}

/// By rpm and its own database; what the package needs is there as Debian's.
#[track_caller]
pub fn install_rpm(machine: &Machine) {
    machine.ok(&format!(
        "rpm --install --nodeps {PACKAGES}/meshwork-agent-*.rpm"
    ));
}

/// Directories that on a host with rpm other packages own.
#[track_caller]
pub fn rpm_system(machine: &Machine) {
    machine.ok(
        "mkdir -p /usr/share/licenses /usr/share/fish/vendor_completions.d /usr/share/zsh/site-functions \
         /usr/lib/NetworkManager/conf.d /usr/lib/systemd/networkd.conf.d",
    );
}

/// nginx as its unit, with a page of ours.
#[track_caller]
pub fn serve_web(machine: &Machine) {
    machine.write("etc/nginx/sites-enabled/default", NGINX);
    machine.ok("systemctl enable --now nginx");
}

/// The file that makes nginx `shop/web`.
pub fn declare_web(machine: &Machine) {
    machine.write("etc/meshwork/services.d/web.toml", WEB);
}

/// The unit `client`.
#[track_caller]
pub fn run_client(machine: &Machine) {
    machine.write("etc/systemd/system/client.service", CLIENT_UNIT);
    machine.ok("systemctl daemon-reload && systemctl enable --now client");
}

/// The file that makes it `shop/client`.
pub fn declare_client(machine: &Machine) {
    machine.write("etc/meshwork/services.d/client.toml", CLIENT);
}

/// A call of the unit `client`.
pub fn call(machine: &Machine) -> Cmd {
    machine.in_unit("client", CALL)
}

/// Waits until the unit `client` of `machine` is answered by a host.
#[track_caller]
pub fn wait_answer(machine: &Machine, by: &Machine) {
    let answer = format!("hello from {}\n", by.host.name());
    wait_until("the call to be answered", SOON, || {
        let output = call(machine).output();
        check(output.stdout == answer, output.to_string())
    });
}

/// The process of the agent's unit.
#[track_caller]
pub fn holder(machine: &Machine) -> String {
    let pid = machine.ok("systemctl show --property MainPID --value mesh-agent");
    pid.trim().to_owned()
}

/// Its workers.
#[track_caller]
pub fn workers(machine: &Machine) -> Vec<String> {
    let pids = machine.run(&format!("pgrep --parent {}", holder(machine)));
    pids.stdout.lines().map(str::to_owned).collect()
}

/// What the kernel of a host was told, and what is in its files.
pub fn facts_of(machine: &Machine) -> BTreeSet<String> {
    let files = [
        "cat /etc/resolv.conf /etc/passwd /etc/group",
        // But for what those who install and boot write down for themselves.
        "find / -xdev \\( -path /var/log -o -path /var/cache -o -path /var/lib/dpkg -o -path /var/lib/rpm -o \
         -path /var/lib/apt -o -path /var/lib/systemd -o -path /var/backups -o -path /root/.rpmdb -o -path /tmp -o -path /var/tmp \\) -prune \
         -o \\( -type d -printf '%p %m %U:%G\\n' \\) -o -printf '%p %y %m %U:%G %s %l\\n'",
        "find /etc -type f -exec sha256sum {} +",
        "find /run -name '*mesh*'",
        "systemctl list-unit-files --no-legend",
    ];
    facts::of(facts::KERNEL.iter().chain(&files), |line| {
        machine.run(line).stdout
    })
}
