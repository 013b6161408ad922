//! What these tests begin with: control on a host of its own, installed, and hosts that are not yet.

use std::collections::BTreeSet;
use std::time::Duration;

use meshwork_tests::control::TRUST_DOMAIN;
use meshwork_tests::facts;
use meshwork_tests::machine::{Machine, PACKAGES};
use meshwork_tests::process::{Cmd, Output};
use meshwork_tests::site::Site;
use meshwork_tests::wait::{SOON, check, wait_until};

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
pub(crate) const CALL: &str = "curl -sS -m 10 http://web.shop.mesh.internal/";

pub(crate) struct Mesh {
    pub(crate) control: Machine,
    pub(crate) site: Site,
}

impl Mesh {
    #[track_caller]
    pub(crate) fn new(name: &str) -> Self {
        let site = Site::new(name);
        let control = Machine::booted(&site.host("control"));
        control.ok(&format!(
            "sh {PACKAGES}/install.sh {PACKAGES} meshwork-control meshwork-cli"
        ));
        control.ok(&format!(
            "mesh-control init --trust-domain {TRUST_DOMAIN} --address {}:7440",
            control.host.v4()
        ));
        control.ok("systemctl enable --now mesh-control");
        let mesh = Self { control, site };
        mesh.wait_control();
        mesh
    }

    #[track_caller]
    pub(crate) fn wait_control(&self) {
        wait_until("control to answer", SOON, || {
            let status = self.meshctl("status");
            check(status.status.success(), status.to_string())
        });
    }

    /// A host that booted and has nothing of ours.
    #[track_caller]
    pub(crate) fn machine(&self, name: &str) -> Machine {
        Machine::booted(&self.site.host(name))
    }

    #[track_caller]
    pub(crate) fn meshctl(&self, words: &str) -> Output {
        self.control.run(&format!(
            "meshctl --context /var/lib/meshwork-control/admin.yaml {words}"
        ))
    }

    #[track_caller]
    pub(crate) fn token(&self) -> String {
        let token = self.meshctl("token create --namespace shop").ok();
        token.trim().to_owned()
    }

    /// A host that will serve `shop/web` and one whose unit `client` will call it, both from the deb; neither has joined.
    #[track_caller]
    pub(crate) fn installed(&self) -> (Machine, Machine) {
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
    pub(crate) fn pair(&self) -> (Machine, Machine) {
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
pub(crate) fn join(machine: &Machine, token: &str) -> Output {
    machine
        .cmd(&format!("mesh-agent join {token}"))
        .deadline(JOIN_MAX)
        .output()
}

#[track_caller]
pub(crate) fn install_deb(machine: &Machine) {
    machine.ok(&format!("sh {PACKAGES}/install.sh {PACKAGES}"));
}

/// By rpm and its own database; what the package needs is there as Debian's.
#[track_caller]
pub(crate) fn install_rpm(machine: &Machine) {
    machine.ok(&format!(
        "rpm --install --nodeps {PACKAGES}/meshwork-agent-*.rpm"
    ));
}

/// Directories that on a host with rpm other packages own.
#[track_caller]
pub(crate) fn rpm_system(machine: &Machine) {
    machine.ok(
        "mkdir -p /usr/share/licenses /usr/share/fish/vendor_completions.d /usr/share/zsh/site-functions \
         /usr/lib/NetworkManager/conf.d /usr/lib/systemd/networkd.conf.d",
    );
}

/// nginx as its unit, with a page of ours.
#[track_caller]
pub(crate) fn serve_web(machine: &Machine) {
    machine.write("etc/nginx/sites-enabled/default", NGINX);
    machine.ok("systemctl enable --now nginx");
}

/// The file that makes nginx `shop/web`.
pub(crate) fn declare_web(machine: &Machine) {
    machine.write("etc/meshwork/services.d/web.toml", WEB);
}

/// The unit `client`.
#[track_caller]
pub(crate) fn run_client(machine: &Machine) {
    machine.write("etc/systemd/system/client.service", CLIENT_UNIT);
    machine.ok("systemctl daemon-reload && systemctl enable --now client");
}

/// The file that makes it `shop/client`.
pub(crate) fn declare_client(machine: &Machine) {
    machine.write("etc/meshwork/services.d/client.toml", CLIENT);
}

/// A call of the unit `client`.
pub(crate) fn call(machine: &Machine) -> Cmd {
    machine.in_unit("client", CALL)
}

/// Waits until the unit `client` of `machine` is answered by a host.
#[track_caller]
pub(crate) fn wait_answer(machine: &Machine, by: &Machine) {
    let answer = format!("hello from {}\n", by.host.name());
    wait_until("the call to be answered", SOON, || {
        let output = call(machine).output();
        check(output.stdout == answer, output.to_string())
    });
}

/// What the kernel of a host was told, and what is in its files.
pub(crate) fn facts_of(machine: &Machine) -> BTreeSet<String> {
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
