//! Whether another agent answers, as who it should be: for `explain` and `check`. Nothing is asked of its services.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_core::names::{Account, HostUid};
use mesh_core::reason::Reason;
use mesh_core::service::Endpoint;
use mesh_runtime::tls::handshake;
use mesh_runtime::tls::leaf::read_leaf;
use mesh_runtime::tls::verify::handshake_reason;
use rustls_pki_types::ServerName;
use serde::{Deserialize, Serialize};
use tokio::io::AsyncReadExt as _;
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use crate::view::Leaf;

/// How long one agent may take for all of it. Shorter than what who asked waits for.
const ANSWER_MAX: Duration = Duration::from_secs(4);

/// Another agent, and how it answered.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Probed {
    /// Its mesh port.
    pub(crate) address: String,
    /// `namespace/account` that it must show.
    pub(crate) account: String,
    pub(crate) host_uid: String,
    /// As control says: healthy or stale.
    pub(crate) health: String,
    /// How long it took, milliseconds; `None`: it did not answer.
    pub(crate) took_ms: Option<u64>,
    /// Why it did not: code of a reason.
    pub(crate) reason: Option<String>,
}

impl Probed {
    /// An endpoint that was not asked.
    pub(crate) fn unasked(endpoint: &Endpoint) -> Self {
        Self {
            address: SocketAddr::new(endpoint.address, endpoint.mesh_port).to_string(),
            account: endpoint.account.to_string(),
            host_uid: endpoint.host.to_string(),
            health: match endpoint.health {
                mesh_core::service::Health::Healthy => "healthy",
                mesh_core::service::Health::Stale => "stale",
            }
            .to_owned(),
            took_ms: None,
            reason: None,
        }
    }
}

/// Asks the agents of all `endpoints` at once, as the identity of `leaf`. The answers are in their order.
pub(crate) async fn probe_all(leaf: &Arc<Leaf>, endpoints: &[Endpoint]) -> Vec<Probed> {
    let mut asked = JoinSet::new();
    for (index, endpoint) in endpoints.iter().enumerate() {
        let address = SocketAddr::new(endpoint.address, endpoint.mesh_port);
        let (account, host) = (endpoint.account.clone(), endpoint.host.clone());
        let leaf = Arc::clone(leaf);
        asked.spawn(async move {
            let begun = Instant::now();
            let answer = tokio::time::timeout(ANSWER_MAX, probe(&leaf, address, &account, &host));
            let answer = answer.await.unwrap_or(Err(Reason::PeerUnreachable));
            (index, answer.map(|()| begun.elapsed()))
        });
    }
    let mut probed: Vec<Probed> = endpoints.iter().map(Probed::unasked).collect();
    while let Some(Ok((index, answer))) = asked.join_next().await {
        match answer {
            Ok(took) => {
                probed[index].took_ms = Some(u64::try_from(took.as_millis()).unwrap_or(u64::MAX));
            }
            Err(reason) => probed[index].reason = Some(reason.code().to_owned()),
        }
    }
    probed
}

/// Connects as the identity of `leaf` to the agent that must be `account` on `host`, until it has taken that identity.
async fn probe(
    leaf: &Leaf,
    address: SocketAddr,
    account: &Account,
    host: &HostUid,
) -> Result<(), Reason> {
    let socket = TcpStream::connect(address)
        .await
        .map_err(|_| Reason::PeerUnreachable)?;
    let name = format!(
        "{}.{}.{}",
        account.name, account.namespace, leaf.id.trust_domain
    );
    let name = ServerName::try_from(name).map_err(|_| Reason::PeerIdentity)?;
    let mut tls = handshake::connect(Arc::clone(&leaf.client), name, socket)
        .await
        .map_err(|error| match handshake_reason(&error) {
            reason @ (Reason::PeerIdentity | Reason::CertificateExpired) => reason,
            _ => Reason::PeerHandshake,
        })?;
    let shown = tls.peer.as_ref().ok_or(Reason::PeerIdentity)?;
    if read_leaf(shown)?.host.as_ref() != Some(host) {
        return Err(Reason::PeerIdentity);
    }
    // A server judges its client after the client's handshake is through: its first bytes say that it has.
    let mut first = [0; 1];
    match tls.stream.read(&mut first).await {
        Ok(1..) => Ok(()),
        _ => Err(Reason::PeerHandshake),
    }
}
