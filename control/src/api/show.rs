//! What operators see: the objects of the catalogue in the shape of Kubernetes.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;

use mesh_api::resource::{
    CAPTURE_ANNOTATION, OUR_API, PLAINTEXT_FROM_ANNOTATION, TRANSPORT_ANNOTATION,
};
use mesh_core::edge::EdgeCaller;
use mesh_core::expiry::Alarm;
use mesh_core::identity::{Identity, SpiffeId};
use mesh_core::names::{Account, Label, Network, ServiceName};
use mesh_core::service::{Capture, Health, Pattern, Transport};
use serde_json::{Map, Value, json};

use crate::catalogue::Catalogue;
use crate::catalogue::objects::{Host, Offer, Policy, Revoked, Scope, Service, Source, Token};
use crate::clock;
use crate::control::Control;
use crate::expiry;
use crate::refusal::Refusal;

/// The namespace of a path for objects that are in none.
const NO_NAMESPACE: &str = "-";

pub(crate) fn status(control: &Control) -> Value {
    let now = control.writer.now();
    let live = now.hosts.values().filter(|h| h.live).count();
    let pin = control.ca.pin().map(crate::catalogue::objects::Digest);
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "trustDomain": now.settings.trust_domain.as_str(),
        "dnsSuffix": now.settings.dns_suffix,
        "addresses": now.settings.addresses,
        "epoch": now.epoch.to_string(),
        "revision": now.revision,
        "hosts": {
            "live": live,
            "stale": now.hosts.len() - live,
            "held": control.leases.held(),
        },
        "sessions": control.metrics.sessions.get(),
        "services": now.services.len(),
        "endpoints": now.endpoint_count(),
        "policies": now.policies.len(),
        "plaintextEdges": plaintext_edges(control),
        "bundle": control.bundle.number,
        "certificates": certificates(control),
        "ca": {
            "rootPin": pin.map(|p| p.to_string()).unwrap_or_default(),
            "issuerEnds": clock::rfc3339(control.ca.issuer_ends_s()),
        },
        "autonomyHours": control.leaves.autonomy().as_secs() / 3600,
    })
}

/// How many callers come in plaintext, straight to a program's own port.
fn plaintext_edges(control: &Control) -> usize {
    let all = control.edges.all();
    let edges = all.values().flat_map(|report| &report.edges);
    edges
        .filter(|(key, _)| matches!(key.caller, EdgeCaller::Plaintext(_)))
        .count()
}

/// What people must replace in time.
fn certificates(control: &Control) -> Vec<Value> {
    let show = |one: &expiry::Certificate| {
        let ends_s = one.life.not_after_s.max(0).cast_unsigned();
        json!({
            "name": one.name,
            "ends": clock::rfc3339(ends_s),
            "daysLeft": one.left_s / (24 * 3600),
            "alarm": one.alarm.map(Alarm::as_str),
        })
    };
    expiry::certificates(control).iter().map(show).collect()
}

/// All objects of a kind, of one namespace if one is named.
pub(super) fn list(
    control: &Control,
    kind: &str,
    namespace: Option<&str>,
) -> Result<Vec<Value>, Refusal> {
    let now = &*control.writer.now();
    let wanted =
        |ns: Option<&Label>| namespace.is_none_or(|w| ns.is_some_and(|ns| ns.as_str() == w));
    Ok(match kind {
        "services" => {
            let all = now.services.values();
            all.filter(|s| wanted(Some(&s.name.namespace)))
                .map(|s| service(now, s))
                .collect()
        }
        "policies" => {
            let all = now.policies.iter();
            all.filter(|((ns, _), _)| wanted(ns.as_ref()))
                .map(|(_, p)| policy(p))
                .collect()
        }
        "workloads" => {
            let all = workloads(now);
            all.iter()
                .filter(|(account, _)| wanted(Some(&account.namespace)))
                .map(|(account, on)| workload(now, account, on))
                .collect()
        }
        "hosts" => now.hosts.values().map(|h| host(control, now, h)).collect(),
        "revocations" => revocations(control, now),
        "tokens" => now.tokens.values().map(|t| token(t)).collect(),
        _ => return Err(unknown_kind(kind)),
    })
}

fn unknown_kind(kind: &str) -> Refusal {
    Refusal::not_found(&format!(
        "kind {kind}; there are services, workloads, hosts, policies, tokens, revocations and audit"
    ))
}

/// One object.
pub(super) fn one(
    control: &Control,
    kind: &str,
    namespace: &str,
    name: &str,
) -> Result<Value, Refusal> {
    let now = &*control.writer.now();
    let label = |text: &str| {
        text.parse::<Label>()
            .map_err(|e| Refusal::invalid(e.to_string()))
    };
    let found = match kind {
        "services" => {
            let name = ServiceName {
                namespace: label(namespace)?,
                name: label(name)?,
            };
            now.services.get(&name).map(|s| service(now, s))
        }
        "policies" => {
            let namespace = (namespace != NO_NAMESPACE).then(|| label(namespace));
            let key = (namespace.transpose()?, label(name)?);
            now.policies.get(&key).map(|p| policy(p))
        }
        "workloads" => {
            let account = Account {
                namespace: label(namespace)?,
                name: label(name)?,
            };
            let all = workloads(now);
            all.get(&account).map(|on| workload(now, &account, on))
        }
        "hosts" => now
            .host_by_name(&label(name)?)
            .map(|h| host(control, now, h)),
        "tokens" => now.tokens.get(name).map(|t| token(t)),
        _ => return Err(unknown_kind(kind)),
    };
    let of = if namespace == NO_NAMESPACE {
        format!("{kind}/{name}")
    } else {
        format!("{kind}/{namespace}/{name}")
    };
    found.ok_or_else(|| Refusal::not_found(&of))
}

/// The common shape. `namespace` and an empty `status` are left out where there are none.
fn object(api_version: &str, kind: &str, metadata: &Value, spec: &Value, status: &Value) -> Value {
    json!({
        "apiVersion": api_version,
        "kind": kind,
        "metadata": metadata,
        "spec": spec,
        "status": status,
    })
}

fn metadata(namespace: Option<&str>, name: &str, revision: u64, created_s: u64) -> Value {
    let mut metadata = Map::new();
    metadata.insert("name".to_owned(), name.into());
    if let Some(namespace) = namespace {
        metadata.insert("namespace".to_owned(), namespace.into());
    }
    metadata.insert("resourceVersion".to_owned(), revision.to_string().into());
    metadata.insert(
        "creationTimestamp".to_owned(),
        clock::rfc3339(created_s).into(),
    );
    metadata.into()
}

fn source(now: &Catalogue, source: &Source) -> String {
    match source {
        Source::Operator => "operator".to_owned(),
        Source::Host(uid) => now.host_label(uid),
    }
}

fn service(now: &Catalogue, service: &Service) -> Value {
    let (namespace, name) = (service.name.namespace.as_str(), service.name.name.as_str());
    let mut metadata = metadata(Some(namespace), name, service.revision, service.created_s);
    let mut annotations = service.annotations.clone();
    if service.transport != Transport::default() {
        let transport = service.transport.to_string();
        annotations.insert(TRANSPORT_ANNOTATION.to_owned(), transport);
    }
    if !service.plaintext_from.is_empty() {
        let ranges: Vec<String> = service
            .plaintext_from
            .iter()
            .map(ToString::to_string)
            .collect();
        annotations.insert(PLAINTEXT_FROM_ANNOTATION.to_owned(), ranges.join(","));
    }
    if service.capture != Capture::default() {
        annotations.insert(CAPTURE_ANNOTATION.to_owned(), service.capture.to_string());
    }
    if !annotations.is_empty() {
        metadata["annotations"] = json!(annotations);
    }
    if !service.labels.is_empty() {
        metadata["labels"] = json!(service.labels);
    }
    let ports = service.ports.iter().map(|port| {
        let mut shown = json!({
            "port": port.number,
            "protocol": "TCP",
            "appProtocol": port.protocol.as_str(),
        });
        if let Some(name) = service.port_names.get(&port.number) {
            shown["name"] = name.as_str().into();
        }
        shown
    });
    let ports: Vec<Value> = ports.collect();
    let status = json!({
        "vip4": service.vip.v4,
        "vip6": service.vip.v6,
        "source": source(now, &service.source),
        "endpoints": endpoints(now, &service.name),
        "conditions": conditions(now, service),
    });
    object(
        "v1",
        "Service",
        &metadata,
        &json!({"ports": ports}),
        &status,
    )
}

/// The servers without an agent that a host goes on to in plaintext for a service, as this workload of it says.
fn plaintext<'a>(
    host: &'a Host,
    account: Option<&Account>,
    name: &ServiceName,
) -> &'a [SocketAddr] {
    let mut offers = host.offers();
    let own = offers.find(|(a, o)| o.service == *name && account.is_none_or(|own| own == *a));
    own.map_or(&[], |(_, offer)| &offer.plaintext)
}

fn endpoints(now: &Catalogue, name: &ServiceName) -> Vec<Value> {
    let list = now.endpoints_of(name).map_or(&[][..], |e| &e.list);
    let show = |e: &mesh_core::service::Endpoint| {
        let host = now.hosts.get(&e.host);
        let beyond = host.map_or(&[][..], |h| plaintext(h, Some(&e.account), name));
        let mut shown = json!({
            "host": host.map(|h| h.name.to_string()),
            "network": e.network.as_str(),
            "address": e.address,
            "account": e.account.to_string(),
            "state": match e.health {
                Health::Healthy => "healthy",
                Health::Stale => "stale",
            },
        });
        if !beyond.is_empty() {
            shown["plaintextBeyond"] = json!(beyond);
        }
        shown
    };
    list.iter().map(show).collect()
}

/// What the service says that does not hold, and why hosts that offer it are not listed.
fn conditions(now: &Catalogue, service: &Service) -> Vec<Value> {
    let name = &service.name;
    let mut conditions = Vec::new();
    for host in now.servers_of(name) {
        let beyond: Vec<String> = plaintext(host, None, name)
            .iter()
            .map(ToString::to_string)
            .collect();
        if !beyond.is_empty() {
            conditions.push(json!({
                "type": "Encrypted",
                "status": "False",
                "reason": "PlaintextEndpoints",
                "host": host.name.as_str(),
                "message": format!("plaintext beyond {}: {}", host.name, beyond.join(", ")),
            }));
        }
        let problems = now.problems_of(host).into_iter();
        let ours = problems.filter(|p| p.service.as_ref().is_none_or(|s| s == name));
        conditions.extend(ours.map(|problem| {
            json!({
                "type": "NotListed",
                "status": "True",
                "reason": problem.reason.code(),
                "host": host.name.as_str(),
                "message": problem.message,
            })
        }));
    }
    conditions
}

fn policy(policy: &Policy) -> Value {
    let mut shown = serde_json::to_value(&policy.object).unwrap_or_default();
    if let Some(metadata) = shown.get_mut("metadata") {
        metadata["resourceVersion"] = policy.revision.to_string().into();
        metadata["creationTimestamp"] = clock::rfc3339(policy.created_s).into();
    }
    shown["status"] = json!({"source": "operator"});
    shown
}

type Workloads<'a> = BTreeMap<Account, Vec<(&'a Arc<Host>, &'a [Offer])>>;

fn workloads(now: &Catalogue) -> Workloads<'_> {
    let mut all = Workloads::new();
    for host in now.hosts.values() {
        for workload in &host.workloads {
            let on = all.entry(workload.account.clone()).or_default();
            on.push((host, &workload.offers));
        }
    }
    all
}

fn workload(now: &Catalogue, account: &Account, on: &[(&Arc<Host>, &[Offer])]) -> Value {
    let created_s = on.iter().map(|(h, _)| h.created_s).min().unwrap_or(0);
    let revision = on.iter().map(|(h, _)| h.revision).max().unwrap_or(0);
    let (namespace, name) = (account.namespace.as_str(), account.name.as_str());
    let identity = SpiffeId {
        trust_domain: now.settings.trust_domain.clone(),
        identity: Identity::Workload(account.clone()),
    };
    let hosts: Vec<&str> = on.iter().map(|(host, _)| host.name.as_str()).collect();
    let offered = on.iter().flat_map(|(_, offers)| *offers);
    let mut services: Vec<String> = offered.map(|o| o.service.name.to_string()).collect();
    services.sort();
    services.dedup();
    let allowed = on.iter().all(|(h, _)| h.scope.allows_account(account));
    object(
        OUR_API,
        "Workload",
        &metadata(Some(namespace), name, revision, created_s),
        &json!({"host": hosts, "services": services, "identity": identity.to_string()}),
        &json!({"inScope": allowed}),
    )
}

/// What was revoked, newest first, and of how many of the hosts that are there it is known to be in force.
fn revocations(control: &Control, now: &Catalogue) -> Vec<Value> {
    let heard: Vec<u64> = now
        .hosts
        .keys()
        .map(|uid| {
            control
                .acks
                .of(uid)
                .map_or(0, |ack| ack.revocations_revision)
        })
        .collect();
    let mut all: Vec<_> = now.revoked_after(&(0, None)).collect();
    all.reverse();
    let show = |revoked: &Revoked| {
        let account = revoked.account.as_ref().map(ToString::to_string);
        let spec = json!({
            "host": revoked.name,
            "uid": revoked.uid.as_str(),
            "account": account,
        });
        let status = json!({
            "hosts": heard.len(),
            "acknowledged": heard.iter().filter(|heard| revoked.revision <= **heard).count(),
        });
        let name = match &account {
            None => revoked.uid.to_string(),
            Some(account) => format!("{}/{account}", revoked.uid),
        };
        let metadata = metadata(None, &name, revoked.revision, revoked.at_s);
        object(OUR_API, "Revocation", &metadata, &spec, &status)
    };
    all.into_iter().map(|(_, revoked)| show(revoked)).collect()
}

fn host(control: &Control, now: &Catalogue, host: &Host) -> Value {
    let problems = now.problems_of(host).into_iter().map(|problem| {
        json!({
            "account": problem.account.to_string(),
            "service": problem.service.map(|s| s.to_string()),
            "reason": problem.reason.code(),
            "message": problem.message,
        })
    });
    let problems: Vec<Value> = problems.collect();
    let spec = json!({
        "uid": host.uid.as_str(),
        "network": host.network.as_str(),
        "address": host.address,
        "meshPort": host.mesh_port,
        "scope": scope(&host.scope),
        "token": host.token,
    });
    let status = json!({
        "lease": if host.live { "live" } else { "stale" },
        "since": clock::rfc3339(host.since_s),
        "version": host.version,
        "addressProven": host.proven,
        "acknowledged": acknowledged(control, host),
        "problems": problems,
    });
    let metadata = metadata(None, host.name.as_str(), host.revision, host.created_s);
    object(OUR_API, "Host", &metadata, &spec, &status)
}

/// What the host has on disk and in use. The bundle is known of hosts that are away, too.
fn acknowledged(control: &Control, host: &Host) -> Value {
    let mut shown = json!({"bundle": host.bundle});
    if let Some(ack) = control.acks.of(&host.uid) {
        shown["index"] = ack.index_revision.into();
        shown["policies"] = ack.policy_revision.into();
        shown["revocations"] = ack.revocations_revision.into();
    }
    shown
}

fn token(token: &Token) -> Value {
    let now_s = clock::now_s();
    let state = if token.revoked {
        "revoked"
    } else if token.expires_s <= now_s {
        "expired"
    } else if token.uses <= token.used {
        "used"
    } else {
        "usable"
    };
    let scope = scope(&token.scope);
    let spec = json!({
        "name": token.name,
        "identities": scope["identities"],
        "services": scope["services"],
        "networks": scope["networks"],
        "uses": token.uses,
        "replace": token.replace,
        "expires": clock::rfc3339(token.expires_s),
    });
    object(
        OUR_API,
        "Token",
        &metadata(None, &token.id, token.revision, token.created_s),
        &spec,
        &json!({"used": token.used, "state": state}),
    )
}

fn scope(scope: &Scope) -> Value {
    let texts = |list: &[Pattern]| list.iter().map(ToString::to_string).collect::<Vec<_>>();
    let networks: Vec<&str> = scope.networks.iter().map(Network::as_str).collect();
    json!({
        "identities": texts(&scope.identities),
        "services": texts(&scope.services),
        "networks": networks,
    })
}
