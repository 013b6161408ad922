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
    let mut warnings = |text: &str| {
        let command = Command::Apply {
            resources: resource::parse_all(text).unwrap(),
            dry_run: false,
        };
        match w.run(&command).unwrap() {
            Outcome::Applied(applied) => applied.into_iter().map(|one| one.warnings).collect(),
            other => panic!("{other:?}"),
        }
    };
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
