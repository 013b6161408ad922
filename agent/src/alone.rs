//! One agent a host: the lock that a running agent holds for its life, and that leaving takes too.

use std::fs::{File, TryLockError};
use std::io::{ErrorKind, Read as _, Write as _};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::net::UnixStream;

use anyhow::{Context as _, bail};
use nix::unistd::Pid;

use crate::config::Config;
use crate::{drained, health, reload};

const NAME: &str = "agent.lock";

/// Held as long as it lives. A worker does not inherit it, so it ends with the holder; a program that takes the holder's
/// place does.
#[derive(Debug)]
pub(crate) struct Alone(File);

impl Alone {
    /// The lock of the program before this one, which is open as long as this is.
    pub(crate) fn handed_over(lock: OwnedFd) -> Self {
        Self(lock.into())
    }
}

impl AsFd for Alone {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The process that holds the lock; `None` when no agent runs here.
pub(crate) fn holder(config: &Config) -> anyhow::Result<Option<Pid>> {
    let path = config.runtime_dir.join(NAME);
    let mut file = match File::open(&path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        opened => opened.with_context(|| format!("cannot open {}", path.display()))?,
    };
    if file.try_lock_shared().is_ok() {
        return Ok(None);
    }
    let mut text = String::new();
    file.read_to_string(&mut text)?;
    let pid = text.trim().parse();
    let pid = pid.with_context(|| format!("{} does not say who holds it", path.display()))?;
    Ok(Some(Pid::from_raw(pid)))
}

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
        Ok(()) if UnixStream::connect(config.admin_socket()).is_err() => {
            let named = (file.set_len(0)).and_then(|()| writeln!(&file, "{}", std::process::id()));
            named.with_context(|| format!("cannot write {}", path.display()))?;
            Ok(Alone(file))
        }
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
    let names = [
        NAME,
        reload::NAME,
        reload::CONFIG_COPY,
        health::KEPT,
        drained::STOPPING,
    ];
    for name in names {
        let _ = std::fs::remove_file(config.runtime_dir.join(name));
    }
    // Pipes are gone with the worker that made them, or it was killed.
    let pipes = config.runtime_dir.join(health::PIPES);
    for entry in std::fs::read_dir(&pipes).into_iter().flatten().flatten() {
        let _ = std::fs::remove_file(entry.path());
    }
    let _ = std::fs::remove_dir(pipes);
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
        let own = Pid::this();
        assert_eq!(holder(&config).unwrap(), Some(own));
        drop(first);
        assert_eq!(holder(&config).unwrap(), None);
        drop(alone(&config).unwrap());
        remove_runtime_dir(&config);
        assert!(!state.root().exists());
    }
}
