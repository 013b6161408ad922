//! `services.d/*.toml`: one workload a file, as the host's administrator writes it.
//!
//! ```toml
//! account = "web"             # default: the file's name
//! namespace = "shop"
//! [owner]                     # exactly one; none where every service has endpoints
//! unit = "nginx.service"      # or user = "www-data", or cgroup = "system.slice/nginx.service"
//! [[service]]
//! name = "web"                # default: the account
//! ports = [{ port = 80, protocol = "http" }]
//! transport = "permissive"    # value at creation only
//! check = { http = "/healthz", port = 80, interval_s = 5 }   # or tcp, grpc, exec, systemd
//! endpoints = ["10.9.0.5:5432"]   # servers without an agent, which this host goes on to in plaintext
//! [[call]]                    # a local port or unix socket by which this workload, and nobody else, calls a service
//! service = "shop/db"
//! port = 5432                 # of the service
//! listen = "127.0.0.1:15432"  # or socket = "/run/web/db.sock"
//! ```

mod calls;
mod check;

use std::net::{IpAddr, SocketAddr};
use std::ops::Range;

use mesh_core::names::{Account, Label, NameError, ServiceName};
use mesh_core::service::{Port, Protocol, Transport};
use mesh_core::vip::VipRanges;
use serde::de::value::MapAccessDeserializer;
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer};

use crate::resource::check_ports;
pub use calls::{CALLS_MAX, CallAt, LocalCall};
use calls::{CallForm, calls};
pub use check::{Check, CheckKind, RunAs};
use check::{CheckForm, check};

/// Largest file we read, in bytes.
pub const FILE_MAX: u64 = 64 * 1024;
/// Most services of one workload.
pub const SERVICES_MAX: usize = 64;
/// Most plaintext endpoints of one service: the primary and replicas of a database, not a fleet, which would join.
pub const ENDPOINTS_MAX: usize = 16;

/// Which processes are the workload.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Owner {
    /// A systemd unit, by its name.
    Unit(String),
    /// A user, by name or number.
    User(String),
    /// A cgroup and all below it, relative to the root of the cgroup2 hierarchy.
    Cgroup(String),
}

impl std::fmt::Display for Owner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Unit(name) => write!(f, "unit {name}"),
            Self::User(name) => write!(f, "user {name}"),
            Self::Cgroup(path) => write!(f, "cgroup {path}"),
        }
    }
}

/// A workload of this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Workload {
    pub account: Account,
    /// `None`: it has no processes here, since all its services are served beyond this host.
    pub owner: Option<Owner>,
    pub services: Vec<LocalService>,
    /// Where it calls services without capture.
    pub calls: Vec<LocalCall>,
}

/// A service that the workload serves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalService {
    pub name: ServiceName,
    pub ports: Vec<Port>,
    /// What the service gets when this host is the first to register it.
    pub transport: Transport,
    pub check: Option<Check>,
    /// Where it is served without an agent: this host authorizes, and goes on to one of these in plaintext. Each once;
    /// none where a program of this host serves it.
    pub endpoints: Vec<SocketAddr>,
}

/// What a plaintext endpoint must not be: a file is judged by the host that it stands on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostAddresses {
    /// Of the host itself.
    pub own: Vec<IpAddr>,
    /// Of the mesh.
    pub vips: Option<VipRanges>,
    /// Its agent has no privileges: it can show no program the address of its caller.
    pub calls_only: bool,
}

/// What is wrong with a file, where, and what to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileError {
    /// 1-based; 0 where the whole file is meant.
    pub line: usize,
    pub message: String,
    pub remedy: &'static str,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileForm {
    account: Option<String>,
    namespace: String,
    owner: Option<toml::Spanned<OwnerForm>>,
    #[serde(default, rename = "service")]
    services: Vec<toml::Spanned<ServiceForm>>,
    #[serde(default, rename = "call")]
    calls: Vec<toml::Spanned<CallForm>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct OwnerForm {
    unit: Option<String>,
    user: Option<String>,
    cgroup: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ServiceForm {
    name: Option<String>,
    ports: Vec<PortForm>,
    transport: Option<String>,
    check: Option<CheckForm>,
    endpoints: Option<toml::Spanned<Vec<String>>>,
}

struct PortForm {
    port: u16,
    protocol: Option<String>,
}

impl<'de> Deserialize<'de> for PortForm {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_map(PortVisitor)
    }
}

/// Says how a port is written to who writes `ports = [80]`.
struct PortVisitor;

impl<'de> Visitor<'de> for PortVisitor {
    type Value = PortForm;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a port, written as ports = [{ port = 80, protocol = \"http\" }]")
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<PortForm, A::Error> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Fields {
            port: u16,
            protocol: Option<String>,
        }
        let Fields { port, protocol } = Fields::deserialize(MapAccessDeserializer::new(map))?;
        Ok(PortForm { port, protocol })
    }
}

impl Workload {
    /// Reads a file named `<stem>.toml`, of no host in particular.
    pub fn parse(stem: &str, text: &str) -> Result<Self, FileError> {
        Self::parse_on(&HostAddresses::default(), stem, text)
    }

    /// Reads a file named `<stem>.toml` of this host.
    pub fn parse_on(host: &HostAddresses, stem: &str, text: &str) -> Result<Self, FileError> {
        let form: FileForm = toml::from_str(text).map_err(|error| FileError {
            line: error.span().map_or(0, |span| line_of(text, &span)),
            message: error.message().trim().replace('\n', " "),
            remedy: "compare with `docs/reference.md`; unknown keys are refused",
        })?;
        let at = |span: Range<usize>| line_of(text, &span);
        let namespace: Label = form.namespace.parse().map_err(|e| name_error(0, &e))?;
        let account = form.account.as_deref().unwrap_or(stem);
        let account: Label = account.parse().map_err(|e| name_error(0, &e))?;
        let owner = form
            .owner
            .map(|form| owner(at(form.span()), form.into_inner()));
        let owner = owner.transpose()?;
        if form.services.len() > SERVICES_MAX {
            return Err(FileError {
                line: 0,
                message: format!(
                    "{} services; a workload has at most {SERVICES_MAX}",
                    form.services.len()
                ),
                remedy: "split the workload",
            });
        }
        let mut services: Vec<LocalService> = Vec::new();
        for spanned in form.services {
            let line = at(spanned.span());
            let mut form = spanned.into_inner();
            let endpoints = match form.endpoints.take() {
                None => Vec::new(),
                Some(list) => endpoints(at(list.span()), list.into_inner(), host)?,
            };
            let checked_port = form.check.as_ref().and_then(|check| check.port);
            let mut service = service(line, form, (&namespace, &account), owner.as_ref())?;
            if !endpoints.is_empty() {
                let fault = fits_endpoints(&service, checked_port);
                fault.map_err(|(message, remedy)| FileError {
                    line,
                    message,
                    remedy,
                })?;
            }
            service.endpoints = endpoints;
            let clash = services.iter().any(|s| {
                s.name == service.name || s.ports.iter().any(|p| service.port(p.number).is_some())
            });
            if clash {
                return Err(FileError {
                    line,
                    message: format!(
                        "service {} has a name or port that one above has",
                        service.name
                    ),
                    remedy: "give each service of a workload its own name and ports",
                });
            }
            if host.calls_only && !service.is_fronted() {
                return Err(FileError {
                    line,
                    message: format!(
                        "service {} is to be served by a program of this host, whose agent runs with capture.enabled = false",
                        service.name
                    ),
                    remedy: "such an agent only calls; run it with privileges, or serve from a host where it is",
                });
            }
            services.push(service);
        }
        let calls = calls(form.calls, at)?;
        let fronted = calls.is_empty()
            && !services.is_empty()
            && services.iter().all(LocalService::is_fronted);
        if owner.is_none() && !fronted {
            return Err(FileError {
                line: 0,
                message: "there is no owner, so nothing says which programs are the workload"
                    .to_owned(),
                remedy: "write [owner] with unit, user or cgroup; only a workload whose services all have endpoints \
                         has none",
            });
        }
        Ok(Self {
            account: Account {
                namespace,
                name: account,
            },
            owner,
            services,
            calls,
        })
    }
}

impl LocalService {
    pub fn port(&self, number: u16) -> Option<&Port> {
        self.ports.iter().find(|port| port.number == number)
    }

    /// Whether it is served beyond this host, by servers without an agent.
    pub fn is_fronted(&self) -> bool {
        !self.endpoints.is_empty()
    }
}

fn line_of(text: &str, span: &Range<usize>) -> usize {
    text.as_bytes()
        .iter()
        .take(span.start)
        .filter(|b| **b == b'\n')
        .count()
        + 1
}

fn name_error(line: usize, error: &NameError) -> FileError {
    FileError {
        line,
        message: error.to_string(),
        remedy: "use a DNS label",
    }
}

fn owner(line: usize, form: OwnerForm) -> Result<Owner, FileError> {
    let owner = match (form.unit, form.user, form.cgroup) {
        (Some(unit), None, None) if is_unit(&unit) => Owner::Unit(unit),
        (None, Some(user), None) if !user.is_empty() => Owner::User(user),
        (None, None, Some(path)) if is_relative(&path) => Owner::Cgroup(path),
        _ => {
            return Err(FileError {
                line,
                message: "the owner is not exactly one of unit, user or cgroup".to_owned(),
                remedy: "write e.g. unit = \"nginx.service\", user = \"www-data\" or cgroup = \"system.slice/nginx.service\"",
            });
        }
    };
    Ok(owner)
}

fn is_unit(name: &str) -> bool {
    name.len() <= 255
        && !name.contains('/')
        && (name.ends_with(".service") || name.ends_with(".scope") || name.ends_with(".slice"))
}

fn is_relative(path: &str) -> bool {
    path.len() <= 4096
        && !path.starts_with('/')
        && path.split('/').all(|part| !matches!(part, "" | "." | ".."))
}

/// Reads the servers that a service is fronted for.
fn endpoints(
    line: usize,
    list: Vec<String>,
    host: &HostAddresses,
) -> Result<Vec<SocketAddr>, FileError> {
    let fault = |message: String, remedy| FileError {
        line,
        message,
        remedy,
    };
    if list.is_empty() || ENDPOINTS_MAX < list.len() {
        return Err(fault(
            format!(
                "{} endpoints; a service has 1 to {ENDPOINTS_MAX}",
                list.len()
            ),
            "leave `endpoints` out where a program of this host serves",
        ));
    }
    let mut found: Vec<SocketAddr> = Vec::with_capacity(list.len());
    for text in list {
        let endpoint: SocketAddr = text.parse().map_err(|_| {
            fault(
                format!("endpoint `{text}` is not an address with a port"),
                "write e.g. \"10.9.0.5:5432\" or \"[fd00::5]:5432\"; names are not resolved",
            )
        })?;
        if let Some((why, remedy)) = unfit(endpoint, host) {
            return Err(fault(format!("endpoint {endpoint} {why}"), remedy));
        }
        if found.contains(&endpoint) {
            return Err(fault(
                format!("endpoint {endpoint} is listed twice"),
                "list each endpoint once",
            ));
        }
        found.push(endpoint);
    }
    Ok(found)
}

/// Why a host must not go on to `endpoint` in plaintext, and what to do.
fn unfit(endpoint: SocketAddr, host: &HostAddresses) -> Option<(&'static str, &'static str)> {
    const ANOTHER: &str = "write the server's address as this host reaches it";
    const JOINED: &str =
        "leave `endpoints` out and name the program's owner: it is served by this host itself";
    let ip = endpoint.ip();
    let (link_local, special) = match endpoint {
        SocketAddr::V4(v4) => (v4.ip().is_link_local(), v4.ip().is_broadcast()),
        SocketAddr::V6(v6) => (v6.ip().is_unicast_link_local(), v6.scope_id() != 0),
    };
    if endpoint.port() == 0 {
        Some(("has port 0", "write the port that the server listens on"))
    } else if ip.to_canonical() != ip {
        Some(("is IPv4 written as IPv6", "write it as IPv4"))
    } else if ip.is_loopback() || ip.is_unspecified() {
        Some(("is this host itself", JOINED))
    } else if link_local {
        // Cloud machines keep their credentials there, behind no password: 169.254.169.254.
        Some(("is link-local", ANOTHER))
    } else if ip.is_multicast() || special {
        Some(("is no address of one server", ANOTHER))
    } else if host.vips.is_some_and(|vips| vips.contains(ip)) {
        Some((
            "is a virtual address of the mesh",
            "call that service by its mesh name instead; a front for it would hide who calls",
        ))
    } else if host.own.contains(&ip) {
        Some(("is this host's own", JOINED))
    } else {
        None
    }
}

/// Whether a service is one that servers beyond this host can serve. `checked_port`: what its check names.
fn fits_endpoints(
    service: &LocalService,
    checked_port: Option<u16>,
) -> Result<(), (String, &'static str)> {
    if let Some(port) = checked_port {
        return Err((
            format!("the check names port {port}, and there are endpoints"),
            "leave `port` out of the check: each endpoint is asked at its own port",
        ));
    }
    let kind = service.check.as_ref().map(|check| &check.kind);
    if let Some(kind) = kind.filter(|kind| !kind.asks_an_address()) {
        return Err((
            format!(
                "the check is {}, which is about this host, and there are endpoints",
                kind.as_str()
            ),
            "ask the endpoints by tcp, http or grpc",
        ));
    }
    if service.ports.len() != 1 {
        return Err((
            format!(
                "service {} has endpoints and {} ports",
                service.name,
                service.ports.len()
            ),
            "a service with endpoints has one port; write a service for each port",
        ));
    }
    Ok(())
}

fn service(
    line: usize,
    form: ServiceForm,
    (namespace, account): (&Label, &Label),
    owner: Option<&Owner>,
) -> Result<LocalService, FileError> {
    let fault = |message: String, remedy| FileError {
        line,
        message,
        remedy,
    };
    let name: Label = match form.name {
        None => account.clone(),
        Some(text) => text.parse().map_err(|e| name_error(line, &e))?,
    };
    let mut ports = Vec::new();
    for port in form.ports {
        let text = port.protocol.as_deref().unwrap_or("auto");
        let protocol = Protocol::parse(text).ok_or_else(|| {
            fault(
                format!("protocol `{text}` is not known"),
                "use auto, tcp, http, http2 or grpc",
            )
        })?;
        ports.push(Port {
            number: port.port,
            protocol,
        });
    }
    let ports = check_ports(ports).map_err(|message| fault(message, "list each port once"))?;
    let transport = match form.transport {
        None => Transport::default(),
        Some(text) => Transport::parse(&text).ok_or_else(|| {
            fault(
                format!("transport `{text}` is not known"),
                "use permissive or strict",
            )
        })?,
    };
    let check = match form.check {
        None => None,
        Some(form) => Some(
            check(form, &ports, owner)
                .map_err(|m| fault(m, "write e.g. check = { http = \"/healthz\", port = 80 }"))?,
        ),
    };
    Ok(LocalService {
        name: ServiceName {
            namespace: namespace.clone(),
            name,
        },
        ports,
        transport,
        check,
        endpoints: Vec::new(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = r#"
namespace = "shop"
[owner]
unit = "nginx.service"
[[service]]
ports = [{ port = 80, protocol = "http" }, { port = 5432 }]
check = { http = "/healthz" }
"#;

    #[test]
    fn defaults_come_from_the_file_name() {
        let workload = Workload::parse("web", FILE).unwrap();
        assert_eq!(workload.account.to_string(), "shop/web");
        assert_eq!(workload.services[0].name.to_string(), "shop/web");
        let check = workload.services[0].check.as_ref().unwrap();
        assert_eq!((check.port, check.interval_s, check.fall), (80, 5, 3));
    }

    #[test]
    fn mistakes_have_their_line_and_remedy() {
        for (change, with, line) in [
            ("ports =", "prts =", 6),
            ("unit = \"nginx.service\"", "unit = \"nginx\"", 3),
            (
                "unit = \"nginx.service\"",
                "user = \"a\"\ncgroup = \"b\"",
                3,
            ),
            ("unit = \"nginx.service\"", "cgroup = \"../x\"", 3),
            ("protocol = \"http\"", "protocol = \"smtp\"", 5),
            ("port = 5432", "port = 80", 5),
            ("port = 5432", "port = 70000", 6),
            ("\"/healthz\"", "\"healthz\"", 5),
        ] {
            let error = read(&FILE.replace(change, with)).unwrap_err();
            assert_eq!(error.line, line, "{with}: {error:?}");
            assert!(!error.remedy.is_empty());
        }
    }

    #[test]
    fn a_bare_port_is_told_its_form() {
        let list = "[{ port = 80, protocol = \"http\" }, { port = 5432 }]";
        for bare in ["[80]", "80", "[\"80\"]"] {
            let error = read(&FILE.replace(list, bare)).unwrap_err();
            assert_eq!(error.line, 6, "{error:?}");
            if bare.starts_with('[') {
                assert!(error.message.contains("ports = [{ port = 80"), "{error:?}");
            }
        }
    }

    const FRONT: &str = r#"
namespace = "shop"
[[service]]
ports = [{ port = 5432, protocol = "tcp" }]
endpoints = ["10.9.0.5:5432", "[fd00::5]:6432"]
"#;

    fn read(text: &str) -> Result<Workload, FileError> {
        let host = HostAddresses {
            own: vec![
                IpAddr::from([10, 0, 0, 7]),
                IpAddr::from([0xfd00, 0, 0, 0, 0, 0, 0, 7]),
            ],
            vips: Some(VipRanges::default()),
            ..HostAddresses::default()
        };
        Workload::parse_on(&host, "db", text)
    }

    #[test]
    fn a_workload_that_only_fronts_needs_no_owner() {
        let workload = read(FRONT).unwrap();
        assert_eq!(workload.owner, None);
        let endpoints: Vec<String> = workload.services[0]
            .endpoints
            .iter()
            .map(ToString::to_string)
            .collect();
        assert_eq!(endpoints, ["10.9.0.5:5432", "[fd00::5]:6432"]);
        let owned = FRONT.replace("[[service]]", "owner = { user = \"1\" }\n[[service]]");
        assert!(read(&owned).unwrap().owner.is_some(), "it may call, too");
        let mixed = format!("{FRONT}[[service]]\nname = \"own\"\nports = [{{ port = 80 }}]\n");
        assert!(read(&mixed).unwrap_err().message.contains("no owner"));
        let none = read("namespace = \"shop\"\n").unwrap_err();
        assert!(none.message.contains("no owner"), "{none:?}");
    }

    #[test]
    fn a_front_goes_to_servers_beyond_the_host_only() {
        for (endpoint, word) in [
            ("127.0.0.1:5432", "this host itself"),
            ("127.8.0.1:5432", "this host itself"),
            ("0.0.0.0:5432", "this host itself"),
            ("[::1]:5432", "this host itself"),
            ("[::]:5432", "this host itself"),
            ("169.254.169.254:80", "link-local"),
            ("[fe80::1]:5432", "link-local"),
            ("[fe80::1%2]:5432", "link-local"),
            ("[fd00::1%2]:5432", "no address of one server"),
            ("[::ffff:10.9.0.5]:5432", "IPv4 written as IPv6"),
            ("[::ffff:127.0.0.1]:5432", "IPv4 written as IPv6"),
            ("224.0.0.1:5432", "no address of one server"),
            ("255.255.255.255:5432", "no address of one server"),
            ("[ff02::1]:5432", "no address of one server"),
            ("252.64.0.9:5432", "virtual address"),
            ("[fd6d:6573:6800::9]:5432", "virtual address"),
            ("10.0.0.7:7441", "this host's own"),
            ("[fd00::7]:5432", "this host's own"),
            ("10.9.0.5:0", "port 0"),
            ("10.9.0.5", "not an address with a port"),
            ("db.example.com:5432", "not an address with a port"),
            ("[fd00::5]:6432", "twice"),
        ] {
            let error = read(&FRONT.replace("10.9.0.5:5432", endpoint)).unwrap_err();
            assert!(error.message.contains(word), "{endpoint}: {error:?}");
            assert_eq!(error.line, 5, "{endpoint}");
            assert!(!error.remedy.is_empty());
        }
    }

    #[test]
    fn a_front_is_bounded_and_has_one_port() {
        let many: Vec<String> = (0..=ENDPOINTS_MAX)
            .map(|n| format!("\"10.9.1.{n}:5432\""))
            .collect();
        let list = "\"10.9.0.5:5432\", \"[fd00::5]:6432\"";
        assert!(read(&FRONT.replace(list, &many[1..].join(", "))).is_ok());
        for bad in [many.join(", "), String::new()] {
            let error = read(&FRONT.replace(list, &bad)).unwrap_err();
            assert!(error.message.contains("1 to 16"), "{error:?}");
        }
        let two = FRONT.replace("}]", "}, { port = 80 }]");
        assert!(read(&two).unwrap_err().remedy.contains("one port"));
        let checked = |check: &str| read(&format!("{FRONT}check = {{ {check} }}\n"));
        assert!(checked("tcp = true").is_ok());
        let error = checked("tcp = true, port = 5432").unwrap_err();
        assert!(error.remedy.contains("its own port"), "{error:?}");
    }
}
