//! SSH is not the mesh's to cut or refuse, whatever is declared, armed, flushed or restarted.

use std::fs::{File, OpenOptions};
use std::io::Write as _;

use meshwork_tests::host::Host;
use meshwork_tests::process::Process;
use meshwork_tests::servers;
use meshwork_tests::wait::{SOON, check, wait_until};

use crate::door::{NO_NEW_WAY_TO_CONTROL, STRICT, disarms_telling, service};
use crate::pair::{Pair, owner, spiffe};
use crate::real_addresses::{self, REAL, wait_taken};

/// The command of a login at `to` with the server's own key, and its options.
fn ssh(server: &Host, to: &str) -> String {
    format!(
        "ssh -F none -i {}/ssh/client -o BatchMode=yes -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null \
         -o LogLevel=ERROR -o ConnectTimeout=5 root@{to}",
        server.dir().display()
    )
}

/// A login that stands: what is written into it comes back from the other host.
struct Session {
    to: String,
    input: File,
    process: Process,
    said: u32,
}

impl Session {
    #[track_caller]
    fn open(from: &Host, server: &Host, to: &str) -> Self {
        let name = format!("ssh-{}", to.replace(':', "-"));
        let input = from.dir().join(&name);
        from.ok(&format!("mkfifo {}", input.display()));
        let line = format!("exec {} cat < {}", ssh(server, to), input.display());
        let process = from.cmd(&line).spawn(&name);
        // For both, so that opening waits for nobody, and the other end never sees an end.
        let input = OpenOptions::new().read(true).write(true).open(input);
        Self {
            to: to.to_owned(),
            input: input.unwrap(),
            process,
            said: 0,
        }
    }

    /// Says something, and returns it.
    fn say(&mut self) -> String {
        self.said += 1;
        let word = format!("word {} to {}\n", self.said, self.to);
        self.input.write_all(word.as_bytes()).unwrap();
        word
    }

    fn heard(&self, word: &str) -> bool {
        self.process.log().contains(word)
    }

    #[track_caller]
    fn hears(&mut self, word: &str, when: &str) {
        wait_until(&format!("an echo {when}"), SOON, || {
            self.process.is_alive()?;
            check(self.heard(word), self.process.log())
        });
    }
}

#[test]
fn ssh_is_never_cut_and_never_refused() {
    let mut pair = Pair::new("ssh_is_never_cut");
    let server = pair.server.host.clone();
    let _sshd = servers::sshd(&server, "ssh", 22);
    let stranger = pair.site.host("stranger");
    let to = [server.v4().to_string(), server.v6().to_string()];
    let mut sessions = to.map(|to| Session::open(&stranger, &server, &to));
    let login = |to: &str| stranger.run(&format!("{} echo here", ssh(&server, to)));
    let mut look = |when: &str| {
        for session in &mut sessions {
            let word = session.say();
            session.hears(&word, when);
            let output = login(&session.to);
            assert_eq!(output.stdout, "here\n", "{when}: {output}");
        }
    };
    look("before the mesh knows of it");
    // All that can be declared against it.
    pair.server.serve("ssh", &owner("ssh"), &[(22, "tcp")]);
    pair.control.wait_endpoints("shop/ssh", 1);
    let strict = service(STRICT)
        .replace("name: web", "name: ssh")
        .replace("port: 80, appProtocol: http", "port: 22, appProtocol: tcp");
    pair.control.apply(&strict).ok();
    look("as a strict service");
    // A new door, from its trial on.
    disarms_telling(&pair, &stranger, &server, NO_NEW_WAY_TO_CONTROL, &mut look);
    let nobody = "apiVersion: meshwork.io/v1alpha1\nkind: Policy\nmetadata: {name: nobody, namespace: shop}\n\
                  spec: {rules: [{name: n, from: [{identity: none/none}]}]}\n";
    pair.control.apply(nobody).ok();
    look("while a policy allows nobody");
    server.ok("nft flush ruleset");
    look("after a foreign flush");
    wait_until("the rules to be put back", SOON, || {
        let rules = server.ok("nft list ruleset");
        let whole = ["inet meshwork ", "inet meshwork_guard "];
        check(whole.iter().all(|table| rules.contains(table)), rules)
    });
    look("after the repair");
    pair.server.kill_worker();
    look("with a new worker");
    pair.server.stop();
    look("without an agent");
    pair.server.start();
    look("with the agent started again");
    pair.server.kill9();
    look("when the agent has crashed");
    pair.server.command("guard").ok();
    look("behind the guard alone, as at boot");
    pair.server.start();
    look("with the agent started after its crash");

    // A rule that does cut it is seen, by who is in and by who comes.
    server.ok(
        "nft 'add table inet cut; add chain inet cut in { type filter hook input priority 0; }; \
         add rule inet cut in tcp dport 22 counter drop'",
    );
    for session in &mut sessions {
        let word = session.say();
        let dropped = login(&session.to);
        assert_eq!(dropped.code(), 255, "{dropped}");
        assert!(!session.heard(&word), "it passed what was to drop it");
    }
    let rules = server.ok("nft list table inet cut");
    assert!(!rules.contains("packets 0 "), "{rules}");
    server.ok("nft delete table inet cut");
    for session in &mut sessions {
        let word = format!("word {} to {}\n", session.said, session.to);
        session.hears(&word, "once the rule is gone");
    }
}

/// Where a service asks for its real addresses and is strict, a member's own way to port 22 is not taken over either: it logs
/// in as before, while a call to port 80 of the same address goes by the mesh.
#[test]
fn a_member_logs_in_at_a_real_address_that_is_taken_over() {
    let pair = Pair::new("a_member_logs_in_at_a_real_address");
    let server = pair.server.host.clone();
    let _sshd = servers::sshd(&server, "ssh", 22);
    let _web = pair.web("http", "");
    pair.server.serve("ssh", &owner("ssh"), &[(22, "tcp")]);
    pair.control.wait_endpoints("shop/ssh", 1);
    let both = format!("{REAL}, {STRICT}");
    for (name, port) in [
        ("ssh", "{port: 22, appProtocol: tcp}"),
        ("web", "{port: 80, appProtocol: http}"),
    ] {
        let service = real_addresses::service(name, port, &both);
        pair.control.apply(&service).ok();
    }
    // What was said of the other one came before.
    let address = server.v4().to_string();
    wait_taken(&pair.client.host, &address, true);
    let line = format!("curl -sS -m 10 http://{address}/");
    assert_eq!(pair.ok(&line), "hello\n");
    wait_until("the call to be counted", SOON, || {
        let count = pair.calls(&spiffe("client"), "shop/web");
        check(count == 1.0, count.to_string())
    });
    for to in [address, server.v6().to_string()] {
        let line = format!("{} echo here", ssh(&server, &to));
        for command in [pair.cmd(&line), pair.client.host.cmd(&line)] {
            let output = command.output();
            assert_eq!(output.stdout, "here\n", "{output}");
        }
    }
    assert_eq!(pair.calls(&spiffe("client"), "shop/ssh"), 0.0);
}
