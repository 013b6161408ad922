//! The mesh under torture: every byte of a gigabyte, those who are slow, those who take much. What each end does is
//! in `tests/src/app.rs`.

use std::time::Duration;

use meshwork_tests::agent::Agent;
use meshwork_tests::binary;
use meshwork_tests::host::Host;
use meshwork_tests::process::{Cmd, Process};
use meshwork_tests::wait::{SOON, check, wait_until};

use crate::pair::{Pair, owner};

/// Longest run of one task on a busy machine.
pub(crate) const TASK_MAX: Duration = Duration::from_secs(400);
/// Until kept connections to apps are given up: their sweep and some more.
const SETTLED_MAX: Duration = Duration::from_secs(90);
/// Descriptors beyond those of an agent that has served a call: what metrics and logs may have open at the moment.
const DESCRIPTORS_SPARE: usize = 8;
pub(crate) const HTTP: u16 = 8080;
pub(crate) const TCP: u16 = 9000;

pub(crate) const GIB: u64 = 1 << 30;
/// Memory of both processes of an agent at rest, and what a few dozen connections may add.
const AGENT_KIB: u64 = 60 * 1024;
/// What one mesh connection may hold unread (`Limits::DEFAULT`), for the connections that a pair of agents makes, at
/// its two ends, and the buffers beside.
pub(crate) const BUFFERS_KIB: u64 = 96 * 1024;

/// A pair with the app of the torture tests as `shop/app`.
pub(crate) struct Rig {
    pub(crate) pair: Pair,
    pub(crate) app: Process,
    /// Descriptors of both agents' workers when nothing is open.
    at_rest: [usize; 2],
    to: String,
}

/// `meshwork-app` with these words.
pub(crate) fn app(host: &Host, words: &str) -> Cmd {
    let program = binary("meshwork-app").display().to_string();
    let words = words.split(' ').map(str::to_owned);
    host.program(std::iter::once(program).chain(words))
}

/// The server on a host, in cgroup `app`.
#[track_caller]
pub(crate) fn serve(host: &Host) -> Process {
    let server = app(host, &format!("serve --http {HTTP} --tcp {TCP}"));
    let server = server.cgroup("app").spawn("app");
    for port in [HTTP, TCP] {
        host.wait_listening(port, SOON);
    }
    server
}

impl Rig {
    #[track_caller]
    pub(crate) fn new(name: &str, http: &str) -> Self {
        let pair = Pair::new(name);
        let app = serve(&pair.server.host);
        pair.server
            .serve("app", &owner("app"), &[(HTTP, http), (TCP, "tcp")]);
        pair.control.wait_endpoints("shop/app", 1);
        pair.wait_name("app");
        let [vip, _] = pair.vips("app");
        let mut rig = Self {
            pair,
            app,
            at_rest: [0; 2],
            to: format!("--http {vip}:{HTTP} --tcp {vip}:{TCP}"),
        };
        assert_eq!(rig.run("churn --times 2 --parallel 1"), "closed 2\n");
        rig.wait_closed();
        rig.at_rest = rig.agents().map(Agent::descriptors);
        rig
    }

    pub(crate) fn agents(&self) -> [&Agent; 2] {
        [&self.pair.client, &self.pair.server]
    }

    /// A task of the caller, as workload `shop/client`.
    pub(crate) fn task(&self, words: &str) -> Cmd {
        let words = format!("{words} {}", self.to);
        let task = app(&self.pair.client.host, &words);
        task.cgroup("client").deadline(TASK_MAX)
    }

    #[track_caller]
    pub(crate) fn run(&self, words: &str) -> String {
        self.task(words).ok()
    }

    #[track_caller]
    pub(crate) fn wait_closed(&self) {
        for agent in self.agents() {
            wait_until("all calls to be over", SOON, || {
                let open = agent.metrics().sum("mesh_open_connections", &[]);
                check(open == 0.0, format!("{open} are open"))
            });
        }
    }

    /// Waits until nothing of all that was done is left, and shows that the next call is served.
    #[track_caller]
    pub(crate) fn settled(&self) {
        self.wait_closed();
        for (agent, at_rest) in self.agents().into_iter().zip(self.at_rest) {
            let name = agent.host.name();
            wait_until(&format!("descriptors of {name}"), SETTLED_MAX, || {
                let open = agent.descriptors();
                check(
                    open <= at_rest + DESCRIPTORS_SPARE,
                    format!("{open} are open, {at_rest} before"),
                )
            });
        }
        assert_eq!(self.run("churn --times 4 --parallel 2"), "closed 4\n");
    }

    /// How much more memory each agent has than `before`, in KiB.
    pub(crate) fn grown(&self, before: [u64; 2]) -> [u64; 2] {
        let [client, server] = self.memory();
        [
            client.saturating_sub(before[0]),
            server.saturating_sub(before[1]),
        ]
    }

    pub(crate) fn memory(&self) -> [u64; 2] {
        self.agents().map(Agent::rss_kib)
    }
}

/// Waits until a running task has written a line that begins so, and returns its rest.
#[track_caller]
pub(crate) fn wait_said(task: &mut Process, begin: &str) -> String {
    wait_until(&format!("{begin:?} of a task"), TASK_MAX, || {
        let log = task.log();
        let found = log.lines().find_map(|line| line.strip_prefix(begin));
        match found {
            Some(rest) => Ok(rest.trim().to_owned()),
            None => {
                task.is_alive().unwrap_or_else(|e| panic!("{e}"));
                Err(log)
            }
        }
    })
}

/// Each framing down, each up, and both ways at once over plain bytes.
#[test]
fn a_gibibyte_passes_each_way_in_each_framing_with_its_digest() {
    let rig = Rig::new("a_gibibyte_passes_each_way", "http");
    let before = rig.memory();
    let text = rig.run(&format!("bodies --bytes {GIB}"));
    assert!(text.ends_with("both ways tcp\n"), "{text}");
    let grown = rig.grown(before);
    assert!(
        grown.iter().all(|kib| *kib < BUFFERS_KIB),
        "KiB more: {grown:?}"
    );
}

/// The same with a tenth of it where the protocol is told from the bytes.
#[test]
fn bodies_pass_unchanged_where_the_protocol_is_not_declared() {
    let rig = Rig::new("bodies_pass_unchanged_auto", "auto");
    let text = rig.run(&format!("bodies --bytes {}", GIB / 10));
    assert!(text.ends_with("both ways tcp\n"), "{text}");
}

#[test]
fn readers_that_stand_still_hold_back_nobody_else_and_a_bounded_memory() {
    let rig = Rig::new("readers_that_stand_still", "http");
    let go = rig.pair.client.host.dir().join("go");
    let before = rig.memory();
    let task = rig.task(&format!(
        "slow-readers --readers 200 --bytes {} --until {}",
        GIB / 64,
        go.display()
    ));
    let mut task = task.spawn("slow-readers");
    assert_eq!(wait_said(&mut task, "answered "), "300");
    // They hold half of a connection's credit, so that there is another one for those who call.
    let metrics = rig.pair.client.metrics();
    let dialled = metrics.sum("mesh_limit_used", &[("limit", "dialled")]);
    assert!((2.0..=4.0).contains(&dialled), "{dialled} connections");
    let grown = rig.grown(before);
    assert!(
        grown.iter().all(|kib| *kib < BUFFERS_KIB),
        "200 readers of 16 MiB stand still; KiB more: {grown:?}"
    );
    std::fs::write(&go, "").unwrap();
    assert_eq!(wait_said(&mut task, "whole "), "200");
    rig.wait_closed();
}

#[test]
fn writers_of_single_bytes_are_served() {
    let rig = Rig::new("writers_of_single_bytes", "http");
    assert_eq!(
        rig.run("slow-writers --writers 60 --bytes 1000"),
        "whole 60\n"
    );
    rig.wait_closed();
}

#[test]
fn small_calls_go_on_beside_bulk_transfers() {
    let rig = Rig::new("small_calls_go_on_beside_bulk", "http");
    let text = rig.run(&format!("fair --bytes {}", GIB / 4));
    let answered = text.trim().strip_prefix("answered ").unwrap();
    let answered: u64 = answered.parse().unwrap();
    // Two gibibytes pass beside them. A call that waited for a share of a transfer would be answered once or twice.
    assert!(100 <= answered, "{answered} small calls were answered");
    let memory = rig.memory();
    assert!(
        memory.iter().all(|kib| *kib < AGENT_KIB + BUFFERS_KIB),
        "KiB: {memory:?}"
    );
}
