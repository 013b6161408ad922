//! A check by what systemd says of a unit.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::process::Stdio;

use tokio::process::Command;

/// There while systemd is the first process of this host: sd_booted(3).
const BOOTED: &str = "/run/systemd/system";

pub(super) async fn ask(unit: &str) -> io::Result<()> {
    let said = properties(unit, &["LoadState", "ActiveState", "SubState"]).await?;
    judge(unit, &said)
}

fn judge(unit: &str, said: &BTreeMap<String, String>) -> io::Result<()> {
    let word = |name| said.get(name).map_or("", String::as_str);
    let (load, active) = (word("LoadState"), word("ActiveState"));
    if active == "active" {
        return Ok(());
    }
    Err(io::Error::other(match load {
        "not-found" => format!("there is no unit {unit}"),
        "loaded" => format!("{unit} is {active} ({})", word("SubState")),
        load => format!("{unit} is {active}, and its file is {load}"),
    }))
}

/// What systemd says of these properties of a unit.
pub(super) async fn properties(unit: &str, names: &[&str]) -> io::Result<BTreeMap<String, String>> {
    booted()?;
    let output = Command::new("systemctl")
        .args(["--no-pager", "show"])
        .arg(format!("--property={}", names.join(",")))
        .args(["--", unit])
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output()
        .await?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(io::Error::other(format!(
            "systemd can not be asked for {unit}: {}",
            said.trim()
        )));
    }
    let text = String::from_utf8_lossy(&output.stdout);
    let lines = text.lines().filter_map(|line| line.split_once('='));
    Ok(lines
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect())
}

/// Whether there is a systemd to ask.
pub(super) fn booted() -> io::Result<()> {
    match Path::new(BOOTED).is_dir() {
        true => Ok(()),
        false => Err(io::Error::new(
            io::ErrorKind::Unsupported,
            "systemd does not run this host: use a check of kind tcp, http or grpc",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_active_is_healthy() {
        for (load, active, word) in [
            ("loaded", "active", ""),
            ("loaded", "reloading", "reloading"),
            ("loaded", "activating", "activating"),
            ("loaded", "deactivating", "deactivating"),
            ("loaded", "inactive", "inactive"),
            ("loaded", "failed", "failed"),
            ("not-found", "inactive", "no unit"),
            ("masked", "inactive", "masked"),
            // Its file went while it runs.
            ("not-found", "active", ""),
            ("", "", "web.service"),
        ] {
            let said = [("LoadState", load), ("ActiveState", active)];
            let said = said.map(|(name, value)| (name.to_owned(), value.to_owned()));
            let judged = judge("web.service", &said.into());
            let why = judged.map_or_else(|error| error.to_string(), |()| String::new());
            assert_eq!(why.is_empty(), word.is_empty(), "{load} {active}: {why}");
            assert!(why.contains(word), "{why}");
        }
    }
}
