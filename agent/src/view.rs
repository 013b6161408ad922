//! One immutable picture of all that the data path decides by. Each part has one owner who replaces it; readers
//! hold a whole picture for as long as one decision takes.

use std::collections::BTreeMap;
use std::sync::Arc;

use mesh_core::identity::{Identity, SpiffeId};
use mesh_core::names::{Account, HostUid, Label, Network, ServiceName, TrustDomain};
use mesh_core::policy::PolicySet;
use mesh_core::reason::Reason;
use mesh_core::revocation::Revocations;
use mesh_core::service::{Endpoint, Index};
use mesh_core::vip::VipRanges;
use rustls::ClientConfig;
use rustls::sign::CertifiedKey;
use tokio::sync::watch;

use crate::health::Unfit;
use crate::reals::Reals;
use crate::whose::OwnerTable;
use crate::workloads::WorkloadSet;

/// Of each service that was asked for.
pub(crate) type Endpoints = BTreeMap<ServiceName, Arc<Vec<Endpoint>>>;

/// The picture. Cheap to clone: all of it is shared.
#[derive(Clone, Debug)]
pub(crate) struct View {
    pub(crate) host: Arc<HostFacts>,
    /// `None` until one was received or read from disk.
    pub(crate) index: Option<Arc<Index>>,
    /// `None` until they were received or read from disk: then nobody is let in.
    pub(crate) policies: Option<Arc<PolicySet>>,
    /// Only services that were asked for.
    pub(crate) endpoints: Arc<Endpoints>,
    pub(crate) workloads: Arc<WorkloadSet>,
    /// Servers without an agent that fail their service's check.
    pub(crate) unfit: Arc<Unfit>,
    /// Whose a socket is, by what the kernel says of it.
    pub(crate) owners: Arc<OwnerTable>,
    /// Where calls to real addresses are taken over.
    pub(crate) reals: Arc<Reals>,
    pub(crate) leaves: Arc<Leaves>,
    /// What must no more be believed, of this host too. `None`: it is not known, and nobody is believed.
    pub(crate) revoked: Option<Arc<Revocations>>,
    /// Whether the session with control is live, or dialled for the first time: only then is it worth waiting for an answer.
    pub(crate) live: bool,
    /// Control was dialled in vain, and never reached since the start.
    pub(crate) unreached: bool,
}

impl View {
    /// Nothing more comes of waiting for the endpoints of a service.
    pub(crate) fn is_settled(&self, service: &ServiceName) -> bool {
        self.endpoints.contains_key(service) || self.unreached
    }

    /// The certificate of an identity that this host may speak for.
    pub(crate) fn leaf(&self, identity: &Identity) -> Result<&Arc<Leaf>, Reason> {
        let revoked = self.revoked.as_ref().ok_or(Reason::RevocationsUnknown)?;
        if revoked.cover(&self.host.uid, identity) {
            return Err(Reason::IdentityRevoked);
        }
        self.leaves.of(identity).ok_or(Reason::NoIdentity)
    }
}

/// What the join gave this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct HostFacts {
    pub(crate) uid: HostUid,
    pub(crate) name: Label,
    pub(crate) trust_domain: TrustDomain,
    pub(crate) network: Network,
    pub(crate) vips: VipRanges,
    /// e.g. `mesh.internal`, without dots around it.
    pub(crate) dns_suffix: String,
}

/// The identities that this host may speak for now.
#[derive(Clone, Debug, Default)]
pub(crate) struct Leaves {
    pub(crate) workloads: BTreeMap<Account, Arc<Leaf>>,
    /// For processes that match no workload.
    pub(crate) host: Option<Arc<Leaf>>,
}

/// A certificate in use, with what is made of it once and not per connection.
#[derive(Debug)]
pub(crate) struct Leaf {
    pub(crate) id: SpiffeId,
    pub(crate) key: Arc<CertifiedKey>,
    /// Shows this leaf and accepts only the workload that the SNI names.
    pub(crate) client: Arc<ClientConfig>,
    /// Unix time, seconds.
    pub(crate) not_after_s: i64,
}

impl Leaves {
    pub(crate) fn of(&self, identity: &Identity) -> Option<&Arc<Leaf>> {
        match identity {
            Identity::Workload(account) => self.workloads.get(account),
            Identity::Host(_) => self.host.as_ref(),
            _ => None,
        }
    }
}

/// What readers hold.
pub(crate) type ViewReader = watch::Receiver<Arc<View>>;

/// What owners of a part hold.
#[derive(Clone, Debug)]
pub(crate) struct ViewWriter(Arc<watch::Sender<Arc<View>>>);

impl ViewWriter {
    pub(crate) fn new(view: View) -> Self {
        Self(Arc::new(watch::Sender::new(Arc::new(view))))
    }

    pub(crate) fn reader(&self) -> ViewReader {
        self.0.subscribe()
    }

    /// Replaces a part; all readers see the new picture from their next decision on.
    pub(crate) fn change(&self, change: impl FnOnce(&mut View)) {
        self.0.send_modify(|view| change(Arc::make_mut(view)));
    }

    /// The picture as it is now.
    pub(crate) fn now(&self) -> Arc<View> {
        Arc::clone(&self.0.borrow())
    }
}
