//! Who is listed: what checks say, and what calls say before them.

use meshwork_tests::servers;
use meshwork_tests::wait::{SOON, check, wait_until};

use crate::pair::{Pair, owner};

/// Serves gRPC's health protocol. The status is what the file in `STATUS` says; without it the method is not there.
const HEALTH: &str = "\
import grpc, os
from concurrent import futures
def ask(request, context):
    if request != b'\\x0a\\x09shop.Cart':
        context.abort(grpc.StatusCode.NOT_FOUND, 'who?')
    try: said = open(os.environ['STATUS']).read()
    except OSError: context.abort(grpc.StatusCode.UNIMPLEMENTED, 'never heard of')
    return b'\\x08' + bytes([int(said)])
handlers = {'Check': grpc.unary_unary_rpc_method_handler(ask)}
server = grpc.server(futures.ThreadPoolExecutor(2))
server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler('grpc.health.v1.Health', handlers),))
server.add_insecure_port('0.0.0.0:50051')
server.start()
server.wait_for_termination()
";

#[test]
fn a_server_is_listed_while_its_grpc_health_is_serving() {
    let pair = Pair::new("grpc_health");
    let host = &pair.server.host;
    let status = host.dir().join("status");
    let say = |number: &str| {
        let new = host.dir().join("status.new");
        std::fs::write(&new, number).unwrap();
        std::fs::rename(new, &status).unwrap();
    };
    let server = host.python("cart", HEALTH);
    let server = server.env("STATUS", &status.display().to_string());
    let _server = server.cgroup("cart").spawn("cart");
    host.wait_listening(50051, SOON);
    say("1");
    let file = |service: &str| {
        let line = pair.server.owner_line(&owner("cart"));
        let text = format!(
            "namespace = \"shop\"\n[owner]\n{line}\n[[service]]\nports = [{{ port = 50051, protocol = \"grpc\" }}]\n\
             check = {{ grpc = \"{service}\", interval_s = 1, fall = 2 }}\n"
        );
        pair.server.write_file("cart.toml", &text);
    };
    file("shop.Cart");
    pair.control.wait_endpoints("shop/cart", 1);
    say("2");
    pair.control.wait_endpoints("shop/cart", 0);
    let wait_log = |word: &str| {
        wait_until(word, SOON, || {
            let log = pair.server.log();
            check(log.contains(word), log.clone())
        });
    };
    wait_log("its status of shop.Cart is NOT_SERVING");
    say("1");
    pair.control.wait_endpoints("shop/cart", 1);
    std::fs::remove_file(&status).unwrap();
    pair.control.wait_endpoints("shop/cart", 0);
    wait_log("it does not implement grpc.health.v1.Health");
    say("1");
    pair.control.wait_endpoints("shop/cart", 1);
    // A service that it knows nothing of, though the program serves.
    file("shop.Other");
    pair.control.wait_endpoints("shop/cart", 0);
    wait_log("it knows no gRPC service `shop.Other`");
    let metrics = pair.server.metrics();
    for result in ["ok", "failed"] {
        let labels = [("kind", "grpc"), ("result", result)];
        assert!(metrics.sum("mesh_health_checks_total", &labels) >= 1.0);
    }
}

/// Calls without end, each on a connection of its own.
const CALLER: &str = "\
import http.client, time
while True:
    c = http.client.HTTPConnection('web.shop.mesh.internal', 80, timeout=20)
    try:
        c.request('GET', '/')
        c.getresponse().read()
    except OSError: pass
    c.close()
    time.sleep(0.02)
";

/// Its checks are an hour apart, or there are none: only the calls can tell that it died.
fn died_under_calls(name: &str, check_line: &str) {
    const PAGE: &str = "location / { return 200 \"hello\\n\"; }";
    let pair = Pair::new(name);
    let web = servers::nginx(&pair.server.host, "web", 80, PAGE);
    let line = pair.server.owner_line(&owner("web"));
    let file = format!(
        "namespace = \"shop\"\n[owner]\n{line}\n[[service]]\nports = [{{ port = 80, protocol = \"http\" }}]\n{check_line}"
    );
    pair.server.write_file("web.toml", &file);
    pair.control.wait_endpoints("shop/web", 1);
    pair.wait_name("web");
    let caller = pair.client.host.python("caller", CALLER).cgroup("client");
    let _caller = caller.spawn("caller");
    let mut web = Some(web);
    for _ in 0..2 {
        if let Some(web) = web.take() {
            web.kill9();
        }
        pair.control.wait_endpoints("shop/web", 0);
        let status = pair.server.command("status").ok();
        assert!(status.contains("unhealthy"), "{status}");
        web = Some(servers::nginx(&pair.server.host, "web", 80, PAGE));
        pair.control.wait_endpoints("shop/web", 1);
    }
    let labels = [("kind", "calls"), ("result", "failed")];
    let unlisted = pair
        .server
        .metrics()
        .sum("mesh_health_checks_total", &labels);
    assert!(unlisted >= 2.0, "{unlisted}");
}

#[test]
fn an_app_that_dies_under_calls_is_unlisted_long_before_its_check() {
    let check = "check = { tcp = true, interval_s = 3600 }\n";
    died_under_calls("dies_before_its_check", check);
}

#[test]
fn an_app_without_a_check_that_dies_under_calls_is_unlisted_and_comes_back() {
    died_under_calls("dies_without_a_check", "");
}
