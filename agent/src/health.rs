//! Checks the services of this host and publishes which of them are healthy.
//!
//! One task for each service (`health/task.rs`), or one for each of its servers where those have no agent;
//! `mesh_core::health` decides when to check and what results mean, the tasks here only ask (`health/ask.rs`). A service
//! without a check counts as healthy until its program takes no calls (`health/calls.rs`); one of several servers is as
//! healthy as the best of them.

mod ask;
mod calls;
mod exec;
mod grpc;
mod http;
mod kept;
mod systemd;
mod task;
mod tcp;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use mesh_api::workload_file::{Check, CheckKind, LocalService};
use mesh_core::health::{Thresholds, Verdict};
use mesh_core::names::{Account, ServiceName};
use tokio::sync::{mpsc, watch};
use tokio::task::{AbortHandle, JoinSet};
use tokio_util::sync::CancellationToken;

use crate::drained;
use crate::workloads::WorkloadSet;
use ask::Asking;
pub(crate) use ask::Results;
use calls::Call;
pub(crate) use calls::{Calls, CallsInbox, channel};
use task::Task;

/// Verdicts on their way from the tasks to the one that publishes; a task waits when it is full.
const VERDICTS_QUEUE: usize = 64;
/// Calls that wait for one task; what comes while it is full is not counted.
const CALLS_QUEUE: usize = 8;
/// How a service without a check is, once calls have unlisted it: by a connection to its lowest port.
const UNCHECKED: Thresholds = Thresholds {
    interval: Duration::from_secs(5),
    timeout: Duration::from_secs(2),
    rise: 1,
    fall: 1,
};

/// A service of one workload. Two workloads of a host may serve the same one.
pub(crate) type Served = (Account, ServiceName);
/// What is known of each service of the host.
pub(crate) type Verdicts = BTreeMap<Served, Verdict>;
/// Servers without an agent that fail the check.
pub(crate) type Unfit = BTreeSet<(Served, SocketAddr)>;
/// Where programs of this host listen on a TCP port: addresses as the kernel lists them, with `0.0.0.0` and
/// `::` for all.
pub(crate) type Listening = Arc<dyn Fn(u16) -> io::Result<Vec<IpAddr>> + Send + Sync>;

/// The verdicts of the worker before this one, for one that takes its place under the same holder: what is healthy must
/// not be unlisted until its first check. A worker of another holder comes after a stop, and knows nothing.
pub(crate) const KEPT: &str = "health.json";
/// Below the runtime directory: the pipes of commands that run now.
pub(crate) const PIPES: &str = "checks";

/// What is asked, heard and counted.
pub(crate) struct Sources {
    pub(crate) listening: Listening,
    /// From the data path.
    pub(crate) calls: CallsInbox,
    pub(crate) results: Results,
    /// For pipes of commands.
    pub(crate) pipes: PathBuf,
}

/// Where verdicts go.
pub(crate) struct Publish {
    pub(crate) verdicts: watch::Sender<Arc<Verdicts>>,
    /// What the operator has taken out, whatever the checks say.
    pub(crate) drained: watch::Receiver<Arc<drained::Set>>,
    /// Where they are kept for the next worker.
    pub(crate) file: PathBuf,
    /// Called with each change.
    pub(crate) unfit: Box<dyn Fn(Arc<Unfit>) + Send>,
}

/// Keeps the checks of `sets` running and publishes their verdicts until `stop`.
pub(crate) async fn run(
    mut sets: watch::Receiver<Arc<WorkloadSet>>,
    sources: Sources,
    mut publish: Publish,
    stop: CancellationToken,
) -> io::Result<()> {
    let (report, mut reports) = mpsc::channel(VERDICTS_QUEUE);
    let mut calls = sources.calls;
    let mut checks = Checks {
        asking: Asking {
            listening: sources.listening,
            results: sources.results,
            dir: Arc::new(sources.pipes),
        },
        counting: calls.counting.clone(),
        report,
        tasks: JoinSet::new(),
        running: BTreeMap::new(),
        generation: 0,
        kept: kept::read(&publish.file),
        written: BTreeMap::new(),
        verdicts: BTreeMap::new(),
        unfit: Unfit::new(),
    };
    loop {
        let set = Arc::clone(&sets.borrow_and_update());
        checks.converge(&set);
        checks.publish(&publish);
        loop {
            tokio::select! {
                () = stop.cancelled() => return Ok(()),
                changed = sets.changed() => match changed {
                    Ok(()) => break,
                    // Nobody can change the workloads any more: the daemon ends.
                    Err(_) => return Ok(()),
                },
                Ok(()) = publish.drained.changed() => {
                    publish.drained.mark_unchanged();
                    checks.publish(&publish);
                }
                Some(found) = reports.recv() => {
                    checks.found(found);
                    checks.publish(&publish);
                }
                call = calls.recv() => checks.called(call),
                Some(ended) = checks.tasks.join_next() => {
                    if let Err(error) = ended && error.is_panic() {
                        return Err(io::Error::other(error));
                    }
                }
            }
        }
    }
}

/// The running checks.
struct Checks {
    asking: Asking,
    counting: calls::Counting,
    report: mpsc::Sender<Found>,
    tasks: JoinSet<()>,
    running: BTreeMap<Asked, Running>,
    generation: u64,
    /// Of the worker before this one.
    kept: BTreeMap<Asked, Verdict>,
    /// For the worker after this one.
    written: BTreeMap<Asked, Verdict>,
    verdicts: BTreeMap<Asked, Verdict>,
    /// As published.
    unfit: Unfit,
}

/// Who is asked: the program of this host that serves, or one of the servers beyond it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Asked {
    served: Served,
    beyond: Option<SocketAddr>,
}

impl std::fmt::Display for Asked {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (account, service) = &self.served;
        match self.beyond {
            None => write!(f, "service {service} of {account}"),
            Some(server) => write!(f, "plaintext endpoint {server} of service {service}"),
        }
    }
}

/// What a task is for: when this changes, another takes its place.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Plan {
    check: Check,
    /// Not only while calls have unlisted the service.
    always: bool,
}

impl Plan {
    /// Of a service that a program of this host serves.
    fn of(service: &LocalService) -> Option<Self> {
        if let Some(check) = service.check.clone() {
            return Some(Self {
                check,
                always: true,
            });
        }
        let Thresholds {
            interval,
            timeout,
            rise,
            fall,
        } = UNCHECKED;
        // Some seconds.
        let seconds = |time: Duration| u32::try_from(time.as_secs()).unwrap_or(u32::MAX);
        let check = Check {
            kind: CheckKind::Tcp,
            port: service.ports.first()?.number,
            interval_s: seconds(interval),
            timeout_s: seconds(timeout),
            rise,
            fall,
        };
        Some(Self {
            check,
            always: false,
        })
    }

    fn thresholds(&self) -> Thresholds {
        Thresholds {
            interval: Duration::from_secs(self.check.interval_s.into()),
            timeout: Duration::from_secs(self.check.timeout_s.into()),
            rise: self.check.rise,
            fall: self.check.fall,
        }
    }
}

struct Running {
    plan: Plan,
    generation: u64,
    task: AbortHandle,
    calls: mpsc::Sender<bool>,
}

/// What a task found.
struct Found {
    asked: Asked,
    /// Of the task: a word of one that was replaced counts no more.
    generation: u64,
    verdict: Verdict,
}

impl Checks {
    /// Stops, starts and leaves alone, so that the running checks are those of `set`.
    fn converge(&mut self, set: &WorkloadSet) {
        let mut wanted: BTreeMap<Asked, Option<Plan>> = BTreeMap::new();
        for workload in &set.workloads {
            for service in &workload.services {
                let served = (workload.account.clone(), service.name.clone());
                let asked = |beyond| Asked {
                    served: served.clone(),
                    beyond,
                };
                if !service.is_fronted() {
                    wanted.insert(asked(None), Plan::of(service));
                }
                // Calls say nothing of them here: those who carry them leave out what does not answer.
                let checked = service.check.as_ref().and_then(|_| Plan::of(service));
                let servers = service.endpoints.iter().copied();
                wanted.extend(servers.map(|server| (asked(Some(server)), checked.clone())));
            }
        }
        self.verdicts.retain(|asked, _| wanted.contains_key(asked));
        self.running.retain(|asked, running| {
            let stays = wanted.get(asked).and_then(Option::as_ref) == Some(&running.plan);
            if !stays {
                running.task.abort();
            }
            stays
        });
        for (asked, plan) in wanted {
            match plan {
                None => drop(self.verdicts.insert(asked, Verdict::Healthy)),
                Some(plan) if !self.running.contains_key(&asked) => self.start(asked, plan),
                Some(_) => (),
            }
        }
    }

    fn start(&mut self, asked: Asked, plan: Plan) {
        self.generation += 1;
        // One whose check was edited keeps its verdict until the first result of the new check.
        let kept = self.kept.remove(&asked);
        let before = match plan.always {
            true => self
                .verdicts
                .get(&asked)
                .copied()
                .or(kept)
                .unwrap_or(Verdict::Unknown),
            // Until its first call fails.
            false => kept.unwrap_or(Verdict::Healthy),
        };
        self.verdicts.insert(asked.clone(), before);
        let (calls_by, calls) = mpsc::channel(CALLS_QUEUE);
        let task = Task {
            asked: asked.clone(),
            plan: plan.clone(),
            generation: self.generation,
            asking: self.asking.clone(),
            report: self.report.clone(),
            calls,
            counting: self.counting.clone(),
            before,
        };
        let running = Running {
            plan,
            generation: self.generation,
            task: self.tasks.spawn(task.run()),
            calls: calls_by,
        };
        self.running.insert(asked, running);
    }

    /// A call of the data path: counts at the port that is checked, so that no other port of a service can unlist it.
    fn called(&self, call: Call) {
        let asked = Asked {
            served: call.served,
            beyond: None,
        };
        let running = self.running.get(&asked);
        if let Some(running) = running.filter(|running| running.plan.check.port == call.port) {
            // Full: there are enough of them.
            let _ = running.calls.try_send(call.taken);
        }
    }

    fn found(&mut self, found: Found) {
        let current = self.running.get(&found.asked).map(|r| r.generation);
        if current == Some(found.generation) {
            self.verdicts.insert(found.asked, found.verdict);
        }
    }

    fn publish(&mut self, publish: &Publish) {
        if self.verdicts != self.written {
            kept::write(&publish.file, &self.verdicts);
            self.written.clone_from(&self.verdicts);
        }
        let mut verdicts = services(&self.verdicts);
        let drained = Arc::clone(&publish.drained.borrow());
        for ((_, service), verdict) in &mut verdicts {
            if drained.contains(service) {
                *verdict = Verdict::Draining;
            }
        }
        publish.verdicts.send_if_modified(|current| {
            let changed = **current != verdicts;
            if changed {
                *current = Arc::new(verdicts);
            }
            changed
        });
        let unfit = unfit(&self.verdicts);
        if unfit != self.unfit {
            self.unfit = unfit;
            (publish.unfit)(Arc::new(self.unfit.clone()));
        }
    }
}

/// Of each service the verdict on the best who serves it.
fn services(all: &BTreeMap<Asked, Verdict>) -> Verdicts {
    let rank = |verdict: Verdict| match verdict {
        Verdict::Healthy => 3,
        Verdict::Unknown => 2,
        Verdict::Draining => 1,
        Verdict::Unhealthy => 0,
    };
    let mut best = Verdicts::new();
    for (asked, verdict) in all {
        best.entry(asked.served.clone())
            .and_modify(|known| {
                if rank(*known) < rank(*verdict) {
                    *known = *verdict;
                }
            })
            .or_insert(*verdict);
    }
    best
}

fn unfit(all: &BTreeMap<Asked, Verdict>) -> Unfit {
    let unhealthy = all.iter().filter(|(_, v)| **v == Verdict::Unhealthy);
    let servers = unhealthy.filter_map(|(asked, _)| Some((asked.served.clone(), asked.beyond?)));
    servers.collect()
}

#[cfg(test)]
mod tests;
