//! The words of nf_tables that we use, as netlink attributes. What they are used for stands in `rules.rs`.
//!
//! Numbers are those of `linux/netfilter/nf_tables.h`; `nft --debug=mnl` shows the same bytes.

use super::netlink::{APPEND, Attributes, CREATE, DUMP, EXCLUSIVE, Message, attributes};

const NFNL_SUBSYS_NFTABLES: u16 = 10;
const NFNL_MSG_BATCH_BEGIN: u16 = 0x10;
const NFNL_MSG_BATCH_END: u16 = 0x11;
const NFPROTO_INET: u8 = 1;

const NEW_TABLE: u16 = 0;
const GET_TABLE: u16 = 1;
const DELETE_TABLE: u16 = 2;
const NEW_CHAIN: u16 = 3;
const NEW_RULE: u16 = 6;
const DELETE_RULE: u16 = 8;
const NEW_SET: u16 = 9;
const NEW_ELEMENTS: u16 = 12;
const GET_ELEMENTS: u16 = 13;
const DELETE_ELEMENTS: u16 = 14;
const GET_GENERATION: u16 = 16;

/// `NFT_TABLE_F_OWNER`: only the socket that made the table changes it, and it goes with that socket.
const TABLE_OWNED: u32 = 2;
const SET_INTERVAL: u32 = 0x4;
const SET_MAP: u32 = 0x8;
const SET_TIMEOUT: u32 = 0x10;
const SET_DYNAMIC: u32 = 0x20;
const SET_CONCATENATION: u32 = 0x80;
const KEY: u16 = 1;
const ELEMENT_TIMEOUT: u16 = 4;
const ELEMENT_EXPRESSION: u16 = 7;
const KEY_END: u16 = 10;
/// An attribute's length has 16 bits; an element takes at most 64 bytes.
const ELEMENTS_PER_MESSAGE: usize = 512;

/// A 4-byte register by number; the 16-byte register 1 is the same storage as the first four of these.
#[derive(Clone, Copy, Debug)]
pub(super) struct Register(u32);

impl Register {
    /// The `index`-th of sixteen.
    pub(super) const fn word(index: u32) -> Self {
        Self(8 + index)
    }
}

/// The first register: most expressions need no other.
pub(super) const R0: Register = Register::word(0);

/// What is known of a packet beside its bytes.
#[derive(Clone, Copy, Debug)]
pub(super) enum Meta {
    Mark = 3,
    InputName = 6,
    OutputName = 7,
    InputType = 8,
    OutputType = 9,
    SocketUid = 10,
    Family = 15,
    Protocol = 16,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Compare {
    Equal = 0,
    NotEqual = 1,
    AtMost = 3,
    AtLeast = 5,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Base {
    Network = 1,
    Transport = 2,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Hook {
    Prerouting = 0,
    Input = 1,
    Output = 3,
    Postrouting = 4,
}

/// Types that sets declare. The kernel ignores them; `nft list` prints by them.
#[derive(Clone, Copy, Debug)]
pub(super) enum Type {
    Ipv4 = 7,
    Ipv6 = 8,
    Protocol = 12,
    Port = 13,
    Mark = 19,
    Uid = 24,
    Cgroup = 46,
}

impl Type {
    const fn bytes(self) -> u32 {
        match self {
            Self::Ipv4 | Self::Mark | Self::Uid => 4,
            Self::Ipv6 => 16,
            Self::Port => 2,
            Self::Protocol => 1,
            Self::Cgroup => 8,
        }
    }

    /// `nft` reads this from the set's user data to print numbers right: 1 is host order, 2 network order.
    const fn byte_order(self) -> u8 {
        match self {
            Self::Mark | Self::Uid | Self::Cgroup => 1,
            Self::Ipv4 | Self::Ipv6 | Self::Protocol | Self::Port => 2,
        }
    }
}

/// The steps of a rule, in order.
#[derive(Clone, Debug, Default)]
pub(super) struct Steps(Attributes);

impl Steps {
    fn step(self, name: &str, data: &Attributes) -> Self {
        let expression = Attributes::default().string(1, name).nest(2, data);
        Self(self.0.nest(1, &expression))
    }

    pub(super) fn meta(self, key: Meta, to: Register) -> Self {
        let data = Attributes::default().be32(2, key as u32).be32(1, to.0);
        self.step("meta", &data)
    }

    pub(super) fn set_mark(self, from: Register) -> Self {
        let data = Attributes::default()
            .be32(2, Meta::Mark as u32)
            .be32(3, from.0);
        self.step("meta", &data)
    }

    pub(super) fn compare(self, from: Register, how: Compare, value: &[u8]) -> Self {
        let data = Attributes::default()
            .be32(1, from.0)
            .be32(2, how as u32)
            .nest(3, &value_of(value));
        self.step("cmp", &data)
    }

    pub(super) fn payload(self, base: Base, offset: u32, length: u32, to: Register) -> Self {
        let data = Attributes::default()
            .be32(1, to.0)
            .be32(2, base as u32)
            .be32(3, offset)
            .be32(4, length);
        self.step("payload", &data)
    }

    pub(super) fn mask(self, register: Register, mask: &[u8]) -> Self {
        let data = Attributes::default()
            .be32(1, register.0)
            .be32(2, register.0)
            .be32(3, u32::try_from(mask.len()).unwrap_or(0))
            .nest(4, &value_of(mask))
            .nest(5, &value_of(&vec![0; mask.len()]));
        self.step("bitwise", &data)
    }

    pub(super) fn value(self, to: Register, value: &[u8]) -> Self {
        let data = Attributes::default()
            .be32(1, to.0)
            .nest(2, &value_of(value));
        self.step("immediate", &data)
    }

    /// The id of the socket's cgroup at `level`; the rule ends where the socket is not that deep.
    pub(super) fn socket_cgroup(self, level: u32, to: Register) -> Self {
        let data = Attributes::default()
            .be32(1, 3)
            .be32(2, to.0)
            .be32(3, level);
        self.step("socket", &data)
    }

    /// The rule ends here unless `from` is in the set.
    pub(super) fn only_if_in(self, set: &str, from: Register) -> Self {
        let data = Attributes::default().string(1, set).be32(2, from.0);
        self.step("lookup", &data)
    }

    /// The rule ends here if `from` is in the set.
    pub(super) fn only_if_not_in(self, set: &str, from: Register) -> Self {
        let data = Attributes::default()
            .string(1, set)
            .be32(2, from.0)
            .be32(5, 1);
        self.step("lookup", &data)
    }

    /// What the map says to `from`; the rule ends where it says nothing.
    pub(super) fn map(self, map: &str, from: Register, to: Register) -> Self {
        let data = Attributes::default()
            .string(1, map)
            .be32(2, from.0)
            .be32(3, to.0);
        self.step("lookup", &data)
    }

    /// Adds the key to a dynamic set, or starts its time anew.
    pub(super) fn update(self, set: &str, key: Register) -> Self {
        let data = Attributes::default()
            .string(1, set)
            .be32(3, 1)
            .be32(4, key.0);
        self.step("dynset", &data)
    }

    /// The same, for another time than the set's own.
    pub(super) fn update_for(self, set: &str, key: Register, lifetime_ms: u64) -> Self {
        let data = Attributes::default()
            .string(1, set)
            .be32(3, 1)
            .be32(4, key.0)
            .be64(6, lifetime_ms);
        self.step("dynset", &data)
    }

    /// Takes the key out of a dynamic set, if it is there.
    pub(super) fn forget(self, set: &str, key: Register) -> Self {
        let data = Attributes::default()
            .string(1, set)
            .be32(3, 2)
            .be32(4, key.0);
        self.step("dynset", &data)
    }

    /// The same as [`Self::update`], and counts packets by key. The rule ends where the set has no room.
    pub(super) fn count(self, set: &str, key: Register) -> Self {
        let counter = Attributes::default()
            .string(1, "counter")
            .nest(2, &Attributes::default());
        let data = Attributes::default()
            .string(1, set)
            .be32(3, 1)
            .be32(4, key.0)
            .nest(7, &counter);
        self.step("dynset", &data)
    }

    /// Goes on with packets of a key that come oftener than `rate` a second, after `burst` of them. The rule ends for all
    /// others, and for keys that the set has no room for.
    pub(super) fn beyond_share(self, set: &str, key: Register, rate: u64, burst: u32) -> Self {
        let limit = Attributes::default()
            .string(1, "limit")
            .nest(2, &limit_beyond(rate, burst));
        let data = Attributes::default()
            .string(1, set)
            .be32(3, 1)
            .be32(4, key.0)
            .nest(7, &limit);
        self.step("dynset", &data)
    }

    /// The same of all packets that come by here.
    pub(super) fn beyond(self, rate: u64, burst: u32) -> Self {
        self.step("limit", &limit_beyond(rate, burst))
    }

    /// Gives the packet to the transparent socket that listens at (address, port); the rule ends where none does.
    pub(super) fn tproxy(self, family: u8, address: Register, port: Register) -> Self {
        let data = Attributes::default()
            .be32(1, family.into())
            .be32(2, address.0)
            .be32(3, port.0);
        self.step("tproxy", &data)
    }

    pub(super) fn reject_with_reset(self) -> Self {
        let data = Attributes::default().be32(1, 1).bytes(2, &[0]);
        self.step("reject", &data)
    }

    /// ICMP or ICMPv6 "port unreachable", by the packet's family.
    pub(super) fn reject_as_unreachable(self) -> Self {
        let data = Attributes::default().be32(1, 2).bytes(2, &[1]);
        self.step("reject", &data)
    }

    pub(super) fn accept(self) -> Self {
        self.verdict(1, None)
    }

    pub(super) fn drop(self) -> Self {
        self.verdict(0, None)
    }

    pub(super) fn go_to(self, chain: &str) -> Self {
        self.verdict(-4, Some(chain))
    }

    pub(super) fn back(self) -> Self {
        self.verdict(-5, None)
    }

    fn verdict(self, code: i32, chain: Option<&str>) -> Self {
        let mut verdict = Attributes::default().be32(1, code.cast_unsigned());
        if let Some(chain) = chain {
            verdict = verdict.string(2, chain);
        }
        let data = Attributes::default()
            .be32(1, 0)
            .nest(2, &Attributes::default().nest(2, &verdict));
        self.step("immediate", &data)
    }
}

fn value_of(bytes: &[u8]) -> Attributes {
    Attributes::default().bytes(1, bytes)
}

/// Packets a second, inverted.
fn limit_beyond(rate: u64, burst: u32) -> Attributes {
    Attributes::default()
        .be64(1, rate)
        .be64(2, 1)
        .be32(3, burst)
        .be32(4, 0)
        .be32(5, 1)
}

/// A set or map to be declared.
#[derive(Clone, Copy, Debug)]
pub(super) struct SetShape<'a> {
    pub(super) name: &'a str,
    /// Number of the declaration within its batch.
    pub(super) id: u32,
    pub(super) key: &'a [Type],
    pub(super) value: Option<Type>,
    /// For a set that rules fill: lifetime of an element in milliseconds and number of elements.
    pub(super) dynamic: Option<(u64, u32)>,
    /// Whether elements are ranges of joined fields.
    pub(super) ranges: bool,
}

impl<'a> SetShape<'a> {
    /// A plain set or map that we fill.
    pub(super) const fn plain(
        name: &'a str,
        id: u32,
        key: &'a [Type],
        value: Option<Type>,
    ) -> Self {
        Self {
            name,
            id,
            key,
            value,
            dynamic: None,
            ranges: false,
        }
    }
}

/// Makes the messages for one table.
#[derive(Clone, Copy, Debug)]
pub(super) struct Scribe<'a> {
    pub(super) table: &'a str,
}

impl Scribe<'_> {
    pub(super) fn new_table(self) -> Message {
        let attributes = Attributes::default()
            .string(1, self.table)
            .be32(2, TABLE_OWNED);
        message(NEW_TABLE, CREATE | EXCLUSIVE, &attributes)
    }

    /// A table that everybody may change and that outlives us; one of this name is kept, and does its work.
    pub(super) fn unowned_table(self) -> Message {
        let attributes = Attributes::default().string(1, self.table).be32(2, 0);
        message(NEW_TABLE, CREATE, &attributes)
    }

    pub(super) fn get_table(self) -> Message {
        message(GET_TABLE, 0, &Attributes::default().string(1, self.table))
    }

    /// Asks for all elements of a set; [`elements_of`] reads the answers.
    pub(super) fn get_elements(self, set: &str) -> Message {
        let attributes = Attributes::default().string(1, self.table).string(2, set);
        message(GET_ELEMENTS, DUMP, &attributes)
    }

    pub(super) fn delete_table(self) -> Message {
        message(
            DELETE_TABLE,
            0,
            &Attributes::default().string(1, self.table),
        )
    }

    pub(super) fn new_chain(self, name: &str) -> Message {
        let attributes = Attributes::default().string(1, self.table).string(3, name);
        message(NEW_CHAIN, CREATE, &attributes)
    }

    pub(super) fn new_hook(self, name: &str, kind: &str, hook: Hook, priority: i32) -> Message {
        let place = Attributes::default()
            .be32(1, hook as u32)
            .be32(2, priority.cast_unsigned());
        let attributes = Attributes::default()
            .string(1, self.table)
            .string(3, name)
            .nest(4, &place)
            .string(7, kind);
        message(NEW_CHAIN, CREATE, &attributes)
    }

    pub(super) fn empty_chain(self, name: &str) -> Message {
        let attributes = Attributes::default().string(1, self.table).string(2, name);
        message(DELETE_RULE, 0, &attributes)
    }

    /// Empties all chains of the table.
    pub(super) fn empty_chains(self) -> Message {
        message(DELETE_RULE, 0, &Attributes::default().string(1, self.table))
    }

    pub(super) fn new_rule(self, chain: &str, steps: &Steps) -> Message {
        let attributes = Attributes::default()
            .string(1, self.table)
            .string(2, chain)
            .nest(4, &steps.0);
        message(NEW_RULE, CREATE | APPEND, &attributes)
    }

    pub(super) fn new_set(self, shape: SetShape<'_>) -> Message {
        let mut flags = 0;
        // Types of joined fields are six bits each; the fields are padded to whole registers.
        let key_type = shape
            .key
            .iter()
            .fold(0, |joined, field| joined << 6 | *field as u32);
        let padded = |field: &Type| field.bytes().next_multiple_of(4);
        let key_length = match shape.key {
            [only] => only.bytes(),
            fields => fields.iter().map(padded).sum(),
        };
        let mut attributes = Attributes::default()
            .string(1, self.table)
            .string(2, shape.name)
            .be32(4, key_type)
            .be32(5, key_length)
            .be32(10, shape.id);
        let mut notes = vec![];
        if let [only] = shape.key {
            notes = order_note(0, only.byte_order());
        }
        if let Some(value) = shape.value {
            flags |= SET_MAP;
            notes.extend(order_note(1, value.byte_order()));
            attributes = attributes.be32(6, value as u32).be32(7, value.bytes());
        }
        if let Some((lifetime, size)) = shape.dynamic {
            flags |= SET_DYNAMIC | SET_TIMEOUT;
            attributes = attributes
                .nest(9, &Attributes::default().be32(1, size))
                .be64(11, lifetime);
        }
        if shape.ranges {
            flags |= SET_INTERVAL | SET_CONCATENATION;
            let fields = shape.key.iter().fold(Attributes::default(), |list, field| {
                list.nest(1, &Attributes::default().be32(1, field.bytes()))
            });
            attributes = attributes.nest(9, &Attributes::default().nest(2, &fields));
        }
        attributes = attributes.be32(3, flags);
        if !notes.is_empty() {
            attributes = attributes.bytes(13, &notes);
        }
        message(NEW_SET, CREATE, &attributes)
    }

    pub(super) fn empty_set(self, name: &str) -> Message {
        let attributes = Attributes::default().string(1, self.table).string(2, name);
        message(DELETE_ELEMENTS, 0, &attributes)
    }

    /// Adds elements (key, value) to a map, in as many messages as they need.
    pub(super) fn elements(self, map: &str, elements: &[(Vec<u8>, Vec<u8>)]) -> Vec<Message> {
        let element = |(key, value): &(Vec<u8>, Vec<u8>)| {
            Attributes::default()
                .nest(KEY, &value_of(key))
                .nest(2, &value_of(value))
        };
        self.add(map, elements, element)
    }

    /// Adds keys to a set.
    pub(super) fn members(self, set: &str, keys: &[Vec<u8>]) -> Vec<Message> {
        self.add(set, keys, |key| {
            Attributes::default().nest(KEY, &value_of(key))
        })
    }

    /// Adds a key that leaves the set by itself after so many milliseconds.
    pub(super) fn passing_member(self, set: &str, key: &[u8], lifetime: u64) -> Vec<Message> {
        self.add(set, &[key], |key| {
            Attributes::default()
                .nest(KEY, &value_of(key))
                .be64(ELEMENT_TIMEOUT, lifetime)
        })
    }

    /// Adds ranges (first, last) to a set of ranges.
    pub(super) fn ranges(self, set: &str, ranges: &[(Vec<u8>, Vec<u8>)]) -> Vec<Message> {
        self.add(set, ranges, |(first, last)| {
            Attributes::default()
                .nest(KEY, &value_of(first))
                .nest(KEY_END, &value_of(last))
        })
    }

    fn add<T>(self, set: &str, all: &[T], element: impl Fn(&T) -> Attributes) -> Vec<Message> {
        let chunks = all.chunks(ELEMENTS_PER_MESSAGE).map(|chunk| {
            let list = chunk.iter().fold(Attributes::default(), |list, one| {
                list.nest(1, &element(one))
            });
            let attributes = Attributes::default()
                .string(1, self.table)
                .string(2, set)
                .nest(3, &list);
            message(NEW_ELEMENTS, CREATE, &attributes)
        });
        chunks.collect()
    }
}

/// Asks for the number that grows with each change of any table.
pub(super) fn get_generation() -> Message {
    message(GET_GENERATION, 0, &Attributes::default())
}

/// Reads the answer to it.
pub(super) fn generation_of(body: &[u8]) -> Option<u32> {
    let id = value_at(body.get(4..)?, 1)?;
    Some(u32::from_be_bytes(id.try_into().ok()?))
}

/// Reads (key, packets) of each element of one answer.
pub(super) fn elements_of(body: &[u8]) -> impl Iterator<Item = (&[u8], u64)> {
    let list = body.get(4..).and_then(|body| value_at(body, 3));
    attributes(list.unwrap_or_default()).filter_map(|(_, element)| {
        let key = value_at(value_at(element, KEY)?, 1)?;
        let packets = value_at(element, ELEMENT_EXPRESSION)
            .and_then(|counter| value_at(value_at(counter, 2)?, 2))
            .and_then(|packets| packets.try_into().ok())
            .map_or(0, u64::from_be_bytes);
        Some((key, packets))
    })
}

fn value_at(bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    let mut all = attributes(bytes);
    all.find(|(kind, _)| *kind == wanted)
        .map(|(_, value)| value)
}

/// A type-length-value of libnftnl: byte order of the key (0) or the value (1).
fn order_note(which: u8, order: u8) -> Vec<u8> {
    vec![which, 4, order, 0, 0, 0]
}

fn message(kind: u16, flags: u16, attributes: &Attributes) -> Message {
    let header = [NFPROTO_INET, 0, 0, 0];
    Message::new(NFNL_SUBSYS_NFTABLES << 8 | kind, flags, &header, attributes)
}

/// The messages around a batch.
pub(super) fn batch_bounds() -> (Message, Message) {
    let [high, low] = NFNL_SUBSYS_NFTABLES.to_be_bytes();
    let bound = |kind| Message::new(kind, 0, &[0, 0, high, low], &Attributes::default());
    (bound(NFNL_MSG_BATCH_BEGIN), bound(NFNL_MSG_BATCH_END))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(text: &str) -> Vec<u8> {
        let digits: Vec<u8> = text
            .chars()
            .filter_map(|c| c.to_digit(16))
            .map(|d| u8::try_from(d).unwrap())
            .collect();
        digits
            .chunks(2)
            .map(|pair| pair[0] << 4 | pair[1])
            .collect()
    }

    // The bytes that `nft --debug=mnl` (1.0.6) shows for `nft add chain inet mw output '{ type route hook output
    // priority -150; }'`, with the flag "nested" where the kernel's policy asks for it.
    #[test]
    fn a_base_chain_is_the_bytes_that_nft_sends() {
        let scribe = Scribe { table: "mw" };
        let bytes = scribe
            .new_hook("output", "route", Hook::Output, -150)
            .to_bytes(5);
        assert_eq!(
            bytes,
            hex("48000000 030a 0104 05000000 00000000 01000000 \
                 0700 0100 6d770000 0b00 0300 6f7574707574 0000 \
                 1400 0480 0800 0100 00000003 0800 0200 ffffff6a \
                 0a00 0700 726f7574650000 00")
        );
    }

    #[test]
    fn a_map_declares_its_types_and_their_order() {
        let bytes = Scribe { table: "mw" }
            .new_set(SetShape::plain(
                "uid_mark",
                1,
                &[Type::Uid],
                Some(Type::Mark),
            ))
            .to_bytes(7);
        assert_eq!(
            bytes,
            hex("6c000000 090a 0104 07000000 00000000 01000000 \
                 0700 0100 6d770000 0d00 0200 7569645f6d61726b 00000000 \
                 0800 0400 00000018 0800 0500 00000004 0800 0a00 00000001 \
                 0800 0600 00000013 0800 0700 00000004 0800 0300 00000008 \
                 1000 0d00 000401000000 010401000000")
        );
    }

    #[test]
    fn elements_are_cut_into_messages_that_fit() {
        let elements: Vec<_> = (0..1_200_u64)
            .map(|i| (i.to_ne_bytes().to_vec(), vec![0; 4]))
            .collect();
        let messages = Scribe { table: "mw" }.elements("m", &elements);
        assert_eq!(messages.len(), 3);
        assert!(messages.iter().all(|m| m.to_bytes(0).len() < 60_000));
    }
}
