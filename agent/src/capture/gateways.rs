//! The gateways of the host's default routes: whether they still answer after a change.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::netlink::{
    Attributes, CREATE, Connection, DUMP, Message, REPLACE, attributes, errno_of, read_u16,
    read_u32,
};
use super::routes::{FAMILIES, MAIN_TABLE, RTA_OIF, RTA_TABLE, RTM_GETROUTE, V4, V6};

const RTM_NEWNEIGH: u16 = 28;
const RTM_GETNEIGH: u16 = 30;
const RTA_GATEWAY: u16 = 5;
const RTA_MULTIPATH: u16 = 9;
const RTA_VIA: u16 = 18;
/// Bytes of `rtnexthop`, which stands before the attributes of each hop of a route that has several.
const NEXT_HOP: usize = 8;
const NDA_DST: u16 = 1;
/// As if a packet were sent to it.
const NTF_USE: u8 = 0x01;
const NTF_EXT_LEARNED: u8 = 0x10;

/// A router answers within milliseconds; the holder does nothing else meanwhile.
const ANSWER_MAX: Duration = Duration::from_millis(500);
const LOOK_EVERY: Duration = Duration::from_millis(10);

const NUD_REACHABLE: u16 = 0x02;
const NUD_STALE: u16 = 0x04;
const NUD_DELAY: u16 = 0x08;
const NUD_PROBE: u16 = 0x10;
const NUD_NOARP: u16 = 0x40;
const NUD_PERMANENT: u16 = 0x80;
/// The link address is known: it answered once.
const KNOWN: u16 = NUD_REACHABLE | NUD_STALE | NUD_DELAY | NUD_PROBE | NUD_NOARP | NUD_PERMANENT;
/// Nothing is left to be asked.
const ANSWERED: u16 = NUD_REACHABLE | NUD_NOARP | NUD_PERMANENT;

/// The next hop of a default route.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Gateway {
    address: IpAddr,
    link: u32,
}

/// Those that answer now: whoever is known is asked for its link address (RFC 4861 §7.3 for IPv6, and the same by ARP), and has
/// [`ANSWER_MAX`].
pub(super) fn answering() -> io::Result<Vec<Gateway>> {
    let mut kernel = open()?;
    let mut known = Vec::new();
    for gateway in defaults(&mut kernel)? {
        if state(&mut kernel, gateway)? & KNOWN != 0 {
            known.push(gateway);
        }
    }
    probe(&mut kernel, &known)?;
    let until = Instant::now() + ANSWER_MAX;
    loop {
        let mut all = true;
        for gateway in &known {
            all &= state(&mut kernel, *gateway)? & ANSWERED != 0;
        }
        if all || until <= Instant::now() {
            break;
        }
        std::thread::sleep(LOOK_EVERY);
    }
    let mut found = Vec::new();
    for gateway in known {
        if state(&mut kernel, gateway)? & ANSWERED != 0 {
            found.push(gateway);
        }
    }
    Ok(found)
}

/// Asks these again.
pub(crate) fn ask(gateways: &[Gateway]) -> io::Result<()> {
    if gateways.is_empty() {
        return Ok(());
    }
    probe(&mut open()?, gateways)
}

/// The first of these that has not answered since it was asked; where the kernel asks no more, it is told to. One that is no
/// default route's any more is not waited for.
pub(crate) fn silent(asked: &[Gateway]) -> io::Result<Option<IpAddr>> {
    if asked.is_empty() {
        return Ok(None);
    }
    let mut kernel = open()?;
    let defaults = defaults(&mut kernel)?;
    for gateway in asked.iter().filter(|gateway| defaults.contains(gateway)) {
        let state = state(&mut kernel, *gateway)?;
        if state & ANSWERED != 0 {
            continue;
        }
        if state & KNOWN == 0 {
            let wanted = (0, NTF_USE);
            kernel.request(&neighbour(RTM_NEWNEIGH, CREATE, *gateway, wanted))?;
        } else if state & NUD_PROBE == 0 {
            probe(&mut kernel, &[*gateway])?;
        }
        return Ok(Some(gateway.address));
    }
    Ok(None)
}

fn open() -> io::Result<Connection> {
    Connection::open(netlink_sys::protocols::NETLINK_ROUTE)
}

fn probe(kernel: &mut Connection, gateways: &[Gateway]) -> io::Result<()> {
    for gateway in gateways {
        if state(kernel, *gateway)? & (NUD_NOARP | NUD_PERMANENT) == 0 {
            let probe = (NUD_PROBE, 0);
            kernel.request(&neighbour(RTM_NEWNEIGH, REPLACE, *gateway, probe))?;
        }
    }
    Ok(())
}

fn defaults(kernel: &mut Connection) -> io::Result<Vec<Gateway>> {
    let mut found = Vec::new();
    for family in FAMILIES {
        let mut header = [0; 12];
        header[0] = family;
        let query = Message::new(RTM_GETROUTE, DUMP, &header, &Attributes::default());
        let asked = kernel.query(&query, |_, body| default_of(body, &mut found));
        match asked {
            // A host without IPv6 has no such routes.
            Err(error) if errno_of(&error) == Some(libc::EOPNOTSUPP) => (),
            asked => asked?,
        }
    }
    Ok(found)
}

/// Adds the gateways of a route to everywhere.
fn default_of(body: &[u8], found: &mut Vec<Gateway>) {
    let Some((&[_, 0, ..], fields)) = body.split_first_chunk::<12>() else {
        return;
    };
    let table = attributes(fields).find(|(kind, _)| *kind == RTA_TABLE);
    if table.and_then(|(_, value)| read_u32(value, 0)) != Some(MAIN_TABLE) {
        return;
    }
    let link = attributes(fields).find(|(kind, _)| *kind == RTA_OIF);
    if let Some(link) = link.and_then(|(_, value)| read_u32(value, 0)) {
        found.extend(hop(fields, link));
    }
    for (_, mut hops) in attributes(fields).filter(|(kind, _)| *kind == RTA_MULTIPATH) {
        while let (Some(length), Some(link)) = (read_u16(hops, 0), read_u32(hops, 4)) {
            let length = usize::from(length);
            let Some(fields) = hops.get(NEXT_HOP..length) else {
                break;
            };
            found.extend(hop(fields, link));
            hops = hops.get(length.next_multiple_of(4)..).unwrap_or_default();
        }
    }
}

fn hop(fields: &[u8], link: u32) -> Option<Gateway> {
    let address = attributes(fields).find_map(|(kind, value)| match kind {
        RTA_GATEWAY => address(value),
        // A gateway of the other family stands behind its number.
        RTA_VIA => address(value.get(2..)?),
        _ => None,
    })?;
    Some(Gateway { address, link })
}

fn address(value: &[u8]) -> Option<IpAddr> {
    let v4 = <[u8; 4]>::try_from(value).map(|v| Ipv4Addr::from(v).into());
    let v6 = || <[u8; 16]>::try_from(value).map(|v| Ipv6Addr::from(v).into());
    v4.or_else(|_| v6()).ok()
}

/// What the kernel knows of it; 0 where it knows nothing.
fn state(kernel: &mut Connection, gateway: Gateway) -> io::Result<u16> {
    let mut state = 0;
    let question = neighbour(RTM_GETNEIGH, 0, gateway, (0, 0));
    let asked = kernel.query(&question, |_, body| {
        state = read_u16(body, 8).unwrap_or_default();
        // Another program's, which says where it is: nobody may answer for it.
        if body
            .get(10)
            .is_some_and(|flags| flags & NTF_EXT_LEARNED != 0)
        {
            state = NUD_PERMANENT;
        }
    });
    match asked {
        Err(error) if errno_of(&error) == Some(libc::ENOENT) => Ok(0),
        asked => asked.map(|()| state),
    }
}

/// `ndmsg`: family, three bytes of nothing, link, state, flags, type.
fn neighbour(kind: u16, how: u16, gateway: Gateway, (state, flags): (u16, u8)) -> Message {
    let (family, address) = match gateway.address {
        IpAddr::V4(address) => (V4, address.octets().to_vec()),
        IpAddr::V6(address) => (V6, address.octets().to_vec()),
    };
    let mut header = vec![family, 0, 0, 0];
    header.extend_from_slice(&gateway.link.to_ne_bytes());
    header.extend_from_slice(&state.to_ne_bytes());
    header.extend_from_slice(&[flags, 0]);
    let attributes = Attributes::default().bytes(NDA_DST, &address);
    Message::new(kind, how, &header, &attributes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn route(prefix: u8, table: u32, attributes: Attributes) -> Vec<u8> {
        let mut header = [0; 12];
        (header[0], header[1]) = (V4, prefix);
        let attributes = attributes.ne32(RTA_TABLE, table);
        let mut body = header.to_vec();
        body.extend_from_slice(attributes.as_bytes());
        body
    }

    fn gateways(body: &[u8]) -> Vec<Gateway> {
        let mut found = Vec::new();
        default_of(body, &mut found);
        found
    }

    #[test]
    fn the_gateways_of_default_routes_are_found_and_no_others() {
        let to = |address: [u8; 4]| Attributes::default().bytes(RTA_GATEWAY, &address);
        let near = to([10, 0, 0, 1]).ne32(RTA_OIF, 2);
        let gateway = |address: IpAddr, link| Gateway { address, link };
        let expected = [gateway([10, 0, 0, 1].into(), 2)];
        assert_eq!(gateways(&route(0, MAIN_TABLE, near.clone())), expected);
        assert_eq!(gateways(&route(8, MAIN_TABLE, near.clone())), []);
        assert_eq!(gateways(&route(0, 7441, near)), []);
        let direct = Attributes::default().ne32(RTA_OIF, 2);
        assert_eq!(gateways(&route(0, MAIN_TABLE, direct)), []);
        let via = Attributes::default()
            .bytes(RTA_VIA, &[&[V6, 0][..], &[0xfe; 16]].concat())
            .ne32(RTA_OIF, 3);
        let expected = [gateway([0xfe; 16].into(), 3)];
        assert_eq!(gateways(&route(0, MAIN_TABLE, via)), expected);
    }

    #[test]
    fn each_hop_of_a_route_that_has_several_is_found() {
        let hop = |last: u8, link: u8| {
            let gateway = Attributes::default().bytes(RTA_GATEWAY, &[10, 0, 0, last]);
            let head = [16, 0, 0, 0, link, 0, 0, 0];
            [&head[..], gateway.as_bytes()].concat()
        };
        let mut hops = [hop(1, 2), hop(2, 3)].concat();
        let found = |hops: &[u8]| {
            let several = Attributes::default().bytes(RTA_MULTIPATH, hops);
            gateways(&route(0, MAIN_TABLE, several)).len()
        };
        assert_eq!(found(&hops), 2);
        hops.truncate(20);
        assert_eq!(found(&hops), 1, "cut off");
        assert_eq!(found(&[0; 8]), 0);
    }
}
