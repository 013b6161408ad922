//! The admin socket of a worker: health, readiness, metrics, state, configuration and the log level.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};

use http::{Method, StatusCode};
use mesh_api::sync::Problem;
use mesh_api::workload_file::{LocalService, Workload};
use mesh_core::health::Verdict;
use mesh_core::identity::Identity;
use mesh_core::names::{Account, ServiceName};
use mesh_core::reason::Reason;
use mesh_core::session::Phase;
use mesh_runtime::admin::{Answer, Handler};
use tokio::sync::{mpsc, watch};
use tonic::transport::Channel;

use crate::bypass::Open;
use crate::capture::sockdiag::{Listener, SockDiag};
use crate::config::Config;
use crate::control::SessionStatus;
use crate::dns;
use crate::drained::Drained;
use crate::explicit::Closed;
use crate::health::Verdicts;
use crate::holder::protocol::Arming;
use crate::leaves::{LeafStanding, Standings, now_ms};
use crate::metrics::Metrics;
use crate::owners::OwnerStatus;
use crate::state::Membership;
use crate::status::{
    CaptureStatus, ControlStatus, DoorStatus, ExampleStatus, IndexStatus, LeafStatus, NamesStatus,
    RefusalStatus, ServiceStatus, Status, UsageStatus, WorkloadStatus,
};
use crate::view::{View, ViewReader};
use crate::workloads::WorkloadSet;

mod drained;
mod explain;
mod peers;

/// Ports looked at for one answer, since each costs a question to the kernel, and the session waits meanwhile.
const PORTS_MAX: usize = 1_024;

/// What the answers are made of.
#[derive(Debug)]
pub(crate) struct Sources {
    pub(crate) config: Config,
    pub(crate) membership: Membership,
    pub(crate) view: ViewReader,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) sets: watch::Receiver<Arc<WorkloadSet>>,
    pub(crate) verdicts: watch::Receiver<Arc<Verdicts>>,
    pub(crate) session: watch::Receiver<Arc<SessionStatus>>,
    pub(crate) standings: watch::Receiver<Arc<Standings>>,
    pub(crate) owners: watch::Receiver<Arc<OwnerStatus>>,
    /// Services that the operator has taken out.
    pub(crate) drained: Drained,
    /// Local ports and sockets that could not be opened.
    pub(crate) closed: watch::Receiver<Arc<Closed>>,
    pub(crate) dns: Option<Arc<dns::Counters>>,
    pub(crate) names: Option<watch::Receiver<NamesStatus>>,
    pub(crate) diag: Mutex<SockDiag>,
    /// Services whose endpoints are wanted.
    pub(crate) wants: mpsc::Sender<ServiceName>,
    /// The way to control while the session is live.
    pub(crate) channel: watch::Receiver<Option<Channel>>,
}

/// Answers from `sources`.
pub(crate) fn handler(sources: Sources) -> Handler {
    let sources = Arc::new(sources);
    Arc::new(move |method, path| {
        let sources = Arc::clone(&sources);
        Box::pin(async move { sources.answer(&method, &path).await })
    })
}

impl Sources {
    async fn answer(&self, method: &Method, path: &str) -> Answer {
        let (path, query) = path.split_once('?').unwrap_or((path, ""));
        match (method.as_str(), path) {
            ("GET", "/health") => Answer::text("ok\n"),
            ("GET", "/ready") => self.ready(),
            ("GET", "/metrics") => Answer {
                status: StatusCode::OK,
                content_type: "application/openmetrics-text; version=1.0.0; charset=utf-8",
                body: self.metrics.encode(),
            },
            ("GET", "/state") => Answer::json(&self.status()),
            ("GET", "/explain") => self.explain(query).await,
            ("GET", "/peers") => self.peers().await,
            ("GET", "/config") => match toml::to_string(&self.config) {
                Ok(text) => Answer::text(text),
                Err(error) => Answer::error(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string()),
            },
            ("GET", "/drained") => Answer::json(&self.open_calls()),
            ("PUT", "/drain") => self.drain(query, true),
            ("PUT", "/undrain") => self.drain(query, false),
            ("PUT", "/log-level") => set_level(query),
            (
                _,
                "/health" | "/ready" | "/metrics" | "/state" | "/explain" | "/peers" | "/config"
                | "/drained" | "/drain" | "/undrain" | "/log-level",
            ) => Answer::error(
                StatusCode::METHOD_NOT_ALLOWED,
                "use GET, or PUT for /drain, /undrain and /log-level",
            ),
            _ => Answer::error(
                StatusCode::NOT_FOUND,
                "there are /health, /ready, /metrics, /state, /explain, /peers, /config, /drained, /drain, /undrain and \
                 /log-level",
            ),
        }
    }

    fn ready(&self) -> Answer {
        let waits = self.waits_for();
        if waits.is_empty() {
            return Answer::text("ready\n");
        }
        let message = format!("not ready; waiting for {}", waits.join(", "));
        Answer::error(StatusCode::SERVICE_UNAVAILABLE, &message)
    }

    /// What must be there before calls are certain to be served.
    fn waits_for(&self) -> Vec<String> {
        let mut waits = Vec::new();
        let view = self.view.borrow().clone();
        if !self.owners.borrow().applied {
            waits.push("the kernel to know the workloads".to_owned());
        }
        if view.index.is_none() {
            waits.push("the services of the mesh, which control sends".to_owned());
        }
        if view.policies.is_none() {
            waits.push("the policies, which control sends".to_owned());
        }
        if view.revoked.is_none() {
            waits.push("what was revoked, which control sends again".to_owned());
        }
        let standings = self.standings.borrow().clone();
        let set = self.sets.borrow().clone();
        let accounts = set.workloads.iter().map(|w| &w.account);
        let mut wanted: Vec<Identity> = accounts.cloned().map(Identity::Workload).collect();
        wanted.push(Identity::Host(self.membership.host.name.clone()));
        for identity in wanted {
            let standing = standings.get(&identity);
            let settled = standing.is_some_and(|s| s.not_after_s.is_some() || s.refused.is_some());
            if !settled {
                waits.push(format!("the certificate of {identity}"));
            }
        }
        waits
    }

    fn status(&self) -> Status {
        let view = self.view.borrow().clone();
        let session = self.session.borrow().clone();
        let standings = self.standings.borrow().clone();
        let verdicts = self.verdicts.borrow().clone();
        let owners = self.owners.borrow().clone();
        let set = self.sets.borrow().clone();
        let host = &self.membership.host;
        let host_identity = Identity::Host(host.name.clone());
        let spaces = namespaces(&set);
        let mut status = Status {
            version: mesh_runtime::version().to_owned(),
            host: host.name.to_string(),
            host_uid: host.uid.to_string(),
            trust_domain: host.trust_domain.to_string(),
            network: host.network.to_string(),
            address: match session.own_address {
                Some(address) => address.to_string(),
                None => self.membership.address.clone(),
            },
            control: control(&session),
            index: index(&view, &session),
            policies: view.policies.as_ref().map(|p| p.revision),
            revocations_unknown: view.revoked.is_none(),
            endpoints_known: view.endpoints.len(),
            capture: CaptureStatus {
                applied: owners.applied,
                error: owners.error.clone(),
                enabled: self.config.capture.enabled,
                closed: closed(&self.closed.borrow()),
                reals: owners.reals,
                reals_left_out: owners.reals_left_out,
            },
            door: DoorStatus {
                ports: owners.door.ports,
                disarmed: owners.door.arming == Arming::Disarmed,
                overflowed: owners.door.overflowed,
                repaired: owners.door.repaired,
                error: owners.door.error.clone(),
            },
            draining_workers: owners.draining,
            reload_given_up: owners.given_up.clone(),
            bypass: owners.bypass.as_ref().and_then(Open::of),
            host_leaf: leaf(&host_identity, standings.get(&host_identity), &spaces),
            workloads: Vec::new(),
            file_problems: set.problems.iter().map(ToString::to_string).collect(),
            autonomy_s: None,
            dns: self.dns.as_deref().map(counters).unwrap_or_default(),
            names: self.names.as_ref().map(|names| names.borrow().clone()),
            in_use: self.in_use(),
        };
        let mut ports = PORTS_MAX;
        for workload in &set.workloads {
            let account = &workload.account;
            let mut shown = workload_status(workload, &session.problems, &verdicts, &spaces);
            let identity = Identity::Workload(account.clone());
            shown.leaf = leaf(&identity, standings.get(&identity), &spaces);
            let revoked = view.revoked.as_ref();
            if revoked.is_some_and(|revoked| revoked.cover(&host.uid, &identity)) {
                let reason = Reason::IdentityRevoked;
                shown.leaf.left_s = None;
                shown.leaf.refused = Some(refusal(reason, reason.text(), &identity, &spaces));
            }
            shown.number = set.number(account).unwrap_or_default();
            let problem = owners.problems.get(account);
            shown.problem = problem.or_else(|| owners.absent.get(account)).cloned();
            for (service, shown_service) in workload.services.iter().zip(&mut shown.services) {
                if service.is_fronted() {
                    fronted(&view, account, service, shown_service);
                    continue;
                }
                if shown.problem.is_none() {
                    shown_service.problems =
                        self.port_problems(&view, account, service, &mut ports);
                }
                let in_doubt = shown.problem.is_some() || !shown_service.problems.is_empty();
                if in_doubt && ["healthy", NOT_CHECKED].contains(&shown_service.health.as_str()) {
                    "not served".clone_into(&mut shown_service.health);
                }
            }
            status.workloads.push(shown);
        }
        let lives = status.workloads.iter().filter_map(|w| w.leaf.left_s);
        status.autonomy_s = lives.chain(status.host_leaf.left_s).min();
        status
    }
}

impl Sources {
    /// What is wrong with the ports of a service, as the kernel's listening sockets say.
    fn port_problems(
        &self,
        view: &View,
        account: &Account,
        service: &LocalService,
        left: &mut usize,
    ) -> Vec<String> {
        let looked_at = service.ports.iter().take(*left);
        let problems = looked_at.clone().filter_map(|port| {
            let listeners = self.listeners(port.number);
            port_problem(port.number, listeners, |listener| {
                let owner = view.owners.find(listener.uid, listener.cgroup);
                owner.is_ok_and(|owner| owner == Some(account))
            })
        });
        let problems = problems.collect();
        *left -= looked_at.len();
        problems
    }

    fn in_use(&self) -> Vec<UsageStatus> {
        let limits = &self.metrics.limits;
        limits.refresh();
        let all = limits.in_use().into_iter();
        all.map(|(limit, used, max)| UsageStatus {
            limit: limit.name().to_owned(),
            used,
            max,
        })
        .collect()
    }

    fn listeners(&self, port: u16) -> io::Result<Vec<Listener>> {
        let mut diag = self.diag.lock().unwrap_or_else(PoisonError::into_inner);
        diag.listeners(port)
    }
}

/// What there is to say of a service that servers without an agent serve: no port of this host matters.
fn fronted(view: &View, account: &Account, service: &LocalService, shown: &mut ServiceStatus) {
    let served = (account.clone(), service.name.clone());
    for server in &service.endpoints {
        shown.plaintext.push(server.to_string());
        if view.unfit.contains(&(served.clone(), *server)) {
            shown.problems.push(format!(
                "plaintext endpoint {server} fails the check and is left out; see why there, or take it out of the file"
            ));
        }
    }
}

fn port_problem(
    port: u16,
    listeners: io::Result<Vec<Listener>>,
    own: impl Fn(&Listener) -> bool,
) -> Option<String> {
    let listeners = match listeners {
        Ok(listeners) => listeners,
        Err(error) => {
            return Some(format!(
                "who listens on port {port} can not be told: {error}"
            ));
        }
    };
    let Some(first) = listeners.first() else {
        return Some(format!(
            "nothing listens on port {port}; start the program, or correct the port"
        ));
    };
    if listeners.iter().any(own) {
        return None;
    }
    Some(format!(
        "port {port} is held by another program (uid {}, {}), which is not of this workload's owner; calls are refused",
        first.uid, first.address
    ))
}

/// The health of a service that nobody asked to be checked.
const NOT_CHECKED: &str = "not checked";

fn control(session: &SessionStatus) -> ControlStatus {
    let live = session.phase == Phase::Live;
    let error = session.last_error.as_ref().filter(|_| !live);
    ControlStatus {
        session: match session.phase {
            Phase::Waiting => "waiting",
            Phase::Connecting => "connecting",
            Phase::Greeting => "greeting",
            Phase::Live => "live",
        }
        .to_owned(),
        address: session.address.clone(),
        version: session.control_version.clone(),
        clock_offset_ms: session.clock_offset_ms,
        stale_since_s: (!live).then_some(session.heard_ms / 1000),
        last_error: error.map(|e| e.text.clone()),
        last_reason: error.and_then(|e| e.reason.clone()),
    }
}

fn index(view: &View, session: &SessionStatus) -> Option<IndexStatus> {
    let index = view.index.as_ref()?;
    let installed = session.installed?;
    Some(IndexStatus {
        epoch: installed.epoch,
        revision: installed.revision,
        services: index.services().len(),
        example: index.services().next().map(|service| ExampleStatus {
            dns_name: format!(
                "{}.{}.{}",
                service.name.name, service.name.namespace, view.host.dns_suffix
            ),
            vip4: service.vip.v4.to_string(),
            vip6: service.vip.v6.to_string(),
        }),
    })
}

/// What a token must allow so that this host may be all that its files say: a token takes the place of the one before.
fn namespaces(set: &WorkloadSet) -> String {
    let all = set.workloads.iter().map(|w| &w.account.namespace);
    let all: BTreeSet<String> = all.map(|ns| format!("--namespace {ns}")).collect();
    Vec::from_iter(all).join(" ")
}

fn leaf(identity: &Identity, standing: Option<&LeafStanding>, spaces: &str) -> LeafStatus {
    let now_s = i64::try_from(now_ms() / 1000).unwrap_or(i64::MAX);
    LeafStatus {
        identity: identity.to_string(),
        left_s: standing
            .and_then(|s| s.not_after_s)
            .map(|not_after| not_after.saturating_sub(now_s)),
        refused: standing
            .and_then(|s| s.refused.as_ref())
            .map(|(reason, message)| refusal(*reason, message, identity, spaces)),
    }
}

fn refusal(reason: Reason, message: &str, whose: &Identity, spaces: &str) -> RefusalStatus {
    let remedy = match (reason, whose) {
        // What a host may hold is fixed by the token of its join.
        (Reason::OutOfScope, Identity::Workload(_)) => format!(
            "it must join again with a token for all that it is: `meshctl token create {spaces} --replace`; then stop the \
             agent, `mesh-agent leave`, `mesh-agent join <token>`"
        ),
        _ => reason.text().to_owned(),
    };
    RefusalStatus {
        reason: reason.code().to_owned(),
        message: message.to_owned(),
        remedy,
    }
}

fn workload_status(
    workload: &Workload,
    problems: &[Problem],
    verdicts: &Verdicts,
    spaces: &str,
) -> WorkloadStatus {
    let identity = Identity::Workload(workload.account.clone());
    let refused = |service: Option<&mesh_core::names::Label>| {
        let mut own = problems.iter().filter(|p| p.account == workload.account);
        let problem = own.find(|p| p.service.as_ref() == service)?;
        Some(refusal(problem.reason, &problem.message, &identity, spaces))
    };
    let services = workload.services.iter().map(|service| {
        let served = (workload.account.clone(), service.name.clone());
        let verdict = verdicts.get(&served).copied().unwrap_or(Verdict::Unknown);
        ServiceStatus {
            name: service.name.to_string(),
            ports: service.ports.iter().map(|p| p.number).collect(),
            health: match &service.check {
                // Calls may have unlisted it.
                None if verdict == Verdict::Healthy => NOT_CHECKED,
                _ => verdict.as_str(),
            }
            .to_owned(),
            plaintext: Vec::new(),
            problems: Vec::new(),
            refused: refused(Some(&service.name.name)),
        }
    });
    WorkloadStatus {
        account: workload.account.to_string(),
        owner: workload
            .owner
            .as_ref()
            .map_or_else(|| "none, fronted".to_owned(), ToString::to_string),
        services: services.collect(),
        refused: refused(None),
        ..WorkloadStatus::default()
    }
}

fn counters(dns: &dns::Counters) -> BTreeMap<String, u64> {
    let all = [
        ("answered", &dns.answered),
        ("no_such_name", &dns.no_such_name),
        ("no_index", &dns.no_index),
        ("forwarded", &dns.forwarded),
        ("upstream_failed", &dns.upstream_failed),
        ("overloaded", &dns.overloaded),
        ("malformed", &dns.malformed),
    ];
    let read = all.map(|(name, counter)| (name.to_owned(), counter.load(Ordering::Relaxed)));
    BTreeMap::from(read)
}

fn closed(closed: &Closed) -> Vec<String> {
    let closed = closed.iter();
    closed.map(|(at, error)| format!("{at}: {error}")).collect()
}

fn set_level(query: &str) -> Answer {
    let Some(level) = query.strip_prefix("level=") else {
        return Answer::error(StatusCode::BAD_REQUEST, "use PUT /log-level?level=debug");
    };
    match mesh_runtime::log::set_level(level) {
        Ok(()) => {
            log::info!(level = level; "the log level was changed");
            Answer::text("changed\n")
        }
        Err(error) => Answer::error(StatusCode::BAD_REQUEST, &error),
    }
}
