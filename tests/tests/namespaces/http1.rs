//! HTTP/1.1 to the byte: what an app and its caller see of each other through two agents.

use meshwork_tests::raw::{Answer, App, Step, talk};
use meshwork_tests::wait::{SOON, check, wait_until};

use crate::pair::{Pair, mesh_name, spiffe};

use Step::{End, Rest, Send, Until};

/// The app `web` at port 80, and what a caller does with it.
struct Site {
    pair: Pair,
    app: App,
}

impl Site {
    #[track_caller]
    fn new(name: &str, answers: &[(&str, Answer<'_>)]) -> Self {
        let pair = Pair::new(name);
        let app = App::start(&pair.server.host, "web", 80, answers);
        pair.declare("web", 80, "http");
        Self { pair, app }
    }

    /// All that came back in one conversation.
    #[track_caller]
    fn talk(&self, steps: &[Step<'_>]) -> String {
        let name = mesh_name("web");
        let all = talk(
            &self.pair.client.host,
            "client",
            (&name, 80),
            &[steps.to_vec()],
        );
        all.into_iter().next().unwrap()
    }
}

/// What the app gets of `request`: its own bytes, and who called as the last header line.
fn as_seen(request: &str) -> String {
    let (head, body) = request.split_once("\r\n\r\n").unwrap();
    let id = spiffe("client");
    format!("{head}\r\nx-meshwork-client-id: {id}\r\n\r\n{body}")
}

const fn then(then: &str) -> Answer<'_> {
    Answer {
        before: "",
        early: false,
        then,
        close: false,
        tunnel: false,
    }
}

#[test]
fn pipelined_requests_are_answered_in_their_order() {
    let (one, two, three) = (
        "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\none",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\ntwo\r\n0\r\n\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nthree",
    );
    let site = Site::new(
        "pipelined_requests_are_answered",
        &[("/1", then(one)), ("/2", then(two)), ("/3", then(three))],
    );
    let requests = [
        "GET /1 HTTP/1.1\r\nHost: a\r\n\r\n",
        "POST /2 HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\nbody",
        "POST /2 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n",
        "GET /3 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
    ];
    let got = site.talk(&[Send(&requests.concat()), Rest]);
    assert_eq!(got, [one, two, two, three].concat());
    assert_eq!(site.app.requests(), requests.map(as_seen));
}

/// Names, order, case, spaces, repeated lines, extensions of chunks and trailers.
#[test]
fn messages_pass_byte_for_byte() {
    let request = "POST /x?q=%20&\u{e9} HTTP/1.1\r\nhOsT:a\r\nX-b:  two  spaces\t\r\nx-B: \u{e9}\r\nX-b:\r\n\
        ACCEPT: */*\r\nTransfer-Encoding: chunked\r\nTrailer: x-sum\r\nCookie: a=b\r\ncookie: c=d\r\n\r\n\
        5;name=value;q=\"a b\"\r\nhello\r\n00A\r\n0123456789\r\n0;last\r\nX-Sum:  7 \r\nx-other:\r\n\r\n";
    let answer = "HTTP/1.1 207 Odd  Phrase\r\nserver:x\r\nSET-Cookie: a\r\nset-cookie: b\r\nTRANSFER-encoding: Chunked\r\n\
        X-Empty:\r\n\r\n3;ext=\"\u{e9}\"\r\nabc\r\n0\r\nX-Sum: 7\r\nX-sum: 8\r\n\r\n";
    let site = Site::new("messages_pass_byte_for_byte", &[("*", then(answer))]);
    let close = "GET /last HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";
    let mut expected = vec![as_seen(request)];
    let got = site.talk(&[
        Send(request),
        Until(answer),
        Send(request),
        Send(close),
        Rest,
    ]);
    assert_eq!(got, answer.repeat(3));
    expected.extend([as_seen(request), as_seen(close)]);
    assert_eq!(site.app.requests(), expected);
}

#[test]
fn interim_answers_pass_when_they_are_said() {
    let early = "HTTP/1.1 413 Too Much\r\nContent-Length: 3\r\n\r\nno\n";
    let hints = "HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 102 Processing\r\n\r\n";
    let done = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";
    let go = "HTTP/1.1 100 Continue\r\n\r\n";
    let before = |before| Answer {
        before,
        then: done,
        ..Answer::default()
    };
    let refused = Answer {
        before: early,
        early: true,
        ..Answer::default()
    };
    let site = Site::new(
        "interim_answers_pass",
        &[
            ("/go", before(go)),
            ("/hints", before(hints)),
            ("/no", refused),
        ],
    );
    let post = |path: &str| {
        format!(
            "POST {path} HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 4\r\n\r\n"
        )
    };
    let get = "GET /hints HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";
    // The body is sent only when it was asked for.
    let got = site.talk(&[
        Send(&post("/go")),
        Until(go),
        Send("body"),
        Until(done),
        Send(get),
        Rest,
    ]);
    assert_eq!(got, [go, done, hints, done].concat());
    // An answer instead: the caller's next request can not be told from the body, so there is none.
    let got = site.talk(&[Send(&post("/no")), Rest]);
    assert_eq!(got, early);
    // It is never taken for a complete request.
    let expected = [
        as_seen(&format!("{}body", post("/go"))),
        as_seen(get),
        as_seen(&post("/no")),
    ];
    assert_eq!(site.app.requests(), expected);
    let numbers: Vec<_> = site
        .app
        .seen()
        .iter()
        .map(|line| line["conn"].as_u64())
        .collect();
    let got = site.talk(&[
        Send("GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"),
        Rest,
    ]);
    assert_eq!(got, done);
    let last = site
        .app
        .seen()
        .iter()
        .rfind(|line| line["raw"].is_string())
        .unwrap()["conn"]
        .as_u64();
    assert!(
        last > numbers.into_iter().max().flatten(),
        "a connection was used on which a body was still due"
    );
}

#[test]
fn answers_without_a_body_have_none_whatever_they_say() {
    let head = "HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n";
    let none = "HTTP/1.1 204 No Content\r\nX: y\r\n\r\n";
    let zero = "HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n";
    let same = "HTTP/1.1 304 Not Modified\r\nContent-Length: 5000\r\nETag: \"x\"\r\n\r\n";
    let chunked = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
    let site = Site::new(
        "answers_without_a_body",
        &[
            ("/head", then(head)),
            ("/none", then(none)),
            ("/zero", then(zero)),
            ("/same", then(same)),
            ("/chunked", then(chunked)),
        ],
    );
    let request = |method: &str, path: &str| format!("{method} {path} HTTP/1.1\r\nHost: a\r\n\r\n");
    let requests = [
        request("HEAD", "/head"),
        request("GET", "/none"),
        request("DELETE", "/zero"),
        request("GET", "/same"),
        request("HEAD", "/chunked"),
        "GET /end HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n".to_owned(),
    ];
    let got = site.talk(&[Send(&requests.concat()), Rest]);
    let ok = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";
    assert_eq!(got, [head, none, zero, same, chunked, ok].concat());
    // One connection to the app did for all.
    let seen = site.app.seen();
    let asked = seen.iter().filter(|line| line["raw"].is_string());
    let mut connections: Vec<_> = asked.map(|line| line["conn"].as_u64()).collect();
    assert_eq!(connections.len(), requests.len());
    connections.dedup();
    assert_eq!(connections.len(), 1, "{seen:?}");
}

#[test]
fn what_leaves_http_becomes_bytes_and_nothing_is_lost() {
    let tunnel = |then| Answer {
        then,
        tunnel: true,
        ..Answer::default()
    };
    let switched =
        "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\nhello";
    let connected = "HTTP/1.1 200 Connected\r\n\r\n";
    let site = Site::new(
        "what_leaves_http_becomes_bytes",
        &[("/up", tunnel(switched)), ("db:5432", tunnel(connected))],
    );
    let upgrade =
        "GET /up HTTP/1.1\r\nHost: a\r\nConnection: keep-alive, Upgrade\r\nUpgrade: x\r\n\r\n";
    let with_body = "POST /up HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: x\r\nContent-Length: 4\r\n\r\nbody";
    let connect = "CONNECT db:5432 HTTP/1.1\r\nHost: db:5432\r\n\r\n";
    for (request, answer) in [
        (upgrade, switched),
        (with_body, switched),
        (connect, connected),
    ] {
        // Bytes of the tunnel right behind the request, and after the answer.
        let early = format!("{request}early ");
        let got = site.talk(&[
            Send(&early),
            Until("EARLY "),
            Send("late\r\n\u{ff}"),
            Until("LATE\r\n\u{ff}"),
            End,
            Rest,
        ]);
        assert_eq!(got, format!("{answer}EARLY LATE\r\n\u{ff}"), "{request}");
    }
    assert_eq!(
        site.app.requests(),
        [upgrade, with_body, connect].map(as_seen)
    );
    // To HTTP/2 nobody upgrades, and a target may be said in full.
    let h2c = "GET http://a/x HTTP/1.1\r\nHost: a\r\nConnection: Upgrade, HTTP2-Settings, close\r\nUpgrade: h2c\r\n\
        HTTP2-Settings: AAMAAABkAAQAAP__\r\n\r\n";
    let got = site.talk(&[Send(h2c), Rest]);
    assert!(got.starts_with("HTTP/1.1 200 OK\r\n"), "{got}");
    let expected = as_seen(h2c).replace("Upgrade: h2c\r\n", "");
    assert_eq!(site.app.requests().last(), Some(&expected));
}

#[test]
fn long_heads_pass_up_to_the_bound() {
    let site = Site::new("long_heads_pass_up_to_the_bound", &[]);
    let request =
        |lines: &str| format!("GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n{lines}\r\n");
    let long = request(&format!("X: {}\r\n", "x".repeat(60 * 1024)));
    let many = request(&"a: b\r\n".repeat(900));
    for good in [&long, &many] {
        let got = site.talk(&[Send(good), Rest]);
        assert!(got.starts_with("HTTP/1.1 200 "), "{got}");
    }
    assert_eq!(site.app.requests(), [as_seen(&long), as_seen(&many)]);
    let longer = request(&format!("X: {}\r\n", "x".repeat(70 * 1024)));
    let more = request(&"a: b\r\n".repeat(1_100));
    for bad in [&longer, &more] {
        let got = site.talk(&[Send(bad), Rest]);
        assert!(got.starts_with("HTTP/1.1 431 "), "{got}");
        assert!(
            got.contains("\r\nx-meshwork-reason: http_head_too_large\r\n"),
            "{got}"
        );
        assert!(got.contains("\r\nconnection: close\r\n"), "{got}");
    }
    assert_eq!(site.app.requests().len(), 2);
}

/// The app has heard enough: its answer comes whole, and the connections on both sides end.
#[test]
fn an_early_answer_reaches_a_caller_that_is_still_sending() {
    let early = "HTTP/1.1 403 No\r\nContent-Length: 6\r\n\r\nenough";
    let answer = Answer {
        before: early,
        early: true,
        close: true,
        ..Answer::default()
    };
    let go = Answer {
        before: "HTTP/1.1 100 Continue\r\n\r\n",
        ..then("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
    };
    let site = Site::new("an_early_answer_reaches", &[("/up", answer), ("/down", go)]);
    let head = "POST /up HTTP/1.1\r\nHost: a\r\nContent-Length: 10000000\r\n\r\n";
    let part = "x".repeat(100_000);
    let got = site.talk(&[Send(head), Send(&part), Until("enough"), Rest]);
    assert_eq!(got, early);
    let head = "POST /up HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n";
    let got = site.talk(&[Send(head), Until("enough"), Rest]);
    assert_eq!(got, early);
    // A caller that goes away in the middle of its body leaves no request behind that looks whole.
    let head = "POST /down HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\nhalf";
    site.talk(&[Send(head), Until("100 Continue")]);
    wait_until("the app to see the end", SOON, || {
        let seen = site.app.seen();
        let ends = seen.iter().filter(|line| line["left"] == "half").count();
        check(ends == 1, format!("{seen:?}"))
    });
}

/// What an answer of the mesh itself looks like where no body may follow.
#[test]
fn a_refused_head_request_is_answered_without_a_body() {
    let Site { pair, app } = Site::new("a_refused_head_request", &[]);
    drop(app);
    let name = mesh_name("web");
    let one = "HEAD / HTTP/1.1\r\nHost: a\r\n\r\n";
    let last = "HEAD / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";
    let twice = [one, last].concat();
    let steps = vec![Send(&twice), Rest];
    let got = talk(&pair.client.host, "client", (&name, 80), &[steps]);
    let heads: Vec<&str> = got[0].split_terminator("\r\n\r\n").collect();
    assert_eq!(heads.len(), 2, "{got:?}");
    let refused =
        |head: &&str| head.starts_with("HTTP/1.1 503 ") && head.contains("x-meshwork-reason: ");
    assert!(heads.iter().all(refused), "{got:?}");
}

/// An app that answers before it took the body has a connection that nobody else gets, however much of the body the agent
/// has read: the rest of it would be the next request's head.
#[test]
fn a_connection_with_half_a_body_is_used_for_nothing_else() {
    const APP: &str = r#"
import os, socket, threading, time
def serve(c):
    data = b""
    while True:
        while b"\r\n\r\n" not in data:
            b = c.recv(4096)
            if not b: return c.close()
            data += b
        head, data = data.split(b"\r\n\r\n", 1)
        if head.startswith(b"GET"):
            c.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
            continue
        _, _, size = head.lower().partition(b"content-length: ")
        size = int(size.split()[0])
        c.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nenough")
        # The body stays where it is until the caller has its answer: then it is decided what becomes of the connection.
        answered = "DIR/" + head.split()[1].decode().strip("/")
        while not os.path.exists(answered): time.sleep(0.01)
        while len(data) < size:
            b = c.recv(1 << 20)
            if not b: return c.close()
            data += b
        if data[:size] != b"x" * size: print("mixed", flush=True)
        data = data[size:]
s = socket.socket()
s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
s.bind(("0.0.0.0", 80)); s.listen(512)
while True: threading.Thread(target=serve, args=(s.accept()[0],), daemon=True).start()
"#;
    const CALLER: &str = r#"
import socket, threading
def dial():
    s = socket.create_connection(("NAME", 80), 20)
    s.settimeout(20)
    return s
def send(s, bytes):
    try: s.sendall(bytes)
    except OSError: pass
# In steps of what one read takes: some of these bodies are read whole by the agent and not written whole.
for number in range(1, 65):
    s, size = dial(), number * 65536
    head = b"POST /%d HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % (number, size)
    writer = threading.Thread(target=send, args=(s, head + b"x" * size), daemon=True)
    writer.start()
    got = b""
    while b"enough" not in got:
        part = s.recv(4096)
        assert part, (number, got)
        got += part
    open("DIR/%d" % number, "w").close()
    t = dial()
    t.sendall(b"GET /%d HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n" % number)
    got = t.recv(4096)
    assert got.endswith(b"ok"), (number, got)
    s.close(); t.close(); writer.join()
print("alone")
"#;
    let pair = Pair::new("half_a_body");
    let host = &pair.server.host;
    let dir = host.subdir("answered", None).display().to_string();
    let app = host.python("app", &APP.replace("DIR", &dir));
    let app = app.cgroup("web").spawn("web");
    host.wait_listening(80, SOON);
    pair.declare("web", 80, "http");
    let script = CALLER
        .replace("NAME", &mesh_name("web"))
        .replace("DIR", &dir);
    let caller = pair.client.host.python("caller", &script).cgroup("client");
    assert_eq!(caller.deadline(SOON * 4).ok(), "alone\n");
    assert!(!app.log().contains("mixed"), "{}", app.log());
    let reused = pair.server.metrics().sum("mesh_app_reused_total", &[]);
    assert!(reused >= 1.0, "clean ones are used again: {reused}");
}

/// Heads that come slowly and never end cost a bounded amount, and what is said at once is still heard. So are other
/// programs' slow heads.
#[test]
fn unfinished_heads_hold_a_bounded_amount() {
    let site = Site::new("unfinished_heads_hold", &[]);
    let script = r#"
import resource, selectors, socket
most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
all, refused = selectors.DefaultSelector(), 0
part = b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 60000
for _ in range(1200):
    s = socket.create_connection(("NAME", 80), 20)
    s.settimeout(20)
    s.sendall(part)
    all.register(s, selectors.EVENT_READ)
# One piece more, so that each is counted with what came before.
for key in list(all.get_map().values()):
    try: key.fileobj.sendall(b"y")
    except OSError: pass
while not refused:
    for key, _ in all.select(20):
        got = key.fileobj.recv(4096)
        assert b" 503 " in got and b"x-meshwork-reason: overloaded" in got, got
        refused += 1
        all.unregister(key.fileobj)
s = socket.create_connection(("NAME", 80), 20)
s.sendall(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
assert s.recv(4096).startswith(b"HTTP/1.1 200 ")
print("refused", flush=True)
while all.get_map(): all.select(20)
"#;
    let script = script.replace("NAME", &mesh_name("web"));
    let host = &site.pair.client.host;
    let hostile = host.python("hostile", &script).cgroup("client");
    let hostile = hostile.spawn("hostile");
    wait_until("a refusal", SOON * 4, || {
        check(hostile.log().contains("refused"), hostile.log())
    });
    let other = r#"
import socket
all = [socket.create_connection(("NAME", 80), 20) for _ in range(50)]
pieces = [b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 50000, b"y", b"z\r\n\r\n"]
for piece in pieces:
    for s in all: s.sendall(piece)
for s in all:
    s.settimeout(20)
    got = s.recv(4096)
    assert got.startswith(b"HTTP/1.1 200 "), got
print("served")
"#;
    let other = other.replace("NAME", &mesh_name("web"));
    let text = host.python("other", &other).deadline(SOON * 2).ok();
    assert_eq!(
        text, "served\n",
        "a process that is no workload has a share, too"
    );
    drop(hostile);
    let reached = site
        .pair
        .client
        .metrics()
        .sum("mesh_limit_reached_total", &[("limit", "heads")]);
    assert!(reached >= 1.0, "counted {reached} times");
}
