//! `mesh-agent bypass`: root opens a host to plaintext for a time. It closes by itself, whatever becomes of the agent.

use meshwork_tests::wait::{SOON, check, wait_until};

use crate::door::{PASSES, REFUSED, STRICT, plaintext, wait_plaintext};
use crate::pair::{Pair, mesh_name};
use crate::real_addresses::{REAL, service, wait_taken};

const WEB: &str = "{port: 80, appProtocol: http}";

/// Who asks nginx, as it sees it: by the mesh the agent says whose call it is.
const LOCATIONS: &str = "location = /who { return 200 \"from '$http_x_meshwork_client_id'\\n\"; }";

fn who(pair: &Pair, to: &str) -> String {
    let output = pair
        .cmd(&format!("curl -sS -m 10 http://{to}/who"))
        .output();
    output.stdout
}

#[test]
fn root_opens_a_host_for_a_time_and_it_closes_by_itself() {
    let pair = Pair::new("root_opens_a_host");
    let _web = pair.web("http", LOCATIONS);
    let strict = format!("{REAL}, {STRICT}");
    pair.control.apply(&service("web", WEB, &strict)).ok();
    let stranger = pair.site.host("stranger");
    let address = pair.server.host.v4().to_string();
    wait_taken(&pair.client.host, &address, true);
    wait_plaintext(&pair, &stranger, REFUSED);
    let client = "from 'spiffe://corp.test/ns/shop/sa/client'\n";
    assert_eq!(who(&pair, &address), client);

    let said = pair
        .server
        .command("bypass --for 1h --why 'the mesh is ill'")
        .ok();
    assert!(said.contains("open until"), "{said}");
    wait_plaintext(&pair, &stranger, PASSES);
    // The caller's own host is closed still: from there it goes by the mesh.
    assert_eq!(who(&pair, &address), client);
    pair.client.command("bypass --for 1h").ok();
    assert_eq!(who(&pair, &address), "from ''\n");
    assert_eq!(
        who(&pair, &mesh_name("web")),
        client,
        "by name nothing changes"
    );

    // It is seen on the host and in the mesh.
    wait_until("the agent to say it", SOON, || {
        let page = pair.server.command("status").ok();
        check(
            page.contains("OPEN TO PLAINTEXT") && page.contains("the mesh is ill"),
            page,
        )
    });
    let open = pair.server.metrics().sum("mesh_bypass", &[]);
    assert_eq!(open, 1.0);
    let page = pair.server.command("check").stdout;
    assert!(page.contains("WARNING  bypass"), "{page}");
    wait_until("control to say it", SOON, || {
        let page = pair.control.meshctl("check").stdout;
        check(
            page.contains("bypasses") && page.contains("the mesh is ill"),
            page,
        )
    });
    let noted = || {
        let audit = pair.control.get("audit");
        let of = audit.iter().filter(|entry| entry["action"] == "bypass");
        of.filter(|entry| {
            entry["object"]
                .as_str()
                .unwrap()
                .contains("the mesh is ill")
        })
        .count()
    };
    wait_until("it to be noted", SOON, || check(noted() == 1, "it is not"));

    // It outlives reload, death and flush, and closes when it is told.
    pair.server.command("reload").ok();
    assert_eq!(plaintext(&pair.server.host, &stranger, false), PASSES);
    pair.server.host.ok("nft flush ruleset");
    wait_plaintext(&pair, &stranger, PASSES);
    pair.server.command("bypass --end").ok();
    wait_plaintext(&pair, &stranger, REFUSED);
    pair.client.command("bypass --end").ok();
    assert_eq!(who(&pair, &address), client);
    wait_until("its end to be noted", SOON, || {
        check(noted() == 2, "it is not")
    });
    let again = pair.server.command("bypass --end").ok();
    assert!(again.contains("closed already"), "{again}");

    // By itself.
    pair.server.command("bypass --for 5s").ok();
    wait_plaintext(&pair, &stranger, REFUSED);
    wait_until("the agent to say that it is closed", SOON, || {
        let open = pair.server.metrics().sum("mesh_bypass", &[]);
        check(open == 0.0, "open")
    });

    for wrong in [
        "bypass",
        "bypass --for 2d",
        "bypass --for 4s",
        "bypass --for 1h --end",
    ] {
        let output = pair.server.command(wrong);
        assert_eq!(output.status.code(), Some(2), "{wrong}: {output}");
    }
}

/// Who needs it most has an agent that does not run.
#[test]
fn a_host_without_its_agent_is_opened_and_closes_by_itself() {
    let mut pair = Pair::new("a_host_without_its_agent_is_opened");
    let _web = pair.web("http", "");
    pair.control.apply(&crate::door::service(STRICT)).ok();
    let stranger = pair.site.host("stranger");
    wait_plaintext(&pair, &stranger, REFUSED);
    let server = pair.server.host.clone();
    wait_until("the guard to know it", SOON, || {
        let guard = server.ok("nft list table inet meshwork_guard");
        check(guard.contains("80"), guard)
    });
    pair.server.stop();
    assert_eq!(plaintext(&server, &stranger, false), REFUSED);
    pair.server.command("bypass --for 5s").ok();
    assert_eq!(plaintext(&server, &stranger, false), PASSES);
    wait_plaintext(&pair, &stranger, REFUSED);

    // An agent that starts meanwhile keeps it, and control hears of it.
    pair.server.command("bypass --for 1h --why 'no agent'").ok();
    pair.server.start();
    assert_eq!(plaintext(&server, &stranger, false), PASSES);
    wait_until("it to be noted", SOON, || {
        let audit = pair.control.get("audit");
        let noted = |entry: &serde_json::Value| {
            entry["object"]
                .as_str()
                .is_some_and(|o| o.contains("no agent"))
        };
        check(audit.iter().any(noted), "it is not")
    });
    pair.server.kill9();
    pair.server.command("bypass --end").ok();
    assert_eq!(plaintext(&server, &stranger, false), REFUSED);
    assert_eq!(plaintext(&server, &stranger, true), REFUSED);
}
