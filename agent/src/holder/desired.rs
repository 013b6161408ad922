//! Checks what a worker wants: it is the less trusted one, and the holder writes for it what only it may write.

use std::collections::BTreeSet;
use std::net::IpAddr;

use thiserror::Error;

use mesh_core::policy::Cidr;

use super::protocol::{Desired, DesiredDoor, DesiredWorkload};
use crate::capture::containers::ADDRESSES_MAX;
use crate::capture::door::DoorPort;
use crate::capture::real::{REALS_MAX, Real};
use crate::capture::{NUMBER_MAX, VipRanges};

/// A unit has one directory, or one a slice; a glob of units later some more.
const CGROUPS_MAX: usize = 64;
/// Users of one workload.
const UIDS_MAX: usize = 64;
/// Elements of all maps together; one batch must hold them (see `capture::rules`).
const ELEMENTS_MAX: usize = 16_384;
const LABEL_MAX: usize = 255;
/// Ports with a door, and address ranges of all of them: one batch must hold them.
pub(crate) const DOORS_MAX: usize = 4_096;
pub(crate) const RANGES_MAX: usize = 16_384;
/// The inode of the cgroup tree's root: every process of the host.
const ROOT_CGROUP: u64 = 1;

/// Why a worker's wish is not fulfilled. The worker is at fault, or it and the holder were started with different
/// settings.
#[derive(Debug, Error, PartialEq, Eq)]
pub(super) enum DesiredError {
    #[error("{0} workloads are more than the 4095 that marks can tell apart")]
    TooMany(usize),
    #[error("workload number {number} {rule}")]
    Number { number: u16, rule: &'static str },
    #[error("the label of workload {number} must be unique, of 1 to 255 printable characters")]
    Label { number: u16 },
    #[error("cgroup {id} at level {level} of workload {number} {rule}")]
    Cgroup {
        number: u16,
        id: u64,
        level: u8,
        rule: &'static str,
    },
    #[error("user {uid} of workload {number} {rule}")]
    Uid {
        number: u16,
        uid: u32,
        rule: &'static str,
    },
    #[error("the address {address} of a container of workload {number} {rule}")]
    Address {
        number: u16,
        address: IpAddr,
        rule: &'static str,
    },
    #[error(
        "the workloads have more than 16384 cgroups, users and containers' addresses in all, or one has more than 64 of a kind"
    )]
    TooManyOwners,
    #[error("the input door of port {port} {rule}")]
    Door { port: u16, rule: &'static str },
    #[error("more than 4096 ports, or more than 16384 address ranges, have an input door")]
    TooManyDoors,
    #[error("more than 4096 real addresses are wanted, or one of them twice")]
    TooManyReals,
    #[error(
        "the mesh's virtual addresses are {wanted} now and the agent runs with {running}; restart the agent"
    )]
    Ranges { wanted: String, running: String },
}

/// True to its bounds, and without two workloads that claim the same.
pub(super) fn check(desired: &Desired, ranges: &VipRanges) -> Result<(), DesiredError> {
    let running = format!("{} and {}", ranges.v4, ranges.v6);
    match VipRanges::new(&desired.vip4, &desired.vip6) {
        Ok(wanted) if wanted == *ranges => {}
        _ => {
            let short = |text: &str| text.chars().take(64).collect::<String>();
            return Err(DesiredError::Ranges {
                wanted: format!("{} and {}", short(&desired.vip4), short(&desired.vip6)),
                running,
            });
        }
    }
    if desired.workloads.len() > usize::from(NUMBER_MAX) {
        return Err(DesiredError::TooMany(desired.workloads.len()));
    }
    let mut seen = Seen::default();
    for workload in &desired.workloads {
        check_workload(workload, &mut seen)?;
    }
    let elements = seen.cgroups.len() + seen.uids.len() + seen.addresses.len();
    if elements > ELEMENTS_MAX {
        return Err(DesiredError::TooManyOwners);
    }
    Ok(())
}

/// Reads the doors; ports in `keep_open` have none, whatever is wanted.
pub(super) fn doors(
    wanted: &[DesiredDoor],
    keep_open: &[u16],
) -> Result<Vec<DoorPort>, DesiredError> {
    let count = |door: &DesiredDoor| {
        door.open.len() + door.audited.len() + door.strict.as_ref().map_or(0, Vec::len)
    };
    if wanted.len() > DOORS_MAX || wanted.iter().map(count).sum::<usize>() > RANGES_MAX {
        return Err(DesiredError::TooManyDoors);
    }
    let mut ports = BTreeSet::new();
    let mut doors = Vec::with_capacity(wanted.len());
    for door in wanted {
        let port = door.port;
        if port == 0 || !ports.insert(port) {
            let rule = "comes twice, or is of no port";
            return Err(DesiredError::Door { port, rule });
        }
        let ranges = |texts: &[String]| {
            let ranges = texts.iter().map(|text| Cidr::parse(text));
            let rule = "has an address range that is none";
            ranges
                .collect::<Option<Vec<_>>>()
                .ok_or(DesiredError::Door { port, rule })
        };
        let door = DoorPort {
            port,
            open: ranges(&door.open)?,
            audited: ranges(&door.audited)?,
            strict: door.strict.as_deref().map(ranges).transpose()?,
        };
        if !keep_open.contains(&port) {
            doors.push(door);
        }
    }
    Ok(doors)
}

/// Whether one batch holds them.
pub(super) fn bound(doors: &[DoorPort]) -> Result<(), DesiredError> {
    let count = |door: &DoorPort| {
        door.open.len() + door.audited.len() + door.strict.as_ref().map_or(0, Vec::len)
    };
    if doors.len() > DOORS_MAX || doors.iter().map(count).sum::<usize>() > RANGES_MAX {
        return Err(DesiredError::TooManyDoors);
    }
    Ok(())
}

/// Checks real addresses. What must never be taken over is left out, whatever is wanted.
pub(super) fn reals(
    wanted: &[Real],
    keep_open: &[u16],
    ranges: &VipRanges,
) -> Result<Vec<Real>, DesiredError> {
    let mut seen = BTreeSet::new();
    let new = |real: &Real| seen.insert((real.address, real.port));
    if wanted.len() > REALS_MAX || !wanted.iter().all(new) {
        return Err(DesiredError::TooManyReals);
    }
    let wanted = wanted.iter().filter(|r| r.may_be(keep_open, ranges));
    Ok(wanted.cloned().collect())
}

#[derive(Default)]
struct Seen<'a> {
    numbers: BTreeSet<u16>,
    labels: BTreeSet<&'a str>,
    cgroups: BTreeSet<u64>,
    uids: BTreeSet<u32>,
    addresses: BTreeSet<IpAddr>,
}

fn check_workload<'a>(
    workload: &'a DesiredWorkload,
    seen: &mut Seen<'a>,
) -> Result<(), DesiredError> {
    let number = workload.number;
    let wrong_number = |rule| Err(DesiredError::Number { number, rule });
    if !(1..=NUMBER_MAX).contains(&number) {
        return wrong_number("is not 1 to 4095");
    }
    if !seen.numbers.insert(number) {
        return wrong_number("comes twice");
    }
    let label = workload.label.as_str();
    let printable = !label.is_empty() && !label.chars().any(char::is_control);
    if !printable || label.len() > LABEL_MAX || !seen.labels.insert(label) {
        return Err(DesiredError::Label { number });
    }
    if workload.cgroups.len() > CGROUPS_MAX
        || workload.uids.len() > UIDS_MAX
        || workload.addresses.len() > ADDRESSES_MAX
    {
        return Err(DesiredError::TooManyOwners);
    }
    for cgroup in &workload.cgroups {
        let rule = if cgroup.id <= ROOT_CGROUP || cgroup.level == 0 {
            "is the root or none"
        } else if !seen.cgroups.insert(cgroup.id) {
            "belongs to another workload too"
        } else {
            continue;
        };
        let (id, level) = (cgroup.id, cgroup.level);
        return Err(DesiredError::Cgroup {
            number,
            id,
            level,
            rule,
        });
    }
    for uid in workload.uids.iter().copied() {
        let rule = if uid == u32::MAX {
            "is no user"
        } else if uid == 0 && !workload.root {
            "is root, which the workload does not name"
        } else if !seen.uids.insert(uid) {
            "belongs to another workload too"
        } else {
            continue;
        };
        return Err(DesiredError::Uid { number, uid, rule });
    }
    for address in workload.addresses.iter().copied() {
        let rule = if address.is_unspecified() || address.is_loopback() || address.is_multicast() {
            "is nobody's"
        } else if !seen.addresses.insert(address) {
            "belongs to another workload too"
        } else {
            continue;
        };
        return Err(DesiredError::Address {
            number,
            address,
            rule,
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::capture::CgroupRef;

    fn workload(number: u16) -> DesiredWorkload {
        DesiredWorkload {
            number,
            label: format!("w{number}"),
            cgroups: vec![CgroupRef {
                id: 100 + u64::from(number),
                level: 2,
            }],
            uids: vec![1_000 + u32::from(number)],
            addresses: vec![[10, 88, (number >> 8) as u8, number as u8].into()],
            root: false,
        }
    }

    fn running() -> VipRanges {
        VipRanges::new("252.64.0.0/16", "fd6d::/64").unwrap()
    }

    fn outcome(workloads: Vec<DesiredWorkload>) -> Result<(), DesiredError> {
        let ranges = running();
        let desired = Desired {
            generation: 1,
            workloads,
            doors: None,
            kept_doors: vec![],
            reals: None,
            vip4: "252.64.0.0/16".to_owned(),
            vip6: "fd6d::/64".to_owned(),
        };
        check(&desired, &ranges)
    }

    #[test]
    fn honest_wishes_pass_up_to_the_bound() {
        assert_eq!(outcome(vec![]), Ok(()));
        assert_eq!(outcome((1..=NUMBER_MAX).map(workload).collect()), Ok(()));
        let mut root = workload(1);
        root.uids = vec![0];
        root.root = true;
        assert_eq!(outcome(vec![root]), Ok(()));
    }

    #[test]
    fn doors_are_read_and_bounded_and_some_ports_stay_open() {
        let door = |port, open: &str| DesiredDoor {
            port,
            open: vec![open.to_owned()],
            strict: Some(vec!["fd00::/8".to_owned()]),
            ..DesiredDoor::default()
        };
        let read = doors(&[door(80, "10.0.0.0/8"), door(22, "::/0")], &[22]).unwrap();
        let [only] = &read[..] else {
            panic!("{read:?}");
        };
        assert_eq!((only.port, only.open.len()), (80, 1));
        assert!(doors(&[door(80, "10.0.0.0/8"), door(80, "::/0")], &[]).is_err());
        assert!(doors(&[door(0, "10.0.0.0/8")], &[]).is_err());
        assert!(doors(&[door(80, "10.0.0.0")], &[]).is_err());
        let many: Vec<_> = (1..=4_097).map(|port| door(port, "::/0")).collect();
        assert_eq!(doors(&many, &[]), Err(DesiredError::TooManyDoors));
    }

    #[test]
    fn real_addresses_are_bounded_and_some_are_never_taken() {
        let real = |last: u8, port| Real {
            address: [10, 0, 0, last].into(),
            port,
            strict: true,
        };
        let ranges = running();
        let read = reals(&[real(1, 80), real(1, 22), real(2, 53)], &[22], &ranges);
        assert_eq!(read, Ok(vec![real(1, 80)]));
        let twice = [real(1, 80), real(1, 80)];
        assert!(reals(&twice, &[], &ranges).is_err());
        let many: Vec<_> = (1..=4_097).map(|port| real(1, port)).collect();
        assert_eq!(reals(&many, &[], &ranges), Err(DesiredError::TooManyReals));
    }

    #[test]
    fn each_field_is_bounded() {
        let refused = |change: fn(&mut DesiredWorkload)| {
            let mut second = workload(2);
            change(&mut second);
            outcome(vec![workload(1), second]).is_err()
        };
        assert!(refused(|w| w.number = 0));
        assert!(refused(|w| w.number = 4096));
        assert!(refused(|w| w.number = 1));
        assert!(refused(|w| w.label = "w1".to_owned()));
        assert!(refused(|w| w.label = String::new()));
        assert!(refused(|w| w.label = "a\nb".to_owned()));
        assert!(refused(|w| w.label = "x".repeat(256)));
        assert!(refused(|w| w.cgroups[0].id = 101));
        assert!(refused(|w| w.cgroups[0].id = 1));
        assert!(refused(|w| w.cgroups[0].level = 0));
        assert!(refused(|w| w.uids = vec![1_001]));
        assert!(refused(|w| w.uids = vec![0]));
        assert!(refused(|w| w.uids = vec![u32::MAX]));
        assert!(refused(|w| w.uids = (5_000..5_065).collect()));
        assert!(refused(|w| w.addresses = vec![[10, 88, 0, 1].into()]));
        assert!(refused(|w| w.addresses = vec![[127, 0, 0, 1].into()]));
        assert!(refused(|w| w.addresses = vec![[0; 16].into()]));
        let many = |w: &mut DesiredWorkload| {
            w.addresses = (0..65).map(|last| [10, 89, 0, last].into()).collect();
        };
        assert!(refused(many));
    }

    #[test]
    fn a_worker_can_not_change_the_ranges() {
        let ranges = VipRanges::new("252.64.0.0/16", "fd6d::/64").unwrap();
        let desired = Desired {
            generation: 1,
            workloads: vec![],
            doors: None,
            kept_doors: vec![],
            reals: None,
            vip4: "0.0.0.0/0".to_owned(),
            vip6: "fd6d::/64".to_owned(),
        };
        let error = check(&desired, &ranges).unwrap_err();
        assert!(matches!(error, DesiredError::Ranges { .. }));
    }
}
