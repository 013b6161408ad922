//! The table `inet meshwork` as an object of the kernel: made, filled, taken on from another program, removed. What is in it
//! stands in `rules.rs`.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::Duration;

use super::bypass;
use super::door::{self, Arm, DoorPort, Seen};
use super::netlink::{Connection, Message};
use super::nft::{Scribe, batch_bounds, elements_of};
use super::real::{self, Real};
use super::rules::{SHED, Shed, TCP, UDP, contents, frame};
use super::{CaptureSettings, Marks, VipRanges, Workload};

/// One datagram must hold a whole batch: 16,384 elements of maps and 4,096 real addresses of at most 64 bytes, 16,384
/// ranges of at most 96, and the rules.
const BATCH_BYTES: usize = 4 * 1024 * 1024;

/// The owned table. It lives as long as this value: the kernel removes it with the socket.
#[derive(Debug)]
pub(super) struct Table {
    connection: Connection,
    name: String,
    marks: Marks,
    /// Levels for which a map stands; maps are never taken away, only emptied.
    levels: Vec<u8>,
}

/// A table that another program left, with the socket that owns it.
#[derive(Debug)]
pub(crate) struct LeftTable {
    pub(crate) socket: OwnedFd,
    pub(crate) sequence: u32,
    /// Levels for which a map stands in it; `None`: it is not known, and nothing of what is in it is of use.
    pub(crate) levels: Option<Vec<u8>>,
}

/// What the rules decide by.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Contents<'a> {
    pub(crate) workloads: &'a [Workload],
    pub(crate) reals: &'a [Real],
    pub(crate) doors: &'a [DoorPort],
    pub(crate) arm: Arm,
}

impl Table {
    /// Makes the table with no workload in it: every SYN to a virtual address is reset.
    pub(super) fn create(settings: &CaptureSettings, ranges: &VipRanges) -> io::Result<Self> {
        let connection = Connection::open(netlink_sys::protocols::NETLINK_NETFILTER)?;
        connection.reserve_send(BATCH_BYTES)?;
        let mut table = Self {
            connection,
            name: settings.table.clone(),
            marks: settings.marks(),
            levels: Vec::new(),
        };
        let mut messages = vec![Scribe { table: &table.name }.new_table()];
        messages.extend(frame(settings, ranges));
        table.commit(&messages)?;
        Ok(table)
    }

    /// Takes on a table that another program left with its socket, and makes the kernel know these workloads and doors by
    /// our rules in the same moment. What it knows of open connections stays, unless it is of another form.
    pub(super) fn take_on(
        settings: &CaptureSettings,
        ranges: &VipRanges,
        left: LeftTable,
        contents: Contents<'_>,
    ) -> io::Result<Self> {
        let mut table = Self {
            connection: Connection::handed_over(left.socket, left.sequence),
            name: settings.table.clone(),
            marks: settings.marks(),
            levels: Vec::new(),
        };
        table.connection.forget_answers();
        table.connection.reserve_send(BATCH_BYTES)?;
        let frame = frame(settings, ranges);
        let name = table.name.clone();
        let scribe = Scribe { table: &name };
        if let Some(levels) = left.levels {
            table.levels = levels;
            let rules = std::iter::once(scribe.empty_chains()).chain(frame.iter().cloned());
            let Err(error) = table.fill(rules.collect(), &contents) else {
                return Ok(table);
            };
            log::warn!(
                "the rules of the agent before this one are of another form, and are replaced as a whole: {error}; connections \
                 to programs that are open now may end"
            );
            table.levels.clear();
        }
        let anew = [scribe.delete_table(), scribe.new_table()];
        table.fill(anew.into_iter().chain(frame).collect(), &contents)?;
        Ok(table)
    }

    /// For the program that takes our place.
    pub(super) fn to_hand_over(&self) -> (BorrowedFd<'_>, u32, &[u8]) {
        let (socket, sequence) = self.connection.to_hand_over();
        (socket, sequence, &self.levels)
    }

    /// Removes it, whoever else has its socket.
    pub(super) fn remove(mut self) -> io::Result<()> {
        let name = self.name.clone();
        self.commit(&[Scribe { table: &name }.delete_table()])
    }

    /// Makes the kernel know exactly these workloads and doors, all at once.
    pub(super) fn apply(
        &mut self,
        workloads: &[Workload],
        reals: &[Real],
        doors: &[DoorPort],
        arm: Arm,
    ) -> io::Result<()> {
        let contents = Contents {
            workloads,
            reals,
            doors,
            arm,
        };
        self.fill(Vec::new(), &contents)
    }

    /// Commits `messages`, and after them exactly these contents.
    fn fill(&mut self, mut messages: Vec<Message>, new: &Contents<'_>) -> io::Result<()> {
        let workloads = new.workloads;
        let mut levels: Vec<u8> = workloads
            .iter()
            .flat_map(|w| w.cgroups.iter().map(|c| c.level))
            .collect();
        levels.sort_unstable();
        levels.dedup();
        let known = self.levels.clone();
        messages.extend(contents(&self.name, self.marks, &known, &levels, workloads));
        let scribe = Scribe { table: &self.name };
        messages.extend(real::contents(scribe, new.reals));
        messages.extend(door::contents(scribe, new.doors, new.arm));
        self.commit(&messages)?;
        self.levels
            .extend(levels.iter().filter(|level| !known.contains(level)));
        Ok(())
    }

    /// Arms what stands for good.
    pub(super) fn arm(&mut self) -> io::Result<()> {
        let messages = door::armed(Scribe { table: &self.name }, Arm::ForGood);
        self.commit(&messages)
    }

    pub(super) fn bypass(&mut self, left: Option<Duration>) -> io::Result<()> {
        let messages = bypass::contents(Scribe { table: &self.name }, left);
        self.commit(&messages)
    }

    /// Plaintext callers that came lately, and what was shed.
    pub(super) fn seen(&mut self) -> io::Result<(Seen, Shed)> {
        let scribe = Scribe { table: &self.name };
        let seen = door::seen(scribe, &mut self.connection)?;
        let mut shed = Shed::default();
        self.connection
            .query(&scribe.get_elements(SHED), |_, body| {
                for (key, packets) in elements_of(body) {
                    match key {
                        [TCP, ..] => shed.dials = packets,
                        [UDP, ..] => shed.names = packets,
                        _ => {}
                    }
                }
            })?;
        Ok((seen, shed))
    }

    /// The flows in a set: connections to real addresses that are led to the agent.
    pub(super) fn flows(&mut self, set: &str) -> io::Result<Vec<Vec<u8>>> {
        let scribe = Scribe { table: &self.name };
        let mut flows = Vec::new();
        self.connection
            .query(&scribe.get_elements(set), |_, body| {
                flows.extend(elements_of(body).map(|(key, _)| key.to_vec()));
            })?;
        Ok(flows)
    }

    fn commit(&mut self, messages: &[Message]) -> io::Result<()> {
        let (begin, end) = batch_bounds();
        self.connection.batch(&begin, messages, &end)
    }
}

/// Removes a table that nobody owns; an owned one answers with EPERM.
pub(super) fn delete(settings: &CaptureSettings) -> io::Result<()> {
    let mut connection = Connection::open(netlink_sys::protocols::NETLINK_NETFILTER)?;
    let (begin, end) = batch_bounds();
    let scribe = Scribe {
        table: &settings.table,
    };
    connection.batch(&begin, &[scribe.delete_table()], &end)
}
