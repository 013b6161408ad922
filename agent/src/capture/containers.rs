//! The addresses of containers: of network namespaces that hang on one of the bridges that the settings name, and in which a
//! process of a workload lives.
//!
//! That a namespace hangs there is the kernel's word: it is asked which namespaces the other ends of a bridge's ports are
//! in, and in which one a process is. So nobody gets an address looked at by making a namespace of its own.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};

use super::cgroup::{CgroupError, CgroupTree, Directory};
use super::netlink::{Attributes, Connection, DUMP, Message, attributes, errno_of, read_u32};
use super::routes::{IFLA_IFNAME, RTM_GETLINK};

const RTM_GETNSID: u16 = 90;
const NETNSA_NSID: u16 = 1;
const NETNSA_PID: u16 = 2;
const IFLA_MASTER: u16 = 10;
const IFLA_LINK_NETNSID: u16 = 37;
/// Processes of one workload that are looked at: a container has some, and one of each namespace is enough.
const PROCESSES_MAX: usize = 1_024;
/// Directories of one workload that are looked at.
const DIRECTORIES_MAX: usize = 1_024;
/// Addresses of one workload.
pub(crate) const ADDRESSES_MAX: usize = 64;
/// `IFA_F_*` and scopes of `/proc/net/if_inet6`: only what reaches beyond the link is anybody's address.
const SCOPE_GLOBAL: &str = "00";

/// The addresses of each of these owners, in their order. A directory below another's belongs to the deepest.
pub(crate) fn addresses(
    bridges: &[String],
    tree: &CgroupTree,
    owners: &[&[Directory]],
) -> io::Result<Vec<BTreeSet<IpAddr>>> {
    let mut found = vec![BTreeSet::new(); owners.len()];
    let mut kernel = Connection::open(netlink_sys::protocols::NETLINK_ROUTE)?;
    let behind = namespaces_behind(&mut kernel, bridges)?;
    if behind.is_empty() {
        return Ok(found);
    }
    let owned: BTreeSet<&Path> = owners
        .iter()
        .flat_map(|directories| directories.iter().map(|d| d.path.as_path()))
        .collect();
    let mut known = BTreeMap::new();
    for (owner, found) in owners.iter().zip(&mut found) {
        for directory in below(tree, owner, &owned).map_err(io::Error::other)? {
            let processes = processes(tree, &directory);
            for pid in processes.iter().take(PROCESSES_MAX) {
                let Some(namespace) = namespace_of(&mut kernel, *pid)? else {
                    continue;
                };
                if !behind.contains(&namespace) {
                    continue;
                }
                let own = match known.get(&namespace) {
                    Some(own) => own,
                    None => {
                        let read = read_addresses(*pid);
                        // Its number may be another process's by now.
                        if !self::processes(tree, &directory).contains(pid) {
                            continue;
                        }
                        known.entry(namespace).or_insert(read)
                    }
                };
                found.extend(
                    own.iter()
                        .take(ADDRESSES_MAX - found.len().min(ADDRESSES_MAX)),
                );
            }
        }
    }
    Ok(found)
}

/// The directories of an owner and those below, but for what is another's.
fn below(
    tree: &CgroupTree,
    owner: &[Directory],
    owned: &BTreeSet<&Path>,
) -> Result<Vec<PathBuf>, CgroupError> {
    let mut all: Vec<PathBuf> = owner.iter().map(|d| d.path.clone()).collect();
    let mut next = 0;
    while let Some(path) = all.get(next).cloned() {
        next += 1;
        for (name, _) in tree.children(&path)? {
            let child = path.join(name);
            if all.len() < DIRECTORIES_MAX && !owned.contains(child.as_path()) {
                all.push(child);
            }
        }
    }
    Ok(all)
}

/// The processes of a directory; none when it is gone.
fn processes(tree: &CgroupTree, directory: &Path) -> BTreeSet<u32> {
    let path = tree.root().join(directory).join("cgroup.procs");
    let text = fs::read_to_string(path).unwrap_or_default();
    text.lines().filter_map(|line| line.parse().ok()).collect()
}

/// The namespaces, as this one numbers them, at the other ends of what is plugged into the bridges.
fn namespaces_behind(kernel: &mut Connection, bridges: &[String]) -> io::Result<BTreeSet<u32>> {
    let mut ports = Vec::new();
    let mut masters = BTreeSet::new();
    let query = Message::new(RTM_GETLINK, DUMP, &[0; 16], &Attributes::default());
    kernel.query(&query, |_, body| {
        let fields = body.get(16..).unwrap_or_default();
        let (mut master, mut namespace) = (None, None);
        for (kind, value) in attributes(fields) {
            match kind {
                IFLA_MASTER => master = read_u32(value, 0),
                IFLA_LINK_NETNSID => namespace = read_u32(value, 0),
                IFLA_IFNAME => {
                    let name = value.strip_suffix(&[0]).unwrap_or(value);
                    if bridges.iter().any(|bridge| bridge.as_bytes() == name) {
                        masters.extend(read_u32(body, 4));
                    }
                }
                _ => {}
            }
        }
        ports.extend(master.zip(namespace));
    })?;
    let behind = ports.iter().filter(|(master, _)| masters.contains(master));
    Ok(behind.map(|(_, namespace)| *namespace).collect())
}

/// The number of the namespace in which a process is. `None`: it is gone, or in one that has no number here.
fn namespace_of(kernel: &mut Connection, pid: u32) -> io::Result<Option<u32>> {
    let attributes_sent = Attributes::default().ne32(NETNSA_PID, pid);
    let query = Message::new(RTM_GETNSID, 0, &[0; 4], &attributes_sent);
    let mut found = None;
    let outcome = kernel.query(&query, |_, body| {
        let mut fields = attributes(body.get(4..).unwrap_or_default());
        let number = fields.find(|(kind, _)| *kind == NETNSA_NSID);
        found = number.and_then(|(_, value)| read_u32(value, 0));
    });
    match outcome {
        // -1: none was given.
        Ok(()) => Ok(found.filter(|number| *number != u32::MAX)),
        Err(error) if errno_of(&error) == Some(libc::ESRCH) => Ok(None),
        Err(error) => Err(error),
    }
}

/// All addresses of the namespace of a process.
fn read_addresses(pid: u32) -> BTreeSet<IpAddr> {
    let read = |name: &str| fs::read_to_string(format!("/proc/{pid}/net/{name}"));
    let v4 = read("fib_trie").unwrap_or_default();
    let v6 = read("if_inet6").unwrap_or_default();
    local4(&v4)
        .map(IpAddr::from)
        .chain(global6(&v6).map(IpAddr::from))
        .collect()
}

/// The local addresses in `/proc/net/fib_trie`, where an address stands before the lines that say what it is.
fn local4(text: &str) -> impl Iterator<Item = Ipv4Addr> {
    let mut at = None;
    text.lines().filter_map(move |line| {
        let line = line.trim_start();
        if let Some(address) = line.strip_prefix("|-- ") {
            at = address.trim_end().parse::<Ipv4Addr>().ok();
            return None;
        }
        let is_local = line.starts_with("/32 host LOCAL");
        at.filter(|address| is_local && !address.is_loopback())
    })
}

/// The addresses in `/proc/net/if_inet6` that reach beyond their link: address, link, prefix, scope, flags, name.
fn global6(text: &str) -> impl Iterator<Item = Ipv6Addr> {
    text.lines().filter_map(|line| {
        let mut fields = line.split_whitespace();
        let address = u128::from_str_radix(fields.next()?, 16).ok()?;
        (fields.nth(2)? == SCOPE_GLOBAL).then(|| Ipv6Addr::from_bits(address))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn local_addresses_are_read_and_no_others() {
        let text = "Main:\n  +-- 0.0.0.0/0 3 0 5\n     |-- 0.0.0.0\n        /0 universe UNICAST\n\
            |-- 10.88.0.0\n /16 link UNICAST\n|-- 10.88.0.5\n   /32 host LOCAL\n\
            |-- 10.88.255.255\n   /32 link BROADCAST\n|-- 127.0.0.1\n   /32 host LOCAL\n/32 host LOCAL\n|-- what\n /32 host LOCAL\n";
        let found: Vec<_> = local4(text).collect();
        assert_eq!(found, [Ipv4Addr::new(10, 88, 0, 5)]);
    }

    #[test]
    fn addresses_beyond_the_link_are_read_and_no_others() {
        let text = "00000000000000000000000000000001 01 80 10 80       lo\n\
            fe80000000000000a4d3b1fffe0c5a3e 02 40 20 80     eth0\n\
            fd880000000000000000000000000005 02 40 00 82     eth0\nbroken\n";
        let found: Vec<_> = global6(text).collect();
        assert_eq!(found, ["fd88::5".parse::<Ipv6Addr>().unwrap()]);
    }

    #[test]
    fn a_process_without_a_namespace_of_its_own_has_no_container_address() {
        let mut kernel = Connection::open(netlink_sys::protocols::NETLINK_ROUTE).unwrap();
        assert!(
            namespaces_behind(&mut kernel, &["no-such-br0".to_owned()])
                .unwrap()
                .is_empty()
        );
        assert_eq!(namespace_of(&mut kernel, u32::MAX >> 1).unwrap(), None);
    }
}
