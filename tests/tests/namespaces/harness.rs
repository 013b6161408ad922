//! What the other tests stand on, tried without the mesh.

use std::time::Duration;

use meshwork_tests::process::Cmd;
use meshwork_tests::servers;
use meshwork_tests::site::Site;

#[test]
fn hosts_reach_each_other_and_nothing_else() {
    let site = Site::new("hosts_reach_each_other_and_nothing_else");
    let (a, b) = (site.host("a"), site.host("b"));
    let _web = servers::nginx(&b, "web", 80, "location / { return 200 \"from b\\n\"; }");
    for address in [b.v4().to_string(), format!("[{}]", b.v6())] {
        assert_eq!(
            a.ok(&format!("curl -sS -m 5 http://{address}/")),
            "from b\n"
        );
    }
    let log = servers::access_log(&b, "web");
    assert!(log.contains(&a.v4().to_string()), "{log}");
    let outside = a.run("ip route get 192.0.2.1");
    assert_ne!(outside.code(), 0, "{outside}");
}

#[test]
fn programs_run_as_who_and_where_they_were_told() {
    let site = Site::new("programs_run_as_who_and_where_they_were_told");
    let host = site.host("a");
    let who = |command: Cmd| command.ok();
    let text = who(host
        .cmd("id -u; cat /proc/self/cgroup")
        .user(20_001)
        .cgroup("client"));
    assert!(text.starts_with("20001\n"), "{text}");
    assert!(text.contains(&host.cgroup_name("client")), "{text}");
    assert!(host.ok("cat /etc/resolv.conf").contains("10.77.0.1"));
}

#[test]
fn nothing_of_a_site_stays() {
    let site = Site::new("nothing_of_a_site_stays");
    let prefix = site.prefix().to_owned();
    let host = site.host("a");
    let server = host.cmd("exec sleep 1000").spawn("sleep");
    let pid = server.pid();
    let (dir, cgroup) = (host.dir(), host.cgroup("shell"));
    drop((host, site));
    drop(server);
    assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists());
    assert!(!dir.exists() && !cgroup.exists());
    let names = std::fs::read_dir("/run/netns").unwrap();
    let left = names.map(|e| e.unwrap().file_name().into_string().unwrap());
    assert_eq!(left.filter(|name| name.starts_with(&prefix)).count(), 0);
}

#[test]
#[should_panic(expected = "did not end within")]
fn a_command_that_hangs_fails_its_test() {
    let site = Site::new("a_command_that_hangs_fails_its_test");
    let host = site.host("a");
    let command = host
        .cmd("exec sleep 1000")
        .deadline(Duration::from_millis(200));
    drop(command.output());
}

/// So that a failure of the same call through the mesh says something about the mesh.
#[test]
fn servers_and_clients_work_without_the_mesh() {
    let site = Site::new("servers_and_clients_work_without_the_mesh");
    let (a, b) = (site.host("a"), site.host("b"));
    let to = b.v4();
    let _redis = servers::redis(&b, "redis", 6379);
    assert_eq!(a.ok(&format!("redis-cli -h {to} ping")), "PONG\n");
    let _postgresql = servers::postgresql(&b, "postgresql", 5432);
    let text = a.ok(&format!(
        "psql -h {to} -U postgres -X -A -t -c 'select inet_client_addr()'"
    ));
    assert_eq!(text.trim(), a.v4().to_string());
    let _mariadb = servers::mariadb(&b, "mariadb", 3306);
    let text = a.ok(&format!(
        "mariadb --no-defaults --skip-ssl -h {to} -u mesh -N -e 'select user()'"
    ));
    assert_eq!(text.trim(), format!("mesh@{}", a.v4()));
    let _nghttpd = servers::nghttpd(&b, "nghttpd", 8080);
    std::fs::write(b.dir().join("nghttpd/www/index.html"), "over h2\n").unwrap();
    let text = a.ok(&format!("nghttp -v http://{to}:8080/"));
    assert!(text.contains("x-sum: 7"), "{text}");
    let text = a.ok(&format!(
        "curl -sS --http2-prior-knowledge http://{to}:8080/"
    ));
    assert_eq!(text, "over h2\n");
}
