//! Leaving a host leaves it as it was.

use std::collections::BTreeSet;

use meshwork_tests::agent::Agent;
use meshwork_tests::control::{Control, TokenOptions};
use meshwork_tests::facts;
use meshwork_tests::host::Host;
use meshwork_tests::process::Cmd;
use meshwork_tests::servers;
use meshwork_tests::site::Site;
use meshwork_tests::wait::{SOON, check, wait_until};

use crate::pair::{mesh_name, owner};

/// A host with files of its own whose addresses are settled.
fn settled(site: &Site) -> Host {
    let host = site.host("vm1");
    host.own_etc_and_run();
    wait_until("addresses to be settled", SOON, || {
        let text = host.ok("ip -o address");
        check(text.contains("fe80:") && !text.contains("tentative"), text)
    });
    host
}

/// All that the kernel and the host's files say, one fact a line.
fn facts(host: &Host) -> BTreeSet<String> {
    let files = [
        "cat /etc/resolv.conf",
        "find /etc /run -xdev -printf '%p %y %m %U:%G %l\\n'",
        "find /etc /run -xdev -type f -exec sha256sum {} +",
        // Other programs of the machine write here too; ours would write under its name.
        "find /usr /opt /var /root -xdev -name target -prune -o \\( -iname '*mesh-agent*' -o -iname '*meshwork*' \\) -print",
    ];
    facts::of(facts::KERNEL.iter().chain(&files), |line| {
        host.run(line).stdout
    })
}

/// Whether a command that must fail sends a SYN to port 80 by way of `gateway`, in either family.
#[track_caller]
pub(crate) fn watch_gateway(gateway: &Host, command: Cmd) -> bool {
    gateway.ok(
        "nft 'add table inet watch; add chain inet watch in { type filter hook prerouting priority -400; }; \
         add rule inet watch in tcp dport 80 counter'",
    );
    let output = command.output();
    assert!(!output.status.success(), "{output}");
    let seen = gateway.ok("nft list table inet watch");
    gateway.ok("nft delete table inet watch");
    !seen.contains("packets 0 ")
}

/// Gives a host a way to all other addresses.
pub(crate) fn lead_by(gateway: &Host, host: &Host) {
    let (v4, v6) = (gateway.v4(), gateway.v6());
    host.ok(&format!(
        "ip route add default via {v4} && ip -6 route add default via {v6}"
    ));
}

#[test]
fn leaving_removes_every_trace() {
    let site = Site::new("leaving_removes_every_trace");
    let control = Control::start(&site);
    let host = settled(&site);
    let before = facts(&host);
    // A file that is left would be seen.
    host.ok("touch /etc/left /run/left");
    assert_ne!(facts(&host), before);
    host.ok("rm /etc/left /run/left");
    let mut agent = control.join(&host, &TokenOptions::default());
    agent.serve("web", &owner("web"), &[(80, "http")]);
    let web = servers::nginx(&host, "web", 80, "location / { return 200 \"hello\\n\"; }");
    control.wait_endpoints("shop/web", 1);
    assert!(
        host.ok(&format!("curl -sS -m 10 http://{}/", mesh_name("web")))
            .contains("hello")
    );
    assert_ne!(
        facts(&host),
        before,
        "an agent that changes nothing captures nothing"
    );
    agent.stop();
    // Also where there is a way to all other addresses.
    let gateway = control.host.v4();
    host.ok(&format!("ip route add default via {gateway}"));
    let way = |to: &str| host.ok(&format!("ip route get {to}"));
    let other = way("192.0.2.1");
    assert!(other.contains(&gateway.to_string()), "{other}");
    let fail_closed = way("252.64.0.2");
    assert!(
        fail_closed.contains("mesh0"),
        "a stopped agent opens the range: {fail_closed}"
    );
    let call = "curl -sS -m 5 http://252.64.0.2/";
    let gone = watch_gateway(&control.host, host.cmd(call));
    assert!(!gone, "a call to the range left the host");
    let call = "curl -sS -m 1 http://192.0.2.1/";
    let gone = watch_gateway(&control.host, host.cmd(call));
    assert!(gone, "this test sees nothing leave");
    host.ok(&format!("ip route delete default via {gateway}"));
    let leave = agent.command("leave");
    leave.ok();
    drop(web);
    let after = facts(&host);
    let state = host.dir();
    let state = state.display();
    let state = host.run(&format!("find {state}/state {state}/run -mindepth 1"));
    assert_eq!(state.stdout, "", "of the agent's own directories");
    facts::assert_same(&before, &after);
    assert!(control.get("hosts").is_empty(), "control still knows it");
}

#[test]
fn a_killed_agent_is_cleaned_up_by_leaving() {
    let site = Site::new("a_killed_agent_is_cleaned_up");
    let control = Control::start(&site);
    let host = settled(&site);
    let before = facts(&host);
    let mut agent: Agent = control.join(&host, &TokenOptions::default());
    agent.kill9();
    agent.command("leave").ok();
    let after = facts(&host);
    let state = host.dir();
    let state = state.display();
    let state = host.run(&format!("find {state}/state {state}/run -mindepth 1"));
    assert_eq!(state.stdout, "", "of the agent's own directories");
    facts::assert_same(&before, &after);
}
