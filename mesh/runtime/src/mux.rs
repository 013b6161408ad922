//! The stream layer over a carrier: many streams on one connection, everything that is ready in a turn of the
//! loop written at once. The rules are in [`mesh_core::stream`]; here are the bytes.
//!
//! A connection and its streams live on one thread. One task runs the [`Driver`]; it alone touches the carrier.
//! A stream's writer appends to the shared output and wakes the driver, which runs after all else that is ready,
//! so what several streams wrote leaves in one system call.

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use mesh_api::frame;
use mesh_core::reason::Reason;
use mesh_core::stream::{Event, Frame, Machine, OpenError, Side, Streams, Violation};

mod budget;
mod driver;
mod opener;
mod received;
mod settings;
mod slot;
mod stream;

pub use budget::{Budget, is_for_others};
use opener::Opener;
use slot::{Slot, wake};

pub use driver::Driver;
pub use settings::{Bound, KEEPALIVE, Settings};
pub use stream::{MuxStream, StreamError};

/// What one stream may add to the output before it has left: a bulk transfer leaves room for others.
const QUANTUM: usize = 128 * 1024;
/// All output that waits for the carrier. Above it every stream waits. What is more than the carrier takes at once
/// only gets cold.
const OUTPUT_MAX: usize = 256 * 1024;

/// A connection, as those see it who open streams.
#[derive(Clone, Debug)]
pub struct Mux(Rc<RefCell<Shared>>);

/// What a new stream meets on a connection, the best first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Room {
    /// Nothing in its way; the hello may still be under way.
    Free,
    /// Readers that stand still hold half of the credit, in either direction: its share is small.
    Starved,
    /// As many streams as the peer bears: it waits until one is over.
    Full,
    /// No stream is opened any more.
    Over,
}

/// The streams that the peer opens.
#[derive(Debug)]
pub struct Incoming(Rc<RefCell<Shared>>);

#[derive(Debug)]
struct Shared {
    machine: Machine,
    max_frame: u32,
    max_streams: usize,
    /// What waits for the carrier; up to `written` it is gone already.
    output: Vec<u8>,
    written: usize,
    /// A round ends when what was queued at its begin has left; [`QUANTUM`] is a stream's share of one.
    round: u64,
    /// Of `output`, what is queued from before this round.
    round_end: usize,
    /// The last data frame of [`Self::output`]: its stream and where it begins, while none of it has left.
    last_data: Option<(u32, usize)>,
    /// A stream waits because the output is full.
    was_full: bool,
    slots: Streams<Slot>,
    /// Who waits for a new round, for room in the output or for credit of the connection.
    waiting: BTreeMap<Place, Waiter>,
    tickets: u64,
    /// What a stream has had, in bytes, that was served whenever it was its turn.
    fair: u64,
    /// How many waited when writers were last woken.
    contenders: u64,
    incoming: VecDeque<(u32, Vec<u8>)>,
    accepting: Option<Waker>,
    /// Who waits for room among the streams, or for the hello; who came first has its turn first.
    opening: BTreeMap<u64, Waker>,
    /// Who is at opening a stream, woken or not.
    openers: usize,
    /// Turns that were given to openers, and not taken yet.
    turns: usize,
    driver: Option<Waker>,
    /// Set once; nothing happens afterwards.
    closed: Option<Reason>,
    ended_by: Option<Bound>,
    /// The owner wants the carrier closed when the output has left.
    closing: bool,
    /// The owner wants the carrier closed when the last stream is over.
    retired: bool,
    /// The owner ended it: nothing of the peer is heard any more.
    ended: bool,
    heard: bool,
    /// Received by all streams and not read yet.
    unread: usize,
    share: budget::Share,
}

/// A place among those who wait: first comes who has had least of late, then who waits longest. So a small call
/// does not stand behind all bulk transfers, however many there are, and they do not stand behind all small calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Place {
    had: u64,
    ticket: u64,
}

#[derive(Debug)]
enum Waiter {
    /// The writer of this stream.
    Stream(u32),
    Open(Waker),
}

/// A connection over `carrier`, with the driver that must be run on this thread.
pub fn connection<C>(
    carrier: C,
    side: Side,
    settings: impl Into<Settings>,
) -> (Mux, Incoming, Driver<C>) {
    let Settings {
        limits,
        keepalive,
        budget,
    } = settings.into();
    let shared = Rc::new(RefCell::new(Shared {
        machine: Machine::new(side, limits),
        max_frame: limits.max_frame,
        max_streams: limits.max_streams as usize,
        output: Vec::new(),
        written: 0,
        round: 1,
        round_end: 0,
        last_data: None,
        was_full: false,
        slots: Streams::default(),
        waiting: BTreeMap::new(),
        tickets: 0,
        fair: 0,
        contenders: 1,
        incoming: VecDeque::new(),
        accepting: None,
        opening: BTreeMap::new(),
        openers: 0,
        turns: 0,
        driver: None,
        closed: None,
        ended_by: None,
        closing: false,
        retired: false,
        ended: false,
        heard: false,
        unread: 0,
        share: budget::Share::of(budget),
    }));
    let driver = Driver::new(carrier, Rc::clone(&shared), keepalive);
    (
        Mux(Rc::clone(&shared)),
        Incoming(Rc::clone(&shared)),
        driver,
    )
}

impl Mux {
    /// Opens a stream; waits for the peer's hello and for room among its streams.
    ///
    /// # Errors
    /// Why the connection takes no new stream.
    pub async fn open(&self, header: &[u8]) -> Result<MuxStream, Reason> {
        let mut opener = Opener::begin(&self.0);
        poll_fn(|cx| self.poll_open(cx, header, &mut opener)).await
    }

    fn poll_open(
        &self,
        cx: &Context<'_>,
        header: &[u8],
        opener: &mut Opener<'_>,
    ) -> Poll<Result<MuxStream, Reason>> {
        let mut shared = self.0.borrow_mut();
        if let Some(reason) = shared.closed {
            let told = shared.machine.can_open() == Err(OpenError::GoingAway);
            return Poll::Ready(Err(match reason {
                // It said that it goes before it went.
                Reason::PeerLost if told => Reason::Draining,
                reason => reason,
            }));
        }
        if shared.output.len() - shared.written >= OUTPUT_MAX {
            shared.was_full = true;
            let place = *opener.place.get_or_insert_with(|| shared.next_place(0));
            let waiter = Waiter::Open(cx.waker().clone());
            shared.waiting.insert(place, waiter);
            return Poll::Pending;
        }
        let turn = opener.takes_turn(&mut shared);
        let opened = match shared.unclaimed() {
            // Whoever comes anew takes nobody's turn.
            Ok(0) if !turn => Err(OpenError::TooMany),
            _ => shared.machine.open(),
        };
        match opened {
            Ok(id) => {
                // What the machine has to say comes before the stream.
                shared.take_control();
                frame::encode(&Frame::Open { stream: id, header }, &mut shared.output);
                shared.slots.insert(id, Slot::default());
                shared.wake_driver();
                Poll::Ready(Ok(MuxStream::new(Rc::clone(&self.0), id)))
            }
            Err(OpenError::GoingAway) => Poll::Ready(Err(Reason::Draining)),
            Err(OpenError::NotReady | OpenError::TooMany) => {
                opener.wait(&mut shared, cx.waker());
                Poll::Pending
            }
        }
    }

    /// Why the connection is over, if it is.
    pub fn closed(&self) -> Option<Reason> {
        self.0.borrow().closed
    }

    /// The bound that ended the connection, if one did.
    pub fn ended_by(&self) -> Option<Bound> {
        self.0.borrow().ended_by
    }

    /// What a stream that were opened now would meet.
    pub fn room(&self) -> Room {
        let shared = self.0.borrow();
        if shared.closed.is_some() || shared.closing || shared.retired {
            return Room::Over;
        }
        match shared.unclaimed() {
            Ok(0) | Err(OpenError::TooMany) => Room::Full,
            Ok(_) if shared.machine.is_starved() => Room::Starved,
            Ok(_) => Room::Free,
            // How many it bears is not known yet: as many as we do, mostly.
            Err(OpenError::NotReady) if shared.openers >= shared.max_streams => Room::Full,
            Err(OpenError::NotReady) => Room::Free,
            Err(OpenError::GoingAway) => Room::Over,
        }
    }

    /// Whether the peer said hello.
    pub fn is_ready(&self) -> bool {
        self.0.borrow().machine.can_open() != Err(OpenError::NotReady)
    }

    /// Streams that are open in at least one direction.
    pub fn open_streams(&self) -> usize {
        self.0.borrow().machine.open_streams()
    }

    /// Whether nobody has, or waits for, a stream on it.
    pub fn is_idle(&self) -> bool {
        let shared = self.0.borrow();
        let fresh = matches!(shared.machine.can_open(), Err(OpenError::NotReady));
        shared.machine.open_streams() == 0
            && shared.openers == 0
            && shared.waiting.is_empty()
            && !fresh
    }

    /// Takes no new streams, and closes the connection with the last one.
    pub fn retire(&self, reason: Reason) {
        let mut shared = self.0.borrow_mut();
        shared.retired = true;
        shared.machine.go_away(reason);
        shared.give_turns();
        shared.wake_driver();
    }

    /// Ends the connection with all its streams at once, at both ends, for `reason`. What was written may be lost.
    pub fn end(&self, reason: Reason) {
        self.0.borrow_mut().end_all(reason);
    }

    /// Closes the connection when what was written has left.
    pub fn close(&self) {
        let mut shared = self.0.borrow_mut();
        shared.closing = true;
        shared.wake_driver();
    }
}

impl Incoming {
    /// The next stream that the peer opened, with its header's bytes. `None` when the connection is over.
    pub async fn next(&mut self) -> Option<(MuxStream, Vec<u8>)> {
        poll_fn(|cx| {
            let mut shared = self.0.borrow_mut();
            while let Some((id, header)) = shared.incoming.pop_front() {
                // Opened and reset before anybody looked: nothing was asked.
                if shared
                    .slots
                    .get(&id)
                    .is_none_or(|slot| slot.reset.is_some())
                {
                    shared.drop_stream(id, Reason::Cancelled);
                    continue;
                }
                let stream = MuxStream::new(Rc::clone(&self.0), id);
                return Poll::Ready(Some((stream, header)));
            }
            if shared.closed.is_some() {
                return Poll::Ready(None);
            }
            shared.accepting = Some(cx.waker().clone());
            Poll::Pending
        })
        .await
    }
}

impl Shared {
    fn wake_driver(&self) {
        if let Some(waker) = &self.driver {
            waker.wake_by_ref();
        }
    }

    fn end_all(&mut self, reason: Reason) {
        for (stream, slot) in &mut self.slots {
            self.machine.reset(*stream, reason);
            slot.end_by(reason);
        }
        self.machine.go_away(reason);
        self.ended = true;
        self.close(reason);
        self.wake_driver();
    }

    /// Whether the owner wants no more of the connection.
    fn is_over(&self) -> bool {
        self.closing || (self.retired && self.machine.open_streams() == 0)
    }

    /// Tells the budget what is held now; true when it must not grow like that. Output is told in the driver's turn,
    /// which follows all that writes.
    fn note_held(&mut self) -> bool {
        self.share
            .note(self.unread + self.output.len() - self.written)
    }

    fn take_control(&mut self) {
        while let Some(frame) = self.machine.poll_control() {
            frame::encode(&frame, &mut self.output);
        }
    }

    /// How much `stream` may send in one frame now; nothing while its share of this round is used up.
    fn allowance(&mut self, stream: u32) -> usize {
        if self.output.len() - self.written >= OUTPUT_MAX {
            self.was_full = true;
            return 0;
        }
        let capacity = self.machine.send_capacity(stream);
        let round = self.round;
        let Some(slot) = self.slots.get_mut(&stream) else {
            return 0;
        };
        if slot.round != round {
            slot.round = round;
            slot.sent_in_round = 0;
        }
        capacity.min(QUANTUM.saturating_sub(slot.sent_in_round))
    }

    /// A data frame of `bytes` that was appended at `at`.
    fn note_sent(&mut self, stream: u32, bytes: usize, at: usize) {
        self.last_data = Some((stream, at));
        self.machine.sent(stream, bytes, false);
        if let Some(slot) = self.slots.get_mut(&stream) {
            slot.sent_in_round += bytes;
            slot.place = None;
            // What was sent while nobody waited is held against a stream up to one share only.
            let had = slot.had.max(self.fair) + bytes as u64;
            self.fair += bytes as u64 / self.contenders;
            slot.had = had.min(self.fair + QUANTUM as u64);
        }
        self.wake_driver();
    }

    /// Ends our direction of a stream: with its last frame, if that has not left, else with one of its own.
    fn end(&mut self, stream: u32) {
        if !self.machine.can_end(stream) {
            return;
        }
        self.take_control();
        match self.last_data {
            Some((last, at)) if last == stream => frame::set_end(&mut self.output[at..]),
            _ => self.output.extend(frame::data_prefix(stream, 0, true)),
        }
        self.last_data = None;
        self.machine.sent(stream, 0, true);
        if let Some(slot) = self.slots.get_mut(&stream) {
            slot.place = None;
        }
        self.give_turns();
        self.wake_driver();
    }

    /// The carrier took `bytes` more. What has left is not kept: a connection that is never idle must not grow.
    fn note_written(&mut self, bytes: usize) {
        self.written += bytes;
        self.last_data = None;
        let pending = self.output.len() - self.written;
        if pending == 0 {
            self.output.clear();
            self.forget_written(self.written);
        } else if self.written >= QUANTUM && self.written >= pending {
            self.output.drain(..self.written);
            self.forget_written(self.written);
        }
        if self.written >= self.round_end {
            self.round += 1;
            self.round_end = self.output.len();
            self.wake_writers();
        } else if self.was_full && pending < OUTPUT_MAX / 2 {
            self.wake_writers();
        }
    }

    fn forget_written(&mut self, bytes: usize) {
        self.round_end = self.round_end.saturating_sub(bytes);
        self.written = 0;
    }

    fn wake_writers(&mut self) {
        self.was_full = false;
        // Woken twice in a turn, most have not come back yet: they are still there.
        let still = self.contenders.saturating_sub(1).max(1);
        self.contenders = still.max(self.waiting.len() as u64);
        for waiter in std::mem::take(&mut self.waiting).into_values() {
            match waiter {
                Waiter::Open(waker) => waker.wake(),
                Waiter::Stream(id) => {
                    if let Some(slot) = self.slots.get_mut(&id) {
                        wake(&mut slot.writer);
                    }
                }
            }
        }
    }

    /// The place of one who begins to wait now and has had so much.
    fn next_place(&mut self, had: u64) -> Place {
        self.tickets += 1;
        Place {
            had: had.max(self.fair),
            ticket: self.tickets,
        }
    }

    /// The writer of `stream` waits until [`Self::wake_writers`] or until credit of its own comes.
    fn wait_to_write(&mut self, stream: u32, waker: &Waker) {
        let had = self.slots.get(&stream).map_or(0, |slot| slot.had);
        let next = self.next_place(had);
        if let Some(slot) = self.slots.get_mut(&stream) {
            slot.writer = Some(waker.clone());
            let place = *slot.place.get_or_insert(next);
            self.waiting.insert(place, Waiter::Stream(stream));
        }
    }

    fn close(&mut self, reason: Reason) {
        if self.closed.is_some() {
            return;
        }
        self.closed = Some(reason);
        self.incoming.clear();
        for (id, slot) in &mut self.slots {
            // What is whole in both directions is only to be read yet.
            if !slot.ended || self.machine.can_end(*id) {
                slot.end_by(reason);
            }
        }
        wake(&mut self.accepting);
        self.wake_writers();
        self.give_turns();
    }

    /// Takes one frame of the peer.
    fn handle(&mut self, frame: &Frame<'_>) -> Result<(), Reason> {
        let event = self.machine.handle(frame).map_err(|violation| {
            if violation == Violation::ControlFlood {
                self.ended_by = Some(Bound::Control);
            }
            log::warn!("the peer broke the rules of the stream layer: {violation}");
            Reason::ProtocolError
        })?;
        match event {
            Event::None | Event::Pong { .. } => (),
            Event::Ready => self.give_turns(),
            Event::Opened { stream } => {
                self.slots.insert(stream, Slot::default());
                if let Frame::Open { header, .. } = frame {
                    self.incoming.push_back((stream, header.to_vec()));
                }
                wake(&mut self.accepting);
            }
            Event::Accepted { stream } => {
                if let Some(slot) = self.slots.get_mut(&stream) {
                    slot.accepted = true;
                    wake(&mut slot.reader);
                }
            }
            Event::Data { stream, end } => {
                let Frame::Data { data, .. } = frame else {
                    return Ok(());
                };
                match self.slots.get_mut(&stream) {
                    Some(slot) => {
                        slot.received.push(data);
                        self.unread += data.len();
                        slot.ended |= end;
                        wake(&mut slot.reader);
                    }
                    None => self.machine.consumed(stream, data.len()),
                }
                if end {
                    self.give_turns();
                }
            }
            Event::Reset {
                stream,
                reason,
                code,
            } => {
                if let Some(slot) = self.slots.get_mut(&stream) {
                    slot.code = code;
                    slot.end_by(reason);
                }
                self.give_turns();
            }
            Event::Writable { stream } => {
                if let Some(slot) = self.slots.get_mut(&stream) {
                    wake(&mut slot.writer);
                }
            }
            Event::AllWritable => self.wake_writers(),
            Event::GoAway { last, .. } => self.peer_goes_away(last),
        }
        Ok(())
    }

    /// Our streams above `last` were never looked at: they may be tried elsewhere.
    fn peer_goes_away(&mut self, last: u32) {
        let lost: Vec<u32> = self.slots.keys().copied().filter(|id| *id > last).collect();
        for id in lost {
            if self.machine.is_ours(id) {
                self.machine.reset(id, Reason::Draining);
                if let Some(slot) = self.slots.get_mut(&id) {
                    slot.end_by(Reason::Draining);
                }
            }
        }
        self.give_turns();
    }

    /// The owner of a stream let it go.
    fn drop_stream(&mut self, stream: u32, reason: Reason) {
        let Some(slot) = self.slots.remove(&stream) else {
            return;
        };
        self.machine.reset(stream, reason);
        let unread = slot.received.len();
        if unread > 0 {
            self.machine.consumed(stream, unread);
            self.unread -= unread;
            self.note_held();
        }
        self.give_turns();
        self.wake_driver();
    }
}

#[cfg(test)]
mod tests;
