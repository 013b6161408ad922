//! One agent a host: the lock that a running agent holds for its life, and that leaving takes too.

use std::fs::{File, TryLockError};
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::net::UnixStream;

use anyhow::{Context as _, bail};

use crate::config::Config;

const NAME: &str = "agent.lock";

/// Held as long as it lives. A worker does not inherit it, so it ends with the holder.
#[derive(Debug)]
pub(crate) struct Alone(#[expect(dead_code, reason = "its being open is the lock")] File);

/// Takes the lock. The runtime directory must be there.
///
/// # Errors
/// When an agent runs here. Nothing of it was touched then.
pub(crate) fn alone(config: &Config) -> anyhow::Result<Alone> {
    let path = config.runtime_dir.join(NAME);
    let mut options = File::options();
    options.create(true).write(true).truncate(false).mode(0o600);
    let file = options
        .open(&path)
        .with_context(|| format!("cannot open {}", path.display()))?;
    match file.try_lock() {
        Ok(()) if UnixStream::connect(config.admin_socket()).is_err() => Ok(Alone(file)),
        Ok(()) | Err(TryLockError::WouldBlock) => {
            bail!("mesh-agent already runs here; see `mesh-agent status`")
        }
        Err(TryLockError::Error(error)) => {
            Err(error).with_context(|| format!("cannot lock {}", path.display()))
        }
    }
}

/// Removes the runtime directory with what agents leave in it; it stays where somebody put something else into it.
pub(crate) fn remove_runtime_dir(config: &Config) {
    let _ = std::fs::remove_file(config.admin_socket());
    let _ = std::fs::remove_file(config.runtime_dir.join(NAME));
    let _ = std::fs::remove_dir(&config.runtime_dir);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::tests::Scratch;

    #[test]
    fn there_is_one_agent_at_a_time() {
        let Scratch(state) = &Scratch::new();
        let config = Config {
            runtime_dir: state.root().to_owned(),
            ..Config::default()
        };
        let first = alone(&config).unwrap();
        let refused = alone(&config).unwrap_err().to_string();
        assert!(refused.contains("already runs here"), "{refused}");
        drop(first);
        drop(alone(&config).unwrap());
        remove_runtime_dir(&config);
        assert!(!state.root().exists());
    }
}
