//! Logins that belong to a connection (NTLM, Negotiate): to one caller's, and to nobody else's.

use meshwork_tests::control::TokenOptions;
use meshwork_tests::host::Host;
use meshwork_tests::process::Process;
use meshwork_tests::wait::{SOON, check, wait_until};

use crate::pair::{Pair, mesh_name, owner};

/// Logs in connections, as NTLM does: a word, a challenge that only this connection knows, an answer to it.
const APP: &str = r#"
import socket, threading
count = 0
def serve(c, me):
    user, data = None, b""
    try:
        while True:
            while b"\r\n\r\n" not in data:
                more = c.recv(4096)
                if not more: raise EOFError
                data += more
            head, _, data = data.partition(b"\r\n\r\n")
            word = b""
            for line in head.split(b"\r\n"):
                if line.lower().startswith(b"authorization: ntlm "): word = line[20:]
            status, extra, text = "200 OK", "", "%s on %s" % (user, me)
            if word == b"hello":
                status, extra, text = "401 No", "WWW-Authenticate: NTLM prove-%s\r\n" % me, "prove"
            elif word.startswith(b"proof-%s-" % me.encode()):
                user = word.split(b"-")[-1].decode()
                text = "%s on %s" % (user, me)
            elif word or not user:
                status, extra, text = "401 No", "WWW-Authenticate: Negotiate\r\nWWW-Authenticate: NTLM\r\n", "nobody"
            if b" /bye " in head: extra += "Connection: close\r\n"
            c.sendall(("HTTP/1.1 %s\r\n%sContent-Length: %d\r\n\r\n%s" % (status, extra, len(text), text)).encode())
            if b" /bye " in head or b" /leave " in head: raise EOFError
    except (OSError, EOFError):
        print("gone %s\n" % me, end="", flush=True)
        c.close()
listener = socket.create_server(("0.0.0.0", 80), backlog=512)
while True:
    c, _ = listener.accept()
    count += 1
    threading.Thread(target=serve, args=(c, "HOST%d" % count), daemon=True).start()
"#;

/// Callers that log in, each on a connection of its own, in turns; and one that never does.
const CALLERS: &str = r#"
import socket, re
class Caller:
    def __init__(self):
        self.s = socket.create_connection(("NAME", 80), 20)
        self.data = b""
    def ask(self, path="/", word=None):
        login = "Authorization: NTLM %s\r\n" % word if word else ""
        self.s.sendall(("GET %s HTTP/1.1\r\nHost: a\r\n%s\r\n" % (path, login)).encode())
        while b"\r\n\r\n" not in self.data: self.more()
        head, _, self.data = self.data.partition(b"\r\n\r\n")
        head = head.decode()
        length = int(re.search(r"(?i)content-length: (\d+)", head)[1])
        while len(self.data) < length: self.more()
        text, self.data = self.data[:length].decode(), self.data[length:]
        return head, text
    def more(self):
        more = self.s.recv(4096)
        if not more: raise EOFError
        self.data += more
def hello(c): return re.search(r"NTLM prove-(\S+)", c.ask(word="hello")[0])[1]
def proof(c, me, user): return c.ask(word="proof-%s-%s" % (me, user))[1]
alice, bob, nobody = Caller(), Caller(), Caller()
FIRST
a = hello(alice)
b = hello(bob)
assert a != b, (a, b)
assert nobody.ask()[1] == "nobody"
assert proof(alice, a, "alice") == "alice on " + a
assert nobody.ask()[1] == "nobody"
assert proof(bob, b, "bob") == "bob on " + b
for n in range(20):
    # Without another word of the login: it is the connection that is logged in.
    assert alice.ask()[1] == "alice on " + a, n
    assert bob.ask("/x")[1] == "bob on " + b, n
    head, text = nobody.ask()
    assert text == "nobody" and " 401 " in head, (n, head, text)
# The caller's end is the end of what was its own.
alice.s.close()
print("left", a, flush=True)
assert nobody.ask()[1] == "nobody"
# And the app's end is the caller's, said or not.
assert bob.ask("/leave")[1] == "bob on " + b
assert bob.s.recv(1) == b""
carol = Caller()
c = hello(carol)
assert proof(carol, c, "carol") == "carol on " + c
assert carol.ask("/bye")[1] == "carol on " + c
assert carol.s.recv(1) == b""
print("ok")
"#;

fn app(host: &Host) -> Process {
    let script = APP.replace("HOST", host.name());
    let process = host.python("web", &script).cgroup("web").spawn("web");
    host.wait_listening(80, SOON);
    process
}

#[track_caller]
fn logins_stay(pair: &Pair, apps: &[&Process], first: &str) {
    let script = CALLERS
        .replace("NAME", &mesh_name("web"))
        .replace("FIRST", first);
    let text = pair
        .client
        .host
        .python("callers", &script)
        .cgroup("client")
        .ok();
    let left = text
        .lines()
        .find_map(|line| line.strip_prefix("left "))
        .unwrap();
    assert!(text.ends_with("ok\n"), "{text}");
    wait_until("the app to see its caller go", SOON, || {
        let logs: String = apps.iter().map(|app| app.log()).collect();
        check(
            logs.contains(&format!("gone {left}\n")),
            format!("{left} is open: {logs}"),
        )
    });
}

/// Over two instances: a connection that was logged in stays with the one that knows it.
#[test]
fn a_login_stays_with_its_callers_connection() {
    let pair = Pair::new("a_login_stays_with_its");
    let second = pair
        .control
        .join(&pair.site.host("second"), &TokenOptions::default());
    let apps = [app(&pair.server.host), app(&second.host)];
    second.serve("web", &owner("web"), &[(80, "http")]);
    pair.server.serve("web", &owner("web"), &[(80, "http")]);
    pair.control.wait_endpoints("shop/web", 2);
    pair.wait_name("web");
    // As browsers do: first a request without any login.
    let first = "assert all(c.ask()[1] == 'nobody' for c in (alice, bob, nobody))";
    logins_stay(&pair, &[&apps[0], &apps[1]], first);
    // And as curl does: the first word on a new connection.
    logins_stay(&pair, &[&apps[0], &apps[1]], "");
}

#[test]
fn a_login_stays_with_its_connection_on_a_port_of_unknown_protocol() {
    let pair = Pair::new("a_login_stays_auto");
    let app = app(&pair.server.host);
    pair.declare("web", 80, "auto");
    logins_stay(&pair, &[&app], "");
    logins_stay(&pair, &[&app], "assert alice.ask()[1] == 'nobody'");
}

/// Without NTLM the same app is called on kept connections, so the tests above prove something.
#[test]
fn without_a_login_connections_are_shared() {
    let pair = Pair::new("without_a_login_connections");
    let _web = pair.web("http", "");
    let url = format!("http://{}/", mesh_name("web"));
    for _ in 0..3 {
        assert_eq!(pair.ok(&format!("curl -sS -m 20 {url}")), "hello\n");
    }
    let reused = pair.server.metrics().sum("mesh_app_reused_total", &[]);
    assert!(reused >= 2.0, "reused {reused} times");
}
