//! `Renew`: new leaves for what a host's token allows, and for nothing else.

use std::time::Instant;

use mesh_api::proto;
use mesh_core::identity::{Identity, SpiffeId};
use mesh_core::reason::Reason;

use crate::audit::Actor;
use crate::auth::Peer;
use crate::ca::{self, LeafOrder};
use crate::catalogue::objects::Host;
use crate::control::Control;
use crate::refusal::Refusal;

/// Most leaves of one call: as many as a host may have workloads.
const LEAVES_MAX: usize = 256;

pub(super) fn renew(
    control: &Control,
    host: &Host,
    peer: &Peer,
    request: &proto::RenewRequest,
) -> Result<proto::RenewResponse, Refusal> {
    if LEAVES_MAX < request.leaves.len() {
        return Err(Refusal::invalid(format!(
            "{} leaves in one call; at most {LEAVES_MAX} may be",
            request.leaves.len()
        )));
    }
    let asked = request.leaves.len();
    control.limits.leaves(&host.uid, asked, Instant::now())?;
    let actor = Actor {
        who: format!("host/{}", host.name),
        from: peer.from(),
    };
    let answer = |leaf: &proto::LeafRequest| match one(control, host, leaf) {
        Ok(certificate_chain) => {
            control.metrics.leaves_signed.inc();
            control.audited(&actor, "sign", &leaf.spiffe_id);
            proto::LeafResponse {
                certificate_chain,
                refusal: None,
            }
        }
        Err(refusal) => {
            control.refused(&actor, "sign", &leaf.spiffe_id, &refusal);
            proto::LeafResponse {
                certificate_chain: Vec::new(),
                refusal: Some(proto::Refusal {
                    reason: refusal.reason.to_wire().into(),
                    message: refusal.message,
                }),
            }
        }
    };
    let leaves = request.leaves.iter().map(answer).collect();
    Ok(proto::RenewResponse { leaves })
}

fn one(
    control: &Control,
    host: &Host,
    leaf: &proto::LeafRequest,
) -> Result<Vec<bytes::Bytes>, Refusal> {
    let id = SpiffeId::parse(&leaf.spiffe_id).map_err(|e| Refusal::invalid(e.to_string()))?;
    let life = allowed(control, host, &id)?;
    let (key, digest) = ca::requested_key(&leaf.csr)?;
    // The key that joined is the host: by it a host that was away for long comes back.
    if matches!(id.identity, Identity::Agent(_)) && !digest.matches(&host.key) {
        return Err(Refusal::new(
            Reason::BadRequestKey,
            "the agent's own credential keeps the key that joined",
        ));
    }
    let order = LeafOrder {
        id: &id,
        source: Some(&host.uid),
        names: &[],
        life_s: life.as_secs(),
    };
    control.sign(&order, &key)
}

/// The life of a leaf that `host` may have.
fn allowed(control: &Control, host: &Host, id: &SpiffeId) -> Result<std::time::Duration, Refusal> {
    let own = id.trust_domain == control.settings.trust_domain;
    if let Identity::Workload(account) = &id.identity
        && control.writer.now().is_revoked(&host.uid, account)
    {
        return Err(Reason::IdentityRevoked.into());
    }
    let life = match &id.identity {
        Identity::Agent(uid) if *uid == host.uid => Some(control.leaves.agent()),
        Identity::Host(name) if *name == host.name => Some(control.leaves.workload()),
        Identity::Workload(account) if host.scope.allows_account(account) => {
            Some(control.leaves.workload())
        }
        _ => None,
    };
    life.filter(|_| own).ok_or_else(|| {
        let message = format!(
            "the token of host {} does not allow the identity {id}",
            host.name
        );
        Refusal::new(Reason::OutOfScope, message)
    })
}
