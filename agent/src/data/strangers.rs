//! What strangers may make a thread do before they have shown who they are.

use std::collections::HashMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

/// TLS handshakes under way: who has not shown who it is gets little.
#[derive(Debug, Default)]
pub(crate) struct Handshakes {
    all: usize,
    by_address: HashMap<IpAddr, usize>,
}

impl Handshakes {
    /// At once, a thread: half a second's work of a core.
    const MAX: usize = 1024;
    /// At once from one address: a gateway that brings many peers has so many new ones at once.
    const PER_ADDRESS_MAX: usize = 256;

    pub(crate) fn begin(&mut self, from: IpAddr) -> bool {
        let here = self.by_address.get(&from).copied().unwrap_or(0);
        if self.all >= Self::MAX || here >= Self::PER_ADDRESS_MAX {
            return false;
        }
        self.all += 1;
        self.by_address.insert(from, here + 1);
        true
    }

    pub(crate) fn end(&mut self, from: IpAddr) {
        self.all -= 1;
        if let Some(here) = self.by_address.get_mut(&from) {
            *here -= 1;
            if *here == 0 {
                self.by_address.remove(&from);
            }
        }
    }
}

/// Lets some log lines pass a second; what a stranger causes must not fill the log.
#[derive(Debug, Default)]
pub(crate) struct LogGate {
    second: Option<Instant>,
    passed: u32,
}

impl LogGate {
    const A_SECOND: u32 = 10;

    pub(crate) fn passes(&mut self) -> bool {
        let fresh = self
            .second
            .is_none_or(|at| at.elapsed() >= Duration::from_secs(1));
        if fresh {
            (self.second, self.passed) = (Some(Instant::now()), 0);
        }
        self.passed += 1;
        self.passed <= Self::A_SECOND
    }
}
