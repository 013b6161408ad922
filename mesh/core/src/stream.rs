//! The stream layer's rules, without I/O: one connection between two agents carries many streams, each with its
//! own credit under a ceiling for the whole connection.
//!
//! The shell (`mesh_runtime::mux`) owns bytes and buffers. It hands every frame that comes in to
//! [`Machine::handle`], asks [`Machine::send_capacity`] before it sends data, reports with [`Machine::sent`] and
//! [`Machine::consumed`], and writes what [`Machine::poll_control`] gives.
//!
//! Invariants: what was received and not yet consumed never exceeds the connection's credit, whatever the number
//! of streams; nothing is sent without credit; a stream's end comes after all of its data.

use std::collections::VecDeque;

use crate::reason::Reason;

mod frame;
mod ids;

pub use frame::{Event, Frame, OpenError, Violation};
pub use ids::{IdHasher, Streams};

/// The version of the frames, in [`Frame::Hello`].
pub const VERSION: u8 = 1;

/// What one side is ready to bear. Each side tells its own in its first frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Streams that the peer may have open at once.
    pub max_streams: u32,
    /// Bytes of a stream that may be under way or unread.
    pub stream_credit: u32,
    /// Bytes of all streams together: the ceiling of memory for a connection.
    pub connection_credit: u32,
    /// Longest payload of a data frame, in bytes.
    pub max_frame: u32,
}

impl Limits {
    /// Half a megabyte a stream fills a path of 10 Gbit/s and 0.4 ms; 8 MiB bounds a connection whose readers
    /// all stand still; 64 KiB frames cost few system calls, and a
    /// small call waits for one at the most 52 µs at that speed.
    pub const DEFAULT: Self = Self {
        max_streams: 4096,
        stream_credit: 512 * 1024,
        connection_credit: 8 * 1024 * 1024,
        max_frame: 64 * 1024,
    };

    /// What one stream may have under way or unread while `free` is left of the connection's credit. Half of the
    /// credit is reserved, an equal part for each stream that may be open; of the rest nobody takes more than a
    /// quarter of what is left (dynamic thresholds: Choudhury and Hahne, IEEE/ACM Transactions on Networking 6(2),
    /// 1998). So readers that stand still, however many, hold back their own streams only.
    fn share(&self, free: u64) -> u64 {
        let reserved = u64::from(self.connection_credit) / 2;
        let own = (reserved / u64::from(self.max_streams)).max(1);
        own + free.saturating_sub(reserved) / 4
    }

    /// Whether a peer may say this at all.
    pub const fn are_sane(&self) -> bool {
        self.max_streams >= 1
            && self.max_streams <= 1 << 20
            && self.stream_credit >= 4096
            && self.stream_credit <= 1 << 28
            && self.connection_credit >= self.stream_credit
            && self.connection_credit <= 1 << 30
            && self.max_frame >= 1024
            && self.max_frame <= 1 << 20
    }
}

/// Control frames queued for a peer that does not read: beyond it the connection is given up. Pings and resets
/// are all that a peer can make us queue without limit of its own.
pub const CONTROL_QUEUE_MAX: usize = 16_384;

/// Which side opened the TLS connection. It decides the parity of the ids of streams that it opens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Odd ids.
    Client,
    /// Even ids.
    Server,
}

#[derive(Debug)]
struct Stream {
    send_credit: u64,
    /// What the peer may still send.
    receive_credit: u64,
    /// Consumed, but not given back yet.
    unreturned: u64,
    local_ended: bool,
    remote_ended: bool,
}

/// One side of a connection.
#[derive(Debug)]
pub struct Machine {
    side: Side,
    limits: Limits,
    peer: Option<Limits>,
    streams: Streams<Stream>,
    next: u32,
    /// Highest id that the peer opened.
    last_of_peer: u32,
    open_by_us: u32,
    open_by_peer: u32,
    send_credit: u64,
    receive_credit: u64,
    unreturned: u64,
    /// No stream has more unreturned than this, unless it owes nothing.
    unreturned_max: u64,
    going_away: bool,
    control: VecDeque<Frame<'static>>,
}

impl Machine {
    /// A new connection; its hello is the first that [`Self::poll_control`] gives.
    pub fn new(side: Side, limits: Limits) -> Self {
        let hello = Frame::Hello {
            version: VERSION,
            limits,
        };
        Self {
            side,
            limits,
            peer: None,
            streams: Streams::default(),
            next: if side == Side::Client { 1 } else { 2 },
            last_of_peer: 0,
            open_by_us: 0,
            open_by_peer: 0,
            send_credit: 0,
            receive_credit: u64::from(limits.connection_credit),
            unreturned: 0,
            unreturned_max: 0,
            going_away: false,
            control: VecDeque::from([hello]),
        }
    }

    /// The streams that are open in at least one direction.
    pub fn open_streams(&self) -> usize {
        self.streams.len()
    }

    /// Whether readers that stand still hold half of the connection's credit, in either direction: others have small
    /// shares.
    pub fn is_starved(&self) -> bool {
        let Some(peer) = self.peer else { return false };
        let few = |free: u64, limits: &Limits| free <= u64::from(limits.connection_credit) / 2;
        few(self.send_credit, &peer) || few(self.receive_credit, &self.limits)
    }

    /// How many streams can be opened now, at least one.
    pub fn can_open(&self) -> Result<u32, OpenError> {
        let peer = self.peer.ok_or(OpenError::NotReady)?;
        if self.going_away || self.next > u32::MAX - 2 {
            return Err(OpenError::GoingAway);
        }
        match peer.max_streams.saturating_sub(self.open_by_us) {
            0 => Err(OpenError::TooMany),
            room => Ok(room),
        }
    }

    /// Opens a stream. The shell sends its `Open` frame at once, before anything else of the stream.
    pub fn open(&mut self) -> Result<u32, OpenError> {
        self.can_open()?;
        let peer = self.peer.ok_or(OpenError::NotReady)?;
        let id = self.next;
        self.next += 2;
        self.open_by_us += 1;
        self.streams.insert(id, Stream::new(&self.limits, &peer));
        Ok(id)
    }

    /// Data bytes that may be sent on `stream` in one frame now.
    pub fn send_capacity(&self, stream: u32) -> usize {
        match (self.streams.get(&stream), self.peer) {
            (Some(s), Some(peer)) if !s.local_ended => {
                let held = u64::from(peer.stream_credit) - s.send_credit;
                let share = peer.share(self.send_credit);
                s.send_credit
                    .min(self.send_credit)
                    .min(u64::from(peer.max_frame))
                    .min(share.saturating_sub(held)) as usize
            }
            _ => 0,
        }
    }

    /// Reports that a data frame of `bytes` went out; at most [`Self::send_capacity`] of them.
    pub fn sent(&mut self, stream: u32, bytes: usize, end: bool) {
        let Some(s) = self.streams.get_mut(&stream) else {
            return;
        };
        debug_assert!(!s.local_ended, "data after the end");
        s.send_credit -= bytes as u64;
        self.send_credit -= bytes as u64;
        if end {
            s.local_ended = true;
            if s.remote_ended {
                self.remove(stream);
            }
        }
    }

    /// Reports that the reader took `bytes`, or that they were thrown away.
    pub fn consumed(&mut self, stream: u32, bytes: usize) {
        self.unreturned += bytes as u64;
        let share = self.limits.share(self.receive_credit);
        if let Some(s) = self.streams.get_mut(&stream)
            && !s.remote_ended
        {
            s.unreturned += bytes as u64;
            let enough = share.min(u64::from(self.limits.stream_credit));
            if s.unreturned * 2 >= enough {
                let frame = s.give_back(stream);
                self.control.extend(frame);
            }
            self.unreturned_max = self.unreturned_max.max(s.unreturned);
        }
        self.return_credit();
    }

    /// Gives back what was consumed: in large steps while the peer has much, at once when it has little. When all is
    /// read and nothing under way, a stream of the peer's can send: it counts as held what it was not given back,
    /// which is less than its share.
    fn return_credit(&mut self) {
        let enough = self.unreturned * 8 >= u64::from(self.limits.connection_credit);
        if self.unreturned > 0 && (enough || self.unreturned * 4 >= self.receive_credit) {
            let bytes = std::mem::take(&mut self.unreturned);
            self.receive_credit += bytes;
            self.queue(Frame::Credit {
                stream: 0,
                bytes: bytes as u32,
            });
        }
        // What was little when it was consumed is much, now that shares are small. They halve until this is done
        // again, so it is done seldom.
        let share = self.limits.share(self.receive_credit);
        if share > self.unreturned_max {
            return;
        }
        self.unreturned_max = 0;
        for (id, s) in &mut self.streams {
            if !s.remote_ended && s.unreturned * 2 >= share {
                self.control.extend(s.give_back(*id));
            }
            if !s.remote_ended {
                self.unreturned_max = self.unreturned_max.max(s.unreturned);
            }
        }
    }

    /// Says that the called app took the connection.
    pub fn accept(&mut self, stream: u32) {
        if self.streams.contains_key(&stream) {
            self.queue(Frame::Accepted { stream });
        }
    }

    /// Ends a stream at once, both ways. The shell also consumes what it still holds of it.
    pub fn reset(&mut self, stream: u32, reason: Reason) {
        self.reset_with(stream, reason, 0);
    }

    /// Ends a stream at once as [`Self::reset`] does, with the app's own code.
    pub fn reset_with(&mut self, stream: u32, reason: Reason, code: u32) {
        if self.remove(stream) {
            self.queue(Frame::Reset {
                stream,
                reason,
                code,
            });
        }
    }

    /// Asks the peer to answer with `nonce`.
    pub fn ping(&mut self, nonce: u64) {
        self.queue(Frame::Ping { nonce });
    }

    /// Tells the peer to open no more streams. Those that are open go on.
    pub fn go_away(&mut self, reason: Reason) {
        if !self.going_away {
            self.going_away = true;
            self.queue(Frame::GoAway {
                last: self.last_of_peer,
                reason,
            });
        }
    }

    /// The next frame that must be written, before further data.
    pub fn poll_control(&mut self) -> Option<Frame<'static>> {
        self.control.pop_front()
    }

    /// Whether a frame waits in [`Self::poll_control`].
    pub fn has_control(&self) -> bool {
        !self.control.is_empty()
    }

    /// Whether our direction of `stream` is still open.
    pub fn can_end(&self, stream: u32) -> bool {
        self.streams.get(&stream).is_some_and(|s| !s.local_ended)
    }

    /// Whether this side opened `stream`.
    pub fn is_ours(&self, stream: u32) -> bool {
        (stream % 2 == 1) == (self.side == Side::Client)
    }

    /// Takes a frame of the peer.
    pub fn handle(&mut self, frame: &Frame<'_>) -> Result<Event, Violation> {
        if self.peer.is_none() && !matches!(frame, Frame::Hello { .. }) {
            return Err(Violation::Hello);
        }
        match *frame {
            Frame::Hello { version, limits } => self.handle_hello(version, limits),
            Frame::Open { stream, .. } => self.handle_open(stream),
            Frame::Accepted { stream } => {
                let known = self.is_known(stream)?;
                Ok(if known {
                    Event::Accepted { stream }
                } else {
                    Event::None
                })
            }
            Frame::Data { stream, data, end } => self.handle_data(stream, data.len() as u64, end),
            Frame::Reset {
                stream,
                reason,
                code,
            } => {
                let known = self.is_known(stream)?;
                self.remove(stream);
                Ok(if known {
                    Event::Reset {
                        stream,
                        reason,
                        code,
                    }
                } else {
                    Event::None
                })
            }
            Frame::Credit { stream, bytes } => self.handle_credit(stream, bytes),
            Frame::Ping { nonce } => {
                if self.control.len() >= CONTROL_QUEUE_MAX {
                    return Err(Violation::ControlFlood);
                }
                self.queue(Frame::Pong { nonce });
                Ok(Event::None)
            }
            Frame::Pong { nonce } => Ok(Event::Pong { nonce }),
            Frame::GoAway { last, reason } => {
                self.going_away = true;
                Ok(Event::GoAway { last, reason })
            }
        }
    }

    fn handle_hello(&mut self, version: u8, limits: Limits) -> Result<Event, Violation> {
        if self.peer.is_some() {
            return Err(Violation::Hello);
        }
        if version != VERSION {
            return Err(Violation::Version(version));
        }
        if !limits.are_sane() {
            return Err(Violation::Limits);
        }
        self.send_credit = u64::from(limits.connection_credit);
        self.peer = Some(limits);
        Ok(Event::Ready)
    }

    fn handle_open(&mut self, stream: u32) -> Result<Event, Violation> {
        let first = if self.side == Side::Server { 1 } else { 2 };
        let next = match self.last_of_peer {
            0 => Some(first),
            last => last.checked_add(2),
        };
        // None is left out: nobody chooses ids that fall on one place of a table.
        if Some(stream) != next {
            return Err(Violation::OpenOrder(stream));
        }
        if self.open_by_peer >= self.limits.max_streams {
            return Err(Violation::TooManyStreams);
        }
        if self.control.len() >= CONTROL_QUEUE_MAX {
            return Err(Violation::ControlFlood);
        }
        let Some(peer) = self.peer else {
            return Err(Violation::Hello);
        };
        self.last_of_peer = stream;
        self.open_by_peer += 1;
        self.streams
            .insert(stream, Stream::new(&self.limits, &peer));
        if self.going_away {
            self.reset(stream, Reason::Draining);
            return Ok(Event::None);
        }
        Ok(Event::Opened { stream })
    }

    fn handle_data(&mut self, stream: u32, bytes: u64, end: bool) -> Result<Event, Violation> {
        self.receive_credit = self
            .receive_credit
            .checked_sub(bytes)
            .ok_or(Violation::ConnectionCredit)?;
        let Some(s) = self.streams.get_mut(&stream) else {
            self.is_known(stream)?;
            // It was under way when the stream ended here: nobody will read it.
            self.consumed(stream, bytes as usize);
            return Ok(Event::None);
        };
        if s.remote_ended {
            return Err(Violation::AfterEnd(stream));
        }
        s.receive_credit = s
            .receive_credit
            .checked_sub(bytes)
            .ok_or(Violation::StreamCredit(stream))?;
        if end {
            s.remote_ended = true;
            if s.local_ended {
                self.remove(stream);
            }
        }
        self.return_credit();
        Ok(Event::Data { stream, end })
    }

    fn handle_credit(&mut self, stream: u32, bytes: u32) -> Result<Event, Violation> {
        let Some(peer) = self.peer else {
            return Err(Violation::Hello);
        };
        let add = |credit: &mut u64, ceiling: u32| {
            *credit += u64::from(bytes);
            if *credit > u64::from(ceiling) {
                Err(Violation::CreditOverflow)
            } else {
                Ok(())
            }
        };
        if stream == 0 {
            add(&mut self.send_credit, peer.connection_credit)?;
            return Ok(Event::AllWritable);
        }
        if !self.is_known(stream)? {
            return Ok(Event::None);
        }
        if let Some(s) = self.streams.get_mut(&stream) {
            add(&mut s.send_credit, peer.stream_credit)?;
        }
        Ok(Event::Writable { stream })
    }

    /// Whether `stream` is open; an error if it never was.
    fn is_known(&self, stream: u32) -> Result<bool, Violation> {
        let opened = if self.is_ours(stream) {
            stream < self.next
        } else {
            stream <= self.last_of_peer
        };
        if stream == 0 || !opened {
            return Err(Violation::NeverOpened(stream));
        }
        Ok(self.streams.contains_key(&stream))
    }

    fn remove(&mut self, stream: u32) -> bool {
        if self.streams.remove(&stream).is_none() {
            return false;
        }
        if self.is_ours(stream) {
            self.open_by_us -= 1;
        } else {
            self.open_by_peer -= 1;
        }
        true
    }

    fn queue(&mut self, frame: Frame<'static>) {
        self.control.push_back(frame);
    }
}

impl Stream {
    /// The credit for what was consumed.
    fn give_back(&mut self, stream: u32) -> Option<Frame<'static>> {
        let bytes = std::mem::take(&mut self.unreturned);
        self.receive_credit += bytes;
        (bytes > 0).then_some(Frame::Credit {
            stream,
            bytes: bytes as u32,
        })
    }

    fn new(limits: &Limits, peer: &Limits) -> Self {
        Self {
            send_credit: u64::from(peer.stream_credit),
            receive_credit: u64::from(limits.stream_credit),
            unreturned: 0,
            local_ended: false,
            remote_ended: false,
        }
    }
}

#[cfg(test)]
mod tests;
