//! Every bound of docs/reference.md that is not seen in `bounds.rs`, driven until it bites: it is counted under its name,
//! whoever is refused hears why, and what is open goes on.

use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;

use meshwork_tests::agent::MESH_PORT;
use meshwork_tests::control::TRUST_DOMAIN;
use meshwork_tests::host::Host;
use meshwork_tests::mesh::{Authority, ask_without_reading};
use meshwork_tests::process::{Cmd, Process};
use meshwork_tests::servers;
use meshwork_tests::wait::{SOON, check, wait_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::bounds::{reached, used};
use crate::http2;
use crate::pair::{Pair, mesh_name, owner, spiffe};

const APP: &str = include_str!("limits/app.py");
const OPEN: &str = include_str!("limits/open.py");

pub(crate) const ECHO: u16 = 9000;
pub(crate) const HTTP: u16 = 8000;
/// HTTP/2 is declared and not served.
pub(crate) const PORTS: [(u16, &str); 3] = [(ECHO, "tcp"), (HTTP, "http"), (8081, "http2")];

/// A pair whose `shop/app` echoes and speaks HTTP.
pub(crate) struct Rig {
    pub(crate) pair: Pair,
    pub(crate) app: Process,
}

impl Rig {
    /// With these lines in the configurations of the client's and the server's agent.
    #[track_caller]
    pub(crate) fn new(name: &str, client: &str, server: &str) -> Self {
        let mut pair = Pair::new(name);
        for (agent, lines) in [(&mut pair.client, client), (&mut pair.server, server)] {
            if !lines.is_empty() {
                agent.stop();
                agent.configure(lines);
                agent.start();
            }
        }
        let app = app(&pair.server.host, "app", ECHO, HTTP);
        pair.server.serve("app", &owner("app"), &PORTS);
        pair.control.wait_endpoints("shop/app", 1);
        pair.wait_name("app");
        Self { pair, app }
    }

    /// A program of the client's host, in this cgroup, with an open connection.
    #[track_caller]
    pub(crate) fn open(&self, name: &str, cgroup: &str) -> Open {
        let open = self.begin(name, cgroup, "app", ECHO);
        open.wait("open");
        open
    }

    /// The same, which may not be open yet.
    fn begin(&self, name: &str, cgroup: &str, service: &str, port: u16) -> Open {
        let host = &self.pair.client.host;
        let go = host.dir().join(format!("{name}-go"));
        let process = to(host, name, service, port)
            .cgroup(cgroup)
            .env("GO", &go.display().to_string())
            .spawn(name);
        Open { process, go }
    }

    /// A connection to the echo of `service`: `open`, or how it failed.
    #[track_caller]
    pub(crate) fn once(&self, cgroup: &str, service: &str, port: u16) -> String {
        let command = to(&self.pair.client.host, "once", service, port);
        command.cgroup(cgroup).ok().trim().to_owned()
    }

    #[track_caller]
    pub(crate) fn wait_once(&self, cgroup: &str) {
        wait_until("a call to go through", SOON, || {
            let outcome = self.once(cgroup, "app", ECHO);
            check(outcome == "open", outcome)
        });
    }

    /// One HTTP request of `shop/client`: status and reason, or body.
    #[track_caller]
    pub(crate) fn get(&self, path: &str) -> String {
        answer(&self.curl(path).ok())
    }

    /// The same, to be run.
    pub(crate) fn curl(&self, path: &str) -> Cmd {
        let line = format!("curl -sS -i -m 60 http://{}:{HTTP}{path}", mesh_name("app"));
        self.pair.cmd(&line).deadline(SOON * 2)
    }

    /// Lets the app answer `/wait/<name>`.
    pub(crate) fn answer(&self, name: &str) {
        fs::write(self.pair.server.host.dir().join(name), "").unwrap();
    }

    /// Waits until the app has said this so often.
    #[track_caller]
    pub(crate) fn wait_said(&self, what: &str, times: usize) {
        wait_until(
            &format!("the app to say `{what}` {times} times"),
            SOON,
            || {
                let log = self.app.log();
                check(log.matches(what).count() >= times, log)
            },
        );
    }
}

/// The app in the cgroup `name`; it answers with the host's name.
#[track_caller]
pub(crate) fn app(host: &Host, name: &str, echo: u16, http: u16) -> Process {
    let command = host.python(name, APP).cgroup(name);
    let app = command
        .env("DIR", &host.dir().display().to_string())
        .env("NAME", host.name())
        .env("ECHO", &echo.to_string())
        .env("HTTP", &http.to_string())
        .spawn(name);
    host.wait_listening(echo, SOON);
    host.wait_listening(http, SOON);
    app
}

fn to(host: &Host, name: &str, service: &str, port: u16) -> Cmd {
    let command = host.python(name, OPEN).env("TO", &mesh_name(service));
    command.env("PORT", &port.to_string())
}

/// What `curl -i` wrote: the status with the reason, or of a 200 the body.
pub(crate) fn answer(text: &str) -> String {
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or((text, ""));
    let status = head.split(' ').nth(1).unwrap_or("none");
    if status == "200" {
        return body.trim().to_owned();
    }
    let reason = head
        .lines()
        .find_map(|line| line.strip_prefix("x-meshwork-reason: "));
    format!("{status} {}", reason.unwrap_or("without a reason"))
}

/// A program with an open connection.
pub(crate) struct Open {
    process: Process,
    pub(crate) go: PathBuf,
}

impl Open {
    #[track_caller]
    pub(crate) fn wait(&self, what: &str) {
        wait_until(&format!("a program to say `{what}`"), SOON, || {
            let log = self.process.log();
            check(log.contains(what), log)
        });
    }

    pub(crate) fn go(&self) {
        fs::write(&self.go, "").unwrap();
    }

    /// The connection carries on, and ends as its two programs end it.
    #[track_caller]
    pub(crate) fn goes_on(&self) {
        self.go();
        self.wait("went on to its end");
    }
}

fn signal(pid: u32, signal: Signal) {
    kill(Pid::from_raw(i32::try_from(pid).unwrap()), signal).unwrap();
}

/// Control says nothing for a while. A call whose endpoints it has to say waits as long as it may, and as many wait as
/// may; calls of what is known go on, and those that waited go through when control is back.
#[test]
fn calls_that_wait_for_control_are_bounded_in_time_and_number() {
    let mut rig = Rig::new(
        "held_calls",
        "[limits]\nheld = 2\n[timeouts]\nhold_s = 20\n",
        "",
    );
    let names = ["late", "later"];
    let _apps = [(9100, 9101), (9200, 9201)]
        .iter()
        .zip(names)
        .map(|((echo, http), name)| {
            let app = app(&rig.pair.server.host, name, *echo, *http);
            rig.pair.declare(name, *echo, "tcp");
            app
        })
        .collect::<Vec<_>>();
    assert_eq!(rig.get("/"), "server");
    let old = rig.open("old", "client");
    let control = rig.pair.control.take();
    control.signal(Signal::SIGSTOP);
    let held = ["one", "two"].map(|name| rig.begin(name, "client", "late", 9100));
    let client = &rig.pair.client;
    wait_until("two calls to be held", SOON, || {
        let held = used(client, "held");
        check(held == 2.0, format!("{held} are held"))
    });
    assert_eq!(rig.once("client", "late", 9100), "ConnectionResetError");
    // Reset before it knew that it was connected, a client tries the other family, too.
    let refused = reached(client, "held");
    assert!((1.0..=2.0).contains(&refused), "{refused}");
    assert_eq!(client.refused("too_many_held"), refused);
    assert_eq!(rig.get("/"), "server", "what is known is called");
    control.signal(Signal::SIGCONT);
    for call in held {
        call.wait("open");
        call.goes_on();
    }
    old.goes_on();
    assert_eq!(reached(client, "hold"), 0.0);
    assert_eq!(used(client, "held"), 0.0);

    let client = &mut rig.pair.client;
    client.stop();
    client.configure("[timeouts]\nhold_s = 1\n");
    client.start();
    wait_until("the session", SOON, || {
        let status = rig.pair.client.command("status").ok();
        check(status.contains("live at"), status)
    });
    control.signal(Signal::SIGSTOP);
    assert_eq!(rig.once("client", "later", 9200), "ConnectionResetError");
    let client = &rig.pair.client;
    assert_eq!(reached(client, "hold"), 1.0);
    assert_eq!(client.refused("endpoints_unknown"), 1.0);
    assert_eq!(rig.get("/"), "server");
    control.signal(Signal::SIGCONT);
    wait_until("the other service to be called", SOON, || {
        let outcome = rig.once("client", "later", 9200);
        check(outcome == "open", outcome)
    });
}

/// The called agent has room for two calls and for two other agents, of which each identity is one.
#[test]
fn more_calls_and_more_peers_than_are_allowed_are_refused() {
    let rig = Rig::new("calls_and_peers", "", "[limits]\nconnections = 2\n");
    let (client, server) = (&rig.pair.client, &rig.pair.server);
    client.serve("other", &owner("other"), &[]);
    wait_until("the other workload to be known", SOON, || {
        rig.once("other", "app", ECHO);
        let calls = rig.pair.calls(&spiffe("other"), "shop/app");
        check(calls >= 1.0, "it is not")
    });
    let open = ["one", "two"].map(|name| rig.open(name, "client"));
    assert_eq!(used(server, "calls"), 2.0);
    let before = client.refused("overloaded");
    assert_eq!(rig.once("client", "app", ECHO), "ConnectionResetError");
    assert_eq!(rig.get("/"), "503 overloaded");
    assert!(reached(server, "calls") >= 2.0);
    assert!(client.refused("overloaded") >= before + 2.0);
    assert!(server.refused("overloaded") >= 2.0);
    // The two identities have a connection each; that of the host itself would be the third.
    assert_eq!(rig.once("other", "app", ECHO), "ConnectionResetError");
    wait_until("two peers", SOON, || {
        let peers = used(server, "peers");
        check(peers == 2.0, format!("{peers}"))
    });
    let before = reached(server, "peers");
    assert_eq!(rig.once("shell", "app", ECHO), "ConnectionResetError");
    assert!(reached(server, "peers") > before);
    assert!(client.refused("peer_handshake") >= 1.0);
    let status = server.command("status").ok();
    assert!(status.contains("peers 2 of 2"), "{status}");
    for call in open {
        call.goes_on();
    }
    rig.wait_once("client");
}

/// Says nothing on so many connections to a mesh port, and tells how each ended.
const SILENT: &str = r#"
import os, socket
kept = [socket.create_connection((os.environ["TO"], 7441), 20) for _ in range(300)]
print("open", flush=True)
ends = {}
for c in kept:
    c.settimeout(60)
    try: end = "data" if c.recv(1) else "closed"
    except ConnectionResetError: end = "reset"
    ends[end] = ends.get(end, 0) + 1
print("ends", ends.get("reset", 0), ends.get("closed", 0), flush=True)
"#;

/// Who begins handshakes and does not go on has its share of them, for a time; others come in meanwhile. An agent that falls
/// silent is given up, with what is open to it and nothing else.
#[test]
fn handshakes_and_silence_are_bounded_at_both_sides() {
    let server = "[timeouts]\nhandshake_s = 3\n";
    let client = format!("{server}[keepalive]\npeer_s = 3\n");
    let mut rig = Rig::new("handshakes", &client, server);
    let (client, server) = (&rig.pair.client, &rig.pair.server);
    let _near = servers::nginx(
        &client.host,
        "near",
        80,
        "location / { return 200 \"near\\n\"; }",
    );
    client.serve("near", &owner("near"), &[(80, "http")]);
    rig.pair.control.wait_endpoints("shop/near", 1);
    rig.pair.wait_name("near");
    let old = rig.open("old", "client");
    let stranger = rig.pair.site.host("stranger");
    let silent = stranger
        .python("silent", SILENT)
        .env("TO", &server.host.v4().to_string())
        .spawn("silent");
    let wait_silent = |what: &str| {
        wait_until(&format!("the stranger to say {what}"), SOON, || {
            check(silent.log().contains(what), silent.log())
        });
    };
    wait_silent("open");
    // Another identity than the one whose connection stands: a handshake of its own.
    assert_eq!(rig.once("shell", "app", ECHO), "open");
    wait_silent("ends");
    let log = silent.log();
    let ends = log.lines().find_map(|line| line.strip_prefix("ends "));
    let mut ends = ends.unwrap().split(' ').map(|n| n.parse::<f64>().unwrap());
    let (reset, closed) = (ends.next().unwrap(), ends.next().unwrap());
    assert!(reset >= 1.0 && reset + closed == 300.0, "{log}");
    assert_eq!(reached(server, "handshakes"), reset);
    assert_eq!(server.refused("overloaded"), reset);
    assert_eq!(reached(server, "handshake"), closed);
    assert_eq!(server.refused("timeout"), closed);
    old.goes_on();

    // The other way round: the called agent takes the connection and says nothing. HTTP/2 that does not begin, too.
    rig.pair.client.stop();
    rig.pair.client.start();
    rig.pair.wait_name("app");
    rig.pair.control.wait_endpoints("shop/near", 1);
    let (client, server) = (&rig.pair.client, &rig.pair.server);
    let script = "import os, socket\nc = socket.create_connection((os.environ['TO'], 8081), 20)\nc.settimeout(60)\n\
                  try:\n    while c.recv(100): pass\nexcept ConnectionResetError: pass\n";
    let preface = client.host.python("preface", script);
    let preface = preface.env("TO", &mesh_name("app")).cgroup("client");
    preface.deadline(SOON * 2).ok();
    assert_eq!(reached(client, "handshake"), 1.0);
    assert_eq!(client.refused("timeout"), 1.0);
    let silent = rig.open("silent", "shell");
    let worker = server.worker();
    signal(worker, Signal::SIGSTOP);
    assert_eq!(rig.once("client", "app", ECHO), "ConnectionResetError");
    assert_eq!(reached(client, "handshake"), 2.0);
    assert_eq!(client.refused("peer_handshake"), 1.0);
    let near = format!("curl -sS -m 20 http://{}/", mesh_name("near"));
    assert_eq!(rig.pair.ok(&near), "near\n");
    wait_until("the silence to be too long", SOON, || {
        let silences = reached(client, "peer_silence");
        check(silences == 1.0, format!("{silences}"))
    });
    assert_eq!(client.refused("peer_lost"), 1.0);
    silent.go();
    silent.wait("ConnectionResetError");
    assert_eq!(rig.pair.ok(&near), "near\n");
    signal(worker, Signal::SIGCONT);
    rig.wait_once("client");
}

/// Listens, and takes nothing once `FULL` is there and its queue holds what it may.
const FULL: &str = r#"
import os, socket, time
s = socket.socket()
s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
s.bind(("0.0.0.0", 9300))
s.listen(0)
kept = []
while True:
    c = socket.socket()
    c.settimeout(2)
    try: c.connect(("127.0.0.1", 9300))
    except OSError: break
    kept.append(c)
print("full", flush=True)
while True: time.sleep(60)
"#;

/// Neither an agent nor an app that does not answer is waited for longer than is allowed.
#[test]
fn connections_that_do_not_come_to_stand_are_given_up() {
    let times = "[timeouts]\nconnect_s = 1\n";
    let rig = Rig::new("connect", times, times);
    let (client, server) = (&rig.pair.client, &rig.pair.server);
    let full = server.host.python("full", FULL).cgroup("full");
    let full = full.spawn("full");
    wait_until("the app to be full", SOON, || {
        check(full.log().contains("full"), full.log())
    });
    let file = format!(
        "namespace = \"shop\"\n[owner]\n{}\n[[service]]\nports = [{{ port = 9300, protocol = \"tcp\" }}]\n",
        server.owner_line(&owner("full"))
    );
    server.write_file("full.toml", &file);
    rig.pair.control.wait_endpoints("shop/full", 1);
    rig.pair.wait_name("full");
    let old = rig.open("old", "shell");
    assert_eq!(rig.once("shell", "full", 9300), "ConnectionResetError");
    assert_eq!(reached(server, "connect"), 1.0);
    assert_eq!(server.refused("app_unreachable"), 1.0);
    assert_eq!(client.refused("app_unreachable"), 1.0);
    // No new connection between the agents comes to stand.
    let host = &server.host;
    host.ok("nft add table inet wall");
    host.ok("nft 'add chain inet wall in { type filter hook input priority -300; }'");
    host.ok("nft 'add rule inet wall in tcp dport 7441 tcp flags & (syn | ack) == syn drop'");
    assert_eq!(rig.get("/"), "503 peer_unreachable");
    assert_eq!(reached(client, "connect"), 1.0);
    assert_eq!(client.refused("peer_unreachable"), 1.0);
    old.goes_on();
    host.ok("nft delete table inet wall");
    assert_eq!(rig.get("/"), "server");
}

/// An HTTP caller that ended its side gets its answer when that comes in time; else the call is given up, and others
/// that wait as long go on. Connections to an app are kept for the next request, so many.
#[test]
fn half_closed_callers_and_kept_connections_are_bounded() {
    let rig = Rig::new("half_closed", "[timeouts]\nhalf_closed_s = 3\n", "");
    let (client, server) = (&rig.pair.client, &rig.pair.server);
    let waits = rig.curl("/wait/whole").spawn("waits");
    rig.wait_said("GET /wait/whole", 1);
    let script = "import os, socket\nc = socket.create_connection((os.environ['TO'], 8000), 20)\nc.settimeout(20)\n\
                  c.sendall(b'GET ' + os.environ['PATH_'].encode() + b' HTTP/1.1\\r\\nHost: a\\r\\n\\r\\n')\n\
                  c.shutdown(socket.SHUT_WR)\n\
                  try: print(c.recv(15))\nexcept ConnectionResetError: print('reset')\n";
    let half = |path: &str| {
        let command = client.host.python("half", script).cgroup("client");
        let command = command.env("TO", &mesh_name("app")).env("PATH_", path);
        command.ok()
    };
    assert_eq!(half("/"), "b'HTTP/1.1 200 OK'\n");
    assert_eq!(reached(client, "half_closed"), 0.0);
    assert_eq!(half("/wait/half"), "reset\n");
    assert_eq!(reached(client, "half_closed"), 1.0);
    rig.answer("whole");
    wait_until("the other answer", SOON, || {
        check(answer(&waits.log()) == "server", waits.log())
    });
    rig.answer("half");

    // The worker that comes has 44 descriptors beyond its own, of which a fifth is for what is kept.
    let worker = server.worker();
    let holder = server.pids().into_iter().find(|pid| *pid != worker);
    let line = format!("prlimit --pid {} --nofile=300:300", holder.unwrap());
    server.host.ok(&line);
    signal(worker, Signal::SIGKILL);
    wait_until("a new worker", SOON, || {
        let pids = server.pids();
        check(
            pids.len() == 2 && !pids.contains(&worker),
            format!("{pids:?}"),
        )
    });
    wait_until("calls to go through", SOON, || {
        let got = rig.get("/");
        check(got == "server", got)
    });
    let many: Vec<Process> = (0..12)
        .map(|n| rig.curl("/wait/many").spawn(&format!("many-{n}")))
        .collect();
    rig.wait_said("GET /wait/many", 12);
    assert_eq!(reached(server, "kept_apps"), 0.0);
    rig.answer("many");
    for one in &many {
        wait_until("an answer", SOON, || {
            check(answer(&one.log()) == "server", one.log())
        });
    }
    wait_until("four connections more than are kept", SOON, || {
        let closed = reached(server, "kept_apps");
        check(closed == 4.0, format!("{closed}"))
    });
    assert_eq!(rig.get("/"), "server");
}

/// An app that takes one request on each connection gets eight of them; who comes then waits, not for ever, and has its turn
/// when another is through.
#[test]
fn requests_that_wait_for_an_app_are_bounded_in_time() {
    let rig = Rig::new("http2_apps", "", "[timeouts]\nconnect_s = 2\n");
    let _app = http2::serve(&rig.pair.server.host, &[("STREAMS", "1")]);
    rig.pair.declare("h2", 8080, "http2");
    let text = http2::run(
        &rig.pair,
        "\
c = Client()
waiting = [c.open('/wait') for _ in range(8)]
begun = 0
for event in c.events():
    begun += isinstance(event, ev.DataReceived)
    if begun == 8: break
c.flush()
head = c.get('/number')[0]
print(head[':status'], head['x-meshwork-reason'])
c.h2.reset_stream(waiting[0], 8)
c.flush()
print(c.get('/')[1])
",
    );
    assert_eq!(text, "503 overloaded\nb'hello'\n");
    let server = &rig.pair.server;
    assert_eq!(reached(server, "http2_apps"), 1.0);
    assert_eq!(server.refused("overloaded"), 1.0);
    assert_eq!(rig.get("/"), "server");
}

/// Another agent that asks and does not read is given up; the rest of them is served.
#[test]
fn an_agent_that_asks_and_never_reads_is_given_up_and_counted() {
    let rig = Rig::new("control_frames", "", "");
    let server = &rig.pair.server;
    let old = rig.open("old", "client");
    let ours = Authority::of_control(&rig.pair.control.state_dir());
    let uid = "00112233445566778899aabbccddeeff";
    let hostile = ours.leaf(&[&spiffe("hostile")], (-1, 1), Some(uid));
    let address = SocketAddr::from((server.host.v4(), MESH_PORT));
    let sni = format!("app.shop.{TRUST_DOMAIN}");
    let host = &rig.pair.client.host;
    host.inside(|| ask_without_reading(address, &sni, &hostile));
    wait_until("the bound to be counted", SOON, || {
        let times = reached(server, "control_frames");
        check(times == 1.0, format!("{times}"))
    });
    assert!(server.log().contains("more control frames are asked for"));
    old.goes_on();
}

/// An agent with as many connections to other agents as it may have refuses the call that needs one more, and gives up
/// those that carry nothing, so that the next one finds room. The one that carries a call stays.
#[test]
fn more_connections_to_agents_than_are_allowed_are_refused() {
    let rig = Rig::new("dialled", "[limits]\nconnections = 2\n", "");
    let server = &rig.pair.server.host;
    let _apps = [("b", 9101, 8001), ("c", 9102, 8002)].map(|(name, echo, http)| {
        let app = app(server, name, echo, http);
        rig.pair.declare(name, http, "http");
        app
    });
    let get = |service: &str, port: u16| {
        let url = format!("http://{}:{port}/", mesh_name(service));
        answer(&rig.pair.ok(&format!("curl -sS -i -m 30 {url}")))
    };
    let client = &rig.pair.client;
    let old = rig.open("old", "client");
    assert_eq!(get("b", 8001), "server");
    assert_eq!(used(client, "dialled"), 2.0);
    assert_eq!(get("c", 8002), "503 overloaded");
    assert_eq!(reached(client, "dialled"), 1.0);
    assert_eq!(client.refused("overloaded"), 1.0);
    wait_until("room for another", SOON, || {
        let got = get("c", 8002);
        check(got == "server", got)
    });
    assert_eq!(used(client, "dialled"), 2.0);
    old.goes_on();
}

/// The called agent bears two calls on a connection, and four connections are made to it: the ninth call waits for room, not
/// for ever. Whoever has connections of its own goes on, as do those that are open; and when one is through there is room.
#[test]
fn calls_that_wait_for_room_on_a_connection_are_bounded_in_time() {
    let rig = Rig::new(
        "streams",
        "[timeouts]\nconnect_s = 2\n",
        "[limits]\nstreams = 2\n",
    );
    let client = &rig.pair.client;
    let mut open: Vec<Open> = (0..8)
        .map(|n| rig.open(&format!("open-{n}"), "client"))
        .collect();
    assert_eq!(used(client, "dialled"), 4.0);
    assert_eq!(reached(client, "streams"), 0.0);
    assert_eq!(rig.once("client", "app", ECHO), "ConnectionResetError");
    assert_eq!(rig.get("/"), "503 overloaded");
    assert_eq!(reached(client, "streams"), 2.0);
    assert_eq!(client.refused("overloaded"), 2.0);
    assert_eq!(rig.once("shell", "app", ECHO), "open");
    open.pop().unwrap().goes_on();
    assert_eq!(rig.get("/"), "server");
    for call in open {
        call.goes_on();
    }
}
