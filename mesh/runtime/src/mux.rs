//! The stream layer over a carrier: many streams on one connection, everything that is ready in a turn of the
//! loop written at once. The rules are in [`mesh_core::stream`]; here are the bytes.
//!
//! A connection and its streams live on one thread. One task runs the [`Driver`]; it alone touches the carrier.
//! A stream's writer appends to the shared output and wakes the driver, which runs after all else that is ready,
//! so what several streams wrote leaves in one system call.

use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use mesh_api::frame;
use mesh_core::reason::Reason;
use mesh_core::stream::{Event, Frame, Limits, Machine, OpenError, Side};

mod driver;
mod stream;

pub use driver::Driver;
pub use stream::{MuxStream, StreamError};

/// What one stream may add to the output before it has left: a bulk transfer leaves room for others.
const QUANTUM: usize = 128 * 1024;
/// All output that waits for the carrier. Above it every stream waits.
const OUTPUT_MAX: usize = 1024 * 1024;

/// A connection, as those see it who open streams.
#[derive(Clone, Debug)]
pub struct Mux(Rc<RefCell<Shared>>);

/// The streams that the peer opens.
#[derive(Debug)]
pub struct Incoming(Rc<RefCell<Shared>>);

#[derive(Debug)]
struct Shared {
    machine: Machine,
    max_frame: u32,
    /// What waits for the carrier; up to `written` it is gone already.
    output: Vec<u8>,
    written: usize,
    /// Counts how often the output was empty, so that [`QUANTUM`] is a stream's share of one round.
    round: u64,
    slots: HashMap<u32, Slot>,
    /// Streams whose writer waits for a new round or for credit of the connection.
    waiting: Vec<u32>,
    incoming: VecDeque<(u32, Vec<u8>)>,
    accepting: Option<Waker>,
    opening: Vec<Waker>,
    driver: Option<Waker>,
    /// Set once; nothing happens afterwards.
    closed: Option<Reason>,
    /// The owner wants the carrier closed when the output has left.
    closing: bool,
    heard: bool,
}

/// A stream's bytes and who waits for them.
#[derive(Debug, Default)]
struct Slot {
    received: Vec<u8>,
    /// Up to here `received` is consumed.
    taken: usize,
    ended: bool,
    reset: Option<Reason>,
    accepted: bool,
    round: u64,
    sent_in_round: usize,
    reader: Option<Waker>,
    writer: Option<Waker>,
}

/// A connection over `carrier`, with the driver that must be run on this thread.
pub fn connection<C>(carrier: C, side: Side, limits: Limits) -> (Mux, Incoming, Driver<C>) {
    let shared = Rc::new(RefCell::new(Shared {
        machine: Machine::new(side, limits),
        max_frame: limits.max_frame,
        output: Vec::new(),
        written: 0,
        round: 1,
        slots: HashMap::new(),
        waiting: Vec::new(),
        incoming: VecDeque::new(),
        accepting: None,
        opening: Vec::new(),
        driver: None,
        closed: None,
        closing: false,
        heard: false,
    }));
    let driver = Driver::new(carrier, Rc::clone(&shared));
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
        poll_fn(|cx| self.poll_open(cx, header)).await
    }

    fn poll_open(&self, cx: &mut Context<'_>, header: &[u8]) -> Poll<Result<MuxStream, Reason>> {
        let mut shared = self.0.borrow_mut();
        if let Some(reason) = shared.closed {
            return Poll::Ready(Err(reason));
        }
        match shared.machine.open() {
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
                shared.opening.push(cx.waker().clone());
                Poll::Pending
            }
        }
    }

    /// Why the connection is over, if it is.
    pub fn closed(&self) -> Option<Reason> {
        self.0.borrow().closed
    }

    /// Whether a stream could be opened without waiting; the hello may still be under way.
    pub fn takes_streams(&self) -> bool {
        let shared = self.0.borrow();
        shared.closed.is_none()
            && !shared.closing
            && matches!(shared.machine.can_open(), Ok(()) | Err(OpenError::NotReady))
    }

    /// Streams that are open in at least one direction.
    pub fn open_streams(&self) -> usize {
        self.0.borrow().machine.open_streams()
    }

    /// Tells the peer to open no more streams; those that are open go on.
    pub fn go_away(&self, reason: Reason) {
        let mut shared = self.0.borrow_mut();
        shared.machine.go_away(reason);
        shared.wake_driver();
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

    fn take_control(&mut self) {
        while let Some(frame) = self.machine.poll_control() {
            frame::encode(&frame, &mut self.output);
        }
    }

    /// How much `stream` may send in one frame now; nothing while its share of this round is used up.
    fn allowance(&mut self, stream: u32) -> usize {
        if self.output.len() - self.written >= OUTPUT_MAX {
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

    fn note_sent(&mut self, stream: u32, bytes: usize, end: bool) {
        self.machine.sent(stream, bytes, end);
        if let Some(slot) = self.slots.get_mut(&stream) {
            slot.sent_in_round += bytes;
        }
        self.wake_driver();
    }

    /// The carrier took all output: every stream has a new share.
    fn next_round(&mut self) {
        self.output.clear();
        self.written = 0;
        self.round += 1;
        // A burst must not be paid for by a connection's whole life.
        if self.output.capacity() > 4 * QUANTUM {
            self.output.shrink_to(QUANTUM);
        }
        self.wake_writers();
    }

    fn wake_writers(&mut self) {
        for id in self.waiting.drain(..) {
            if let Some(slot) = self.slots.get_mut(&id) {
                wake(&mut slot.writer);
            }
        }
    }

    fn close(&mut self, reason: Reason) {
        if self.closed.is_some() {
            return;
        }
        self.closed = Some(reason);
        self.incoming.clear();
        for slot in self.slots.values_mut() {
            slot.reset.get_or_insert(reason);
            wake(&mut slot.reader);
            wake(&mut slot.writer);
        }
        wake(&mut self.accepting);
        self.opening.drain(..).for_each(Waker::wake);
    }

    /// Takes one frame of the peer.
    fn handle(&mut self, frame: &Frame<'_>) -> Result<(), Reason> {
        let event = self.machine.handle(frame).map_err(|violation| {
            log::warn!("the peer broke the rules of the stream layer: {violation}");
            Reason::ProtocolError
        })?;
        match event {
            Event::None | Event::Pong { .. } => (),
            Event::Ready => self.opening.drain(..).for_each(Waker::wake),
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
                        slot.received.extend_from_slice(data);
                        slot.ended |= end;
                        wake(&mut slot.reader);
                    }
                    None => self.machine.consumed(stream, data.len()),
                }
                if end {
                    self.opening.drain(..).for_each(Waker::wake);
                }
            }
            Event::Reset { stream, reason } => {
                if let Some(slot) = self.slots.get_mut(&stream) {
                    slot.reset = Some(reason);
                    wake(&mut slot.reader);
                    wake(&mut slot.writer);
                }
                self.opening.drain(..).for_each(Waker::wake);
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
                    slot.reset.get_or_insert(Reason::Draining);
                    wake(&mut slot.reader);
                    wake(&mut slot.writer);
                }
            }
        }
        self.opening.drain(..).for_each(Waker::wake);
    }

    /// The owner of a stream let it go.
    fn drop_stream(&mut self, stream: u32, reason: Reason) {
        let Some(slot) = self.slots.remove(&stream) else {
            return;
        };
        self.machine.reset(stream, reason);
        let unread = slot.received.len() - slot.taken;
        if unread > 0 {
            self.machine.consumed(stream, unread);
        }
        self.opening.drain(..).for_each(Waker::wake);
        self.wake_driver();
    }
}

fn wake(waker: &mut Option<Waker>) {
    if let Some(waker) = waker.take() {
        waker.wake();
    }
}

#[cfg(test)]
mod tests;
