//! What agents have on disk and in use, as they said in the sessions of this process. That of the trust bundle is
//! kept in the catalogue beside: it must be known of hosts that are away.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use mesh_api::proto::Ack;
use mesh_core::names::HostUid;

use crate::catalogue::HOSTS_MAX;

/// The last word of each host.
#[derive(Debug, Default)]
pub(crate) struct Acks {
    /// Held for a look-up only.
    last: Mutex<BTreeMap<HostUid, Ack>>,
}

impl Acks {
    pub(crate) fn note(&self, uid: &HostUid, ack: Ack) {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        // Of hosts that were removed meanwhile; those that are there say it again.
        if HOSTS_MAX <= last.len() && !last.contains_key(uid) {
            last.clear();
        }
        last.insert(uid.clone(), ack);
    }

    pub(crate) fn of(&self, uid: &HostUid) -> Option<Ack> {
        let last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        last.get(uid).cloned()
    }
}
