//! Services that the operator has taken out of the mesh on this host, until they are put back: they are not listed, whatever
//! their checks say, and what is open goes on. `mesh-agent drain` and `undrain`.

use std::collections::{BTreeMap, BTreeSet};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use mesh_core::names::ServiceName;
use mesh_runtime::files;
use tokio::sync::watch;

use crate::config::Config;
use crate::status;

/// Of the state directory: it holds over a restart and a reboot.
pub(crate) const FILE: &str = "drained.json";
/// Every service that a host can have.
const FILE_MAX: u64 = 4 * 1024 * 1024;
/// Between two looks at what is open.
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// How long nothing must be open until a service counts as empty: callers hear from control within a second.
const QUIET: Duration = Duration::from_secs(2);

/// What is drained.
pub(crate) type Set = BTreeSet<ServiceName>;

/// The owner of the list.
#[derive(Debug)]
pub(crate) struct Drained {
    file: PathBuf,
    set: watch::Sender<Arc<Set>>,
}

impl Drained {
    /// As it was kept. A list that can not be read is as none.
    pub(crate) fn load(state_dir: &Path) -> Self {
        let file = state_dir.join(FILE);
        let set = read(&file).unwrap_or_else(|error| {
            log::warn!("{error:#}; no service is drained");
            Set::new()
        });
        Self {
            set: watch::Sender::new(Arc::new(set)),
            file,
        }
    }

    pub(crate) fn watch(&self) -> watch::Receiver<Arc<Set>> {
        self.set.subscribe()
    }

    /// Takes services out, or puts them back. Nothing changes where it can not be kept.
    pub(crate) fn change(&self, services: &Set, out: bool) -> anyhow::Result<()> {
        let mut set = Set::clone(&self.set.borrow());
        match out {
            true => set.extend(services.iter().cloned()),
            false => set.retain(|service| !services.contains(service)),
        }
        let names: Vec<String> = set.iter().map(ToString::to_string).collect();
        files::write_private(&self.file, &serde_json::to_vec(&names)?)?;
        let names: Vec<String> = services.iter().map(ToString::to_string).collect();
        let services = names.join(", ");
        match out {
            true => log::info!(services = services.as_str(); "drained by the operator"),
            false => log::info!(services = services.as_str(); "no more drained"),
        }
        self.set.send_replace(Arc::new(set));
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
    let names = names.iter().map(|name| ServiceName::parse(name));
    names.collect::<Result<_, _>>().with_context(name)
}

/// Calls of other hosts that are open, by service. What the admin socket answers at `/drained`.
pub(crate) type OpenCalls = BTreeMap<String, i64>;

/// Takes `service`, or all of this host, out of the mesh or back; waits for the end of its calls for so long. `None`: no agent
/// runs.
pub(crate) fn ask(
    config: &Config,
    service: Option<&str>,
    wait: Option<Duration>,
) -> anyhow::Result<Option<String>> {
    let socket = config.admin_socket();
    let word = if wait.is_some() { "drain" } else { "undrain" };
    let query = service.map(|service| format!("?service={service}"));
    let path = format!("/{word}{}", query.unwrap_or_default());
    let Some(services) = status::request::<Vec<String>>(&socket, "PUT", &path)? else {
        return Ok(None);
    };
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::tests::Scratch;

    #[test]
    fn what_is_drained_is_so_after_a_restart_until_it_is_put_back() {
        let Scratch(state) = &Scratch::new();
        state.create().unwrap();
        let name = |text| ServiceName::parse(text).unwrap();
        let both = Set::from([name("shop/web"), name("shop/db")]);
        Drained::load(state.root()).change(&both, true).unwrap();
        let drained = Drained::load(state.root());
        assert_eq!(**drained.watch().borrow(), both);
        let one = Set::from([name("shop/web")]);
        drained.change(&one, false).unwrap();
        assert!(!drained.watch().borrow().contains(&name("shop/web")));
        let left = Drained::load(state.root()).watch().borrow().clone();
        assert_eq!(*left, Set::from([name("shop/db")]));
        std::fs::write(state.root().join(FILE), "no list").unwrap();
        assert!(Drained::load(state.root()).watch().borrow().is_empty());
    }
}
