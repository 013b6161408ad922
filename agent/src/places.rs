//! Places among the connections of callers: a flood of one leaves room for the others.

use std::rc::Rc;

use mesh_core::names::Account;
use mesh_runtime::mux::is_for_others;

use crate::data::Thread;
use crate::limits::Limit;
use crate::metrics::Direction;

/// Who has places.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Party {
    Workload(Account),
    /// A user whose programs are no workload.
    User(u32),
}

/// One place, held while its connection is served.
#[derive(Debug)]
pub(crate) struct Place(Rc<Thread>, Party);

impl Thread {
    /// A place for one more connection of `party`, which is counted among all callers already.
    pub(crate) fn place(self: &Rc<Self>, party: Party) -> Option<Place> {
        let mut places = self.places.borrow_mut();
        let own = places.entry(party.clone()).or_default();
        let others = self.callers.get().saturating_sub(1);
        if is_for_others(others, *own, self.share) {
            self.shed(Limit::Callers, Direction::Outbound);
            return None;
        }
        *own += 1;
        Some(Place(Rc::clone(self), party))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut places = self.0.places.borrow_mut();
        if let Some(own) = places.get_mut(&self.1) {
            *own -= 1;
            if *own == 0 {
                places.remove(&self.1);
            }
        }
    }
}
