//! How long a connection to a real address is led to the agent: while its program can write, and not much longer. What is
//! written on one that was forgotten would leave as it is, which each test shows beside.

use meshwork_tests::host::Host;
use meshwork_tests::process::Process;
use meshwork_tests::wait::{SOON, check, wait_until};
use serde_json::Value;

use crate::pair::{Pair, mesh_name};
use crate::real_addresses::{REAL, service, wait_taken};

/// A user that is no workload.
const OTHER: u32 = 20_001;
const PORT: u16 = 9000;

/// Answers each word; one that begins with `h` keeps its side open when the caller ends.
const SERVER: &str = r#"
import socket, threading, time
def serve(c):
    keep = False
    try:
        while b := c.recv(65536):
            keep = keep or b[:1] == b"h"
            c.sendall(b)
        while keep: time.sleep(1)
    except OSError: pass
    c.close()
s = socket.create_server(("0.0.0.0", 9000))
while True: threading.Thread(target=serve, args=(s.accept()[0],), daemon=True).start()
"#;

/// Says a word on each of these connections, ends some, and keeps all.
const CALLER: &str = r#"
import os, socket, struct, time
kept = []
for kind in ["open", "half", "over", "reset"]:
    c = socket.create_connection((os.environ["TO"], 9000), 20)
    c.sendall(b"h" if kind in ("open", "half") else b"e")
    c.recv(10)
    port = c.getsockname()[1]
    if kind in ("half", "over"): c.shutdown(socket.SHUT_WR)
    if kind == "over": c.recv(10)
    if kind == "reset":
        c.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        c.close()
    kept.append(c)
    print(kind, port, flush=True)
time.sleep(1000)
"#;

/// Says a word, and what it hears.
const WORD: &str = r#"
import os, socket
c = socket.create_connection((os.environ["TO"], 9000), 10)
c.settimeout(10)
c.sendall(os.environ["WORD"].encode())
print(c.recv(100).decode())
"#;

struct Real {
    pair: Pair,
    address: String,
    _server: Process,
}

impl Real {
    /// The service `shop/echo`, taken over at the server's address.
    fn new(name: &str) -> Self {
        let pair = Pair::new(name);
        let host = &pair.server.host;
        let server = host.python("echo", SERVER).cgroup("echo").spawn("echo");
        host.wait_listening(PORT, SOON);
        pair.declare("echo", PORT, "tcp");
        let address = host.v4().to_string();
        let echo = "{port: 9000, appProtocol: tcp}";
        pair.control.apply(&service("echo", echo, REAL)).ok();
        wait_taken(&pair.client.host, &address, true);
        Self {
            pair,
            address,
            _server: server,
        }
    }
}

/// For how many seconds the flow of a port stays in a set, if it is there.
fn stays(host: &Host, table: &str, set: &str, port: u64) -> Option<u64> {
    let whole = listed(host, table, set);
    let parts = whole["nftables"].as_array()?.iter();
    let elements = parts.filter_map(|part| part["set"]["elem"].as_array());
    let mut flows = elements.flatten().map(|element| &element["elem"]);
    let found = flows.find(|flow| flow["val"]["concat"][1] == port)?;
    found["expires"].as_u64()
}

fn listed(host: &Host, table: &str, set: &str) -> Value {
    let text = host.ok(&format!("nft -j list set inet {table} {set}"));
    serde_json::from_str(&text).unwrap()
}

#[track_caller]
fn port_of(process: &Process, kind: &str) -> u64 {
    let port = wait_until(&format!("the connection `{kind}`"), SOON, || {
        let log = process.log();
        let mut words = log.lines().filter_map(|line| line.split_once(' '));
        let found = words.find(|(word, _)| *word == kind);
        found.map(|(_, port)| port.to_owned()).ok_or(log)
    });
    port.parse().unwrap()
}

/// A program that does not read makes its kernel say something every two minutes only; one that is silent, every minute.
#[test]
fn a_flow_is_known_while_it_can_be_written_to_and_not_for_long_after() {
    let real = Real::new("a_flow_is_known_while_it_can_be_written_to");
    let host = &real.pair.client.host;
    let caller = host.python("caller", CALLER).cgroup("client");
    let caller = caller.env("TO", &real.address).spawn("caller");
    let last = port_of(&caller, "reset");
    for table in ["meshwork", "meshwork_guard"] {
        for kind in ["open", "half"] {
            let port = port_of(&caller, kind);
            let left = stays(host, table, "carried4", port);
            assert!(
                left.is_some_and(|left| 240 < left),
                "{table} {kind}: {left:?}"
            );
        }
        for port in [port_of(&caller, "over"), last] {
            wait_until("what is over to be forgotten", SOON, || {
                let left = stays(host, table, "carried4", port);
                assert!(left.is_none_or(|left| left <= 10), "{table}: {left:?}");
                check(left.is_none(), format!("{left:?}"))
            });
        }
    }
    let half = port_of(&caller, "half");
    assert!(stays(host, "meshwork", "ended4", half).is_some());
    let over = port_of(&caller, "over");
    assert_eq!(stays(host, "meshwork", "ended4", over), None);
}

/// Says `SAYS`, hears until the end, waits until its connection is in state `UNTIL`, and writes on it.
const LATE: &str = r#"
import codecs, os, socket, time
c = socket.create_connection((os.environ["TO"], int(os.environ["PORT"])), 30)
c.settimeout(30)
c.sendall(codecs.decode(os.environ["SAYS"], "unicode_escape").encode("latin1"))
try:
    while c.recv(4096): pass
except OSError as error: print("broken", error)
state = lambda: c.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
end = time.monotonic() + 30
while state() != int(os.environ["UNTIL"]):
    if end < time.monotonic(): raise SystemExit("state %d" % state())
    time.sleep(0.01)
try:
    c.sendall(b"a late word")
    print("written")
except OSError as error: print("dead")
"#;
const CLOSED: &str = "7";
const CLOSE_WAIT: &str = "8";

/// However the agent ends a connection, its program can write no more on it: not when the flow is forgotten either.
#[test]
fn what_the_agent_has_ended_can_not_be_written_to() {
    let mut pair = Pair::new("what_the_agent_has_ended_can_not_be_written");
    let _web = pair.web("http", "");
    let _two = meshwork_tests::servers::nginx(
        &pair.server.host,
        "two",
        81,
        "location / { return 200 \"two\\n\"; }",
    );
    pair.declare("two", 81, "http2");
    pair.client.stop();
    pair.client.configure("[timeouts]\nidle_s = 1\n");
    pair.client.start();
    for (name, port) in [
        ("web", "{port: 80, appProtocol: http}"),
        ("two", "{port: 81, appProtocol: http2}"),
    ] {
        pair.control.apply(&service(name, port, REAL)).ok();
    }
    let address = pair.server.host.v4().to_string();
    wait_taken(&pair.client.host, &format!("{address} . 80"), true);
    wait_taken(&pair.client.host, &format!("{address} . 81"), true);
    let host = &pair.client.host;
    let late = |to: &str, port: &str, says: &str, until: &str| {
        let script = host.python("late", LATE).cgroup("client");
        let script = script.env("TO", to).env("PORT", port).env("SAYS", says);
        script.env("UNTIL", until).output().stdout
    };
    let silent = "GET / HTTP/1.1\\r\\nHost: a\\r\\n\\r\\n";
    let last = "GET / HTTP/1.1\\r\\nHost: a\\r\\nConnection: close\\r\\n\\r\\n";
    let malformed = "GET / HTTP/1.1\\r\\nno field\\r\\n\\r\\n";
    let preface = "PRI * HTTP/2.0\\r\\n\\r\\nSM\\r\\n\\r\\n\\0\\0\\0\\4\\0\\0\\0\\0\\0";
    for (port, says) in [
        ("80", silent),
        ("80", last),
        ("80", malformed),
        ("81", preface),
    ] {
        let said = late(&address, port, says, CLOSED);
        assert!(said.ends_with("dead\n"), "{says}: {said}");
        // At a virtual address, whose packets never leave, an end is an end: there the same word can be written.
        let name = mesh_name(if port == "80" { "web" } else { "two" });
        assert_eq!(late(&name, port, says, CLOSE_WAIT), "written\n", "{says}");
    }
}

/// Says a word on its connection when a file of that name is there.
const ASKED: &str = r#"
import os, socket, time
c = socket.create_connection((os.environ["TO"], 9000), 20)
print("port", c.getsockname()[1], flush=True)
for word in ["the-first-word", "the-last-word"]:
    while not os.path.exists(os.environ["DIR"] + "/" + word): time.sleep(0.01)
    c.sendall(word.encode())
    if word == "the-first-word": c.recv(100)
    print("said", word, flush=True)
time.sleep(1000)
"#;

/// Another program's change of the tables makes the guard be written anew: what it knows of connections stays, so that
/// one whose agent dies right then, and that does not hear of it, says nothing in plaintext.
#[test]
fn the_guard_goes_on_knowing_what_is_open_when_it_is_put_back() {
    let mut real = Real::new("the_guard_goes_on_knowing_what_is_open");
    let pair = &mut real.pair;
    let host = pair.client.host.clone();
    let dir = host.subdir("asked", None);
    let asked = host.python("asked", ASKED).cgroup("client");
    let asked = asked.env("TO", &real.address);
    let asked = asked.env("DIR", &dir.display().to_string()).spawn("asked");
    let say = |word: &str| {
        std::fs::write(dir.join(word), "").unwrap();
        wait_until(&format!("{word} to be said"), SOON, || {
            let log = asked.log();
            check(log.contains(&format!("said {word}")), log)
        });
    };
    say("the-first-word");
    let port = port_of(&asked, "port");
    let server = pair.server.host.clone();
    let file = server.dir().join("wire.pcap");
    let line = format!("exec tcpdump -i eth0 -U -s 0 -Z root -w {}", file.display());
    let wire = server.cmd(&line).spawn("wire");
    wait_until("tcpdump to listen", SOON, || {
        check(wire.log().contains("listening on"), wire.log())
    });
    let on_wire = |word: &str| {
        let bytes = std::fs::read(&file).unwrap_or_default();
        bytes.windows(word.len()).any(|w| w == word.as_bytes())
    };
    let knows = |when: &str| {
        wait_until(&format!("the guard to know it {when}"), SOON, || {
            let tables = host.ok("nft list tables");
            check(tables.contains("meshwork_guard"), &tables)?;
            let known = stays(&host, "meshwork_guard", "carried4", port);
            check(known.is_some(), "it does not")
        });
    };
    knows("from its packets");
    host.ok("nft flush ruleset");
    knows("again, though nothing was said meanwhile");
    let rules = || host.ok("nft -a list chain inet meshwork_guard guard_out");
    let before = rules();
    // The program hears nothing of its agent any more, nor that it died.
    let deaf = format!(
        "nft 'add table inet deaf; add chain inet deaf in {{ type filter hook input priority -300; }}; \
         add rule inet deaf in iif lo tcp sport {PORT} drop'"
    );
    host.ok(&deaf);
    wait_until("the guard to be written anew", SOON, || {
        check(rules() != before, rules())
    });
    assert!(stays(&host, "meshwork_guard", "carried4", port).is_some());
    pair.client.kill9();
    say("the-last-word");
    // What is on the wire after it shows that the wire was looked at until then.
    let marker = "a-marker-on-the-wire";
    let after = host.python("after", WORD).env("TO", &real.address);
    after.env("WORD", marker).output();
    wait_until("the marker on the wire", SOON, || {
        check(on_wire(marker), "not yet")
    });
    assert!(!on_wire("the-last-word"), "it left in plaintext");
    // What it was spared: a guard that has forgotten.
    host.ok("nft flush set inet meshwork_guard carried4");
    wait_until("the word to leave without a guard", SOON, || {
        check(on_wire("the-last-word"), "not yet")
    });
}

/// Whoever opens connections to real addresses without end is refused beyond its share, and fills no set that others need.
#[test]
fn a_flood_of_connections_to_real_addresses_locks_nobody_out() {
    const FLOOD: &str = r#"
import errno, os, socket, struct
refused = 0
for n in range(1, 10**9):
    c = socket.socket()
    c.setblocking(False)
    c.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    if c.connect_ex((os.environ["TO"], 9000)) in (errno.ECONNREFUSED, errno.EPERM): refused += 1
    elif c.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNREFUSED: refused += 1
    c.close()
    if n % 1000 == 0: print("refused", refused, "of", n, flush=True)
"#;
    let real = Real::new("a_flood_of_connections_to_real_addresses");
    let pair = &real.pair;
    let host = &pair.client.host;
    let flood = |number: &str| {
        let flood = host.python("flood", FLOOD).env("TO", &real.address);
        flood.user(OTHER).cgroup("flood").spawn(number)
    };
    let floods = ["flood1", "flood2"].map(flood);
    let shed = || {
        let metrics = pair.client.metrics();
        metrics.sum("mesh_limit_reached_total", &[("limit", "dials")])
    };
    wait_until("the flood to be shed", SOON * 2, || {
        check(shed() > 100.0, format!("{}: {}", shed(), floods[0].log()))
    });
    let call = || {
        let call = host.python("word", WORD).env("TO", &real.address);
        call.env("WORD", "a word")
    };
    for _ in 0..5 {
        assert_eq!(call().cgroup("client").ok(), "a word\n");
        assert_eq!(call().user(OTHER + 1).ok(), "a word\n");
    }
    // What they were spared: who shares with the flood, being its user, is refused.
    wait_until("a call of the user who floods to be refused", SOON, || {
        let output = call().user(OTHER).output();
        check(!output.stdout.contains("a word"), output.to_string())
    });
}
