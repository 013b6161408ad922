//! Who waits to open a stream: who came first has its turn first, and nobody takes the room that a turn was given for.

use std::cell::RefCell;
use std::task::Waker;

use mesh_core::stream::OpenError;

use super::{Place, Shared};

/// Somebody who is at opening a stream: also between being given a turn and taking it.
pub(super) struct Opener<'a> {
    shared: &'a RefCell<Shared>,
    pub(super) ticket: u64,
    /// While the output is full.
    pub(super) place: Option<Place>,
    /// It is in [`Shared::opening`], or was given a turn.
    waits: bool,
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
            waits: false,
        }
    }

    /// Whether a turn was given to it, which it takes by asking.
    pub(super) fn takes_turn(&mut self, shared: &mut Shared) -> bool {
        let given = self.waits && !shared.opening.contains_key(&self.ticket);
        if given {
            self.waits = false;
            shared.turns -= 1;
        }
        given
    }

    pub(super) fn wait(&mut self, shared: &mut Shared, waker: &Waker) {
        self.waits = true;
        shared.opening.insert(self.ticket, waker.clone());
    }
}

impl Drop for Opener<'_> {
    fn drop(&mut self) {
        let mut shared = self.shared.borrow_mut();
        shared.openers -= 1;
        if let Some(place) = self.place {
            shared.waiting.remove(&place);
        }
        if self.waits && shared.opening.remove(&self.ticket).is_none() {
            shared.turns -= 1;
        }
        // Given up before its turn came, it leaves the turn to the next.
        shared.give_turns();
    }
}

impl Shared {
    /// Streams that can be opened and that nobody was given a turn for.
    pub(super) fn unclaimed(&self) -> Result<usize, OpenError> {
        let room = self.machine.can_open()?;
        Ok((room as usize).saturating_sub(self.turns))
    }

    /// Gives a turn to as many as there is room for, or to all when there will be none.
    pub(super) fn give_turns(&mut self) {
        if self.opening.is_empty() {
            return;
        }
        let turns = match self.unclaimed() {
            _ if self.closed.is_some() => usize::MAX,
            Ok(room) => room,
            Err(OpenError::GoingAway) => usize::MAX,
            Err(OpenError::NotReady | OpenError::TooMany) => 0,
        };
        for _ in 0..turns {
            let Some((_, waker)) = self.opening.pop_first() else {
                break;
            };
            self.turns += 1;
            waker.wake();
        }
    }
}
