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
    // The worker holds the keys: its memory and descriptors are nobody's, not even of another process of root
    // without CAP_SYS_PTRACE.
    let worker = pair.server.worker();
    let output = host
        .cmd(&format!("ls /proc/{worker}/fd"))
        .user(OTHER)
        .output();
    assert!(!output.status.success(), "{output}");
}

/// Who a caller is comes from its cgroup and user. A mark on its socket says nothing.
#[test]
fn a_mark_makes_nobody_another_caller() {
    const MARKED: &str = "\
import os, socket
s = socket.socket()
s.settimeout(10)
try: s.setsockopt(socket.SOL_SOCKET, 36, int(os.environ['MARK']))
except PermissionError: print('not permitted'); raise SystemExit
try:
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
    let marks = [0x4d00_8001_u32, 0x4d00_9000, 0x4d00_a000];
    let host = &pair.client.host;
    let call = |mark: u32, to: &str| {
        let script = host.python("marked", MARKED);
        script.env("MARK", &mark.to_string()).env("TO", to)
    };
    for mark in marks {
        let answer = call(mark, &vip).user(OTHER).ok();
        assert_eq!(answer, "not permitted\n", "a user may set marks");
        // Root may, and gets no further by it: the mark leads its packets past the name's way.
        let answer = call(mark, &vip).ok();
        assert!(
            answer.contains("hello") || answer.contains("refused"),
            "{mark:x}: {answer}"
        );
        let real = call(mark, &pair.server.host.v4().to_string()).ok();
        assert!(!real.contains("hello"), "{mark:x}: {real}");
    }
    // The next call is counted after all of those.
    assert_eq!(host.ok(&format!("curl -sS -m 10 {url}")), "hello\n");
    let by_host = || pair.calls(&spiffe_host(host), "shop/web");
    wait_until("the host's own call to be counted", SOON, || {
        check(0.0 < by_host(), by_host().to_string())
    });
    assert_eq!(client(), 1.0, "a mark made a call another's");
}

/// Any program may ask for names without end. A question of another that is lost in the flood is answered when it is
/// asked again: the agent neither stops nor grows.
#[test]
fn a_flood_of_names_is_outlived() {
    const FLOOD: &str = "\
import os, socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.setblocking(False)
for i in range(50000):
    name = b'\\x0bn%010d' % i + b'\\x04shop\\x04mesh\\x08internal\\0\\0\\1\\0\\1'
    try: s.sendto(b'\\0\\1\\1\\0\\0\\1\\0\\0\\0\\0\\0\\0' + name, (os.environ['TO'], 53))
    except OSError: pass
    if i == 20000: print('flooding', flush=True)
";
    let pair = Pair::new("a_flood_of_names_is_outlived");
    let _web = pair.web("http", "");
    let host = &pair.client.host;
    let server = host.ok("awk '/^nameserver/ {print $2; exit}' /etc/resolv.conf");
    let flood = host.python("flood", FLOOD).env("TO", server.trim());
    let flood = flood.user(OTHER).cgroup("flood").spawn("flood");
    wait_until("the flood", SOON, || {
        let log = flood.log();
        check(log.contains("flooding"), log)
    });
    for _ in 0..5 {
        wait_until("an answer beside the flood", SOON, || {
            let call = format!("curl -sS -m 20 http://{}/", mesh_name("web"));
            let call = pair.cmd(&call).output();
            check(call.stdout == "hello\n", call.to_string())
        });
    }
}
