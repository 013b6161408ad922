//! What processes have used, by the cgroups they run in.

use std::fs;
use std::path::Path;

/// User and system time of a cgroup's processes so far, in microseconds, as the kernel sums it: exact, and threads and
/// processes that ended meanwhile are in it.
pub(super) fn cpu_us(cgroup: &Path) -> f64 {
    let path = cgroup.join("cpu.stat");
    let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    usage_us(&text).unwrap_or_else(|| panic!("{}: {text}", path.display()))
}

/// Resident memory of all processes of a cgroup, in MiB. What they share is counted for each.
pub(super) fn rss_mib(cgroup: &Path) -> f64 {
    let pids = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
    let sizes = pids.lines().filter_map(|pid| {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        rss_kib(&status)
    });
    sizes.sum::<f64>() / 1024.0
}

/// `usage_usec` of a cgroup's `cpu.stat`.
fn usage_us(text: &str) -> Option<f64> {
    let mut lines = text.lines();
    let value = lines.find_map(|line| line.strip_prefix("usage_usec "))?;
    value.trim().parse().ok()
}

/// `VmRSS` of proc_pid_status(5).
fn rss_kib(status: &str) -> Option<f64> {
    let mut lines = status.lines();
    let value = lines.find_map(|line| line.strip_prefix("VmRSS:"))?;
    value.trim().strip_suffix(" kB")?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_counts_is_read() {
        assert_eq!(usage_us("usage_usec 1234\nuser_usec 1000\n"), Some(1234.0));
        assert_eq!(usage_us(""), None);
        let status = "VmHWM:\t   20480 kB\nVmRSS:\t   10240 kB\n";
        assert_eq!(rss_kib(status), Some(10_240.0));
    }
}
