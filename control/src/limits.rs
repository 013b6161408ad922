//! Slows down who guesses, asks or is refused too often: for a while there is no answer. Others notice nothing.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use mesh_core::names::HostUid;
use mesh_core::reason::Reason;

use crate::refusal::Refusal;

/// Who is remembered of each kind. When it is full, who was slowed down longest ago is forgotten.
const KNOWN_MAX: usize = 4096;

/// So many at once, and one more after each `refill`.
#[derive(Debug)]
pub(crate) struct Pace<K> {
    burst: u32,
    refill: Duration,
    /// What each did, as the moment when all of it is forgiven. Held for a look-up only.
    forgiven_at: Mutex<BTreeMap<K, Instant>>,
}

impl<K: Ord + Clone> Pace<K> {
    pub(crate) fn new(burst: u32, refill: Duration) -> Self {
        Self {
            burst,
            refill,
            forgiven_at: Mutex::default(),
        }
    }

    fn has_room(&self, who: &K, now: Instant) -> bool {
        let table = self.forgiven_at.lock();
        let table = table.unwrap_or_else(PoisonError::into_inner);
        let at = table.get(who);
        at.is_none_or(|at| at.saturating_duration_since(now) < self.refill * self.burst)
    }

    fn note(&self, who: K, count: u32, now: Instant) {
        let table = self.forgiven_at.lock();
        let mut table = table.unwrap_or_else(PoisonError::into_inner);
        if KNOWN_MAX <= table.len() {
            table.retain(|_, at| now < *at);
        }
        if KNOWN_MAX <= table.len()
            && let Some(oldest) = table.iter().min_by_key(|(_, at)| **at)
        {
            let oldest = oldest.0.clone();
            table.remove(&oldest);
        }
        let at = table.entry(who).or_insert(now);
        *at = (*at).max(now) + self.refill * count;
    }

    /// Takes so many, if there is room for one.
    pub(crate) fn take(&self, who: K, count: u32, now: Instant) -> bool {
        let room = self.has_room(&who, now);
        if room {
            self.note(who, count, now);
        }
        room
    }
}

#[derive(Debug)]
pub(crate) struct Limits {
    failures: Pace<IpAddr>,
    questions: Pace<HostUid>,
    leaves: Pace<HostUid>,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            // More than a person mistypes. Success costs nothing.
            failures: Pace::new(30, Duration::from_secs(2)),
            // More than people ask by `mesh-agent explain`; each reads the policies of a service.
            questions: Pace::new(60, Duration::from_secs(1)),
            // All leaves of the largest host eight times over; they are due every 16 hours.
            leaves: Pace::new(2_048, Duration::from_secs(1)),
        }
    }
}

impl Limits {
    /// Refuses an address that failed too often.
    pub(crate) fn check(&self, address: IpAddr, now: Instant) -> Result<(), Refusal> {
        if self.failures.has_room(&key(address), now) {
            return Ok(());
        }
        Err(Reason::RateLimited.into())
    }

    pub(crate) fn failed(&self, address: IpAddr, now: Instant) {
        self.failures.note(key(address), 1, now);
    }

    /// Refuses a host that asks too often.
    pub(crate) fn question(&self, host: &HostUid, now: Instant) -> Result<(), Refusal> {
        if self.questions.take(host.clone(), 1, now) {
            return Ok(());
        }
        let message = "this host asks too often what policies say; wait a second";
        Err(Refusal::new(Reason::RateLimited, message))
    }

    /// Refuses a host that asks for certificates without end; `count` are asked for now.
    pub(crate) fn leaves(&self, host: &HostUid, count: usize, now: Instant) -> Result<(), Refusal> {
        let count = u32::try_from(count).unwrap_or(u32::MAX);
        if self.leaves.take(host.clone(), count, now) {
            return Ok(());
        }
        let message = "this host asks for more certificates than it can need; wait a minute";
        Err(Refusal::new(Reason::RateLimited, message))
    }
}

/// One customer has a whole /64 of IPv6.
pub(crate) fn key(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => IpAddr::V6(Ipv6Addr::from_bits(v6.to_bits() >> 64 << 64)),
        v4 => v4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_fails_too_often_waits_and_others_do_not() {
        let limits = Limits::default();
        let now = Instant::now();
        let guesser: IpAddr = "fd00::1".parse().unwrap();
        for _ in 0..limits.failures.burst {
            assert!(limits.check(guesser, now).is_ok());
            limits.failed(guesser, now);
        }
        let neighbour = "fd00::2".parse().unwrap();
        let refusal = limits.check(neighbour, now).unwrap_err();
        assert_eq!(refusal.reason, Reason::RateLimited);
        assert!(limits.check("fd00:1::1".parse().unwrap(), now).is_ok());
        let refill = limits.failures.refill;
        assert!(limits.check(guesser, now + refill).is_ok());
        for n in 0..10_000_u32 {
            limits.failed(IpAddr::V4(n.into()), now);
        }
        assert!(limits.failures.forgiven_at.lock().unwrap().len() <= KNOWN_MAX);
    }

    #[test]
    fn who_asks_too_often_waits_too() {
        let limits = Limits::default();
        let now = Instant::now();
        let uid = |n: u8| -> HostUid { format!("{n:032x}").parse().unwrap() };
        for _ in 0..limits.questions.burst {
            limits.question(&uid(1), now).unwrap();
        }
        // Asking in vain makes it no longer.
        for _ in 0..3 {
            let refusal = limits.question(&uid(1), now).unwrap_err();
            assert_eq!(refusal.reason, Reason::RateLimited);
        }
        limits.question(&uid(2), now).unwrap();
        for _ in 0..8 {
            limits.leaves(&uid(1), 256, now).unwrap();
        }
        assert!(limits.leaves(&uid(1), 1, now).is_err());
        limits.leaves(&uid(2), 256, now).unwrap();
        limits
            .question(&uid(1), now + limits.questions.refill)
            .unwrap();
    }
}
