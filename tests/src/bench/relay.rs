//! A pair of relays that do nothing else: the floor of all that passes bytes through two more programs.

use super::subjects::{Sides, Way};
use crate::binary;
use crate::host::Host;
use crate::process::Process;
use crate::wait::SOON;

/// The cgroup of its processes.
pub(super) const CGROUP: &str = "relay";

/// Where its caller's side listens.
pub(super) const fn port(way: Way) -> u16 {
    8600 + way.app_port()
}

const fn port_between(way: Way) -> u16 {
    8700 + way.app_port()
}

pub(super) fn start(sides: &Sides) -> Vec<Process> {
    let mut processes = Vec::new();
    for way in Way::ALL {
        let between = format!("{}:{}", sides.server.v4(), port_between(way));
        let app = format!("127.0.0.1:{}", way.app_port());
        processes.push(spawn(&sides.server, port_between(way), &between, &app));
        let near = format!("{}:{}", sides.client.v4(), port(way));
        processes.push(spawn(&sides.client, port(way), &near, &between));
    }
    processes
}

fn spawn(host: &Host, port: u16, listen: &str, to: &str) -> Process {
    let program = binary("meshwork-app").display().to_string();
    let words = [&program, "relay", "--listen", listen, "--to", to];
    let process = host.program(words).cgroup(CGROUP).spawn("relay");
    host.wait_listening(port, SOON);
    process
}
