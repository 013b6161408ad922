//! HTTPS to the operator API: TLS 1.3, trust in the context's root and nothing else, a bearer token.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use http::header::{AUTHORIZATION, CONTENT_TYPE, HOST};
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper_util::rt::TokioIo;
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, ServerName};
use serde_json::Value;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use crate::context::Context;
use crate::failure::Failure;

/// How long one address may take to accept and shake hands before the next is tried.
const CONNECT_MAX: Duration = Duration::from_secs(5);
/// How long control may take to begin its answer: a group commit takes milliseconds.
const ANSWER_MAX: Duration = Duration::from_secs(30);
/// Largest answer held in memory: 10,000 services of about 2 KiB, thrice.
const BODY_MAX: usize = 64 * 1024 * 1024;

pub(crate) struct Client {
    context: Context,
    tls: TlsConnector,
}

/// One request.
#[derive(Clone, Debug)]
pub(crate) struct Ask<'a> {
    /// For messages: what is done, and to what.
    pub operation: &'a str,
    pub object: &'a str,
    pub method: Method,
    pub path: &'a str,
    pub body: Option<&'a Value>,
}

impl Client {
    pub(crate) fn new(context: Context) -> Result<Self, Failure> {
        let bad = |cause: &dyn fmt::Display| {
            Failure::usage(
                "read",
                "the root certificate of the context file",
                cause,
                "use the admin.yaml that `mesh-control init` wrote, unchanged",
            )
        };
        let mut roots = RootCertStore::empty();
        for root in CertificateDer::pem_slice_iter(context.root.as_bytes()) {
            roots.add(root.map_err(|e| bad(&e))?).map_err(|e| bad(&e))?;
        }
        if roots.is_empty() {
            return Err(bad(&"it has no certificate"));
        }
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|e| bad(&e))?
            .with_root_certificates(roots)
            .with_no_client_auth();
        Ok(Self {
            context,
            tls: TlsConnector::from(Arc::new(config)),
        })
    }

    /// Asks and reads a JSON answer; an empty one is `null`.
    pub(crate) async fn json(&self, ask: &Ask<'_>) -> Result<Value, Failure> {
        let (address, response) = self.stream(ask).await?;
        let bytes = collect(&address, response).await?;
        if bytes.is_empty() {
            return Ok(Value::Null);
        }
        serde_json::from_slice(&bytes)
            .map_err(|e| not_control(&address, &format!("its answer is not JSON: {e}")))
    }

    /// Asks; the answer was a success and its body is still to be read.
    pub(crate) async fn stream(
        &self,
        ask: &Ask<'_>,
    ) -> Result<(String, Response<Incoming>), Failure> {
        let mut tried = Vec::new();
        for address in &self.context.addresses {
            match timeout(CONNECT_MAX, self.dial(address)).await {
                Ok(Ok(stream)) => return self.call(address, stream, ask).await,
                Ok(Err(cause)) => tried.push(format!("{address}: {cause}")),
                Err(_) => tried.push(format!(
                    "{address}: no answer within {} s",
                    CONNECT_MAX.as_secs()
                )),
            }
        }
        Err(Failure::unreachable(
            "control",
            tried.join("; "),
            "see whether mesh-control runs and whether the context file names its address",
        ))
    }

    async fn dial(
        &self,
        address: &str,
    ) -> Result<tokio_rustls::client::TlsStream<TcpStream>, String> {
        let (host, _) = address
            .rsplit_once(':')
            .ok_or_else(|| "an address is written host:port".to_owned())?;
        let host = host.trim_start_matches('[').trim_end_matches(']');
        let name = ServerName::try_from(host.to_owned()).map_err(|e| e.to_string())?;
        let tcp = TcpStream::connect(address)
            .await
            .map_err(|e| e.to_string())?;
        tcp.set_nodelay(true).map_err(|e| e.to_string())?;
        let tls = self.tls.connect(name, tcp).await;
        tls.map_err(|e| format!("it is not the control of this context: {e}"))
    }

    async fn call(
        &self,
        address: &str,
        stream: tokio_rustls::client::TlsStream<TcpStream>,
        ask: &Ask<'_>,
    ) -> Result<(String, Response<Incoming>), Failure> {
        let lost = |cause: &dyn fmt::Display| {
            Failure::unreachable(
                address,
                format!("the connection broke during the call: {cause}"),
                "look whether the change was made before you repeat it",
            )
        };
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|e| lost(&e))?;
        // Ends with the response's body, or with this process.
        tokio::spawn(connection);
        let request = self.request(address, ask)?;
        let response = timeout(ANSWER_MAX, sender.send_request(request))
            .await
            .map_err(|_| lost(&format!("no answer within {} s", ANSWER_MAX.as_secs())))?
            .map_err(|e| lost(&e))?;
        if response.status().is_success() {
            return Ok((address.to_owned(), response));
        }
        let status = response.status();
        let body = collect(address, response).await?;
        Err(refusal(status, &body, ask))
    }

    fn request(&self, address: &str, ask: &Ask<'_>) -> Result<Request<Full<Bytes>>, Failure> {
        let body = ask.body.map(Value::to_string).unwrap_or_default();
        Request::builder()
            .method(&ask.method)
            .uri(ask.path)
            .header(HOST, address)
            .header(AUTHORIZATION, format!("Bearer {}", self.context.token))
            .header(CONTENT_TYPE, "application/json")
            .body(Full::new(Bytes::from(body)))
            .map_err(|e| Failure::usage(ask.operation, ask.object, e, "correct its name"))
    }
}

/// Reads a body that must fit into memory.
async fn collect(address: &str, response: Response<Incoming>) -> Result<Bytes, Failure> {
    let body = Limited::new(response.into_body(), BODY_MAX);
    let collected = body.collect().await;
    Ok(collected
        .map_err(|e| not_control(address, &format!("its answer could not be read: {e}")))?
        .to_bytes())
}

fn not_control(address: &str, cause: &str) -> Failure {
    Failure::unreachable(
        address,
        cause,
        "see whether meshctl and mesh-control are of the same or the next minor version",
    )
}

/// Reads `{"reason": …, "message": …}`; anything else is shown as it came.
fn refusal(status: StatusCode, body: &[u8], ask: &Ask<'_>) -> Failure {
    let error: Value = serde_json::from_slice(body).unwrap_or_default();
    let text = |field: &str| error.get(field).and_then(Value::as_str);
    let raw = String::from_utf8_lossy(body);
    let message = text("message").unwrap_or_else(|| raw.trim());
    let reason = text("reason").unwrap_or_else(|| status.as_str());
    Failure::refused(ask.operation, ask.object, reason, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_keeps_the_reason_of_control() {
        let ask = Ask {
            operation: "delete",
            object: "service shop/web",
            method: Method::DELETE,
            path: "/v1/services/shop/web",
            body: None,
        };
        let body = br#"{"reason":"conflict","message":"owned by host vm-1"}"#;
        let text = refusal(StatusCode::CONFLICT, body, &ask).to_string();
        for part in ["delete service shop/web", "owned by host vm-1", "conflict"] {
            assert!(text.contains(part), "{part}: {text}");
        }
        // What control could not read was typed wrong.
        for (reason, code) in [("conflict", 1), ("invalid", 2)] {
            let body = format!(r#"{{"reason":"{reason}","message":"x"}}"#);
            let failure = refusal(StatusCode::BAD_REQUEST, body.as_bytes(), &ask);
            assert_eq!(
                failure.exit_code(),
                std::process::ExitCode::from(code),
                "{reason}"
            );
        }
        let text = refusal(StatusCode::BAD_GATEWAY, b"oops", &ask).to_string();
        assert!(text.contains("oops") && text.contains("502"), "{text}");
    }
}
