//! `mesh-agent reload`: asks the running agent to go over to the program and the configuration on disk, and waits until it
//! has, or has given up. The holder does it (`holder/handover.rs`) and leaves the outcome in a file.

use std::fs::File;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use mesh_runtime::files;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::{Signal, kill};
use serde::{Deserialize, Serialize};

use crate::alone;
use crate::config::Config;

pub(crate) const NAME: &str = "reload.json";
/// The configuration of the program that handed over last.
pub(crate) const CONFIG_COPY: &str = "agent.toml";
/// Held by who reloads.
const TURN: &str = "reload.lock";
/// A few words, one of them an error.
const BYTES_MAX: u64 = 4_096;
/// The holder's own times come to 45 s at most.
const WAIT_MAX: Duration = Duration::from_secs(60);
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// What the holder tells.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Outcome {
    /// Reloads that came to an end since the agent was started.
    pub(crate) reloads: u64,
    /// Why the last one was given up.
    pub(crate) given_up: Option<String>,
}

/// Reloads the running agent.
///
/// # Errors
/// When it was given up: then all is as it was.
pub(crate) fn reload(config: &Config) -> anyhow::Result<()> {
    let file = config.runtime_dir.join(NAME);
    let Some(holder) = alone::holder(config)? else {
        bail!("mesh-agent does not run here; `systemctl start mesh-agent`");
    };
    let until = Instant::now() + WAIT_MAX;
    // Who asks while another reload is under way means what is on disk now, and waits for its turn.
    let turn = config.runtime_dir.join(TURN);
    let mut turn =
        File::create(&turn).with_context(|| format!("cannot open {}", turn.display()))?;
    let _turn = loop {
        match Flock::lock(turn, FlockArg::LockExclusiveNonblock) {
            Ok(held) => break held,
            Err((_, error)) if error != Errno::EWOULDBLOCK => {
                return Err(error).context("cannot wait for another reload");
            }
            Err((file, _)) => turn = file,
        }
        ensure!(
            Instant::now() < until,
            "another reload did not end within {} s; see the agent's log",
            WAIT_MAX.as_secs()
        );
        std::thread::sleep(LOOK_EVERY);
    };
    let before = read(&file)?.reloads;
    kill(holder, Signal::SIGHUP).context("the agent can not be told")?;
    let until = Instant::now() + WAIT_MAX;
    loop {
        let outcome = read(&file)?;
        match outcome.given_up {
            _ if outcome.reloads == before => {}
            None => return Ok(()),
            Some(why) => bail!("the reload was given up, and the agent goes on as before: {why}"),
        }
        ensure!(
            alone::holder(config)?.is_some(),
            "the agent ended during the reload; see its log"
        );
        ensure!(
            Instant::now() < until,
            "the agent did not say within {} s how the reload ended; see its log",
            WAIT_MAX.as_secs()
        );
        std::thread::sleep(LOOK_EVERY);
    }
}

fn read(file: &Path) -> anyhow::Result<Outcome> {
    let text = match files::read_bounded(file, BYTES_MAX) {
        Ok(text) => text,
        Err(error) if error.cause.kind() == std::io::ErrorKind::NotFound => {
            return Ok(Outcome::default());
        }
        Err(error) => return Err(error.into()),
    };
    let outcome = serde_json::from_slice(&text);
    outcome.with_context(|| format!("cannot read {}", file.display()))
}
