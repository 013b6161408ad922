//! Hosts that their root opened to plaintext, as they say themselves. It is shown and noted in the audit log, and decides
//! nothing; a control that starts anew hears it again.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use mesh_api::proto;
use mesh_core::names::HostUid;

use crate::limits::Pace;

/// More than people open and close a host; who does so without end must not rotate away what else is in the audit log.
const NOTED_MAX: u32 = 20;
const NOTED_REFILL: Duration = Duration::from_secs(60);

/// The last one of each host.
#[derive(Debug)]
pub(crate) struct Bypasses {
    last: Mutex<BTreeMap<HostUid, proto::Bypass>>,
    noted: Pace<HostUid>,
}

impl Default for Bypasses {
    fn default() -> Self {
        Self {
            last: Mutex::default(),
            noted: Pace::new(NOTED_MAX, NOTED_REFILL),
        }
    }
}

impl Bypasses {
    /// A host told its last one. True if that is to be noted.
    pub(crate) fn heard(&self, host: &HostUid, bypass: &proto::Bypass) -> bool {
        let known = self.lock().insert(host.clone(), bypass.clone());
        known.as_ref() != Some(bypass) && self.noted.take(host.clone(), 1, Instant::now())
    }

    /// The host is none of the mesh any more.
    pub(crate) fn forget(&self, host: &HostUid) {
        self.lock().remove(host);
    }

    /// Those that are open at this Unix time.
    pub(crate) fn open(&self, now_ms: u64) -> Vec<(HostUid, proto::Bypass)> {
        let all = self.lock();
        let open = all.iter().filter(|(_, bypass)| now_ms < bypass.until_ms);
        open.map(|(host, bypass)| (host.clone(), bypass.clone()))
            .collect()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<HostUid, proto::Bypass>> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
