//! What the parts of a running control share.

use std::sync::Arc;

use anyhow::Context as _;
use bytes::Bytes;
use mesh_api::proto;
use mesh_core::reason::Fault;
use mesh_core::revocation::Revocation;
use rcgen::PublicKeyData;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::acks::Acks;
use crate::audit::{Actor, Audit};
use crate::bypasses::Bypasses;
use crate::ca::{Ca, LeafOrder};
use crate::catalogue::objects::{Revoked, Settings};
use crate::clocks::Clocks;
use crate::config::{Config, Leaves};
use crate::edges::Edges;
use crate::lease::{LeaseHandle, LeaseLoop};
use crate::limits::Limits;
use crate::metrics::Metrics;
use crate::refusal::Refusal;
use crate::rpc::rejoin::Nonces;
use crate::store::Store;
use crate::writer::{Writer, WriterLoop};
use crate::{clock, init};

#[derive(Debug)]
pub(crate) struct Control {
    pub settings: Arc<Settings>,
    pub bundle: proto::TrustBundle,
    pub leaves: Leaves,
    pub ca: Ca,
    pub writer: Writer,
    pub leases: LeaseHandle,
    pub edges: Edges,
    pub acks: Acks,
    pub nonces: Nonces,
    pub limits: Limits,
    pub clocks: Clocks,
    pub bypasses: Bypasses,
    pub audit: Arc<Audit>,
    pub metrics: Arc<Metrics>,
    /// The tasks of sessions.
    pub sessions: TaskTracker,
    pub stopping: CancellationToken,
}

/// A control that is open but does not serve yet, and the loops of its owners.
pub(crate) struct Opened {
    pub control: Arc<Control>,
    pub writer_loop: WriterLoop,
    pub lease_loop: LeaseLoop,
}

impl Control {
    /// Opens all that is stored.
    pub(crate) fn open(config: &Config) -> anyhow::Result<Opened> {
        let state = &config.state_dir;
        let ca = Ca::load(state).map_err(|error| {
            let missing = matches!(state.join("ca").try_exists(), Ok(false));
            let advice = if missing {
                "no certificate authority there; run `mesh-control init` first"
            } else {
                "the certificate authority can not be used; is it of the user that runs mesh-control?"
            };
            anyhow::Error::new(error).context(format!("{}: {advice}", state.display()))
        })?;
        let stored = Store::open(state, init::new_epoch())?;
        if let Some(lost) = &stored.lost {
            log::error!("{lost}");
        }
        let audit = Arc::new(Audit::open(state).context("cannot open the audit log")?);
        let metrics = Metrics::new();
        let settings = Arc::clone(&stored.catalogue.settings);
        let (writer, writer_loop) = Writer::new(
            stored.store,
            stored.catalogue,
            Arc::clone(&audit),
            Arc::clone(&metrics),
        )
        .map_err(anyhow::Error::msg)?;
        let (leases, lease_loop) = LeaseHandle::new(&writer);
        let control = Arc::new(Self {
            bundle: ca.bundle(&settings.trust_domain, settings.bundle),
            settings,
            leaves: config.leaves,
            ca,
            writer,
            leases,
            edges: Edges::default(),
            acks: Acks::default(),
            nonces: Nonces::default(),
            limits: Limits::default(),
            clocks: Clocks::default(),
            bypasses: Bypasses::default(),
            audit,
            metrics,
            sessions: TaskTracker::new(),
            stopping: CancellationToken::new(),
        });
        Ok(Opened {
            control,
            writer_loop,
            lease_loop,
        })
    }

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

    /// A revocation as agents get it. It is signed once.
    pub(crate) fn signed(&self, revoked: &Revoked) -> Revocation {
        let subject = revoked.subject();
        let signature = revoked.signature.get_or_init(|| {
            let statement = subject.statement(&self.settings.trust_domain, revoked.at_s);
            let signed = self.ca.sign_statement(&statement);
            // Unsigned it has its effect, and only a restored control will not believe it.
            let signed = signed.unwrap_or_else(|error| {
                log::error!("{error}");
                Vec::new()
            });
            signed.into()
        });
        Revocation {
            at_s: revoked.at_s,
            signature: Arc::clone(signature),
            issuer: self.ca.issuer(),
            subject,
        }
    }

    /// Notes a refusal that never came to the writer. A caller that is refused without end is only counted after a while.
    pub(crate) fn refused(&self, actor: &Actor, action: &str, object: &str, refusal: &Refusal) {
        self.metrics.refused(refusal.reason);
        let revision = self.writer.now().revision;
        let refused = Some(refusal.reason);
        if !self.audit.append(actor, action, object, refused, revision) {
            return;
        }
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
    }

    /// Notes an act that changes nothing in the catalogue.
    pub(crate) fn audited(&self, actor: &Actor, action: &str, object: &str) {
        let revision = self.writer.now().revision;
        self.audit.append(actor, action, object, None, revision);
    }
}
