//! Which hosts control hears from: its table of leases, as a pure state machine.
//!
//! The lease of a host is its Sync stream with its heartbeat. It is lost after [`LEASE`] of silence, not
//! when the stream closes: an agent that restarts is back before that and nobody notices. When more than a
//! fifth of the fleet falls silent at once it is more likely that control is cut off than that they all
//! died, so nothing expires then: it is held, and said loudly, until they return, an operator acts, or
//! [`Settings::held_max`] has passed.
//!
//! Only transitions come out (the store sees nothing else); beats stay in memory.
//!
//! Invariant: a host turns stale only after a whole lease of silence, and a host that beats is live.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::names::HostUid;
use crate::session;

/// How long a host may be silent: three beats.
pub const LEASE: Duration = session::SILENCE_MAX;
/// How long hosts that were live before control started have to come back: the longest wait of an agent that
/// could not reach control for long, and a lease.
pub const START_GRACE: Duration = session::BACKOFF_MAX.saturating_add(LEASE);
/// How long the expiry of many is held. By then an operator was called and the data path has ejected what
/// is really dead.
pub const HELD_MAX: Duration = Duration::from_secs(600);
/// Below this many silent hosts nothing is held: in a small fleet two failures at once are two failures.
pub const HELD_HOSTS_MIN: usize = 3;
/// The part of the fleet, one of so many, beyond which expiry is held.
pub const HELD_SHARE: usize = 5;

/// What an operator may set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    pub start_grace: Duration,
    pub held_max: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            start_grace: START_GRACE,
            held_max: HELD_MAX,
        }
    }
}

/// One Sync stream, as the shell numbers them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct SessionId(pub u64);

/// What the catalogue must be told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Transition {
    /// The host is heard again, or for the first time.
    Live(HostUid),
    /// The host lost its lease: its endpoints are stale.
    Stale(HostUid),
    /// `count` hosts of a fleet of `fleet` are silent and are not expired. Comes again as more join.
    Held { count: usize, fleet: usize },
    /// Nothing is held any more.
    Released,
}

/// Two machines speak with one host's credential.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "host {host} is connected from another machine: boot {ours} holds the session, boot {theirs} asks for \
     one; give one of them a credential of its own by joining it again"
)]
pub struct Cloned {
    pub host: HostUid,
    /// The boot id of the session that stands.
    pub ours: Arc<str>,
    /// The boot id that was refused.
    pub theirs: String,
}

#[derive(Debug)]
pub struct Leases {
    settings: Settings,
    hosts: BTreeMap<HostUid, Host>,
    /// Hosts that are live and not held, by the end of their lease.
    ends: BTreeSet<(Instant, HostUid)>,
    held: BTreeSet<HostUid>,
    /// When holding ends whatever comes; `None` while nothing is held.
    held_until: Option<Instant>,
    transitions: VecDeque<Transition>,
}

#[derive(Debug)]
struct Host {
    state: State,
    session: Option<(SessionId, Arc<str>)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Live { ends_at: Instant },
    Held,
    Stale,
}

impl Leases {
    /// The table after a start of control. `live` are the hosts that the store calls live, `stale` the
    /// others: neither was heard by this process yet.
    pub fn new(
        settings: Settings,
        live: impl IntoIterator<Item = HostUid>,
        stale: impl IntoIterator<Item = HostUid>,
        now: Instant,
    ) -> Self {
        let ends_at = now + settings.start_grace.max(LEASE);
        let mut leases = Self {
            settings,
            hosts: BTreeMap::new(),
            ends: BTreeSet::new(),
            held: BTreeSet::new(),
            held_until: None,
            transitions: VecDeque::new(),
        };
        for host in stale {
            leases.hosts.insert(host, Host::unheard(State::Stale));
        }
        for host in live {
            leases.ends.insert((ends_at, host.clone()));
            leases
                .hosts
                .insert(host, Host::unheard(State::Live { ends_at }));
        }
        leases
    }

    /// A host opened a session. Returns the session that this one replaces, to be closed; refuses it while
    /// another boot of the same host holds a live one.
    pub fn opened(
        &mut self,
        host: &HostUid,
        session: SessionId,
        boot_id: &str,
        now: Instant,
    ) -> Result<Option<SessionId>, Cloned> {
        let entry = self
            .hosts
            .entry(host.clone())
            .or_insert_with(|| Host::unheard(State::Stale));
        if let (Some((_, ours)), State::Live { ends_at }) = (&entry.session, entry.state)
            && now < ends_at
            && **ours != *boot_id
        {
            return Err(Cloned {
                host: host.clone(),
                ours: Arc::clone(ours),
                theirs: boot_id.to_owned(),
            });
        }
        let replaced = entry.session.replace((session, boot_id.into()));
        self.extend(host, now);
        Ok(replaced.map(|(id, _)| id).filter(|id| *id != session))
    }

    /// A beat, or any other message of the host. False when `session` is not the host's session: close it.
    pub fn beat(&mut self, host: &HostUid, session: SessionId, now: Instant) -> bool {
        let ours = |entry: &Host| entry.session.as_ref().map(|(id, _)| *id);
        if self.hosts.get(host).and_then(ours) != Some(session) {
            return false;
        }
        self.extend(host, now);
        true
    }

    /// The session ended. Its lease runs on to its end.
    pub fn closed(&mut self, host: &HostUid, session: SessionId) {
        if let Some(entry) = self.hosts.get_mut(host)
            && entry.session.as_ref().is_some_and(|(id, _)| *id == session)
        {
            entry.session = None;
        }
    }

    /// The host left or was revoked. Returns its session, to be closed.
    pub fn removed(&mut self, host: &HostUid) -> Option<SessionId> {
        let entry = self.hosts.remove(host)?;
        if let State::Live { ends_at } = entry.state {
            self.ends.remove(&(ends_at, host.clone()));
        }
        self.held.remove(host);
        self.end_hold_if_empty();
        entry.session.map(|(id, _)| id)
    }

    /// The operator says that the silent hosts are gone: all that is held expires.
    pub fn release(&mut self) {
        for host in std::mem::take(&mut self.held) {
            self.set(&host, State::Stale);
            self.transitions.push_back(Transition::Stale(host));
        }
        self.end_hold_if_empty();
    }

    pub fn handle_timeout(&mut self, now: Instant) {
        if self.held_until.is_some_and(|until| until <= now) {
            self.release();
        }
        if self.ends.first().is_none_or(|(ends_at, _)| now < *ends_at) {
            return;
        }
        let hold = self.held_until.is_some() || self.many_are_silent(now);
        let mut held_more = false;
        while let Some((ends_at, _)) = self.ends.first()
            && *ends_at <= now
            && let Some((_, host)) = self.ends.pop_first()
        {
            if hold {
                self.set(&host, State::Held);
                self.held.insert(host);
                held_more = true;
            } else {
                self.set(&host, State::Stale);
                self.transitions.push_back(Transition::Stale(host));
            }
        }
        if held_more {
            self.held_until.get_or_insert(now + self.settings.held_max);
            self.transitions.push_back(Transition::Held {
                count: self.held.len(),
                fleet: self.fleet(),
            });
        }
    }

    pub fn poll_transition(&mut self) -> Option<Transition> {
        self.transitions.pop_front()
    }

    pub fn poll_timeout(&self) -> Option<Instant> {
        let first = self.ends.first().map(|(ends_at, _)| *ends_at);
        first.into_iter().chain(self.held_until).min()
    }

    /// The hosts whose expiry is held, for status and `check`.
    pub fn held(&self) -> impl ExactSizeIterator<Item = &HostUid> {
        self.held.iter()
    }

    /// Whether the host's endpoints count as healthy: live, or held.
    pub fn is_live(&self, host: &HostUid) -> bool {
        self.hosts
            .get(host)
            .is_some_and(|entry| entry.state != State::Stale)
    }

    /// The host's session, if one is open.
    pub fn session(&self, host: &HostUid) -> Option<SessionId> {
        self.hosts.get(host)?.session.as_ref().map(|(id, _)| *id)
    }

    fn extend(&mut self, host: &HostUid, now: Instant) {
        let Some(entry) = self.hosts.get_mut(host) else {
            return;
        };
        let ends_at = now + LEASE;
        match std::mem::replace(&mut entry.state, State::Live { ends_at }) {
            State::Live { ends_at: old } => {
                self.ends.remove(&(old, host.clone()));
            }
            State::Held => {
                self.held.remove(host);
                self.end_hold_if_empty();
            }
            State::Stale => self.transitions.push_back(Transition::Live(host.clone())),
        }
        self.ends.insert((ends_at, host.clone()));
    }

    /// Hosts that lost connection at one moment beat at different ones, so their leases end over the length
    /// of a beat. Whoever missed two beats is counted when the first of them expires.
    fn many_are_silent(&self, now: Instant) -> bool {
        let silent = self
            .ends
            .iter()
            .take_while(|(ends_at, _)| *ends_at <= now + session::BEAT_EVERY)
            .count();
        HELD_HOSTS_MIN <= silent && self.fleet() < silent * HELD_SHARE
    }

    /// Hosts that are not stale.
    fn fleet(&self) -> usize {
        self.ends.len() + self.held.len()
    }

    fn set(&mut self, host: &HostUid, state: State) {
        if let Some(entry) = self.hosts.get_mut(host) {
            entry.state = state;
        }
    }

    fn end_hold_if_empty(&mut self) {
        if self.held.is_empty() && self.held_until.take().is_some() {
            self.transitions.push_back(Transition::Released);
        }
    }
}

impl Host {
    const fn unheard(state: State) -> Self {
        Self {
            state,
            session: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    #[test]
    fn a_silent_host_turns_stale_and_comes_back() {
        let mut fleet = Fleet::live(1);
        assert_eq!(fleet.advance(), [Transition::Stale(uid(0))]);
        assert_eq!(fleet.now, fleet.start + LEASE);
        assert!(fleet.leases.beat(&uid(0), SessionId(0), fleet.now));
        assert_eq!(fleet.drain(), [Transition::Live(uid(0))]);
    }

    #[test]
    fn a_closed_session_keeps_its_lease_until_its_end() {
        let mut fleet = Fleet::live(1);
        fleet.leases.closed(&uid(0), SessionId(0));
        assert_eq!(fleet.drain(), []);
        fleet.now += LEASE / 2;
        assert_eq!(fleet.open(0, 1, "boot"), Ok(None));
        assert_eq!(fleet.drain(), [], "nobody notices a restart");
        assert!(!fleet.leases.beat(&uid(0), SessionId(0), fleet.now));
    }

    #[test]
    fn another_boot_is_refused_while_the_session_lives_and_taken_afterwards() {
        let mut fleet = Fleet::live(1);
        let cloned = fleet.open(0, 1, "other").unwrap_err();
        assert_eq!((&*cloned.ours, &*cloned.theirs), ("boot", "other"));
        assert_eq!(fleet.open(0, 2, "boot"), Ok(Some(SessionId(0))));
        assert_eq!(fleet.advance(), [Transition::Stale(uid(0))]);
        assert_eq!(fleet.open(0, 3, "other"), Ok(Some(SessionId(2))));
    }

    #[test]
    fn after_a_start_the_fleet_has_time_to_come_back() {
        let now = start();
        let mut leases = Leases::new(Settings::default(), [uid(0)], [uid(1)], now);
        leases.handle_timeout(now + LEASE);
        assert_eq!(leases.poll_transition(), None);
        assert!(leases.is_live(&uid(0)) && !leases.is_live(&uid(1)));
        assert_eq!(leases.poll_timeout(), Some(now + START_GRACE));
        leases.handle_timeout(now + START_GRACE);
        assert_eq!(leases.poll_transition(), Some(Transition::Stale(uid(0))));
    }

    #[test]
    fn few_expire_and_many_are_held() {
        for (silent, held) in [(2, false), (3, true)] {
            let mut fleet = Fleet::live(10);
            fleet.now += LEASE;
            for host in silent..10 {
                assert!(fleet.leases.beat(&uid(host), SessionId(host), fleet.now));
            }
            let transitions = fleet.advance();
            if held {
                let expected = Transition::Held {
                    count: 3,
                    fleet: 10,
                };
                assert_eq!(transitions, [expected]);
                assert!(fleet.leases.is_live(&uid(0)));
            } else {
                assert_eq!(
                    transitions,
                    [Transition::Stale(uid(0)), Transition::Stale(uid(1))]
                );
            }
        }
    }

    #[test]
    fn a_cut_is_seen_as_one_though_leases_end_over_a_beat() {
        let mut fleet = Fleet::live(20);
        for host in 0..20 {
            let spread = Duration::from_millis(host * 240);
            let at = fleet.start + spread;
            assert!(fleet.leases.beat(&uid(host), SessionId(host), at));
        }
        fleet.now = fleet.start + session::BEAT_EVERY;
        for host in 0..20 {
            for transition in fleet.advance() {
                let count = host as usize + 1;
                assert_eq!(transition, Transition::Held { count, fleet: 20 });
            }
        }
        assert_eq!(fleet.leases.held().len(), 20);
    }

    #[test]
    fn holding_ends_when_all_are_back_or_by_word_or_by_time() {
        let hold = || {
            let mut fleet = Fleet::live(4);
            assert_eq!(fleet.advance(), [Transition::Held { count: 4, fleet: 4 }]);
            fleet
        };
        let mut back = hold();
        for host in 0..4 {
            assert!(back.leases.beat(&uid(host), SessionId(host), back.now));
        }
        assert_eq!(back.drain(), [Transition::Released]);

        let expired: Vec<_> = (0..4)
            .map(|host| Transition::Stale(uid(host)))
            .chain([Transition::Released])
            .collect();
        let mut word = hold();
        word.leases.release();
        assert_eq!(word.drain(), expired);

        let mut time = hold();
        assert_eq!(time.advance(), expired);
        assert_eq!(time.now, time.start + LEASE + HELD_MAX);
    }

    #[test]
    fn a_removed_host_is_forgotten() {
        let mut fleet = Fleet::live(1);
        assert_eq!(fleet.leases.removed(&uid(0)), Some(SessionId(0)));
        assert_eq!(fleet.leases.poll_timeout(), None);
        assert!(!fleet.leases.beat(&uid(0), SessionId(0), fleet.now));
    }

    /// The goal: whatever comes, a host is called stale only after a whole lease of silence, one that beats is
    /// live, and transitions of a host alternate. Method: a seeded random walk beside the plainest model,
    /// the time each host was last heard.
    #[test]
    fn only_silence_makes_stale() {
        for seed in 0..500 {
            let mut rng = Rng::new(seed);
            let hosts = 1 + rng.below(30);
            let mut fleet = Fleet::live(hosts);
            let mut heard = vec![fleet.now; hosts as usize];
            let mut live = vec![true; hosts as usize];
            for _ in 0..400 {
                let host = rng.below(hosts);
                let index = host as usize;
                match rng.below(6) {
                    0 => {
                        if fleet.open(host, host, "boot").is_ok() {
                            heard[index] = fleet.now;
                        }
                    }
                    1 | 2 => {
                        if fleet.leases.beat(&uid(host), SessionId(host), fleet.now) {
                            heard[index] = fleet.now;
                        }
                    }
                    3 => fleet.leases.closed(&uid(host), SessionId(host)),
                    4 => fleet.now += Duration::from_millis(rng.below(4_000)),
                    _ => {
                        if let Some(at) = fleet.leases.poll_timeout() {
                            fleet.now = fleet.now.max(at);
                        }
                    }
                }
                fleet.leases.handle_timeout(fleet.now);
                for transition in fleet.drain() {
                    match transition {
                        Transition::Live(host) => {
                            let index = number(&host);
                            assert!(!live[index], "seed {seed}: live twice");
                            live[index] = true;
                        }
                        Transition::Stale(host) => {
                            let index = number(&host);
                            assert!(live[index], "seed {seed}: stale twice");
                            live[index] = false;
                            assert!(LEASE <= fleet.now - heard[index], "seed {seed}: too early");
                        }
                        Transition::Held { count, fleet } => {
                            assert!(0 < count && count <= fleet, "seed {seed}");
                        }
                        Transition::Released => (),
                    }
                }
                for host in 0..hosts {
                    let index = host as usize;
                    assert_eq!(fleet.leases.is_live(&uid(host)), live[index], "seed {seed}");
                    if fleet.now - heard[index] < LEASE {
                        assert!(live[index], "seed {seed}: heard, yet stale");
                    }
                }
            }
        }
    }

    struct Fleet {
        leases: Leases,
        start: Instant,
        now: Instant,
    }

    impl Fleet {
        fn live(hosts: u64) -> Self {
            let start = start();
            let leases = Leases::new(Settings::default(), [], [], start);
            let mut fleet = Self {
                leases,
                start,
                now: start,
            };
            for host in 0..hosts {
                assert_eq!(fleet.open(host, host, "boot"), Ok(None));
            }
            fleet.drain();
            fleet
        }

        fn open(
            &mut self,
            host: u64,
            session: u64,
            boot: &str,
        ) -> Result<Option<SessionId>, Cloned> {
            self.leases
                .opened(&uid(host), SessionId(session), boot, self.now)
        }

        fn advance(&mut self) -> Vec<Transition> {
            self.now = self.now.max(self.leases.poll_timeout().unwrap());
            self.leases.handle_timeout(self.now);
            self.drain()
        }

        fn drain(&mut self) -> Vec<Transition> {
            std::iter::from_fn(|| self.leases.poll_transition()).collect()
        }
    }

    fn uid(number: u64) -> HostUid {
        format!("{number:032x}").parse().unwrap()
    }

    fn number(host: &HostUid) -> usize {
        usize::from_str_radix(host.as_str(), 16).unwrap()
    }

    #[expect(
        clippy::disallowed_methods,
        reason = "a test needs one Instant to begin with"
    )]
    fn start() -> Instant {
        Instant::now()
    }
}
