//! What TCP promises two programs holds across the mesh: a reset is a reset at once, an end is an end, silence is not
//! an end, and the kernel watches both programs.

use meshwork_tests::process::{Cmd, Process};
use meshwork_tests::wait::{SOON, check, wait_until};
use nix::sys::signal::Signal;

use crate::pair::{Pair, mesh_name};

/// A server whose ports do each what a test needs, and which says what it sees:
/// 9000 hears and says `reset` or `end`; 9001 never reads, and knows by its socket alone; 9002 sends without end;
/// 9003 takes a word, answers, and resets; 9004 echoes, 9005 is HTTP, 9006 resets at once, and 9007 echoes twelve bytes when it
/// has all of them. Health checks say nothing. The same, 10 higher, is there with a protocol that is not declared.
const SERVER: &str = r#"
import socket, struct, threading, time
def say(*words): print(" ".join(map(str, words)) + "\n", end="", flush=True)
def port(c): return c.getsockname()[1]
def reset(c):
    c.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    c.close()
def hear(c):
    if c.recv(1) == b"": return
    say(port(c), "heard")
    try:
        while c.recv(65536): pass
        say(port(c), "end")
        c.close()
    except ConnectionResetError: say(port(c), "reset")
def ignore(c):
    if c.recv(1, socket.MSG_PEEK) == b"": return
    ended = False
    while not c.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
        CLOSE_WAIT = 8
        if not ended and c.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == CLOSE_WAIT:
            ended = True
            say(port(c), "end")
        time.sleep(0.01)
    say(port(c), "reset")
def flood(c):
    if c.recv(1) == b"": return
    try:
        while True: c.sendall(b"x" * 65536)
    except (ConnectionResetError, BrokenPipeError): say(port(c), "reset")
def answer(c):
    if c.recv(4, socket.MSG_WAITALL) == b"": return
    c.sendall(b"last words")
    c.recv(1)
    reset(c)
def echo(c):
    while True:
        b = c.recv(65536)
        if not b: break
        c.sendall(b)
    c.close()
def whole(c):
    while b := c.recv(12, socket.MSG_WAITALL): c.sendall(b)
kept = []
def serve(port, what):
    s = socket.create_server(("0.0.0.0", port))
    while True:
        c = s.accept()[0]
        kept.append(c)
        threading.Thread(target=what, args=(c,), daemon=True).start()
for number, what in ((9000, hear), (9001, ignore), (9002, flood), (9003, answer), (9004, echo), (9006, reset), (9007, whole)):
    for more in (0, 10): threading.Thread(target=serve, args=(number + more, what)).start()
serve(9005, echo)
"#;

/// What every client begins with.
const CLIENT: &str = r#"
import os, select, socket, struct, sys, time
def connect(port):
    c = socket.create_connection(("NAME", port + MORE), 20)
    c.settimeout(20)
    return c
def reset(c):
    c.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    c.close()
def fill(c):
    "Sends until nothing more is taken, which is when every window on the way is full."
    c.setblocking(False)
    sent = 0
    while True:
        try: sent += c.send(b"y" * 65536)
        except BlockingIOError:
            if not select.select([], [c], [], 1)[1]: return sent
"#;

/// What is added to a port of the server, and how it is declared then.
const PROTOCOLS: [(u16, &str); 2] = [(0, "tcp"), (10, "auto")];

struct Exact {
    pair: Pair,
    server: Process,
}

impl Exact {
    #[track_caller]
    fn new(name: &str) -> Self {
        let pair = Pair::new(name);
        let host = &pair.server.host;
        let server = host.python("exact", SERVER).cgroup("exact").spawn("exact");
        let mut ports = vec![(9005, "http")];
        for (more, protocol) in PROTOCOLS {
            ports.extend(
                [9000, 9001, 9002, 9003, 9004, 9006, 9007].map(|port| (port + more, protocol)),
            );
        }
        for (port, _) in &ports {
            host.wait_listening(*port, SOON);
        }
        pair.server
            .serve("exact", &crate::pair::owner("exact"), &ports);
        pair.control.wait_endpoints("shop/exact", 1);
        pair.wait_name("exact");
        Self { pair, server }
    }

    /// A program of the caller, which must end well; returns what it said.
    #[track_caller]
    fn client(&self, name: &str, more: u16, script: &str) -> String {
        self.command(name, more, script).ok()
    }

    /// It connects to ports that are `more` higher than it says.
    fn command(&self, name: &str, more: u16, script: &str) -> Cmd {
        let begin = CLIENT
            .replace("NAME", &mesh_name("exact"))
            .replace("MORE", &more.to_string());
        let script = begin + script;
        self.pair.client.host.python(name, &script).cgroup("client")
    }

    /// Waits until the server has said this of a port.
    #[track_caller]
    fn wait_said(&self, port: u16, what: &str) {
        let line = format!("{port} {what}\n");
        wait_until(&format!("the server to say {line}"), SOON, || {
            let log = self.server.log();
            check(log.contains(&line), log)
        });
    }
}

#[test]
fn a_reset_of_the_caller_reaches_a_server_that_reads() {
    let exact = Exact::new("reset_reaches_a_server");
    for (more, protocol) in PROTOCOLS {
        let go = exact.pair.client.host.dir().join(protocol);
        let script = format!(
            "c = connect(9000)\nc.sendall(b'a' * 10)\n\
             while not os.path.exists({go:?}): time.sleep(0.01)\nreset(c)\n"
        );
        let _client = exact.command("idle", more, &script).spawn("idle");
        exact.wait_said(9000 + more, "heard");
        std::fs::write(&go, "").unwrap();
        exact.wait_said(9000 + more, "reset");
        let ended = exact.server.log().contains(&format!("{} end", 9000 + more));
        assert!(!ended, "{protocol}: a reset is no end");
        let script = "c = connect(9000)\nc.sendall(b'a' * 10)\nc.shutdown(socket.SHUT_WR)\n\
                      assert c.recv(1) == b''\n";
        exact.client("whole", more, script);
        exact.wait_said(9000 + more, "end");
    }
}

/// The caller's bytes fill every window on the way; nobody reads them, and nobody writes either.
#[test]
fn a_reset_passes_windows_that_are_full() {
    let exact = Exact::new("a_reset_passes_full_windows");
    for (more, _) in PROTOCOLS {
        let script = "c = connect(9001)\nsent = fill(c)\nprint(sent)\nreset(c)\n";
        let text = exact.client("full", more, script);
        let sent: u64 = text.trim().parse().unwrap();
        assert!(sent > 512 * 1024, "the windows were never full: {sent}");
        exact.wait_said(9001 + more, "reset");
    }
}

/// The server sends to a caller that does not read; the caller's reset must not wait behind those bytes.
#[test]
fn a_reset_passes_bytes_that_nobody_reads() {
    let exact = Exact::new("a_reset_passes_unread_bytes");
    let script = r#"
c = connect(9002)
c.sendall(b"a")
# The receive buffer stops growing: all on the way is full.
import fcntl, termios, array
def unread():
    n = array.array("i", [0])
    fcntl.ioctl(c, termios.FIONREAD, n)
    return n[0]
seen, same = -1, 0
while same < 50:
    now = unread()
    same = same + 1 if now == seen and now > 0 else 0
    seen = now
    time.sleep(0.01)
# Closed with bytes unread, it resets by itself.
c.close()
"#;
    for (more, _) in PROTOCOLS {
        exact.client("unread", more, script);
        exact.wait_said(9002 + more, "reset");
    }
}

/// After its own end the caller resets: the server, which says nothing and so would never find out, hears of it.
#[test]
fn a_reset_after_an_end_is_carried_too() {
    let exact = Exact::new("a_reset_after_an_end");
    for (more, protocol) in PROTOCOLS {
        let go = exact.pair.client.host.dir().join(protocol);
        let script = format!(
            "c = connect(9001)\nc.sendall(b'a')\nc.shutdown(socket.SHUT_WR)\n\
             while not os.path.exists({go:?}): time.sleep(0.01)\nreset(c)\n"
        );
        let _client = exact.command("ended", more, &script).spawn("ended");
        exact.wait_said(9001 + more, "end");
        let reset = exact
            .server
            .log()
            .contains(&format!("{} reset", 9001 + more));
        assert!(!reset, "{protocol}: not yet");
        std::fs::write(&go, "").unwrap();
        exact.wait_said(9001 + more, "reset");
    }
}

/// What a server says before it resets arrives, and then the reset, not an end.
#[test]
fn last_words_arrive_before_the_reset() {
    let exact = Exact::new("last_words_arrive");
    let script = r#"
for _ in range(20):
    c = connect(9003)
    c.sendall(b"word")
    got = b""
    while len(got) < 10: got += c.recv(100)
    assert got == b"last words", got
    c.sendall(b"!")
    try:
        print("end", c.recv(100))
        sys.exit(1)
    except ConnectionResetError: pass
print("ok")
"#;
    for (more, protocol) in PROTOCOLS {
        let before = exact.pair.server.refused("app_reset");
        assert_eq!(exact.client("words", more, script), "ok\n", "{protocol}");
        let refused = exact.pair.server.refused("app_reset") - before;
        assert!(refused >= 20.0, "{protocol}: {refused}");
    }
}

/// Urgent bytes are bytes (RFC 6093): they arrive at their place, and what follows them does not wait. That they were
/// urgent is not carried.
#[test]
fn an_urgent_byte_is_not_lost() {
    let exact = Exact::new("an_urgent_byte");
    let script = r#"
def told(c):
    # What is before the mark may be a method of HTTP: what is behind it tells that it is none.
    c.sendall(b"before")
    assert c.send(b"\0", socket.MSG_OOB) == 1
    c.sendall(b"after")
def answered(c):
    got = b""
    while len(got) < 12:
        part = c.recv(100)
        assert part, got
        got += part
    assert got == b"before\0after", got
c = connect(9007)
for _ in range(20):
    told(c)
    answered(c)
c.close()
# The agent waits for the first byte, stands still then, and finds all of them at once.
c = connect(9007)
print("connected", flush=True)
while not os.path.exists(GO): time.sleep(0.01)
told(c)
print("told", flush=True)
answered(c)
print("ok", flush=True)
"#;
    let agent = &exact.pair.client;
    for (more, protocol) in PROTOCOLS {
        let go = agent.host.dir().join(protocol);
        let script = script.replace("GO", &format!("{go:?}"));
        let client = exact.command("urgent", more, &script).spawn(protocol);
        let wait = |word: &str| {
            wait_until(&format!("{protocol}: the word {word}"), SOON, || {
                check(client.log().contains(word), client.log())
            });
        };
        wait("connected");
        let port = 9007 + more;
        wait_until("the connection to the app", SOON, || {
            let filter = format!("ss -Htn state established dport = :{port}");
            let found = exact.pair.server.host.ok(&filter);
            check(!found.is_empty(), found)
        });
        agent.signal_worker(Signal::SIGSTOP);
        std::fs::write(&go, "").unwrap();
        wait("told");
        agent.signal_worker(Signal::SIGCONT);
        wait("ok");
    }
}

/// A server that resets before anybody said a word ended nothing properly.
#[test]
fn a_reset_before_any_word_is_no_end() {
    let exact = Exact::new("a_reset_before_any_word");
    let script = r#"
for _ in range(20):
    # The reset may be there before the connection is seen to stand.
    try: print(connect(9006).recv(1))
    except ConnectionResetError: print("reset")
"#;
    for (more, protocol) in PROTOCOLS {
        let text = exact.client("wordless", more, script);
        assert_eq!(text, "reset\n".repeat(20), "{protocol}");
    }
}

/// A quiet connection outlives the idle time of HTTP several times, and both programs' kernels are asked whether
/// they live.
#[test]
fn silence_does_not_end_a_connection_of_bytes() {
    let mut exact = Exact::new("silence_does_not_end");
    for agent in [&mut exact.pair.client, &mut exact.pair.server] {
        agent.stop();
        agent.configure("[timeouts]\nidle_s = 1\n[keepalive]\nidle_s = 2\ninterval_s = 1\n");
        agent.start();
    }
    exact.pair.control.wait_endpoints("shop/exact", 1);
    exact.pair.wait_name("exact");
    let go = exact.pair.client.host.dir().join("go");
    let script = format!(
        "c = connect(9004)\nc.sendall(b'one')\nassert c.recv(9) == b'one'\nprint('quiet', flush=True)\n\
         for _ in range(4): assert connect(9005).recv(1) == b'', 'HTTP is closed when it is silent'\n\
         while not os.path.exists({go:?}): time.sleep(0.01)\n\
         c.sendall(b'two')\nassert c.recv(9) == b'two'\nprint('ok', flush=True)\n"
    );
    let client = exact.command("quiet", 0, &script).spawn("quiet");
    wait_until("the connection to be quiet", SOON, || {
        check(client.log().contains("quiet"), client.log())
    });
    // The timers of the agents' own ends: of the captured connection and of the one to the app.
    for (agent, filter) in [
        (&exact.pair.client, "sport = :9004"),
        (&exact.pair.server, "dport = :9004"),
    ] {
        let of_agent = format!("pid={},", agent.worker());
        wait_until("the keep-alive timer", SOON, || {
            let text = agent
                .host
                .ok(&format!("ss -Htnop state established '{filter}'"));
            let mut lines = text.lines().filter(|line| line.contains(&of_agent));
            check(
                lines.any(|line| line.contains("timer:(keepalive")),
                text.clone(),
            )
        });
    }
    wait_until("four times the idle time of HTTP", SOON, || {
        let closed = exact.pair.client.metrics();
        let closed = closed.sum("mesh_limit_reached_total", &[("limit", "idle")]);
        check(closed >= 4.0, format!("{closed} of 4; {}", client.log()))
    });
    std::fs::write(&go, "").unwrap();
    wait_until("the connection to go on", SOON, || {
        check(client.log().contains("ok\n"), client.log())
    });
}

/// Where it is set, silence ends a connection of bytes, by a reset with a reason; what moves is not cut, however long.
#[test]
fn an_idle_time_for_bytes_cuts_only_what_is_silent() {
    let mut exact = Exact::new("an_idle_time_for_bytes");
    let agent = &mut exact.pair.client;
    agent.stop();
    agent.configure("[timeouts]\ntcp_idle_s = 1\n");
    agent.start();
    exact.pair.wait_name("exact");
    let script = r#"
quiet, busy = connect(9004), connect(9004)
quiet.sendall(b"x")
assert quiet.recv(1) == b"x"
end, cut = time.monotonic() + 20, None
while cut is None:
    busy.sendall(b"x")
    assert busy.recv(1) == b"x"
    if select.select([quiet], [], [], 0.2)[0]:
        try: cut = quiet.recv(1)
        except ConnectionResetError: cut = "reset"
    assert time.monotonic() < end, "never cut"
began = time.monotonic()
while time.monotonic() < began + 3:
    busy.sendall(b"x")
    assert busy.recv(1) == b"x"
    time.sleep(0.2)
print(cut)
"#;
    assert_eq!(exact.client("moving", 0, script), "reset\n");
    let metrics = exact.pair.client.metrics();
    let counted = metrics.sum("mesh_limit_reached_total", &[("limit", "tcp_idle")]);
    assert_eq!(counted, 1.0);
    assert_eq!(exact.pair.client.refused("timeout"), 1.0);
}
