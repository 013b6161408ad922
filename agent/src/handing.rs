//! Another worker takes over from this one: first it stops taking what is new, then it lets go of what only one may do,
//! and then it carries on what is open, heeding what the other one writes to disk.

use std::convert::Infallible;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

/// How long a task may take to let go. The holder waits for longer.
const LET_GO_MAX: Duration = Duration::from_millis(1_500);

/// What tasks are told.
#[derive(Clone, Debug)]
pub(crate) struct Handing {
    begun: CancellationToken,
    done: CancellationToken,
    /// Of a task that only one may run: it has not let go yet.
    holds: Option<mpsc::Sender<Infallible>>,
}

/// Tells them.
#[derive(Debug)]
pub(crate) struct Hander {
    told: Handing,
    held: mpsc::Receiver<Infallible>,
}

impl Hander {
    pub(crate) fn new() -> Self {
        let (holds, held) = mpsc::channel(1);
        let told = Handing {
            begun: CancellationToken::new(),
            done: CancellationToken::new(),
            holds: Some(holds),
        };
        Self { told, held }
    }

    /// For a task that hands something over.
    pub(crate) fn holding(&self) -> Handing {
        self.told.clone()
    }

    /// For a task that only wants to know.
    pub(crate) fn watching(&self) -> Handing {
        let mut told = self.told.clone();
        told.let_go();
        told
    }

    /// Returns when all have let go.
    pub(crate) async fn hand_over(&mut self) {
        self.told.begun.cancel();
        self.told.let_go();
        if tokio::time::timeout(LET_GO_MAX, self.held.recv())
            .await
            .is_err()
        {
            log::warn!(
                "a task does not let go in time; the worker that takes over goes on without it"
            );
        }
        self.told.done.cancel();
    }
}

impl Handing {
    /// Nothing new from now on.
    pub(crate) async fn begun(&self) {
        self.begun.cancelled().await;
    }

    /// All have let go.
    pub(crate) async fn done(&self) {
        self.done.cancelled().await;
    }

    pub(crate) fn let_go(&mut self) {
        self.holds = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn it_is_done_when_all_have_let_go() {
        let mut hander = Hander::new();
        let (mut holding, watching) = (hander.holding(), hander.watching());
        let task = tokio::spawn(async move {
            holding.begun().await;
            assert!(!holding.done.is_cancelled());
            holding.let_go();
            holding.done().await;
        });
        hander.hand_over().await;
        watching.done().await;
        task.await.unwrap();
    }
}
