//! What agents call: `Join`, `Renew`, `Sync`, `Leave`, `Explain`. One file each, but for those of a few lines; this one says who may call
//! what.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use mesh_api::proto;
use mesh_api::proto::mesh_server::Mesh;
use mesh_core::reason::Reason;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

mod explain;
mod join;
mod outbox;
pub(crate) mod rejoin;
mod renew;
mod report;
mod sync;

use crate::audit::Actor;
use crate::auth::Peer;
use crate::catalogue::command::Command;
use crate::catalogue::objects::{Offer, Workload};
use crate::control::Control;
use crate::refusal::Refusal;

/// Largest message of an agent, in bytes.
pub(crate) const MESSAGE_MAX: usize = 4 * 1024 * 1024;

#[derive(Clone, Debug)]
pub(crate) struct MeshService {
    control: Arc<Control>,
}

impl MeshService {
    pub(crate) fn new(control: Arc<Control>) -> Self {
        Self { control }
    }
}

#[tonic::async_trait]
impl Mesh for MeshService {
    type SyncStream = ReceiverStream<Result<proto::FromControl, Status>>;

    async fn join(
        &self,
        request: Request<proto::JoinRequest>,
    ) -> Result<Response<proto::JoinResponse>, Status> {
        let peer = peer(&request)?;
        let address = peer.address.ip().to_canonical();
        let limits = &self.control.limits;
        limits.check(address, Instant::now()).inspect_err(|r| {
            let id = request.get_ref().token_id.clone();
            self.refused(&token_actor(&id, address), "join", "", r);
        })?;
        let joined = join::join(&self.control, address, request.into_inner()).await;
        match joined {
            Ok(response) => Ok(Response::new(response)),
            Err(refusal) => {
                limits.failed(address, Instant::now());
                Err(refusal.into())
            }
        }
    }

    async fn renew(
        &self,
        request: Request<proto::RenewRequest>,
    ) -> Result<Response<proto::RenewResponse>, Status> {
        let peer = peer(&request)?;
        let host = peer.agent(&self.control.writer.now());
        let host = host.inspect_err(|r| self.refused(&unknown(&peer), "renew", "", r))?;
        let response = renew::renew(&self.control, &host, &peer, request.get_ref());
        let response = response.inspect_err(|r| self.refused(&unknown(&peer), "renew", "", r))?;
        Ok(Response::new(response))
    }

    async fn challenge(
        &self,
        request: Request<proto::ChallengeRequest>,
    ) -> Result<Response<proto::ChallengeResponse>, Status> {
        let address = peer(&request)?.address.ip().to_canonical();
        self.control.limits.check(address, Instant::now())?;
        let response = rejoin::challenge(&self.control, request.get_ref())?;
        Ok(Response::new(response))
    }

    async fn rejoin(
        &self,
        request: Request<proto::RejoinRequest>,
    ) -> Result<Response<proto::RejoinResponse>, Status> {
        let address = peer(&request)?.address.ip().to_canonical();
        let limits = &self.control.limits;
        limits.check(address, Instant::now())?;
        let rejoined = rejoin::rejoin(&self.control, address, request.get_ref());
        let response = rejoined.inspect_err(|_| limits.failed(address, Instant::now()))?;
        Ok(Response::new(response))
    }

    async fn sync(
        &self,
        request: Request<tonic::Streaming<proto::FromAgent>>,
    ) -> Result<Response<Self::SyncStream>, Status> {
        let peer = peer(&request)?;
        let host = peer.agent(&self.control.writer.now());
        let host = host.inspect_err(|r| self.refused(&unknown(&peer), "sync", "", r))?;
        let stream = sync::start(&self.control, &host, &peer, request.into_inner());
        Ok(Response::new(stream))
    }

    async fn leave(
        &self,
        request: Request<proto::LeaveRequest>,
    ) -> Result<Response<proto::LeaveResponse>, Status> {
        let peer = peer(&request)?;
        let host = peer.agent(&self.control.writer.now());
        let host = host.inspect_err(|r| self.refused(&unknown(&peer), "leave", "", r))?;
        let actor = Actor {
            who: format!("host/{}", host.name),
            from: peer.from(),
        };
        let command = Command::RemoveHost {
            name: host.name.clone(),
        };
        self.control.writer.ask(actor, command).await?;
        Ok(Response::new(proto::LeaveResponse {}))
    }

    async fn explain(
        &self,
        request: Request<proto::ExplainRequest>,
    ) -> Result<Response<proto::ExplainResponse>, Status> {
        let peer = peer(&request)?;
        let now = self.control.writer.now();
        let host = peer.agent(&now);
        let host = host.inspect_err(|r| self.refused(&unknown(&peer), "explain", "", r))?;
        let limits = &self.control.limits;
        let response = limits
            .question(&host.uid, Instant::now())
            .and_then(|()| explain::explain(&now, &host, request.get_ref()));
        let response = response.inspect_err(|r| self.refused(&unknown(&peer), "explain", "", r))?;
        Ok(Response::new(response))
    }
}

impl MeshService {
    fn refused(&self, actor: &Actor, action: &str, object: &str, refusal: &Refusal) {
        self.control.refused(actor, action, object, refusal);
    }
}

fn peer<T>(request: &Request<T>) -> Result<Peer, Refusal> {
    let peer = request.extensions().get::<Peer>().cloned();
    peer.ok_or_else(Refusal::internal)
}

fn unknown(peer: &Peer) -> Actor {
    let who = peer.leaf.as_ref().map(|leaf| leaf.id.identity.to_string());
    Actor {
        who: who.unwrap_or_else(|| "unknown".to_owned()),
        from: peer.from(),
    }
}

fn token_actor(id: &str, from: IpAddr) -> Actor {
    let known = id.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
    Actor {
        who: if known {
            format!("token/{id}")
        } else {
            "token/(malformed)".to_owned()
        },
        from: from.to_string(),
    }
}

/// A name that came over the wire.
fn name<T: std::str::FromStr<Err = mesh_core::names::NameError>>(text: &str) -> Result<T, Refusal> {
    text.parse()
        .map_err(|e: mesh_core::names::NameError| Refusal::new(Reason::Invalid, e.to_string()))
}

/// A port that came over the wire; 0 is none.
fn port(number: u32) -> Result<Option<u16>, Refusal> {
    let port = u16::try_from(number)
        .map_err(|_| Refusal::invalid(format!("{number} is no port; use 1 to 65535")))?;
    Ok((port != 0).then_some(port))
}
