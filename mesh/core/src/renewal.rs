//! The life of a certificate: when to renew it, and when to be alarmed, as a pure state machine.
//!
//! Certificates live by the wall clock, so this machine is told Unix milliseconds. Wall clocks jump: the
//! shell sleeps at most [`LOOK_EVERY`], and a retry that a clock set back has moved out of reach is brought
//! near again. Nothing but the present time and the certificate decides its [`Standing`].
//!
//! The first attempt comes at one third of the life, give or take a tenth of that, so that a fleet enrolled
//! at one moment does not renew at one moment. Retries go on past the end: control may take a late renewal,
//! and a host that was asleep for days must find back by itself. A certificate whose life has not begun (control's clock is
//! ahead, or ours behind) is asked for again until one is good, or its life begins.

use std::collections::VecDeque;
use std::time::Duration;

use crate::rng::Rng;

/// Unix time in milliseconds.
pub type UnixMs = u64;

/// Shortest and longest wait before another attempt.
pub const RETRY_MIN: Duration = Duration::from_secs(5);
pub const RETRY_MAX: Duration = Duration::from_secs(300);
/// How long the shell sleeps at most, so that a jump of the wall clock is noticed.
pub const LOOK_EVERY: Duration = Duration::from_secs(60);
/// An attempt that was not answered by then counts as failed. The shell's own time limit is shorter.
pub const ATTEMPT_MAX: Duration = Duration::from_secs(60);
/// A certificate of a short life is retried so many times within it, however long the outage.
const RETRIES_PER_LIFE: u64 = 20;

/// How a certificate stands at a moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Its life has not begun: this host's clock is behind control's.
    NotYetValid,
    Fresh,
    /// A third of the life or less is left, and it was not renewed: someone must look.
    Ageing,
    Expired,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Ask control for a new leaf; answer by [`Renewal::handle_renewed`] or [`Renewal::handle_failed`].
    Renew,
    /// The standing changed: log it, and show it.
    Tell(Standing),
}

#[derive(Debug)]
pub struct Renewal {
    not_before: UnixMs,
    not_after: UnixMs,
    state: State,
    /// Attempts that failed since the certificate was taken into use.
    failures: u32,
    told: Standing,
    rng: Rng,
    commands: VecDeque<Command>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// The first third: nothing failed yet.
    Fresh {
        renew_at: UnixMs,
    },
    Retrying {
        retry_at: UnixMs,
        wait: u64,
    },
    Running {
        since: UnixMs,
    },
}

impl Renewal {
    /// A certificate that is valid from `not_before` to `not_after`.
    pub fn new(not_before: UnixMs, not_after: UnixMs, seed: u64) -> Self {
        let mut renewal = Self {
            not_before,
            not_after,
            state: State::Fresh { renew_at: 0 },
            failures: 0,
            told: Standing::Fresh,
            rng: Rng::new(seed),
            commands: VecDeque::new(),
        };
        renewal.begin_life();
        renewal
    }

    /// The attempt brought a new certificate, which is in use from now on.
    pub fn handle_renewed(&mut self, not_before: UnixMs, not_after: UnixMs, now: UnixMs) {
        self.not_before = not_before;
        self.not_after = not_after;
        self.begin_life();
        self.tell(now);
        // A certificate that is due at once again (its life is shorter than the clocks' difference) must not
        // become a loop of renewals.
        if let State::Fresh { renew_at } = self.state
            && renew_at <= now
        {
            self.retry(now);
        }
    }

    /// The attempt failed.
    pub fn handle_failed(&mut self, now: UnixMs) {
        if let State::Running { .. } = self.state {
            self.retry(now);
        }
    }

    /// An operator asks, or the key may be known to others: renew now.
    pub fn handle_wanted(&mut self, now: UnixMs) {
        if !matches!(self.state, State::Running { .. }) {
            self.run(now);
        }
    }

    pub fn handle_timeout(&mut self, now: UnixMs) {
        self.tell(now);
        self.heed_clock(now);
        match self.state {
            State::Fresh { .. } if now < self.not_before => self.wait_for_life(now),
            State::Fresh { renew_at } if renew_at <= now => self.run(now),
            State::Retrying { retry_at, .. }
                if retry_at <= now && self.failures == 0 && self.not_before <= now =>
            {
                self.begin_life();
            }
            State::Retrying { retry_at, .. } if retry_at <= now => self.run(now),
            State::Running { since } if since + millis(ATTEMPT_MAX) <= now => self.retry(now),
            State::Fresh { .. } | State::Retrying { .. } | State::Running { .. } => (),
        }
    }

    pub fn poll_command(&mut self) -> Option<Command> {
        self.commands.pop_front()
    }

    /// How long to sleep. Not a moment: the clock may be another one when it comes.
    pub fn poll_sleep(&self, now: UnixMs) -> Duration {
        let at = match self.state {
            State::Fresh { renew_at } => renew_at,
            State::Retrying { retry_at, .. } => retry_at,
            State::Running { since } => since + millis(ATTEMPT_MAX),
        };
        Duration::from_millis(at.saturating_sub(now)).min(LOOK_EVERY)
    }

    pub fn standing(&self, now: UnixMs) -> Standing {
        if now < self.not_before {
            Standing::NotYetValid
        } else if self.not_after <= now {
            Standing::Expired
        } else if self.not_after - now <= self.life() / 3 {
            Standing::Ageing
        } else {
            Standing::Fresh
        }
    }

    pub fn is_expired(&self, now: UnixMs) -> bool {
        self.standing(now) == Standing::Expired
    }

    pub fn not_after(&self) -> UnixMs {
        self.not_after
    }

    fn life(&self) -> u64 {
        self.not_after.saturating_sub(self.not_before)
    }

    fn begin_life(&mut self) {
        let third = self.life() / 3;
        let tenth = third / 10;
        let jitter = self.rng.below(2 * tenth + 1);
        let renew_at = self.not_before.saturating_add(third - tenth + jitter);
        self.state = State::Fresh { renew_at };
        self.failures = 0;
    }

    fn run(&mut self, now: UnixMs) {
        self.state = State::Running { since: now };
        self.commands.push_back(Command::Renew);
    }

    fn retry(&mut self, now: UnixMs) {
        let doubled = millis(RETRY_MIN) << (self.failures + 1).min(16);
        let longest = (self.life() / RETRIES_PER_LIFE)
            .clamp(millis(RETRY_MIN), millis(RETRY_MAX))
            .min(doubled);
        let half = (longest / 2).max(millis(RETRY_MIN));
        let wait = half + self.rng.below((longest - half.min(longest)) + 1);
        self.failures = self.failures.saturating_add(1);
        self.state = State::Retrying {
            retry_at: now.saturating_add(wait),
            wait,
        };
    }

    fn wait_for_life(&mut self, now: UnixMs) {
        let wait = (self.not_before - now).min(millis(RETRY_MAX));
        self.state = State::Retrying {
            retry_at: now.saturating_add(wait),
            wait,
        };
    }

    /// A clock that was set back leaves moments in the future that were meant to be near.
    fn heed_clock(&mut self, now: UnixMs) {
        match &mut self.state {
            State::Retrying { retry_at, wait } => {
                *retry_at = (*retry_at).min(now.saturating_add(*wait))
            }
            State::Running { since } => *since = (*since).min(now),
            State::Fresh { .. } => (),
        }
    }

    fn tell(&mut self, now: UnixMs) {
        let standing = self.standing(now);
        if standing != self.told {
            self.told = standing;
            // Only the last word counts; it bounds the queue too.
            self.commands.retain(|c| !matches!(c, Command::Tell(_)));
            self.commands.push_back(Command::Tell(standing));
        }
    }
}

const fn millis(duration: Duration) -> u64 {
    duration.as_millis() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: u64 = 3_600_000;
    const LIFE: u64 = 48 * HOUR;
    const START: UnixMs = 1_700_000_000_000;

    #[test]
    fn the_first_attempt_comes_at_a_third_of_the_life() {
        let mut moments = std::collections::BTreeSet::new();
        for seed in 0..200 {
            let mut leaf = Leaf::new(seed);
            while leaf.sleep().is_empty() {}
            let hours = (leaf.now - START) as f64 / HOUR as f64;
            assert!((14.4..=17.6).contains(&hours), "seed {seed}: {hours} h");
            moments.insert(leaf.now);
        }
        assert!(150 < moments.len(), "jitter spreads a fleet");
    }

    #[test]
    fn failures_are_retried_until_the_end_and_beyond_and_alarmed_once() {
        let mut leaf = Leaf::new(1);
        let mut attempts = Vec::new();
        let mut told = Vec::new();
        while leaf.now < START + LIFE + HOUR {
            for command in leaf.sleep() {
                match command {
                    Command::Renew => {
                        attempts.push(leaf.now);
                        leaf.renewal.handle_failed(leaf.now);
                    }
                    Command::Tell(standing) => told.push((leaf.now, standing)),
                }
            }
        }
        let gaps: Vec<u64> = attempts.windows(2).map(|w| w[1] - w[0]).collect();
        assert!(gaps[0] <= 2 * millis(RETRY_MIN), "{}", gaps[0]);
        for gap in &gaps {
            assert!(
                millis(RETRY_MIN) <= *gap && *gap <= millis(RETRY_MAX),
                "{gap}"
            );
        }
        assert!(START + LIFE < *attempts.last().unwrap());
        let [(ageing, Standing::Ageing), (expired, Standing::Expired)] = told[..] else {
            panic!("{told:?}");
        };
        let look = millis(LOOK_EVERY);
        let since = |then: u64| then..=then + look;
        assert!(since(START + LIFE - LIFE / 3).contains(&ageing));
        assert!(since(START + LIFE).contains(&expired));
    }

    #[test]
    fn a_new_certificate_begins_a_new_life() {
        let mut leaf = Leaf::new(1);
        leaf.now = START + LIFE - HOUR;
        assert_eq!(
            leaf.wake(),
            [Command::Tell(Standing::Ageing), Command::Renew]
        );
        leaf.renewal
            .handle_renewed(leaf.now, leaf.now + LIFE, leaf.now);
        assert_eq!(leaf.drain(), [Command::Tell(Standing::Fresh)]);
        let renewed = leaf.now;
        while !leaf.sleep().contains(&Command::Renew) {}
        assert!(14 * HOUR < leaf.now - renewed);
    }

    #[test]
    fn an_attempt_without_an_answer_counts_as_failed() {
        let mut leaf = Leaf::new(1);
        leaf.now = START + LIFE / 2;
        assert_eq!(leaf.wake(), [Command::Renew]);
        leaf.now += millis(ATTEMPT_MAX);
        assert_eq!(leaf.wake(), []);
        leaf.now += 2 * millis(RETRY_MIN);
        assert_eq!(leaf.wake(), [Command::Renew]);
    }

    #[test]
    fn a_clock_that_leaps_ahead_renews_at_once_and_one_set_back_does_not_wait_long() {
        let mut leaf = Leaf::new(1);
        leaf.now += 100 * LIFE;
        assert_eq!(
            leaf.wake(),
            [Command::Tell(Standing::Expired), Command::Renew]
        );
        leaf.renewal.handle_failed(leaf.now);
        leaf.now = START + HOUR;
        assert_eq!(leaf.wake(), [Command::Tell(Standing::Fresh)]);
        leaf.now += 2 * millis(RETRY_MIN);
        assert_eq!(leaf.wake(), [Command::Renew]);
        leaf.now = START - HOUR;
        assert_eq!(leaf.wake(), [Command::Tell(Standing::NotYetValid)]);
        leaf.now += millis(ATTEMPT_MAX);
        leaf.wake();
        leaf.now += 4 * millis(RETRY_MIN);
        assert_eq!(leaf.wake(), [Command::Renew]);
    }

    #[test]
    fn one_whose_life_has_not_begun_is_asked_for_again_until_one_is_good() {
        let day = 24 * HOUR;
        let mut leaf = Leaf::new(1);
        leaf.now = START + LIFE / 2;
        assert_eq!(leaf.wake(), [Command::Renew]);
        // Control's clock is a day ahead.
        for _ in 0..3 {
            let begins = leaf.now + day;
            leaf.renewal.handle_renewed(begins, begins + LIFE, leaf.now);
            let asked = leaf.now;
            while !leaf.wake().contains(&Command::Renew) {
                leaf.now += millis(leaf.renewal.poll_sleep(leaf.now));
            }
            assert_eq!(leaf.now - asked, millis(RETRY_MAX));
        }
        // Ours is minutes behind: nothing more is asked for when its life begins.
        let begins = leaf.now + 2 * 60_000;
        leaf.renewal.handle_renewed(begins, begins + LIFE, leaf.now);
        while leaf.sleep().iter().all(|c| *c != Command::Renew) {}
        assert!(14 * HOUR < leaf.now - begins);
    }

    #[test]
    fn a_certificate_that_is_due_when_it_comes_makes_no_loop() {
        let mut leaf = Leaf::new(1);
        leaf.now = START + LIFE;
        leaf.wake();
        for _ in 0..3 {
            leaf.renewal.handle_renewed(START, START + LIFE, leaf.now);
            leaf.drain();
            assert!(RETRY_MIN <= leaf.renewal.poll_sleep(leaf.now));
            leaf.now += 2 * millis(RETRY_MIN);
            assert_eq!(leaf.wake(), [Command::Renew]);
        }
    }

    #[test]
    fn a_short_life_is_retried_often_enough() {
        let life = 180_000;
        let mut leaf = Leaf {
            renewal: Renewal::new(START, START + life, 1),
            now: START,
        };
        let mut attempts = 0;
        while leaf.now < START + life {
            if leaf.sleep().contains(&Command::Renew) {
                attempts += 1;
                leaf.renewal.handle_failed(leaf.now);
            }
        }
        assert!(10 < attempts, "{attempts}");
    }

    /// The goal: whatever the clock and control do, an attempt is never far away once it is due, never runs
    /// twice at a time, and the standing that was told is the true one. Method: a seeded random walk with
    /// jumps of the clock in both directions and lives of every length, empty and reversed ones too.
    #[test]
    fn what_is_due_is_tried_whatever_the_clock_does() {
        for seed in 0..1_000 {
            let mut rng = Rng::new(seed);
            let mut leaf = Leaf::new(seed);
            let mut told = Standing::Fresh;
            let mut running = false;
            for _ in 0..300 {
                match rng.below(6) {
                    0 => leaf.now += rng.below(LIFE),
                    1 => leaf.now = leaf.now.saturating_sub(rng.below(LIFE)),
                    2 => {
                        leaf.renewal.handle_failed(leaf.now);
                        running = false;
                    }
                    3 if running => {
                        let not_before = leaf.now.saturating_sub(rng.below(HOUR));
                        let not_after = not_before.saturating_add(rng.below(LIFE)) - rng.below(9);
                        leaf.renewal.handle_renewed(not_before, not_after, leaf.now);
                        running = false;
                    }
                    _ => leaf.now += millis(leaf.renewal.poll_sleep(leaf.now)),
                }
                running &= matches!(leaf.renewal.state, State::Running { .. });
                leaf.renewal.handle_timeout(leaf.now);
                // An attempt whose time is over ends without a command.
                running &= matches!(leaf.renewal.state, State::Running { .. });
                for command in leaf.drain() {
                    match command {
                        Command::Renew => {
                            assert!(!running, "seed {seed}: two attempts at a time");
                            running = true;
                        }
                        Command::Tell(standing) => told = standing,
                    }
                }
                assert_eq!(told, leaf.renewal.standing(leaf.now), "seed {seed}");
                if let State::Retrying { retry_at, .. } = leaf.renewal.state {
                    let far = leaf.now + millis(RETRY_MAX);
                    assert!(retry_at <= far, "seed {seed}: out of reach");
                }
            }
        }
    }

    struct Leaf {
        renewal: Renewal,
        now: UnixMs,
    }

    impl Leaf {
        fn new(seed: u64) -> Self {
            Self {
                renewal: Renewal::new(START, START + LIFE, seed),
                now: START,
            }
        }

        fn sleep(&mut self) -> Vec<Command> {
            self.now += millis(self.renewal.poll_sleep(self.now));
            self.wake()
        }

        fn wake(&mut self) -> Vec<Command> {
            self.renewal.handle_timeout(self.now);
            self.drain()
        }

        fn drain(&mut self) -> Vec<Command> {
            std::iter::from_fn(|| self.renewal.poll_command()).collect()
        }
    }
}
