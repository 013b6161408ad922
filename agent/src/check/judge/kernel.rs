//! What the kernel of this host says, with an agent or without.

use mesh_api::check::Check;

use super::NOT_CAPTURED;
use crate::check::Facts;

/// Of the connections that the kernel can track, in hundredths; at 100 it drops.
const TRACKED_WARN: u64 = 70;
const TRACKED_FAIL: u64 = 95;
/// Of the disk of the state, in bytes: where logs fill it, there are hours left; and what the state may grow by.
const FREE_WARN: u64 = 64 * 1024 * 1024;
const FREE_FAIL: u64 = 4 * 1024 * 1024;
/// Files of one change of the state.
const FILES_FAIL: u64 = 16;

/// Of the kernel, what would let nothing through, or through to the wrong place.
pub(super) fn routes(facts: &Facts) -> Check {
    const NAME: &str = "routes";
    if !facts.captures {
        return Check::skipped(NAME, NOT_CAPTURED);
    }
    let found = match &facts.kernel {
        Ok(found) => found,
        Err(error) => return Check::skipped(NAME, error),
    };
    let mut missing = found.missing.routes.clone();
    if found.missing.link {
        missing.push("the link of the virtual addresses, or it is down".to_owned());
    }
    let runs = matches!(facts.status, Ok(Some(_)));
    if found.missing.table {
        missing.push("the table of the packet filter".to_owned());
    }
    if missing.is_empty() {
        return Check::ok(NAME, "link, routes, policy rules and packet filter stand");
    }
    let remedy = match runs {
        true => {
            "another program took it away: see which one (`ip rule`, `nft list tables`), then restart the agent"
        }
        false => "start the agent: it makes what is missing",
    };
    Check::failed(
        NAME,
        "calls by name can not be taken over: it is missing what leads them to the agent",
        remedy,
    )
    .about(missing)
}

pub(super) fn clashes(facts: &Facts) -> Check {
    const NAME: &str = "clashes";
    let mut found = match &facts.kernel {
        _ if !facts.captures => Vec::new(),
        Ok(found) => found.clashes.clone(),
        Err(error) => return Check::skipped(NAME, error),
    };
    let runs = matches!(facts.status, Ok(Some(_)));
    let listeners = facts.mesh_port.as_deref().unwrap_or_default();
    if let Some(other) = listeners.first()
        && !runs
    {
        found.push(format!(
            "port {} is held by a program of user {} ({})",
            facts.mesh_port_number, other.uid, other.address
        ));
    }
    if found.is_empty() {
        return Check::ok(
            NAME,
            "no other program uses our marks, tables, priorities or port",
        );
    }
    Check::failed(
        NAME,
        "another program uses what is ours",
        "set another number in agent.toml ([capture], mesh.listen_port), or in the other program",
    )
    .about(found)
}

pub(super) fn conntrack(facts: &Facts) -> Check {
    const NAME: &str = "conntrack";
    let Some((count, max)) = facts.tracked else {
        return Check::ok(NAME, "connections are not tracked");
    };
    if count == 0 {
        return Check::ok(NAME, "no connection is tracked");
    }
    let found = format!("{count} of {max} connections are tracked, by rules of other programs");
    let remedy = "the kernel drops new connections of all programs when the table is full: raise net.netfilter.nf_conntrack_max";
    match count.saturating_mul(100) / max.max(1) {
        0..TRACKED_WARN => Check::ok(NAME, found),
        TRACKED_WARN..TRACKED_FAIL => Check::warning(NAME, found, remedy),
        _ => Check::failed(NAME, found, remedy),
    }
}

pub(super) fn bypass(facts: &Facts) -> Check {
    const NAME: &str = "bypass";
    match &facts.bypass {
        Ok(None) => Check::ok(NAME, "this host is not opened to plaintext"),
        Ok(Some(open)) => Check::warning(
            NAME,
            format!("this host is open to plaintext {open}"),
            "`mesh-agent bypass --end` closes it before its time",
        ),
        Err(error) => Check::failed(
            NAME,
            format!("whether this host is opened to plaintext can not be told: {error}"),
            "as it says",
        ),
    }
}

/// An agent that can not write goes on with what it has in memory, and begins with what is older after a restart.
pub(super) fn disk(facts: &Facts) -> Check {
    const NAME: &str = "disk";
    let disk = match &facts.disk {
        Ok(disk) => disk,
        Err(error) => return Check::skipped(NAME, error),
    };
    let place = disk.directory.display();
    let lost = "what control says and new certificates can not be kept there";
    if disk.read_only {
        return Check::failed(
            NAME,
            format!("the file system of {place} is read-only: {lost}"),
            "look into the kernel's log (`dmesg`) why, and mount it to be written",
        );
    }
    let mib = disk.free / (1024 * 1024);
    let found = format!("{mib} MiB are free for {place}");
    let remedy = "make room: see what fills the disk (`du -x`, `journalctl --disk-usage`)";
    match disk.free {
        _ if disk.files.is_some_and(|files| files < FILES_FAIL) => Check::failed(
            NAME,
            format!("no more files can be made in {place}: {lost}"),
            "remove files: see where there are many (`du -x --inodes`)",
        ),
        0..FREE_FAIL => Check::failed(NAME, format!("{found}: {lost}"), remedy),
        FREE_FAIL..FREE_WARN => Check::warning(NAME, found, remedy),
        _ => Check::ok(NAME, found),
    }
}
