//! Leaving the mesh: every trace of the agent goes from this host, but for what its package put there.

use anyhow::bail;

use crate::capture;
use crate::config::Config;
use crate::dns::resolv_conf;
use crate::state::State;

/// Removes rules, routes, link, the resolver's line, and all state. May be repeated.
pub(crate) fn leave(config: &Config) -> anyhow::Result<()> {
    let socket = config.admin_socket();
    if std::os::unix::net::UnixStream::connect(&socket).is_ok() {
        bail!(
            "the agent runs (it answers at {}); stop it first, e.g. `systemctl stop mesh-agent`",
            socket.display()
        );
    }
    capture::remove_all(&config.capture)?;
    if let Some(path) = config.resolv_conf() {
        resolv_conf::unwire(path)?;
    }
    let _ = std::fs::remove_file(&socket);
    State::new(&config.state_dir).clear()
}

/// Takes our line out of the resolver's file; what can not be done is said.
pub(crate) fn unwire(config: &Config) {
    if let Some(path) = config.resolv_conf()
        && let Err(error) = resolv_conf::unwire(path)
    {
        log::warn!("mesh names stay wired in, and resolvers pass over them after a time: {error}");
    }
}
