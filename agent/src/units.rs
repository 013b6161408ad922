//! This host's systemd: our units in it, and what a command of ours asks of it. Everything goes through `systemctl`,
//! which is wherever systemd is and needs no bus of our own.

use std::path::Path;
use std::process::{Command, Output, Stdio};

use anyhow::{Context as _, bail, ensure};

mod order;

pub(crate) use order::{Words, unorder_all};

pub(crate) const AGENT: &str = "mesh-agent.service";
/// Enabled with the agent's by its `Also=`.
pub(crate) const GUARD: &str = "mesh-guard.service";
/// There while systemd is the first process of this host: sd_booted(3).
const BOOTED: &str = "/run/systemd/system";
/// The oldest systemd whose units are known to do what ours ask for.
const SYSTEMD_MIN: u32 = 249;
/// Lines of the journal that tell why a unit did not start.
const JOURNAL_LINES: &str = "8";

/// Whether systemd runs this host and knows our unit.
pub(crate) fn there() -> bool {
    Path::new(BOOTED).is_dir()
        && systemctl(&["cat", AGENT]).is_ok_and(|output| output.status.success())
}

/// How a unit stood before we touched it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Before {
    enabled: bool,
    active: bool,
}

impl Before {
    pub(crate) fn of(unit: &str) -> Self {
        let is = |word| systemctl(&[word, "--quiet", unit]).is_ok_and(|o| o.status.success());
        Self {
            enabled: is("is-enabled"),
            active: is("is-active"),
        }
    }

    pub(crate) const fn is_active(self) -> bool {
        self.active
    }
}

/// Enables the agent's unit and starts it; returns when it says that it is ready.
///
/// # Errors
/// With the end of its journal. It goes on trying then, until [`stop`].
pub(crate) fn start() -> anyhow::Result<()> {
    done(&["enable", AGENT])?;
    let Err(error) = done(&["start", AGENT]) else {
        ensure!(
            Before::of(AGENT).active,
            "{AGENT} was skipped: it looks for this host's membership in /var/lib/meshwork-agent, so leave `state_dir` \
             as it is, or override ConditionPathExists and StateDirectory of the unit"
        );
        return Ok(());
    };
    let journal = Command::new("journalctl")
        .args(["--unit", AGENT, "--lines", JOURNAL_LINES])
        .args(["--output", "cat", "--no-pager", "--quiet"])
        .stdin(Stdio::null())
        .output();
    let said = journal.map(|o| String::from_utf8_lossy(&o.stdout).trim().to_owned());
    match said {
        Ok(said) if !said.is_empty() => bail!("{error:#}; its journal ends with\n{said}"),
        _ => Err(error),
    }
}

/// Stops the agent's units, which takes away what they set up, and disables them unless `before` they were enabled.
pub(crate) fn stop(before: Option<Before>) -> anyhow::Result<()> {
    if !before.is_some_and(|before| before.enabled) {
        done(&["disable", AGENT, GUARD])?;
    }
    done(&["stop", AGENT, GUARD])
}

fn reload() -> anyhow::Result<()> {
    match Path::new(BOOTED).is_dir() {
        true => done(&["daemon-reload"]),
        false => Ok(()),
    }
}

/// What this host lacks for all that an agent can do, each with what becomes of it.
pub(crate) fn lacking(kernel: &str, cgroups: bool) -> Vec<String> {
    let mut lacking = Vec::new();
    if version(kernel).is_some_and(|version| version < (5, 14)) {
        lacking.push(format!(
            "this kernel is {kernel}; from 5.14 on everything works, on older ones try owners `user = …`, or \
             capture.enabled = false"
        ));
    }
    if !cgroups {
        lacking.push(
            "cgroup2 is not mounted: owners `unit` and `cgroup` match nothing, name them by `user = …`".to_owned(),
        );
    }
    if Path::new(BOOTED).is_dir() {
        let said =
            systemctl(&["--version"]).map(|o| String::from_utf8_lossy(&o.stdout).into_owned());
        let number = said
            .ok()
            .and_then(|said| said.split_whitespace().nth(1)?.parse().ok());
        if let Some(number) = number.filter(|number: &u32| *number < SYSTEMD_MIN) {
            lacking.push(format!(
                "systemd is {number}; before {SYSTEMD_MIN} it does not know all that the units ask for"
            ));
        }
    }
    lacking
}

/// `6.1.0-18-amd64`: the first two numbers.
fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// Whether a service unit has programs that can be called. `None`: systemd can not be asked.
pub(crate) fn runs(unit: &str) -> Option<bool> {
    let output = systemctl(&["show", "--property=ActiveState", "--value", "--", unit]).ok()?;
    let state = String::from_utf8_lossy(&output.stdout);
    let runs = matches!(state.trim(), "active" | "reloading" | "refreshing");
    output.status.success().then_some(runs)
}

fn done(words: &[&str]) -> anyhow::Result<()> {
    let output = systemctl(words)?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success(),
        "`systemctl {}` failed: {}",
        words.join(" "),
        said.trim()
    );
    Ok(())
}

fn systemctl(words: &[&str]) -> anyhow::Result<Output> {
    Command::new("systemctl")
        .args(["--no-ask-password", "--no-pager"])
        .args(words)
        .stdin(Stdio::null())
        .output()
        .context("cannot run systemctl")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_of_kernels_are_compared_as_numbers() {
        assert_eq!(version("6.1.0-18-amd64"), Some((6, 1)));
        assert_eq!(version("5.4.0"), Some((5, 4)));
        assert_eq!(version("generic"), None);
        assert!(lacking("6.1.0", true).iter().all(|l| !l.contains("kernel")));
        assert!(lacking("5.4.0-1", true)[0].contains("5.14"));
        assert!(lacking("6.1.0", false)[0].contains("user"));
    }
}
