//! Packages of the agent that are installed over one that serves, under load: nobody notices, what was open goes on, and
//! what the operator says meanwhile reaches it. One whose program can not serve is given up.

#[path = "upgrade/sessions.rs"]
mod sessions;

use meshwork_tests::booted::load::Load;
use meshwork_tests::booted::package::{BUILT, Newer};
use meshwork_tests::booted::{Mesh, holder, workers};
use meshwork_tests::machine::Machine;
use meshwork_tests::process::Process;
use meshwork_tests::wait::{SOON, check, wait_until};

use sessions::{DATABASE, Exchange, Psql, STREAMS, serve_all};

/// Asks for a name, calls it by a connection of its own, and looks at the rules, over and over; says what was wrong and how
/// often it looked.
const WATCH: &str = "\
import http.client, os, socket, subprocess, sys
looks = 0
while not os.path.exists('/run/end'):
    looks += 1
    if sys.argv[1] == 'calls':
        try:
            address = socket.getaddrinfo('web.shop.mesh.internal', 80)[0][4][0]
            call = http.client.HTTPConnection(address, 80, timeout=30)
            call.request('GET', '/', headers={'Host': 'web.shop.mesh.internal'})
            answer = call.getresponse()
            body = answer.read()
            if answer.status != 200 or body != b'hello from server\\n': print('wrong:', answer.status, body, flush=True)
        except OSError as error: print('wrong: no answer:', error, flush=True)
    else:
        try: socket.getaddrinfo('db.shop.mesh.internal', 80)
        except OSError as error: print('wrong: no name:', error, flush=True)
        rules = subprocess.run(['nft', 'list', 'table', 'inet', 'meshwork'], capture_output=True, text=True)
        if rules.returncode or 'tproxy' not in rules.stdout: print('wrong: no rules:', rules.stderr, flush=True)
        guard = subprocess.run(['nft', 'list', 'table', 'inet', 'meshwork_guard'], capture_output=True, text=True)
        if guard.returncode: print('wrong: no guard:', guard.stderr, flush=True)
print('looked', looks, flush=True)
";

/// Of services of the shop, only the database is closed to its client.
const DENIED: &str = "\
apiVersion: meshwork.io/v1alpha1
kind: Policy
metadata: {name: db, namespace: shop}
spec: {service: db, rules: [{name: r, from: [{identity: shop/other}]}]}
";

/// What of the agent's program names the file of the mesh's roots, and a word that no host has a file of.
const BROKEN: (&str, &str) = ("bundle", "bumble");

/// What the status says of a reload that was.
const GIVEN_UP: &str = "reload       GIVEN UP";

fn watch(machine: &Machine, what: &str) -> Process {
    machine.write("root/watch.py", WATCH);
    let line = format!("exec python3 /root/watch.py {what}");
    let line = match what {
        "calls" => machine.in_unit("client", &line),
        _ => machine.cmd(&line),
    };
    line.spawn(what)
}

/// Installs a package over the one that is there; the agent that runs goes over to it.
#[track_caller]
fn upgrade(machine: &Machine, to: &Newer) {
    let (before, old) = (holder(machine), workers(machine));
    let runs = program(machine);
    let said = machine.ok(&to.bring(machine));
    assert!(said.contains("has gone over to this version"), "{said}");
    assert_eq!(holder(machine), before, "the holder is the same process");
    assert_ne!(program(machine), runs, "it runs another program");
    let now = workers(machine);
    let new = now.iter().filter(|worker| !old.contains(worker)).count();
    assert_eq!(new, 1, "one worker is new: {old:?}, then {now:?}");
    let agent = format!("agent        {}", to.version);
    wait_status(machine, &[&agent, "draining     "]);
}

/// The worker asks the holder once a second.
#[track_caller]
fn wait_status(machine: &Machine, says: &[&str]) {
    wait_until("the status", SOON, || {
        let status = machine.ok("mesh-agent status");
        let given_up = says.contains(&GIVEN_UP) == status.contains(GIVEN_UP);
        check(
            given_up && says.iter().all(|word| status.contains(word)),
            status,
        )
    });
}

/// The file that the holder runs.
#[track_caller]
fn program(machine: &Machine) -> String {
    machine.ok(&format!("stat -L -c '%d %i' /proc/{}/exe", holder(machine)))
}

#[track_caller]
fn all_go_on(exchanges: &mut [Exchange], psql: &mut Psql) {
    for exchange in exchanges {
        exchange.goes_on();
    }
    psql.goes_on();
}

#[test]
fn packages_over_a_serving_agent_cut_nothing_and_lose_nothing() {
    let mesh = Mesh::new("packages_over_a_serving_agent");
    let (client, server) = mesh.pair();
    serve_all(&mesh, &server);
    let first = Newer::after(BUILT, &[], &server.host.dir());
    let broken = Newer::after(&first.version, &[BROKEN], &server.host.dir());
    let second = Newer::after(&broken.version, &[], &server.host.dir());

    // Open before, and in use all the time.
    let mut psql = Psql::open(&client);
    let mut exchanges = STREAMS.map(|stream| Exchange::open(&client, stream));
    let mut load = Load::start(&client, "client", "http://web.shop.mesh.internal/");
    let mut watches = [
        watch(&client, "calls"),
        watch(&client, "rules"),
        watch(&server, "rules"),
    ];
    let old = [&client, &server].map(|machine| workers(machine));
    for machine in [&server, &client] {
        upgrade(machine, &first);
        all_go_on(&mut exchanges, &mut psql);
        load.is_alive();
    }
    for (machine, old) in [&client, &server].into_iter().zip(&old) {
        let now = workers(machine);
        assert!(
            now.contains(&old[0]),
            "{} carries the sessions: {now:?}",
            old[0]
        );
    }

    // A program whose worker finds its files missing: it goes back when it is under way.
    let now = (holder(&server), workers(&server), program(&server));
    // The package is installed all the same.
    let said = server.ok(&broken.bring(&server));
    assert!(
        said.contains("the version before goes on serving"),
        "{said}"
    );
    let after = (holder(&server), workers(&server), program(&server));
    assert_eq!(now, after, "nothing has changed");
    wait_status(
        &server,
        &[&format!("agent        {}", first.version), GIVEN_UP],
    );
    let journal = server.journal("mesh-agent");
    assert!(journal.contains("its worker ended"), "{journal}");
    all_go_on(&mut exchanges, &mut psql);
    load.is_alive();
    // The next good one is taken.
    upgrade(&server, &second);
    all_go_on(&mut exchanges, &mut psql);

    // All that was called meanwhile was answered, all names too, and the rules were there at each look.
    let report = load.end(&client);
    report.assert_good();
    for machine in [&client, &server] {
        machine.write("run/end", "");
        machine.ok("touch /run/end");
    }
    for watch in &mut watches {
        let log = wait_until("the watch to end", SOON, || {
            let log = watch.log();
            check(log.contains("looked "), log.clone()).map(|()| log)
        });
        assert!(!log.contains("wrong"), "{log}");
    }
    for machine in [&client, &server] {
        let journal = machine.journal("mesh-agent");
        for wrong in ["ended by itself", "is killed", "panicked"] {
            assert!(!journal.contains(wrong), "{journal}");
        }
    }

    what_the_operator_says_reaches(&mesh, psql, exchanges);
}

/// By workers that have no session with control: those of two packages ago.
#[track_caller]
fn what_the_operator_says_reaches(mesh: &Mesh, psql: Psql, mut exchanges: [Exchange; 2]) {
    mesh.control.write("root/denied.yaml", DENIED);
    mesh.meshctl("apply -f /root/denied.yaml").ok();
    psql.ends();
    for exchange in &mut exchanges {
        exchange.goes_on();
    }
    mesh.meshctl("revoke workload shop/client --host client")
        .ok();
    for exchange in exchanges {
        exchange.ends();
    }
    let edges = mesh.meshctl("edges").ok();
    assert!(edges.contains(DATABASE), "{edges}");
}
