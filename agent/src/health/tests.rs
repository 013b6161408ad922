//! The checks of a set of workloads, on servers of these tests.

use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;
use mesh_api::workload_file::Workload;
use mesh_core::health::CALLS_FALL;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

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
    let text = format!("[[service]]\nports = [{{ port = {port} }}]\ncheck = {{ tcp = true }}\n");
    let mut checks = Started::new(set(&text));
    checks.until("web", Some(Verdict::Healthy)).await;
    checks.stop().await;
}

/// Nothing but calls can tell before the next check, which is an hour away.
#[tokio::test]
async fn calls_that_fail_unlist_and_a_check_brings_back() {
    for check in ["check = { tcp = true, interval_s = 3600 }\n", ""] {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let port = address.port();
        let text =
            format!("[[service]]\nports = [{{ port = {port} }}, {{ port = 65535 }}]\n{check}");
        let mut checks = Started::new(set(&text));
        checks.until("web", Some(Verdict::Healthy)).await;
        drop(listener);
        let (account, service) = served("web");
        let fail = |port| {
            for _ in 0..CALLS_FALL {
                checks.calls.failed(&account, &service, port);
            }
        };
        fail(port);
        checks.until("web", Some(Verdict::Unhealthy)).await;
        let _listener = TcpListener::bind(address).await.unwrap();
        checks.until("web", Some(Verdict::Healthy)).await;
        checks.stop().await;
    }
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
        let address = listener.local_addr().unwrap();
        let (server, sender) = serve(listener);
        sender.send_replace(answer);
        let stream = TcpStream::connect(address).await.unwrap();
        let result = tokio::time::timeout(WAIT, http::ask(stream, "/")).await;
        assert_eq!(result.unwrap().is_ok(), good, "{answer:?}");
        server.abort();
    }
}

struct Started {
    sets: watch::Sender<Arc<WorkloadSet>>,
    verdicts: watch::Receiver<Arc<Verdicts>>,
    unfit: watch::Receiver<Arc<Unfit>>,
    calls: Calls,
    file: PathBuf,
    stop: CancellationToken,
    task: tokio::task::JoinHandle<io::Result<()>>,
}

impl Started {
    fn new(first: Arc<WorkloadSet>) -> Self {
        let (sets, receiver) = watch::channel(first);
        let (verdicts_by, verdicts) = watch::channel(Arc::default());
        let (unfit_by, unfit) = watch::channel(Arc::default());
        let file = own_file();
        let publish = Publish {
            drained: watch::channel(Arc::default()).1,
            file: file.clone(),
            verdicts: verdicts_by,
            unfit: Box::new(move |unfit| drop(unfit_by.send_replace(unfit))),
        };
        let stop = CancellationToken::new();
        let (calls, inbox) = channel();
        let sources = Sources {
            listening: on_loopback(),
            calls: inbox,
            results: Results::default(),
            pipes: std::env::temp_dir(),
        };
        let task = tokio::spawn(run(receiver, sources, publish, stop.clone()));
        Self {
            sets,
            verdicts,
            unfit,
            calls,
            file,
            stop,
            task,
        }
    }

    async fn until(&mut self, name: &str, verdict: Option<Verdict>) {
        let served = served(name);
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
        drop(std::fs::remove_file(self.file));
    }
}

/// What one test keeps is no other's.
fn own_file() -> PathBuf {
    static COUNT: AtomicUsize = AtomicUsize::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    std::env::temp_dir().join(format!("health-{}-{count}.json", std::process::id()))
}

fn served(name: &str) -> Served {
    let account = Account::parse("shop/web").unwrap();
    let service = ServiceName::parse(&format!("shop/{name}")).unwrap();
    (account, service)
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
