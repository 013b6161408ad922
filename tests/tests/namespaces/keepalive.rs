//! A program's end that falls silent, as behind a firewall that forgot it: TCP keep-alive gives it up, and its other end
//! hears of it. The packets are dropped in the namespaces of the test.

use meshwork_tests::agent::Agent;
use meshwork_tests::host::Host;
use meshwork_tests::process::Process;
use meshwork_tests::wait::{SOON, check, wait_until};

use crate::pair::{Pair, owner};
use crate::torture::{HTTP, TCP, serve, wait_said};

/// Asked after a second, and given up after two unanswered questions.
const KEEPALIVE: &str = "[keepalive]\nidle_s = 1\ninterval_s = 1\nprobes = 2\n";

/// Three calls in their middle with nothing under way: plain bytes, a request that is not answered yet, an answer that has
/// begun. How each ends is a line.
const CALLS: &str = "\
import os, socket, threading
vip = os.environ['VIP']
def call(name, port, ask, begun):
    c = socket.create_connection((vip, port), 60)
    c.settimeout(300)
    c.sendall(ask)
    got = b''
    while len(got) < begun: got += c.recv(65536)
    ready.release()
    try:
        while True:
            part = c.recv(65536)
            if not part: break
            got += part
        end = 'end'
    except ConnectionResetError: end = 'reset'
    except TimeoutError: end = 'timeout'
    reason = [l.split(b': ')[1].decode() for l in got.split(b'\\r\\n') if l.startswith(b'x-meshwork-reason')]
    print(' '.join([name, end, *reason]) + '\\n', end='', flush=True)
ready = threading.Semaphore(0)
calls = [('tcp', 9000, b'echo\\nhello', 5),
         ('waiting', 8080, b'POST /give HTTP/1.1\\r\\nhost: app\\r\\ncontent-length: 9\\r\\n\\r\\nhello', 0),
         ('begun', 8080, b'GET /give?bytes=100&seed=1&framing=length&stop=10&step=10 HTTP/1.1\\r\\nhost: app\\r\\n\\r\\n', 40)]
threads = [threading.Thread(target=call, args=each) for each in calls]
for thread in threads: thread.start()
for thread in threads: ready.acquire()
print('open', flush=True)
for thread in threads: thread.join()
print('over', flush=True)
";

/// A pair with the app of the torture tests whose agents ask often, and three calls of `shop/client` to it.
#[track_caller]
fn calls(name: &str) -> (Pair, Process, Process) {
    let mut pair = Pair::new(name);
    let app = serve(&pair.server.host);
    let ports = [(HTTP, "http"), (TCP, "tcp")];
    pair.server.serve("app", &owner("app"), &ports);
    for agent in [&mut pair.client, &mut pair.server] {
        agent.stop();
        agent.configure(KEEPALIVE);
        agent.start();
    }
    pair.control.wait_endpoints("shop/app", 1);
    pair.wait_name("app");
    let [vip, _] = pair.vips("app");
    let calls = pair.client.host.python("calls", CALLS).env("VIP", &vip);
    let mut calls = calls.cgroup("client").spawn("calls");
    wait_said(&mut calls, "open");
    wait_until("the calls to reach the app", SOON, || {
        let open = open(&pair.server);
        check(open == 3.0, format!("{open} calls"))
    });
    (pair, app, calls)
}

fn open(agent: &Agent) -> f64 {
    agent.metrics().sum("mesh_open_connections", &[])
}

/// From now on nothing of the programs at these ports is heard on the host: no data, no acknowledgement, no reset.
fn silence(host: &Host, from: &str) {
    host.ok("nft add table inet silence");
    host.ok("nft 'add chain inet silence input { type filter hook input priority -500; }'");
    host.ok(&format!(
        "nft add rule inet silence input tcp {from} '{{ {HTTP}, {TCP} }}' drop"
    ));
}

#[track_caller]
fn all_closed(pair: &Pair) {
    for agent in [&pair.client, &pair.server] {
        wait_until("all calls to be over", SOON, || {
            let open = open(agent);
            check(open == 0.0, format!("{open} are open"))
        });
    }
}

#[test]
fn callers_of_an_app_that_falls_silent_are_told() {
    let (pair, _app, mut calls) = calls("an_app_falls_silent");
    silence(&pair.server.host, "sport");
    wait_said(&mut calls, "over");
    let said = calls.log();
    assert!(said.contains("tcp reset\n"), "{said}");
    assert!(said.contains("begun reset\n"), "{said}");
    // Its answer had not begun: the mesh can still say why.
    assert!(said.contains("waiting end app_reset\n"), "{said}");
    all_closed(&pair);
}

#[test]
fn an_app_whose_callers_fall_silent_is_told() {
    let (pair, app, _calls) = calls("a_caller_falls_silent");
    silence(&pair.client.host, "dport");
    all_closed(&pair);
    wait_until("the app to hear of it", SOON, || {
        let log = app.log();
        let told = log.contains("tcp ended: ") && log.contains("http upload cut: ");
        check(told, log)
    });
}
