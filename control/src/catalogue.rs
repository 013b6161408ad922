//! All that control knows, as immutable maps: who holds one sees one moment of it. Only the writer makes a
//! next one, through [`command`], from a [`draft::Draft`].
//!
//! Invariant: what is derived here (who serves what, endpoints, the ring of changes) is a function of the
//! stored objects; a restart shows the same.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use imbl::{OrdMap, OrdSet, Vector};
use mesh_core::names::{Account, HostUid, Label, Network, ServiceName};
use mesh_core::revocation::Subject;
use mesh_core::service::{Endpoint, Pattern};

pub(crate) mod authz;
pub(crate) mod command;
pub(crate) mod draft;
pub(crate) mod host;
pub(crate) mod items;
pub(crate) mod listing;
pub(crate) mod objects;
pub(crate) mod policy;
pub(crate) mod service;
mod text;
pub(crate) mod token;
pub(crate) mod warnings;

use objects::{
    Digest, Host, Operator, Policy, PolicyKey, Revoked, Service, Settings, Token, Tombstone,
};

/// Changes of the index that are kept for resumes. An agent that missed more takes a snapshot, which is then
/// about as large.
pub(crate) const CHANGES_MAX: usize = 4096;
/// Most hosts: ten times the largest fleet that one control was sized for.
pub(crate) const HOSTS_MAX: usize = 20_000;
/// Most services: their index must fit one message of 4 MiB.
pub(crate) const SERVICES_MAX: usize = 20_000;
/// Most tokens, used and expired ones included.
pub(crate) const TOKENS_MAX: usize = 10_000;
/// Most policies.
pub(crate) const POLICIES_MAX: usize = 10_000;
/// Bytes of all policies as JSON: an agent may get all of them in one message of 4 MiB.
pub(crate) const POLICIES_BYTES_MAX: usize = 3 * 1024 * 1024;

/// One moment of the catalogue. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Catalogue {
    /// A restored store begins a new one: revisions of another epoch say nothing.
    pub epoch: u64,
    /// Of the last commit.
    pub revision: u64,
    pub settings: Arc<Settings>,
    pub hosts: OrdMap<HostUid, Arc<Host>>,
    pub revoked: OrdMap<Subject, Arc<Revoked>>,
    /// The same in the order in which they came about.
    revoked_in_turn: OrdMap<Turn, Arc<Revoked>>,
    pub tokens: OrdMap<String, Arc<Token>>,
    pub operators: OrdMap<Label, Arc<Operator>>,
    pub services: OrdMap<ServiceName, Arc<Service>>,
    pub tombstones: OrdMap<ServiceName, Arc<Tombstone>>,
    pub policies: OrdMap<PolicyKey, Arc<Policy>>,
    /// Of the last change of any policy.
    pub policies_revision: u64,
    /// Of the last change of any endpoint.
    pub endpoints_revision: u64,
    /// Of the last change of any service.
    pub index_revision: u64,
    host_names: OrdMap<Label, HostUid>,
    host_keys: OrdMap<Digest, HostUid>,
    addresses: OrdMap<(Network, IpAddr), HostUid>,
    servers: OrdMap<ServiceName, OrdSet<HostUid>>,
    endpoints: OrdMap<ServiceName, Arc<Endpoints>>,
    /// The last changes of the index, oldest first.
    changes: Vector<(u64, ServiceName)>,
    /// Changes up to here are not in the ring.
    changes_floor: u64,
}

/// The place of a revocation among all: its revision, then who. `None` is before all of its revision.
pub(crate) type Turn = (u64, Option<Subject>);

/// Where a service is served.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Endpoints {
    pub revision: u64,
    pub list: Vec<Endpoint>,
}

/// What an agent that stands at some revision of the index lacks.
#[derive(Clone, Debug)]
pub(crate) enum IndexChange {
    Snapshot(Vec<Arc<Service>>),
    Delta {
        changed: Vec<Arc<Service>>,
        removed: Vec<ServiceName>,
    },
}

/// A host with all that it was given.
pub(crate) fn whole(host: &HostUid) -> Subject {
    Subject {
        host: host.clone(),
        account: None,
    }
}

impl Catalogue {
    /// An empty one, as `init` begins.
    pub(crate) fn new(epoch: u64, settings: Settings) -> Self {
        Self {
            epoch,
            revision: 0,
            settings: Arc::new(settings),
            hosts: OrdMap::new(),
            revoked: OrdMap::new(),
            revoked_in_turn: OrdMap::new(),
            tokens: OrdMap::new(),
            operators: OrdMap::new(),
            services: OrdMap::new(),
            tombstones: OrdMap::new(),
            policies: OrdMap::new(),
            policies_revision: 0,
            endpoints_revision: 0,
            index_revision: 0,
            host_names: OrdMap::new(),
            host_keys: OrdMap::new(),
            addresses: OrdMap::new(),
            servers: OrdMap::new(),
            endpoints: OrdMap::new(),
            changes: Vector::new(),
            changes_floor: 0,
        }
    }

    pub(crate) fn host_by_name(&self, name: &Label) -> Option<&Arc<Host>> {
        self.hosts.get(self.host_names.get(name)?)
    }

    pub(crate) fn host_by_key(&self, key: &Digest) -> Option<&Arc<Host>> {
        self.hosts.get(self.host_keys.get(key)?)
    }

    pub(crate) fn host_at(&self, network: &Network, address: IpAddr) -> Option<&Arc<Host>> {
        let uid = self.addresses.get(&(network.clone(), address))?;
        self.hosts.get(uid)
    }

    /// The hosts that report a service, listed or not.
    pub(crate) fn servers_of(&self, service: &ServiceName) -> impl Iterator<Item = &Arc<Host>> {
        let uids = self.servers.get(service).into_iter().flatten();
        uids.filter_map(|uid| self.hosts.get(uid))
    }

    pub(crate) fn endpoints_of(&self, service: &ServiceName) -> Option<&Arc<Endpoints>> {
        self.endpoints.get(service)
    }

    pub(crate) fn endpoint_count(&self) -> usize {
        self.endpoints.values().map(|e| e.list.len()).sum()
    }

    /// A host's name for people; its uid once it is gone.
    pub(crate) fn host_label(&self, uid: &HostUid) -> String {
        match (self.hosts.get(uid), self.revoked.get(&whole(uid))) {
            (Some(host), _) => format!("host/{}", host.name),
            (None, Some(revoked)) => format!("host/{} (removed)", revoked.name),
            (None, None) => format!("host/{uid}"),
        }
    }

    /// Whether this identity was revoked on this host, alone or with it.
    pub(crate) fn is_revoked(&self, host: &HostUid, account: &Account) -> bool {
        let alone = Subject {
            host: host.clone(),
            account: Some(account.clone()),
        };
        self.revoked.contains_key(&alone) || self.revoked.contains_key(&whole(host))
    }

    /// What was revoked after `turn`, with its own.
    pub(crate) fn revoked_after(
        &self,
        turn: &Turn,
    ) -> impl Iterator<Item = (&Turn, &Arc<Revoked>)> {
        use std::ops::Bound::{Excluded, Unbounded};
        let after = (Excluded(turn.clone()), Unbounded);
        self.revoked_in_turn.range::<_, Turn>(after)
    }

    /// The hosts that were removed after `revision`.
    pub(crate) fn revoked_hosts_since(&self, revision: u64) -> impl Iterator<Item = &Arc<Revoked>> {
        let newer = self.revoked_in_turn.iter().rev();
        let newer = newer.take_while(move |((at, _), _)| revision < *at);
        newer
            .map(|(_, revoked)| revoked)
            .filter(|r| r.account.is_none())
    }

    /// Of the last revocation; 0 when there is none.
    pub(crate) fn revoked_revision(&self) -> u64 {
        let last = self.revoked_in_turn.get_max();
        last.map_or(0, |((revision, _), _)| *revision)
    }

    fn index_revoked(&mut self, revoked: &Arc<Revoked>) {
        let subject = revoked.subject();
        let turn = (revoked.revision, Some(subject.clone()));
        self.revoked_in_turn.insert(turn, Arc::clone(revoked));
        self.revoked.insert(subject, Arc::clone(revoked));
    }

    fn unindex_revoked(&mut self, revoked: &Revoked) {
        let subject = revoked.subject();
        self.revoked.remove(&subject);
        self.revoked_in_turn
            .remove(&(revoked.revision, Some(subject)));
    }

    /// What the index changed since `have` of this epoch; everything if the ring does not reach back so far.
    pub(crate) fn index_since(&self, have: Option<u64>) -> IndexChange {
        let known = have.filter(|r| self.changes_floor <= *r && *r <= self.index_revision);
        let Some(have) = known else {
            return IndexChange::Snapshot(self.services.values().cloned().collect());
        };
        let newer = self.changes.iter().rev().take_while(|(r, _)| have < *r);
        let names: BTreeSet<&ServiceName> = newer.map(|(_, name)| name).collect();
        let (mut changed, mut removed) = (Vec::new(), Vec::new());
        for name in names {
            match self.services.get(name) {
                Some(service) => changed.push(Arc::clone(service)),
                None => removed.push(name.clone()),
            }
        }
        IndexChange::Delta { changed, removed }
    }

    /// The policies that decide about what `host` serves or may come to serve: the mesh's, and those of its
    /// namespaces and services. The agent has them before it serves something new, so that there is no moment in
    /// which only a wider policy is known.
    pub(crate) fn policies_of(&self, host: &Host) -> Vec<&Arc<Policy>> {
        let served: BTreeSet<&ServiceName> = host.offers().map(|(_, o)| &o.service).collect();
        let concerns = |namespace: &Label, service: Option<&str>| {
            let is = |name: &Label| service.is_none_or(|service| service == name.as_str());
            let reported = |s: &&ServiceName| s.namespace == *namespace && is(&s.name);
            let allowed = |p: &Pattern| {
                let service = service.map(str::parse::<Label>);
                p.namespace.matches(namespace)
                    && service.is_none_or(|s| s.is_ok_and(|s| p.name.matches(&s)))
            };
            served.iter().any(reported) || host.scope.services.iter().any(allowed)
        };
        let all = self.policies.iter();
        all.filter(|((namespace, _), policy)| {
            let service = policy.object.spec.service.as_deref();
            namespace.as_ref().is_none_or(|ns| concerns(ns, service))
        })
        .map(|(_, policy)| policy)
        .collect()
    }

    /// Remembers that the index shows `name` anew, or no more.
    fn note_change(&mut self, revision: u64, name: ServiceName) {
        self.index_revision = self.index_revision.max(revision);
        self.changes.push_back((revision, name));
        while CHANGES_MAX < self.changes.len() {
            if let Some((dropped, _)) = self.changes.pop_front() {
                self.changes_floor = self.changes_floor.max(dropped);
            }
        }
    }

    fn index_host(&mut self, host: &Arc<Host>) {
        let uid = &host.uid;
        self.host_names.insert(host.name.clone(), uid.clone());
        self.host_keys.insert(host.key, uid.clone());
        let place = (host.network.clone(), host.address);
        self.addresses.insert(place, uid.clone());
        for (_, offer) in host.offers() {
            let servers = self.servers.entry(offer.service.clone()).or_default();
            servers.insert(uid.clone());
        }
        self.hosts.insert(uid.clone(), Arc::clone(host));
    }

    fn unindex_host(&mut self, host: &Host) {
        self.host_names.remove(&host.name);
        self.host_keys.remove(&host.key);
        self.addresses.remove(&(host.network.clone(), host.address));
        for (_, offer) in host.offers() {
            if let Some(servers) = self.servers.get_mut(&offer.service) {
                servers.remove(&host.uid);
                if servers.is_empty() {
                    self.servers.remove(&offer.service);
                }
            }
        }
        self.hosts.remove(&host.uid);
    }
}

#[cfg(test)]
mod tests;
