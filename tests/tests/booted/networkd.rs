//! systemd-networkd removes routes and rules that it did not make, and may adopt links. Ours it leaves alone.

use meshwork_tests::machine::Machine;
use meshwork_tests::wait::{SOON, check, wait_until};

use meshwork_tests::booted::{Mesh, wait_answer};

/// A host whose networkd manages every link that it may. On `lo` the address would make its whole network local.
fn manage_all(machine: &Machine) {
    let text = format!(
        "[Match]\nName=!lo\n[Network]\nAddress={}/24\nAddress={}/64\nIPv6AcceptRA=no\n",
        machine.host.v4(),
        machine.host.v6()
    );
    machine.write("etc/systemd/network/10-all.network", &text);
}

/// What the kernel was told to forget, of ours, while networkd was started anew.
#[track_caller]
fn taken_by_restart(machine: &Machine) -> String {
    machine.ok("systemd-run --quiet --unit=watch sh -c 'exec ip monitor rule route address > /run/watched'");
    wait_until("the watch to see", SOON, || {
        // A route of no consequence, until it is seen to come and go.
        machine.run("ip route add 192.0.2.1/32 dev lo; ip route delete 192.0.2.1/32 dev lo");
        let seen = machine.ok("cat /run/watched");
        check(seen.contains("Deleted 192.0.2.1"), seen)
    });
    machine.ok("systemctl restart systemd-networkd");
    // It may not write all settings of a link in a container, and says `failed` then; it is through with it all the same.
    wait_until("the host's link to be dealt with", SOON, || {
        let links = machine.run("networkctl --no-legend").stdout;
        let eth0 = links.lines().find(|line| line.contains("eth0"));
        let done = |line: &str| line.contains("configured") || line.contains("failed");
        check(eth0.is_some_and(done), links)
    });
    machine.ok("systemctl stop watch");
    let seen = machine.ok("cat /run/watched");
    let ours = |line: &&str| {
        line.starts_with("Deleted") && ["mesh0", "7441", "744:"].iter().any(|w| line.contains(w))
    };
    seen.lines().filter(ours).collect::<Vec<_>>().join("\n")
}

#[test]
fn networkd_may_be_restarted_and_takes_nothing_of_ours() {
    let mesh = Mesh::new("networkd_may_be_restarted");
    let (client, server) = mesh.pair();
    manage_all(&client);
    let taken = taken_by_restart(&client);
    assert_eq!(taken, "", "networkd took it away");
    let links = client.ok("networkctl --no-legend");
    let mesh0 = links.lines().find(|line| line.contains("mesh0"));
    assert!(mesh0.is_some_and(|l| l.contains("unmanaged")), "{links}");
    wait_answer(&client, &server);
}
