//! Who waits to open a stream.

use std::cell::RefCell;

use super::{Place, Shared};

/// Somebody who is at opening a stream: also between being woken and having its turn.
pub(super) struct Opener<'a> {
    shared: &'a RefCell<Shared>,
    pub(super) ticket: u64,
    pub(super) place: Option<Place>,
}

impl<'a> Opener<'a> {
    pub(super) fn begin(shared: &'a RefCell<Shared>) -> Self {
        let mut all = shared.borrow_mut();
        all.openers += 1;
        all.tickets += 1;
        Self {
            shared,
            ticket: all.tickets,
            place: None,
        }
    }
}

impl Drop for Opener<'_> {
    fn drop(&mut self) {
        let mut shared = self.shared.borrow_mut();
        shared.openers -= 1;
        shared.opening.remove(&self.ticket);
        // Given up before its turn came, it leaves the turn to the next.
        shared.wake_openers();
    }
}
