//! Who may call what. Rules only allow. The nearest level that has a rule decides alone: service, then
//! namespace, then mesh; no rule at any level is a denial. Only [`authorize`] makes a [`Permit`].

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use crate::identity::{Identity, SpiffeId};
use crate::names::{Label, ServiceName, TrustDomain};
use crate::reason::Reason;
use crate::service::{Glob, Pattern, Transport};

/// What a policy is attached to.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    Service(ServiceName),
    Namespace(Label),
    Mesh,
}

/// Whether a denial is carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Default)]
pub enum Enforce {
    /// Let it pass, log and count it.
    Audit,
    #[default]
    On,
}

/// A set of rules at one level.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    pub name: Label,
    pub level: Level,
    pub enforce: Enforce,
    pub rules: Vec<Rule>,
}

/// Allows `callers` to reach `ports`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    pub name: Label,
    pub callers: Vec<Caller>,
    /// Empty: all declared ports.
    pub ports: Vec<u16>,
}

/// Whom a rule allows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Caller {
    /// Workloads `namespace/account` of one trust domain.
    Workload {
        trust_domain: TrustDomain,
        pattern: Pattern,
    },
    /// Unmapped processes of hosts of one trust domain.
    Host {
        trust_domain: TrustDomain,
        name: Glob,
    },
    /// Every workload and host of a trust domain.
    TrustDomain(TrustDomain),
    /// Plaintext callers from an address range. Never matches a caller with an identity.
    Plaintext(Cidr),
}

/// An address range.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Cidr {
    pub address: IpAddr,
    /// Bits of the network part, at most the bits of the address.
    pub prefix: u8,
}

impl Cidr {
    /// Parses `address/prefix`.
    pub fn parse(text: &str) -> Option<Self> {
        let (address, prefix) = text.split_once('/')?;
        let address: IpAddr = address.parse().ok()?;
        let prefix: u8 = prefix.parse().ok()?;
        let bits = if address.is_ipv4() { 32 } else { 128 };
        (prefix <= bits).then_some(Self { address, prefix })
    }

    /// All addresses of both families.
    pub const EVERYWHERE: [Self; 2] = [
        Self {
            address: IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            prefix: 0,
        },
        Self {
            address: IpAddr::V6(Ipv6Addr::UNSPECIFIED),
            prefix: 0,
        },
    ];

    /// Whether all of `other` lies in this range.
    pub fn holds(&self, other: &Self) -> bool {
        self.prefix <= other.prefix && self.contains(other.address)
    }

    /// Its first and its last address.
    pub fn bounds(&self) -> (IpAddr, IpAddr) {
        match self.address {
            IpAddr::V4(v4) => {
                let rest = u32::MAX.checked_shr(self.prefix.into()).unwrap_or(0);
                let first = v4.to_bits() & !rest;
                (
                    Ipv4Addr::from_bits(first).into(),
                    Ipv4Addr::from_bits(first | rest).into(),
                )
            }
            IpAddr::V6(v6) => {
                let rest = u128::MAX.checked_shr(self.prefix.into()).unwrap_or(0);
                let first = v6.to_bits() & !rest;
                (
                    Ipv6Addr::from_bits(first).into(),
                    Ipv6Addr::from_bits(first | rest).into(),
                )
            }
        }
    }

    pub fn contains(&self, address: IpAddr) -> bool {
        match (self.address, address) {
            (IpAddr::V4(a), IpAddr::V4(b)) => {
                let shift = 32 - u32::from(self.prefix);
                (a.to_bits() ^ b.to_bits()).checked_shr(shift).unwrap_or(0) == 0
            }
            (IpAddr::V6(a), IpAddr::V6(b)) => {
                let shift = 128 - u32::from(self.prefix);
                (a.to_bits() ^ b.to_bits()).checked_shr(shift).unwrap_or(0) == 0
            }
            _ => false,
        }
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

impl fmt::Display for Caller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Workload {
                trust_domain,
                pattern,
            } => write!(f, "{pattern} of {trust_domain}"),
            Self::Host { trust_domain, name } => write!(f, "host {name} of {trust_domain}"),
            Self::TrustDomain(trust_domain) => write!(f, "everyone of {trust_domain}"),
            Self::Plaintext(cidr) => write!(f, "plaintext from {cidr}"),
        }
    }
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Service(name) => write!(f, "service {name}"),
            Self::Namespace(name) => write!(f, "namespace {name}"),
            Self::Mesh => f.write_str("mesh"),
        }
    }
}

impl Enforce {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Audit => "audit",
            Self::On => "on",
        }
    }
}

impl Caller {
    fn matches(&self, peer: &SpiffeId) -> bool {
        match (self, &peer.identity) {
            (
                Self::Workload {
                    trust_domain,
                    pattern,
                },
                Identity::Workload(account),
            ) => {
                *trust_domain == peer.trust_domain
                    && pattern.matches(&account.namespace, &account.name)
            }
            (Self::Host { trust_domain, name }, Identity::Host(host)) => {
                *trust_domain == peer.trust_domain && name.matches(host)
            }
            (Self::TrustDomain(trust_domain), Identity::Workload(_) | Identity::Host(_)) => {
                *trust_domain == peer.trust_domain
            }
            _ => false,
        }
    }
}

/// All policies that an agent needs for the services it serves, at one revision.
#[derive(Clone, Debug, Default)]
pub struct PolicySet {
    pub revision: u64,
    pub policies: Vec<Arc<Policy>>,
}

/// A declared port of a service: what a caller asks for.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Target {
    pub service: ServiceName,
    pub port: u16,
}

/// Proof that policy lets a peer reach a target. Made by [`authorize`] and nowhere else.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Permit {
    target: Target,
    rule: String,
    audited: bool,
}

impl Permit {
    pub fn target(&self) -> &Target {
        &self.target
    }

    /// `policy/rule` that allowed it; for an audited call the policy level that would have refused it.
    pub fn rule(&self) -> &str {
        &self.rule
    }

    /// Whether it passes only because `enforce` is `audit`.
    pub fn audited(&self) -> bool {
        self.audited
    }
}

/// A refusal by policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Denial {
    pub reason: Reason,
    /// Which level decided, for log and `explain`.
    pub decided_by: String,
}

/// The policies that decide about a service: those of the nearest level that has a rule. None: all is denied.
pub fn deciding<'a>(policies: &'a PolicySet, service: &ServiceName) -> Vec<&'a Policy> {
    let levels = [
        Level::Service(service.clone()),
        Level::Namespace(service.namespace.clone()),
        Level::Mesh,
    ];
    for level in levels {
        let all = policies.policies.iter().map(Arc::as_ref);
        let here: Vec<&Policy> = all
            .filter(|p| p.level == level && !p.rules.is_empty())
            .collect();
        if !here.is_empty() {
            return here;
        }
    }
    Vec::new()
}

/// Decides whether `peer` may reach `target`.
pub fn authorize(policies: &PolicySet, peer: &SpiffeId, target: Target) -> Result<Permit, Denial> {
    let here = deciding(policies, &target.service);
    if here.is_empty() {
        return Err(Denial {
            reason: Reason::NotAllowed,
            decided_by: "no policy".to_owned(),
        });
    }
    for policy in &here {
        for rule in &policy.rules {
            let port = rule.ports.is_empty() || rule.ports.contains(&target.port);
            if port && rule.callers.iter().any(|caller| caller.matches(peer)) {
                let rule = format!("{}/{}", policy.name, rule.name);
                return Ok(Permit {
                    target,
                    rule,
                    audited: false,
                });
            }
        }
    }
    let names: Vec<&str> = here.iter().map(|p| p.name.as_str()).collect();
    let decided_by = names.join(",");
    if here.iter().all(|p| p.enforce == Enforce::Audit) {
        return Ok(Permit {
            target,
            rule: decided_by,
            audited: true,
        });
    }
    Err(Denial {
        reason: Reason::NotAllowed,
        decided_by,
    })
}

/// What becomes of plaintext callers of one port: those in `open` pass, those in `audited` too but are counted as ones
/// that policy would refuse, all others are refused. No range of a list lies in another one of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PlaintextDoor {
    pub open: Vec<Cidr>,
    pub audited: Vec<Cidr>,
}

/// Decides about plaintext callers of `target`: transport and policy must both let them in. Only rules by address range
/// match them.
pub fn plaintext_door(
    policies: &PolicySet,
    target: &Target,
    transport: Transport,
    plaintext_from: &[Cidr],
) -> PlaintextDoor {
    let by_transport = match transport {
        Transport::Permissive => Cidr::EVERYWHERE.to_vec(),
        Transport::Strict => widest(plaintext_from.to_vec()),
    };
    let here = deciding(policies, &target.service);
    if here.is_empty() {
        return PlaintextDoor::default();
    }
    let rules = here.iter().flat_map(|p| &p.rules);
    let rules = rules.filter(|r| r.ports.is_empty() || r.ports.contains(&target.port));
    let ranges = rules
        .flat_map(|r| &r.callers)
        .filter_map(|caller| match caller {
            Caller::Plaintext(range) => Some(*range),
            _ => None,
        });
    let by_policy: Vec<Cidr> = ranges.collect();
    let audit = here.iter().all(|p| p.enforce == Enforce::Audit);
    PlaintextDoor {
        open: common(&by_transport, &by_policy),
        audited: if audit { by_transport } else { Vec::new() },
    }
}

/// What is in a range of both lists: of two ranges one holds the other, or they share nothing.
pub fn common(a: &[Cidr], b: &[Cidr]) -> Vec<Cidr> {
    let pairs = a.iter().flat_map(|a| b.iter().map(move |b| (a, b)));
    let both = pairs.filter_map(|(a, b)| {
        if a.holds(b) {
            Some(*b)
        } else {
            b.holds(a).then_some(*a)
        }
    });
    widest(both.collect())
}

/// Without those that lie in another one.
pub fn widest(mut ranges: Vec<Cidr>) -> Vec<Cidr> {
    ranges.sort_by_key(|range| range.prefix);
    let mut kept: Vec<Cidr> = Vec::with_capacity(ranges.len());
    for range in ranges {
        if !kept.iter().any(|wider| wider.holds(&range)) {
            kept.push(range);
        }
    }
    kept.sort();
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cidrs(texts: &[&str]) -> Vec<Cidr> {
        texts
            .iter()
            .map(|text| Cidr::parse(text).unwrap())
            .collect()
    }

    /// One rule for these ranges, beside one for a trust domain, which must not matter.
    fn by_range(level: Level, enforce: Enforce, ranges: &[&str], port: Option<u16>) -> Arc<Policy> {
        let callers = cidrs(ranges).into_iter().map(Caller::Plaintext);
        let rule = Rule {
            name: "r".parse().unwrap(),
            callers: callers
                .chain([Caller::TrustDomain("a.b".parse().unwrap())])
                .collect(),
            ports: port.into_iter().collect(),
        };
        Arc::new(Policy {
            name: "p".parse().unwrap(),
            level,
            enforce,
            rules: vec![rule],
        })
    }

    /// What is open and what is audited.
    fn door(policies: Vec<Arc<Policy>>, transport: Transport, from: &[&str]) -> [String; 2] {
        let set = PolicySet {
            revision: 1,
            policies,
        };
        let door = plaintext_door(&set, &target(), transport, &cidrs(from));
        [door.open, door.audited].map(|ranges| {
            let texts: Vec<String> = ranges.iter().map(ToString::to_string).collect();
            texts.join(" ")
        })
    }

    const EVERYWHERE: &[&str] = &["0.0.0.0/0", "::/0"];

    #[test]
    fn plaintext_callers_need_transport_and_policy() {
        let (open, strict) = (Transport::Permissive, Transport::Strict);
        let everyone = || by_range(Level::Mesh, Enforce::On, EVERYWHERE, None);
        assert_eq!(door(vec![], open, &[]), ["", ""]);
        assert_eq!(door(vec![everyone()], open, &[])[0], "0.0.0.0/0 ::/0");
        assert_eq!(door(vec![everyone()], strict, &[])[0], "");
        let from = ["10.1.2.0/24", "10.1.0.0/16"];
        assert_eq!(door(vec![everyone()], strict, &from)[0], "10.1.0.0/16");
        let other = by_range(Level::Mesh, Enforce::On, EVERYWHERE, Some(80));
        assert_eq!(door(vec![other], open, &[])[0], "", "another port");
    }

    #[test]
    fn the_nearest_level_decides_about_plaintext_and_audit_lets_it_pass() {
        let (open, strict) = (Transport::Permissive, Transport::Strict);
        let everyone = by_range(Level::Mesh, Enforce::On, EVERYWHERE, None);
        let near = |enforce| {
            let level = Level::Namespace("data".parse().unwrap());
            by_range(level, enforce, &["10.0.0.0/8", "fd00::/8"], Some(5432))
        };
        let narrowed = door(vec![everyone, near(Enforce::On)], open, &[]);
        assert_eq!(narrowed, ["10.0.0.0/8 fd00::/8", ""]);
        let from = ["10.1.0.0/16", "192.168.0.0/16"];
        assert_eq!(
            door(vec![near(Enforce::On)], strict, &from)[0],
            "10.1.0.0/16"
        );
        let audited = door(vec![near(Enforce::Audit)], open, &[]);
        assert_eq!(audited[1], "0.0.0.0/0 ::/0");
        let audited = door(vec![near(Enforce::Audit)], strict, &["192.168.0.0/16"]);
        assert_eq!(audited, ["", "192.168.0.0/16"], "strict stays strict");
    }

    fn id(uri: &str) -> SpiffeId {
        SpiffeId::parse(uri).unwrap()
    }

    fn web() -> SpiffeId {
        id("spiffe://corp.example.com/ns/shop/sa/web")
    }

    fn target() -> Target {
        Target {
            service: ServiceName::parse("data/db").unwrap(),
            port: 5432,
        }
    }

    fn policy(name: &str, level: Level, enforce: Enforce, callers: &[&str]) -> Arc<Policy> {
        let callers: Vec<Caller> = callers
            .iter()
            .map(|c| Caller::Workload {
                trust_domain: "corp.example.com".parse().unwrap(),
                pattern: Pattern::parse(c).unwrap(),
            })
            .collect();
        let rule = Rule {
            name: "r".parse().unwrap(),
            callers,
            ports: vec![],
        };
        Arc::new(Policy {
            name: name.parse().unwrap(),
            level,
            enforce,
            rules: vec![rule],
        })
    }

    fn decide(policies: Vec<Arc<Policy>>) -> Result<Permit, Denial> {
        authorize(
            &PolicySet {
                revision: 1,
                policies,
            },
            &web(),
            target(),
        )
    }

    #[test]
    fn no_rule_anywhere_is_a_denial() {
        assert_eq!(decide(vec![]).unwrap_err().reason, Reason::NotAllowed);
    }

    #[test]
    fn the_nearest_level_decides_alone() {
        let everyone = policy("everyone", Level::Mesh, Enforce::On, &["*/*"]);
        assert_eq!(decide(vec![everyone.clone()]).unwrap().rule(), "everyone/r");
        let near = policy(
            "near",
            Level::Namespace("data".parse().unwrap()),
            Enforce::On,
            &["ops/*"],
        );
        let denial = decide(vec![everyone.clone(), near.clone()]).unwrap_err();
        assert_eq!(denial.decided_by, "near");
        let nearest = policy(
            "db",
            Level::Service(target().service),
            Enforce::On,
            &["shop/web"],
        );
        assert_eq!(
            decide(vec![everyone, near, nearest]).unwrap().rule(),
            "db/r"
        );
    }

    #[test]
    fn audit_lets_pass_and_says_so() {
        let near = policy("near", Level::Mesh, Enforce::Audit, &["ops/*"]);
        assert!(decide(vec![near.clone()]).unwrap().audited());
        let on = policy("on", Level::Mesh, Enforce::On, &["ops/*"]);
        assert!(decide(vec![near, on]).is_err());
    }

    #[test]
    fn another_trust_domain_with_the_same_path_is_another_caller() {
        let set = PolicySet {
            revision: 1,
            policies: vec![policy("p", Level::Mesh, Enforce::On, &["*/*"])],
        };
        let other = id("spiffe://evil.example.com/ns/shop/sa/web");
        assert!(authorize(&set, &other, target()).is_err());
        let agent = id("spiffe://corp.example.com/agent/00112233445566778899aabbccddeeff");
        assert!(authorize(&set, &agent, target()).is_err());
    }

    #[test]
    fn ranges_compare_their_network_part() {
        let range = Cidr::parse("10.1.0.0/16").unwrap();
        assert!(range.contains("10.1.2.3".parse().unwrap()));
        assert!(!range.contains("10.2.0.0".parse().unwrap()));
        assert!(
            Cidr::parse("0.0.0.0/0")
                .unwrap()
                .contains("1.2.3.4".parse().unwrap())
        );
        assert!(
            !Cidr::parse("::/0")
                .unwrap()
                .contains("1.2.3.4".parse().unwrap())
        );
        assert!(Cidr::parse("10.0.0.0/33").is_none());
        let bounds = |text: &str| {
            let (first, last) = Cidr::parse(text).unwrap().bounds();
            format!("{first} {last}")
        };
        assert_eq!(bounds("10.1.2.3/16"), "10.1.0.0 10.1.255.255");
        assert_eq!(bounds("0.0.0.0/0"), "0.0.0.0 255.255.255.255");
        assert_eq!(bounds("fd00::1/128"), "fd00::1 fd00::1");
        assert_eq!(bounds("::/0"), ":: ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff");
    }
}
