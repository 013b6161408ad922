//! What an operator should know of a resource that was taken over: what this version does not do, and what it
//! does not yet concern. Nothing that is accepted and without effect is passed over in silence.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use mesh_api::resource::{Object, PolicySpec, Resource};
use mesh_core::names::ServiceName;
use mesh_core::policy::{Caller, Cidr, Level, PolicySet, Target, plaintext_door};
use mesh_core::service::Transport;

use super::objects::Service;
use super::{Catalogue, authz};

/// Callers that a warning names; `meshctl edges` has all.
const NAMED_MAX: usize = 3;

/// A plaintext caller that a called host told of, and of which it did not refuse all calls.
pub(crate) type PlaintextCaller = (ServiceName, u16, IpAddr);

/// Why an exception has no effect.
const NOTHING_EXCEPTED: &str = "`meshwork.io/plaintext-from` excepts callers from transport `strict`, and the service \
     is permissive: plaintext callers are judged by policy alone";

/// What there is to say of a resource once all of its file are in the catalogue.
pub(super) fn of(now: &Catalogue, resource: &Resource) -> Vec<String> {
    match resource {
        Resource::Service(object) => {
            let name = object.to_core().map(|declared| declared.name).ok();
            let service = name.and_then(|name| now.services.get(&name));
            let needless = service.is_some_and(|s| {
                s.transport == Transport::Permissive && !s.plaintext_from.is_empty()
            });
            needless
                .then(|| NOTHING_EXCEPTED.to_owned())
                .into_iter()
                .collect()
        }
        Resource::Policy(object) => {
            let mut warnings: Vec<String> = unmatched(now, object).into_iter().collect();
            warnings.extend(unmet(now, object));
            warnings
        }
    }
}

/// Ports that no service of a policy has, and hosts that are not in the mesh: rules that match nobody so far.
fn unmet(now: &Catalogue, policy: &Object<PolicySpec>) -> Vec<String> {
    let own = &now.settings.trust_domain;
    // It was checked when it came.
    let Ok(policy) = policy.to_core(own) else {
        return Vec::new();
    };
    let services = now.services.values();
    let services: Vec<&Arc<Service>> = services
        .filter(|s| covers(&policy.level, &s.name))
        .collect();
    let mut warnings = Vec::new();
    for rule in &policy.rules {
        let unknown = |port: &&u16| {
            !services
                .iter()
                .any(|s| s.ports.iter().any(|p| p.number == **port))
        };
        // Where there is no service that is all there is to say.
        for port in rule
            .ports
            .iter()
            .filter(unknown)
            .filter(|_| !services.is_empty())
        {
            warnings.push(format!(
                "rule {} names port {port}, which no service has that the policy is for",
                rule.name
            ));
        }
        for caller in &rule.callers {
            if let Caller::Host { trust_domain, name } = caller
                && trust_domain == own
                && !now.hosts.values().any(|host| name.matches(&host.name))
            {
                warnings.push(format!(
                    "rule {} lets in {caller}, and the mesh has no such host now",
                    rule.name
                ));
            }
        }
    }
    warnings
}

fn covers(level: &Level, service: &ServiceName) -> bool {
    match level {
        Level::Mesh => true,
        Level::Namespace(namespace) => *namespace == service.namespace,
        Level::Service(name) => name == service,
    }
}

/// From where plaintext callers of one port are let in, before a change and after it.
struct Doors<'a> {
    of: (&'a ServiceName, u16),
    old: Vec<Cidr>,
    new: Vec<Cidr>,
}

/// The plaintext callers that were let in `before` and are not any more.
pub(super) fn cut_off<'a>(
    before: &Catalogue,
    after: &Catalogue,
    seen: &'a BTreeSet<PlaintextCaller>,
) -> Vec<&'a PlaintextCaller> {
    let (old, new) = (authz::policies(before), authz::policies(after));
    let mut at: Option<Doors<'_>> = None;
    let mut cut = Vec::new();
    // Sorted: all callers of one port come together.
    for caller in seen {
        let (service, port, address) = caller;
        let of = (service, *port);
        let doors = match at.take() {
            Some(doors) if doors.of == of => doors,
            _ => Doors {
                of,
                old: let_in(before, &old, service, *port),
                new: let_in(after, &new, service, *port),
            },
        };
        let within = |ranges: &[Cidr]| ranges.iter().any(|range| range.contains(*address));
        if within(&doors.old) && !within(&doors.new) {
            cut.push(caller);
        }
        at = Some(doors);
    }
    cut
}

/// From where plaintext callers of a port are let in.
fn let_in(now: &Catalogue, policies: &PolicySet, service: &ServiceName, port: u16) -> Vec<Cidr> {
    let Some(service) = now.services.get(service) else {
        return Vec::new();
    };
    let target = Target {
        service: service.name.clone(),
        port,
    };
    let mut door = plaintext_door(
        policies,
        &target,
        service.transport,
        &service.plaintext_from,
    );
    door.open.append(&mut door.audited);
    door.open
}

/// Says of a resource whom its change cuts off.
pub(super) fn of_cut_off(resource: &Resource, cut: &[&PlaintextCaller]) -> Option<String> {
    let namespace =
        |name: &ServiceName, of: Option<&str>| of.is_none_or(|ns| ns == name.namespace.as_str());
    let concerns = |name: &ServiceName| match resource {
        Resource::Service(object) => {
            let of = object.metadata.namespace.as_deref().unwrap_or("default");
            namespace(name, Some(of)) && object.metadata.name == name.name.as_str()
        }
        Resource::Policy(object) => {
            let service = object.spec.service.as_deref();
            namespace(name, object.metadata.namespace.as_deref())
                && service.is_none_or(|s| s == name.name.as_str())
        }
    };
    let lost: Vec<String> = cut
        .iter()
        .filter(|(name, _, _)| concerns(name))
        .map(|(name, port, address)| format!("{address} of {name} port {port}"))
        .collect();
    let more = match lost.len() {
        0 => return None,
        count if NAMED_MAX < count => " and others (`meshctl edges --plaintext`)",
        _ => "",
    };
    let named = lost
        .iter()
        .take(NAMED_MAX)
        .map(String::as_str)
        .collect::<Vec<_>>();
    let way = match resource {
        Resource::Service(_) => "`meshwork.io/plaintext-from` keeps them",
        Resource::Policy(_) => "a rule with `cidr` keeps them, `enforce: audit` only counts them",
    };
    Some(format!(
        "{} plaintext caller(s) that were seen are no longer let in: {}{more}; {way}",
        lost.len(),
        named.join(", ")
    ))
}

/// Says of a policy below the mesh's that it decides about nothing so far: mostly a mistyped name.
pub(crate) fn unmatched(now: &Catalogue, policy: &Object<PolicySpec>) -> Option<String> {
    let namespace = policy.metadata.namespace.as_deref()?;
    let mut of_namespace = now
        .services
        .keys()
        .filter(|s| s.namespace.as_str() == namespace);
    let (found, what) = match policy.spec.service.as_deref() {
        None => (
            of_namespace.next().is_some(),
            format!("the namespace {namespace} has none"),
        ),
        Some(service) => (
            of_namespace.any(|s| s.name.as_str() == service),
            format!("there is no {namespace}/{service}"),
        ),
    };
    (!found).then(|| format!("no service matches yet: {what}"))
}

/// Said after a deletion that left no rule at any level.
pub(crate) fn of_no_rule(now: &Catalogue) -> Option<&'static str> {
    let mut policies = now.policies.values();
    let none = policies.all(|policy| policy.object.spec.rules.is_empty());
    none.then_some("no policy is left that allows anything: all calls are denied")
}
