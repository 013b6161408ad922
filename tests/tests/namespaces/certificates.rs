//! Who may not speak at the mesh port, each refused by its reason.

use std::fs;
use std::net::SocketAddr;

use mesh_api::header::{Header, StreamKind};
use mesh_api::proto::{TrustBundle, TrustDomainRoots};
use mesh_api::stored::{seal, unseal};
use mesh_core::reason::Reason;
use meshwork_tests::agent::{Agent, MESH_PORT};
use meshwork_tests::control::{Control, TRUST_DOMAIN};
use meshwork_tests::mesh::{Authority, Credential, knock, knock_plaintext, open_stream};
use meshwork_tests::wait::{SOON, check, wait_until};

use crate::pair::{Pair, mesh_name, owner, spiffe};

const UID: &str = "00112233445566778899aabbccddeeff";
/// Valid since yesterday, until tomorrow.
const NOW: (i64, i64) = (-1, 1);

struct Port<'a> {
    pair: &'a Pair,
    address: SocketAddr,
    sni: String,
}

impl Port<'_> {
    /// How it ends to knock with a credential.
    #[track_caller]
    fn knock(&self, credential: &Credential) -> String {
        let client = &self.pair.client.host;
        client.inside(|| knock(self.address, &self.sni, Some(credential)))
    }

    /// Knocks with a credential, which must be refused for `reason`.
    #[track_caller]
    fn refuses(&self, reason: &str, sni: &str, credential: Option<&Credential>) {
        let before = self.pair.server.refused(reason);
        let client = &self.pair.client.host;
        let end = client.inside(|| knock(self.address, sni, credential));
        assert_ne!(end, "accepted", "{reason}");
        self.pair.server.wait_refused(reason, before);
    }
}

fn port(pair: &Pair) -> Port<'_> {
    Port {
        pair,
        address: SocketAddr::from((pair.server.host.v4(), MESH_PORT)),
        sni: format!("web.shop.{TRUST_DOMAIN}"),
    }
}

#[test]
fn certificates_that_prove_nothing_are_refused_by_reason() {
    let pair = Pair::new("certificates_that_prove_nothing");
    let _web = pair.web("http", "");
    let port = port(&pair);
    let ours = Authority::of_control(&pair.control.state_dir());
    let foreign = Authority::foreign(TRUST_DOMAIN);
    let client = spiffe("client");
    let refuses = |reason: &str, credential: Credential| {
        port.refuses(reason, &port.sni, Some(&credential));
    };
    refuses("untrusted_issuer", foreign.leaf(&[&client], NOW, Some(UID)));
    refuses(
        "certificate_expired",
        ours.leaf(&[&client], (-3, -2), Some(UID)),
    );
    refuses(
        "certificate_expired",
        ours.leaf(&[&client], (2, 3), Some(UID)),
    );
    refuses(
        "certificate_malformed",
        ours.leaf(&[&client, &spiffe("boss")], NOW, Some(UID)),
    );
    refuses(
        "certificate_malformed",
        ours.leaf(&["https://corp.test/"], NOW, Some(UID)),
    );
    let elsewhere = "spiffe://evil.test/ns/shop/sa/client";
    refuses(
        "unknown_trust_domain",
        ours.leaf(&[elsewhere], NOW, Some(UID)),
    );
    for kind in [format!("agent/{UID}"), "operator/admin".to_owned()] {
        let uri = format!("spiffe://{TRUST_DOMAIN}/{kind}");
        refuses("identity_kind", ours.leaf(&[&uri], NOW, Some(UID)));
    }
    // Signed by our own issuer, and covered by no revocation.
    refuses("source_missing", ours.leaf(&[&client], NOW, None));
    refuses(
        "certificate_malformed",
        ours.leaf(&[&client], NOW, Some("x")),
    );
    port.refuses("no_certificate", &port.sni, None);
    let end = port.knock(&ours.leaf(&[&client], NOW, Some(UID)));
    assert_eq!(end, "accepted", "with all of it right it gets in");
}

/// Two trust domains are believed, each by its own root: neither may speak in the other's name.
#[test]
fn a_root_of_one_trust_domain_vouches_for_no_other() {
    let mut pair = Pair::new("a_root_of_one_trust_domain");
    let _web = pair.web("http", "");
    let ours = Authority::of_control(&pair.control.state_dir());
    let theirs = Authority::foreign("evil.test");
    // As control will say once two meshes are linked; this one would take it back.
    pair.control.stop();
    pair.server.stop();
    let file = pair.server.host.dir().join("state/bundle");
    let mut bundle: TrustBundle = unseal(&fs::read(&file).unwrap()).unwrap();
    bundle.domains.push(TrustDomainRoots {
        trust_domain: "evil.test".to_owned(),
        roots: vec![theirs.root().to_vec().into()],
    });
    fs::write(&file, seal(&bundle)).unwrap();
    pair.server.start();
    let port = port(&pair);
    let id = |domain: &str| format!("spiffe://{domain}/ns/shop/sa/client");
    for (authority, own, other) in [
        (&ours, TRUST_DOMAIN, "evil.test"),
        (&theirs, "evil.test", TRUST_DOMAIN),
    ] {
        let end = port.knock(&authority.leaf(&[&id(own)], NOW, Some(UID)));
        assert_eq!(end, "accepted", "{own} speaks for itself");
        let forged = authority.leaf(&[&id(other)], NOW, Some(UID));
        port.refuses("untrusted_issuer", &port.sni, Some(&forged));
    }
}

/// A wall clock that steps costs no trust that it need not, and what it costs comes back with it: the caller's.
#[test]
fn a_callers_clock_that_steps_by_minutes_and_by_a_day_is_outlived() {
    let mut pair = Pair::new("a_callers_clock_that_steps");
    let _web = pair.web("http", "");
    steps_are_outlived(&mut pair, [|p| &mut p.client, |p| &mut p.server]);
}

/// The same where the called host's clock steps, by which callers are judged.
#[test]
fn a_called_hosts_clock_that_steps_by_minutes_and_by_a_day_is_outlived() {
    let mut pair = Pair::new("a_called_hosts_clock_that_steps");
    let _web = pair.web("http", "");
    steps_are_outlived(&mut pair, [|p| &mut p.server, |p| &mut p.client]);
}

type Side = fn(&mut Pair) -> &mut Agent;

fn steps_are_outlived(pair: &mut Pair, [stepped, other]: [Side; 2]) {
    stepped(pair).stop();
    stepped(pair).start_off_clock(0);
    let call = format!("curl -sS -m 10 -i http://{}/", mesh_name("web"));
    let answer = |pair: &mut Pair| {
        // Its connections go with it: the next call is a handshake, judged by the clocks of now.
        other(pair).kill_worker();
        pair.cmd(&call).output()
    };
    let signed = |pair: &Pair| {
        pair.control
            .metrics()
            .sum("mesh_control_leaves_signed_total", &[])
    };
    for seconds in [300, -300, 86_400, 0] {
        stepped(pair).step_clock(seconds);
        let before = signed(pair);
        wait_until(&format!("calls at {seconds:+} s"), SOON, || {
            let got = answer(pair);
            check(got.stdout.ends_with("hello\n"), got.to_string())
        });
        // What is signed anew is not new by that clock, and must not be asked for again and again.
        let made = signed(pair) - before;
        assert!(made < 20.0, "{made} certificates at {seconds:+} s");
    }
    // A day behind, nothing is valid yet, and that is said; nobody is believed on the off chance.
    stepped(pair).step_clock(-86_400);
    wait_until("a refusal", SOON, || {
        let got = answer(pair);
        let said = ["certificate_expired", "no_identity", "peer_handshake"]
            .iter()
            .any(|reason| got.stdout.contains(&format!("x-meshwork-reason: {reason}")));
        check(said, got.to_string())
    });
    let judged = stepped(pair);
    assert!(0.0 < judged.refused("certificate_expired") + judged.refused("no_identity"));
    judged.step_clock(0);
    wait_until("calls by the right clock", SOON, || {
        let got = answer(pair);
        check(got.stdout.ends_with("hello\n"), got.to_string())
    });
}

/// Control's clock is in what it signs, and judges agents. Five minutes more or less cost nothing. By a day, who has a
/// certificate goes on, and who has none gets none that is of use, which is said; a workload that comes when the clock is
/// right again is served. What was signed a day ahead is asked for again within minutes, and replaces none that is good.
#[test]
fn controls_clock_that_steps_by_a_day_costs_new_certificates_only() {
    let mut pair = Pair::new("controls_clock_that_steps");
    let _web = pair.web("http", "");
    pair.control.stop();
    pair.control.run_off_clock(0);
    let call = format!("curl -sS -m 10 -i http://{}/", mesh_name("web"));
    // A workload that has no certificate yet.
    let new = |pair: &Pair, name: &str| {
        pair.client.serve(name, &owner(name), &[]);
        // Agents may have to find back to control first.
        wait_until(&format!("calls of {name}"), Control::NOTICED * 2, || {
            let got = pair.client.host.cmd(&call).cgroup(name).output();
            check(got.stdout.ends_with("hello\n"), got.to_string())
        });
    };
    let old = |pair: &mut Pair, seconds: i64| {
        pair.client.kill_worker();
        wait_until(&format!("calls at {seconds:+} s"), SOON, || {
            let got = pair.cmd(&call).output();
            check(got.stdout.ends_with("hello\n"), got.to_string())
        });
    };
    for (seconds, name) in [(300, "ahead"), (-300, "behind")] {
        pair.control.step_clock(seconds);
        old(&mut pair, seconds);
        new(&pair, name);
    }
    for (seconds, name) in [(86_400, "day-ahead"), (-86_400, "day-behind")] {
        pair.control.step_clock(seconds);
        let before = pair.control.refused("certificate_expired");
        old(&mut pair, seconds);
        let unknown = pair.client.refused("no_identity");
        pair.client.serve(name, &owner(name), &[]);
        wait_until(&format!("the refusal of {name}"), SOON, || {
            let got = pair.client.host.cmd(&call).cgroup(name).output();
            assert!(!got.stdout.ends_with("hello\n"), "{got}");
            let refused = got.stdout.contains("x-meshwork-reason: peer_handshake");
            let unknown = unknown < pair.client.refused("no_identity");
            check(refused || unknown, got.to_string())
        });
        wait_until("that to be told", SOON, || {
            // Behind, control takes no agent's certificate, and tells none its time.
            let refused = before < pair.control.refused("certificate_expired");
            let said = pair.client.command("check").stdout;
            let failed = |line: &str| line.starts_with("FAILED") && line.contains(" clock ");
            check(refused || said.lines().any(failed), said)
        });
        pair.control.step_clock(0);
        new(&pair, &format!("after-{name}"));
    }
}

/// Control shows itself at the mesh port to prove addresses. That gives it no right to call anything.
#[test]
fn what_a_peer_asks_for_is_judged_whoever_it_is() {
    let pair = Pair::new("what_a_peer_asks_for_is_judged");
    let _web = pair.web("tcp", "");
    let port = port(&pair);
    let ours = Authority::of_control(&pair.control.state_dir());
    let control = ours.leaf(&[&format!("spiffe://{TRUST_DOMAIN}/control")], NOW, None);
    let client = ours.leaf(&[&spiffe("client")], NOW, Some(UID));
    let host = &pair.client.host;
    let ask = |credential: &Credential, header: &[u8]| {
        host.inside(|| open_stream(port.address, &port.sni, credential, header))
    };
    let header = |port: u16, service: &str| {
        let mut bytes = Vec::new();
        let service = service.parse().unwrap();
        let kind = StreamKind::Tcp;
        Header {
            kind,
            service,
            port,
        }
        .encode(&mut bytes);
        bytes
    };
    assert_eq!(ask(&client, &header(80, "web")), None);
    let refused = |reason: Reason, credential: &Credential, header: &[u8]| {
        let before = pair.server.refused(reason.code());
        assert_eq!(ask(credential, header), Some(reason));
        pair.server.wait_refused(reason.code(), before);
    };
    refused(Reason::NotAllowed, &control, &header(80, "web"));
    refused(Reason::NoSuchPort, &client, &header(81, "web"));
    refused(Reason::NoSuchPort, &client, &header(80, "cache"));
    let mut newer = header(80, "web");
    newer[0] = 200;
    refused(Reason::HeaderVersion, &client, &newer);
    refused(Reason::HeaderMalformed, &client, &header(80, "web")[..4]);
    refused(Reason::HeaderMalformed, &client, b"");
}

/// The credential that the client's agent really has for control, taken from its disk.
#[test]
fn an_agents_own_credential_opens_no_mesh_port() {
    let pair = Pair::new("an_agents_own_credential");
    let _web = pair.web("http", "");
    let port = port(&pair);
    let state = pair.client.host.dir().join("state");
    let credential = Credential::of_agent(&state);
    port.refuses("identity_kind", &port.sni, Some(&credential));
    let workload = Credential::of_leaf(&state, "shop.client");
    assert_eq!(port.knock(&workload), "accepted", "its workload's does");
}

#[test]
fn bytes_that_are_no_tls_are_refused_by_reason() {
    let pair = Pair::new("bytes_that_are_no_tls");
    let _web = pair.web("http", "");
    let port = port(&pair);
    for bytes in [
        &b"GET / HTTP/1.1\r\nHost: web\r\n\r\n"[..],
        b"SSH-2.0-x\r\n",
        &[0; 64],
    ] {
        let before = pair.server.refused("not_tls");
        pair.client
            .host
            .inside(|| knock_plaintext(port.address, bytes));
        pair.server.wait_refused("not_tls", before);
    }
}

/// Right in all but whom it asks for: identities that are not of this host, or of nobody.
#[test]
fn a_server_name_that_is_not_of_this_host_is_refused() {
    let pair = Pair::new("a_server_name_that_is_not_of_this_host");
    let _web = pair.web("http", "");
    let port = port(&pair);
    let ours = Authority::of_control(&pair.control.state_dir());
    let credential = ours.leaf(&[&spiffe("client")], NOW, Some(UID));
    // An address is not sent as a server name: the last asks for nobody at all.
    for name in [
        "client.shop.corp.test",
        "web.shop.evil.test",
        "web.shop",
        "192.0.2.1",
    ] {
        port.refuses("unknown_server_name", name, Some(&credential));
    }
    assert_eq!(
        port.knock(&credential),
        "accepted",
        "by the right name it gets in"
    );
}

/// A host that answers at the address of another one, with a certificate of its own, is not believed.
#[test]
fn a_server_with_another_identity_is_not_called() {
    let pair = Pair::new("a_server_with_another_identity");
    let _web = pair.web("http", "");
    let url = format!("http://{}/", mesh_name("web"));
    assert_eq!(pair.ok(&format!("curl -sS -m 10 {url}")), "hello\n");
    // The same identity, but from another host: the right name under another Source.
    let token = meshwork_tests::control::TokenOptions::default();
    let mut other = pair.control.join(&pair.site.host("other"), &token);
    other.serve("web", &owner("web"), &[(80, "http")]);
    pair.control.wait_endpoints("shop/web", 1);
    let _gotcha = meshwork_tests::servers::nginx(&other.host, "gotcha", 81, "");
    let mut server = pair.server;
    server.stop();
    // It takes over the address of the host that is gone.
    let address = server.host.v4();
    server
        .host
        .ok(&format!("ip address del {address}/24 dev eth0"));
    other
        .host
        .ok(&format!("ip address add {address}/24 dev eth0"));
    let flush = "ip neighbour flush all";
    pair.client.host.ok(flush);
    let before = pair.client.refused("peer_identity");
    let answer = pair
        .client
        .host
        .cmd(&format!("curl -sS -m 20 -i {url}"))
        .cgroup("client")
        .ok();
    assert!(
        answer
            .to_lowercase()
            .contains("x-meshwork-reason: peer_identity"),
        "{answer}"
    );
    pair.client.wait_refused("peer_identity", before);
    other.stop();
}
