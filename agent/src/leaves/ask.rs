//! One call for certificates, and what came of it.

use std::time::Duration;

use mesh_api::proto::mesh_client::MeshClient;
use mesh_api::{proto, sync};
use mesh_core::identity::Identity;
use tonic::transport::Channel;

/// How long a call may take; shorter than what the renewal machine gives an attempt.
const CALL_MAX: Duration = Duration::from_secs(20);

/// For each leaf a chain or a refusal, or why the call failed.
pub(super) struct Renewed {
    pub(super) wanted: Vec<(Identity, String)>,
    pub(super) answer: Result<Vec<proto::LeafResponse>, String>,
}

pub(super) async fn call(
    channel: Channel,
    request: proto::RenewRequest,
    wanted: Vec<(Identity, String)>,
) -> Renewed {
    let mut client = MeshClient::new(channel);
    let answer = match tokio::time::timeout(CALL_MAX, client.renew(request)).await {
        Err(_) => Err(format!("no answer within {} s", CALL_MAX.as_secs())),
        Ok(Err(status)) => Err(sync::printable(status.message())),
        Ok(Ok(response)) => Ok(response.into_inner().leaves),
    };
    Renewed { wanted, answer }
}
