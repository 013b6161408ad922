//! Looks at the kernel for `mesh-agent check`: whether all of ours stands, and what of others stands in its way. Nothing
//! is changed. It is run by root beside the agent, so that it says something when no agent runs, too.

use std::collections::BTreeSet;
use std::io;

use super::netlink::{Attributes, Connection, DUMP, Message, attributes, errno_of, read_u32};
use super::routes::{
    FRA_FWMARK, FRA_FWMASK, FRA_PRIORITY, FRA_TABLE, IFLA_IFNAME, MAIN_TABLE, OUR_PROTOCOL,
    RTA_DST, RTA_TABLE, RTM_GETLINK, RTM_GETROUTE, RTN_LOCAL, V4, V6, rules,
};
use super::{CaptureSettings, VipRanges};

const RTM_GETRULE: u16 = 34;
const NFNL_SUBSYS_NFTABLES: u16 = 10;
const GET_TABLE: u16 = 1;
const GET_CHAIN: u16 = 4;
const NFTA_TABLE_NAME: u16 = 1;
const NFTA_CHAIN_TABLE: u16 = 1;
const NFTA_CHAIN_NAME: u16 = 3;
const NFTA_CHAIN_HOOK: u16 = 4;
const NFTA_CHAIN_POLICY: u16 = 5;
const NFTA_HOOK_NUMBER: u16 = 1;
/// `NF_INET_LOCAL_IN`.
const HOOK_INPUT: u32 = 1;
const POLICY_DROP: u32 = 0;
/// `RT_TABLE_LOCAL`: before everything, on every host.
const LOCAL_TABLE: u32 = 255;
/// The kernel's switch for IPv6 of one link; absent without IPv6.
const IPV6_OFF: &str = "/proc/sys/net/ipv6/conf";
/// Where bridges call the packet filter; absent where they can not.
const BRIDGES_CALL: &str = "/proc/sys/net/bridge";

/// What stands in the kernel.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Inspection {
    /// Of ours, and not there.
    pub(crate) missing: Missing,
    /// Of others, and in the way of ours.
    pub(crate) clashes: Vec<String>,
    /// Chains of others that drop what comes in unless a rule lets it.
    pub(crate) input_drops: Vec<String>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Missing {
    /// The table of the packet filter.
    pub(crate) table: bool,
    /// The link of the virtual addresses, or that it is up.
    pub(crate) link: bool,
    /// Routes and policy rules, in words.
    pub(crate) routes: Vec<String>,
}

/// Looks.
pub(crate) fn inspect(
    settings: &CaptureSettings,
    ranges: &VipRanges,
) -> Result<Inspection, String> {
    let failed = |error: io::Error| format!("the kernel can not be asked: {error}");
    let mut found = Inspection::default();
    look_at_filter(settings, &mut found).map_err(failed)?;
    if !settings.bridges.is_empty() {
        found.clashes.extend(bridges_that_call());
    }
    let mut routes = Connection::open(netlink_sys::protocols::NETLINK_ROUTE).map_err(failed)?;
    found.missing.link = !link_is_up(&mut routes, &settings.link).map_err(failed)?;
    for (family, range) in [(V4, ranges.v4), (V6, ranges.v6)] {
        if family == V6 && !does_ipv6(&settings.link) {
            continue;
        }
        look_at_rules(&mut routes, settings, family, &mut found).map_err(failed)?;
        let octets = super::routes::octets(range.address);
        look_at_routes(&mut routes, settings, family, &octets, &mut found).map_err(failed)?;
    }
    Ok(found)
}

/// A SYN of a container then loses its listener on the way from the bridge to the host.
fn bridges_that_call() -> Vec<String> {
    let on = |name: &&str| {
        let text = std::fs::read_to_string(format!("{BRIDGES_CALL}/{name}"));
        text.is_ok_and(|text| text.trim() != "0")
    };
    let names = ["bridge-nf-call-iptables", "bridge-nf-call-ip6tables"];
    let names = names.iter().filter(|name| on(name));
    let told = names.map(|name| {
        format!("net.bridge.{name} is not 0, so calls of containers (capture.bridges) are refused")
    });
    told.collect()
}

fn does_ipv6(link: &str) -> bool {
    let off = |name: &str| std::fs::read_to_string(format!("{IPV6_OFF}/{name}/disable_ipv6"));
    // Without the link the host as a whole decides.
    match off(link).or_else(|_| off("all")) {
        Ok(text) => text.trim() == "0",
        Err(_) => false,
    }
}

const fn name_of(family: u8) -> &'static str {
    if family == V4 { "IPv4" } else { "IPv6" }
}

fn text(value: &[u8]) -> String {
    String::from_utf8_lossy(value.strip_suffix(&[0]).unwrap_or(value)).into_owned()
}

fn be32(value: &[u8]) -> Option<u32> {
    value.try_into().ok().map(u32::from_be_bytes)
}

/// The value of an attribute in host order, as rtnetlink has them.
fn number(body: &[u8], kind: u16) -> Option<u32> {
    let (_, value) = attributes(body).find(|(found, _)| *found == kind)?;
    read_u32(value, 0)
}

fn look_at_filter(settings: &CaptureSettings, found: &mut Inspection) -> io::Result<()> {
    let mut connection = Connection::open(netlink_sys::protocols::NETLINK_NETFILTER)?;
    let dump = |what: u16| {
        let kind = NFNL_SUBSYS_NFTABLES << 8 | what;
        Message::new(kind, DUMP, &[0, 0, 0, 0], &Attributes::default())
    };
    let mut tables = BTreeSet::new();
    connection.query(&dump(GET_TABLE), |_, body| {
        let names = attributes(body.get(4..).unwrap_or_default());
        tables.extend(
            names
                .filter(|(kind, _)| *kind == NFTA_TABLE_NAME)
                .map(|(_, name)| text(name)),
        );
    })?;
    found.missing.table = !tables.contains(&settings.table);
    let mut drops = Vec::new();
    connection.query(&dump(GET_CHAIN), |_, body| {
        let fields = body.get(4..).unwrap_or_default();
        let field = |wanted| {
            let mut all = attributes(fields);
            all.find(|(kind, _)| *kind == wanted)
                .map(|(_, value)| value)
        };
        let hook = field(NFTA_CHAIN_HOOK).and_then(|hook| {
            let (_, number) = attributes(hook).find(|(kind, _)| *kind == NFTA_HOOK_NUMBER)?;
            be32(number)
        });
        let policy = field(NFTA_CHAIN_POLICY).and_then(be32);
        let table = field(NFTA_CHAIN_TABLE).map(text).unwrap_or_default();
        let ours = table == settings.table;
        if hook == Some(HOOK_INPUT) && policy == Some(POLICY_DROP) && !ours {
            let chain = field(NFTA_CHAIN_NAME).map(text).unwrap_or_default();
            drops.push(format!("chain `{chain}` of table `{table}`"));
        }
    })?;
    found.input_drops = drops;
    Ok(())
}

fn link_is_up(connection: &mut Connection, name: &str) -> io::Result<bool> {
    let query = Message::new(
        RTM_GETLINK,
        0,
        &[0; 16],
        &Attributes::default().string(IFLA_IFNAME, name),
    );
    let mut up = false;
    let outcome = connection.query(&query, |_, body| {
        let flags = read_u32(body, 8).unwrap_or_default();
        up = flags & libc::IFF_UP.cast_unsigned() != 0;
    });
    match outcome {
        Err(error) if errno_of(&error) == Some(libc::ENODEV) => Ok(false),
        other => other.map(|()| up),
    }
}

fn look_at_rules(
    connection: &mut Connection,
    settings: &CaptureSettings,
    family: u8,
    found: &mut Inspection,
) -> io::Result<()> {
    let mut header = [0; 12];
    header[0] = family;
    let query = Message::new(RTM_GETRULE, DUMP, &header, &Attributes::default());
    let ours = rules(settings, family);
    let mut seen = [false; 2];
    let mut clashes = Vec::new();
    connection.query(&query, |_, body| {
        let fields = body.get(12..).unwrap_or_default();
        let has = |wanted: (u16, &[u8])| attributes(fields).any(|field| field == wanted);
        let which = ours.iter().position(|rule| {
            let mut wanted = attributes(rule.attributes.as_bytes());
            wanted.all(has)
        });
        match which {
            Some(which) => seen[which] = true,
            None => clashes.extend(clash_of_rule(settings, family, fields)),
        }
    })?;
    for (rule, seen) in ours.iter().zip(seen) {
        if !seen {
            let missing = format!("the {} ({})", rule.what, name_of(family));
            found.missing.routes.push(missing);
        }
    }
    found.clashes.extend(clashes);
    Ok(())
}

/// What is wrong with a policy rule that is not ours.
fn clash_of_rule(settings: &CaptureSettings, family: u8, fields: &[u8]) -> Option<String> {
    let priority = number(fields, FRA_PRIORITY).unwrap_or_default();
    let table = number(fields, FRA_TABLE).unwrap_or_default();
    let family = name_of(family);
    if table == settings.route_table {
        return Some(format!(
            "the {family} policy rule {priority} leads into table {table}, which is ours (capture.route_table)"
        ));
    }
    let (mark, mask) = settings.marks().to_loopback();
    if let Some(theirs) = number(fields, FRA_FWMARK)
        && priority <= settings.rule_priority
        && table != LOCAL_TABLE
    {
        let their_mask = number(fields, FRA_FWMASK).unwrap_or(u32::MAX);
        if (theirs ^ mark) & their_mask & mask == 0 {
            return Some(format!(
                "the {family} policy rule {priority} takes packets with our marks ({theirs:#x}/{their_mask:#x}) before ours \
                 does (capture.mark_base, capture.rule_priority)"
            ));
        }
    }
    None
}

fn look_at_routes(
    connection: &mut Connection,
    settings: &CaptureSettings,
    family: u8,
    range: &[u8],
    found: &mut Inspection,
) -> io::Result<()> {
    let mut header = [0; 12];
    header[0] = family;
    let query = Message::new(RTM_GETROUTE, DUMP, &header, &Attributes::default());
    let (mut to_loopback, mut to_link) = (false, false);
    let mut clashes = Vec::new();
    connection.query(&query, |_, body| {
        let Some((&[_, _, _, _, _, protocol, _, kind, ..], fields)) =
            body.split_first_chunk::<12>()
        else {
            return;
        };
        let table = number(fields, RTA_TABLE).unwrap_or_default();
        let ours = protocol == OUR_PROTOCOL;
        if table == settings.route_table {
            to_loopback |= ours && kind == RTN_LOCAL;
            if !ours {
                clashes.push(format!(
                    "table {table} has an {} route that is not ours (capture.route_table)",
                    name_of(family)
                ));
            }
        }
        let here = attributes(fields).any(|(kind, value)| kind == RTA_DST && value == range);
        to_link |= table == MAIN_TABLE && ours && here;
    })?;
    for (stands, what) in [
        (to_loopback, "the local route of marked packets"),
        (to_link, "the route of the virtual addresses"),
    ] {
        if !stands {
            found
                .missing
                .routes
                .push(format!("{what} ({})", name_of(family)));
        }
    }
    clashes.dedup();
    found.clashes.extend(clashes);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_rules_that_take_what_is_ours_clash() {
        let settings = CaptureSettings::default();
        let rule = |priority: u32, table: u32, mark: Option<(u32, u32)>| {
            let mut fields = Attributes::default()
                .ne32(FRA_PRIORITY, priority)
                .ne32(FRA_TABLE, table);
            if let Some((mark, mask)) = mark {
                fields = fields.ne32(FRA_FWMARK, mark).ne32(FRA_FWMASK, mask);
            }
            clash_of_rule(&settings, V4, fields.as_bytes())
        };
        assert_eq!(rule(0, LOCAL_TABLE, None), None);
        assert_eq!(rule(32_766, MAIN_TABLE, None), None);
        assert_eq!(
            rule(5_210, 52, Some((0x8_0000, 0xff_0000))),
            None,
            "after ours"
        );
        assert_eq!(
            rule(100, 52, Some((0x8_0000, 0xff_0000))),
            None,
            "another mark"
        );
        assert!(rule(100, 52, Some((0x4d00_8000, 0xffff_8000))).is_some());
        assert!(
            rule(100, 52, Some((0x1, 0x1))).is_some(),
            "every other workload"
        );
        assert!(rule(9_000, settings.route_table, None).is_some());
    }
}
