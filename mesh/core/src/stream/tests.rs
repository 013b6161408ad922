//! The stream machine against itself, over a wire that delivers in order but when it likes.

use super::*;
use crate::rng::Rng;

const SMALL: Limits = Limits {
    max_streams: 5,
    stream_credit: 4096,
    connection_credit: 8192,
    max_frame: 1024,
};

fn pair() -> (Machine, Machine) {
    let mut client = Machine::new(Side::Client, SMALL);
    let mut server = Machine::new(Side::Server, SMALL);
    let hello = client.poll_control().unwrap();
    assert_eq!(server.handle(&hello), Ok(Event::Ready));
    let hello = server.poll_control().unwrap();
    assert_eq!(client.handle(&hello), Ok(Event::Ready));
    (client, server)
}

fn data(stream: u32, data: &[u8], end: bool) -> Frame<'_> {
    Frame::Data { stream, data, end }
}

#[test]
fn hello_comes_first_and_once() {
    let mut server = Machine::new(Side::Server, SMALL);
    assert_eq!(
        server.handle(&Frame::Ping { nonce: 1 }),
        Err(Violation::Hello)
    );
    let (mut client, _) = pair();
    let again = Frame::Hello {
        version: VERSION,
        limits: SMALL,
    };
    assert_eq!(client.handle(&again), Err(Violation::Hello));
}

#[test]
fn a_stream_is_over_when_both_sides_ended() {
    let (mut client, mut server) = pair();
    let id = client.open().unwrap();
    server
        .handle(&Frame::Open {
            stream: id,
            header: &[],
        })
        .unwrap();
    client.sent(id, 3, true);
    assert_eq!(
        server.handle(&data(id, b"abc", true)),
        Ok(Event::Data {
            stream: id,
            end: true
        })
    );
    assert_eq!(
        server.handle(&data(id, b"", true)),
        Err(Violation::AfterEnd(id))
    );
    server.sent(id, 0, true);
    client.handle(&data(id, b"", true)).unwrap();
    assert_eq!((client.open_streams(), server.open_streams()), (0, 0));
    // Late frames of a stream that is over are not a violation.
    assert_eq!(
        client.handle(&Frame::Credit {
            stream: id,
            bytes: 1
        }),
        Ok(Event::None)
    );
}

#[test]
fn a_peer_that_breaks_a_bound_is_named() {
    let (_, mut server) = pair();
    assert_eq!(
        server.handle(&data(1, b"x", false)),
        Err(Violation::NeverOpened(1))
    );
    let open = |stream| Frame::Open {
        stream,
        header: &[],
    };
    assert_eq!(server.handle(&open(2)), Err(Violation::OpenOrder(2)));
    for n in 0..SMALL.max_streams {
        server.handle(&open(n * 2 + 1)).unwrap();
    }
    assert_eq!(server.handle(&open(99)), Err(Violation::TooManyStreams));
    assert_eq!(server.handle(&open(1)), Err(Violation::OpenOrder(1)));
    let bulk = [0; 4097];
    assert_eq!(
        server.handle(&data(1, &bulk, false)),
        Err(Violation::StreamCredit(1))
    );
    let credit = Frame::Credit {
        stream: 0,
        bytes: u32::MAX,
    };
    assert_eq!(server.handle(&credit), Err(Violation::CreditOverflow));
}

#[test]
fn a_ping_flood_is_bounded() {
    let (_, mut server) = pair();
    let mut outcome = Ok(Event::None);
    for nonce in 0..=CONTROL_QUEUE_MAX as u64 {
        outcome = server.handle(&Frame::Ping { nonce });
    }
    assert_eq!(outcome, Err(Violation::ControlFlood));
}

#[test]
fn going_away_refuses_new_streams_and_keeps_old_ones() {
    let (mut client, mut server) = pair();
    let old = client.open().unwrap();
    server
        .handle(&Frame::Open {
            stream: old,
            header: &[],
        })
        .unwrap();
    server.go_away(Reason::Draining);
    let late = client.open().unwrap();
    assert_eq!(
        server.handle(&Frame::Open {
            stream: late,
            header: &[]
        }),
        Ok(Event::None)
    );
    while let Some(frame) = server.poll_control() {
        client.handle(&frame).unwrap();
    }
    assert_eq!(client.open(), Err(OpenError::GoingAway));
    assert_eq!(client.open_streams(), 1);
    assert!(client.send_capacity(old) > 0);
}

/// What a stream's two ends know outside of the machine.
#[derive(Default)]
struct Pipe {
    sent: usize,
    received: usize,
    unread: usize,
    ended: bool,
    saw_end: bool,
}

#[derive(Debug)]
enum Wire {
    Open(u32),
    Data(u32, usize, bool),
    Control(Frame<'static>),
}

/// The goal: no order of opens, sends, slow readers, resets and delays breaks a bound, loses a byte or stands
/// still for ever. Method: a seeded walk over both ends; then all is delivered and read, and every byte that was
/// sent on a stream that was not reset must have arrived, with its end.
#[test]
fn no_order_of_events_loses_a_byte_or_a_bound() {
    for seed in 0..400 {
        let mut walk = Walk::new(seed);
        for _ in 0..600 {
            walk.step();
        }
        walk.settle();
    }
}

struct Walk {
    seed: u64,
    rng: Rng,
    client: Machine,
    server: Machine,
    to_server: VecDeque<Wire>,
    to_client: VecDeque<Wire>,
    pipes: BTreeMap<u32, Pipe>,
}

impl Walk {
    fn new(seed: u64) -> Self {
        let (client, server) = pair();
        Self {
            seed,
            rng: Rng::new(seed),
            client,
            server,
            to_server: VecDeque::new(),
            to_client: VecDeque::new(),
            pipes: BTreeMap::new(),
        }
    }

    fn pick(&mut self) -> Option<u32> {
        let n = self.pipes.len() as u64;
        (n > 0)
            .then(|| self.rng.below(n))
            .and_then(|at| self.pipes.keys().nth(at as usize).copied())
    }

    fn step(&mut self) {
        match self.rng.below(8) {
            0 => {
                if let Ok(id) = self.client.open() {
                    self.to_server.push_back(Wire::Open(id));
                    self.pipes.insert(id, Pipe::default());
                }
            }
            1 | 2 => {
                let want = self.rng.below(3000) as usize;
                let end = self.rng.below(6) == 0;
                if let Some(id) = self.pick() {
                    self.send(id, want, end);
                }
            }
            3 => {
                let want = self.rng.below(3000) as usize;
                if let Some(id) = self.pick() {
                    self.read(id, want);
                }
            }
            4 if self.rng.below(20) == 0 => {
                if let Some(id) = self.pick() {
                    self.drain_control();
                    self.client.reset(id, Reason::Cancelled);
                    self.forget(id);
                }
            }
            5 | 6 => self.deliver_to_server(),
            _ => self.deliver_to_client(),
        }
        self.drain_control();
        let unread: usize = self.pipes.values().map(|p| p.unread).sum();
        assert!(
            unread <= SMALL.connection_credit as usize,
            "seed {}: {unread} unread",
            self.seed
        );
    }

    fn send(&mut self, id: u32, want: usize, end: bool) {
        let pipe = self.pipes.get_mut(&id).unwrap();
        if pipe.ended {
            return;
        }
        let bytes = want.min(self.client.send_capacity(id));
        let end = end && bytes == want;
        if bytes == 0 && !end {
            return;
        }
        pipe.sent += bytes;
        pipe.ended = end;
        self.client.sent(id, bytes, end);
        self.to_server.push_back(Wire::Data(id, bytes, end));
    }

    fn read(&mut self, id: u32, want: usize) {
        let pipe = self.pipes.get_mut(&id).unwrap();
        let bytes = want.min(pipe.unread);
        pipe.unread -= bytes;
        if bytes > 0 {
            self.server.consumed(id, bytes);
        }
    }

    /// A reset stream: what is still unread is thrown away.
    fn forget(&mut self, id: u32) {
        if let Some(pipe) = self.pipes.remove(&id) {
            self.server.consumed(id, pipe.unread);
        }
    }

    fn drain_control(&mut self) {
        while let Some(frame) = self.client.poll_control() {
            self.to_server.push_back(Wire::Control(frame));
        }
        while let Some(frame) = self.server.poll_control() {
            self.to_client.push_back(Wire::Control(frame));
        }
    }

    fn deliver_to_server(&mut self) {
        let Some(wire) = self.to_server.pop_front() else {
            return;
        };
        let bulk = [0; 4096];
        let (frame, end) = match &wire {
            Wire::Open(stream) => (
                Frame::Open {
                    stream: *stream,
                    header: &[],
                },
                false,
            ),
            Wire::Data(stream, bytes, end) => (data(*stream, &bulk[..*bytes], *end), *end),
            Wire::Control(frame) => (*frame, false),
        };
        let event = self.server.handle(&frame);
        let event = event.unwrap_or_else(|v| panic!("seed {}: {wire:?}: {v}", self.seed));
        if let (Event::Data { stream, .. }, Wire::Data(_, bytes, _)) = (event, &wire) {
            match self.pipes.get_mut(&stream) {
                Some(pipe) => {
                    assert!(!pipe.saw_end, "seed {}: data after the end", self.seed);
                    pipe.received += bytes;
                    pipe.unread += bytes;
                    pipe.saw_end = end;
                }
                None => self.server.consumed(stream, *bytes),
            }
        }
    }

    fn deliver_to_client(&mut self) {
        if let Some(Wire::Control(frame)) = self.to_client.pop_front() {
            let event = self.client.handle(&frame);
            event.unwrap_or_else(|v| panic!("seed {}: {frame:?}: {v}", self.seed));
        }
    }

    fn settle(&mut self) {
        let ids: Vec<u32> = self.pipes.keys().copied().collect();
        // Bounded: each round delivers and reads all there is, so credit always comes back.
        for _ in 0..50 {
            for id in &ids {
                self.send(*id, 100, true);
                self.read(*id, usize::MAX);
            }
            self.drain_control();
            while !self.to_server.is_empty() || !self.to_client.is_empty() {
                self.deliver_to_server();
                self.deliver_to_client();
                for id in &ids {
                    self.read(*id, usize::MAX);
                }
                self.drain_control();
            }
        }
        for (id, pipe) in &self.pipes {
            assert!(pipe.saw_end, "seed {}: stream {id} never ended", self.seed);
            assert_eq!(pipe.sent, pipe.received, "seed {}: stream {id}", self.seed);
        }
        assert_eq!(self.client.open_by_us as usize, self.client.streams.len());
    }
}
