//! Minutes of mixed work: nothing fails, and the agents' memory stays where it was.
//!
//! How long is said by `MESH_SOAK_SECONDS`, which `cargo xtask test --tier namespaces soak` sets to minutes; in a
//! run of the whole tier it is short.

use std::time::{Duration, Instant};

use meshwork_tests::agent::Agent;

use crate::torture::{Rig, wait_said};
use crate::torture_http2::Calls;

/// Where nobody says how long.
const SHORT: Duration = Duration::from_secs(20);
/// Between two looks at the memory.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// How often the memory is said; who runs it by `cargo xtask test` sees it.
const SAYINGS: u32 = 10;
/// What the last third may have more than the first, beside a tenth: an allocator's own moods.
const SPARE_KIB: u64 = 6 * 1024;
/// Before the first look: pools and buffers fill once.
const WARM_PARTS: u32 = 10;

#[test]
#[expect(clippy::print_stdout, reason = "how the memory goes is its result")]
fn a_soak_of_mixed_work_fails_nothing_and_keeps_memory_flat() {
    let seconds = std::env::var("MESH_SOAK_SECONDS").ok();
    let length = seconds.map_or(SHORT, |text| {
        Duration::from_secs(
            text.parse()
                .expect("MESH_SOAK_SECONDS is a number of seconds"),
        )
    });
    // HTTP/1.1 and plain bytes by one pair of programs, HTTP/2 and gRPC by another, through the same agents.
    let calls = Calls::beside(Rig::new("soak", "http"));
    let rig = &calls.rig;
    let end = rig.pair.client.host.dir().join("end");
    let refused = |agent: &Agent| agent.metrics().sum("mesh_refused_total", &[]);
    let before = rig.agents().map(refused);
    let words = format!("mixed --seed 1 --until {}", end.display());
    let mut tasks = [
        rig.task(&words).spawn("mixed"),
        calls.task(&words).spawn("mixed-http2"),
    ];
    let begun = Instant::now();
    let mut seen: [Vec<u64>; 2] = Default::default();
    let mut said = 0;
    while begun.elapsed() < length {
        for task in &mut tasks {
            task.is_alive().unwrap_or_else(|e| panic!("{e}"));
        }
        if length * said / SAYINGS <= begun.elapsed() {
            said += 1;
            let [client, server] = rig.memory();
            println!(
                "after {:3} s: the agents have {client} and {server} KiB",
                begun.elapsed().as_secs()
            );
        }
        if length / WARM_PARTS < begun.elapsed() {
            for (seen, kib) in seen.iter_mut().zip(rig.memory()) {
                seen.push(kib);
            }
        }
        std::thread::sleep(LOOK_EVERY);
    }
    std::fs::write(&end, "").unwrap();
    let [first, second] = &mut tasks;
    let done = [first, second].map(|task| wait_said(task, "calls ").parse::<u64>().unwrap());
    println!(
        "{} calls over HTTP/1.1 and TCP, {} over HTTP/2 and gRPC",
        done[0], done[1]
    );
    assert!(done.iter().all(|calls| 0 < *calls));
    for ((agent, before), seen) in rig.agents().into_iter().zip(before).zip(&seen) {
        let third = seen.len() / 3;
        let (first, last) = (median(&seen[..third]), median(&seen[seen.len() - third..]));
        assert!(
            last <= first + first / 10 + SPARE_KIB,
            "the agent of {} grew from {first} to {last} KiB in {done:?} calls",
            agent.host.name()
        );
        assert_eq!(refused(agent), before, "{}", agent.log());
    }
    calls.settled();
}

fn median(seen: &[u64]) -> u64 {
    let mut sorted = seen.to_vec();
    sorted.sort_unstable();
    sorted.get(sorted.len() / 2).copied().unwrap_or_default()
}
