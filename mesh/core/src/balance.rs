//! Which endpoint a call goes to: power of two choices over peak EWMA latency, and passive ejection.
//!
//! Of two endpoints taken by chance the one with the smaller load is picked. The load is the endpoint's
//! latency, remembered so that a rise counts at once and a fall slowly (a peak-sensitive moving average, as
//! Finagle introduced it), times the calls it has to answer, this one included.
//!
//! An endpoint that fails [`FAILURES_MAX`] times in a row is ejected; after a backoff one call at a time is
//! let through as a probe. Stale endpoints, and then ejected ones, are tried when nothing better is left.
//!
//! Invariant: as long as one endpoint is not excluded by the caller, one is picked.

use std::time::{Duration, Instant};

use crate::rng::Rng;
use crate::service::Health;

/// Endpoints of one service that are kept. More than control lists for any service.
pub const ENDPOINTS_MAX: usize = 10_000;
/// Consecutive failures that eject: enough that one bad connection or one restart does not.
pub const FAILURES_MAX: u32 = 5;
/// First and longest time without a probe.
pub const EJECTED_MIN: Duration = Duration::from_secs(1);
pub const EJECTED_MAX: Duration = Duration::from_secs(60);
/// Over this time a remembered latency loses most of its weight.
pub const DECAY: Duration = Duration::from_secs(10);
/// What an endpoint is thought to need while its first calls are under way, and at least after a failure:
/// one that fails fast must not look fast.
pub const LATENCY_UNKNOWN: Duration = Duration::from_secs(1);
/// Draws by chance before all endpoints are looked at. Only where most are ejected or stale are more needed.
const DRAWS: usize = 4;

/// How a call ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It was answered; `latency` until the first byte of the answer, or until the connection stood.
    Success { latency: Duration },
    /// The endpoint failed it.
    Failure,
    /// The caller gave it up: says nothing about the endpoint.
    Cancelled,
}

/// The endpoints of one service, as one thread of an agent sees them.
#[derive(Debug)]
pub struct Balancer<K> {
    /// In the order of their keys.
    slots: Vec<Slot<K>>,
    /// No ejected endpoint may be probed before; `None` when none is ejected.
    probe_at: Option<Instant>,
}

#[derive(Debug)]
struct Slot<K> {
    key: K,
    health: Health,
    pending: u32,
    failures: u32,
    latency: Option<Latency>,
    standing: Standing,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Standing {
    Taken,
    Ejected {
        since: Instant,
        probe_at: Instant,
        backoff: Duration,
    },
    /// A probe is under way.
    Probing {
        since: Instant,
        backoff: Duration,
    },
}

/// A latency that rises at once and falls slowly.
#[derive(Clone, Copy, Debug)]
struct Latency {
    seconds: f64,
    at: Instant,
}

impl<K: Ord + Clone> Default for Balancer<K> {
    fn default() -> Self {
        Self::new()
    }
}

impl<K: Ord + Clone> Balancer<K> {
    pub const fn new() -> Self {
        Self {
            slots: Vec::new(),
            probe_at: None,
        }
    }

    /// Replaces the set of endpoints; what is known of those that stay is kept. Returns how many were too
    /// many and are not used.
    pub fn update(&mut self, endpoints: impl IntoIterator<Item = (K, Health)>) -> usize {
        let mut wanted: Vec<(K, Health)> = endpoints.into_iter().collect();
        wanted.sort_by(|(a, _), (b, _)| a.cmp(b));
        wanted.dedup_by(|(a, _), (b, _)| a == b);
        let dropped = wanted.len().saturating_sub(ENDPOINTS_MAX);
        wanted.truncate(ENDPOINTS_MAX);
        let mut old = std::mem::take(&mut self.slots).into_iter().peekable();
        for (key, health) in wanted {
            while old.next_if(|slot| slot.key < key).is_some() {}
            let slot = match old.next_if(|slot| slot.key == key) {
                Some(slot) => Slot { health, ..slot },
                None => Slot::new(key, health),
            };
            self.slots.push(slot);
        }
        self.refresh_probe();
        dropped
    }

    /// The endpoint for the next call, other than `exclude` (those that this call tried already). The
    /// caller says [`Self::started`] and later [`Self::finished`], or nothing if it does not call.
    pub fn pick(&self, now: Instant, rng: &mut Rng, exclude: &[K]) -> Option<K> {
        let slot = self
            .due_probe(now, exclude)
            .or_else(|| self.of_two(now, rng, exclude))
            .or_else(|| self.of_all(now, rng, exclude, Health::Healthy))
            .or_else(|| self.of_all(now, rng, exclude, Health::Stale))
            .or_else(|| self.least_recently_ejected(exclude))?;
        Some(slot.key.clone())
    }

    pub fn started(&mut self, key: &K, now: Instant) {
        let Some(slot) = self.slot(key) else { return };
        slot.pending = slot.pending.saturating_add(1);
        if let Standing::Ejected {
            since,
            probe_at,
            backoff,
        } = slot.standing
            && probe_at <= now
        {
            slot.standing = Standing::Probing { since, backoff };
            self.refresh_probe();
        }
    }

    pub fn finished(&mut self, key: &K, now: Instant, outcome: Outcome) {
        let Some(slot) = self.slot(key) else { return };
        slot.pending = slot.pending.saturating_sub(1);
        let before = slot.standing;
        match outcome {
            Outcome::Success { latency } => {
                slot.observe(latency, now);
                slot.failures = 0;
                slot.standing = Standing::Taken;
            }
            Outcome::Failure => slot.fail(now),
            Outcome::Cancelled => {
                if let Standing::Probing { since, backoff } = slot.standing {
                    slot.standing = Standing::Ejected {
                        since,
                        probe_at: now,
                        backoff,
                    };
                }
            }
        }
        if slot.standing != before {
            self.refresh_probe();
        }
    }

    pub fn len(&self) -> usize {
        self.slots.len()
    }

    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// The first endpoint that is meant, whatever is known of it.
    pub fn find(&self, is_meant: impl Fn(&K) -> bool) -> Option<&K> {
        let mut keys = self.slots.iter().map(|slot| &slot.key);
        keys.find(|key| is_meant(key))
    }

    pub fn contains(&self, key: &K) -> bool {
        self.position(key).is_some()
    }

    /// The endpoints that are ejected or being probed, for status and metrics.
    pub fn ejected(&self) -> impl Iterator<Item = &K> {
        let ejected = self.slots.iter().filter(|s| s.standing != Standing::Taken);
        ejected.map(|s| &s.key)
    }

    fn position(&self, key: &K) -> Option<usize> {
        self.slots.binary_search_by(|slot| slot.key.cmp(key)).ok()
    }

    fn slot(&mut self, key: &K) -> Option<&mut Slot<K>> {
        let index = self.position(key)?;
        self.slots.get_mut(index)
    }

    /// An ejected endpoint whose backoff is over goes first: by its latency it would never be picked.
    fn due_probe(&self, now: Instant, exclude: &[K]) -> Option<&Slot<K>> {
        if self.probe_at.is_none_or(|at| now < at) {
            return None;
        }
        let better = self.slots.iter().any(Slot::is_taken_and_healthy);
        self.slots
            .iter()
            .filter(|slot| slot.probe_due(now) && !exclude.contains(&slot.key))
            // A stale endpoint is not worth a call's risk while a healthy one answers.
            .find(|slot| slot.health == Health::Healthy || !better)
    }

    fn of_two(&self, now: Instant, rng: &mut Rng, exclude: &[K]) -> Option<&Slot<K>> {
        if self.slots.len() < 2 {
            return None;
        }
        let count = self.slots.len() as u64;
        for _ in 0..DRAWS {
            let first = rng.below(count);
            let second = (first + 1 + rng.below(count - 1)) % count;
            let (first, second) = (&self.slots[first as usize], &self.slots[second as usize]);
            let usable =
                |slot: &Slot<K>| slot.is_taken_and_healthy() && !exclude.contains(&slot.key);
            if usable(first) && usable(second) {
                return Some(first.lighter(second, now));
            }
        }
        None
    }

    /// Power of two choices among the usable ones, found by looking at each.
    fn of_all(
        &self,
        now: Instant,
        rng: &mut Rng,
        exclude: &[K],
        health: Health,
    ) -> Option<&Slot<K>> {
        let usable = || {
            self.slots.iter().filter(|slot| {
                slot.standing == Standing::Taken
                    && slot.health == health
                    && !exclude.contains(&slot.key)
            })
        };
        let count = usable().count() as u64;
        if count < 2 {
            return usable().next();
        }
        let first = rng.below(count);
        let second = (first + 1 + rng.below(count - 1)) % count;
        let (first, second) = (
            usable().nth(first as usize)?,
            usable().nth(second as usize)?,
        );
        Some(first.lighter(second, now))
    }

    fn least_recently_ejected(&self, exclude: &[K]) -> Option<&Slot<K>> {
        let candidates = self.slots.iter().filter(|s| !exclude.contains(&s.key));
        candidates.min_by_key(|slot| slot.ejected_since())
    }

    fn refresh_probe(&mut self) {
        self.probe_at = self
            .slots
            .iter()
            .filter_map(|slot| match slot.standing {
                Standing::Ejected { probe_at, .. } => Some(probe_at),
                Standing::Taken | Standing::Probing { .. } => None,
            })
            .min();
    }
}

impl<K> Slot<K> {
    const fn new(key: K, health: Health) -> Self {
        Self {
            key,
            health,
            pending: 0,
            failures: 0,
            latency: None,
            standing: Standing::Taken,
        }
    }

    fn is_taken_and_healthy(&self) -> bool {
        self.standing == Standing::Taken && self.health == Health::Healthy
    }

    fn probe_due(&self, now: Instant) -> bool {
        matches!(self.standing, Standing::Ejected { probe_at, .. } if probe_at <= now)
    }

    const fn ejected_since(&self) -> Option<Instant> {
        match self.standing {
            Standing::Taken => None,
            Standing::Ejected { since, .. } | Standing::Probing { since, .. } => Some(since),
        }
    }

    fn lighter<'a>(&'a self, other: &'a Self, now: Instant) -> &'a Self {
        if other.load(now) < self.load(now) {
            other
        } else {
            self
        }
    }

    fn load(&self, now: Instant) -> f64 {
        let seconds = match self.latency {
            // Idle for long: what was slow once may be tried again. With calls under way we learn from them.
            Some(latency) if self.pending == 0 => latency.seconds * weight(latency.at, now),
            Some(latency) => latency.seconds,
            // Never called: tried at once, by one call.
            None if self.pending == 0 => 0.0,
            None => LATENCY_UNKNOWN.as_secs_f64(),
        };
        seconds * (f64::from(self.pending) + 1.0)
    }

    fn observe(&mut self, latency: Duration, now: Instant) {
        let new = latency.as_secs_f64();
        let seconds = match self.latency {
            Some(old) if new < old.seconds => {
                let weight = weight(old.at, now);
                old.seconds * weight + new * (1.0 - weight)
            }
            Some(_) | None => new,
        };
        self.latency = Some(Latency { seconds, at: now });
    }

    fn fail(&mut self, now: Instant) {
        let seconds = self
            .latency
            .map_or(0.0, |l| l.seconds)
            .max(LATENCY_UNKNOWN.as_secs_f64());
        self.latency = Some(Latency { seconds, at: now });
        self.failures = self.failures.saturating_add(1);
        let ejected = |backoff: Duration| Standing::Ejected {
            since: now,
            probe_at: now + backoff,
            backoff,
        };
        self.standing = match self.standing {
            Standing::Taken if self.failures < FAILURES_MAX => Standing::Taken,
            Standing::Taken => ejected(EJECTED_MIN),
            Standing::Probing { backoff, .. } => ejected((backoff * 2).min(EJECTED_MAX)),
            // A call from before the ejection, or one that had no other choice: it becomes the most
            // recent, so that the next such call goes elsewhere.
            Standing::Ejected {
                probe_at, backoff, ..
            } => Standing::Ejected {
                since: now,
                probe_at,
                backoff,
            },
        };
    }
}

/// How much of what was observed at `then` still counts.
fn weight(then: Instant, now: Instant) -> f64 {
    let elapsed = now.saturating_duration_since(then);
    (-elapsed.as_secs_f64() / DECAY.as_secs_f64()).exp()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::{BTreeMap, BTreeSet};

    const FAST: Duration = Duration::from_millis(1);
    const SLOW: Duration = Duration::from_millis(100);

    #[test]
    fn nothing_to_pick_from_is_none() {
        let mut world = World::new(0);
        assert_eq!(world.pick(&[]), None);
        world.healthy(1);
        assert_eq!(world.pick(&[]), Some(0));
        assert_eq!(world.pick(&[0]), None);
    }

    #[test]
    fn a_slow_endpoint_gets_less() {
        let mut world = World::new(3);
        let mut calls = BTreeMap::new();
        for _ in 0..1_000 {
            let key = world.pick(&[]).unwrap();
            *calls.entry(key).or_insert(0) += 1;
            let latency = if key == 0 { SLOW } else { FAST };
            world.call(key, Outcome::Success { latency });
        }
        assert!(calls[&0] < 50, "{calls:?}");
        assert!(300 < calls[&1] && 300 < calls[&2], "{calls:?}");
    }

    #[test]
    fn calls_under_way_count() {
        let mut world = World::new(2);
        for key in [0, 1] {
            world.call(key, Outcome::Success { latency: FAST });
        }
        for _ in 0..9 {
            world.balancer.started(&0, world.now);
        }
        assert_eq!(world.pick(&[]), Some(1));
    }

    #[test]
    fn an_endpoint_that_was_slow_is_tried_again_after_idling() {
        let mut world = World::new(2);
        world.call(0, Outcome::Success { latency: SLOW });
        world.call(1, Outcome::Success { latency: FAST });
        assert_eq!(world.pick(&[]), Some(1));
        world.now += DECAY * 10;
        world.call(1, Outcome::Success { latency: FAST });
        assert_eq!(world.pick(&[]), Some(0));
    }

    #[test]
    fn failures_in_a_row_eject_and_a_success_between_does_not() {
        let mut world = World::new(2);
        for _ in 0..3 {
            for _ in 1..FAILURES_MAX {
                world.call(0, Outcome::Failure);
            }
            world.call(0, Outcome::Success { latency: FAST });
        }
        assert_eq!(world.ejected(), []);
        world.eject(0);
        assert_eq!(world.ejected(), [0]);
        for _ in 0..100 {
            assert_eq!(world.pick(&[]), Some(1));
        }
    }

    #[test]
    fn one_probe_at_a_time_and_its_outcome_decides() {
        let mut world = World::new(2);
        world.eject(0);
        let mut backoff = EJECTED_MIN;
        for _ in 0..8 {
            world.now += backoff - Duration::from_millis(1);
            assert_eq!(world.pick(&[]), Some(1), "before {backoff:?}");
            world.now += Duration::from_millis(1);
            assert_eq!(world.pick(&[]), Some(0), "after {backoff:?}");
            world.balancer.started(&0, world.now);
            for _ in 0..20 {
                assert_eq!(world.pick(&[]), Some(1), "a second probe");
            }
            world.balancer.finished(&0, world.now, Outcome::Failure);
            backoff = (backoff * 2).min(EJECTED_MAX);
        }
        assert_eq!(backoff, EJECTED_MAX);
        world.now += backoff;
        world.call(0, Outcome::Success { latency: FAST });
        assert_eq!(world.ejected(), []);
    }

    #[test]
    fn a_probe_that_was_given_up_is_repeated() {
        let mut world = World::new(2);
        world.eject(0);
        world.now += EJECTED_MIN;
        world.call(0, Outcome::Cancelled);
        assert_eq!(world.pick(&[]), Some(0));
    }

    #[test]
    fn when_all_are_ejected_they_take_turns() {
        let mut world = World::new(3);
        for key in [1, 2, 0] {
            world.now += FAST;
            world.eject(key);
        }
        for expected in [1, 2, 0, 1] {
            world.now += FAST;
            assert_eq!(world.pick(&[]), Some(expected));
            world.call(expected, Outcome::Failure);
        }
        assert_eq!(world.pick(&[2, 0]), Some(1));
    }

    #[test]
    fn stale_endpoints_serve_only_when_no_healthy_one_does() {
        let mut world = World::new(0);
        world
            .balancer
            .update([(0, Health::Stale), (1, Health::Healthy)]);
        for _ in 0..50 {
            assert_eq!(world.pick(&[]), Some(1));
        }
        assert_eq!(world.pick(&[1]), Some(0));
        world.eject(1);
        assert_eq!(world.pick(&[]), Some(0));
    }

    #[test]
    fn what_stays_is_kept_and_what_goes_is_forgotten() {
        let mut world = World::new(3);
        world.eject(0);
        world.eject(2);
        world.balancer.update([0, 1].map(|k| (k, Health::Healthy)));
        assert_eq!(world.ejected(), [0]);
        world.healthy(3);
        assert_eq!(world.ejected(), [0], "2 came back as a new one");
    }

    #[test]
    fn endpoints_are_bounded() {
        let mut world = World::new(0);
        let many = (0..ENDPOINTS_MAX as u64 + 5).map(|k| (k, Health::Healthy));
        assert_eq!(world.balancer.update(many), 5);
        assert_eq!(world.balancer.len(), ENDPOINTS_MAX);
    }

    /// The goal: whatever happens one endpoint is picked if one may be, never an excluded or unknown one, and
    /// an ejected one only as a probe or when there is nothing else. Method: a seeded random walk.
    #[test]
    fn one_is_always_picked_and_never_a_wrong_one() {
        for seed in 0..500 {
            let mut world = World::new(0);
            world.rng = Rng::new(seed);
            let mut known: BTreeMap<u64, Health> = BTreeMap::new();
            for _ in 0..300 {
                match world.rng.below(8) {
                    0 => {
                        known = (0..world.rng.below(8))
                            .map(|_| {
                                let stale = world.rng.below(4) == 0;
                                let health = if stale {
                                    Health::Stale
                                } else {
                                    Health::Healthy
                                };
                                (world.rng.below(10), health)
                            })
                            .collect();
                        world.balancer.update(known.clone());
                    }
                    1 => world.now += Duration::from_millis(world.rng.below(3_000)),
                    2 => {
                        let key = world.rng.below(10);
                        world.eject(key);
                    }
                    _ => world.checked_call(&known, seed),
                }
            }
        }
    }

    struct World {
        balancer: Balancer<u64>,
        rng: Rng,
        now: Instant,
    }

    impl World {
        #[expect(
            clippy::disallowed_methods,
            reason = "a test needs one Instant to begin with"
        )]
        fn new(endpoints: u64) -> Self {
            let mut world = Self {
                balancer: Balancer::new(),
                rng: Rng::new(1),
                now: Instant::now(),
            };
            world.healthy(endpoints);
            world
        }

        fn healthy(&mut self, endpoints: u64) {
            self.balancer
                .update((0..endpoints).map(|key| (key, Health::Healthy)));
        }

        fn pick(&mut self, exclude: &[u64]) -> Option<u64> {
            self.balancer.pick(self.now, &mut self.rng, exclude)
        }

        fn call(&mut self, key: u64, outcome: Outcome) {
            self.balancer.started(&key, self.now);
            self.balancer.finished(&key, self.now, outcome);
        }

        fn eject(&mut self, key: u64) {
            for _ in 0..FAILURES_MAX {
                self.call(key, Outcome::Failure);
            }
        }

        fn ejected(&self) -> Vec<u64> {
            self.balancer.ejected().copied().collect()
        }

        fn checked_call(&mut self, known: &BTreeMap<u64, Health>, seed: u64) {
            let exclude: Vec<u64> = (0..self.rng.below(4)).map(|_| self.rng.below(10)).collect();
            let allowed: BTreeSet<u64> = known
                .keys()
                .copied()
                .filter(|k| !exclude.contains(k))
                .collect();
            let Some(key) = self.pick(&exclude) else {
                assert!(allowed.is_empty(), "seed {seed}: none of {allowed:?}");
                return;
            };
            assert!(allowed.contains(&key), "seed {seed}: {key} is not allowed");
            let ejected: BTreeSet<u64> = self.ejected().into_iter().collect();
            let probe = self
                .balancer
                .slot(&key)
                .is_some_and(|slot| slot.probe_due(self.now));
            let free = allowed.iter().any(|k| !ejected.contains(k));
            assert!(
                !ejected.contains(&key) || probe || !free,
                "seed {seed}: {key} is ejected"
            );
            let outcome = match self.rng.below(5) {
                0 | 1 => Outcome::Failure,
                2 => Outcome::Cancelled,
                _ => Outcome::Success { latency: FAST },
            };
            self.call(key, outcome);
        }
    }
}
