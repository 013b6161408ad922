//! Makes the kernel what the worker wants, after checking it, and keeps it so.

use std::collections::BTreeMap;
use std::io;
use std::net::TcpListener;
use std::time::Instant;

use mesh_runtime::notify;

use super::protocol::{Desired, DesiredWorkload, Looked, Wire, WorkloadListener};
use super::worker_process::WorkerProcess;
use super::{BYPASS_EVERY, COMMON, Holder, REPAIR_EVERY, desired, send_listeners, sockets, stored};
use crate::bypass::{self, Bypass};
use crate::capture::Workload;
use crate::capture::door::{Arm, DoorPort};

impl Holder<'_> {
    pub(super) fn look(&mut self, worker: &mut WorkerProcess) -> io::Result<()> {
        let mut looked = Looked {
            arming: self.confirmed.arming(),
            repaired: self.repaired,
            error: self
                .repair_error
                .as_ref()
                .or(self.settle_error.as_ref())
                .cloned(),
            draining: self.draining.len(),
            given_up: self.given_up.clone(),
            bypass: self.bypass.clone(),
            ..Looked::default()
        };
        match self.capture.seen() {
            Ok((seen, shed)) => (looked.seen, looked.shed) = (seen, shed),
            Err(error) => looked.error = Some(format!("{:#}", anyhow::Error::new(error))),
        }
        worker.send(&Wire::Looked(looked), &[])
    }

    pub(super) fn reached(&mut self, generation: u64) {
        self.confirmed.reached(generation);
        self.settle();
    }

    /// Makes what was confirmed hold for good, and keeps it. What fails is tried again with the next look at the rules.
    pub(super) fn settle(&mut self) {
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
    pub(super) fn repair_if_due(&mut self, now: Instant) {
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

    /// Opens the host to plaintext, or closes it, as `mesh-agent bypass` wrote down.
    pub(super) fn heed_bypass(&mut self, now: Instant) {
        if now < self.bypass_at {
            return;
        }
        self.bypass_at = now + BYPASS_EVERY;
        let read = bypass::read(&self.config.bypass_file);
        let bypass = read.unwrap_or_else(|error| {
            if self.opened != Some(false) {
                log::error!("{error:#}");
            }
            None
        });
        let left = bypass.as_ref().and_then(Bypass::left);
        // While it is open the rules may have been made anew, and closed.
        if left.is_none() && self.opened == Some(false) {
            return;
        }
        if let Err(error) = self.capture.bypass(left) {
            log::error!(
                "{:#}; it is tried again in {} s",
                anyhow::Error::new(error),
                BYPASS_EVERY.as_secs()
            );
            return;
        }
        match (&bypass, left) {
            (Some(new), Some(left)) if self.opened != Some(true) || bypass != self.bypass => {
                log::warn!(
                    by = new.by.as_str(), why = new.why.as_str();
                    "this host is open to plaintext for {} s", left.as_secs()
                );
            }
            (_, None) if self.opened == Some(true) => {
                log::warn!("this host is closed to plaintext again")
            }
            _ => {}
        }
        self.opened = Some(left.is_some());
        self.bypass = bypass;
    }

    /// Makes listeners and rules what the worker wants, or leaves all as it is and says why.
    pub(super) fn converge(
        &mut self,
        worker: &mut WorkerProcess,
        desired: &Desired,
    ) -> io::Result<()> {
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
        let (mut made, mut new) = (BTreeMap::new(), Vec::new());
        for wanted in &desired.workloads {
            let (number, label) = (wanted.number, &wanted.label);
            let stands = self.listeners.get(&number);
            if stands.is_some_and(|l| l.label == *label) {
                continue;
            }
            // A worker before this one may have counted otherwise: who waits in the queue must not be cut for that.
            let moved = self.listeners.values().find(|l| l.label == *label);
            let listener = match moved {
                Some(listener) => numbered(listener, number)?,
                None => {
                    new.push(number);
                    sockets::workload(number, label, self.config.capture.enabled)?
                }
            };
            made.insert(number, listener);
        }
        let listener = |number: &u16| made.get(number).or_else(|| self.listeners.get(number));
        let workloads = workloads(&desired.workloads, listener);
        let arm = self.confirmed.arm_of(&doors);
        let gateways = self.confirmed.gateways(arm, self.capture);
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
            .applied(desired.generation, doors, reals, arm, gateways);
        self.settle();
        self.applied.clone_from(&desired.workloads);
        for listener in made.values() {
            if let Some(replaced) = self.listeners.get(&listener.number) {
                stored::unstore_listener(replaced);
            }
            stored::store_listener(listener);
        }
        self.listeners.extend(made);
        // Closing our copy of what is no more wanted leaves the worker's, until it closes that too.
        self.listeners.retain(|number, listener| {
            let wanted = workloads.iter().any(|w| w.number == *number);
            if !wanted {
                stored::unstore_listener(listener);
            }
            wanted
        });
        Ok(new)
    }
}

/// These and the common one, as the kernel is to know them.
pub(super) fn workloads<'a>(
    wanted: &[DesiredWorkload],
    listener: impl Fn(&u16) -> Option<&'a WorkloadListener>,
) -> Vec<Workload> {
    let common = (COMMON, Vec::new(), Vec::new(), Vec::new());
    let wanted = wanted.iter();
    let wanted = wanted.map(|w| {
        let (cgroups, uids) = (w.cgroups.clone(), w.uids.clone());
        (w.number, cgroups, uids, w.addresses.clone())
    });
    let all = std::iter::once(common).chain(wanted);
    let all = all.map(|(number, cgroups, uids, addresses)| {
        let (port4, port6) = listener(&number).map_or((None, None), ports);
        Workload {
            number,
            cgroups,
            uids,
            addresses,
            port4,
            port6,
        }
    });
    all.collect()
}

/// The same listener under another number.
fn numbered(listener: &WorkloadListener, number: u16) -> io::Result<WorkloadListener> {
    let copy = |socket: &Option<TcpListener>| {
        let socket = socket.as_ref();
        socket.map(TcpListener::try_clone).transpose()
    };
    Ok(WorkloadListener {
        number,
        label: listener.label.clone(),
        v4: copy(&listener.v4)?,
        v6: copy(&listener.v6)?,
    })
}

fn ports(listener: &WorkloadListener) -> (Option<u16>, Option<u16>) {
    let port = |socket: &Option<TcpListener>| {
        let address = socket.as_ref()?.local_addr().ok()?;
        Some(address.port())
    };
    (port(&listener.v4), port(&listener.v6))
}
