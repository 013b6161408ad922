//! Conversations in raw bytes: a client that sends exactly what it is told, and an app that shows exactly what it got.
//! Bytes are written as text in Latin-1.

use std::fs;

use serde_json::{Value, json};

use crate::host::Host;
use crate::process::Process;
use crate::wait::SOON;

/// What a client does.
#[derive(Clone, Copy, Debug)]
pub enum Step<'a> {
    Send(&'a str),
    /// Reads until this came.
    Until(&'a str),
    /// Ends its direction.
    End,
    /// Reads to the end.
    Rest,
}

impl<'a> Step<'a> {
    fn said(self) -> [&'a str; 2] {
        match self {
            Self::Send(text) => ["send", text],
            Self::Until(text) => ["until", text],
            Self::End => ["end", ""],
            Self::Rest => ["rest", ""],
        }
    }
}

const CLIENT: &str = r#"
import json, socket
def talk(to, steps):
    s = socket.create_connection(tuple(to), 20)
    got = b""
    def read():
        nonlocal got
        more = s.recv(65536)
        got += more
        return more
    try:
        for step, text in steps:
            text = text.encode("latin-1")
            if step == "send": s.sendall(text)
            elif step == "end": s.shutdown(socket.SHUT_WR)
            elif step == "rest":
                while read(): pass
            else:
                while text not in got:
                    if not read(): raise EOFError
    except (OSError, EOFError) as error:
        got += ("<%s>" % type(error).__name__).encode()
    s.close()
    return got.decode("latin-1")
plan = json.load(open("TALKS"))
print(json.dumps([talk(plan["to"], steps) for steps in plan["talks"]]))
"#;

/// Talks to `to`, one connection after the other, as a program in `cgroup`; returns all that came on each. How a
/// connection broke stands at the end in `<>`.
#[track_caller]
pub fn talk(host: &Host, cgroup: &str, to: (&str, u16), talks: &[Vec<Step<'_>>]) -> Vec<String> {
    let talks: Vec<Vec<_>> = talks
        .iter()
        .map(|steps| steps.iter().map(|step| step.said()).collect())
        .collect();
    let plan = host.dir().join("talks.json");
    let text = json!({"to": [to.0, to.1], "talks": talks}).to_string();
    fs::write(&plan, text).expect("what is to be said");
    let script = CLIENT.replace("TALKS", &plan.display().to_string());
    let text = host
        .python("talk", &script)
        .cgroup(cgroup)
        .deadline(SOON * 4)
        .ok();
    serde_json::from_str(&text).expect("what came")
}

/// How the app answers requests of one path.
#[derive(Clone, Copy, Debug, Default)]
pub struct Answer<'a> {
    /// Said before the body is read.
    pub before: &'a str,
    /// Does not read the body at all.
    pub early: bool,
    pub then: &'a str,
    /// Ends the connection behind it.
    pub close: bool,
    /// From here on it gives all bytes back in upper case.
    pub tunnel: bool,
}

const APP: &str = r#"
import json, socket, threading
ANSWERS = json.load(open("ANSWERS"))
count = 0
class Connection:
    def __init__(self, socket, number):
        self.socket, self.number, self.data = socket, number, b""
    def more(self):
        more = self.socket.recv(65536)
        if not more: raise EOFError
        self.data += more
    def take(self, length):
        while len(self.data) < length: self.more()
        taken, self.data = self.data[:length], self.data[length:]
        return taken
    def until(self, end):
        while end not in self.data: self.more()
        return self.take(self.data.index(end) + len(end))
    def show(self, **what):
        what["conn"] = self.number
        print(json.dumps(what), flush=True)
    def body(self, head):
        fields = [line.partition(b":") for line in head.lower().split(b"\r\n")[1:]]
        fields = {name: value.strip() for name, _, value in fields}
        if fields.get(b"transfer-encoding") == b"chunked":
            body = b""
            while True:
                line = self.until(b"\r\n")
                size = int(line.split(b";")[0], 16)
                body += line
                if size: body += self.take(size + 2)
                else: break
            while not body.endswith(b"\r\n\r\n"): body += self.until(b"\r\n")
            return body
        return self.take(int(fields.get(b"content-length", b"0")))
    def say(self, text):
        self.socket.sendall(text.encode("latin-1"))
    def serve(self):
        try:
            while True:
                head = self.until(b"\r\n\r\n")
                path = head.split(b" ")[1].decode("latin-1")
                answer = ANSWERS.get(path) or ANSWERS["*"]
                self.say(answer["before"])
                body = b"" if answer["early"] else self.body(head)
                self.show(raw=(head + body).decode("latin-1"))
                self.say(answer["then"])
                if answer["close"]: return self.socket.close()
                while answer["tunnel"]:
                    self.socket.sendall(self.data.upper())
                    self.data = b""
                    self.more()
        except (OSError, EOFError, ValueError) as error:
            self.show(end=type(error).__name__, left=self.data.decode("latin-1"))
            self.socket.close()
listener = socket.create_server(("0.0.0.0", PORT), backlog=512)
while True:
    accepted, _ = listener.accept()
    count += 1
    threading.Thread(target=Connection(accepted, count).serve, daemon=True).start()
"#;

/// A running app, which keeps its connections.
#[derive(Debug)]
pub struct App(Process);

impl App {
    /// Listens on `port` in cgroup `name`. Paths that are not in `answers` are answered as `*`.
    #[track_caller]
    pub fn start(host: &Host, name: &str, port: u16, answers: &[(&str, Answer<'_>)]) -> Self {
        let mut table = serde_json::Map::new();
        let default = Answer {
            then: "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
            ..Answer::default()
        };
        for (path, answer) in [("*", default)].iter().chain(answers) {
            let Answer {
                before,
                early,
                then,
                close,
                tunnel,
            } = answer;
            let value = json!({"before": before, "early": early, "then": then, "close": close, "tunnel": tunnel});
            table.insert((*path).to_owned(), value);
        }
        let path = host.dir().join(format!("{name}-answers.json"));
        fs::write(&path, Value::Object(table).to_string()).expect("the answers");
        let script = APP
            .replace("ANSWERS\"", &format!("{}\"", path.display()))
            .replace("PORT", &port.to_string());
        let process = host.python(name, &script).cgroup(name).spawn(name);
        host.wait_listening(port, SOON);
        Self(process)
    }

    /// What it saw so far: requests in `raw`, ends of connections in `end`, each with the connection's number.
    pub fn seen(&self) -> Vec<Value> {
        let log = self.0.log();
        let lines = log
            .lines()
            .filter_map(|line| serde_json::from_str(line).ok());
        lines.collect()
    }

    /// The requests that it got, as they came.
    pub fn requests(&self) -> Vec<String> {
        let seen = self.seen();
        let raw = seen.iter().filter_map(|line| line["raw"].as_str());
        raw.map(str::to_owned).collect()
    }
}
