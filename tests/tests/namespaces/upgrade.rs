//! The agent goes over to another program while it serves: nobody notices, what is open goes on in the worker that had it,
//! and what the operator says meanwhile reaches that too. A program that can not serve is given up.

use std::fs;
use std::path::PathBuf;

use meshwork_tests::agent::Agent;
use meshwork_tests::binary;
use meshwork_tests::manager::Manager;
use meshwork_tests::process::Process;
use meshwork_tests::wait::{SOON, check, wait_until};

use crate::limits::{self, ECHO};
use crate::pair::{Pair, mesh_name, owner};
use crate::revocation::{held, wait_log};
use crate::torture::{Rig, wait_said};

/// Asks for a name and looks at the rules, over and over; says what was wrong and how often it looked.
const WATCH: &str = "\
import os, socket, subprocess
looks = 0
while not os.path.exists(os.environ['END']):
    looks += 1
    try: socket.getaddrinfo(os.environ['NAME'], 80)
    except OSError as error: print('no name:', error, flush=True)
    rules = subprocess.run(['nft', 'list', 'table', 'inet', 'meshwork'], capture_output=True, text=True)
    if rules.returncode or 'tproxy' not in rules.stdout or 'whose' not in rules.stdout:
        print('no rules:', rules.stderr, flush=True)
print('looked', looks, flush=True)
";

/// Has the host run a program of its own, so that another can take its place.
#[track_caller]
fn own_program(agent: &mut Agent) {
    agent.install(&binary("mesh-agent"));
    agent.stop();
    agent.start();
}

fn watch(agent: &Agent, end: &std::path::Path) -> Process {
    let watch = agent.host.python("watch", WATCH);
    let watch = watch.env("END", &end.display().to_string());
    watch.env("NAME", &mesh_name("app")).spawn("watch")
}

/// Installs a program that is another file, and goes over to it.
#[track_caller]
fn upgrade(agent: &Agent) {
    let (holder, before) = (agent.holder(), agent.workers());
    let old = agent.runs(holder);
    agent.install(&binary("mesh-agent"));
    agent.reload().ok();
    let new = agent.runs(holder);
    assert_ne!(
        old, new,
        "the holder runs another program, as the same process"
    );
    let workers = agent.workers();
    let fresh: Vec<u32> = workers
        .into_iter()
        .filter(|w| !before.contains(w))
        .collect();
    assert_eq!(fresh.len(), 1, "{}", agent.log());
    assert_eq!(agent.runs(fresh[0]), new, "so does its worker");
}

#[test]
fn an_upgrade_under_load_fails_no_call_and_loses_no_name_and_no_rule() {
    let mut rig = Rig::new("upgrade_under_load", "http");
    own_program(&mut rig.pair.client);
    own_program(&mut rig.pair.server);
    rig.pair.control.wait_endpoints("shop/app", 1);
    rig.run("churn --times 2 --parallel 1");
    let end = rig.pair.client.host.dir().join("end");
    let words = format!("mixed --seed 1 --until {}", end.display());
    let mut load = rig.task(&words).spawn("mixed");
    let mut watches = rig.agents().map(|agent| watch(agent, &end));
    for _ in 0..2 {
        for agent in rig.agents() {
            upgrade(agent);
            // New connections are served by the new worker.
            rig.run("churn --times 20 --parallel 4");
            load.is_alive().unwrap_or_else(|e| panic!("{e}"));
        }
    }
    fs::write(&end, "").unwrap();
    let calls = wait_said(&mut load, "calls ").parse::<u64>().unwrap();
    assert!(0 < calls);
    for watch in &mut watches {
        wait_said(watch, "looked ");
        let log = watch.log();
        assert!(!log.contains("no "), "{log}");
    }
    for agent in rig.agents() {
        let log = agent.log();
        assert!(!log.contains("ended by itself"), "{log}");
        assert!(!log.contains("of another form"), "{log}");
    }
    // With their last connection the workers of before end.
    for agent in rig.agents() {
        wait_until("the workers of before to end", SOON * 2, || {
            let workers = agent.workers();
            check(workers.len() == 1, format!("{workers:?}: {}", agent.log()))
        });
        assert_eq!(agent.refused("draining"), 0.0);
    }
}

/// A pair whose agents run programs of their own, with an app that echoes.
fn open_rig(name: &str, client: &str) -> limits::Rig {
    let mut rig = limits::Rig::new(name, client, "");
    own_program(&mut rig.pair.client);
    own_program(&mut rig.pair.server);
    rig.pair.control.wait_endpoints("shop/app", 1);
    rig.wait_once("client");
    rig
}

#[test]
fn what_is_open_goes_on_over_upgrades_of_both_ends() {
    let rig = open_rig("upgrade_open", "");
    let bytes = rig.open("bytes", "client");
    let request = rig.curl("/wait/later").spawn("request");
    rig.wait_said("GET /wait/later", 1);
    for agent in [&rig.pair.client, &rig.pair.server] {
        upgrade(agent);
        assert_eq!(agent.workers().len(), 2, "{}", agent.log());
    }
    assert_eq!(rig.once("client", "app", ECHO), "open");
    bytes.goes_on();
    rig.answer("later");
    wait_until("the answer", SOON, || {
        let got = limits::answer(&request.log());
        check(got == "server", got)
    });
    for agent in [&rig.pair.client, &rig.pair.server] {
        wait_until("the worker of before to end", SOON, || {
            let workers = agent.workers();
            check(workers.len() == 1, format!("{workers:?}: {}", agent.log()))
        });
    }
    rig.pair.control.wait_endpoints("shop/app", 1);
}

/// What was open before an upgrade of the called host, and is carried by a worker that has no session with control.
#[test]
fn a_policy_and_a_revocation_reach_what_was_open_before_an_upgrade() {
    let rig = open_rig("upgrade_policy", "");
    rig.pair.client.serve("other", &owner("other"), &[]);
    rig.wait_once("other");
    let [denied, revoked] = ["other", "client"].map(|cgroup| {
        let call = rig.pair.client.host.python(cgroup, &held("app"));
        let call = call.cgroup(cgroup).spawn(cgroup);
        wait_log(&call, "open");
        call
    });
    upgrade(&rig.pair.server);
    let policy = "\
apiVersion: meshwork.io/v1alpha1
kind: Policy
metadata: {name: app, namespace: shop}
spec: {service: app, rules: [{name: r, from: [{identity: shop/client}]}]}
";
    rig.pair.control.apply(policy).ok();
    wait_log(&denied, "reset");
    assert_eq!(revoked.log(), "open\n");
    rig.pair
        .control
        .meshctl("revoke workload shop/client --host client")
        .ok();
    wait_log(&revoked, "reset");
}

/// Control hears that a host uses a bundle when the workers that drain use it, too.
#[test]
fn a_bundle_is_in_use_when_those_that_drain_use_it() {
    let rig = open_rig("upgrade_bundle", "");
    let (control, agent) = (&rig.pair.control, &rig.pair.server);
    let bytes = rig.open("bytes", "client");
    let [before] = agent.workers()[..] else {
        panic!("one worker");
    };
    upgrade(agent);
    let followers = agent.host.dir().join("state/followers");
    let says = fs::read(followers.join(before.to_string())).expect("what it says");
    let number = u64::from_be_bytes(says.try_into().expect("a number"));
    let acknowledged = |number: u64| {
        wait_until(&format!("bundle {number} to be in use"), SOON, || {
            let hosts = control.get("hosts");
            let host = hosts.iter().find(|h| h["metadata"]["name"] == "server");
            let host = host.ok_or("no such host")?;
            check(
                host["status"]["acknowledged"]["bundle"] == number,
                host.to_string(),
            )
        });
    };
    acknowledged(number);
    // Another one, which is behind.
    let script = "import fcntl, os, time\nf = open(os.environ['FILE'], 'wb')\nfcntl.flock(f, fcntl.LOCK_EX)\n\
                  f.write(bytes(8))\nf.flush()\nprint('locked', flush=True)\ntime.sleep(1000)\n";
    let behind = agent.host.python("behind", script);
    let behind = behind
        .env("FILE", &followers.join("1").display().to_string())
        .spawn("behind");
    wait_log(&behind, "locked");
    // What is kept next is acknowledged with all the rest.
    let policy = "apiVersion: meshwork.io/v1alpha1\nkind: Policy\nmetadata: {name: app, namespace: shop}\n\
                  spec: {service: app, rules: [{name: r, from: [{identity: shop/client}]}]}\n";
    control.apply(policy).ok();
    acknowledged(0);
    drop(behind);
    acknowledged(number);
    bytes.goes_on();
}

/// A program at this path that the host may run.
fn script(agent: &Agent, name: &str, text: &str) -> PathBuf {
    let path = agent.host.dir().join(name);
    fs::write(&path, text).unwrap();
    fs::set_permissions(&path, mode(0o755)).unwrap();
    path
}

fn mode(bits: u32) -> fs::Permissions {
    std::os::unix::fs::PermissionsExt::from_mode(bits)
}

#[test]
fn a_program_that_can_not_serve_is_given_up_and_the_old_one_goes_on() {
    let rig = open_rig("upgrade_given_up", "");
    let agent = &rig.pair.server;
    let open = rig.open("bytes", "client");
    let (holder, worker) = (agent.holder(), agent.worker());
    let runs = agent.runs(holder);
    let silent = script(agent, "silent", "#!/bin/sh\nexec sleep 1000\n");
    let text = script(agent, "text", "no program\n");
    fs::set_permissions(&text, mode(0o644)).unwrap();
    for (program, why) in [
        ("/bin/false".into(), "said nothing"),
        ("/bin/true".into(), "said nothing"),
        (silent, "did not answer within 10 s"),
        (text, "can not be started"),
    ] {
        agent.install(&program);
        let output = agent.reload();
        assert_eq!(output.code(), 1, "{output}");
        assert!(output.stderr.contains(why), "{output}");
        assert_eq!((agent.worker(), agent.runs(holder)), (worker, runs));
        assert_eq!(rig.once("client", "app", ECHO), "open");
    }
    // A program that answers, and whose worker finds its files damaged: it goes back when it is under way.
    agent.install(&binary("mesh-agent"));
    let state = agent.host.dir().join("state");
    fs::rename(state.join("bundle"), state.join("bundle.away")).unwrap();
    let output = agent.reload();
    assert_eq!(output.code(), 1, "{output}");
    assert!(output.stderr.contains("its worker ended"), "{output}");
    assert_eq!((agent.worker(), agent.runs(holder)), (worker, runs));
    assert_eq!(rig.once("client", "app", ECHO), "open");
    fs::rename(state.join("bundle.away"), state.join("bundle")).unwrap();
    // A configuration that is wrong is given up as well.
    let config = fs::read_to_string(agent.config()).unwrap();
    fs::write(
        agent.config(),
        format!("{config}\n[capture]\ntable = \"other\"\n"),
    )
    .unwrap();
    let output = agent.reload();
    assert!(output.stderr.contains("needs a restart"), "{output}");
    let other = agent.host.dir().join("other");
    agent
        .host
        .ok(&format!("cp -a {} {}", state.display(), other.display()));
    let [from, to] = [&state, &other].map(|dir| format!("state_dir = \"{}\"", dir.display()));
    fs::write(agent.config(), config.replace(&from, &to)).unwrap();
    let output = agent.reload();
    assert!(output.stderr.contains("state_dir"), "{output}");
    fs::write(agent.config(), "no = such = thing\n").unwrap();
    assert_eq!(agent.command("reload").code(), 1);
    fs::write(agent.config(), config).unwrap();
    upgrade(agent);
    assert_eq!(rig.once("client", "app", ECHO), "open");
    open.goes_on();
}

/// Each means what is on disk when it asks, and none takes another's outcome for its own.
#[test]
fn reloads_that_are_asked_for_at_once_are_done_one_after_the_other() {
    let rig = open_rig("upgrade_at_once", "");
    let agent = &rig.pair.server;
    let before = agent.worker();
    std::thread::scope(|scope| {
        let asked = [(); 3].map(|()| scope.spawn(|| agent.reload()));
        for output in asked {
            output.join().expect("the command").ok();
        }
    });
    let told = fs::read_to_string(agent.host.dir().join("run/reload.json")).unwrap();
    let told: serde_json::Value = serde_json::from_str(&told).unwrap();
    assert_eq!(told["reloads"], 3, "{told}");
    assert_ne!(agent.worker(), before);
    assert_eq!(rig.once("client", "app", ECHO), "open");
}

/// Of a third, the oldest has the time that a stop gives it.
#[test]
fn workers_that_drain_are_few_and_end_with_the_agent() {
    let mut rig = open_rig("upgrade_many", "[timeouts]\ndrain_s = 1\n");
    let mut open = Vec::new();
    for number in 0..3 {
        open.push(rig.open(&format!("bytes{number}"), "client"));
        upgrade(&rig.pair.client);
    }
    wait_until("the oldest to end", SOON, || {
        let workers = rig.pair.client.workers();
        check(workers.len() == 3, format!("{workers:?}"))
    });
    open[0].go();
    open[0].wait("ConnectionResetError");
    open[1].goes_on();
    rig.pair.client.stop();
    open[2].go();
    open[2].wait("ConnectionResetError");
}

/// What reloads without a pause leave behind is bounded, and cuts nothing.
#[test]
fn a_reload_is_refused_while_many_workers_drain() {
    let rig = open_rig("upgrade_storm", "[timeouts]\ndrain_s = 600\n");
    let agent = &rig.pair.client;
    let mut open = Vec::new();
    for number in 0..6 {
        open.push(rig.open(&format!("bytes{number}"), "client"));
        agent.reload().ok();
    }
    let refused = agent.reload();
    assert_eq!(refused.code(), 1, "{refused}");
    assert!(refused.stderr.contains("reload again then"), "{refused}");
    assert_eq!(agent.workers().len(), 7, "{}", agent.log());
    for open in &mut open {
        open.goes_on();
    }
}

fn of<'a>(pair: &'a mut Pair, who: &str) -> &'a mut Agent {
    match who {
        "client" => &mut pair.client,
        _ => &mut pair.server,
    }
}

/// The holder dies with its worker, and the next one gets its sockets from the service manager.
#[test]
fn who_calls_while_the_holder_is_dead_waits_for_the_next() {
    let mut pair = Pair::new("holder_dies");
    let _web = pair.web("http", "");
    let line = format!("curl -sS -m 30 http://{}/", mesh_name("web"));
    let managers = [&pair.client, &pair.server].map(|agent| Manager::new(&agent.host));
    for (agent, manager) in [&mut pair.client, &mut pair.server]
        .into_iter()
        .zip(&managers)
    {
        agent.install(&binary("mesh-agent"));
        agent.stop();
        agent.spawn_under(manager);
        agent.wait_ready();
    }
    pair.control.wait_endpoints("shop/web", 1);
    wait_until("the call to be answered", SOON, || {
        let output = pair.cmd(&line).output();
        check(output.stdout == "hello\n", output.to_string())
    });
    // The next worker may have to answer from disk before control is reached.
    let kept = pair.client.host.dir().join("state/endpoints");
    wait_until("the endpoints to be on disk", SOON, || {
        let bytes = fs::read(&kept).unwrap_or_default();
        let there = bytes.windows(3).any(|part| part == b"web");
        check(there, "the file does not have them")
    });
    // By address: the resolver is dead, too.
    let [vip, _] = pair.vips("web");
    let call = format!("curl -sS -m 30 http://{vip}/");
    for (who, manager) in ["client", "server"].iter().zip(&managers) {
        let agent = of(&mut pair, who);
        agent.kill_holder();
        let rules = agent.host.ok("nft list table inet meshwork");
        assert!(rules.contains("tproxy"), "{rules}");
        let calling = pair.cmd(&call).spawn(&format!("calling-{who}"));
        wait_until("the call to wait", SOON, || {
            let host = &pair.client.host;
            let open = host.ok(&format!("ss -Htn state established dst {vip}"));
            check(!open.is_empty(), calling.log())
        });
        assert_eq!(calling.log(), "");
        let agent = of(&mut pair, who);
        agent.spawn_under(manager);
        wait_until("the call that waited", SOON, || {
            check(calling.log().contains("hello"), calling.log())
        });
        let log = agent.log();
        assert!(log.contains("its sockets are taken on"), "{log}");
        agent.wait_ready();
        assert_eq!(pair.ok(&line), "hello\n");
    }
    for (agent, manager) in [&mut pair.client, &mut pair.server]
        .into_iter()
        .zip(&managers)
    {
        upgrade(agent);
        agent.stop();
        let kept = manager.kept();
        assert!(kept.is_empty(), "{kept:?}");
        let tables = agent.host.ok("nft list tables");
        assert!(!tables.contains("inet meshwork\n"), "{tables}");
    }
}
