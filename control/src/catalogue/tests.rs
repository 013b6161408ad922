//! The catalogue's rules, each refusal by its reason.

use std::collections::BTreeSet;

use mesh_api::resource;
use mesh_core::names::Account;
use mesh_core::service::{Health, Pattern, Port, Protocol, Transport};

use super::command::{Action, Command, Join, NewToken, Outcome, State};
use super::objects::{Offer, Scope, Source, Workload};
use super::*;
use crate::refusal::Refusal;
use mesh_core::reason::Reason;

mod services;
mod trust;

const NOW: u64 = 1_800_000_000;

struct World {
    state: State,
    now_s: u64,
    hosts: u8,
}

impl World {
    fn new() -> Self {
        let settings = Settings {
            trust_domain: "corp.example.com".parse().unwrap(),
            dns_suffix: "mesh.internal".to_owned(),
            vip4_range: "252.64.0.0/12".to_owned(),
            vip6_range: "fd6d:6573:6800::/64".to_owned(),
            addresses: vec!["control:7440".to_owned()],
            bundle: 1,
        };
        Self {
            state: State::new(Catalogue::new(7, settings)).unwrap(),
            now_s: NOW,
            hosts: 0,
        }
    }

    fn run(&mut self, command: &Command) -> Result<Outcome, Refusal> {
        let revision = self.state.catalogue.revision + 1;
        let (outcome, ops) = self.state.apply(command, revision, self.now_s)?;
        let changed = self.state.catalogue.revision == revision;
        assert_eq!(changed, !ops.is_empty(), "a revision is a change");
        self.check();
        Ok(outcome)
    }

    /// The invariant: a restart shows the same.
    fn check(&self) {
        let now = &self.state.catalogue;
        let again = Catalogue::load(&now.items()).unwrap();
        assert_eq!(again.items(), now.items());
        assert_eq!(again.index_revision, now.index_revision);
        for name in now.services.keys() {
            let list = |c: &Catalogue| c.endpoints_of(name).map(|e| e.list.clone());
            assert_eq!(list(&again), list(now));
        }
        again.allocator().unwrap();
    }

    fn token(&mut self, change: impl FnOnce(&mut NewToken)) -> String {
        let mut new = NewToken {
            id: format!("t-{}", self.state.catalogue.tokens.len()),
            name: String::new(),
            secret: Digest::of(b"secret"),
            scope: Scope {
                identities: vec![Pattern::parse("shop/*").unwrap()],
                services: vec![Pattern::parse("shop/*").unwrap()],
                networks: vec![],
            },
            uses: 1,
            replace: false,
            expires_s: self.now_s + 3600,
        };
        change(&mut new);
        let id = new.id.clone();
        self.run(&Command::CreateToken(new)).unwrap();
        id
    }

    fn join_of(&mut self, token: &str, name: &str) -> Join {
        self.hosts += 1;
        Join {
            token: token.to_owned(),
            secret: Digest::of(b"secret"),
            key: Digest::of(&[self.hosts]),
            uid: format!("{:032x}", self.hosts).parse().unwrap(),
            host_name: name.parse().unwrap(),
            network: None,
            address: IpAddr::from([10, 0, 0, self.hosts]),
            mesh_port: 7441,
            version: "0.1.0".to_owned(),
        }
    }

    fn try_join(&mut self, join: &Join) -> Result<Arc<Host>, Refusal> {
        match self.run(&Command::Join(Box::new(join.clone())))? {
            Outcome::Joined(host) => Ok(host),
            other => panic!("{other:?}"),
        }
    }

    /// A host that is live and proven.
    fn host(&mut self, name: &str) -> HostUid {
        let token = self.token(|_| {});
        let join = self.join_of(&token, name);
        let host = self.try_join(&join).unwrap();
        let uid = host.uid.clone();
        self.lease(&uid, true);
        let (address, mesh_port) = (host.address, host.mesh_port);
        let proven = Command::Proven {
            uid: uid.clone(),
            address,
            mesh_port,
        };
        self.run(&proven).unwrap();
        uid
    }

    fn lease(&mut self, uid: &HostUid, live: bool) {
        let uid = uid.clone();
        self.run(&Command::Lease { uid, live }).unwrap();
    }

    fn report(&mut self, uid: &HostUid, offers: &[(&str, u16)]) {
        let offers = offers.iter().map(|(name, port)| offer(name, *port));
        let workload = Workload {
            account: Account::parse("shop/web").unwrap(),
            offers: offers.collect(),
        };
        let workloads = vec![workload];
        let uid = uid.clone();
        self.run(&Command::Report { uid, workloads }).unwrap();
    }

    fn apply(&mut self, yaml: &str) -> Result<Vec<Action>, Refusal> {
        let resources = resource::parse_all(yaml).map_err(|e| Refusal::invalid(e.to_string()))?;
        let command = Command::Apply {
            resources,
            dry_run: false,
            plaintext: BTreeSet::new(),
        };
        match self.run(&command)? {
            Outcome::Applied(applied) => Ok(applied.iter().map(|a| a.action).collect()),
            other => panic!("{other:?}"),
        }
    }

    fn delete(&mut self, service: &str) -> Result<Outcome, Refusal> {
        let name = name(service);
        self.run(&Command::DeleteService { name })
    }

    fn endpoints(&self, service: &str) -> Vec<Endpoint> {
        let endpoints = self.state.catalogue.endpoints_of(&name(service));
        endpoints.map_or_else(Vec::new, |e| e.list.clone())
    }

    fn problems(&self, uid: &HostUid) -> Vec<Reason> {
        let host = &self.state.catalogue.hosts[uid];
        let problems = self.state.catalogue.problems_of(host);
        problems.iter().map(|p| p.reason).collect()
    }

    fn service(&self, service: &str) -> &Service {
        &self.state.catalogue.services[&name(service)]
    }
}

fn name(text: &str) -> ServiceName {
    ServiceName::parse(text).unwrap()
}

fn offer(service: &str, port: u16) -> Offer {
    Offer {
        service: name(service),
        ports: vec![Port {
            number: port,
            protocol: Protocol::Auto,
        }],
        transport: Transport::Permissive,
        healthy: true,
        plaintext: Vec::new(),
    }
}

const STRICT: &str = "
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop, annotations: {meshwork.io/transport: strict}}
spec: {ports: [{port: 80, name: front}]}
";

fn refused<T: std::fmt::Debug>(result: Result<T, Refusal>) -> Reason {
    result.unwrap_err().reason
}

#[test]
fn a_join_is_refused_by_its_reason() {
    let mut w = World::new();
    let token = w.token(|_| {});
    let mut unknown = w.join_of("t-99", "a");
    assert_eq!(refused(w.try_join(&unknown)), Reason::TokenUnknown);
    unknown.token = token.clone();
    unknown.secret = Digest::of(b"guess");
    assert_eq!(refused(w.try_join(&unknown)), Reason::TokenUnknown);

    let mut network = w.join_of(&token, "a");
    network.network = Some("other".parse().unwrap());
    assert_eq!(refused(w.try_join(&network)), Reason::OutOfScope);

    let first = w.join_of(&token, "a");
    w.try_join(&first).unwrap();
    let second = w.join_of(&token, "b");
    assert_eq!(refused(w.try_join(&second)), Reason::TokenUsed);

    let many = w.token(|t| t.uses = 10);
    let taken = w.join_of(&many, "a");
    assert_eq!(refused(w.try_join(&taken)), Reason::HostNameTaken);
    let mut address = w.join_of(&many, "c");
    address.address = first.address;
    assert_eq!(refused(w.try_join(&address)), Reason::AddressTaken);
    address.address = "0.0.0.0".parse().unwrap();
    assert_eq!(refused(w.try_join(&address)), Reason::Invalid);
    let used = w.state.catalogue.tokens[&many].used;
    assert_eq!(used, 0, "a refused join uses nothing");

    w.now_s += 3600;
    let late = w.join_of(&many, "d");
    assert_eq!(refused(w.try_join(&late)), Reason::TokenExpired);
    w.now_s = NOW;
    let revoke = |id: &str| Command::RevokeToken {
        id: id.to_owned(),
        hosts: false,
    };
    w.run(&revoke(&many)).unwrap();
    assert_eq!(refused(w.try_join(&late)), Reason::TokenRevoked);
    assert_eq!(refused(w.run(&revoke("x"))), Reason::NotFound);
}

#[test]
fn a_join_whose_answer_was_lost_is_answered_again() {
    let mut w = World::new();
    let token = w.token(|_| {});
    let mut join = w.join_of(&token, "a");
    let host = w.try_join(&join).unwrap();
    // Another random uid, the token used up and even expired: the key decides.
    join.uid = format!("{:032x}", 99).parse().unwrap();
    w.now_s += 7200;
    assert_eq!(w.try_join(&join).unwrap().uid, host.uid);
    join.address = "10.0.0.77".parse().unwrap();
    let moved = w.try_join(&join).unwrap();
    assert_eq!(
        (moved.uid.clone(), moved.address),
        (host.uid.clone(), join.address)
    );
    assert_eq!(w.state.catalogue.hosts.len(), 1);
    assert_eq!(w.state.catalogue.tokens[&token].used, 1);
    join.host_name = "b".parse().unwrap();
    assert_eq!(refused(w.try_join(&join)), Reason::Invalid);

    // The old key with a new token keeps the host, and gets the new scope.
    join.host_name = "a".parse().unwrap();
    join.token = w.token(|t| t.scope.identities.clear());
    let again = w.try_join(&join).unwrap();
    assert_eq!(again.uid, host.uid);
    assert!(again.scope.identities.is_empty());
}

#[test]
fn replace_revokes_the_old_host_in_the_same_commit() {
    let mut w = World::new();
    let old = w.host("a");
    let replace = w.token(|t| t.replace = true);
    let mut join = w.join_of(&replace, "a");
    join.address = w.state.catalogue.hosts[&old].address;
    let new = w.try_join(&join).unwrap();
    let now = &w.state.catalogue;
    let old = whole(&old);
    assert!(!now.hosts.contains_key(&old.host) && now.revoked.contains_key(&old));
    assert_eq!(now.host_by_name(&new.name).unwrap().uid, new.uid);
    assert_eq!(now.revoked[&old].revision, now.hosts[&new.uid].revision);
}

#[test]
fn a_removed_host_does_not_come_back_with_its_old_token() {
    let mut w = World::new();
    let token = w.token(|t| t.uses = 2);
    let mut join = w.join_of(&token, "a");
    let host = w.try_join(&join).unwrap();
    let remove = Command::RemoveHost {
        name: "a".parse().unwrap(),
    };
    w.run(&remove).unwrap();
    assert_eq!(refused(w.try_join(&join)), Reason::HostRevoked);
    for command in [
        Command::Lease {
            uid: host.uid.clone(),
            live: true,
        },
        Command::Report {
            uid: host.uid.clone(),
            workloads: vec![],
        },
    ] {
        assert_eq!(refused(w.run(&command)), Reason::HostRevoked);
    }
    // A new token is an operator's word.
    join.token = w.token(|_| {});
    join.uid = format!("{:032x}", 98).parse().unwrap();
    assert_ne!(w.try_join(&join).unwrap().uid, host.uid);
}

#[test]
fn tokens_are_checked() {
    let mut w = World::new();
    let id = w.token(|_| {});
    let NewToken { scope, secret, .. } = {
        let token = &w.state.catalogue.tokens[&id];
        NewToken {
            id: String::new(),
            name: String::new(),
            secret: token.secret,
            scope: token.scope.clone(),
            uses: 0,
            replace: false,
            expires_s: 0,
        }
    };
    for (uses, expires_s) in [(0, NOW + 1), (1, NOW), (1, NOW + 366 * 24 * 3600)] {
        let new = NewToken {
            id: "bad".to_owned(),
            name: String::new(),
            secret,
            scope: scope.clone(),
            uses,
            replace: false,
            expires_s,
        };
        assert_eq!(refused(w.run(&Command::CreateToken(new))), Reason::Invalid);
    }
    w.now_s += 32 * 24 * 3600;
    w.token(|t| t.id = "new".to_owned());
    assert!(!w.state.catalogue.tokens.contains_key(&id), "old ones go");
}

#[test]
fn what_a_host_reports_is_listed_or_it_is_said_why_not() {
    let mut w = World::new();
    let a = w.host("a");
    w.report(&a, &[("shop/web", 80)]);
    let listed = w.endpoints("shop/web");
    assert_eq!(listed.len(), 1);
    assert_eq!(listed[0].host, a);
    assert_eq!(listed[0].account.to_string(), "shop/web");
    assert_eq!(w.problems(&a), []);
    assert_eq!(w.service("shop/web").source, Source::Host(a.clone()));

    let b = w.host("b");
    w.report(&b, &[("shop/web", 81)]);
    assert_eq!(w.problems(&b), [Reason::ServiceConflict]);
    assert_eq!(w.endpoints("shop/web").len(), 1);
    w.report(&b, &[("shop/web", 80), ("data/db", 5432)]);
    assert_eq!(w.problems(&b), [Reason::OutOfScope]);
    assert_eq!(w.endpoints("shop/web").len(), 2);
    assert!(!w.state.catalogue.services.contains_key(&name("data/db")));

    let account = Account::parse("data/db").unwrap();
    let workloads = vec![Workload {
        account,
        offers: vec![offer("shop/web", 80)],
    }];
    let uid = b.clone();
    w.run(&Command::Report { uid, workloads }).unwrap();
    assert_eq!(w.problems(&b), [Reason::OutOfScope]);
    assert_eq!(w.endpoints("shop/web").len(), 1);
}

#[test]
fn an_unhealthy_service_is_not_listed_and_a_silent_host_is_stale() {
    let mut w = World::new();
    let a = w.host("a");
    w.report(&a, &[("shop/web", 80)]);
    w.lease(&a, false);
    assert_eq!(w.endpoints("shop/web")[0].health, Health::Stale);
    w.lease(&a, true);
    assert_eq!(w.endpoints("shop/web")[0].health, Health::Healthy);
    let mut sick = offer("shop/web", 80);
    sick.healthy = false;
    let workloads = vec![Workload {
        account: Account::parse("shop/web").unwrap(),
        offers: vec![sick],
    }];
    let uid = a.clone();
    w.run(&Command::Report { uid, workloads }).unwrap();
    assert_eq!(w.endpoints("shop/web"), []);
    assert_eq!(w.problems(&a), [Reason::Unhealthy]);
}

#[test]
fn a_host_that_moved_is_not_listed_until_it_is_proven_again() {
    let mut w = World::new();
    let a = w.host("a");
    w.report(&a, &[("shop/web", 80)]);
    let hello = |address: &str| Command::Hello {
        uid: a.clone(),
        version: "0.1.0".to_owned(),
        address: Some(address.parse().unwrap()),
        mesh_port: None,
    };
    w.run(&hello("10.0.0.1")).unwrap();
    assert_eq!(w.endpoints("shop/web").len(), 1, "it did not move");
    w.run(&hello("10.0.0.50")).unwrap();
    assert_eq!(w.problems(&a), [], "it is about to be proven");
    let doubted = Command::Doubted {
        uid: a.clone(),
        address: "10.0.0.50".parse().unwrap(),
        mesh_port: 7441,
    };
    w.run(&doubted).unwrap();
    w.run(&doubted).unwrap();
    assert_eq!(w.problems(&a), [Reason::AddressUnproven]);
    let proven = |address: &str| Command::Proven {
        uid: a.clone(),
        address: address.parse().unwrap(),
        mesh_port: 7441,
    };
    w.run(&proven("10.0.0.1")).unwrap();
    assert_eq!(
        w.endpoints("shop/web"),
        [],
        "the proof was of the old place"
    );
    w.run(&proven("10.0.0.50")).unwrap();
    assert_eq!(w.endpoints("shop/web").len(), 1);
    let b = w.host("b");
    let taken = Command::Hello {
        uid: b,
        version: String::new(),
        address: Some("10.0.0.50".parse().unwrap()),
        mesh_port: None,
    };
    assert_eq!(refused(w.run(&taken)), Reason::AddressTaken);
}

#[test]
fn policies_reach_those_who_may_serve() {
    let mut w = World::new();
    let a = w.host("a");
    let policy = |name: &str, place: &str, service: &str| {
        format!(
            "{{apiVersion: meshwork.io/v1alpha1, kind: Policy, metadata: {{name: {name}{place}}}, spec: {{{service}rules: [{{name: r, from: [{{identity: '*/*'}}]}}]}}}}\n---\n"
        )
    };
    let all = [
        policy("everyone", "", ""),
        policy("shop", ", namespace: shop", ""),
        policy("web", ", namespace: shop", "service: web, "),
        policy("data", ", namespace: data", ""),
        policy("db", ", namespace: data", "service: db, "),
    ];
    assert_eq!(w.apply(&all.concat()).unwrap(), [Action::Created; 5]);
    assert_eq!(w.apply(&all[0]).unwrap(), [Action::Unchanged]);
    let names = |w: &World| -> Vec<String> {
        let host = &w.state.catalogue.hosts[&a];
        let policies = w.state.catalogue.policies_of(host);
        let names = policies.iter().map(|p| p.object.metadata.name.clone());
        names.collect()
    };
    assert_eq!(names(&w), ["everyone", "shop", "web"]);
    // What it reports out of its scope is not listed, but what decides about it is known.
    w.report(&a, &[("data/db", 5432)]);
    assert_eq!(names(&w), ["everyone", "data", "db", "shop", "web"]);
    let key = (Some("shop".parse().unwrap()), "web".parse().unwrap());
    let delete = Command::DeletePolicy { key };
    w.run(&delete).unwrap();
    assert_eq!(refused(w.run(&delete)), Reason::NotFound);
}

#[test]
fn the_ring_serves_resumes_and_a_snapshot_what_is_older() {
    let mut w = World::new();
    w.apply(STRICT).unwrap();
    let first = w.state.catalogue.index_revision;
    w.apply(&STRICT.replace("name: web", "name: b")).unwrap();
    w.delete("shop/web").unwrap();
    for state in [
        State::new(w.state.catalogue.clone()).unwrap(),
        State::new(Catalogue::load(&w.state.catalogue.items()).unwrap()).unwrap(),
    ] {
        let IndexChange::Delta { changed, removed } = state.catalogue.index_since(Some(first))
        else {
            panic!("the ring reaches back so far")
        };
        assert_eq!(changed.len(), 1);
        assert_eq!(changed[0].name, name("shop/b"));
        assert_eq!(removed, [name("shop/web")]);
    }
    let ahead = w.state.catalogue.index_revision + 1;
    for have in [None, Some(ahead)] {
        let change = w.state.catalogue.index_since(have);
        assert!(matches!(change, IndexChange::Snapshot(all) if all.len() == 1));
    }
    let mut now = w.state.catalogue.clone();
    for _ in 0..=CHANGES_MAX {
        let next = now.index_revision + 1;
        now.note_change(next, name("shop/b"));
    }
    assert_eq!(now.changes.len(), CHANGES_MAX);
    assert!(matches!(
        now.index_since(Some(first)),
        IndexChange::Snapshot(_)
    ));
}

#[test]
fn endpoints_have_the_revision_of_their_own_last_change() {
    let mut w = World::new();
    let a = w.host("a");
    w.report(&a, &[("shop/web", 80)]);
    let revision = |w: &World| {
        let endpoints = w.state.catalogue.endpoints_of(&name("shop/web"));
        endpoints.unwrap().revision
    };
    let first = revision(&w);
    w.report(&a, &[("shop/web", 80), ("shop/other", 81)]);
    assert_eq!(revision(&w), first);
    w.lease(&a, false);
    assert!(first < revision(&w));
    assert_eq!(w.state.catalogue.endpoints_revision, revision(&w));
}
