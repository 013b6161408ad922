//! Who calls whom, as the hosts last said. It stays in memory: after a start each host tells it again with its next
//! session, with the times that it knows.

use std::sync::Arc;

use imbl::OrdMap;
use mesh_core::edge::EdgeReport;
use mesh_core::names::HostUid;
use tokio::sync::watch;

/// Edges of all hosts together; some 200 bytes each. What is above is cut from the report that comes last.
const EDGES_MAX: usize = 200_000;

/// By the host that is called.
pub(crate) type EdgesByHost = OrdMap<HostUid, Arc<EdgeReport>>;

#[derive(Debug, Default)]
pub(crate) struct Edges(watch::Sender<Held>);

#[derive(Clone, Debug, Default)]
struct Held {
    by_host: EdgesByHost,
    count: usize,
}

impl Edges {
    /// Takes the report of a host in the place of its last one.
    pub(crate) fn put(&self, host: &HostUid, mut report: EdgeReport) {
        self.0.send_modify(|held| {
            held.remove(host);
            let room = EDGES_MAX.saturating_sub(held.count);
            if room < report.edges.len() {
                report.edges.truncate(room);
                report.overflowed = true;
            }
            held.count += report.edges.len();
            held.by_host.insert(host.clone(), Arc::new(report));
        });
    }

    /// A host that is gone has no callers.
    pub(crate) fn forget(&self, host: &HostUid) {
        self.0.send_modify(|held| held.remove(host));
    }

    pub(crate) fn all(&self) -> EdgesByHost {
        self.0.borrow().by_host.clone()
    }
}

impl Held {
    fn remove(&mut self, host: &HostUid) {
        if let Some(old) = self.by_host.remove(host) {
            self.count -= old.edges.len();
        }
    }
}

#[cfg(test)]
mod tests {
    use mesh_core::edge::{EdgeCaller, EdgeKey, EdgeUse, EdgeVerdict};
    use mesh_core::names::ServiceName;

    use super::*;

    fn report(count: usize) -> EdgeReport {
        let edge = |n: usize| {
            let key = EdgeKey {
                service: ServiceName::parse("shop/web").unwrap(),
                port: 80,
                caller: EdgeCaller::Plaintext(
                    std::net::Ipv4Addr::from_bits(u32::try_from(n).unwrap()).into(),
                ),
                verdict: EdgeVerdict::Passed,
            };
            let used = EdgeUse {
                calls: 1,
                first_ms: 1,
                last_ms: 1,
            };
            (key, used)
        };
        EdgeReport {
            edges: (0..count).map(edge).collect(),
            ..EdgeReport::default()
        }
    }

    #[test]
    fn all_hosts_together_are_bounded_and_a_host_that_goes_makes_room() {
        let uid = |n: u8| format!("{n:032x}").parse::<HostUid>().unwrap();
        let edges = Edges::default();
        edges.put(&uid(1), report(EDGES_MAX - 10));
        edges.put(&uid(2), report(50));
        let held = edges.all();
        assert_eq!(held[&uid(2)].edges.len(), 10);
        assert!(held[&uid(2)].overflowed && !held[&uid(1)].overflowed);
        edges.forget(&uid(1));
        edges.put(&uid(2), report(50));
        assert_eq!(edges.all()[&uid(2)].edges.len(), 50);
        assert_eq!(edges.all().len(), 1);
    }
}
