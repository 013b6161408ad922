//! Removing what sites made: at their end, or after a run that was killed.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::cgroup;

/// Sites of tests are `mwt-<pid of the test process>-<number>`.
pub const TEST_PREFIX: &str = "mwt-";
/// The site of the demonstration. There is one at a time.
pub const DEMO_PREFIX: &str = "mwd";

/// Where systemd-nspawn leaves a directory a machine.
const MACHINES: &str = "/run/systemd/nspawn/propagate";

/// Removes the sites of test processes that are dead. Those of living ones belong to another run.
pub fn dead_tests() {
    let mut prefixes: Vec<String> = [
        Path::new("/run/netns"),
        &std::env::temp_dir(),
        &cgroup::root(),
    ]
    .iter()
    .filter_map(|dir| fs::read_dir(dir).ok())
    .flatten()
    .flatten()
    .filter_map(|entry| prefix_of(&entry.file_name().to_string_lossy()))
    .filter(|(_, pid)| !Path::new(&format!("/proc/{pid}")).exists())
    .map(|(prefix, _)| prefix)
    .collect();
    prefixes.sort();
    prefixes.dedup();
    for prefix in prefixes {
        site(&prefix);
    }
}

/// Removes the site of the demonstration.
pub fn demo() {
    site(DEMO_PREFIX);
}

/// `mwt-<pid>-<number>` and the pid, of the name of something that a site made.
fn prefix_of(name: &str) -> Option<(String, u32)> {
    let mut parts = name.strip_prefix(TEST_PREFIX)?.split('-');
    let (pid, number) = (parts.next()?, parts.next()?);
    let pid = pid.parse().ok()?;
    number.parse::<u32>().ok()?;
    Some((format!("{TEST_PREFIX}{pid}-{number}"), pid))
}

/// Removes one site: its processes, cgroups, namespaces (and with them links, routes and rules), directories.
pub fn site(prefix: &str) {
    let root = cgroup::root();
    report(prefix, cgroup::remove(&root.join(prefix)));
    for unit in units(&root, prefix) {
        report(prefix, cgroup::remove(&unit));
    }
    let names = fs::read_dir("/run/netns").into_iter().flatten().flatten();
    for name in names.map(|e| e.file_name().to_string_lossy().into_owned()) {
        if name.starts_with(&format!("{prefix}-")) {
            drop(Command::new("ip").args(["netns", "delete", &name]).output());
        }
    }
    if let Some(old) = cgroup::version1().map(|root| root.join(prefix))
        && old.exists()
    {
        report(prefix, cgroup::remove_empty(&old));
    }
    let dir = std::env::temp_dir().join(prefix);
    unmount(&dir);
    let machines = fs::read_dir(MACHINES).into_iter().flatten().flatten();
    for machine in machines.filter(|e| {
        let name = e.file_name();
        name.to_string_lossy().starts_with(&format!("{prefix}-"))
    }) {
        drop(fs::remove_dir_all(machine.path()));
    }
    if dir.exists() {
        report(prefix, fs::remove_dir_all(dir));
    }
}

/// Roots of hosts that booted.
fn unmount(dir: &Path) {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let points = mounts.lines().filter_map(|line| line.split(' ').nth(4));
    let points: Vec<&str> = points
        .filter(|point| Path::new(point).starts_with(dir))
        .collect();
    // The innermost was mounted last.
    for point in points.into_iter().rev() {
        drop(Command::new("umount").args(["--lazy", point]).output());
    }
}

/// Cgroups that stand for systemd units: `system.slice/<prefix>-<name>.service`.
fn units(root: &Path, prefix: &str) -> Vec<std::path::PathBuf> {
    let entries = fs::read_dir(root.join("system.slice"));
    let entries = entries.into_iter().flatten().flatten();
    entries
        .filter(|e| {
            e.file_name()
                .to_string_lossy()
                .starts_with(&format!("{prefix}-"))
        })
        .map(|e| e.path())
        .collect()
}

#[expect(clippy::print_stderr, reason = "nobody is left to hand the error to")]
fn report(prefix: &str, result: std::io::Result<()>) {
    if let Err(error) = result {
        eprintln!("could not remove all of {prefix}: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_test_sites_are_swept() {
        assert_eq!(prefix_of("mwt-12-3-vm1"), Some(("mwt-12-3".to_owned(), 12)));
        assert_eq!(prefix_of("mwt-12-3"), Some(("mwt-12-3".to_owned(), 12)));
        for other in ["mwt-x-3", "mwd-vm1", "mwt-12", "eth0"] {
            assert_eq!(prefix_of(other), None, "{other}");
        }
    }
}
