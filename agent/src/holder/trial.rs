//! A program that took the holder's place tries whether it can serve: it starts a worker of its own, which loads all that
//! it needs and then stands by. Nothing that others see has changed until then, and the program before this one can go on
//! where it stopped.

use std::os::fd::AsFd as _;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use mesh_runtime::notify::Watchdog;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::sys::signalfd::SignalFd;
use nix::unistd::Pid;

use super::HolderConfig;
use super::protocol::{self, Sockets, ToHolder};
use super::worker_process::WorkerProcess;

/// How long a worker may take until it stands by. It reads files and asks nobody.
const STANDBY_MAX: Duration = Duration::from_secs(30);
/// Between two looks at what may have been missed.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// A worker that stands by on these sockets.
pub(super) fn run(
    config: &HolderConfig,
    signals: &SignalFd,
    sockets: &Sockets,
) -> anyhow::Result<WorkerProcess> {
    let mut worker = WorkerProcess::start(&config.worker_arguments)
        .context("its worker could not be started")?;
    let outcome = stands_by(&mut worker, signals, sockets);
    if outcome.is_err() {
        end(&worker);
    }
    outcome.map(|()| worker)
}

fn stands_by(
    worker: &mut WorkerProcess,
    signals: &SignalFd,
    sockets: &Sockets,
) -> anyhow::Result<()> {
    let (wire, descriptors) = protocol::sockets_message(sockets, true);
    let sent = worker.send(&wire, &descriptors);
    sent.context("its worker takes no sockets")?;
    let until = Instant::now() + STANDBY_MAX;
    let mut watchdog = Watchdog::new(Instant::now());
    loop {
        let now = Instant::now();
        watchdog.alive(now);
        match worker.receive() {
            Ok(ToHolder::StandsBy) => return Ok(()),
            Ok(_) => bail!("its worker did not stand by"),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            // Its end says more.
            Err(_) if worker.ended()?.is_none() => {}
            Err(_) => bail!("its worker ended; see the log for what it said"),
        }
        if let Some(ended) = worker.ended()? {
            bail!("its worker ended with {ended}; see the log for what it said");
        }
        let left = until.saturating_duration_since(now);
        if left.is_zero() {
            bail!(
                "its worker was not ready within {} s",
                STANDBY_MAX.as_secs()
            );
        }
        let turn = PollTimeout::try_from(left.min(LOOK_EVERY)).unwrap_or(PollTimeout::MAX);
        let mut waiting = [
            PollFd::new(signals.as_fd(), PollFlags::POLLIN),
            PollFd::new(worker.link(), PollFlags::POLLIN),
        ];
        match poll(&mut waiting, turn) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error).context("its worker can not be waited for"),
        }
        while let Some(info) = signals.read_signal()? {
            let number = i32::try_from(info.ssi_signo).ok();
            let signal = number.and_then(|number| Signal::try_from(number).ok());
            if let Some(signal @ (Signal::SIGTERM | Signal::SIGINT)) = signal {
                // It waits for the program that goes on.
                kill(Pid::this(), signal)?;
                bail!("the agent is to stop");
            }
        }
    }
}

/// Ends a worker that is not needed. After SIGKILL there lies only the kernel's work before the end.
pub(super) fn end(worker: &WorkerProcess) {
    worker.signal(Signal::SIGKILL);
    const MAX: Duration = Duration::from_secs(2);
    let until = Instant::now() + MAX;
    while Instant::now() < until && matches!(worker.ended(), Ok(None)) {
        std::thread::sleep(Duration::from_millis(5));
    }
}
