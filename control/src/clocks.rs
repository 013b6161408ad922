//! How far the clocks of hosts with a live session are from control's, as their beats tell it. It is seen and forgotten:
//! nothing is decided by it.

use imbl::OrdMap;
use mesh_core::names::HostUid;
use tokio::sync::watch;

/// Milliseconds that a host's clock is ahead of control's; negative: behind. The way of the message counts as behind.
pub(crate) type Offsets = OrdMap<HostUid, i64>;

/// As many entries as there are sessions.
#[derive(Debug, Default)]
pub(crate) struct Clocks(watch::Sender<Offsets>);

impl Clocks {
    /// A host said that it is `theirs_ms` when it was `ours_ms` here.
    pub(crate) fn heard(&self, host: &HostUid, theirs_ms: u64, ours_ms: u64) {
        let apart = i64::try_from(theirs_ms.abs_diff(ours_ms)).unwrap_or(i64::MAX);
        let offset = if theirs_ms < ours_ms { -apart } else { apart };
        self.0.send_modify(|all| {
            all.insert(host.clone(), offset);
        });
    }

    /// Its session is over.
    pub(crate) fn forget(&self, host: &HostUid) {
        self.0.send_modify(|all| {
            all.remove(host);
        });
    }

    pub(crate) fn all(&self) -> Offsets {
        self.0.borrow().clone()
    }
}
