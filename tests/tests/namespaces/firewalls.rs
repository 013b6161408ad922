//! Other programs that write the kernel's tables, rules and routes. What they take away of ours comes back and is told;
//! nothing of theirs is touched, and SSH is never cut.

use std::time::Duration;

use meshwork_tests::host::Host;
use meshwork_tests::process::Process;
use meshwork_tests::servers;
use meshwork_tests::wait::{SOON, check, wait_until};

use crate::pair::{Pair, mesh_name};
use crate::removal::{lead_by, watch_gateway};

/// These tools are slow to start.
const TOOL_MAX: Duration = Duration::from_secs(120);

/// A mesh whose service `shop/web` is strict, with a server at port 22 beside it.
struct Strict {
    pair: Pair,
    stranger: Host,
    _servers: [Process; 2],
}

impl Strict {
    #[track_caller]
    fn new(name: &str) -> Self {
        let pair = Pair::new(name);
        let host = &pair.server.host;
        let ssh = servers::nginx(host, "ssh", 22, "location / { return 200 \"ssh\\n\"; }");
        let web = pair.web("http", "");
        let yaml = "apiVersion: v1\nkind: Service\nmetadata: {name: web, namespace: shop, annotations: \
                    {meshwork.io/transport: strict}}\nspec: {ports: [{port: 80, appProtocol: http}]}\n";
        pair.control.apply(yaml).ok();
        let strict = Self {
            stranger: pair.site.host("stranger"),
            pair,
            _servers: [ssh, web],
        };
        strict.wait_plaintext_refused();
        strict
    }

    fn plaintext(&self, port: u16) -> String {
        let server = self.pair.server.host.v4();
        let line = format!("curl -sS --http0.9 -m 5 http://{server}:{port}/ 2>&1; echo $?");
        self.stranger.run(&line).stdout
    }

    #[track_caller]
    fn wait_plaintext_refused(&self) {
        wait_until("plaintext to be refused", SOON, || {
            let got = self.plaintext(80);
            check(got.ends_with("7\n"), got)
        });
    }

    /// All that was promised holds.
    #[track_caller]
    fn holds(&self, when: &str) {
        let url = format!("http://{}/", mesh_name("web"));
        wait_until(&format!("a call {when}"), SOON, || {
            let output = self.pair.cmd(&format!("curl -sS -m 10 {url}")).output();
            check(output.stdout == "hello\n", output.to_string())
        });
        self.wait_plaintext_refused();
        // What curl makes of port 22 is its own business; the connection stands.
        let script = "import os, socket; socket.create_connection((os.environ['TO'], 22), 5)";
        let ssh = self.stranger.python("ssh", script);
        ssh.env("TO", &self.pair.server.host.v4().to_string()).ok();
        wait_until(&format!("both tables {when}"), SOON, || {
            let tables = self.pair.server.host.ok("nft list tables");
            let both = tables.contains("inet meshwork\n") && tables.contains("inet meshwork_guard");
            check(both, tables)
        });
    }
}

impl Strict {
    /// Plaintext callers that the door has counted, from the stranger's address of one family.
    fn counted(&self, v6: bool) -> f64 {
        let stranger = &self.stranger;
        let source = if v6 {
            stranger.v6().to_string()
        } else {
            stranger.v4().to_string()
        };
        let metrics = self.pair.server.metrics();
        metrics.sum("mesh_plaintext_callers_total", &[("src", &source)])
    }

    /// One call over IPv6 that the door refuses, until it is counted: so is then all that came before.
    #[track_caller]
    fn settle(&self) {
        let before = self.counted(true);
        let line = format!("curl -sS -m 5 http://[{}]/", self.pair.server.host.v6());
        let output = self.stranger.run(&line);
        assert_eq!(output.code(), 7, "{output}");
        wait_until("the door to count", SOON, || {
            let now = self.counted(true);
            check(before < now, format!("{now}"))
        });
    }

    /// What the firewall does not let in does not reach the door.
    #[track_caller]
    fn closed_is_not_counted(&self, close: impl FnOnce(), open: impl FnOnce()) {
        self.settle();
        let before = self.counted(false);
        close();
        let got = self.plaintext(80);
        assert!(!got.ends_with("\n0\n"), "{got}");
        open();
        self.settle();
        assert_eq!(self.counted(false), before, "it reached the door");
        assert!(self.plaintext(80).ends_with("7\n"));
        self.settle();
        assert!(before < self.counted(false), "this test sees no caller");
    }
}

#[test]
fn what_others_take_away_is_put_back() {
    let strict = Strict::new("what_others_take_away");
    let agent = &strict.pair.client;
    let host = &agent.host;
    let url = format!("http://{}/", mesh_name("web"));
    let repairs = || agent.metrics().sum("mesh_capture_repairs", &[]);
    for (take, named) in [
        (
            "ip rule delete priority 744 && ip -6 rule delete priority 744",
            "policy rule by mark",
        ),
        ("ip rule delete priority 745", "policy rule for answers"),
        ("ip route flush table 7441", "local route"),
        ("ip link set mesh0 down", "route of"),
        ("ip link delete mesh0", "link `mesh0`"),
        ("nft flush ruleset", "meshwork_guard"),
    ] {
        let before = repairs();
        host.ok(take);
        wait_until(&format!("the repair after `{take}`"), SOON, || {
            check(before < repairs(), agent.log())
        });
        let log = agent.log();
        let line = log
            .lines()
            .rev()
            .find(|l| l.contains("took away"))
            .unwrap_or_default();
        assert!(line.contains(named), "{take}: {line}");
        wait_until(&format!("a call after `{take}`"), SOON, || {
            let output = strict.pair.cmd(&format!("curl -sS -m 5 {url}")).output();
            check(output.stdout == "hello\n", output.to_string())
        });
    }
    strict.holds("at the end");
}

const RULES: &str = "ip rule delete priority 744 && ip -6 rule delete priority 744";
const LINK: &str = "ip link delete mesh0";

/// Until it is put back a call fails: it goes neither to a server of its own host nor by the default route. So it is while
/// the agent's table stands, and without that while `mesh0` does.
#[test]
fn what_is_not_put_back_yet_is_closed() {
    let mut pair = Pair::new("what_is_not_put_back_yet");
    let _web = pair.web("http", "");
    let host = pair.client.host.clone();
    let decoy = "location / { return 200 \"decoy\\n\"; }";
    let _decoy = servers::nginx(&host, "decoy", 80, decoy);
    let gateway = pair.site.host("gateway");
    lead_by(&gateway, &host);
    let [v4, v6] = pair.vips("web");
    let urls = [format!("http://{v4}/"), format!("http://[{v6}]/")];
    let by_mesh = |pair: &Pair| {
        for url in &urls {
            wait_until(&format!("an answer of {url}"), SOON, || {
                let output = pair.cmd(&format!("curl -sS -m 5 {url}")).output();
                check(output.stdout == "hello\n", output.to_string())
            });
        }
    };
    // All of them fail, or this fails.
    let leave = |pair: &Pair| {
        urls.each_ref().map(|url| {
            let call = pair.cmd(&format!("curl -sS -m 2 {url}"));
            watch_gateway(&gateway, call)
        })
    };
    by_mesh(&pair);
    let both = format!("{RULES} && {LINK}");
    let (routes, down) = ("ip route flush table 7441", "ip link set mesh0 down");
    for take in [RULES, routes, down, LINK, &both] {
        // Nobody repairs.
        let pids: Vec<String> = pair.client.pids().iter().map(u32::to_string).collect();
        let pids = pids.join(" ");
        host.ok(&format!("kill -STOP {pids}"));
        host.ok(take);
        assert_eq!(leave(&pair), [false; 2], "{take}: a call left the host");
        host.ok(&format!("kill -CONT {pids}"));
        by_mesh(&pair);
    }
    pair.client.kill9();
    host.ok(RULES);
    assert_eq!(leave(&pair), [false; 2], "a call left the host");
    // That link is what holds them then.
    host.ok(LINK);
    assert_eq!(leave(&pair), [true; 2], "this test sees nothing leave");
    pair.client.command("guard").ok();
    assert_eq!(leave(&pair), [false; 2], "a call left the host");
    pair.client.start();
    by_mesh(&pair);
}

#[test]
fn ufw_and_the_mesh_leave_each_other_alone() {
    let strict = Strict::new("ufw_and_the_mesh");
    let host = &strict.pair.server.host;
    host.own_etc_and_run();
    let ufw = |words: &str| {
        host.cmd(&format!("ufw {words}")).deadline(TOOL_MAX).ok();
    };
    for port in [22, 80, 7441] {
        ufw(&format!("allow {port}/tcp"));
    }
    ufw("--force enable");
    strict.holds("with ufw");
    strict.closed_is_not_counted(|| ufw("delete allow 80/tcp"), || ufw("allow 80/tcp"));
    ufw("reload");
    strict.holds("after its reload");
    // It does its own work: what it does not allow is dropped, here as before.
    ufw("delete allow 22/tcp");
    let script = "import os, socket\ntry: socket.create_connection((os.environ['TO'], 22), 2)\n\
                  except OSError as e: print('dropped', e)\n";
    let cut = strict.stranger.python("cut", script);
    let cut = cut.env("TO", &host.v4().to_string()).ok();
    assert!(cut.contains("dropped"), "ufw does nothing here: {cut}");
    ufw("allow 22/tcp");
    ufw("--force disable");
    strict.holds("without ufw");
}

#[test]
fn firewalld_and_the_mesh_leave_each_other_alone() {
    let strict = Strict::new("firewalld_and_the_mesh");
    let host = &strict.pair.server.host;
    host.own_etc_and_run();
    let bus = host.dir().join("bus");
    let address = format!("unix:path={}", bus.display());
    let daemon = format!("dbus-daemon --session --nofork --nopidfile --address={address}");
    let _bus = host.cmd(&daemon).spawn("bus");
    wait_until("the bus", SOON, || check(bus.exists(), "no socket"));
    let with_bus = |line: &str| host.cmd(line).env("DBUS_SYSTEM_BUS_ADDRESS", &address);
    for port in ["22/tcp", "80/tcp", "7441/tcp"] {
        host.cmd(&format!("firewall-offline-cmd --add-port={port}"))
            .deadline(TOOL_MAX)
            .ok();
    }
    let firewalld = with_bus("exec firewalld --nofork --nopid").spawn("firewalld");
    let running = || {
        wait_until("firewalld's table", TOOL_MAX, || {
            let tables = host.ok("nft list tables");
            check(tables.contains("inet firewalld"), firewalld.log() + &tables)
        });
    };
    running();
    // Its table stands before it serves: a reload asked for then would hang it.
    wait_until("firewalld to serve", TOOL_MAX, || {
        let state = with_bus("firewall-cmd --state").deadline(TOOL_MAX).output();
        check(state.stdout == "running\n", state.to_string())
    });
    strict.holds("with firewalld");
    let change = |words: &str| {
        with_bus(&format!("firewall-cmd {words}"))
            .deadline(TOOL_MAX)
            .ok();
    };
    strict.closed_is_not_counted(
        || change("--remove-port=80/tcp"),
        || change("--add-port=80/tcp"),
    );
    // A reload takes its table away and makes it anew.
    let handle = || host.ok("nft -a list table inet firewalld | head -1");
    let before = handle();
    with_bus("firewall-cmd --reload").deadline(TOOL_MAX).ok();
    assert_ne!(handle(), before, "it did not reload");
    strict.holds("after its reload");
}
