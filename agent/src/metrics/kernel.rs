//! What the holder tells, and what stands beside its work: door, repairs, reloads.

use std::sync::atomic::Ordering;

use super::Metrics;
use crate::bypass::Bypass;
use crate::holder::protocol::Looked;

impl Metrics {
    /// Shows how the input door stands.
    pub(crate) fn door(&self, disarmed: bool, repairs: u64) {
        self.door_disarmed.set(disarmed.into());
        let repairs = repairs.saturating_add(self.names_repaired.load(Ordering::Relaxed));
        self.repairs.set(i64::try_from(repairs).unwrap_or(i64::MAX));
    }

    /// Counts that names were wired in again.
    pub(crate) fn names_repaired(&self) {
        self.names_repaired.fetch_add(1, Ordering::Relaxed);
        self.repairs.inc();
    }

    /// Shows what became of the workers before this one.
    pub(crate) fn reloaded(&self, looked: &Looked) {
        let draining = i64::try_from(looked.draining).unwrap_or(i64::MAX);
        self.draining_workers.set(draining);
        self.reload_given_up.set(looked.given_up.is_some().into());
        let open = looked.bypass.as_ref().and_then(Bypass::left);
        self.bypass.set(open.is_some().into());
    }
}
