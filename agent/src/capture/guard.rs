//! The guard: a table that nobody owns, which goes on refusing what must be mTLS when the agent and its own table are
//! gone. It stands behind the table of the agent and knows only what was confirmed: while the agent runs, the door has
//! refused already what comes in by here, and calls to real addresses are marked when they come by on their way out.

use std::io;
use std::time::Duration;

use mesh_core::policy::Cidr;

use super::bypass;
use super::door::{DoorPort, caller, from_elsewhere, ranges};
use super::netlink::{Connection, Message, errno_of};
use super::nft::{
    Compare, Hook, Meta, R0, Scribe, SetShape, Steps, Type, batch_bounds, generation_of,
    get_generation,
};
use super::real::{self, Real};
use super::rules::{IPV4, IPV6, family, tcp};
use super::{CaptureSettings, Marks, guard_table};

const STRICT_PORTS: &str = "strict_ports";
const GUARD: &str = "guard";
const GUARD_OUT: &str = "guard_out";
const SETS: [(u8, Type, &str); 2] = [(IPV4, Type::Ipv4, "from4"), (IPV6, Type::Ipv6, "from6")];
/// Room for one datagram with all of it.
const BATCH_BYTES: usize = 4 * 1024 * 1024;

/// At 64 bytes each they are a quarter of that.
const FLOWS_PER_BATCH: usize = 16_384;

/// The guard as it was written last.
#[derive(Debug)]
pub(super) struct Guard {
    connection: Connection,
    table: String,
    marks: Marks,
    priority: i32,
    out_priority: i32,
    doors: Vec<DoorPort>,
    reals: Vec<Real>,
    /// What the kernel's count of changes of any table was with our last one.
    generation: Option<u32>,
}

impl Guard {
    pub(super) fn open(settings: &CaptureSettings) -> io::Result<Self> {
        let connection = Connection::open(netlink_sys::protocols::NETLINK_NETFILTER)?;
        connection.reserve_send(BATCH_BYTES)?;
        Ok(Self {
            connection,
            table: guard_table(settings),
            marks: settings.marks(),
            priority: settings.input_priority + 1,
            out_priority: settings.output_priority + 1,
            doors: Vec::new(),
            reals: Vec::new(),
            generation: None,
        })
    }

    /// Makes it refuse exactly what is `strict` of these; `None`: the same real addresses as before.
    pub(super) fn write(&mut self, doors: &[DoorPort], reals: Option<&[Real]>) -> io::Result<()> {
        let doors = doors.iter().filter(|d| d.strict.is_some());
        let doors: Vec<DoorPort> = doors.cloned().collect();
        let reals = match reals {
            None => self.reals.clone(),
            Some(reals) => reals.iter().filter(|r| r.strict).cloned().collect(),
        };
        if self.generation.is_some() && (&doors, &reals) == (&self.doors, &self.reals) {
            return Ok(());
        }
        (self.doors, self.reals) = (doors, reals);
        self.generation = None;
        self.rewrite()
    }

    /// Puts it back if another program changed the kernel's tables since. True if it was gone.
    pub(super) fn repair(&mut self) -> io::Result<bool> {
        let now = self.now()?;
        if self.generation.is_some() && now == self.generation {
            return Ok(false);
        }
        let scribe = Scribe { table: &self.table };
        let gone = match self.connection.query(&scribe.get_table(), |_, _| {}) {
            Ok(()) => false,
            Err(error) if errno_of(&error) == Some(libc::ENOENT) => true,
            Err(error) => return Err(error),
        };
        self.rewrite()?;
        Ok(gone)
    }

    fn now(&mut self) -> io::Result<Option<u32>> {
        let mut generation = None;
        self.connection.query(&get_generation(), |_, body| {
            generation = generation_of(body)
        })?;
        Ok(generation)
    }

    /// Writes all of it but the connections under way, which it goes on knowing. Where what stands is not ours any more
    /// (another program changed sets or hooks) it is replaced as a whole.
    fn rewrite(&mut self) -> io::Result<()> {
        self.commit(false).or_else(|_| self.commit(true))
    }

    fn commit(&mut self, anew: bool) -> io::Result<()> {
        let scribe = Scribe { table: &self.table };
        // What stands is replaced in the same moment.
        let mut messages = vec![scribe.unowned_table()];
        if anew {
            messages.extend([scribe.delete_table(), scribe.unowned_table()]);
        }
        messages.extend([
            bypass::set(scribe, 20),
            scribe.new_hook(GUARD, "filter", Hook::Input, self.priority),
            scribe.new_hook(GUARD_OUT, "filter", Hook::Output, self.out_priority),
            scribe.empty_chain(GUARD),
            scribe.empty_chain(GUARD_OUT),
        ]);
        messages.extend(self.inwards(scribe));
        messages.extend(self.outwards(scribe));
        self.send(&messages)
    }

    /// Makes it know connections under way that the agent's own table knows, after it was gone.
    pub(super) fn learn(&mut self, set: &str, flows: &[Vec<u8>]) -> io::Result<()> {
        let table = self.table.clone();
        let scribe = Scribe { table: &table };
        let mut batches = flows.chunks(FLOWS_PER_BATCH);
        batches.try_for_each(|flows| self.send(&scribe.members(set, flows)))
    }

    pub(super) fn bypass(&mut self, left: Option<Duration>) -> io::Result<()> {
        let table = self.table.clone();
        self.send(&bypass::contents(Scribe { table: &table }, left))
    }

    fn send(&mut self, messages: &[Message]) -> io::Result<()> {
        let before = self.now()?;
        let (begin, end) = batch_bounds();
        self.connection.batch(&begin, messages, &end)?;
        // Ours was the next change. Had it been asked for afterwards, it might be that of a program which took it away.
        self.generation = before.map(next_generation);
        Ok(())
    }

    /// Plaintext callers of local programs.
    fn inwards(&self, scribe: Scribe<'_>) -> Vec<Message> {
        let mut messages = vec![
            scribe.new_set(SetShape::plain(STRICT_PORTS, 1, &[Type::Port], None)),
            scribe.empty_set(STRICT_PORTS),
        ];
        let ports = self.doors.iter().map(|d| d.port.to_be_bytes().to_vec());
        messages.extend(scribe.members(STRICT_PORTS, &ports.collect::<Vec<_>>()));
        let mut rules = from_elsewhere(STRICT_PORTS, self.marks);
        rules.push(bypass::if_open(Steps::default()).back());
        for (id, (version, address, name)) in (2..).zip(SETS) {
            messages.push(scribe.new_set(SetShape {
                ranges: true,
                ..SetShape::plain(name, id, &[address, Type::Port], None)
            }));
            messages.push(scribe.empty_set(name));
            let excepted = ranges(&self.doors, version, |door| {
                door.strict.as_deref().unwrap_or_default()
            });
            messages.extend(scribe.ranges(name, &excepted));
            let known = caller(family(Steps::default(), version), version);
            rules.push(known.only_if_in(name, R0).back());
        }
        rules.push(Steps::default().reject_with_reset());
        messages.extend(rules.iter().map(|steps| scribe.new_rule(GUARD, steps)));
        messages
    }

    /// Calls of local programs to real addresses. Those that were led to the agent, and no more are, are refused
    /// whatever their service's transport is: what was begun as mTLS does not go on in plaintext.
    fn outwards(&self, scribe: Scribe<'_>) -> Vec<Message> {
        let mut messages = Vec::new();
        let mut rules = vec![tcp(Steps::default(), Compare::NotEqual).back()];
        for (id, names) in (10..).step_by(2).zip(&real::FAMILIES) {
            messages.extend(names.sets(scribe, id));
            messages.push(scribe.empty_set(names.real));
            messages.extend(scribe.members(names.real, &real::keys(names, self.reals.iter())));
            rules.extend([
                names.note(self.marks.carried(), false).back(),
                names.note(self.marks.carried_over(), true).back(),
            ]);
        }
        let (value, mask) = self.marks.to_loopback();
        rules.push(
            Steps::default()
                .meta(Meta::Mark, R0)
                .mask(R0, &mask.to_ne_bytes())
                .compare(R0, Compare::Equal, &value.to_ne_bytes())
                .back(),
        );
        for names in &real::FAMILIES {
            rules.extend([
                bypass::if_closed(names.beginning()).reject_with_reset(),
                names.forgetting(),
                names.following().reject_with_reset(),
            ]);
        }
        messages.extend(rules.iter().map(|steps| scribe.new_rule(GUARD_OUT, steps)));
        messages
    }
}

/// The kernel leaves out 0.
const fn next_generation(generation: u32) -> u32 {
    match generation.wrapping_add(1) {
        0 => 1,
        next => next,
    }
}

/// Removes the guard, if it stands.
pub(super) fn delete(settings: &CaptureSettings) -> io::Result<()> {
    let mut connection = Connection::open(netlink_sys::protocols::NETLINK_NETFILTER)?;
    let table = guard_table(settings);
    let scribe = Scribe { table: &table };
    let (begin, end) = batch_bounds();
    match connection.batch(&begin, &[scribe.delete_table()], &end) {
        Err(error) if errno_of(&error) == Some(libc::ENOENT) => Ok(()),
        other => other,
    }
}

/// What the guard may refuse while `next` is not confirmed: what both refuse.
pub(super) fn meanwhile(confirmed: &[DoorPort], next: &[DoorPort]) -> Vec<DoorPort> {
    let both = confirmed.iter().filter_map(|old| {
        let new = next.iter().find(|new| new.port == old.port)?;
        let (old_from, new_from) = (old.strict.as_ref()?, new.strict.as_ref()?);
        let from: Vec<Cidr> = old_from.iter().chain(new_from).copied().collect();
        Some(DoorPort {
            port: old.port,
            strict: Some(from),
            ..DoorPort::default()
        })
    });
    both.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn until_it_is_confirmed_the_guard_refuses_no_more_than_before_and_no_more_than_after() {
        let door = |port, strict: Option<&[&str]>| DoorPort {
            port,
            strict: strict.map(|all| all.iter().map(|r| Cidr::parse(r).unwrap()).collect()),
            ..DoorPort::default()
        };
        let before = [
            door(1, Some(&["10.0.0.0/8"])),
            door(2, Some(&[])),
            door(3, None),
        ];
        let after = [
            door(1, Some(&["192.168.0.0/16"])),
            door(2, None),
            door(3, Some(&[])),
        ];
        let between = meanwhile(&before, &after);
        assert_eq!(between, [door(1, Some(&["10.0.0.0/8", "192.168.0.0/16"]))]);
    }

    #[test]
    fn the_change_after_the_last_is_not_counted_as_none() {
        assert_eq!(next_generation(7), 8);
        assert_eq!(next_generation(u32::MAX), 1);
    }
}
