//! What the data path counts. A connection or stream looks its counters up once; counting is an atomic add.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use mesh_core::edge::{EdgeCaller, EdgeKey, EdgeVerdict};
use mesh_core::identity::SpiffeId;
use mesh_core::names::ServiceName;
use mesh_core::policy::Target;
use mesh_core::reason::Reason;
use mesh_runtime::mux::Budget;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{
    DescriptorEncoder, EncodeLabelSet, EncodeLabelValue, EncodeMetric as _,
};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use tokio::sync::watch;

pub(crate) use decisions::DecisionCount;
use decisions::Edges;

use crate::leaves::Standings;
use crate::limits::Limits;
use crate::peers::unix_now_s;
use crate::workloads::WorkloadSet;

mod decisions;
mod kernel;
mod open;

/// Different flows that are told apart; later ones are counted together under `overflow`. A peer can make us see
/// as many identities as it has certificates.
const FLOWS_MAX: usize = 10_000;
/// Seconds: from a call within a host to one across continents that waits.
const BUCKETS: [f64; 12] = [
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0, 30.0,
];

/// Which side of a call this agent is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub(crate) enum Direction {
    Outbound,
    Inbound,
}

/// Between whom a call is.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct FlowLabels {
    pub(crate) direction: Direction,
    /// SPIFFE id of the caller.
    pub(crate) src: String,
    /// `namespace/service`.
    pub(crate) dst: String,
    pub(crate) port: u16,
    /// SPIFFE id of the called workload; `none` until one is known.
    pub(crate) tls: String,
    pub(crate) protocol: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    direction: Direction,
    src: String,
    dst: String,
    port: u16,
    tls: String,
    protocol: &'static str,
    /// HTTP status class, or `ok` and `failed` for connections.
    status: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct GrpcLabels {
    direction: Direction,
    src: String,
    dst: String,
    port: u16,
    tls: String,
    protocol: &'static str,
    /// The code of gRPC, `other` for one that it does not know and for an answer that ended without.
    grpc_status: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RefusalLabels {
    direction: Direction,
    reason: &'static str,
}

/// Which rule decided at the called side, and how.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DecisionLabels {
    src: String,
    dst: String,
    port: u16,
    rule: String,
    decision: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PlaintextLabels {
    dst: String,
    endpoint: String,
    status: &'static str,
}

/// Who came straight to a port of this host.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PlaintextCallerLabels {
    /// Its address, or `overflow`.
    src: String,
    dst: String,
    port: u16,
    verdict: &'static str,
}

/// Says at each scrape which services go on in plaintext beyond this host: the files decide, so nothing can be stale.
#[derive(Debug)]
pub(crate) struct FrontedServices(pub(crate) watch::Receiver<Arc<WorkloadSet>>);

impl Collector for FrontedServices {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let mut family = encoder.encode_descriptor(
            "plaintext_endpoints",
            "Servers without an agent that this host goes on to in plaintext",
            None,
            MetricType::Gauge,
        )?;
        let set = Arc::clone(&self.0.borrow());
        let services = set.workloads.iter().flat_map(|w| &w.services);
        for service in services.filter(|service| service.is_fronted()) {
            let labels = [("dst", service.name.to_string())];
            let count = ConstGauge::new(i64::try_from(service.endpoints.len()).unwrap_or(i64::MAX));
            count.encode(family.encode_family(&labels)?)?;
        }
        Ok(())
    }
}

/// Says at each scrape how long each certificate of this host still lives.
#[derive(Debug)]
pub(crate) struct CertificateLives(pub(crate) watch::Receiver<Arc<Standings>>);

impl Collector for CertificateLives {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let mut family = encoder.encode_descriptor(
            "certificate_remaining_seconds",
            "Until the certificate of an identity of this host ends; below a third of its life it is late",
            None,
            MetricType::Gauge,
        )?;
        let standings = Arc::clone(&self.0.borrow());
        let now_s = unix_now_s();
        for (identity, standing) in standings.iter() {
            if let Some(not_after_s) = standing.not_after_s {
                let labels = [("identity", identity.to_string())];
                let left = ConstGauge::new(not_after_s.saturating_sub(now_s));
                left.encode(family.encode_family(&labels)?)?;
            }
        }
        Ok(())
    }
}

/// The counters of one flow.
#[derive(Debug)]
pub(crate) struct Flow {
    statuses: [Counter; STATUSES.len()],
    pub(crate) open: Gauge,
    /// From the caller to the service.
    pub(crate) sent: Counter,
    /// From the service to the caller.
    pub(crate) received: Counter,
    latency: Histogram,
    /// Of a flow that may be HTTP/2.
    grpc: Option<Box<GrpcStatuses>>,
}

const STATUSES: [&str; 7] = ["1xx", "2xx", "3xx", "4xx", "5xx", "ok", "failed"];
/// The codes of gRPC, and `other`.
const GRPC_STATUSES: [&str; 18] = [
    "0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "10", "11", "12", "13", "14", "15", "16",
    "other",
];

/// The counters of gRPC's codes in one flow. Most are never seen, so each is made when it is.
#[derive(Debug)]
struct GrpcStatuses {
    labels: FlowLabels,
    all: Family<GrpcLabels, Counter>,
    counters: [OnceLock<Counter>; GRPC_STATUSES.len()],
}

impl GrpcStatuses {
    fn new(labels: &FlowLabels, all: &Family<GrpcLabels, Counter>) -> Self {
        Self {
            labels: labels.clone(),
            all: all.clone(),
            counters: Default::default(),
        }
    }

    fn count(&self, status: Option<u16>) {
        let other = GRPC_STATUSES.len() - 1;
        let at = status.map_or(other, |status| usize::from(status).min(other));
        let make = || {
            let FlowLabels {
                direction,
                src,
                dst,
                port,
                tls,
                protocol,
            } = self.labels.clone();
            let labels = GrpcLabels {
                direction,
                src,
                dst,
                port,
                tls,
                protocol,
                grpc_status: GRPC_STATUSES[at],
            };
            self.all.get_or_create(&labels).clone()
        };
        self.counters[at].get_or_init(make).inc();
    }
}

impl Flow {
    /// Counts an HTTP response and the time until its head.
    pub(crate) fn response(&self, status: u16, seconds: f64) {
        let class = usize::from(status / 100).clamp(1, 5) - 1;
        self.statuses[class].inc();
        self.latency.observe(seconds);
    }

    /// Counts a response that this agent made itself: it says nothing of latency.
    pub(crate) fn refused(&self, status: u16) {
        self.statuses[usize::from(status / 100).clamp(1, 5) - 1].inc();
    }

    /// Counts a connection that ended.
    pub(crate) fn connection(&self, ok: bool) {
        self.statuses[if ok { 5 } else { 6 }].inc();
    }

    /// Counts the end of a gRPC call by its code; `None`: it had none that is known.
    pub(crate) fn grpc(&self, status: Option<u16>) {
        if let Some(grpc) = &self.grpc {
            grpc.count(status);
        }
    }

    /// Counts the time until the called app took a connection.
    pub(crate) fn connected(&self, seconds: f64) {
        self.latency.observe(seconds);
    }
}

/// All metrics of a worker.
#[derive(Debug)]
pub(crate) struct Metrics {
    registry: Mutex<Registry>,
    flows: Mutex<HashMap<FlowLabels, Arc<Flow>>>,
    /// Callers of which policy decided something.
    known: Mutex<HashSet<String>>,
    requests: Family<RequestLabels, Counter>,
    grpc_responses: Family<GrpcLabels, Counter>,
    bytes_sent: Family<FlowLabels, Counter>,
    bytes_received: Family<FlowLabels, Counter>,
    open: Family<FlowLabels, Gauge>,
    latency: Family<FlowLabels, Histogram, fn() -> Histogram>,
    refused: Family<RefusalLabels, Counter>,
    decisions: Family<DecisionLabels, Counter>,
    edges: Mutex<Edges>,
    pub(crate) mesh_connections: Gauge,
    pub(crate) app_connections: Counter,
    pub(crate) app_reused: Counter,
    pub(crate) limits: Limits,
    plaintext_connections: Family<PlaintextLabels, Counter>,
    plaintext_callers: Family<PlaintextCallerLabels, Counter>,
    door_disarmed: Gauge,
    repairs: Gauge,
    /// Of them, what is not the holder's to count.
    names_repaired: AtomicU64,
    draining_workers: Gauge,
    reload_given_up: Gauge,
    bypass: Gauge,
}

impl Metrics {
    /// `budget` is what the buffers of all mesh connections count against.
    pub(crate) fn new(budget: Arc<Budget>) -> Arc<Self> {
        let histogram: fn() -> Histogram = || Histogram::new(BUCKETS);
        let mut registry = Registry::with_prefix("mesh");
        let metrics = Self {
            limits: Limits::register(&mut registry, budget),
            registry: Mutex::new(registry),
            flows: Mutex::default(),
            known: Mutex::default(),
            requests: Family::default(),
            grpc_responses: Family::default(),
            bytes_sent: Family::default(),
            bytes_received: Family::default(),
            open: Family::default(),
            latency: Family::new_with_constructor(histogram),
            refused: Family::default(),
            decisions: Family::default(),
            edges: Mutex::default(),
            mesh_connections: Gauge::default(),
            app_connections: Counter::default(),
            app_reused: Counter::default(),
            plaintext_connections: Family::default(),
            plaintext_callers: Family::default(),
            door_disarmed: Gauge::default(),
            repairs: Gauge::default(),
            names_repaired: AtomicU64::new(0),
            draining_workers: Gauge::default(),
            reload_given_up: Gauge::default(),
            bypass: Gauge::default(),
        };
        metrics.register_flows();
        metrics.register(|registry| {
            registry.register(
                "refused",
                "Refused connections and calls by reason",
                metrics.refused.clone(),
            );
            registry.register(
                "decisions",
                "Decisions of policy at the called side",
                metrics.decisions.clone(),
            );
            registry.register(
                "peer_connections",
                "TLS connections with other agents that are open now",
                metrics.mesh_connections.clone(),
            );
            registry.register(
                "app_connections",
                "Connections made to local apps",
                metrics.app_connections.clone(),
            );
            registry.register(
                "app_reused",
                "Requests on a kept connection to a local app",
                metrics.app_reused.clone(),
            );
            registry.register(
                "plaintext_connections",
                "Attempts to connect to servers without an agent",
                metrics.plaintext_connections.clone(),
            );
            registry.register(
                "plaintext_callers",
                "Attempts of plaintext callers to connect to a program's own port, by what became of them",
                metrics.plaintext_callers.clone(),
            );
            registry.register(
                "door_disarmed",
                "1: control, or the default gateway, was not reached after the input door was changed, so it refuses nothing new",
                metrics.door_disarmed.clone(),
            );
            registry.register(
                "capture_repairs",
                "How often other programs took away links, routes, rules or tables of ours, or the wiring of names since the holder started",
                metrics.repairs.clone(),
            );
            let of_before = "Workers of before, which carry what was open when another took over";
            registry.register("draining_workers", of_before, metrics.draining_workers.clone());
            let given_up = "1: the last reload was given up, so the program of before runs";
            registry.register("reload_given_up", given_up, metrics.reload_given_up.clone());
            let open = "1: root opened this host to plaintext for a time";
            registry.register("bypass", open, metrics.bypass.clone());
        });
        Arc::new(metrics)
    }

    /// What each flow counts.
    fn register_flows(&self) {
        self.register(|registry| {
            registry.register(
                "requests",
                "HTTP responses and ended connections",
                self.requests.clone(),
            );
            registry.register(
                "grpc_responses",
                "Ends of gRPC calls by their status",
                self.grpc_responses.clone(),
            );
            registry.register(
                "sent_bytes",
                "Bytes from callers to services",
                self.bytes_sent.clone(),
            );
            registry.register(
                "received_bytes",
                "Bytes from services to callers",
                self.bytes_received.clone(),
            );
            registry.register(
                "open_connections",
                "Calls that are open now",
                self.open.clone(),
            );
            registry.register(
                "latency_seconds",
                "Until the response head, or until the app took the connection",
                self.latency.clone(),
            );
        });
    }

    /// Adds metrics of other parts of the worker.
    pub(crate) fn register(&self, add: impl FnOnce(&mut Registry)) {
        add(&mut self.registry.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// The counters between two parties. Looked up once per connection and party, not per request.
    pub(crate) fn flow(&self, labels: &FlowLabels) -> Arc<Flow> {
        let mut flows = self.flows.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(flow) = flows.get(labels) {
            return Arc::clone(flow);
        }
        let labels = if flows.len() < FLOWS_MAX {
            labels.clone()
        } else {
            overflow(labels)
        };
        let flow = Arc::new(self.make_flow(&labels));
        flows.insert(labels, Arc::clone(&flow));
        flow
    }

    fn make_flow(&self, labels: &FlowLabels) -> Flow {
        let status = |status| {
            let FlowLabels {
                direction,
                src,
                dst,
                port,
                tls,
                protocol,
            } = labels.clone();
            let labels = RequestLabels {
                direction,
                src,
                dst,
                port,
                tls,
                protocol,
                status,
            };
            self.requests.get_or_create(&labels).clone()
        };
        Flow {
            statuses: STATUSES.map(status),
            open: self.open.get_or_create(labels).clone(),
            sent: self.bytes_sent.get_or_create(labels).clone(),
            received: self.bytes_received.get_or_create(labels).clone(),
            latency: self.latency.get_or_create(labels).clone(),
            grpc: matches!(labels.protocol, "grpc" | "http2" | "auto")
                .then(|| Box::new(GrpcStatuses::new(labels, &self.grpc_responses))),
        }
    }

    /// Counts a refusal. Every refusal of the data path comes by here.
    pub(crate) fn refused(&self, direction: Direction, reason: Reason) {
        let labels = RefusalLabels {
            direction,
            reason: reason.code(),
        };
        self.refused.get_or_create(&labels).inc();
    }

    /// Counts refusals that the kernel made for us.
    pub(crate) fn refused_many(&self, direction: Direction, reason: Reason, count: u64) {
        let labels = RefusalLabels {
            direction,
            reason: reason.code(),
        };
        self.refused.get_or_create(&labels).inc_by(count);
    }

    /// Counts plaintext callers. `src` is bounded by who calls this.
    pub(crate) fn plaintext_callers(
        &self,
        src: String,
        dst: &ServiceName,
        port: u16,
        verdict: EdgeVerdict,
        count: u64,
    ) {
        let labels = PlaintextCallerLabels {
            src,
            dst: dst.to_string(),
            port,
            verdict: verdict.as_str(),
        };
        self.plaintext_callers.get_or_create(&labels).inc_by(count);
    }

    /// Counts an attempt to connect to a server without an agent. As many labels as the workload files have endpoints.
    pub(crate) fn plaintext(&self, dst: &ServiceName, endpoint: SocketAddr, connected: bool) {
        let labels = PlaintextLabels {
            dst: dst.to_string(),
            endpoint: endpoint.to_string(),
            status: if connected { "ok" } else { "failed" },
        };
        self.plaintext_connections.get_or_create(&labels).inc();
    }

    /// What counts a decision of policy; it is not counted by this. `src` may be any identity, so its number is bounded by [`FLOWS_MAX`].
    pub(crate) fn decision(
        &self,
        src: &SpiffeId,
        target: &Target,
        rule: &str,
        verdict: EdgeVerdict,
    ) -> DecisionCount {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let name = src.to_string();
        let told_apart = known.contains(&name) || known.len() < FLOWS_MAX;
        if told_apart {
            known.insert(name.clone());
        }
        drop(known);
        let labels = DecisionLabels {
            src: if told_apart {
                name
            } else {
                "overflow".to_owned()
            },
            dst: target.service.to_string(),
            port: target.port,
            rule: rule.to_owned(),
            decision: match verdict {
                EdgeVerdict::Passed => "allowed",
                EdgeVerdict::Audited => "audited",
                EdgeVerdict::Refused => "denied",
            },
        };
        let key = EdgeKey {
            service: target.service.clone(),
            port: target.port,
            caller: EdgeCaller::Identity(src.clone()),
            verdict,
        };
        let mut edges = self.edges.lock().unwrap_or_else(PoisonError::into_inner);
        let metric = self.decisions.get_or_create(&labels).clone();
        DecisionCount::new(metric, edges.calls(key))
    }

    /// The calls over mTLS that were decided about since this was asked last, and whether there were callers that could
    /// not be told apart.
    pub(crate) fn take_decided(&self) -> (Vec<(EdgeKey, u64)>, bool) {
        let mut edges = self.edges.lock().unwrap_or_else(PoisonError::into_inner);
        edges.take()
    }

    /// All metrics in the text form of OpenMetrics.
    pub(crate) fn encode(&self) -> String {
        self.limits.refresh();
        let mut text = String::new();
        let registry = self.registry.lock().unwrap_or_else(PoisonError::into_inner);
        // Writing to a string does not fail.
        let _ = prometheus_client::encoding::text::encode(&mut text, &registry);
        text
    }
}

fn overflow(labels: &FlowLabels) -> FlowLabels {
    FlowLabels {
        src: "overflow".to_owned(),
        tls: "overflow".to_owned(),
        ..labels.clone()
    }
}

#[cfg(test)]
mod tests {
    use mesh_core::edge::EDGES_MAX;

    use super::*;

    #[test]
    fn plaintext_is_counted_and_listed_as_the_files_say() {
        use mesh_api::workload_file::Workload;
        let text = "namespace = \"shop\"\n[[service]]\nports = [{ port = 5432 }]\n\
             endpoints = [\"10.9.0.5:5432\", \"[fd00::5]:5432\"]\n";
        let set = WorkloadSet {
            workloads: vec![Arc::new(Workload::parse("db", text).unwrap())],
            ..WorkloadSet::default()
        };
        let (sets, receiver) = watch::channel(Arc::new(set));
        let metrics = Metrics::new(Budget::new(1));
        metrics.register(|r| r.register_collector(Box::new(FrontedServices(receiver))));
        let service = ServiceName::parse("shop/db").unwrap();
        metrics.plaintext(&service, "10.9.0.5:5432".parse().unwrap(), false);
        let page = metrics.encode();
        for line in [
            "mesh_plaintext_endpoints{dst=\"shop/db\"} 2\n",
            "mesh_plaintext_connections_total{dst=\"shop/db\",endpoint=\"10.9.0.5:5432\",status=\"failed\"} 1\n",
        ] {
            assert!(page.contains(line), "{line} is missing:\n{page}");
        }
        sets.send_replace(Arc::default());
        assert!(!metrics.encode().contains("mesh_plaintext_endpoints{"));
    }

    #[test]
    fn grpc_statuses_are_told_apart_as_far_as_grpc_does() {
        let metrics = Metrics::new(Budget::new(1));
        let flow = |protocol| {
            metrics.flow(&FlowLabels {
                direction: Direction::Inbound,
                src: "a".to_owned(),
                dst: "b/c".to_owned(),
                port: 80,
                tls: "none".to_owned(),
                protocol,
            })
        };
        for status in [Some(0), Some(16), Some(17), Some(999), None] {
            flow("grpc").grpc(status);
            flow("http").grpc(status);
        }
        let page = metrics.encode();
        let lines = page
            .lines()
            .filter(|line| line.starts_with("mesh_grpc_responses_total{"));
        let mut ends: Vec<_> = lines
            .filter_map(|line| line.split("grpc_status=").nth(1))
            .collect();
        ends.sort_unstable();
        assert_eq!(ends, ["\"0\"} 1", "\"16\"} 1", "\"other\"} 3"], "{page}");
    }

    #[test]
    fn edges_are_taken_once_bounded_and_forgotten() {
        let metrics = Metrics::new(Budget::new(1));
        let decision = |n: usize, rule: &str| {
            let src = SpiffeId::parse(&format!("spiffe://a/ns/b/sa/c{n}")).unwrap();
            let target = Target {
                service: ServiceName::parse("b/d").unwrap(),
                port: 80,
            };
            metrics.decision(&src, &target, rule, EdgeVerdict::Passed)
        };
        let living = decision(0, "p/one");
        assert_eq!(metrics.take_decided(), (vec![], false), "nobody called yet");
        living.count();
        decision(0, "p/two").count();
        let (taken, full) = metrics.take_decided();
        assert_eq!((taken.len(), taken[0].1, full), (1, 2, false));
        assert_eq!(metrics.take_decided().0, []);
        living.count();
        assert_eq!(metrics.take_decided().0[0].1, 1, "of who is still there");
        for n in 0..EDGES_MAX + 10 {
            decision(n, "p/one").count();
        }
        let (taken, full) = metrics.take_decided();
        assert_eq!((taken.len(), full), (EDGES_MAX, true));
        // They are gone, so that others have room; the calls of all are in the metric.
        decision(EDGES_MAX + 20, "p/one").count();
        assert_eq!(metrics.take_decided().0.len(), 1);
        assert_eq!(metrics.edges.lock().unwrap().calls.len(), 1);
        let page = metrics.encode();
        let last = format!("c{}\",", EDGES_MAX + 9);
        assert!(page.contains(&last), "{page}");
    }

    #[test]
    fn flows_are_shared_and_bounded() {
        let metrics = Metrics::new(Budget::new(1));
        let labels = |n: usize| FlowLabels {
            direction: Direction::Inbound,
            src: format!("spiffe://a/ns/b/sa/c{n}"),
            dst: "b/d".to_owned(),
            port: 80,
            tls: "none".to_owned(),
            protocol: "http",
        };
        metrics.flow(&labels(0)).response(204, 0.001);
        metrics.flow(&labels(0)).response(200, 0.001);
        for n in 0..FLOWS_MAX + 10 {
            metrics.flow(&labels(n)).sent.inc();
        }
        let text = metrics.encode();
        assert!(text.contains("status=\"2xx\"} 2"), "counted together");
        assert!(text.contains("src=\"overflow\""));
        assert!(metrics.flows.lock().unwrap().len() <= FLOWS_MAX + 1);
    }
}
