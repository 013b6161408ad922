//! Asks the agents of other hosts that are in use whether they answer.

use std::collections::BTreeMap;
use std::sync::Arc;

use mesh_core::service::Endpoint;
use mesh_runtime::admin::Answer;

use super::Sources;
use crate::probe::{Probed, probe_all};

/// Agents that are asked: a sample says whether the mesh port is reached, and each costs a handshake.
const PEERS_MAX: usize = 32;

impl Sources {
    pub(super) async fn peers(&self) -> Answer {
        let view = Arc::clone(&self.view.borrow());
        let all = view.endpoints.values().flat_map(|list| list.iter());
        let others = all.filter(|e| e.network == view.host.network && e.host != view.host.uid);
        // One endpoint of each host.
        let by_host: BTreeMap<_, &Endpoint> = others.map(|e| (&e.host, e)).collect();
        let asked: Vec<Endpoint> = by_host.into_values().take(PEERS_MAX).cloned().collect();
        let leaf = view.leaves.workloads.values().next();
        Answer::json(&match leaf.or(view.leaves.host.as_ref()) {
            Some(leaf) => probe_all(leaf, &asked).await,
            None => asked.iter().map(Probed::unasked).collect(),
        })
    }
}
