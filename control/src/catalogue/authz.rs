//! Who may call what, by the policies of now. Called agents decide; this says what they will.

use std::net::IpAddr;
use std::sync::Arc;

use mesh_core::identity::SpiffeId;
use mesh_core::names::ServiceName;
use mesh_core::policy::{Cidr, PolicySet, Target, authorize, deciding, plaintext_door};
use mesh_core::service::Transport;

use super::Catalogue;
use super::objects::{Policy, Service};

/// What the policies say of one call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Decision {
    /// `allowed`, `audited` or `denied`.
    pub outcome: &'static str,
    /// `policy/rule` that allows, else the policies that decided.
    pub by: String,
}

/// All policies, as called agents have them.
pub(crate) fn policies(now: &Catalogue) -> PolicySet {
    select(now, |_| true)
}

/// The policies that may decide about one service. Only these are read: agents ask for it.
pub(crate) fn policies_of(now: &Catalogue, service: &ServiceName) -> PolicySet {
    select(now, |policy| {
        let (metadata, spec) = (&policy.object.metadata, &policy.object.spec);
        let namespace = metadata.namespace.as_deref();
        namespace.is_none_or(|ns| ns == service.namespace.as_str())
            && (spec.service.as_deref()).is_none_or(|name| name == service.name.as_str())
    })
}

fn select(now: &Catalogue, wanted: impl Fn(&Policy) -> bool) -> PolicySet {
    let own = &now.settings.trust_domain;
    let all = now.policies.values().filter(|policy| wanted(policy));
    // They were checked when they came.
    let all = all.filter_map(|policy| policy.object.to_core(own).ok());
    PolicySet {
        revision: now.policies_revision,
        policies: all.map(Arc::new).collect(),
    }
}

/// What the called agent will decide.
pub(crate) fn decide(policies: &PolicySet, caller: &SpiffeId, target: Target) -> Decision {
    match authorize(policies, caller, target) {
        Ok(permit) => Decision {
            outcome: if permit.audited() {
                "audited"
            } else {
                "allowed"
            },
            by: permit.rule().to_owned(),
        },
        Err(denial) => Decision {
            outcome: "denied",
            by: denial.decided_by,
        },
    }
}

/// What becomes of a plaintext caller at the called host's input door.
pub(crate) fn decide_plaintext(
    policies: &PolicySet,
    service: &Service,
    caller: IpAddr,
    target: &Target,
) -> Decision {
    let from = &service.plaintext_from;
    let door = plaintext_door(policies, target, service.transport, from);
    let within = |ranges: &[Cidr]| ranges.iter().any(|range| range.contains(caller));
    let outcome = match (within(&door.open), within(&door.audited)) {
        (true, _) => "allowed",
        (false, true) => "audited",
        (false, false) => "denied",
    };
    let by = if service.transport == Transport::Strict && !within(from) {
        "transport strict".to_owned()
    } else {
        let names = deciding(policies, &service.name);
        let names: Vec<&str> = names.iter().map(|p| p.name.as_str()).collect();
        match names.is_empty() {
            true => "no policy".to_owned(),
            false => names.join(","),
        }
    };
    Decision { outcome, by }
}
