//! Exchanges that are cut: whoever dies, nobody takes a part for the whole, and nothing is left behind.

use meshwork_tests::agent::Agent;
use meshwork_tests::process::Process;

use crate::torture::{Rig, wait_said};

/// Cuts all kinds of transfers in their middle by `kill`, and shows that both ends saw that they were cut.
#[track_caller]
fn cut(rig: &mut Rig, who: &str, kill: impl FnOnce(&mut Rig)) {
    let mut task = rig.task("endless").spawn(&format!("endless-{who}"));
    wait_said(&mut task, "flowing");
    kill(rig);
    all_cut(&mut task, 14, who);
    rig.settled();
    let server = rig.app.log();
    assert!(!server.contains("upload whole"), "{who}: {server}");
}

/// Waits until all transfers of the task have ended, and shows that none looks whole.
#[track_caller]
pub(crate) fn all_cut(task: &mut Process, transfers: usize, who: &str) {
    assert_eq!(wait_said(task, "ended "), transfers.to_string(), "{who}");
    let text = task.log();
    assert!(!text.contains("LOOKS WHOLE"), "{who}: {text}");
    assert_eq!(text.matches(" cut: ").count(), transfers, "{who}: {text}");
}

#[test]
fn an_agent_that_is_killed_leaves_no_body_that_looks_whole() {
    let mut rig = Rig::new("an_agent_that_is_killed", "http");
    cut(&mut rig, "server", |rig| {
        rig.pair.server.kill9();
        rig.pair.server.start();
    });
    cut(&mut rig, "client", |rig| {
        rig.pair.client.kill9();
        rig.pair.client.start();
    });
}

#[test]
fn a_worker_that_is_killed_leaves_no_body_that_looks_whole() {
    let mut rig = Rig::new("a_worker_that_is_killed", "auto");
    cut(&mut rig, "server", |rig| rig.pair.server.kill_worker());
    cut(&mut rig, "client", |rig| rig.pair.client.kill_worker());
}

#[test]
fn random_resets_leave_nothing_open() {
    for seed in [1, 2] {
        let rig = Rig::new("random_resets", "http");
        let text = rig.run(&format!("resets --seed {seed} --times 3000"));
        assert!(text.contains("whole ") && text.contains("cut "), "{text}");
        rig.settled();
        let served = rig.agents().map(Agent::log);
        assert!(
            served.iter().all(|log| !log.contains("broke the rules")),
            "seed {seed}"
        );
    }
}
