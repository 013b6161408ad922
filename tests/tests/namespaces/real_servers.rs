//! Servers and clients as they are installed everywhere, through the mesh: what each leans on must hold.

use std::fs;
use std::time::Duration;

use meshwork_tests::host::Host;
use meshwork_tests::process::Process;
use meshwork_tests::servers::{self, golang, web};
use meshwork_tests::wait::{SOON, check, wait_until};
use nix::sys::signal::Signal;

use crate::pair::{Pair, mesh_name, spiffe};

const MIB: u64 = 1024 * 1024;
/// A body that no buffer holds.
const LARGE: u64 = 64 * MIB;
/// One call with such a body, on a busy machine.
const CALL_MAX: Duration = Duration::from_secs(120);

/// A pipeline of requests that curl does not make: chunk extensions, trailers, an answer awaited only at the end.
const PIPELINE: &str = "\
import hashlib, os, socket
c = socket.create_connection((os.environ['NAME'], 80), 60)
c.settimeout(60)
up = [b'GET / HTTP/1.1\\r\\nHost: w\\r\\n\\r\\n',
      b'POST /digest HTTP/1.1\\r\\nHost: w\\r\\nTransfer-Encoding: chunked\\r\\nTrailer: X-Digest\\r\\n\\r\\n'
      b'5;name=\"a;b\"\\r\\nhello\\r\\n6\\r\\n world\\r\\n0\\r\\nX-Digest: seen\\r\\n\\r\\n',
      b'POST /digest HTTP/1.1\\r\\nHost: w\\r\\nContent-Length: 3\\r\\n\\r\\nabc',
      b'GET / HTTP/1.1\\r\\nHost: w\\r\\nConnection: close\\r\\n\\r\\n']
c.sendall(b''.join(up))
got = b''
while True:
    part = c.recv(65536)
    if not part: break
    got += part
assert got.count(b'HTTP/1.1 200') == 4, got
assert got.count(b'hello\\n') == 2, got
for body, line in ((b'hello world', b' 11 -1 '), (b'abc', b' 3 3 ')):
    assert hashlib.sha256(body).hexdigest().encode() + line in got, got
print('trailer seen' if b' 11 -1 seen' in got else 'no trailer')
";

/// What every web server must do through the mesh as it does without.
#[track_caller]
fn web_contract(name: &str, protocol: &str, start: impl Fn(&Host, &str, u16) -> Process) -> Pair {
    let pair = Pair::new(&format!("{name}_{protocol}"));
    let _server = start(&pair.server.host, name, 80);
    pair.declare(name, 80, protocol);
    let url = format!("http://{}", mesh_name(name));
    let kept = pair.ok(&format!(
        "curl -sS -m 20 -w '%{{num_connects}} ' {url}/ {url}/ -I {url}/"
    ));
    assert!(kept.contains("1 ") && kept.ends_with("0 "), "{kept}");
    // Down: announced and chunked. The digest is in the trailer where the server can write one.
    let body = pair.client.host.dir().join("body");
    let body = body.display();
    for length in ["", "&length=1"] {
        let get = format!("curl -sS -m 100 -D - -o {body} '{url}/bytes?n={LARGE}{length}'");
        let head = pair.cmd(&get).deadline(CALL_MAX).ok().to_lowercase();
        let line = pair.ok(&format!("stat -c %s {body}; sha256sum < {body}"));
        let (size, digest) = line.split_once('\n').unwrap();
        assert_eq!(size, LARGE.to_string(), "{head}");
        let trailer = head.lines().find_map(|l| l.strip_prefix("x-digest: "));
        if let Some(trailer) = trailer {
            assert_eq!(trailer, &digest[..64], "{head}");
        }
        // Up: what came down, announced, chunked, and after `100 Continue`.
        for form in [
            "",
            "-H 'Transfer-Encoding: chunked'",
            "-H 'Expect: 100-continue'",
        ] {
            let post = format!("curl -sS -m 100 -T {body} -X POST {form} {url}/digest");
            let text = pair.cmd(&post).deadline(CALL_MAX).ok();
            let came = format!("{} {LARGE} ", &digest[..64]);
            assert!(text.starts_with(&came), "{form}: {text}");
        }
    }
    let pipeline = pair.client.host.python("pipeline", PIPELINE);
    let pipeline = pipeline.env("NAME", &mesh_name(name)).cgroup("client").ok();
    assert!(pipeline.contains("trailer"), "{pipeline}");
    let load = pair
        .cmd(&format!("h2load --h1 -n 4000 -c 64 {url}/"))
        .deadline(CALL_MAX)
        .ok();
    assert!(
        load.contains("4000 succeeded, 0 failed, 0 errored, 0 timeout"),
        "{load}"
    );
    assert!(
        4000.0 <= pair.calls(&spiffe("client"), &format!("shop/{name}")),
        "{name}"
    );
    pair
}

#[test]
fn apache_httpd_serves_every_framing() {
    for protocol in ["http", "auto"] {
        let pair = web_contract("apache", protocol, web::apache);
        let url = format!("http://{}", mesh_name("apache"));
        // What only a server of files has: parts, and answers without a body.
        let etag = pair.ok(&format!(
            "curl -sS -m 20 -o /dev/null -w '%header{{etag}}' {url}/index.html"
        ));
        let etag = etag.trim_matches('"').to_owned();
        let same = format!("curl -sS -m 20 -i -H 'If-None-Match: \"{etag}\"' {url}/ {url}/none");
        let same = pair.ok(&same);
        assert!(same.contains(" 304 ") && same.contains(" 404 "), "{same}");
        let part = pair.ok(&format!("curl -sS -m 20 -r 1-3 {url}/"));
        assert_eq!(part, "ell");
    }
}

#[test]
fn node_serves_every_framing() {
    let pair = web_contract("node", "http", web::node);
    interim(&pair, "node");
}

#[test]
fn go_serves_every_framing() {
    let pair = web_contract("go", "http", web::go);
    interim(&pair, "go");
}

/// `103 Early Hints` reaches the caller before the answer.
#[track_caller]
fn interim(pair: &Pair, name: &str) {
    // The server of the contract has ended with it.
    let start = if name == "go" { web::go } else { web::node };
    let _server = start(&pair.server.host, name, 80);
    let text = wait_until("the server to be there again", SOON, || {
        let url = format!("http://{}/hinted", mesh_name(name));
        let output = pair.cmd(&format!("curl -sS -m 20 -i {url}")).output();
        let text = output.stdout.clone();
        check(text.ends_with("hinted\n"), output.to_string()).map(|()| text)
    });
    let (hint, answer) = text.split_once("\r\n\r\n").unwrap();
    assert!(
        hint.contains(" 103 ") && hint.contains("rel=preload"),
        "{text}"
    );
    assert!(answer.contains(" 200 "), "{text}");
}

/// Messages of many sizes and forms, ping and pong, a close of either end, and a hundred connections at once.
const WEBSOCKETS: &str = "\
import asyncio, os, websockets
async def main():
    url = 'ws://' + os.environ['NAME'] + '/'
    async with websockets.connect(url, max_size=None) as ws:
        for size in (0, 1, 125, 126, 65535, 65536, 1000000, int(os.environ['LARGEST'])):
            message = os.urandom(size)
            await ws.send(message)
            assert await ws.recv() == message, size
        await ws.send('z\\u00fcge')
        assert await ws.recv() == 'z\\u00fcge'
        pong = await ws.ping(b'there?')
        await pong
        await ws.send([b'in ', b'parts'])
        assert await ws.recv() == b'in parts'
        await ws.close(3001, 'enough')
    async with websockets.connect(url) as ws:
        await ws.send('close')
        try: await ws.recv()
        except websockets.ConnectionClosed as e: print(e.rcvd.code, e.rcvd.reason)
    async def one(number):
        async with websockets.connect(url) as ws:
            for turn in range(20):
                await ws.send('%d %d' % (number, turn))
                assert await ws.recv() == '%d %d' % (number, turn)
    await asyncio.gather(*(one(n) for n in range(100)))
    print('ok')
asyncio.run(main())
";

/// Echo of frames of many sizes, ping and pong, the codes of both ends' close.
#[test]
fn websockets_pass_both_ways_until_either_end_closes() {
    const SERVER: &str = "\
import asyncio, websockets
async def serve(ws):
    try:
        async for message in ws:
            if message == 'close': await ws.close(4001, 'as you wish')
            else: await ws.send(message)
    except websockets.ConnectionClosed: pass
    print('closed', ws.close_code, ws.close_reason, flush=True)
async def main():
    async with websockets.serve(serve, '0.0.0.0', 80, max_size=None):
        await asyncio.Future()
asyncio.run(main())
";
    for protocol in ["http", "auto"] {
        let pair = Pair::new(&format!("websockets_{protocol}"));
        let server = pair.server.host.python("ws", SERVER).cgroup("ws");
        let server = server.spawn("ws");
        pair.server.host.wait_listening(80, SOON);
        pair.declare("ws", 80, protocol);
        let client = pair.client.host.python("client", WEBSOCKETS);
        let client = client.env("NAME", &mesh_name("ws")).cgroup("client");
        let client = client.env("LARGEST", "20000000");
        let text = client.deadline(CALL_MAX).ok();
        assert_eq!(text, "4001 as you wish\nok\n", "{protocol}");
        wait_until("the server to see the close", SOON, || {
            check(server.log().contains("closed 3001 enough"), server.log())
        });
    }
}

/// RFC 8441: HAProxy makes extended CONNECT of a program's upgrade, Hypercorn answers it. Neither is ours, and between
/// the agents each is a stream.
#[test]
fn websockets_pass_over_http2() {
    const SERVER: &str = "\
import asyncio
from hypercorn.asyncio import serve
from hypercorn.config import Config
async def app(scope, receive, send):
    if scope['type'] != 'websocket': return
    await receive()
    await send({'type': 'websocket.accept'})
    print('opened over', scope['http_version'], flush=True)
    while True:
        event = await receive()
        if event['type'] == 'websocket.disconnect': return print('closed', flush=True)
        if event.get('text') == 'close':
            await send({'type': 'websocket.close', 'code': 4001, 'reason': 'as you wish'})
            return print('closed', flush=True)
        await send({'type': 'websocket.send', 'bytes': event.get('bytes'), 'text': event.get('text')})
config = Config()
config.bind = ['0.0.0.0:80']
config.websocket_max_message_size = 1 << 26
asyncio.run(serve(app, config))
";
    let pair = Pair::new("websockets_over_http2");
    let host = &pair.server.host;
    let server = host.python("ws", SERVER).cgroup("ws").spawn("ws");
    host.wait_listening(80, SOON);
    pair.declare("ws", 80, "http2");
    let [vip, _] = pair.vips("ws");
    let client = &pair.client.host;
    let config = client.dir().join("haproxy.cfg");
    let text = format!(
        "defaults\n mode http\n timeout connect 30s\n timeout client 60s\n timeout server 60s\n\
         listen ws\n bind 127.0.0.1:8091\n server mesh {vip}:80 proto h2 ws h2\n"
    );
    fs::write(&config, text).unwrap();
    let words = ["haproxy", "-db", "-f", &config.display().to_string()];
    let _haproxy = client.program(words).cgroup("client").spawn("haproxy");
    client.wait_listening(8091, SOON);
    let task = client.python("client", WEBSOCKETS);
    // This server reads frames in Python.
    let task = task.env("NAME", "127.0.0.1:8091").env("LARGEST", "2000000");
    assert_eq!(task.deadline(CALL_MAX).ok(), "4001 as you wish\nok\n");
    wait_until("the server to see all closed", SOON, || {
        let log = server.log();
        let counts = ["opened over 2\n", "closed\n"].map(|line| log.matches(line).count());
        check(counts == [102, 102], log)
    });
}

/// A session that waits in silence, speaking the protocol itself: psql only looks when it is asked something.
const LISTENER: &str = "\
import os, socket, struct
c = socket.create_connection((os.environ['NAME'], 5432), 60)
c.settimeout(60)
def exactly(n):
    got = b''
    while len(got) < n:
        part = c.recv(n - len(got))
        assert part, 'the end'
        got += part
    return got
def message():
    kind, length = exactly(1), struct.unpack('>I', exactly(4))[0]
    return kind, exactly(length - 4)
start = struct.pack('>I', 196608) + b'user\\0postgres\\0\\0'
c.sendall(struct.pack('>I', len(start) + 4) + start)
while message()[0] != b'Z': pass
query = b'LISTEN news\\0'
c.sendall(b'Q' + struct.pack('>I', len(query) + 4) + query)
while message()[0] != b'Z': pass
print('listening', flush=True)
while True:
    kind, body = message()
    if kind == b'A': break
print(body[4:].split(b'\\0')[:2])
";

#[test]
fn postgresql_copies_cancels_and_notifies() {
    let pair = Pair::new("postgresql_copies");
    let host = &pair.server.host;
    let _server = servers::postgresql(host, "db", 5432);
    pair.declare("db", 5432, "tcp");
    let name = mesh_name("db");
    let psql = format!("psql -h {name} -U postgres -X -A -t -v ON_ERROR_STOP=1");
    // A transaction that is rolled back, one that is not, and COPY of many megabytes both ways.
    pair.ok(&format!(
        "{psql} -c 'create table t (a int, b text)' -c 'begin; insert into t values (1); rollback' \
         -c 'begin; insert into t values (2, repeat($$x$$, 1000000)); commit'"
    ));
    let rows = pair.ok(&format!("{psql} -c 'select a, length(b) from t'"));
    assert_eq!(rows, "2|1000000\n");
    let file = pair.client.host.dir().join("rows");
    let file = file.display();
    let copy = format!(
        "seq 400000 | awk '{{print $1 \"\\t\" $1 * 7919 \" a row of a table that is copied in and out again\"}}' > {file} && \
         {psql} -c 'truncate t' -c \"\\copy t from {file}\" && \
         {psql} -c 'copy (select * from t order by a) to stdout' | cmp - {file} && wc -c < {file}"
    );
    let bytes = pair.cmd(&copy).deadline(CALL_MAX).ok();
    let bytes = bytes.lines().last().unwrap().trim().parse::<u64>().unwrap();
    assert!(20 * MIB < bytes, "{bytes}");
    // A cancel comes on a connection of its own.
    let words = psql.split(' ').map(str::to_owned);
    let sleep = ["-c".to_owned(), "select pg_sleep(600)".to_owned()];
    let sleeping = pair.client.host.program(words.chain(sleep));
    let sleeping = sleeping.cgroup("client").spawn("sleeping");
    wait_until("the query to run", SOON, || {
        let text = host.ok(&format!(
            "psql -h {} -U postgres -X -A -t -c \"select count(*) from pg_stat_activity where query like 'select pg_sleep%' and state = 'active'\"",
            host.v4()
        ));
        check(text == "1\n", text)
    });
    sleeping.signal(Signal::SIGINT);
    wait_until("the cancel to arrive", SOON, || {
        let log = sleeping.log();
        check(log.contains("canceling statement due to user request"), log)
    });
    let listener = pair.client.host.python("listener", LISTENER);
    let listener = listener
        .env("NAME", &name)
        .cgroup("client")
        .spawn("listener");
    wait_until("the listener", SOON, || {
        check(listener.log().contains("listening"), listener.log())
    });
    pair.ok(&format!("{psql} -c \"notify news, 'it is here'\""));
    wait_until("the notification", SOON, || {
        let log = listener.log();
        check(log.contains("[b'news', b'it is here']"), log)
    });
}

#[test]
fn redis_publishes_to_those_who_wait() {
    let pair = Pair::new("redis_publishes");
    let _redis = servers::redis(&pair.server.host, "cache", 6379);
    pair.declare("cache", 6379, "tcp");
    let cli = format!("redis-cli -h {}", mesh_name("cache"));
    let subscribed = pair
        .cmd(&format!("exec {cli} subscribe news"))
        .spawn("news");
    wait_until("the subscription", SOON, || {
        check(subscribed.log().contains("subscribe"), subscribed.log())
    });
    let value = "v".repeat(100_000);
    let file = pair.client.host.dir().join("value");
    fs::write(&file, &value).unwrap();
    let set = format!("{cli} -x set large < {}", file.display());
    assert_eq!(pair.ok(&set), "OK\n");
    assert_eq!(pair.ok(&format!("{cli} get large")).trim(), value);
    assert_eq!(pair.ok(&format!("{cli} publish news 'it is here'")), "1\n");
    wait_until("the message", SOON, || {
        check(subscribed.log().contains("it is here"), subscribed.log())
    });
    // A transaction, and a client that blocks until another one speaks.
    let blocked = pair
        .cmd(&format!("exec {cli} blpop queue 0"))
        .spawn("blocked");
    wait_until("a blocked client", SOON, || {
        let info = pair.ok(&format!("{cli} info clients"));
        check(info.contains("blocked_clients:1"), info)
    });
    let multi = pair.ok(&format!("printf 'multi\\nrpush queue x\\nexec\\n' | {cli}"));
    assert_eq!(multi, "OK\nQUEUED\n1\n");
    wait_until("the blocked client's answer", SOON, || {
        check(blocked.log().contains("queue"), blocked.log())
    });
}

#[test]
fn openssh_runs_commands_and_copies_files() {
    let pair = Pair::new("openssh");
    let host = &pair.server.host;
    let _sshd = servers::sshd(host, "ssh", 2222);
    pair.declare("ssh", 2222, "auto");
    let key = host.dir().join("ssh/client");
    let options = format!(
        "-F none -i {} -o BatchMode=yes -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR",
        key.display()
    );
    let to = format!("root@{}", mesh_name("ssh"));
    let ssh = format!("ssh {options} -p 2222 {to}");
    let text = pair
        .cmd(&format!("{ssh} 'cat; echo to you; exit 7' < /etc/hostname"))
        .output();
    assert_eq!(text.code(), 7, "{text}");
    assert!(text.stdout.ends_with("to you\n"), "{text}");
    let (sent, there, back) = ("sent", "there", "back");
    let path = |host: &Host, name: &str| host.dir().join(name).display().to_string();
    let sent = path(&pair.client.host, sent);
    let there = path(host, there);
    let back = path(&pair.client.host, back);
    pair.ok(&format!("head -c {} /dev/urandom > {sent}", 100 * MIB));
    let scp = format!(
        "scp {options} -P 2222 {sent} {to}:{there} && scp {options} -P 2222 {to}:{there} {back} && \
         sha256sum < {sent} && sha256sum < {there} && sha256sum < {back}"
    );
    let digests = pair.cmd(&scp).deadline(CALL_MAX).ok();
    let digests: Vec<&str> = digests.lines().collect();
    assert_eq!(digests.len(), 3);
    assert!(digests.iter().all(|d| *d == digests[0]), "{digests:?}");
}

/// The gRPC project's own cases of interoperability, and ours: `tests/go/grpc`.
#[test]
fn grpc_go_passes_the_interoperability_cases() {
    let pair = Pair::new("grpc_go");
    let _server = servers::grpc_go(&pair.server.host, "rpc", 9000);
    pair.declare("rpc", 9000, "grpc");
    let client = golang::program("grpc").display().to_string();
    let words = [
        client,
        "call".to_owned(),
        format!("{}:9000", mesh_name("rpc")),
    ];
    let call = pair.client.host.program(words).cgroup("client");
    let text = call.deadline(CALL_MAX).ok();
    assert!(text.contains("all 17\n"), "{text}");
}

#[test]
fn h2load_finds_no_failed_request_over_http2() {
    let pair = Pair::new("h2load");
    let _server = servers::nghttpd(&pair.server.host, "h2", 8080);
    let page = pair.server.host.dir().join("h2/www/index.html");
    fs::write(page, "x".repeat(5000)).unwrap();
    pair.declare("h2", 8080, "http2");
    let load = format!(
        "h2load -n 10000 -c 16 -m 20 http://{}:8080/",
        mesh_name("h2")
    );
    let text = pair.cmd(&load).deadline(CALL_MAX).ok();
    assert!(
        text.contains("10000 succeeded, 0 failed, 0 errored, 0 timeout"),
        "{text}"
    );
}
