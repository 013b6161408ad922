//! The data plane: threads that accept, each with a loop, a pool of peers and balancers of its own. They share
//! immutable pictures and counters, nothing else.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::io;
use std::net::TcpListener as StdListener;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use mesh_api::workload_file::CallAt;
use mesh_core::names::{Account, ServiceName};
use mesh_core::reason::Reason;
use mesh_core::rng::Rng;
use mesh_core::stream;
use mesh_runtime::mux::{self, Budget};
use mesh_runtime::tls::trust::SharedTrust;
use mesh_runtime::tls::verify::{Accept, Verifier};
use prometheus_client::metrics::gauge::Gauge;
use socket2::TcpKeepalive;
use tokio::net::TcpListener;
use tokio::runtime::{Builder, LocalOptions};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::{AbortHandle, spawn_local};

use crate::accept;
use crate::call::Balancers;
use crate::capture::app_socket::AppDialer;
use crate::capture::sockdiag::SockDiag;
use crate::drain;
use crate::explicit::LocalListener;
use crate::health::Calls;
use crate::http::Heads;
use crate::inbound::app::{AppPool, KEPT_MAX};
use crate::inbound::front::Fronts;
use crate::inbound::http2::app::Connections;
use crate::inbound::{Hands, Shares, certificates};
use crate::limits::{self, Limit, ShedLog};
use crate::live::Live;
use crate::metrics::{Direction, Metrics};
use crate::peers::Peers;
use crate::places::{Party, Turns};
use crate::quiet::Quiet;
use crate::view::{View, ViewReader};

pub(crate) use strangers::{Handshakes, LogGate};

mod strangers;
mod upkeep;

/// Commands to a thread that wait: listeners at the start, one a workload.
const COMMANDS_MAX: usize = 1024;
/// Descriptors of the process that are no connection's: listeners (two a workload), files, links to holder and control.
const OWN_DESCRIPTORS: usize = 256;
/// Connections of each kind that are possible however few descriptors there may be.
const CONNECTIONS_MIN: usize = 64;

/// How the data plane works. Each bound has its reason in docs/reference.md.
#[derive(Clone, Debug)]
pub(crate) struct DataSettings {
    /// Until a TCP connection to a peer or an app stands.
    pub(crate) connect: Duration,
    /// Until a TLS handshake is through.
    pub(crate) handshake: Duration,
    /// Until an HTTP connection on which nothing moves is closed.
    pub(crate) idle: Duration,
    /// The same of one that is bytes; `None`: it lives for as long as both programs do.
    pub(crate) tcp_idle: Option<Duration>,
    /// How long an HTTP head may take from its first byte to its last.
    pub(crate) head: Duration,
    /// How long a caller that closed its side of an HTTP connection may wait for its answer.
    pub(crate) half_closed: Duration,
    /// How the kernel asks whether a program's end of a connection is still there.
    pub(crate) keepalive: TcpKeepalive,
    /// The same of another agent's, in the stream layer.
    pub(crate) peer_keepalive: Duration,
    /// What a mesh connection may carry at once.
    pub(crate) streams: stream::Limits,
    /// How long a connection is held for the first answer about its service.
    pub(crate) hold: Duration,
    /// Connections held so at once, a thread.
    pub(crate) held_max: usize,
    /// Connections of callers, and as many of peers, that are open at once, a thread. Less where the process may have
    /// fewer descriptors.
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
    /// Where health hears whether programs take their calls.
    pub(crate) calls: Calls,
    pub(crate) trust: SharedTrust,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) settings: DataSettings,
    pub(crate) turns: Arc<Turns>,
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
    /// A local port or socket that leads to a service.
    Local(CallAt, LocalListener),
    /// Accept at these only.
    KeepLocal(Arc<BTreeSet<CallAt>>),
    /// Accept for these workloads and the common listener only.
    Keep(Arc<BTreeSet<Account>>),
    /// Accept nothing more, from nobody.
    StopAccepting(oneshot::Sender<()>),
    Drain(Ending, Duration, oneshot::Sender<()>),
}

/// How the calls of a worker end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    /// Nobody serves here afterwards: whoever can go elsewhere is told to.
    Stop,
    /// Another worker serves: nobody notices.
    HandOver,
}

impl DataPlane {
    /// Starts the threads.
    pub(crate) fn start(shared: &DataShared) -> anyhow::Result<Self> {
        let mut threads = Vec::new();
        for number in 0..shared.settings.threads.max(1) {
            let (commands, inbox) = mpsc::channel(COMMANDS_MAX);
            let shared = shared.clone();
            let body = move || {
                let runtime = Builder::new_current_thread()
                    .enable_all()
                    .build_local(LocalOptions::default());
                let outcome = runtime
                    .map_err(Into::into)
                    .and_then(|runtime| runtime.block_on(run(shared, inbox)));
                if let Err(error) = outcome {
                    // Without its data plane a worker is of no use: the holder starts another.
                    log::error!("the data plane can not run: {error:#}");
                    std::process::exit(1);
                }
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

    /// Gives up the listeners of all other workloads: the kernel leads nothing to them any more.
    pub(crate) async fn keep(&self, accounts: BTreeSet<Account>) {
        let accounts = Arc::new(accounts);
        for thread in &self.threads {
            // A thread that is gone accepts nothing.
            let _ = thread.send(Command::Keep(Arc::clone(&accounts))).await;
        }
    }

    /// Serves a local port or socket.
    pub(crate) async fn add_local(
        &self,
        at: &CallAt,
        listener: LocalListener,
    ) -> anyhow::Result<()> {
        for thread in &self.threads {
            let listener = match &listener {
                LocalListener::Port(port) => LocalListener::Port(port.try_clone()?),
                LocalListener::Socket(socket) => LocalListener::Socket(socket.try_clone()?),
            };
            thread
                .send(Command::Local(at.clone(), listener))
                .await
                .map_err(|_| anyhow::anyhow!("the data plane is gone"))?;
        }
        Ok(())
    }

    /// Gives up all other local ports and sockets.
    pub(crate) async fn keep_local(&self, kept: BTreeSet<CallAt>) {
        let kept = Arc::new(kept);
        for thread in &self.threads {
            // A thread that is gone accepts nothing.
            let _ = thread.send(Command::KeepLocal(Arc::clone(&kept))).await;
        }
    }

    /// Takes no connection any more, on any thread, when this returns. What was taken goes on.
    pub(crate) async fn stop_accepting(&self) {
        self.tell_all(Command::StopAccepting).await;
    }

    /// Takes no new calls, lets open ones end until `deadline`, then cuts them.
    pub(crate) async fn drain(&self, ending: Ending, deadline: Duration) {
        self.tell_all(|done| Command::Drain(ending, deadline, done))
            .await;
    }

    /// Returns when all threads have done it.
    async fn tell_all(&self, command: impl Fn(oneshot::Sender<()>) -> Command) {
        let mut waits = Vec::new();
        for thread in &self.threads {
            let (done, wait) = oneshot::channel();
            if thread.send(command(done)).await.is_ok() {
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
    pub(crate) calls: Calls,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) settings: DataSettings,
    pub(crate) peers: Peers,
    pub(crate) live: Live,
    pub(crate) balancers: Balancers,
    pub(crate) rng: RefCell<Rng>,
    pub(crate) diag: RefCell<SockDiag>,
    pub(crate) dialer: AppDialer,
    pub(crate) apps: AppPool,
    /// Bytes of HTTP heads that are not whole yet.
    pub(crate) heads: Rc<Heads>,
    pub(crate) fronts: Fronts,
    /// Tasks that wait for a stream of a peer.
    pub(crate) hands: Hands,
    /// Watches for calls on which nothing moves.
    pub(crate) quiet: Quiet,
    pub(crate) http2_apps: Connections,
    pub(crate) mesh_tls: Arc<rustls::ServerConfig>,
    /// Calls that wait for their endpoints.
    pub(crate) held: Cell<usize>,
    pub(crate) callers: Cell<usize>,
    /// How many of them each party has.
    pub(crate) places: RefCell<HashMap<Party, usize>>,
    /// The calls of users.
    pub(crate) turns: Arc<Turns>,
    pub(crate) peers_open: Cell<usize>,
    /// Connections of peers that came when the drain had begun: each is told to go elsewhere, none is waited for.
    late: Cell<usize>,
    /// Calls of peers that are being served, each with at most one connection to an app.
    pub(crate) serving: Cell<usize>,
    /// The most of each of the three, and of connections to other agents.
    pub(crate) share: usize,
    /// What each host has of what peers may have.
    pub(crate) shares: Shares,
    pub(crate) handshakes: RefCell<Handshakes>,
    pub(crate) refusals: RefCell<LogGate>,
    pub(crate) shed_log: RefCell<ShedLog>,
    /// What a connection is taken and reset with when there is no other descriptor.
    pub(crate) spare: RefCell<Option<File>>,
    /// True when this thread takes no new calls.
    pub(crate) draining: watch::Sender<bool>,
    /// Whether another worker serves then.
    pub(crate) handed_over: Cell<bool>,
}

impl Thread {
    /// The picture for one decision.
    pub(crate) fn view(&self) -> Arc<View> {
        Arc::clone(&self.view.borrow())
    }

    /// How mesh connections work here; their buffers count against `budget`.
    pub(crate) fn mux_settings(&self, budget: &Arc<Budget>) -> mux::Settings {
        mux::Settings {
            limits: self.settings.streams,
            keepalive: self.settings.peer_keepalive,
            budget: Arc::clone(budget),
        }
    }

    /// Counts a connection while it lives; `None` when there are as many as may be. Callers and peers have a share
    /// each, so that neither can lock the other out.
    pub(crate) fn admit(self: &Rc<Self>, direction: Direction) -> Option<Admission> {
        if self.metrics.limits.budget.is_spent() {
            self.shed(Limit::Buffers, direction);
            return None;
        }
        let admission = Admission::new(self, direction);
        if admission.count().get() > self.share {
            let limit = match direction {
                Direction::Outbound => Limit::Callers,
                Direction::Inbound => Limit::Peers,
            };
            self.shed(limit, direction);
            return None;
        }
        Some(admission)
    }

    /// Whether this thread takes no new calls, and nobody else here does.
    pub(crate) fn stops(&self) -> bool {
        *self.draining.borrow() && !self.handed_over.get()
    }

    /// Connections that a drain waits for.
    pub(crate) fn open(&self) -> usize {
        self.callers.get() + self.peers_open.get()
    }

    /// New work is refused because a bound is reached: said, counted.
    pub(crate) fn shed(&self, limit: Limit, direction: Direction) {
        self.metrics.refused(direction, Reason::Overloaded);
        self.reached(limit);
    }

    /// The same where whoever renders the refusal counts it.
    pub(crate) fn reached(&self, limit: Limit) {
        self.metrics.limits.reached(limit);
        self.shed_log.borrow_mut().say(limit);
    }

    /// A socket could not be had for want of something of this host: the reason for the call that wanted it.
    pub(crate) fn short_of(&self, error: &io::Error) -> Reason {
        if limits::out_of_descriptors(error) {
            self.give_up_idle();
            self.reached(Limit::Descriptors);
        }
        Reason::Overloaded
    }

    /// Gives up connections that are kept and nobody's calls, for want of descriptors. Whether there is one more now.
    pub(crate) fn give_up_idle(&self) -> bool {
        // These end in a turn of their own.
        self.peers.close_idle();
        self.http2_apps.close_idle(Duration::ZERO);
        self.apps.clear()
    }
}

/// A connection that counts.
#[derive(Debug)]
pub(crate) struct Admission {
    thread: Rc<Thread>,
    direction: Direction,
    /// It came during a drain.
    late: bool,
}

impl Admission {
    fn new(thread: &Rc<Thread>, direction: Direction) -> Self {
        let admission = Self {
            thread: Rc::clone(thread),
            direction,
            late: *thread.draining.borrow(),
        };
        let count = admission.count();
        count.set(count.get() + 1);
        admission.gauge().inc();
        admission
    }

    fn count(&self) -> &Cell<usize> {
        match self.direction {
            Direction::Outbound => &self.thread.callers,
            Direction::Inbound if self.late => &self.thread.late,
            Direction::Inbound => &self.thread.peers_open,
        }
    }

    fn gauge(&self) -> &Gauge {
        let limits = &self.thread.metrics.limits;
        match self.direction {
            Direction::Outbound => &limits.callers,
            Direction::Inbound => &limits.peers,
        }
    }
}

impl Drop for Admission {
    fn drop(&mut self) {
        let count = self.count();
        count.set(count.get() - 1);
        self.gauge().dec();
    }
}

/// What each of callers, peers, apps and connections to other agents may have of the process's descriptors, and how
/// many connections to apps may be kept beside them, a thread.
fn shares_of_descriptors(threads: usize) -> (usize, usize) {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap_or((1024, 1024));
    let have = if setrlimit(Resource::RLIMIT_NOFILE, hard, hard).is_ok() {
        hard
    } else {
        soft
    };
    let have = usize::try_from(have).unwrap_or(usize::MAX);
    let have = have.saturating_sub(OWN_DESCRIPTORS) / threads.max(1);
    let kept = KEPT_MAX.min(have / 5);
    ((have - kept).div_euclid(4).max(CONNECTIONS_MIN), kept)
}

async fn run(shared: DataShared, mut inbox: mpsc::Receiver<Command>) -> anyhow::Result<()> {
    let verifier = Verifier::new(Arc::clone(&shared.trust), Accept::Callers);
    let resolver = certificates(shared.view.clone());
    let mesh_tls =
        mesh_runtime::tls::server_config(resolver, verifier, &[mesh_runtime::tls::ALPN_MESH])?;
    let seed = std::process::id() as u64 ^ (Arc::as_ptr(&shared.metrics) as u64).rotate_left(17);
    let threads = shared.settings.threads;
    let (share, kept) = shares_of_descriptors(threads);
    let share = share.min(shared.settings.connections_max);
    let limits = &shared.metrics.limits;
    for limit in [Limit::Callers, Limit::Peers, Limit::Dialled, Limit::Calls] {
        limits.set_max(limit, share * threads);
    }
    limits.set_max(Limit::Held, shared.settings.held_max * threads);
    let shares = Shares::new(&limits.budget);
    let thread = Rc::new(Thread {
        dialer: AppDialer::new(shared.settings.app_mark, shared.settings.keepalive.clone()),
        view: shared.view,
        wants: shared.wants,
        calls: shared.calls,
        metrics: shared.metrics,
        settings: shared.settings,
        peers: Peers::default(),
        live: Live::default(),
        balancers: Balancers::default(),
        rng: RefCell::new(Rng::new(seed)),
        diag: RefCell::new(SockDiag::open()?),
        apps: AppPool::new(kept),
        heads: Rc::default(),
        fronts: Fronts::default(),
        hands: Hands::default(),
        quiet: Quiet::default(),
        http2_apps: Connections::default(),
        mesh_tls: Arc::new(mesh_tls),
        held: Cell::new(0),
        places: RefCell::default(),
        turns: shared.turns,
        callers: Cell::new(0),
        peers_open: Cell::new(0),
        late: Cell::new(0),
        serving: Cell::new(0),
        share,
        shares,
        handshakes: RefCell::default(),
        refusals: RefCell::default(),
        shed_log: RefCell::default(),
        spare: RefCell::new(accept::spare_descriptor()),
        draining: watch::Sender::new(false),
        handed_over: Cell::new(false),
    });
    upkeep::begin(&thread);
    // Of no workload: the mesh port and the common listener.
    let mut always: Vec<AbortHandle> = Vec::new();
    let mut accepting: Vec<(Account, AbortHandle)> = Vec::new();
    let mut local: Vec<(CallAt, AbortHandle)> = Vec::new();
    while let Some(command) = inbox.recv().await {
        match command {
            Command::Local(at, listener) => {
                let task = accept::locally(&thread, &at, listener)?;
                local.push((at, task));
            }
            Command::KeepLocal(kept) => local.retain(|(at, task)| {
                let stays = kept.contains(at);
                if !stays {
                    task.abort();
                }
                stays
            }),
            Command::Keep(accounts) => accepting.retain(|(account, task)| {
                let kept = accounts.contains(account);
                if !kept {
                    task.abort();
                }
                kept
            }),
            Command::Mesh(listener) => {
                let task = accept::peers(Rc::clone(&thread), TcpListener::from_std(listener)?);
                always.push(spawn_local(task).abort_handle());
            }
            Command::Callers(whose, listener) => {
                // What it accepts inherits this.
                crate::relay::prepare_listener(&listener, &thread.settings.keepalive)?;
                let listener = TcpListener::from_std(listener)?;
                let task = accept::callers(Rc::clone(&thread), whose.clone(), listener);
                let task = spawn_local(task).abort_handle();
                match whose {
                    Some(account) => accepting.push((account, task)),
                    None => always.push(task),
                }
            }
            Command::StopAccepting(done) => {
                let workloads = accepting.drain(..).map(|(_, task)| task);
                let local = local.drain(..).map(|(_, task)| task);
                stop_accepting(always.drain(..).chain(workloads).chain(local), done);
            }
            Command::Drain(ending, deadline, done) => end_calls(&thread, ending, deadline, done),
        }
    }
    Ok(())
}

/// Each task waits for a connection and nothing else: none is lost with it.
fn stop_accepting(tasks: impl Iterator<Item = AbortHandle>, done: oneshot::Sender<()>) {
    tasks.for_each(|task| task.abort());
    let _ = done.send(());
}

/// Drains in a task of its own: another drain, with less time, may follow.
fn end_calls(thread: &Rc<Thread>, ending: Ending, deadline: Duration, done: oneshot::Sender<()>) {
    thread.handed_over.set(ending == Ending::HandOver);
    let thread = Rc::clone(thread);
    spawn_local(async move {
        drain::drain(&thread, deadline).await;
        let _ = done.send(());
    });
}
