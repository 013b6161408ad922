//! Local ports and unix sockets that lead to a service, and an agent that has nothing else.

use meshwork_tests::agent::{Agent, Owner};
use meshwork_tests::control::TokenOptions;
use meshwork_tests::host::Host;
use meshwork_tests::process::Cmd;
use meshwork_tests::servers;
use meshwork_tests::wait::{SOON, check, wait_until};

use crate::pair::{Pair, owner, spiffe, spiffe_host};

/// A user that is no workload.
const OTHER: u32 = 20_001;
/// Whose agent it is that has no privileges, and whose program calls by it.
const KEEPER: u32 = 20_002;
const CALLER: u32 = 20_003;

fn calls(port: u16, socket: &str) -> String {
    format!(
        "[[call]]\nservice = \"shop/web\"\nport = 80\nlisten = \"127.0.0.1:{port}\"\n\
         [[call]]\nservice = \"shop/web\"\nport = 80\nsocket = \"{socket}\"\n"
    )
}

/// What a call gets: the answer and curl's exit code.
fn got(command: Cmd) -> String {
    command.output().stdout
}

fn by_port(host: &Host, port: u16) -> Cmd {
    host.cmd(&format!("curl -sS -m 10 http://127.0.0.1:{port}/; echo $?"))
}

fn by_socket(host: &Host, socket: &str) -> Cmd {
    host.cmd(&format!(
        "curl -sS -m 10 --unix-socket {socket} http://web/; echo $?"
    ))
}

const HELLO: &str = "hello\n0\n";

#[track_caller]
fn wait_hello(what: &str, command: impl Fn() -> Cmd) {
    wait_until(&format!("a call by {what}"), SOON, || {
        let got = got(command());
        check(got == HELLO, got)
    });
}

#[track_caller]
fn wait_counted(pair: &Pair, account: &str, least: f64) {
    wait_until(&format!("calls of {account} to be counted"), SOON, || {
        let count = pair.calls(&spiffe(account), "shop/web");
        check(least <= count, format!("{count} of {least}"))
    });
}

/// Each belongs to the workload of its file. Others find it and are refused, root and users of the same directory too.
/// No switch opens one to all; that others reach it is seen at the reason that is counted, and that it works at its workload's
/// calls before and after.
#[test]
fn a_local_port_or_socket_belongs_to_one_workload() {
    let mut pair = Pair::new("a_local_port_or_socket_belongs");
    let _web = pair.web("http", "");
    let host = pair.client.host.clone();
    let socket = host.subdir("calls", None).join("web.sock");
    let socket = socket.display().to_string();
    let file = format!(
        "namespace = \"shop\"\n[owner]\n{}\n{}",
        pair.client.owner_line(&owner("client")),
        calls(15_080, &socket)
    );
    pair.client.write_file("client.toml", &file);
    wait_hello("its port", || by_port(&host, 15_080).cgroup("client"));
    wait_hello("its socket", || by_socket(&host, &socket).cgroup("client"));
    wait_counted(&pair, "client", 2.0);
    for (user, cgroup) in [
        (None, "shell"),
        (Some(OTHER), "shell"),
        (Some(OTHER), "other"),
    ] {
        for command in [by_port(&host, 15_080), by_socket(&host, &socket)] {
            let before = pair.client.refused("not_the_owner");
            let command = command.cgroup(cgroup);
            let command = match user {
                Some(user) => command.user(user),
                None => command,
            };
            let answer = got(command);
            assert!(!answer.contains("hello"), "{answer}");
            pair.client.wait_refused("not_the_owner", before);
        }
    }
    // The user does not matter where the cgroup is the workload's.
    let answer = got(by_socket(&host, &socket).cgroup("client").user(OTHER));
    assert_eq!(answer, HELLO);
    wait_counted(&pair, "client", 3.0);
    assert_eq!(pair.calls(&spiffe_host(&host), "shop/web"), 0.0);

    // They outlive a worker and the agent, and are another file's to take only when the first has given them up.
    pair.client.kill_worker();
    wait_hello("its port", || by_port(&host, 15_080).cgroup("client"));
    wait_hello("its socket", || by_socket(&host, &socket).cgroup("client"));
    pair.client.kill9();
    let without_agent = || by_port(&host, 15_080).cgroup("client");
    assert_eq!(got(without_agent()), "7\n");
    assert_eq!(got(by_socket(&host, &socket).cgroup("client")), "7\n");
    let taken = "location / { return 200 \"taken\\n\"; }";
    let other = servers::nginx(&host, "other", 15_080, taken);
    assert_eq!(got(without_agent()), "taken\n0\n");
    drop(other);
    pair.client.start();
    wait_hello("its port", || by_port(&host, 15_080).cgroup("client"));
    wait_hello("its socket", || by_socket(&host, &socket).cgroup("client"));
    let thief = file.replace("/client\"", "/thief\"");
    pair.client.write_file("thief.toml", &thief);
    wait_until("the second file to be refused", SOON, || {
        let page = pair.client.command("status").stdout;
        check(page.contains("belongs to"), page)
    });
    std::fs::remove_file(host.dir().join("services.d/client.toml")).unwrap();
    wait_hello("what is another's now", || {
        by_port(&host, 15_080).cgroup("thief")
    });
    std::fs::remove_file(host.dir().join("services.d/thief.toml")).unwrap();
    wait_until("port and socket to be gone", SOON, || {
        let answer = got(by_port(&host, 15_080).cgroup("thief"));
        let there = std::path::Path::new(&socket).exists();
        check(answer == "7\n" && !there, answer)
    });
}

/// An agent of an ordinary user, which touches nothing of its host, carries the calls of another user by identity.
#[test]
fn an_agent_without_privileges_calls_by_ports_and_sockets() {
    let pair = Pair::new("an_agent_without_privileges");
    let _web = pair.web("http", "");
    let host = pair.site.host("plain");
    let agent = Agent::new(&host);
    agent.configure("[capture]\nenabled = false\n");
    let dir = host.dir().display().to_string();
    host.ok(&format!(
        "chown -R {KEEPER} {dir}/state {dir}/run {dir}/services.d"
    ));
    // The build's own directory may be closed to users.
    let program = meshwork_tests::binary("mesh-agent");
    host.ok(&format!(
        "cp {} {dir}/mesh-agent && chmod 755 {dir}/mesh-agent",
        program.display()
    ));
    let command = |words: &str| {
        let line = format!("exec {dir}/mesh-agent --config {dir}/agent.toml {words}");
        host.cmd(&line).user(KEEPER).cgroup("agent")
    };
    let tables = || host.ok("nft list tables; ip -o link; ip rule; cat /etc/resolv.conf");
    let before = tables();
    let token = pair.control.token(&TokenOptions::default().0);
    command(&format!(
        "join {token} --host-name plain --address {}",
        host.v4()
    ))
    .ok();
    let socket = host.subdir("calls", Some(KEEPER)).join("web.sock");
    let socket = socket.display().to_string();
    let file = |more: &str| {
        format!(
            "namespace = \"shop\"\n[owner]\n{}\n{}{more}",
            agent.owner_line(&Owner::User(CALLER)),
            calls(15_080, &socket)
        )
    };
    agent.write_file("plain.toml", &file(""));
    let process = command("run").spawn("agent");
    wait_hello("its port", || by_port(&host, 15_080).user(CALLER));
    wait_hello("its socket", || by_socket(&host, &socket).user(CALLER));
    wait_counted(&pair, "plain", 2.0);
    for command in [by_port(&host, 15_080), by_socket(&host, &socket)] {
        let before = agent.refused("not_the_owner");
        let answer = got(command.user(OTHER));
        assert!(!answer.contains("hello"), "{answer}");
        agent.wait_refused("not_the_owner", before);
    }
    for pid in agent.pids() {
        let status = host.ok(&format!("cat /proc/{pid}/status"));
        for none in ["CapPrm:\t0000000000000000", "CapEff:\t0000000000000000"] {
            assert!(status.contains(none), "{status}");
        }
    }
    assert_eq!(tables(), before, "it changed its host");
    let page = command("check").output().stdout;
    assert!(page.contains("nothing is captured"), "{page}");
    // It can serve nobody, and says so.
    agent.write_file(
        "plain.toml",
        &file("[[service]]\nports = [{ port = 8080 }]\n"),
    );
    wait_until("the service to be refused", SOON, || {
        let page = command("status").output().stdout;
        check(page.contains("such an agent only calls"), page)
    });
    wait_hello("the last good file", || by_port(&host, 15_080).user(CALLER));
    assert!(process.stop().success());
    assert!(!std::path::Path::new(&socket).exists());
}
