//! What an operator should know of a resource that was taken over: what this version does not do, and what it
//! does not yet concern. Nothing that is accepted and without effect is passed over in silence.

use mesh_api::resource::{Object, PolicySpec, Resource};
use mesh_core::service::Transport;

use super::Catalogue;

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
        Resource::Policy(object) => unmatched(now, object).into_iter().collect(),
    }
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
