//! Revocation, restore, and what a host can not write.

use super::*;

#[test]
fn a_revoked_workload_is_not_listed_and_its_host_goes_on() {
    let mut w = World::new();
    let a = w.host("a");
    w.report(&a, &[("shop/web", 80)]);
    let revoke = |account: &str| Command::RevokeWorkload {
        account: Account::parse(account).unwrap(),
        host: "a".parse().unwrap(),
    };
    assert_eq!(refused(w.run(&revoke("data/db"))), Reason::NotFound);
    assert_eq!(w.endpoints("shop/web").len(), 1);
    w.run(&revoke("shop/web")).unwrap();
    assert_eq!(w.problems(&a), [Reason::IdentityRevoked]);
    assert!(w.endpoints("shop/web").is_empty());
    let first = w.state.catalogue.revoked_revision();
    w.now_s += 5;
    w.run(&revoke("shop/web")).unwrap();
    assert_eq!(
        w.state.catalogue.revoked_revision(),
        first,
        "the first stands"
    );
    // The host joins anew under another uid: nothing of it was revoked.
    w.run(&Command::RemoveHost {
        name: "a".parse().unwrap(),
    })
    .unwrap();
    let again = w.host("a");
    w.report(&again, &[("shop/web", 80)]);
    assert_eq!(w.endpoints("shop/web").len(), 1);
    // In the order in which they came about, and kept for as long as a leaf may live.
    let names = |w: &World| -> Vec<bool> {
        let all = w.state.catalogue.revoked_after(&(0, None));
        all.map(|(_, r)| r.account.is_some()).collect()
    };
    assert_eq!(names(&w), [true, false]);
    assert_eq!(
        w.state.catalogue.revoked_after(&(first + 1, None)).count(),
        1
    );
    w.now_s += mesh_core::revocation::KEPT_S;
    w.run(&revoke("shop/web")).unwrap();
    assert_eq!(names(&w), [false, true], "the oldest is over");
}

#[test]
fn a_stolen_token_takes_its_hosts_with_it() {
    let mut w = World::new();
    let token = w.token(|t| t.uses = 3);
    for name in ["a", "b"] {
        let join = w.join_of(&token, name);
        w.try_join(&join).unwrap();
    }
    let other = w.host("c");
    let revoke = Command::RevokeToken {
        id: token.clone(),
        hosts: true,
    };
    w.run(&revoke).unwrap();
    let now = &w.state.catalogue;
    assert_eq!(now.hosts.keys().collect::<Vec<_>>(), [&other]);
    assert!(now.tokens[&token].revoked && now.revoked.len() == 2);
    let late = w.join_of(&token, "d");
    assert_eq!(refused(w.try_join(&late)), Reason::TokenRevoked);
}

#[test]
fn an_older_state_keeps_what_the_newer_one_revoked() {
    let mut w = World::new();
    let (a, b) = (w.host("a"), w.host("b"));
    let unused = w.token(|_| {});
    let old = w.state.catalogue.clone();
    w.run(&Command::RemoveHost {
        name: "a".parse().unwrap(),
    })
    .unwrap();
    let late = w.host("late");
    w.run(&Command::RemoveHost {
        name: "late".parse().unwrap(),
    })
    .unwrap();
    let renewed = crate::restore::renew(old, &[w.state.catalogue.clone()], 8, w.now_s).unwrap();
    assert_eq!((renewed.revocations, renewed.tokens), (2, 1));
    let now = renewed.catalogue;
    assert_eq!(now.epoch, 8);
    assert_eq!(now.hosts.keys().collect::<Vec<_>>(), [&b]);
    for (uid, name) in [(&a, "a"), (&late, "late")] {
        assert_eq!(now.revoked[&whole(uid)].name, name);
    }
    assert!(now.tokens.contains_key(&unused));
    assert_eq!(Catalogue::load(&now.items()).unwrap().items(), now.items());
    // Another mesh's file says nothing about this one.
    let mut foreign = w.state.catalogue.clone();
    let mut settings = Settings::clone(&foreign.settings);
    settings.trust_domain = "evil.example.com".parse().unwrap();
    foreign.settings = Arc::new(settings);
    let renewed = crate::restore::renew(now, &[foreign], 9, w.now_s).unwrap();
    assert_eq!(renewed.revocations, 0);
}

#[test]
fn a_host_can_not_loosen_what_the_operator_made_strict() {
    let mut w = World::new();
    let a = w.host("a");
    w.report(&a, &[("shop/web", 80)]);
    w.apply(STRICT).unwrap();
    assert_eq!(w.service("shop/web").transport, Transport::Strict);
    // Says it again, takes it away and brings it back, and another host takes it over.
    w.report(&a, &[("shop/web", 80)]);
    w.report(&a, &[]);
    w.report(&a, &[("shop/web", 80)]);
    assert_eq!(w.service("shop/web").transport, Transport::Strict);
    let b = w.host("b");
    w.report(&a, &[]);
    w.report(&b, &[("shop/web", 81)]);
    assert_eq!(w.service("shop/web").source, Source::Host(b));
    assert_eq!(w.service("shop/web").transport, Transport::Strict);
}
