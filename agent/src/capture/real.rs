//! Calls to the real addresses of services that ask for it: they are led to the agent as calls to virtual addresses are.
//!
//! A SYN to a (host address, port) of such a service gets the mark of its workload, and its flow is written into a
//! bounded set. Later packets are led by that set alone: a connection that was open before, or is of another program's
//! making, is never touched. Which SYNs were led can not be told from the destination later, since it may leave the set.
//!
//! A flow must not be forgotten while its program can still write: what it writes then would leave as it is. So it lives
//! long, and leaves soon once both ends have said FIN, or one has said RST. The agent ends every such connection by one of
//! the two (`outbound::end`). How many flows users begin a second is bounded (`dialers`), so that nobody fills the set.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::bypass;
use super::netlink::Message;
use super::nft::{Base, Compare, Meta, R0, Register, Scribe, SetShape, Steps, Type};
use super::rules::{
    Common, FLOWS_MAX, IPV4, IPV6, LOOPBACK, SHARE_BURST, SHARE_RATE, SHED, TCP_FLAGS_OFFSET,
    WHOSE, family, flow_key, marked, syn, tcp,
};
use super::{Marks, VipRanges};

/// Real addresses on one host: a hundred services of forty hosts. They must fit one batch and one message of the worker's.
pub(crate) const REALS_MAX: usize = 4_096;
/// Never taken over, whatever a service declares: DNS, DHCP and NTP, without which a host may not find its way back.
const NEVER: [u16; 6] = [53, 67, 68, 123, 546, 547];
/// How long a flow lives without a packet of its program. The kernel answers for a program that is silent: to keepalives,
/// every 60 s at least, and, where it does not read, to probes of its window, every 120 s (`TCP_RTO_MAX`) and a little.
const CARRIED_LIFETIME_MS: u64 = 300_000;
/// What has begun and gets no further, or is over, leaves after so long.
const BRIEF_MS: u64 = 10_000;
/// Connections that may be begun beyond the users' own shares. What is brief of them fills a quarter of the set at most, and
/// what is brief of twenty users' own shares another half. What is open has a place with the agent, which bounds it
/// (`places.rs`).
const DIALS: Common = Common {
    rate: 5_000,
    burst: 5_000,
};
const _: () = {
    let seconds = BRIEF_MS / 1_000;
    let common = DIALS.rate * seconds + DIALS.burst as u64;
    let own = SHARE_RATE * seconds + SHARE_BURST as u64;
    assert!(common * 4 <= FLOWS_MAX as u64 && own * 20 * 2 <= FLOWS_MAX as u64);
};
const FIN: u8 = 0x01;
const RST: u8 = 0x04;

/// Chains: for SYNs, for what exceeds a share, and for what follows SYNs.
const BEGIN: &str = "real";
const CARRY: &str = "carry";
/// For FIN and RST of the agent.
const END: &str = "end";
/// Users who began connections of late.
const DIALERS: &str = "dialers";

/// A real address of a service that another host serves.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Real {
    pub(crate) address: IpAddr,
    pub(crate) port: u16,
    /// Plaintext must not go there, whatever becomes of the agent.
    pub(crate) strict: bool,
}

impl Real {
    /// Whether it may be taken over at all.
    pub(crate) fn may_be(&self, keep_open: &[u16], ranges: &VipRanges) -> bool {
        let address = self.address;
        self.port != 0
            && !NEVER.contains(&self.port)
            && !keep_open.contains(&self.port)
            && !address.is_loopback()
            && !address.is_unspecified()
            && !address.is_multicast()
            && !ranges.v4.contains(address)
            && !ranges.v6.contains(address)
    }

    pub(super) fn key(&self) -> Vec<u8> {
        address_and_port(self.address, self.port)
    }
}

/// The key of a set of (address, port).
pub(super) fn address_and_port(address: IpAddr, port: u16) -> Vec<u8> {
    let mut key = super::routes::octets(address);
    key.extend(port.to_be_bytes());
    key.extend([0, 0]);
    key
}

/// What the sets of one family are called.
pub(super) struct Names {
    pub(super) family: u8,
    pub(super) address: Type,
    pub(super) real: &'static str,
    pub(super) carried: &'static str,
    /// Flows, as they are sent, one of whose ends has said FIN: of either direction.
    ended: &'static str,
}

pub(super) const FAMILIES: [Names; 2] = [
    Names {
        family: IPV4,
        address: Type::Ipv4,
        real: "real4",
        carried: "carried4",
        ended: "ended4",
    },
    Names {
        family: IPV6,
        address: Type::Ipv6,
        real: "real6",
        carried: "carried6",
        ended: "ended6",
    },
];

impl Names {
    /// Declares the sets of addresses and of flows, with ids from `id` on.
    pub(super) fn sets(&self, scribe: Scribe<'_>, id: u32) -> [Message; 2] {
        let address = self.address;
        [
            scribe.new_set(SetShape::plain(self.real, id, &[address, Type::Port], None)),
            self.flows(scribe, self.carried, id + 1),
        ]
    }

    fn flows(&self, scribe: Scribe<'_>, name: &str, id: u32) -> Message {
        let address = self.address;
        let key = [address, Type::Port, address, Type::Port];
        scribe.new_set(SetShape {
            dynamic: Some((CARRIED_LIFETIME_MS, FLOWS_MAX)),
            ..SetShape::plain(name, id, &key, None)
        })
    }

    /// A SYN of this family to one of the real addresses.
    pub(super) fn beginning(&self) -> Steps {
        let steps = syn(self.tcp(), Compare::Equal);
        let (offset, length, words) = if self.family == IPV4 {
            (16, 4, 1)
        } else {
            (24, 16, 4)
        };
        steps
            .payload(Base::Network, offset, length, R0)
            .payload(Base::Transport, 2, 2, Register::word(words))
            .only_if_in(self.real, R0)
    }

    /// A SYN to anywhere else begins a connection that is not ours, whatever had its addresses and ports before.
    pub(super) fn forgetting(&self) -> Steps {
        let steps = syn(self.tcp(), Compare::Equal);
        flow_key(steps, self.family, false).forget(self.carried, R0)
    }

    /// A packet of a connection that is led to the agent.
    pub(super) fn following(&self) -> Steps {
        flow_key(self.tcp(), self.family, false).only_if_in(self.carried, R0)
    }

    /// Notes a packet that was marked as one of a flow, for `carried` of another table.
    pub(super) fn note(&self, mark: u32, over: bool) -> Steps {
        let marked =
            Steps::default()
                .meta(Meta::Mark, R0)
                .compare(R0, Compare::Equal, &mark.to_ne_bytes());
        let key = flow_key(family(marked, self.family), self.family, false);
        match over {
            true => key.update_for(self.carried, R0, BRIEF_MS),
            false => key.update(self.carried, R0),
        }
    }

    fn tcp(&self) -> Steps {
        tcp(family(Steps::default(), self.family), Compare::Equal)
    }

    fn own(&self) -> Steps {
        family(Steps::default(), self.family)
    }

    fn key(&self, steps: Steps, reversed: bool) -> Steps {
        flow_key(steps, self.family, reversed)
    }

    /// What is over leaves all sets soon. `reversed`: this packet is the agent's.
    fn leaves_soon(&self, steps: Steps, reversed: bool) -> Steps {
        let steps = self
            .key(steps, !reversed)
            .update_for(self.ended, R0, BRIEF_MS);
        self.key(steps, reversed)
            .update_for(self.ended, R0, BRIEF_MS)
            .update_for(self.carried, R0, BRIEF_MS)
    }

    /// A SYN: what its addresses and ports had before is over.
    fn begin(&self) -> Steps {
        let steps = self.key(self.own(), true).forget(self.ended, R0);
        self.key(steps, false)
            .forget(self.ended, R0)
            .update_for(self.carried, R0, BRIEF_MS)
            .go_to(WHOSE)
    }

    /// A later packet of the program.
    fn carry(&self, marks: Marks) -> [Steps; 4] {
        let fin = flags(self.own(), FIN);
        let reset = flags(self.own(), RST);
        let both = self.key(self.own(), true).only_if_in(self.ended, R0);
        let both = self.key(both, false).only_if_in(self.ended, R0);
        let goes_on = self.key(self.own(), false).update(self.carried, R0);
        [
            self.key(fin, false).update(self.ended, R0),
            marked(self.leaves_soon(reset, false), marks.carried_over()),
            marked(self.leaves_soon(both, false), marks.carried_over()),
            marked(goes_on, marks.carried()),
        ]
    }

    /// FIN or RST of the agent to the program.
    fn end(&self) -> [Steps; 2] {
        let fin = flags(self.own(), FIN);
        let reset = flags(self.own(), RST);
        [
            self.key(fin, false).update(self.ended, R0),
            self.leaves_soon(reset, true),
        ]
    }

    fn ending(&self) -> Steps {
        let steps = flags(self.tcp(), FIN | RST);
        self.key(steps, true)
            .only_if_in(self.carried, R0)
            .go_to(END)
    }
}

/// Goes on with what has one of these flags, of what is known to be TCP.
fn flags(steps: Steps, any: u8) -> Steps {
    steps
        .payload(Base::Transport, TCP_FLAGS_OFFSET, 1, R0)
        .mask(R0, &[any])
        .compare(R0, Compare::NotEqual, &[0])
}

/// Sets and chains; they must stand before the rules of the output chain.
pub(super) fn frame(scribe: Scribe<'_>, marks: Marks) -> Vec<Message> {
    let mut messages = vec![Common::sharers(scribe, DIALERS, 50)];
    for (id, names) in (40..).step_by(3).zip(&FAMILIES) {
        messages.extend(names.sets(scribe, id));
        messages.push(names.flows(scribe, names.ended, id + 2));
    }
    messages.extend([BEGIN, CARRY, END].map(|chain| scribe.new_chain(chain)));
    let mut add = |chain, rules: &[Steps]| {
        messages.extend(rules.iter().map(|steps| scribe.new_rule(chain, steps)));
    };
    add(BEGIN, &DIALS.rules(DIALERS));
    for names in &FAMILIES {
        add(BEGIN, &[names.begin()]);
        add(CARRY, &names.carry(marks));
        add(END, &names.end());
    }
    // The set is full: what follows could not be led, so nothing is begun.
    add(BEGIN, &[Steps::default().go_to(SHED)]);
    messages
}

/// What the output chain does with what goes to no virtual address.
pub(super) fn output_rules() -> Vec<Steps> {
    let of_family = |names: &Names| {
        [
            bypass::if_closed(names.beginning()).go_to(BEGIN),
            names.forgetting(),
            names.following().go_to(CARRY),
            names.ending(),
        ]
    };
    FAMILIES.iter().flat_map(of_family).collect()
}

/// What was marked and leaves the host all the same, by a socket bound to a device or for want of our policy rules, would
/// leave it in plaintext.
pub(super) fn leaving_rules(marks: Marks) -> Vec<Steps> {
    let (value, mask) = marks.to_loopback();
    vec![
        Steps::default()
            .meta(Meta::Mark, R0)
            .mask(R0, &mask.to_ne_bytes())
            .compare(R0, Compare::Equal, &value.to_ne_bytes())
            .meta(Meta::OutputType, R0)
            .compare(R0, Compare::NotEqual, &LOOPBACK.to_ne_bytes())
            .drop(),
    ]
}

/// What follows index and endpoints.
pub(super) fn contents(scribe: Scribe<'_>, reals: &[Real]) -> Vec<Message> {
    let mut messages = Vec::new();
    for names in &FAMILIES {
        messages.push(scribe.empty_set(names.real));
        messages.extend(scribe.members(names.real, &keys(names, reals.iter())));
    }
    messages
}

/// Keys of one family.
pub(super) fn keys<'a>(names: &Names, reals: impl Iterator<Item = &'a Real>) -> Vec<Vec<u8>> {
    let is_v4 = names.family == IPV4;
    reals
        .filter(|real| real.address.is_ipv4() == is_v4)
        .map(Real::key)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_core::policy::Cidr;

    #[test]
    fn what_a_host_needs_to_be_reached_is_never_taken_over() {
        let ranges = VipRanges {
            v4: Cidr::parse("252.64.0.0/12").unwrap(),
            v6: Cidr::parse("fd6d::/64").unwrap(),
        };
        let may = |address: &str, port| {
            let address = address.parse().unwrap();
            let real = Real {
                address,
                port,
                strict: false,
            };
            real.may_be(&[22, 7441], &ranges)
        };
        assert!(may("10.0.0.2", 80) && may("2001:db8::2", 5432));
        for port in [0, 22, 53, 67, 68, 123, 546, 547, 7441] {
            assert!(!may("10.0.0.2", port), "{port}");
        }
        for address in [
            "127.0.0.1",
            "0.0.0.0",
            "224.0.0.1",
            "252.64.0.2",
            "::1",
            "fd6d::2",
        ] {
            assert!(!may(address, 80), "{address}");
        }
    }

    #[test]
    fn keys_are_padded_to_whole_registers() {
        let key = address_and_port("10.0.0.2".parse().unwrap(), 0x1538);
        assert_eq!(key, [10, 0, 0, 2, 0x15, 0x38, 0, 0]);
        assert_eq!(address_and_port("::1".parse().unwrap(), 80).len(), 20);
    }
}
