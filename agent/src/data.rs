//! The data plane: threads that accept, each with a loop, a pool of peers and balancers of its own. They share
//! immutable pictures and counters, nothing else.

use std::cell::{Cell, RefCell};
use std::net::TcpListener as StdListener;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_core::names::{Account, ServiceName};
use mesh_core::reason::Reason;
use mesh_core::rng::Rng;
use mesh_runtime::tls::trust::SharedTrust;
use mesh_runtime::tls::verify::{Accept, Verifier};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::{LocalSet, spawn_local};

use crate::call::Balancers;
use crate::capture::app_socket::AppDialer;
use crate::capture::sockdiag::SockDiag;
use crate::inbound::app::AppPool;
use crate::inbound::certificates;
use crate::metrics::{Direction, Metrics};
use crate::peers::Peers;
use crate::view::{View, ViewReader};
use crate::{inbound, outbound};

/// Commands to a thread that wait: listeners at the start, one a workload.
const COMMANDS_MAX: usize = 1024;
/// After an accept that failed for want of descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// How the data plane works. Each bound has its reason in docs/reference.md.
#[derive(Clone, Debug)]
pub(crate) struct DataSettings {
    /// Until a TCP connection to a peer or an app stands.
    pub(crate) connect: Duration,
    /// Until a TLS handshake is through.
    pub(crate) handshake: Duration,
    /// Until a connection on which nothing moves is closed.
    pub(crate) idle: Duration,
    /// How long a connection is held for the first answer about its service.
    pub(crate) hold: Duration,
    /// Connections held so at once, a thread.
    pub(crate) held_max: usize,
    /// Connections of callers and peers that are open at once, a thread.
    pub(crate) connections_max: usize,
    /// Longest HTTP head, in bytes.
    pub(crate) head_max: usize,
    /// The mark of connections to apps ([`crate::capture::Marks::app`]).
    pub(crate) app_mark: u32,
    pub(crate) threads: usize,
}

/// What all threads share.
#[derive(Clone, Debug)]
pub(crate) struct DataShared {
    pub(crate) view: ViewReader,
    /// Services whose endpoints are wanted.
    pub(crate) wants: mpsc::Sender<ServiceName>,
    pub(crate) trust: SharedTrust,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) settings: DataSettings,
}

/// A handle on the running threads.
#[derive(Debug)]
pub(crate) struct DataPlane {
    threads: Vec<mpsc::Sender<Command>>,
}

#[derive(Debug)]
enum Command {
    /// The mesh port.
    Mesh(StdListener),
    /// Captured connections of a workload; of `None` those whose owner the kernel did not say.
    Callers(Option<Account>, StdListener),
    Drain(Duration, oneshot::Sender<()>),
}

impl DataPlane {
    /// Starts the threads.
    pub(crate) fn start(shared: &DataShared) -> anyhow::Result<Self> {
        let mut threads = Vec::new();
        for number in 0..shared.settings.threads.max(1) {
            let (commands, inbox) = mpsc::channel(COMMANDS_MAX);
            let shared = shared.clone();
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()?;
            let body = move || {
                let local = LocalSet::new();
                local.block_on(&runtime, async {
                    if let Err(error) = run(shared, inbox).await {
                        // Without its data plane a worker is of no use: the holder starts another.
                        log::error!("the data plane can not run: {error:#}");
                        std::process::exit(1);
                    }
                });
            };
            std::thread::Builder::new()
                .name(format!("data-{number}"))
                .spawn(body)?;
            threads.push(commands);
        }
        Ok(Self { threads })
    }

    /// Serves peers on the mesh port.
    pub(crate) async fn add_mesh_listener(&self, listener: StdListener) -> anyhow::Result<()> {
        self.listen(listener, Command::Mesh).await
    }

    /// Serves captured connections; `whose` is `None` for the common listener.
    pub(crate) async fn add_listener(
        &self,
        whose: Option<Account>,
        listener: StdListener,
    ) -> anyhow::Result<()> {
        self.listen(listener, |listener| {
            Command::Callers(whose.clone(), listener)
        })
        .await
    }

    async fn listen(
        &self,
        listener: StdListener,
        command: impl Fn(StdListener) -> Command,
    ) -> anyhow::Result<()> {
        listener.set_nonblocking(true)?;
        for thread in &self.threads {
            let listener = listener.try_clone()?;
            thread
                .send(command(listener))
                .await
                .map_err(|_| anyhow::anyhow!("the data plane is gone"))?;
        }
        Ok(())
    }

    /// Stops accepting, lets open calls end until `deadline`, then cuts them.
    pub(crate) async fn drain(&self, deadline: Duration) {
        let mut waits = Vec::new();
        for thread in &self.threads {
            let (done, wait) = oneshot::channel();
            if thread.send(Command::Drain(deadline, done)).await.is_ok() {
                waits.push(wait);
            }
        }
        for wait in waits {
            let _ = wait.await;
        }
    }
}

/// What belongs to one thread.
#[derive(Debug)]
pub(crate) struct Thread {
    pub(crate) view: ViewReader,
    pub(crate) wants: mpsc::Sender<ServiceName>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) settings: DataSettings,
    pub(crate) peers: Peers,
    pub(crate) balancers: RefCell<Balancers>,
    pub(crate) rng: RefCell<Rng>,
    pub(crate) diag: RefCell<SockDiag>,
    pub(crate) dialer: AppDialer,
    pub(crate) apps: AppPool,
    pub(crate) mesh_tls: Arc<rustls::ServerConfig>,
    /// Calls that wait for their endpoints.
    pub(crate) held: Cell<usize>,
    open: Cell<usize>,
    /// True when this thread takes no new calls.
    pub(crate) draining: watch::Sender<bool>,
}

impl Thread {
    /// The picture for one decision.
    pub(crate) fn view(&self) -> Arc<View> {
        Arc::clone(&self.view.borrow())
    }

    /// Counts a connection while it lives; `None` when there are as many as may be.
    fn admit(self: &Rc<Self>, direction: Direction) -> Option<Admission> {
        if self.open.get() >= self.settings.connections_max {
            self.metrics.refused(direction, Reason::Overloaded);
            return None;
        }
        self.open.set(self.open.get() + 1);
        Some(Admission(Rc::clone(self)))
    }
}

/// A connection that counts.
#[derive(Debug)]
pub(crate) struct Admission(Rc<Thread>);

impl Drop for Admission {
    fn drop(&mut self) {
        self.0.open.set(self.0.open.get() - 1);
    }
}

async fn run(shared: DataShared, mut inbox: mpsc::Receiver<Command>) -> anyhow::Result<()> {
    let verifier = Verifier::new(Arc::clone(&shared.trust), Accept::Callers);
    let resolver = certificates(shared.view.clone());
    let mesh_tls =
        mesh_runtime::tls::server_config(resolver, verifier, &[mesh_runtime::tls::ALPN_MESH])?;
    let seed = std::process::id() as u64 ^ (Arc::as_ptr(&shared.metrics) as u64).rotate_left(17);
    let thread = Rc::new(Thread {
        dialer: AppDialer::new(shared.settings.app_mark),
        view: shared.view,
        wants: shared.wants,
        metrics: shared.metrics,
        settings: shared.settings,
        peers: Peers::default(),
        balancers: RefCell::default(),
        rng: RefCell::new(Rng::new(seed)),
        diag: RefCell::new(SockDiag::open()?),
        apps: AppPool::default(),
        mesh_tls: Arc::new(mesh_tls),
        held: Cell::new(0),
        open: Cell::new(0),
        draining: watch::Sender::new(false),
    });
    spawn_local(sweep(Rc::clone(&thread)));
    while let Some(command) = inbox.recv().await {
        match command {
            Command::Mesh(listener) => {
                spawn_local(accept_mesh(
                    Rc::clone(&thread),
                    TcpListener::from_std(listener)?,
                ));
            }
            Command::Callers(whose, listener) => {
                spawn_local(accept_callers(
                    Rc::clone(&thread),
                    whose,
                    TcpListener::from_std(listener)?,
                ));
            }
            Command::Drain(deadline, done) => {
                drain(&thread, deadline).await;
                let _ = done.send(());
            }
        }
    }
    Ok(())
}

/// Gives up what nobody used for a while.
async fn sweep(thread: Rc<Thread>) {
    const EVERY: Duration = Duration::from_secs(15);
    loop {
        tokio::time::sleep(EVERY).await;
        thread.peers.sweep();
        thread.apps.sweep();
        thread
            .balancers
            .borrow_mut()
            .sweep(&thread.view(), &thread.wants);
    }
}

async fn drain(thread: &Rc<Thread>, deadline: Duration) {
    thread.draining.send_replace(true);
    let until = Instant::now() + deadline;
    // Kept connections to peers and apps are nobody's calls.
    thread.peers.close_idle();
    while thread.open.get() > 0 && Instant::now() < until {
        tokio::time::sleep(Duration::from_millis(20)).await;
        thread.peers.close_idle();
    }
    let cut = thread.open.get();
    if cut > 0 {
        log::warn!(connections = cut; "the drain deadline is over; what is still open is cut");
    }
}

async fn accept_callers(thread: Rc<Thread>, whose: Option<Account>, listener: TcpListener) {
    let mut draining = thread.draining.subscribe();
    loop {
        let Some((socket, from)) = accept(&listener, &mut draining).await else {
            return;
        };
        let Some(admission) = thread.admit(Direction::Outbound) else {
            crate::relay::abort(socket);
            continue;
        };
        let (thread, whose) = (Rc::clone(&thread), whose.clone());
        spawn_local(async move {
            outbound::serve(&thread, whose, socket, from).await;
            drop(admission);
        });
    }
}

async fn accept_mesh(thread: Rc<Thread>, listener: TcpListener) {
    let mut draining = thread.draining.subscribe();
    loop {
        let Some((socket, from)) = accept(&listener, &mut draining).await else {
            return;
        };
        let Some(admission) = thread.admit(Direction::Inbound) else {
            crate::relay::abort(socket);
            continue;
        };
        let thread = Rc::clone(&thread);
        spawn_local(async move {
            inbound::serve(&thread, socket, from).await;
            drop(admission);
        });
    }
}

async fn accept(
    listener: &TcpListener,
    draining: &mut watch::Receiver<bool>,
) -> Option<(TcpStream, std::net::SocketAddr)> {
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = draining.wait_for(|draining| *draining) => return None,
        };
        match accepted {
            Ok((socket, from)) => {
                if let Err(error) = socket.set_nodelay(true) {
                    // The connection is gone already.
                    log::debug!("an accepted connection is gone: {error}");
                    continue;
                }
                return Some((socket, from));
            }
            Err(error) => {
                log::warn!("accept failed: {error}; what is open goes on");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}
