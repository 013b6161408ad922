//! Health as systemd and a workload's own commands tell it, and services that are drained before their unit stops.

use std::time::Duration;

use meshwork_tests::machine::Machine;
use meshwork_tests::wait::{SOON, check, wait_until};

use meshwork_tests::booted::{Mesh, declare_web, install_deb, join, serve_web, wait_answer};

/// A program of a user that is not root, in groups of its own.
const APP_UNIT: &str = "\
[Service]
User=www-data
SupplementaryGroups=adm
ExecStart=sleep infinity
";
const EXEC: &str = "exec = [\"/usr/local/bin/healthy\", \"$HOME\", \"${USER} b\"]";
/// Says who it is and what it was given.
const HEALTHY: &str = "\
#!/bin/sh
{ id -un; id -Gn; printf '%s\\n' \"$@\"; grep CapEff /proc/self/status; } > /var/lib/check/said
if [ -e /var/lib/check/bad ]; then echo it is bad; exit 3; fi
if [ -e /var/lib/check/hang ]; then sleep 1234 & wait; fi
";

/// Makes the unit `app` the service `shop/app`, checked so.
fn declare_app(machine: &Machine, check: &str) {
    let text = format!(
        "namespace = \"shop\"\n[owner]\nunit = \"app.service\"\n[[service]]\nports = [{{ port = 81 }}]\n\
         check = {{ {check}, interval_s = 1, timeout_s = 2, fall = 1 }}\n"
    );
    machine.write("etc/meshwork/services.d/app.toml", &text);
}

#[track_caller]
fn wait_endpoints(mesh: &Mesh, service: &str, count: usize) {
    wait_until(&format!("{count} endpoints of {service}"), SOON, || {
        let output = mesh.meshctl(&format!("get services {service} -o json"));
        let value: serde_json::Value =
            serde_json::from_str(&output.stdout).map_err(|_| output.to_string())?;
        let endpoints = value.pointer("/status/endpoints");
        let endpoints = endpoints.and_then(|e| e.as_array()).cloned();
        let healthy = endpoints.unwrap_or_default();
        let healthy = healthy.iter().filter(|e| e["state"] == "healthy").count();
        check(healthy == count, output.stdout)
    });
}

#[track_caller]
fn wait_log(machine: &Machine, words: &str) {
    wait_until(words, SOON, || {
        let log = machine.journal("mesh-agent");
        check(log.contains(words), log)
    });
}

#[test]
fn commands_and_units_say_what_is_listed() {
    let mesh = Mesh::new("commands_and_units_say");
    let server = mesh.machine("server");
    install_deb(&server);
    server.write("etc/systemd/system/app.service", APP_UNIT);
    server.write("usr/local/bin/healthy", HEALTHY);
    server.ok("chmod 755 /usr/local/bin/healthy && mkdir -m 777 /var/lib/check");
    server.ok("systemctl daemon-reload && systemctl start app");
    declare_app(&server, EXEC);
    join(&server, &mesh.token()).ok();
    wait_endpoints(&mesh, "shop/app", 1);
    let said = server.ok("cat /var/lib/check/said");
    assert_eq!(
        said,
        "www-data\nwww-data adm\n$HOME\n${USER} b\nCapEff:\t0000000000000000\n"
    );
    server.ok("touch /var/lib/check/bad");
    wait_endpoints(&mesh, "shop/app", 0);
    wait_log(&server, "/usr/local/bin/healthy failed: it is bad");
    server.ok("rm /var/lib/check/bad");
    wait_endpoints(&mesh, "shop/app", 1);
    server.ok("touch /var/lib/check/hang");
    wait_endpoints(&mesh, "shop/app", 0);
    wait_log(&server, "no answer within 2 s");
    server.ok("rm /var/lib/check/hang");
    // All that it had begun was killed.
    wait_until("nothing of it to be left", SOON, || {
        let left = server.run("pgrep -a -f '[s]leep 1234'");
        check(left.stdout.is_empty(), left.to_string())
    });
    wait_endpoints(&mesh, "shop/app", 1);
    // A check a second must not fill the journal, nor the list of failed units.
    let journal = server.journal("");
    let lines: Vec<&str> = journal
        .lines()
        .filter(|l| l.contains("mesh-check-"))
        .collect();
    assert!(lines.is_empty(), "{lines:#?}");
    let units = server.ok("systemctl list-units --all --no-legend --state=failed");
    assert!(!units.contains("mesh-check-"), "{units}");
    let status = server.ok("ls /run/meshwork-agent/checks");
    assert!(status.lines().count() <= 1, "{status}");

    declare_app(&server, "systemd = true");
    wait_log(&server, "service shop/app of shop/app is healthy");
    server.ok("systemctl stop app");
    wait_endpoints(&mesh, "shop/app", 0);
    wait_log(&server, "app.service is inactive (dead)");
    server.ok("systemctl start app");
    wait_endpoints(&mesh, "shop/app", 1);
}

/// A page at once, and one that takes longer than nginx has for its own stop.
const NGINX: &str = "\
server {
  listen 80 default_server;
  location / { return 200 \"hello from $hostname\\n\"; }
  location /slow { alias /var/www/slow; limit_rate 20k; }
}
";
const SLOW_BYTES: u32 = 200_000;
/// Calls without end, each on a connection of its own, and tells of each how it went.
const LOAD: &str = "while [ ! -e /run/enough ]; do \
    curl -sS -m 20 -o /dev/null -w '%{http_code}\\n' http://web.shop.mesh.internal/ 2>&1; done > /var/lib/load";
/// It waits for calls that are open.
const STOP_MAX: Duration = Duration::from_secs(90);

/// One long call, and its answer.
const SLOW: &str = "curl -sS -m 60 -o /dev/null -w '%{http_code} %{size_download}\\n' \
    http://web.shop.mesh.internal/slow > /var/lib/slow 2>&1";

#[track_caller]
fn load_went_well(client: &Machine) {
    let load = client.ok("cat /var/lib/load");
    let bad: Vec<&str> = load.lines().filter(|line| *line != "200").collect();
    assert!(bad.is_empty() && load.lines().count() > 20, "{bad:?}");
}

#[test]
fn a_service_is_drained_before_its_unit_stops_and_put_back_at_its_start() {
    let mesh = Mesh::new("drained_before_its_unit_stops");
    let (client, mut server) = mesh.pair();
    let second = mesh.machine("second");
    install_deb(&second);
    serve_web(&second);
    for machine in [&server, &second] {
        machine.write("etc/nginx/sites-enabled/default", NGINX);
        machine.ok(&format!("head -c {SLOW_BYTES} /dev/zero > /var/www/slow"));
        machine.ok("systemctl reload nginx");
    }
    let said = server.ok("mesh-agent unit nginx --drain 60s");
    assert!(said.contains("is drained before it stops"), "{said}");
    // Only the first serves when the long call begins.
    let _slow = client.in_unit("client", SLOW).spawn("slow");
    wait_until("the long call to be open", SOON, || {
        let open = server.run("mesh-agent status");
        let calls = server.run("ss -Htn state established 'sport = :80'");
        check(!calls.stdout.is_empty(), format!("{calls} {open}"))
    });
    declare_web(&second);
    join(&second, &mesh.token()).ok();
    wait_endpoints(&mesh, "shop/web", 2);
    let _load = client.in_unit("client", LOAD).spawn("load");
    server
        .cmd("systemctl stop nginx")
        .deadline(STOP_MAX)
        .output()
        .ok();
    wait_log(&server, "drained by their unit, which stops");
    let slow = client.ok("cat /var/lib/slow");
    assert_eq!(slow, format!("200 {SLOW_BYTES}\n"), "it ended whole");
    wait_endpoints(&mesh, "shop/web", 1);
    server.ok("systemctl start nginx");
    wait_endpoints(&mesh, "shop/web", 2);
    for _ in 0..2 {
        server
            .cmd("systemctl restart nginx")
            .deadline(STOP_MAX)
            .output()
            .ok();
        wait_endpoints(&mesh, "shop/web", 2);
    }
    client.ok("touch /run/enough");
    load_went_well(&client);
    let refused = server.ok(
        "curl -sS --unix-socket /run/meshwork-agent/agent.sock http://agent/metrics | grep mesh_refused || true",
    );
    assert!(!refused.contains("app_unreachable"), "{refused}");

    // What the operator drained stays out over a start of the unit.
    server.ok("mesh-agent drain shop/web");
    server
        .cmd("systemctl restart nginx")
        .deadline(STOP_MAX)
        .output()
        .ok();
    let status = server.ok("mesh-agent status");
    assert!(status.contains("draining"), "{status}");
    server.ok("mesh-agent undrain shop/web");
    wait_endpoints(&mesh, "shop/web", 2);

    // A program that dies is started again without waiting for a drain, and comes back.
    server.ok(
        "systemctl kill --signal=KILL nginx && systemctl reset-failed nginx; systemctl start nginx",
    );
    wait_endpoints(&mesh, "shop/web", 2);
    // Without its agent a unit stops and starts as ever, and so does the host.
    server.ok("systemctl stop mesh-agent && systemctl restart nginx && systemctl start mesh-agent");
    wait_endpoints(&mesh, "shop/web", 2);
    second.ok("systemctl stop nginx");
    server.reboot();
    wait_answer(&client, &server);
    server.ok("mesh-agent leave");
    let left =
        server.run("ls -d /etc/systemd/system/mesh-drain-* /etc/systemd/system/nginx.service.d");
    assert_eq!(left.stdout, "", "{left}");
    let active = server.run("systemctl is-active mesh-drain-nginx nginx");
    assert_eq!(active.stdout, "inactive\nactive\n", "{active}");
}
