//! What control sends in a Sync session, read into core types, and what an agent keeps of it, written back.
//!
//! Everything is checked here: a field out of its bounds makes the whole message bad, and the agent keeps what it
//! had. The messages themselves are bounded by the transport ([`MESSAGE_MAX`]).

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use bytes::Bytes;
use mesh_core::names::{Account, HostUid, Label, ServiceName, TrustDomain};
use mesh_core::policy::{Cidr, PolicySet};
use mesh_core::reason::Reason;
use mesh_core::revocation::{Revocation, Subject};
use mesh_core::service::{
    Capture, Endpoint, Health, Index, Port, Protocol, Service, Transport, Vip,
};
use mesh_core::vip::VipRanges;

use crate::proto;
use crate::resource::{Resource, check_ports, check_ranges};

/// Largest message of either side, in bytes.
pub const MESSAGE_MAX: usize = 4 * 1024 * 1024;
/// Most services of a mesh that an agent takes.
pub const SERVICES_MAX: usize = 65_536;
/// Most endpoints of one service: what the balancer holds.
pub const ENDPOINTS_MAX: usize = 10_000;
/// Most policies that concern one host.
pub const POLICIES_MAX: usize = 10_000;
/// Most revocations of one message: with the longest names about half of what a message holds.
pub const REVOCATIONS_PART: usize = 5_000;
/// Longest signature, in bytes: RSA of 4096 bits.
const SIGNATURE_MAX: usize = 512;
/// Most issuers of one message: a mesh has a few in the year for which revocations are kept.
const ISSUERS_MAX: usize = 64;
/// Largest certificate of an issuer, in bytes: ours have about 500, with RSA of 4096 bits some 2,000.
const ISSUER_MAX: usize = 4 * 1024;
/// Longest text of one field, in bytes: a DNS name.
pub const TEXT_MAX: usize = 253;

/// What is wrong with a message, and which object of it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{object}: {message}")]
pub struct SyncError {
    pub object: String,
    pub message: String,
}

fn bad(object: impl Into<String>, message: impl std::fmt::Display) -> SyncError {
    SyncError {
        object: object.into(),
        message: message.to_string(),
    }
}

fn at_most(object: &str, count: usize, max: usize) -> Result<(), SyncError> {
    if count > max {
        return Err(bad(object, format!("{count} of at most {max}")));
    }
    Ok(())
}

/// What all hosts of a mesh agree on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MeshSettings {
    /// e.g. `mesh.internal`, without dots around it.
    pub dns_suffix: String,
    pub vips: VipRanges,
}

impl TryFrom<&proto::MeshSettings> for MeshSettings {
    type Error = SyncError;

    fn try_from(wire: &proto::MeshSettings) -> Result<Self, SyncError> {
        let labels: Result<Vec<Label>, _> = wire.dns_suffix.split('.').map(str::parse).collect();
        if wire.dns_suffix.len() > SUFFIX_MAX || labels.is_err() {
            let text: String = wire.dns_suffix.chars().take(80).collect();
            return Err(bad("the DNS suffix", format!("`{text}` is not a DNS name")));
        }
        let range = |text: &str| {
            Cidr::parse(text).ok_or_else(|| {
                let text: String = text.chars().take(80).collect();
                bad("a range of virtual addresses", format!("`{text}` is none"))
            })
        };
        let vips = VipRanges::new(range(&wire.vip4_range)?, range(&wire.vip6_range)?)
            .map_err(|error| bad("the ranges of virtual addresses", error))?;
        Ok(Self {
            dns_suffix: wire.dns_suffix.clone(),
            vips,
        })
    }
}

/// Leaves room for `<service>.<namespace>.` in a DNS name.
const SUFFIX_MAX: usize = 125;

impl From<&MeshSettings> for proto::MeshSettings {
    fn from(settings: &MeshSettings) -> Self {
        Self {
            dns_suffix: settings.dns_suffix.clone(),
            vip4_range: settings.vips.v4().to_string(),
            vip6_range: settings.vips.v6().to_string(),
        }
    }
}

/// A change of the index, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IndexChange {
    pub revision: u64,
    pub snapshot: bool,
    pub services: Vec<Service>,
    pub removed: Vec<ServiceName>,
}

impl IndexChange {
    /// Reads an update; all addresses must lie in `vips`.
    pub fn read(wire: &proto::IndexUpdate, vips: &VipRanges) -> Result<Self, SyncError> {
        at_most("services of the index", wire.services.len(), SERVICES_MAX)?;
        at_most("removals of the index", wire.removed.len(), SERVICES_MAX)?;
        if wire.snapshot && !wire.removed.is_empty() {
            return Err(bad("the index", "a snapshot removes nothing"));
        }
        let services = wire.services.iter().map(|s| index_service(s, vips));
        let removed = wire.removed.iter().map(service_name);
        Ok(Self {
            revision: wire.revision,
            snapshot: wire.snapshot,
            services: services.collect::<Result<_, _>>()?,
            removed: removed.collect::<Result<_, _>>()?,
        })
    }

    /// The index after this change of `before`.
    pub fn apply(self, before: Option<&Index>) -> Result<Index, SyncError> {
        let mut index = match before {
            Some(before) if !self.snapshot => before.clone(),
            _ => Index::default(),
        };
        for name in &self.removed {
            index.remove(name);
        }
        for service in self.services {
            index.insert(service);
        }
        at_most(
            "services of the index",
            index.services().len(),
            SERVICES_MAX,
        )?;
        Ok(index)
    }
}

/// An index as one snapshot, as it is kept on disk.
pub fn index_snapshot(index: &Index, revision: u64) -> proto::IndexUpdate {
    let services = index.services().map(|service| proto::IndexService {
        namespace: service.name.namespace.to_string(),
        name: service.name.name.to_string(),
        vip4: service.vip.v4.to_string(),
        vip6: service.vip.v6.to_string(),
        ports: service.ports.iter().map(reported_port).collect(),
        transport: service.transport.to_string(),
        plaintext_from: service.plaintext_from.iter().map(Cidr::to_string).collect(),
        capture: service.capture.to_string(),
    });
    proto::IndexUpdate {
        revision,
        snapshot: true,
        services: services.collect(),
        removed: Vec::new(),
    }
}

fn index_service(wire: &proto::IndexService, vips: &VipRanges) -> Result<Service, SyncError> {
    let name = names(&wire.namespace, &wire.name)?;
    let object = format!("service {name}");
    let vip = Vip {
        v4: wire.vip4.parse().map_err(|e| bad(&object, e))?,
        v6: wire.vip6.parse().map_err(|e| bad(&object, e))?,
    };
    if !vips.contains(vip.v4.into()) || !vips.contains(vip.v6.into()) || vip == vips.own() {
        let message = format!("{} or {} is no address of the mesh", vip.v4, vip.v6);
        return Err(bad(object, message));
    }
    let transport = Transport::parse(&wire.transport)
        .ok_or_else(|| bad(&object, "its transport is not known to this version"))?;
    let ports = wire.ports.iter().map(|p| port(&object, p));
    let ports = ports.collect::<Result<_, _>>()?;
    let plaintext_from = wire.plaintext_from.iter().map(String::as_str);
    let plaintext_from = check_ranges(plaintext_from).map_err(|message| bad(&object, message))?;
    let capture = Capture::parse(&wire.capture)
        .ok_or_else(|| bad(&object, "its capture is not known to this version"))?;
    Ok(Service {
        name,
        vip,
        ports: check_ports(ports).map_err(|message| bad(&object, message))?,
        transport,
        plaintext_from,
        capture,
    })
}

/// A port as an agent reports it and the index lists it.
pub fn reported_port(port: &Port) -> proto::ReportedPort {
    proto::ReportedPort {
        number: port.number.into(),
        protocol: port.protocol.to_string(),
    }
}

fn port(object: &str, wire: &proto::ReportedPort) -> Result<Port, SyncError> {
    let number = u16::try_from(wire.number)
        .map_err(|_| bad(object, format!("{} is no port", wire.number)))?;
    let protocol = Protocol::parse(&wire.protocol).ok_or_else(|| {
        bad(
            object,
            format!("the protocol of port {number} is not known to this version"),
        )
    })?;
    Ok(Port { number, protocol })
}

/// Reads a reference to a service.
pub fn service_name(wire: &proto::ServiceRef) -> Result<ServiceName, SyncError> {
    names(&wire.namespace, &wire.name)
}

/// Writes a reference to a service.
pub fn service_ref(name: &ServiceName) -> proto::ServiceRef {
    proto::ServiceRef {
        namespace: name.namespace.to_string(),
        name: name.name.to_string(),
    }
}

fn names(namespace: &str, name: &str) -> Result<ServiceName, SyncError> {
    let read = |text: &str| text.parse::<Label>().map_err(|e| bad("a service", e));
    Ok(ServiceName {
        namespace: read(namespace)?,
        name: read(name)?,
    })
}

/// The endpoints of one service, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointsChange {
    pub service: ServiceName,
    pub revision: u64,
    pub endpoints: Vec<Endpoint>,
}

impl TryFrom<&proto::EndpointsUpdate> for EndpointsChange {
    type Error = SyncError;

    fn try_from(wire: &proto::EndpointsUpdate) -> Result<Self, SyncError> {
        let service = wire.service.as_ref();
        let service = service_name(service.ok_or_else(|| bad("endpoints", "of no service"))?)?;
        let object = format!("endpoints of {service}");
        at_most(&object, wire.endpoints.len(), ENDPOINTS_MAX)?;
        let mut seen = BTreeSet::new();
        let mut endpoints = Vec::with_capacity(wire.endpoints.len());
        for one in &wire.endpoints {
            let endpoint = endpoint(&object, one)?;
            let key = (
                endpoint.network.clone(),
                endpoint.address,
                endpoint.host.clone(),
                endpoint.account.clone(),
            );
            if !seen.insert(key) {
                return Err(bad(object, format!("{} is listed twice", endpoint.address)));
            }
            endpoints.push(endpoint);
        }
        Ok(Self {
            service,
            revision: wire.revision,
            endpoints,
        })
    }
}

fn endpoint(object: &str, wire: &proto::Endpoint) -> Result<Endpoint, SyncError> {
    let name = |error| bad(object, error);
    let mesh_port = u16::try_from(wire.mesh_port).ok().filter(|port| *port != 0);
    let address: IpAddr = wire.address.parse().map_err(|e| bad(object, e))?;
    if address.is_unspecified() || address.is_multicast() {
        return Err(bad(object, format!("{address} is no host's address")));
    }
    Ok(Endpoint {
        network: wire.network.parse().map_err(name)?,
        address,
        mesh_port: mesh_port
            .ok_or_else(|| bad(object, format!("{} is no port", wire.mesh_port)))?,
        account: Account {
            namespace: wire.namespace.parse().map_err(name)?,
            name: wire.account.parse().map_err(name)?,
        },
        host: wire.host_uid.parse().map_err(name)?,
        health: if wire.stale {
            Health::Stale
        } else {
            Health::Healthy
        },
    })
}

/// Reads all policies that concern a host of trust domain `own`.
pub fn policy_set(wire: &proto::PolicyUpdate, own: &TrustDomain) -> Result<PolicySet, SyncError> {
    at_most("policies", wire.policies.len(), POLICIES_MAX)?;
    let mut policies = Vec::with_capacity(wire.policies.len());
    for text in &wire.policies {
        let value = serde_json::from_str(text).map_err(|e| bad("a policy", e))?;
        match Resource::from_value(value).map_err(|e| bad("a policy", e))? {
            Resource::Policy(policy) => {
                let core = policy.to_core(own).map_err(|e| bad("a policy", e))?;
                policies.push(Arc::new(core));
            }
            other => return Err(bad(other.object(), "is not a policy")),
        }
    }
    Ok(PolicySet {
        revision: wire.revision,
        policies,
    })
}

/// Reads a part of a list of revocations.
pub fn revocations(wire: &proto::Revocations) -> Result<Vec<Revocation>, SyncError> {
    at_most("revocations", wire.revoked.len(), REVOCATIONS_PART)?;
    at_most("issuers", wire.issuers.len(), ISSUERS_MAX)?;
    let mut issuers: Vec<Arc<[u8]>> = vec![Arc::default()];
    for issuer in &wire.issuers {
        at_most("bytes of an issuer", issuer.len(), ISSUER_MAX)?;
        issuers.push(issuer.as_ref().into());
    }
    wire.revoked
        .iter()
        .map(|one| revocation(one, &issuers))
        .collect()
}

fn revocation(wire: &proto::Revocation, issuers: &[Arc<[u8]>]) -> Result<Revocation, SyncError> {
    let name = |e| bad("a revocation", e);
    let host: HostUid = wire.host_uid.parse().map_err(name)?;
    at_most("bytes of a signature", wire.signature.len(), SIGNATURE_MAX)?;
    let account = match (wire.namespace.as_str(), wire.account.as_str()) {
        ("", "") => None,
        (namespace, account) => Some(Account {
            namespace: namespace.parse().map_err(name)?,
            name: account.parse().map_err(name)?,
        }),
    };
    let issuer = usize::try_from(wire.issuer).ok();
    let issuer = issuer.and_then(|at| issuers.get(at));
    Ok(Revocation {
        subject: Subject { host, account },
        at_s: wire.at_s,
        signature: wire.signature.as_ref().into(),
        issuer: Arc::clone(issuer.ok_or_else(|| bad("a revocation", "its issuer is not listed"))?),
    })
}

/// Writes revocations, and the issuers to which they point.
pub fn revocations_to_wire<'a>(
    all: impl IntoIterator<Item = &'a Revocation>,
) -> (Vec<proto::Revocation>, Vec<Bytes>) {
    let mut issuers: Vec<&Arc<[u8]>> = Vec::new();
    let all = all.into_iter().map(|one| {
        let known = issuers.iter().position(|known| **known == one.issuer);
        let at = known.or_else(|| {
            // One more than can be said: it goes without, as one that nobody signed.
            let room = !one.issuer.is_empty() && issuers.len() < ISSUERS_MAX;
            room.then(|| {
                issuers.push(&one.issuer);
                issuers.len() - 1
            })
        });
        let issuer = at.and_then(|at| u32::try_from(at + 1).ok());
        revocation_to_wire(one, issuer.unwrap_or(0))
    });
    let all = all.collect();
    let issuers = issuers.into_iter().map(|der| der.to_vec().into());
    (all, issuers.collect())
}

fn revocation_to_wire(revocation: &Revocation, issuer: u32) -> proto::Revocation {
    let account = revocation.subject.account.as_ref();
    let (namespace, name) = account
        .map(|a| (a.namespace.to_string(), a.name.to_string()))
        .unwrap_or_default();
    proto::Revocation {
        host_uid: revocation.subject.host.to_string(),
        namespace,
        account: name,
        at_s: revocation.at_s,
        signature: revocation.signature.to_vec().into(),
        issuer,
    }
}

/// Why something of a report is not listed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    pub account: Account,
    /// `None`: the whole workload.
    pub service: Option<Label>,
    pub reason: Reason,
    pub message: String,
}

/// Most problems of one report: each workload and each of its services has at most one.
pub const PROBLEMS_MAX: usize = 256 * 65;
/// Longest message of a problem or refusal that is kept, in characters.
const MESSAGE_TEXT_MAX: usize = 500;

/// Reads what control says of a report: its generation and what is not listed.
pub fn report_status(wire: &proto::ReportStatus) -> Result<(u64, Vec<Problem>), SyncError> {
    at_most("problems", wire.problems.len(), PROBLEMS_MAX)?;
    let problems = wire.problems.iter().map(|problem| {
        let name = |e| bad("a problem", e);
        let service = match problem.service.as_str() {
            "" => None,
            text => Some(text.parse().map_err(name)?),
        };
        Ok(Problem {
            account: Account {
                namespace: problem.namespace.parse().map_err(name)?,
                name: problem.account.parse().map_err(name)?,
            },
            service,
            reason: reason(problem.reason),
            message: printable(&problem.message),
        })
    });
    Ok((wire.generation, problems.collect::<Result<_, _>>()?))
}

/// What a host signs to be let in again.
pub fn rejoin_statement(host: &HostUid, nonce: &[u8]) -> String {
    use std::fmt::Write as _;
    let mut text = format!("meshwork rejoin 1\n{host}\n");
    for byte in nonce {
        // To memory.
        let _ = write!(text, "{byte:02x}");
    }
    text.push('\n');
    text
}

/// Reads a refusal: its reason, and control's words.
pub fn refusal(wire: &proto::Refusal) -> (Reason, String) {
    (reason(wire.reason), printable(&wire.message))
}

fn reason(number: u32) -> Reason {
    u16::try_from(number).map_or(Reason::Unspecified, Reason::from_wire)
}

/// A text of the other side, as a log line can bear it.
pub fn printable(text: &str) -> String {
    text.chars()
        .filter(|c| !c.is_control())
        .take(MESSAGE_TEXT_MAX)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service(name: &str, last: u8) -> proto::IndexService {
        proto::IndexService {
            namespace: "shop".to_owned(),
            name: name.to_owned(),
            vip4: format!("252.64.0.{last}"),
            vip6: format!("fd6d:6573:6800::{last:x}"),
            ports: vec![proto::ReportedPort {
                number: 80,
                protocol: "http".to_owned(),
            }],
            transport: "permissive".to_owned(),
            plaintext_from: vec!["10.0.0.0/8".to_owned()],
            capture: "vip+real".to_owned(),
        }
    }

    fn read(update: &proto::IndexUpdate) -> Result<IndexChange, SyncError> {
        IndexChange::read(update, &VipRanges::default())
    }

    fn snapshot(services: Vec<proto::IndexService>) -> proto::IndexUpdate {
        proto::IndexUpdate {
            revision: 7,
            snapshot: true,
            services,
            removed: vec![],
        }
    }

    #[test]
    fn revocations_read_back_with_who_signed_them() {
        let one = |n: u64, issuer: &[u8]| Revocation {
            subject: Subject {
                host: format!("{n:032x}").parse().unwrap(),
                account: None,
            },
            at_s: n,
            signature: [7, 8].into(),
            issuer: issuer.into(),
        };
        let all = [one(1, b"old"), one(2, b"new"), one(3, b""), one(4, b"old")];
        let (revoked, issuers) = revocations_to_wire(&all);
        assert_eq!(issuers, [&b"old"[..], b"new"]);
        let mut wire = proto::Revocations {
            revoked,
            issuers,
            ..proto::Revocations::default()
        };
        assert_eq!(revocations(&wire).unwrap(), all);
        wire.issuers.pop();
        assert!(revocations(&wire).is_err(), "an issuer that is not listed");
        wire.issuers = vec![Bytes::from(vec![0; ISSUER_MAX + 1]); 2];
        assert!(revocations(&wire).is_err());
        // More than a message bears: the last go without, and all of it can still be read.
        let many: Vec<_> = (0..100_u8).map(|n| one(n.into(), &[n, 1])).collect();
        let (revoked, issuers) = revocations_to_wire(&many);
        assert_eq!(issuers.len(), ISSUERS_MAX);
        let wire = proto::Revocations {
            revoked,
            issuers,
            ..proto::Revocations::default()
        };
        let read = revocations(&wire).unwrap();
        assert_eq!(read[..ISSUERS_MAX], many[..ISSUERS_MAX]);
        assert!(read[ISSUERS_MAX..].iter().all(|one| one.issuer.is_empty()));
    }

    #[test]
    fn an_index_reads_back_as_it_was_kept() {
        let first = snapshot(vec![service("api", 2), service("web", 3)]);
        let index = read(&first).unwrap().apply(None).unwrap();
        assert_eq!(index_snapshot(&index, 7), first);
        let delta = proto::IndexUpdate {
            revision: 8,
            snapshot: false,
            services: vec![service("db", 4)],
            removed: vec![service_ref(&ServiceName::parse("shop/web").unwrap())],
        };
        let index = read(&delta).unwrap().apply(Some(&index)).unwrap();
        let names: Vec<String> = index.services().map(|s| s.name.to_string()).collect();
        assert_eq!(names, ["shop/api", "shop/db"]);
    }

    #[test]
    fn a_service_out_of_bounds_makes_the_whole_update_bad() {
        let changes: [fn(&mut proto::IndexService); 11] = [
            |s| s.namespace = String::new(),
            |s| s.name = "UP".to_owned(),
            |s| s.vip4 = "10.0.0.1".to_owned(),
            |s| s.vip4 = "x".to_owned(),
            |s| s.vip6 = "2001:db8::1".to_owned(),
            |s| s.ports.clear(),
            |s| s.ports[0].number = 70_000,
            |s| s.ports[0].protocol = "ftp".to_owned(),
            |s| s.transport = "open".to_owned(),
            |s| s.plaintext_from[0] = "10.0.0.0".to_owned(),
            |s| s.capture = "real".to_owned(),
        ];
        for change in changes {
            let mut bad = service("web", 3);
            change(&mut bad);
            let update = snapshot(vec![service("api", 2), bad.clone()]);
            assert!(read(&update).is_err(), "{bad:?}");
        }
        let mut removing = snapshot(vec![]);
        removing
            .removed
            .push(service_ref(&ServiceName::parse("shop/web").unwrap()));
        assert!(read(&removing).is_err());
    }

    #[test]
    fn endpoints_are_checked_one_by_one() {
        let good = proto::Endpoint {
            network: "default".to_owned(),
            address: "10.0.0.2".to_owned(),
            mesh_port: 7441,
            namespace: "shop".to_owned(),
            account: "web".to_owned(),
            host_uid: "0".repeat(32),
            stale: true,
        };
        let update = |endpoints| proto::EndpointsUpdate {
            service: Some(service_ref(&ServiceName::parse("shop/web").unwrap())),
            revision: 3,
            endpoints,
        };
        let read = EndpointsChange::try_from(&update(vec![good.clone()])).unwrap();
        assert_eq!(read.endpoints[0].health, Health::Stale);
        let changes: [fn(&mut proto::Endpoint); 7] = [
            |e| e.network = String::new(),
            |e| e.address = "0.0.0.0".to_owned(),
            |e| e.address = "host".to_owned(),
            |e| e.mesh_port = 0,
            |e| e.mesh_port = 65_536,
            |e| e.account = "a.b".to_owned(),
            |e| e.host_uid = "0".to_owned(),
        ];
        for change in changes {
            let mut bad = good.clone();
            change(&mut bad);
            assert!(EndpointsChange::try_from(&update(vec![bad])).is_err());
        }
        let twice = update(vec![good.clone(), good]);
        assert!(EndpointsChange::try_from(&twice).is_err());
    }

    #[test]
    fn policies_come_as_operators_write_them_and_nothing_else_does() {
        let own: TrustDomain = "corp.example.com".parse().unwrap();
        let update = |text: &str| proto::PolicyUpdate {
            revision: 2,
            policies: vec![text.to_owned()],
        };
        let policy = r#"{"apiVersion":"meshwork.io/v1alpha1","kind":"Policy","metadata":{"name":"p"},
            "spec":{"rules":[{"name":"r","from":[{"namespace":"shop"}]}]}}"#;
        let set = policy_set(&update(policy), &own).unwrap();
        assert_eq!((set.revision, set.policies.len()), (2, 1));
        for bad in [
            "",
            "{}",
            r#"{"apiVersion":"v1","kind":"Service","metadata":{"name":"s"},"spec":{"ports":[{"port":1}]}}"#,
        ] {
            assert!(policy_set(&update(bad), &own).is_err(), "{bad}");
        }
    }

    #[test]
    fn settings_are_a_name_and_two_ranges() {
        let good = proto::MeshSettings {
            dns_suffix: "mesh.internal".to_owned(),
            vip4_range: "252.64.0.0/12".to_owned(),
            vip6_range: "fd6d:6573:6800::/64".to_owned(),
        };
        let read = MeshSettings::try_from(&good).unwrap();
        assert_eq!(proto::MeshSettings::from(&read), good);
        for suffix in ["", ".mesh", "mesh.", "a b", "x".repeat(64).as_str()] {
            let bad = proto::MeshSettings {
                dns_suffix: suffix.to_owned(),
                ..good.clone()
            };
            assert!(MeshSettings::try_from(&bad).is_err(), "{suffix}");
        }
    }

    #[test]
    fn a_problem_keeps_its_reason_and_loses_control_characters() {
        let status = proto::ReportStatus {
            generation: 4,
            problems: vec![proto::Problem {
                namespace: "shop".to_owned(),
                account: "web".to_owned(),
                service: String::new(),
                reason: Reason::OutOfScope.to_wire().into(),
                message: "a\nb".to_owned(),
            }],
        };
        let (generation, problems) = report_status(&status).unwrap();
        assert_eq!((generation, problems[0].reason), (4, Reason::OutOfScope));
        assert_eq!(problems[0].message, "ab");
    }
}
