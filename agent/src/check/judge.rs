//! What the facts mean: one function a check. Nothing is asked here.

mod kernel;

use mesh_api::check::{Check, Checks};
use mesh_core::expiry::alarm;
use mesh_core::reason::Reason;

use kernel::{bypass, clashes, conntrack, disk, routes};

use super::{Certificate, Facts};
use crate::capture::real::REALS_MAX;
use crate::status::{NamesStatus, Status, span};

/// A difference of clocks that is worth a look, and one at which certificates are judged wrongly, milliseconds.
const OFFSET_WARN_MS: u64 = 5_000;
const OFFSET_FAIL_MS: u64 = 60_000;
/// An index so old has missed a night: services may have moved, and only health of calls tells.
const STALE_FAIL_S: u64 = 86_400;
/// Of a bound of the data path, in hundredths.
const USED_WARN: u64 = 90;

/// Why nothing is to be found in the kernel.
const NOT_CAPTURED: &str = "nothing is captured: capture.enabled is false";

type Judge = fn(&Facts, &Status) -> Check;

/// In the order in which causes come before what they cause.
const OF_AGENT: [(&str, Judge); 14] = [
    ("control", control),
    ("clock", clock),
    ("index", index),
    ("names", names),
    ("capture", capture),
    ("door", door),
    ("mesh_port", mesh_port),
    ("firewall", firewall),
    ("peers", peers),
    ("files", files),
    ("workloads", workloads),
    ("ports", ports),
    ("plaintext", plaintext),
    ("limits", limits),
];

pub(super) fn judge(facts: &Facts) -> Checks {
    let mut checks = vec![agent(facts), routes(facts), clashes(facts)];
    checks.push(conntrack(facts));
    checks.push(bypass(facts));
    checks.push(disk(facts));
    checks.push(certificates(facts));
    let status = facts.status.as_ref().ok().and_then(Option::as_ref);
    checks.extend(OF_AGENT.iter().map(|(name, judge)| match status {
        Some(status) => judge(facts, status),
        None => Check::skipped(name, "no agent runs"),
    }));
    Checks { checks }
}

fn agent(facts: &Facts) -> Check {
    const NAME: &str = "agent";
    let start = "start `mesh-agent run`, or the unit that you run it by; its log says why it ended";
    match (&facts.membership, &facts.status) {
        (Err(error), _) => Check::failed(NAME, error, "`mesh-agent leave`, then join again"),
        (Ok(None), _) => Check::failed(
            NAME,
            "this host has not joined a mesh",
            "`mesh-agent join <token>`; the operator makes one with `meshctl token create`",
        ),
        (_, Err(error)) => Check::failed(NAME, error, start),
        (Ok(Some(_)), Ok(None)) => Check::failed(NAME, "no agent runs", start),
        (_, Ok(Some(status))) if let Some(why) = &status.reload_given_up => Check::failed(
            NAME,
            format!("the last reload was given up, and the program of before runs: {why}"),
            "mend the cause, then `systemctl reload mesh-agent`",
        ),
        (Ok(Some(_)), Ok(Some(status))) => Check::ok(
            NAME,
            format!("version {} runs as host {}", status.version, status.host),
        ),
    }
}

fn certificates(facts: &Facts) -> Check {
    const NAME: &str = "certificates";
    let status = facts.status.as_ref().ok().and_then(Option::as_ref);
    let leaves = status
        .iter()
        .flat_map(|s| s.workloads.iter().map(|w| &w.leaf).chain([&s.host_leaf]));
    let refused: Vec<String> = leaves
        .filter_map(|leaf| {
            let refused = leaf.refused.as_ref()?;
            Some(format!(
                "{}: {}: {}",
                leaf.identity, refused.reason, refused.message
            ))
        })
        .collect();
    if !refused.is_empty() {
        return Check::failed(
            NAME,
            "control refuses to sign",
            "`mesh-agent status` says what to do for each",
        )
        .about(refused);
    }
    let left = |c: &Certificate| c.not_after_s - facts.now_s;
    let list = |wanted: &dyn Fn(&Certificate) -> bool| -> Vec<String> {
        let all = facts.certificates.iter().filter(|c| wanted(c));
        all.map(|c| match left(c) {
            ..=0 => format!("{} ended {} ago", c.what, span(-left(c))),
            left => format!("{} ends in {}", c.what, span(left)),
        })
        .collect()
    };
    let ended = list(&|c| left(c) <= 0);
    if !ended.is_empty() {
        return Check::failed(
            NAME,
            "certificates have ended",
            "see `control` and `clock`: they are renewed as soon as control is reached and the clocks agree",
        )
        .about(ended);
    }
    let early = list(&|c| facts.now_s < c.not_before_s);
    if !early.is_empty() {
        let remedy = "set this host's clock: it is behind control's";
        return Check::failed(NAME, "certificates are not valid yet", remedy).about(early);
    }
    let late = list(&|c| alarm(c.not_before_s, c.not_after_s, facts.now_s).is_some());
    if !late.is_empty() {
        let remedy = "they should have been renewed: see `control`, and the agent's log; the issuing one is control's to renew";
        return Check::warning(NAME, "little life is left", remedy).about(late);
    }
    let autonomy = status.and_then(|s| s.autonomy_s);
    match autonomy {
        Some(left) => Check::ok(
            NAME,
            format!(
                "all are valid; calls go on without control for {}",
                span(left)
            ),
        ),
        None => Check::ok(
            NAME,
            format!("{} on disk are valid", facts.certificates.len()),
        ),
    }
}

fn control(_: &Facts, status: &Status) -> Check {
    const NAME: &str = "control";
    let control = &status.control;
    if control.stale_since_s.is_none() {
        return Check::ok(NAME, format!("live at {}", control.address));
    }
    if status.is_removed() {
        let remedy = "`mesh-agent leave`, then `mesh-agent join <token>` with a new token";
        return Check::failed(NAME, "the operator took this host out of the mesh", remedy);
    }
    let error = control.last_error.as_deref().unwrap_or("no answer yet");
    Check::failed(
        NAME,
        format!("not reached at {}: {error}", control.address),
        "see whether mesh-control runs, and whether this host reaches its address and port",
    )
}

fn clock(_: &Facts, status: &Status) -> Check {
    const NAME: &str = "clock";
    let Some(offset) = status.control.clock_offset_ms else {
        return Check::skipped(NAME, "control did not tell its time yet");
    };
    let seconds = offset as f64 / 1000.0;
    let way = if offset < 0 { "behind" } else { "ahead of" };
    let found = format!("{:.1} s {way} control's", seconds.abs());
    let remedy = "keep the clocks of all hosts by NTP (chrony, systemd-timesyncd): certificates are judged by them";
    match offset.unsigned_abs() {
        0..OFFSET_WARN_MS => Check::ok(NAME, found),
        OFFSET_WARN_MS..OFFSET_FAIL_MS => Check::warning(NAME, found, remedy),
        _ => Check::failed(NAME, found, remedy),
    }
}

fn index(facts: &Facts, status: &Status) -> Check {
    const NAME: &str = "index";
    let Some(index) = &status.index else {
        let remedy = "see `control`: no service of the mesh is known before it was reached once";
        return Check::failed(NAME, "the services of the mesh are not known", remedy);
    };
    if status.policies.is_none() {
        let remedy = "see `control`: nobody is let in before they came";
        return Check::failed(NAME, "the policies were never received", remedy);
    }
    if status.revocations_unknown {
        let remedy = "see `control`: it names them anew; until then nobody is believed";
        let found = "what was revoked can not be read from disk";
        return Check::failed(NAME, found, remedy);
    }
    let found = format!("{} services, revision {}", index.services, index.revision);
    let Some(since) = status.control.stale_since_s else {
        return Check::ok(NAME, format!("{found}, as control has it"));
    };
    let now_s = u64::try_from(facts.now_s).unwrap_or_default();
    let age_s = now_s.saturating_sub(since);
    let age = span(i64::try_from(age_s).unwrap_or(i64::MAX));
    let found = format!("{found}, {age} old");
    let remedy = "see `control`: new and moved services are not known";
    match age_s {
        0..STALE_FAIL_S => Check::warning(NAME, found, remedy),
        _ => Check::failed(NAME, found, remedy),
    }
}

fn names(facts: &Facts, status: &Status) -> Check {
    const NAME: &str = "names";
    let Some(names) = &status.names else {
        return Check::skipped(NAME, "`dns.enabled` is false");
    };
    let (wiring, server) = (&names.wiring, &names.server);
    if let Some(error) = &names.error {
        let found = format!("the host's resolver does not ask the agent at {server}: {error}");
        let remedy = "mend the cause, the agent tries again; docs/operations.md, Names, says which `dns.wiring` suits which resolver";
        return Check::failed(NAME, found, remedy);
    }
    let Some(resolved) = &facts.name else {
        return Check::skipped(NAME, "there is no service to ask for yet");
    };
    let name = &resolved.name;
    let remedy = names_remedy(names);
    match &resolved.answer {
        Err(error) => Check::failed(
            NAME,
            format!("{name} is not resolved (`dns.wiring` {wiring}): {error}"),
            remedy,
        ),
        Ok(answer) if answer.iter().any(|ip| resolved.expected.contains(ip)) => Check::ok(
            NAME,
            format!(
                "{name} is resolved to {} (`dns.wiring` {wiring})",
                answer[0]
            ),
        ),
        Ok(answer) => {
            let answer: Vec<String> = answer.iter().map(ToString::to_string).collect();
            let found = format!(
                "{name} is resolved to {}, which is not its address (`dns.wiring` {wiring})",
                answer.join(", ")
            );
            Check::failed(NAME, found, remedy)
        }
    }
}

/// What may stand between a resolver that was told of the agent and an answer.
fn names_remedy(names: &NamesStatus) -> String {
    let server = &names.server;
    match names.wiring.as_str() {
        "resolved" => "programs must ask systemd-resolved: make /etc/resolv.conf a link to \
             ../run/systemd/resolve/stub-resolv.conf, or use nss-resolve; `resolvectl status` shows the link's domain"
            .to_owned(),
        "dnsmasq" => format!(
            "dnsmasq must have been started anew with the file meshwork.conf of `dns.dnsmasq_dir` (`systemctl restart \
             dnsmasq`; mesh-names.path does it), its configuration must name that directory (`conf-dir=`), and its own address \
             must be the first of resolv.conf; names are answered at {server}"
        ),
        "resolv_conf" => "the agent must be the first server of the host's resolver: look at /etc/resolv.conf, \
             `dns.resolv_conf` and who writes the file"
            .to_owned(),
        _ => format!(
            "wiring is off: have the host's resolver ask {server} for the mesh's names, or set `dns.wiring`"
        ),
    }
}

fn capture(_: &Facts, status: &Status) -> Check {
    const NAME: &str = "capture";
    if !status.capture.closed.is_empty() {
        let remedy = "mend the cause, the agent tries again; services.d says whose they are";
        return Check::failed(NAME, "local ports or sockets could not be opened", remedy)
            .about(status.capture.closed.clone());
    }
    if !status.capture.enabled {
        let remedy = "only calls by local ports and sockets are the mesh's; run the agent with privileges to capture";
        return Check::warning(NAME, NOT_CAPTURED, remedy);
    }
    match &status.capture.error {
        Some(error) => Check::failed(
            NAME,
            format!("the kernel does not know the workloads: {error}"),
            "what was before stays in force; mend the cause, the agent tries again",
        ),
        None if status.capture.applied => match status.capture.reals_left_out {
            0 => Check::ok(NAME, "the kernel knows all workloads"),
            more => Check::warning(
                NAME,
                format!(
                    "{more} real addresses are not taken over: there are more than {REALS_MAX}"
                ),
                "let fewer services ask for `meshwork.io/capture: vip+real`; calls by name are not concerned",
            ),
        },
        None => Check::warning(NAME, "it is being set up", "wait, e.g. with --wait 30s"),
    }
}

fn door(_: &Facts, status: &Status) -> Check {
    const NAME: &str = "door";
    let door = &status.door;
    if let Some(error) = &door.error {
        let remedy = "what stood before stays; mend the cause, the agent tries again";
        return Check::failed(
            NAME,
            format!("the input door can not be kept: {error}"),
            remedy,
        );
    }
    if door.disarmed {
        let found =
            "control was not reached after the input door was changed: it refuses nothing new";
        let remedy = "see `control`: the door refuses as soon as control is reached, and the default gateway answers";
        return Check::failed(NAME, found, remedy);
    }
    let found = match door.repaired {
        0 => format!("plaintext callers are looked for at {} ports", door.ports),
        times => format!(
            "plaintext callers are looked for at {} ports; what other programs took away was put back {times} times",
            door.ports
        ),
    };
    if door.overflowed {
        let remedy = "`meshctl edges` is not whole; let fewer strangers reach the ports";
        return Check::warning(
            NAME,
            "there are more callers than can be told apart",
            remedy,
        );
    }
    Check::ok(NAME, found)
}

/// Whether control could not prove that this host's agent is at its address.
fn is_unproven(status: &Status) -> bool {
    let mut services = status.workloads.iter().flat_map(|w| &w.services);
    let code = Reason::AddressUnproven.code();
    services.any(|s| s.refused.as_ref().is_some_and(|r| r.reason == code))
}

fn mesh_port(facts: &Facts, status: &Status) -> Check {
    const NAME: &str = "mesh_port";
    let port = facts.mesh_port_number;
    match &facts.mesh_port {
        Err(error) => return Check::skipped(NAME, error),
        Ok(listeners) if listeners.is_empty() => {
            let remedy =
                "see `mesh.listen` and `mesh.listen_port` in agent.toml, and the agent's log";
            return Check::failed(NAME, format!("nobody listens on port {port}"), remedy);
        }
        Ok(_) => {}
    }
    if is_unproven(status) {
        let remedy = format!(
            "open port {port} of {} to the other hosts and to control, or correct the address (`mesh-agent join TOKEN --address`, then reload the agent)",
            status.address
        );
        let found = format!(
            "control does not reach the agent at {} port {port}",
            status.address
        );
        return Check::failed(NAME, found, remedy);
    }
    Check::ok(NAME, format!("the agent listens on port {port}"))
}

fn firewall(facts: &Facts, status: &Status) -> Check {
    const NAME: &str = "firewall";
    if !facts.captures {
        return Check::skipped(NAME, NOT_CAPTURED);
    }
    let drops = match &facts.kernel {
        Ok(found) => &found.input_drops,
        Err(error) => return Check::skipped(NAME, error),
    };
    let port = facts.mesh_port_number;
    if drops.is_empty() {
        return Check::ok(NAME, "nothing on this host drops what comes in");
    }
    let list = drops.join(", ");
    if is_unproven(status) {
        return Check::failed(
            NAME,
            format!("{list} drops what no rule lets in, and the mesh port is not reached"),
            format!("let TCP to port {port} in, e.g. `nft insert rule … tcp dport {port} accept`"),
        );
    }
    Check::ok(
        NAME,
        format!("{list} drops what no rule lets in; port {port} must be let in"),
    )
}

fn peers(facts: &Facts, _: &Status) -> Check {
    const NAME: &str = "peers";
    let peers = match &facts.peers {
        Ok(peers) => peers,
        Err(error) => return Check::skipped(NAME, error),
    };
    if peers.is_empty() {
        return Check::ok(NAME, "no other host is in use");
    }
    let silent = |health: &'static str| {
        let all = peers.iter();
        all.filter(move |p| p.took_ms.is_none() && p.health == health)
            .map(|p| {
                let reason = p.reason.as_deref().unwrap_or("not asked");
                format!("{} as {}: {reason}", p.address, p.account)
            })
    };
    let answering = peers.iter().filter(|p| p.took_ms.is_some()).count();
    let found = format!(
        "{answering} of {} agents that are in use answer",
        peers.len()
    );
    let failed: Vec<String> = silent("healthy").collect();
    if !failed.is_empty() {
        let remedy = "see whether those agents run and whether their mesh port is open to this host; docs/reasons.md says what each reason means";
        return Check::failed(NAME, found, remedy).about(failed);
    }
    let stale: Vec<String> = silent("stale").collect();
    if !stale.is_empty() {
        let remedy =
            "control has lost them too: bring the hosts back, or `meshctl delete host NAME`";
        return Check::warning(NAME, found, remedy).about(stale);
    }
    Check::ok(NAME, found)
}

fn files(_: &Facts, status: &Status) -> Check {
    const NAME: &str = "files";
    if status.file_problems.is_empty() {
        return Check::ok(
            NAME,
            format!("{} workloads are declared", status.workloads.len()),
        );
    }
    let remedy = "mend the files of services.d; what they said before stays in force";
    Check::failed(NAME, "files of services.d can not be used", remedy)
        .about(status.file_problems.iter().cloned())
}

fn workloads(_: &Facts, status: &Status) -> Check {
    const NAME: &str = "workloads";
    let mut found = Vec::new();
    for workload in &status.workloads {
        let account = &workload.account;
        found.extend(workload.problem.iter().map(|p| format!("{account}: {p}")));
        let services = workload.services.iter().map(|s| (&s.name, &s.refused));
        let refused = services.filter_map(|(name, refused)| Some((name, refused.as_ref()?)));
        let unproven = Reason::AddressUnproven.code();
        found.extend(
            refused
                .filter(|(_, refused)| refused.reason != unproven)
                .map(|(name, r)| format!("{name}: {}: {}", r.reason, r.message)),
        );
    }
    if found.is_empty() {
        return Check::ok(NAME, "all are found and listed");
    }
    let remedy = "`mesh-agent status` says what to do for each";
    Check::failed(NAME, "some are not found, or not listed by control", remedy).about(found)
}

fn ports(_: &Facts, status: &Status) -> Check {
    const NAME: &str = "ports";
    let services = status.workloads.iter().flat_map(|w| &w.services);
    let mut found: Vec<String> = services
        .flat_map(|s| s.problems.iter().map(move |p| format!("{}: {p}", s.name)))
        .collect();
    // Of these nobody knows who should hold the port.
    let ownerless = status
        .workloads
        .iter()
        .filter_map(|w| Some((w, w.problem.as_ref()?)));
    found.extend(ownerless.flat_map(|(workload, problem)| {
        let own = workload.services.iter().filter(|s| s.plaintext.is_empty());
        own.map(move |s| format!("{}: its owner is not found: {problem}", s.name))
    }));
    if found.is_empty() {
        // The input door looks at what comes from other hosts.
        let own = status.workloads.iter().flat_map(|w| &w.services);
        let own = own.filter(|s| s.plaintext.is_empty());
        let own: Vec<String> = own
            .flat_map(|s| s.ports.iter().map(u16::to_string))
            .collect();
        return Check::ok(
            NAME,
            match own.len() {
                0 => "no program of this host serves".to_owned(),
                _ => format!(
                    "each is held by the program that it belongs to; other programs of this host reach {} on loopback, past policy",
                    own.join(", ")
                ),
            },
        );
    }
    let remedy = "calls to these are refused: start the right program, stop the stranger, or correct the file";
    Check::failed(
        NAME,
        "ports are not served by the program that they belong to",
        remedy,
    )
    .about(found)
}

fn plaintext(_: &Facts, status: &Status) -> Check {
    const NAME: &str = "plaintext";
    let services = status.workloads.iter().flat_map(|w| &w.services);
    let beyond = services.filter(|s| !s.plaintext.is_empty());
    let found: Vec<String> = beyond
        .map(|s| {
            format!(
                "{} goes on to {} in plaintext",
                s.name,
                s.plaintext.join(", ")
            )
        })
        .collect();
    if found.is_empty() {
        return Check::ok(NAME, "no service goes on in plaintext beyond this host");
    }
    let remedy = "let the servers join where they can; else let only this host reach them";
    Check::warning(NAME, "calls leave this host without encryption", remedy).about(found)
}

fn limits(_: &Facts, status: &Status) -> Check {
    const NAME: &str = "limits";
    let near = status
        .in_use
        .iter()
        .filter(|u| u.max > 0 && USED_WARN <= u.used.saturating_mul(100) / u.max);
    let near: Vec<String> = near
        .map(|u| format!("{}: {} of {}", u.limit, u.used, u.max))
        .collect();
    if near.is_empty() {
        return Check::ok(NAME, "no bound is near");
    }
    let remedy =
        "new calls are refused with `overloaded` at the bound: see docs/reference.md, Bounds";
    Check::warning(NAME, "bounds of the data path are nearly reached", remedy).about(near)
}

#[cfg(test)]
mod tests;
