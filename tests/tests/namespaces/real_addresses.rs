//! Calls to the real addresses of hosts, where a service asks that they are taken over too.

use meshwork_tests::agent::Agent;
use meshwork_tests::control::TokenOptions;
use meshwork_tests::host::Host;
use meshwork_tests::servers;
use meshwork_tests::wait::{SOON, check, wait_until};

use crate::pair::{Pair, calls, mesh_name, owner, spiffe};

pub(crate) fn service(name: &str, port: &str, annotations: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: shop, annotations: {{{annotations}}}}}\n\
         spec: {{ports: [{port}]}}\n"
    )
}

const WEB: &str = "{port: 80, appProtocol: http}";
pub(crate) const REAL: &str = "meshwork.io/capture: vip+real";

/// What a call of `shop/client` by address gets, and curl's exit code. 7 is a refused connection.
fn call(pair: &Pair, address: &str) -> String {
    let line = format!("curl -sS -m 10 http://{address}/; echo $?");
    pair.cmd(&line).output().stdout
}

/// Waits until the client's kernel takes calls to `address` over, or no more.
#[track_caller]
pub(crate) fn wait_taken(client: &Host, address: &str, taken: bool) {
    wait_until(
        &format!("{address} to be taken over: {taken}"),
        SOON,
        || {
            let sets =
                client.ok("nft list set inet meshwork real4; nft list set inet meshwork real6");
            check(sets.contains(address) == taken, sets)
        },
    );
}

fn taken_calls(agent: &Agent) -> f64 {
    calls(&agent.metrics(), &spiffe("client"), "shop/web")
}

/// A call by address is answered, and it came by the mesh: where plaintext would be let in too, the answer alone says nothing.
#[track_caller]
fn by_mesh(pair: &Pair, address: &str, when: &str) {
    let before = taken_calls(&pair.server);
    assert_eq!(call(pair, address), "hello\n0\n", "{when}");
    wait_taken_calls(pair, before + 1.0, when);
}

#[track_caller]
fn wait_taken_calls(pair: &Pair, count: f64, when: &str) {
    wait_until(&format!("a call by the mesh {when}"), SOON, || {
        let now = taken_calls(&pair.server);
        check(now == count, format!("{now}, not {count}"))
    });
}

/// The same call is plaintext before, and mTLS by the client's identity afterwards. It goes to the host that was dialled
/// and to no other, over either family; other ports of that host are nobody's business.
#[test]
fn a_real_address_is_called_by_identity_and_is_not_balanced() {
    let pair = Pair::new("a_real_address_is_called_by_identity");
    let _web = pair.web("http", "");
    let server = pair.server.host.v4().to_string();
    let other = pair.site.host("other");
    let (_other, other) = second_server(&pair, &other);
    let _plain = servers::nginx(
        &pair.server.host,
        "plain",
        8080,
        "location / { return 200 \"plain\\n\"; }",
    );
    let other_address = format!("[{}]", other.host.v6());
    for (address, answer) in [(&server, "hello\n0\n"), (&other_address, "other\n0\n")] {
        assert_eq!(call(&pair, address), answer, "in plaintext");
    }
    assert_eq!(taken_calls(&pair.server) + taken_calls(&other), 0.0);

    pair.control.apply(&service("web", WEB, REAL)).ok();
    wait_taken(&pair.client.host, &server, true);
    wait_taken(&pair.client.host, &other.host.v6().to_string(), true);
    for _ in 0..5 {
        assert_eq!(call(&pair, &server), "hello\n0\n");
        assert_eq!(call(&pair, &other_address), "other\n0\n");
    }
    for agent in [&pair.server, &other] {
        wait_until("five calls to be counted at each", SOON, || {
            let count = taken_calls(agent);
            check(count == 5.0, count.to_string())
        });
    }
    // By name they are balanced as before.
    let by_name = format!("curl -sS -m 10 http://{}/", mesh_name("web"));
    assert!(["hello\n", "other\n"].contains(&pair.ok(&by_name).as_str()));
    assert_eq!(call(&pair, &format!("{server}:8080")), "plain\n0\n");

    let page = pair
        .client
        .command(&format!("explain {server}:80 --as shop/client"));
    assert!(page.stdout.contains("at the real address"), "{page}");
    assert!(page.stdout.contains("carried by mTLS to 1 of 1"), "{page}");

    // Policy decides about it as about any call of the mesh, and a host that does not answer has no stand-in.
    let nobody = "apiVersion: meshwork.io/v1alpha1\nkind: Policy\nmetadata: {name: web, namespace: shop}\n\
                  spec: {service: web, rules: [{name: n, from: [{identity: shop/nobody}, {cidr: 0.0.0.0/0}]}]}\n";
    pair.control.apply(nobody).ok();
    wait_until("the call to be refused by policy", SOON, || {
        let line = format!("curl -sS -m 10 -i http://{server}/");
        let answer = pair.cmd(&line).output().stdout;
        check(answer.contains("x-meshwork-reason: not_allowed"), answer)
    });
    // It ends as it began.
    pair.control
        .apply(&service("web", WEB, "meshwork.io/capture: vip"))
        .ok();
    wait_taken(&pair.client.host, &server, false);
    assert_eq!(call(&pair, &server), "hello\n0\n");
}

/// Another host that serves `shop/web`, at its IPv6 address.
fn second_server(pair: &Pair, host: &Host) -> (meshwork_tests::process::Process, Agent) {
    let web = servers::nginx(host, "web", 80, "location / { return 200 \"other\\n\"; }");
    let agent = Agent::new(host);
    let token = pair.control.token(TokenOptions::default().0.as_str());
    let join = format!("join {token} --host-name other --address {}", host.v6());
    agent.command(&join).ok();
    let agent = agent.started();
    agent.serve("web", &owner("web"), &[(80, "http")]);
    pair.control.wait_endpoints("shop/web", 2);
    (web, agent)
}

/// Where mTLS is promised a call by address fails when the agent is gone, at its caller: the server would let it in.
#[test]
fn a_strict_real_address_gets_no_plaintext_without_the_agent() {
    let mut pair = Pair::new("a_strict_real_address_gets_no_plaintext");
    let _web = pair.web("http", "");
    let server = pair.server.host.v4().to_string();
    let client = pair.client.host.clone();
    pair.control.apply(&service("web", WEB, REAL)).ok();
    wait_taken(&pair.client.host, &server, true);
    by_mesh(&pair, &server, "while it is permissive");
    pair.client.kill9();
    let before = taken_calls(&pair.server);
    assert_eq!(call(&pair, &server), "hello\n0\n", "permissive is open");
    pair.client.start();
    wait_taken(&pair.client.host, &server, true);

    let strict = format!(
        "{REAL}, meshwork.io/transport: strict, meshwork.io/plaintext-from: {}/32",
        client.v4()
    );
    pair.control.apply(&service("web", WEB, &strict)).ok();
    let guarded = || {
        client
            .ok("nft list table inet meshwork_guard")
            .contains(&server)
    };
    wait_until("the guard to know it", SOON, || {
        check(guarded(), "it does not")
    });
    by_mesh(&pair, &server, "while it is strict");
    let count = taken_calls(&pair.server);
    assert_eq!(count, before + 1.0, "plaintext is counted as the mesh's");
    let kept = client.dir().join("state/endpoints");
    wait_until("the endpoints to be on disk", SOON, || {
        let kept = std::fs::read(&kept).unwrap_or_default();
        let has = kept.windows(3).any(|word| word == b"web");
        check(has, "the service is not among them")
    });
    a_call_waits_for_the_next_worker(&mut pair, &server);
    by_mesh(&pair, &server, "by a new worker");

    pair.control.kill9();
    pair.client.kill9();
    assert_eq!(call(&pair, &server), "7\n", "without an agent");
    // As after a boot, before the agent.
    client.ok("nft flush ruleset");
    assert_eq!(
        call(&pair, &server),
        "hello\n0\n",
        "this test sees no guard"
    );
    pair.client.command("guard").ok();
    assert_eq!(call(&pair, &server), "7\n", "at boot, before the agent");
    // Without control, from what is kept.
    pair.client.start();
    wait_taken(&pair.client.host, &server, true);
    let before = taken_calls(&pair.server);
    wait_until("a call, from what is kept", SOON, || {
        let answer = call(&pair, &server);
        check(answer == "hello\n0\n", answer)
    });
    wait_taken_calls(&pair, before + 1.0, "from what is kept");
}

/// The worker is dead and no other can come before this says so: a call that begins meanwhile waits, and goes by the mesh.
#[track_caller]
fn a_call_waits_for_the_next_worker(pair: &mut Pair, address: &str) {
    let before = taken_calls(&pair.server);
    let client = pair.client.host.clone();
    let holder = pair.client.holder();
    client.ok(&format!("kill -STOP {holder}"));
    pair.client.kill_worker_now();
    let line = format!("curl -sS -m 20 http://{address}/; echo $?");
    let waiting = pair.cmd(&line).spawn("waiting");
    wait_until("the kernel to take it over", SOON, || {
        let open = client.ok(&format!("ss -Htn state established dst {address}:80"));
        check(!open.is_empty(), waiting.log())
    });
    assert_eq!(waiting.log(), "", "nobody is there to answer it");
    assert_eq!(taken_calls(&pair.server), before);
    client.ok(&format!("kill -CONT {holder}"));
    wait_until("its answer", SOON, || {
        let got = waiting.log();
        check(got == "hello\n0\n", got)
    });
    wait_taken_calls(pair, before + 1.0, "that waited");
    pair.client.wait_ready();
}

/// A host that is delisted since it serves no more is not called in plaintext for that, where mTLS is promised.
#[test]
fn a_strict_real_address_that_is_delisted_gets_no_plaintext() {
    let mut pair = Pair::new("a_strict_real_address_that_is_delisted");
    let _web = pair.web("http", "");
    let server = pair.server.host.v4().to_string();
    let file = pair.server.host.dir().join("services.d/web.toml");
    let served = std::fs::read(&file).unwrap();
    pair.control.apply(&service("web", WEB, REAL)).ok();
    wait_taken(&pair.client.host, &server, true);
    std::fs::remove_file(&file).unwrap();
    wait_taken(&pair.client.host, &server, false);
    assert_eq!(call(&pair, &server), "hello\n0\n", "permissive is open");

    std::fs::write(&file, served).unwrap();
    pair.control.wait_endpoints("shop/web", 1);
    let strict = format!("{REAL}, meshwork.io/transport: strict");
    pair.control.apply(&service("web", WEB, &strict)).ok();
    wait_taken(&pair.client.host, &server, true);
    let host = &pair.client.host;
    wait_until("the guard to know it", SOON, || {
        let guard = host.ok("nft list table inet meshwork_guard");
        check(guard.contains(&server), guard)
    });
    std::fs::remove_file(&file).unwrap();
    pair.control.wait_endpoints("shop/web", 0);
    wait_until("the call to be refused for want of a host", SOON, || {
        let line = format!("curl -sS -m 10 -i http://{server}/");
        let answer = pair.cmd(&line).output().stdout;
        check(answer.contains("x-meshwork-reason: no_endpoints"), answer)
    });
    wait_taken(&pair.client.host, &server, true);

    // Whoever restarts the agent gets no plaintext for it, nor does a worker that dies open anything.
    let refused = |pair: &Pair, after: &str| {
        wait_until(&format!("a refusal after {after}"), SOON, || {
            let line = format!("curl -sS -m 10 -i http://{server}/");
            let answer = pair.cmd(&line).output().stdout;
            assert!(!answer.contains("hello"), "after {after}: {answer}");
            check(answer.contains("x-meshwork-reason: no_endpoints"), answer)
        });
    };
    pair.client.kill_worker_now();
    pair.client.wait_ready();
    refused(&pair, "the end of the worker");
    pair.client.kill9();
    pair.client.start();
    refused(&pair, "the end of the agent");
    // That it was kept is what holds it.
    pair.client.stop();
    std::fs::remove_file(pair.client.host.dir().join("state/reals.json")).unwrap();
    pair.client.start();
    wait_taken(&pair.client.host, &server, false);
    assert_eq!(call(&pair, &server), "hello\n0\n");
}

/// Nor is one that is delisted since its program is ill or has ended, or since it was revoked. It would let plaintext in: a host
/// beside it that has no agent gets its answer.
#[test]
fn a_strict_real_address_of_who_is_ill_or_revoked_gets_no_plaintext() {
    let mut pair = Pair::new("a_strict_real_address_of_who_is_ill");
    let host = pair.server.host.clone();
    let healthy = host.subdir("health", None).join("ok");
    std::fs::write(&healthy, "").unwrap();
    let locations = format!(
        "location = / {{ return 200 \"hello\\n\"; }}\n\
         location = /healthz {{ root /; try_files {} =503; }}",
        healthy.display()
    );
    let start = || servers::nginx(&host, "web", 80, &locations);
    let web = start();
    let file = format!(
        "namespace = \"shop\"\n[owner]\n{}\n[[service]]\nports = [{{ port = 80, protocol = \"http\" }}]\n\
         check = {{ http = \"/healthz\", interval_s = 1, fall = 1 }}\n",
        pair.server.owner_line(&owner("web"))
    );
    pair.server.write_file("web.toml", &file);
    pair.control.wait_endpoints("shop/web", 1);
    let strict =
        format!("{REAL}, meshwork.io/transport: strict, meshwork.io/plaintext-from: 10.77.0.0/24");
    pair.control.apply(&service("web", WEB, &strict)).ok();
    let server = host.v4().to_string();
    wait_taken(&pair.client.host, &server, true);
    by_mesh(&pair, &server, "while it is well");

    let stranger = pair.site.host("stranger");
    let plaintext = |expected: &str, when: &str| {
        let got = stranger.run(&format!("curl -sS -m 10 http://{server}/; echo $?"));
        assert_eq!(got.stdout, expected, "plaintext of another, {when}");
    };
    let ask = |pair: &Pair| {
        let line = format!("curl -sS -m 10 -i http://{server}/");
        pair.cmd(&line).output().stdout
    };
    let refused = |pair: &Pair, when: &str| {
        wait_until(&format!("a refusal, {when}"), SOON, || {
            let answer = ask(pair);
            check(answer.contains("x-meshwork-reason: no_endpoints"), answer)
        });
        wait_taken(&pair.client.host, &server, true);
        for _ in 0..5 {
            let answer = ask(pair);
            assert!(!answer.contains("hello"), "{when}: {answer}");
        }
    };
    std::fs::remove_file(&healthy).unwrap();
    pair.control.wait_endpoints("shop/web", 0);
    refused(&pair, "it is ill");
    plaintext("hello\n0\n", "it is ill");
    std::fs::write(&healthy, "").unwrap();
    let well_again = |pair: &Pair, when: &str| {
        pair.control.wait_endpoints("shop/web", 1);
        wait_until(&format!("an answer, {when}"), SOON, || {
            let answer = ask(pair);
            check(answer.contains("hello"), answer)
        });
    };
    well_again(&pair, "it is well again");

    drop(web);
    pair.control.wait_endpoints("shop/web", 0);
    refused(&pair, "its program has ended");
    plaintext("7\n", "its program has ended");
    let _web = start();
    well_again(&pair, "its program runs again");

    let told = pair.control.meshctl("revoke host server").ok();
    assert!(told.contains("host server revoked"), "{told}");
    refused(&pair, "it was revoked");
    plaintext("hello\n0\n", "it was revoked");
    pair.client.kill9();
    assert_eq!(call(&pair, &server), "7\n", "without an agent");
    pair.client.start();
    refused(&pair, "it was revoked and the agent is another");
}

/// A program that says a word to `TO` again and again, and what it hears, until a file `leave` is there.
const TALKER: &str = r#"
import os, socket, time
c = socket.create_connection((os.environ["TO"], 9000), 20)
c.settimeout(20)
n = 0
try:
    while not os.path.exists(os.environ["DIR"] + "/leave"):
        c.sendall(os.environ["WORD"].encode())
        if not c.recv(100): break
        n += 1
        print("said", n, flush=True)
        time.sleep(0.001)
    print("left", flush=True)
except OSError as error: print("cut", error, flush=True)
"#;

const ECHO: &str = r#"
import socket, threading
def echo(c):
    try:
        while b := c.recv(65536): c.sendall(b)
    except OSError: pass
    c.close()
s = socket.create_server(("0.0.0.0", 9000))
while True: threading.Thread(target=echo, args=(s.accept()[0],), daemon=True).start()
"#;

/// A connection that was open before is not touched; one that was begun as mTLS does not go on in plaintext when the agent
/// dies.
#[test]
fn a_connection_stays_what_it_began_as() {
    let mut pair = Pair::new("a_connection_stays_what_it_began_as");
    let host = pair.server.host.clone();
    let _echo = host.python("echo", ECHO).cgroup("echo").spawn("echo");
    host.wait_listening(9000, SOON);
    pair.declare("echo", 9000, "tcp");
    let address = host.v4().to_string();
    let client = pair.client.host.clone();
    let talk = |name: &str, word: &str| {
        let dir = client.subdir(name, None);
        let talker = client.python(name, TALKER).cgroup("client");
        let talker = talker
            .env("TO", &address)
            .env("WORD", word)
            .env("DIR", &dir.display().to_string());
        (talker.spawn(name), dir)
    };
    let heard = |talker: &meshwork_tests::process::Process| talker.log().matches("said").count();
    let hear_more = |talker: &meshwork_tests::process::Process| {
        let before = heard(talker);
        wait_until("more to be said", SOON, || {
            check(heard(talker) > before + 20, talker.log())
        });
    };
    let file = host.dir().join("wire.pcap");
    let line = format!("exec tcpdump -i eth0 -U -s 0 -Z root -w {}", file.display());
    let wire = host.cmd(&line).spawn("wire");
    wait_until("tcpdump to listen", SOON, || {
        check(wire.log().contains("listening on"), wire.log())
    });
    let on_wire = |word: &str| {
        let bytes = std::fs::read(&file).unwrap_or_default();
        bytes.windows(word.len()).any(|w| w == word.as_bytes())
    };

    let (before, before_dir) = talk("before", "the-word-of-before");
    hear_more(&before);
    let echo = "{port: 9000, appProtocol: tcp}";
    pair.control.apply(&service("echo", echo, REAL)).ok();
    wait_taken(&pair.client.host, &address, true);
    hear_more(&before);
    std::fs::write(before_dir.join("leave"), "").unwrap();
    wait_until("it to end well", SOON, || {
        check(before.log().contains("left"), before.log())
    });

    let (during, _) = talk("during", "the-word-of-during");
    hear_more(&during);
    pair.client.kill9();
    wait_until("it to be cut", SOON, || {
        check(during.log().contains("cut"), during.log())
    });
    // What is on the wire after that shows that the rest of it was looked at.
    let (after, _) = talk("after", "the-word-of-after");
    hear_more(&after);
    wait_until("the capture to have it", SOON, || {
        check(on_wire("the-word-of-after"), "not yet")
    });
    assert!(
        on_wire("the-word-of-before"),
        "the capture misses what is there"
    );
    assert!(!on_wire("the-word-of-during"), "it went on in plaintext");
}
