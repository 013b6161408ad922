//! Who may call what, and by which rule: `meshctl authz`.

use std::net::IpAddr;

use mesh_core::edge::EdgeCaller;
use mesh_core::identity::{Identity, SpiffeId};
use mesh_core::names::{Account, ServiceName, TrustDomain};
use mesh_core::policy::{PolicySet, Target, deciding};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::catalogue::objects::Service;
use crate::catalogue::{Catalogue, authz};
use crate::refusal::Refusal;

#[derive(Debug, Deserialize)]
pub(super) struct Question {
    /// Only this one, `namespace/name`.
    service: Option<String>,
    /// Only services of this namespace.
    namespace: Option<String>,
    /// Who calls: `namespace/account`, `host:name`, a SPIFFE id, or the address of a plaintext caller. Without it: all
    /// rules.
    from: Option<String>,
}

pub(super) fn answer(now: &Catalogue, question: &Question) -> Result<Value, Refusal> {
    let invalid = |e: mesh_core::names::NameError| Refusal::invalid(e.to_string());
    let service = question.service.as_deref().map(ServiceName::parse);
    let service = service.transpose().map_err(invalid)?;
    let own = &now.settings.trust_domain;
    let from = question.from.as_deref().map(|text| caller(text, own));
    let from = from.transpose()?;
    let policies = match &service {
        Some(name) if !now.services.contains_key(name) => {
            return Err(Refusal::not_found(&format!("services/{name}")));
        }
        Some(name) => authz::policies_of(now, name),
        None => authz::policies(now),
    };
    let wanted = |s: &&std::sync::Arc<Service>| {
        service.as_ref().is_none_or(|name| *name == s.name)
            && (question.namespace.as_deref()).is_none_or(|ns| ns == s.name.namespace.as_str())
    };
    let services = now.services.values().filter(wanted);
    let items: Vec<Value> = services
        .flat_map(|service| match &from {
            Some(caller) => decisions(&policies, service, caller),
            None => rules(&policies, service),
        })
        .collect();
    Ok(json!({"items": items}))
}

fn caller(text: &str, own: &TrustDomain) -> Result<EdgeCaller, Refusal> {
    if text.starts_with("spiffe://") {
        let id = SpiffeId::parse(text).map_err(|e| Refusal::invalid(e.to_string()))?;
        return Ok(EdgeCaller::Identity(id));
    }
    if let Ok(address) = text.parse::<IpAddr>() {
        return Ok(EdgeCaller::Plaintext(address.to_canonical()));
    }
    let bad = |e: mesh_core::names::NameError| {
        Refusal::invalid(format!(
            "`{text}` is no caller: {e}; write namespace/account, host:NAME, a SPIFFE id or an address"
        ))
    };
    let identity = match text.strip_prefix("host:") {
        Some(name) => Identity::Host(name.parse().map_err(bad)?),
        None => Identity::Workload(Account::parse(text).map_err(bad)?),
    };
    Ok(EdgeCaller::Identity(SpiffeId {
        trust_domain: own.clone(),
        identity,
    }))
}

/// What becomes of the calls of one caller: one line a port.
fn decisions(policies: &PolicySet, service: &Service, caller: &EdgeCaller) -> Vec<Value> {
    let decide = |port: u16| {
        let target = Target {
            service: service.name.clone(),
            port,
        };
        let (from, decision) = match caller {
            EdgeCaller::Identity(id) => (id.to_string(), authz::decide(policies, id, target)),
            EdgeCaller::Plaintext(address) => (
                format!("{address}, plaintext"),
                authz::decide_plaintext(policies, service, *address, &target),
            ),
        };
        json!({
            "service": service.name.to_string(),
            "port": port,
            "from": from,
            "decision": decision.outcome,
            "by": decision.by,
        })
    };
    service.ports.iter().map(|p| decide(p.number)).collect()
}

/// All rules that decide about a service: one line a rule. None: one that says so.
fn rules(policies: &PolicySet, service: &Service) -> Vec<Value> {
    let deciding = deciding(policies, &service.name);
    let of = deciding.iter().flat_map(|policy| {
        policy.rules.iter().map(|rule| {
            let callers: Vec<String> = rule.callers.iter().map(ToString::to_string).collect();
            json!({
                "service": service.name.to_string(),
                "level": policy.level.to_string(),
                "rule": format!("{}/{}", policy.name, rule.name),
                "enforce": policy.enforce.as_str(),
                "ports": rule.ports,
                "callers": callers,
            })
        })
    });
    let all: Vec<Value> = of.collect();
    if !all.is_empty() {
        return all;
    }
    vec![json!({
        "service": service.name.to_string(),
        "level": Value::Null,
        "rule": Value::Null,
        "enforce": "on",
        "ports": [],
        "callers": [],
    })]
}
