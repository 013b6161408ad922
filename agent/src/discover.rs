//! `mesh-agent discover`: files for `services.d` proposed from what listens on this host and from the units that it
//! belongs to. It proposes; an operator, or `--write`, decides.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::net::SocketAddr;
use std::path::Path;

use anyhow::Context as _;
use mesh_api::workload_file::{HostAddresses, Owner};
use mesh_core::names::Label;

use crate::capture::cgroup::{CgroupTree, OwnerPath};
use crate::capture::sockdiag::SockDiag;
use crate::config::Config;
use crate::units;
use crate::workloads::Loader;

/// Parts of the system that nobody calls by a name of the mesh.
const SYSTEM: [&str; 2] = ["systemd-", "rpcbind"];

/// What was found.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Discovered {
    pub(crate) proposals: Vec<Proposal>,
    /// What listens and is not proposed, and why.
    pub(crate) left_out: Vec<String>,
}

/// A file for `services.d`.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Proposal {
    pub(crate) file: String,
    pub(crate) text: String,
}

/// A socket that listens, and the unit whose it is.
#[derive(Clone, Debug)]
struct Found {
    address: SocketAddr,
    /// Its cgroup, where it is in no unit's.
    unit: Result<String, String>,
}

/// Looks at this host. Nothing is written.
pub(crate) fn discover(config: &Config, namespace: &Label) -> anyhow::Result<Discovered> {
    let tree = CgroupTree::find().context("units are told apart by their cgroups")?;
    let cgroups = tree.by_id()?;
    let listeners = SockDiag::open()
        .and_then(|mut diag| diag.listeners(0))
        .context("the kernel can not be asked who listens")?;
    let found: Vec<Found> = listeners
        .into_iter()
        .map(|listener| {
            let path = listener.cgroup.and_then(|id| cgroups.get(&id));
            Found {
                address: listener.address,
                unit: path.map_or_else(
                    || Err(format!("a program of user {}", listener.uid)),
                    |path| unit_of(path),
                ),
            }
        })
        .collect();
    let mut loader = Loader::new(config.services_dir.clone(), HostAddresses::default());
    let declared = loader.load().workloads;
    let declared: BTreeSet<String> = declared
        .iter()
        .filter_map(|workload| match &workload.owner {
            Some(Owner::Unit(name)) => match OwnerPath::unit(name) {
                Ok(OwnerPath::Unit(name)) => Some(name),
                _ => None,
            },
            _ => None,
        })
        .collect();
    let mut discovered = propose(&found, &declared, &config.capture.keep_open, namespace);
    let (there, new) = discovered
        .proposals
        .into_iter()
        .partition(|proposal| config.services_dir.join(&proposal.file).exists());
    discovered.proposals = new;
    let there: Vec<Proposal> = there;
    discovered.left_out.extend(
        there
            .into_iter()
            .map(|proposal| format!("{}: there is such a file already", proposal.file)),
    );
    Ok(discovered)
}

/// The deepest service in a cgroup's path; else the path.
fn unit_of(path: &Path) -> Result<String, String> {
    let parts = path.iter().map(|part| part.to_string_lossy());
    let unit = parts.rev().find(|part| part.ends_with(".service"));
    match unit {
        // Of a person who is logged in.
        Some(unit) if !path.starts_with("user.slice") => Ok(unit.into_owned()),
        _ => Err(format!("the cgroup {}", path.display())),
    }
}

/// Decides what of it is proposed.
fn propose(
    found: &[Found],
    declared: &BTreeSet<String>,
    keep_open: &[u16],
    namespace: &Label,
) -> Discovered {
    let mut discovered = Discovered::default();
    let mut ports: BTreeMap<&str, BTreeSet<u16>> = BTreeMap::new();
    let mut local: BTreeSet<(&str, u16)> = BTreeSet::new();
    let mut left_out: BTreeSet<String> = BTreeSet::new();
    for one in found {
        let port = one.address.port();
        match &one.unit {
            Ok(unit) if is_ours(unit) => {}
            Ok(unit) if SYSTEM.iter().any(|name| unit.starts_with(name)) => {}
            Ok(unit) if declared.contains(unit) => {
                left_out.insert(format!("{unit}: a file of services.d names it already"));
            }
            Ok(unit) if keep_open.contains(&port) => {
                left_out.insert(format!("{unit}: port {port} is in capture.keep_open"));
            }
            Ok(unit) if one.address.ip().to_canonical().is_loopback() => {
                local.insert((unit, port));
            }
            Ok(unit) => {
                ports.entry(unit).or_default().insert(port);
            }
            Err(whose) => {
                left_out.insert(format!(
                    "port {port}: {whose}, which is no unit; name it by `cgroup` or `user`"
                ));
            }
        }
    }
    for (unit, port) in local {
        if !ports.get(unit).is_some_and(|ports| ports.contains(&port)) {
            left_out.insert(format!(
                "{unit}: port {port} is open to this host only, and would be to the mesh"
            ));
        }
    }
    let mut accounts: BTreeSet<Label> = BTreeSet::new();
    for (unit, ports) in ports {
        match account(unit) {
            Some(account) if accounts.insert(account.clone()) => {
                discovered.proposals.push(Proposal {
                    file: format!("{account}.toml"),
                    text: text(unit, &ports, namespace),
                })
            }
            _ => {
                left_out.insert(format!(
                    "{unit}: no account can be named after it; write a file of your own"
                ));
            }
        }
    }
    discovered.left_out.extend(left_out);
    discovered
}

fn is_ours(unit: &str) -> bool {
    [units::AGENT, "mesh-control.service"].contains(&unit)
}

/// `postgresql@15-main.service`: `postgresql-15-main`.
fn account(unit: &str) -> Option<Label> {
    let name = unit.strip_suffix(".service").unwrap_or(unit);
    let name: String = name
        .to_ascii_lowercase()
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() { c } else { '-' })
        .collect();
    name.trim_matches('-').parse().ok()
}

fn text(unit: &str, ports: &BTreeSet<u16>, namespace: &Label) -> String {
    let mut list = String::new();
    for port in ports {
        let comma = if list.is_empty() { "" } else { ", " };
        // Writing to a string does not fail.
        let _ = write!(list, "{comma}{{ port = {port}, protocol = \"auto\" }}");
    }
    // `\` is part of names that systemd escaped.
    let quoted = unit.replace('\\', "\\\\");
    format!(
        "# Proposed by `mesh-agent discover`: {unit} listens on these ports.\n\
         namespace = \"{namespace}\"\n\
         [owner]\n\
         unit = \"{quoted}\"\n\
         [[service]]\n\
         ports = [{list}]\n\
         transport = \"permissive\"\n\
         check = {{ tcp = true }}\n"
    )
}

/// Puts the files in place, whole, and makes the directory.
pub(crate) fn write(config: &Config, proposals: &[Proposal]) -> anyhow::Result<()> {
    std::fs::create_dir_all(&config.services_dir)
        .with_context(|| format!("cannot make {}", config.services_dir.display()))?;
    for proposal in proposals {
        let path = config.services_dir.join(&proposal.file);
        mesh_runtime::files::write_atomic(&path, proposal.text.as_bytes())?;
    }
    Ok(())
}

impl Discovered {
    /// For people: the files, or which were written, and what was left out.
    pub(crate) fn render(&self, config: &Config, written: bool) -> String {
        let mut page = String::new();
        for proposal in &self.proposals {
            let path = config.services_dir.join(&proposal.file);
            let path = path.display();
            let _ = match written {
                true => writeln!(page, "wrote {path}"),
                false => writeln!(page, "{path}:\n{}", proposal.text),
            };
        }
        if self.proposals.is_empty() {
            page.push_str("nothing is proposed\n");
        }
        for why in &self.left_out {
            let _ = writeln!(page, "left out: {why}");
        }
        page
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_api::workload_file::Workload;

    fn found(address: &str, unit: &str) -> Found {
        Found {
            address: address.parse().unwrap(),
            unit: match unit.ends_with(".service") {
                true => Ok(unit.to_owned()),
                false => Err(unit.to_owned()),
            },
        }
    }

    #[test]
    fn units_that_listen_are_proposed_and_the_rest_is_named() {
        let all = [
            found("0.0.0.0:80", "nginx.service"),
            found("[::]:80", "nginx.service"),
            found("[::]:443", "nginx.service"),
            found("127.0.0.1:8081", "nginx.service"),
            found("10.0.0.1:5432", "postgresql@15-main.service"),
            found("0.0.0.0:22", "ssh.service"),
            found("[::ffff:127.0.0.1]:6379", "redis-server.service"),
            found("127.0.0.53:53", "systemd-resolved.service"),
            found("0.0.0.0:7441", "mesh-agent.service"),
            found("0.0.0.0:9000", "the cgroup user.slice/x"),
            found("0.0.0.0:3000", "web.service"),
        ];
        let declared = BTreeSet::from(["web.service".to_owned()]);
        let shop: Label = "shop".parse().unwrap();
        let discovered = propose(&all, &declared, &[22], &shop);
        let files: Vec<&str> = discovered
            .proposals
            .iter()
            .map(|p| p.file.as_str())
            .collect();
        assert_eq!(files, ["nginx.toml", "postgresql-15-main.toml"]);
        let nginx = &discovered.proposals[0].text;
        assert!(
            nginx.contains("port = 80") && nginx.contains("port = 443"),
            "{nginx}"
        );
        assert!(!nginx.contains("8081"), "{nginx}");
        // What is proposed is what the agent reads.
        let read = Workload::parse("nginx", nginx).unwrap();
        assert_eq!(read.owner, Some(Owner::Unit("nginx.service".to_owned())));
        assert_eq!(read.services[0].ports.len(), 2);
        for (whose, why) in [
            ("nginx.service: port 8081", "this host only"),
            ("redis-server.service", "this host only"),
            ("ssh.service", "keep_open"),
            ("port 9000", "no unit"),
            ("web.service", "already"),
        ] {
            let left = discovered.left_out.iter().find(|l| l.starts_with(whose));
            assert!(
                left.is_some_and(|l| l.contains(why)),
                "{whose}: {discovered:?}"
            );
        }
        assert_eq!(discovered.left_out.len(), 5);
    }

    #[test]
    fn the_deepest_service_of_the_system_is_the_unit() {
        let unit = |path: &str| unit_of(Path::new(path));
        assert_eq!(unit("system.slice/a.service/b"), Ok("a.service".to_owned()));
        assert!(unit("user.slice/user-1.slice/user@1.service/app.slice/x.service").is_err());
        assert!(unit("init.scope").is_err());
    }
}
