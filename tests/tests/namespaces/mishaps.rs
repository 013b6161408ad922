//! What happens to a machine that is nobody's fault: it gets another address, it sleeps.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use meshwork_tests::agent::Agent;
use meshwork_tests::control::{Control, TokenOptions};
use meshwork_tests::host::Host;
use meshwork_tests::servers;
use meshwork_tests::site::Site;
use meshwork_tests::wait::{SOON, check, wait_until};
use serde_json::Value;

use crate::pair::{Pair, mesh_name, owner};

/// What could not be kept is tried again every 30 s.
const KEPT: Duration = Duration::from_secs(60);

/// Joins as most do: control sees the address.
#[track_caller]
fn joined_as_seen(control: &Control, host: &Host) -> Agent {
    let agent = Agent::new(host);
    let token = control.token(&TokenOptions::default().0);
    let name = host.name();
    agent
        .command(&format!("join {token} --host-name {name}"))
        .ok();
    agent.started()
}

fn host_of(control: &Control, name: &str) -> Value {
    let hosts = control.get("hosts");
    let host = hosts.iter().find(|h| h["metadata"]["name"] == name);
    host.cloned().unwrap_or_default()
}

#[track_caller]
fn wait_answer(client: &Agent, name: &str) {
    let call = format!("curl -sS -m 5 http://{}/", mesh_name(name));
    wait_until(&format!("an answer of {name}"), SOON, || {
        let answer = client.host.cmd(&call).cgroup("client").output();
        check(answer.stdout.contains("hello"), answer.to_string())
    });
}

/// As when a lease of DHCP ends in another address.
#[test]
fn a_host_that_moves_is_found_at_its_new_address() {
    let site = Site::new("mishap_moves");
    let control = Control::start(&site);
    let server = joined_as_seen(&control, &site.host("server"));
    let client = joined_as_seen(&control, &site.host("client"));
    client.serve("client", &owner("client"), &[]);
    let locations = "location / { return 200 \"hello\\n\"; }";
    let _web = servers::nginx(&server.host, "web", 80, locations);
    server.serve("web", &owner("web"), &[(80, "http")]);
    control.wait_endpoints("shop/web", 1);
    wait_answer(&client, "web");

    let before = server.host.v4();
    server.host.ok("ip addr add 10.77.0.201/24 dev eth0");
    server.host.ok(&format!("ip addr del {before}/24 dev eth0"));
    // The first address of a subnet takes the others of it along.
    server.host.ok("ip addr replace 10.77.0.201/24 dev eth0");
    wait_until("control to hear of it", SOON, || {
        let host = host_of(&control, "server");
        check(host.to_string().contains("10.77.0.201"), host.to_string())
    });
    control.wait_endpoints("shop/web", 1);
    wait_answer(&client, "web");
    let status = server.command("status").ok();
    assert!(status.contains("10.77.0.201"), "{status}");
    assert!(!status.contains(&before.to_string()), "{status}");
    assert!(
        server.log().contains("this host's address changed"),
        "{}",
        server.log()
    );

    // A further address is no move.
    let also = "ip addr add 10.77.0.202/24 dev eth0";
    server.host.ok(also);
    let mut server = server;
    server.stop();
    server.start();
    control.wait_endpoints("shop/web", 1);
    wait_answer(&client, "web");
    let host = host_of(&control, "server").to_string();
    assert!(host.contains("10.77.0.201"), "{host}");
}

/// Stops all processes of a host's cgroup, or lets them go on.
fn freeze(host: &Host, cgroup: &str, frozen: bool) {
    let file = host.cgroup(cgroup).join("cgroup.freeze");
    fs::write(file, if frozen { "1" } else { "0" }).expect("the cgroup is there");
}

/// As a laptop's lid, or a hypervisor that pauses a guest: nothing runs, nothing arrives, and all goes on later.
#[test]
fn a_host_that_slept_goes_on() {
    let pair = Pair::new("mishap_sleeps");
    let _web = pair.web("http", "");
    wait_answer(&pair.client, "web");
    for (agent, other) in [(&pair.server, "web"), (&pair.client, "client")] {
        let host = &agent.host;
        let name = host.name().to_owned();
        let sleep = |asleep: bool| {
            host.set_link(!asleep);
            for cgroup in ["agent", other] {
                freeze(host, cgroup, asleep);
            }
        };
        sleep(true);
        wait_until("control to miss it", Control::NOTICED, || {
            let host = host_of(&pair.control, &name);
            check(host["status"]["lease"] == "stale", host.to_string())
        });
        sleep(false);
        wait_answer(&pair.client, "web");
        pair.control.wait_endpoints("shop/web", 1);
        wait_until("its checks to pass", SOON, || {
            let page = agent.command("check").to_string();
            check(page.contains("0 failed"), page)
        });
    }
}

/// A small file system in the place of a directory, with what the directory had.
struct SmallDisk(PathBuf);

impl SmallDisk {
    #[track_caller]
    fn over(directory: &Path, mib: u32) -> Self {
        let at = directory.display();
        run(&format!(
            "cp -a {at} {at}.was && mount -t tmpfs -o size={mib}m,mode=0700 tmpfs {at} && cp -a {at}.was/. {at}/"
        ));
        Self(directory.to_owned())
    }

    fn filler(&self) -> PathBuf {
        self.0.join("a-log-that-grew")
    }

    #[track_caller]
    fn fill(&self) {
        let file = self.filler();
        let mut file = fs::File::create(file).expect("room for a file");
        let much = vec![7; 64 * 1024];
        let end = loop {
            if let Err(error) = file.write_all(&much) {
                break error;
            }
        };
        assert_eq!(end.kind(), std::io::ErrorKind::StorageFull, "{end}");
    }

    fn empty(&self) {
        fs::remove_file(self.filler()).expect("the filler was there");
    }

    #[track_caller]
    fn read_only(&self, is: bool) {
        let mode = if is { "ro" } else { "rw" };
        run(&format!("mount -o remount,{mode} {}", self.0.display()));
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Processes of the site may be in it still.
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[track_caller]
fn run(line: &str) {
    let output = Command::new("sh").args(["-c", line]).output().expect("sh");
    assert!(output.status.success(), "{line}: {output:?}");
}

#[track_caller]
fn wait_check(agent: &Agent, line: &str) {
    wait_until(&format!("`{line}` of check"), SOON, || {
        let page = agent.command("check").to_string();
        check(page.contains(line), page)
    });
}

/// Whether the agent at the called host refuses the client by policy.
#[track_caller]
fn wait_denied(pair: &Pair, denied: bool) {
    let call = format!("curl -sS -i -m 5 http://{}/", mesh_name("web"));
    wait_until(&format!("denied to be {denied}"), SOON, || {
        let answer = pair.client.host.cmd(&call).cgroup("client").output();
        let page = &answer.stdout;
        let is = page.contains("x-meshwork-reason: not_allowed");
        check(
            is == denied && (denied || page.contains("hello")),
            answer.to_string(),
        )
    });
}

const DENIED: &str = "\
apiVersion: meshwork.io/v1alpha1
kind: Policy
metadata: {name: nobody, namespace: shop}
spec: {service: web, rules: [{name: r, from: [{identity: shop/nobody}]}]}
";

/// Calls go on and policies reach them; what can not be kept is said, and kept when there is room again.
#[test]
fn an_agent_without_room_or_on_a_read_only_disk_goes_on() {
    let mut pair = Pair::new("mishap_disk");
    let _web = pair.web("http", "");
    wait_answer(&pair.client, "web");
    pair.server.stop();
    let state = pair.server.host.dir().join("state");
    let disk = SmallDisk::over(&state, 80);
    pair.server.start();
    pair.control.wait_endpoints("shop/web", 1);
    wait_answer(&pair.client, "web");
    wait_check(&pair.server, "ok       disk ");

    disk.fill();
    wait_check(&pair.server, "FAILED   disk ");
    pair.control.apply(DENIED).ok();
    wait_denied(&pair, true);
    wait_until("the agent to say it", SOON, || {
        let log = pair.server.log();
        check(log.contains("what control sent can not be kept"), log)
    });
    disk.empty();
    wait_check(&pair.server, "ok       disk ");
    // It is kept now: a restart without control knows it.
    wait_until("control to hear that it is kept", KEPT, || {
        let host = host_of(&pair.control, "server");
        let kept = &host["status"]["acknowledged"]["policies"];
        let newest = pair.control.get("policies -n shop");
        let newest = newest[0]["metadata"]["resourceVersion"].clone();
        check(
            kept.as_u64() >= newest.as_str().and_then(|n| n.parse().ok()),
            format!("{kept} of {newest}"),
        )
    });
    pair.control.stop();
    pair.server.stop();

    disk.read_only(true);
    pair.server.start();
    wait_check(&pair.server, "FAILED   disk ");
    wait_denied(&pair, true);
    pair.control.run();
    pair.control.meshctl("delete policy nobody -n shop").ok();
    wait_denied(&pair, false);
    disk.read_only(false);
    wait_check(&pair.server, "ok       disk ");
    pair.server.stop();
}

/// It answers who asks for the change with the cause, ends, and comes back with all that it ever answered for.
#[test]
fn a_control_without_room_says_so_and_comes_back_whole() {
    let mut pair = Pair::new("mishap_room");
    let _web = pair.web("http", "");
    wait_answer(&pair.client, "web");
    pair.control.stop();
    let disk = SmallDisk::over(&pair.control.state_dir(), 32);
    pair.control.run();
    pair.control.apply(DENIED).ok();
    wait_denied(&pair, true);
    pair.control.meshctl("delete policy nobody -n shop").ok();
    wait_denied(&pair, false);
    disk.fill();
    let mut refused = None;
    // Files of the store have some room inside.
    for n in 0..500 {
        let rules =
            (0..64).map(|r| format!("{{name: r{r}, from: [{{identity: shop/nobody-{n}-{r}}}]}}"));
        let rules = rules.collect::<Vec<_>>().join(", ");
        let text = format!(
            "apiVersion: meshwork.io/v1alpha1\nkind: Policy\nmetadata: {{name: nobody-{n}, namespace: shop}}\n\
             spec: {{service: web, rules: [{rules}]}}\n"
        );
        let output = pair.control.apply(&text);
        if !output.status.success() {
            refused = Some(output);
            break;
        }
    }
    let refused = refused.expect("a refusal").to_string();
    assert!(refused.contains("control can not keep it"), "{refused}");
    assert!(refused.contains("No space left"), "{refused}");
    wait_until("control to end", SOON, || {
        let log = pair.control.log();
        check(log.contains("No space left"), log)
    });
    // The host goes on with what it has.
    wait_denied(&pair, true);
    disk.empty();
    pair.control.kill9();
    pair.control.run();
    let policies = pair.control.get("policies -n shop");
    assert!(!policies.is_empty(), "what was answered is there");
    for policy in &policies {
        let name = policy["metadata"]["name"].as_str().unwrap_or_default();
        pair.control
            .meshctl(&format!("delete policy {name} -n shop"))
            .ok();
    }
    wait_denied(&pair, false);
    pair.control.stop();
}

/// All files and directories of an agent's state, the innermost first.
fn files_of(directory: &Path) -> Vec<PathBuf> {
    let mut all = Vec::new();
    for entry in fs::read_dir(directory).expect("the state").flatten() {
        let path = entry.path();
        if path.is_dir() {
            all.extend(files_of(&path));
        }
        all.push(path);
    }
    all.sort();
    all
}

/// A file that a careless hand or a bad disk took: what can be had again is had again, and what makes the host what it is
/// is named.
#[test]
fn a_lost_file_of_the_state_is_had_again_or_named() {
    let mut pair = Pair::new("mishap_lost");
    let _web = pair.web("http", "");
    wait_answer(&pair.client, "web");
    pair.server.stop();
    let state = pair.server.host.dir().join("state");
    let whole = pair.server.host.dir().join("state.whole");
    run(&format!("cp -a {} {}", state.display(), whole.display()));
    let files = files_of(&state);
    for file in &files {
        let name = file.strip_prefix(&state).unwrap().display().to_string();
        if file.is_dir() {
            fs::remove_dir_all(file).unwrap();
        } else {
            fs::remove_file(file).unwrap();
        }
        match name.as_str() {
            // Nobody else knows who this host is, and by which roots it knows control.
            "agent.json" | "agent.key" | "bundle" => {
                let output = pair.server.command("run");
                assert!(!output.status.success(), "{name}: {output}");
                let said = output.to_string();
                assert!(said.contains("mesh-agent join"), "{name}: {said}");
            }
            _ => {
                pair.server.start();
                wait_answer(&pair.client, "web");
                wait_until(&format!("all to be well without {name}"), SOON, || {
                    let page = pair.server.command("check").to_string();
                    check(page.contains("0 failed"), page)
                });
                pair.server.stop();
            }
        }
        run(&format!(
            "rm -rf {0} && cp -a {1} {0}",
            state.display(),
            whole.display()
        ));
    }
}
