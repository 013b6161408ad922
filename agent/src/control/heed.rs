//! Of a worker that another has taken over from: it has no session any more, and follows what the other one keeps on disk.

use std::time::Duration;

use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::Shell;
use crate::state::Kept;

/// Between two looks at what another worker wrote: a revocation holds within a second.
const HEED_EVERY: Duration = Duration::from_millis(250);

impl Shell {
    /// Ends the session. Returns when nothing more will be written.
    pub(super) async fn hand_over(
        &mut self,
        keeping: JoinHandle<anyhow::Result<()>>,
    ) -> anyhow::Result<()> {
        self.connection = None;
        self.links.channel.send_replace(None);
        self.links.view.change(|view| view.live = false);
        keeping.await??;
        self.heeded = self.links.state.stamps();
        self.links.handing.let_go();
        Ok(())
    }

    /// Follows what the worker that took over writes, until `stop`: so policies and revocations reach what is open here.
    pub(super) async fn heed(&mut self, stop: CancellationToken) {
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(HEED_EVERY) => (),
            }
            let now = self.links.state.stamps();
            for (index, what) in Kept::ALL.into_iter().enumerate() {
                if now[index].is_none() || now[index] == self.heeded[index] {
                    continue;
                }
                if let Err(error) = self.mirror.heed(&self.links.state, what) {
                    log::warn!(
                        file:% = self.links.state.file(what).display(), error:% = format!("{error:#}");
                        "what the worker that took over wrote is of no use here; what was good stays in use"
                    );
                }
            }
            self.heeded = now;
        }
    }
}
