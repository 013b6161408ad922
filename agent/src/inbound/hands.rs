//! Tasks that serve one stream after another: to make one for each request, with its room and its buffers, costs as
//! much as the request's own bookkeeping.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Poll, Waker};

use mesh_runtime::mux::MuxStream;
use tokio::task::spawn_local;

use super::{Admitted, Peer, Serving, http};
use crate::data::Thread;
use crate::relay::Activity;

/// Tasks that wait for a stream, a thread. Each has a few KiB.
const IDLE_MAX: usize = 256;

/// A stream that is to be served.
pub(super) struct Job {
    pub(super) peer: Rc<Peer>,
    pub(super) stream: MuxStream,
    pub(super) admitted: Rc<Admitted>,
    pub(super) serving: Serving,
}

/// The tasks of one thread that wait.
#[derive(Default)]
pub(crate) struct Hands(RefCell<Vec<Rc<Seat>>>);

/// Where a task waits for its next stream.
#[derive(Default)]
struct Seat {
    job: Cell<Option<Job>>,
    waker: Cell<Option<Waker>>,
}

impl std::fmt::Debug for Hands {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Hands")
            .field(&self.0.borrow().len())
            .finish()
    }
}

/// Has `job` done by the task that waited last, whose memory is warm, or by a new one.
pub(super) fn serve(thread: &Rc<Thread>, job: Job) {
    let seat = thread.hands.0.borrow_mut().pop();
    match seat {
        Some(seat) => {
            seat.job.set(Some(job));
            if let Some(waker) = seat.waker.take() {
                waker.wake();
            }
        }
        None => drop(spawn_local(run(Rc::clone(thread), job))),
    }
}

async fn run(thread: Rc<Thread>, first: Job) {
    let seat = Rc::new(Seat::default());
    let activity = Activity::new(&thread);
    let mut buffers = http::Buffers::default();
    let mut next = Some(first);
    while let Some(job) = next {
        let Job {
            peer,
            stream,
            admitted,
            serving,
        } = job;
        // The time in which it waited is no silence of this call.
        activity.renew();
        peer.serve_stream(stream, &admitted, &activity, &mut buffers)
            .await;
        drop((serving, admitted, peer));
        // Nothing of it is looked at any more.
        activity.renew();
        buffers.reset();
        if thread.hands.0.borrow().len() >= IDLE_MAX {
            return;
        }
        thread.hands.0.borrow_mut().push(Rc::clone(&seat));
        next = poll_fn(|cx| match seat.job.take() {
            Some(job) => Poll::Ready(Some(job)),
            None => {
                seat.waker.set(Some(cx.waker().clone()));
                Poll::Pending
            }
        })
        .await;
    }
}
