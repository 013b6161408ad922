//! What this host has of control's state: read from disk at the start, replaced as control sends, shown in the view,
//! kept on disk. Whatever is bad is refused whole, and what was good stays in use.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::Context as _;
use mesh_api::stored::{StoredEndpoints, StoredIndex, StoredPolicies, StoredRevocations};
use mesh_api::sync::{EndpointsChange, IndexChange, REVOCATIONS_PART, SyncError, policy_set};
use mesh_api::{proto, sync};
use mesh_core::names::{ServiceName, TrustDomain};
use mesh_core::reason::Reason;
use mesh_core::revocation::{Known, Named, Revocations};
use mesh_core::service::{Capture, Index};
use mesh_core::session::Installed;
use mesh_core::vip::VipRanges;
use mesh_runtime::tls::trust::{SharedTrust, TrustStore};
use tokio::sync::watch;

use super::keep::{KeptEndpoints, KeptIndex, KeptPolicies, KeptRevocations, Wanted};
use crate::state::{Kept, State};
use crate::view::{HostFacts, ViewWriter};

/// Most services whose endpoints are asked for: what control takes.
pub(super) const SUBSCRIPTIONS_MAX: usize = 10_000;
/// Endpoints that nobody asked for so long are given up: a day.
const UNUSED_MS: u64 = 24 * 3600 * 1000;

/// The owner of index, policies, endpoints and roots.
#[derive(Debug)]
pub(super) struct Mirror {
    view: ViewWriter,
    trust: SharedTrust,
    trust_domain: TrustDomain,
    vips: VipRanges,
    wanted: watch::Sender<Wanted>,
    /// The epoch of the live session.
    epoch: u64,
    revocations: Known,
    /// What is on disk of them can not be read, and control has not named all yet: nobody is believed.
    unreadable: bool,
    /// Services whose endpoints are wanted, and when they last were.
    subscriptions: BTreeMap<ServiceName, u64>,
}

impl Mirror {
    /// Takes what is on disk into use.
    pub(super) fn load(
        state: &State,
        host: &HostFacts,
        view: ViewWriter,
        trust: SharedTrust,
        bundle: proto::TrustBundle,
    ) -> Self {
        let contact_ms = state.contact().unwrap_or(0);
        let mut mirror = Self {
            view,
            trust,
            trust_domain: host.trust_domain.clone(),
            vips: host.vips,
            wanted: watch::Sender::new(Wanted {
                bundle: Some(Arc::new(bundle)),
                contact_ms,
                ..Wanted::default()
            }),
            epoch: 0,
            revocations: Known::default(),
            unreadable: false,
            subscriptions: BTreeMap::new(),
        };
        mirror.load_revocations(state);
        let loaded = [
            ("index", mirror.load_index(state)),
            ("policies", mirror.load_policies(state)),
            ("endpoints", mirror.load_endpoints(state)),
        ];
        for (what, outcome) in loaded {
            if let Err(error) = outcome {
                log::warn!(what = what, error:% = error; "what was kept is of no use and is left out");
            }
        }
        // The session says all of them when it begins.
        mirror.want_real(contact_ms);
        mirror
    }

    /// That there is no file means that nothing was ever heard: a host that has just joined. One that can not be read
    /// means that something was.
    fn load_revocations(&mut self, state: &State) {
        match read_revocations(state) {
            Ok(known) => self.revocations = known,
            Err(error) => {
                log::error!(
                    error:% = error, reason:% = Reason::RevocationsUnknown;
                    "what was revoked can not be read from disk: nobody is believed until control is reached. If that takes \
                     too long, remove {}: what was revoked and control has not said again is believed then",
                    state.file(Kept::Revocations).display()
                );
                self.unreadable = true;
            }
        }
        self.use_revocations();
    }

    /// Another worker has written this: it is used as if control had said it. What is bad, or not there, changes nothing.
    pub(super) fn heed(&mut self, state: &State, what: Kept) -> anyhow::Result<()> {
        match what {
            Kept::Revocations => {
                let written = read_revocations(state)?;
                // What we know was said to us, and is never taken back.
                let mut all = Revocations::clone(self.revocations.all());
                for one in written.all().iter() {
                    all.add(one.clone());
                }
                self.revocations = Known::new(all, written.at());
                self.unreadable &= written.at().is_none();
                self.use_revocations();
            }
            Kept::Bundle => {
                let bundle = state.kept(Kept::Bundle);
                self.bundle(bundle.context("it can not be read")?)?;
            }
            Kept::Policies => self.load_policies(state)?,
            Kept::Index => self.load_index(state)?,
            Kept::Endpoints => self.load_endpoints(state)?,
            Kept::Edges => {}
        }
        Ok(())
    }

    fn load_index(&mut self, state: &State) -> Result<(), SyncError> {
        let Some(stored) = state.kept::<StoredIndex>(Kept::Index) else {
            return Ok(());
        };
        let change = IndexChange::read(&stored.update.unwrap_or_default(), &self.vips)?;
        let installed = Installed {
            epoch: stored.epoch,
            revision: change.revision,
        };
        let index = change.apply(None)?;
        self.use_index(installed, index, stored.received_ms);
        Ok(())
    }

    fn load_policies(&mut self, state: &State) -> Result<(), SyncError> {
        let Some(stored) = state.kept::<StoredPolicies>(Kept::Policies) else {
            return Ok(());
        };
        let update = stored.update.unwrap_or_default();
        self.use_policies(update, stored.epoch, stored.received_ms)
    }

    fn load_endpoints(&mut self, state: &State) -> Result<(), SyncError> {
        let stored: StoredEndpoints = state.kept(Kept::Endpoints).unwrap_or_default();
        for service in stored.services.into_iter().take(SUBSCRIPTIONS_MAX) {
            let update = service.update.unwrap_or_default();
            let change = EndpointsChange::try_from(&update)?;
            self.subscriptions
                .insert(change.service.clone(), service.used_ms);
            let kept = KeptEndpoints {
                epoch: service.epoch,
                received_ms: service.received_ms,
                used_ms: service.used_ms,
                update: Arc::new(update),
            };
            self.use_endpoints(change, kept);
        }
        Ok(())
    }

    /// What is to be on disk.
    pub(super) fn wanted(&self) -> watch::Receiver<Wanted> {
        self.wanted.subscribe()
    }

    pub(super) fn installed(&self) -> Option<Installed> {
        self.wanted.borrow().index.as_ref().map(|i| i.installed)
    }

    /// Until when all that is in use was known to be true, by what is on disk; Unix milliseconds.
    pub(super) fn known_until_ms(&self) -> u64 {
        let wanted = self.wanted.borrow();
        let index = wanted.index.as_ref().map_or(0, |i| i.received_ms);
        wanted.contact_ms.max(index)
    }

    /// The epoch of the session that is live from now on.
    pub(super) fn begin_epoch(&mut self, epoch: u64) {
        self.epoch = epoch;
        self.revocations.begin();
    }

    /// Of the session that is live, or was last.
    pub(super) fn epoch(&self) -> u64 {
        self.epoch
    }

    /// What is known of revocations, of which epoch.
    pub(super) fn revocations_at(&self) -> Option<Installed> {
        self.revocations.at()
    }

    /// More revocations. True when control must be told of some that it has forgotten.
    pub(super) fn revocations(
        &mut self,
        update: &proto::Revocations,
        now_ms: u64,
    ) -> Result<bool, SyncError> {
        let named = Named {
            at: Installed {
                epoch: self.epoch,
                revision: update.revision,
            },
            snapshot: update.snapshot,
            more: update.more,
            revoked: sync::revocations(update)?,
        };
        let forgotten = self.revocations.handle(named, now_ms / 1000);
        if self.unreadable && self.revocations.at().is_some() {
            log::info!("control named all that was revoked: others are believed again");
            self.unreadable = false;
        }
        self.use_revocations();
        Ok(forgotten)
    }

    /// What control has forgotten, in parts; each is told once.
    pub(super) fn take_forgotten(&mut self) -> Option<proto::Revocations> {
        let (part, more) = self.revocations.take_forgotten(REVOCATIONS_PART);
        let (revoked, issuers) = sync::revocations_to_wire(&part);
        (!part.is_empty()).then(|| proto::Revocations {
            more,
            revoked,
            issuers,
            ..proto::Revocations::default()
        })
    }

    /// First no new handshake is believed, then what is open is ended: so nothing slips between.
    fn use_revocations(&self) {
        let revoked = (!self.unreadable).then(|| Arc::clone(self.revocations.all()));
        let trust = TrustStore::clone(&self.trust.load());
        self.trust
            .store(Arc::new(trust.with_revoked(revoked.clone())));
        self.view.change(|view| view.revoked.clone_from(&revoked));
        // What can not be read stays there until all of it is known again. What was never said is no file.
        let at = self.revocations.at();
        if let Some(revoked) = revoked
            && (at.is_some() || !revoked.is_empty())
        {
            let at = at.unwrap_or_default();
            let kept = Arc::new(KeptRevocations { at, revoked });
            self.wanted.send_modify(|w| w.revocations = Some(kept));
        }
    }

    pub(super) fn contact(&self, now_ms: u64) {
        self.wanted.send_modify(|w| w.contact_ms = now_ms);
    }

    /// Reads an update without applying it.
    pub(super) fn read_index(&self, update: &proto::IndexUpdate) -> Result<IndexChange, SyncError> {
        IndexChange::read(update, &self.vips)
    }

    /// A new index. True if control must be asked for endpoints.
    pub(super) fn install_index(
        &mut self,
        change: IndexChange,
        installed: Installed,
        now_ms: u64,
    ) -> Result<bool, SyncError> {
        let before = self.view.now().index.clone();
        let index = change.apply(before.as_deref())?;
        self.use_index(installed, index, now_ms);
        self.forget_unlisted();
        Ok(self.want_real(now_ms))
    }

    /// Where calls to the real addresses of a service are taken over, its endpoints must be known before the first call.
    /// True if control must be asked for some.
    fn want_real(&mut self, now_ms: u64) -> bool {
        let Some(index) = self.view.now().index.clone() else {
            return false;
        };
        let mut asked = false;
        for service in index
            .services()
            .filter(|s| s.capture == Capture::VipAndReal)
        {
            asked |= self.want(&service.name, now_ms);
        }
        asked
    }

    fn is_real(&self, service: &ServiceName) -> bool {
        let index = self.view.now().index.clone();
        let service = index.as_ref().and_then(|index| index.get(service));
        service.is_some_and(|s| s.capture == Capture::VipAndReal)
    }

    fn use_index(&self, installed: Installed, index: Index, received_ms: u64) {
        let index = Arc::new(index);
        self.view
            .change(|view| view.index = Some(Arc::clone(&index)));
        let kept = Arc::new(KeptIndex {
            installed,
            received_ms,
            index,
        });
        self.wanted.send_modify(|w| w.index = Some(kept));
    }

    /// All policies that concern this host, replaced whole.
    pub(super) fn policies(
        &self,
        update: proto::PolicyUpdate,
        now_ms: u64,
    ) -> Result<bool, SyncError> {
        let have = self.wanted.borrow().policies.clone();
        if let Some(have) = have
            && have.epoch == self.epoch
            && update.revision < have.update.revision
        {
            return Ok(false);
        }
        self.use_policies(update, self.epoch, now_ms)?;
        Ok(true)
    }

    fn use_policies(
        &self,
        update: proto::PolicyUpdate,
        epoch: u64,
        received_ms: u64,
    ) -> Result<(), SyncError> {
        let set = Arc::new(policy_set(&update, &self.trust_domain)?);
        self.view.change(|view| view.policies = Some(set));
        let kept = Arc::new(KeptPolicies {
            epoch,
            received_ms,
            update,
        });
        self.wanted.send_modify(|w| w.policies = Some(kept));
        Ok(())
    }

    /// The endpoints of one service, replaced whole. False if they were not asked for, or are old.
    pub(super) fn endpoints(
        &self,
        update: proto::EndpointsUpdate,
        now_ms: u64,
    ) -> Result<bool, SyncError> {
        let change = EndpointsChange::try_from(&update)?;
        let Some(used_ms) = self.subscriptions.get(&change.service).copied() else {
            return Ok(false);
        };
        let wanted = self.wanted.borrow();
        if let Some(have) = wanted.endpoints.get(&change.service)
            && have.epoch == self.epoch
            && change.revision < have.update.revision
        {
            return Ok(false);
        }
        drop(wanted);
        let kept = KeptEndpoints {
            epoch: self.epoch,
            received_ms: now_ms,
            used_ms,
            update: Arc::new(update),
        };
        self.use_endpoints(change, kept);
        Ok(true)
    }

    fn use_endpoints(&self, change: EndpointsChange, kept: KeptEndpoints) {
        let endpoints = Arc::new(change.endpoints);
        self.view.change(|view| {
            let all = Arc::make_mut(&mut view.endpoints);
            all.insert(change.service.clone(), endpoints);
        });
        self.wanted.send_modify(|wanted| {
            Arc::make_mut(&mut wanted.endpoints).insert(change.service, kept);
        });
    }

    /// New roots; all of them must be good, and the own trust domain among them.
    pub(super) fn bundle(&self, bundle: proto::TrustBundle) -> anyhow::Result<bool> {
        if bundle.number < self.trust.load().number() {
            return Ok(false);
        }
        let store = TrustStore::from_bundle(&bundle)?;
        store
            .roots(&self.trust_domain)
            .filter(|roots| !roots.is_empty())
            .with_context(|| format!("it has no root of {}", self.trust_domain))?;
        let revoked = self.trust.load().revoked().cloned();
        self.trust.store(Arc::new(store.with_revoked(revoked)));
        let bundle = Arc::new(bundle);
        self.wanted.send_modify(|w| w.bundle = Some(bundle));
        Ok(true)
    }

    /// A program of this host wants to reach `service`. True if control must be asked for it.
    pub(super) fn want(&mut self, service: &ServiceName, now_ms: u64) -> bool {
        let listed = self.view.now().index.as_ref().map(Arc::clone);
        if listed.is_none_or(|index| index.get(service).is_none()) {
            return false;
        }
        if let Some(used_ms) = self.subscriptions.get_mut(service) {
            *used_ms = now_ms;
            return false;
        }
        if self.subscriptions.len() >= SUBSCRIPTIONS_MAX {
            let subscriptions = self.subscriptions.iter();
            let unbound = subscriptions.filter(|(name, _)| !self.is_real(name));
            let oldest = unbound.min_by_key(|(_, used)| **used);
            if let Some(oldest) = oldest.map(|(name, _)| name.clone()) {
                self.forget(&[oldest]);
            }
        }
        self.subscriptions.insert(service.clone(), now_ms);
        true
    }

    /// Gives up what nobody used for a day. True if control must be told.
    pub(super) fn forget_unused(&mut self, now_ms: u64) -> bool {
        let unused = |used: u64| now_ms.saturating_sub(used) > UNUSED_MS;
        let subscriptions = self.subscriptions.iter();
        let gone: Vec<ServiceName> = subscriptions
            .filter(|(name, used)| unused(**used) && !self.is_real(name))
            .map(|(name, _)| name.clone())
            .collect();
        self.forget(&gone);
        !gone.is_empty()
    }

    /// A service that is not listed can not be called; if it comes back it is asked for anew.
    fn forget_unlisted(&mut self) {
        let Some(index) = self.view.now().index.clone() else {
            return;
        };
        let names = self.subscriptions.keys();
        let gone: Vec<ServiceName> = names
            .filter(|name| index.get(name).is_none())
            .cloned()
            .collect();
        self.forget(&gone);
    }

    fn forget(&mut self, gone: &[ServiceName]) {
        if gone.is_empty() {
            return;
        }
        self.subscriptions.retain(|name, _| !gone.contains(name));
        self.view.change(|view| {
            Arc::make_mut(&mut view.endpoints).retain(|name, _| !gone.contains(name));
        });
        self.wanted.send_modify(|wanted| {
            Arc::make_mut(&mut wanted.endpoints).retain(|name, _| !gone.contains(name));
        });
    }

    pub(super) fn subscribe(&self) -> proto::Subscribe {
        proto::Subscribe {
            services: self.subscriptions.keys().map(sync::service_ref).collect(),
        }
    }
}

fn read_revocations(state: &State) -> anyhow::Result<Known> {
    let Some(stored) = state.kept_whole::<StoredRevocations>(Kept::Revocations)? else {
        return Ok(Known::default());
    };
    let mut all = Revocations::default();
    for part in stored.revoked.chunks(REVOCATIONS_PART) {
        let part = proto::Revocations {
            revoked: part.to_vec(),
            issuers: stored.issuers.clone(),
            ..proto::Revocations::default()
        };
        for one in sync::revocations(&part)? {
            all.add(one);
        }
    }
    let at = Installed {
        epoch: stored.epoch,
        revision: stored.revision,
    };
    Ok(Known::new(all, Some(at)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::keep;
    use crate::state::tests::{Scratch, membership};
    use crate::view::View;
    use mesh_core::identity::Identity;
    use mesh_core::service::Health;
    use tokio_util::sync::CancellationToken;

    const EPOCH: u64 = 9;

    fn view() -> ViewWriter {
        ViewWriter::new(View {
            host: Arc::new(membership().host),
            index: None,
            policies: None,
            endpoints: Arc::default(),
            workloads: Arc::default(),
            unfit: Arc::default(),
            owners: Arc::default(),
            reals: Arc::default(),
            leaves: Arc::default(),
            revoked: Some(Arc::default()),
            live: false,
            unreached: false,
        })
    }

    fn mirror(state: &State) -> Mirror {
        let trust = TrustStore::default().shared();
        let bundle = proto::TrustBundle::default();
        let mut mirror = Mirror::load(state, &membership().host, view(), trust, bundle);
        mirror.begin_epoch(EPOCH);
        mirror
    }

    fn index(names: &[&str]) -> proto::IndexUpdate {
        let services = names
            .iter()
            .zip(2..)
            .map(|(name, last)| proto::IndexService {
                namespace: "shop".to_owned(),
                name: (*name).to_owned(),
                vip4: format!("252.64.0.{last}"),
                vip6: format!("fd6d:6573:6800::{last}"),
                ports: vec![proto::ReportedPort {
                    number: 80,
                    protocol: "http".to_owned(),
                }],
                transport: "permissive".to_owned(),
                plaintext_from: vec![],
                capture: "vip".to_owned(),
            });
        proto::IndexUpdate {
            revision: 5,
            snapshot: true,
            services: services.collect(),
            removed: vec![],
        }
    }

    fn install(mirror: &mut Mirror, update: &proto::IndexUpdate) {
        let installed = Installed {
            epoch: EPOCH,
            revision: update.revision,
        };
        let change = mirror.read_index(update).unwrap();
        mirror.install_index(change, installed, 1_000).unwrap();
    }

    fn endpoints(name: &str, revision: u64, stale: bool) -> proto::EndpointsUpdate {
        proto::EndpointsUpdate {
            service: Some(sync::service_ref(&service(name))),
            revision,
            endpoints: vec![proto::Endpoint {
                network: "default".to_owned(),
                address: "10.0.0.2".to_owned(),
                mesh_port: 7441,
                namespace: "shop".to_owned(),
                account: name.to_owned(),
                host_uid: "0".repeat(32),
                stale,
            }],
        }
    }

    fn service(name: &str) -> ServiceName {
        ServiceName::parse(&format!("shop/{name}")).unwrap()
    }

    fn health(mirror: &Mirror, name: &str) -> Option<Health> {
        let view = mirror.view.now();
        view.endpoints.get(&service(name)).map(|e| e[0].health)
    }

    fn everyone() -> proto::PolicyUpdate {
        let policy = r#"{"apiVersion":"meshwork.io/v1alpha1","kind":"Policy","metadata":{"name":"p"},
            "spec":{"rules":[{"name":"r","from":[{"namespace":"shop"}]}]}}"#;
        proto::PolicyUpdate {
            revision: 6,
            policies: vec![policy.to_owned()],
        }
    }

    #[tokio::test]
    async fn what_was_sent_is_there_after_a_restart() {
        let Scratch(state) = &Scratch::new();
        let mut first = mirror(state);
        let (persisted, known) = watch::channel(keep::Persisted::default());
        let stop = CancellationToken::new();
        let keeping = keep::run(state.clone(), first.wanted(), persisted, stop.clone());
        install(&mut first, &index(&["web", "db"]));
        assert!(first.want(&service("web"), 1_000));
        assert_eq!(first.endpoints(endpoints("web", 7, true), 1_000), Ok(true));
        assert_eq!(first.policies(everyone(), 1_000), Ok(true));
        let revoked = revocations(4, &[revoked(1)]);
        assert_eq!(first.revocations(&revoked, 1_000), Ok(false));
        first.contact(2_000);
        stop.cancel();
        // Stopping writes what is still to be written.
        keeping.await.unwrap();
        let ack = known.borrow().ack(EPOCH);
        assert_eq!((ack.policy_revision, ack.revocations_revision), (6, 4));
        assert_eq!(known.borrow().ack(EPOCH + 1).policy_revision, 0);

        let second = mirror(state);
        let installed = Installed {
            epoch: EPOCH,
            revision: 5,
        };
        assert_eq!(second.installed(), Some(installed));
        assert_eq!(second.known_until_ms(), 2_000);
        assert_eq!(health(&second, "web"), Some(Health::Stale));
        let view = second.view.now();
        assert_eq!(view.policies.as_ref().unwrap().policies.len(), 1);
        assert_eq!(second.subscribe().services.len(), 1);
        let revoked = view.revoked.as_ref().unwrap();
        assert_eq!(revoked.len(), 1);
        assert_eq!(second.trust.load().revoked(), Some(revoked));
    }

    fn revoked(host: u8) -> proto::Revocation {
        proto::Revocation {
            host_uid: format!("{host:032x}"),
            at_s: 1,
            ..proto::Revocation::default()
        }
    }

    fn revocations(revision: u64, revoked: &[proto::Revocation]) -> proto::Revocations {
        proto::Revocations {
            revision,
            snapshot: true,
            more: false,
            revoked: revoked.to_vec(),
            issuers: vec![],
        }
    }

    #[test]
    fn revocations_only_grow_and_a_control_that_forgot_some_is_told() {
        let Scratch(state) = &Scratch::new();
        let mut mirror = mirror(state);
        let both = [revoked(1), revoked(2)];
        assert_eq!(mirror.revocations(&revocations(7, &both), 1_000), Ok(false));
        let installed = |epoch, revision| Some(Installed { epoch, revision });
        assert_eq!(mirror.revocations_at(), installed(EPOCH, 7));

        // A control of an older backup, in two parts: it knows of another one, and not of ours.
        mirror.begin_epoch(EPOCH + 1);
        let mut part = revocations(3, &[revoked(3)]);
        part.more = true;
        assert_eq!(mirror.revocations(&part, 1_000), Ok(false));
        assert_eq!(mirror.revocations_at(), installed(EPOCH, 7), "not whole");
        let rest = revocations(3, &[revoked(1)]);
        assert_eq!(mirror.revocations(&rest, 1_000), Ok(true));
        assert_eq!(mirror.revocations_at(), installed(EPOCH + 1, 3));
        assert_eq!(mirror.view.now().revoked.as_ref().unwrap().len(), 3);
        let told = mirror.take_forgotten().unwrap();
        assert_eq!(told.revoked, [revoked(2)]);
        assert_eq!(mirror.take_forgotten(), None);
        // New roots leave them alone, and so does a bad update.
        let mut bad = revocations(9, &[revoked(4)]);
        bad.revoked[0].host_uid = "x".to_owned();
        assert!(mirror.revocations(&bad, 1_000).is_err());
        assert_eq!(mirror.trust.load().revoked().unwrap().len(), 3);
    }

    #[test]
    fn nobody_is_believed_while_what_was_revoked_can_not_be_read() {
        let Scratch(state) = &Scratch::new();
        let nobody = |mirror: &Mirror| {
            let (view, trust) = (mirror.view.now(), mirror.trust.load());
            assert_eq!(view.revoked.is_none(), trust.revoked().is_none());
            view.revoked.is_none()
        };
        assert!(!nobody(&mirror(state)), "it was never told of any");
        // A file that can be opened and not understood, and one whose content this version does not take.
        let bad = StoredRevocations {
            revoked: vec![proto::Revocation::default()],
            ..StoredRevocations::default()
        };
        for damage in ["sealed", "cut"] {
            match damage {
                "sealed" => state.keep(Kept::Revocations, &bad).unwrap(),
                _ => std::fs::write(state.file(Kept::Revocations), "meshwk1\n").unwrap(),
            }
            let mut mirror = mirror(state);
            assert!(nobody(&mirror), "{damage}");
            let host = Identity::Host("vm-1".parse().unwrap());
            let refused = mirror.view.now().leaf(&host).map(drop);
            assert_eq!(refused, Err(Reason::RevocationsUnknown));
            assert_eq!(mirror.revocations_at(), None, "control is to name all");
            // New roots, and a part of the list, are not enough; and the file stays as it is.
            let mut part = revocations(4, &[revoked(1)]);
            part.more = true;
            assert_eq!(mirror.revocations(&part, 1_000), Ok(false));
            assert!(nobody(&mirror) && mirror.wanted().borrow().revocations.is_none());
            let rest = revocations(4, &[revoked(2)]);
            assert_eq!(mirror.revocations(&rest, 1_000), Ok(false));
            assert!(!nobody(&mirror));
            assert_eq!(mirror.view.now().revoked.as_ref().unwrap().len(), 2);
            assert!(mirror.wanted().borrow().revocations.is_some());
        }
    }

    #[test]
    fn what_is_bad_or_old_leaves_the_last_good_in_use() {
        let Scratch(state) = &Scratch::new();
        let mut mirror = mirror(state);
        install(&mut mirror, &index(&["web"]));
        mirror.want(&service("web"), 1_000);
        mirror.endpoints(endpoints("web", 7, false), 1_000).unwrap();
        mirror.policies(everyone(), 1_000).unwrap();

        let mut bad = endpoints("web", 8, true);
        bad.endpoints[0].address = "nowhere".to_owned();
        assert!(mirror.endpoints(bad, 2_000).is_err());
        assert_eq!(
            mirror.endpoints(endpoints("web", 6, true), 2_000),
            Ok(false)
        );
        assert_eq!(health(&mirror, "web"), Some(Health::Healthy));
        let bad = proto::PolicyUpdate {
            revision: 7,
            policies: vec!["{}".to_owned()],
        };
        assert!(mirror.policies(bad, 2_000).is_err());
        assert_eq!(mirror.view.now().policies.as_ref().unwrap().revision, 6);
        let bundle = proto::TrustBundle {
            number: 1,
            domains: vec![],
        };
        assert!(mirror.bundle(bundle).is_err(), "without our own roots");

        // Another epoch counts anew.
        mirror.begin_epoch(EPOCH + 1);
        assert_eq!(mirror.endpoints(endpoints("web", 1, true), 3_000), Ok(true));
        assert_eq!(health(&mirror, "web"), Some(Health::Stale));
    }

    #[test]
    fn only_listed_services_are_asked_for_and_unused_ones_given_up() {
        let Scratch(state) = &Scratch::new();
        let mut mirror = mirror(state);
        assert!(!mirror.want(&service("web"), 1_000), "no index yet");
        install(&mut mirror, &index(&["web", "db"]));
        assert!(!mirror.want(&service("other"), 1_000));
        assert!(mirror.want(&service("web"), 1_000));
        assert!(!mirror.want(&service("web"), 1_000), "it was asked for");
        assert!(mirror.want(&service("db"), UNUSED_MS));
        let unasked = endpoints("other", 1, false);
        assert_eq!(mirror.endpoints(unasked, 1_000), Ok(false));
        mirror.endpoints(endpoints("web", 1, false), 1_000).unwrap();

        assert!(mirror.forget_unused(UNUSED_MS + 1_001));
        assert_eq!(health(&mirror, "web"), None);
        assert_eq!(mirror.subscribe().services.len(), 1);
        install(&mut mirror, &index(&["web"]));
        assert!(mirror.subscribe().services.is_empty(), "db is gone");
    }
}
