//! What control counts, in the text form of OpenMetrics.

use std::sync::Arc;

use mesh_core::reason::Reason;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use crate::expiry::Certificate;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByReason {
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByState {
    state: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByCertificate {
    certificate: &'static str,
}

#[derive(Debug)]
pub(crate) struct Metrics {
    registry: Registry,
    pub sessions: Gauge,
    pub commits: Counter,
    pub store_bytes: Gauge,
    pub leaves_signed: Counter,
    pub held: Gauge,
    hosts: Family<ByState, Gauge>,
    endpoints: Gauge,
    services: Gauge,
    refusals: Family<ByReason, Counter>,
    lives: Family<ByCertificate, Gauge>,
}

impl Metrics {
    pub(crate) fn new() -> Arc<Self> {
        let mut registry = Registry::with_prefix("mesh_control");
        let metrics = Self {
            sessions: Gauge::default(),
            commits: Counter::default(),
            store_bytes: Gauge::default(),
            leaves_signed: Counter::default(),
            held: Gauge::default(),
            hosts: Family::default(),
            endpoints: Gauge::default(),
            services: Gauge::default(),
            refusals: Family::default(),
            lives: Family::default(),
            registry: Registry::default(),
        };
        registry.register(
            "sessions",
            "Open sessions of agents",
            metrics.sessions.clone(),
        );
        registry.register("commits", "Commits of the store", metrics.commits.clone());
        registry.register(
            "store_bytes",
            "Bytes of the store on disk",
            metrics.store_bytes.clone(),
        );
        registry.register(
            "leaves_signed",
            "Certificates signed",
            metrics.leaves_signed.clone(),
        );
        registry.register(
            "hosts",
            "Hosts by the state of their lease",
            metrics.hosts.clone(),
        );
        registry.register(
            "held_hosts",
            "Silent hosts that are not called stale because they are too many",
            metrics.held.clone(),
        );
        registry.register("endpoints", "Listed endpoints", metrics.endpoints.clone());
        registry.register("services", "Services", metrics.services.clone());
        registry.register("refused", "Refusals by reason", metrics.refusals.clone());
        registry.register(
            "certificate_remaining_seconds",
            "Until the root and the issuer end; at 60, 30 and 7 days somebody is needed",
            metrics.lives.clone(),
        );
        Arc::new(Self {
            registry,
            ..metrics
        })
    }

    pub(crate) fn refused(&self, reason: Reason) {
        let reason = reason.code();
        self.refusals.get_or_create(&ByReason { reason }).inc();
    }

    pub(crate) fn lives(&self, certificates: &[Certificate]) {
        for one in certificates {
            let certificate = one.name;
            self.lives
                .get_or_create(&ByCertificate { certificate })
                .set(one.left_s);
        }
    }

    /// All metrics as text; the gauges of the catalogue are read from it now.
    pub(crate) fn render(&self, catalogue: &crate::catalogue::Catalogue) -> String {
        let count = |n: usize| i64::try_from(n).unwrap_or(i64::MAX);
        let live = catalogue.hosts.values().filter(|h| h.live).count();
        for (state, n) in [("live", live), ("stale", catalogue.hosts.len() - live)] {
            let state = ByState { state };
            self.hosts.get_or_create(&state).set(count(n));
        }
        self.endpoints.set(count(catalogue.endpoint_count()));
        self.services.set(count(catalogue.services.len()));
        let mut text = String::new();
        match prometheus_client::encoding::text::encode(&mut text, &self.registry) {
            Ok(()) => text,
            Err(error) => format!("# cannot be written: {error}\n"),
        }
    }
}
