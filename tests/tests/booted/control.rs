//! What an operator does as root to a control that is stopped.

use meshwork_tests::booted::Mesh;

#[test]
fn what_root_restores_and_renews_belongs_to_the_daemon() {
    let mesh = Mesh::new("what_root_restores_and_renews");
    let control = &mesh.control;
    let strangers = || {
        control.ok(
            "find /var/lib/meshwork-control ! -user meshwork-control -o ! -group meshwork-control",
        )
    };
    mesh.meshctl("backup --out /root/mesh.backup").ok();
    for command in ["renew-issuer", "restore /root/mesh.backup --force"] {
        control.ok("systemctl stop mesh-control");
        control.ok(&format!("mesh-control {command}"));
        assert_eq!(strangers(), "", "after {command}");
        control.ok("systemctl start mesh-control");
        mesh.wait_control();
        assert_eq!(strangers(), "", "when control runs after {command}");
    }
}
