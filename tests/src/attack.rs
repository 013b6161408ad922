//! Six attacks on real hosts, each with the line by which an operator learns of it. It shows and it checks: an attack
//! that succeeds ends it with an error.

#![expect(clippy::print_stdout, reason = "showing is what it is for")]

use std::net::SocketAddr;
use std::time::Instant;

use crate::agent::{Agent, MESH_PORT, Owner};
use crate::control::{Control, TRUST_DOMAIN};
use crate::demo::{shown, title};
use crate::host::Host;
use crate::mesh::{Authority, Credential, knock};
use crate::process::Process;
use crate::servers;
use crate::site::Site;
use crate::wait::{SOON, check, wait_until};

/// The user of the forged listener: neither root nor the service's.
const STRANGER: u32 = 20_666;
const CALL: &str = "curl -sS -m 10 -D - http://web.shop.mesh.internal/";
/// Only the shop's client may call the shop; anybody may still come in plaintext, where a service lets them.
const POLICY: &str = "\
apiVersion: meshwork.io/v1alpha1
kind: Policy
metadata: {name: only-the-client, namespace: shop}
spec:
  rules:
  - {name: client, from: [{identity: shop/client}]}
  - {name: plaintext, from: [{cidr: 0.0.0.0/0}]}
";
const STRICT: &str = "\
apiVersion: v1
kind: Service
metadata:
  name: web
  namespace: shop
  annotations: {meshwork.io/transport: strict}
spec:
  ports: [{port: 80, appProtocol: http}]
";
/// The boot of the machine that runs from a copied disk.
const OTHER_BOOT: &str = "c10e0000-0000-4000-8000-000000000000";

/// Answers each byte.
const ECHO: &str = "
import socket, threading
listener = socket.create_server(('', 9000))
def serve(client):
    try:
        while data := client.recv(65536):
            client.sendall(data)
    except OSError:
        pass
while True:
    threading.Thread(target=serve, args=listener.accept()[:1]).start()
";

/// Keeps a call open, and says how it ends.
const HELD: &str = "
import socket
call = socket.create_connection(('echo.shop.mesh.internal', 9000))
call.sendall(b'x')
call.recv(1)
print('the call stands', flush=True)
try:
    print('data' if call.recv(1) else 'closed', flush=True)
except OSError as error:
    print(error, flush=True)
";

struct Attack {
    control: Control,
    server: Agent,
    client: Agent,
    /// A machine of somebody else in the same network.
    evil: Host,
    /// A member that will turn out to be taken over.
    taken: Agent,
    /// The token by which the client joined.
    used: String,
    web: Option<Process>,
    _echo: Process,
    step: u32,
}

/// Runs all six.
pub fn run(site: &Site) {
    let mut attack = Attack::prepare(site);
    attack.stolen_token();
    attack.direct_dial();
    attack.plaintext_to_strict();
    attack.cloned_host();
    attack.revoked_host();
    attack.forged_listener();
    println!("\nSix attacks failed.");
}

impl Attack {
    fn prepare(site: &Site) -> Self {
        title(
            0,
            "A shop: host server serves shop/web and shop/echo, hosts client and taken call them",
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
        let (taken, _) = join("taken");
        let owner = |name: &str| Owner::Cgroup(name.to_owned());
        let location = "location / { return 200 \"hello from the shop\\n\"; }";
        let web = servers::nginx(&server.host, "web", 80, location);
        let echo = server
            .host
            .python("echo", ECHO)
            .cgroup("echo")
            .spawn("echo");
        server.serve("web", &owner("web"), &[(80, "http")]);
        server.serve("echo", &owner("echo"), &[(9000, "tcp")]);
        client.serve("client", &owner("client"), &[]);
        taken.serve("client", &owner("client"), &[]);
        control.wait_endpoints("shop/web", 1);
        control.wait_endpoints("shop/echo", 1);
        control.apply(POLICY).ok();
        print!("{POLICY}");
        let attack = Self {
            control,
            server,
            client,
            evil: site.host("evil"),
            taken,
            used,
            web: Some(web),
            _echo: echo,
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

    fn server_logs(&self, words: &[&str]) {
        let (host, log) = (&self.server.host, || self.server.log());
        Self::operator_sees(host, "journalctl -u mesh-agent", log, words);
    }

    fn audit_says(&self, words: &[&str]) {
        let control = &self.control;
        let audit = || control.meshctl("get audit --limit 20").ok();
        Self::operator_sees(&control.host, "meshctl get audit", audit, words);
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
        self.audit_says(&["join", "token_used"]);
    }

    fn direct_dial(&mut self) {
        self.next("The server's agent is dialled directly: with no certificate, then with one of another authority");
        let id = format!("spiffe://{TRUST_DOMAIN}/ns/shop/sa/client");
        let authority = Authority::foreign(TRUST_DOMAIN);
        let uid = "00112233445566778899aabbccddeeff";
        let forged = authority.leaf(&[&id], (-1, 1), Some(uid));
        self.knocks("no certificate", None, "no_certificate");
        self.knocks(&id, Some(&forged), "untrusted_issuer");
    }

    /// Somebody who does what he likes, at the mesh port of the server.
    fn knocks(&self, as_whom: &str, credential: Option<&Credential>, reason: &str) {
        let port = SocketAddr::from((self.server.host.v4(), MESH_PORT));
        let sni = format!("web.shop.{TRUST_DOMAIN}");
        shown(
            &self.evil,
            &format!("a TLS client at {port} that shows {as_whom}"),
        );
        let end = self.evil.inside(|| knock(port, &sni, credential));
        assert_ne!(end, "accepted", "{as_whom} was let in");
        println!("{end}");
        self.server_logs(&[reason]);
    }

    fn plaintext_to_strict(&mut self) {
        self.next("A stranger goes past the mesh, straight to the shop's port");
        let command = format!("curl -sS -m 5 http://{}/", self.server.host.v4());
        shown(&self.evil, &command);
        print!("{}", self.evil.ok(&command));
        println!("That is what `permissive` lets in. Now the operator makes the service strict:");
        shown(&self.control.host, "meshctl apply -f web.yaml");
        print!("{}", self.control.apply(STRICT).ok());
        let refused = wait_until("the refusal", SOON, || {
            let output = self.evil.run(&command);
            check(!output.status.success(), output.to_string()).map(|()| output)
        });
        shown(&self.evil, &command);
        print!("{}", refused.stderr);
        let (control, source) = (&self.control, self.evil.v4().to_string());
        let edges = || control.meshctl("edges --plaintext").ok();
        let words = [source.as_str(), "plaintext", "refused"];
        Self::operator_sees(&control.host, "meshctl edges --plaintext", edges, &words);
        self.server_logs(&[&source, "plaintext_refused"]);
        self.client_is_served();
    }

    fn cloned_host(&mut self) {
        self.next("The disk of host client is copied, and the copy is started on another machine");
        let mut clone = self.client.cloned(&self.evil);
        shown(&self.evil, "mesh-agent run");
        clone.spawn_in_boot(OTHER_BOOT);
        let (host, log) = (&self.control.host, || self.control.log());
        let words = ["host_cloned", OTHER_BOOT];
        Self::operator_sees(host, "journalctl -u mesh-control", log, &words);
        clone.kill9();
        self.client_is_served();
    }

    fn revoked_host(&mut self) {
        self.next("Host taken is in strange hands: a call stands open, and its keys were copied");
        let host = &self.taken.host;
        let held = host.python("held", HELD).cgroup("client").spawn("held");
        let said = |word: &str| {
            wait_until(&format!("`{word}`"), SOON, || {
                let log = held.log();
                check(log.contains(word), log)
            });
        };
        said("the call stands");
        shown(host, "a program with a call to echo.shop.mesh.internal");
        print!("{}", held.log());
        let stolen = Credential::of_leaf(&host.dir().join("state"), "shop.client");
        let command = "revoke host taken";
        shown(&self.control.host, &format!("meshctl {command}"));
        let begun = Instant::now();
        print!("{}", self.control.meshctl(command).ok());
        said("reset by peer");
        let took = begun.elapsed();
        shown(host, "the same program");
        print!("{}", held.log().lines().last().unwrap_or_default());
        println!(", {} ms after the operator's word", took.as_millis());
        self.server_logs(&["revoked by the operator"]);
        self.knocks(
            "the certificate of host taken",
            Some(&stolen),
            "peer_revoked",
        );
        self.audit_says(&["host/taken", "host_revoked"]);
        self.client_is_served();
    }

    fn forged_listener(&mut self) {
        self.next("The shop's program is gone, and another user takes its port");
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
