//! What an operator should know of a resource that was taken over: what this version does not do, and what it
//! does not yet concern. Nothing that is accepted and without effect is passed over in silence.

use mesh_api::resource::{Object, PolicySpec, Resource};
use mesh_core::service::Transport;

use super::Catalogue;
use super::objects::Service;

/// Why `strict` does not hold yet.
pub(crate) const STRICT: &str = "transport `strict` is not enforced by this version: who reaches the program's own \
     port gets in without the mesh; bind the program to loopback or firewall its port";
const CIDR: &str = "callers by `cidr` are not enforced by this version: they name plaintext callers, and those are \
     neither let in nor kept out; bind the program to loopback or firewall its port";

/// Whether a service says something that this version does not do.
pub(crate) fn is_unenforced(service: &Service) -> bool {
    service.transport == Transport::Strict
}

/// What there is to say of a resource once all of its file are in the catalogue.
pub(super) fn of(now: &Catalogue, resource: &Resource) -> Vec<String> {
    match resource {
        Resource::Service(object) => {
            let name = object.to_core().map(|declared| declared.name).ok();
            let service = name.and_then(|name| now.services.get(&name));
            let strict = service.is_some_and(|s| is_unenforced(s));
            strict.then(|| STRICT.to_owned()).into_iter().collect()
        }
        Resource::Policy(object) => {
            let mut rules = object.spec.rules.iter();
            let cidr = rules.any(|rule| rule.from.iter().any(|caller| caller.cidr.is_some()));
            let cidr = cidr.then(|| CIDR.to_owned());
            cidr.into_iter().chain(unmatched(now, object)).collect()
        }
    }
}

/// Says of a policy below the mesh's that it decides about nothing so far: mostly a mistyped name.
fn unmatched(now: &Catalogue, policy: &Object<PolicySpec>) -> Option<String> {
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
