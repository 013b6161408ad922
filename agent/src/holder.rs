//! The holder: the agent's main process. It has no keys and parses nothing from the network. It owns the listening
//! sockets and the packet filter, keeps one worker running on them, and writes into the kernel what the worker
//! wants, after checking it.
//!
//! It runs on one thread without a runtime: signals come by descriptor, and capabilities and signal masks are a
//! thread's. [`run`] must therefore be called before any other thread is started.

pub(crate) mod client;
mod confirmed;
mod converge;
mod desired;
pub(crate) mod handover;
mod privileges;
pub(crate) mod protocol;
mod reload;
mod restart;
mod sockets;
mod stored;
mod trial;
mod worker_process;

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::ffi::OsString;
use std::io;
use std::iter;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Context;
use mesh_runtime::notify::{self, Watchdog};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use crate::alone::Alone;
use crate::bypass::Bypass;
use crate::capture::door::Arm;
use crate::capture::{Capture, CaptureSettings, Contents, LeftTable, VipRanges};
use crate::config;
use crate::dns::wiring;
pub(crate) use confirmed::Confirmed;
pub(crate) use desired::{DOORS_MAX, RANGES_MAX};
use handover::Left;
use protocol::{DesiredWorkload, Sockets, ToHolder, WorkloadListener};
use reload::{Asked, TakenOver};
use restart::{BACKOFF_LAST, Restart};
use stored::Stored;
use worker_process::WorkerProcess;

pub(crate) const MESH_PORT: u16 = 7441;
/// The listener of callers that belong to no workload.
const COMMON: u16 = 0;
/// Between the end of a worker's link and its own end lies only its exit.
const EXIT_TIMEOUT: Duration = Duration::from_secs(1);
/// How often it is looked whether other programs took away what is ours.
const REPAIR_EVERY: Duration = Duration::from_secs(5);
/// How often it is looked whether root opened the host to plaintext: who does so waits for it.
const BYPASS_EVERY: Duration = Duration::from_secs(1);
/// Messages read in one turn, so that a babbling worker can not keep signals waiting.
const MESSAGES_PER_TURN: usize = 16;

/// How the holder runs.
#[derive(Clone, Debug)]
pub(crate) struct HolderConfig {
    pub(crate) capture: CaptureSettings,
    /// As control fixed them; the state directory has them since the join.
    pub(crate) ranges: VipRanges,
    /// Where other agents reach this one.
    pub(crate) mesh: Vec<SocketAddr>,
    /// How names are wired in, which says at which port they are answered.
    pub(crate) dns: config::Dns,
    /// Arguments that make this program a worker: `worker`, `--config`, its path.
    pub(crate) worker_arguments: Vec<OsString>,
    /// How long a worker may go on serving after SIGTERM.
    pub(crate) drain: Duration,
    /// How long after another has taken over from it.
    pub(crate) handover: Duration,
    /// The file that was named, what it says, and where a copy of that is kept for a program that goes on.
    pub(crate) config: Option<PathBuf>,
    pub(crate) config_text: String,
    pub(crate) config_copy: PathBuf,
    /// Where it is told how a reload ended.
    pub(crate) outcome_file: PathBuf,
    /// Where the input door is kept that was confirmed last.
    pub(crate) door_file: PathBuf,
    /// Where `mesh-agent bypass` says what it wants.
    pub(crate) bypass_file: PathBuf,
    /// Leave the link and the routes to it when we stop, so that calls by name fail instead of leaving the host.
    pub(crate) keep_link: bool,
}

impl HolderConfig {
    /// Ports without a door. The mesh's own is one: what comes there is TLS, or is refused there.
    fn keep_open(&self) -> Vec<u16> {
        let mesh = self.mesh.iter().map(SocketAddr::port);
        self.capture.keep_open.iter().copied().chain(mesh).collect()
    }
}

/// What the process has for as long as it lives, whichever program it runs.
struct Lasting {
    signals: SignalFd,
    lock: Alone,
    program: PathBuf,
}

/// Sets everything up, or goes on with what another program left, keeps a worker running until SIGTERM or SIGINT, and takes
/// everything down; `served` is called when there was a worker and is none any more, so not after a start that failed.
pub(crate) fn run(
    config: &HolderConfig,
    lock: Alone,
    left: Option<Left>,
    served: impl FnOnce(),
) -> anyhow::Result<ExitCode> {
    let signals = catch_signals().context("could not catch signals")?;
    privileges::raise_open_files().context("could not raise the limit of open files")?;
    let program = match &left {
        Some(left) => left.state.program.clone(),
        None => handover::program().context("where this program is can not be told")?,
    };
    let lasting = Lasting {
        signals,
        lock,
        program,
    };
    let Some(left) = left else {
        let confirmed = Confirmed::load(config);
        let mut stored = Stored::take();
        let mut capture = open(config, &confirmed, &mut stored)?;
        // From here on the table is ours, so whatever fails, it is we who clean up.
        let begun = begin(config, lasting, &mut capture, confirmed, stored);
        let outcome = begun.and_then(|mut holder| {
            let outcome = holder.serve();
            served();
            outcome
        });
        capture.close(config.keep_link)?;
        return outcome.map(|()| ExitCode::SUCCESS);
    };
    let begun = match TakenOver::begin(config, &lasting.signals, &left) {
        Ok(begun) => begun,
        // That it can go on from there it has shown before it handed over.
        Err(error) if left.given_up.is_some() => return Err(error),
        Err(error) => return Err(left.go_back(&format!("{error:#}"))),
    };
    let (mut capture, taken) = begun;
    let outcome = taken.finish(config, lasting, &mut capture, left).serve();
    served();
    capture.close(config.keep_link)?;
    outcome.map(|()| ExitCode::SUCCESS)
}

/// Takes the table of a holder that died on, or makes one.
fn open(
    config: &HolderConfig,
    confirmed: &Confirmed,
    stored: &mut Stored,
) -> anyhow::Result<Capture> {
    let (doors, reals) = (confirmed.doors(), confirmed.reals());
    if let Some(socket) = stored.rules()
        && config.capture.enabled
    {
        let left = LeftTable {
            socket,
            sequence: 0,
            levels: None,
        };
        // Until the listeners are known every SYN is reset, as in a new table.
        let contents = Contents {
            workloads: &[],
            reals,
            doors,
            arm: Arm::ForGood,
        };
        match Capture::take_on(&config.capture, &config.ranges, Some(left), doors, contents) {
            Ok(capture) => return Ok(capture),
            Err(error) => {
                let error = anyhow::Error::new(error);
                log::warn!(
                    "the table of the holder before this one can not be taken on: {error:#}"
                );
                // It is the service manager's as well.
                notify::unstore(stored::RULES);
            }
        }
    }
    Ok(Capture::open(
        &config.capture,
        &config.ranges,
        doors,
        reals,
    )?)
}

fn begin<'a>(
    config: &'a HolderConfig,
    lasting: Lasting,
    capture: &'a mut Capture,
    confirmed: Confirmed,
    mut stored: Stored,
) -> anyhow::Result<Holder<'a>> {
    let captures = config.capture.enabled;
    let ranges = captures.then_some(&config.ranges);
    let names = wiring::choose(&config.dns).way.port();
    let sockets = sockets::bind(&config.mesh, ranges, names, &mut stored).inspect_err(|_| {
        // One that the configuration does not name any more may be in the way: the next start is without them.
        stored::unstore(iter::empty());
    })?;
    let mut listeners = stored.listeners();
    if !captures {
        listeners.clear();
    }
    if let Entry::Vacant(place) = listeners.entry(COMMON) {
        place.insert(sockets::workload(COMMON, "", captures)?);
    }
    stored::store(&sockets, capture.to_hand_over().map(|(socket, ..)| socket));
    listeners.values().for_each(stored::store_listener);
    privileges::confine_holder().context("could not give up capabilities")?;
    let holder = Holder::new(config, lasting, capture, confirmed, sockets, listeners);
    // Before the first worker is asked: the common listener takes the SYNs meanwhile.
    let common = converge::workloads(&[], |number| holder.listeners.get(number));
    let (doors, reals) = (holder.confirmed.doors(), holder.confirmed.reals());
    let arm = holder.confirmed.arm();
    holder.capture.apply(&common, reals, doors, arm)?;
    Ok(holder)
}

fn catch_signals() -> nix::Result<SignalFd> {
    let mut caught = SigSet::empty();
    for signal in [
        Signal::SIGTERM,
        Signal::SIGINT,
        Signal::SIGHUP,
        Signal::SIGCHLD,
    ] {
        caught.add(signal);
    }
    caught.thread_block()?;
    SignalFd::with_flags(&caught, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)
}

/// A worker that another has taken over from: its open connections go on until they end, or until then.
struct Draining {
    worker: WorkerProcess,
    until: Instant,
}

struct Holder<'a> {
    config: &'a HolderConfig,
    lasting: Lasting,
    capture: &'a mut Capture,
    sockets: Sockets,
    /// By number; the common one is always there.
    listeners: BTreeMap<u16, WorkloadListener>,
    worker: Option<WorkerProcess>,
    /// The oldest first.
    draining: Vec<Draining>,
    restart: Restart,
    /// What the kernel knows of workloads.
    applied: Vec<DesiredWorkload>,
    /// The program that is to take our place is being asked.
    asked: Option<Asked>,
    /// Reloads that came to an end, whichever.
    reloads: u64,
    /// Why the last one was given up.
    given_up: Option<String>,
    /// Set once we are to stop: when the worker is killed.
    stop_by: Option<Instant>,
    confirmed: Confirmed,
    repair_at: Instant,
    /// Since the start.
    repaired: u64,
    repair_error: Option<String>,
    /// Why a confirmed door does not refuse for good, or is not kept.
    settle_error: Option<String>,
    /// Whether plaintext passes on purpose; `None`: that was not looked at yet.
    opened: Option<bool>,
    bypass_at: Instant,
    bypass: Option<Bypass>,
    watchdog: Watchdog,
    /// A worker has served: names, listeners and rules stand.
    ready: bool,
}

impl<'a> Holder<'a> {
    fn new(
        config: &'a HolderConfig,
        lasting: Lasting,
        capture: &'a mut Capture,
        confirmed: Confirmed,
        sockets: Sockets,
        listeners: BTreeMap<u16, WorkloadListener>,
    ) -> Self {
        let now = Instant::now();
        Self {
            config,
            lasting,
            capture,
            sockets,
            listeners,
            worker: None,
            draining: Vec::new(),
            restart: Restart::default(),
            applied: Vec::new(),
            asked: None,
            reloads: 0,
            given_up: None,
            stop_by: None,
            confirmed,
            repair_at: now + REPAIR_EVERY,
            repaired: 0,
            repair_error: None,
            settle_error: None,
            opened: None,
            bypass_at: now,
            bypass: None,
            watchdog: Watchdog::new(now),
            ready: false,
        }
    }

    fn serve(&mut self) -> anyhow::Result<()> {
        self.write_outcome();
        // One may have ended while nobody looked.
        self.reap_workers()?;
        loop {
            let now = Instant::now();
            if self.worker.is_none() {
                if self.stop_by.is_none() {
                    if self.restart.wait(now).is_zero() {
                        self.start_worker();
                    }
                } else if self.draining.is_empty() {
                    stored::unstore(self.listeners.values());
                    return Ok(());
                }
            }
            self.watchdog.alive(now);
            self.kill_if_late(now);
            self.repair_if_due(now);
            self.heed_bypass(now);
            let worker_is_ready = self.wait()?;
            self.read_signals()?;
            if worker_is_ready {
                self.read_worker();
            }
            self.follow_reload();
        }
    }

    /// Waits for a signal, the worker, or the next moment to act; tells whether the worker has something to read.
    fn wait(&self) -> anyhow::Result<bool> {
        let now = Instant::now();
        let has_mail = self.worker.as_ref().is_some_and(WorkerProcess::has_mail);
        let restart = match (&self.worker, self.stop_by) {
            (None, None) => Some(now + self.restart.wait(now)),
            (Some(_), _) if has_mail => Some(now),
            _ => None,
        };
        let draining = self.draining.iter().map(|draining| draining.until);
        let next = [
            Some(self.repair_at),
            Some(self.bypass_at),
            restart,
            self.stop_by,
            self.worker.as_ref().and_then(|worker| worker.kill_at),
            self.asked.as_ref().map(Asked::until),
        ];
        let next = next.into_iter().flatten().chain(draining).min();
        let rest = next.map_or(REPAIR_EVERY, |at| at.saturating_duration_since(now));
        // A millisecond more than the rounded-down rest, else the last one would be spun through.
        let rest = if rest.is_zero() {
            rest
        } else {
            rest + Duration::from_millis(1)
        };
        let timeout = PollTimeout::try_from(rest).unwrap_or(PollTimeout::MAX);
        let mut waiting = vec![PollFd::new(self.lasting.signals.as_fd(), PollFlags::POLLIN)];
        if let Some(worker) = &self.worker
            && worker.kill_at.is_none()
        {
            waiting.push(PollFd::new(worker.link(), PollFlags::POLLIN));
        }
        match poll(&mut waiting, timeout) {
            Ok(_) => {}
            Err(Errno::EINTR) => return Ok(false),
            Err(error) => return Err(error).context("could not wait for signals and the worker"),
        }
        Ok(has_mail || waiting.get(1).and_then(PollFd::any).unwrap_or(false))
    }

    fn read_signals(&mut self) -> anyhow::Result<()> {
        while let Some(info) = self
            .lasting
            .signals
            .read_signal()
            .context("could not read signals")?
        {
            let signal = i32::try_from(info.ssi_signo)
                .ok()
                .and_then(|number| Signal::try_from(number).ok());
            match signal {
                Some(Signal::SIGTERM | Signal::SIGINT) if self.stop_by.is_none() => {
                    log::info!("stopping");
                    notify::stopping();
                    self.stop_by = Some(Instant::now() + self.config.drain);
                    self.tell_workers(Signal::SIGTERM);
                }
                Some(Signal::SIGHUP) => self.begin_reload(),
                Some(Signal::SIGCHLD) => self.reap_workers()?,
                _ => {}
            }
        }
        Ok(())
    }

    fn tell_workers(&self, signal: Signal) {
        let draining = self.draining.iter().map(|draining| &draining.worker);
        for worker in self.worker.iter().chain(draining) {
            worker.signal(signal);
        }
    }

    fn reap_workers(&mut self) -> anyhow::Result<()> {
        const FAILED: &str = "could not wait for a worker";
        let mut left = Vec::new();
        for draining in self.draining.drain(..) {
            match draining.worker.ended().context(FAILED)? {
                None => left.push(draining),
                Some(status) => {
                    let id = draining.worker.id();
                    log::info!(worker = id, status:% = status; "the worker that drained ended");
                }
            }
        }
        self.draining = left;
        let Some(worker) = &mut self.worker else {
            return Ok(());
        };
        let Some(status) = worker.ended().context(FAILED)? else {
            return Ok(());
        };
        let (id, life) = (worker.id(), worker.started.elapsed());
        self.worker = None;
        if self.stop_by.is_some() {
            log::info!(worker = id, status:% = status; "the worker ended");
        } else {
            let pause = self.restart.ended(life, Instant::now());
            log::error!(
                worker = id, status:% = status, restart_in_ms = pause.as_millis();
                "the worker ended by itself and is replaced; new connections wait"
            );
        }
        Ok(())
    }

    fn start_worker(&mut self) {
        let started = WorkerProcess::start(&self.config.worker_arguments);
        match started {
            Ok(mut worker) => {
                log::info!(worker = worker.id(); "the worker was started");
                if let Err(error) = self.greet(&mut worker) {
                    give_up(&mut worker, &error);
                }
                self.worker = Some(worker);
            }
            Err(error) => {
                let pause = self.restart.ended(Duration::ZERO, Instant::now());
                log::error!(
                    error:% = error, restart_in_ms = pause.as_millis();
                    "a worker could not be started; new connections wait"
                );
            }
        }
    }

    /// Gives a new worker all sockets, and the numbers that are in force.
    fn greet(&self, worker: &mut WorkerProcess) -> io::Result<()> {
        let (wire, descriptors) = protocol::sockets_message(&self.sockets, false);
        worker.send(&wire, &descriptors)?;
        let all: Vec<_> = self.listeners.values().collect();
        send_listeners(worker, &all)
    }

    fn read_worker(&mut self) {
        for _ in 0..MESSAGES_PER_TURN {
            let Some(mut worker) = self.worker.take() else {
                return;
            };
            let outcome = match worker.receive() {
                Ok(ToHolder::Desired(desired)) => self.converge(&mut worker, &desired),
                Ok(ToHolder::Look) => self.look(&mut worker),
                Ok(ToHolder::Reached { generation }) => {
                    self.reached(generation);
                    Ok(())
                }
                Ok(ToHolder::StandsBy) => Err(protocol::malformed("nobody asked it to stand by")),
                Err(error) => Err(error),
            };
            let done = outcome.is_err();
            if let Err(error) = outcome
                && error.kind() != io::ErrorKind::WouldBlock
            {
                give_up(&mut worker, &error);
            }
            self.worker = Some(worker);
            if done {
                return;
            }
        }
    }

    fn kill_if_late(&mut self, now: Instant) {
        let late = |at: Option<Instant>| at.is_some_and(|at| at <= now);
        let stopped = late(self.stop_by);
        let mut killed = Vec::new();
        if let Some(worker) = &mut self.worker
            && (stopped || late(worker.kill_at))
        {
            // Only a process stuck in the kernel survives that; it is said again then.
            worker.kill_at = Some(now + BACKOFF_LAST);
            killed.push(&*worker);
        }
        for Draining { worker, until } in &mut self.draining {
            if stopped || *until <= now {
                *until = now + BACKOFF_LAST;
                killed.push(&*worker);
            }
        }
        for worker in killed {
            log::warn!(worker = worker.id(); "the worker did not end in time and is killed");
            worker.signal(Signal::SIGKILL);
        }
        if stopped {
            self.stop_by = Some(now + BACKOFF_LAST);
        }
    }
}

/// A worker whose link has ended is ending, and what it says then is the cause; one that breaks the protocol or hangs is
/// killed. Its end is noticed by signal.
fn give_up(worker: &mut WorkerProcess, error: &io::Error) {
    worker.kill_at = Some(Instant::now() + EXIT_TIMEOUT);
    // Reset, where it left something of ours unread.
    let ended = matches!(
        error.kind(),
        io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe
    );
    if !ended {
        log::error!(worker = worker.id(), error:% = error; "the link to the worker failed and it is killed");
        worker.signal(Signal::SIGKILL);
    }
}

fn send_listeners(worker: &mut WorkerProcess, listeners: &[&WorkloadListener]) -> io::Result<()> {
    for (wire, descriptors) in protocol::listener_messages(listeners) {
        worker.send(&wire, &descriptors)?;
    }
    Ok(())
}
