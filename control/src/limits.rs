//! Slows down who guesses: an address that failed too often waits. Success costs nothing.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use mesh_core::reason::Reason;

use crate::refusal::Refusal;

/// Failures in a row before an address waits: more than a person mistypes.
const BURST: u32 = 30;
/// One more failure is allowed after each of these.
const REFILL: Duration = Duration::from_secs(2);
/// Addresses that are remembered. When it is full, who failed longest ago is forgotten.
const ADDRESSES_MAX: usize = 4096;

/// The failures of each address, as the moment when all of them are forgiven.
#[derive(Debug, Default)]
pub(crate) struct Limits {
    /// Held for a look-up only.
    forgiven_at: Mutex<BTreeMap<IpAddr, Instant>>,
}

impl Limits {
    /// Refuses an address that failed too often.
    pub(crate) fn check(&self, address: IpAddr, now: Instant) -> Result<(), Refusal> {
        let table = self.forgiven_at.lock();
        let table = table.unwrap_or_else(PoisonError::into_inner);
        match table.get(&key(address)) {
            Some(at) if REFILL * BURST <= at.saturating_duration_since(now) => {
                Err(Reason::RateLimited.into())
            }
            _ => Ok(()),
        }
    }

    pub(crate) fn failed(&self, address: IpAddr, now: Instant) {
        let table = self.forgiven_at.lock();
        let mut table = table.unwrap_or_else(PoisonError::into_inner);
        if ADDRESSES_MAX <= table.len() {
            table.retain(|_, at| now < *at);
        }
        if ADDRESSES_MAX <= table.len()
            && let Some(oldest) = table.iter().min_by_key(|(_, at)| **at).map(|(a, _)| *a)
        {
            table.remove(&oldest);
        }
        let at = table.entry(key(address)).or_insert(now);
        *at = (*at).max(now) + REFILL;
    }
}

/// One customer has a whole /64 of IPv6.
fn key(address: IpAddr) -> IpAddr {
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
        for _ in 0..BURST {
            assert!(limits.check(guesser, now).is_ok());
            limits.failed(guesser, now);
        }
        let neighbour = "fd00::2".parse().unwrap();
        let refusal = limits.check(neighbour, now).unwrap_err();
        assert_eq!(refusal.reason, Reason::RateLimited);
        assert!(limits.check("fd00:1::1".parse().unwrap(), now).is_ok());
        assert!(limits.check(guesser, now + REFILL).is_ok());
        for n in 0..10_000_u32 {
            limits.failed(IpAddr::V4(n.into()), now);
        }
        assert!(limits.forgiven_at.lock().unwrap().len() <= ADDRESSES_MAX);
    }
}
