//! The input door: plaintext callers, who go straight to the port of a local program.
//!
//! One chain in the input hook looks at SYNs that did not come by `lo` and go to a port that a workload declares. The
//! caller's address and the port decide: in `open` it passes, in `audited` it passes as one that policy would refuse,
//! else it is reset. Each is counted by (address, port) in a bounded set of its verdict, which is read from time to
//! time. Calls over the mesh come by the agent's own port, and by `lo` to the program: they are not seen here.
//!
//! Nothing is refused unless `armed` has an element. After a change it has a lifetime, so that a change that cuts the
//! host off from control undoes itself.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use mesh_core::policy::{Cidr, widest};
use serde::{Deserialize, Serialize};

use super::Marks;
use super::bridged;
use super::bypass;
use super::netlink::{Connection, Message};
use super::nft::{
    Base, Compare, Hook, Meta, R0, Register, Scribe, SetShape, Steps, Type, elements_of,
};
use super::rules::{IPV4, IPV6, LOOPBACK, TCP, family, syn, tcp};

/// A caller that is silent for so long leaves its set; it is read many times before.
const SEEN_LIFETIME_MS: u64 = 120_000;
/// Callers of one family and verdict at once. All of them must fit one message of the holder's.
const SEEN_MAX: u32 = 1_024;

/// One is in it; while it is replaced there are two.
const ARMED_MAX: u32 = 2;

const DOOR: &str = "door";
const DOOR_PORTS: &str = "door_ports";
const ARMED: &str = "armed";

/// What the sets of one family are called.
struct Names {
    family: u8,
    address: Type,
    open: &'static str,
    audited: &'static str,
    /// Sets of callers, and the chains that fill them.
    passed: &'static str,
    warned: &'static str,
    refused: &'static str,
}

const FAMILIES: [Names; 2] = [
    Names {
        family: IPV4,
        address: Type::Ipv4,
        open: "open4",
        audited: "audited4",
        passed: "seen_passed4",
        warned: "seen_audited4",
        refused: "seen_refused4",
    },
    Names {
        family: IPV6,
        address: Type::Ipv6,
        open: "open6",
        audited: "audited6",
        passed: "seen_passed6",
        warned: "seen_audited6",
        refused: "seen_refused6",
    },
];

/// What becomes of plaintext callers of one port.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct DoorPort {
    pub(crate) port: u16,
    pub(crate) open: Vec<Cidr>,
    pub(crate) audited: Vec<Cidr>,
    /// Where plaintext must stay out whatever becomes of the agent: who is excepted.
    pub(crate) strict: Option<Vec<Cidr>>,
}

/// For how long the door may refuse.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Arm {
    ForGood,
    /// Unless control is reached by then.
    For(Duration),
    Not,
}

/// What became of a caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Verdict {
    Passed,
    Audited,
    Refused,
}

/// A plaintext caller of a port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Caller {
    pub(crate) source: IpAddr,
    pub(crate) port: u16,
    pub(crate) verdict: Verdict,
    /// Attempts to connect since it is in the set.
    pub(crate) attempts: u64,
}

/// The plaintext callers of late.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Seen {
    pub(crate) callers: Vec<Caller>,
    /// A set has no more room: there may be callers that are not in it.
    pub(crate) full: bool,
}

/// Sets, chains and rules that do not change while the table lives.
pub(super) fn frame(scribe: Scribe<'_>, priority: i32, marks: Marks) -> Vec<Message> {
    let mut messages = vec![
        scribe.new_set(SetShape::plain(DOOR_PORTS, 10, &[Type::Port], None)),
        // Its elements may have a lifetime; the set says none.
        scribe.new_set(SetShape {
            dynamic: Some((0, ARMED_MAX)),
            ..SetShape::plain(ARMED, 11, &[Type::Protocol], None)
        }),
    ];
    for (index, names) in (0..).zip(&FAMILIES) {
        let key = [names.address, Type::Port];
        let ranges = |name, id| {
            scribe.new_set(SetShape {
                ranges: true,
                ..SetShape::plain(name, id, &key, None)
            })
        };
        let seen = |name, id| {
            scribe.new_set(SetShape {
                dynamic: Some((SEEN_LIFETIME_MS, SEEN_MAX)),
                ..SetShape::plain(name, id, &key, None)
            })
        };
        let id = 20 + index * 10;
        messages.extend([
            ranges(names.open, id),
            ranges(names.audited, id + 1),
            seen(names.passed, id + 2),
            seen(names.warned, id + 3),
            seen(names.refused, id + 4),
        ]);
        // A chain has the name of the set that it fills. Where that is full its rule ends, and the next one follows.
        for set in [names.passed, names.warned, names.refused] {
            messages.push(scribe.new_chain(set));
            let count = caller(Steps::default(), names.family).count(set, R0);
            messages.push(scribe.new_rule(set, &count));
        }
        messages.push(scribe.new_rule(names.refused, &Steps::default().reject_with_reset()));
    }
    messages.push(scribe.new_hook(DOOR, "filter", Hook::Input, priority));
    let rules = door_rules(marks);
    messages.extend(rules.iter().map(|steps| scribe.new_rule(DOOR, steps)));
    messages
}

/// Which packets a chain of the input hook is about: SYNs from elsewhere to one of the ports in `ports`, but for those that
/// go to a listener of ours.
pub(super) fn from_elsewhere(ports: &str, marks: Marks) -> Vec<Steps> {
    vec![
        Steps::default()
            .meta(Meta::InputType, R0)
            .compare(R0, Compare::Equal, &LOOPBACK.to_ne_bytes())
            .back(),
        // Of a container; none comes marked from another host.
        bridged::captured(marks).back(),
        tcp(Steps::default(), Compare::NotEqual).back(),
        syn(Steps::default(), Compare::NotEqual).back(),
        Steps::default()
            .payload(Base::Transport, 2, 2, R0)
            .only_if_not_in(ports, R0)
            .back(),
    ]
}

fn door_rules(marks: Marks) -> Vec<Steps> {
    let mut rules = bridged::input_rules(marks).to_vec();
    rules.extend(from_elsewhere(DOOR_PORTS, marks));
    for names in &FAMILIES {
        let of_family = || family(Steps::default(), names.family);
        let within = |set| caller(of_family(), names.family).only_if_in(set, R0);
        rules.extend([
            within(names.open).go_to(names.passed),
            within(names.audited).go_to(names.warned),
            bypass::if_closed(of_family())
                .meta(Meta::Protocol, R0)
                .only_if_in(ARMED, R0)
                .go_to(names.refused),
            // Not armed, or open on purpose: it would be refused.
            of_family().go_to(names.warned),
        ]);
    }
    rules
}

/// Loads (source address, destination port) from `R0` on.
pub(super) fn caller(steps: Steps, family: u8) -> Steps {
    let (offset, length, words) = if family == IPV4 {
        (12, 4, 1)
    } else {
        (8, 16, 4)
    };
    steps.payload(Base::Network, offset, length, R0).payload(
        Base::Transport,
        2,
        2,
        Register::word(words),
    )
}

/// What follows the workloads, index and policies.
pub(super) fn contents(scribe: Scribe<'_>, doors: &[DoorPort], arm: Arm) -> Vec<Message> {
    let mut messages = vec![scribe.empty_set(DOOR_PORTS)];
    let ports: Vec<_> = doors
        .iter()
        .map(|d| d.port.to_be_bytes().to_vec())
        .collect();
    messages.extend(scribe.members(DOOR_PORTS, &ports));
    for names in &FAMILIES {
        for set in [names.open, names.audited] {
            messages.push(scribe.empty_set(set));
        }
        let open = ranges(doors, names.family, |door| &door.open);
        messages.extend(scribe.ranges(names.open, &open));
        let audited = ranges(doors, names.family, |door| &door.audited);
        messages.extend(scribe.ranges(names.audited, &audited));
    }
    messages.extend(armed(scribe, arm));
    messages
}

/// The first and last key of each range of one family.
pub(super) fn ranges(
    doors: &[DoorPort],
    family: u8,
    of: impl Fn(&DoorPort) -> &[Cidr],
) -> Vec<(Vec<u8>, Vec<u8>)> {
    let key = |address: IpAddr, port: u16| {
        let mut key = match address {
            IpAddr::V4(v4) => v4.octets().to_vec(),
            IpAddr::V6(v6) => v6.octets().to_vec(),
        };
        key.extend(port.to_be_bytes());
        key.extend([0, 0]);
        key
    };
    let mut all = Vec::new();
    for door in doors {
        // The kernel refuses ranges that share an address.
        let own = widest(of(door).to_vec());
        for range in own {
            if range.address.is_ipv4() == (family == IPV4) {
                let (first, last) = range.bounds();
                all.push((key(first, door.port), key(last, door.port)));
            }
        }
    }
    all
}

/// Makes the door refuse, for how long is said.
pub(super) fn armed(scribe: Scribe<'_>, arm: Arm) -> Vec<Message> {
    let mut messages = vec![scribe.empty_set(ARMED)];
    messages.extend(match arm {
        Arm::Not => Vec::new(),
        Arm::ForGood => scribe.members(ARMED, &[vec![TCP]]),
        Arm::For(time) => {
            let ms = u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
            scribe.passing_member(ARMED, &[TCP], ms.max(1))
        }
    });
    messages
}

/// Reads the sets of callers.
pub(super) fn seen(scribe: Scribe<'_>, connection: &mut Connection) -> io::Result<Seen> {
    let mut seen = Seen::default();
    for names in &FAMILIES {
        for (set, verdict) in [
            (names.passed, Verdict::Passed),
            (names.warned, Verdict::Audited),
            (names.refused, Verdict::Refused),
        ] {
            let before = seen.callers.len();
            connection.query(&scribe.get_elements(set), |_, body| {
                let elements = elements_of(body).filter_map(|(key, attempts)| {
                    let (source, port) = read_key(key)?;
                    Some(Caller {
                        source,
                        port,
                        verdict,
                        attempts,
                    })
                });
                seen.callers.extend(elements);
            })?;
            seen.full |= seen.callers.len() - before >= SEEN_MAX as usize;
        }
    }
    Ok(seen)
}

fn read_key(key: &[u8]) -> Option<(IpAddr, u16)> {
    let (address, rest) = if key.len() == 8 {
        let (address, rest) = key.split_first_chunk::<4>()?;
        (Ipv4Addr::from(*address).into(), rest)
    } else {
        let (address, rest) = key.split_first_chunk::<16>()?;
        (Ipv6Addr::from(*address).into(), rest)
    };
    let port = rest.first_chunk::<2>()?;
    Some((address, u16::from_be_bytes(*port)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_of_a_port_become_keys_that_share_nothing() {
        let cidr = |text: &str| Cidr::parse(text).unwrap();
        let door = DoorPort {
            port: 0x1538,
            open: vec![cidr("10.1.0.0/16"), cidr("10.0.0.0/8"), cidr("fd00::/8")],
            ..DoorPort::default()
        };
        let open = ranges(std::slice::from_ref(&door), IPV4, |door| &door.open);
        let expected = (
            vec![10, 0, 0, 0, 0x15, 0x38, 0, 0],
            vec![10, 255, 255, 255, 0x15, 0x38, 0, 0],
        );
        assert_eq!(open, [expected]);
        assert_eq!(
            read_key(&open[0].1),
            Some(("10.255.255.255".parse().unwrap(), 0x1538))
        );
        let open = ranges(&[door], IPV6, |door| &door.open);
        assert_eq!(open.len(), 1);
        assert_eq!(
            read_key(&open[0].0),
            Some(("fd00::".parse().unwrap(), 0x1538))
        );
        assert_eq!(read_key(&[1, 2, 3]), None);
    }
}
