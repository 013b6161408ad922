//! What a session still has to tell its agent. Nothing is queued: the outbox holds what was sent last and makes
//! the next message from the newest catalogue when the transport has room, so that a slow agent gets coalesced
//! state.

use std::collections::BTreeMap;
use std::sync::Arc;

use mesh_api::proto;
use mesh_api::sync::{REVOCATIONS_PART, revocations_to_wire};
use mesh_core::names::{HostUid, ServiceName};
use mesh_core::revocation::Revocation;
use mesh_core::service::{Endpoint, Health, Port};

use crate::catalogue::listing::Problem;
use crate::catalogue::objects::{Host, Policy, Revoked, Service};
use crate::catalogue::{Catalogue, IndexChange, Turn};

#[derive(Debug)]
pub(super) struct Outbox {
    uid: HostUid,
    welcome: Option<proto::Welcome>,
    revocations: Told,
    bundle: Option<proto::TrustBundle>,
    beat: Option<proto::Beat>,
    /// The revision of the index that the agent has, of this epoch.
    index: Option<u64>,
    policies: Option<Vec<Arc<Policy>>>,
    /// Revisions of policies and host for which `policies` was compared last.
    policies_seen: Option<(u64, u64)>,
    report: Option<Reported>,
    subscriptions: BTreeMap<ServiceName, Sent>,
    /// Endpoints up to this revision are sent, unless subscriptions changed.
    endpoints: Option<u64>,
}

/// The last report and what the agent was told of it.
#[derive(Debug)]
struct Reported {
    generation: u64,
    /// What could not even be read.
    unread: Vec<proto::Problem>,
    /// Revisions of index, host and revocations for which `told` was compared last.
    seen: Option<(u64, u64, u64)>,
    told: Option<Vec<proto::Problem>>,
}

/// What was sent of a subscribed service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sent {
    Nothing,
    /// Revision of its endpoints; 0 when it had none.
    Revision(u64),
}

/// How far an agent was told of revocations.
#[derive(Debug)]
struct Told {
    /// It has nothing of this epoch: it is told all, and once that is whole it says what it knows beside.
    snapshot: bool,
    /// A whole revision that it has.
    revision: Option<u64>,
    /// All before it is sent.
    turn: Turn,
}

/// What an agent says that it has, where that is of this epoch.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Have {
    pub index: Option<u64>,
    pub revocations: Option<u64>,
}

impl Outbox {
    /// The outbox of a session whose agent stands at `have`.
    pub(super) fn new(
        uid: HostUid,
        have: Have,
        welcome: proto::Welcome,
        bundle: proto::TrustBundle,
    ) -> Self {
        Self {
            uid,
            welcome: Some(welcome),
            revocations: Told {
                snapshot: have.revocations.is_none(),
                revision: have.revocations,
                turn: (have.revocations.map_or(0, |have| have + 1), None),
            },
            bundle: Some(bundle),
            beat: None,
            index: have.index,
            policies: None,
            policies_seen: None,
            report: None,
            subscriptions: BTreeMap::new(),
            endpoints: None,
        }
    }

    /// A beat is to be answered; an older one that was not is skipped.
    pub(super) fn beat(&mut self, sequence: u64, time_ms: u64) {
        self.beat = Some(proto::Beat { sequence, time_ms });
    }

    pub(super) fn reported(&mut self, generation: u64, unread: Vec<proto::Problem>) {
        self.report = Some(Reported {
            generation,
            unread,
            seen: None,
            told: None,
        });
    }

    /// The whole set of services whose endpoints are wanted.
    pub(super) fn subscribe(&mut self, wanted: impl IntoIterator<Item = ServiceName>) {
        let mut old = std::mem::take(&mut self.subscriptions);
        let kept = wanted.into_iter().map(|name| {
            let sent = old.remove(&name).unwrap_or(Sent::Nothing);
            (name, sent)
        });
        self.subscriptions = kept.collect();
        self.endpoints = None;
    }

    /// The next message; `None` when the agent knows all that `now` has for it.
    pub(super) fn next(
        &mut self,
        now: &Catalogue,
        signed: impl Fn(&Revoked) -> Revocation,
    ) -> Option<proto::FromControl> {
        use proto::from_control::Message;
        let host = now.hosts.get(&self.uid)?;
        let welcome = self.welcome.take().map(Message::Welcome);
        // First what must no more be believed.
        let message = welcome
            .or_else(|| self.next_revocations(now, signed).map(Message::Revocations))
            .or_else(|| self.beat.take().map(Message::Beat))
            .or_else(|| self.bundle.take().map(Message::Bundle))
            .or_else(|| self.next_index(now).map(Message::Index))
            .or_else(|| self.next_policies(now, host).map(Message::Policies))
            .or_else(|| self.next_status(now, host).map(Message::ReportStatus))
            .or_else(|| self.next_endpoints(now).map(Message::Endpoints));
        message.map(|message| proto::FromControl {
            message: Some(message),
        })
    }

    fn next_revocations(
        &mut self,
        now: &Catalogue,
        signed: impl Fn(&Revoked) -> Revocation,
    ) -> Option<proto::Revocations> {
        let told = &mut self.revocations;
        let revision = now.revoked_revision();
        if told.revision.is_some_and(|told| revision <= told) {
            return None;
        }
        let after = told.turn.clone();
        let mut newer = now.revoked_after(&after).peekable();
        let part = newer.by_ref().take(REVOCATIONS_PART);
        let (turns, revoked): (Vec<_>, Vec<_>) = part.unzip();
        let more = newer.peek().is_some();
        if let Some(last) = turns.last() {
            told.turn = Turn::clone(last);
        }
        told.revision = (!more).then_some(revision);
        let revoked: Vec<Revocation> = revoked.iter().map(|one| signed(one)).collect();
        let (revoked, issuers) = revocations_to_wire(&revoked);
        let update = proto::Revocations {
            revision,
            snapshot: told.snapshot,
            more,
            revoked,
            issuers,
        };
        told.snapshot &= more;
        Some(update)
    }

    fn next_index(&mut self, now: &Catalogue) -> Option<proto::IndexUpdate> {
        if self.index == Some(now.index_revision) {
            return None;
        }
        let change = now.index_since(self.index);
        let have = self.index.replace(now.index_revision);
        let (snapshot, services, removed) = match change {
            IndexChange::Snapshot(all) => (true, all, Vec::new()),
            IndexChange::Delta { changed, removed } => (false, changed, removed),
        };
        log::trace!(host = self.uid.as_str(), snapshot; "index from {have:?}");
        Some(proto::IndexUpdate {
            revision: now.index_revision,
            snapshot,
            services: services.iter().map(|s| index_service(s)).collect(),
            removed: removed.iter().map(service_ref).collect(),
        })
    }

    fn next_policies(&mut self, now: &Catalogue, host: &Host) -> Option<proto::PolicyUpdate> {
        let seen = Some((now.policies_revision, host.revision));
        if std::mem::replace(&mut self.policies_seen, seen) == seen {
            return None;
        }
        let concerned = now.policies_of(host);
        if let Some(sent) = &self.policies
            && sent.len() == concerned.len()
            && sent.iter().zip(&concerned).all(|(a, b)| Arc::ptr_eq(a, b))
        {
            return None;
        }
        let texts = concerned.iter().map(|policy| {
            // Our own resources always are JSON.
            serde_json::to_string(&policy.object).unwrap_or_default()
        });
        let update = proto::PolicyUpdate {
            revision: now.revision,
            policies: texts.collect(),
        };
        self.policies = Some(concerned.into_iter().cloned().collect());
        Some(update)
    }

    fn next_status(&mut self, now: &Catalogue, host: &Host) -> Option<proto::ReportStatus> {
        let reported = self.report.as_mut()?;
        let seen = Some((now.index_revision, host.revision, now.revoked_revision()));
        if std::mem::replace(&mut reported.seen, seen) == seen {
            return None;
        }
        let found = now.problems_of(host);
        let problems: Vec<_> = reported
            .unread
            .iter()
            .cloned()
            .chain(found.into_iter().map(problem))
            .collect();
        if reported.told.as_ref() == Some(&problems) {
            return None;
        }
        reported.told = Some(problems.clone());
        Some(proto::ReportStatus {
            generation: reported.generation,
            problems,
        })
    }

    fn next_endpoints(&mut self, now: &Catalogue) -> Option<proto::EndpointsUpdate> {
        if self.endpoints == Some(now.endpoints_revision) {
            return None;
        }
        let newer = self.subscriptions.iter_mut().find_map(|(name, sent)| {
            let endpoints = now.endpoints_of(name);
            let revision = Sent::Revision(endpoints.map_or(0, |e| e.revision));
            (*sent != revision).then(|| {
                *sent = revision;
                (name, endpoints)
            })
        });
        let Some((name, endpoints)) = newer else {
            self.endpoints = Some(now.endpoints_revision);
            return None;
        };
        let list = endpoints.map_or(&[][..], |e| &e.list);
        Some(proto::EndpointsUpdate {
            service: Some(service_ref(name)),
            revision: endpoints.map_or(now.revision, |e| e.revision),
            endpoints: list.iter().map(endpoint).collect(),
        })
    }
}

fn service_ref(name: &ServiceName) -> proto::ServiceRef {
    proto::ServiceRef {
        namespace: name.namespace.to_string(),
        name: name.name.to_string(),
    }
}

fn index_service(service: &Service) -> proto::IndexService {
    proto::IndexService {
        namespace: service.name.namespace.to_string(),
        name: service.name.name.to_string(),
        vip4: service.vip.v4.to_string(),
        vip6: service.vip.v6.to_string(),
        ports: service.ports.iter().map(reported_port).collect(),
        transport: service.transport.to_string(),
        plaintext_from: service
            .plaintext_from
            .iter()
            .map(ToString::to_string)
            .collect(),
        capture: service.capture.to_string(),
    }
}

fn reported_port(port: &Port) -> proto::ReportedPort {
    proto::ReportedPort {
        number: port.number.into(),
        protocol: port.protocol.to_string(),
    }
}

fn endpoint(endpoint: &Endpoint) -> proto::Endpoint {
    proto::Endpoint {
        network: endpoint.network.to_string(),
        address: endpoint.address.to_string(),
        mesh_port: endpoint.mesh_port.into(),
        namespace: endpoint.account.namespace.to_string(),
        account: endpoint.account.name.to_string(),
        host_uid: endpoint.host.to_string(),
        stale: endpoint.health == Health::Stale,
    }
}

fn problem(problem: Problem) -> proto::Problem {
    proto::Problem {
        namespace: problem.account.namespace.to_string(),
        account: problem.account.name.to_string(),
        service: problem
            .service
            .map_or_else(String::new, |s| s.name.to_string()),
        reason: problem.reason.to_wire().into(),
        message: problem.message,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalogue::command::{Command, State};
    use crate::catalogue::objects::{Digest, Scope, Settings};
    use proto::from_control::Message;

    fn apply(state: &mut State, name: &str, port: u16) {
        let text = format!(
            "{{apiVersion: v1, kind: Service, metadata: {{name: {name}, namespace: shop}}, spec: {{ports: [{{port: {port}}}]}}}}"
        );
        let command = Command::Apply {
            resources: mesh_api::resource::parse_all(&text).unwrap(),
            dry_run: false,
            plaintext: std::collections::BTreeSet::new(),
        };
        let revision = state.catalogue.revision + 1;
        state.apply(&command, revision, 1).unwrap();
    }

    fn world() -> (State, HostUid) {
        let settings = Settings {
            trust_domain: "corp.example.com".parse().unwrap(),
            dns_suffix: "mesh.internal".to_owned(),
            vip4_range: "252.64.0.0/12".to_owned(),
            vip6_range: "fd6d:6573:6800::/64".to_owned(),
            addresses: Vec::new(),
            bundle: 1,
        };
        let uid: HostUid = format!("{:032x}", 1).parse().unwrap();
        let host = Host {
            uid: uid.clone(),
            name: "vm-1".parse().unwrap(),
            network: "default".parse().unwrap(),
            address: "10.0.0.1".parse().unwrap(),
            mesh_port: 7441,
            version: String::new(),
            proven: true,
            doubted: false,
            key: Digest([0; 32]),
            token: "t-1".to_owned(),
            scope: Scope::default(),
            bundle: 0,
            live: true,
            since_s: 1,
            workloads: Vec::new(),
            created_s: 1,
            revision: 1,
        };
        let mut items = Catalogue::new(1, settings).items();
        items.push((
            crate::catalogue::items::host_key(&uid),
            crate::catalogue::items::encode(&host),
        ));
        let state = State::new(Catalogue::load(&items).unwrap()).unwrap();
        (state, uid)
    }

    fn drain(outbox: &mut Outbox, now: &Catalogue) -> Vec<Message> {
        let signed = |revoked: &Revoked| Revocation {
            subject: revoked.subject(),
            at_s: revoked.at_s,
            signature: Arc::default(),
            issuer: Arc::default(),
        };
        let all = std::iter::from_fn(|| outbox.next(now, signed));
        all.filter_map(|m| m.message).collect()
    }

    #[test]
    fn a_slow_agent_gets_the_last_state_once() {
        let (mut state, uid) = world();
        let welcome = proto::Welcome::default();
        let bundle = proto::TrustBundle::default();
        let mut outbox = Outbox::new(uid, Have::default(), welcome, bundle);
        let first = drain(&mut outbox, &state.catalogue);
        assert!(matches!(
            first.as_slice(),
            [
                Message::Welcome(_),
                Message::Revocations(proto::Revocations { snapshot: true, .. }),
                Message::Bundle(_),
                Message::Index(proto::IndexUpdate { snapshot: true, .. }),
                Message::Policies(_)
            ]
        ));
        assert_eq!(drain(&mut outbox, &state.catalogue), []);
        // A hundred changes while the transport has no room, and as many beats.
        for n in 0..100 {
            apply(&mut state, "web", 80 + n);
            outbox.beat(n.into(), 1);
        }
        outbox.subscribe([ServiceName::parse("shop/web").unwrap()]);
        let later = drain(&mut outbox, &state.catalogue);
        let [
            Message::Beat(beat),
            Message::Index(index),
            Message::Endpoints(none),
        ] = later.as_slice()
        else {
            panic!("{later:?}")
        };
        assert_eq!(beat.sequence, 99);
        assert!(!index.snapshot && index.services.len() == 1);
        assert_eq!(index.services[0].ports[0].number, 179);
        assert!(none.endpoints.is_empty(), "it is said that there is none");
        outbox.subscribe([ServiceName::parse("shop/web").unwrap()]);
        assert_eq!(drain(&mut outbox, &state.catalogue), []);
    }
}
