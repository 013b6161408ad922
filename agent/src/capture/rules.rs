//! The table `inet meshwork`: which packets are ours, and what becomes of them.
//!
//! A packet that leaves this host passes `output`, in this order:
//!
//! 1. *The way back.* An app answers the address that we showed it. If the packet belongs to a flow of ours, it gets
//!    the way-back mark and is routed to `lo`. First, because an app's socket may have inherited our mark.
//! 2. *Our own* connections to apps (the app mark) write their flow into a dynamic set; each packet starts its time anew.
//! 3. *Virtual addresses* go to `vip`: the link's own addresses are left alone but for a flood of questions (`askers`), what is not TCP is rejected, a SYN gets
//!    the mark of its workload (`whose`: deepest cgroup first, then the user, else the common number), and every later
//!    packet a constant.
//! 4. *Real addresses* of services that ask for it: see `real.rs`.
//!
//! What was marked comes in again by `lo`. In `prerouting` a SYN is handed to the listener of its number, or reset if
//! there is none: it must never reach another program that listens on the same port. Later packets find their
//! socket by themselves. Before that stands what comes from containers, see `bridged.rs`.
//!
//! What comes in from elsewhere, straight to a program's own port, passes the door (`door.rs`).
//!
//! There is no `nat` chain and no `ct` expression: either would turn connection tracking on for the whole host.

use std::net::{Ipv4Addr, Ipv6Addr};

use mesh_core::policy::Cidr;
use serde::{Deserialize, Serialize};

use super::bridged;
use super::bypass;
use super::door;
use super::netlink::Message;
use super::nft::{Base, Compare, Hook, Meta, R0, Register, Scribe, SetShape, Steps, Type};
use super::real;
use super::{CaptureSettings, Marks, VipRanges, Workload};
use crate::dns::wiring;

/// A flow is forgotten this long after our last packet; the keepalive of `app_socket` comes twice in it at least.
const FLOW_LIFETIME_MS: u64 = 120_000;
/// Twice as many connections to apps as one agent may hold; 262,144 IPv6 flows take about 40 MB of the kernel.
pub(super) const FLOWS_MAX: u32 = 262_144;
/// Behind all filters of the host: only what would really leave is looked at.
const LEAVING_PRIORITY: i32 = 300;
const OUTPUT: &str = "output";
const PREROUTING: &str = "prerouting";
const VIP: &str = "vip";
const LEAVING: &str = "leaving";
pub(super) const WHOSE: &str = "whose";
const OWN: &str = "own";
const UID_MARK: &str = "uid_mark";
const PORT_OF_4: &str = "port_of4";
const PORT_OF_6: &str = "port_of6";
const FLOWS_4: &str = "flows4";
const FLOWS_6: &str = "flows6";
/// Users who asked for names of late, and the chain that sees to it.
const ASKERS: &str = "askers";
/// What users sent beyond their share, by protocol: UDP is questions, TCP is connections to real addresses.
pub(super) const SHED: &str = "shed";

/// Questions for names beyond the users' own shares, a second and at once: a program that opens two thousand connections as
/// fast as it can, each with a question for both families, is none that floods. With them nobody fills the socket that all
/// ask by, which holds twice as many (`holder::sockets`).
const NAMES: Common = Common {
    rate: 10_000,
    burst: 4_000,
};

pub(super) const IPV4: u8 = 2;
pub(super) const IPV6: u8 = 10;
pub(super) const TCP: u8 = 6;
pub(super) const UDP: u8 = 17;
/// `ARPHRD_LOOPBACK`.
pub(super) const LOOPBACK: u16 = 772;
pub(super) const TCP_FLAGS_OFFSET: u32 = 13;
const SYN: u8 = 0x02;
const SYN_ACK: u8 = 0x12;

/// What all users may have together beyond the share that each of them has for sure.
pub(super) struct Common {
    pub(super) rate: u64,
    pub(super) burst: u32,
}

/// What a user has a second, and at once, however many others want more than there is.
pub(super) const SHARE_RATE: u64 = 500;
pub(super) const SHARE_BURST: u32 = 1_000;
/// Users told apart at once; all others share one share.
const SHARERS_MAX: u32 = 1_024;
/// A user that sends nothing for so long has its full share again.
const SHARER_LIFETIME_MS: u64 = 10_000;

impl Common {
    /// The set of users who have a share, which the rules need.
    pub(super) fn sharers(scribe: Scribe<'_>, set: &str, id: u32) -> Message {
        scribe.new_set(SetShape {
            dynamic: Some((SHARER_LIFETIME_MS, SHARERS_MAX)),
            ..SetShape::plain(set, id, &[Type::Uid], None)
        })
    }

    /// Refuses what is beyond: packets of users who have had their own share when nothing is left of this.
    pub(super) fn rules(&self, sharers: &str) -> [Steps; 2] {
        let user = || Steps::default().meta(Meta::SocketUid, R0);
        [
            user()
                .beyond_share(sharers, R0, SHARE_RATE, SHARE_BURST)
                .beyond(self.rate, self.burst)
                .go_to(SHED),
            user()
                .only_if_not_in(sharers, R0)
                .beyond(SHARE_RATE, SHARE_BURST)
                .go_to(SHED),
        ]
    }
}

/// How many packets of users were beyond their shares since the table stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Shed {
    /// Connections to real addresses.
    pub(crate) dials: u64,
    /// Questions for names.
    pub(crate) names: u64,
}

pub(super) fn map_of_level(level: u8) -> String {
    format!("cgroup_mark_{level}")
}

/// What does not change while the table lives, all but the table.
pub(super) fn frame(settings: &CaptureSettings, ranges: &VipRanges) -> Vec<Message> {
    let scribe = Scribe {
        table: &settings.table,
    };
    let marks = settings.marks();
    let map = |name, id, key, value| scribe.new_set(SetShape::plain(name, id, key, Some(value)));
    let flows = |name, id, address| {
        scribe.new_set(SetShape {
            name,
            id,
            key: &[address, Type::Port, address, Type::Port],
            value: None,
            dynamic: Some((FLOW_LIFETIME_MS, FLOWS_MAX)),
            ranges: false,
        })
    };
    let mut messages = vec![
        map(UID_MARK, 1, &[Type::Uid], Type::Mark),
        map(PORT_OF_4, 2, &[Type::Mark], Type::Port),
        map(PORT_OF_6, 3, &[Type::Mark], Type::Port),
        flows(FLOWS_4, 4, Type::Ipv4),
        flows(FLOWS_6, 5, Type::Ipv6),
        Common::sharers(scribe, ASKERS, 6),
        // Its elements stay as long as the table does; the set says no time.
        scribe.new_set(SetShape {
            dynamic: Some((0, 2)),
            ..SetShape::plain(SHED, 7, &[Type::Protocol], None)
        }),
        bypass::set(scribe, 8),
        scribe.new_chain(SHED),
        scribe.new_chain(ASKERS),
        scribe.new_chain(WHOSE),
        scribe.new_chain(VIP),
        scribe.new_chain(OWN),
        // The kernel takes hooks down in the order in which they were made: nothing is marked any more
        // when `prerouting` goes.
        scribe.new_hook(OUTPUT, "route", Hook::Output, settings.output_priority),
        scribe.new_hook(
            PREROUTING,
            "filter",
            Hook::Prerouting,
            settings.prerouting_priority,
        ),
        scribe.new_hook(LEAVING, "filter", Hook::Postrouting, LEAVING_PRIORITY),
    ];
    messages.extend(real::frame(scribe, marks));
    messages.extend(bridged::frame(scribe, marks, ranges));
    let mut add = |chain, rules: Vec<Steps>| {
        messages.extend(rules.iter().map(|steps| scribe.new_rule(chain, steps)));
    };
    add(OUTPUT, output_rules(marks, ranges));
    add(OWN, own_rules());
    add(VIP, vip_rules(settings, ranges));
    add(ASKERS, NAMES.rules(ASKERS).into());
    add(SHED, shed_rules());
    add(PREROUTING, bridged::prerouting_rules(settings, ranges));
    add(PREROUTING, prerouting_rules(marks));
    add(WHOSE, whose_rules(marks, &[]));
    add(LEAVING, real::leaving_rules(marks));
    messages.extend(door::frame(scribe, settings.input_priority, marks));
    messages
}

/// What follows the workloads: maps and the order in which they are asked.
pub(super) fn contents(
    table: &str,
    marks: Marks,
    known_levels: &[u8],
    levels: &[u8],
    workloads: &[Workload],
) -> Vec<Message> {
    let scribe = Scribe { table };
    let mut messages = Vec::new();
    for level in levels.iter().filter(|level| !known_levels.contains(level)) {
        messages.push(scribe.new_set(SetShape::plain(
            &map_of_level(*level),
            100 + u32::from(*level),
            &[Type::Cgroup],
            Some(Type::Mark),
        )));
    }
    for level in known_levels {
        messages.push(scribe.empty_set(&map_of_level(*level)));
    }
    messages.extend([UID_MARK, PORT_OF_4, PORT_OF_6].map(|map| scribe.empty_set(map)));
    messages.push(scribe.empty_chain(WHOSE));

    let mark = |workload: &Workload| marks.captured(workload.number).to_ne_bytes().to_vec();
    for level in levels {
        let elements: Vec<_> = workloads
            .iter()
            .flat_map(|w| w.cgroups.iter().map(move |c| (w, c)))
            .filter(|(_, cgroup)| cgroup.level == *level)
            .map(|(w, cgroup)| (cgroup.id.to_ne_bytes().to_vec(), mark(w)))
            .collect();
        messages.extend(scribe.elements(&map_of_level(*level), &elements));
    }
    let uids: Vec<_> = workloads
        .iter()
        .flat_map(|w| w.uids.iter().map(move |uid| (w, uid)))
        .map(|(w, uid)| (uid.to_ne_bytes().to_vec(), mark(w)))
        .collect();
    messages.extend(scribe.elements(UID_MARK, &uids));
    let ports = |port: fn(&Workload) -> Option<u16>| -> Vec<_> {
        workloads
            .iter()
            .filter_map(|w| Some((mark(w), port(w)?.to_be_bytes().to_vec())))
            .collect()
    };
    messages.extend(scribe.elements(PORT_OF_4, &ports(|w| w.port4)));
    messages.extend(scribe.elements(PORT_OF_6, &ports(|w| w.port6)));
    let rules = whose_rules(marks, levels);
    messages.extend(rules.iter().map(|steps| scribe.new_rule(WHOSE, steps)));
    messages.extend(bridged::contents(scribe, marks, workloads));
    messages
}

pub(super) fn family(steps: Steps, family: u8) -> Steps {
    steps
        .meta(Meta::Family, R0)
        .compare(R0, Compare::Equal, &[family])
}

pub(super) fn tcp(steps: Steps, how: Compare) -> Steps {
    steps.meta(Meta::Protocol, R0).compare(R0, how, &[TCP])
}

/// SYN without ACK, of what is known to be TCP.
pub(super) fn syn(steps: Steps, how: Compare) -> Steps {
    steps
        .payload(Base::Transport, TCP_FLAGS_OFFSET, 1, R0)
        .mask(R0, &[SYN_ACK])
        .compare(R0, how, &[SYN])
}

pub(super) fn marked(steps: Steps, mark: u32) -> Steps {
    steps.value(R0, &mark.to_ne_bytes()).set_mark(R0).accept()
}

/// Loads (address, port, address, port) of a packet from `R0` on: as it was sent, or as its answer's flow was.
pub(super) fn flow_key(steps: Steps, family: u8, reversed: bool) -> Steps {
    let (source, destination, length, words) = if family == IPV4 {
        (12, 16, 4, 1)
    } else {
        (8, 24, 16, 4)
    };
    let ((first, first_port), (second, second_port)) = if reversed {
        ((destination, 2), (source, 0))
    } else {
        ((source, 0), (destination, 2))
    };
    steps
        .payload(Base::Network, first, length, R0)
        .payload(Base::Transport, first_port, 2, Register::word(words))
        .payload(Base::Network, second, length, Register::word(words + 1))
        .payload(
            Base::Transport,
            second_port,
            2,
            Register::word(2 * words + 1),
        )
}

/// Compares the destination's network part with a range.
pub(super) fn destination_in(steps: Steps, range: Cidr) -> Steps {
    let (protocol, offset, address) = match range.address {
        std::net::IpAddr::V4(v4) => (IPV4, 16, v4.octets().to_vec()),
        std::net::IpAddr::V6(v6) => (IPV6, 24, v6.octets().to_vec()),
    };
    let whole = usize::from(range.prefix / 8);
    let odd_bits = range.prefix % 8;
    let length = whole + usize::from(odd_bits != 0);
    let mut mask = vec![0xff; whole];
    if odd_bits != 0 {
        mask.push(0xff_u8 << (8 - odd_bits));
    }
    let network: Vec<u8> = address.iter().zip(&mask).map(|(a, m)| a & m).collect();
    let mut steps = family(steps, protocol).payload(
        Base::Network,
        offset,
        u32::try_from(length).unwrap_or(0),
        R0,
    );
    if odd_bits != 0 {
        steps = steps.mask(R0, &mask);
    }
    steps.compare(R0, Compare::Equal, &network)
}

fn output_rules(marks: Marks, ranges: &VipRanges) -> Vec<Steps> {
    let way_back = |version, flows| {
        let steps = tcp(family(Steps::default(), version), Compare::Equal)
            .payload(Base::Transport, 2, 2, R0)
            .compare(
                R0,
                Compare::AtLeast,
                &super::app_socket::FIRST_PORT.to_be_bytes(),
            )
            .compare(
                R0,
                Compare::AtMost,
                &super::app_socket::LAST_PORT.to_be_bytes(),
            );
        let steps = flow_key(steps, version, true).only_if_in(flows, R0);
        marked(steps, marks.way_back())
    };
    let own = Steps::default()
        .meta(Meta::Mark, R0)
        .compare(R0, Compare::Equal, &marks.app().to_ne_bytes())
        .go_to(OWN);
    let mut rules = vec![
        way_back(IPV4, FLOWS_4),
        way_back(IPV6, FLOWS_6),
        own,
        destination_in(Steps::default(), ranges.v4).go_to(VIP),
        destination_in(Steps::default(), ranges.v6).go_to(VIP),
    ];
    rules.extend(real::output_rules());
    rules
}

fn own_rules() -> Vec<Steps> {
    let update = |version, flows| {
        let steps = tcp(family(Steps::default(), version), Compare::Equal);
        flow_key(steps, version, false).update(flows, R0).accept()
    };
    vec![update(IPV4, FLOWS_4), update(IPV6, FLOWS_6)]
}

/// What goes to the link's own address, where the agent answers for names.
pub(super) fn own_address(ranges: &VipRanges, range: Cidr) -> Steps {
    let address = ranges.own(range);
    let prefix = if address.is_ipv4() { 32 } else { 128 };
    destination_in(Steps::default(), Cidr { address, prefix })
}

fn vip_rules(settings: &CaptureSettings, ranges: &VipRanges) -> Vec<Steps> {
    let own = |range| own_address(ranges, range);
    let names = |range: Cidr, port: u16| {
        own(range)
            .meta(Meta::Protocol, R0)
            .compare(R0, Compare::Equal, &[UDP])
            .payload(Base::Transport, 2, 2, R0)
            .compare(R0, Compare::Equal, &port.to_be_bytes())
            .go_to(ASKERS)
    };
    // A socket bound to a device leaves by it even with our mark: nothing for the mesh may go out in the clear.
    let mut link = settings.link.clone().into_bytes();
    link.resize(libc::IFNAMSIZ, 0);
    let elsewhere = || {
        Steps::default()
            .meta(Meta::OutputName, R0)
            .compare(R0, Compare::NotEqual, &link)
    };
    let ports = wiring::PORTS.into_iter();
    let names = ports.flat_map(|port| [names(ranges.v4, port), names(ranges.v6, port)]);
    let others = [
        own(ranges.v4).back(),
        own(ranges.v6).back(),
        tcp(Steps::default(), Compare::NotEqual).reject_as_unreachable(),
        elsewhere().reject_with_reset(),
        syn(Steps::default(), Compare::Equal).go_to(WHOSE),
        marked(Steps::default(), settings.marks().established()),
    ];
    names.chain(others).collect()
}

/// Counts and refuses.
fn shed_rules() -> Vec<Steps> {
    vec![
        Steps::default().meta(Meta::Protocol, R0).count(SHED, R0),
        tcp(Steps::default(), Compare::Equal).reject_with_reset(),
        Steps::default().drop(),
    ]
}

fn whose_rules(marks: Marks, levels: &[u8]) -> Vec<Steps> {
    let mut rules: Vec<Steps> = levels
        .iter()
        .rev()
        .map(|level| {
            Steps::default()
                .socket_cgroup(u32::from(*level), R0)
                .map(&map_of_level(*level), R0, R0)
                .set_mark(R0)
                .accept()
        })
        .collect();
    rules.push(
        Steps::default()
            .meta(Meta::SocketUid, R0)
            .map(UID_MARK, R0, R0)
            .set_mark(R0)
            .accept(),
    );
    rules.push(marked(Steps::default(), marks.captured(0)));
    rules
}

/// Hands a SYN to the listener of its number, or resets it if there is none.
pub(super) fn give_to_listeners() -> [Steps; 3] {
    let give = |version, address: &[u8], ports| {
        let port = Register::word(4);
        tcp(family(Steps::default(), version), Compare::Equal)
            .value(R0, address)
            .meta(Meta::Mark, port)
            .map(ports, port, port)
            .tproxy(version, R0, port)
            .accept()
    };
    [
        give(IPV4, &Ipv4Addr::LOCALHOST.octets(), PORT_OF_4),
        give(IPV6, &Ipv6Addr::LOCALHOST.octets(), PORT_OF_6),
        Steps::default().reject_with_reset(),
    ]
}

fn prerouting_rules(marks: Marks) -> Vec<Steps> {
    let mut rules = vec![
        Steps::default()
            .meta(Meta::Mark, R0)
            .mask(R0, &Marks::KIND_MASK.to_ne_bytes())
            .compare(R0, Compare::NotEqual, &marks.captured(0).to_ne_bytes())
            .back(),
        Steps::default()
            .meta(Meta::InputType, R0)
            .compare(R0, Compare::NotEqual, &LOOPBACK.to_ne_bytes())
            .back(),
        // With `tcp_fwmark_accept` set on the host, the listeners' answers carry the mark of the SYN.
        syn(tcp(Steps::default(), Compare::Equal), Compare::NotEqual).back(),
    ];
    rules.extend(give_to_listeners());
    rules
}
