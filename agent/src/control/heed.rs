//! Of a worker that another has taken over from: it has no session any more, and follows what the other one keeps on disk.

use std::time::Duration;

use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::Shell;
use super::followers::Follower;
use crate::state::Kept;

/// Between two looks at what another worker wrote: a revocation holds within a second.
pub(super) const HEED_EVERY: Duration = Duration::from_millis(250);

impl Shell {
    /// Ends the session. Returns when nothing more will be written.
    pub(super) async fn hand_over(
        &mut self,
        keeping: JoinHandle<anyhow::Result<()>>,
    ) -> anyhow::Result<()> {
        self.connection = None;
        self.links.channel.send_replace(None);
        self.links.view.change(|view| view.live = false);
        // Before another one serves, and tells control what all of us use.
        let number = self.links.trust.load().number();
        match Follower::begin(&self.links.state.followers(), number) {
            Ok(follower) => self.follower = Some(follower),
            Err(error) => log::warn!(
                "control may be told that this host uses another bundle before this worker does: {error:#}"
            ),
        }
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
            self.heed_what_changed(|_| true);
            let number = self.links.trust.load().number();
            let told = self.follower.as_mut().map(|f| f.uses(number));
            if let Some(Err(error)) = told {
                log::warn!("cannot say which bundle this worker uses: {error}; it is tried again");
            }
        }
    }

    /// Of a worker that stood by while the one before it was told more: by whom calls may be made is known before the
    /// first is taken. All else control says again.
    pub(crate) fn catch_up(&mut self) {
        self.heed_what_changed(|what| {
            matches!(what, Kept::Revocations | Kept::Bundle | Kept::Policies)
        });
    }

    fn heed_what_changed(&mut self, wanted: impl Fn(Kept) -> bool) {
        let now = self.links.state.stamps();
        for (index, what) in Kept::ALL.into_iter().enumerate() {
            if !wanted(what) || now[index].is_none() || now[index] == self.heeded[index] {
                continue;
            }
            match self.mirror.heed(&self.links.state, what) {
                Ok(()) => self.heeded[index] = now[index],
                // It is tried again at each look.
                Err(error) => {
                    if self.unheeded[index] != now[index] {
                        log::warn!(
                            file:% = self.links.state.file(what).display(), error:% = format!("{error:#}");
                            "what another worker wrote is of no use here; what was good stays in use"
                        );
                    }
                    self.unheeded[index] = now[index];
                }
            }
        }
    }
}
