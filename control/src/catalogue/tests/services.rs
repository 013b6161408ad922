//! Whose a service is, and what others may change of it.

use super::*;

#[test]
fn ports_are_the_owners_and_pass_on_when_it_is_gone() {
    let mut w = World::new();
    let (a, b) = (w.host("a"), w.host("b"));
    w.report(&a, &[("shop/web", 80)]);
    w.report(&b, &[("shop/web", 81)]);
    w.report(&a, &[("shop/web", 81)]);
    assert_eq!(
        w.endpoints("shop/web").len(),
        2,
        "the owner changed its mind"
    );
    w.report(&a, &[]);
    w.report(&b, &[("shop/web", 82)]);
    assert_eq!(w.service("shop/web").source, Source::Host(b.clone()));
    assert_eq!(w.endpoints("shop/web").len(), 1);
    w.report(&b, &[]);
    assert!(
        w.state.catalogue.services.contains_key(&name("shop/web")),
        "a service that nobody serves keeps its name and address"
    );
}

/// Those who wait for the ports need not say theirs again: what they said stands.
#[test]
fn a_service_passes_on_to_who_waits_when_its_owner_goes() {
    let serving = |w: &World| match &w.service("shop/web").source {
        Source::Host(uid) => (uid.clone(), w.service("shop/web").ports[0].number),
        Source::Operator => panic!("it is a host's"),
    };
    for revoked in [false, true] {
        let mut w = World::new();
        let [a, b, c] = ["a", "b", "c"].map(|name| w.host(name));
        w.report(&a, &[("shop/web", 80)]);
        w.report(&b, &[("shop/web", 81)]);
        w.report(&c, &[("shop/web", 80)]);
        assert_eq!(w.endpoints("shop/web").len(), 2);
        assert_eq!(w.problems(&b), [Reason::ServiceConflict]);
        // To one that has its ports, so that nobody who is listed is not any more.
        let name = "a".parse().unwrap();
        w.run(&Command::RemoveHost { name }).unwrap();
        assert_eq!(serving(&w), (c.clone(), 80));
        if revoked {
            let account = Account::parse("shop/web").unwrap();
            let host = "c".parse().unwrap();
            w.run(&Command::RevokeWorkload { account, host }).unwrap();
        } else {
            w.report(&c, &[]);
        }
        assert_eq!(serving(&w), (b.clone(), 81));
        assert_eq!(w.endpoints("shop/web").len(), 1);
        assert_eq!(w.problems(&b), []);
    }
}

#[test]
fn of_a_hosts_service_only_the_transport_is_the_operators() {
    let mut w = World::new();
    let a = w.host("a");
    w.report(&a, &[("shop/web", 80)]);
    assert_eq!(w.apply(STRICT).unwrap(), [Action::Configured]);
    assert_eq!(w.service("shop/web").transport, Transport::Strict);
    w.report(&a, &[("shop/web", 81)]);
    assert_eq!(w.service("shop/web").transport, Transport::Strict);
    let refusal = w.apply(STRICT).unwrap_err();
    assert_eq!(refusal.reason, Reason::Conflict);
    assert!(refusal.message.contains("host/a"), "{refusal}");
    assert_eq!(refused(w.delete("shop/web")), Reason::Conflict);
    w.lease(&a, false);
    w.delete("shop/web").unwrap();
    assert_eq!(w.endpoints("shop/web"), []);
}

#[test]
fn the_operators_service_stays_as_it_says() {
    let mut w = World::new();
    let two = format!("{STRICT}---{}", STRICT.replace("name: web", "name: other"));
    assert_eq!(w.apply(&two).unwrap(), [Action::Created, Action::Created]);
    assert_eq!(w.apply(STRICT).unwrap(), [Action::Unchanged]);
    let a = w.host("a");
    w.report(&a, &[("shop/web", 81)]);
    assert_eq!(w.problems(&a), [Reason::ServiceConflict]);
    w.report(&a, &[("shop/web", 80)]);
    assert_eq!(w.endpoints("shop/web").len(), 1);
    w.delete("shop/web").unwrap();
    assert_eq!(w.service("shop/web").source, Source::Host(a));
    assert_eq!(refused(w.delete("shop/none")), Reason::NotFound);
}

#[test]
fn apply_is_all_or_nothing_and_a_dry_run_is_nothing() {
    let mut w = World::new();
    let a = w.host("a");
    w.report(&a, &[("shop/web", 81)]);
    let before = w.state.catalogue.items();
    let both = format!("{}---{STRICT}", STRICT.replace("name: web", "name: new"));
    assert_eq!(refused(w.apply(&both)), Reason::Conflict);
    let dry = Command::Apply {
        resources: resource::parse_all(&STRICT.replace("name: web", "name: dry")).unwrap(),
        dry_run: true,
        plaintext: BTreeSet::new(),
    };
    w.run(&dry).unwrap();
    assert_eq!(w.state.catalogue.items(), before);
    // No address was used up by either.
    w.apply(&STRICT.replace("name: web", "name: next")).unwrap();
    assert_eq!(w.service("shop/next").vip.v4.octets()[3], 3);
}

#[test]
fn an_address_comes_back_to_its_service() {
    let mut w = World::new();
    w.apply(STRICT).unwrap();
    let vip = w.service("shop/web").vip;
    w.delete("shop/web").unwrap();
    w.apply(&STRICT.replace("name: web", "name: other"))
        .unwrap();
    assert_ne!(w.service("shop/other").vip, vip);
    w.state = State::new(Catalogue::load(&w.state.catalogue.items()).unwrap()).unwrap();
    w.apply(STRICT).unwrap();
    assert_eq!(w.service("shop/web").vip, vip);
}

#[test]
fn used_up_addresses_are_said() {
    let mut w = World::new();
    let mut settings = Settings::clone(&w.state.catalogue.settings);
    settings.vip4_range = "252.64.0.0/30".to_owned();
    w.state = State::new(Catalogue::new(7, settings)).unwrap();
    w.apply(STRICT).unwrap();
    let other = STRICT.replace("name: web", "name: other");
    assert_eq!(refused(w.apply(&other)), Reason::VipExhausted);
    let a = w.host("a");
    w.report(&a, &[("shop/third", 80)]);
    assert_eq!(w.problems(&a), [Reason::VipExhausted]);
}

#[test]
fn what_has_no_effect_is_said() {
    let mut w = World::new();
    let yaml = "apiVersion: meshwork.io/v1alpha1\nkind: Policy\nmetadata: {name: p, namespace: shop}\n\
                spec: {service: web, rules: [{name: lan, from: [{cidr: 10.0.0.0/8}]}]}\n";
    let excepted = "apiVersion: v1\nkind: Service\nmetadata: {name: web, namespace: shop, annotations: \
                  {meshwork.io/plaintext-from: 10.0.0.0/8}}\nspec: {ports: [{port: 80}]}\n";
    let mut warnings = |text: &str| warned(&mut w, text, &[]);
    let policy: Vec<Vec<String>> = warnings(yaml);
    assert_eq!(policy[0].len(), 1, "{policy:?}");
    assert!(
        policy[0][0].contains("no service matches yet"),
        "{policy:?}"
    );
    let both: Vec<Vec<String>> = warnings(&format!("{yaml}---\n{excepted}"));
    assert!(both[0].is_empty(), "its service stands behind it: {both:?}");
    assert!(both[1][0].contains("plaintext-from"), "{both:?}");
    let strict = excepted.replace("{mesh", "{meshwork.io/transport: strict, mesh");
    assert!(warnings(&strict)[0].is_empty());
    assert_eq!(warnings::of_no_rule(&w.state.catalogue), None);
    let key = (Some("shop".parse().unwrap()), "p".parse().unwrap());
    w.run(&Command::DeletePolicy { key }).unwrap();
    assert!(warnings::of_no_rule(&w.state.catalogue).is_some());
}

#[test]
fn a_rule_that_matches_nobody_is_said() {
    let mut w = World::new();
    let a = w.host("a");
    w.report(&a, &[("shop/web", 80)]);
    let policy = |ports: &str, host: &str| {
        format!(
            "apiVersion: meshwork.io/v1alpha1\nkind: Policy\nmetadata: {{name: p, namespace: shop}}\n\
             spec: {{service: web, rules: [{{name: r, from: [{{host: '{host}'}}], ports: {ports}}}]}}\n"
        )
    };
    assert_eq!(warned(&mut w, &policy("[80]", "a"), &[]), [[""; 0]]);
    assert_eq!(warned(&mut w, &policy("[]", "*"), &[]), [[""; 0]]);
    let wrong = &warned(&mut w, &policy("[80, 81]", "b*"), &[])[0];
    assert_eq!(wrong.len(), 2, "{wrong:?}");
    assert!(wrong[0].starts_with("rule r names port 81, "), "{wrong:?}");
    assert!(wrong[1].contains("no such host"), "{wrong:?}");
    // Where there is no service nothing is said of its ports.
    let early = policy("[81]", "a").replace("service: web", "service: later");
    let early = &warned(&mut w, &early, &[])[0];
    assert!(
        early.len() == 1 && early[0].contains("no service matches yet"),
        "{early:?}"
    );
}

#[test]
fn plaintext_callers_that_a_change_cuts_off_are_said() {
    let mut w = World::new();
    let a = w.host("a");
    w.report(&a, &[("shop/web", 80), ("shop/db", 5432)]);
    let policy = |spec: &str| {
        format!(
            "apiVersion: meshwork.io/v1alpha1\nkind: Policy\nmetadata: {{name: p, namespace: shop}}\nspec: {{{spec}}}\n"
        )
    };
    let seen = [
        ("shop/web", 80, "10.0.0.5"),
        ("shop/web", 80, "10.0.0.6"),
        ("shop/web", 80, "10.9.0.7"),
        ("shop/db", 5432, "10.0.0.5"),
    ];
    let everyone = "apiVersion: meshwork.io/v1alpha1\nkind: Policy\nmetadata: {name: everyone}\n\
                    spec: {rules: [{name: all, from: [{cidr: 0.0.0.0/0}]}]}\n";
    assert_eq!(warned(&mut w, everyone, &seen), [[""; 0]]);
    let front = "service: web, rules: [{name: front, from: [{identity: shop/front}]}]";
    // What only counts cuts nobody off.
    let audit = format!("enforce: audit, {front}");
    assert_eq!(warned(&mut w, &policy(&audit), &seen), [[""; 0]]);
    let cut = &warned(&mut w, &policy(front), &seen)[0];
    assert!(
        cut.len() == 1 && cut[0].starts_with("3 plaintext caller(s) that were seen are no longer let in: 10.0.0.5 of shop/web port 80"),
        "{cut:?}"
    );
    assert_eq!(
        warned(&mut w, &policy(front), &seen),
        [[""; 0]],
        "they were cut off before"
    );
    w.run(&Command::DeletePolicy {
        key: (Some("shop".parse().unwrap()), "p".parse().unwrap()),
    })
    .unwrap();
    let kept = "service: web, rules: [{name: lan, from: [{cidr: 10.0.0.0/16}]}]";
    let cut = &warned(&mut w, &policy(kept), &seen)[0];
    assert!(
        cut[0].contains("1 plaintext caller(s)") && cut[0].contains("10.9.0.7"),
        "{cut:?}"
    );
    let strict = STRICT
        .replace("name: web", "name: db")
        .replace("port: 80", "port: 5432");
    let cut = warned(&mut w, &strict, &seen);
    assert!(
        cut[0][0].contains("10.0.0.5 of shop/db port 5432"),
        "{cut:?}"
    );
}

/// Applies, and says of each resource what is warned of.
fn warned(w: &mut World, yaml: &str, seen: &[(&str, u16, &str)]) -> Vec<Vec<String>> {
    let seen = seen.iter();
    let command = Command::Apply {
        resources: resource::parse_all(yaml).unwrap(),
        dry_run: false,
        plaintext: seen
            .map(|(service, port, address)| (name(service), *port, address.parse().unwrap()))
            .collect(),
    };
    match w.run(&command).unwrap() {
        Outcome::Applied(applied) => applied.into_iter().map(|one| one.warnings).collect(),
        other => panic!("{other:?}"),
    }
}
