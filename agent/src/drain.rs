//! The end of a thread's calls: no new ones, and the open ones have until a deadline.

use std::rc::Rc;
use std::time::{Duration, Instant};

use mesh_core::reason::Reason;

use crate::data::Thread;
use crate::limits::Limit;

/// How long the word that a call is cut may take to leave. The holder waits for longer.
const CUT_MAX: Duration = Duration::from_secs(1);

/// Between two looks at what is open.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// Lets open calls end until `deadline`, then cuts them: who waits for one is told why.
pub(crate) async fn drain(thread: &Rc<Thread>, deadline: Duration) {
    thread.draining.send_replace(true);
    if emptied(thread, deadline).await {
        return;
    }
    let calls = thread.live.cut();
    for _ in 0..calls {
        thread.metrics.limits.reached(Limit::Drain);
    }
    log::warn!(
        limit = Limit::Drain.name(), reason:% = Reason::AgentStopped, calls = calls, connections = thread.open();
        "the drain deadline is over; what is still open is cut"
    );
    emptied(thread, CUT_MAX).await;
}

/// Whether all that was open when the drain began has ended within `time`.
async fn emptied(thread: &Thread, time: Duration) -> bool {
    let until = Instant::now() + time;
    loop {
        // Kept connections to peers and apps are nobody's calls.
        thread.peers.close_idle();
        if thread.open() == 0 {
            return true;
        }
        if Instant::now() >= until {
            return false;
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}
