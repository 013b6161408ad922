//! One end of the simulated connection: the machine, what its shell would keep, and the wire from it.

use std::collections::BTreeMap;
use std::collections::BTreeSet;

use super::super::super::*;
use crate::rng::Rng;

#[derive(Debug)]
pub(super) enum Wire {
    Open(u32),
    Data {
        stream: u32,
        at: usize,
        bytes: usize,
        end: bool,
    },
    Control(Frame<'static>),
}

/// What the owner of a stream knows at one end.
#[derive(Debug, Default)]
pub(super) struct Pipe {
    pub(super) sent: usize,
    pub(super) ended: bool,
    pub(super) received: usize,
    pub(super) unread: usize,
    pub(super) saw_end: bool,
    /// Its reader stands still.
    pub(super) stalled: bool,
}

pub(super) struct End {
    pub(super) machine: Machine,
    /// Behind each other to the other end.
    pub(super) wire: VecDeque<Wire>,
    pub(super) pipes: BTreeMap<u32, Pipe>,
    /// What this end said when it reset a stream.
    pub(super) resets: BTreeMap<u32, (Reason, u32)>,
    pub(super) let_go: BTreeSet<u32>,
    pub(super) last_opened: u32,
    pub(super) asked: u64,
    pub(super) answered: u64,
    pub(super) gone_away: bool,
    /// The most control frames that may wait since they were last taken: it does not grow with time.
    pub(super) control_max: usize,
}

impl End {
    pub(super) fn new(side: Side, rng: &mut Rng) -> Self {
        let stream_credit = 4096 + rng.below(3) as u32 * 1111;
        let limits = Limits {
            max_streams: 1 + rng.below(6) as u32,
            stream_credit,
            connection_credit: stream_credit * (1 + rng.below(3) as u32) + rng.below(100) as u32,
            max_frame: 1024 + rng.below(4) as u32 * 777,
        };
        assert!(limits.are_sane());
        Self {
            machine: Machine::new(side, limits),
            wire: VecDeque::new(),
            pipes: BTreeMap::new(),
            resets: BTreeMap::new(),
            let_go: BTreeSet::new(),
            last_opened: 0,
            asked: 0,
            answered: 0,
            gone_away: false,
            control_max: 4,
        }
    }

    pub(super) fn unread(&self) -> u64 {
        self.pipes.values().map(|pipe| pipe.unread as u64).sum()
    }

    /// As the shell does it: what the machine has to say comes before everything else.
    pub(super) fn take_control(&mut self) {
        while let Some(frame) = self.machine.poll_control() {
            self.wire.push_back(Wire::Control(frame));
        }
        self.control_max = 4 + 4 * self.machine.open_streams();
    }

    pub(super) fn reset(&mut self, stream: u32, reason: Reason, code: u32) {
        // Of a stream that is over only what is unread is let go: nothing is said to the other end.
        if self.machine.streams.contains_key(&stream) {
            self.resets.insert(stream, (reason, code));
        }
        self.let_go.insert(stream);
        self.machine.reset_with(stream, reason, code);
        self.forget(stream);
    }

    /// Nobody will read what came.
    pub(super) fn forget(&mut self, stream: u32) {
        if let Some(pipe) = self.pipes.remove(&stream) {
            self.machine.consumed(stream, pipe.unread);
        }
    }

    pub(super) fn credit_on_the_way(&self, to: u32) -> u64 {
        let queued = self.machine.control.iter();
        let sent = self.wire.iter().filter_map(|wire| match wire {
            Wire::Control(frame) => Some(frame),
            _ => None,
        });
        let all = queued.chain(sent);
        all.filter_map(|frame| match frame {
            Frame::Credit { stream, bytes } if *stream == to => Some(u64::from(*bytes)),
            _ => None,
        })
        .sum()
    }

    pub(super) fn data_on_the_way(&self, of: Option<u32>) -> u64 {
        let data = self.wire.iter().filter_map(|wire| match wire {
            Wire::Data { stream, bytes, .. } if of.is_none_or(|of| of == *stream) => {
                Some(*bytes as u64)
            }
            _ => None,
        });
        data.sum()
    }
}
