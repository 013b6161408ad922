//! What the kernel side promises the rest of the host: nobody else answers for the mesh, nothing else is touched.

use meshwork_tests::host::Host;
use meshwork_tests::servers;
use meshwork_tests::wait::{SOON, check, wait_until};

use crate::pair::{Pair, mesh_name};

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
    pair.client.start();
    wait_until("calls to be answered again", SOON, || {
        let output = pair.cmd(&format!("curl -sS -m 10 {}", urls[0])).output();
        check(output.stdout == "hello\n", output.to_string())
    });
}

#[test]
fn what_the_mesh_does_not_carry_is_refused_at_once() {
    const UDP: &str = "\
import socket, time
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.settimeout(5)
s.connect((sys.argv[1], 5353))
start = time.monotonic()
try:
    s.send(b'x'); s.recv(1); print('answered')
except ConnectionRefusedError: print('refused')
except OSError as e: print('error', e)
assert time.monotonic() - start < 4
";
    let pair = Pair::new("what_the_mesh_does_not_carry");
    let _web = pair.web("http", "");
    let _decoy = decoy(&pair.client.host);
    let [vip, _] = pair.vips("web");
    let udp = UDP.replace("sys.argv[1]", &format!("'{vip}'"));
    let answer = pair.client.host.python("udp", &udp).cgroup("client").ok();
    assert!(!answer.contains("answered"), "{answer}");
    // A port that the service does not declare.
    let before = pair.client.refused("no_such_port");
    let output = pair
        .cmd(&format!("curl -sS -m 10 http://{vip}:81/"))
        .output();
    assert!(!output.status.success(), "{output}");
    pair.client.wait_refused("no_such_port", before);
    // An address of the range that is nobody's.
    let before = pair.client.refused("no_such_service");
    let nobody = "252.79.255.250";
    let output = pair
        .cmd(&format!("curl -sS -m 10 -i http://{nobody}/"))
        .output();
    assert!(!output.stdout.contains("decoy"), "{output}");
    pair.client.wait_refused("no_such_service", before);
}

/// A listener that is dialled by its own address would not know whom for.
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
    let pair = Pair::new("other_names_are_resolved_as_before");
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
    let _dns = dns.python("dns", SERVER).spawn("dns");
    let _web = pair.web("http", "");
    wait_until("a foreign name", SOON, || {
        let output = pair.cmd("getent ahostsv4 www.example.com").output();
        check(output.stdout.contains("192.0.2.7"), output.to_string())
    });
    let unknown = pair
        .cmd("getent ahostsv4 nothing.shop.mesh.internal")
        .output();
    assert!(
        !unknown.status.success(),
        "a mesh name that is none was asked elsewhere: {unknown}"
    );
}
