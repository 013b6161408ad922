//! The open connections with other agents, by the host of the other end: a revocation ends its own without a look at the
//! rest, and no call is ever asked about it.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;

use mesh_core::identity::Identity;
use mesh_core::names::HostUid;
use mesh_core::reason::Reason;
use mesh_core::revocation::Subject;
use mesh_runtime::mux::Mux;

use crate::data::Thread;
use crate::metrics::Direction;

/// The connections of one thread. Of one that is not here any more nothing is left to end.
#[derive(Debug, Default)]
pub(crate) struct Live {
    hosts: RefCell<HashMap<HostUid, HashMap<u64, Connection>>>,
    last: Cell<u64>,
}

#[derive(Clone, Debug)]
struct Connection {
    mux: Mux,
    direction: Direction,
    ours: Identity,
    theirs: Identity,
}

/// The place of a connection in the table, for as long as it lives.
#[derive(Debug)]
pub(crate) struct Entered {
    thread: Rc<Thread>,
    host: HostUid,
    number: u64,
}

impl Drop for Entered {
    fn drop(&mut self) {
        let mut hosts = self.thread.live.hosts.borrow_mut();
        if let Some(connections) = hosts.get_mut(&self.host) {
            connections.remove(&self.number);
            if connections.is_empty() {
                hosts.remove(&self.host);
            }
        }
    }
}

/// Whose ends a connection joins.
#[derive(Debug)]
pub(crate) struct Ends {
    pub(crate) direction: Direction,
    pub(crate) ours: Identity,
    pub(crate) theirs: Identity,
    /// The Source of the other end's certificate.
    pub(crate) host: HostUid,
}

/// Enters a connection whose handshake is through. One of its ends may have been revoked meanwhile; then it is ended.
pub(crate) fn enter(thread: &Rc<Thread>, mux: &Mux, ends: Ends) -> Entered {
    let live = &thread.live;
    let number = live.last.get() + 1;
    live.last.set(number);
    let connection = Connection {
        mux: mux.clone(),
        direction: ends.direction,
        ours: ends.ours,
        theirs: ends.theirs,
    };
    let view = thread.view();
    match &view.revoked {
        None => connection.end(thread, Reason::RevocationsUnknown),
        Some(revoked) if revoked.cover(&ends.host, &connection.theirs) => {
            connection.end(thread, Reason::PeerRevoked);
        }
        Some(revoked) if revoked.cover(&view.host.uid, &connection.ours) => {
            connection.end(thread, Reason::IdentityRevoked);
        }
        Some(_) => {}
    }
    let mut hosts = live.hosts.borrow_mut();
    let of_host = hosts.entry(ends.host.clone()).or_default();
    of_host.insert(number, connection);
    Entered {
        thread: Rc::clone(thread),
        host: ends.host,
        number,
    }
}

impl Connection {
    fn end(&self, thread: &Thread, reason: Reason) {
        thread.metrics.refused(self.direction, reason);
        // A caller hears what it is to the caller: its peer that was revoked.
        self.mux.end(match self.direction {
            Direction::Inbound => Reason::PeerRevoked,
            Direction::Outbound => reason,
        });
    }
}

/// Ends what is revoked from now on. Never completes while the agent lives.
pub(crate) async fn heed(thread: Rc<Thread>) {
    let mut view = thread.view.clone();
    let mut known = view.borrow().revoked.clone().unwrap_or_default();
    while view.changed().await.is_ok() {
        // While it is not known there is nothing open.
        let now = view.borrow_and_update().revoked.clone();
        let now = now.unwrap_or_default();
        if Arc::ptr_eq(&now, &known) {
            continue;
        }
        for one in now.since(&known) {
            thread.live.end(&thread, &one.subject);
        }
        known = now;
    }
}

impl Live {
    /// Ends all that is open, because this agent stops. Says how many calls that cut.
    pub(crate) fn cut(&self) -> usize {
        let hosts = self.hosts.borrow();
        let all = hosts.values().flat_map(HashMap::values);
        let cut = all.map(|connection| {
            let calls = connection.mux.open_streams();
            connection.mux.end(Reason::AgentStopped);
            calls
        });
        cut.sum()
    }

    fn end(&self, thread: &Thread, subject: &Subject) {
        let covers = |identity: &Identity| match (&subject.account, identity) {
            (None, _) => true,
            (Some(account), Identity::Workload(theirs)) => account == theirs,
            (Some(_), _) => false,
        };
        let own = subject.host == thread.view().host.uid;
        // Ending one wakes its tasks, which run later: the table is not touched meanwhile.
        let hosts = self.hosts.borrow();
        let mut count = 0;
        if own {
            let all = hosts.values().flat_map(HashMap::values);
            for connection in all.filter(|c| covers(&c.ours)) {
                connection.end(thread, Reason::IdentityRevoked);
                count += 1;
            }
        }
        let of_host = hosts.get(&subject.host).into_iter();
        for connection in of_host
            .flat_map(HashMap::values)
            .filter(|c| covers(&c.theirs))
        {
            connection.end(thread, Reason::PeerRevoked);
            count += 1;
        }
        let account = subject.account.as_ref();
        log::warn!(
            host:% = subject.host, account = account.map_or_else(|| "all".to_owned(), ToString::to_string),
            connections = count;
            "revoked by the operator; what was open with it is ended"
        );
    }
}
