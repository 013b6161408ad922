//! The link `mesh0`, the routes of the virtual addresses to it, and the policy rules that bring marked packets to `lo`.
//!
//! The link is a bridge without ports: an unmarked packet to a virtual address dies in it, so that no failure of ours
//! lets one out or makes another local program answer. No sysctl is changed. A host without IPv6 has the IPv4 half;
//! the other way round likewise.

use std::io;
use std::net::IpAddr;

use mesh_core::policy::Cidr;

use super::app_socket::{FIRST_PORT, LAST_PORT};
use super::netlink::{
    Attributes, CREATE, Connection, DUMP, EXCLUSIVE, Message, REPLACE, attributes, errno_of,
    read_u32,
};
use super::{CaptureError, CaptureSettings, VipRanges};

const RTM_NEWLINK: u16 = 16;
const RTM_DELLINK: u16 = 17;
pub(super) const RTM_GETLINK: u16 = 18;
const RTM_NEWADDR: u16 = 20;
const RTM_NEWROUTE: u16 = 24;
const RTM_DELROUTE: u16 = 25;
pub(super) const RTM_GETROUTE: u16 = 26;
const RTM_NEWRULE: u16 = 32;
const RTM_DELRULE: u16 = 33;

pub(super) const IFLA_IFNAME: u16 = 3;
const IFLA_LINKINFO: u16 = 18;
const IFLA_INFO_KIND: u16 = 1;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_F_NODAD: u8 = 0x02;
pub(super) const RTA_DST: u16 = 1;
pub(super) const RTA_OIF: u16 = 4;
const RTA_PREFSRC: u16 = 7;
pub(super) const RTA_TABLE: u16 = 15;
const FRA_SRC: u16 = 2;
const FRA_IIFNAME: u16 = 3;
pub(super) const FRA_PRIORITY: u16 = 6;
pub(super) const FRA_FWMARK: u16 = 10;
pub(super) const FRA_TABLE: u16 = 15;
pub(super) const FRA_FWMASK: u16 = 16;
const FRA_IP_PROTO: u16 = 22;
const FRA_DPORT_RANGE: u16 = 24;

pub(super) const MAIN_TABLE: u32 = 254;
/// Names us as the maker of a route: `ip route` shows it, and by it all of them are found again.
pub(super) const OUR_PROTOCOL: u8 = 174;
const IPPROTO_TCP: u8 = 6;
const SCOPE_UNIVERSE: u8 = 0;
const SCOPE_LINK: u8 = 253;
const SCOPE_HOST: u8 = 254;
const RTN_UNICAST: u8 = 1;
pub(super) const RTN_LOCAL: u8 = 2;
const RTN_UNREACHABLE: u8 = 7;
const FR_ACT_TO_TBL: u8 = 1;
/// `lo` is the first link of every network namespace.
const LO_INDEX: u32 = 1;
const BRIDGE: &str = "bridge";
/// A rule may stand more than once if somebody added it by hand.
const COPIES_MAX: usize = 16;

pub(super) const FAMILIES: [u8; 2] = [V4, V6];
pub(super) const V4: u8 = 2;
pub(super) const V6: u8 = 10;

/// Makes what is missing.
pub(super) fn ensure(settings: &CaptureSettings, ranges: &VipRanges) -> Result<(), CaptureError> {
    let mut kernel = Kernel::open()?;
    let index = kernel.ensure_link(&settings.link)?;
    let mut working = 0;
    let mut last = None;
    for range in [ranges.v4, ranges.v6] {
        match kernel.ensure_family(settings, ranges, range, index) {
            Ok(()) => working += 1,
            Err(error) if error.is_absent_family() => {
                log::warn!(
                    range:% = range, error:% = error.source;
                    "this host does not do the address family; virtual addresses of the other one work"
                );
                kernel.close_range(range);
                last = Some(error);
            }
            Err(error) => return Err(error.into()),
        }
    }
    match last {
        Some(error) if working == 0 => Err(error.into()),
        _ => Ok(()),
    }
}

/// Makes what is missing and names it. Nothing that stands is touched.
pub(super) fn repair(
    settings: &CaptureSettings,
    ranges: &VipRanges,
) -> Result<Vec<String>, CaptureError> {
    let mut kernel = Kernel::open()?;
    let mut missing = Vec::new();
    if kernel.link_index(&settings.link)?.is_none() {
        missing.push(format!("the link `{}`", settings.link));
    }
    let index = kernel.ensure_link(&settings.link)?;
    for range in [ranges.v4, ranges.v6] {
        let own = ranges.own(range);
        let family = family_of(own);
        let mut steps = vec![
            (
                format!("the address {own}"),
                address_message(own, index, CREATE | EXCLUSIVE),
            ),
            (
                format!("the route of {range}"),
                range_route(range, own, index, CREATE | EXCLUSIVE),
            ),
            (
                format!("the local route in table {}", settings.route_table),
                loopback_route(settings, family, RTM_NEWROUTE, CREATE | EXCLUSIVE),
            ),
        ];
        for rule in rules(settings, family) {
            let message = rule.message(RTM_NEWRULE, CREATE | EXCLUSIVE);
            steps.push((format!("the {}", rule.what), message));
        }
        for (what, message) in steps {
            match kernel.0.request(&message) {
                Ok(()) => missing.push(format!("{what} (IPv{})", if family == V4 { 4 } else { 6 })),
                Err(error) if errno_of(&error) == Some(libc::EEXIST) => {}
                Err(source) => {
                    let operation = format!("put back {what}");
                    let error = StepError { operation, source };
                    if !error.is_absent_family() {
                        return Err(error.into());
                    }
                    break;
                }
            }
        }
    }
    Ok(missing)
}

/// Takes away the policy rules and their table.
pub(super) fn remove_rules(settings: &CaptureSettings) -> Result<(), CaptureError> {
    let mut kernel = Kernel::open()?;
    for family in FAMILIES {
        for rule in rules(settings, family) {
            kernel.delete_all(
                &format!("delete the {}", rule.what),
                &rule.message(RTM_DELRULE, 0),
            )?;
        }
        let route = loopback_route(settings, family, RTM_DELROUTE, 0);
        kernel.delete_all("delete the local route", &route)?;
    }
    Ok(())
}

/// Takes away the link and every route of ours.
pub(super) fn remove_link(settings: &CaptureSettings) -> Result<(), CaptureError> {
    let mut kernel = Kernel::open()?;
    if kernel.link_index(&settings.link)?.is_some() {
        let message = link_message(RTM_DELLINK, 0, 0, 0, &name_of(&settings.link));
        kernel.ask(format!("delete the link `{}`", settings.link), &message)?;
    }
    // The link took its own routes with it; what closed a range stands for itself.
    for route in kernel.our_routes()? {
        kernel.delete_all("delete a route of ours", &route)?;
    }
    Ok(())
}

/// A step that failed, before it is known whether that matters.
#[derive(Debug)]
struct StepError {
    operation: String,
    source: io::Error,
}

impl StepError {
    /// The kernel has not this family, or the host has it switched off.
    fn is_absent_family(&self) -> bool {
        matches!(
            errno_of(&self.source),
            Some(libc::EAFNOSUPPORT | libc::EOPNOTSUPP | libc::EACCES | libc::EPFNOSUPPORT)
        )
    }
}

impl From<StepError> for CaptureError {
    fn from(StepError { operation, source }: StepError) -> Self {
        Self::Route { operation, source }
    }
}

struct Kernel(Connection);

impl Kernel {
    fn open() -> Result<Self, StepError> {
        Connection::open(netlink_sys::protocols::NETLINK_ROUTE)
            .map(Self)
            .map_err(|source| StepError {
                operation: "open an rtnetlink socket".to_owned(),
                source,
            })
    }

    fn ask(&mut self, operation: String, message: &Message) -> Result<(), StepError> {
        self.0
            .request(message)
            .map_err(|source| StepError { operation, source })
    }

    /// Deletes until the kernel says that there is none.
    fn delete_all(&mut self, operation: &str, message: &Message) -> Result<(), StepError> {
        for _ in 0..COPIES_MAX {
            match self.0.request(message) {
                Ok(()) => {}
                Err(error)
                    if matches!(
                        errno_of(&error),
                        Some(libc::ENOENT | libc::ESRCH | libc::EAFNOSUPPORT | libc::EOPNOTSUPP)
                    ) =>
                {
                    return Ok(());
                }
                Err(source) => {
                    let operation = operation.to_owned();
                    return Err(StepError { operation, source });
                }
            }
        }
        Ok(())
    }

    /// The number of our link, made and set up if needed.
    fn ensure_link(&mut self, name: &str) -> Result<u32, StepError> {
        let operation = format!("make the link `{name}`");
        let kind = Attributes::default().string(IFLA_INFO_KIND, BRIDGE);
        let attributes = name_of(name).nest(IFLA_LINKINFO, &kind);
        let make = link_message(RTM_NEWLINK, CREATE | EXCLUSIVE, 0, 0, &attributes);
        match self.0.request(&make) {
            Err(error) if errno_of(&error) == Some(libc::EEXIST) => {}
            Err(source) => return Err(StepError { operation, source }),
            Ok(()) => {}
        }
        let index = self.link_index(name)?.ok_or_else(|| StepError {
            operation: operation.clone(),
            source: io::Error::new(
                io::ErrorKind::AlreadyExists,
                "a link of this name and of another kind than bridge stands; set another `link`",
            ),
        })?;
        let up = libc::IFF_UP.cast_unsigned();
        let set_up = link_message(RTM_NEWLINK, 0, index, up, &Attributes::default());
        self.ask(format!("set the link `{name}` up"), &set_up)?;
        Ok(index)
    }

    /// The number of the bridge of this name.
    fn link_index(&mut self, name: &str) -> Result<Option<u32>, StepError> {
        let query = link_message(RTM_GETLINK, 0, 0, 0, &name_of(name));
        let mut found = None;
        let outcome = self.0.query(&query, |_, body| {
            let index = read_u32(body, 4);
            let is_bridge = attributes(body.get(16..).unwrap_or_default())
                .filter(|(kind, _)| *kind == IFLA_LINKINFO)
                .flat_map(|(_, info)| attributes(info))
                .any(|(kind, value)| {
                    kind == IFLA_INFO_KIND
                        && value.strip_suffix(&[0]).unwrap_or(value) == BRIDGE.as_bytes()
                });
            if is_bridge {
                found = index;
            }
        });
        match outcome {
            Ok(()) => Ok(found),
            Err(error) if errno_of(&error) == Some(libc::ENODEV) => Ok(None),
            Err(source) => Err(StepError {
                operation: format!("look up the link `{name}`"),
                source,
            }),
        }
    }

    /// Messages that delete the routes in the main table that we made.
    fn our_routes(&mut self) -> Result<Vec<Message>, StepError> {
        let mut ours = Vec::new();
        for family in FAMILIES {
            let header = route_header(family, 0, 0, 0);
            let query = Message::new(RTM_GETROUTE, DUMP, &header, &Attributes::default());
            let outcome = self.0.query(&query, |_, body| {
                let Some((header, rest)) = body.split_first_chunk::<12>() else {
                    return;
                };
                let [found, _, _, _, table, protocol, ..] = *header;
                let destination = attributes(rest).find(|(kind, _)| *kind == RTA_DST);
                if let Some((_, destination)) = destination
                    && (found, protocol) == (family, OUR_PROTOCOL)
                    && u32::from(table) == MAIN_TABLE
                {
                    let attributes = Attributes::default().bytes(RTA_DST, destination);
                    ours.push(Message::new(RTM_DELROUTE, 0, header, &attributes));
                }
            });
            match outcome {
                Err(error)
                    if matches!(
                        errno_of(&error),
                        Some(libc::EAFNOSUPPORT | libc::EOPNOTSUPP)
                    ) => {}
                Err(source) => {
                    let operation = "list routes".to_owned();
                    return Err(StepError { operation, source });
                }
                Ok(()) => {}
            }
        }
        Ok(ours)
    }

    fn ensure_family(
        &mut self,
        settings: &CaptureSettings,
        ranges: &VipRanges,
        range: Cidr,
        index: u32,
    ) -> Result<(), StepError> {
        let own = ranges.own(range);
        let family = family_of(own);
        self.ask(
            format!("give the link `{}` the address {own}", settings.link),
            &address_message(own, index, CREATE | REPLACE),
        )?;
        self.ask(
            format!("route {range} to the link `{}`", settings.link),
            &range_route(range, own, index, CREATE | REPLACE),
        )?;
        self.ask(
            format!("make the local route in table {}", settings.route_table),
            &loopback_route(settings, family, RTM_NEWROUTE, CREATE | REPLACE),
        )?;
        for rule in rules(settings, family) {
            match self
                .0
                .request(&rule.message(RTM_NEWRULE, CREATE | EXCLUSIVE))
            {
                Err(error) if errno_of(&error) == Some(libc::EEXIST) => {}
                Err(source) => {
                    let operation = format!("make the {}", rule.what);
                    return Err(StepError { operation, source });
                }
                Ok(()) => {}
            }
        }
        Ok(())
    }

    /// Where a family is off on our link only, its virtual addresses must not follow the default route.
    fn close_range(&mut self, range: Cidr) {
        let attributes = Attributes::default()
            .bytes(RTA_DST, &octets(range.address))
            .ne32(RTA_TABLE, MAIN_TABLE);
        let header = route_header(
            family_of(range.address),
            range.prefix,
            SCOPE_UNIVERSE,
            RTN_UNREACHABLE,
        );
        let message = Message::new(RTM_NEWROUTE, CREATE | REPLACE, &header, &attributes);
        if let Err(error) = self.0.request(&message) {
            // Without the family in the kernel there is nothing to close.
            log::debug!(range:% = range, error:% = error; "no closing route");
        }
    }
}

/// One policy rule.
pub(super) struct Rule {
    pub(super) what: &'static str,
    family: u8,
    source_prefix: u8,
    pub(super) attributes: Attributes,
}

impl Rule {
    fn message(&self, kind: u16, flags: u16) -> Message {
        let header = [
            self.family,
            0,
            self.source_prefix,
            0,
            0,
            0,
            0,
            FR_ACT_TO_TBL,
            0,
            0,
            0,
            0,
        ];
        Message::new(kind, flags, &header, &self.attributes)
    }
}

pub(super) fn rules(settings: &CaptureSettings, family: u8) -> [Rule; 2] {
    let (mark, mask) = settings.marks().to_loopback();
    let common = |priority| {
        Attributes::default()
            .ne32(FRA_PRIORITY, priority)
            .ne32(FRA_TABLE, settings.route_table)
    };
    let (loopback, source_prefix): (&[u8], u8) = if family == V4 {
        (&[127, 0, 0, 0], 8)
    } else {
        (&[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1], 128)
    };
    let [a, b] = FIRST_PORT.to_ne_bytes();
    let [c, d] = LAST_PORT.to_ne_bytes();
    let shown_ports = [a, b, c, d];
    [
        Rule {
            what: "policy rule by mark",
            family,
            source_prefix: 0,
            attributes: common(settings.rule_priority)
                .ne32(FRA_FWMARK, mark)
                .ne32(FRA_FWMASK, mask),
        },
        // An app on 127.0.0.1 answers an address that is not local: without this its packet has no route at all. Only
        // TCP to the ports that we show, so that nothing else from loopback is led back to this host.
        Rule {
            what: "policy rule for answers from loopback",
            family,
            source_prefix,
            attributes: common(settings.rule_priority + 1)
                .bytes(FRA_SRC, loopback)
                .string(FRA_IIFNAME, "lo")
                .bytes(FRA_IP_PROTO, &[IPPROTO_TCP])
                .bytes(FRA_DPORT_RANGE, &shown_ports),
        },
    ]
}

fn loopback_route(settings: &CaptureSettings, family: u8, kind: u16, flags: u16) -> Message {
    let attributes = Attributes::default()
        .ne32(RTA_OIF, LO_INDEX)
        .ne32(RTA_TABLE, settings.route_table);
    let scope = if family == V4 {
        SCOPE_HOST
    } else {
        SCOPE_UNIVERSE
    };
    Message::new(
        kind,
        flags,
        &route_header(family, 0, scope, RTN_LOCAL),
        &attributes,
    )
}

fn range_route(range: Cidr, own: IpAddr, index: u32, flags: u16) -> Message {
    let attributes = Attributes::default()
        .bytes(RTA_DST, &octets(range.address))
        .ne32(RTA_OIF, index)
        .bytes(RTA_PREFSRC, &octets(own))
        .ne32(RTA_TABLE, MAIN_TABLE);
    let scope = if own.is_ipv4() {
        SCOPE_LINK
    } else {
        SCOPE_UNIVERSE
    };
    let header = route_header(family_of(own), range.prefix, scope, RTN_UNICAST);
    Message::new(RTM_NEWROUTE, flags, &header, &attributes)
}

fn route_header(family: u8, prefix: u8, scope: u8, kind: u8) -> [u8; 12] {
    // The table stands in an attribute: its number may be larger than a byte.
    [
        family,
        prefix,
        0,
        0,
        0,
        OUR_PROTOCOL,
        scope,
        kind,
        0,
        0,
        0,
        0,
    ]
}

/// The address without its range, so that no broadcast address comes with it.
fn address_message(own: IpAddr, index: u32, flags: u16) -> Message {
    let bytes = octets(own);
    let prefix = if own.is_ipv4() { 32 } else { 128 };
    let [a, b, c, d] = index.to_ne_bytes();
    let header = [
        family_of(own),
        prefix,
        IFA_F_NODAD,
        SCOPE_UNIVERSE,
        a,
        b,
        c,
        d,
    ];
    let attributes = Attributes::default()
        .bytes(IFA_LOCAL, &bytes)
        .bytes(IFA_ADDRESS, &bytes);
    Message::new(RTM_NEWADDR, flags, &header, &attributes)
}

fn link_message(kind: u16, flags: u16, index: u32, up: u32, attributes: &Attributes) -> Message {
    let mut header = [0; 16];
    header[4..8].copy_from_slice(&index.to_ne_bytes());
    header[8..12].copy_from_slice(&up.to_ne_bytes());
    header[12..16].copy_from_slice(&up.to_ne_bytes());
    Message::new(kind, flags, &header, attributes)
}

fn name_of(link: &str) -> Attributes {
    Attributes::default().string(IFLA_IFNAME, link)
}

const fn family_of(address: IpAddr) -> u8 {
    if address.is_ipv4() { V4 } else { V6 }
}

pub(super) fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rule_by_mark_is_the_bytes_that_ip_rule_sends() {
        let [rule, _] = rules(&CaptureSettings::default(), V4);
        let bytes = rule.message(RTM_NEWRULE, CREATE | EXCLUSIVE).to_bytes(1);
        let expected: &[u8] = &[
            60, 0, 0, 0, 32, 0, 1, 6, 1, 0, 0, 0, 0, 0, 0, 0, // nlmsghdr
            2, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, // fib_rule_hdr
            8, 0, 6, 0, 0xe8, 2, 0, 0, // priority 744
            8, 0, 15, 0, 0x11, 0x1d, 0, 0, // table 7441
            8, 0, 10, 0, 0, 0x80, 0, 0x4d, // mark
            8, 0, 16, 0, 0, 0x80, 0xff, 0xff, // mask
        ];
        assert_eq!(bytes, expected);
    }
}
