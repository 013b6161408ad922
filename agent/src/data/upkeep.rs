//! What a thread does beside its calls.

use std::rc::Rc;
use std::time::Duration;

use tokio::task::spawn_local;

use super::Thread;
use crate::live;

/// Begins all of it; it goes on for as long as the thread does.
pub(super) fn begin(thread: &Rc<Thread>) {
    spawn_local(sweep(Rc::clone(thread)));
    spawn_local(live::heed(Rc::clone(thread)));
    let clock = Rc::clone(thread);
    spawn_local(async move { clock.quiet.run().await });
}

/// Gives up what nobody used for a while.
async fn sweep(thread: Rc<Thread>) {
    const EVERY: Duration = Duration::from_secs(15);
    loop {
        tokio::time::sleep(EVERY).await;
        thread.peers.sweep();
        thread.shares.sweep();
        thread.apps.sweep();
        thread.fronts.sweep(&thread.view().workloads);
        thread.http2_apps.sweep();
        thread.balancers.sweep(&thread.view(), &thread.wants);
    }
}
