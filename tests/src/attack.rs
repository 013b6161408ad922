//! Six attacks on real hosts, each with the line by which an operator learns of it. It shows and it checks: an attack
//! that succeeds ends it with an error.

#![expect(clippy::print_stdout, reason = "showing is what it is for")]

use std::net::SocketAddr;

use crate::agent::{Agent, MESH_PORT, Owner};
use crate::control::{Control, TRUST_DOMAIN};
use crate::demo::{shown, title};
use crate::host::Host;
use crate::mesh::{Authority, knock};
use crate::process::Process;
use crate::servers;
use crate::site::Site;
use crate::wait::{SOON, check, wait_until};

/// The user of the forged listener: neither root nor the service's.
const STRANGER: u32 = 20_666;
const CALL: &str = "curl -sS -m 10 -D - http://web.shop.mesh.internal/";
/// Only the shop's client may call the shop.
const POLICY: &str = "\
apiVersion: meshwork.io/v1alpha1
kind: Policy
metadata: {name: only-the-client, namespace: shop}
spec:
  rules:
  - {name: client, from: [{identity: shop/client}]}
";

struct Attack {
    control: Control,
    server: Agent,
    client: Agent,
    evil: Host,
    /// The token by which the client joined.
    used: String,
    web: Option<Process>,
    step: u32,
}

/// Runs all six.
pub fn run(site: &Site) {
    let mut attack = Attack::prepare(site);
    attack.stolen_token();
    attack.forged_certificate();
    let evil = attack.foreign_service();
    attack.unnamed_caller();
    attack.removed_host(evil);
    attack.forged_listener();
    println!("\nSix attacks failed.");
}

impl Attack {
    fn prepare(site: &Site) -> Self {
        title(
            0,
            "A shop: host server serves shop/web, host client calls it",
        );
        let control = Control::start(site);
        let join = |name: &str| {
            let token = control.token("--namespace shop");
            let mut agent = Agent::new(&site.host(name));
            agent.join(&token).ok();
            agent.start();
            (agent, token)
        };
        let (server, _) = join("server");
        let (client, used) = join("client");
        let owner = |name: &str| Owner::Cgroup(name.to_owned());
        let location = "location / { return 200 \"hello from the shop\\n\"; }";
        let web = servers::nginx(&server.host, "web", 80, location);
        server.serve("web", &owner("web"), &[(80, "http")]);
        client.serve("client", &owner("client"), &[]);
        control.wait_endpoints("shop/web", 1);
        control.apply(POLICY).ok();
        print!("{POLICY}");
        let attack = Self {
            control,
            server,
            client,
            evil: site.host("evil"),
            used,
            web: Some(web),
            step: 0,
        };
        attack.client_is_served();
        attack
    }

    /// What must go on through all attacks.
    fn client_is_served(&self) {
        let host = &self.client.host;
        let answer = wait_until("an answer for the client", SOON, || {
            let answer = host.cmd(CALL).cgroup("client").output().stdout;
            check(answer.contains(" 200 "), answer.clone()).map(|()| answer)
        });
        shown(host, "curl http://web.shop.mesh.internal/");
        println!("{}", answer.lines().last().unwrap_or_default());
    }

    fn next(&mut self, text: &str) {
        self.step += 1;
        title(self.step, text);
    }

    /// Shows the last line that has all these words, and the check that it belongs to: what an operator sees.
    fn operator_sees(host: &Host, command: &str, text: impl Fn() -> String, words: &[&str]) {
        let found = wait_until(&format!("a line with {words:?}"), Control::NOTICED, || {
            let text = text();
            let lines: Vec<&str> = text.lines().collect();
            let has = |line: &&str| words.iter().all(|word| line.contains(word));
            let at = lines.iter().rposition(has).ok_or_else(|| text.clone())?;
            let check = lines[..at].iter().rev().find(|line| !line.starts_with(' '));
            let check = check.filter(|_| lines[at].starts_with(' '));
            let shown = check.into_iter().chain([&lines[at]]);
            Ok(shown.copied().collect::<Vec<_>>().join("\n"))
        });
        println!("\nThe operator sees:");
        shown(host, command);
        println!("{found}");
    }

    fn stolen_token(&mut self) {
        self.next("A join token is stolen, and used once more");
        let shortened = &self.used[..24.min(self.used.len())];
        shown(&self.evil, &format!("mesh-agent join {shortened}…"));
        let output = Agent::new(&self.evil).join(&self.used);
        assert!(
            !output.status.success(),
            "a used token let a host in: {output}"
        );
        print!("{}", output.stderr);
        let control = &self.control;
        let audit = || control.meshctl("get audit --limit 20").ok();
        Self::operator_sees(
            &control.host,
            "meshctl get audit",
            audit,
            &["join", "token_used"],
        );
    }

    fn forged_certificate(&mut self) {
        self.next("A certificate of another authority names our client");
        let id = format!("spiffe://{TRUST_DOMAIN}/ns/shop/sa/client");
        let authority = Authority::foreign(TRUST_DOMAIN);
        let leaf = authority.leaf(&[&id], (-1, 1), Some("00112233445566778899aabbccddeeff"));
        let port = SocketAddr::from((self.server.host.v4(), MESH_PORT));
        let sni = format!("web.shop.{TRUST_DOMAIN}");
        shown(
            &self.evil,
            &format!("a TLS client that shows {id} to {port}"),
        );
        let end = self.evil.inside(|| knock(port, &sni, Some(&leaf)));
        assert_ne!(end, "accepted", "a forged certificate was taken");
        println!("{end}");
        let (host, log) = (&self.server.host, || self.server.log());
        Self::operator_sees(host, "journalctl -u mesh-agent", log, &["untrusted_issuer"]);
    }

    fn foreign_service(&mut self) -> Agent {
        self.next("A host that may serve its own namespace claims shop/web");
        let mut evil = Agent::new(&self.evil);
        evil.join(&self.control.token("--namespace evil")).ok();
        evil.start();
        evil.serve("web", &Owner::Cgroup("web".to_owned()), &[(80, "http")]);
        let location = "location / { return 200 \"hello from evil\\n\"; }";
        let _web = servers::nginx(&self.evil, "web", 80, location);
        shown(&self.evil, "cat services.d/web.toml");
        print!(
            "{}",
            self.evil.ok("cat services.d/web.toml 2>/dev/null || true")
        );
        let control = &self.control;
        let found = || control.meshctl("check").stdout;
        Self::operator_sees(
            &control.host,
            "meshctl check",
            found,
            &["evil", "out_of_scope"],
        );
        self.client_is_served();
        evil
    }

    fn unnamed_caller(&mut self) {
        self.next("A program that no rule names calls the shop");
        shown(&self.evil, "curl -i http://web.shop.mesh.internal/");
        let evil = &self.evil;
        let answer = wait_until("an answer for the stranger", SOON, || {
            let answer = evil.run(CALL).stdout;
            check(answer.contains("HTTP/"), answer.clone()).map(|()| answer)
        });
        print!("{answer}");
        let refused = answer.contains(" 403 ") && answer.contains("x-meshwork-reason: not_allowed");
        assert!(refused, "a caller without a rule was let in");
        let (host, log) = (&self.server.host, || self.server.log());
        let words = ["not_allowed", "only-the-client"];
        Self::operator_sees(host, "journalctl -u mesh-agent", log, &words);
    }

    fn removed_host(&mut self, mut evil: Agent) {
        self.next("A host that the operator removed comes back with its old credential");
        shown(&self.control.host, "meshctl delete host evil");
        print!("{}", self.control.meshctl("delete host evil").ok());
        evil.stop();
        shown(&self.evil, "mesh-agent run");
        evil.spawn();
        let control = &self.control;
        let audit = || control.meshctl("get audit --limit 20").ok();
        Self::operator_sees(&control.host, "meshctl get audit", audit, &["host_revoked"]);
        let hosts = control.meshctl("get hosts").ok();
        assert!(
            !hosts.contains("evil"),
            "a removed host is in the mesh: {hosts}"
        );
    }

    fn forged_listener(&mut self) {
        self.next("The shop's program is gone, and another user takes its port");
        self.client_is_served();
        drop(self.web.take());
        let host = &self.server.host;
        let line = "exec /usr/bin/python3 -m http.server 80";
        shown(host, "su stranger -c 'python3 -m http.server 80'");
        // Ports below 1024 are anybody's in this network namespace, as where `ip_unprivileged_port_start` is 0.
        host.ok("echo 0 > /proc/sys/net/ipv4/ip_unprivileged_port_start");
        let _forged = host
            .cmd(line)
            .user(STRANGER)
            .cgroup("stranger")
            .spawn("forged");
        host.wait_listening(80, SOON);
        let client = &self.client.host;
        let answer = wait_until("an answer for the client", SOON, || {
            let answer = client.cmd(CALL).cgroup("client").output().stdout;
            assert!(
                !answer.contains(" 200 "),
                "a forged listener answered: {answer}"
            );
            check(answer.contains("x-meshwork-reason"), answer.clone()).map(|()| answer)
        });
        shown(client, "curl -i http://web.shop.mesh.internal/");
        print!("{answer}");
        let found = || self.server.command("check").stdout;
        Self::operator_sees(
            host,
            "mesh-agent check",
            found,
            &["shop/web", "another program"],
        );
    }
}
