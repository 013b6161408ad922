//! What `mesh-agent unit` adds to a unit of an operator: its order beside the agent, and for a service a unit of ours that
//! drains it before it stops. That is stopped before the service, since it begins after it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail};

use super::{AGENT, Before, done, reload};
use crate::Mistyped;
use crate::capture::cgroup::OwnerPath;

/// Where an operator's additions to units are, and the name of ours among them.
const ADDITIONS: &str = "/etc/systemd/system";
const ORDER: &str = "meshwork.conf";
/// Begins the name of each unit that drains.
const DRAIN: &str = "mesh-drain-";
/// Begins each of ours: others of that name stay.
const MARK: &str = "# Made by `mesh-agent unit`";
/// What a drain may take beside its wait.
const DRAIN_REST: Duration = Duration::from_secs(15);

/// What is typed after `mesh-agent unit`.
#[derive(Debug, clap::Args)]
pub(crate) struct Words {
    /// E.g. nginx.service
    name: String,
    /// How long the stop of a service waits until none of its calls is open
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = mesh_api::duration::parse)]
    drain: Duration,
    /// Its stop does not drain it
    #[arg(long, conflicts_with = "drain")]
    no_drain: bool,
    /// Take that away again
    #[arg(long)]
    remove: bool,
    /// Only show it
    #[arg(long, conflicts_with = "remove")]
    print: bool,
}

impl Words {
    /// Orders a unit behind the agent, or no longer; or only says how it would.
    pub(crate) fn heed(&self) -> anyhow::Result<String> {
        const NO_UNIT: &str = "that can not be ordered";
        let owner = OwnerPath::unit(&self.name).context(Mistyped(NO_UNIT.to_owned()))?;
        let OwnerPath::Unit(name) = owner else {
            bail!(NO_UNIT);
        };
        let drain = match self.no_drain {
            true => Duration::ZERO,
            false => self.drain,
        };
        match (self.remove, self.print) {
            (true, _) => unordered(&name),
            (_, true) => Ok(order(&name, drain)),
            _ => ordered(&name, drain),
        }
    }
}

/// The files for a unit that calls by the mesh, or is called: what each is, and where. `drain`: how long the stop of a service
/// waits for its calls.
fn files(unit: &str, drain: Duration) -> Vec<(PathBuf, String)> {
    let away = format!("{MARK}; `mesh-agent unit --remove {unit}` takes it away.\n");
    let companion = companion(unit).filter(|_| !drain.is_zero());
    let wants = companion
        .as_deref()
        .map_or_else(String::new, |c| format!(" {c}"));
    let mut files = vec![(
        addition(unit),
        format!(
            "{away}[Unit]\n\
             # Its names and calls work from its first moment to its last. Wants, not Requires: it also runs without.\n\
             Wants={AGENT}{wants}\n\
             After={AGENT}\n"
        ),
    )];
    if let Some(companion) = companion {
        let wait = drain.as_secs();
        let most = (drain + DRAIN_REST).as_secs();
        let text = format!(
            "{away}[Unit]\n\
             Description=Drain of {unit} in the mesh before it stops\n\
             Documentation=man:mesh-agent-drain(1)\n\
             # It begins after the service, so it is stopped before it, and before the agent.\n\
             BindsTo={unit}\n\
             After={unit} {AGENT}\n\
             \n\
             [Service]\n\
             Type=oneshot\n\
             RemainAfterExit=yes\n\
             ExecStart=/usr/bin/mesh-agent undrain --unit {unit}\n\
             # What is open after that ends with the service.\n\
             ExecStop=-/usr/bin/mesh-agent drain --unit {unit} --wait {wait}s\n\
             TimeoutStartSec=60s\n\
             TimeoutStopSec={most}s\n\
             # The agent did not answer: a service that stays drained is called by nobody.\n\
             Restart=on-failure\n\
             RestartSec=5s\n"
        );
        files.push((Path::new(ADDITIONS).join(companion), text));
    }
    files
}

/// What [`ordered`] would write.
fn order(unit: &str, drain: Duration) -> String {
    let shown = files(unit, drain);
    let shown = shown
        .iter()
        .map(|(path, text)| format!("# {}\n{text}", path.display()));
    shown.collect::<Vec<_>>().join("\n")
}

/// Adds it.
fn ordered(unit: &str, drain: Duration) -> anyhow::Result<String> {
    for (path, text) in files(unit, drain) {
        let dir = path.parent().unwrap_or_else(|| Path::new(ADDITIONS));
        std::fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
        mesh_runtime::files::write_atomic(&path, text.as_bytes())?;
    }
    let companion = companion(unit);
    match &companion {
        // One of an earlier order.
        Some(companion) if drain.is_zero() => take_away(std::slice::from_ref(companion))?,
        _ => reload()?,
    }
    let mut said = format!(
        "wrote {}: from its next start on {unit} begins after the agent is ready, and ends before it\n",
        addition(unit).display()
    );
    if let Some(companion) = companion.filter(|_| !drain.is_zero()) {
        // A service that runs is drained at its next stop already.
        if Before::of(unit).is_active() {
            done(&["start", &companion])?;
        }
        said += &format!(
            "wrote {}: {unit} is drained before it stops, for at most {} s\n",
            Path::new(ADDITIONS).join(companion).display(),
            drain.as_secs()
        );
    }
    Ok(said)
}

/// Takes it away.
fn unordered(unit: &str) -> anyhow::Result<String> {
    let path = addition(unit);
    let removed = remove_ours(&path)?;
    let companions: Vec<String> = companion(unit).into_iter().collect();
    take_away(&companions)?;
    Ok(match removed {
        true => format!("removed {}\n", path.display()),
        false => format!("{unit} was not ordered: {} is not there\n", path.display()),
    })
}

/// Takes away all of them.
pub(crate) fn unorder_all() -> anyhow::Result<()> {
    let Ok(entries) = std::fs::read_dir(ADDITIONS) else {
        return Ok(());
    };
    let mut removed = false;
    let mut companions = Vec::new();
    for entry in entries.flatten() {
        removed |= remove_ours(&entry.path().join(ORDER))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with(DRAIN) && is_ours(&entry.path()) {
            companions.push(name);
        }
    }
    if removed || !companions.is_empty() {
        take_away(&companions)?;
    }
    Ok(())
}

/// Removes the units that drain, then forgets them: without their files nothing is drained by their stop.
fn take_away(companions: &[String]) -> anyhow::Result<()> {
    for companion in companions {
        remove_ours(&Path::new(ADDITIONS).join(companion))?;
    }
    reload()?;
    for companion in companions {
        if Before::of(companion).is_active() {
            done(&["stop", companion])?;
        }
    }
    Ok(())
}

/// The unit that drains a service; other units have no calls of their own.
fn companion(unit: &str) -> Option<String> {
    unit.ends_with(".service").then(|| format!("{DRAIN}{unit}"))
}

fn addition(unit: &str) -> PathBuf {
    Path::new(ADDITIONS).join(format!("{unit}.d")).join(ORDER)
}

fn is_ours(path: &Path) -> bool {
    std::fs::read_to_string(path).is_ok_and(|text| text.starts_with(MARK))
}

fn remove_ours(path: &Path) -> anyhow::Result<bool> {
    if !is_ours(path) {
        return Ok(false);
    }
    std::fs::remove_file(path).with_context(|| format!("cannot remove {}", path.display()))?;
    if let Some(dir) = path.parent() {
        // Stays where there are others' additions.
        let _ = std::fs::remove_dir(dir);
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_service_gets_a_unit_that_drains_it_and_nothing_else_does() {
        let shown = order("web.service", Duration::from_secs(20));
        for line in [
            "# /etc/systemd/system/web.service.d/meshwork.conf",
            "Wants=mesh-agent.service mesh-drain-web.service",
            "# /etc/systemd/system/mesh-drain-web.service",
            "BindsTo=web.service",
            "After=web.service mesh-agent.service",
            "ExecStop=-/usr/bin/mesh-agent drain --unit web.service --wait 20s",
            "TimeoutStopSec=35s",
        ] {
            assert!(shown.lines().any(|l| l == line), "{line}: {shown}");
        }
        for without in [
            order("web.service", Duration::ZERO),
            order("web.scope", Duration::from_secs(20)),
        ] {
            assert!(!without.contains(DRAIN), "{without}");
            assert!(without.contains("After=mesh-agent.service"), "{without}");
        }
    }
}
