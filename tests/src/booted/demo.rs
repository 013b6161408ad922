//! The life of hosts, shown: machines that boot are installed, join, call each other, are upgraded under load and are rid of
//! it all. Every command is run as it stands there, and what it says is what is shown.

#![expect(clippy::print_stdout, reason = "showing is what it is for")]

use std::collections::BTreeSet;

use super::load::Load;
use super::package::{BUILT, Newer};
use super::{
    CALL, JOIN_MAX, Mesh, call, declare_client, declare_web, facts_of, holder, run_client,
    serve_web, workers,
};
use crate::demo::title;
use crate::facts;
use crate::machine::{Machine, PACKAGES};
use crate::process::Cmd;
use crate::site::Site;
use crate::wait::{SOON, check, wait_until};

const URL: &str = "http://web.shop.mesh.internal/";

struct Demo {
    mesh: Mesh,
    client: Machine,
    server: Machine,
    /// What was so on both before anything of ours came.
    before: [BTreeSet<String>; 2],
    step: u32,
    /// What was seen, for the end.
    seen: Vec<String>,
}

/// Runs all of it. Whatever does not come out as it should ends it with an error.
pub fn run() {
    crate::sweep::demo();
    let mut demo = Demo::boot();
    demo.install();
    demo.join();
    demo.call();
    demo.upgrade();
    demo.remove();
    title(demo.step + 1, "What was seen");
    for line in &demo.seen {
        println!("- {line}");
    }
    println!("\nThe demonstration is over; everything it made is removed.");
}

impl Demo {
    fn boot() -> Self {
        title(1, "Three machines boot, each a Debian with systemd");
        let mesh = Mesh::on(Site::demo(false));
        let (client, server) = (mesh.machine("client"), mesh.machine("server"));
        run_client(&client);
        serve_web(&server);
        for machine in [&mesh.control, &client, &server] {
            let line = ". /etc/os-release; echo \"$PRETTY_NAME, $(systemctl is-system-running)\"; \
                        ip -brief address show eth0";
            show(machine, line);
        }
        println!(
            "\nThe server runs nginx at port 80, the client a unit of its own. Neither knows of a mesh:"
        );
        show(&server, "systemctl is-active nginx");
        show(&client, "systemctl is-active client");
        let before = [&client, &server].map(facts_of);
        Self {
            mesh,
            client,
            server,
            before,
            step: 1,
            seen: Vec::new(),
        }
    }

    fn next(&mut self, text: &str) {
        self.step += 1;
        title(self.step, text);
    }

    fn install(&mut self) {
        self.next("They are installed from packages");
        for line in self.mesh.control_lines() {
            show(&self.mesh.control, &line);
        }
        self.mesh.wait_control();
        for machine in [&self.client, &self.server] {
            show(machine, &format!("sh {PACKAGES}/install.sh {PACKAGES}"));
        }
        println!("\nThat has started nothing, and told the kernel nothing:");
        let rules = show(&self.client, "nft list ruleset | wc -l");
        assert_eq!(rules, "0\n");
    }

    fn join(&mut self) {
        self.next("They join, each by a token");
        println!("What of a host is in the mesh is in its files:");
        declare_web(&self.server);
        declare_client(&self.client);
        for machine in [&self.server, &self.client] {
            show(machine, "cat /etc/meshwork/services.d/*.toml");
        }
        for machine in [&self.server, &self.client] {
            let token = self.mesh.token();
            shown(&self.mesh.control, "meshctl token create --namespace shop");
            let begin = token.get(..24).unwrap_or_default();
            println!("{begin}…");
            shown(machine, &format!("mesh-agent join {begin}…"));
            said(machine.cmd(&format!("exec 2>&1; mesh-agent join {token}")));
        }
        self.meshctl("get hosts");
        let hosts = self.mesh.meshctl("get hosts").ok();
        assert!(
            hosts.contains("client") && hosts.contains("server"),
            "{hosts}"
        );
    }

    fn call(&mut self) {
        self.next("An unchanged curl of the client's unit calls, over mTLS");
        wait_until("the service to be known", SOON, || {
            let output = call(&self.client).output();
            check(output.stdout == "hello from server\n", output.to_string())
        });
        unit_shown(&self.client, CALL);
        said(call(&self.client));
        let edges = wait_until("the edge to be listed", SOON, || {
            let edges = self.mesh.meshctl("edges").ok();
            check(edges.contains("mTLS"), edges.clone()).map(|()| edges)
        });
        println!("\nWho called whom, as both agents proved it to each other:");
        shown(&self.mesh.control, "meshctl edges");
        print!("{edges}");
        self.seen
            .push("shop/client called shop/web by name, over mTLS".to_owned());
    }

    fn upgrade(&mut self) {
        let newer = Newer::after(BUILT, &[], &self.server.host.dir());
        self.next(&format!(
            "Both agents are upgraded to {} under load",
            newer.version
        ));
        unit_shown(&self.client, &format!("{} &", Load::line(URL)));
        let mut load = Load::start(&self.client, "client", URL);
        for machine in [&self.server, &self.client] {
            println!();
            let before = (holder(machine), workers(machine));
            show(machine, "mesh-agent status | grep ^agent");
            show(machine, &newer.bring(machine));
            show(machine, "mesh-agent status | grep -E '^(agent|draining)'");
            let after = (holder(machine), workers(machine));
            println!(
                "the agent's process was {} and is {}; its worker was {}, now {}",
                before.0,
                after.0,
                before.1.join(" "),
                after.1.join(" ")
            );
            assert_eq!(before.0, after.0, "the agent's process stays");
            assert!(after.1.iter().any(|w| !before.1.contains(w)), "{after:?}");
            let status = machine.ok("mesh-agent status");
            let agent = format!("agent        {}", newer.version);
            assert!(status.contains(&agent), "{status}");
            load.is_alive();
        }
        let report = load.end(&self.client);
        println!("\nwrk is told to end. It would name errors and answers other than 2xx:");
        print!("{}", report.text);
        report.assert_good();
        self.seen.push(format!(
            "both agents went from {BUILT} to {} while {} requests were made; none failed",
            newer.version, report.requests
        ));
    }

    fn remove(&mut self) {
        self.next("They leave and are rid of it");
        for machine in [&self.client, &self.server] {
            show(machine, "mesh-agent leave");
            show(machine, "apt-get purge -y -q meshwork-agent");
        }
        self.meshctl("get hosts");
        println!(
            "\nRules, links, addresses, routes, sysctls, sockets, files and units of before the installation, and now:"
        );
        for (machine, before) in [&self.client, &self.server].into_iter().zip(&self.before) {
            let after = facts_of(machine);
            let name = machine.host.name();
            println!(
                "{name}: {} facts before, {} after; {} are new, {} are lost",
                before.len(),
                after.len(),
                after.difference(before).count(),
                before.difference(&after).count()
            );
            facts::assert_same(before, &after);
            self.seen.push(format!(
                "{name} is as it was: all of {} facts about its kernel and files are the same",
                before.len()
            ));
        }
    }

    fn meshctl(&self, words: &str) {
        shown(&self.mesh.control, &format!("meshctl {words}"));
        print!("{}", self.mesh.meshctl(words).ok());
    }
}

fn shown(machine: &Machine, line: &str) {
    println!("{}# {line}", machine.host.name());
}

/// As a program of the unit `client`.
fn unit_shown(machine: &Machine, line: &str) {
    println!("{} (client.service)$ {line}", machine.host.name());
}

/// Runs a line as root, which must succeed, and shows both.
fn show(machine: &Machine, line: &str) -> String {
    shown(machine, line);
    said(machine.cmd(&format!("exec 2>&1; {line}")))
}

fn said(cmd: Cmd) -> String {
    let text = cmd.deadline(JOIN_MAX).ok();
    for line in text.lines() {
        // Of a line that was written over and over, as progress is, what a terminal shows in the end.
        println!("{}", line.rsplit('\r').next().unwrap_or_default());
    }
    text
}
