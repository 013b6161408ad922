//! The next moment of the catalogue while a command makes it, and what the store must write for it. A draft of
//! a refused command is dropped, and nothing happened.

use std::collections::BTreeSet;
use std::sync::{Arc, OnceLock};

use mesh_core::names::ServiceName;
use mesh_core::reason::Reason;
use mesh_core::revocation::{KEPT_S, Subject};
use mesh_core::service::Vip;
use mesh_core::vip::Allocator;
use serde::Serialize;

use super::objects::{Host, Joined, Policy, PolicyKey, Revoked, Service, Token, Tombstone};
use super::{Catalogue, items, service};

/// One write of a commit. Later ones on the same key win.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Op {
    Put(String, Vec<u8>),
    Remove(String),
}

#[derive(Debug)]
pub(crate) struct Draft<'a> {
    pub next: Catalogue,
    pub now_s: u64,
    /// The revision that the commit will have.
    pub revision: u64,
    vips: &'a mut Allocator,
    ops: Vec<Op>,
    /// Services whose endpoints may have changed.
    touched: BTreeSet<ServiceName>,
}

impl<'a> Draft<'a> {
    pub(crate) fn new(
        base: &Catalogue,
        revision: u64,
        vips: &'a mut Allocator,
        now_s: u64,
    ) -> Self {
        Self {
            next: base.clone(),
            now_s,
            revision,
            vips,
            ops: Vec::new(),
            touched: BTreeSet::new(),
        }
    }

    /// The finished catalogue and its writes; none if nothing changed.
    pub(crate) fn finish(mut self) -> (Catalogue, Vec<Op>) {
        for name in self.touched.clone() {
            service::pass_on(&mut self, &name);
        }
        if !self.ops.is_empty() {
            self.next.revision = self.revision;
        }
        for service in std::mem::take(&mut self.touched) {
            self.next.relist(&service, self.revision);
        }
        (self.next, self.ops)
    }

    pub(crate) fn put_host(&mut self, mut host: Host) {
        host.revision = self.revision;
        if let Some(old) = self.next.hosts.get(&host.uid).cloned() {
            self.touch(&old);
            self.next.unindex_host(&old);
        }
        self.touch(&host);
        let host = Arc::new(host);
        self.next.index_host(&host);
        self.put(items::host_key(&host.uid), &*host);
    }

    /// Revokes a host, which removes it, or one workload of it, since `at_s`. That stands for ever: where it stands
    /// already nothing happens.
    pub(crate) fn revoke(&mut self, subject: &Subject, at_s: u64) {
        self.revoke_as(&Revoked {
            uid: subject.host.clone(),
            account: subject.account.clone(),
            name: subject.host.to_string(),
            joined: None,
            at_s,
            revision: 0,
            signature: OnceLock::new(),
        });
    }

    /// The same, with what is known of the host where it is gone already.
    pub(crate) fn revoke_as(&mut self, known: &Revoked) {
        let subject = &known.subject();
        if self.next.revoked.contains_key(subject) {
            return;
        }
        self.forget_revoked();
        let uid = &subject.host;
        let host = self.next.hosts.get(uid).cloned();
        if let Some(host) = &host {
            self.touch(host);
            if subject.account.is_none() {
                self.next.unindex_host(host);
                self.ops.push(Op::Remove(items::host_key(uid)));
            }
        }
        let mut revoked = known.clone();
        revoked.revision = self.revision;
        if let Some(host) = host {
            revoked.name = host.name.to_string();
            revoked.joined = Some(Joined {
                key: host.key,
                token: host.token.clone(),
            });
        }
        let revoked = Arc::new(revoked);
        self.put(items::revoked_key(subject), &*revoked);
        self.next.index_revoked(&revoked);
    }

    /// What no living certificate needs any more goes.
    fn forget_revoked(&mut self) {
        let now_s = self.now_s;
        let over = |revoked: &&Arc<Revoked>| revoked.at_s.saturating_add(KEPT_S) < now_s;
        let over: Vec<_> = self.next.revoked.values().filter(over).cloned().collect();
        for revoked in over {
            self.next.unindex_revoked(&revoked);
            let key = items::revoked_key(&revoked.subject());
            self.ops.push(Op::Remove(key));
        }
    }

    fn touch(&mut self, host: &Host) {
        let served = host.offers().map(|(_, offer)| offer.service.clone());
        self.touched.extend(served);
    }

    pub(crate) fn put_token(&mut self, mut token: Token) {
        token.revision = self.revision;
        self.put(items::token_key(&token.id), &token);
        self.next.tokens.insert(token.id.clone(), Arc::new(token));
    }

    pub(crate) fn remove_token(&mut self, id: &str) {
        self.next.tokens.remove(id);
        self.ops.push(Op::Remove(items::token_key(id)));
    }

    /// The virtual addresses of a service; uses up tombstones.
    pub(crate) fn allot(&mut self, name: &ServiceName) -> Result<Vip, Reason> {
        let allotted = self.vips.allot(name, self.now_s)?;
        if let Some(owner) = allotted.used_up {
            // Who stands before this removal can no more be told of it by a delta.
            if let Some(tombstone) = self.next.tombstones.remove(&owner)
                && owner != *name
            {
                let floor = self.next.changes_floor.max(tombstone.revision);
                self.next.changes_floor = floor;
            }
            self.ops.push(Op::Remove(items::tombstone_key(&owner)));
        }
        Ok(allotted.vip)
    }

    /// `service.revision` is set here.
    pub(crate) fn put_service(&mut self, mut service: Service) {
        service.revision = self.revision;
        let name = service.name.clone();
        self.put(items::service_key(&name), &service);
        self.next.services.insert(name.clone(), Arc::new(service));
        self.next.note_change(self.revision, name.clone());
        self.touched.insert(name);
    }

    pub(crate) fn remove_service(&mut self, name: &ServiceName) {
        self.next.services.remove(name);
        self.ops.push(Op::Remove(items::service_key(name)));
        if let Some(released) = self.vips.release(name, self.now_s) {
            let tombstone = Tombstone {
                name: released.name,
                vip: released.vip,
                released_s: released.released_s,
                revision: self.revision,
            };
            self.put(items::tombstone_key(name), &tombstone);
            let tombstone = Arc::new(tombstone);
            self.next.tombstones.insert(name.clone(), tombstone);
        }
        self.next.note_change(self.revision, name.clone());
        self.touched.insert(name.clone());
    }

    pub(crate) fn put_policy(&mut self, key: PolicyKey, mut policy: Policy) {
        policy.revision = self.revision;
        self.put(items::policy_key(&key), &policy);
        self.next.policies.insert(key, Arc::new(policy));
        self.next.policies_revision = self.revision;
    }

    pub(crate) fn remove_policy(&mut self, key: &PolicyKey) {
        self.next.policies.remove(key);
        self.ops.push(Op::Remove(items::policy_key(key)));
        self.next.policies_revision = self.revision;
    }

    fn put(&mut self, key: String, object: &impl Serialize) {
        self.ops.push(Op::Put(key, items::encode(object)));
    }
}
