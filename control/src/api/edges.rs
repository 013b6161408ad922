//! Who really calls what, as the called hosts tell it: `meshctl edges`.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use mesh_core::edge::{EdgeCaller, EdgeKey, EdgeUse, EdgeVerdict};
use mesh_core::names::ServiceName;
use mesh_core::service::Transport;
use mesh_runtime::clock::rfc3339;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::catalogue::Catalogue;
use crate::edges::EdgesByHost;
use crate::refusal::Refusal;

/// A port that saw no plaintext caller for so long is proposed for `strict`: a weekly job has come by then.
const QUIET_MS: u64 = 8 * 86_400_000;

#[derive(Debug, Deserialize)]
pub(super) struct Question {
    /// Only this one, `namespace/name`.
    service: Option<String>,
    /// Only services of this namespace.
    namespace: Option<String>,
    /// Only plaintext callers.
    #[serde(default)]
    plaintext: bool,
}

/// One edge, of all hosts that serve it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Edge {
    pub calls: u64,
    pub first_ms: u64,
    pub last_ms: u64,
    pub hosts: BTreeSet<String>,
}

pub(super) fn answer(
    now: &Catalogue,
    by_host: &EdgesByHost,
    now_ms: u64,
    question: &Question,
) -> Result<Value, Refusal> {
    let service = question.service.as_deref().map(ServiceName::parse);
    let service = service
        .transpose()
        .map_err(|e| Refusal::invalid(e.to_string()))?;
    let wanted = |name: &ServiceName| {
        service.as_ref().is_none_or(|wanted| wanted == name)
            && (question.namespace.as_deref()).is_none_or(|ns| ns == name.namespace.as_str())
    };
    let edges = joined(now, by_host);
    let edges = edges.iter().filter(|(key, _)| {
        wanted(&key.service)
            && (!question.plaintext || matches!(key.caller, EdgeCaller::Plaintext(_)))
    });
    let items: Vec<Value> = edges.map(|(key, edge)| show(key, edge)).collect();
    let quiet = quiet(now, by_host, now_ms);
    let quiet = quiet.iter().filter(|((name, _), _)| wanted(name));
    let proposals = quiet.map(|((name, port), since_ms)| {
        json!({"service": name.to_string(), "port": port, "since": rfc3339(since_ms / 1000)})
    });
    let overflowed = by_host.iter().filter(|(_, report)| report.overflowed);
    let overflowed = overflowed.filter_map(|(uid, _)| now.hosts.get(uid));
    Ok(json!({
        "items": items,
        "proposals": proposals.collect::<Vec<_>>(),
        "overflowed": overflowed.map(|h| h.name.to_string()).collect::<Vec<_>>(),
    }))
}

fn show(key: &EdgeKey, edge: &Edge) -> Value {
    let (caller, tls) = match &key.caller {
        EdgeCaller::Identity(id) => (id.to_string(), "mTLS"),
        EdgeCaller::Plaintext(address) => (address.to_string(), "plaintext"),
    };
    json!({
        "service": key.service.to_string(),
        "port": key.port,
        "caller": caller,
        "tls": tls,
        "verdict": key.verdict.as_str(),
        "calls": edge.calls,
        "since": rfc3339(edge.first_ms / 1000),
        "last": rfc3339(edge.last_ms / 1000),
        "hosts": edge.hosts,
    })
}

/// The edges of all hosts that are in the mesh, each once.
pub(super) fn joined(now: &Catalogue, by_host: &EdgesByHost) -> BTreeMap<EdgeKey, Edge> {
    let mut all: BTreeMap<EdgeKey, Edge> = BTreeMap::new();
    for (uid, report) in by_host {
        let Some(host) = now.hosts.get(uid) else {
            continue;
        };
        for (key, used) in &report.edges {
            let EdgeUse {
                calls,
                first_ms,
                last_ms,
            } = *used;
            let edge = all.entry(key.clone()).or_insert_with(|| Edge {
                first_ms,
                ..Edge::default()
            });
            edge.calls = edge.calls.saturating_add(calls);
            edge.first_ms = edge.first_ms.min(first_ms);
            edge.last_ms = edge.last_ms.max(last_ms);
            edge.hosts.insert(host.name.to_string());
        }
    }
    all
}

/// Who came in plaintext and was not refused, for what a change would cut off.
pub(super) fn plaintext_callers(by_host: &EdgesByHost) -> BTreeSet<(ServiceName, u16, IpAddr)> {
    let edges = by_host.values().flat_map(|report| &report.edges);
    let let_in = edges.map(|(key, _)| key);
    let let_in = let_in.filter(|key| key.verdict != EdgeVerdict::Refused);
    let_in
        .filter_map(|key| match key.caller {
            EdgeCaller::Plaintext(address) => Some((key.service.clone(), key.port, address)),
            EdgeCaller::Identity(_) => None,
        })
        .collect()
}

/// The permissive ports at which every host that serves them saw no plaintext caller for long, and since when.
pub(super) fn quiet(
    now: &Catalogue,
    by_host: &EdgesByHost,
    now_ms: u64,
) -> BTreeMap<(ServiceName, u16), u64> {
    let mut since: BTreeMap<(ServiceName, u16), u64> = BTreeMap::new();
    let mut watched: BTreeMap<(ServiceName, u16), usize> = BTreeMap::new();
    let reports = by_host
        .iter()
        .filter(|(uid, _)| now.hosts.contains_key(*uid));
    for (_, report) in reports {
        let mut seen: BTreeMap<(&ServiceName, u16), u64> = BTreeMap::new();
        for (edge, used) in &report.edges {
            if let EdgeCaller::Plaintext(_) = edge.caller {
                let last = seen.entry((&edge.service, edge.port)).or_default();
                *last = used.last_ms.max(*last);
            }
        }
        for port in &report.watched {
            let key = (port.service.clone(), port.port);
            let last = seen.get(&(&port.service, port.port)).copied();
            // Where callers can not be told apart nobody knows who was not seen.
            let quiet = match report.overflowed {
                true => now_ms,
                false => port.since_ms.max(last.unwrap_or_default()),
            };
            let all = since.entry(key.clone()).or_insert(quiet);
            *all = quiet.max(*all);
            *watched.entry(key).or_default() += 1;
        }
    }
    since.retain(|key, quiet| {
        let (name, _) = key;
        let permissive = now.services.get(name);
        let permissive = permissive.is_some_and(|s| s.transport == Transport::Permissive);
        let everywhere = now.servers_of(name).count() <= watched.get(key).copied().unwrap_or(0);
        permissive && everywhere && QUIET_MS <= now_ms.saturating_sub(*quiet)
    });
    since
}
