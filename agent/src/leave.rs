//! Leaving the mesh: every trace of the agent goes from this host, but for what its package and its operator put there.

use anyhow::Context as _;

use crate::alone::{self, Alone};
use crate::capture;
use crate::config::Config;
use crate::dns::resolv_conf;
use crate::state::State;

/// What this host was before it left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Left {
    /// A member, under this name.
    Host(String),
    /// A member that can not be told by name: its file is damaged.
    Unnamed,
    /// No member; leftovers of an agent are gone too.
    Nothing,
}

/// Removes rules, routes, link, the resolver's line, and all state. May be repeated.
pub(crate) fn leave(config: &Config) -> anyhow::Result<Left> {
    let _alone = stopped(config)?;
    let state = State::new(&config.state_dir);
    let left = match state.membership() {
        Ok(Some(membership)) => Left::Host(membership.host.name.to_string()),
        Ok(None) => Left::Nothing,
        Err(_) => Left::Unnamed,
    };
    undo(config)?;
    state.clear()?;
    alone::remove_runtime_dir(config);
    Ok(left)
}

/// Removes rules, routes, link and the resolver's line, and keeps what the join gave this host. May be repeated.
pub(crate) fn open(config: &Config) -> anyhow::Result<()> {
    let _alone = stopped(config)?;
    undo(config)
}

/// The lock of the one agent. Where there is no such directory no agent runs.
fn stopped(config: &Config) -> anyhow::Result<Option<Alone>> {
    let lock = (config.runtime_dir.exists()).then(|| alone::alone(config));
    lock.transpose()
        .context("stop the agent first: `systemctl stop mesh-agent`, or end `mesh-agent run`")
}

/// What an agent did to the kernel and the resolver. None may run.
pub(crate) fn undo(config: &Config) -> anyhow::Result<()> {
    if config.capture.enabled {
        capture::remove_all(&config.capture)?;
    }
    if let Some(path) = config.resolv_conf() {
        resolv_conf::unwire(path)?;
    }
    Ok(())
}

/// Takes our line out of the resolver's file; what can not be done is said.
pub(crate) fn unwire(config: &Config) {
    if let Some(path) = config.resolv_conf()
        && let Err(error) = resolv_conf::unwire(path)
    {
        log::warn!("mesh names stay wired in, and resolvers pass over them after a time: {error}");
    }
}
