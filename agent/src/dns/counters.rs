//! What the responder did, counted.

use std::sync::atomic::{AtomicU64, Ordering};

/// What the responder did, since it started.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    /// Mesh names answered with an address or another record, or with the certainty that there is none.
    pub(crate) answered: AtomicU64,
    /// Mesh names that do not exist.
    pub(crate) no_such_name: AtomicU64,
    /// Mesh names asked before any index was there.
    pub(crate) no_index: AtomicU64,
    pub(crate) forwarded: AtomicU64,
    /// Forwarded queries that no upstream answered.
    pub(crate) upstream_failed: AtomicU64,
    /// Queries refused because too many (`IN_FLIGHT_MAX`) were under way.
    pub(crate) overloaded: AtomicU64,
    /// Packets that are no query, or could not be read.
    pub(crate) malformed: AtomicU64,
}

pub(super) fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}
