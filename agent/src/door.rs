//! The worker's side of the input door: which plaintext callers are let in follows from index, policies and workloads;
//! who came is read from the holder, counted, logged when it is new, kept, and told control.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::net::IpAddr;
use std::sync::Arc;

use mesh_api::proto;
use mesh_core::edge::{EdgeCaller, EdgeKey, EdgeReport, EdgeVerdict, Ledger};
use mesh_core::names::ServiceName;
use mesh_core::policy::{Cidr, PlaintextDoor, Target, common, plaintext_door};
use mesh_core::reason::Reason;
use mesh_core::service::Transport;
use tokio::sync::watch;

use crate::capture::door::{Caller, Verdict};
use crate::capture::rules::Shed;
use crate::holder::protocol::{Arming, DesiredDoor, Looked};
use crate::holder::{DOORS_MAX, RANGES_MAX};
use crate::limits::Limit;
use crate::metrics::{Direction, Metrics};
use crate::state::{Kept, State};
use crate::view::View;

/// How often control is told who calls: its own session beats as seldom.
const TELL_EVERY_MS: u64 = 10_000;
/// How often it is kept on disk that callers who are known called again. Another caller is kept when control is told.
const KEEP_EVERY_MS: u64 = 60_000;
/// Different callers in metrics; later ones are counted together under `overflow`.
const SOURCES_MAX: usize = 1_000;
/// Ports, and ranges of all of them together, half of what the holder takes: as many may have to be kept.
const DOORS_WANTED_MAX: usize = DOORS_MAX / 2;
const RANGES_WANTED_MAX: usize = RANGES_MAX / 2;
/// New callers that are logged one by one in a turn: a scan must not fill the log.
const LOGGED_MAX: usize = 10;

/// How the door stands, for `status` and checks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct DoorStatus {
    /// Ports at which plaintext callers are looked for.
    pub(crate) ports: usize,
    pub(crate) arming: Arming,
    /// There were more callers than can be told apart.
    pub(crate) overflowed: bool,
    /// How often other programs took away what is ours of link, routes, rules and guard.
    pub(crate) repaired: u64,
    pub(crate) error: Option<String>,
}

/// The doors that there are to be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct WantedDoors {
    pub(crate) doors: Vec<DesiredDoor>,
    /// Ports whose doors stay as they are.
    pub(crate) kept: Vec<u16>,
}

/// Why a port refuses.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Facts {
    service: ServiceName,
    /// `None`: permissive.
    strict: Option<Vec<Cidr>>,
}

#[derive(Debug)]
pub(crate) struct Door {
    ledger: Ledger,
    state: State,
    metrics: Arc<Metrics>,
    report: watch::Sender<Arc<EdgeReport>>,
    told_ms: u64,
    kept_ms: u64,
    keep_open: Vec<u16>,
    ports: BTreeMap<u16, Facts>,
    /// What the kernel had counted when it was read last.
    counted: BTreeMap<(IpAddr, u16, Verdict), u64>,
    shed: Shed,
    /// Whether it was never read: what it has of callers that are known, the worker before this one has counted.
    resuming: bool,
    sources: HashSet<IpAddr>,
    /// Why some ports' doors stay as they are.
    too_many: Option<String>,
    pub(crate) status: DoorStatus,
}

impl Door {
    pub(crate) fn new(
        state: State,
        metrics: &Arc<Metrics>,
        report: watch::Sender<Arc<EdgeReport>>,
        keep_open: Vec<u16>,
    ) -> Self {
        let kept = state.kept::<proto::Edges>(Kept::Edges).unwrap_or_default();
        let kept = EdgeReport::try_from(&kept).unwrap_or_else(|error| {
            log::warn!("the callers that were known can not be read: {error}; they are seen anew");
            EdgeReport::default()
        });
        Self {
            ledger: Ledger::resume(kept),
            state,
            metrics: Arc::clone(metrics),
            report,
            told_ms: 0,
            kept_ms: 0,
            keep_open,
            ports: BTreeMap::new(),
            counted: BTreeMap::new(),
            shed: Shed::default(),
            resuming: true,
            sources: HashSet::new(),
            too_many: None,
            status: DoorStatus::default(),
        }
    }

    /// The door of each port that a program of this host serves. `None` while it is not known what control says: then
    /// what stands is kept, since silence must open nothing.
    pub(crate) fn wanted(&mut self, view: &View, now_ms: u64) -> Option<WantedDoors> {
        let (index, policies) = (view.index.as_ref()?, view.policies.as_ref()?);
        let mut ports: BTreeMap<u16, (Facts, PlaintextDoor)> = BTreeMap::new();
        let workloads = view.workloads.workloads.iter();
        let local = workloads
            .flat_map(|w| &w.services)
            .filter(|s| !s.is_fronted());
        let mut watched = Vec::new();
        // Of services that left the index: what was strict must stay so while a program serves it.
        let mut unknown = BTreeMap::new();
        for local in local {
            for port in local.ports.iter().map(|port| port.number) {
                if self.keep_open.contains(&port) {
                    continue;
                }
                let Some(service) = index.get(&local.name) else {
                    unknown.insert(port, local.name.clone());
                    continue;
                };
                let target = Target {
                    service: local.name.clone(),
                    port,
                };
                let door = plaintext_door(
                    policies,
                    &target,
                    service.transport,
                    &service.plaintext_from,
                );
                let strict = service.transport == Transport::Strict;
                let strict = strict.then(|| service.plaintext_from.clone());
                watched.push((local.name.clone(), port));
                match ports.get_mut(&port) {
                    // Two services at one port of a host, at different addresses: both must let a caller in.
                    Some((facts, both)) => {
                        both.open = common(&both.open, &door.open);
                        both.audited = common(&both.audited, &door.audited);
                        facts.strict = match (facts.strict.take(), strict) {
                            (Some(a), Some(b)) => Some(common(&a, &b)),
                            (a, b) => a.or(b),
                        };
                    }
                    None => {
                        let service = local.name.clone();
                        ports.insert(port, (Facts { service, strict }, door));
                    }
                }
            }
        }
        self.ledger.watch(watched, now_ms);
        self.status.ports = ports.len() + unknown.len();
        let mut kept = unknown.keys().copied().collect::<BTreeSet<u16>>();
        kept.extend(beyond_bounds(&ports));
        let excess = kept.len() - unknown.len();
        self.too_many = (0 < excess).then(|| {
            format!(
                "{excess} ports have no room for their address ranges, so what stands there stays: rules by `cidr` and \
                 `plaintext-from` give more than {RANGES_WANTED_MAX} ranges of all ports together"
            )
        });
        let mut facts: BTreeMap<u16, Facts> = BTreeMap::new();
        for (port, service) in unknown {
            let before = self.ports.get(&port).filter(|f| f.service == service);
            let strict = before.and_then(|before| before.strict.clone());
            facts.insert(port, Facts { service, strict });
        }
        ports.retain(|port, (known, _)| {
            facts.entry(*port).or_insert_with(|| known.clone());
            !kept.contains(port)
        });
        self.ports = facts;
        let texts = |ranges: &[Cidr]| ranges.iter().map(ToString::to_string).collect();
        let doors = ports.iter().map(|(port, (facts, door))| DesiredDoor {
            port: *port,
            open: texts(&door.open),
            audited: texts(&door.audited),
            strict: facts.strict.as_deref().map(texts),
        });
        Some(WantedDoors {
            doors: doors.collect(),
            kept: kept.into_iter().collect(),
        })
    }

    /// Takes what the kernel counted. What is new of it is added.
    pub(crate) fn looked(&mut self, looked: Looked, now_ms: u64) {
        let mut new = Vec::new();
        let mut counted = BTreeMap::new();
        for caller in looked.seen.callers {
            let key = (caller.source, caller.port, caller.verdict);
            // One that left the kernel's set meanwhile begins at nothing again.
            let before = self.counted.get(&key).copied().unwrap_or(0);
            let attempts = if caller.attempts < before {
                caller.attempts
            } else {
                caller.attempts - before
            };
            counted.insert(key, caller.attempts);
            if 0 < attempts && self.count(&caller, attempts, now_ms) {
                new.push(caller);
            }
        }
        self.counted = counted;
        self.count_shed(looked.shed);
        self.resuming = false;
        self.log(&new);
        if looked.seen.full {
            self.ledger.overflow();
        }
        self.count_identities(now_ms);
        self.ledger.tidy(now_ms);
        if looked.arming == Arming::Disarmed && self.status.arming != Arming::Disarmed {
            log::warn!(
                "control, or the default gateway, was not reached after the input door was changed: it refuses nothing \
                 until both are, but what was strict before"
            );
        }
        self.status.arming = looked.arming;
        self.status.repaired = looked.repaired;
        self.metrics
            .door(looked.arming == Arming::Disarmed, looked.repaired);
        self.status.error = looked.error.or_else(|| self.too_many.clone());
        self.tell(now_ms);
    }

    /// What was shed before this worker looked was counted by the one before.
    fn count_shed(&mut self, shed: Shed) {
        let before = std::mem::replace(&mut self.shed, shed);
        if !self.resuming {
            let limits = &self.metrics.limits;
            limits.reached_by(Limit::Dials, shed.dials.saturating_sub(before.dials));
            limits.reached_by(Limit::Names, shed.names.saturating_sub(before.names));
        }
    }

    /// Adds the callers over mTLS, as policy decided about them.
    fn count_identities(&mut self, now_ms: u64) {
        let (decided, full) = self.metrics.take_decided();
        for (key, calls) in decided {
            self.ledger.add(key, calls, now_ms);
        }
        if full {
            self.ledger.overflow();
        }
    }

    /// True if such a caller was not known.
    fn count(&mut self, caller: &Caller, attempts: u64, now_ms: u64) -> bool {
        let Some(facts) = self.ports.get(&caller.port) else {
            return false;
        };
        let key = EdgeKey {
            service: facts.service.clone(),
            port: caller.port,
            caller: EdgeCaller::Plaintext(caller.source),
            verdict: match caller.verdict {
                Verdict::Passed => EdgeVerdict::Passed,
                Verdict::Audited => EdgeVerdict::Audited,
                Verdict::Refused => EdgeVerdict::Refused,
            },
        };
        if self.resuming && self.ledger.knows(&key) {
            return false;
        }
        if key.verdict == EdgeVerdict::Refused {
            let reason = reason(facts, caller.source);
            self.metrics
                .refused_many(Direction::Inbound, reason, attempts);
        }
        let known = self.sources.contains(&caller.source);
        let room = self.sources.len() < SOURCES_MAX;
        if !known && room {
            self.sources.insert(caller.source);
        }
        let src = if known || room {
            caller.source.to_string()
        } else {
            "overflow".to_owned()
        };
        self.metrics
            .plaintext_callers(src, &facts.service, caller.port, key.verdict, attempts);
        self.ledger.add(key, attempts, now_ms)
    }

    fn log(&self, new: &[Caller]) {
        for caller in new.iter().take(LOGGED_MAX) {
            let Some(facts) = self.ports.get(&caller.port) else {
                continue;
            };
            let (source, service, port) = (caller.source, &facts.service, caller.port);
            let reason = reason(facts, source);
            match caller.verdict {
                Verdict::Passed => {
                    log::info!(source:% = source, service:% = service, port; "a new plaintext caller");
                }
                Verdict::Audited => {
                    log::warn!(source:% = source, service:% = service, port, reason:% = reason; "a plaintext caller would be refused if it were enforced");
                }
                Verdict::Refused => {
                    log::warn!(source:% = source, service:% = service, port, reason:% = reason; "a plaintext caller is refused");
                }
            }
        }
        if LOGGED_MAX < new.len() {
            let more = new.len() - LOGGED_MAX;
            log::warn!(more; "more new plaintext callers; `meshctl edges` lists them");
        }
    }

    fn tell(&mut self, now_ms: u64) {
        let report = self.ledger.report();
        self.status.overflowed = report.overflowed;
        let new = {
            let told = self.report.borrow();
            if now_ms < self.told_ms + TELL_EVERY_MS || **told == report {
                return;
            }
            let keys = |report: &EdgeReport| -> Vec<EdgeKey> {
                report.edges.iter().map(|(key, _)| key.clone()).collect()
            };
            told.watched != report.watched || keys(&told) != keys(&report)
        };
        self.told_ms = now_ms;
        if new || self.kept_ms + KEEP_EVERY_MS <= now_ms {
            self.kept_ms = now_ms;
            if let Err(error) = self.state.keep(Kept::Edges, &proto::Edges::from(&report)) {
                log::warn!("{error}; since when callers come is forgotten at the next start");
            }
        }
        self.report.send_replace(Arc::new(report));
    }
}

/// The ports that have no room, by their numbers: the last ones.
fn beyond_bounds(ports: &BTreeMap<u16, (Facts, PlaintextDoor)>) -> Vec<u16> {
    let (mut doors, mut ranges) = (0, 0);
    let mut beyond = Vec::new();
    for (port, (facts, door)) in ports {
        let strict = facts.strict.as_ref().map_or(0, Vec::len);
        let more = door.open.len() + door.audited.len() + strict;
        if doors == DOORS_WANTED_MAX || ranges + more > RANGES_WANTED_MAX {
            beyond.push(*port);
        } else {
            doors += 1;
            ranges += more;
        }
    }
    beyond
}

/// Why a caller is refused, or would be.
fn reason(facts: &Facts, source: IpAddr) -> Reason {
    match &facts.strict {
        Some(from) if !from.iter().any(|range| range.contains(source)) => Reason::PlaintextRefused,
        _ => Reason::NotAllowed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::capture::door::Seen;
    use crate::state::tests::{Scratch, membership};
    use crate::workloads::WorkloadSet;
    use mesh_api::workload_file::Workload;
    use mesh_core::service::{Capture, Index, Service, Vip};
    use mesh_runtime::mux::Budget;

    #[test]
    fn what_the_kernel_counted_is_added_once() {
        let scratch = Scratch::new();
        let (report, told) = watch::channel(Arc::default());
        let metrics = Metrics::new(Budget::new(1));
        let mut door = Door::new(scratch.0.clone(), &metrics, report, vec![]);
        let facts = Facts {
            service: ServiceName::parse("shop/web").unwrap(),
            strict: Some(vec![Cidr::parse("10.1.0.0/16").unwrap()]),
        };
        door.ports.insert(80, facts.clone());
        let mut look = |attempts, now_ms| {
            let callers = vec![Caller {
                source: "10.2.0.1".parse().unwrap(),
                port: 80,
                verdict: Verdict::Refused,
                attempts,
            }];
            let seen = Seen {
                callers,
                full: false,
            };
            let looked = Looked {
                seen,
                ..Looked::default()
            };
            door.looked(looked, now_ms);
        };
        look(3, 20_000);
        look(3, 100_000);
        look(5, 200_000);
        // It left the set and came again.
        look(1, 300_000);
        let report = Arc::clone(&told.borrow());
        let [(_, used)] = &report.edges[..] else {
            panic!("{report:?}");
        };
        assert_eq!(
            (used.calls, used.first_ms, used.last_ms),
            (6, 20_000, 300_000)
        );
        let page = metrics.encode();
        assert!(page.contains("reason=\"plaintext_refused\"} 6"), "{page}");
        assert!(page.contains("src=\"10.2.0.1\""), "{page}");
        let kept = scratch.0.kept::<proto::Edges>(Kept::Edges).unwrap();
        assert_eq!(EdgeReport::try_from(&kept).unwrap(), *report);
        // The next worker finds what is counted already.
        let (again, _told) = watch::channel(Arc::default());
        let mut next = Door::new(scratch.0.clone(), &metrics, again, vec![]);
        next.ports.insert(80, facts.clone());
        let looked = |attempts| {
            let source = "10.2.0.1".parse().unwrap();
            let callers = vec![Caller {
                source,
                port: 80,
                verdict: Verdict::Refused,
                attempts,
            }];
            let seen = Seen {
                callers,
                full: false,
            };
            Looked {
                seen,
                ..Looked::default()
            }
        };
        next.looked(looked(1), 400_000);
        assert_eq!(next.ledger.report().edges[0].1.calls, 6);
        next.looked(looked(3), 500_000);
        assert_eq!(next.ledger.report().edges[0].1.calls, 8);
        let inside = "10.1.0.1".parse().unwrap();
        assert_eq!(
            reason(&facts, inside),
            Reason::NotAllowed,
            "strict excepts it; policy does not"
        );
    }

    fn view(services: &[&str], file: &str) -> View {
        let mut index = Index::default();
        for (name, last) in services.iter().zip(2..) {
            index.insert(Service {
                name: ServiceName::parse(name).unwrap(),
                vip: Vip {
                    v4: [252, 64, 0, last].into(),
                    v6: [0xfd6d, 0, 0, 0, 0, 0, 0, last.into()].into(),
                },
                ports: Vec::new(),
                transport: Transport::Strict,
                plaintext_from: vec![Cidr::parse("10.1.0.0/16").unwrap()],
                capture: Capture::Vip,
            });
        }
        let workload = Workload::parse("web", file).unwrap();
        View {
            host: Arc::new(membership().host),
            index: Some(Arc::new(index)),
            policies: Some(Arc::default()),
            endpoints: Arc::default(),
            workloads: Arc::new(WorkloadSet {
                workloads: vec![Arc::new(workload)],
                ..WorkloadSet::default()
            }),
            unfit: Arc::default(),
            owners: Arc::default(),
            reals: Arc::default(),
            leaves: Arc::default(),
            revoked: Some(Arc::default()),
            live: true,
            unreached: false,
        }
    }

    const FILE: &str = "namespace = \"shop\"\n[owner]\nuser = \"web\"\n[[service]]\nports = [{ port = 80 }]\n\
                        [[service]]\nname = \"db\"\nports = [{ port = 5432 }]\n";

    #[test]
    fn the_door_of_a_service_that_left_the_index_stays_as_it_is() {
        let scratch = Scratch::new();
        let (report, _told) = watch::channel(Arc::default());
        let metrics = Metrics::new(Budget::new(1));
        let mut door = Door::new(scratch.0.clone(), &metrics, report, vec![]);
        let wanted = door
            .wanted(&view(&["shop/web", "shop/db"], FILE), 1)
            .unwrap();
        let ports: Vec<u16> = wanted.doors.iter().map(|door| door.port).collect();
        assert_eq!((ports, wanted.kept), (vec![80, 5432], vec![]));
        let wanted = door.wanted(&view(&["shop/web"], FILE), 2).unwrap();
        let ports: Vec<u16> = wanted.doors.iter().map(|door| door.port).collect();
        assert_eq!((ports, wanted.kept), (vec![80], vec![5432]));
        let db = &door.ports[&5432];
        assert!(db.strict.is_some(), "and why it refuses is still known");
        // No more declared, no more served.
        let file = FILE.replace("5432", "5433");
        let wanted = door.wanted(&view(&["shop/web"], &file), 3).unwrap();
        assert_eq!(wanted.kept, [5433]);
    }

    #[test]
    fn ranges_beyond_the_bound_leave_what_stands_and_are_told() {
        let facts = Facts {
            service: ServiceName::parse("shop/web").unwrap(),
            strict: None,
        };
        let range = Cidr::parse("10.0.0.0/24").unwrap();
        let door = |ranges: usize| PlaintextDoor {
            open: vec![range; ranges],
            audited: Vec::new(),
        };
        let mut ports: BTreeMap<_, _> = (1..=8)
            .map(|port| (port, (facts.clone(), door(RANGES_WANTED_MAX / 8))))
            .collect();
        assert_eq!(beyond_bounds(&ports), [0; 0]);
        ports.insert(5, (facts.clone(), door(RANGES_WANTED_MAX / 8 + 1)));
        assert_eq!(beyond_bounds(&ports), [8]);
        let many: BTreeMap<_, _> = (1..)
            .zip(vec![(facts, door(1)); DOORS_WANTED_MAX + 2])
            .collect();
        assert_eq!(beyond_bounds(&many).len(), 2);
    }
}
