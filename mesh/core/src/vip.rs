//! Which virtual address a service gets. Control allots, stores and never moves them.
//!
//! A service has the same offset in both ranges, so that one number names both addresses. An address that was
//! released keeps its owner's name as a tombstone for [`TOMBSTONE_S`]: a client that still holds it must not
//! reach another service, and a service that comes back gets it back. Fresh addresses are given out before
//! released ones.
//!
//! Invariant: no two services, living or within their tombstone, have an address in common.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::names::ServiceName;
use crate::policy::Cidr;
use crate::reason::Reason;
use crate::service::Vip;

/// How long a released address is not given to another service, in seconds: 30 days.
pub const TOMBSTONE_S: u64 = 30 * 24 * 3600;
/// The offset of the agents' own address on `mesh0`. Offset 0 is the network (and, for IPv6, the routers'
/// anycast address of RFC 4291 §2.6.1).
const OWN: u64 = 1;

/// The two ranges of a mesh. Both hold at least one address for a service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VipRanges {
    v4: Ipv4Addr,
    v6: Ipv6Addr,
    v4_prefix: u8,
    v6_prefix: u8,
    /// The last offset that both ranges have and no broadcast is.
    last: u64,
}

/// Why ranges can not be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RangeError {
    #[error("the range {0} is not IPv4; write it like 252.64.0.0/12")]
    NotV4(Cidr),
    #[error("the range {0} is not IPv6; write it like fd6d:6573:6800::/64")]
    NotV6(Cidr),
    #[error("the range {0} is too small for any service; use a prefix of at most /30 (IPv6: /126)")]
    TooSmall(Cidr),
    #[error("the range {0} has bits set behind its prefix; write its first address")]
    HostBits(Cidr),
}

impl VipRanges {
    pub fn new(v4: Cidr, v6: Cidr) -> Result<Self, RangeError> {
        let IpAddr::V4(first4) = v4.address else {
            return Err(RangeError::NotV4(v4));
        };
        let IpAddr::V6(first6) = v6.address else {
            return Err(RangeError::NotV6(v6));
        };
        if 30 < v4.prefix {
            return Err(RangeError::TooSmall(v4));
        }
        if 126 < v6.prefix {
            return Err(RangeError::TooSmall(v6));
        }
        let size4 = 1_u64 << (32 - v4.prefix);
        let mask6 = u128::MAX.checked_shr(v6.prefix.into()).unwrap_or(0);
        if u64::from(first4.to_bits()) & (size4 - 1) != 0 {
            return Err(RangeError::HostBits(v4));
        }
        if first6.to_bits() & mask6 != 0 {
            return Err(RangeError::HostBits(v6));
        }
        let last6 = u64::try_from(mask6).unwrap_or(u64::MAX);
        Ok(Self {
            v4: first4,
            v6: first6,
            v4_prefix: v4.prefix,
            v6_prefix: v6.prefix,
            last: (size4 - 2).min(last6),
        })
    }

    pub fn v4(&self) -> Cidr {
        Cidr {
            address: self.v4.into(),
            prefix: self.v4_prefix,
        }
    }

    pub fn v6(&self) -> Cidr {
        Cidr {
            address: self.v6.into(),
            prefix: self.v6_prefix,
        }
    }

    /// The address that every agent has on `mesh0` itself.
    pub fn own(&self) -> Vip {
        self.vip(OWN)
    }

    pub fn contains(&self, address: IpAddr) -> bool {
        self.v4().contains(address) || self.v6().contains(address)
    }

    fn vip(&self, offset: u64) -> Vip {
        Vip {
            // The offset is at most `last`, which fits the smaller range.
            v4: Ipv4Addr::from_bits(self.v4.to_bits() | (offset as u32)),
            v6: Ipv6Addr::from_bits(self.v6.to_bits() | u128::from(offset)),
        }
    }

    /// The offsets that `vip` keeps from others: one, or two if it was allotted under other rules.
    fn offsets(&self, vip: Vip) -> impl Iterator<Item = u64> {
        let v4 = self
            .v4()
            .contains(vip.v4.into())
            .then(|| u64::from(vip.v4.to_bits() ^ self.v4.to_bits()));
        let v6 = self
            .v6()
            .contains(vip.v6.into())
            .then(|| u64::try_from(vip.v6.to_bits() ^ self.v6.to_bits()).ok())
            .flatten();
        let last = self.last;
        let second = v6.filter(|_| v4 != v6);
        v4.into_iter().chain(second).filter(move |o| *o <= last)
    }
}

impl Default for VipRanges {
    /// 252.64.0.0/12 and fd6d:6573:6800::/64: in no use by others, and apart from the ranges of other meshes.
    fn default() -> Self {
        Self {
            v4: Ipv4Addr::new(252, 64, 0, 0),
            v6: Ipv6Addr::new(0xfd6d, 0x6573, 0x6800, 0, 0, 0, 0, 0),
            v4_prefix: 12,
            v6_prefix: 64,
            last: (1 << 20) - 2,
        }
    }
}

/// A released address, as it is stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tombstone {
    pub name: ServiceName,
    pub vip: Vip,
    /// Unix time, seconds.
    pub released_s: u64,
}

/// What `allot` decided.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Allotted {
    pub vip: Vip,
    /// Whether the service had it already: nothing is to be stored.
    pub known: bool,
    /// The service whose tombstone is used up and is to be deleted from the store.
    pub used_up: Option<ServiceName>,
}

#[derive(Clone, Debug)]
pub struct Allocator {
    ranges: VipRanges,
    living: BTreeMap<ServiceName, Vip>,
    tombstones: BTreeMap<ServiceName, (Vip, u64)>,
    /// Tombstones by the time of their release.
    released: BTreeSet<(u64, ServiceName)>,
    /// Offsets that nobody has, as first → last of each gap.
    free: BTreeMap<u64, u64>,
}

impl Allocator {
    /// The allocator of a store. Of stored allocations that share an address the first keeps it; the names of
    /// the others are returned and they are to be allotted anew.
    pub fn new(
        ranges: VipRanges,
        living: impl IntoIterator<Item = (ServiceName, Vip)>,
        tombstones: impl IntoIterator<Item = Tombstone>,
    ) -> (Self, Vec<ServiceName>) {
        let mut allocator = Self {
            ranges,
            living: BTreeMap::new(),
            tombstones: BTreeMap::new(),
            released: BTreeSet::new(),
            free: BTreeMap::from([(OWN + 1, ranges.last)]),
        };
        let mut conflicts = Vec::new();
        for (name, vip) in living {
            if allocator.take_offsets(vip) {
                allocator.living.insert(name, vip);
            } else {
                conflicts.push(name);
            }
        }
        for tombstone in tombstones {
            let known = allocator.living.contains_key(&tombstone.name)
                || allocator.tombstones.contains_key(&tombstone.name);
            if !known && allocator.take_offsets(tombstone.vip) {
                allocator.bury(tombstone.name, tombstone.vip, tombstone.released_s);
            }
        }
        (allocator, conflicts)
    }

    /// The address of `name`: the one it has, the one it had, a fresh one, or the one that was released
    /// longest ago, if its tombstone is over.
    pub fn allot(&mut self, name: &ServiceName, now_s: u64) -> Result<Allotted, Reason> {
        if let Some(vip) = self.living.get(name) {
            return Ok(Allotted {
                vip: *vip,
                known: true,
                used_up: None,
            });
        }
        let (vip, used_up) = if let Some(vip) = self.exhume(name) {
            (vip, Some(name.clone()))
        } else if let Some((first, last)) = self.free.pop_first() {
            if first < last {
                self.free.insert(first + 1, last);
            }
            (self.ranges.vip(first), None)
        } else {
            let (released_s, oldest) = self.released.first().ok_or(Reason::VipExhausted)?;
            // A clock that went back makes it later, never earlier.
            if now_s.saturating_sub(*released_s) < TOMBSTONE_S {
                return Err(Reason::VipExhausted);
            }
            let oldest = oldest.clone();
            let vip = self.exhume(&oldest).ok_or(Reason::VipExhausted)?;
            (vip, Some(oldest))
        };
        self.living.insert(name.clone(), vip);
        Ok(Allotted {
            vip,
            known: false,
            used_up,
        })
    }

    /// The service is gone. Returns the tombstone to be stored; `None` if it had no address.
    pub fn release(&mut self, name: &ServiceName, now_s: u64) -> Option<Tombstone> {
        let vip = self.living.remove(name)?;
        self.bury(name.clone(), vip, now_s);
        Some(Tombstone {
            name: name.clone(),
            vip,
            released_s: now_s,
        })
    }

    pub fn get(&self, name: &ServiceName) -> Option<Vip> {
        self.living.get(name).copied()
    }

    pub fn ranges(&self) -> VipRanges {
        self.ranges
    }

    fn bury(&mut self, name: ServiceName, vip: Vip, released_s: u64) {
        self.released.insert((released_s, name.clone()));
        self.tombstones.insert(name, (vip, released_s));
    }

    fn exhume(&mut self, name: &ServiceName) -> Option<Vip> {
        let (vip, released_s) = self.tombstones.remove(name)?;
        self.released.remove(&(released_s, name.clone()));
        Some(vip)
    }

    /// Takes the offsets of a stored address out of the free ones; false, and nothing taken, if one of them
    /// has an owner already. An address of other ranges, from before they were changed, takes none.
    fn take_offsets(&mut self, vip: Vip) -> bool {
        let ranges = self.ranges;
        let all_free = ranges.offsets(vip).all(|o| self.gap_of(o).is_some());
        if all_free {
            ranges.offsets(vip).for_each(|offset| self.take(offset));
        }
        all_free
    }

    fn gap_of(&self, offset: u64) -> Option<(u64, u64)> {
        let (first, last) = self.free.range(..=offset).next_back()?;
        (offset <= *last).then_some((*first, *last))
    }

    fn take(&mut self, offset: u64) {
        let Some((first, last)) = self.gap_of(offset) else {
            return;
        };
        self.free.remove(&first);
        if first < offset {
            self.free.insert(first, offset - 1);
        }
        if offset < last {
            self.free.insert(offset + 1, last);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    const DAY: u64 = 24 * 3600;

    #[test]
    fn ranges_are_checked() {
        let new =
            |v4: &str, v6: &str| VipRanges::new(Cidr::parse(v4).unwrap(), Cidr::parse(v6).unwrap());
        let standard = new("252.64.0.0/12", "fd6d:6573:6800::/64").unwrap();
        assert_eq!(standard, VipRanges::default());
        assert_eq!(standard.own().v4, Ipv4Addr::new(252, 64, 0, 1));
        assert!(standard.contains("252.79.255.255".parse().unwrap()));
        assert!(!standard.contains("252.80.0.0".parse().unwrap()));
        for (v4, v6) in [
            ("252.64.0.0/31", "fd00::/64"),
            ("252.64.0.0/12", "fd00::/127"),
            ("fd00::/64", "fd00::/64"),
            ("252.64.0.0/12", "252.64.0.0/12"),
            ("252.64.0.1/12", "fd00::/64"),
            ("252.64.0.0/12", "fd00::1/64"),
        ] {
            assert!(new(v4, v6).is_err(), "{v4} {v6}");
        }
        assert!(new("0.0.0.0/0", "::/0").is_ok());
    }

    #[test]
    fn both_addresses_have_one_offset_and_stay() {
        let mut allocator = allocator(VipRanges::default());
        let first = allocator.allot(&name(1), 0).unwrap();
        assert_eq!(first.vip.v4, Ipv4Addr::new(252, 64, 0, 2));
        assert_eq!(
            first.vip.v6,
            "fd6d:6573:6800::2".parse::<Ipv6Addr>().unwrap()
        );
        let again = allocator.allot(&name(1), DAY).unwrap();
        assert!(again.known);
        assert_eq!(again.vip, first.vip);
        assert_eq!(
            allocator.allot(&name(2), 0).unwrap().vip.v4,
            Ipv4Addr::new(252, 64, 0, 3)
        );
    }

    #[test]
    fn the_network_the_agents_and_the_broadcast_address_are_never_given() {
        let mut allocator = allocator(tiny());
        let given: Vec<Ipv4Addr> = (0..5)
            .map(|n| allocator.allot(&name(n), 0).unwrap().vip.v4)
            .collect();
        let expected: Vec<Ipv4Addr> = (2..7).map(|n| Ipv4Addr::new(252, 0, 0, n)).collect();
        assert_eq!(given, expected);
        assert_eq!(allocator.allot(&name(9), 0), Err(Reason::VipExhausted));
    }

    #[test]
    fn a_released_address_rests_thirty_days_and_returns_to_its_owner() {
        let mut allocator = allocator(tiny());
        for n in 0..5 {
            allocator.allot(&name(n), 0).unwrap();
        }
        let tombstone = allocator.release(&name(3), DAY).unwrap();
        assert_eq!(
            allocator.allot(&name(9), 30 * DAY),
            Err(Reason::VipExhausted)
        );
        let back = allocator.allot(&name(3), 30 * DAY).unwrap();
        assert_eq!((back.vip, back.used_up), (tombstone.vip, Some(name(3))));
        allocator.release(&name(3), DAY).unwrap();
        let taken = allocator.allot(&name(9), 31 * DAY).unwrap();
        assert_eq!((taken.vip, taken.used_up), (tombstone.vip, Some(name(3))));
        assert_eq!(
            allocator.allot(&name(3), 31 * DAY),
            Err(Reason::VipExhausted)
        );
    }

    #[test]
    fn a_clock_that_went_back_gives_nothing_out_early() {
        let mut allocator = allocator(tiny());
        for n in 0..5 {
            allocator.allot(&name(n), 0).unwrap();
        }
        allocator.release(&name(0), 100 * DAY).unwrap();
        assert_eq!(allocator.allot(&name(9), 0), Err(Reason::VipExhausted));
    }

    #[test]
    fn what_is_stored_stands_and_doubles_are_named() {
        let ranges = VipRanges::default();
        let foreign = Vip {
            v4: Ipv4Addr::new(10, 0, 0, 1),
            v6: Ipv6Addr::LOCALHOST,
        };
        let stored = [
            (name(1), ranges.vip(2)),
            (name(2), ranges.vip(4)),
            (name(3), ranges.vip(4)),
            (name(4), ranges.own()),
            (name(5), foreign),
        ];
        let tombstone = Tombstone {
            name: name(6),
            vip: ranges.vip(3),
            released_s: 0,
        };
        let (mut allocator, conflicts) = Allocator::new(ranges, stored, [tombstone]);
        assert_eq!(conflicts, [name(3), name(4)]);
        assert_eq!(allocator.get(&name(5)), Some(foreign));
        assert_eq!(allocator.allot(&name(3), 0).unwrap().vip, ranges.vip(5));
        assert_eq!(allocator.allot(&name(6), 0).unwrap().vip, ranges.vip(3));
    }

    /// The goal: no address has two owners, living or resting, also across restarts, and one that has an
    /// address keeps it. Method: a seeded random walk in a tiny range; at times the allocator is made anew
    /// from what a store would hold.
    #[test]
    fn no_address_has_two_owners() {
        for seed in 0..300 {
            let mut rng = Rng::new(seed);
            let mut allocator = allocator(tiny());
            let mut now = 0;
            let mut living: BTreeMap<ServiceName, Vip> = BTreeMap::new();
            let mut tombstones: BTreeMap<ServiceName, Tombstone> = BTreeMap::new();
            for _ in 0..300 {
                let service = name(rng.below(9));
                match rng.below(5) {
                    0 | 1 => {
                        if let Ok(allotted) = allocator.allot(&service, now) {
                            if let Some(old) = &allotted.used_up {
                                let old = tombstones.remove(old).unwrap();
                                let rested = TOMBSTONE_S <= now - old.released_s;
                                assert!(rested || old.name == service, "seed {seed}: too early");
                            }
                            let before = living.insert(service, allotted.vip);
                            assert_eq!(before.is_some(), allotted.known, "seed {seed}");
                            assert!(
                                before.is_none_or(|b| b == allotted.vip),
                                "seed {seed}: moved"
                            );
                        }
                    }
                    2 => {
                        if let Some(tombstone) = allocator.release(&service, now) {
                            living.remove(&service);
                            tombstones.insert(service, tombstone);
                        }
                    }
                    3 => now += rng.below(10) * DAY,
                    _ => {
                        let (again, conflicts) =
                            Allocator::new(tiny(), living.clone(), tombstones.values().cloned());
                        assert_eq!(conflicts, [], "seed {seed}");
                        allocator = again;
                    }
                }
                let owned = living.values().chain(tombstones.values().map(|t| &t.vip));
                let unique: BTreeSet<&Vip> = owned.clone().collect();
                assert_eq!(unique.len(), owned.count(), "seed {seed}: two owners");
            }
        }
    }

    fn allocator(ranges: VipRanges) -> Allocator {
        Allocator::new(ranges, [], []).0
    }

    /// Five addresses for services.
    fn tiny() -> VipRanges {
        let (v4, v6) = ("252.0.0.0/29", "fd00::/64");
        VipRanges::new(Cidr::parse(v4).unwrap(), Cidr::parse(v6).unwrap()).unwrap()
    }

    fn name(n: u64) -> ServiceName {
        ServiceName::parse(&format!("shop/s{n}")).unwrap()
    }
}
