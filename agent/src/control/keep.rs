//! Keeps what control sent on disk, beside the way of calls: the newest state is written whenever the last writing is
//! done, whatever came between is never written.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use mesh_api::stored::{
    StoredEndpoints, StoredIndex, StoredPolicies, StoredRevocations, StoredService,
};
use mesh_api::{proto, sync};
use mesh_core::names::ServiceName;
use mesh_core::revocation::Revocations;
use mesh_core::service::Index;
use mesh_core::session::Installed;
use mesh_runtime::files::FileError;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::state::{Kept, State};

/// Between two writings: endpoints of a busy mesh change many times a second.
const PAUSE: Duration = Duration::from_millis(250);
/// After a writing that failed: a full disk does not get better at once.
const PAUSE_FAILED: Duration = Duration::from_secs(30);

/// The state that is to be on disk. Parts are compared by address: a new one is another part.
#[derive(Clone, Debug, Default)]
pub(super) struct Wanted {
    pub(super) bundle: Option<Arc<proto::TrustBundle>>,
    pub(super) index: Option<Arc<KeptIndex>>,
    pub(super) policies: Option<Arc<KeptPolicies>>,
    pub(super) revocations: Option<Arc<KeptRevocations>>,
    pub(super) endpoints: Arc<BTreeMap<ServiceName, KeptEndpoints>>,
    /// When control was last heard, Unix milliseconds; 0: never.
    pub(super) contact_ms: u64,
}

#[derive(Clone, Debug)]
pub(super) struct KeptIndex {
    pub(super) installed: Installed,
    pub(super) received_ms: u64,
    pub(super) index: Arc<Index>,
}

#[derive(Clone, Debug)]
pub(super) struct KeptPolicies {
    pub(super) epoch: u64,
    pub(super) received_ms: u64,
    pub(super) update: proto::PolicyUpdate,
}

#[derive(Clone, Debug)]
pub(super) struct KeptRevocations {
    /// Of the control that was heard last, and what of that is whole.
    pub(super) at: Installed,
    pub(super) revoked: Arc<Revocations>,
}

#[derive(Clone, Debug)]
pub(super) struct KeptEndpoints {
    pub(super) epoch: u64,
    pub(super) received_ms: u64,
    pub(super) used_ms: u64,
    pub(super) update: Arc<proto::EndpointsUpdate>,
}

/// What is persisted by now, and used since before that.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Persisted {
    pub(super) bundle_number: u64,
    pub(super) index: Option<Installed>,
    pub(super) policies: Option<Installed>,
    pub(super) revocations: Option<Installed>,
}

/// Writes until `stop`, and once more then. What is wanted at the call came from disk.
pub(super) fn run(
    state: State,
    mut wanted: watch::Receiver<Wanted>,
    persisted: watch::Sender<Persisted>,
    stop: CancellationToken,
) -> impl Future<Output = anyhow::Result<()>> {
    let written = wanted.borrow_and_update().clone();
    persisted.send_replace(Persisted::of(&written));
    write_on(state, wanted, written, persisted, stop)
}

async fn write_on(
    state: State,
    mut wanted: watch::Receiver<Wanted>,
    mut written: Wanted,
    persisted: watch::Sender<Persisted>,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let mut failing = false;
    loop {
        let stopping = tokio::select! {
            changed = wanted.changed() => changed.is_err(),
            () = stop.cancelled() => true,
        };
        let now = wanted.borrow_and_update().clone();
        let (keeper, before, after) = (state.clone(), written.clone(), now.clone());
        let outcome = tokio::task::spawn_blocking(move || write(&keeper, &before, &after)).await?;
        match outcome {
            Ok(()) => {
                failing = false;
                written = now;
                persisted.send_if_modified(|known| {
                    let new = Persisted::of(&written);
                    std::mem::replace(known, new) != new
                });
            }
            Err(error) => {
                if !failing {
                    log::warn!(error:% = error; "what control sent can not be kept; a restart would begin with older state");
                }
                failing = true;
                // What was not written is wanted still.
                wanted.mark_changed();
            }
        }
        if stopping {
            return Ok(());
        }
        let pause = if failing { PAUSE_FAILED } else { PAUSE };
        tokio::select! {
            () = stop.cancelled() => wanted.mark_changed(),
            () = tokio::time::sleep(pause) => (),
            () = until_lacking(&written, wanted.clone()), if !failing => (),
        }
    }
}

/// Returns when something is wanted of which the disk has not even an older state, as after a join: who is killed within
/// the pause should begin with it. A sender that is gone wants nothing more.
async fn until_lacking(written: &Wanted, mut wanted: watch::Receiver<Wanted>) {
    let lacking = wanted.wait_for(|now| written.lacks_part_of(now));
    if lacking.await.is_err() {
        std::future::pending().await
    }
}

impl Wanted {
    /// Whether `newer` has a part of which this has none.
    fn lacks_part_of(&self, newer: &Self) -> bool {
        let lacks = |mine: bool, other: bool| !mine && other;
        lacks(self.bundle.is_some(), newer.bundle.is_some())
            || lacks(self.index.is_some(), newer.index.is_some())
            || lacks(self.policies.is_some(), newer.policies.is_some())
            || lacks(self.revocations.is_some(), newer.revocations.is_some())
            || newer
                .endpoints
                .keys()
                .any(|name| !self.endpoints.contains_key(name))
    }
}

impl Persisted {
    fn of(wanted: &Wanted) -> Self {
        Self {
            bundle_number: wanted.bundle.as_ref().map_or(0, |b| b.number),
            index: wanted.index.as_ref().map(|i| i.installed),
            policies: wanted.policies.as_ref().map(|p| Installed {
                epoch: p.epoch,
                revision: p.update.revision,
            }),
            revocations: wanted.revocations.as_ref().map(|r| r.at),
        }
    }

    /// As control is told in a session of `epoch`: revisions of another one mean nothing there.
    pub(super) fn ack(&self, epoch: u64) -> proto::Ack {
        let of = |at: Option<Installed>| {
            let at = at.filter(|at| at.epoch == epoch);
            at.map_or(0, |at| at.revision)
        };
        proto::Ack {
            bundle_number: self.bundle_number,
            index_revision: of(self.index),
            policy_revision: of(self.policies),
            revocations_revision: of(self.revocations),
        }
    }
}

/// Writes what differs. Revocations and roots first: a leaf or policy must never be newer than what it is judged by.
fn write(state: &State, before: &Wanted, after: &Wanted) -> Result<(), FileError> {
    if let Some(kept) = changed(before.revocations.as_ref(), after.revocations.as_ref()) {
        let (revoked, issuers) = sync::revocations_to_wire(kept.revoked.iter());
        let stored = StoredRevocations {
            epoch: kept.at.epoch,
            revision: kept.at.revision,
            revoked,
            issuers,
        };
        state.keep(Kept::Revocations, &stored)?;
    }
    if let Some(bundle) = changed(before.bundle.as_ref(), after.bundle.as_ref()) {
        state.keep(Kept::Bundle, bundle)?;
    }
    if let Some(kept) = changed(before.policies.as_ref(), after.policies.as_ref()) {
        let stored = StoredPolicies {
            epoch: kept.epoch,
            received_ms: kept.received_ms,
            update: Some(kept.update.clone()),
        };
        state.keep(Kept::Policies, &stored)?;
    }
    if let Some(kept) = changed(before.index.as_ref(), after.index.as_ref()) {
        let stored = StoredIndex {
            epoch: kept.installed.epoch,
            received_ms: kept.received_ms,
            update: Some(sync::index_snapshot(&kept.index, kept.installed.revision)),
        };
        state.keep(Kept::Index, &stored)?;
    }
    if !Arc::ptr_eq(&before.endpoints, &after.endpoints) {
        let services = after.endpoints.values().map(|kept| StoredService {
            epoch: kept.epoch,
            received_ms: kept.received_ms,
            used_ms: kept.used_ms,
            update: Some((*kept.update).clone()),
        });
        let services = services.collect();
        state.keep(Kept::Endpoints, &StoredEndpoints { services })?;
    }
    if before.contact_ms != after.contact_ms {
        state.set_contact(after.contact_ms)?;
    }
    Ok(())
}

fn changed<'a, T>(before: Option<&Arc<T>>, after: Option<&'a Arc<T>>) -> Option<&'a T> {
    let same = match (before, after) {
        (Some(before), Some(after)) => Arc::ptr_eq(before, after),
        _ => false,
    };
    after.filter(|_| !same).map(Arc::as_ref)
}
