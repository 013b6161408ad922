//! Servers without an agent, fronted by a host that joined: a managed database, an appliance.

use meshwork_tests::agent::Agent;
use meshwork_tests::control::TokenOptions;
use meshwork_tests::host::Host;
use meshwork_tests::process::Process;
use meshwork_tests::servers;
use meshwork_tests::wait::{SOON, check, wait_until};

use crate::pair::{Pair, mesh_name, owner, spiffe};

/// The file of a service `shop/<account>` that the host fronts.
fn front(agent: &Agent, account: &str, port: &str, endpoints: &[String], more: &str) {
    let endpoints: Vec<String> = endpoints.iter().map(|e| format!("\"{e}\"")).collect();
    agent.write_file(
        &format!("{account}.toml"),
        &format!(
            "namespace = \"shop\"\n[[service]]\nports = [{{ {port} }}]\nendpoints = [{}]\n{more}",
            endpoints.join(", ")
        ),
    );
}

pub(crate) fn declare(pair: &Pair, account: &str, port: &str, endpoints: &[String], more: &str) {
    front(&pair.server, account, port, endpoints, more);
    pair.control.wait_endpoints(&format!("shop/{account}"), 1);
    pair.wait_name(account);
}

/// nginx of this name on port 80, which says who it is.
fn named(host: &Host) -> Process {
    let location = format!("location / {{ return 200 \"{}\\n\"; }}", host.name());
    servers::nginx(host, "web", 80, &location)
}

fn policy(service: &str, caller: &str) -> String {
    format!(
        "apiVersion: meshwork.io/v1alpha1\nkind: Policy\nmetadata: {{name: {service}, namespace: shop}}\n\
         spec: {{service: {service}, rules: [{{name: r, from: [{{identity: shop/{caller}}}]}}]}}\n"
    )
}

#[test]
fn a_database_without_an_agent_is_called_by_name_and_guarded() {
    let pair = Pair::new("unjoined_database");
    let database = pair.site.host("managed");
    let _postgresql = servers::postgresql(&database, "db", 5432);
    let endpoint = format!("{}:5432", database.v4());
    let check_tcp = "check = { tcp = true, interval_s = 1 }\n";
    let port = "port = 5432, protocol = \"tcp\"";
    declare(
        &pair,
        "db",
        port,
        std::slice::from_ref(&endpoint),
        check_tcp,
    );
    pair.client.serve("other", &owner("other"), &[]);
    pair.control.apply(&policy("db", "client")).ok();
    let psql = format!(
        "psql -h {} -U postgres -X -A -t -v ON_ERROR_STOP=1",
        mesh_name("db")
    );
    let text = pair.ok(&format!(
        "{psql} -c 'select inet_client_addr()' -c 'select count(*) from generate_series(1, 200000)'"
    ));
    let front_host = pair.server.host.v4().to_string();
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines, [&front_host, "200000"], "it sees who fronts it");
    wait_until("its count", SOON, || {
        let count = pair.calls(&spiffe("client"), "shop/db");
        check(0.0 < count, format!("{count} calls"))
    });
    let before = pair.server.refused("not_allowed");
    wait_until("a denial of another workload", SOON, || {
        let output = pair
            .client
            .host
            .cmd(&format!("{psql} -c 'select 1'"))
            .cgroup("other")
            .output();
        check(!output.status.success(), output.to_string())?;
        let now = pair.server.refused("not_allowed");
        check(before < now, format!("{output}; refused {now}"))
    });
    let labels = [("dst", "shop/db")];
    let metrics = pair.server.metrics();
    assert_eq!(metrics.sum("mesh_plaintext_endpoints", &labels), 1.0);
    let labels = [("endpoint", endpoint.as_str()), ("status", "ok")];
    let made = metrics.sum("mesh_plaintext_connections_total", &labels);
    assert!(1.0 <= made, "{made}");
}

#[test]
fn what_is_plaintext_is_said_everywhere() {
    let pair = Pair::new("unjoined_listed");
    let web = pair.site.host("legacy");
    let _nginx = named(&web);
    let endpoint = format!("{}:80", web.v4());
    declare(
        &pair,
        "web",
        "port = 80",
        std::slice::from_ref(&endpoint),
        "",
    );
    let said = format!("plaintext beyond server: {endpoint}");
    let table = pair.control.meshctl("get services").ok();
    assert!(table.contains(&said), "{table}");
    let yaml = pair.control.meshctl("get services shop/web -o yaml").ok();
    assert!(yaml.contains(&said), "{yaml}");
    let json = pair.control.get("services shop/web");
    let beyond = json[0].pointer("/status/endpoints/0/plaintextBeyond/0");
    assert_eq!(beyond.and_then(|e| e.as_str()), Some(endpoint.as_str()));
    let status = pair.server.command("status").ok();
    let line = format!("plaintext    shop/web beyond this host: {endpoint}\n");
    assert!(status.contains(&line), "{status}");
    assert!(status.contains("none, fronted"), "{status}");
    assert!(status.contains("problems     none"), "{status}");
    // An app of the host takes the service over: nothing is plaintext any more, and nothing goes there.
    let call = format!("curl -sS -m 10 http://{}/", mesh_name("web"));
    assert_eq!(pair.ok(&call), "legacy\n");
    let _own = named(&pair.server.host);
    pair.server.serve("web", &owner("web"), &[(80, "auto")]);
    wait_until("the app of the host itself", SOON, || {
        let text = pair.ok(&call);
        check(text == "server\n", text)
    });
    wait_until("the listing without plaintext", SOON, || {
        let table = pair.control.meshctl("get services").ok();
        check(!table.contains("plaintext beyond"), table)
    });
    let metrics = pair.server.metrics();
    assert_eq!(metrics.sum("mesh_plaintext_endpoints", &[]), 0.0);
}

#[test]
fn calls_of_each_protocol_take_turns_and_pass_over_what_is_down() {
    for (protocol, account) in [
        ("http", "web-http"),
        ("auto", "web-auto"),
        ("tcp", "web-tcp"),
    ] {
        let pair = Pair::new(&format!("unjoined_turns_{protocol}"));
        let [one, two] = ["one", "two"].map(|name| pair.site.host(name));
        let first = named(&one);
        let _second = named(&two);
        let endpoints = [format!("{}:80", one.v4()), format!("[{}]:80", two.v6())];
        let port = format!("port = 80, protocol = \"{protocol}\"");
        declare(&pair, account, &port, &endpoints, "");
        let call = format!("curl -sS -m 10 http://{}/", mesh_name(account));
        for wanted in ["one\n", "two\n"] {
            wait_until(wanted, SOON, || {
                let text = pair.ok(&call);
                check(text == wanted, text)
            });
        }
        assert!(first.stop().success());
        // Without a check nobody knows but by failing: no call of a caller may.
        for _ in 0..20 {
            assert_eq!(pair.ok(&call), "two\n", "{protocol}");
        }
        let labels = [("endpoint", endpoints[0].as_str()), ("status", "failed")];
        let metrics = pair.server.metrics();
        let failed = metrics.sum("mesh_plaintext_connections_total", &labels);
        assert!(1.0 <= failed, "{protocol}: {failed}");
        let _again = named(&one);
        wait_until("the return of the first", SOON, || {
            let text = pair.ok(&call);
            check(text == "one\n", text)
        });
    }
}

#[test]
fn a_server_that_answers_nothing_costs_no_call() {
    let pair = Pair::new("unjoined_silent");
    let [silent, answering] = ["silent", "answering"].map(|name| pair.site.host(name));
    let _web = named(&answering);
    silent.set_link(false);
    let endpoints = [silent.v4(), answering.v4()].map(|ip| format!("{ip}:80"));
    declare(
        &pair,
        "web",
        "port = 80, protocol = \"tcp\"",
        &endpoints,
        "",
    );
    let call = format!("curl -sS -m 20 http://{}/", mesh_name("web"));
    for _ in 0..4 {
        assert_eq!(pair.ok(&call), "answering\n");
    }
    let labels = [("endpoint", endpoints[0].as_str()), ("status", "failed")];
    let metrics = pair.server.metrics();
    let failed = metrics.sum("mesh_plaintext_connections_total", &labels);
    assert!(1.0 <= failed, "{failed}");
}

#[test]
fn a_check_asks_each_server_and_leaves_out_what_fails_it() {
    let pair = Pair::new("unjoined_checked");
    let [good, bad] = ["good", "bad"].map(|name| pair.site.host(name));
    let _good = named(&good);
    let broken = "location / { return 200 \"bad\\n\"; }\nlocation = /health { return 503; }";
    let broken = servers::nginx(&bad, "web", 80, broken);
    let endpoints = [good.v4(), bad.v4()].map(|ip| format!("{ip}:80"));
    let check_http = "check = { http = \"/health\", interval_s = 1, fall = 1 }\n";
    let port = "port = 80, protocol = \"http\"";
    declare(&pair, "web", port, &endpoints, check_http);
    let problem = format!("plaintext endpoint {} fails the check", endpoints[1]);
    wait_until("the failed check", SOON, || {
        let status = pair.server.command("status").ok();
        check(status.contains(&problem), status)
    });
    let call = format!("curl -sS -m 10 http://{}/", mesh_name("web"));
    for _ in 0..10 {
        assert_eq!(pair.ok(&call), "good\n");
    }
    assert!(broken.stop().success());
    // Then the other one, too: the service is not listed any more.
    let none = [endpoints[1].clone()];
    front(&pair.server, "web", port, &none, check_http);
    pair.control.wait_endpoints("shop/web", 0);
    let answer = pair.ok(&format!("curl -sS -m 10 -i http://{}/", mesh_name("web")));
    assert!(answer.contains("no_endpoints"), "{answer}");
}

#[test]
fn servers_that_are_all_down_are_named_and_nothing_else_is_reached() {
    let pair = Pair::new("unjoined_down");
    let nobody = pair.site.host("nobody");
    let endpoint = format!("{}:80", nobody.v4());
    declare(
        &pair,
        "web",
        "port = 80, protocol = \"http\"",
        std::slice::from_ref(&endpoint),
        "",
    );
    let before = pair.server.refused("app_unreachable");
    let answer = pair.ok(&format!("curl -sS -m 20 -i http://{}/", mesh_name("web")));
    assert!(answer.contains(" 503 "), "{answer}");
    let lower = answer.to_lowercase();
    assert!(
        lower.contains("x-meshwork-reason: app_unreachable"),
        "{answer}"
    );
    pair.server.wait_refused("app_unreachable", before);
    let log = pair.server.log();
    assert!(log.contains(&endpoint), "{log}");
}

/// The front must be no way around the checks of what this host itself serves, nor around other services' policies.
#[test]
fn addresses_that_are_no_server_beyond_the_host_are_refused() {
    let pair = Pair::new("unjoined_refused");
    let _web = pair.web("http", "");
    let [vip4, vip6] = pair.vips("web");
    let host = &pair.server.host;
    for (endpoint, word) in [
        ("127.0.0.1:80".to_owned(), "this host itself"),
        (format!("{}:7441", host.v4()), "this host's own"),
        (format!("[{}]:80", host.v6()), "this host's own"),
        ("169.254.169.254:80".to_owned(), "link-local"),
        (format!("{vip4}:80"), "virtual address"),
        (format!("[{vip6}]:80"), "virtual address"),
        ("db.example.com:5432".to_owned(), "names are not resolved"),
    ] {
        front(
            &pair.server,
            "bad",
            "port = 81",
            std::slice::from_ref(&endpoint),
            "",
        );
        wait_until("the refusal of the file", SOON, || {
            let status = pair.server.command("status").ok();
            let told = status.contains(&endpoint) && status.contains(word);
            check(told && status.contains("bad.toml:4"), status)
        });
    }
    let listed = pair.control.get("services");
    assert_eq!(listed.len(), 1, "{listed:?}");
    // The host gets the server's address after its file was read: its own programs were not checked.
    let moved = pair.site.host("moved");
    let endpoint = format!("{}:80", moved.v4());
    moved.set_link(false);
    declare(
        &pair,
        "late",
        "port = 80, protocol = \"http\"",
        std::slice::from_ref(&endpoint),
        "",
    );
    host.ok(&format!("ip address add {}/32 dev eth0", moved.v4()));
    let before = pair.server.refused("app_unreachable");
    let answer = pair.ok(&format!("curl -sS -m 20 -i http://{}/", mesh_name("late")));
    assert!(
        answer.contains("app_unreachable") && !answer.contains("hello"),
        "{answer}"
    );
    pair.server.wait_refused("app_unreachable", before);
    let log = pair.server.log();
    assert!(log.contains("an address of this host now"), "{log}");
}

#[test]
fn a_front_serves_only_what_its_token_allows() {
    let pair = Pair::new("unjoined_scope");
    let options = TokenOptions("--identity 'shop/*' --service 'shop/allowed'".to_owned());
    let narrow = pair.control.join(&pair.site.host("narrow"), &options);
    let server = pair.site.host("legacy");
    let _nginx = named(&server);
    let endpoint = format!("{}:80", server.v4());
    for account in ["allowed", "other"] {
        front(
            &narrow,
            account,
            "port = 80",
            std::slice::from_ref(&endpoint),
            "",
        );
    }
    pair.control.wait_endpoints("shop/allowed", 1);
    wait_until("the refusal", SOON, || {
        let status = narrow.command("status").ok();
        check(status.contains("out_of_scope"), status)
    });
    pair.wait_name("allowed");
    let call = format!("curl -sS -m 10 http://{}/", mesh_name("allowed"));
    assert_eq!(pair.ok(&call), "legacy\n");
}

/// Keep-alive asks nothing while something is under way: a server that is gone by then is noticed all the same, long
/// before its kernel gives up.
#[test]
fn a_server_that_vanishes_ends_the_calls_that_it_has() {
    const SERVER: &str = "\
import socket, threading
def serve(c):
    data = c.recv(65536)
    while data:
        if data == b'ready': c.sendall(data)
        data = c.recv(65536)
s = socket.create_server(('0.0.0.0', 9000))
while True: threading.Thread(target=serve, args=(s.accept()[0],), daemon=True).start()
";
    const CALLER: &str = "\
import os, socket, time
def dial(name):
    s = socket.create_connection((name + '.shop.mesh.internal', 9000), 20)
    s.settimeout(120)
    return s
tcp = dial('bytes')
tcp.sendall(b'ready')
assert tcp.recv(5) == b'ready'
web = dial('web')
web.sendall(b'POST / HTTP/1.1\\r\\nHost: a\\r\\nTransfer-Encoding: chunked\\r\\n\\r\\n1\\r\\nx\\r\\n')
print('open', flush=True)
while not os.path.exists('GO'): time.sleep(0.01)
tcp.sendall(b'lost')
web.sendall(b'1\\r\\ny\\r\\n')
try: print('tcp', tcp.recv(100), flush=True)
except ConnectionResetError: print('tcp reset', flush=True)
print('web', web.recv(4096), flush=True)
";
    let pair = Pair::new("unjoined_vanishes");
    let host = pair.site.host("vanishing");
    let _server = host.python("server", SERVER).spawn("server");
    host.wait_listening(9000, SOON);
    let endpoint = [format!("{}:9000", host.v4())];
    declare(
        &pair,
        "bytes",
        "port = 9000, protocol = \"tcp\"",
        &endpoint,
        "",
    );
    declare(
        &pair,
        "web",
        "port = 9000, protocol = \"http\"",
        &endpoint,
        "",
    );
    let go = pair.client.host.dir().join("go");
    let script = CALLER.replace("GO", &go.display().to_string());
    let caller = pair.client.host.python("caller", &script).cgroup("client");
    let caller = caller.spawn("caller");
    wait_until("the connection", SOON, || {
        check(caller.log().contains("open"), caller.log())
    });
    wait_until("the request to be open", SOON, || {
        let labels = [("dst", "shop/web"), ("direction", "Inbound")];
        let open = pair.server.metrics().sum("mesh_open_connections", &labels);
        check(open == 1.0, format!("{open} open"))
    });
    host.set_link(false);
    std::fs::write(&go, "").unwrap();
    wait_until("both to be told", SOON * 4, || {
        let log = caller.log();
        let told = log.contains("tcp reset") && log.contains("app_reset");
        check(told, log)
    });
}
