//! Decisions of policy, counted for metrics and for the edges that control is told.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use mesh_core::edge::{EDGES_MAX, EdgeKey};
use prometheus_client::metrics::counter::Counter;

/// Counts one decision of policy: by its rule as a metric, and as calls of an edge.
#[derive(Clone, Debug)]
pub(crate) struct DecisionCount {
    metric: Counter,
    /// `None`: there are more edges than are told apart.
    edge: Option<Arc<AtomicU64>>,
}

impl DecisionCount {
    pub(super) fn new(metric: Counter, edge: Option<Arc<AtomicU64>>) -> Self {
        Self { metric, edge }
    }

    pub(crate) fn count(&self) {
        self.metric.inc();
        if let Some(calls) = &self.edge {
            calls.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Calls over mTLS that nobody asked for yet, by edge. One whose calls were taken and of which no connection holds the
/// counter is forgotten: who keeps edges for long is the ledger of the door.
#[derive(Debug, Default)]
pub(super) struct Edges {
    /// As many as a report has.
    pub(super) calls: HashMap<EdgeKey, Arc<AtomicU64>>,
    overflowed: bool,
}

impl Edges {
    pub(super) fn calls(&mut self, key: EdgeKey) -> Option<Arc<AtomicU64>> {
        if self.calls.len() >= EDGES_MAX && !self.calls.contains_key(&key) {
            self.overflowed = true;
            return None;
        }
        Some(Arc::clone(self.calls.entry(key).or_default()))
    }

    pub(super) fn take(&mut self) -> (Vec<(EdgeKey, u64)>, bool) {
        let mut taken = Vec::new();
        self.calls.retain(|key, calls| {
            // First this: nobody who does not hold it by now can count any more.
            let held = 1 < Arc::strong_count(calls);
            let new = calls.swap(0, Ordering::Acquire);
            if 0 < new {
                taken.push((key.clone(), new));
            }
            held
        });
        (taken, std::mem::take(&mut self.overflowed))
    }
}
