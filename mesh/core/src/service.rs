//! What an agent knows of the mesh: services and where they are.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use crate::names::{Account, HostUid, Label, Network, ServiceName};
use crate::policy::Cidr;

/// How the bytes of a port are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum Protocol {
    /// HTTP/1 if the first bytes of the caller are an HTTP head and the server did not speak first; else bytes.
    #[default]
    Auto,
    /// Bytes.
    Tcp,
    /// HTTP/1.1, one stream a request.
    Http,
    /// HTTP/2 by prior knowledge, one stream a request.
    Http2,
    /// gRPC over HTTP/2: refusals are gRPC statuses.
    Grpc,
}

impl Protocol {
    pub const ALL: [Self; 5] = [Self::Auto, Self::Tcp, Self::Http, Self::Http2, Self::Grpc];

    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Tcp => "tcp",
            Self::Http => "http",
            Self::Http2 => "http2",
            Self::Grpc => "grpc",
        }
    }

    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|p| p.as_str() == text)
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Whether plaintext callers are still served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum Transport {
    #[default]
    Permissive,
    Strict,
}

impl Transport {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Permissive => "permissive",
            Self::Strict => "strict",
        }
    }

    pub fn parse(text: &str) -> Option<Self> {
        [Self::Permissive, Self::Strict]
            .into_iter()
            .find(|t| t.as_str() == text)
    }
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Which calls of a service the agents of its callers take over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum Capture {
    /// Those to its virtual addresses.
    #[default]
    Vip,
    /// Those to the addresses of the hosts that serve it too; each goes on to the host that was called.
    VipAndReal,
}

impl Capture {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Vip => "vip",
            Self::VipAndReal => "vip+real",
        }
    }

    pub fn parse(text: &str) -> Option<Self> {
        [Self::Vip, Self::VipAndReal]
            .into_iter()
            .find(|c| c.as_str() == text)
    }
}

impl fmt::Display for Capture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A declared port of a service.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Port {
    /// 1 to 65535.
    pub number: u16,
    pub protocol: Protocol,
}

/// The virtual addresses of a service, allotted by control and stable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Vip {
    pub v4: Ipv4Addr,
    pub v6: Ipv6Addr,
}

/// A service as the index lists it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    pub name: ServiceName,
    pub vip: Vip,
    /// In the order of their numbers, each number once.
    pub ports: Vec<Port>,
    pub transport: Transport,
    /// Whose plaintext `strict` lets in.
    pub plaintext_from: Vec<Cidr>,
    pub capture: Capture,
}

impl Service {
    pub fn port(&self, number: u16) -> Option<&Port> {
        self.ports.iter().find(|port| port.number == number)
    }
}

/// The health of an endpoint, as control knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Health {
    Healthy,
    /// Its host lost its lease: tried only when nothing better answers.
    Stale,
}

/// Where a service is served. Keyed by (network, address, host).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Endpoint {
    pub network: Network,
    /// The host's address; its mesh port is `mesh_port`.
    pub address: IpAddr,
    /// TCP port of the host's agent.
    pub mesh_port: u16,
    /// The identity that the endpoint's agent must show.
    pub account: Account,
    /// The Source: the host that the endpoint's leaf must name.
    pub host: HostUid,
    pub health: Health,
}

/// Every service an agent may see. Immutable; a change makes a new one.
#[derive(Clone, Debug, Default)]
pub struct Index {
    services: BTreeMap<ServiceName, Arc<Service>>,
    by_address: BTreeMap<IpAddr, Arc<Service>>,
}

impl Index {
    pub fn get(&self, name: &ServiceName) -> Option<&Arc<Service>> {
        self.services.get(name)
    }

    /// The service that has `address` as its virtual address.
    pub fn by_address(&self, address: IpAddr) -> Option<&Arc<Service>> {
        self.by_address.get(&address)
    }

    pub fn services(&self) -> impl ExactSizeIterator<Item = &Arc<Service>> {
        self.services.values()
    }

    pub fn insert(&mut self, service: Service) {
        self.remove(&service.name);
        let service = Arc::new(service);
        self.by_address
            .insert(service.vip.v4.into(), Arc::clone(&service));
        self.by_address
            .insert(service.vip.v6.into(), Arc::clone(&service));
        self.services.insert(service.name.clone(), service);
    }

    pub fn remove(&mut self, name: &ServiceName) {
        if let Some(old) = self.services.remove(name) {
            for address in [IpAddr::from(old.vip.v4), IpAddr::from(old.vip.v6)] {
                // Another service may have been given the address meanwhile.
                if self
                    .by_address
                    .get(&address)
                    .is_some_and(|s| s.name == old.name)
                {
                    self.by_address.remove(&address);
                }
            }
        }
    }
}

/// A namespace/service pattern as scopes and rules write it: each side a label, or `*`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Pattern {
    pub namespace: Glob,
    pub name: Glob,
}

/// `*`, an exact label, or `prefix*`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Glob {
    Any,
    Exact(Label),
    Prefix(String),
}

impl Glob {
    pub fn parse(text: &str) -> Result<Self, crate::names::NameError> {
        match text.strip_suffix('*') {
            Some("") => Ok(Self::Any),
            // A prefix is checked as the label it begins; a trailing `-` may follow.
            Some(prefix) => {
                format!("{prefix}x").parse::<Label>()?;
                Ok(Self::Prefix(prefix.to_owned()))
            }
            None => text.parse().map(Self::Exact),
        }
    }

    pub fn matches(&self, label: &Label) -> bool {
        match self {
            Self::Any => true,
            Self::Exact(exact) => exact == label,
            Self::Prefix(prefix) => label.as_str().starts_with(prefix.as_str()),
        }
    }
}

impl fmt::Display for Glob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Any => f.write_str("*"),
            Self::Exact(label) => write!(f, "{label}"),
            Self::Prefix(prefix) => write!(f, "{prefix}*"),
        }
    }
}

impl Pattern {
    /// Parses `namespace/name`, where each side may be `*` or end in `*`.
    pub fn parse(text: &str) -> Result<Self, crate::names::NameError> {
        let (namespace, name) = text
            .split_once('/')
            .ok_or_else(|| crate::names::NameError {
                kind: "pattern",
                text: text.chars().take(130).collect(),
                rule: "write it as `namespace/name`; each side may be `*` or end in `*`",
            })?;
        Ok(Self {
            namespace: Glob::parse(namespace)?,
            name: Glob::parse(name)?,
        })
    }

    pub fn matches(&self, namespace: &Label, name: &Label) -> bool {
        self.namespace.matches(namespace) && self.name.matches(name)
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service(name: &str, last: u8) -> Service {
        Service {
            name: ServiceName::parse(name).unwrap(),
            vip: Vip {
                v4: Ipv4Addr::new(252, 64, 0, last),
                v6: Ipv6Addr::new(0xfd6d, 0, 0, 0, 0, 0, 0, last.into()),
            },
            ports: vec![],
            transport: Transport::Permissive,
            plaintext_from: vec![],
            capture: Capture::Vip,
        }
    }

    #[test]
    fn an_address_that_moved_stays_with_its_new_service() {
        let mut index = Index::default();
        index.insert(service("shop/a", 2));
        index.insert(service("shop/b", 2));
        index.remove(&ServiceName::parse("shop/a").unwrap());
        let found = index
            .by_address(Ipv4Addr::new(252, 64, 0, 2).into())
            .unwrap();
        assert_eq!(found.name.to_string(), "shop/b");
    }

    #[test]
    fn patterns_match_whole_labels_or_prefixes() {
        let web = "web".parse::<Label>().unwrap();
        let shop = "shop".parse::<Label>().unwrap();
        for (text, expected) in [
            ("shop/web", true),
            ("*/*", true),
            ("shop/w*", true),
            ("shop/we", false),
            ("sho/*", false),
            ("s*/web", true),
        ] {
            assert_eq!(
                Pattern::parse(text).unwrap().matches(&shop, &web),
                expected,
                "{text}"
            );
        }
        for bad in ["shop", "shop/", "a*b/c", "/x", "**/x"] {
            assert!(Pattern::parse(bad).is_err(), "{bad}");
        }
    }
}
