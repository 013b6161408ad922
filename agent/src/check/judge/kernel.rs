//! What the kernel of this host says, with an agent or without.

use mesh_api::check::Check;

use super::NOT_CAPTURED;
use crate::check::Facts;

/// Of the connections that the kernel can track, in hundredths; at 100 it drops.
const TRACKED_WARN: u64 = 70;
const TRACKED_FAIL: u64 = 95;

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
