//! What stands when a host boots and its agent does not run yet.

use meshwork_tests::wait::{SOON, check, wait_until};

use meshwork_tests::booted::Mesh;

/// Must be mTLS, and is captured at the host's own address.
const STRICT: &str = "\
apiVersion: v1
kind: Service
metadata:
  name: web
  namespace: shop
  annotations: {meshwork.io/transport: strict, meshwork.io/capture: vip+real}
spec: {ports: [{port: 80, appProtocol: http}]}
";

/// Calls as soon as there is a network.
const EARLY: &str = "\
[Unit]
Wants=network.target network-online.target
After=network.target network-online.target
[Service]
Type=oneshot
ExecStart=sh -c 'curl -sS -m 5 http://ADDRESS/ > /var/lib/early 2>&1; echo \"ended $?\" >> /var/lib/early'
[Install]
WantedBy=multi-user.target
";

#[test]
fn guard_and_mesh0_stand_before_the_network_and_no_early_program_gets_plaintext() {
    let mesh = Mesh::new("guard_and_mesh0_stand_before");
    let (mut client, server) = mesh.pair();
    mesh.control.write("root/web.yaml", STRICT);
    mesh.meshctl("apply -f /root/web.yaml").ok();
    let address = server.host.v4().to_string();
    wait_until("the client's guard to know it", SOON, || {
        let guard = client.ok("nft list table inet meshwork_guard");
        check(guard.contains(&address), guard)
    });
    let early = EARLY.replace("ADDRESS", &address);
    client.write("etc/systemd/system/early.service", &early);
    client.ok("systemctl daemon-reload && systemctl enable early && systemctl mask mesh-agent");
    client.power_off();
    // Nothing refuses at the other end: what leaves the client is answered.
    server.ok("systemctl stop mesh-agent mesh-guard");
    client.boot();

    assert_eq!(
        client.run("systemctl is-active mesh-agent").stdout,
        "inactive\n"
    );
    let stood_at = |unit: &str| {
        let show = format!("systemctl show -p ActiveEnterTimestampMonotonic --value {unit}");
        let at: u64 = client.ok(&show).trim().parse().unwrap();
        assert_ne!(at, 0, "{unit} never was");
        at
    };
    let guard = stood_at("mesh-guard.service");
    for later in [
        "network-pre.target",
        "network.target",
        "network-online.target",
        "early.service",
    ] {
        // A oneshot that ended is not active: when it was begun.
        let at = if later == "early.service" {
            let show = format!("systemctl show -p ExecMainStartTimestampMonotonic --value {later}");
            client.ok(&show).trim().parse().unwrap()
        } else {
            stood_at(later)
        };
        assert!(guard <= at, "{later} at {at}, the guard at {guard}");
    }
    // It is no chance of this boot.
    let before = client.ok("systemctl show -p Before --value mesh-guard");
    for later in ["network-pre.target", "mesh-agent.service"] {
        assert!(
            before.split_whitespace().any(|unit| unit == later),
            "{before}"
        );
    }
    let after = client.ok("systemctl show -p After --value network.target");
    assert!(after.contains("network-pre.target"), "{after}");
    let link = client.ok("ip -o link show mesh0");
    assert!(link.contains("UP"), "{link}");
    // Refused, neither answered nor left waiting.
    let said = client.ok("cat /var/lib/early");
    assert!(said.ends_with("ended 7\n"), "{said}");

    // Without the guard the same program gets its answer in plaintext.
    client.ok("systemctl stop mesh-guard && systemctl restart early");
    let said = client.ok("cat /var/lib/early");
    assert_eq!(said, "hello from server\nended 0\n");
}
