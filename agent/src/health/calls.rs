//! What the data path says of the programs of this host: whether they take their calls. It costs a call nothing while all
//! is well.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use mesh_core::names::{Account, ServiceName};
use tokio::sync::mpsc;

use super::Served;

/// Calls that wait to be counted. What comes while it is full is not: it can only be later that a service is unlisted.
const QUEUE: usize = 256;

/// One call of another program: whether the app took its connection.
#[derive(Debug)]
pub(super) struct Call {
    pub(super) served: Served,
    pub(super) port: u16,
    pub(super) taken: bool,
}

/// Where the data path tells it.
#[derive(Clone, Debug)]
pub(crate) struct Calls {
    sender: mpsc::Sender<Call>,
    counting: Counting,
}

/// Where health hears it.
#[derive(Debug)]
pub(crate) struct CallsInbox {
    receiver: mpsc::Receiver<Call>,
    pub(super) counting: Counting,
}

/// How many services have failed calls behind them that a good one makes forgotten.
#[derive(Clone, Debug, Default)]
pub(super) struct Counting(Arc<AtomicUsize>);

/// One of them.
#[derive(Debug)]
pub(super) struct Counts(Counting);

impl Counting {
    pub(super) fn begin(&self) -> Counts {
        self.0.fetch_add(1, Ordering::Relaxed);
        Counts(self.clone())
    }
}

impl Drop for Counts {
    fn drop(&mut self) {
        let Counting(count) = &self.0;
        count.fetch_sub(1, Ordering::Relaxed);
    }
}

pub(crate) fn channel() -> (Calls, CallsInbox) {
    let (sender, receiver) = mpsc::channel(QUEUE);
    let counting = Counting::default();
    let calls = Calls {
        sender,
        counting: counting.clone(),
    };
    (calls, CallsInbox { receiver, counting })
}

impl Calls {
    /// The program took a connection for a call.
    pub(crate) fn taken(&self, server: &Account, service: &ServiceName, port: u16) {
        let Counting(count) = &self.counting;
        if count.load(Ordering::Relaxed) > 0 {
            self.tell(server, service, port, true);
        }
    }

    /// It did not.
    pub(crate) fn failed(&self, server: &Account, service: &ServiceName, port: u16) {
        self.tell(server, service, port, false);
    }

    fn tell(&self, server: &Account, service: &ServiceName, port: u16, taken: bool) {
        let served = (server.clone(), service.clone());
        // Full: there are enough of them.
        let _ = self.sender.try_send(Call {
            served,
            port,
            taken,
        });
    }
}

impl CallsInbox {
    /// The next call; never, when the data path is gone.
    pub(super) async fn recv(&mut self) -> Call {
        match self.receiver.recv().await {
            Some(call) => call,
            None => std::future::pending().await,
        }
    }
}
