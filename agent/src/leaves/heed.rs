//! Of a worker that another has taken over from: it asks for no certificates any more, and follows those on disk.

use std::sync::Arc;
use std::time::Duration;

use mesh_core::identity::Identity;
use mesh_core::names::Account;
use tokio_util::sync::CancellationToken;

use super::{Keeper, file_name};

/// Between two looks at what another worker wrote: a leaf is renewed long before its end.
const HEED_EVERY: Duration = Duration::from_secs(5);

impl Keeper {
    /// Follows the certificates that the worker which took over writes, until `stop`.
    pub(super) async fn heed(&mut self, stop: CancellationToken) {
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(HEED_EVERY) => (),
            }
            let set = Arc::clone(&self.links.sets.borrow_and_update());
            let there = |account: &Account| set.workloads.iter().any(|w| w.account == *account);
            for identity in self.entries.keys().cloned().collect::<Vec<_>>() {
                let Some(name) = file_name(&identity) else {
                    continue;
                };
                if matches!(&identity, Identity::Workload(account) if !there(account)) {
                    self.entries.remove(&identity);
                    self.withdraw(&identity);
                    continue;
                }
                // What can not be read is being written, or is the other worker's to mend.
                let Ok(Some(pair)) = self.links.state.leaf(&name) else {
                    continue;
                };
                let known = self.entries.get(&identity).and_then(|e| e.not_after_s);
                let Ok((_, facts)) = self.check(&identity, &pair) else {
                    continue;
                };
                if known != Some(facts.not_after_s)
                    && self.take(&identity, &pair).is_ok()
                    && let Some(entry) = self.entries.get_mut(&identity)
                {
                    entry.not_after_s = Some(facts.not_after_s);
                }
            }
        }
    }
}
