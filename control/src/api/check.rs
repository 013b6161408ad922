//! What an operator would look at in a mesh, named and judged: `meshctl check`.

use std::collections::BTreeSet;
use std::sync::Arc;

use mesh_api::check::{Check, Checks};
use mesh_api::proto;
use mesh_core::edge::{EdgeCaller, EdgeVerdict};
use mesh_core::expiry::Alarm;
use mesh_core::names::HostUid;
use mesh_core::policy::{Caller, Enforce, Level, PolicySet};
use mesh_core::reason::Reason;
use mesh_core::service::Transport;
use mesh_runtime::clock::rfc3339;
use serde_json::{Value, json};

use super::edges;
use crate::catalogue::objects::Host;
use crate::catalogue::{Catalogue, authz, warnings};
use crate::clock;
use crate::clocks::Offsets;
use crate::control::Control;
use crate::edges::EdgesByHost;
use crate::expiry::{self, Certificate};

/// A difference of clocks that is worth a look, and one at which certificates are judged wrongly, milliseconds.
const OFFSET_WARN_MS: u64 = 5_000;
const OFFSET_FAIL_MS: u64 = 60_000;

/// What the checks are made of.
struct Facts<'a> {
    now: &'a Catalogue,
    authorities: [Certificate; 2],
    autonomy_s: u64,
    /// Hosts that fell silent together and are held as live.
    held: u64,
    clocks: Offsets,
    /// Hosts that are open to plaintext now.
    open: Vec<(HostUid, proto::Bypass)>,
    edges: EdgesByHost,
    now_ms: u64,
}

/// The answer, with the time that a caller compares its clock with.
pub(crate) fn answer(control: &Control) -> Value {
    let now = control.writer.now();
    let facts = Facts {
        now: &now,
        authorities: expiry::certificates(control),
        autonomy_s: control.leaves.autonomy().as_secs(),
        held: control.leases.held(),
        clocks: control.clocks.all(),
        open: control.bypasses.open(clock::now_ms()),
        edges: control.edges.all(),
        now_ms: clock::now_ms(),
    };
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "timeMs": clock::now_ms(),
        "checks": judge(&facts).checks,
    })
}

fn judge(facts: &Facts<'_>) -> Checks {
    let policies = authz::policies(facts.now);
    Checks {
        checks: vec![
            certificates(facts),
            hosts(facts),
            host_clocks(facts),
            bypasses(facts),
            addresses(facts),
            versions(facts),
            reports(facts),
            endpoints(facts),
            rules(&policies),
            everyone(facts, &policies),
            audit(&policies),
            unmatched(facts),
            transport(facts),
            plaintext(facts),
        ],
    }
}

fn certificates(facts: &Facts<'_>) -> Check {
    const NAME: &str = "certificates";
    let mut failed = Vec::new();
    let mut late = Vec::new();
    for one in &facts.authorities {
        let ends = rfc3339(one.life.not_after_s.max(0).cast_unsigned());
        let line = format!("the {} ends {ends}", one.name);
        match one.alarm {
            None => {}
            Some(Alarm::Plan | Alarm::Act) => late.push(line),
            Some(Alarm::Urgent | Alarm::Over) => failed.push(line),
        }
    }
    let remedy = "no certificate lives longer than what issued it: make a new authority in time (docs/operations.md)";
    if !failed.is_empty() {
        return Check::failed(NAME, "the authority ends within a week, or has", remedy)
            .about(failed);
    }
    if !late.is_empty() {
        return Check::warning(NAME, "the authority is near its end", remedy).about(late);
    }
    let ends = facts.authorities.iter().map(|one| one.life.not_after_s);
    Check::ok(
        NAME,
        format!(
            "root and issuer live until {} at least; hosts run without control for {} h",
            rfc3339(ends.min().unwrap_or_default().max(0).cast_unsigned()),
            facts.autonomy_s / 3600
        ),
    )
}

fn hosts(facts: &Facts<'_>) -> Check {
    const NAME: &str = "hosts";
    let all = facts.now.hosts.values();
    let stale = all.filter(|h| !h.live).map(|h| {
        let since = rfc3339(h.since_s);
        format!("{} ({}), silent since {since}", h.name, h.address)
    });
    let stale: Vec<String> = stale.collect();
    if 0 < facts.held {
        let remedy = "suspect control's own network first; their endpoints are kept for 10 minutes";
        let found = format!("{} hosts fell silent at once", facts.held);
        return Check::failed(NAME, found, remedy).about(stale);
    }
    let count = facts.now.hosts.len();
    if stale.is_empty() {
        return Check::ok(NAME, format!("all {count} are live"));
    }
    let found = format!("{} of {count} are silent", stale.len());
    let remedy = "bring them back (`mesh-agent check` there), or `meshctl delete host NAME`";
    Check::warning(NAME, found, remedy).about(stale)
}

fn host_clocks(facts: &Facts<'_>) -> Check {
    const NAME: &str = "host_clocks";
    let off = |least_ms: u64| -> Vec<String> {
        let off = facts.clocks.iter();
        let off = off.filter(|(_, offset)| least_ms <= offset.unsigned_abs());
        off.filter_map(|(uid, offset)| {
            let seconds = offset.unsigned_abs() / 1000;
            let way = if *offset < 0 { "behind" } else { "ahead" };
            Some(format!(
                "{} is {seconds} s {way}",
                facts.now.hosts.get(uid)?.name
            ))
        })
        .collect()
    };
    let remedy = "keep the clocks of all hosts by NTP (chrony, systemd-timesyncd): certificates are judged by them";
    let failed = off(OFFSET_FAIL_MS);
    if !failed.is_empty() {
        return Check::failed(NAME, "clocks of hosts are far from control's", remedy).about(failed);
    }
    let warned = off(OFFSET_WARN_MS);
    if !warned.is_empty() {
        return Check::warning(NAME, "clocks of hosts differ from control's", remedy).about(warned);
    }
    Check::ok(NAME, "the clocks of all live hosts agree with control's")
}

fn bypasses(facts: &Facts<'_>) -> Check {
    const NAME: &str = "bypasses";
    let open = facts.open.iter().filter_map(|(uid, bypass)| {
        let name = &facts.now.hosts.get(uid)?.name;
        let until = rfc3339(bypass.until_ms / 1000);
        Some(format!(
            "{name} until {until}, by {} ({})",
            bypass.by, bypass.why
        ))
    });
    let open: Vec<String> = open.collect();
    if open.is_empty() {
        return Check::ok(NAME, "no host is opened to plaintext");
    }
    let found =
        "hosts are opened by their root: plaintext passes there, whatever transport and policy say";
    let remedy = "they close by themselves; `mesh-agent bypass --end` there closes them before";
    Check::warning(NAME, found, remedy).about(open)
}

fn addresses(facts: &Facts<'_>) -> Check {
    const NAME: &str = "addresses";
    let all = facts.now.hosts.values();
    let unproven = all.filter(|h| h.live && h.doubted && !h.proven);
    let (serving, calling): (Vec<_>, Vec<_>) = unproven.partition(|h| h.offers().next().is_some());
    let line = |h: &Arc<Host>| format!("{} at {} port {}", h.name, h.address, h.mesh_port);
    if serving.is_empty() && !calling.is_empty() {
        let found = "control does not reach the agents of these hosts, which serve nothing";
        let remedy = "nothing is to be done as long as they only call; open the port to control and to the other hosts before \
             they serve";
        return Check::warning(NAME, found, remedy).about(calling.into_iter().map(line));
    }
    if serving.is_empty() {
        return Check::ok(NAME, "the agents of all live hosts that serve were reached");
    }
    let remedy = "open the port to control and to the other hosts, or let the host join with its right `--address`";
    let found = "control does not reach the agents of these hosts: what they serve is not listed";
    Check::failed(NAME, found, remedy).about(serving.into_iter().map(line))
}

fn versions(facts: &Facts<'_>) -> Check {
    const NAME: &str = "versions";
    let own = env!("CARGO_PKG_VERSION");
    let all = facts.now.hosts.values();
    let others = all.filter(|h| h.live && !h.version.is_empty() && minor(&h.version) != minor(own));
    let others: Vec<String> = others
        .map(|h| format!("{} has {}", h.name, h.version))
        .collect();
    if others.is_empty() {
        return Check::ok(NAME, format!("all live hosts have {}", minor(own)));
    }
    let remedy = "one minor version apart works: upgrade control first, then the hosts";
    Check::warning(
        NAME,
        format!("hosts have another version than control ({own})"),
        remedy,
    )
    .about(others)
}

/// `0.1` of `0.1.7`.
fn minor(version: &str) -> &str {
    let mut dots = version.match_indices('.');
    let second = dots.nth(1).map_or(version.len(), |(at, _)| at);
    &version[..second]
}

fn reports(facts: &Facts<'_>) -> Check {
    const NAME: &str = "reports";
    let mut found = Vec::new();
    for host in facts.now.hosts.values().filter(|h| h.live) {
        let problems = facts.now.problems_of(host).into_iter();
        // That is a check of its own.
        let problems = problems.filter(|p| p.reason != Reason::AddressUnproven);
        found.extend(problems.map(|p| format!("{}: {}: {}", host.name, p.reason, p.message)));
    }
    if found.is_empty() {
        return Check::ok(NAME, "all that hosts offer is listed");
    }
    let remedy =
        "mend what each line says on its host; docs/reasons.md says what each reason means";
    Check::failed(NAME, "hosts offer what is not listed", remedy).about(found)
}

fn endpoints(facts: &Facts<'_>) -> Check {
    const NAME: &str = "endpoints";
    let answers = |name| {
        let known = facts.now.endpoints_of(name);
        known.is_some_and(|e| {
            let healthy = mesh_core::service::Health::Healthy;
            e.list.iter().any(|e| e.health == healthy)
        })
    };
    let names = facts.now.services.keys();
    let without: Vec<String> = names
        .filter(|name| !answers(name))
        .map(ToString::to_string)
        .collect();
    if without.is_empty() {
        let count = facts.now.services.len();
        return Check::ok(NAME, format!("each of {count} services is served"));
    }
    let remedy = "start their programs and hosts, or `meshctl delete service NAME`";
    Check::warning(NAME, "services are served by no live host", remedy).about(without)
}

fn rules(policies: &PolicySet) -> Check {
    const NAME: &str = "policies";
    if policies.policies.iter().all(|p| p.rules.is_empty()) {
        let remedy = "apply a policy (docs/reference.md, Resources): without a rule nobody may call anything";
        return Check::failed(
            NAME,
            "no policy allows anything: all calls are denied",
            remedy,
        );
    }
    Check::ok(NAME, format!("{} are in force", policies.policies.len()))
}

fn everyone(facts: &Facts<'_>, policies: &PolicySet) -> Check {
    const NAME: &str = "policy_everyone";
    let own = &facts.now.settings.trust_domain;
    let lets_all = |caller: &Caller| matches!(caller, Caller::TrustDomain(td) if td == own);
    let wide = policies.policies.iter().filter(|policy| {
        policy.level == Level::Mesh && policy.rules.iter().any(|r| r.callers.iter().any(lets_all))
    });
    let wide: Vec<String> = wide.map(|p| p.name.to_string()).collect();
    if wide.is_empty() {
        return Check::ok(NAME, "no mesh-wide policy lets everyone in");
    }
    let names = facts.now.services.keys();
    let open = names.filter(|name| {
        let deciding = mesh_core::policy::deciding(policies, name);
        deciding.iter().any(|p| p.level == Level::Mesh)
    });
    let open: Vec<String> = open.map(ToString::to_string).collect();
    let found = format!(
        "policy {} lets everyone of the mesh call {} of {} services",
        wide.join(", "),
        open.len(),
        facts.now.services.len()
    );
    let remedy = "give each namespace or service a policy of its own, with `enforce: audit` first, then delete this one";
    Check::warning(NAME, found, remedy).about(open)
}

fn audit(policies: &PolicySet) -> Check {
    const NAME: &str = "policy_audit";
    let audited = policies.policies.iter();
    let audited = audited.filter(|p| p.enforce == Enforce::Audit);
    let audited: Vec<String> = audited
        .map(|p| format!("{} of {}", p.name, p.level))
        .collect();
    if audited.is_empty() {
        return Check::ok(NAME, "all policies are enforced");
    }
    let remedy = "look at what they would refuse (`meshctl edges`), then set `enforce: on`";
    Check::warning(NAME, "policies only count what they would refuse", remedy).about(audited)
}

fn unmatched(facts: &Facts<'_>) -> Check {
    const NAME: &str = "policy_unmatched";
    let policies = facts.now.policies.values();
    let found = policies.filter_map(|policy| {
        let why = warnings::unmatched(facts.now, &policy.object)?;
        Some(format!("{}: {why}", policy.object.metadata.name))
    });
    let found: Vec<String> = found.collect();
    if found.is_empty() {
        return Check::ok(NAME, "each policy decides about a service");
    }
    let remedy = "correct the name, or delete the policy";
    Check::warning(NAME, "policies decide about nothing", remedy).about(found)
}

fn transport(facts: &Facts<'_>) -> Check {
    const NAME: &str = "transport";
    let services = facts.now.services.values();
    let strict = services
        .filter(|s| s.transport == Transport::Strict)
        .count();
    let found = format!(
        "{strict} of {} services are strict",
        facts.now.services.len()
    );
    let quiet = edges::quiet(facts.now, &facts.edges, facts.now_ms);
    if quiet.is_empty() {
        return Check::ok(NAME, found);
    }
    let found = format!(
        "{found}; the ports below saw no plaintext caller for long: `strict` would refuse nobody"
    );
    Check::ok(NAME, found).about(quiet.iter().map(|((service, port), since_ms)| {
        format!("{service}:{port}, since {}", rfc3339(since_ms / 1000))
    }))
}

fn plaintext(facts: &Facts<'_>) -> Check {
    const NAME: &str = "plaintext";
    let mut found = BTreeSet::new();
    for host in facts.now.hosts.values() {
        for (_, offer) in host.offers().filter(|(_, o)| !o.plaintext.is_empty()) {
            let beyond: Vec<String> = offer.plaintext.iter().map(ToString::to_string).collect();
            found.insert(format!(
                "{} goes on in plaintext beyond {} to {}",
                offer.service,
                host.name,
                beyond.join(", ")
            ));
        }
    }
    for (key, edge) in edges::joined(facts.now, &facts.edges) {
        let EdgeCaller::Plaintext(address) = key.caller else {
            continue;
        };
        if key.verdict != EdgeVerdict::Refused {
            let since = rfc3339(edge.first_ms / 1000);
            let (service, port) = (&key.service, key.port);
            found.insert(format!(
                "{service}:{port} is called in plaintext from {address} since {since}"
            ));
        }
    }
    if found.is_empty() {
        return Check::ok(NAME, "every edge that is known is mTLS");
    }
    let remedy =
        "let the servers join where they can; else let only the hosts that front them reach them";
    Check::warning(NAME, "calls are carried without encryption", remedy).about(found)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use mesh_api::check::Verdict;

    use super::*;
    use crate::ca::Life;
    use crate::catalogue::objects::{Digest, Offer, Scope, Settings, Workload};

    const NOW_S: i64 = 1_800_000_000;
    const DAY_S: i64 = 86_400;

    fn settings() -> Settings {
        Settings {
            trust_domain: "corp.example.com".parse().unwrap(),
            dns_suffix: "mesh.internal".to_owned(),
            vip4_range: "252.64.0.0/12".to_owned(),
            vip6_range: "fd6d:6573:6800::/64".to_owned(),
            addresses: vec![],
            bundle: 1,
        }
    }

    fn host(uid: char, offers: Vec<Offer>) -> Host {
        let account = mesh_core::names::Account::parse("shop/web").unwrap();
        Host {
            uid: String::from_iter([uid; 32]).parse().unwrap(),
            name: "vm-1".parse().unwrap(),
            network: mesh_core::names::Network::default_network(),
            address: "10.0.0.1".parse().unwrap(),
            mesh_port: 7441,
            version: String::new(),
            proven: false,
            doubted: true,
            key: Digest::of(b"key"),
            token: String::new(),
            scope: Scope {
                identities: vec![],
                services: vec![],
                networks: vec![],
            },
            bundle: 1,
            live: true,
            since_s: 0,
            workloads: vec![Workload { account, offers }],
            created_s: 0,
            revision: 1,
        }
    }

    fn verdicts(change: impl FnOnce(&mut Facts<'_>)) -> BTreeMap<String, Verdict> {
        verdicts_of(&Catalogue::new(7, settings()), change)
    }

    fn verdicts_of(
        now: &Catalogue,
        change: impl FnOnce(&mut Facts<'_>),
    ) -> BTreeMap<String, Verdict> {
        let mut facts = Facts {
            now,
            authorities: [
                authority(10 * 365, 9 * 365 * DAY_S),
                authority(365, 364 * DAY_S),
            ],
            autonomy_s: 115_200,
            held: 0,
            clocks: Offsets::default(),
            open: Vec::new(),
            edges: EdgesByHost::default(),
            now_ms: NOW_S.unsigned_abs() * 1000,
        };
        change(&mut facts);
        let checks = judge(&facts).checks;
        checks.into_iter().map(|c| (c.name, c.verdict)).collect()
    }

    fn authority(life_days: i64, left_s: i64) -> Certificate {
        let not_after_s = NOW_S + left_s;
        let life = Life {
            not_before_s: not_after_s - life_days * DAY_S,
            not_after_s,
        };
        Certificate::at("issuer", life, NOW_S)
    }

    #[test]
    fn an_address_that_nobody_needs_is_no_failure() {
        let offer = Offer {
            service: mesh_core::names::ServiceName::parse("shop/web").unwrap(),
            ports: vec![],
            transport: Transport::Permissive,
            healthy: true,
            plaintext: vec![],
        };
        let (calls, serves) = (host('a', vec![]), host('b', vec![offer]));
        let verdict = |hosts: &[&Host]| {
            let mut now = Catalogue::new(7, settings());
            for host in hosts {
                now.hosts
                    .insert(host.uid.clone(), Arc::new(Host::clone(host)));
            }
            verdicts_of(&now, |_| ())["addresses"]
        };
        assert_eq!(verdict(&[]), Verdict::Ok);
        assert_eq!(verdict(&[&calls]), Verdict::Warning);
        assert_eq!(verdict(&[&calls, &serves]), Verdict::Failed);
    }

    /// The thresholds are those of `mesh_core::expiry`, as in log, metrics and `meshctl status`.
    #[test]
    fn an_authority_is_named_in_time() {
        let with = |life_days: i64, left_s: i64| {
            verdicts(|f| f.authorities[1] = authority(life_days, left_s))["certificates"]
        };
        assert_eq!(with(365, 364 * DAY_S), Verdict::Ok);
        assert_eq!(with(365, 60 * DAY_S + 1), Verdict::Ok);
        assert_eq!(with(365, 60 * DAY_S), Verdict::Warning);
        assert_eq!(with(365, 7 * DAY_S + 1), Verdict::Warning);
        assert_eq!(with(365, 7 * DAY_S), Verdict::Failed);
        assert_eq!(with(365, -1), Verdict::Failed);
        // One that lives for a month only is no cause for a warning on its first day, nor a failure on its last.
        assert_eq!(with(30, 29 * DAY_S), Verdict::Ok);
        assert_eq!(with(30, 10 * DAY_S), Verdict::Warning);
        assert_eq!(with(30, DAY_S), Verdict::Warning);
        assert_eq!(with(30, 0), Verdict::Failed);
    }

    #[test]
    fn an_empty_mesh_lets_nobody_in_and_silence_at_once_is_suspected() {
        let found = verdicts(|f| f.held = 3);
        assert_eq!(found["policies"], Verdict::Failed);
        assert_eq!(found["hosts"], Verdict::Failed);
        assert_eq!(verdicts(|_| ())["hosts"], Verdict::Ok);
    }
}
