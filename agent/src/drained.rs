//! Services that the operator has taken out of the mesh on this host, until they are put back: they are not listed, whatever
//! their checks say, and what is open goes on. `mesh-agent drain` and `undrain`. Beside them those whose unit stops, until it
//! runs again.

use std::collections::{BTreeMap, BTreeSet};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use mesh_core::names::ServiceName;
use mesh_runtime::files;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::config::Config;
use crate::{status, units};

/// Of the state directory: it holds over a restart and a reboot.
pub(crate) const FILE: &str = "drained.json";
/// Every service that a host can have.
const FILE_MAX: u64 = 4 * 1024 * 1024;
/// Between two looks at what is open.
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// How long nothing must be open until a service counts as empty: callers hear from control within a second.
const QUIET: Duration = Duration::from_secs(2);

/// Of the runtime directory: services whose unit stops. It ends with the agent, so that none can stay out for ever because
/// nobody was there to put it back.
pub(crate) const STOPPING: &str = "stopping.json";

/// How long the stop or start of a unit waits for an agent that is there and does not answer.
const AGENT_MAX: Duration = Duration::from_secs(10);

/// What is drained.
pub(crate) type Set = BTreeSet<ServiceName>;

/// Who took a service out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum By {
    Operator,
    /// Its unit stops.
    Unit,
}

/// The owner of the lists.
#[derive(Debug)]
pub(crate) struct Drained {
    file: PathBuf,
    stopping_file: PathBuf,
    lists: Mutex<Lists>,
    set: watch::Sender<Arc<Set>>,
}

#[derive(Debug, Default)]
struct Lists {
    operator: Set,
    stopping: Set,
}

impl Lists {
    fn all(&self) -> Arc<Set> {
        Arc::new(self.operator.union(&self.stopping).cloned().collect())
    }
}

/// What the file of services that stop has.
#[derive(Debug, Serialize, Deserialize)]
struct Stopping {
    /// Process number of the holder: a worker of another comes after a stop.
    holder: u32,
    services: Vec<String>,
}

impl Drained {
    /// As it was kept. A list that can not be read is as none.
    pub(crate) fn load(state_dir: &Path, runtime_dir: &Path) -> Self {
        let file = state_dir.join(FILE);
        let stopping_file = runtime_dir.join(STOPPING);
        let operator = read(&file).unwrap_or_else(|error| {
            log::warn!("{error:#}; no service is drained");
            Set::new()
        });
        let lists = Lists {
            operator,
            // The first worker of a holder finds none, or one of before.
            stopping: read_stopping(&stopping_file).unwrap_or_default(),
        };
        Self {
            set: watch::Sender::new(lists.all()),
            lists: Mutex::new(lists),
            stopping_file,
            file,
        }
    }

    pub(crate) fn watch(&self) -> watch::Receiver<Arc<Set>> {
        self.set.subscribe()
    }

    /// Takes services out, or puts them back; what the other took out stays out. Nothing changes where it can not be kept.
    pub(crate) fn change(&self, services: &Set, out: bool, by: By) -> anyhow::Result<()> {
        let mut lists = self.lists.lock().unwrap_or_else(PoisonError::into_inner);
        let list = match by {
            By::Operator => &mut lists.operator,
            By::Unit => &mut lists.stopping,
        };
        let mut set = list.clone();
        match out {
            true => set.extend(services.iter().cloned()),
            false => set.retain(|service| !services.contains(service)),
        }
        if set == *list {
            return Ok(());
        }
        let names = set.iter().map(ToString::to_string).collect();
        match by {
            By::Operator => {
                files::write_private(&self.file, &serde_json::to_vec::<Vec<String>>(&names)?)?
            }
            By::Unit => {
                let stopping = Stopping {
                    holder: std::os::unix::process::parent_id(),
                    services: names,
                };
                files::write_private(&self.stopping_file, &serde_json::to_vec(&stopping)?)?;
            }
        }
        *list = set;
        let names: Vec<String> = services.iter().map(ToString::to_string).collect();
        let services = names.join(", ");
        let who = match by {
            By::Operator => "the operator",
            By::Unit => "their unit, which stops",
        };
        match out {
            true => log::info!(services = services.as_str(); "drained by {who}"),
            false => log::info!(services = services.as_str(); "no more drained by {who}"),
        }
        self.set.send_replace(lists.all());
        Ok(())
    }
}

fn read(file: &Path) -> anyhow::Result<Set> {
    let name = || format!("cannot read {}", file.display());
    let text = match files::read_bounded(file, FILE_MAX) {
        Err(error) if error.cause.kind() == ErrorKind::NotFound => return Ok(Set::new()),
        read => read.with_context(name)?,
    };
    let names: Vec<String> = serde_json::from_slice(&text).with_context(name)?;
    parse(&names).with_context(name)
}

fn read_stopping(file: &Path) -> anyhow::Result<Set> {
    let stopping: Stopping = serde_json::from_slice(&files::read_bounded(file, FILE_MAX)?)?;
    match stopping.holder == std::os::unix::process::parent_id() {
        true => parse(&stopping.services),
        false => Ok(Set::new()),
    }
}

fn parse(names: &[String]) -> anyhow::Result<Set> {
    let names = names.iter().map(|name| ServiceName::parse(name));
    Ok(names.collect::<Result<_, _>>()?)
}

/// Which services a command is about.
#[derive(Debug, clap::Args)]
pub(crate) struct Meant {
    /// NAMESPACE/SERVICE [default: all of this host]
    service: Option<String>,
    /// Instead, what the programs of this unit serve, until it runs again: as its stop and its start say
    #[arg(long, value_name = "UNIT", conflicts_with = "service")]
    unit: Option<String>,
}

impl Meant {
    pub(crate) fn unit(&self) -> Option<&str> {
        self.unit.as_deref()
    }

    pub(crate) fn what(&self) -> What<'_> {
        let service = self.service.as_deref();
        service.map_or(What::All, What::Service)
    }
}

/// The same, once it is known that no unit asks, or that one does.
#[derive(Clone, Copy, Debug)]
pub(crate) enum What<'a> {
    All,
    Service(&'a str),
    /// What the programs of a unit serve, for its stop and its start.
    Unit(&'a str),
}

impl What<'_> {
    fn query(self) -> String {
        match self {
            Self::All => String::new(),
            Self::Service(service) => format!("?service={service}"),
            Self::Unit(unit) => format!("?unit={unit}"),
        }
    }
}

/// Calls of other hosts that are open, by service. What the admin socket answers at `/drained`.
pub(crate) type OpenCalls = BTreeMap<String, i64>;

/// Takes services out of the mesh or back; waits for the end of their calls for so long. `None`: no agent runs.
pub(crate) fn ask(
    config: &Config,
    what: What<'_>,
    wait: Option<Duration>,
) -> anyhow::Result<Option<String>> {
    let socket = config.admin_socket();
    let word = if wait.is_some() { "drain" } else { "undrain" };
    let path = format!("/{word}{}", what.query());
    let Some(services) = status::request::<Vec<String>>(&socket, "PUT", &path)? else {
        return Ok(None);
    };
    if services.is_empty() {
        return Ok(Some("no service of this host is meant\n".to_owned()));
    }
    let names = services.join(", ");
    let Some(wait) = wait else {
        return Ok(Some(format!("{names}: listed again, where healthy\n")));
    };
    let end = Instant::now() + wait;
    let mut quiet_since = None;
    loop {
        let open = status::ask::<OpenCalls>(&socket, "/drained")?;
        let open = open.context("the agent ended meanwhile")?;
        let open: i64 = services.iter().filter_map(|name| open.get(name)).sum();
        let now = Instant::now();
        if open > 0 {
            quiet_since = None;
        } else if *quiet_since.get_or_insert(now) + QUIET <= now {
            return Ok(Some(format!("{names}: not listed, and no call is open\n")));
        }
        ensure!(
            now < end || open == 0,
            "{names}: not listed any more; {open} calls are still open after {} s",
            wait.as_secs()
        );
        std::thread::sleep(LOOK_EVERY);
    }
}

/// The same for the unit's stop or start, which waits for nothing else: where no agent runs there is nothing to do.
pub(crate) fn ask_of_unit(
    config: &Config,
    unit: &str,
    wait: Option<Duration>,
) -> anyhow::Result<String> {
    if wait.is_some() && units::runs(unit) == Some(false) {
        return Ok(format!("{unit} does not run: nothing is open to it\n"));
    }
    let end = Instant::now() + AGENT_MAX;
    loop {
        match ask(config, What::Unit(unit), wait) {
            Ok(Some(said)) => return Ok(said),
            // It takes its directory along when it ends.
            Ok(None) if !config.admin_socket().exists() => {
                return Ok("the agent does not run: nothing is drained\n".to_owned());
            }
            // A worker gives way to another.
            Ok(None) => ensure!(
                Instant::now() < end,
                "nothing answers at {}",
                config.admin_socket().display()
            ),
            Err(error) => return Err(error),
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::tests::Scratch;

    #[test]
    fn what_is_drained_is_so_after_a_restart_until_it_is_put_back() {
        let Scratch(state) = &Scratch::new();
        state.create().unwrap();
        let load = || Drained::load(state.root(), state.root());
        let name = |text| ServiceName::parse(text).unwrap();
        let both = Set::from([name("shop/web"), name("shop/db")]);
        load().change(&both, true, By::Operator).unwrap();
        let drained = load();
        assert_eq!(**drained.watch().borrow(), both);
        let one = Set::from([name("shop/web")]);
        drained.change(&one, false, By::Operator).unwrap();
        assert!(!drained.watch().borrow().contains(&name("shop/web")));
        let left = load().watch().borrow().clone();
        assert_eq!(*left, Set::from([name("shop/db")]));
        std::fs::write(state.root().join(FILE), "no list").unwrap();
        assert!(load().watch().borrow().is_empty());
    }

    #[test]
    fn a_unit_puts_back_only_what_its_stop_took_out() {
        let Scratch(state) = &Scratch::new();
        state.create().unwrap();
        let load = || Drained::load(state.root(), state.root());
        let web = Set::from([ServiceName::parse("shop/web").unwrap()]);
        let drained = load();
        drained.change(&web, true, By::Operator).unwrap();
        drained.change(&web, true, By::Unit).unwrap();
        drained.change(&web, false, By::Unit).unwrap();
        assert_eq!(**drained.watch().borrow(), web, "the operator's word holds");
        drained.change(&web, true, By::Unit).unwrap();
        drained.change(&web, false, By::Operator).unwrap();
        assert_eq!(
            **load().watch().borrow(),
            web,
            "for the next worker of this holder"
        );
        let file = state.root().join(STOPPING);
        let text = std::fs::read_to_string(&file).unwrap();
        let own = std::os::unix::process::parent_id().to_string();
        std::fs::write(&file, text.replace(&own, "1")).unwrap();
        assert!(
            load().watch().borrow().is_empty(),
            "the agent was stopped meanwhile"
        );
    }
}
