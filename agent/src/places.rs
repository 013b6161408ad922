//! Places among the connections of callers, and among the calls of users: a flood of one leaves room for the others.

use std::collections::HashMap;
use std::fmt;
use std::net::IpAddr;
use std::rc::Rc;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use mesh_api::header::StreamKind;

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

impl fmt::Display for Party {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Workload(account) => write!(f, "workload {account}"),
            Self::User(uid) => write!(f, "user {uid}"),
        }
    }
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

/// HTTP/2 requests of users to one host. An app takes from one caller what eight connections bear, 800 where it allows a hundred on
/// each; one user has three quarters of this.
const REQUESTS_MAX: usize = 1024;
/// Other calls of users to one host, and no more than half of what this agent may carry. A host may have three quarters of the
/// calls that another one serves, 3,510 by default.
const CALLS_MAX: usize = 2048;

/// Calls of users whose programs are no workload, of all threads. To the called host they are all one caller, whose calls have a bound
/// there: that one user does not have all of them is seen to here. Nothing but such calls waits for the lock.
#[derive(Debug, Default)]
pub(crate) struct Turns(Mutex<HashMap<Whither, Turned>>);

/// A host, and whether its apps are called by HTTP/2.
type Whither = (IpAddr, bool);

/// Those with calls only.
#[derive(Debug, Default)]
struct Turned {
    all: usize,
    users: HashMap<u32, usize>,
}

/// One call, while it goes on.
#[derive(Debug)]
pub(crate) struct Turn {
    turns: Arc<Turns>,
    to: Whither,
    user: u32,
}

impl Thread {
    /// A turn for one more call to the host at this address; `None` where what is left is for others.
    pub(crate) fn turn(&self, user: u32, address: IpAddr, kind: StreamKind) -> Option<Turn> {
        let to = (address, kind == StreamKind::Http2);
        let max = match kind {
            StreamKind::Http2 => REQUESTS_MAX,
            _ => CALLS_MAX.min(self.share * self.settings.threads.max(1) / 2),
        };
        self.turns.begin(to, user, max)
    }
}

impl Turns {
    fn begin(self: &Arc<Self>, to: Whither, user: u32, max: usize) -> Option<Turn> {
        let mut turns = self.lock();
        let turned = turns.entry(to).or_default();
        let own = turned.users.get(&user).copied().unwrap_or_default();
        if turned.all >= max || is_for_others(turned.all, own, max) {
            return None;
        }
        turned.all += 1;
        turned.users.insert(user, own + 1);
        let turns = Arc::clone(self);
        Some(Turn { turns, to, user })
    }

    /// Numbers are whole whatever became of who held it last.
    fn lock(&self) -> MutexGuard<'_, HashMap<Whither, Turned>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let mut turns = self.turns.lock();
        let Some(turned) = turns.get_mut(&self.to) else {
            return;
        };
        turned.all -= 1;
        if let Some(own) = turned.users.get_mut(&self.user) {
            *own -= 1;
            if *own == 0 {
                turned.users.remove(&self.user);
            }
        }
        if turned.all == 0 {
            turns.remove(&self.to);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_user_leaves_turns_to_others_and_gives_back_its_own() {
        let turns = Arc::<Turns>::default();
        let to = ([192, 0, 2, 1].into(), false);
        let take = |user| turns.begin(to, user, 64);
        let first: Vec<Turn> = std::iter::from_fn(|| take(1)).collect();
        assert_eq!(first.len(), 48);
        let second: Vec<Turn> = std::iter::from_fn(|| take(2)).collect();
        assert_eq!(second.len(), 4, "as one that has few");
        assert!(take(1).is_none() && take(3).is_some());
        assert!(turns.begin(([192, 0, 2, 2].into(), false), 1, 64).is_some());
        drop((first, second));
        assert!(turns.lock().is_empty());
    }
}
