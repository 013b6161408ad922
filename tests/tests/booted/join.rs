//! `mesh-agent join` on booted hosts: by hand and at the first boot, and when the agent can not be started.

use meshwork_tests::facts;
use meshwork_tests::machine::Machine;
use meshwork_tests::wait::{SOON, check, wait_until};

use meshwork_tests::booted::{
    Mesh, declare_client, declare_web, facts_of, install_deb, join, run_client, serve_web,
    wait_answer,
};

/// An agent that never comes to serve.
const BROKEN: &str = "etc/systemd/system/mesh-agent.service.d/broken.conf";

#[test]
fn a_join_that_can_not_serve_leaves_the_host_as_it_was_and_may_be_repeated() {
    let mesh = Mesh::new("a_join_that_can_not_serve");
    let (client, server) = mesh.installed();
    join(&server, &mesh.token()).ok();

    // Before control is asked: another program has the mesh port.
    let token = mesh.token();
    client.write(
        "etc/nginx/conf.d/taken.conf",
        "server { listen 7441; return 404; }\n",
    );
    client.ok("systemctl start nginx");
    let before = facts_of(&client);
    let refused = join(&client, &token);
    assert!(
        !refused.status.success() && refused.stderr.contains(":7441 is taken by another program"),
        "{refused}"
    );
    facts::assert_same(&before, &facts_of(&client));
    client.ok("systemctl stop nginx");

    // After it: its unit ends at once.
    client.write(
        BROKEN,
        "[Service]\nExecStart=\nExecStart=/bin/sh -c 'echo is broken; exit 1'\n",
    );
    client.ok("systemctl daemon-reload");
    let before = facts_of(&client);
    let refused = join(&client, &token);
    assert!(!refused.status.success(), "{refused}");
    for said in ["did not come to serve", "as it was", "is broken"] {
        assert!(refused.stderr.contains(said), "no `{said}`: {refused}");
    }
    // But for the key, by which the same token joins again.
    client.ok("mv /var/lib/meshwork-agent/agent.key /run/kept && rmdir /var/lib/meshwork-agent");
    facts::assert_same(&before, &facts_of(&client));
    client.ok(
        "install -d -m 700 /var/lib/meshwork-agent && mv /run/kept /var/lib/meshwork-agent/agent.key",
    );
    client.ok(&format!(
        "rm -r $(dirname /{BROKEN}) && systemctl daemon-reload"
    ));
    join(&client, &token).ok();
    wait_answer(&client, &server);
}

#[test]
fn images_join_at_their_first_boot_by_a_credential_or_the_environment() {
    let mesh = Mesh::new("images_join_at_their_first_boot");
    let (mut client, mut server) = (mesh.machine("client"), mesh.machine("server"));
    run_client(&client);
    serve_web(&server);
    for machine in [&mut client, &mut server] {
        install_deb(machine);
        machine.ok("systemctl enable mesh-join");
    }
    declare_web(&server);
    declare_client(&client);
    client.power_off();
    client.boot_with(&[format!("--set-credential=mesh.join-token:{}", mesh.token())]);
    server.power_off();
    server.boot_with(&[format!("--setenv=MESH_JOIN_TOKEN={}", mesh.token())]);
    wait_answer(&client, &server);
    // The next boot has nothing to join.
    client.reboot();
    wait_answer(&client, &server);
    skipped(&client);
}

#[track_caller]
fn skipped(machine: &Machine) {
    wait_until("the join to be skipped", SOON, || {
        let state = machine.ok("systemctl show --property ConditionResult --value mesh-join");
        check(state == "no\n", state)
    });
}
