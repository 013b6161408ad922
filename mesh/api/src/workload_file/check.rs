//! `check = { … }` of a service: how its health is asked.

use mesh_core::service::Port;
use serde::Deserialize;

use super::Owner;

/// Most words of a command, and bytes of all.
const COMMAND_WORDS_MAX: usize = 64;
const COMMAND_BYTES_MAX: usize = 4096;
/// Longest name of a gRPC service.
const GRPC_NAME_MAX: usize = 256;

/// How a service's health is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Check {
    pub kind: CheckKind,
    /// What is asked, unless it is a command or a unit. Calls to this port that fail count, too.
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
    /// `grpc.health.v1.Health/Check` of this service answers SERVING; empty: of the whole server.
    Grpc(String),
    /// This command exits with 0, run as the workload's user. Its program is an absolute path; no shell reads it.
    Exec(Vec<String>, RunAs),
    /// This systemd unit is active.
    Systemd(String),
}

/// Whose rights a command has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RunAs {
    /// A user, by name or number.
    User(String),
    /// The user and the groups of a service unit.
    Unit(String),
}

impl CheckKind {
    /// As in metrics and files.
    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Http(_) => "http",
            Self::Grpc(_) => "grpc",
            Self::Exec(..) => "exec",
            Self::Systemd(_) => "systemd",
        }
    }

    /// Whether it is about a server at an address, so that servers beyond this host can be asked.
    pub const fn asks_an_address(&self) -> bool {
        matches!(self, Self::Tcp | Self::Http(_) | Self::Grpc(_))
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct CheckForm {
    http: Option<String>,
    tcp: Option<bool>,
    grpc: Option<Named>,
    exec: Option<Vec<String>>,
    systemd: Option<Named>,
    pub(super) port: Option<u16>,
    interval_s: Option<u32>,
    timeout_s: Option<u32>,
    rise: Option<u32>,
    fall: Option<u32>,
}

/// `true`, or the name of something in particular.
#[derive(Deserialize)]
#[serde(untagged, expecting = "it is `true` or a name in quotes")]
enum Named {
    Plain(bool),
    Name(String),
}

/// Reads the check of a service with these ports, of a workload with this owner.
pub(super) fn check(
    form: CheckForm,
    ports: &[Port],
    owner: Option<&Owner>,
) -> Result<Check, String> {
    let first = ports.first().map(|port| port.number);
    let port = form.port.or(first).unwrap_or_default();
    if port == 0 {
        return Err("port 0 can not be checked".to_owned());
    }
    let within = |name: &str, value: Option<u32>, default: u32, max: u32| {
        let value = value.unwrap_or(default);
        if (1..=max).contains(&value) {
            Ok(value)
        } else {
            Err(format!("{name} = {value} is not within 1 to {max}"))
        }
    };
    Ok(Check {
        port,
        interval_s: within("interval_s", form.interval_s, 5, 3600)?,
        timeout_s: within("timeout_s", form.timeout_s, 2, 60)?,
        rise: within("rise", form.rise, 1, 10)?,
        fall: within("fall", form.fall, 3, 10)?,
        kind: kind(form, owner)?,
    })
}

fn kind(form: CheckForm, owner: Option<&Owner>) -> Result<CheckKind, String> {
    match (form.http, form.tcp, form.grpc, form.exec, form.systemd) {
        (Some(path), None, None, None, None) => http(path),
        (None, Some(true), None, None, None) => Ok(CheckKind::Tcp),
        (None, None, Some(Named::Plain(true)), None, None) => Ok(CheckKind::Grpc(String::new())),
        (None, None, Some(Named::Name(name)), None, None) => grpc(name),
        (None, None, None, Some(command), None) => exec(command, owner),
        (None, None, None, None, Some(Named::Plain(true))) => own_unit(owner),
        (None, None, None, None, Some(Named::Name(unit))) => systemd(unit),
        _ => Err(
            "a check has exactly one of http = \"/path\", tcp = true, grpc = true (or a service's name), \
             exec = [\"/program\", …] or systemd = true (or a unit's name)"
                .to_owned(),
        ),
    }
}

fn http(path: String) -> Result<CheckKind, String> {
    let good = path.starts_with('/') && path.bytes().all(|b| b.is_ascii_graphic());
    good.then_some(CheckKind::Http(path))
        .ok_or_else(|| "http is no path: it begins with `/` and has no spaces".to_owned())
}

fn grpc(name: String) -> Result<CheckKind, String> {
    let good =
        (1..=GRPC_NAME_MAX).contains(&name.len()) && name.bytes().all(|b| b.is_ascii_graphic());
    good.then_some(CheckKind::Grpc(name)).ok_or_else(|| {
        format!("grpc is no name of a gRPC service: 1 to {GRPC_NAME_MAX} characters without spaces")
    })
}

fn exec(command: Vec<String>, owner: Option<&Owner>) -> Result<CheckKind, String> {
    let run_as = match owner {
        Some(Owner::User(user)) => RunAs::User(user.clone()),
        Some(Owner::Unit(unit)) if unit.ends_with(".service") => RunAs::Unit(unit.clone()),
        _ => {
            return Err(
                "exec runs as the user of the workload, and its owner says none: it is neither a user nor a service unit"
                    .to_owned(),
            );
        }
    };
    let program = command.first().map_or("", String::as_str);
    if !program.starts_with('/') {
        return Err(format!(
            "exec begins with `{program}`: the program is an absolute path, and no shell looks for it"
        ));
    }
    let bytes: usize = command.iter().map(String::len).sum();
    if COMMAND_WORDS_MAX < command.len() || COMMAND_BYTES_MAX < bytes {
        return Err(format!(
            "exec has {} words and {bytes} bytes; it may have {COMMAND_WORDS_MAX} and {COMMAND_BYTES_MAX}: write a script",
            command.len()
        ));
    }
    if command.iter().any(|word| word.contains('\0')) {
        return Err("exec has a NUL byte".to_owned());
    }
    Ok(CheckKind::Exec(command, run_as))
}

fn own_unit(owner: Option<&Owner>) -> Result<CheckKind, String> {
    match owner {
        Some(Owner::Unit(unit)) => systemd(unit.clone()),
        _ => Err(
            "systemd = true is the unit that owns the workload, and no unit does: name one, systemd = \"nginx.service\""
                .to_owned(),
        ),
    }
}

fn systemd(unit: String) -> Result<CheckKind, String> {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || b":-_.\\@".contains(&b);
    let good = unit.len() <= 255
        && !unit.starts_with(['-', '.'])
        && unit.bytes().all(allowed)
        && unit
            .rsplit_once('.')
            .is_some_and(|(name, kind)| !name.is_empty() && !kind.is_empty());
    match good {
        true => Ok(CheckKind::Systemd(unit)),
        false => Err(format!(
            "systemd = `{unit}` is no unit: write it with its type, e.g. \"nginx.service\""
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Workload;
    use super::*;

    /// The kind, or what is said.
    fn read(owner: &str, check: &str) -> Result<CheckKind, String> {
        let text = format!(
            "namespace = \"shop\"\nowner = {{ {owner} }}\n[[service]]\nports = [{{ port = 80 }}]\ncheck = {{ {check} }}\n"
        );
        let read = Workload::parse("web", &text);
        let mut workload = read.map_err(|error| {
            assert!(!error.remedy.is_empty());
            error.message
        })?;
        Ok(workload.services.remove(0).check.unwrap().kind)
    }

    const UNIT: &str = "unit = \"web.service\"";

    #[test]
    fn every_kind_is_read() {
        let text = |text: &str| text.to_owned();
        for (check, kind) in [
            ("tcp = true", CheckKind::Tcp),
            ("http = \"/x?y=1\"", CheckKind::Http(text("/x?y=1"))),
            ("grpc = true", CheckKind::Grpc(String::new())),
            ("grpc = \"shop.Cart\"", CheckKind::Grpc(text("shop.Cart"))),
            (
                "exec = [\"/bin/true\", \"a b\"]",
                CheckKind::Exec(
                    vec![text("/bin/true"), text("a b")],
                    RunAs::Unit(text("web.service")),
                ),
            ),
            ("systemd = true", CheckKind::Systemd(text("web.service"))),
            (
                "systemd = \"pg@15.service\"",
                CheckKind::Systemd(text("pg@15.service")),
            ),
        ] {
            assert_eq!(read(UNIT, check), Ok(kind), "{check}");
        }
        let user = read("user = \"web\"", "exec = [\"/bin/true\"]");
        let expected = CheckKind::Exec(vec![text("/bin/true")], RunAs::User(text("web")));
        assert_eq!(user, Ok(expected));
    }

    #[test]
    fn mistakes_are_told() {
        let long = format!(
            "exec = [\"/bin/true\", \"{}\"]",
            "x".repeat(COMMAND_BYTES_MAX)
        );
        let many = format!(
            "exec = [\"/bin/true\"{}]",
            ", \"x\"".repeat(COMMAND_WORDS_MAX)
        );
        for (owner, check, word) in [
            (UNIT, "interval_s = 1", "exactly one of"),
            (UNIT, "tcp = true, grpc = true", "exactly one of"),
            (UNIT, "tcp = false", "exactly one of"),
            (UNIT, "grpc = false", "exactly one of"),
            (UNIT, "systemd = false", "exactly one of"),
            (UNIT, "grpc = 5", "`true` or a name"),
            (UNIT, "grpc = \"\"", "no name of a gRPC service"),
            (UNIT, "grpc = \"a b\"", "no name of a gRPC service"),
            (UNIT, "http = \"x\"", "no path"),
            (UNIT, "exec = \"/bin/true\"", "sequence"),
            (UNIT, "exec = []", "absolute path"),
            (UNIT, "exec = [\"curl\"]", "absolute path"),
            (UNIT, "exec = [\"/bin/true\", \"\\u0000\"]", "NUL"),
            (UNIT, &long, "write a script"),
            (UNIT, &many, "write a script"),
            (
                "cgroup = \"x\"",
                "exec = [\"/bin/true\"]",
                "its owner says none",
            ),
            (
                "unit = \"x.scope\"",
                "exec = [\"/bin/true\"]",
                "its owner says none",
            ),
            ("user = \"web\"", "systemd = true", "name one"),
            (UNIT, "systemd = \"nginx\"", "with its type"),
            (UNIT, "systemd = \"--help.service\"", "with its type"),
            (UNIT, "systemd = \"a b.service\"", "with its type"),
            (UNIT, "tcp = true, fall = 11", "within 1 to 10"),
            (UNIT, "tcp = true, port = 0", "port 0"),
        ] {
            let said = read(owner, check).unwrap_err();
            assert!(said.contains(word), "{check}: {said}");
        }
    }

    #[test]
    fn what_asks_this_host_says_nothing_of_servers_beyond_it() {
        let file = |check: &str| {
            format!(
                "namespace = \"shop\"\nowner = {{ {UNIT} }}\n[[service]]\nports = [{{ port = 80 }}]\n\
                 endpoints = [\"10.9.0.5:80\"]\ncheck = {{ {check} }}\n"
            )
        };
        for good in ["tcp = true", "http = \"/\"", "grpc = true"] {
            Workload::parse("web", &file(good)).unwrap();
        }
        for bad in ["exec = [\"/bin/true\"]", "systemd = true"] {
            let error = Workload::parse("web", &file(bad)).unwrap_err();
            assert!(error.message.contains("endpoints"), "{error:?}");
        }
    }
}
