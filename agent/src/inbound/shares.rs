//! What one host may have of this one. Of connections, calls and buffers the last quarter is for hosts that have few: one
//! that is hostile, or out of its mind, locks nobody out.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::{Rc, Weak};
use std::sync::Arc;

use mesh_core::names::HostUid;
use mesh_runtime::mux::{Budget, is_for_others};

use super::Peer;
use crate::data::Thread;
use crate::limits::Limit;

/// The hosts that have connections; there are never more than connections. Control's own certificate is of no host.
#[derive(Debug)]
pub(crate) struct Shares {
    budget: Arc<Budget>,
    hosts: RefCell<HashMap<Option<HostUid>, Weak<Share>>>,
}

impl Shares {
    pub(crate) fn new(budget: &Arc<Budget>) -> Self {
        Self {
            budget: Arc::clone(budget),
            hosts: RefCell::default(),
        }
    }

    /// That of a host, for one connection more.
    pub(super) fn of(&self, host: Option<&HostUid>) -> Rc<Share> {
        let mut hosts = self.hosts.borrow_mut();
        let known = hosts.entry(host.cloned()).or_default();
        known.upgrade().unwrap_or_else(|| {
            let share = Rc::new(Share {
                connections: Cell::new(0),
                calls: Cell::new(0),
                budget: self.budget.part(),
            });
            *known = Rc::downgrade(&share);
            share
        })
    }

    /// Forgets hosts that have nothing.
    pub(crate) fn sweep(&self) {
        let mut hosts = self.hosts.borrow_mut();
        hosts.retain(|_, share| share.strong_count() > 0);
    }
}

/// What a host has. Each of its connections holds it.
#[derive(Debug)]
pub(super) struct Share {
    connections: Cell<usize>,
    calls: Cell<usize>,
    budget: Arc<Budget>,
}

impl Share {
    /// What its connections' buffers count against.
    pub(super) fn budget(&self) -> &Arc<Budget> {
        &self.budget
    }

    /// One connection more, which is counted among all peers already: `None` when what is left is for others.
    pub(super) fn connected(self: &Rc<Self>, thread: &Thread) -> Option<Connected> {
        let own = self.connections.get();
        let all = thread.peers_open.get().saturating_sub(1);
        if is_for_others(all, own, thread.share) {
            return None;
        }
        self.connections.set(own + 1);
        Some(Connected(Rc::clone(self)))
    }
}

/// A connection of a host, while it lives.
#[derive(Debug)]
pub(super) struct Connected(Rc<Share>);

impl Drop for Connected {
    fn drop(&mut self) {
        self.0.connections.set(self.0.connections.get() - 1);
    }
}

/// A call that is being served counts until its handler is through, whatever became of its stream: a peer that opens
/// and resets does not get more than one that waits.
pub(super) struct Serving {
    thread: Rc<Thread>,
    share: Rc<Share>,
    live: Rc<Cell<u32>>,
}

impl Serving {
    pub(super) fn begin(peer: &Peer, live: &Rc<Cell<u32>>) -> Option<Self> {
        let (thread, share) = (&peer.thread, &peer.share);
        let all = thread.serving.get();
        let limit = if share.budget.is_spent() {
            Some(Limit::Buffers)
        } else if live.get() >= thread.settings.streams.max_streams {
            Some(Limit::Streams)
        } else if all >= thread.share || is_for_others(all, share.calls.get(), thread.share) {
            Some(Limit::Calls)
        } else {
            None
        };
        if let Some(limit) = limit {
            thread.reached(limit);
            return None;
        }
        thread.metrics.limits.calls.inc();
        live.set(live.get() + 1);
        thread.serving.set(all + 1);
        share.calls.set(share.calls.get() + 1);
        Some(Self {
            thread: Rc::clone(thread),
            share: Rc::clone(share),
            live: Rc::clone(live),
        })
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.live.set(self.live.get() - 1);
        self.share.calls.set(self.share.calls.get() - 1);
        self.thread.serving.set(self.thread.serving.get() - 1);
        self.thread.metrics.limits.calls.dec();
    }
}
