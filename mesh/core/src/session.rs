//! An agent's session with control, as a pure state machine.
//!
//! The shell hands in what happened through `handle_*`, each with its `now`, then drains
//! [`Session::poll_command`] until `None`, then sleeps until [`Session::poll_timeout`] and calls
//! [`Session::handle_timeout`]. Messages are named here, not carried: the shell fills in what it has at
//! the moment of sending, so that a change which comes while another waits is sent once.
//!
//! Every connection has an [`Attempt`]; what a connection that was given up still says is ignored.
//!
//! Invariants: an agent never goes back to an older revision of the same epoch, never applies a delta to
//! anything but the epoch it belongs to, and never stops trying to reach control.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::rng::Rng;

/// How often the agent beats. Three beats make a lease, so that one lost packet costs nothing.
pub const BEAT_EVERY: Duration = Duration::from_secs(5);
/// How long control may be silent before the connection is given up; it answers each beat.
pub const SILENCE_MAX: Duration = Duration::from_secs(15);
/// Shortest wait before control is tried again: a restarting control must not be stormed.
pub const BACKOFF_MIN: Duration = Duration::from_millis(500);
/// Longest wait: the time within which a whole fleet is back after a long outage.
pub const BACKOFF_MAX: Duration = Duration::from_secs(60);
/// Longest wait after a refusal, of which at least half is waited: by then the lease of a session that this
/// host had before a reboot is over, and the refusal with it.
pub const REFUSED_WAIT: Duration = Duration::from_secs(30);

/// One connection to control, counted from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Attempt(pub u64);

/// What the agent has of the index: the number of the epoch, and the revision within it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Installed {
    pub epoch: u64,
    pub revision: u64,
}

/// What to send on the connection of the current attempt. The shell fills in the content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outgoing {
    /// First on each connection, with what is installed (nothing: both 0).
    Hello(Option<Installed>),
    Beat {
        sequence: u64,
    },
    /// The whole of what the host serves.
    Report,
    /// The whole set of services whose endpoints are wanted.
    Subscribe,
    /// What is persisted and used by now.
    Ack,
    /// The whole of what is known of callers.
    Edges,
    /// Revocations that control has forgotten.
    Revocations,
}

/// What the shell must do next, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Dial `addresses[address]` and open the Sync stream; answer by [`Session::handle_connected`] or
    /// [`Session::handle_lost`] with this attempt.
    Connect {
        attempt: Attempt,
        address: usize,
    },
    /// Close the connection of `attempt`, if there still is one.
    Disconnect {
        attempt: Attempt,
        why: Lost,
    },
    Send(Outgoing),
    /// Control began a new epoch: revisions of endpoints and policies from before mean nothing any more.
    /// What is installed stays in use until it is replaced.
    NewEpoch {
        epoch: u64,
    },
    /// Apply the index update that was just handed in, and keep it on disk under this number.
    Install {
        installed: Installed,
        snapshot: bool,
    },
    /// The index update that was just handed in is not newer than what is installed: drop it and say so.
    Ignore {
        offered: Installed,
    },
}

/// Why a connection ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lost {
    /// It could not be made, or broke.
    Broken,
    /// Control refused this host: waiting longer is all that can help.
    Refused,
    /// Nothing came for [`SILENCE_MAX`].
    Silent,
    /// Control broke the order of messages.
    Protocol,
}

/// Where the session stands, for status and for what waits on a live session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Waiting to try again.
    Waiting,
    Connecting,
    /// Connected; control did not say welcome yet.
    Greeting,
    Live,
}

#[derive(Debug)]
pub struct Session {
    state: State,
    installed: Option<Installed>,
    /// The epoch of the live connection.
    epoch: u64,
    addresses: usize,
    address: usize,
    attempt: Attempt,
    /// Attempts in a row that did not live to see an answered beat.
    failures: u32,
    sequence: u64,
    rng: Rng,
    commands: VecDeque<Command>,
}

#[derive(Clone, Copy, Debug)]
enum State {
    Waiting {
        retry_at: Instant,
    },
    Connecting {
        fail_at: Instant,
    },
    Greeting {
        fail_at: Instant,
    },
    Live {
        silent_at: Instant,
        beat_at: Instant,
    },
}

impl Session {
    /// A session that may connect at once. `addresses` is how many addresses of control are known; 0 counts
    /// as 1, so that the shell is asked again and can say why there is none.
    pub fn new(addresses: usize, installed: Option<Installed>, seed: u64, now: Instant) -> Self {
        Self {
            state: State::Waiting { retry_at: now },
            installed,
            epoch: 0,
            addresses: addresses.max(1),
            address: 0,
            attempt: Attempt(0),
            failures: 0,
            sequence: 0,
            rng: Rng::new(seed),
            commands: VecDeque::new(),
        }
    }

    /// The connection of `attempt` stands and its stream is open.
    pub fn handle_connected(&mut self, attempt: Attempt, now: Instant) {
        if let State::Connecting { .. } = self.state
            && attempt == self.attempt
        {
            self.state = State::Greeting {
                fail_at: now + SILENCE_MAX,
            };
            self.send(Outgoing::Hello(self.installed));
        }
    }

    /// The connection of `attempt` could not be made, or ended.
    pub fn handle_lost(&mut self, attempt: Attempt, why: Lost, now: Instant) {
        if attempt == self.attempt && !matches!(self.state, State::Waiting { .. }) {
            self.lose(why, now);
        }
    }

    /// Control said welcome: the host's lease runs, and control wants to know what it serves and needs.
    pub fn handle_welcome(&mut self, attempt: Attempt, epoch: u64, now: Instant) {
        if attempt != self.attempt {
            return;
        }
        match self.state {
            State::Greeting { .. } => {
                self.state = State::Live {
                    silent_at: now + SILENCE_MAX,
                    beat_at: now + BEAT_EVERY,
                };
                self.epoch = epoch;
                if self.installed.is_some_and(|i| i.epoch != epoch) {
                    self.commands.push_back(Command::NewEpoch { epoch });
                }
                self.send(Outgoing::Report);
                self.send(Outgoing::Subscribe);
                // What was acknowledged to a control that is no more must be said again.
                self.send(Outgoing::Ack);
            }
            State::Live { .. } => self.lose(Lost::Protocol, now),
            State::Waiting { .. } | State::Connecting { .. } => (),
        }
    }

    /// Control answered a beat.
    pub fn handle_beat(&mut self, attempt: Attempt, now: Instant) {
        if self.heard(attempt, now) {
            // Only a connection that lived a beat long clears the count: a control that accepts and
            // falls over again must not be met at full speed.
            self.failures = 0;
        }
    }

    /// An index update came. The shell keeps it at hand until it has drained the commands.
    pub fn handle_index(&mut self, attempt: Attempt, revision: u64, snapshot: bool, now: Instant) {
        if !self.heard(attempt, now) {
            return;
        }
        let offered = Installed {
            epoch: self.epoch,
            revision,
        };
        match self.installed {
            Some(have) if have.epoch == self.epoch => {
                if revision <= have.revision {
                    self.commands.push_back(Command::Ignore { offered });
                    return;
                }
            }
            // Nothing of this epoch: a delta would change what it was not made for.
            Some(_) | None if !snapshot => return self.lose(Lost::Protocol, now),
            Some(_) | None => (),
        }
        self.installed = Some(offered);
        self.commands.push_back(Command::Install {
            installed: offered,
            snapshot,
        });
    }

    /// Any other message came: control lives.
    pub fn handle_other(&mut self, attempt: Attempt, now: Instant) {
        self.heard(attempt, now);
    }

    /// What the host serves changed.
    pub fn handle_report_changed(&mut self) {
        self.send_if_live(Outgoing::Report);
    }

    /// The set of services whose endpoints are wanted changed.
    pub fn handle_subscriptions_changed(&mut self) {
        self.send_if_live(Outgoing::Subscribe);
    }

    /// Something that was received is now persisted and in use.
    pub fn handle_applied(&mut self) {
        self.send_if_live(Outgoing::Ack);
    }

    /// What is known of callers changed.
    pub fn handle_edges_changed(&mut self) {
        self.send_if_live(Outgoing::Edges);
    }

    /// Control named all revocations that it has, and there are others.
    pub fn handle_revocations_forgotten(&mut self) {
        self.send_if_live(Outgoing::Revocations);
    }

    /// What was on disk or was installed is gone or unreadable: the next connection asks for everything.
    /// A live one is given up for that.
    pub fn handle_installed_lost(&mut self, now: Instant) {
        self.installed = None;
        if !matches!(self.state, State::Waiting { .. }) {
            self.lose(Lost::Broken, now);
        }
    }

    pub fn handle_timeout(&mut self, now: Instant) {
        match self.state {
            State::Waiting { retry_at } if retry_at <= now => self.connect(now),
            State::Connecting { fail_at } if fail_at <= now => self.lose(Lost::Silent, now),
            State::Greeting { fail_at } if fail_at <= now => self.lose(Lost::Silent, now),
            State::Live { silent_at, .. } if silent_at <= now => self.lose(Lost::Silent, now),
            State::Live { silent_at, beat_at } if beat_at <= now => {
                self.state = State::Live {
                    silent_at,
                    beat_at: now + BEAT_EVERY,
                };
                self.sequence += 1;
                self.send(Outgoing::Beat {
                    sequence: self.sequence,
                });
            }
            State::Waiting { .. }
            | State::Connecting { .. }
            | State::Greeting { .. }
            | State::Live { .. } => (),
        }
    }

    pub fn poll_command(&mut self) -> Option<Command> {
        self.commands.pop_front()
    }

    pub fn poll_timeout(&self) -> Instant {
        match self.state {
            State::Waiting { retry_at } => retry_at,
            State::Connecting { fail_at } | State::Greeting { fail_at } => fail_at,
            State::Live { silent_at, beat_at } => silent_at.min(beat_at),
        }
    }

    pub fn phase(&self) -> Phase {
        match self.state {
            State::Waiting { .. } => Phase::Waiting,
            State::Connecting { .. } => Phase::Connecting,
            State::Greeting { .. } => Phase::Greeting,
            State::Live { .. } => Phase::Live,
        }
    }

    pub fn is_live(&self) -> bool {
        self.phase() == Phase::Live
    }

    pub fn installed(&self) -> Option<Installed> {
        self.installed
    }

    fn connect(&mut self, now: Instant) {
        self.attempt.0 += 1;
        self.state = State::Connecting {
            fail_at: now + SILENCE_MAX,
        };
        self.commands.push_back(Command::Connect {
            attempt: self.attempt,
            address: self.address,
        });
    }

    fn lose(&mut self, why: Lost, now: Instant) {
        let longest = match why {
            Lost::Refused => REFUSED_WAIT,
            Lost::Broken | Lost::Silent | Lost::Protocol => self.longest_wait(),
        };
        self.failures = self.failures.saturating_add(1);
        self.address = (self.address + 1) % self.addresses;
        self.state = State::Waiting {
            retry_at: now + self.jittered(longest),
        };
        // What was to be sent belongs to the connection that is gone; what was to be installed does not.
        self.commands.retain(|c| !matches!(c, Command::Send(_)));
        self.commands.push_back(Command::Disconnect {
            attempt: self.attempt,
            why,
        });
    }

    /// Doubles with each round in which every address failed once.
    fn longest_wait(&self) -> Duration {
        let rounds = self.failures as usize / self.addresses;
        let doubled = 1_u32 << rounds.min(16);
        (BACKOFF_MIN * 2)
            .saturating_mul(doubled)
            .min(BACKOFF_MAX)
            .max(BACKOFF_MIN)
    }

    /// Between one half of `longest` and the whole, so that a fleet that lost control at one moment does
    /// not come back at one moment.
    fn jittered(&mut self, longest: Duration) -> Duration {
        let half = longest / 2;
        half + Duration::from_millis(self.rng.below(half.as_millis() as u64 + 1))
    }

    /// Notes that control spoke; false when it was not on the live connection.
    fn heard(&mut self, attempt: Attempt, now: Instant) -> bool {
        if attempt != self.attempt {
            return false;
        }
        match &mut self.state {
            State::Live { silent_at, .. } => {
                *silent_at = now + SILENCE_MAX;
                true
            }
            // Control must say welcome first.
            State::Greeting { .. } => {
                self.lose(Lost::Protocol, now);
                false
            }
            State::Waiting { .. } | State::Connecting { .. } => false,
        }
    }

    fn send_if_live(&mut self, what: Outgoing) {
        if self.is_live() {
            self.send(what);
        }
    }

    /// Queues `what` unless it waits already: its content is taken when it is sent.
    fn send(&mut self, what: Outgoing) {
        let command = Command::Send(what);
        if !self.commands.contains(&command) {
            self.commands.push_back(command);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EPOCH: u64 = 3;

    #[test]
    fn a_new_session_says_hello_then_reports_and_subscribes() {
        let mut link = Link::new(1, None);
        link.advance();
        let attempt = Attempt(1);
        assert_eq!(
            link.drain(),
            [Command::Connect {
                attempt,
                address: 0
            }]
        );
        link.session.handle_connected(attempt, link.now);
        assert_eq!(link.drain(), [Command::Send(Outgoing::Hello(None))]);
        assert!(!link.session.is_live());
        link.session.handle_welcome(attempt, EPOCH, link.now);
        assert_eq!(
            link.drain(),
            [Outgoing::Report, Outgoing::Subscribe, Outgoing::Ack].map(Command::Send)
        );
        assert!(link.session.is_live());
    }

    #[test]
    fn an_older_revision_of_the_epoch_is_never_installed() {
        let mut link = Link::live(Some((EPOCH, 7)));
        for (revision, snapshot) in [(6, false), (6, true), (7, true)] {
            link.index(revision, snapshot);
            let offered = Installed {
                epoch: EPOCH,
                revision,
            };
            assert_eq!(link.drain(), [Command::Ignore { offered }]);
        }
        link.index(8, false);
        let installed = Installed {
            epoch: EPOCH,
            revision: 8,
        };
        assert_eq!(
            link.drain(),
            [Command::Install {
                installed,
                snapshot: false
            }]
        );
        assert_eq!(link.session.installed(), Some(installed));
    }

    #[test]
    fn a_new_epoch_starts_over_with_a_snapshot_of_any_revision() {
        let mut link = Link::connected(Some((EPOCH - 1, 900)));
        link.session
            .handle_welcome(link.session.attempt, EPOCH, link.now);
        assert_eq!(link.drain()[0], Command::NewEpoch { epoch: EPOCH });
        link.index(2, true);
        let installed = Installed {
            epoch: EPOCH,
            revision: 2,
        };
        assert_eq!(
            link.drain(),
            [Command::Install {
                installed,
                snapshot: true
            }]
        );
    }

    #[test]
    fn a_delta_without_its_base_ends_the_connection() {
        for installed in [None, Some((EPOCH - 1, 1))] {
            let mut link = Link::live(installed);
            link.index(5, false);
            assert!(matches!(
                link.drain()[..],
                [Command::Disconnect {
                    why: Lost::Protocol,
                    ..
                }]
            ));
            assert_eq!(link.session.installed().map(|i| i.epoch == EPOCH), {
                installed.map(|_| false)
            });
        }
    }

    #[test]
    fn silence_ends_the_connection_and_the_next_resumes_from_what_is_installed() {
        let mut link = Link::live(Some((EPOCH, 7)));
        let lost_by = link.now + SILENCE_MAX;
        let mut beats = 0;
        let lost = loop {
            link.advance();
            match link.drain()[..] {
                [Command::Send(Outgoing::Beat { sequence })] => {
                    beats += 1;
                    assert_eq!(sequence, beats);
                }
                [Command::Disconnect { why, .. }] => break why,
                ref other => panic!("{other:?}"),
            }
        };
        assert_eq!((lost, beats, link.now), (Lost::Silent, 2, lost_by));
        link.advance();
        let attempt = Attempt(2);
        assert_eq!(
            link.drain(),
            [Command::Connect {
                attempt,
                address: 0
            }]
        );
        link.session.handle_connected(attempt, link.now);
        let have = link.session.installed();
        assert_eq!(have.map(|i| i.revision), Some(7));
        assert_eq!(link.drain(), [Command::Send(Outgoing::Hello(have))]);
    }

    #[test]
    fn beats_keep_it_alive() {
        let mut link = Link::live(None);
        for _ in 0..100 {
            link.advance();
            assert!(matches!(
                link.drain()[..],
                [Command::Send(Outgoing::Beat { .. })]
            ));
            link.session.handle_beat(link.session.attempt, link.now);
        }
        assert!(link.session.is_live());
    }

    #[test]
    fn addresses_take_turns_and_the_wait_doubles_by_round() {
        let mut link = Link::new(3, None);
        let mut waits = Vec::new();
        for round in 0..9 {
            link.advance();
            let [Command::Connect { attempt, address }] = link.drain()[..] else {
                panic!("no attempt in round {round}");
            };
            assert_eq!(address, round % 3);
            link.session.handle_lost(attempt, Lost::Broken, link.now);
            link.drain();
            waits.push(link.session.poll_timeout() - link.now);
        }
        for (index, wait) in waits.into_iter().enumerate() {
            let longest = Duration::from_secs(1 << (index / 3));
            assert!(longest / 2 <= wait && wait <= longest, "{index}: {wait:?}");
        }
    }

    #[test]
    fn a_control_that_falls_over_after_its_welcome_is_met_ever_more_slowly() {
        let mut link = Link::new(1, None);
        let mut last = Duration::ZERO;
        for _ in 0..12 {
            link.advance();
            let attempt = link.session.attempt;
            link.session.handle_connected(attempt, link.now);
            link.session.handle_welcome(attempt, EPOCH, link.now);
            link.session.handle_lost(attempt, Lost::Broken, link.now);
            link.drain();
            last = link.session.poll_timeout() - link.now;
        }
        assert!(BACKOFF_MAX / 2 <= last, "{last:?}");
        link.advance();
        let attempt = link.session.attempt;
        link.session.handle_connected(attempt, link.now);
        link.session.handle_welcome(attempt, EPOCH, link.now);
        link.session.handle_beat(attempt, link.now);
        link.session.handle_lost(attempt, Lost::Broken, link.now);
        let wait = link.session.poll_timeout() - link.now;
        assert!(wait <= BACKOFF_MIN * 2, "{wait:?}");
    }

    #[test]
    fn a_refusal_waits_out_a_lease() {
        let mut link = Link::connected(None);
        let attempt = link.session.attempt;
        link.session.handle_lost(attempt, Lost::Refused, link.now);
        assert!(SILENCE_MAX <= link.session.poll_timeout() - link.now);
    }

    #[test]
    fn what_an_abandoned_connection_says_is_ignored() {
        let mut link = Link::live(Some((EPOCH, 1)));
        let old = link.session.attempt;
        link.session.handle_lost(old, Lost::Broken, link.now);
        link.advance();
        link.drain();
        link.session.handle_connected(old, link.now);
        link.session.handle_welcome(old, EPOCH, link.now);
        link.session.handle_index(old, 9, true, link.now);
        link.session.handle_lost(old, Lost::Broken, link.now);
        assert_eq!(link.drain(), []);
        assert_eq!(link.session.phase(), Phase::Connecting);
        assert_eq!(link.session.installed().map(|i| i.revision), Some(1));
    }

    #[test]
    fn changes_are_sent_once_and_only_when_live() {
        let mut link = Link::connected(None);
        link.session.handle_report_changed();
        link.session.handle_applied();
        assert_eq!(link.drain(), []);
        let mut link = Link::live(None);
        link.session.handle_report_changed();
        link.session.handle_report_changed();
        link.session.handle_subscriptions_changed();
        link.session.handle_applied();
        assert_eq!(
            link.drain(),
            [Outgoing::Report, Outgoing::Subscribe, Outgoing::Ack].map(Command::Send)
        );
    }

    /// The goal: no order of events makes the agent go back within an epoch, send on a connection that is
    /// not live, or stop trying. Method: a seeded random walk over every input, old attempts included.
    #[test]
    fn never_goes_back_and_never_gives_up() {
        for seed in 0..2_000 {
            let mut rng = Rng::new(seed);
            let mut link = Link::live(Some((EPOCH, 1)));
            for _ in 0..200 {
                let before = link.session.installed();
                link.step(&mut rng);
                for command in link.drain() {
                    if let Command::Send(what) = command
                        && !matches!(what, Outgoing::Hello(_))
                    {
                        assert!(
                            link.session.is_live(),
                            "seed {seed}: {what:?} while not live"
                        );
                    }
                }
                let after = link.session.installed();
                if before.map(|i| i.epoch) == after.map(|i| i.epoch) {
                    assert!(before <= after, "seed {seed}: went back");
                }
                assert!(
                    link.session.poll_timeout() <= link.now + BACKOFF_MAX,
                    "seed {seed}: gave up"
                );
            }
        }
    }

    struct Link {
        session: Session,
        now: Instant,
    }

    #[expect(
        clippy::disallowed_methods,
        reason = "a test needs one Instant to begin with"
    )]
    fn start() -> Instant {
        Instant::now()
    }

    impl Link {
        fn new(addresses: usize, installed: Option<(u64, u64)>) -> Self {
            let now = start();
            let installed = installed.map(|(epoch, revision)| Installed { epoch, revision });
            Self {
                session: Session::new(addresses, installed, 1, now),
                now,
            }
        }

        fn connected(installed: Option<(u64, u64)>) -> Self {
            let mut link = Self::new(1, installed);
            link.advance();
            link.session
                .handle_connected(link.session.attempt, link.now);
            link.drain();
            link
        }

        fn live(installed: Option<(u64, u64)>) -> Self {
            let mut link = Self::connected(installed);
            link.session
                .handle_welcome(link.session.attempt, EPOCH, link.now);
            link.drain();
            link
        }

        fn index(&mut self, revision: u64, snapshot: bool) {
            self.session
                .handle_index(self.session.attempt, revision, snapshot, self.now);
        }

        fn step(&mut self, rng: &mut Rng) {
            let (session, now) = (&mut self.session, self.now);
            // Mostly the current connection, at times one that was given up.
            let attempt = Attempt(session.attempt.0 - rng.below(8) / 7);
            match rng.below(10) {
                0 => session.handle_connected(attempt, now),
                1 => session.handle_lost(attempt, Lost::Broken, now),
                2 => session.handle_welcome(attempt, EPOCH + rng.below(2), now),
                3 => session.handle_index(attempt, rng.below(50), rng.below(2) == 0, now),
                4 => session.handle_beat(attempt, now),
                5 => session.handle_report_changed(),
                6 => session.handle_other(attempt, now),
                7 => self.now += Duration::from_millis(rng.below(5_000)),
                _ => self.advance(),
            }
        }

        fn advance(&mut self) {
            self.now = self.now.max(self.session.poll_timeout());
            self.session.handle_timeout(self.now);
        }

        fn drain(&mut self) -> Vec<Command> {
            std::iter::from_fn(|| self.session.poll_command()).collect()
        }
    }
}
