//! The certificates that this host speaks with: one for each workload, one for processes that match none, and the
//! agent's own credential. `mesh_core::renewal` decides when each is renewed; this asks control and keeps the answers.
//!
//! A new leaf is on disk before it is used, so an agent that restarts while control is away goes on with it. Keys stay
//! for as long as their workload does: a key and its certificate can not come apart when the agent dies between two
//! writes.

mod ask;
mod heed;

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{BuildHasher as _, Hasher as _, RandomState};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use bytes::Bytes;
use mesh_api::{proto, sync};
use mesh_core::identity::{Identity, SpiffeId};
use mesh_core::names::{Account, TrustDomain};
use mesh_core::reason::Reason;
use mesh_core::renewal::{Command, Renewal, Standing};
use mesh_runtime::clock;
pub(crate) use mesh_runtime::clock::now_ms;
use mesh_runtime::tls::leaf::LeafFacts;
use mesh_runtime::tls::trust::SharedTrust;
use mesh_runtime::tls::verify::{Accept, Verifier};
use mesh_runtime::tls::{ALPN_MESH, client_config};
use rustls::sign::CertifiedKey;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;

use self::ask::{Renewed, call};
use crate::handing::Handing;
use crate::keys;
use crate::state::{Membership, Pair, State};
use crate::view::{Leaf, ViewWriter};
use crate::workloads::WorkloadSet;

/// Leaves in one call: what control takes.
const BATCH_MAX: usize = 256;
/// The agent's own credential lives for 30 days and is renewed daily: a third of this.
const AGENT_LIFE_MS: u64 = 3 * 24 * 3600 * 1000;
/// After a refusal, which an operator must lift: an asking fleet must not be a load.
const REFUSED_WAIT_MS: u64 = 60_000;

/// How each identity stands, for `status` and readiness.
pub(crate) type Standings = BTreeMap<Identity, LeafStanding>;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LeafStanding {
    /// Unix time, seconds; `None` while there is no certificate.
    pub(crate) not_after_s: Option<i64>,
    pub(crate) refused: Option<(Reason, String)>,
}

/// What the owner of the leaves works with.
#[derive(Debug)]
pub(crate) struct Links {
    pub(crate) state: State,
    pub(crate) view: ViewWriter,
    pub(crate) trust: SharedTrust,
    pub(crate) sets: watch::Receiver<Arc<WorkloadSet>>,
    /// The way to control while the session is live.
    pub(crate) channel: watch::Receiver<Option<Channel>>,
    /// A new credential of the agent's own, where the old one had ended.
    pub(crate) rejoined: mpsc::Receiver<Vec<Bytes>>,
    /// Changes when control has judged what this host reports.
    pub(crate) judged: watch::Receiver<u64>,
    /// The agent's own credential.
    pub(crate) credential: watch::Sender<Option<Arc<CertifiedKey>>>,
    pub(crate) standings: watch::Sender<Arc<Standings>>,
    /// Another worker may take over: only one asks for certificates and writes them.
    pub(crate) handing: Handing,
}

/// The owner of all leaves.
#[derive(Debug)]
pub(crate) struct Keeper {
    links: Links,
    host: Identity,
    agent: Identity,
    trust_domain: TrustDomain,
    entries: BTreeMap<Identity, Entry>,
    seed: u64,
}

#[derive(Debug)]
struct Entry {
    /// PEM. On disk as soon as there is a certificate.
    key: String,
    renewal: Renewal,
    not_after_s: Option<i64>,
    refused: Option<Refused>,
}

#[derive(Debug)]
struct Refused {
    reason: Reason,
    message: String,
    at_ms: u64,
}

impl Keeper {
    /// Takes the leaves that are on disk into use.
    pub(crate) fn new(links: Links, membership: &Membership) -> anyhow::Result<Self> {
        let mut keeper = Self {
            host: Identity::Host(membership.host.name.clone()),
            agent: membership.agent_id().identity,
            trust_domain: membership.host.trust_domain.clone(),
            entries: BTreeMap::new(),
            seed: RandomState::new().build_hasher().finish(),
            links,
        };
        keeper.converge()?;
        Ok(keeper)
    }

    /// Renews and publishes until `stop`.
    pub(crate) async fn run(mut self, stop: CancellationToken) -> anyhow::Result<()> {
        let mut calls: JoinSet<Renewed> = JoinSet::new();
        self.remove_unwanted();
        loop {
            self.wake(&mut calls)?;
            self.publish();
            let sleep = self.sleep();
            tokio::select! {
                () = stop.cancelled() => return Ok(()),
                () = self.links.handing.begun() => {
                    // What is asked for and not answered yet, the other worker asks for again.
                    calls.shutdown().await;
                    self.links.handing.let_go();
                    self.heed(stop).await;
                    return Ok(());
                }
                changed = self.links.sets.changed() => {
                    changed.context("the owner of the workloads is gone")?;
                    self.converge()?;
                    self.remove_unwanted();
                }
                changed = self.links.channel.changed() => {
                    changed.context("the session with control is gone")?;
                    self.want(|_| true);
                }
                changed = self.links.judged.changed() => {
                    changed.context("the session with control is gone")?;
                    self.want(Entry::end_rest);
                }
                Some(chain) = self.links.rejoined.recv() => self.rejoined(&chain),
                Some(done) = calls.join_next() => self.renewed(done.context("a renewal failed")?),
                () = tokio::time::sleep(sleep) => (),
            }
        }
    }

    /// Makes the entries those of the workloads, with what is on disk for new ones.
    fn converge(&mut self) -> anyhow::Result<()> {
        let set = Arc::clone(&self.links.sets.borrow_and_update());
        let accounts = set.workloads.iter().map(|w| w.account.clone());
        let mut wanted: BTreeSet<Identity> = accounts.map(Identity::Workload).collect();
        wanted.extend([self.host.clone(), self.agent.clone()]);
        for identity in &wanted {
            if !self.entries.contains_key(identity) {
                let entry = self.load(identity)?;
                self.entries.insert(identity.clone(), entry);
            }
        }
        let gone: Vec<Identity> = self.entries.keys().cloned().collect();
        for identity in gone.into_iter().filter(|i| !wanted.contains(i)) {
            self.entries.remove(&identity);
            self.withdraw(&identity);
        }
        Ok(())
    }

    /// Removes leaves of workloads that are no more. Not before this worker serves: one that only stands by may have been
    /// told of other workloads than the one that goes on if it is given up.
    fn remove_unwanted(&self) {
        // A file that can not be read now may be good again soon: its leaf is kept.
        if !self.links.sets.borrow().problems.is_empty() {
            return;
        }
        let files: BTreeSet<String> = self.entries.keys().filter_map(file_name).collect();
        for name in self.links.state.leaf_names() {
            if !files.contains(&name) {
                self.links.state.remove_leaf(&name);
            }
        }
    }

    fn load(&mut self, identity: &Identity) -> anyhow::Result<Entry> {
        self.seed = self.seed.wrapping_add(1);
        let state = &self.links.state;
        let kept = match file_name(identity) {
            None => state.agent(),
            Some(name) => state.leaf(&name),
        };
        let kept = kept.unwrap_or_else(|error| {
            log::warn!(identity:% = identity, error:% = error; "a certificate on disk can not be read");
            None
        });
        if let Some(pair) = kept {
            match self.take(identity, &pair) {
                Ok(facts) => return Ok(Entry::of(identity, pair.key, &facts, self.seed)),
                Err(error) => {
                    log::warn!(
                        identity:% = identity, error:% = format!("{error:#}");
                        "a certificate on disk is of no use; a new one is asked for"
                    );
                }
            }
        }
        let key = if *identity == self.agent {
            let key = self.links.state.agent_key()?;
            log::warn!(
                "the credential of this host is not there; control is asked for another, by the key of the join"
            );
            key.context(
                "the key of the join is missing; `mesh-agent leave`, then `mesh-agent join` again",
            )?
        } else {
            keys::generate()?
        };
        Ok(Entry {
            key,
            renewal: Renewal::new(0, 0, self.seed),
            not_after_s: None,
            refused: None,
        })
    }

    fn check(
        &self,
        identity: &Identity,
        pair: &Pair,
    ) -> anyhow::Result<(Arc<CertifiedKey>, LeafFacts)> {
        let (key, facts) = keys::read(pair)?;
        let id = self.id(identity);
        ensure!(facts.id == id, "it is for {}, not for {id}", facts.id);
        Ok((key, facts))
    }

    fn id(&self, identity: &Identity) -> SpiffeId {
        SpiffeId {
            trust_domain: self.trust_domain.clone(),
            identity: identity.clone(),
        }
    }

    /// Checks a pair and takes it into use, unless its life is over.
    fn take(&self, identity: &Identity, pair: &Pair) -> anyhow::Result<LeafFacts> {
        let (key, facts) = self.check(identity, pair)?;
        if *identity == self.agent {
            // Also an expired one: control's refusal says more than silence.
            self.links.credential.send_replace(Some(key));
            return Ok(facts);
        }
        if facts.not_after_s <= now_s() {
            return Ok(facts);
        }
        let verifier = Verifier::new(Arc::clone(&self.links.trust), Accept::NamedWorkload);
        let leaf = Arc::new(Leaf {
            client: Arc::new(client_config(
                Some(Arc::clone(&key)),
                verifier,
                &[ALPN_MESH],
            )?),
            id: facts.id.clone(),
            key,
            not_after_s: facts.not_after_s,
        });
        self.links.view.change(|view| {
            let leaves = Arc::make_mut(&mut view.leaves);
            match identity {
                Identity::Workload(account) => {
                    leaves.workloads.insert(account.clone(), leaf);
                }
                _ => leaves.host = Some(leaf),
            }
        });
        Ok(facts)
    }

    /// New calls can not be made in this name any more.
    fn withdraw(&self, identity: &Identity) {
        let there = self.links.view.now().leaves.of(identity).is_some();
        if there {
            self.links.view.change(|view| {
                let leaves = Arc::make_mut(&mut view.leaves);
                match identity {
                    Identity::Workload(account) => drop(leaves.workloads.remove(account)),
                    _ => leaves.host = None,
                }
            });
        }
    }

    /// Does what is due now.
    fn wake(&mut self, calls: &mut JoinSet<Renewed>) -> anyhow::Result<()> {
        let now = now_ms();
        let mut due = Vec::new();
        let mut told = Vec::new();
        for (identity, entry) in &mut self.entries {
            entry.renewal.handle_timeout(now);
            while let Some(command) = entry.renewal.poll_command() {
                match command {
                    Command::Renew if entry.rests(now) => entry.renewal.handle_failed(now),
                    Command::Renew => due.push((identity.clone(), entry.key.clone())),
                    Command::Tell(standing) => told.push((identity.clone(), standing)),
                }
            }
        }
        for (identity, standing) in told {
            self.tell(&identity, standing);
        }
        let channel = self.links.channel.borrow().clone();
        for batch in due.chunks(BATCH_MAX) {
            match &channel {
                None => {
                    for (identity, _) in batch {
                        self.failed(identity, now);
                    }
                }
                Some(channel) => {
                    let request = self.request(batch)?;
                    calls.spawn(call(channel.clone(), request, batch.to_vec()));
                }
            }
        }
        Ok(())
    }

    fn tell(&self, identity: &Identity, standing: Standing) {
        let Some(not_after_s) = self.entries.get(identity).and_then(|e| e.not_after_s) else {
            return;
        };
        // The machine reckons with a shorter life for the agent's own.
        if *identity == self.agent {
            return;
        }
        match standing {
            // The new certificate was told of.
            Standing::Fresh => (),
            Standing::Ageing => log::warn!(
                identity:% = identity, not_after = date(not_after_s);
                "a third of the certificate's life is left and it was not renewed; is control reached?"
            ),
            Standing::NotYetValid => log::warn!(
                identity:% = identity;
                "the certificate is not valid yet: this host's clock is behind control's"
            ),
            Standing::Expired => {
                log::error!(
                    identity:% = identity;
                    "the certificate is expired: no new call in this name is possible until control is reached"
                );
                self.withdraw(identity);
            }
        }
    }

    fn request(&self, batch: &[(Identity, String)]) -> anyhow::Result<proto::RenewRequest> {
        let leaves = batch.iter().map(|(identity, key)| {
            let id = self.id(identity);
            Ok(proto::LeafRequest {
                spiffe_id: id.to_string(),
                csr: keys::request(key, Some(&id))?.into(),
            })
        });
        Ok(proto::RenewRequest {
            leaves: leaves.collect::<anyhow::Result<_>>()?,
        })
    }

    fn renewed(&mut self, renewed: Renewed) {
        let now = now_ms();
        let answers = match renewed.answer {
            Ok(answers) if answers.len() == renewed.wanted.len() => answers,
            Ok(answers) => {
                log::warn!(
                    "control answered {} of {} certificate requests; they are repeated",
                    answers.len(),
                    renewed.wanted.len()
                );
                renewed.wanted.iter().for_each(|(i, _)| self.failed(i, now));
                return;
            }
            Err(error) => {
                log::warn!(error:% = error; "certificates could not be renewed; it is tried again");
                renewed.wanted.iter().for_each(|(i, _)| self.failed(i, now));
                return;
            }
        };
        for ((identity, key), answer) in renewed.wanted.into_iter().zip(answers) {
            // Its workload may be gone meanwhile, or gone and come back with another key.
            if self.entries.get(&identity).is_none_or(|e| e.key != key) {
                continue;
            }
            if let Some(refusal) = &answer.refusal {
                self.refused(&identity, refusal, now);
            } else if let Err(error) = self.install(&identity, key, &answer.certificate_chain, now)
            {
                log::warn!(
                    identity:% = identity, error:% = format!("{error:#}");
                    "control's certificate is of no use; another is asked for"
                );
                self.failed(&identity, now);
            }
        }
    }

    fn install(
        &mut self,
        identity: &Identity,
        key: String,
        chain: &[impl AsRef<[u8]>],
        now: u64,
    ) -> anyhow::Result<()> {
        let pair = Pair {
            key,
            chain: keys::chain_to_pem(chain)?,
        };
        // What is not good must not replace what is on disk.
        let (_, facts) = self.check(identity, &pair)?;
        let entry = self.entries.get(identity);
        let good = entry.is_some_and(|entry| entry.is_good(now));
        ensure!(
            !good || life(identity, &facts).0 <= now,
            "its life begins at {} only, by this host's clock (control's is ahead, or this one behind): the one before \
             stays in use",
            date(facts.not_before_s)
        );
        let kept = match file_name(identity) {
            None => self.links.state.set_agent_chain(&pair.chain),
            Some(name) => self.links.state.set_leaf(&name, &pair),
        };
        if let Err(error) = kept {
            // Calls must not end with the room on a disk.
            log::warn!(
                identity:% = identity, error:% = format!("{error:#}");
                "a new certificate is in use and can not be kept on disk: a restart begins with the one before"
            );
        }
        let facts = self.take(identity, &pair)?;
        let (not_before, not_after) = life(identity, &facts);
        if let Some(entry) = self.entries.get_mut(identity) {
            entry.refused = None;
            entry.not_after_s = Some(facts.not_after_s);
            entry.renewal.handle_renewed(not_before, not_after, now);
        }
        log::info!(identity:% = identity, not_after = date(facts.not_after_s); "a new certificate is in use");
        Ok(())
    }

    fn rejoined(&mut self, chain: &[Bytes]) {
        let agent = self.agent.clone();
        let key = self.entries.get(&agent).map(|entry| entry.key.clone());
        let installed = key.map(|key| self.install(&agent, key, chain, now_ms()));
        if let Some(Err(error)) = installed {
            log::warn!(
                error:% = format!("{error:#}");
                "the new credential of this host is of no use; another is asked for"
            );
        }
    }

    fn refused(&mut self, identity: &Identity, refusal: &proto::Refusal, now: u64) {
        let (reason, message) = sync::refusal(refusal);
        let Some(entry) = self.entries.get_mut(identity) else {
            return;
        };
        if entry.refused.as_ref().is_none_or(|r| r.reason != reason) {
            log::warn!(
                identity:% = identity, reason:% = reason;
                "control refuses the certificate: {message}"
            );
        }
        entry.refused = Some(Refused {
            reason,
            message,
            at_ms: now,
        });
        entry.renewal.handle_failed(now);
    }

    fn failed(&mut self, identity: &Identity, now: u64) {
        if let Some(entry) = self.entries.get_mut(identity) {
            entry.renewal.handle_failed(now);
        }
    }

    /// Asks at once for what is missing or late, where `which` says so: the cause of its failures may be gone.
    fn want(&mut self, which: impl Fn(&mut Entry) -> bool) {
        let now = now_ms();
        if self.links.channel.borrow().is_none() {
            return;
        }
        for entry in self.entries.values_mut() {
            let late = entry.not_after_s.is_none()
                || matches!(
                    entry.renewal.standing(now),
                    Standing::Ageing | Standing::Expired
                );
            if late && which(entry) {
                entry.renewal.handle_wanted(now);
            }
        }
    }

    fn sleep(&self) -> Duration {
        let now = now_ms();
        let sleeps = self.entries.values().map(|e| e.renewal.poll_sleep(now));
        sleeps.min().unwrap_or(mesh_core::renewal::LOOK_EVERY)
    }

    fn publish(&self) {
        let standings: Standings = self
            .entries
            .iter()
            .map(|(identity, entry)| {
                let refused = entry.refused.as_ref();
                let standing = LeafStanding {
                    not_after_s: entry.not_after_s,
                    refused: refused.map(|r| (r.reason, r.message.clone())),
                };
                (identity.clone(), standing)
            })
            .collect();
        self.links.standings.send_if_modified(|now| {
            let changed = **now != standings;
            if changed {
                *now = Arc::new(standings);
            }
            changed
        });
    }
}

impl Entry {
    fn of(identity: &Identity, key: String, facts: &LeafFacts, seed: u64) -> Self {
        let (not_before, not_after) = life(identity, facts);
        Self {
            key,
            renewal: Renewal::new(not_before, not_after, seed),
            not_after_s: Some(facts.not_after_s),
            refused: None,
        }
    }

    /// Control may decide otherwise now. True if there was a refusal.
    fn end_rest(&mut self) -> bool {
        // It stays shown until then, and is told once.
        self.refused.as_mut().map(|r| r.at_ms = 0).is_some()
    }

    /// It has one that is valid now.
    fn is_good(&self, now: u64) -> bool {
        self.not_after_s.is_some()
            && matches!(
                self.renewal.standing(now),
                Standing::Fresh | Standing::Ageing
            )
    }

    fn rests(&self, now: u64) -> bool {
        let refused = self.refused.as_ref();
        refused.is_some_and(|r| now.abs_diff(r.at_ms) < REFUSED_WAIT_MS)
    }
}

/// The life by which a leaf is renewed, in Unix milliseconds.
fn life(identity: &Identity, facts: &LeafFacts) -> (u64, u64) {
    let ms = |seconds: i64| u64::try_from(seconds).unwrap_or(0).saturating_mul(1000);
    let (not_before, not_after) = (ms(facts.not_before_s), ms(facts.not_after_s));
    match identity {
        Identity::Agent(_) => (not_before, not_after.min(not_before + AGENT_LIFE_MS)),
        _ => (not_before, not_after),
    }
}

/// The name of the leaf's files; the agent's own credential has a place of its own.
fn file_name(identity: &Identity) -> Option<String> {
    match identity {
        Identity::Workload(Account { namespace, name }) => Some(format!("{namespace}.{name}")),
        Identity::Host(_) => Some("host".to_owned()),
        _ => None,
    }
}

/// For people.
fn date(unix_s: i64) -> String {
    clock::rfc3339(u64::try_from(unix_s).unwrap_or_default())
}

fn now_s() -> i64 {
    i64::try_from(now_ms() / 1000).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::tests::{pair, signed, signed_for};
    use crate::state::tests::{Scratch, membership};
    use crate::view::{Leaves, View};
    use mesh_api::workload_file::Workload;
    use mesh_runtime::tls::trust::TrustStore;

    const WEB: &str = "spiffe://corp.example.com/ns/shop/sa/web";
    const PAST: i32 = 2020;
    const FUTURE: i32 = 4000;

    struct Bench {
        keeper: Keeper,
        sets: watch::Sender<Arc<WorkloadSet>>,
        credential: watch::Receiver<Option<Arc<CertifiedKey>>>,
        standings: watch::Receiver<Arc<Standings>>,
    }

    fn set(accounts: &[&str]) -> Arc<WorkloadSet> {
        let workloads = accounts.iter().map(|account| {
            let text = "namespace = \"shop\"\n[owner]\nuser = \"1\"\n";
            Arc::new(Workload::parse(account, text).unwrap())
        });
        Arc::new(WorkloadSet {
            workloads: workloads.collect(),
            ..WorkloadSet::default()
        })
    }

    /// A keeper over `state`, which gets a credential of the agent's own if it has none.
    fn bench(state: &State, accounts: &[&str]) -> Bench {
        if state.agent().unwrap().is_none() {
            let own = pair(&membership().agent_id().to_string());
            state.set_agent_key(&own.key).unwrap();
            state.set_agent_chain(&own.chain).unwrap();
        }
        let view = ViewWriter::new(View {
            host: Arc::new(membership().host),
            index: None,
            policies: None,
            endpoints: Arc::default(),
            workloads: Arc::default(),
            unfit: Arc::default(),
            owners: Arc::default(),
            reals: Arc::default(),
            leaves: Arc::new(Leaves::default()),
            revoked: Some(Arc::default()),
            live: false,
            unreached: false,
        });
        let (sets, sets_at) = watch::channel(set(accounts));
        let (credential_by, credential) = watch::channel(None);
        let (standings_by, standings) = watch::channel(Arc::default());
        let links = Links {
            state: state.clone(),
            view,
            trust: TrustStore::default().shared(),
            sets: sets_at,
            channel: watch::channel(None).1,
            rejoined: mpsc::channel(1).1,
            judged: watch::channel(0).1,
            credential: credential_by,
            standings: standings_by,
            handing: crate::handing::Hander::new().watching(),
        };
        Bench {
            keeper: Keeper::new(links, &membership()).unwrap(),
            sets,
            credential,
            standings,
        }
    }

    fn web() -> Identity {
        SpiffeId::parse(WEB).unwrap().identity
    }

    impl Bench {
        fn in_use(&self) -> bool {
            let view = self.keeper.links.view.now();
            view.leaves.of(&web()).is_some()
        }

        fn key(&self) -> String {
            self.keeper.entries[&web()].key.clone()
        }

        fn answer(&mut self, answer: proto::LeafResponse) {
            let wanted = vec![(web(), self.key())];
            let answer = Ok(vec![answer]);
            self.keeper.renewed(Renewed { wanted, answer });
            self.keeper.publish();
        }

        fn standing(&self) -> LeafStanding {
            self.standings.borrow()[&web()].clone()
        }
    }

    fn chain(der: Vec<u8>) -> proto::LeafResponse {
        proto::LeafResponse {
            certificate_chain: vec![der.into()],
            refusal: None,
        }
    }

    #[test]
    fn a_new_leaf_is_on_disk_and_in_use_and_survives_a_restart() {
        let Scratch(state) = &Scratch::new();
        let mut first = bench(state, &["web"]);
        assert!(first.credential.borrow().is_some());
        assert!(!first.in_use());
        let der = signed(&first.key(), WEB, FUTURE);
        first.answer(chain(der));
        assert!(first.in_use());
        assert!(first.standing().not_after_s.is_some());
        assert!(bench(state, &["web"]).in_use(), "from disk at once");
    }

    #[test]
    fn a_leaf_of_another_key_or_identity_is_not_taken() {
        let Scratch(state) = &Scratch::new();
        let mut bench = bench(state, &["web"]);
        let other_key = signed(&keys::generate().unwrap(), WEB, FUTURE);
        bench.answer(chain(other_key));
        let other_id = signed(&bench.key(), "spiffe://evil.example.com/control", FUTURE);
        bench.answer(chain(other_id));
        bench.answer(chain(b"nonsense".to_vec()));
        assert!(!bench.in_use() && state.leaf_names().is_empty());
        assert_eq!(bench.standing().not_after_s, None);
    }

    /// As a control signs whose clock is ahead: others would refuse it.
    #[test]
    fn a_leaf_whose_life_has_not_begun_replaces_none_that_is_good() {
        let Scratch(state) = &Scratch::new();
        let mut bench = bench(state, &["web"]);
        let early = signed_for(&bench.key(), WEB, FUTURE..FUTURE + 1);
        bench.answer(chain(early.clone()));
        assert!(bench.in_use(), "better than none");
        bench.answer(chain(signed_for(&bench.key(), WEB, PAST..FUTURE)));
        let good = bench.standing().not_after_s;
        bench.answer(chain(early));
        assert_eq!(bench.standing().not_after_s, good);
    }

    #[test]
    fn a_refusal_is_shown_and_rests_until_control_judges_anew() {
        let Scratch(state) = &Scratch::new();
        let mut bench = bench(state, &["web"]);
        bench.answer(proto::LeafResponse {
            certificate_chain: vec![],
            refusal: Some(proto::Refusal {
                reason: Reason::OutOfScope.to_wire().into(),
                message: "no".to_owned(),
            }),
        });
        let refused = Some((Reason::OutOfScope, "no".to_owned()));
        assert_eq!(bench.standing().refused, refused);
        let entry = &bench.keeper.entries[&web()];
        assert!(entry.rests(now_ms()) && !entry.rests(now_ms() + REFUSED_WAIT_MS));
        let entry = bench.keeper.entries.get_mut(&web()).unwrap();
        assert!(entry.end_rest() && !entry.rests(now_ms()));
        bench.keeper.publish();
        assert_eq!(bench.standing().refused, refused, "shown meanwhile");
        let der = signed(&bench.key(), WEB, FUTURE);
        bench.answer(chain(der));
        assert_eq!(bench.standing().refused, None);
    }

    #[test]
    fn an_expired_or_damaged_leaf_on_disk_is_not_used() {
        let Scratch(state) = &Scratch::new();
        let key = keys::generate().unwrap();
        let old = Pair {
            chain: keys::chain_to_pem(&[signed(&key, WEB, PAST)]).unwrap(),
            key,
        };
        state.set_leaf("shop.web", &old).unwrap();
        assert!(!bench(state, &["web"]).in_use());
        let damaged = Pair {
            chain: "nonsense".to_owned(),
            ..pair(WEB)
        };
        state.set_leaf("shop.web", &damaged).unwrap();
        assert!(!bench(state, &["web"]).in_use());
    }

    #[test]
    fn the_leaf_of_a_removed_workload_goes_and_a_late_answer_is_dropped() {
        let Scratch(state) = &Scratch::new();
        state.set_leaf("shop.web", &pair(WEB)).unwrap();
        let mut bench = bench(state, &["web"]);
        assert!(bench.in_use());
        let late = Renewed {
            wanted: vec![(web(), bench.key())],
            answer: Ok(vec![chain(signed(&bench.key(), WEB, FUTURE))]),
        };
        bench.sets.send_replace(set(&[]));
        bench.keeper.converge().unwrap();
        bench.keeper.remove_unwanted();
        assert!(!bench.in_use());
        assert!(state.leaf_names().is_empty());
        bench.keeper.renewed(late);
        assert!(!bench.in_use() && state.leaf_names().is_empty());
    }
}
