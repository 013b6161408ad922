//! Who is calling: by the client certificate of the connection, or by an operator's bearer token.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use http::HeaderMap;
use http::header::AUTHORIZATION;
use mesh_core::identity::Identity;
use mesh_core::names::HostUid;
use mesh_core::reason::Reason;
use mesh_runtime::tls::leaf::LeafFacts;

use crate::audit::Actor;
use crate::catalogue::Catalogue;
use crate::catalogue::objects::{Digest, Host};
use crate::clock;
use crate::limits::Limits;
use crate::refusal::Refusal;

/// The other end of a connection.
#[derive(Clone, Debug)]
pub(crate) struct Peer {
    pub address: SocketAddr,
    /// Verified at the handshake.
    pub leaf: Option<Arc<LeafFacts>>,
}

impl Peer {
    pub(crate) fn from(&self) -> String {
        self.address.ip().to_canonical().to_string()
    }

    /// The identity of the certificate. It is looked at for each call: connections outlive certificates.
    fn identity(&self) -> Result<&Identity, Refusal> {
        let leaf = self.leaf.as_deref();
        let leaf = leaf.ok_or(Reason::NotAuthenticated)?;
        if leaf.not_after_s < clock::now_s().cast_signed() {
            return Err(Reason::CertificateExpired.into());
        }
        Ok(&leaf.id.identity)
    }

    /// The host whose agent calls.
    pub(crate) fn agent(&self, catalogue: &Catalogue) -> Result<Arc<Host>, Refusal> {
        let uid = self.agent_uid()?;
        let host = catalogue.hosts.get(uid).cloned();
        host.ok_or_else(|| Reason::HostRevoked.into())
    }

    fn agent_uid(&self) -> Result<&HostUid, Refusal> {
        match self.identity()? {
            Identity::Agent(uid) => Ok(uid),
            _ => Err(Refusal::new(
                Reason::NotAuthorized,
                "only agents may call this; the operator API is under /v1",
            )),
        }
    }

    /// The operator who calls.
    pub(crate) fn operator(
        &self,
        headers: &HeaderMap,
        catalogue: &Catalogue,
        limits: &Limits,
    ) -> Result<Actor, Refusal> {
        let actor = |name: &dyn std::fmt::Display| Actor {
            who: format!("operator/{name}"),
            from: self.from(),
        };
        if let Ok(Identity::Operator(name)) = self.identity() {
            return Ok(actor(name));
        }
        let address = self.address.ip();
        limits.check(address, Instant::now())?;
        let bearer = headers.get(AUTHORIZATION);
        let bearer = bearer.and_then(|value| value.as_bytes().strip_prefix(b"Bearer "));
        let digest = bearer.map(Digest::of);
        // All are compared: how long it takes must not tell which one was near.
        let all = catalogue.operators.values();
        let found = all.fold(None, |found, operator| {
            let matches = digest.is_some_and(|digest| operator.secret.matches(&digest));
            if matches { Some(operator) } else { found }
        });
        match found {
            Some(operator) => Ok(actor(&operator.name)),
            None => {
                limits.failed(address, Instant::now());
                Err(Reason::NotAuthenticated.into())
            }
        }
    }
}
