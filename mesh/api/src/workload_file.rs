//! `services.d/*.toml`: one workload a file, as the host's administrator writes it.
//!
//! ```toml
//! account = "web"             # default: the file's name
//! namespace = "shop"
//! [owner]                     # exactly one
//! unit = "nginx.service"      # or user = "www-data", or cgroup = "system.slice/nginx.service"
//! [[service]]
//! name = "web"                # default: the account
//! ports = [{ port = 80, protocol = "http" }]
//! transport = "permissive"    # value at creation only
//! check = { http = "/healthz", port = 80, interval_s = 5 }   # or { tcp = true }
//! ```

use std::ops::Range;

use mesh_core::names::{Account, Label, NameError, ServiceName};
use mesh_core::service::{Port, Protocol, Transport};
use serde::Deserialize;

use crate::resource::check_ports;

/// Largest file we read, in bytes.
pub const FILE_MAX: u64 = 64 * 1024;
/// Most services of one workload.
pub const SERVICES_MAX: usize = 64;

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
    pub owner: Owner,
    pub services: Vec<LocalService>,
}

/// A service that the workload serves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalService {
    pub name: ServiceName,
    pub ports: Vec<Port>,
    /// What the service gets when this host is the first to register it.
    pub transport: Transport,
    pub check: Option<Check>,
}

/// How a service's health is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Check {
    pub kind: CheckKind,
    pub port: u16,
    /// Seconds between checks, 1 to 3600.
    pub interval_s: u32,
    /// Seconds until a check counts as failed, 1 to 60.
    pub timeout_s: u32,
    /// Results in a row that change the verdict, 1 to 10.
    pub rise: u32,
    pub fall: u32,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CheckKind {
    /// The port accepts a connection.
    Tcp,
    /// `GET` of this path answers 2xx or 3xx.
    Http(String),
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
    owner: toml::Spanned<OwnerForm>,
    #[serde(default, rename = "service")]
    services: Vec<toml::Spanned<ServiceForm>>,
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
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct PortForm {
    port: u16,
    protocol: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct CheckForm {
    http: Option<String>,
    tcp: Option<bool>,
    port: Option<u16>,
    interval_s: Option<u32>,
    timeout_s: Option<u32>,
    rise: Option<u32>,
    fall: Option<u32>,
}

impl Workload {
    /// Reads a file named `<stem>.toml`.
    pub fn parse(stem: &str, text: &str) -> Result<Self, FileError> {
        let form: FileForm = toml::from_str(text).map_err(|error| FileError {
            line: error.span().map_or(0, |span| line_of(text, &span)),
            message: error.message().trim().replace('\n', " "),
            remedy: "compare with `docs/reference.md`; unknown keys are refused",
        })?;
        let at = |span: Range<usize>| line_of(text, &span);
        let namespace: Label = form.namespace.parse().map_err(|e| name_error(0, &e))?;
        let account = form.account.as_deref().unwrap_or(stem);
        let account: Label = account.parse().map_err(|e| name_error(0, &e))?;
        let owner = owner(at(form.owner.span()), form.owner.into_inner())?;
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
            let service = service(line, spanned.into_inner(), &namespace, &account)?;
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
            services.push(service);
        }
        Ok(Self {
            account: Account {
                namespace,
                name: account,
            },
            owner,
            services,
        })
    }
}

impl LocalService {
    pub fn port(&self, number: u16) -> Option<&Port> {
        self.ports.iter().find(|port| port.number == number)
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

fn service(
    line: usize,
    form: ServiceForm,
    namespace: &Label,
    account: &Label,
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
            check(form, &ports)
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
    })
}

fn check(form: CheckForm, ports: &[Port]) -> Result<Check, String> {
    let kind = match (form.http, form.tcp) {
        (Some(path), None)
            if path.starts_with('/') && path.bytes().all(|b| b.is_ascii_graphic()) =>
        {
            CheckKind::Http(path)
        }
        (None, Some(true)) => CheckKind::Tcp,
        _ => return Err("a check has exactly one of http = \"/path\" or tcp = true".to_owned()),
    };
    let port = form
        .port
        .or_else(|| ports.first().map(|p| p.number))
        .unwrap_or_default();
    let within = |name: &str, value: Option<u32>, default: u32, max: u32| {
        let value = value.unwrap_or(default);
        if (1..=max).contains(&value) {
            Ok(value)
        } else {
            Err(format!("{name} = {value} is not within 1 to {max}"))
        }
    };
    if port == 0 {
        return Err("port 0 can not be checked".to_owned());
    }
    Ok(Check {
        kind,
        port,
        interval_s: within("interval_s", form.interval_s, 5, 3600)?,
        timeout_s: within("timeout_s", form.timeout_s, 2, 60)?,
        rise: within("rise", form.rise, 1, 10)?,
        fall: within("fall", form.fall, 3, 10)?,
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
            let error = Workload::parse("web", &FILE.replace(change, with)).unwrap_err();
            assert_eq!(error.line, line, "{with}: {error:?}");
            assert!(!error.remedy.is_empty());
        }
    }
}
