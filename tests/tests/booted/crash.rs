//! What is killed or taken away on a booted host comes back by itself.

use meshwork_tests::machine::Machine;
use meshwork_tests::wait::{SOON, check, wait_until};

use meshwork_tests::booted::{Mesh, holder, wait_answer, workers};

/// The one that runs, or nothing.
fn worker(machine: &Machine) -> String {
    workers(machine).join(" ")
}

#[test]
fn killed_processes_and_a_flushed_ruleset_come_back() {
    let mesh = Mesh::new("killed_processes_and_a_flushed_ruleset");
    let (client, server) = mesh.pair();
    for machine in [&client, &server] {
        let old = worker(machine);
        machine.ok(&format!("kill -9 {old}"));
        wait_until("another worker", SOON, || {
            let new = worker(machine);
            check(!new.is_empty() && new != old, new)
        });
        wait_answer(&client, &server);

        let old = holder(machine);
        machine.ok(&format!("kill -9 {old}"));
        wait_until("another holder", SOON, || {
            let active = machine.run("systemctl is-active mesh-agent").stdout;
            let new = holder(machine);
            check(
                active == "active\n" && new != old,
                format!("{active} {new}"),
            )
        });
        wait_answer(&client, &server);

        let tables = || {
            let text = machine.ok("nft list tables");
            let mut tables: Vec<String> = text.lines().map(str::to_owned).collect();
            tables.sort();
            tables
        };
        let before = tables();
        assert!(
            before.iter().any(|t| t == "table inet meshwork_guard"),
            "{before:?}"
        );
        machine.ok("nft flush ruleset");
        wait_until("the tables to be back", SOON, || {
            let now = tables();
            check(now == before, format!("{now:?}"))
        });
        wait_answer(&client, &server);
    }
}
