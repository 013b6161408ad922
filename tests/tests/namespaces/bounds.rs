//! When a bound is reached new work is refused with a reason that is counted, open work goes on, and all is well again
//! when there is room.

use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;

use meshwork_tests::agent::{Agent, MESH_PORT};
use meshwork_tests::control::{TRUST_DOMAIN, TokenOptions};
use meshwork_tests::mesh::{Authority, announced};
use meshwork_tests::process::{Cmd, Process};
use meshwork_tests::wait::{SOON, check, wait_until};

use crate::pair::{Pair, mesh_name, owner, spiffe};

/// Echoes on 9000; sends without end on 9001, to whoever says a word.
const SERVER: &str = r#"
import socket, threading
def echo(c):
    try:
        while True:
            b = c.recv(65536)
            if not b: break
            c.sendall(b)
    except OSError: pass
    c.close()
def flood(c):
    try:
        if c.recv(1):
            while True: c.sendall(b"x" * 65536)
    except OSError: pass
    c.close()
def serve(port, what):
    s = socket.create_server(("0.0.0.0", port), backlog=512)
    while True: threading.Thread(target=what, args=(s.accept()[0],), daemon=True).start()
threading.Thread(target=serve, args=(9001, flood)).start()
serve(9000, echo)
"#;

/// Opens connections to a port, each with a word, until `UNTIL` exists; then goes on on the first one when `GO` does.
const HOLDER: &str = r#"
import os, socket, time
def exists(name): return os.path.exists(os.environ["DIR"] + "/" + name)
kept = []
while not exists("until"):
    try:
        c = socket.create_connection(("NAME", PORT), 20)
        c.settimeout(20)
        c.sendall(b"w")
        if PORT == 9000: assert c.recv(1) == b"w"
        kept.append(c)
        print("open", len(kept), flush=True)
    except OSError as error:
        print("refused", error, flush=True)
        time.sleep(0.05)
while not exists("go"): time.sleep(0.01)
for c in kept:
    if PORT == 9000:
        c.sendall(b"still")
        assert c.recv(5, socket.MSG_WAITALL) == b"still"
print("all", len(kept), "go on", flush=True)
while not exists("leave"): time.sleep(0.01)
"#;

/// One call: the word comes back, or how it failed.
const CALL: &str = r#"
import socket
try:
    c = socket.create_connection(("NAME", 9000), 20)
    c.settimeout(20)
    c.sendall(b"hello")
    print(c.recv(5, socket.MSG_WAITALL).decode() or "end")
except OSError as error: print(type(error).__name__)
"#;

struct Bound {
    pair: Pair,
    _server: Process,
}

impl Bound {
    #[track_caller]
    fn new(name: &str) -> Self {
        let pair = Pair::new(name);
        let host = &pair.server.host;
        let server = host.python("echo", SERVER).cgroup("echo").spawn("echo");
        for port in [9000, 9001] {
            host.wait_listening(port, SOON);
        }
        pair.server
            .serve("echo", &owner("echo"), &[(9000, "tcp"), (9001, "tcp")]);
        pair.control.wait_endpoints("shop/echo", 1);
        pair.wait_name("echo");
        Self {
            pair,
            _server: server,
        }
    }

    /// Makes the client's agent start anew with more lines in its configuration.
    #[track_caller]
    fn configure_client(&mut self, lines: &str) {
        restart(&mut self.pair.client, lines);
        self.pair.wait_name("echo");
    }

    fn call(&self) -> String {
        call(|script| {
            self.pair
                .client
                .host
                .python("call", script)
                .cgroup("client")
        })
    }

    /// A call that goes through when there is room again.
    #[track_caller]
    fn wait_call(&self) {
        wait_until("a call to go through", SOON, || {
            let answer = self.call();
            check(answer == "hello", answer)
        });
    }
}

/// How a call ends of whoever `who` says.
fn call(who: impl FnOnce(&str) -> Cmd) -> String {
    let script = CALL.replace("NAME", &mesh_name("echo"));
    who(&script).ok().trim().to_owned()
}

#[track_caller]
fn restart(agent: &mut Agent, lines: &str) {
    agent.stop();
    agent.configure(lines);
    agent.start();
}

/// A program that holds connections.
struct Holder {
    process: Process,
    dir: PathBuf,
}

impl Holder {
    fn start(bound: &Bound, port: u16) -> Self {
        let host = &bound.pair.client.host;
        let dir = host.subdir("holder", None);
        let script = HOLDER
            .replace("NAME", &mesh_name("echo"))
            .replace("PORT", &port.to_string());
        let command = host.python("hold", &script).cgroup("client");
        let process = command
            .env("DIR", &dir.display().to_string())
            .spawn("holder");
        Self { process, dir }
    }

    fn tell(&self, name: &str) {
        fs::write(self.dir.join(name), "").unwrap();
    }

    fn open(&self) -> usize {
        self.process.log().matches("open ").count()
    }

    #[track_caller]
    fn wait(&self, what: &str) {
        wait_until(&format!("the holder to say `{what}`"), SOON, || {
            let log = self.process.log();
            check(log.contains(what), log)
        });
    }
}

pub(crate) fn reached(agent: &Agent, limit: &str) -> f64 {
    let metrics = agent.metrics();
    metrics.sum("mesh_limit_reached_total", &[("limit", limit)])
}

pub(crate) fn used(agent: &Agent, limit: &str) -> f64 {
    let metrics = agent.metrics();
    metrics.sum("mesh_limit_used", &[("limit", limit)])
}

/// Descriptors that the data path leaves to the rest of the agent.
const RESERVED: usize = 32;

/// Changes how many descriptors a running worker may have.
fn set_descriptors(agent: &Agent, limit: usize) {
    let line = format!("prlimit --pid {} --nofile={limit}:", agent.worker());
    agent.host.ok(&line);
}

/// The number of the descriptor that a worker keeps for connections that there is none for: the last of `/dev/null`.
fn spare(agent: &Agent) -> usize {
    let dir = format!("/proc/{}/fd", agent.worker());
    let null = |path: &PathBuf| fs::read_link(path).is_ok_and(|to| to.ends_with("dev/null"));
    let found = fs::read_dir(dir).unwrap().map(|e| e.unwrap().path());
    let numbers = found.filter(null).filter_map(|path| {
        let name = path.file_name()?.to_str()?.to_owned();
        name.parse().ok()
    });
    numbers.max().unwrap()
}

/// Leaves to a worker's calls so many more descriptors than they have.
fn leave_descriptors(agent: &Agent, more: usize) {
    let held = fs::read_dir(format!("/proc/{}/fd", agent.worker())).unwrap();
    set_descriptors(agent, held.count() + RESERVED + more);
}

/// Out of descriptors at the calling side: its callers are reset at once, not left waiting; those who are in go on.
#[test]
fn out_of_descriptors_new_callers_are_reset_and_old_ones_go_on() {
    let bound = Bound::new("out_of_descriptors_callers");
    let client = &bound.pair.client;
    assert_eq!(bound.call(), "hello");
    leave_descriptors(client, 20);
    let holder = Holder::start(&bound, 9000);
    holder.wait("refused");
    let open = holder.open();
    assert!(
        (10..=25).contains(&open),
        "{open} of 20\n{}",
        holder.process.log()
    );
    let answer = bound.call();
    assert_eq!(answer, "ConnectionResetError", "not a wait, not an end");
    holder.tell("until");
    holder.tell("go");
    holder.wait("go on");
    assert!(reached(client, "descriptors") >= 2.0);
    assert!(client.refused("overloaded") >= 2.0);
    let log = client.log();
    assert!(log.contains("raise LimitNOFILE"), "{log}");
    assert!(used(client, "callers") >= open as f64);
    // Its own connections being gone, there is room again.
    holder.tell("leave");
    bound.wait_call();
    // None at all, not even those that are reserved: a connection is taken with a spare one.
    let before = reached(client, "descriptors");
    set_descriptors(client, spare(client) + 1);
    assert_eq!(bound.call(), "ConnectionResetError");
    set_descriptors(client, 1024);
    bound.wait_call();
    assert!(reached(client, "descriptors") > before);
}

/// Out of descriptors at the called side: it has none for a connection to the app. The caller's call is refused with
/// the reason, the connection between the agents and the calls on it go on.
#[test]
fn out_of_descriptors_the_called_agent_refuses_calls_and_keeps_those_it_has() {
    let bound = Bound::new("out_of_descriptors_calls");
    let server = &bound.pair.server;
    assert_eq!(bound.call(), "hello");
    leave_descriptors(server, 20);
    let holder = Holder::start(&bound, 9000);
    holder.wait("refused");
    assert!(holder.open() >= 5, "{}", holder.process.log());
    assert_eq!(bound.call(), "ConnectionResetError");
    bound.pair.client.wait_refused("overloaded", 0.0);
    assert!(server.refused("overloaded") >= 1.0);
    assert!(reached(server, "descriptors") >= 1.0);
    holder.tell("until");
    holder.tell("go");
    holder.wait("go on");
    holder.tell("leave");
    bound.wait_call();
}

/// What descriptors an agent has in the two tests that follow: few, so that they are filled at once.
const DESCRIPTORS: usize = 1024;

/// A workload that takes all descriptors that it gets of its own host's agent leaves some for others: what one may have is a
/// part of what the process has. Where nothing is kept for others, since it was taken away behind the agent's back, they are
/// locked out.
#[test]
fn who_takes_descriptors_at_its_own_agent_leaves_some_for_others() {
    let mut bound = Bound::new("descriptors_at_the_calling_side");
    bound.pair.client.stop();
    bound.pair.client.start_with_descriptors(DESCRIPTORS);
    bound.pair.wait_name("echo");
    let client = &bound.pair.client;
    let other = || call(|script| client.host.python("call", script).user(20_001));
    let holder = Holder::start(&bound, 9000);
    holder.wait("refused");
    assert!(holder.open() >= 64, "{}", holder.process.log());
    assert_eq!(bound.call(), "ConnectionResetError");
    for _ in 0..3 {
        assert_eq!(other(), "hello");
    }
    set_descriptors(client, spare(client) + 1);
    assert_eq!(other(), "ConnectionResetError", "it needs none");
    set_descriptors(client, DESCRIPTORS);
    assert_eq!(other(), "hello");
    for word in ["until", "go"] {
        holder.tell(word);
    }
    holder.wait("go on");
    holder.tell("leave");
    bound.wait_call();
}

/// The same of a host that takes them at the agent it calls.
#[test]
fn who_takes_descriptors_at_the_called_agent_leaves_some_for_other_hosts() {
    let mut bound = Bound::new("descriptors_at_the_called_side");
    bound.pair.server.stop();
    bound.pair.server.start_with_descriptors(DESCRIPTORS);
    bound.pair.control.wait_endpoints("shop/echo", 1);
    let host = bound.pair.site.host("other");
    let _other = bound.pair.control.join(&host, &TokenOptions::default());
    let other = || call(|script| host.python("call", script));
    wait_until("the other host's call", SOON, || {
        let answer = other();
        check(answer == "hello", answer)
    });
    bound.wait_call();
    let server = &bound.pair.server;
    let holder = Holder::start(&bound, 9000);
    holder.wait("refused");
    assert!(holder.open() >= 64, "{}", holder.process.log());
    assert_eq!(bound.call(), "ConnectionResetError");
    assert!(reached(server, "calls") >= 1.0);
    for _ in 0..3 {
        assert_eq!(other(), "hello");
    }
    set_descriptors(server, spare(server) + 1);
    assert_eq!(other(), "ConnectionResetError", "it needs none");
    set_descriptors(server, DESCRIPTORS);
    assert_eq!(other(), "hello");
    for word in ["until", "go"] {
        holder.tell(word);
    }
    holder.wait("go on");
    holder.tell("leave");
    bound.wait_call();
}

/// An agent that may have few descriptors at all refuses by count before it runs out of them. The last quarter of the
/// places is for others than the one who has all those before.
#[test]
fn more_callers_than_are_allowed_are_refused() {
    let mut bound = Bound::new("more_callers_than_are_allowed");
    bound.configure_client("[limits]\nconnections = 10\n");
    let holder = Holder::start(&bound, 9000);
    holder.wait("refused");
    assert_eq!(holder.open(), 8, "{}", holder.process.log());
    let client = &bound.pair.client;
    assert!(reached(client, "callers") >= 1.0);
    assert_eq!(used(client, "callers"), 8.0);
    let status = client.command("status").ok();
    assert!(status.contains("callers 8 of 10,"), "{status}");
    holder.tell("until");
    holder.tell("go");
    holder.wait("all 8 go on");
    holder.tell("leave");
    bound.wait_call();
}

/// Readers that stand still fill the buffers of all connections together: new calls are refused, with the reason in an
/// answer where one can be given, and the old go on, as does everything when the readers are gone.
#[test]
fn out_of_memory_budget_new_calls_are_refused_and_old_ones_go_on() {
    let mut bound = Bound::new("out_of_memory_budget");
    let _web = bound.pair.web("http", "");
    bound.configure_client("[limits]\nbuffer_mib = 4\n");
    bound.pair.wait_name("web");
    let url = format!("http://{}/", mesh_name("web"));
    // A connection that began before, and a connection of HTTP on which requests can still come.
    let old = Holder::start(&bound, 9000);
    wait_until("an old connection", SOON, || check(old.open() >= 1, "none"));
    old.tell("until");
    assert_eq!(bound.pair.ok(&format!("curl -sS -m 20 {url}")), "hello\n");
    let script = format!(
        "import http.client, os, time\nc = http.client.HTTPConnection({:?}, timeout=20)\n\
         def get():\n    c.request('GET', '/')\n    r = c.getresponse()\n    r.read()\n    return r\n\
         assert get().status == 200\nprint('first', flush=True)\n\
         while not os.path.exists({:?}): time.sleep(0.01)\nr = get()\n\
         print(r.status, r.getheader('x-meshwork-reason'), flush=True)\n\
         while not os.path.exists({:?}): time.sleep(0.01)\nprint('then', get().status, flush=True)\n",
        mesh_name("web"),
        old.dir.join("full"),
        old.dir.join("empty"),
    );
    let host = &bound.pair.client.host;
    let web = host.python("web", &script).cgroup("client").spawn("web");
    let web_says = |what: &str| {
        wait_until(&format!("the HTTP caller to say {what}"), SOON, || {
            check(web.log().contains(what), web.log())
        });
    };
    web_says("first");
    // Each holds 512 KiB of the agent when the windows of its own sockets are full.
    let script = format!(
        "import socket, time\nkept = []\nwhile True:\n    try:\n        c = socket.create_connection(({:?}, 9001), 20)\n        \
         c.sendall(b'w')\n        kept.append(c)\n        print('open', flush=True)\n    except OSError as error:\n        \
         print('refused', error, flush=True)\n    time.sleep(0.05)\n",
        mesh_name("echo")
    );
    let readers = host
        .python("still", &script)
        .cgroup("client")
        .spawn("still");
    let client = &bound.pair.client;
    wait_until("a reader to be refused", SOON, || {
        let log = readers.log();
        check(reached(client, "buffers") >= 1.0, log)
    });
    // It goes up and down by what the windows of the sockets take.
    wait_until("the buffers to be full", SOON, || {
        let held = used(client, "buffers");
        check(held >= f64::from(4 << 20), format!("{held} bytes"))
    });
    assert_eq!(bound.call(), "ConnectionResetError");
    old.tell("full");
    web_says("503 overloaded");
    old.tell("go");
    old.wait("go on");
    assert!(reached(client, "buffers") >= 3.0);
    let log = client.log();
    assert!(log.contains("raise limits.buffer_mib"), "{log}");
    let status = client.command("status").ok();
    assert!(status.contains("of 4 MiB"), "{status}");
    readers.kill9();
    bound.wait_call();
    old.tell("empty");
    web_says("then 200");
    wait_until("the buffers to be empty", SOON, || {
        let left = used(client, "buffers");
        check(left == 0.0, format!("{left} bytes"))
    });
}

/// A head that never ends is given up after the time that was set, and counted.
#[test]
fn a_head_that_comes_too_slowly_is_given_up() {
    let mut bound = Bound::new("a_head_that_comes_too_slowly");
    let _web = bound.pair.web("http", "");
    bound.configure_client("[timeouts]\nhead_s = 1\nhalf_closed_s = 1\n");
    bound.pair.wait_name("web");
    let script = "import socket\nc = socket.create_connection((NAME, 80), 20)\nc.settimeout(20)\n\
        c.sendall(b'GET / HTTP/1.1\\r\\nHost: a\\r\\n')\n\
        got = b''\nwhile True:\n    part = c.recv(4096)\n    if not part: break\n    got += part\nprint(got.decode())\n";
    let script = script.replace("NAME", &format!("{:?}", mesh_name("web")));
    let host = &bound.pair.client.host;
    let answer = host.python("slow", &script).cgroup("client").ok();
    assert!(
        answer.starts_with("HTTP/1.1 408 ")
            && answer.contains("x-meshwork-reason: http_head_timeout"),
        "{answer}"
    );
    assert_eq!(reached(&bound.pair.client, "head"), 1.0);
    assert_eq!(bound.pair.client.refused("http_head_timeout"), 1.0);
}

/// Four connections that are full make a call wait. A renewed certificate gives them up, and with it nobody who waits.
#[test]
fn a_renewal_takes_calls_along_that_wait_for_room() {
    let mut bound = Bound::new("a_renewal_takes_calls_along");
    let server = &mut bound.pair.server;
    server.stop();
    server.configure("[limits]\nstreams = 1\n");
    server.start();
    bound.configure_client("[timeouts]\nconnect_s = 60\n");
    // Once asked for, the endpoints are on disk too.
    bound.wait_call();
    bound.pair.age_the_clients_leaf();
    let holder = Holder::start(&bound, 9000);
    wait_until("the fifth call to wait", SOON, || {
        let used = used(&bound.pair.client, "callers");
        check(holder.open() == 4 && used == 5.0, holder.process.log())
    });
    assert_eq!(used(&bound.pair.client, "dialled"), 4.0, "one for each");
    bound.pair.control.run();
    bound.pair.wait_for_the_clients_second_leaf();
    // Whoever calls next finds the connections old.
    assert_eq!(bound.call(), "hello");
    wait_until("calls on new connections", SOON, || {
        check(holder.open() >= 5, holder.process.log())
    });
    let log = holder.process.log();
    assert!(!log.contains("refused"), "{log}");
}

/// What can be set, and is set in no other test, holds as it is set. (Which values are refused: `agent/src/config.rs`.)
#[test]
fn settings_other_than_the_defaults_hold() {
    const LINES: &str = "[limits]\nthreads = 2\nhttp_head_bytes = 2048\nstreams = 77\nstream_kib = 64\nconnection_kib = 128\n";
    let mut bound = Bound::new("settings_hold");
    let _web = bound.pair.web("http", "");
    restart(&mut bound.pair.server, LINES);
    bound.configure_client(LINES);
    bound.pair.control.wait_endpoints("shop/web", 1);
    bound.wait_call();
    // Threads.
    for agent in [&bound.pair.client, &bound.pair.server] {
        let tasks = fs::read_dir(format!("/proc/{}/task", agent.worker())).unwrap();
        let names = tasks.map(|task| fs::read_to_string(task.unwrap().path().join("comm")));
        let names: Vec<String> = names.map(|name| name.unwrap_or_default()).collect();
        for name in ["data-0\n", "data-1\n"] {
            assert!(names.iter().any(|n| n == name), "{names:?}");
        }
    }
    // Heads.
    let url = format!("http://{}/", mesh_name("web"));
    for (length, expected) in [(1500, "200"), (2100, "431")] {
        let long = "x".repeat(length);
        let line =
            format!("curl -sS -m 20 -o /dev/null -w '%{{http_code}}' -H 'x-long: {long}' {url}");
        assert_eq!(bound.pair.ok(&line), expected, "{length} bytes");
    }
    assert_eq!(bound.pair.client.refused("http_head_too_large"), 1.0);
    // What the called agent says that it bears.
    let ours = Authority::of_control(&bound.pair.control.state_dir());
    let uid = "00112233445566778899aabbccddeeff";
    let peer = ours.leaf(&[&spiffe("client")], (-1, 1), Some(uid));
    let address = SocketAddr::from((bound.pair.server.host.v4(), MESH_PORT));
    let sni = format!("echo.shop.{TRUST_DOMAIN}");
    let host = &bound.pair.client.host;
    let limits = host.inside(|| announced(address, &sni, &peer));
    assert_eq!(limits.max_streams, 77);
    assert_eq!(limits.stream_credit, 64 << 10);
    assert_eq!(limits.connection_credit, 128 << 10);
    // What the calling agent holds for readers that stand still: two threads with four connections each, at the most.
    let still = Holder::start(&bound, 9001);
    wait_until("readers that stand still", SOON, || {
        check(still.open() >= 20, format!("{}", still.open()))
    });
    still.tell("until");
    let client = &bound.pair.client;
    let (mut last, mut same) = (0.0, 0);
    wait_until("all buffers to be full", SOON, || {
        let held = used(client, "buffers");
        same = if held == last && held > 0.0 {
            same + 1
        } else {
            0
        };
        last = held;
        check(same >= 10, format!("{held} bytes"))
    });
    assert!(last <= 8.0 * f64::from(128 << 10), "{last} bytes");
    bound.wait_call();
}

/// Opens four connections, and a fifth that waits; when `go` exists the fourth one ends.
const FIVE: &str = r#"
import os, socket, threading, time
def call():
    c = socket.create_connection(("NAME", 9000), 20)
    c.settimeout(20)
    c.sendall(b"w")
    assert c.recv(1) == b"w"
    return c
kept = [call() for _ in range(4)]
print("four", flush=True)
def fifth():
    call()
    print("five", flush=True)
thread = threading.Thread(target=fifth)
thread.start()
while not os.path.exists("GO"): time.sleep(0.01)
kept.pop().close()
thread.join()
"#;

/// Who waits for room takes it where it is, on whichever of the four connections.
#[test]
fn a_call_that_waits_has_the_first_room_of_any_connection() {
    let mut bound = Bound::new("a_call_that_waits_has");
    restart(&mut bound.pair.server, "[limits]\nstreams = 1\n");
    bound.configure_client("[timeouts]\nconnect_s = 60\n");
    bound.wait_call();
    let client = &bound.pair.client;
    let go = client.host.dir().join("go");
    let script = FIVE
        .replace("NAME", &mesh_name("echo"))
        .replace("GO", &go.display().to_string());
    let five = client.host.python("five", &script).cgroup("client");
    let five = five.spawn("five");
    wait_until("the fifth call to wait", SOON, || {
        check(used(client, "callers") == 5.0, five.log())
    });
    assert_eq!(used(client, "dialled"), 4.0);
    assert_eq!(five.log(), "four\n");
    fs::write(go, "").unwrap();
    wait_until("the fifth call to go on", SOON, || {
        check(five.log().contains("five"), five.log())
    });
    assert_eq!(reached(client, "streams"), 0.0);
}
