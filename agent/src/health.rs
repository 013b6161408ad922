//! Checks the services of this host and publishes which of them are healthy.
//!
//! One task for each service with a check, or one for each of its servers where those have no agent;
//! `mesh_core::health` decides when to check and what results mean, the tasks here only ask. A service without a check
//! counts as healthy; one of several servers is as healthy as the best of them.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_api::workload_file::{Check, CheckKind};
use mesh_core::health::{HealthMachine, Thresholds, Verdict};
use mesh_core::names::{Account, ServiceName};
use mesh_runtime::files;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, watch};
use tokio::task::{AbortHandle, JoinSet};
use tokio_util::sync::CancellationToken;

use crate::drained;
use crate::workloads::WorkloadSet;

/// Verdicts on their way from the tasks to the one that publishes; a task waits when it is full.
const VERDICTS_QUEUE: usize = 64;
/// How much of an answer is read for its status line, in bytes.
const STATUS_LINE_MAX: usize = 64;

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
/// Every service of a host with its verdict.
const KEPT_BYTES_MAX: u64 = 4 * 1024 * 1024;

/// What the file has.
#[derive(Debug, Serialize, Deserialize)]
struct KeptVerdicts {
    /// Process number of the holder.
    holder: u32,
    /// By workload, service and, if it is another's, the server.
    verdicts: Vec<(String, String, Option<SocketAddr>, bool)>,
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
    listening: Listening,
    mut publish: Publish,
    stop: CancellationToken,
) -> io::Result<()> {
    let (report, mut reports) = mpsc::channel(VERDICTS_QUEUE);
    let mut checks = Checks {
        listening,
        report,
        tasks: JoinSet::new(),
        running: BTreeMap::new(),
        generation: 0,
        kept: read_kept(&publish.file),
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
    listening: Listening,
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

struct Running {
    check: Check,
    generation: u64,
    task: AbortHandle,
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
        let mut wanted: BTreeMap<Asked, Option<&Check>> = BTreeMap::new();
        for workload in &set.workloads {
            for service in &workload.services {
                let served = (workload.account.clone(), service.name.clone());
                let asked = |beyond| Asked {
                    served: served.clone(),
                    beyond,
                };
                let check = service.check.as_ref();
                if !service.is_fronted() {
                    wanted.insert(asked(None), check);
                }
                let servers = service.endpoints.iter().copied();
                wanted.extend(servers.map(|server| (asked(Some(server)), check)));
            }
        }
        self.verdicts.retain(|asked, _| wanted.contains_key(asked));
        self.running.retain(|asked, running| {
            let stays = wanted.get(asked).copied().flatten() == Some(&running.check);
            if !stays {
                running.task.abort();
            }
            stays
        });
        for (asked, check) in wanted {
            match check {
                None => drop(self.verdicts.insert(asked, Verdict::Healthy)),
                Some(check) if !self.running.contains_key(&asked) => self.start(asked, check),
                Some(_) => (),
            }
        }
    }

    fn start(&mut self, asked: Asked, check: &Check) {
        self.generation += 1;
        // One whose check was edited keeps its verdict until the first result of the new check.
        let before = self.kept.remove(&asked).unwrap_or(Verdict::Unknown);
        self.verdicts.entry(asked.clone()).or_insert(before);
        let task = self.tasks.spawn(check_forever(
            asked.clone(),
            check.clone(),
            self.generation,
            Arc::clone(&self.listening),
            self.report.clone(),
        ));
        let running = Running {
            check: check.clone(),
            generation: self.generation,
            task,
        };
        self.running.insert(asked, running);
    }

    fn found(&mut self, found: Found) {
        let current = self.running.get(&found.asked).map(|r| r.generation);
        if current == Some(found.generation) {
            self.verdicts.insert(found.asked, found.verdict);
        }
    }

    fn publish(&mut self, publish: &Publish) {
        if self.verdicts != self.written {
            keep(&publish.file, &self.verdicts);
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

fn read_kept(file: &Path) -> BTreeMap<Asked, Verdict> {
    let read = || -> anyhow::Result<BTreeMap<Asked, Verdict>> {
        let text = files::read_bounded(file, KEPT_BYTES_MAX)?;
        let kept: KeptVerdicts = serde_json::from_slice(&text)?;
        if kept.holder != std::os::unix::process::parent_id() {
            return Ok(BTreeMap::new());
        }
        let verdicts = kept.verdicts.into_iter();
        let verdicts = verdicts.map(|(account, service, beyond, healthy)| {
            let asked = Asked {
                served: (Account::parse(&account)?, ServiceName::parse(&service)?),
                beyond,
            };
            let verdict = match healthy {
                true => Verdict::Healthy,
                false => Verdict::Unhealthy,
            };
            Ok((asked, verdict))
        });
        verdicts.collect()
    };
    // The first worker of a holder finds none, or one of before.
    read().unwrap_or_default()
}

fn keep(file: &Path, verdicts: &BTreeMap<Asked, Verdict>) {
    let known = verdicts.iter().filter(|(_, v)| **v != Verdict::Unknown);
    let verdicts = known.map(|(asked, verdict)| {
        let (account, service) = &asked.served;
        let (account, service) = (account.to_string(), service.to_string());
        (account, service, asked.beyond, verdict.is_healthy())
    });
    let kept = KeptVerdicts {
        holder: std::os::unix::process::parent_id(),
        verdicts: verdicts.collect(),
    };
    let written = serde_json::to_vec(&kept)
        .map_err(anyhow::Error::from)
        .and_then(|text| Ok(files::write_private(file, &text)?));
    if let Err(error) = written {
        log::warn!("what is healthy can not be kept for the next worker: {error:#}");
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

async fn check_forever(
    asked: Asked,
    check: Check,
    generation: u64,
    listening: Listening,
    report: mpsc::Sender<Found>,
) {
    let thresholds = Thresholds {
        interval: Duration::from_secs(check.interval_s.into()),
        timeout: Duration::from_secs(check.timeout_s.into()),
        rise: check.rise,
        fall: check.fall,
    };
    let place = match asked.beyond {
        None => Place::Here(&listening),
        Some(server) => Place::Beyond(server),
    };
    let mut machine = HealthMachine::new(thresholds, Instant::now());
    let mut told = Verdict::Unknown;
    while let Some(at) = machine.poll_timeout() {
        tokio::time::sleep_until(at.into()).await;
        if let Some(number) = machine.handle_timeout(Instant::now()) {
            let answer = tokio::time::timeout(thresholds.timeout, ask(&check, place)).await;
            let result = answer.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
            if let Err(error) = &result {
                log::debug!("the health check of {asked} failed: {error}");
            }
            machine.handle_result(number, result.is_ok());
        }
        let verdict = machine.verdict();
        if verdict != told {
            log::info!("{asked} is {}", verdict.as_str());
            told = verdict;
            let found = Found {
                asked: asked.clone(),
                generation,
                verdict,
            };
            if report.send(found).await.is_err() {
                return;
            }
        }
    }
}

/// Where a check goes.
#[derive(Clone, Copy)]
enum Place<'a> {
    Here(&'a Listening),
    Beyond(SocketAddr),
}

/// One check: good, or why not.
async fn ask(check: &Check, place: Place<'_>) -> io::Result<()> {
    let mut stream = match place {
        Place::Here(listening) => connect(check.port, listening).await?,
        Place::Beyond(server) => TcpStream::connect(server).await?,
    };
    match &check.kind {
        CheckKind::Tcp => Ok(()),
        CheckKind::Http(path) => {
            let host = stream.peer_addr()?;
            let request = format!(
                "GET {path} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: mesh-agent\r\nAccept: */*\r\nConnection: close\r\n\r\n"
            );
            stream.write_all(request.as_bytes()).await?;
            match read_status(&mut stream).await? {
                200..=399 => Ok(()),
                status => Err(io::Error::other(format!("{path} answered {status}"))),
            }
        }
    }
}

/// Connects to the first of the addresses on which the port is listened that takes it.
async fn connect(port: u16, listening: &Listening) -> io::Result<TcpStream> {
    let addresses = candidates(&listening(port)?);
    let mut last = io::Error::new(
        io::ErrorKind::ConnectionRefused,
        format!("nothing listens on port {port}"),
    );
    for address in addresses {
        match TcpStream::connect(SocketAddr::new(address, port)).await {
            Ok(stream) => return Ok(stream),
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// Where to connect to, loopback first: what listens on all addresses is reached there.
fn candidates(listening: &[IpAddr]) -> Vec<IpAddr> {
    let (v4, v6) = (
        IpAddr::from(Ipv4Addr::LOCALHOST),
        IpAddr::from(Ipv6Addr::LOCALHOST),
    );
    let mut found = Vec::new();
    let mut add = |address| {
        if !found.contains(&address) {
            found.push(address);
        }
    };
    if listening
        .iter()
        .any(|a| *a == v4 || *a == Ipv4Addr::UNSPECIFIED)
    {
        add(v4);
    }
    if listening.contains(&v6) {
        add(v6);
    }
    if listening.contains(&Ipv6Addr::UNSPECIFIED.into()) {
        add(v6);
        // It takes IPv4 too unless it says otherwise, and the host may be without IPv6.
        add(v4);
    }
    for address in listening.iter().filter(|a| !a.is_unspecified()) {
        add(*address);
    }
    found
}

/// The status code of a response (RFC 9112 §4). Informational ones are not waited past: a check asks for none.
async fn read_status(stream: &mut TcpStream) -> io::Result<u16> {
    let malformed = || io::Error::new(io::ErrorKind::InvalidData, "the answer is not HTTP/1");
    let mut head = [0; STATUS_LINE_MAX];
    let mut length = 0;
    // `HTTP/1.1 200` and what ends the number.
    while length < 13 {
        match stream.read(&mut head[length..]).await? {
            0 => break,
            more => length += more,
        }
    }
    let head = &head[..length];
    let rest = head
        .strip_prefix(b"HTTP/1.1 ")
        .or_else(|| head.strip_prefix(b"HTTP/1.0 "))
        .ok_or_else(malformed)?;
    match rest {
        [code @ .., _] if rest.len() > 3 => {
            let digits = code.get(..3).ok_or_else(malformed)?;
            let ends = matches!(rest[3], b' ' | b'\r' | b'\n');
            let code = std::str::from_utf8(digits)
                .ok()
                .and_then(|d| d.parse().ok());
            code.filter(|_| ends).ok_or_else(malformed)
        }
        _ => Err(malformed()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_api::workload_file::Workload;
    use tokio::net::TcpListener;

    const WAIT: Duration = Duration::from_secs(30);

    #[tokio::test]
    async fn verdicts_follow_the_service_and_the_set() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (server, answer) = serve(listener);
        let mut checks = Started::new(set(&format!(
            "[[service]]\nports = [{{ port = {port} }}]\n\
             check = {{ http = \"/healthz\", interval_s = 1, fall = 1 }}\n\
             [[service]]\nname = \"plain\"\nports = [{{ port = 1 }}]\n"
        )));
        checks.until("web", Some(Verdict::Healthy)).await;
        checks.until("plain", Some(Verdict::Healthy)).await;
        answer.send_replace("HTTP/1.1 503 Service Unavailable\r\n\r\n");
        checks.until("web", Some(Verdict::Unhealthy)).await;
        answer.send_replace("HTTP/1.1 302 Found\r\n\r\n");
        checks.until("web", Some(Verdict::Healthy)).await;
        server.abort();
        drop(server.await);
        checks.until("web", Some(Verdict::Unhealthy)).await;
        checks.sets.send_replace(set(""));
        checks.until("web", None).await;
        checks.stop().await;
    }

    #[tokio::test]
    async fn a_fronted_service_is_as_healthy_as_its_best_server() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let up = listener.local_addr().unwrap();
        let down = {
            let gone = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
            gone.local_addr().unwrap()
        };
        let (server, _answer) = serve(listener);
        let text = "[[service]]\nports = [{ port = 80 }]\nendpoints = [\"10.9.0.5:80\"]\n\
             check = { http = \"/\", interval_s = 1, fall = 1 }\n";
        // Files do not name loopback; the tests have nothing else.
        let with = |servers: Vec<SocketAddr>| {
            let mut set = WorkloadSet::clone(&set(text));
            let mut workload = Workload::clone(&set.workloads[0]);
            workload.services[0].endpoints = servers;
            set.workloads = vec![Arc::new(workload)];
            Arc::new(set)
        };
        let mut checks = Started::new(with(vec![up, down]));
        checks.until("web", Some(Verdict::Healthy)).await;
        checks.until_unfit(&[down]).await;
        server.abort();
        drop(server.await);
        checks.until_unfit(&[up, down]).await;
        checks.until("web", Some(Verdict::Unhealthy)).await;
        checks.sets.send_replace(with(vec![down]));
        checks.until_unfit(&[down]).await;
        checks.sets.send_replace(set(""));
        checks.until_unfit(&[]).await;
        checks.until("web", None).await;
        checks.stop().await;
    }

    #[tokio::test]
    async fn an_open_port_is_enough_for_a_tcp_check() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let text =
            format!("[[service]]\nports = [{{ port = {port} }}]\ncheck = {{ tcp = true }}\n");
        let mut checks = Started::new(set(&text));
        checks.until("web", Some(Verdict::Healthy)).await;
        checks.stop().await;
    }

    #[tokio::test]
    async fn what_is_no_good_answer_is_a_failure() {
        for (answer, good) in [
            ("HTTP/1.1 200 OK\r\n\r\n", true),
            ("HTTP/1.0 204\r\n\r\n", true),
            ("HTTP/1.1 399 X\r\n\r\n", true),
            ("HTTP/1.1 100 Continue\r\n\r\n", false),
            ("HTTP/1.1 404 Not Found\r\n\r\n", false),
            ("HTTP/1.1 2000 OK\r\n\r\n", false),
            ("HTTP/1.1 20", false),
            ("HTTP/1.1 +20 \r\n", false),
            ("SSH-2.0-OpenSSH_9.2\r\n", false),
            ("", false),
        ] {
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
            let check = Check {
                kind: CheckKind::Http("/".to_owned()),
                port: listener.local_addr().unwrap().port(),
                interval_s: 1,
                timeout_s: 1,
                rise: 1,
                fall: 1,
            };
            let (server, sender) = serve(listener);
            sender.send_replace(answer);
            let result = tokio::time::timeout(WAIT, ask(&check, Place::Here(&on_loopback()))).await;
            assert_eq!(result.unwrap().is_ok(), good, "{answer:?}");
            server.abort();
        }
    }

    #[test]
    fn loopback_comes_first() {
        let ips =
            |list: &[&str]| -> Vec<IpAddr> { list.iter().map(|a| a.parse().unwrap()).collect() };
        for (listening, expected) in [
            (&[][..], &[][..]),
            (&["0.0.0.0"], &["127.0.0.1"]),
            (&["::"], &["::1", "127.0.0.1"]),
            (&["0.0.0.0", "::"], &["127.0.0.1", "::1"]),
            (&["10.0.0.5"], &["10.0.0.5"]),
            (&["10.0.0.5", "127.0.0.1"], &["127.0.0.1", "10.0.0.5"]),
        ] {
            assert_eq!(candidates(&ips(listening)), ips(expected), "{listening:?}");
        }
    }

    struct Started {
        sets: watch::Sender<Arc<WorkloadSet>>,
        verdicts: watch::Receiver<Arc<Verdicts>>,
        unfit: watch::Receiver<Arc<Unfit>>,
        stop: CancellationToken,
        task: tokio::task::JoinHandle<io::Result<()>>,
    }

    impl Started {
        fn new(first: Arc<WorkloadSet>) -> Self {
            let (sets, receiver) = watch::channel(first);
            let (verdicts_by, verdicts) = watch::channel(Arc::default());
            let (unfit_by, unfit) = watch::channel(Arc::default());
            let publish = Publish {
                drained: watch::channel(Arc::default()).1,
                file: std::env::temp_dir().join(format!("health-{}.json", std::process::id())),
                verdicts: verdicts_by,
                unfit: Box::new(move |unfit| drop(unfit_by.send_replace(unfit))),
            };
            let stop = CancellationToken::new();
            let task = tokio::spawn(run(receiver, on_loopback(), publish, stop.clone()));
            Self {
                sets,
                verdicts,
                unfit,
                stop,
                task,
            }
        }

        async fn until(&mut self, name: &str, verdict: Option<Verdict>) {
            let account = Account::parse("shop/web").unwrap();
            let service = ServiceName::parse(&format!("shop/{name}")).unwrap();
            let served = (account, service);
            let reached = self
                .verdicts
                .wait_for(|verdicts| verdicts.get(&served).copied() == verdict);
            tokio::time::timeout(WAIT, reached).await.unwrap().unwrap();
        }

        async fn until_unfit(&mut self, servers: &[SocketAddr]) {
            let wanted: BTreeSet<SocketAddr> = servers.iter().copied().collect();
            let reached = self.unfit.wait_for(|unfit| {
                let found: BTreeSet<SocketAddr> = unfit.iter().map(|(_, server)| *server).collect();
                found == wanted
            });
            tokio::time::timeout(WAIT, reached).await.unwrap().unwrap();
        }

        async fn stop(self) {
            self.stop.cancel();
            self.task.await.unwrap().unwrap();
        }
    }

    fn set(services: &str) -> Arc<WorkloadSet> {
        let text = format!("namespace = \"shop\"\nowner = {{ user = \"web\" }}\n{services}");
        let workload = Workload::parse("web", &text).unwrap();
        Arc::new(WorkloadSet {
            workloads: vec![Arc::new(workload)],
            ..WorkloadSet::default()
        })
    }

    fn on_loopback() -> Listening {
        Arc::new(|_| Ok(vec![Ipv4Addr::UNSPECIFIED.into()]))
    }

    /// Answers each connection with what the sender holds, then closes it.
    fn serve(listener: TcpListener) -> (tokio::task::JoinHandle<()>, watch::Sender<&'static str>) {
        let (sender, answer) = watch::channel("HTTP/1.1 200 OK\r\n\r\n");
        let server = tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let mut request = [0; 1024];
                let length = stream.read(&mut request).await.unwrap_or(0);
                assert!(request[..length].starts_with(b"GET /"));
                let answer = *answer.borrow();
                drop(stream.write_all(answer.as_bytes()).await);
            }
        });
        (server, sender)
    }
}
