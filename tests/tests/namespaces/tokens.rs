//! Join tokens that must not work, each refused by its reason, in the answer and in the audit log.

use meshwork_tests::agent::Agent;
use meshwork_tests::control::{Control, TokenOptions};
use meshwork_tests::servers;
use meshwork_tests::site::Site;
use meshwork_tests::wait::{SOON, check, wait_until};

use crate::pair::owner;

struct Joining {
    control: Control,
    site: Site,
}

impl Joining {
    fn new(name: &str) -> Self {
        let site = Site::new(name);
        Self {
            control: Control::start(&site),
            site,
        }
    }

    /// Joins a new host with `token`, which control must refuse for `reason`, and count.
    #[track_caller]
    fn refuses(&self, reason: &str, host: &str, token: &str) {
        let before = self.control.refused(reason);
        self.fails(reason, host, token);
        let counted = self.control.refused(reason) - before;
        assert_eq!(counted, 1.0, "{reason} at control");
        self.audited(reason);
    }

    /// Joins a new host with `token`, which its own agent must refuse for `reason`: control is not asked.
    #[track_caller]
    fn refuses_unasked(&self, reason: &str, host: &str, token: &str) {
        let all = || {
            self.control
                .metrics()
                .sum("mesh_control_refused_total", &[])
        };
        let before = all();
        self.fails(reason, host, token);
        assert_eq!(all(), before, "control was asked with it");
    }

    #[track_caller]
    fn fails(&self, reason: &str, host: &str, token: &str) {
        let agent = Agent::new(&self.site.host(host));
        let output = agent.join(token);
        assert!(!output.status.success(), "{reason}: {output}");
        assert!(output.stderr.contains(reason), "{reason}: {output}");
        let hosts = self.control.get("hosts");
        assert!(
            hosts.iter().all(|h| h["metadata"]["name"] != host),
            "{reason}: {hosts:?}"
        );
    }

    /// Waits for an audit entry of this reason.
    #[track_caller]
    fn audited(&self, reason: &str) {
        wait_until(&format!("the audit entry of {reason}"), SOON, || {
            let entries = self.control.get("audit");
            let found = entries.iter().any(|entry| entry["reason"] == reason);
            check(found, format!("{entries:?}"))
        });
    }
}

#[test]
fn tokens_that_are_not_whole_or_not_ours_are_refused() {
    let joining = Joining::new("tokens_that_are_not_whole");
    let token = joining.control.token("--namespace shop");
    joining.refuses_unasked("token_malformed", "a", &token[..token.len() - 5]);
    let mut mistyped = token.clone().into_bytes();
    let middle = mistyped.len() / 2;
    mistyped[middle] = if mistyped[middle] == b'a' { b'b' } else { b'a' };
    joining.refuses_unasked(
        "token_malformed",
        "b",
        std::str::from_utf8(&mistyped).unwrap(),
    );
    // Well-formed, with a secret that somebody guessed.
    let mut guessed = mesh_api::token::JoinToken::parse(&token).unwrap();
    guessed.secret = [7; 32];
    joining.refuses("token_unknown", "c", &guessed.reveal());
    // A token of another mesh, of the same trust domain: the agent does not believe this control.
    let elsewhere = Joining::new("tokens_of_another_mesh");
    let address = joining.control.address();
    let foreign = format!("--namespace shop --address {address}");
    let foreign = elsewhere.control.token(&foreign);
    let before = joining.control.refused("peer_handshake");
    joining.fails("untrusted_issuer", "d", &foreign);
    wait_until("control to be hung up on", SOON, || {
        let counted = joining.control.refused("peer_handshake") - before;
        check(counted == 1.0, format!("{counted}"))
    });
    // And this control does not know it, were it believed.
    let mut believed = mesh_api::token::JoinToken::parse(&foreign).unwrap();
    believed.pins = mesh_api::token::JoinToken::parse(&token).unwrap().pins;
    joining.refuses("token_unknown", "f", &believed.reveal());
    // The token itself is still good.
    Agent::new(&joining.site.host("e")).join(&token).ok();
}

#[test]
fn tokens_that_are_used_revoked_or_expired_are_refused() {
    let joining = Joining::new("tokens_that_are_used_revoked_or_expired");
    let control = &joining.control;
    let once = control.token("--namespace shop");
    Agent::new(&joining.site.host("first")).join(&once).ok();
    joining.refuses("token_used", "second", &once);
    let revoked = control.token("--namespace shop --uses 5");
    let id = mesh_api::token::JoinToken::parse(&revoked).unwrap().id;
    control.meshctl(&format!("token revoke {id}")).ok();
    joining.refuses("token_revoked", "third", &revoked);
    let short = control.token("--namespace shop --expires 1s");
    let id = mesh_api::token::JoinToken::parse(&short).unwrap().id;
    wait_until("the token to expire", SOON, || {
        let list = control.meshctl("token list").ok();
        let line = list
            .lines()
            .find(|line| line.contains(&id))
            .unwrap_or_default();
        check(line.contains("expired"), list.clone())
    });
    joining.refuses("token_expired", "fourth", &short);
}

#[test]
fn a_token_is_good_for_its_scope_only() {
    let joining = Joining::new("a_token_is_good_for_its_scope_only");
    let control = &joining.control;
    let options = "--identity shop/web --service shop/web --network blue";
    let agent = Agent::new(&joining.site.host("a"));
    let before = control.refused("out_of_scope");
    let elsewhere = agent.command(&format!("join {} --network red", control.token(options)));
    assert!(
        !elsewhere.status.success() && elsewhere.stderr.contains("out_of_scope"),
        "{elsewhere}"
    );
    assert_eq!(control.refused("out_of_scope") - before, 1.0);
    joining.audited("out_of_scope");
    let agent = control.join(&joining.site.host("b"), &TokenOptions(options.to_owned()));
    let _web = servers::nginx(&agent.host, "web", 80, "");
    let _db = servers::nginx(&agent.host, "db", 81, "");
    agent.serve("web", &owner("web"), &[(80, "http")]);
    agent.serve("db", &owner("db"), &[(81, "http")]);
    control.wait_endpoints("shop/web", 1);
    wait_until(
        "the problem to be told on the host and at control",
        SOON,
        || {
            let status = agent.command("status").ok();
            check(status.contains("out_of_scope"), status)?;
            let hosts = control.get("hosts");
            check(
                format!("{hosts:?}").contains("out_of_scope"),
                format!("{hosts:?}"),
            )
        },
    );
    let services = control.get("services");
    assert!(
        services.iter().all(|s| s["metadata"]["name"] != "db"),
        "{services:?}"
    );
    // It is the token that says so: the same files are listed of a host with a wide one.
    let wide = TokenOptions("--namespace shop --network blue".to_owned());
    let wide = control.join(&joining.site.host("wide"), &wide);
    let _wide_web = servers::nginx(&wide.host, "web", 80, "");
    let _wide_db = servers::nginx(&wide.host, "db", 81, "");
    wide.serve("web", &owner("web"), &[(80, "http")]);
    wide.serve("db", &owner("db"), &[(81, "http")]);
    control.wait_endpoints("shop/db", 1);
    control.wait_endpoints("shop/web", 2);
    let status = wide.command("status").ok();
    assert!(!status.contains("out_of_scope"), "{status}");
}

#[test]
fn guessing_is_slowed_down() {
    let joining = Joining::new("guessing_is_slowed_down");
    let mut guess =
        mesh_api::token::JoinToken::parse(&joining.control.token("--namespace shop")).unwrap();
    let agent = Agent::new(&joining.site.host("a"));
    wait_until("guesses to be refused unseen", SOON, || {
        guess.secret[0] = guess.secret[0].wrapping_add(1);
        let output = agent.join(&guess.reveal());
        check(output.stderr.contains("rate_limited"), output.to_string())
    });
    assert!(0.0 < joining.control.refused("rate_limited"));
}
