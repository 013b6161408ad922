//! What is open, by service.

use std::collections::BTreeMap;
use std::sync::PoisonError;

use super::{Direction, Metrics};

impl Metrics {
    /// Calls of other hosts that are open, by service.
    pub(crate) fn open_inbound(&self) -> BTreeMap<String, i64> {
        let flows = self.flows.lock().unwrap_or_else(PoisonError::into_inner);
        let mut open = BTreeMap::new();
        for (labels, flow) in flows
            .iter()
            .filter(|(l, _)| l.direction == Direction::Inbound)
        {
            *open.entry(labels.dst.clone()).or_default() += flow.open.get();
        }
        open
    }
}
