//! How exposed the units are, as systemd counts it.

use meshwork_tests::booted::Mesh;
use meshwork_tests::machine::Machine;

/// What was promised of control.
const CONTROL_MAX: f64 = 2.0;
/// What the agent has: it is root, changes the packet filter and speaks to the network, and its unit says why it needs each
/// right. More would be a right that was added; whoever adds one says why there, and changes this.
const AGENT_MAX: f64 = 2.7;

/// `→ Overall exposure level for mesh-control.service: 1.5 OK :-)`
#[track_caller]
fn exposure(machine: &Machine, unit: &str) -> f64 {
    let text = machine.ok(&format!(
        "systemd-analyze security --no-pager {unit}.service"
    ));
    let line = text
        .lines()
        .find(|line| line.contains("Overall exposure level"));
    let word = line.and_then(|line| line.split(": ").nth(1)?.split(' ').next());
    let level = word.and_then(|word| word.parse().ok());
    level.unwrap_or_else(|| panic!("no level: {text}"))
}

#[test]
fn units_are_exposed_no_more_than_promised() {
    let mesh = Mesh::new("units_are_exposed");
    let (client, _server) = mesh.pair();
    for (machine, unit, most) in [
        (&mesh.control, "mesh-control", CONTROL_MAX),
        (&client, "mesh-agent", AGENT_MAX),
    ] {
        let level = exposure(machine, unit);
        assert!(
            level <= most,
            "{unit} is exposed by {level}, more than {most}"
        );
        // What is counted is the unit that runs.
        let active = machine.ok(&format!("systemctl is-active {unit}"));
        assert_eq!(active, "active\n");
    }
}
