//! The holder: the agent's main process. It has no keys and parses nothing from the network. It owns the listening
//! sockets and the packet filter, keeps one worker running on them, and writes into the kernel what the worker
//! wants, after checking it.
//!
//! It runs on one thread without a runtime: signals come by descriptor, and capabilities and signal masks are a
//! thread's. [`run`] must therefore be called before any other thread is started.

pub(crate) mod client;
mod confirmed;
mod desired;
mod privileges;
pub(crate) mod protocol;
mod sockets;
mod worker_process;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io;
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

use crate::capture::door::{Arm, DoorPort};
use crate::capture::{Capture, CaptureSettings, VipRanges, Workload};
pub(crate) use confirmed::Confirmed;
pub(crate) use desired::{DOORS_MAX, RANGES_MAX};
use protocol::{Desired, Looked, Sockets, ToHolder, Wire, WorkloadListener};
use worker_process::WorkerProcess;

pub(crate) const MESH_PORT: u16 = 7441;
/// The listener of callers that belong to no workload.
const COMMON: u16 = 0;
/// A worker that lived so long did not die of what it finds at its start: it is replaced at once.
const STEADY: Duration = Duration::from_secs(10);
const BACKOFF_FIRST: Duration = Duration::from_millis(100);
const BACKOFF_LAST: Duration = Duration::from_secs(5);
/// Between the end of a worker's link and its own end lies only its exit.
const EXIT_TIMEOUT: Duration = Duration::from_secs(1);
/// How often it is looked whether other programs took away what is ours.
const REPAIR_EVERY: Duration = Duration::from_secs(5);
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
    /// Arguments that make this program a worker: `worker`, `--config`, its path.
    pub(crate) worker_arguments: Vec<OsString>,
    /// How long a worker may go on serving after SIGTERM.
    pub(crate) drain: Duration,
    /// Where the input door is kept that was confirmed last.
    pub(crate) door_file: PathBuf,
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

/// Sets everything up, keeps a worker running until SIGTERM or SIGINT, and takes everything down; `served` is called when
/// there was a worker and is none any more, so not after a start that failed.
pub(crate) fn run(config: &HolderConfig, served: impl FnOnce()) -> anyhow::Result<ExitCode> {
    let signals = catch_signals().context("could not catch signals")?;
    privileges::raise_open_files().context("could not raise the limit of open files")?;
    let confirmed = Confirmed::load(config);
    let (doors, reals) = (confirmed.doors(), confirmed.reals());
    let mut capture = Capture::open(&config.capture, &config.ranges, doors, reals)?;
    // From here on the table is ours, so whatever fails, it is we who clean up.
    let outcome = hold(config, signals, &mut capture, confirmed, served);
    capture.close(config.keep_link)?;
    outcome.map(|()| ExitCode::SUCCESS)
}

fn hold(
    config: &HolderConfig,
    signals: SignalFd,
    capture: &mut Capture,
    confirmed: Confirmed,
    served: impl FnOnce(),
) -> anyhow::Result<()> {
    let captures = config.capture.enabled;
    let sockets = sockets::bind(&config.mesh, captures.then_some(&config.ranges))?;
    let common = sockets::workload(COMMON, "", captures)?;
    privileges::confine_holder().context("could not give up capabilities")?;
    let mut holder = Holder {
        config,
        signals,
        capture,
        sockets,
        listeners: BTreeMap::from([(COMMON, common)]),
        worker: None,
        restart: Restart::default(),
        stop_by: None,
        confirmed,
        repair_at: Instant::now() + REPAIR_EVERY,
        repaired: 0,
        repair_error: None,
        settle_error: None,
        watchdog: Watchdog::new(Instant::now()),
        ready: false,
    };
    // Before the first worker is asked: the common listener takes the SYNs meanwhile.
    let common = holder.common_workload();
    let (doors, reals) = (holder.confirmed.doors(), holder.confirmed.reals());
    let arm = holder.confirmed.arm();
    holder.capture.apply(&[common], reals, doors, arm)?;
    let outcome = holder.serve();
    served();
    outcome
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

/// When the next worker may start.
#[derive(Debug, Default)]
struct Restart {
    not_before: Option<Instant>,
    pause: Duration,
}

impl Restart {
    /// Tells that a worker ended which had lived for `life`; returns the pause.
    fn ended(&mut self, life: Duration, now: Instant) -> Duration {
        let pause = if life >= STEADY {
            Duration::ZERO
        } else {
            self.pause
        };
        self.not_before = Some(now + pause);
        self.pause = (pause * 2).clamp(BACKOFF_FIRST, BACKOFF_LAST);
        pause
    }

    fn wait(&self, now: Instant) -> Duration {
        self.not_before
            .map_or(Duration::ZERO, |at| at.saturating_duration_since(now))
    }
}

struct Holder<'a> {
    config: &'a HolderConfig,
    signals: SignalFd,
    capture: &'a mut Capture,
    sockets: Sockets,
    /// By number; the common one is always there.
    listeners: BTreeMap<u16, WorkloadListener>,
    worker: Option<WorkerProcess>,
    restart: Restart,
    /// Set once we are to stop: when the worker is killed.
    stop_by: Option<Instant>,
    confirmed: Confirmed,
    repair_at: Instant,
    /// Since the start.
    repaired: u64,
    repair_error: Option<String>,
    /// Why a confirmed door does not refuse for good, or is not kept.
    settle_error: Option<String>,
    watchdog: Watchdog,
    /// A worker has served: names, listeners and rules stand.
    ready: bool,
}

impl Holder<'_> {
    fn serve(&mut self) -> anyhow::Result<()> {
        loop {
            let now = Instant::now();
            if self.worker.is_none() {
                if self.stop_by.is_some() {
                    return Ok(());
                }
                if self.restart.wait(now).is_zero() {
                    self.start_worker();
                }
            }
            self.watchdog.alive(now);
            self.kill_if_late(now);
            self.repair_if_due(now);
            let worker_is_ready = self.wait()?;
            self.read_signals()?;
            if worker_is_ready {
                self.read_worker();
            }
        }
    }

    /// Waits for a signal, the worker, or the next moment to act; tells whether the worker has something to read.
    fn wait(&self) -> anyhow::Result<bool> {
        let now = Instant::now();
        let has_mail = self.worker.as_ref().is_some_and(WorkerProcess::has_mail);
        let timeout = match &self.worker {
            Some(_) if has_mail => Some(Duration::ZERO),
            None => Some(self.restart.wait(now)),
            Some(worker) => [worker.kill_at, self.stop_by]
                .into_iter()
                .flatten()
                .min()
                .map(|at| at.saturating_duration_since(now)),
        };
        let repair = self.repair_at.saturating_duration_since(now);
        let timeout = Some(timeout.map_or(repair, |timeout| timeout.min(repair)));
        let timeout = match timeout {
            // A millisecond more than the rounded-down rest, else the last one would be spun through.
            Some(rest) => {
                PollTimeout::try_from(rest + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX)
            }
            None => PollTimeout::NONE,
        };
        let mut waiting = vec![PollFd::new(self.signals.as_fd(), PollFlags::POLLIN)];
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
                    self.tell_worker(Signal::SIGTERM);
                }
                Some(Signal::SIGHUP) => self.tell_worker(Signal::SIGHUP),
                Some(Signal::SIGCHLD) => self.reap_worker()?,
                _ => {}
            }
        }
        Ok(())
    }

    fn tell_worker(&self, signal: Signal) {
        if let Some(worker) = &self.worker {
            worker.signal(signal);
        }
    }

    fn reap_worker(&mut self) -> anyhow::Result<()> {
        let Some(worker) = &mut self.worker else {
            return Ok(());
        };
        let Some(status) = worker.ended().context("could not wait for the worker")? else {
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
        let (wire, descriptors) = protocol::sockets_message(&self.sockets);
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

    fn look(&mut self, worker: &mut WorkerProcess) -> io::Result<()> {
        let mut looked = Looked {
            arming: self.confirmed.arming(),
            repaired: self.repaired,
            error: self
                .repair_error
                .as_ref()
                .or(self.settle_error.as_ref())
                .cloned(),
            ..Looked::default()
        };
        match self.capture.seen() {
            Ok((seen, shed)) => (looked.seen, looked.shed) = (seen, shed),
            Err(error) => looked.error = Some(format!("{:#}", anyhow::Error::new(error))),
        }
        worker.send(&Wire::Looked(looked), &[])
    }

    fn reached(&mut self, generation: u64) {
        self.confirmed.reached(generation);
        self.settle();
    }

    /// Makes what was confirmed hold for good, and keeps it. What fails is tried again with the next look at the rules.
    fn settle(&mut self) {
        let error = self.confirmed.settle(self.capture).err();
        let error = error.map(|error| format!("{error:#}"));
        if let Some(error) = &error
            && self.settle_error.as_ref() != Some(error)
        {
            log::error!(
                "{error}; it is tried again every {} s",
                REPAIR_EVERY.as_secs()
            );
        }
        self.settle_error = error;
    }

    /// Puts back what other programs took away: a reload of a firewall, a network manager that starts anew.
    fn repair_if_due(&mut self, now: Instant) {
        if now < self.repair_at {
            return;
        }
        self.repair_at = now + REPAIR_EVERY;
        self.settle();
        let error = match self.capture.repair() {
            Ok(missing) => {
                if !missing.is_empty() {
                    self.repaired += 1;
                    let missing = missing.join(", ");
                    log::warn!(missing = missing.as_str(); "another program took away what is the mesh's; it was put back");
                }
                None
            }
            Err(error) => Some(format!("{:#}", anyhow::Error::new(error))),
        };
        if let Some(error) = &error
            && self.repair_error.as_ref() != Some(error)
        {
            log::error!(
                "{error}; it is tried again every {} s",
                REPAIR_EVERY.as_secs()
            );
        }
        self.repair_error = error;
    }

    fn kill_if_late(&mut self, now: Instant) {
        let Some(worker) = &mut self.worker else {
            return;
        };
        let late = |at: Option<Instant>| at.is_some_and(|at| at <= now);
        if late(self.stop_by) || late(worker.kill_at) {
            log::warn!(worker = worker.id(); "the worker did not end in time and is killed");
            worker.signal(Signal::SIGKILL);
            // Only a process stuck in the kernel survives that; it is said again then.
            worker.kill_at = Some(now + BACKOFF_LAST);
            self.stop_by = self.stop_by.map(|_| now + BACKOFF_LAST);
        }
    }

    /// Makes listeners and rules what the worker wants, or leaves all as it is and says why.
    fn converge(&mut self, worker: &mut WorkerProcess, desired: &Desired) -> io::Result<()> {
        let generation = desired.generation;
        match self.apply(desired) {
            Ok(new) => {
                let new: Vec<_> = new.iter().filter_map(|n| self.listeners.get(n)).collect();
                send_listeners(worker, &new)?;
                let trial = self.confirmed.arm() != Arm::ForGood;
                worker.send(&Wire::Applied { generation, trial }, &[])?;
                // What a worker wants comes when it has wired in names and takes calls.
                if !std::mem::replace(&mut self.ready, true) {
                    log::info!("ready");
                    notify::ready();
                }
                Ok(())
            }
            Err(error) => {
                // The worker logs it with what it wanted.
                let error = format!("{error:#}");
                worker.send(&Wire::Failed { generation, error }, &[])
            }
        }
    }

    /// Returns the numbers whose listeners are new.
    fn apply(&mut self, desired: &Desired) -> anyhow::Result<Vec<u16>> {
        desired::check(desired, &self.config.ranges)?;
        let doors = match &desired.doors {
            Some(doors) => {
                let mut doors = desired::doors(doors, &self.config.keep_open())?;
                let is_kept = |door: &&DoorPort| desired.kept_doors.contains(&door.port);
                let kept = self.confirmed.wanted().iter().filter(is_kept).cloned();
                let kept: Vec<_> = kept
                    .filter(|old| doors.iter().all(|new| new.port != old.port))
                    .collect();
                doors.extend(kept);
                desired::bound(&doors)?;
                doors
            }
            None => self.confirmed.wanted().to_vec(),
        };
        let reals = match &desired.reals {
            Some(reals) => {
                let (keep_open, ranges) = (self.config.keep_open(), &self.config.ranges);
                desired::reals(reals, &keep_open, ranges)?
            }
            None => self.confirmed.reals().to_vec(),
        };
        let mut made = BTreeMap::new();
        for wanted in &desired.workloads {
            let stands = self
                .listeners
                .get(&wanted.number)
                .is_some_and(|l| l.label == wanted.label);
            if !stands {
                let listener =
                    sockets::workload(wanted.number, &wanted.label, self.config.capture.enabled)?;
                made.insert(wanted.number, listener);
            }
        }
        let mut workloads = vec![self.common_workload()];
        for wanted in &desired.workloads {
            let number = wanted.number;
            let listener = made.get(&number).or_else(|| self.listeners.get(&number));
            let (port4, port6) = listener.map_or((None, None), ports);
            workloads.push(Workload {
                number,
                cgroups: wanted.cgroups.clone(),
                uids: wanted.uids.clone(),
                port4,
                port6,
            });
        }
        let arm = self.confirmed.arm_of(&doors);
        let confirmed = self.confirmed.doors();
        self.capture.prepare_guard(confirmed, &doors, &reals)?;
        if let Err(error) = self.capture.apply(&workloads, &reals, &doors, arm) {
            // The door stands as it was, and so should the guard; if that fails too, it is the next wish's to mend.
            let reals = self.confirmed.reals();
            if let Err(error) = self.capture.prepare_guard(confirmed, confirmed, reals) {
                log::error!("{:#}", anyhow::Error::new(error));
            }
            return Err(error.into());
        }
        self.confirmed
            .applied(desired.generation, doors, reals, arm);
        self.settle();
        let new = made.keys().copied().collect();
        self.listeners.extend(made);
        // Closing our copy of what is no more wanted leaves the worker's, until it closes that too.
        self.listeners
            .retain(|number, _| workloads.iter().any(|w| w.number == *number));
        Ok(new)
    }

    fn common_workload(&self) -> Workload {
        let (port4, port6) = self.listeners.get(&COMMON).map_or((None, None), ports);
        Workload {
            number: COMMON,
            cgroups: Vec::new(),
            uids: Vec::new(),
            port4,
            port6,
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

fn ports(listener: &WorkloadListener) -> (Option<u16>, Option<u16>) {
    let port = |socket: &Option<std::net::TcpListener>| {
        let address = socket.as_ref()?.local_addr().ok()?;
        Some(address.port())
    };
    (port(&listener.v4), port(&listener.v6))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_is_replaced_at_once_and_then_ever_later() {
        let now = Instant::now();
        let mut restart = Restart::default();
        let pauses: Vec<u128> = (0..9)
            .map(|_| restart.ended(Duration::from_secs(1), now).as_millis())
            .collect();
        assert_eq!(pauses, [0, 100, 200, 400, 800, 1_600, 3_200, 5_000, 5_000]);
        assert_eq!(restart.wait(now), BACKOFF_LAST);
        assert_eq!(restart.ended(STEADY, now), Duration::ZERO);
        assert_eq!(restart.ended(Duration::ZERO, now), BACKOFF_FIRST);
    }
}
