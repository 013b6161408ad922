//! The demonstration: three hosts, unchanged programs, real output. It shows and it checks: whatever does not come
//! out as it should ends it with an error.

#![expect(clippy::print_stdout, reason = "showing is what it is for")]

use std::collections::BTreeMap;

use crate::agent::{Agent, Owner};
use crate::control::Control;
use crate::host::Host;
use crate::process::Process;
use crate::servers;
use crate::site::Site;
use crate::wait::{SOON, check, wait_until};

/// Calls in the step that shows balancing.
const CALLS: u32 = 40;
/// Rounds of them at most until both instances are known: one that was never called, or whose first call paid for the
/// connection, counts as slow.
const ROUNDS_MAX: u32 = 20;
/// Only the shop's client may call the shop.
const POLICY: &str = "\
apiVersion: meshwork.io/v1alpha1
kind: Policy
metadata:
  name: only-the-client
  namespace: shop
spec:
  rules:
  - name: client
    from:
    - identity: shop/client
";

struct Demo {
    control: Control,
    agents: Vec<Agent>,
    web1: Process,
    _servers: Vec<Process>,
    client: Host,
    step: u32,
}

/// Runs all of it; with `keep` everything stays up afterwards.
pub fn run(keep: bool) {
    crate::sweep::demo();
    let site = Site::demo(keep);
    let mut demo = Demo::prepare(&site);
    demo.identities();
    demo.tcp();
    demo.balancing();
    demo.denied();
    demo.instance_killed();
    demo.control_stopped();
    if keep {
        demo.stay();
    } else {
        println!("\nThe demonstration is over; everything it made is removed.");
    }
}

impl Demo {
    fn prepare(site: &Site) -> Self {
        title(1, "Three hosts join by token");
        let control = Control::start(site);
        println!("mesh-control runs on host control ({})", control.host.v4());
        let hosts = ["vm1", "vm2", "vm3"].map(|name| site.host(name));
        let mut agents = Vec::new();
        for host in &hosts {
            let mut agent = Agent::new(host);
            let token = control.token("--namespace shop");
            shown(
                host,
                &format!("mesh-agent join {}…", &token[..24.min(token.len())]),
            );
            print!("{}", agent.join(&token).ok());
            agent.start();
            agents.push(agent);
        }
        println!("\nWhat each host serves is a file in services.d:");
        let owner = |name: &str| Owner::Cgroup(name.to_owned());
        agents[0].serve("web", &owner("web"), &[(80, "http")]);
        agents[1].serve("web", &owner("web"), &[(80, "http")]);
        agents[1].serve("cache", &owner("cache"), &[(6379, "tcp")]);
        agents[2].serve("client", &owner("client"), &[]);
        print!(
            "{}",
            hosts[0].ok(&format!(
                "cat {}/services.d/web.toml",
                hosts[0].dir().display()
            ))
        );
        let answer = |host: &Host| {
            format!(
                "location / {{ return 200 \"hello from {}\\n\"; }}",
                host.name()
            )
        };
        let web1 = servers::nginx(&hosts[0], "web", 80, &answer(&hosts[0]));
        let web2 = servers::nginx(&hosts[1], "web", 80, &answer(&hosts[1]));
        let cache = servers::redis(&hosts[1], "cache", 6379);
        control.wait_endpoints("shop/web", 2);
        control.wait_endpoints("shop/cache", 1);
        let demo = Self {
            control,
            agents,
            web1,
            _servers: vec![web2, cache],
            client: hosts[2].clone(),
            step: 1,
        };
        demo.meshctl("get services");
        demo.meshctl("get hosts");
        demo
    }

    fn next(&mut self, text: &str) {
        self.step += 1;
        title(self.step, text);
    }

    fn identities(&mut self) {
        self.next("An unchanged curl calls a service by its mesh name");
        let answer = self.call("curl -sS http://web.shop.mesh.internal/");
        assert!(answer.contains("hello from vm"), "nginx did not answer");
        self.call("getent hosts web.shop.mesh.internal");
        println!("\nWho called, as the server's agent proved it by mTLS:");
        for agent in &self.agents[..2] {
            let metrics = agent.metrics();
            let inbound = [("direction", "Inbound"), ("status", "2xx")];
            for call in metrics
                .all("mesh_requests_total", &inbound)
                .filter(|c| 0.0 < c.value)
            {
                let label = |name| call.label(name).unwrap_or_default();
                println!(
                    "{}: {} call of {} to {} as {}",
                    agent.host.name(),
                    call.value,
                    label("src"),
                    label("dst"),
                    label("tls")
                );
            }
        }
    }

    fn tcp(&mut self) {
        self.next("An unchanged redis-cli does too: bytes, not HTTP");
        self.call("redis-cli -h cache.shop.mesh.internal set greeting hello");
        let answer = self.call("redis-cli -h cache.shop.mesh.internal get greeting");
        assert!(answer.contains("hello"), "redis did not answer");
    }

    fn balancing(&mut self) {
        self.next("Requests are balanced over two instances");
        println!(
            "{CALLS} calls at once, when some before them have shown how fast each instance is. A call goes to the one with \
             less to do and the shorter answers, so the shares differ from run to run:"
        );
        for _ in 0..ROUNDS_MAX {
            let counts = counted(&self.client.cmd(&many_line()).cgroup("client").ok());
            let least = counts.values().min().copied().unwrap_or_default();
            if counts.len() == 2 && CALLS as usize <= least * 4 {
                break;
            }
        }
        let counts = self.many();
        assert!(counts.len() == 2, "both instances answer");
    }

    fn many(&self) -> BTreeMap<String, usize> {
        let counts = counted(&self.call_quietly(&many_line()));
        for (line, count) in &counts {
            println!("{count:4} × {line}");
        }
        counts
    }

    fn denied(&mut self) {
        self.next("Policy: only shop/client may call namespace shop");
        print!("{POLICY}");
        print!("{}", self.control.apply(POLICY).ok());
        println!(
            "\nA process that is no workload has only its host's identity, which no rule names:"
        );
        let line = "curl -sS -i http://web.shop.mesh.internal/";
        shown(&self.client, line);
        let answer = wait_until("the policy to reach the agents", SOON, || {
            let answer = self.client.ok(line);
            check(answer.contains(" 403 "), answer.clone()).map(|()| answer)
        });
        println!("{answer}");
        assert!(
            answer
                .to_lowercase()
                .contains("x-meshwork-reason: not_allowed"),
            "the refusal says its reason"
        );
        println!("\nThe client is still let in:");
        let answer = self.call("curl -sS http://web.shop.mesh.internal/");
        assert!(answer.contains("hello"), "the client is allowed");
    }

    fn instance_killed(&mut self) {
        self.next("One instance is killed (kill -9 of nginx on vm1)");
        self.web1.signal(nix::sys::signal::Signal::SIGKILL);
        self.control.wait_endpoints("shop/web", 1);
        let counts = self.many();
        let answered: usize = counts.get("hello from vm2").copied().unwrap_or_default();
        assert!(
            answered == CALLS as usize,
            "the other instance answers every call"
        );
        self.meshctl("get services");
    }

    fn control_stopped(&mut self) {
        self.next("Control is stopped; the data path does not notice");
        self.control.stop();
        println!("mesh-control is stopped");
        let counts = self.many();
        let answered: usize = counts.values().sum();
        assert!(answered == CALLS as usize, "every call is answered");
    }

    fn stay(&mut self) {
        self.control.run();
        println!(
            "\nEverything stays up, control too. A shell on a host, as the workload shop/client:"
        );
        let client = &self.client;
        println!(
            "  nsenter --net=/run/netns/{} unshare --mount sh -c 'echo $$ > {}/cgroup.procs; \
             mount --bind {} /etc/resolv.conf; exec sh'",
            client.namespace(),
            client.cgroup("client").display(),
            client.resolv_conf().display()
        );
        println!("The operator's command line:");
        println!(
            "  nsenter --net=/run/netns/{} {} --context {}/admin.yaml get services",
            self.control.host.namespace(),
            crate::binary("meshctl").display(),
            self.control.state_dir().display()
        );
        println!("To end it:\n  cargo xtask demo --end");
    }

    /// Runs a line as the workload `shop/client` and shows both.
    fn call(&self, line: &str) -> String {
        shown(&self.client, line);
        let answer = self.client.cmd(line).cgroup("client").ok();
        print!("{answer}");
        answer
    }

    fn call_quietly(&self, line: &str) -> String {
        shown(&self.client, line);
        self.client.cmd(line).cgroup("client").ok()
    }

    fn meshctl(&self, words: &str) {
        shown(&self.control.host, &format!("meshctl {words}"));
        print!("{}", self.control.meshctl(words).ok());
    }
}

fn many_line() -> String {
    format!(
        "curl -sS -m 10 -Z --parallel-immediate --parallel-max {CALLS} 'http://web.shop.mesh.internal/?[1-{CALLS}]'"
    )
}

/// How often each line was answered.
fn counted(answers: &str) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for line in answers.lines() {
        *counts.entry(line.to_owned()).or_insert(0) += 1;
    }
    counts
}

pub(crate) fn title(step: u32, text: &str) {
    println!("\n=== {step}. {text}");
}

pub(crate) fn shown(host: &Host, line: &str) {
    println!("{}$ {line}", host.name());
}
