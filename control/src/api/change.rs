//! What operators change.

use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::{Path, Query, State};
use axum::{Extension, Json};
use mesh_api::resource::{APPLY_MAX, Resource};
use mesh_api::token::JoinToken;
use mesh_core::names::{Account, NameError, ServiceName};
use mesh_core::service::Pattern;
use serde::Deserialize;
use serde_json::{Value, json};

use super::{body, edges};
use crate::audit::Actor;
use crate::ca;
use crate::catalogue::Catalogue;
use crate::catalogue::command::{Command, NewToken, Outcome};
use crate::catalogue::objects::{Digest, Scope};
use crate::catalogue::warnings;
use crate::clock;
use crate::control::Control;
use crate::refusal::Refusal;

/// Life of a token when nobody says, in seconds.
const EXPIRES_DEFAULT_S: u64 = 3600;
/// Most control addresses of a token.
const ADDRESSES_MAX: usize = 8;
/// Longest name of a token, in bytes.
const NAME_MAX: usize = 128;

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct TokenRequest {
    name: Option<String>,
    identities: Vec<String>,
    services: Option<Vec<String>>,
    #[serde(default)]
    networks: Vec<String>,
    expires_in: Option<u64>,
    uses: Option<u32>,
    #[serde(default)]
    replace: bool,
    #[serde(default)]
    addresses: Vec<String>,
}

pub(super) async fn create_token(
    State(control): State<Arc<Control>>,
    Extension(actor): Extension<Actor>,
    bytes: Bytes,
) -> Result<Json<Value>, Refusal> {
    let request: TokenRequest = body(&bytes)?;
    let secret = ca::random::<32>();
    let addresses = addresses(&control, &request)?;
    let new = new_token(&request, &secret)?;
    let token = JoinToken {
        addresses,
        pins: vec![control.ca.pin()?],
        id: new.id.clone(),
        secret,
    };
    let expires = clock::rfc3339(new.expires_s);
    control.writer.ask(actor, Command::CreateToken(new)).await?;
    Ok(Json(json!({
        "id": token.id,
        "token": token.reveal(),
        "expires": expires,
    })))
}

fn addresses(control: &Control, request: &TokenRequest) -> Result<Vec<String>, Refusal> {
    let chosen = if request.addresses.is_empty() {
        &control.settings.addresses
    } else {
        &request.addresses
    };
    let bad = |a: &&String| a.len() > 253 + 6 || !is_address(a);
    if let Some(bad) = chosen.iter().find(bad) {
        let message = format!("`{bad}` is no address; write it like control.example.com:7440");
        return Err(Refusal::invalid(message));
    }
    if chosen.is_empty() || ADDRESSES_MAX < chosen.len() {
        return Err(Refusal::invalid(format!(
            "a token names 1 to {ADDRESSES_MAX} addresses of control; say them with --address"
        )));
    }
    Ok(chosen.clone())
}

/// Whether a text is `host:port`.
pub(crate) fn is_address(text: &str) -> bool {
    let parts = text.rsplit_once(':');
    parts.is_some_and(|(host, port)| {
        !host.is_empty()
            && host.bytes().all(|b| b.is_ascii_graphic())
            && port.parse::<u16>().is_ok_and(|p| p != 0)
    })
}

fn new_token(request: &TokenRequest, secret: &[u8]) -> Result<NewToken, Refusal> {
    let invalid = |e: NameError| Refusal::invalid(e.to_string());
    let patterns = |texts: &[String]| {
        let patterns = texts.iter().map(|text| Pattern::parse(text));
        patterns.collect::<Result<Vec<_>, _>>().map_err(invalid)
    };
    let identities = patterns(&request.identities)?;
    let services = match request.services.as_deref() {
        None | Some([]) => identities.clone(),
        Some(services) => patterns(services)?,
    };
    let networks = request.networks.iter().map(|text| text.parse());
    let networks = networks.collect::<Result<_, _>>().map_err(invalid)?;
    let name = request.name.clone().unwrap_or_default();
    if NAME_MAX < name.len() || name.chars().any(char::is_control) {
        let message = format!("a token's name has at most {NAME_MAX} printable bytes");
        return Err(Refusal::invalid(message));
    }
    let life_s = request.expires_in.unwrap_or(EXPIRES_DEFAULT_S);
    Ok(NewToken {
        id: format!("t-{:012x}", u64::from_be_bytes(ca::random::<8>()) >> 16),
        name,
        secret: Digest::of(secret),
        scope: Scope {
            identities,
            services,
            networks,
        },
        uses: request.uses.unwrap_or(1),
        replace: request.replace,
        expires_s: clock::now_s().saturating_add(life_s),
    })
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct ApplyQuery {
    #[serde(default)]
    dry_run: bool,
}

pub(super) async fn apply(
    State(control): State<Arc<Control>>,
    Extension(actor): Extension<Actor>,
    Query(query): Query<ApplyQuery>,
    bytes: Bytes,
) -> Result<Json<Value>, Refusal> {
    let values: Vec<Value> = body(&bytes)?;
    if APPLY_MAX < values.len() {
        let message = format!("{} resources; at most {APPLY_MAX} may be", values.len());
        return Err(Refusal::invalid(message));
    }
    let resources = values.into_iter().map(Resource::from_value);
    let resources = resources
        .collect::<Result<_, _>>()
        .map_err(|e| Refusal::invalid(e.to_string()))?;
    let command = Command::Apply {
        resources,
        dry_run: query.dry_run,
        plaintext: edges::plaintext_callers(&control.edges.all()),
    };
    let Outcome::Applied(applied) = control.writer.ask(actor, command).await? else {
        return Err(Refusal::internal());
    };
    let results = applied.into_iter().map(|one| {
        let mut result = json!({"object": one.object, "action": one.action.as_str()});
        if let Some(message) = one.message {
            result["message"] = message.into();
        }
        if !one.warnings.is_empty() {
            result["warnings"] = one.warnings.into();
        }
        result
    });
    Ok(Json(results.collect()))
}

pub(super) async fn delete(
    State(control): State<Arc<Control>>,
    Extension(actor): Extension<Actor>,
    Path((kind, namespace, name)): Path<(String, String, String)>,
) -> Result<Json<Value>, Refusal> {
    let command = deletion(&kind, &namespace, &name)?;
    control.writer.ask(actor, command).await?;
    let mut answer = json!({"deleted": true});
    match kind.as_str() {
        "hosts" => answer["agents"] = agents(&control),
        "policies" => {
            let warning = warnings::of_no_rule(&control.writer.now());
            if let Some(warning) = warning {
                answer["warnings"] = json!([warning]);
            }
        }
        _ => {}
    }
    Ok(Json(answer))
}

/// How many hosts hear of a revocation now, and how many when they are back.
fn agents(control: &Control) -> Value {
    let now = control.writer.now();
    let live = now.hosts.values().filter(|h| h.live).count();
    json!({"connected": live, "away": now.hosts.len() - live})
}

#[derive(Deserialize)]
pub(super) struct RevokeQuery {
    /// Of a workload: on which host.
    host: Option<String>,
    /// Of a token: with all hosts that joined with it.
    #[serde(default)]
    hosts: bool,
}

/// `POST …/{name}:revoke`: of hosts, workloads and tokens.
pub(super) async fn act(
    State(control): State<Arc<Control>>,
    Extension(actor): Extension<Actor>,
    Path((kind, namespace, name)): Path<(String, String, String)>,
    Query(query): Query<RevokeQuery>,
) -> Result<Json<Value>, Refusal> {
    let invalid = |e: NameError| Refusal::invalid(e.to_string());
    let command = match (kind.as_str(), name.strip_suffix(":revoke")) {
        ("hosts", Some(name)) => deletion(&kind, &namespace, name)?,
        ("tokens", Some(name)) => Command::RevokeToken {
            id: name.to_owned(),
            hosts: query.hosts,
        },
        ("workloads", Some(name)) => {
            let host = query.host.as_deref();
            let host = host.ok_or_else(|| {
                Refusal::invalid("say the host: a workload is revoked on one host at a time")
            })?;
            Command::RevokeWorkload {
                account: Account {
                    namespace: namespace.parse().map_err(invalid)?,
                    name: name.parse().map_err(invalid)?,
                },
                host: host.parse().map_err(invalid)?,
            }
        }
        _ => return Err(Refusal::not_found(&format!("action {name} on {kind}"))),
    };
    let warning = unknown_workload(&control.writer.now(), &command);
    control.writer.ask(actor, command).await?;
    let mut answer = json!({"revoked": true, "agents": agents(&control)});
    if let Some(warning) = warning {
        answer["warnings"] = json!([warning]);
    }
    Ok(Json(answer))
}

/// A workload that its host does not have now may have been there before: it is revoked, and that is said.
fn unknown_workload(now: &Catalogue, command: &Command) -> Option<String> {
    let Command::RevokeWorkload { account, host } = command else {
        return None;
    };
    let known = now.host_by_name(host)?.workloads.iter();
    let mut known = known.map(|workload| &workload.account);
    (!known.any(|known| known == account)).then(|| {
        format!(
            "host {host} has no workload {account} now; if the name is mistyped, the one that was meant is not revoked: see \
             `meshctl get workloads`"
        )
    })
}

fn deletion(kind: &str, namespace: &str, name: &str) -> Result<Command, Refusal> {
    let invalid = |e: NameError| Refusal::invalid(e.to_string());
    Ok(match kind {
        "hosts" => Command::RemoveHost {
            name: name.parse().map_err(invalid)?,
        },
        "tokens" => Command::RevokeToken {
            id: name.to_owned(),
            hosts: false,
        },
        "services" => Command::DeleteService {
            name: ServiceName {
                namespace: namespace.parse().map_err(invalid)?,
                name: name.parse().map_err(invalid)?,
            },
        },
        "policies" => {
            let namespace = (namespace != "-").then(|| namespace.parse());
            Command::DeletePolicy {
                key: (
                    namespace.transpose().map_err(invalid)?,
                    name.parse().map_err(invalid)?,
                ),
            }
        }
        _ => {
            let message =
                format!("{kind} can not be deleted; services, policies, hosts and tokens can");
            return Err(Refusal::invalid(message));
        }
    })
}
