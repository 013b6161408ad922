//! Whose a connection is, is decided by the kernel at its SYN, however short it lives.

use std::path::PathBuf;
use std::time::Duration;

use meshwork_tests::agent::Owner;
use meshwork_tests::process::{Cmd, Process};
use meshwork_tests::servers;
use meshwork_tests::wait::{SOON, check, wait_until};

use crate::pair::{Pair, mesh_name, owner, spiffe, spiffe_host};

/// Connections of the burst: with one wrong in a thousand, it would be found 6 times of 7.
const BURST: u32 = 2_000;
/// Where another burst has shown the same of its other half.
const FEW: u32 = 500;
const BURST_MAX: Duration = Duration::from_secs(120);
/// The user that is the workload `shop/batch`.
const BATCH: u32 = 20_001;
/// A user that no file names.
const NOBODY_WE_KNOW: u32 = 20_999;

const SINK: &str = "\
import os, socket, threading
count, lock = 0, threading.Lock()
def serve(c):
    global count
    data = b''
    try:
        while True:
            part = c.recv(4096)
            if not part: break
            data += part
    except OSError: pass
    c.close()
    with lock:
        count += data.count(b'hello\\n')
        open(os.environ['COUNT'] + '.new', 'w').write(str(count))
        os.rename(os.environ['COUNT'] + '.new', os.environ['COUNT'])
s = socket.create_server(('0.0.0.0', 9000), backlog=1024)
while True: threading.Thread(target=serve, args=(s.accept()[0],), daemon=True).start()
";

#[test]
fn two_callers_and_two_servers_of_a_host_are_four_identities() {
    let pair = Pair::new("two_callers_and_two_servers");
    let host = &pair.server.host;
    let answer = |text: &str| format!("location / {{ return 200 \"{text}\\n\"; }}");
    let _red = servers::nginx(host, "red", 8001, &answer("red"));
    let _blue = servers::nginx(host, "blue", 8002, &answer("blue"));
    pair.declare("red", 8001, "http");
    pair.declare("blue", 8002, "http");
    let by_user = Owner::User(20_001);
    pair.client.serve("batch", &by_user, &[]);
    pair.client.serve("nested", &owner("client/nested"), &[]);
    let red = format!("curl -sS -m 10 http://{}:8001/", mesh_name("red"));
    let blue = format!("curl -sS -m 10 http://{}:8002/", mesh_name("blue"));
    let client = &pair.client.host;
    wait_until("the workloads of the client to be known", SOON, || {
        client.cmd(&red).user(20_001).ok();
        client.cmd(&red).cgroup("client/nested").ok();
        let batch = pair.calls(&spiffe("batch"), "shop/red");
        let nested = pair.calls(&spiffe("nested"), "shop/red");
        check(
            0.0 < batch && 0.0 < nested,
            format!("{batch} and {nested} calls"),
        )
    });
    assert_eq!(pair.ok(&blue), "blue\n");
    assert_eq!(client.cmd(&blue).user(20_001).ok(), "blue\n");
    // The deepest cgroup wins, then the user.
    assert_eq!(
        client.cmd(&blue).user(20_001).cgroup("client/nested").ok(),
        "blue\n"
    );
    let metrics = pair.server.metrics();
    for account in ["client", "batch", "nested"] {
        let labels = [
            ("src", spiffe(account)),
            ("dst", "shop/blue".to_owned()),
            ("tls", spiffe("blue")),
        ];
        let labels = labels.each_ref().map(|(n, v)| (*n, v.as_str()));
        let count = metrics.sum("mesh_requests_total", &labels);
        assert_eq!(count, 1.0, "calls of {account} to blue");
    }
}

/// The service `shop/sink`, which counts the lines that it gets.
struct Sink {
    pair: Pair,
    _process: Process,
    count: PathBuf,
}

/// What the server's agent counted, by whom.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Counted {
    by: f64,
    host: f64,
    all: f64,
    refused: f64,
}

impl Sink {
    #[track_caller]
    fn new(name: &str) -> Self {
        let pair = Pair::new(name);
        let host = &pair.server.host;
        let count = host.dir().join("count");
        let sink = host
            .python("sink", SINK)
            .cgroup("sink")
            .env("COUNT", &count.display().to_string());
        let process = sink.spawn("sink");
        host.wait_listening(9000, SOON);
        pair.declare("sink", 9000, "tcp");
        Self {
            pair,
            _process: process,
            count,
        }
    }

    /// This many connections, each by a process of its own, which is gone when the agent accepts.
    fn burst(&self, vip: &str, number: u32) -> Cmd {
        let line = format!(
            "bash -c 'for i in $(seq {number}); do (echo hello > /dev/tcp/{vip}/9000); done' 2>&1"
        );
        self.pair.client.host.cmd(&line).deadline(BURST_MAX)
    }

    /// Connections by `account`, by the client's host, by anybody, and those whose caller was not known.
    fn counted(&self, account: &str) -> Counted {
        let (server, client) = (self.pair.server.metrics(), self.pair.client.metrics());
        let of = |src: &str| crate::pair::calls(&server, src, "shop/sink");
        let inbound = [("direction", "Inbound"), ("dst", "shop/sink")];
        let unknown = [("reason", "caller_unknown")];
        let unknown = [&server, &client].map(|m| m.sum("mesh_refused_total", &unknown));
        Counted {
            by: of(&spiffe(account)),
            host: of(&spiffe_host(&self.pair.client.host)),
            all: server.sum("mesh_requests_total", &inbound),
            refused: unknown.iter().sum(),
        }
    }

    /// Every connection of a burst that just ended is `account`'s: not one is another's, and none was refused.
    #[track_caller]
    fn wait_all_by(&self, account: &str, before: Counted, number: u32) {
        let expected = Counted {
            by: before.by + f64::from(number),
            all: before.all + f64::from(number),
            ..before
        };
        wait_until("every connection to be counted", SOON, || {
            let now = self.counted(account);
            check(now == expected, format!("{now:?}, not {expected:?}"))
        });
    }

    #[track_caller]
    fn wait_lines(&self, number: u32) {
        wait_until("every line to arrive", SOON, || {
            let text = std::fs::read_to_string(&self.count).unwrap_or_default();
            check(text == number.to_string(), text)
        });
    }
}

/// The race that looking up the socket after the accept loses.
#[test]
fn who_connects_writes_and_exits_is_known_every_time() {
    let sink = Sink::new("who_connects_writes_and_exits");
    let [vip, _] = sink.pair.vips("sink");
    let none = sink.counted("client");
    sink.burst(&vip, BURST).cgroup("client").ok();
    sink.wait_all_by("client", none, BURST);
    sink.wait_lines(BURST);
    // Nobody's: it is the host's or it is refused, and never somebody else's.
    let few = BURST / 10;
    sink.burst(&vip, few).user(NOBODY_WE_KNOW).output();
    wait_until("every connection to be counted or refused", SOON, || {
        let now = sink.counted("client");
        let is_right = now.by == f64::from(BURST)
            && now.host + now.refused == f64::from(few)
            && now.all == f64::from(BURST) + now.host;
        check(is_right, format!("{now:?}"))
    });
}

/// The same where a file names a user, and over IPv6 for both kinds of owner.
#[test]
fn a_user_is_known_every_time_and_over_ipv6_too() {
    let sink = Sink::new("a_user_is_known_every_time");
    let pair = &sink.pair;
    let _web = pair.web("http", "");
    pair.client.serve("batch", &Owner::User(BATCH), &[]);
    let call = format!("curl -sS -m 10 http://{}/", mesh_name("web"));
    wait_until("the user to be known", SOON, || {
        drop(pair.client.host.cmd(&call).user(BATCH).output());
        let count = pair.calls(&spiffe("batch"), "shop/web");
        check(0.0 < count, format!("{count} calls"))
    });
    let [v4, v6] = pair.vips("sink");
    let by_user = |vip: &str, number: u32| {
        let before = sink.counted("batch");
        sink.burst(vip, number).user(BATCH).ok();
        sink.wait_all_by("batch", before, number);
    };
    by_user(&v4, BURST);
    by_user(&v6, FEW);
    let before = sink.counted("client");
    sink.burst(&v6, BURST).cgroup("client").ok();
    sink.wait_all_by("client", before, BURST);
    sink.wait_lines(BURST + FEW + BURST);
}

#[test]
fn a_port_that_another_program_holds_is_not_served() {
    let pair = Pair::new("a_port_that_another_program_holds");
    let web = pair.web("http", "");
    // Without a health check control goes on listing it, and only the connection itself can tell.
    let line = pair.server.owner_line(&owner("web"));
    let file = format!(
        "namespace = \"shop\"\n[owner]\n{line}\n[[service]]\nports = [{{ port = 80, protocol = \"http\" }}]\n"
    );
    pair.server.write_file("web.toml", &file);
    assert_eq!(
        pair.ok(&format!("curl -sS -m 10 http://{}/", mesh_name("web"))),
        "hello\n"
    );
    web.kill9();
    let host = &pair.server.host;
    let _impostor = servers::nginx(
        host,
        "impostor",
        80,
        "location / { return 200 \"gotcha\\n\"; }",
    );
    // Without the mesh it is the one who answers.
    let direct = format!("curl -sS -m 10 http://{}/", host.v4());
    assert_eq!(pair.ok(&direct), "gotcha\n");
    let before = pair.server.refused("app_not_owner");
    let line = format!("curl -sS -m 10 -i http://{}/", mesh_name("web"));
    let answer = wait_until("the refusal", SOON, || {
        let answer = pair.cmd(&line).output().stdout;
        assert!(
            !answer.contains("gotcha"),
            "another program was called: {answer}"
        );
        let is_there = answer
            .to_lowercase()
            .contains("x-meshwork-reason: app_not_owner");
        check(is_there, answer.clone()).map(|()| answer)
    });
    assert!(answer.contains(" 503 "), "{answer}");
    pair.server.wait_refused("app_not_owner", before);
    // The log names both: who listens, and whose port it is.
    let log = pair.server.log();
    let line = log
        .lines()
        .find(|line| line.contains("another program listens"));
    let line = line.unwrap_or_default();
    assert!(
        line.contains("shop/web") && line.contains("no workload"),
        "{log}"
    );
}
