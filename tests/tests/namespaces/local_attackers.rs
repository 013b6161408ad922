//! Programs of other users on a host of the mesh: what they must not get, beside the same done by who may.
//! A forged listener is in `identity.rs`, a listener dialled directly in `capture.rs`, floods of connections and the
//! end of descriptors in `bounds.rs`, floods of handshakes in `hostile.rs`.

use meshwork_tests::wait::{SOON, check, wait_until};

use crate::pair::{Pair, mesh_name, spiffe, spiffe_host};

/// A user of the host that is no workload.
const OTHER: u32 = 20_001;

#[test]
fn keys_state_and_the_admin_socket_are_closed_to_other_users() {
    let pair = Pair::new("keys_state_and_the_admin_socket");
    let _web = pair.web("http", "");
    let host = &pair.server.host;
    let state = host.dir().join("state");
    let state = state.display();
    let files = host.ok(&format!("find {state} -type f"));
    for needed in ["agent.key", "agent.json", "index", "policies", "door.json"] {
        wait_until(&format!("{needed} to be kept"), SOON, || {
            let files = host.ok(&format!("find {state} -type f"));
            check(files.contains(needed), files)
        });
    }
    assert!(files.contains(".key"), "{files}");
    for file in files.lines() {
        let read = format!("cat '{file}'");
        let output = host.cmd(&read).user(OTHER).output();
        assert!(
            !output.status.success() && output.stdout.is_empty(),
            "{output}"
        );
        assert!(
            !host.ok(&read).is_empty(),
            "{file} is empty: this test proves nothing"
        );
        let mode = host.ok(&format!("stat -c %a '{file}'"));
        assert_eq!(mode.trim(), "600", "{file}");
    }
    let socket = host.dir().join("run/agent.sock");
    let ask = format!(
        "curl -sS -m 5 --unix-socket {} http://agent/state",
        socket.display()
    );
    let output = host.cmd(&ask).user(OTHER).output();
    assert!(
        !output.status.success() && output.stdout.is_empty(),
        "{output}"
    );
    assert!(host.ok(&ask).contains("\"host\""));
    // Control's the same: its keys, its store, and the socket that makes whoever speaks to it an operator.
    let control = &pair.control.host;
    let state = pair.control.state_dir();
    let files = control.ok(&format!("find {} -type f", state.display()));
    assert!(files.contains(".key"), "{files}");
    for file in files.lines() {
        let read = format!("head -c 1 '{file}'");
        let output = control.cmd(&read).user(OTHER).output();
        assert!(
            !output.status.success() && output.stdout.is_empty(),
            "{output}"
        );
    }
    let modes = format!("cd {} && stat -c %a . ca/*.key", state.display());
    let modes = control.ok(&modes);
    assert!(
        modes.lines().eq(["700", "600", "600"]),
        "of the directory and its keys: {modes}"
    );
    let ask = format!(
        "curl -sS -f -m 5 --unix-socket {}/control.sock http://control/state",
        state.display()
    );
    let output = control.cmd(&ask).user(OTHER).output();
    assert!(
        !output.status.success() && output.stdout.is_empty(),
        "{output}"
    );
    assert!(!control.ok(&ask).is_empty(), "nobody answers there");
    // The worker holds the keys: its memory and descriptors are nobody's, not even of another process of root
    // without CAP_SYS_PTRACE.
    let worker = pair.server.worker();
    let output = host
        .cmd(&format!("ls /proc/{worker}/fd"))
        .user(OTHER)
        .output();
    assert!(!output.status.success(), "{output}");
}

/// What closes them is their mode alone: where root opens them, another user reads the keys and is answered at the sockets.
#[test]
fn where_root_opens_them_keys_and_admin_sockets_are_open() {
    let pair = Pair::new("where_root_opens_them");
    let (host, control) = (&pair.server.host, &pair.control.host);
    let agent = host.dir();
    let (agent, state) = (agent.display(), pair.control.state_dir());
    let state = state.display();
    let agents_key = format!("{agent}/state/agent.key");
    let agents_socket = format!("{agent}/run/agent.sock http://agent/state");
    let issuers_key = format!("{state}/ca/issuer.key");
    let controls_socket = format!("{state}/control.sock http://control/state");
    for (host, dirs, key, socket) in [
        (
            host,
            format!("{agent}/state {agent}/run"),
            agents_key,
            agents_socket,
        ),
        (control, state.to_string(), issuers_key, controls_socket),
    ] {
        let read = format!("base64 {key}");
        let ask = format!("curl -sS -f -m 5 --unix-socket {socket}");
        for line in [&read, &ask] {
            let output = host.cmd(line).user(OTHER).output();
            assert!(
                !output.status.success() && output.stdout.is_empty(),
                "{output}"
            );
        }
        host.ok(&format!("chmod -R o+rwX {dirs}"));
        let stolen = host.cmd(&read).user(OTHER).ok();
        assert!(!stolen.is_empty() && stolen == host.ok(&read), "{key}");
        assert!(!host.cmd(&ask).user(OTHER).ok().is_empty());
    }
}

/// Who a caller is comes from its cgroup and user. A mark on its socket makes nobody another, and gets nowhere: the kernel
/// finds no source address of this host on the way of marked packets, and where the program names one, a first packet to a
/// virtual address that is not on its way to the link is refused. No switch turns that off: the rules are in a table that only the
/// agent may change. That the script would get there is seen without a mark, and is counted as its own caller's.
#[test]
fn a_mark_makes_nobody_another_caller() {
    const MARKED: &str = "\
import os, socket
s = socket.socket()
s.settimeout(10)
try: s.setsockopt(socket.SOL_SOCKET, 36, int(os.environ['MARK']))
except PermissionError: print('not permitted'); raise SystemExit
try:
    if 'FROM' in os.environ: s.bind((os.environ['FROM'], 0))
    s.connect((os.environ['TO'], 80))
    s.sendall(b'GET / HTTP/1.0\\r\\nHost: a\\r\\n\\r\\n')
    print(s.recv(4096).decode())
except OSError as e: print('refused', e)
";
    let pair = Pair::new("a_mark_makes_nobody_another_caller");
    let _web = pair.web("http", "");
    let url = format!("http://{}/", mesh_name("web"));
    assert_eq!(pair.ok(&format!("curl -sS -m 10 {url}")), "hello\n");
    let client = || pair.calls(&spiffe("client"), "shop/web");
    wait_until("the workload's own call to be counted", SOON, || {
        check(client() == 1.0, client().to_string())
    });
    let [vip, _] = pair.vips("web");
    // Of the first workload: SYNs, and later packets.
    let marks = [
        0x4d00_8001_u32,
        0x4d00_9000,
        0x4d00_9001,
        0x4d00_9003,
        0x4d00_9004,
    ];
    let host = &pair.client.host;
    let call = |mark: u32, to: &str| {
        let script = host.python("marked", MARKED);
        script.env("MARK", &mark.to_string()).env("TO", to)
    };
    let own = host.v4().to_string();
    let real = pair.server.host.v4().to_string();
    for mark in marks {
        let answer = call(mark, &vip).user(OTHER).ok();
        assert_eq!(answer, "not permitted\n", "a user may set marks");
        // Root may.
        for to in [&vip, &real] {
            let answer = call(mark, to).ok();
            assert!(answer.contains("unreachable"), "{mark:x}: {answer}");
        }
        let answer = call(mark, &vip).env("FROM", &own).ok();
        assert!(answer.starts_with("refused"), "{mark:x}: {answer}");
        let answer = call(mark, &real).env("FROM", &own).ok();
        assert!(answer.starts_with("refused"), "{mark:x}: {answer}");
    }
    // Without a mark the same script gets there. This call is counted after all of those.
    let answer = call(0, &vip).ok();
    assert!(answer.contains("hello"), "{answer}");
    let by_host = || pair.calls(&spiffe_host(host), "shop/web");
    wait_until("the host's own call to be counted", SOON, || {
        check(by_host() == 1.0, by_host().to_string())
    });
    assert_eq!(client(), 1.0, "a mark made a call another's");
}

const NAMES_FLOOD: &str = "\
import os, socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.setblocking(False)
sent = lost = 0
while True:
    name = b'\\x0bn%010d' % sent + b'\\x04shop\\x04mesh\\x08internal\\0\\0\\1\\0\\1'
    sent += 1
    try: s.sendto(b'\\0\\1\\1\\0\\0\\1\\0\\0\\0\\0\\0\\0' + name, (os.environ['TO'], 53))
    except PermissionError: lost += 1
    except OSError: pass
    if sent % 20000 == 0: print('lost', lost, 'of', sent, flush=True)
";

/// Any program may ask for names without end; the others still get theirs, at the first try. What spares them is in a table
/// that only the agent may change, so it can not be switched off here; that the flood would drown them is seen at a question
/// of the user who floods, which shares with it and is lost.
#[test]
fn a_flood_of_names_locks_nobody_out() {
    names_are_flooded("a_flood_of_names_locks_nobody_out", 1);
}

/// They share what is there beyond the share of each.
#[test]
fn three_users_who_flood_names_lock_nobody_out() {
    names_are_flooded("three_users_who_flood_names", 3);
}

fn names_are_flooded(test: &str, users: u32) {
    let pair = Pair::new(test);
    let _web = pair.web("http", "");
    let host = &pair.client.host;
    let server = host.ok("awk '/^nameserver/ {print $2; exit}' /etc/resolv.conf");
    let flood = |user: u32| {
        let flood = host
            .python("flood", NAMES_FLOOD)
            .env("TO", server.trim())
            .user(OTHER + user)
            .cgroup("flood");
        flood.spawn(&format!("flood{user}"))
    };
    let floods: Vec<_> = (0..users).map(flood).collect();
    for flood in &floods {
        wait_until("the flood", SOON, || {
            let log = flood.log();
            check(log.contains("of 20000"), log)
        });
    }
    for _ in 0..5 {
        let ask = pair.cmd(&format!("getent ahostsv4 {}", mesh_name("web")));
        ask.env("RES_OPTIONS", "attempts:1 timeout:10").ok();
        let text = pair.ok(&format!("curl -sS -m 20 http://{}/", mesh_name("web")));
        assert_eq!(text, "hello\n");
    }
    // What the others are spared: whoever shares with the flood, being its user, does not get its answers.
    wait_until("a question of the user who floods to be lost", SOON, || {
        let ask = format!("getent ahostsv4 {}", mesh_name("web"));
        let output = host.cmd(&ask).user(OTHER).output();
        check(!output.status.success(), output.to_string())
    });
    for flood in &floods {
        let log = flood.log();
        let mut lost = log.lines().filter(|line| !line.starts_with("lost 0 "));
        assert!(lost.next().is_some(), "{log}");
    }
    wait_until("what was lost to be counted", SOON, || {
        let metrics = pair.client.metrics();
        let shed = metrics.sum("mesh_limit_reached_total", &[("limit", "names")]);
        check(shed > 1_000.0, shed.to_string())
    });
}

/// Requests of a user that are never answered fill its share of what the called host has for this host's users, and not what it
/// has for another user, even of the same service, nor for workloads. What one has is no setting, so it can not be given all;
/// that the flood would lock others out is seen at a request that shares with it, which is refused.
#[test]
fn a_flood_of_streams_leaves_room_for_others() {
    const FLOOD: &str = "
kept = []
for n in range(20):
    client = Client()
    for _ in range(200): client.open('/wait')
    kept.append(client)
    print('open', n, flush=True)
time.sleep(1000)
";
    const CALL: &str = "print(Client().get('/'))";
    let (pair, _server) = crate::http2::pair("a_flood_of_streams_leaves_room");
    let _web = pair.web("http", "");
    let host = &pair.client.host;
    let as_user = |name: &str, text: &str, user: u32| {
        let text = format!("{}\n{text}", crate::http2::PEER);
        host.python(name, &text).user(user).cgroup("flood")
    };
    assert!(as_user("one", CALL, OTHER).ok().contains("hello"));
    let flood = as_user("flood", FLOOD, OTHER).spawn("flood");
    wait_until("the flood to be refused", SOON, || {
        let metrics = pair.client.metrics();
        let reached = metrics.sum("mesh_limit_reached_total", &[("limit", "calls")]);
        check(0.0 < reached, flood.log())
    });
    for _ in 0..5 {
        assert!(crate::http2::run(&pair, CALL).contains("hello"));
        let call = format!("curl -sS -m 10 http://{}/", mesh_name("web"));
        assert_eq!(host.cmd(&call).user(OTHER + 1).ok(), "hello\n");
        let same = as_user("two", CALL, OTHER + 1).ok();
        assert!(same.contains("hello"), "{same}");
    }
    // What they are spared.
    let refused = as_user("one", CALL, OTHER).output();
    assert!(!refused.stdout.contains("hello"), "{refused}");
}

/// A user who opens connections without end, or until no descriptor is left, is refused beyond three quarters of what
/// there is; a workload and another user find room at once.
#[test]
fn a_flood_of_connections_leaves_room_for_others() {
    const FLOOD: &str = "\
import os, socket, time
kept = []
refused = 0
while True:
    try:
        c = socket.create_connection((os.environ['TO'], 80), 10)
        c.settimeout(10)
        c.sendall(b'GET / HTTP/1.1\\r\\nHost: a\\r\\n\\r\\n')
        if not c.recv(100): raise OSError('ended')
        kept.append(c)
    except OSError: refused += 1
    print('open', len(kept), 'refused', refused, flush=True)
    time.sleep(0.01 if refused else 0)
";
    let mut pair = Pair::new("a_flood_of_connections_leaves_room");
    let _web = pair.web("http", "");
    let client = &mut pair.client;
    client.stop();
    client.configure("[limits]\nconnections = 20\nthreads = 1\n");
    client.start();
    pair.wait_name("web");
    let [vip, _] = pair.vips("web");
    let host = &pair.client.host;
    let flood = host.python("flood", FLOOD).env("TO", &vip).user(OTHER);
    let flood = flood.spawn("flood");
    wait_until("the flood to be refused", SOON, || {
        let log = flood.log();
        check(log.contains("refused 3"), log)
    });
    let log = flood.log();
    assert!(log.contains("open 15") && !log.contains("open 16"), "{log}");
    let call = format!("curl -sS -m 10 http://{vip}/");
    for _ in 0..5 {
        assert_eq!(pair.ok(&call), "hello\n");
        assert_eq!(host.cmd(&call).user(OTHER + 1).ok(), "hello\n");
    }
    // What they are spared.
    let output = host.cmd(&call).user(OTHER).output();
    assert!(!output.stdout.contains("hello"), "{output}");
    let metrics = pair.client.metrics();
    let reached = metrics.sum("mesh_limit_reached_total", &[("limit", "callers")]);
    assert!(reached >= 3.0, "{reached}");
    flood.kill9();
    wait_until("room for the user again", SOON, || {
        let output = host.cmd(&call).user(OTHER).output();
        check(output.stdout == "hello\n", output.to_string())
    });
}
