//! Hosts that are taken into the mesh as they are: what listens is found, and units are ordered.

use meshwork_tests::machine::Machine;
use meshwork_tests::wait::{SOON, check, wait_until};

use meshwork_tests::booted::{Mesh, declare_client, install_deb, join, run_client, serve_web};

const ADDITION: &str = "/etc/systemd/system/nginx.service.d/meshwork.conf";

/// When a unit was started and when it was active, in microseconds since the boot.
fn times(machine: &Machine, unit: &str) -> (u64, u64) {
    let of = |property: &str| {
        let text = machine.ok(&format!(
            "systemctl show --property {property} --value {unit}"
        ));
        text.trim().parse().expect("a time")
    };
    (
        of("InactiveExitTimestampMonotonic"),
        of("ActiveEnterTimestampMonotonic"),
    )
}

#[test]
fn what_listens_is_discovered_and_its_unit_waits_for_the_agent() {
    let mesh = Mesh::new("what_listens_is_discovered");
    let (client, mut server) = (mesh.machine("client"), mesh.machine("server"));
    for machine in [&client, &server] {
        install_deb(machine);
    }
    run_client(&client);
    serve_web(&server);
    declare_client(&client);
    join(&client, &mesh.token()).ok();

    let shown = server.ok("mesh-agent discover --namespace shop");
    assert!(
        shown.contains("unit = \"nginx.service\"") && shown.contains("port = 80"),
        "{shown}"
    );
    assert_eq!(server.ok("ls /etc/meshwork/services.d"), "");
    let joined = join(&server, &format!("{} --discover shop", mesh.token())).ok();
    for said in ["wrote /etc/meshwork/services.d/nginx.toml", "shop/nginx"] {
        assert!(joined.contains(said), "no `{said}`: {joined}");
    }
    let wait_answer = || {
        wait_until("the call to be answered", SOON, || {
            let line = "curl -sS -m 10 http://nginx.shop.mesh.internal/";
            let output = client.in_unit("client", line).output();
            check(output.stdout == "hello from server\n", output.to_string())
        });
    };
    wait_answer();
    let again = server.ok("mesh-agent discover --namespace shop");
    assert!(again.starts_with("nothing is proposed"), "{again}");

    server.ok("mesh-agent unit nginx");
    server.reboot();
    let (agent, nginx) = (times(&server, "mesh-agent"), times(&server, "nginx"));
    assert!(agent.1 <= nginx.0, "the agent {agent:?}, nginx {nginx:?}");
    wait_answer();
    server.ok("mesh-agent leave");
    let left = server.run(&format!("ls {ADDITION}"));
    assert!(!left.status.success(), "{left}");
}
