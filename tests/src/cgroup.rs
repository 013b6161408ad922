//! The cgroup2 hierarchy: every process of a site is in a cgroup of its own, as units are on a real host.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::wait::{check, wait_until};

/// How long killed processes may take to be gone: they may be in the middle of an fsync.
const GONE_MAX: Duration = Duration::from_secs(10);

/// Where cgroup2 is mounted: `/sys/fs/cgroup`, or below it on hybrid machines.
pub fn root() -> PathBuf {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let mount = mounts.lines().find_map(|line| {
        let (fields, kind) = line.split_once(" - ")?;
        let point = fields.split(' ').nth(4)?;
        kind.starts_with("cgroup2 ").then(|| PathBuf::from(point))
    });
    mount.expect("no cgroup2 is mounted; the tests need one (mount -t cgroup2 none /sys/fs/cgroup)")
}

/// Where version 1 has the hierarchy of systemd, on hybrid machines: what boots a host there goes by it.
pub fn version1() -> Option<PathBuf> {
    let path = PathBuf::from("/sys/fs/cgroup/systemd");
    path.join("cgroup.procs").exists().then_some(path)
}

/// Kills every process in `cgroup` and below, and removes it.
pub fn remove(cgroup: &Path) -> io::Result<()> {
    if !cgroup.exists() {
        return Ok(());
    }
    kill(cgroup)?;
    remove_empty(cgroup)
}

/// Kills every process in `cgroup` and below and waits until they are gone.
pub fn kill(cgroup: &Path) -> io::Result<()> {
    fs::write(cgroup.join("cgroup.kill"), "1")?;
    wait_until("the processes of a cgroup to end", GONE_MAX, || {
        let events = fs::read_to_string(cgroup.join("cgroup.events")).unwrap_or_default();
        check(events.contains("populated 0"), events)
    });
    Ok(())
}

/// Removes `cgroup` and those below it, in which there is no process any more.
pub fn remove_empty(cgroup: &Path) -> io::Result<()> {
    for entry in fs::read_dir(cgroup)? {
        let path = entry?.path();
        if path.is_dir() {
            remove_empty(&path)?;
        }
    }
    // A task that was just killed may still be counted for a moment.
    wait_until("a cgroup to be removable", GONE_MAX, || {
        fs::remove_dir(cgroup).map_err(|e| format!("{}: {e}", cgroup.display()))
    });
    Ok(())
}
