//! A reload, from the holder's side: the program on disk is asked, becomes this process, and takes over or goes back
//! (`holder/handover.rs`).

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::net::TcpListener;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use mesh_runtime::files;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use nix::sys::signalfd::SignalFd;

use super::handover::{Handover, Left, LeftListener, LeftRules, LeftWorker, Question, places};
use super::protocol::{Sockets, Wire, WorkloadListener};
use super::worker_process::WorkerProcess;
use super::{
    Confirmed, Draining, Holder, HolderConfig, Lasting, converge, give_up, privileges,
    send_listeners, trial,
};
use crate::capture::{Capture, Contents, LeftTable};
use crate::reload::Outcome;

/// Workers that drain at once: each has memory of its own. Of more, the oldest has the time that a stop gives it.
const DRAINING_MAX: usize = 2;
/// So many that a reload is refused until one of them has ended.
const DRAINING_FULL: usize = 6;
/// How long a worker may take to let go of what only one may do: it ends a session and writes a file or two, on a disk that
/// may be busy with the upgrade. Who calls meanwhile waits.
const LET_GO_MAX: Duration = Duration::from_secs(10);

/// The program that is to take our place is being asked, or has agreed.
#[derive(Debug)]
pub(super) struct Asked {
    question: Question,
    agreed: bool,
}

impl Asked {
    pub(super) fn until(&self) -> Instant {
        self.question.until
    }
}

impl Holder<'_> {
    pub(super) fn begin_reload(&mut self) {
        if self.asked.is_some() || self.stop_by.is_some() {
            log::info!("a reload or the end has begun already; this one is left out");
            return;
        }
        if DRAINING_FULL <= self.draining.len() {
            let next = self.draining.iter().map(|draining| draining.until).min();
            let left = next.map_or(Duration::ZERO, |at| {
                at.saturating_duration_since(Instant::now())
            });
            return self.end_reload(Some(format!(
                "{DRAINING_FULL} workers of earlier reloads still carry what was open then, and the next of them ends within {} s: \
                 reload again then",
                left.as_secs() + 1
            )));
        }
        log::info!(program:% = self.lasting.program.display(); "the program on disk is to take over");
        let asked = (|| {
            let old = File::open("/proc/self/exe")?;
            let state = self.to_hand_over(old.as_raw_fd());
            Question::ask(&state, self.config.config.as_deref())
        })();
        match asked {
            Ok(question) => {
                self.asked = Some(Asked {
                    question,
                    agreed: false,
                });
            }
            Err(error) => self.end_reload(Some(format!("it can not be started: {error}"))),
        }
    }

    /// Goes on with a reload that has begun.
    pub(super) fn follow_reload(&mut self) {
        if self.stop_by.is_some() && self.asked.take().is_some() {
            return self.end_reload(Some("the agent was told to end".to_owned()));
        }
        let Some(asked) = &mut self.asked else {
            return;
        };
        if !asked.agreed {
            match asked.question.answer() {
                None => return,
                Some(Ok(())) => asked.agreed = true,
                Some(Err(why)) => {
                    self.asked = None;
                    return self.end_reload(Some(why));
                }
            }
        }
        // The other program reads on where this one stopped.
        let is_between = self
            .worker
            .as_ref()
            .is_none_or(WorkerProcess::is_between_messages);
        let late = self
            .asked
            .as_ref()
            .is_some_and(|a| a.until() <= Instant::now());
        if (is_between || late)
            && let Some(asked) = self.asked.take()
        {
            let error = match is_between {
                true => self.become_it(asked.question),
                false => io::Error::other("the worker is in the middle of a message for too long"),
            };
            self.end_reload(Some(format!("it can not be executed: {error}")));
        }
    }

    fn become_it(&mut self, question: Question) -> io::Error {
        let become_it = || -> io::Result<io::Error> {
            let text = self.config.config_text.as_bytes();
            files::write_private(&self.config.config_copy, text).map_err(io::Error::other)?;
            let old = File::open("/proc/self/exe")?;
            let state = self.to_hand_over(old.as_raw_fd());
            let mut open = self.descriptors();
            open.push(old.as_fd());
            question.become_it(&state, &open)
        };
        become_it().unwrap_or_else(|error| error)
    }

    /// All that another program goes on with. `old` is this one.
    fn to_hand_over(&self, old: RawFd) -> Handover {
        let numbers = |all: &[TcpListener]| all.iter().map(AsRawFd::as_raw_fd).collect();
        let raw = |socket: &Option<TcpListener>| socket.as_ref().map(AsRawFd::as_raw_fd);
        let listeners = self.listeners.values().map(|listener| LeftListener {
            number: listener.number,
            label: listener.label.clone(),
            v4: raw(&listener.v4),
            v6: raw(&listener.v6),
        });
        let left = |worker: &WorkerProcess, until: Option<Instant>| LeftWorker {
            pid: worker.id(),
            link: worker.link().as_raw_fd(),
            age_ms: millis(worker.started.elapsed()),
            left_ms: until.map_or(0, |at| millis(at.saturating_duration_since(Instant::now()))),
        };
        let draining = self.draining.iter();
        Handover {
            form: Handover::form(),
            program: self.lasting.program.clone(),
            old,
            lock: self.lasting.lock.as_fd().as_raw_fd(),
            addresses: self.config.mesh.clone(),
            mesh: numbers(&self.sockets.mesh),
            dns_udp: self
                .sockets
                .dns_udp
                .iter()
                .map(AsRawFd::as_raw_fd)
                .collect(),
            dns_tcp: numbers(&self.sockets.dns_tcp),
            names: (self.sockets.dns_tcp.iter())
                .find_map(|listener| Some(listener.local_addr().ok()?.port()))
                .unwrap_or_default(),
            listeners: listeners.collect(),
            table: self
                .capture
                .to_hand_over()
                .map(|(socket, sequence, levels)| LeftRules {
                    socket: socket.as_raw_fd(),
                    sequence,
                    levels: levels.to_vec(),
                }),
            settings: self.config.capture.clone(),
            vip4: self.config.ranges.v4.to_string(),
            vip6: self.config.ranges.v6.to_string(),
            worker: self.worker.as_ref().map(|worker| left(worker, None)),
            draining: draining.map(|d| left(&d.worker, Some(d.until))).collect(),
            workloads: self.applied.clone(),
            standing: self.confirmed.to_hand_over(),
            places: places(self.config),
            config: self.config.config_copy.clone(),
            repaired: self.repaired,
            reloads: self.reloads,
        }
    }

    /// What the other program must find open.
    fn descriptors(&self) -> Vec<BorrowedFd<'_>> {
        let sockets = self.sockets.mesh.iter().chain(&self.sockets.dns_tcp);
        let listeners = self
            .listeners
            .values()
            .flat_map(|l| [&l.v4, &l.v6])
            .flatten();
        let names = self.sockets.dns_udp.iter().map(AsFd::as_fd);
        let draining = self.draining.iter().map(|draining| &draining.worker);
        let workers = self.worker.iter().chain(draining).map(WorkerProcess::link);
        let table = self.capture.to_hand_over().map(|(socket, ..)| socket);
        let own = [self.lasting.lock.as_fd()].into_iter().chain(table);
        let sockets = sockets.chain(listeners).map(AsFd::as_fd);
        sockets.chain(names).chain(workers).chain(own).collect()
    }

    /// Tells how a reload ended: `given_up` says why the program of before goes on.
    fn end_reload(&mut self, given_up: Option<String>) {
        match &given_up {
            None => log::info!("the reload is done: new connections are this program's"),
            Some(why) => {
                log::error!("the reload is given up, and the agent goes on as before: {why}");
            }
        }
        self.reloads += 1;
        self.given_up = given_up;
        self.write_outcome();
    }

    pub(super) fn write_outcome(&self) {
        let outcome = Outcome {
            reloads: self.reloads,
            given_up: self.given_up.clone(),
        };
        let written = serde_json::to_vec(&outcome)
            .map_err(anyhow::Error::from)
            .and_then(|text| Ok(files::write_private(&self.config.outcome_file, &text)?));
        if let Err(error) = written {
            log::warn!("how a reload ended can not be told: {error:#}");
        }
    }

    /// Lets `next` serve in the place of the worker that did.
    fn take_over(&mut self, mut next: WorkerProcess) {
        if let Some(mut old) = self.worker.take() {
            old.signal(Signal::SIGUSR2);
            wait_until_it_lets_go(&mut old);
            self.draining.push(Draining {
                worker: old,
                until: Instant::now() + self.config.handover,
            });
        }
        let too_many = self.draining.len().saturating_sub(DRAINING_MAX);
        for oldest in self.draining.iter_mut().take(too_many) {
            oldest.worker.signal(Signal::SIGTERM);
            oldest.until = oldest.until.min(Instant::now() + self.config.drain);
        }
        let all: Vec<_> = self.listeners.values().collect();
        let told = next.send(&Wire::Serve, &[]);
        if let Err(error) = told.and_then(|()| send_listeners(&mut next, &all)) {
            give_up(&mut next, &error);
        }
        log::info!(worker = next.id(); "the worker takes over");
        self.worker = Some(next);
    }
}

/// It closes its end of the link when it talks to control no more and writes nothing more.
fn wait_until_it_lets_go(worker: &mut WorkerProcess) {
    let until = Instant::now() + LET_GO_MAX;
    while !worker.has_let_go() {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            // Two would speak for one host, and the one that is stuck would hear of no revocation.
            log::error!(
                worker = worker.id();
                "the worker before this one does not let go in {} s and is killed: what it carried is cut",
                LET_GO_MAX.as_secs()
            );
            worker.signal(Signal::SIGKILL);
            return;
        }
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        let mut link = [PollFd::new(worker.link(), PollFlags::POLLIN)];
        // An interruption is no more than an early look.
        let _ = poll(&mut link, timeout);
    }
}

/// What another program left, in use.
pub(super) struct TakenOver {
    confirmed: Confirmed,
    sockets: Sockets,
    listeners: BTreeMap<u16, WorkloadListener>,
    worker: Option<WorkerProcess>,
    draining: Vec<Draining>,
    /// It stands by.
    next: Option<WorkerProcess>,
}

impl TakenOver {
    /// Tries whether we can serve, unless we did before, and then takes the kernel's rules on. Whatever fails: all is as the
    /// other program left it.
    pub(super) fn begin(
        config: &HolderConfig,
        signals: &SignalFd,
        left: &Left,
    ) -> anyhow::Result<(Capture, Self)> {
        let state = &left.state;
        state.fits(config)?;
        privileges::confine_holder().context("could not give up capabilities")?;
        let mut taken = Self::of(config, left).context("what was handed over is not whole")?;
        if left.given_up.is_none() {
            taken.next = Some(trial::run(config, signals, &taken.sockets)?);
        }
        let table = state.table.as_ref().map(|table| {
            Ok::<_, io::Error>(LeftTable {
                socket: left.copy(table.socket)?,
                sequence: table.sequence,
                levels: Some(table.levels.clone()),
            })
        });
        let workloads = converge::workloads(&state.workloads, |n| taken.listeners.get(n));
        let confirmed = &taken.confirmed;
        let contents = Contents {
            workloads: &workloads,
            reals: confirmed.reals(),
            doors: confirmed.wanted(),
            arm: confirmed.arm(),
        };
        let capture = table
            .transpose()
            .map_err(anyhow::Error::from)
            .and_then(|table| {
                let (settings, ranges) = (&config.capture, &config.ranges);
                let taken = Capture::take_on(settings, ranges, table, confirmed.doors(), contents);
                Ok(taken?)
            });
        match capture {
            Ok(capture) => Ok((capture, taken)),
            Err(error) => {
                if let Some(next) = &taken.next {
                    trial::end(next);
                }
                Err(error)
            }
        }
    }

    fn of(config: &HolderConfig, left: &Left) -> anyhow::Result<Self> {
        let state = &left.state;
        let copy = |number: &Option<RawFd>| number.map(|number| left.copy(number)).transpose();
        let mut listeners = BTreeMap::new();
        for listener in &state.listeners {
            let taken = WorkloadListener {
                number: listener.number,
                label: listener.label.clone(),
                v4: copy(&listener.v4)?.map(TcpListener::from),
                v6: copy(&listener.v6)?.map(TcpListener::from),
            };
            listeners.insert(listener.number, taken);
        }
        let worker = |worker: &LeftWorker| -> io::Result<WorkerProcess> {
            let link: OwnedFd = left.copy(worker.link)?;
            let now = Instant::now();
            let started = now.checked_sub(Duration::from_millis(worker.age_ms));
            Ok(WorkerProcess::handed_over(
                worker.pid,
                link,
                started.unwrap_or(now),
            ))
        };
        let draining = state.draining.iter().map(|left| {
            let until = Instant::now() + Duration::from_millis(left.left_ms).min(config.handover);
            let worker = worker(left)?;
            Ok(Draining { worker, until })
        });
        Ok(Self {
            confirmed: Confirmed::handed_over(config, &state.standing)?,
            sockets: Sockets {
                mesh: left.copies(&state.mesh)?,
                dns_udp: left.copies(&state.dns_udp)?,
                dns_tcp: left.copies(&state.dns_tcp)?,
            },
            listeners,
            worker: state.worker.as_ref().map(worker).transpose()?,
            draining: draining.collect::<io::Result<_>>()?,
            next: None,
        })
    }

    /// From here on there is no way back. The descriptors that the other program had go with `left`.
    pub(super) fn finish<'a>(
        self,
        config: &'a HolderConfig,
        lasting: Lasting,
        capture: &'a mut Capture,
        left: Left,
    ) -> Holder<'a> {
        let (sockets, listeners) = (self.sockets, self.listeners);
        let mut holder = Holder::new(config, lasting, capture, self.confirmed, sockets, listeners);
        holder.worker = self.worker;
        holder.draining = self.draining;
        holder.applied.clone_from(&left.state.workloads);
        holder.repaired = left.state.repaired;
        holder.reloads = left.state.reloads;
        holder.ready = true;
        if let Some(next) = self.next {
            holder.take_over(next);
        }
        holder.end_reload(left.given_up.clone());
        drop(left);
        holder
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}
