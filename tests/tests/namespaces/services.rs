//! services.d: what an administrator writes, and what is said when it is wrong.

use meshwork_tests::servers;
use meshwork_tests::wait::{SOON, check, wait_until};

use crate::pair::{Pair, mesh_name, owner, spiffe};

#[test]
fn changes_are_picked_up_and_a_bad_file_leaves_the_others_alone() {
    let pair = Pair::new("changes_are_picked_up");
    let _web = pair.web("http", "");
    let agent = &pair.server;
    let call = format!("curl -sS -m 10 http://{}/", mesh_name("web"));
    assert_eq!(pair.ok(&call), "hello\n");
    agent.write_file(
        "broken.toml",
        "namespace = \"shop\"\n[owner]\nuser = \"x\"\nprots = 1\n",
    );
    wait_until("the bad file to be reported", SOON, || {
        let status = agent.command("status").ok();
        let told = ["broken.toml", "prots", "4"]
            .iter()
            .all(|word| status.contains(word));
        check(told, status)
    });
    assert_eq!(pair.ok(&call), "hello\n");
    // Two files that name the same processes.
    let line = agent.owner_line(&owner("web"));
    let twin = format!("namespace = \"shop\"\naccount = \"zweb\"\n[owner]\n{line}\n");
    agent.write_file("zweb.toml", &twin);
    wait_until("the clash to be reported", SOON, || {
        let status = agent.command("status").ok();
        check(
            status.contains("zweb.toml") && status.contains("web.toml"),
            status,
        )
    });
    assert_eq!(pair.ok(&call), "hello\n");
    // Mended and gone: nothing is complained about any more.
    for file in ["broken.toml", "zweb.toml"] {
        std::fs::remove_file(agent.host.dir().join("services.d").join(file)).unwrap();
    }
    wait_until("no problem to be left", SOON, || {
        let status = agent.command("status").ok();
        check(
            !status.contains("broken.toml") && !status.contains("zweb.toml"),
            status,
        )
    });
    // A service that ends is no longer offered.
    std::fs::remove_file(agent.host.dir().join("services.d/web.toml")).unwrap();
    pair.control.wait_endpoints("shop/web", 0);
}

#[test]
fn a_failing_health_check_takes_an_instance_out_and_in_again() {
    let pair = Pair::new("a_failing_health_check");
    let health = "location = /healthz { root /; try_files $document_root/healthy =503; }";
    let dir = pair.server.host.subdir("health", None);
    let flag = dir.join("ok");
    std::fs::write(&flag, "").unwrap();
    let health = health.replace("$document_root/healthy", &flag.display().to_string());
    let location = format!("location = / {{ return 200 \"hello\\n\"; }}\n{health}");
    let _web = servers::nginx(&pair.server.host, "web", 80, &location);
    let line = pair.server.owner_line(&owner("web"));
    let file = format!(
        "namespace = \"shop\"\n[owner]\n{line}\n[[service]]\n\
         ports = [{{ port = 80, protocol = \"http\" }}]\n\
         check = {{ http = \"/healthz\", interval_s = 1, fall = 2 }}\n"
    );
    pair.server.write_file("web.toml", &file);
    pair.control.wait_endpoints("shop/web", 1);
    std::fs::remove_file(&flag).unwrap();
    pair.control.wait_endpoints("shop/web", 0);
    pair.wait_name("web");
    let call = format!("curl -sS -m 10 -i http://{}/", mesh_name("web"));
    let before = pair.client.refused("no_endpoints");
    wait_until("the refusal", SOON, || {
        let answer = pair.cmd(&call).output().stdout;
        check(
            answer
                .to_lowercase()
                .contains("x-meshwork-reason: no_endpoints"),
            answer,
        )
    });
    pair.client.wait_refused("no_endpoints", before);
    std::fs::write(&flag, "").unwrap();
    pair.control.wait_endpoints("shop/web", 1);
    wait_until("the call to be answered again", SOON, || {
        let answer = pair.cmd(&call).output().stdout;
        check(answer.contains("hello"), answer)
    });
}

/// Asks on one connection for ever and says when the answer changes.
const CALLER: &str = "\
import http.client, time
c = http.client.HTTPConnection('web.shop.mesh.internal', 80, timeout=20)
c.connect()
c.auto_open = 0
last = None
while True:
    c.request('GET', '/')
    r = c.getresponse()
    said = str(r.status) + ' ' + r.headers.get('x-meshwork-reason', r.read().decode().strip())
    r.read()
    if said != last: print(said, flush=True)
    last = said
    time.sleep(0.02)
";

/// What a connection may do follows the files while it lives: without its identity it is refused, and it goes on with
/// the certificate that came anew.
#[test]
fn a_kept_connection_follows_its_identity_and_takes_the_new_certificate() {
    let pair = Pair::new("a_kept_connection_follows_its_identity");
    let _web = pair.web("http", "");
    let agent = &pair.client;
    let certificates = || {
        let files = "find . -name '*client*' -name '*.crt' -exec sha256sum {} +";
        let dir = agent.host.dir().join("state");
        agent.host.ok(&format!("cd {} && {files}", dir.display()))
    };
    let first = certificates();
    assert!(!first.is_empty(), "no certificate on disk");
    let caller = agent.host.python("caller", CALLER).cgroup("client");
    let mut caller = caller.spawn("caller");
    let mut wait_said = |words: &str| {
        wait_until(words, SOON, || {
            caller.is_alive()?;
            let log = caller.log();
            check(log.ends_with(words), log)
        });
    };
    wait_said("200 hello\n");
    let before = agent.refused("no_identity");
    std::fs::remove_file(agent.host.dir().join("services.d/client.toml")).unwrap();
    wait_said("200 hello\n503 no_identity\n");
    agent.wait_refused("no_identity", before);
    agent.serve("client", &owner("client"), &[]);
    wait_said("503 no_identity\n200 hello\n");
    assert_ne!(certificates(), first, "the old certificate is in use");
}

/// A unit that restarts has a cgroup of the same name that is another one.
#[test]
fn a_unit_that_restarts_is_still_itself() {
    let pair = Pair::new("a_unit_that_restarts");
    let _web = pair.web("http", "");
    let unit = format!("{}-job.service", pair.site.prefix());
    let root = meshwork_tests::cgroup::root().join("system.slice");
    let dir = root.join(&unit);
    let call = format!(
        "echo $$ > {}/cgroup.procs && exec curl -sS -m 10 http://{}/",
        dir.display(),
        mesh_name("web")
    );
    std::fs::create_dir_all(&dir).unwrap();
    pair.client
        .serve("job", &meshwork_tests::agent::Owner::Unit(unit), &[]);
    let job = spiffe("job");
    let wait_known = |count: f64| {
        wait_until("the unit to be known", SOON, || {
            let before = pair.calls(&job, "shop/web");
            drop(pair.client.host.cmd(&call).output());
            let after = pair.calls(&job, "shop/web");
            check(
                count <= after && before < after,
                format!("{before} {after}"),
            )
        });
    };
    wait_known(1.0);
    meshwork_tests::cgroup::remove(&dir).unwrap();
    std::fs::create_dir_all(&dir).unwrap();
    wait_known(2.0);
}

/// A certificate past a third of its life is in use from disk while control is down, and is renewed when it is back: a
/// connection that is kept over it goes on.
#[test]
fn a_leaf_is_renewed_under_a_kept_connection() {
    let mut pair = Pair::new("a_leaf_is_renewed");
    let _web = pair.web("http", "");
    // Once asked for, the endpoints are on disk too.
    assert_eq!(
        pair.ok(&format!("curl -sS -m 10 http://{}/", mesh_name("web"))),
        "hello\n"
    );
    let leaf = pair.age_the_clients_leaf();
    let before = std::fs::read(&leaf).unwrap();
    let caller = pair.client.host.python("caller", CALLER).cgroup("client");
    let mut caller = caller.spawn("caller");
    wait_until("the first answer", SOON, || {
        check(caller.log() == "200 hello\n", caller.log())
    });
    assert_eq!(
        std::fs::read(&leaf).unwrap(),
        before,
        "renewed without control"
    );
    pair.control.run();
    pair.wait_for_the_clients_second_leaf();
    assert_ne!(
        std::fs::read(&leaf).unwrap(),
        before,
        "the old certificate is kept"
    );
    let calls = pair.calls(&spiffe("client"), "shop/web");
    wait_until("calls with the new one", SOON, || {
        let now = pair.calls(&spiffe("client"), "shop/web");
        check(now > calls + 20.0, format!("{calls}, {now}"))
    });
    caller.is_alive().unwrap();
    assert_eq!(caller.log(), "200 hello\n", "the connection saw it");
}
