//! Who may call what. Rules only allow. The nearest level that has a rule decides alone: service, then
//! namespace, then mesh; no rule at any level is a denial. Only [`authorize`] makes a [`Permit`].

use std::net::IpAddr;
use std::sync::Arc;

use crate::identity::{Identity, SpiffeId};
use crate::names::{Label, ServiceName, TrustDomain};
use crate::reason::Reason;
use crate::service::{Glob, Pattern};

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

impl std::fmt::Display for Cidr {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
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
#[derive(Clone, Debug)]
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

/// Decides whether `peer` may reach `target`.
pub fn authorize(policies: &PolicySet, peer: &SpiffeId, target: Target) -> Result<Permit, Denial> {
    let levels = [
        Level::Service(target.service.clone()),
        Level::Namespace(target.service.namespace.clone()),
        Level::Mesh,
    ];
    for level in levels {
        let here = || {
            policies
                .policies
                .iter()
                .filter(|p| p.level == level && !p.rules.is_empty())
        };
        if here().next().is_none() {
            continue;
        }
        for policy in here() {
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
        let names: Vec<&str> = here().map(|p| p.name.as_str()).collect();
        let decided_by = names.join(",");
        if here().all(|p| p.enforce == Enforce::Audit) {
            return Ok(Permit {
                target,
                rule: decided_by,
                audited: true,
            });
        }
        return Err(Denial {
            reason: Reason::NotAllowed,
            decided_by,
        });
    }
    Err(Denial {
        reason: Reason::NotAllowed,
        decided_by: "no policy".to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

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
    }
}
