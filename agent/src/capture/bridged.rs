//! Containers on bridges that the settings name: whose their calls to virtual addresses are.
//!
//! They come in by the bridge, so `prerouting` sees them first, unmarked. A SYN gets the mark of the workload that has its
//! source address, else the common number, and is handed to that listener at once; later packets get the constant. Both
//! are routed to `lo` by the policy rule, like those of local programs. Answers leave by the bridge, unmarked.

use super::netlink::Message;
use super::nft::{Base, Compare, Meta, R0, Scribe, SetShape, Steps, Type};
use super::routes::octets;
use super::rules::{
    IPV4, IPV6, LOOPBACK, destination_in, family, give_to_listeners, marked, own_address, syn, tcp,
};
use super::{CaptureSettings, Marks, VipRanges, Workload};

const BRIDGED: &str = "bridged";

/// The map of one family, and where a packet has its source.
struct Sources {
    family: u8,
    map: &'static str,
    address: Type,
    offset: u32,
    length: u32,
}

const SOURCES: [Sources; 2] = [
    Sources {
        family: IPV4,
        map: "source_mark4",
        address: Type::Ipv4,
        offset: 12,
        length: 4,
    },
    Sources {
        family: IPV6,
        map: "source_mark6",
        address: Type::Ipv6,
        offset: 8,
        length: 16,
    },
];

/// Maps and the chain; they must stand before the rules of the prerouting chain.
pub(super) fn frame(scribe: Scribe<'_>, marks: Marks, ranges: &VipRanges) -> Vec<Message> {
    let mut messages = Vec::new();
    for (id, sources) in (60..).zip(&SOURCES) {
        let key = [sources.address];
        messages.push(scribe.new_set(SetShape::plain(sources.map, id, &key, Some(Type::Mark))));
    }
    messages.push(scribe.new_chain(BRIDGED));
    let rules = bridged_rules(marks, ranges);
    messages.extend(rules.iter().map(|steps| scribe.new_rule(BRIDGED, steps)));
    messages
}

/// What the prerouting chain does first.
pub(super) fn prerouting_rules(settings: &CaptureSettings, ranges: &VipRanges) -> Vec<Steps> {
    let of_bridge = |bridge: &String| {
        let mut name = bridge.clone().into_bytes();
        name.resize(libc::IFNAMSIZ, 0);
        [ranges.v4, ranges.v6].map(|range| {
            let steps =
                Steps::default()
                    .meta(Meta::InputName, R0)
                    .compare(R0, Compare::Equal, &name);
            destination_in(steps, range).go_to(BRIDGED)
        })
    };
    settings.bridges.iter().flat_map(of_bridge).collect()
}

/// A SYN with the mark of a listener.
pub(super) fn captured(marks: Marks) -> Steps {
    Steps::default()
        .meta(Meta::Mark, R0)
        .mask(R0, &Marks::KIND_MASK.to_ne_bytes())
        .compare(R0, Compare::Equal, &marks.captured(0).to_ne_bytes())
}

/// What the input hook does first. Where bridges call the packet filter (`bridge-nf-call-iptables`) a SYN has lost on its way
/// the listener that it was handed to: no other program may get it.
pub(super) fn input_rules(marks: Marks) -> [Steps; 2] {
    let ours = || {
        captured(marks).meta(Meta::InputType, R0).compare(
            R0,
            Compare::NotEqual,
            &LOOPBACK.to_ne_bytes(),
        )
    };
    [
        // The rule ends here where there is no socket.
        ours().meta(Meta::SocketUid, R0).back(),
        ours().reject_with_reset(),
    ]
}

fn bridged_rules(marks: Marks, ranges: &VipRanges) -> Vec<Steps> {
    let source = |sources: &Sources| {
        family(Steps::default(), sources.family)
            .payload(Base::Network, sources.offset, sources.length, R0)
            .map(sources.map, R0, R0)
            .set_mark(R0)
    };
    let common = marks.captured(0).to_ne_bytes();
    let mut rules = vec![
        // There the agent answers for names.
        own_address(ranges, ranges.v4).back(),
        own_address(ranges, ranges.v6).back(),
        tcp(Steps::default(), Compare::NotEqual).reject_as_unreachable(),
        marked(
            syn(Steps::default(), Compare::NotEqual),
            marks.established(),
        ),
        Steps::default().value(R0, &common).set_mark(R0),
    ];
    rules.extend(SOURCES.iter().map(source));
    rules.extend(give_to_listeners());
    rules
}

/// What follows the workloads.
pub(super) fn contents(scribe: Scribe<'_>, marks: Marks, workloads: &[Workload]) -> Vec<Message> {
    let mut messages = Vec::new();
    for sources in &SOURCES {
        messages.push(scribe.empty_set(sources.map));
        let of_workload = |workload: &Workload| {
            let mark = marks.captured(workload.number).to_ne_bytes().to_vec();
            let own = workload.addresses.iter();
            let own = own.filter(|a| a.is_ipv4() == (sources.family == IPV4));
            own.map(|a| (octets(*a), mark.clone())).collect::<Vec<_>>()
        };
        let elements: Vec<_> = workloads.iter().flat_map(of_workload).collect();
        messages.extend(scribe.elements(sources.map, &elements));
    }
    messages
}
