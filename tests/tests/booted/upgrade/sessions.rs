//! What a client has open at a server over upgrades: a transaction of PostgreSQL, a stream of gRPC, a WebSocket.

use std::fs::OpenOptions;
use std::io::Write as _;

use meshwork_tests::booted::Mesh;
use meshwork_tests::machine::Machine;
use meshwork_tests::process::Process;
use meshwork_tests::wait::{SOON, check, wait_until};

pub(super) const DATABASE: &str = "shop/db";

/// A service, the port and protocol of it, its server, and what a client does with it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stream {
    service: &'static str,
    port: u16,
    protocol: &'static str,
    server: &'static str,
    client: &'static str,
}

/// Each exchanges words over one stream for as long as it runs.
pub(super) const STREAMS: [Stream; 2] = [
    Stream {
        service: "greeter",
        port: 50051,
        protocol: "grpc",
        server: "\
import grpc
from concurrent import futures
def chat(requests, context):
    for request in requests: yield request[::-1]
handlers = {'Chat': grpc.stream_stream_rpc_method_handler(chat)}
server = grpc.server(futures.ThreadPoolExecutor(8))
server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler('t.T', handlers),))
server.add_insecure_port('0.0.0.0:50051')
server.start()
server.wait_for_termination()
",
        client: "\
import grpc, queue
words = queue.Queue()
with grpc.insecure_channel('greeter.shop.mesh.internal:50051') as channel:
    answers = channel.stream_stream('/t.T/Chat')(iter(words.get, None))
    number = 0
    while True:
        word = b'word %d' % number
        words.put(word)
        answer = next(answers)
        assert answer == word[::-1], answer
        number += 1
        if number % 20 == 0: print('exchanged', number, flush=True)
",
    },
    Stream {
        service: "chat",
        port: 8080,
        protocol: "http",
        server: "\
import asyncio, websockets
async def serve(ws):
    async for message in ws: await ws.send(message[::-1])
async def main():
    async with websockets.serve(serve, '0.0.0.0', 8080): await asyncio.Future()
asyncio.run(main())
",
        client: "\
import asyncio, websockets
async def main():
    async with websockets.connect('ws://chat.shop.mesh.internal:8080/') as ws:
        number = 0
        while True:
            word = 'word %d' % number
            await ws.send(word)
            answer = await ws.recv()
            assert answer == word[::-1], answer
            number += 1
            if number % 20 == 0: print('exchanged', number, flush=True)
asyncio.run(main())
",
    },
];

/// Runs the servers as units of a host, beside nginx, and makes them services.
#[track_caller]
pub(super) fn serve_all(mesh: &Mesh, machine: &Machine) {
    for stream in &STREAMS {
        let name = stream.service;
        machine.write(&format!("root/{name}.py"), stream.server);
        machine.write(
            &format!("etc/systemd/system/{name}.service"),
            &format!("[Service]\nExecStart=python3 /root/{name}.py\n"),
        );
        machine.ok(&format!(
            "systemctl daemon-reload && systemctl start {name}"
        ));
        declare(machine, name, name, stream.port, stream.protocol);
    }
    // One version, with its cluster `main`.
    let version = machine.ok("ls /etc/postgresql");
    let dir = format!("etc/postgresql/{}/main", version.trim());
    machine.write(
        &format!("{dir}/conf.d/mesh.conf"),
        "listen_addresses = '*'\nfsync = off\n",
    );
    machine.write(
        &format!("{dir}/pg_hba.conf"),
        "local all all peer\nhost all all 0.0.0.0/0 trust\nhost all all ::/0 trust\n",
    );
    machine.ok(&format!(
        "chmod 644 /{dir}/pg_hba.conf /{dir}/conf.d/mesh.conf"
    ));
    let unit = format!("postgresql@{}-main", version.trim());
    machine.ok(&format!("systemctl start {unit}"));
    declare(machine, "db", &unit, 5432, "tcp");
    for service in ["shop/greeter", "shop/chat", DATABASE] {
        mesh.wait_endpoints(service, 1);
    }
}

fn declare(machine: &Machine, name: &str, unit: &str, port: u16, protocol: &str) {
    machine.write(
        &format!("etc/meshwork/services.d/{name}.toml"),
        &format!(
            "namespace = \"shop\"\n[owner]\nunit = \"{unit}.service\"\n[[service]]\n\
             ports = [{{ port = {port}, protocol = \"{protocol}\" }}]\ncheck = {{ tcp = true, interval_s = 1 }}\n"
        ),
    );
}

/// A program that exchanges words over a stream.
#[derive(Debug)]
pub(super) struct Exchange {
    process: Process,
    name: &'static str,
}

impl Exchange {
    #[track_caller]
    pub(super) fn open(machine: &Machine, stream: Stream) -> Self {
        let name = stream.service;
        machine.write(&format!("root/{name}.py"), stream.client);
        let line = format!("exec python3 /root/{name}.py");
        let mut exchange = Self {
            process: machine.in_unit("client", &line).spawn(name),
            name,
        };
        exchange.goes_on();
        exchange
    }

    fn lines(&self) -> usize {
        self.process.log().lines().count()
    }

    /// Words that are asked from now on are answered.
    #[track_caller]
    pub(super) fn goes_on(&mut self) {
        let before = self.lines();
        wait_until(&format!("{} to go on", self.name), SOON, || {
            self.process.is_alive()?;
            // A line may have been under way.
            check(before + 2 <= self.lines(), self.process.log())
        });
    }

    #[track_caller]
    pub(super) fn ends(mut self) {
        wait_until(&format!("{} to be cut", self.name), SOON, || {
            check(self.process.is_alive().is_err(), "it goes on")
        });
    }
}

/// A session in a transaction.
#[derive(Debug)]
pub(super) struct Psql {
    process: Process,
    input: std::fs::File,
    asked: usize,
    /// The server's process, the transaction, and what its table has.
    state: String,
}

impl Psql {
    #[track_caller]
    pub(super) fn open(machine: &Machine) -> Self {
        machine.ok("mkfifo /root/psql");
        let line = "exec psql -h db.shop.mesh.internal -U postgres -X -A -t -v ON_ERROR_STOP=1 < /root/psql";
        let process = machine.in_unit("client", line).spawn("psql");
        // It begins when both ends are open.
        let mut both = OpenOptions::new();
        let pipe = both.read(true).write(true).open(machine.path("root/psql"));
        let input = pipe.expect("the pipe");
        let mut psql = Self {
            process,
            input,
            asked: 0,
            state: String::new(),
        };
        psql.say("begin; create temp table kept as select 'is here' as word;");
        psql.state = psql.ask();
        psql
    }

    fn say(&mut self, line: &str) {
        writeln!(self.input, "{line}").expect("the pipe");
    }

    #[track_caller]
    fn ask(&mut self) -> String {
        self.asked += 1;
        let mark = format!("answer {}|", self.asked);
        self.say(&format!(
            "select 'answer {}', pg_backend_pid(), txid_current(), word from kept;",
            self.asked
        ));
        wait_until("the database's answer", SOON, || {
            let log = self.process.log();
            let line = log.lines().find_map(|line| line.strip_prefix(&mark));
            line.map(str::to_owned).ok_or(log)
        })
    }

    /// The same session, in the same transaction.
    #[track_caller]
    pub(super) fn goes_on(&mut self) {
        assert!(self.state.ends_with("|is here"), "{}", self.state);
        let state = self.ask();
        assert_eq!(state, self.state, "the session's state");
    }

    /// Its next question is not answered, and never will be.
    #[track_caller]
    pub(super) fn ends(mut self) {
        // It may have ended at the last one.
        wait_until("the session to be cut", SOON, || {
            drop(writeln!(self.input, "select 1;"));
            check(self.process.is_alive().is_err(), self.process.log())
        });
        let log = self.process.log();
        assert!(log.contains("connection"), "{log}");
    }
}
