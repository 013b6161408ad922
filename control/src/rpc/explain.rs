//! `Explain`: what the policies of now let a host's own identities do, for `mesh-agent explain`.

use mesh_api::proto;
use mesh_core::identity::{Identity, SpiffeId};
use mesh_core::names::ServiceName;
use mesh_core::policy::Target;
use mesh_core::reason::Reason;

use super::{name, port};
use crate::catalogue::Catalogue;
use crate::catalogue::authz;
use crate::catalogue::objects::Host;
use crate::refusal::Refusal;

/// Most callers of one question: as many as a host may have workloads, and the host itself.
const CALLERS_MAX: usize = 257;

pub(super) fn explain(
    now: &Catalogue,
    host: &Host,
    request: &proto::ExplainRequest,
) -> Result<proto::ExplainResponse, Refusal> {
    let count = request.callers.len();
    if CALLERS_MAX < count {
        return Err(Refusal::invalid(format!(
            "{count} callers in one question; at most {CALLERS_MAX} may be"
        )));
    }
    let service = request.service.as_ref();
    let service = service.ok_or_else(|| Refusal::invalid("the question names no service"))?;
    let target = Target {
        service: ServiceName {
            namespace: name(&service.namespace)?,
            name: name(&service.name)?,
        },
        port: port(request.port)?.ok_or_else(|| Refusal::invalid("the question names no port"))?,
    };
    let policies = authz::policies_of(now, &target.service);
    let decide = |caller: &String| {
        let id = SpiffeId::parse(caller).map_err(|e| Refusal::invalid(e.to_string()))?;
        own(now, host, &id)?;
        let decision = authz::decide(&policies, &id, target.clone());
        Ok(proto::Decision {
            outcome: decision.outcome.to_owned(),
            rule: decision.by,
        })
    };
    let decisions = request.callers.iter().map(decide);
    Ok(proto::ExplainResponse {
        decisions: decisions.collect::<Result<_, Refusal>>()?,
    })
}

/// A host asks for itself only: what others may do is none of its business.
fn own(now: &Catalogue, host: &Host, id: &SpiffeId) -> Result<(), Refusal> {
    let allowed = match &id.identity {
        Identity::Host(name) => *name == host.name,
        Identity::Workload(account) => host.scope.allows_account(account),
        _ => false,
    };
    if allowed && id.trust_domain == now.settings.trust_domain {
        return Ok(());
    }
    let message = format!("host {} may not ask for {id}", host.name);
    Err(Refusal::new(Reason::OutOfScope, message))
}
