//! One check: good, or why not. Each kind that is more than a connection has a file of its own.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use mesh_api::workload_file::{Check, CheckKind};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use tokio::net::TcpStream;

use super::{Listening, exec, grpc, http, systemd, tcp};
use crate::metrics::Metrics;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Labels {
    /// As in the file, or `calls`.
    kind: &'static str,
    result: &'static str,
}

/// Results of checks. Two for each kind, however many services there are.
#[derive(Clone, Debug, Default)]
pub(crate) struct Results(Family<Labels, Counter>);

impl Results {
    pub(crate) fn register(metrics: &Metrics) -> Self {
        let results = Self::default();
        metrics.register(|registry| {
            registry.register(
                "health_checks",
                "Results of the health checks of this host, and services that calls unlisted",
                results.0.clone(),
            );
        });
        results
    }

    fn count(&self, kind: &'static str, good: bool) {
        let result = if good { "ok" } else { "failed" };
        self.0.get_or_create(&Labels { kind, result }).inc();
    }
}

/// What every check needs.
#[derive(Clone)]
pub(super) struct Asking {
    pub(super) listening: Listening,
    pub(super) results: Results,
    /// Where commands say what is wrong.
    pub(super) dir: Arc<PathBuf>,
}

impl Asking {
    /// Begins a check of this host, or of a server beyond it. Whoever has it bounds its time by dropping it.
    pub(super) fn ask(
        &self,
        check: &Check,
        beyond: Option<SocketAddr>,
    ) -> Pin<Box<dyn Future<Output = io::Result<()>> + Send>> {
        let (asking, check) = (self.clone(), check.clone());
        Box::pin(async move {
            let server = match beyond {
                None => Server::Here(check.port, &asking.listening),
                Some(server) => Server::Beyond(server),
            };
            match &check.kind {
                CheckKind::Tcp => server.connect().await.map(drop),
                CheckKind::Http(path) => http::ask(server.connect().await?, path).await,
                CheckKind::Grpc(service) => grpc::ask(server.connect().await?, service).await,
                CheckKind::Exec(command, run_as) => {
                    let timeout = Duration::from_secs(check.timeout_s.into());
                    exec::ask(&asking.dir, command, run_as, timeout).await
                }
                CheckKind::Systemd(unit) => systemd::ask(unit).await,
            }
        })
    }

    pub(super) fn count(&self, kind: &CheckKind, good: bool) {
        self.results.count(kind.as_str(), good);
    }

    /// Calls unlisted a service.
    pub(super) fn count_calls(&self) {
        self.results.count("calls", false);
    }
}

/// Where a check goes.
enum Server<'a> {
    Here(u16, &'a Listening),
    Beyond(SocketAddr),
}

impl Server<'_> {
    async fn connect(&self) -> io::Result<TcpStream> {
        match self {
            Self::Here(port, listening) => tcp::connect(*port, listening).await,
            Self::Beyond(server) => TcpStream::connect(server).await,
        }
    }
}
