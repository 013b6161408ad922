//! Edges: who really calls a port that a host serves. Agents see and report them, control lists them.

use std::collections::BTreeMap;
use std::net::IpAddr;

use crate::identity::SpiffeId;
use crate::names::ServiceName;

/// Most edges of one host's report; who exceeds it is told apart no more, and `overflowed` says so.
pub const EDGES_MAX: usize = 2_048;
/// Most ports of one host's report.
pub const WATCHED_MAX: usize = 4_096;

/// Who calls.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum EdgeCaller {
    /// Over mTLS.
    Identity(SpiffeId),
    /// In plaintext, straight to the program's own port: only its address is known.
    Plaintext(IpAddr),
}

/// What became of the calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum EdgeVerdict {
    Passed,
    /// They would be refused if policy's `enforce` were `on`.
    Audited,
    Refused,
}

impl EdgeVerdict {
    pub const ALL: [Self; 3] = [Self::Passed, Self::Audited, Self::Refused];

    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Passed => "passed",
            Self::Audited => "audited",
            Self::Refused => "refused",
        }
    }

    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|v| v.as_str() == text)
    }
}

impl std::fmt::Display for EdgeVerdict {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Between whom an edge is.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EdgeKey {
    pub service: ServiceName,
    pub port: u16,
    pub caller: EdgeCaller,
    pub verdict: EdgeVerdict,
}

/// How often and when. Times are Unix milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EdgeUse {
    /// Connections or requests.
    pub calls: u64,
    pub first_ms: u64,
    pub last_ms: u64,
}

/// A port at which plaintext callers are looked for, and since when.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct WatchedPort {
    pub service: ServiceName,
    pub port: u16,
    pub since_ms: u64,
}

/// All that one host knows of its callers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EdgeReport {
    /// Each key once.
    pub edges: Vec<(EdgeKey, EdgeUse)>,
    pub watched: Vec<WatchedPort>,
    /// There were more callers than could be told apart.
    pub overflowed: bool,
}

/// An edge that was silent for so long is forgotten: thirty days.
pub const FORGET_AFTER_MS: u64 = 30 * 24 * 3600 * 1000;

/// What a host knows of its callers, kept up to date.
#[derive(Debug, Default)]
pub struct Ledger {
    edges: BTreeMap<EdgeKey, EdgeUse>,
    watched: BTreeMap<(ServiceName, u16), u64>,
    overflowed: bool,
}

impl Ledger {
    /// Goes on where a report ended.
    pub fn resume(report: EdgeReport) -> Self {
        let mut ledger = Self::default();
        for (key, used) in report.edges.into_iter().take(EDGES_MAX) {
            ledger.edges.insert(key, used);
        }
        for port in report.watched.into_iter().take(WATCHED_MAX) {
            ledger
                .watched
                .insert((port.service, port.port), port.since_ms);
        }
        ledger
    }

    /// Plaintext callers of exactly these ports are looked for now. A port that is no more forgets its callers.
    pub fn watch(&mut self, ports: impl IntoIterator<Item = (ServiceName, u16)>, now_ms: u64) {
        let old = std::mem::take(&mut self.watched);
        for port in ports.into_iter().take(WATCHED_MAX) {
            let since = old.get(&port).copied().unwrap_or(now_ms);
            self.watched.insert(port, since);
        }
        let watched = &self.watched;
        self.edges.retain(|key, _| {
            let port = (key.service.clone(), key.port);
            watched.contains_key(&port) || !old.contains_key(&port)
        });
    }

    /// Notes new calls. True if the edge is new.
    pub fn add(&mut self, key: EdgeKey, calls: u64, now_ms: u64) -> bool {
        if let Some(used) = self.edges.get_mut(&key) {
            used.calls = used.calls.saturating_add(calls);
            used.last_ms = used.last_ms.max(now_ms);
            return false;
        }
        if self.edges.len() >= EDGES_MAX {
            self.overflowed = true;
            return false;
        }
        let used = EdgeUse {
            calls,
            first_ms: now_ms,
            last_ms: now_ms,
        };
        self.edges.insert(key, used);
        true
    }

    pub fn knows(&self, key: &EdgeKey) -> bool {
        self.edges.contains_key(key)
    }

    /// Callers came that could not even be counted one by one.
    pub fn overflow(&mut self) {
        self.overflowed = true;
    }

    /// Forgets what was silent for long. Callers are then told apart again, if there is room.
    pub fn tidy(&mut self, now_ms: u64) {
        let before = now_ms.saturating_sub(FORGET_AFTER_MS);
        let count = self.edges.len();
        self.edges.retain(|_, used| before <= used.last_ms);
        if self.edges.len() < count {
            self.overflowed = false;
        }
    }

    pub fn report(&self) -> EdgeReport {
        let watched = self.watched.iter();
        EdgeReport {
            edges: self.edges.iter().map(|(k, u)| (k.clone(), *u)).collect(),
            watched: watched
                .map(|((service, port), since_ms)| WatchedPort {
                    service: service.clone(),
                    port: *port,
                    since_ms: *since_ms,
                })
                .collect(),
            overflowed: self.overflowed,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(port: u16, last: u32) -> EdgeKey {
        EdgeKey {
            service: ServiceName::parse("shop/web").unwrap(),
            port,
            caller: EdgeCaller::Plaintext(std::net::Ipv4Addr::from_bits(last).into()),
            verdict: EdgeVerdict::Passed,
        }
    }

    fn web(port: u16) -> (ServiceName, u16) {
        (ServiceName::parse("shop/web").unwrap(), port)
    }

    #[test]
    fn since_when_is_kept_over_changes_and_restarts() {
        let mut ledger = Ledger::default();
        ledger.watch([web(80), web(81)], 10);
        assert!(ledger.add(key(80, 1), 2, 20));
        assert!(!ledger.add(key(80, 1), 3, 30));
        assert!(ledger.add(key(81, 1), 1, 30));
        ledger.watch([web(80)], 40);
        let mut ledger = Ledger::resume(ledger.report());
        ledger.watch([web(80)], 50);
        let report = ledger.report();
        assert_eq!(report.watched[0].since_ms, 10);
        let [(_, used)] = &report.edges[..] else {
            panic!("{report:?}");
        };
        assert_eq!((used.calls, used.first_ms, used.last_ms), (5, 20, 30));
        ledger.tidy(30 + FORGET_AFTER_MS);
        assert_eq!(ledger.report().edges.len(), 1);
        ledger.tidy(31 + FORGET_AFTER_MS);
        assert!(ledger.report().edges.is_empty());
    }

    #[test]
    fn callers_are_bounded_and_that_is_said() {
        let mut ledger = Ledger::default();
        for n in 0..10 + u32::try_from(EDGES_MAX).unwrap() {
            ledger.add(key(80, n), 1, 1);
        }
        let report = ledger.report();
        assert_eq!(report.edges.len(), EDGES_MAX);
        assert!(report.overflowed);
    }
}
