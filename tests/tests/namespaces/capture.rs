//! What the kernel side promises the rest of the host: nobody else answers for the mesh, nothing else is touched.

use meshwork_tests::host::Host;
use meshwork_tests::servers;
use meshwork_tests::wait::{SOON, check, wait_until};

use crate::pair::{Pair, mesh_name};
use crate::removal::{lead_by, watch_gateway};

/// A server on every address of `host`, port 80, that must never answer for the mesh.
fn decoy(host: &Host) -> meshwork_tests::process::Process {
    servers::nginx(host, "decoy", 80, "location / { return 200 \"decoy\\n\"; }")
}

/// Connections that the kernel tracks for this host.
fn tracked(host: &Host) -> u32 {
    let count = host.ok("cat /proc/sys/net/netfilter/nf_conntrack_count");
    count.trim().parse().unwrap()
}

#[test]
fn connection_tracking_stays_off() {
    let pair = Pair::new("connection_tracking_stays_off");
    let _web = pair.web("http", "");
    let _redis = servers::redis(&pair.server.host, "cache", 6379);
    pair.declare("cache", 6379, "tcp");
    for _ in 0..20 {
        pair.ok(&format!("curl -sS -m 10 http://{}/", mesh_name("web")));
        pair.ok(&format!("redis-cli -h {} ping", mesh_name("cache")));
        pair.ok(&format!("curl -sS -m 10 http://{}/", pair.server.host.v4()));
    }
    for host in [&pair.server.host, &pair.client.host] {
        assert_eq!(tracked(host), 0, "{}", host.name());
    }
    // It would be seen if it were on.
    let client = &pair.client.host;
    client.ok("nft add table inet other");
    client.ok("nft 'add chain inet other out { type filter hook output priority 0; }'");
    client.ok("nft add rule inet other out ct state new accept");
    pair.ok(&format!("curl -sS -m 10 http://{}/", pair.server.host.v4()));
    assert!(
        0 < tracked(client),
        "this test can not see connection tracking"
    );
}

#[test]
fn the_callers_own_server_never_answers_for_a_virtual_address() {
    let mut pair = Pair::new("the_callers_own_server_never_answers");
    let _web = pair.web("http", "");
    let client = pair.client.host.clone();
    let _decoy = decoy(&client);
    // It stands on every address of the host, or it would prove nothing.
    for own in [format!("{}", client.v4()), format!("[{}]", client.v6())] {
        let text = pair.ok(&format!("curl -sS -m 10 http://{own}/"));
        assert_eq!(text, "decoy\n", "{own}");
    }
    let [v4, v6] = pair.vips("web");
    let urls = [format!("http://{v4}/"), format!("http://[{v6}]/")];
    let gateway = pair.site.host("gateway");
    lead_by(&gateway, &client);
    for url in &urls {
        assert_eq!(
            pair.ok(&format!("curl -sS -m 10 {url}")),
            "hello\n",
            "{url}"
        );
    }
    let never = |when: &str| {
        for url in &urls {
            for cgroup in ["client", "shell"] {
                let command = client.cmd(&format!("curl -sS -m 3 {url}")).cgroup(cgroup);
                let output = command.output();
                assert!(!output.stdout.contains("decoy"), "{when}: {output}");
            }
        }
    };
    never("with the table");
    // Another program's idea of a clean host.
    let flush = client.run("nft flush ruleset");
    assert!(flush.status.success(), "{flush}");
    let tables = client.ok("nft list tables");
    assert!(
        tables.contains("inet meshwork"),
        "a foreign flush took it: {tables}"
    );
    never("after a foreign flush");
    assert_eq!(
        pair.ok(&format!("curl -sS -m 10 {}", urls[0])),
        "hello\n",
        "the table is ours alone"
    );
    pair.client.kill9();
    let tables = client.ok("nft list tables");
    assert!(
        !tables.contains("meshwork"),
        "the table outlived its owner: {tables}"
    );
    never("with the table gone");
    // Neither that server nor anybody else is asked.
    let asks = |url: &str, cgroup: &str| {
        let command = client.cmd(&format!("curl -sS -m 2 {url}")).cgroup(cgroup);
        watch_gateway(&gateway, command)
    };
    for url in &urls {
        for cgroup in ["client", "shell"] {
            assert!(!asks(url, cgroup), "a call to {url} left the host");
        }
    }
    for url in ["http://192.0.2.1/", "http://[2001:db8::1]/"] {
        assert!(asks(url, "client"), "this test sees nothing leave");
    }
    pair.client.start();
    wait_until("calls to be answered again", SOON, || {
        let output = pair.cmd(&format!("curl -sS -m 10 {}", urls[0])).output();
        check(output.stdout == "hello\n", output.to_string())
    });
}

/// Sends a word by UDP, or an echo request, and says what comes of it.
const ASK: &str = r#"
import os, socket
to, six = os.environ["TO"], ":" in os.environ["TO"]
family = socket.AF_INET6 if six else socket.AF_INET
if os.environ["BY"] == "udp":
    s, word = socket.socket(family, socket.SOCK_DGRAM), b"word"
    is_answer = lambda got: got == word
else:
    protocol = socket.IPPROTO_ICMPV6 if six else socket.IPPROTO_ICMP
    s = socket.socket(family, socket.SOCK_RAW, protocol)
    word = bytes([128, 0, 0, 0, 0, 1, 0, 1] if six else [8, 0, 0xf7, 0xfd, 0, 1, 0, 1])
    # With the IP header in IPv4.
    is_answer = lambda got: (got[0] == 129) if six else (got[20] == 0)
s.settimeout(10)
try:
    s.connect((to, 5353))
    s.send(word)
    while not is_answer(s.recv(4096)): pass
    print("answered")
except TimeoutError: print("silence")
except OSError as e: print("refused at once:", e)
"#;

const UDP_DECOY: &str = r#"
import select, socket
servers = []
for family, to in (socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::"):
    s = socket.socket(family, socket.SOCK_DGRAM)
    if family == socket.AF_INET6: s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    s.bind((to, 5353))
    servers.append(s)
print("bound", flush=True)
while True:
    for s in select.select(servers, [], [])[0]: s.sendto(*s.recvfrom(100))
"#;

#[test]
fn what_the_mesh_does_not_carry_is_refused_at_once() {
    let pair = Pair::new("what_the_mesh_does_not_carry");
    let _web = pair.web("http", "");
    let client = &pair.client.host;
    let _decoy = decoy(client);
    let udp = client.python("decoy", UDP_DECOY).spawn("udp-decoy");
    wait_until("the decoy", SOON, || {
        check(udp.log().contains("bound"), udp.log())
    });
    let ask = |by: &str, to: &str| {
        let script = client.python("ask", ASK).cgroup("client");
        script.env("BY", by).env("TO", to).ok()
    };
    let vips = pair.vips("web");
    let own = [client.v4().to_string(), client.v6().to_string()];
    for by in ["udp", "icmp"] {
        for (vip, own) in vips.iter().zip(&own) {
            assert_eq!(ask(by, own), "answered\n", "{by} to {own}");
            let answer = ask(by, vip);
            assert!(answer.starts_with("refused at once"), "{by}: {answer}");
        }
    }
    let [vip, _] = vips;
    // A port that the service does not declare.
    let before = pair.client.refused("no_such_port");
    let output = pair
        .cmd(&format!("curl -sS -m 10 http://{vip}:81/"))
        .output();
    assert!(![0, 28].contains(&output.code()), "{output}");
    pair.client.wait_refused("no_such_port", before);
    // An address of the range that is nobody's.
    let before = pair.client.refused("no_such_service");
    let nobody = "252.79.255.250";
    let output = pair
        .cmd(&format!("curl -sS -m 10 -i http://{nobody}/"))
        .output();
    assert!(!output.stdout.contains("decoy"), "{output}");
    assert_ne!(output.code(), 28, "{output}");
    pair.client.wait_refused("no_such_service", before);
}

/// A listener that is dialled by its own address would not know whom for. No switch makes one guess; that they are the listeners
/// that carry calls is seen at a call by name before.
#[test]
fn a_listener_that_is_dialled_directly_refuses() {
    let pair = Pair::new("a_listener_that_is_dialled_directly");
    let _web = pair.web("http", "");
    let call = format!("curl -sS -m 10 http://{}/", mesh_name("web"));
    assert_eq!(
        pair.ok(&call),
        "hello\n",
        "the same listeners are reached by capture"
    );
    let client = &pair.client.host;
    let pids: Vec<String> = pair
        .client
        .pids()
        .iter()
        .map(|pid| format!("pid={pid},"))
        .collect();
    let sockets = client.ok("ss -Hltnp");
    let listeners: Vec<&str> = sockets
        .lines()
        .filter(|line| pids.iter().any(|pid| line.contains(pid.as_str())))
        .filter_map(|line| line.split_whitespace().nth(3))
        .filter(|at| at.starts_with("127.0.0.1:") || at.starts_with("[::1]:"))
        .collect();
    for family in ["127.0.0.1:", "[::1]:"] {
        assert!(
            listeners.iter().any(|at| at.starts_with(family)),
            "the agent has no listener on {family} {sockets}"
        );
    }
    for at in listeners {
        let before = pair.client.refused("not_captured");
        let output = pair
            .cmd(&format!("curl -sS -m 10 -i http://{at}/"))
            .output();
        assert!(!output.stdout.contains("hello"), "{output}");
        pair.client.wait_refused("not_captured", before);
    }
}

#[test]
fn other_names_are_resolved_as_before() {
    let mut pair = Pair::new("other_names_are_resolved_as_before");
    const SERVER: &str = "\
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.bind(('10.77.0.1', 53))
while True:
    q, peer = s.recvfrom(512)
    end = q.index(b'\\0', 12) + 5
    if q[end-4:end-2] == b'\\0\\1':
        a = q[:2] + b'\\x85\\x80\\0\\1\\0\\1\\0\\0\\0\\0' + q[12:end] + b'\\xc0\\x0c\\0\\1\\0\\1\\0\\0\\0\\5\\0\\4\\xc0\\0\\2\\x07'
    else:
        a = q[:2] + b'\\x85\\x80\\0\\1\\0\\0\\0\\0\\0\\0' + q[12:end]
    s.sendto(a, peer)
";
    // The server that stood in every resolv.conf of the site.
    let dns = pair.site.host("dns");
    dns.ok("ip address add 10.77.0.1/24 dev eth0");
    let dns_process = dns.python("dns", SERVER).spawn("dns");
    let _web = pair.web("http", "");
    let foreign = |pair: &Pair, when: &str| {
        wait_until(&format!("a foreign name {when}"), SOON, || {
            let output = pair.cmd("getent ahostsv4 www.example.com").output();
            check(output.stdout.contains("192.0.2.7"), output.to_string())
        });
    };
    foreign(&pair, "while the agent runs");
    let unknown = pair
        .cmd("getent ahostsv4 nothing.shop.mesh.internal")
        .output();
    assert!(
        !unknown.status.success(),
        "a mesh name that is none was asked elsewhere: {unknown}"
    );
    pair.client.kill9();
    foreign(&pair, "when the agent has crashed");
    pair.client.start();
    foreign(&pair, "when it is back");
    pair.client.stop();
    foreign(&pair, "when it was stopped");
    drop(dns_process);
    let nobody = pair.cmd("getent ahostsv4 www.example.com").output();
    assert!(!nobody.status.success(), "somebody else answers: {nobody}");
}
