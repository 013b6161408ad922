//! The task of one service, or of one of its servers: asks when the machine says so, and hears the calls between.

use std::io;
use std::pin::Pin;
use std::time::Instant;

use mesh_core::health::{Check as Number, HealthMachine, Verdict};
use tokio::sync::mpsc;

use super::ask::Asking;
use super::calls::{Counting, Counts};
use super::{Asked, Found, Plan};

pub(super) struct Task {
    pub(super) asked: Asked,
    pub(super) plan: Plan,
    pub(super) generation: u64,
    pub(super) asking: Asking,
    pub(super) report: mpsc::Sender<Found>,
    /// Whether the program took a call.
    pub(super) calls: mpsc::Receiver<bool>,
    pub(super) counting: Counting,
    /// Of the worker before this one.
    pub(super) before: Verdict,
}

/// A check that runs.
type Running = (Number, Pin<Box<dyn Future<Output = io::Result<()>> + Send>>);

impl Task {
    /// Until nobody wants its word any more.
    pub(super) async fn run(mut self) {
        let mut machine = self.machine();
        // Of one without a check nothing is to be found out.
        let mut told = match self.plan.always {
            true => Verdict::Unknown,
            false => machine.verdict(),
        };
        let mut running: Option<Running> = None;
        let mut counts: Option<Counts> = None;
        let mut why = String::new();
        loop {
            let due = machine.poll_timeout();
            tokio::select! {
                biased;
                (number, result) = end_of(&mut running) => {
                    running = None;
                    self.asking.count(&self.plan.check.kind, result.is_ok());
                    machine.handle_result(number, result.is_ok());
                    why = result.err().map_or_else(String::new, |error| error.to_string());
                }
                () = until(due) => {
                    let started = machine.handle_timeout(Instant::now());
                    if running.is_some() {
                        self.asking.count(&self.plan.check.kind, false);
                        why = format!("no answer within {} s", self.plan.check.timeout_s);
                    }
                    // One that runs still is given up.
                    running = started.map(|number| (number, self.asking.ask(&self.plan.check, self.asked.beyond)));
                }
                taken = self.calls.recv() => {
                    let Some(taken) = taken else {
                        return;
                    };
                    let listed = machine.verdict();
                    machine.handle_call(taken, Instant::now());
                    if machine.verdict() != listed {
                        self.asking.count_calls();
                        why = "its program takes no calls".to_owned();
                    }
                    counts = machine.counts_calls().then(|| counts.take().unwrap_or_else(|| self.counting.begin()));
                }
            }
            if !why.is_empty() && machine.verdict() == told {
                log::debug!("the health check of {} failed: {why}", self.asked);
            }
            if machine.verdict() != told {
                told = machine.verdict();
                self.log(told, &why);
                let found = Found {
                    asked: self.asked.clone(),
                    generation: self.generation,
                    verdict: told,
                };
                if self.report.send(found).await.is_err() {
                    return;
                }
            }
            why.clear();
        }
    }

    fn machine(&self) -> HealthMachine {
        let now = Instant::now();
        let thresholds = self.plan.thresholds();
        if self.plan.always {
            return HealthMachine::new(thresholds, now);
        }
        let mut machine = HealthMachine::unchecked(thresholds, now);
        if self.before == Verdict::Unhealthy {
            machine.unlist(now);
        }
        machine
    }

    fn log(&self, verdict: Verdict, why: &str) {
        let verdict = verdict.as_str();
        match why {
            "" => log::info!("{} is {verdict}", self.asked),
            _ => log::info!("{} is {verdict}: {why}", self.asked),
        }
    }
}

async fn end_of(running: &mut Option<Running>) -> (Number, io::Result<()>) {
    match running {
        Some((number, check)) => (*number, check.await),
        None => std::future::pending().await,
    }
}

async fn until(due: Option<Instant>) {
    match due {
        Some(due) => tokio::time::sleep_until(due.into()).await,
        None => std::future::pending().await,
    }
}
