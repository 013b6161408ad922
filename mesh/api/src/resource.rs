//! Resources as operators write them: Kubernetes-shaped YAML or JSON. `Service` is the standard kind of `v1`;
//! our own kinds live in `meshwork.io/v1alpha1`. Unknown fields are errors, never silence.

use std::collections::BTreeMap;

use mesh_core::names::{Label, NameError, ServiceName, TrustDomain};
use mesh_core::policy::{Caller, Cidr, Enforce, Level, Policy, Rule};
use mesh_core::service::{Capture, Glob, Pattern, Port, Protocol, Transport};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// The group and version of our own kinds.
pub const OUR_API: &str = "meshwork.io/v1alpha1";
/// The annotation of a `Service` that sets its transport.
pub const TRANSPORT_ANNOTATION: &str = "meshwork.io/transport";
/// The annotation of a `Service` that names, divided by commas, the address ranges whose plaintext `strict` lets in.
pub const PLAINTEXT_FROM_ANNOTATION: &str = "meshwork.io/plaintext-from";
/// What every annotation of ours begins with.
const OUR_ANNOTATIONS: &str = "meshwork.io/";
/// Whether calls to the real addresses of the hosts that serve it are taken over too.
pub const CAPTURE_ANNOTATION: &str = "meshwork.io/capture";
/// Most address ranges of one policy: each takes a place in the packet filter for each port of each host that it decides
/// about.
const POLICY_RANGES_MAX: usize = 1_024;
/// Most such ranges of one service.
const PLAINTEXT_FROM_MAX: usize = 64;
/// Most resources in one `apply`.
pub const APPLY_MAX: usize = 10_000;

/// What is wrong with a resource, and where.
#[derive(Debug, thiserror::Error)]
pub enum ResourceError {
    #[error("document {document}: {source}")]
    Yaml {
        document: usize,
        source: serde_norway::Error,
    },
    #[error("{object}: {message}")]
    Field { object: String, message: String },
    #[error(
        "kind `{kind}` of `{api_version}` is not one that can be written; known are v1 Service and {OUR_API} Policy"
    )]
    Kind { api_version: String, kind: String },
    #[error("more than {APPLY_MAX} resources in one file; split it")]
    TooMany,
}

/// Name, namespace and what else may be said of any resource.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Metadata {
    pub name: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
    /// Set by control; ignored when written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resource_version: Option<String>,
    /// Set by control; ignored when written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub creation_timestamp: Option<String>,
}

/// A resource that an operator can write.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Resource {
    Service(Object<ServiceSpec>),
    Policy(Object<PolicySpec>),
}

/// The common shape of a resource.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Object<S> {
    pub api_version: String,
    pub kind: String,
    pub metadata: Metadata,
    pub spec: S,
    /// Set by control; ignored when written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<serde_json::Value>,
}

/// The part of a `v1` Service that the mesh reads. `selector` and the like belong to Kubernetes and are refused
/// outside of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct ServiceSpec {
    pub ports: Vec<ServicePort>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct ServicePort {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    pub port: u16,
    /// Only `TCP`.
    #[serde(default = "tcp")]
    pub protocol: String,
    /// `auto`, `tcp`, `http`, `http2`, `grpc`; also `kubernetes.io/h2c`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub app_protocol: Option<String>,
}

fn tcp() -> String {
    "TCP".to_owned()
}

/// A policy: in no namespace it is mesh-wide, else its namespace's or, with `service`, one service's.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct PolicySpec {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service: Option<String>,
    /// `on` (default) or `audit`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub enforce: Option<String>,
    pub rules: Vec<RuleSpec>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct RuleSpec {
    pub name: String,
    pub from: Vec<CallerSpec>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<u16>,
}

/// Exactly one field is set, but `trustDomain`, which may also qualify `identity` and `host`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct CallerSpec {
    /// `namespace/account`, each side may be `*` or end in `*`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub identity: Option<String>,
    /// All workloads of a namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// Unmapped processes of a host: its name, `*` or `prefix*`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
    /// Alone: all workloads and hosts of the trust domain. Default of the others: the mesh's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trust_domain: Option<String>,
    /// Plaintext callers from an address range.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cidr: Option<String>,
}

/// Reads a file of one or more YAML (or JSON) documents.
pub fn parse_all(text: &str) -> Result<Vec<Resource>, ResourceError> {
    let mut resources = Vec::new();
    for (index, document) in serde_norway::Deserializer::from_str(text).enumerate() {
        let yaml = |source| ResourceError::Yaml {
            document: index + 1,
            source,
        };
        let value = serde_json::Value::deserialize(document).map_err(yaml)?;
        if value.is_null() {
            continue;
        }
        if resources.len() == APPLY_MAX {
            return Err(ResourceError::TooMany);
        }
        resources.push(Resource::from_value(value)?);
    }
    Ok(resources)
}

impl Resource {
    /// Reads one resource and checks all of it.
    pub fn from_value(value: serde_json::Value) -> Result<Self, ResourceError> {
        let text = |field: &str| {
            value
                .get(field)
                .and_then(|v| v.as_str())
                .unwrap_or_default()
                .to_owned()
        };
        let (api_version, kind) = (text("apiVersion"), text("kind"));
        let name = value
            .pointer("/metadata/name")
            .and_then(|v| v.as_str())
            .unwrap_or("(no name)");
        let object = format!("{kind} {name}");
        let resource = match (api_version.as_str(), kind.as_str()) {
            ("v1", "Service") => Self::Service(typed(value, &object)?),
            (OUR_API, "Policy") => Self::Policy(typed(value, &object)?),
            _ => return Err(ResourceError::Kind { api_version, kind }),
        };
        let own = "check.invalid"
            .parse::<TrustDomain>()
            .map_err(|e| bad(&object, &e))?;
        match &resource {
            Self::Service(service) => {
                let known = [
                    TRANSPORT_ANNOTATION,
                    PLAINTEXT_FROM_ANNOTATION,
                    CAPTURE_ANNOTATION,
                ];
                known_annotations(&object, &service.metadata, &known)?;
                drop(service.to_core()?);
            }
            Self::Policy(policy) => {
                known_annotations(&object, &policy.metadata, &[])?;
                drop(policy.to_core(&own)?);
            }
        }
        Ok(resource)
    }

    /// `Kind namespace/name`, for messages.
    pub fn object(&self) -> String {
        let (kind, metadata) = match self {
            Self::Service(o) => (&o.kind, &o.metadata),
            Self::Policy(o) => (&o.kind, &o.metadata),
        };
        match &metadata.namespace {
            Some(namespace) => format!("{kind} {namespace}/{}", metadata.name),
            None => format!("{kind} {}", metadata.name),
        }
    }
}

/// Refuses annotations that are ours by name and mean nothing here: mostly mistyped.
fn known_annotations(object: &str, of: &Metadata, known: &[&str]) -> Result<(), ResourceError> {
    let mut ours = of
        .annotations
        .keys()
        .filter(|key| key.starts_with(OUR_ANNOTATIONS));
    let Some(unknown) = ours.find(|key| !known.contains(&key.as_str())) else {
        return Ok(());
    };
    let known = match known.is_empty() {
        true => "a resource of this kind has none of ours".to_owned(),
        false => format!("known are {}", known.join(", ")),
    };
    Err(bad(
        object,
        &format!("the annotation {unknown} is not known; {known}"),
    ))
}

/// Reads a resource of a known kind; what does not fit is told with its path.
fn typed<T: DeserializeOwned>(value: serde_json::Value, object: &str) -> Result<T, ResourceError> {
    serde_path_to_error::deserialize(value).map_err(|error| {
        let path = error.path().to_string();
        let mut message = error.into_inner().to_string();
        // The names of our types say nothing to who writes YAML.
        if let Some(at) = message.find("expected struct ") {
            message.replace_range(at.., "expected a mapping");
        }
        let at = if path == "." {
            String::new()
        } else {
            format!("{path}: ")
        };
        bad(object, &format!("{at}{message}"))
    })
}

fn bad(object: &str, message: &dyn std::fmt::Display) -> ResourceError {
    ResourceError::Field {
        object: object.to_owned(),
        message: message.to_string(),
    }
}

/// What an operator says of a service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeclaredService {
    pub name: ServiceName,
    pub ports: Vec<Port>,
    pub transport: Transport,
    /// Whose plaintext `strict` lets in.
    pub plaintext_from: Vec<Cidr>,
    pub capture: Capture,
}

impl Object<ServiceSpec> {
    /// Checks everything and converts.
    pub fn to_core(&self) -> Result<DeclaredService, ResourceError> {
        let object = format!("Service {}", self.metadata.name);
        let fault = |error: NameError| bad(&object, &error);
        let namespace = self.metadata.namespace.as_deref().unwrap_or("default");
        let name = ServiceName {
            namespace: namespace.parse().map_err(fault)?,
            name: self.metadata.name.parse().map_err(fault)?,
        };
        let mut ports = Vec::new();
        for port in &self.spec.ports {
            if port.protocol != "TCP" {
                return Err(bad(
                    &object,
                    &format!("port {}: only protocol TCP is carried", port.port),
                ));
            }
            let text = port.app_protocol.as_deref().unwrap_or("auto");
            let protocol = match text {
                "kubernetes.io/h2c" => Some(Protocol::Http2),
                other => Protocol::parse(other),
            };
            let protocol = protocol.ok_or_else(|| {
                bad(
                    &object,
                    &format!(
                        "port {}: appProtocol `{text}` is not auto, tcp, http, http2 or grpc",
                        port.port
                    ),
                )
            })?;
            ports.push(Port {
                number: port.port,
                protocol,
            });
        }
        let ports = check_ports(ports).map_err(|message| bad(&object, &message))?;
        let transport = match self.metadata.annotations.get(TRANSPORT_ANNOTATION) {
            None => Transport::default(),
            Some(text) => Transport::parse(text).ok_or_else(|| {
                bad(
                    &object,
                    &format!("{TRANSPORT_ANNOTATION} `{text}` is not permissive or strict"),
                )
            })?,
        };
        let capture = match self.metadata.annotations.get(CAPTURE_ANNOTATION) {
            None => Capture::default(),
            Some(text) => Capture::parse(text).ok_or_else(|| {
                bad(
                    &object,
                    &format!("{CAPTURE_ANNOTATION} `{text}` is not vip or vip+real"),
                )
            })?,
        };
        let ranges = self.metadata.annotations.get(PLAINTEXT_FROM_ANNOTATION);
        let ranges = ranges
            .iter()
            .flat_map(|text| text.split(','))
            .map(str::trim);
        let plaintext_from = check_ranges(ranges)
            .map_err(|message| bad(&object, &format!("{PLAINTEXT_FROM_ANNOTATION}: {message}")))?;
        Ok(DeclaredService {
            name,
            ports,
            transport,
            plaintext_from,
            capture,
        })
    }
}

/// Reads an address range. One with bits behind its prefix is refused: somebody means one address and lets in many.
fn check_range(text: &str) -> Result<Cidr, String> {
    let shown: String = text.chars().take(80).collect();
    let range = Cidr::parse(text)
        .ok_or_else(|| format!("`{shown}` is not an address range such as 10.0.0.0/8"))?;
    let (first, _) = range.bounds();
    if first != range.address {
        let (address, prefix) = (range.address, range.prefix);
        let whole = if address.is_ipv4() { 32 } else { 128 };
        return Err(format!(
            "`{shown}` has bits behind its prefix: write {first}/{prefix} for the range, or {address}/{whole} for the one address"
        ));
    }
    Ok(range)
}

/// Reads address ranges: sorted, each once, 64 at most.
pub(crate) fn check_ranges<'a>(texts: impl Iterator<Item = &'a str>) -> Result<Vec<Cidr>, String> {
    let texts = texts.take(PLAINTEXT_FROM_MAX + 1);
    let mut ranges = texts.map(check_range).collect::<Result<Vec<_>, _>>()?;
    if ranges.len() > PLAINTEXT_FROM_MAX {
        return Err(format!("more than {PLAINTEXT_FROM_MAX} ranges"));
    }
    ranges.sort();
    ranges.dedup();
    Ok(ranges)
}

/// Sorted, none twice, none 0, 1 to 64 of them.
pub(crate) fn check_ports(mut ports: Vec<Port>) -> Result<Vec<Port>, String> {
    ports.sort();
    if ports.is_empty() || ports.len() > 64 {
        return Err(format!("{} ports; a service has 1 to 64", ports.len()));
    }
    if ports.iter().any(|port| port.number == 0) {
        return Err("port 0 can not be called; use 1 to 65535".to_owned());
    }
    if let Some(pair) = ports
        .windows(2)
        .find(|pair| pair[0].number == pair[1].number)
    {
        return Err(format!("port {} is listed twice", pair[0].number));
    }
    Ok(ports)
}

impl Object<PolicySpec> {
    /// Checks everything and converts; callers without a trust domain are of `own`.
    pub fn to_core(&self, own: &TrustDomain) -> Result<Policy, ResourceError> {
        let object = format!("Policy {}", self.metadata.name);
        let fault = |error: NameError| bad(&object, &error);
        let name: Label = self.metadata.name.parse().map_err(fault)?;
        let level = match (&self.metadata.namespace, &self.spec.service) {
            (None, None) => Level::Mesh,
            (Some(namespace), None) => Level::Namespace(namespace.parse().map_err(fault)?),
            (Some(namespace), Some(service)) => Level::Service(ServiceName {
                namespace: namespace.parse().map_err(fault)?,
                name: service.parse().map_err(fault)?,
            }),
            (None, Some(_)) => return Err(bad(&object, &"spec.service needs metadata.namespace")),
        };
        let enforce = match self.spec.enforce.as_deref() {
            None | Some("on") => Enforce::On,
            Some("audit") => Enforce::Audit,
            Some(other) => {
                return Err(bad(
                    &object,
                    &format!("enforce `{other}` is not on or audit"),
                ));
            }
        };
        if self.spec.rules.len() > 256 {
            return Err(bad(&object, &"more than 256 rules; split the policy"));
        }
        let rules = self.spec.rules.iter().map(|rule| rule.to_core(own));
        let rules: Vec<Rule> = rules
            .collect::<Result<_, String>>()
            .map_err(|message| bad(&object, &message))?;
        let callers = rules.iter().flat_map(|rule| &rule.callers);
        let ranges = callers.filter(|caller| matches!(caller, Caller::Plaintext(_)));
        let ranges = ranges.count();
        if POLICY_RANGES_MAX < ranges {
            let message = format!("{ranges} entries of `cidr`; {POLICY_RANGES_MAX} may be");
            return Err(bad(&object, &message));
        }
        Ok(Policy {
            name,
            level,
            enforce,
            rules,
        })
    }
}

impl RuleSpec {
    fn to_core(&self, own: &TrustDomain) -> Result<Rule, String> {
        let name: Label = self.name.parse().map_err(|e: NameError| e.to_string())?;
        if self.from.is_empty() || self.from.len() > 256 {
            return Err(format!(
                "rule {name}: `from` has {} entries; 1 to 256 may be",
                self.from.len()
            ));
        }
        let callers = self.from.iter().map(|caller| {
            caller
                .to_core(own)
                .map_err(|message| format!("rule {name}: {message}"))
        });
        let callers = callers.collect::<Result<_, String>>()?;
        Ok(Rule {
            name,
            callers,
            ports: self.ports.clone(),
        })
    }
}

impl CallerSpec {
    fn to_core(&self, own: &TrustDomain) -> Result<Caller, String> {
        let name = |e: NameError| e.to_string();
        let trust_domain = match &self.trust_domain {
            None => own.clone(),
            Some(text) => text.parse().map_err(name)?,
        };
        match (&self.identity, &self.namespace, &self.host, &self.cidr) {
            (Some(text), None, None, None) => {
                let pattern = Pattern::parse(text).map_err(name)?;
                Ok(Caller::Workload {
                    trust_domain,
                    pattern,
                })
            }
            (None, Some(text), None, None) => {
                let pattern = Pattern {
                    namespace: Glob::parse(text).map_err(name)?,
                    name: Glob::Any,
                };
                Ok(Caller::Workload {
                    trust_domain,
                    pattern,
                })
            }
            (None, None, Some(text), None) => Ok(Caller::Host {
                trust_domain,
                name: Glob::parse(text).map_err(name)?,
            }),
            (None, None, None, Some(text)) if self.trust_domain.is_none() => check_range(text)
                .map(Caller::Plaintext)
                .map_err(|message| format!("cidr {message}")),
            (None, None, None, None) if self.trust_domain.is_some() => {
                Ok(Caller::TrustDomain(trust_domain))
            }
            _ => Err(
                "a caller has exactly one of identity, namespace, host, trustDomain, cidr"
                    .to_owned(),
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const POLICY: &str = "
apiVersion: meshwork.io/v1alpha1
kind: Policy
metadata: {name: db, namespace: data}
spec:
  service: db
  rules:
  - name: shop
    from: [{identity: shop/web}, {namespace: ops}, {host: 'vm-*'}, {trustDomain: other.example.com}, {cidr: 10.0.0.0/8}]
    ports: [5432]
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop, annotations: {meshwork.io/transport: strict, meshwork.io/plaintext-from: '10.1.0.0/16, fd00::/8', meshwork.io/capture: vip+real}}
spec:
  ports: [{port: 80, appProtocol: http}, {port: 5432}]
---
";

    #[test]
    fn the_documented_forms_are_read() {
        let resources = parse_all(POLICY).unwrap();
        assert_eq!(resources.len(), 2);
        let Resource::Policy(policy) = &resources[0] else {
            panic!()
        };
        let policy = policy
            .to_core(&"corp.example.com".parse().unwrap())
            .unwrap();
        assert_eq!(policy.rules[0].callers.len(), 5);
        let Resource::Service(service) = &resources[1] else {
            panic!()
        };
        let service = service.to_core().unwrap();
        assert_eq!(service.transport, Transport::Strict);
        assert_eq!(service.plaintext_from.len(), 2);
        assert_eq!(service.capture, Capture::VipAndReal);
        assert_eq!(service.ports[1].protocol, Protocol::Auto);
    }

    #[test]
    fn address_ranges_of_a_policy_are_bounded() {
        let policy = |count: usize| {
            let from = |n: usize| format!("{{cidr: 10.0.{}.{}/32}}", n / 256, n % 256);
            let entries: Vec<String> = (0..count).map(from).collect();
            let rules = entries.chunks(256).enumerate();
            let rules =
                rules.map(|(n, from)| format!("{{name: r{n}, from: [{}]}}", from.join(",")));
            let rules: Vec<String> = rules.collect();
            format!(
                "apiVersion: meshwork.io/v1alpha1\nkind: Policy\nmetadata: {{name: p}}\nspec: {{rules: [{}]}}\n",
                rules.join(",")
            )
        };
        assert!(parse_all(&policy(1_024)).is_ok());
        let error = parse_all(&policy(1_025)).unwrap_err().to_string();
        assert!(error.contains("1025 entries of `cidr`"), "{error}");
    }

    #[test]
    fn mistakes_are_named() {
        for (change, with, expected) in [
            ("service: db", "servce: db", "servce"),
            ("identity: shop/web", "identity: shop", "namespace/name"),
            (
                "{identity: shop/web}",
                "{identity: shop/web, host: x}",
                "exactly one",
            ),
            ("port: 80", "port: 0", "port 0"),
            ("port: 80", "port: 5432", "twice"),
            ("appProtocol: http", "appProtocol: ftp", "ftp"),
            ("kind: Policy", "kind: Polcy", "Polcy"),
            ("transport: strict", "transport: strickt", "strickt"),
            ("10.1.0.0/16,", "10.1.0.0/33,", "10.1.0.0/33"),
            (
                "10.1.0.0/16,",
                "10.1.2.3/16,",
                "write 10.1.0.0/16 for the range, or 10.1.2.3/32",
            ),
            (
                "cidr: 10.0.0.0/8",
                "cidr: 10.0.0.1/8",
                "cidr `10.0.0.1/8` has bits",
            ),
            (
                "cidr: 10.0.0.0/8",
                "cidr: 'fd00::1/8'",
                "write fd00::/8 for the range, or fd00::1/128",
            ),
            (
                "meshwork.io/transport",
                "meshwork.io/trnsport",
                "known are meshwork.io/transport, meshwork.io/plaintext-from, meshwork.io/capture",
            ),
            (
                "namespace: data}",
                "namespace: data, annotations: {meshwork.io/transport: strict}}",
                "none of ours",
            ),
            ("vip+real", "real", "capture `real`"),
        ] {
            let error = parse_all(&POLICY.replace(change, with))
                .unwrap_err()
                .to_string();
            assert!(error.contains(expected), "{with}: {error}");
        }
    }

    #[test]
    fn a_wrong_type_is_told_with_its_path() {
        let text = |yaml: &str| parse_all(yaml).unwrap_err().to_string();
        let port = text(
            "{apiVersion: v1, kind: Service, metadata: {name: web}, spec: {ports: [{port: x}]}}",
        );
        assert!(port.contains("Service web: spec.ports[0].port: "), "{port}");
        let spec = text("{apiVersion: v1, kind: Service, metadata: {name: web}, spec: 3}");
        assert!(
            spec.contains("spec: ") && spec.ends_with("expected a mapping"),
            "{spec}"
        );
    }
}
