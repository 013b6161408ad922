//! The objects of the catalogue. They are stored as JSON with every name as text, so that core types may
//! change without changing what is on disk.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;
use std::sync::{Arc, OnceLock};

use mesh_api::resource::{Object, PolicySpec};
use mesh_core::names::{Account, HostUid, Label, Network, ServiceName};
use mesh_core::policy::Cidr;
use mesh_core::revocation::Subject;
use mesh_core::service::{Capture, Pattern, Port, Protocol, Transport, Vip};
use mesh_core::vip::{RangeError, VipRanges};
use serde::{Deserialize, Serialize};

use super::text;

/// What all hosts of the mesh agree on; made by `init`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Settings {
    #[serde(with = "text")]
    pub trust_domain: mesh_core::names::TrustDomain,
    pub dns_suffix: String,
    pub vip4_range: String,
    pub vip6_range: String,
    /// Where hosts reach control: the default of tokens.
    pub addresses: Vec<String>,
    /// The number of the trust bundle; grows with each change of roots.
    pub bundle: u64,
}

impl Settings {
    pub(crate) fn vip_ranges(&self) -> Result<VipRanges, String> {
        let cidr =
            |text: &str| Cidr::parse(text).ok_or_else(|| format!("`{text}` is no address range"));
        VipRanges::new(cidr(&self.vip4_range)?, cidr(&self.vip6_range)?)
            .map_err(|e: RangeError| e.to_string())
    }
}

/// SHA-256 of a key or a secret. Shown as hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Digest(pub [u8; 32]);

impl Digest {
    pub(crate) fn of(bytes: &[u8]) -> Self {
        let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, bytes);
        let mut out = [0; 32];
        out.copy_from_slice(digest.as_ref());
        Self(out)
    }

    /// Compares in constant time: both may stand for secrets.
    pub(crate) fn matches(&self, other: &Self) -> bool {
        aws_lc_rs::constant_time::verify_slices_are_equal(&self.0, &other.0).is_ok()
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl FromStr for Digest {
    type Err = &'static str;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const FORM: &str = "a digest has 64 hexadecimal digits";
        if text.len() != 64 || !text.is_ascii() {
            return Err(FORM);
        }
        let mut out = [0; 32];
        for (byte, at) in out.iter_mut().zip((0..64).step_by(2)) {
            *byte = u8::from_str_radix(&text[at..at + 2], 16).map_err(|_| FORM)?;
        }
        Ok(Self(out))
    }
}

/// Who made an object and may change it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Source {
    Operator,
    Host(HostUid),
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Operator => f.write_str("operator"),
            Self::Host(uid) => write!(f, "host/{uid}"),
        }
    }
}

impl FromStr for Source {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('/') {
            None if text == "operator" => Ok(Self::Operator),
            Some(("host", uid)) => uid
                .parse()
                .map(Self::Host)
                .map_err(|e| format!("source `{text}`: {e}")),
            _ => Err(format!("`{text}` is no source")),
        }
    }
}

/// What a join token, and the host that joined with it, may do.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Scope {
    #[serde(with = "text::patterns")]
    pub identities: Vec<Pattern>,
    #[serde(with = "text::patterns")]
    pub services: Vec<Pattern>,
    /// Empty: only the network `default`.
    #[serde(with = "text::list")]
    pub networks: Vec<Network>,
}

impl Scope {
    pub(crate) fn allows_account(&self, account: &Account) -> bool {
        let allows = |p: &Pattern| p.matches(&account.namespace, &account.name);
        self.identities.iter().any(allows)
    }

    pub(crate) fn allows_service(&self, service: &ServiceName) -> bool {
        let allows = |p: &Pattern| p.matches(&service.namespace, &service.name);
        self.services.iter().any(allows)
    }

    pub(crate) fn allows_network(&self, network: &Network) -> bool {
        if self.networks.is_empty() {
            return *network == Network::default_network();
        }
        self.networks.contains(network)
    }
}

/// A join token, without its secret.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Token {
    pub id: String,
    pub name: String,
    #[serde(with = "text")]
    pub secret: Digest,
    pub scope: Scope,
    pub uses: u32,
    pub used: u32,
    pub replace: bool,
    pub revoked: bool,
    pub created_s: u64,
    pub expires_s: u64,
    pub revision: u64,
}

/// A host that joined.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Host {
    #[serde(with = "text")]
    pub uid: HostUid,
    #[serde(with = "text")]
    pub name: Label,
    #[serde(with = "text")]
    pub network: Network,
    pub address: IpAddr,
    pub mesh_port: u16,
    pub version: String,
    /// Whether control reached the host's agent at its address and port.
    #[serde(default)]
    pub proven: bool,
    /// Whether control failed at it often enough for people to hear of it.
    #[serde(default)]
    pub doubted: bool,
    /// SHA-256 of the SubjectPublicKeyInfo that joined.
    #[serde(with = "text")]
    pub key: Digest,
    /// The token that it joined with last.
    pub token: String,
    pub scope: Scope,
    /// The trust bundle that it has on disk and in use; 0: none was acknowledged.
    #[serde(default)]
    pub bundle: u64,
    /// The last transition of its lease.
    pub live: bool,
    pub since_s: u64,
    pub workloads: Vec<Workload>,
    pub created_s: u64,
    pub revision: u64,
}

impl Host {
    pub(crate) fn offers(&self) -> impl Iterator<Item = (&Account, &Offer)> {
        self.workloads
            .iter()
            .flat_map(|w| w.offers.iter().map(move |offer| (&w.account, offer)))
    }

    /// Whether `other` is reached in the same place.
    pub(crate) fn same_place(&self, other: &Self) -> bool {
        let place = |h: &Self| (h.network.clone(), h.address, h.mesh_port);
        place(self) == place(other)
    }

    pub(crate) fn serves(&self, service: &ServiceName) -> bool {
        self.offers().any(|(_, offer)| offer.service == *service)
    }
}

/// A workload as its host reported it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Workload {
    #[serde(with = "text::account")]
    pub account: Account,
    pub offers: Vec<Offer>,
}

/// A service as a workload offers it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Offer {
    #[serde(with = "text::service")]
    pub service: ServiceName,
    #[serde(with = "text::ports")]
    pub ports: Vec<Port>,
    /// Counts only when the service is made.
    #[serde(with = "text::transport")]
    pub transport: Transport,
    pub healthy: bool,
    /// Servers without an agent, to which the host goes on in plaintext; none where a program of the host serves.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub plaintext: Vec<SocketAddr>,
}

/// A host, or one workload of it, that was revoked. A host's uid never comes back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Revoked {
    #[serde(with = "text")]
    pub uid: HostUid,
    /// `None`: the host with all that it was given.
    #[serde(
        with = "text::account_or_none",
        default,
        skip_serializing_if = "Option::is_none"
    )]
    pub account: Option<Account>,
    /// The host's name; its uid where a restored control learned of it from agents.
    pub name: String,
    /// What the host joined with, where it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub joined: Option<Joined>,
    pub at_s: u64,
    pub revision: u64,
    /// Made when it is first sent.
    #[serde(skip)]
    pub signature: OnceLock<Arc<[u8]>>,
}

impl Revoked {
    pub(crate) fn subject(&self) -> Subject {
        Subject {
            host: self.uid.clone(),
            account: self.account.clone(),
        }
    }
}

/// Key and token of a join: a removed host does not come back by them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Joined {
    #[serde(with = "text")]
    pub key: Digest,
    pub token: String,
}

/// A service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Service {
    #[serde(with = "text::service")]
    pub name: ServiceName,
    #[serde(with = "text::vip")]
    pub vip: Vip,
    #[serde(with = "text::ports")]
    pub ports: Vec<Port>,
    #[serde(default)]
    pub port_names: BTreeMap<u16, String>,
    #[serde(with = "text::transport")]
    pub transport: Transport,
    /// Whose plaintext `strict` lets in.
    #[serde(default, with = "text::ranges", skip_serializing_if = "Vec::is_empty")]
    pub plaintext_from: Vec<Cidr>,
    #[serde(default, with = "text::capture")]
    pub capture: Capture,
    #[serde(with = "text")]
    pub source: Source,
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// Without those of the transport.
    #[serde(default)]
    pub annotations: BTreeMap<String, String>,
    pub created_s: u64,
    /// Of the last change that the index shows.
    pub revision: u64,
}

/// A service that is gone and whose addresses rest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Tombstone {
    #[serde(with = "text::service")]
    pub name: ServiceName,
    #[serde(with = "text::vip")]
    pub vip: Vip,
    pub released_s: u64,
    pub revision: u64,
}

/// A policy, as the operator wrote it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Policy {
    pub object: Object<PolicySpec>,
    pub created_s: u64,
    pub revision: u64,
}

/// The bearer token of an operator.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Operator {
    #[serde(with = "text")]
    pub name: Label,
    #[serde(with = "text")]
    pub secret: Digest,
    pub created_s: u64,
}

/// A policy's key: its namespace, `None` for mesh-wide ones, and its name.
pub(crate) type PolicyKey = (Option<Label>, Label);

/// The protocol and number of each port, for messages.
pub(crate) fn show_ports(ports: &[Port]) -> String {
    let show = |p: &Port| match p.protocol {
        Protocol::Auto => p.number.to_string(),
        other => format!("{}/{other}", p.number),
    };
    ports.iter().map(show).collect::<Vec<_>>().join(", ")
}
