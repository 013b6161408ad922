//! Coming back after the agent's own credential has ended, because the host was off for longer than it lives: control
//! gives a nonce, the host signs it with the key that joined, and has a new credential. No token is needed for a year.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use mesh_api::proto::mesh_client::MeshClient;
use mesh_api::{proto, sync};
use mesh_core::names::HostUid;
use mesh_core::session::{Attempt, Lost};
use mesh_runtime::tls::client_config;
use mesh_runtime::tls::leaf::read_leaf;
use mesh_runtime::tls::verify::Verifier;
use rustls::sign::CertifiedKey;
use tokio::sync::mpsc;

use super::dial::{self, ALPN_H2, Ended, Event};
use crate::keys;
use crate::peers::unix_now_s;

/// How long each of the two calls may take. Below the time after which the session gives an attempt up.
const CALL_MAX: Duration = Duration::from_secs(6);
/// Largest nonce that is signed, in bytes: ours have 40.
const NONCE_MAX: usize = 256;

/// Whether control would refuse this credential for its age.
pub(super) fn is_over(credential: &CertifiedKey) -> bool {
    let leaf = credential
        .cert
        .first()
        .and_then(|leaf| read_leaf(leaf).ok());
    leaf.is_some_and(|leaf| leaf.not_after_s <= unix_now_s())
}

/// Asks for a new credential; the last event is [`Event::Lost`], for a session needs another connection.
pub(super) async fn run(
    attempt: Attempt,
    address: String,
    verifier: Arc<Verifier>,
    who: (HostUid, String),
    events: mpsc::Sender<(Attempt, Event)>,
) {
    let last = match ask(&address, verifier, &who.0, &who.1).await {
        Ok(chain) => Event::Rejoined(chain),
        Err(ended) => Event::Lost(ended),
    };
    // Fails when the session is gone; then nobody wants to know.
    let _ = events.send((attempt, last)).await;
}

async fn ask(
    address: &str,
    verifier: Arc<Verifier>,
    host: &HostUid,
    key: &str,
) -> Result<Vec<Bytes>, Ended> {
    let local = |error: &dyn std::fmt::Display| Ended {
        why: Lost::Broken,
        reason: None,
        text: format!("this host's credential has ended, and it can not ask for another: {error}"),
    };
    let tls = client_config(None, verifier, &[ALPN_H2]).map_err(|e| local(&e))?;
    let (channel, _) = dial::connect(address, Arc::new(tls)).await?;
    let mut client = MeshClient::new(channel).max_decoding_message_size(sync::MESSAGE_MAX);
    let asked = client.challenge(proto::ChallengeRequest {
        host_uid: host.to_string(),
    });
    let nonce = in_time(asked).await?.nonce;
    if NONCE_MAX < nonce.len() {
        return Err(local(&"control's nonce is too large"));
    }
    let statement = sync::rejoin_statement(host, &nonce);
    let request = proto::RejoinRequest {
        host_uid: host.to_string(),
        nonce,
        csr: keys::request(key, None).map_err(|e| local(&e))?.into(),
        signature: keys::sign(key, &statement).map_err(|e| local(&e))?.into(),
    };
    Ok(in_time(client.rejoin(request)).await?.certificate_chain)
}

async fn in_time<T>(
    call: impl Future<Output = Result<tonic::Response<T>, tonic::Status>>,
) -> Result<T, Ended> {
    match tokio::time::timeout(CALL_MAX, call).await {
        Ok(Ok(response)) => Ok(response.into_inner()),
        Ok(Err(status)) => Err(dial::ended(&status)),
        Err(_) => Err(Ended {
            why: Lost::Silent,
            reason: None,
            text: "control did not answer in time".to_owned(),
        }),
    }
}
