//! `Join`: a token and a key become a host.

use std::net::IpAddr;

use mesh_api::proto;
use mesh_api::token::JoinToken;
use mesh_core::identity::{Identity, SpiffeId};
use mesh_core::names::HostUid;
use mesh_core::reason::Reason;

use super::{name, port, token_actor};
use crate::ca::{self, LeafOrder};
use crate::catalogue::command::{Command, Join, Outcome};
use crate::catalogue::objects::Digest;
use crate::clock;
use crate::control::Control;
use crate::refusal::Refusal;

/// TCP port of agents, where they do not say.
const MESH_PORT: u16 = 7441;
/// Longest version text of a peer that is kept, in bytes.
pub(super) const VERSION_MAX: usize = 64;

pub(super) async fn join(
    control: &Control,
    from: IpAddr,
    request: proto::JoinRequest,
) -> Result<proto::JoinResponse, Refusal> {
    let actor = token_actor(&request.token_id, from);
    let (key, digest) = ca::requested_key(&request.csr)
        .map_err(Refusal::from)
        .inspect_err(|r| control.refused(&actor, "join", &request.host_name, r))?;
    let command = command(&request, digest, from)
        .inspect_err(|r| control.refused(&actor, "join", &request.host_name, r))?;
    let outcome = control
        .writer
        .ask(actor, Command::Join(Box::new(command)))
        .await?;
    let Outcome::Joined(host) = outcome else {
        return Err(Refusal::internal());
    };
    log::info!(host = host.name.as_str(), uid = host.uid.as_str(), address:% = host.address; "host joined");
    let settings = &control.settings;
    let id = SpiffeId {
        trust_domain: settings.trust_domain.clone(),
        identity: Identity::Agent(host.uid.clone()),
    };
    let order = LeafOrder {
        id: &id,
        source: Some(&host.uid),
        names: &[],
        life_s: control.leaves.agent().as_secs(),
    };
    let chain = control.sign(&order, &key)?;
    Ok(proto::JoinResponse {
        host_uid: host.uid.to_string(),
        host_name: host.name.to_string(),
        trust_domain: settings.trust_domain.to_string(),
        certificate_chain: chain,
        bundle: Some(control.bundle.clone()),
        mesh: Some(control.mesh_settings()),
        network: host.network.to_string(),
        address: host.address.to_string(),
        control_time_ms: clock::now_ms(),
    })
}

fn command(request: &proto::JoinRequest, key: Digest, from: IpAddr) -> Result<Join, Refusal> {
    let address = if request.address.is_empty() {
        if from.is_loopback() {
            return Err(Refusal::invalid(
                "the call came from a loopback address, where no other host finds this one; say an address \
                 with --address",
            ));
        }
        from
    } else {
        let address: Result<IpAddr, _> = request.address.parse();
        let bad = |_| Refusal::invalid("--address is no IP address; write it like 10.0.0.1");
        address.map_err(bad)?.to_canonical()
    };
    let network = (!request.network.is_empty()).then(|| name(&request.network));
    let secret = JoinToken::read_secret(&request.token_secret).ok_or(Reason::TokenMalformed)?;
    Ok(Join {
        token: request.token_id.clone(),
        secret: Digest::of(&secret),
        key,
        uid: new_uid()?,
        host_name: name(&request.host_name)?,
        network: network.transpose()?,
        address,
        mesh_port: port(request.mesh_port)?.unwrap_or(MESH_PORT),
        version: version(&request.version),
    })
}

/// What a peer says of its version: shown, never acted on.
pub(super) fn version(text: &str) -> String {
    let plain = |c: &char| c.is_ascii_graphic();
    text.chars().filter(plain).take(VERSION_MAX).collect()
}

fn new_uid() -> Result<HostUid, Refusal> {
    let text = format!("{:032x}", u128::from_be_bytes(ca::random::<16>()));
    text.parse().map_err(|_| Reason::Internal.into())
}
