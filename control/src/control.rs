//! What the parts of a running control share.

use std::sync::Arc;

use bytes::Bytes;
use mesh_api::proto;
use mesh_core::reason::Fault;
use rcgen::PublicKeyData;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::audit::{Actor, Audit};
use crate::ca::{Ca, LeafOrder};
use crate::catalogue::objects::Settings;
use crate::clock;
use crate::config::Leaves;
use crate::lease::LeaseHandle;
use crate::limits::Limits;
use crate::metrics::Metrics;
use crate::refusal::Refusal;
use crate::writer::Writer;

#[derive(Debug)]
pub(crate) struct Control {
    pub settings: Arc<Settings>,
    pub bundle: proto::TrustBundle,
    pub leaves: Leaves,
    pub ca: Ca,
    pub writer: Writer,
    pub leases: LeaseHandle,
    pub limits: Limits,
    pub audit: Arc<Audit>,
    pub metrics: Arc<Metrics>,
    /// The tasks of sessions.
    pub sessions: TaskTracker,
    pub stopping: CancellationToken,
}

impl Control {
    pub(crate) fn mesh_settings(&self) -> proto::MeshSettings {
        proto::MeshSettings {
            dns_suffix: self.settings.dns_suffix.clone(),
            vip4_range: self.settings.vip4_range.clone(),
            vip6_range: self.settings.vip6_range.clone(),
        }
    }

    /// Signs a leaf; its chain as the wire has it.
    pub(crate) fn sign(
        &self,
        order: &LeafOrder<'_>,
        key: &impl PublicKeyData,
    ) -> Result<Vec<Bytes>, Refusal> {
        let signed = self.ca.sign(order, key, clock::now_s());
        let chain = signed.map_err(|error| {
            log::error!(id:% = order.id; "{error}");
            Refusal::internal()
        })?;
        Ok(chain.iter().map(|der| der.to_vec().into()).collect())
    }

    /// Notes a refusal that never came to the writer.
    pub(crate) fn refused(&self, actor: &Actor, action: &str, object: &str, refusal: &Refusal) {
        let (who, from) = (actor.who.as_str(), actor.from.as_str());
        let reason = refusal.reason.code();
        match refusal.reason.fault() {
            Fault::Local => {
                log::warn!(action, object, who, from, reason; "refused: {refusal}");
            }
            Fault::Peer | Fault::Policy | Fault::Upstream => {
                log::info!(action, object, who, from, reason; "refused: {refusal}");
            }
        }
        self.metrics.refused(refusal.reason);
        let revision = self.writer.now().revision;
        self.audit
            .append(actor, action, object, Some(refusal.reason), revision);
    }

    /// Notes an act that changes nothing in the catalogue.
    pub(crate) fn audited(&self, actor: &Actor, action: &str, object: &str) {
        let revision = self.writer.now().revision;
        self.audit.append(actor, action, object, None, revision);
    }
}
