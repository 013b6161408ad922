//! When nothing moves. One clock a thread looks at all calls once a tick: a timer for each call, set and cleared
//! with it, costs more than the rest of an HTTP request's bookkeeping.

use std::cell::{Cell, RefCell};
use std::os::fd::RawFd;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use crate::vanished::has_vanished;

/// A silence is noticed so much late, at the most.
const TICK: Duration = Duration::from_millis(500);
/// Ticks of silence between two looks whether the other end of a connection vanished: a system call each.
const LOOK_TICKS: u32 = 10;

/// All that a thread watches.
#[derive(Debug, Default)]
pub(crate) struct Quiet(Entries);

type Entries = Rc<RefCell<Vec<Rc<Entry>>>>;

/// One thing that may fall silent.
#[derive(Debug, Default)]
struct Entry {
    /// Its place among [`Entries`].
    place: Cell<usize>,
    moved: Cell<bool>,
    /// Whole ticks without a movement.
    ticks: Cell<u32>,
    /// Ticks after which it is over.
    bound: Cell<Option<u32>>,
    over: Cell<bool>,
    /// A connection whose other end may vanish.
    far: Cell<Option<RawFd>>,
    vanished: Cell<bool>,
    waker: RefCell<Option<Waker>>,
}

impl Entry {
    fn wake(&self) {
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }

    fn tick(&self) {
        if self.moved.replace(false) {
            self.ticks.set(0);
            return;
        }
        self.ticks.set(self.ticks.get().saturating_add(1));
        // The first tick was a part of one.
        if self
            .bound
            .get()
            .is_some_and(|bound| self.ticks.get() > bound)
        {
            self.over.set(true);
            self.wake();
        }
        if self.ticks.get().is_multiple_of(LOOK_TICKS) && self.far.get().is_some_and(has_vanished) {
            self.vanished.set(true);
            self.wake();
        }
    }
}

impl Quiet {
    pub(crate) fn watch(&self) -> Watched {
        let entry = Rc::new(Entry::default());
        let mut entries = self.0.borrow_mut();
        entry.place.set(entries.len());
        entries.push(Rc::clone(&entry));
        Watched {
            entry,
            entries: Rc::clone(&self.0),
        }
    }

    /// Lets all that is watched look at what it depends on.
    pub(crate) fn wake_all(&self) {
        for entry in self.0.borrow().iter() {
            entry.wake();
        }
    }

    /// Runs the clock.
    pub(crate) async fn run(&self) {
        let mut clock = tokio::time::interval(TICK);
        clock.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            clock.tick().await;
            self.tick();
        }
    }

    fn tick(&self) {
        for entry in self.0.borrow().iter() {
            entry.tick();
        }
    }
}

/// Something that is watched while it lives.
#[derive(Debug)]
pub(crate) struct Watched {
    entry: Rc<Entry>,
    entries: Entries,
}

impl Drop for Watched {
    fn drop(&mut self) {
        let mut entries = self.entries.borrow_mut();
        let place = self.entry.place.get();
        entries.swap_remove(place);
        if let Some(moved) = entries.get(place) {
            moved.place.set(place);
        }
    }
}

impl Watched {
    pub(crate) fn note(&self) {
        self.entry.moved.set(true);
    }

    /// From now on, whether the other end of this connection vanished is looked at, while nothing is noted. Who closes
    /// the connection says so.
    pub(crate) fn look_at(&self, connection: Option<RawFd>) {
        self.entry.far.set(connection);
    }

    /// Whether it did. Who waits by [`Self::poll_over`] is woken then.
    pub(crate) fn has_vanished(&self) -> bool {
        self.entry.vanished.get()
    }

    /// Watches something else from now on.
    pub(crate) fn renew(&self) {
        self.restart();
        self.look_at(None);
        self.entry.vanished.set(false);
        self.entry.bound.set(None);
    }

    /// Begins to count anew.
    pub(crate) fn restart(&self) {
        self.entry.ticks.set(0);
        self.entry.over.set(false);
    }

    /// Ready when nothing was noted for `bound`, and then counts anew; without a bound, never. One task only may wait
    /// for it.
    pub(crate) fn poll_over(&self, cx: &Context<'_>, bound: Option<Duration>) -> Poll<()> {
        let entry = &self.entry;
        let ticks = bound.map(|bound| bound.as_millis().div_ceil(TICK.as_millis()));
        entry
            .bound
            .set(ticks.map(|ticks| u32::try_from(ticks).unwrap_or(u32::MAX)));
        if bound.is_some() && entry.over.replace(false) {
            entry.ticks.set(0);
            return Poll::Ready(());
        }
        let mut waker = entry.waker.borrow_mut();
        if !waker
            .as_ref()
            .is_some_and(|waker| waker.will_wake(cx.waker()))
        {
            *waker = Some(cx.waker().clone());
        }
        Poll::Pending
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn poll(watched: &Watched, bound: Option<Duration>) -> bool {
        watched
            .poll_over(&Context::from_waker(Waker::noop()), bound)
            .is_ready()
    }

    #[test]
    fn what_is_silent_for_its_bound_is_over() {
        let quiet = Quiet::default();
        let watched = quiet.watch();
        let bound = Some(TICK * 3);
        assert!(!poll(&watched, bound));
        for _ in 0..3 {
            quiet.tick();
            assert!(!poll(&watched, bound));
        }
        quiet.tick();
        assert!(poll(&watched, bound));
        assert!(!poll(&watched, bound), "it counts anew");
    }

    #[test]
    fn what_moves_or_has_no_bound_goes_on() {
        let quiet = Quiet::default();
        let (moving, unbounded) = (quiet.watch(), quiet.watch());
        for _ in 0..100 {
            moving.note();
            assert!(!poll(&moving, Some(TICK)));
            assert!(!poll(&unbounded, None));
            quiet.tick();
        }
        assert!(!poll(&moving, Some(TICK)) && !poll(&unbounded, None));
    }

    #[test]
    fn what_is_renewed_was_not_silent_before() {
        let quiet = Quiet::default();
        let watched = quiet.watch();
        for _ in 0..100 {
            quiet.tick();
        }
        watched.renew();
        let bound = Some(TICK * 3);
        for _ in 0..4 {
            assert!(!poll(&watched, bound));
            quiet.tick();
        }
        assert!(poll(&watched, bound));
    }

    #[test]
    fn what_is_gone_is_not_watched() {
        let quiet = Quiet::default();
        let mut watched: Vec<_> = (0..4).map(|_| quiet.watch()).collect();
        drop(watched.remove(1));
        drop(watched.remove(2));
        assert_eq!(quiet.0.borrow().len(), 2);
        let bound = Some(TICK);
        assert!(watched.iter().all(|watched| !poll(watched, bound)));
        quiet.tick();
        watched[1].note();
        quiet.tick();
        assert_eq!([true, false], [0, 1].map(|n| poll(&watched[n], bound)));
    }
}
