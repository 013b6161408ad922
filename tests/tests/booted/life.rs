//! A host's life: installed, joined, called, booted again and again, and rid of all of it.

use std::collections::BTreeSet;

use meshwork_tests::facts;
use meshwork_tests::wait::{SOON, check, wait_until};

use meshwork_tests::booted::{
    Mesh, declare_client, declare_web, facts_of, install_deb, install_rpm, join, rpm_system,
    run_client, serve_web, wait_answer,
};

#[test]
fn hosts_are_installed_join_boot_without_control_and_are_rid_of_it_again() {
    let mut mesh = Mesh::new("hosts_are_installed");
    let (mut deb, mut rpm) = (mesh.machine("deb"), mesh.machine("rpm"));
    rpm_system(&rpm);
    run_client(&deb);
    serve_web(&rpm);
    for machine in [&deb, &rpm] {
        // Then the kernel adds a route of it.
        wait_until("the link's own address to be in use", SOON, || {
            let tentative = machine.ok("ip -o address show tentative");
            check(tentative.is_empty(), tentative)
        });
    }
    let before = [facts_of(&deb), facts_of(&rpm)];
    install_deb(&deb);
    install_rpm(&rpm);
    for (machine, before) in [&deb, &rpm].into_iter().zip(&before) {
        let now = facts_of(machine);
        let told = |facts: &BTreeSet<String>| -> Vec<String> {
            let of = |fact: &&String| facts::KERNEL.iter().any(|line| fact.starts_with(line));
            facts.iter().filter(of).cloned().collect()
        };
        assert_eq!(
            told(&now),
            told(before),
            "an installation changes no traffic"
        );
        let enabled = machine.run("systemctl is-enabled mesh-agent mesh-guard mesh-join");
        assert_eq!(enabled.stdout, "disabled\ndisabled\ndisabled\n");
    }
    declare_client(&deb);
    declare_web(&rpm);
    let tokens = [mesh.token(), mesh.token()];
    for (machine, token) in [&deb, &rpm].into_iter().zip(&tokens) {
        let said = join(machine, token).ok();
        let name = machine.host.name();
        assert!(
            said.contains(&format!("joined corp.test as host {name}")),
            "{said}"
        );
        assert!(said.contains("mesh-agent.service runs"), "{said}");
        assert!(said.contains("shop/"), "what is in the mesh: {said}");
    }
    wait_answer(&deb, &rpm);
    // It was carried, and its caller known.
    wait_until("the edge", SOON, || {
        let edges = mesh.meshctl("edges -o json");
        let carried = edges.stdout.contains("ns/shop/sa/client");
        check(carried && edges.stdout.contains("mTLS"), edges.to_string())
    });

    let again = join(&deb, &tokens[0]).ok();
    assert!(again.contains("has already joined"), "{again}");

    deb.reboot();
    rpm.reboot();
    wait_answer(&deb, &rpm);

    mesh.control.power_off();
    deb.reboot();
    rpm.lose_power();
    rpm.boot();
    wait_answer(&deb, &rpm);
    let status = deb.ok("mesh-agent status");
    assert!(status.contains("stale since"), "{status}");
    mesh.control.boot();
    mesh.wait_control();
    wait_until("the host to be live again", SOON, || {
        let status = deb.ok("mesh-agent status");
        check(status.contains("live at"), status)
    });
    wait_answer(&deb, &rpm);

    for machine in [&deb, &rpm] {
        let left = machine.ok("mesh-agent leave");
        assert!(left.contains("control has forgotten it"), "{left}");
    }
    deb.ok("apt-get purge -y -q meshwork-agent");
    rpm.ok("rm -r /etc/meshwork/services.d/* && rpm --erase meshwork-agent");
    for (machine, before) in [&deb, &rpm].into_iter().zip(&before) {
        facts::assert_same(before, &facts_of(machine));
    }
}
