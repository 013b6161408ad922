//! The input door: plaintext callers of a program's own port are seen, judged and, where that is said, refused.

use meshwork_tests::host::Host;
use meshwork_tests::wait::{SOON, check, wait_until};

use crate::pair::{Pair, mesh_name};

/// A service of the operator's making: its transport is.
pub(crate) fn service(annotations: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: web, namespace: shop, annotations: {{{annotations}}}}}\n\
         spec: {{ports: [{{port: 80, appProtocol: http}}]}}\n"
    )
}

pub(crate) const STRICT: &str = "meshwork.io/transport: strict";

/// The policy of the mesh, narrowed to callers of the mesh and, in plaintext, to `cidr`.
fn narrowed(enforce: &str, cidr: &str) -> String {
    format!(
        "apiVersion: meshwork.io/v1alpha1\nkind: Policy\nmetadata: {{name: web, namespace: shop}}\n\
         spec:\n  service: web\n  enforce: {enforce}\n  rules:\n  - name: all\n    from: [{{namespace: '*'}}, \
         {{host: '*'}}, {{cidr: '{cidr}'}}]\n"
    )
}

/// What a plaintext call from `from` gets: curl's exit code and the answer. 7 is a refused connection.
pub(crate) fn plaintext(server: &Host, from: &Host, v6: bool) -> String {
    let url = if v6 {
        format!("http://[{}]/", server.v6())
    } else {
        format!("http://{}/", server.v4())
    };
    let output = from.run(&format!("curl -sS -m 5 {url}; echo $?"));
    output.stdout
}

#[track_caller]
pub(crate) fn wait_plaintext(pair: &Pair, from: &Host, expected: &str) {
    for v6 in [false, true] {
        wait_until(&format!("plaintext to get {expected:?}"), SOON, || {
            let got = plaintext(&pair.server.host, from, v6);
            check(got == expected, got)
        });
    }
}

pub(crate) const PASSES: &str = "hello\n0\n";
pub(crate) const REFUSED: &str = "7\n";

/// Waits until the server has counted plaintext callers of this verdict from `source`.
#[track_caller]
fn wait_counted(pair: &Pair, source: &str, verdict: &str) {
    let labels = [
        ("src", source),
        ("dst", "shop/web"),
        ("port", "80"),
        ("verdict", verdict),
    ];
    wait_until(&format!("a {verdict} caller to be counted"), SOON, || {
        let metrics = pair.server.metrics();
        let count = metrics.sum("mesh_plaintext_callers_total", &labels);
        check(0.0 < count, format!("{count}"))
    });
}

#[test]
fn strict_refuses_plaintext_but_for_its_exceptions_and_mesh_calls_go_on() {
    let pair = Pair::new("strict_refuses_plaintext");
    let _web = pair.web("http", "");
    let stranger = pair.site.host("stranger");
    // Permissive: the same calls pass, and are seen.
    wait_plaintext(&pair, &stranger, PASSES);
    let (v4, v6) = (stranger.v4().to_string(), stranger.v6().to_string());
    wait_counted(&pair, &v4, "passed");
    wait_counted(&pair, &v6, "passed");
    let before = pair.server.refused("plaintext_refused");
    pair.control.apply(&service(STRICT)).ok();
    wait_plaintext(&pair, &stranger, REFUSED);
    wait_counted(&pair, &v4, "refused");
    wait_counted(&pair, &v6, "refused");
    pair.server.wait_refused("plaintext_refused", before);
    assert!(pair.server.log().contains("a plaintext caller is refused"));
    let url = format!("http://{}/", mesh_name("web"));
    assert_eq!(pair.ok(&format!("curl -sS -m 10 {url}")), "hello\n");
    // The host's own programs are not policed, nor is anything else on the host.
    let own = format!("curl -sS -m 5 http://{}/", pair.server.host.v4());
    assert_eq!(pair.server.host.ok(&own), "hello\n");
    let excepted = format!("{STRICT}, meshwork.io/plaintext-from: '{v4}/32, {v6}/128'");
    pair.control.apply(&service(&excepted)).ok();
    wait_plaintext(&pair, &stranger, PASSES);
    assert!(plaintext(&pair.server.host, &pair.client.host, false).contains(REFUSED));
    for host in [&pair.server.host, &pair.client.host] {
        let tracked = host.ok("cat /proc/sys/net/netfilter/nf_conntrack_count");
        assert_eq!(tracked.trim(), "0", "the door tracks connections");
    }
}

#[test]
fn policy_by_address_decides_about_plaintext_and_audit_only_counts() {
    let mut pair = Pair::new("policy_by_address_decides");
    let _web = pair.web("http", "");
    let stranger = pair.site.host("stranger");
    let source = stranger.v4().to_string();
    wait_plaintext(&pair, &stranger, PASSES);
    pair.control.apply(&narrowed("audit", "192.0.2.0/24")).ok();
    // Both verdicts look alike from outside.
    wait_until("the caller to be audited", SOON, || {
        let got = plaintext(&pair.server.host, &stranger, false);
        assert_eq!(got, PASSES);
        let labels = [("src", source.as_str()), ("verdict", "audited")];
        let count = pair
            .server
            .metrics()
            .sum("mesh_plaintext_callers_total", &labels);
        check(0.0 < count, format!("{count}"))
    });
    assert!(
        pair.server.log().contains("would be refused"),
        "{}",
        pair.server.log()
    );
    let before = pair.server.refused("not_allowed");
    pair.control.apply(&narrowed("on", "192.0.2.0/24")).ok();
    wait_plaintext(&pair, &stranger, REFUSED);
    pair.server.wait_refused("not_allowed", before);
    pair.control
        .apply(&narrowed("on", &format!("{source}/32")))
        .ok();
    wait_until("the allowed address to pass", SOON, || {
        let got = plaintext(&pair.server.host, &stranger, false);
        check(got == PASSES, got)
    });
    assert_eq!(plaintext(&pair.server.host, &stranger, true), REFUSED);
    let url = format!("http://{}/", mesh_name("web"));
    assert_eq!(pair.ok(&format!("curl -sS -m 10 {url}")), "hello\n");
    // Policy is the agent's: what must hold without it is `strict`.
    pair.server.kill9();
    assert_eq!(plaintext(&pair.server.host, &stranger, true), PASSES);
}

/// What must be mTLS stays so, whatever dies, in whatever order.
#[test]
fn strict_outlives_the_agent_its_table_and_control() {
    let mut pair = Pair::new("strict_outlives_the_agent");
    let _web = pair.web("http", "");
    let stranger = pair.site.host("stranger");
    wait_plaintext(&pair, &stranger, PASSES);
    pair.control.apply(&service(STRICT)).ok();
    wait_plaintext(&pair, &stranger, REFUSED);
    let server = pair.server.host.clone();
    wait_until("the guard to know it", SOON, || {
        let table = server.ok("nft list tables");
        check(
            server
                .ok("nft list table inet meshwork_guard")
                .contains("80"),
            table,
        )
    });
    let refused = |when: &str| {
        for v6 in [false, true] {
            assert_eq!(plaintext(&server, &stranger, v6), REFUSED, "{when}");
        }
    };
    // A foreign flush takes the guard, which comes back; the door stands meanwhile.
    server.ok("nft flush ruleset");
    refused("after a foreign flush");
    wait_until("the guard to be put back", SOON, || {
        let tables = server.ok("nft list tables");
        check(tables.contains("inet meshwork_guard"), tables)
    });
    wait_until("the repair to be counted", SOON, || {
        let count = pair.server.metrics().sum("mesh_capture_repairs", &[]);
        check(0.0 < count, format!("{count}"))
    });
    pair.server.kill_worker_now();
    refused("while the worker is replaced");
    pair.server.wait_ready();
    refused("with a new worker");
    pair.control.kill9();
    pair.server.kill9();
    let tables = server.ok("nft list tables");
    assert!(
        !tables.contains("inet meshwork\n"),
        "the table outlived its owner: {tables}"
    );
    refused("without an agent");
    pair.server.start();
    refused("with a new agent, without control");
    wait_until("the door to stand as before", SOON, || {
        let table = server.ok("nft list set inet meshwork door_ports");
        check(table.contains("80"), table)
    });
    assert!(
        server
            .ok("nft list set inet meshwork armed")
            .contains("tcp"),
        "it needs no second trial"
    );
    refused("with its door, without control");
    // As after a boot: nothing stands, and the agent has not started.
    pair.server.kill9();
    server.ok("nft flush ruleset");
    server.ok("ip link delete mesh0");
    assert_eq!(
        plaintext(&server, &stranger, false),
        PASSES,
        "this test sees no guard"
    );
    pair.server.command("guard").ok();
    refused("at boot, before the agent");
    let link = server.ok("ip -o link show mesh0");
    assert!(link.contains("mesh0"), "{link}");
}

/// Takes it and gives it back.
pub(crate) const NO_NEW_WAY_TO_CONTROL: [&str; 3] = [
    "nft 'add table inet cut; add chain inet cut out { type filter hook output priority 0; }; \
     add rule inet cut out tcp dport 7440 tcp flags & (syn | ack) == syn drop'",
    "nft delete table inet cut",
    "control was not reached",
];

/// A door that cut the host off from control must open by itself: here no new connection leaves for control.
#[test]
fn a_new_door_disarms_when_control_is_not_reached_and_arms_when_it_is() {
    let pair = Pair::new("a_new_door_disarms");
    let stranger = pair.site.host("stranger");
    disarms(&pair, &stranger, &pair.server.host, NO_NEW_WAY_TO_CONTROL);
}

/// The same where the route to control is gone, as when a gateway is.
#[test]
fn a_new_door_disarms_when_the_way_to_control_is_gone() {
    let pair = Pair::new("a_new_door_disarms_without_a_route");
    let control = pair.control.host.v4();
    // What comes from control still arrives, so that the change does.
    let cut = format!(
        "sysctl -qw net.ipv4.conf.all.rp_filter=0 net.ipv4.conf.eth0.rp_filter=0 && ip route add unreachable {control}/32"
    );
    let mend = format!("ip route delete unreachable {control}/32");
    let stranger = pair.site.host("stranger");
    disarms(
        &pair,
        &stranger,
        &pair.server.host,
        [&cut, &mend, "control was not reached"],
    );
}

/// The same behind a default gateway that goes: all that the host has of the network but two neighbours.
#[test]
fn a_new_door_disarms_when_the_default_gateway_is_gone() {
    let pair = Pair::new("a_new_door_disarms_without_a_gateway");
    let gateway = pair.site.host("gateway");
    gateway.ok("sysctl -qw net.ipv4.ip_forward=1 net.ipv4.conf.all.send_redirects=0 net.ipv4.conf.eth0.send_redirects=0");
    let server = &pair.server.host;
    let stranger = pair.site.host("stranger");
    let near = [gateway.v4(), stranger.v4()]
        .map(|near| format!("ip route add {near}/32 dev eth0 src {}", server.v4()));
    let network = server.ok("ip -4 route show dev eth0 scope link | cut -d' ' -f1");
    server.ok(&format!(
        "{} && {} && ip route add default via {} src {} && ip route delete {} dev eth0",
        near[0],
        near[1],
        gateway.v4(),
        server.v4(),
        network.trim()
    ));
    let way = server.ok(&format!("ip route get {}", pair.control.host.v4()));
    assert!(way.contains(&format!("via {}", gateway.v4())), "{way}");
    disarms(
        &pair,
        &stranger,
        &gateway,
        [
            "ip link set eth0 down",
            "ip link set eth0 up",
            "control was not reached",
        ],
    );
}

/// And where control is reached all the while: the gateway answers before the change, and not after it.
#[test]
fn a_new_door_disarms_when_only_the_default_gateway_is_silent() {
    let pair = Pair::new("a_new_door_disarms_with_a_silent_gateway");
    let gateway = pair.site.host("gateway");
    let server = &pair.server.host;
    let stranger = pair.site.host("stranger");
    let address = gateway.v4();
    // Another one that is remembered, and has been dead for long, is not waited for.
    let dead = pair.site.host("dead");
    for known in [address, dead.v4()] {
        server.run(&format!("curl -sm 5 http://{known}:9/"));
        let neighbour = server.ok(&format!("ip neighbour show {known}"));
        assert!(neighbour.contains("REACHABLE"), "{neighbour}");
    }
    server.ok(&format!("ip route add default via {address}"));
    let other = dead.v4();
    server.ok(&format!("ip route add default via {other} metric 9"));
    dead.ok("ip link set eth0 down");
    let cut = format!(
        "nft 'add table arp cut; add chain arp cut in {{ type filter hook input priority 0; }}; \
         add rule arp cut in arp operation reply arp saddr ip {address} limit rate over 1/day burst 1 packets drop'"
    );
    let said = format!("the default gateway {address} has not answered");
    let how = [&cut[..], "nft delete table arp cut", &said];
    disarms(&pair, &stranger, server, how);
}

#[track_caller]
fn disarms(pair: &Pair, stranger: &Host, at: &Host, how: [&str; 3]) {
    disarms_telling(pair, stranger, at, how, &mut |_| ());
}

/// The same, with a look at the host after each change of the door. What cuts the host off, what mends that, and what its `check`
/// says between the two.
#[track_caller]
pub(crate) fn disarms_telling(
    pair: &Pair,
    stranger: &Host,
    at: &Host,
    [cut, mend, said]: [&str; 3],
    look: &mut dyn FnMut(&str),
) {
    let _web = pair.web("http", "");
    wait_plaintext(pair, stranger, PASSES);
    let server = &pair.server.host;
    let armed = || server.ok("nft list set inet meshwork armed");
    wait_until("the first door to be armed for good", SOON, || {
        let set = armed();
        check(set.contains("tcp") && !set.contains("expires"), set)
    });
    // The session that stands brings the change.
    at.ok(cut);
    pair.control.apply(&service(STRICT)).ok();
    wait_plaintext(pair, stranger, REFUSED);
    let set = armed();
    assert!(set.contains("expires"), "it is on trial: {set}");
    look("while a new door is on trial");
    wait_plaintext(pair, stranger, PASSES);
    look("when the door has disarmed");
    wait_until("that to be told", SOON, || {
        let told = pair.server.metrics().sum("mesh_door_disarmed", &[]);
        let found = pair.server.command("check").stdout;
        check(
            told == 1.0 && found.contains(said),
            pair.server.log() + &found,
        )
    });
    at.ok(mend);
    wait_plaintext(pair, stranger, REFUSED);
    let set = armed();
    assert!(!set.contains("expires"), "{set}");
    look("when the door is armed for good");
}
