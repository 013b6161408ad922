//! The operator API: JSON over HTTPS. Who calls is decided once, before a body is read.

use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, Path, Query, Request, State};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Extension, Json, Router};
use http::header::CONTENT_TYPE;
use http::{HeaderName, HeaderValue, StatusCode};
use mesh_core::reason::Reason;
use serde::Deserialize;
use serde_json::{Value, json};

mod authz;
mod change;
mod check;
mod edges;
mod show;

pub(crate) use change::is_address;

use crate::audit::{Actor, LIMIT_MAX};
use crate::auth::Peer;
use crate::clock;
use crate::control::Control;
use crate::export;
use crate::refusal::{REASON_HEADER, Refusal};

/// Largest body, in bytes: 10,000 resources of about 3 KiB.
const BODY_MAX: usize = 32 * 1024 * 1024;
/// Entries of the audit that are shown when nobody says how many.
const AUDIT_DEFAULT: usize = 100;

pub(crate) fn router(control: &Arc<Control>) -> Router {
    let guarded = Router::new()
        .route("/v1/status", get(status))
        .route("/v1/check", get(check))
        .route("/v1/authz", get(authz))
        .route("/v1/edges", get(edges))
        .route("/v1/audit", get(audit))
        .route("/v1/backup", get(backup))
        .route("/v1/apply", post(change::apply))
        .route("/v1/tokens", get(list_tokens).post(change::create_token))
        .route("/v1/{kind}", get(list))
        .route(
            "/v1/{kind}/{namespace}/{name}",
            get(one).delete(change::delete).post(change::act),
        )
        .fallback(no_such_path)
        .layer(DefaultBodyLimit::max(BODY_MAX))
        .layer(middleware::from_fn_with_state(
            Arc::clone(control),
            authenticate,
        ));
    Router::new().merge(guarded).with_state(Arc::clone(control))
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.reason.http_status());
        let status = status.unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let body = json!({"reason": self.reason.code(), "message": self.message});
        let mut response = (status, Json(body)).into_response();
        response.headers_mut().insert(
            HeaderName::from_static(REASON_HEADER),
            HeaderValue::from_static(self.reason.code()),
        );
        response
    }
}

async fn authenticate(
    State(control): State<Arc<Control>>,
    Extension(peer): Extension<Peer>,
    mut request: Request,
    next: Next,
) -> Response {
    let now = control.writer.now();
    match peer.operator(request.headers(), &now, &control.limits) {
        Ok(actor) => {
            request.extensions_mut().insert(actor);
            next.run(request).await
        }
        Err(refusal) => {
            let actor = Actor {
                who: "unknown".to_owned(),
                from: peer.from(),
            };
            let action = request.method().as_str().to_owned();
            control.refused(&actor, &action, request.uri().path(), &refusal);
            refusal.into_response()
        }
    }
}

async fn no_such_path(request: Request) -> Refusal {
    Refusal::not_found(&format!("path {}", request.uri().path()))
}

async fn status(State(control): State<Arc<Control>>) -> Json<Value> {
    Json(show::status(&control))
}

async fn check(State(control): State<Arc<Control>>) -> Json<Value> {
    Json(check::answer(&control))
}

async fn authz(
    State(control): State<Arc<Control>>,
    Query(question): Query<authz::Question>,
) -> Result<Json<Value>, Refusal> {
    authz::answer(&control.writer.now(), &question).map(Json)
}

async fn edges(
    State(control): State<Arc<Control>>,
    Query(question): Query<edges::Question>,
) -> Result<Json<Value>, Refusal> {
    let (now, by_host) = (control.writer.now(), control.edges.all());
    edges::answer(&now, &by_host, clock::now_ms(), &question).map(Json)
}

#[derive(Deserialize)]
struct Filter {
    namespace: Option<String>,
}

async fn list(
    State(control): State<Arc<Control>>,
    Path(kind): Path<String>,
    Query(filter): Query<Filter>,
) -> Result<Json<Value>, Refusal> {
    let items = show::list(&control, &kind, filter.namespace.as_deref())?;
    Ok(Json(json!({"items": items})))
}

async fn list_tokens(State(control): State<Arc<Control>>) -> Result<Json<Value>, Refusal> {
    let items = show::list(&control, "tokens", None)?;
    Ok(Json(json!({"items": items})))
}

async fn one(
    State(control): State<Arc<Control>>,
    Path((kind, namespace, name)): Path<(String, String, String)>,
) -> Result<Json<Value>, Refusal> {
    show::one(&control, &kind, &namespace, &name).map(Json)
}

#[derive(Deserialize)]
struct Limit {
    limit: Option<usize>,
}

async fn audit(
    State(control): State<Arc<Control>>,
    Query(limit): Query<Limit>,
) -> Result<Json<Value>, Refusal> {
    let limit = limit.limit.unwrap_or(AUDIT_DEFAULT).min(LIMIT_MAX);
    let audit = Arc::clone(&control.audit);
    let read = tokio::task::spawn_blocking(move || audit.tail(limit)).await;
    match read
        .map_err(std::io::Error::other)
        .and_then(|entries| entries)
    {
        Ok(entries) => Ok(Json(json!({"items": entries}))),
        Err(error) => {
            log::error!("cannot read the audit log: {error}");
            Err(Refusal::internal())
        }
    }
}

async fn backup(
    State(control): State<Arc<Control>>,
    Extension(actor): Extension<Actor>,
) -> Result<Response, Refusal> {
    let now = control.writer.now();
    let text = tokio::task::spawn_blocking(move || export::render(&now)).await;
    let Ok(Ok(text)) = text else {
        log::error!("cannot write a backup");
        return Err(Refusal::internal());
    };
    control.audited(&actor, "backup", "catalogue");
    let content_type = HeaderValue::from_static("application/jsonl");
    Ok(([(CONTENT_TYPE, content_type)], text).into_response())
}

/// How control and the mesh are, for the admin socket.
pub(crate) fn status_value(control: &Control) -> Value {
    show::status(control)
}

/// Reads a body as JSON. What is wrong with it is told, and no more than that.
fn body<T: serde::de::DeserializeOwned>(bytes: &Bytes) -> Result<T, Refusal> {
    serde_json::from_slice(bytes)
        .map_err(|e| Refusal::new(Reason::Invalid, format!("the body can not be read: {e}")))
}
