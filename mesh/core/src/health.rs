//! Whether a service counts as healthy, from the results of its checks, as a pure state machine.
//!
//! The first result decides at once: a service is not listed before it, and waits for no more than it.
//! Afterwards only [`Thresholds::rise`] good or [`Thresholds::fall`] bad results in a row change anything.
//!
//! Calls speak too, against a service only: [`CALLS_FALL`] that its program did not take, in a row and within
//! [`CALLS_WINDOW`], unlist it before its next check. Only checks bring it back, by the same `rise`; they come soon then, and
//! ever later up to the interval. A service without a check is checked while it is unlisted so, and not otherwise.

use std::time::{Duration, Instant};

/// Calls in a row that the program did not take, after which a service is unlisted. One or two are a restart.
pub const CALLS_FALL: u32 = 3;
/// How old the first of them may be: what failed long ago says nothing of now.
pub const CALLS_WINDOW: Duration = Duration::from_secs(10);
/// When a service that calls unlisted is checked first. The time doubles until it is the interval.
pub const RECHECK: Duration = Duration::from_secs(1);

/// How a service is checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Thresholds {
    /// From the beginning of one check to that of the next.
    pub interval: Duration,
    /// A check without a result by then failed.
    pub timeout: Duration,
    pub rise: u32,
    pub fall: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verdict {
    /// No result yet: not listed.
    Unknown,
    Healthy,
    Unhealthy,
    /// It is going away: not listed any more, whatever its checks say.
    Draining,
}

impl Verdict {
    pub const fn is_healthy(self) -> bool {
        matches!(self, Self::Healthy)
    }

    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::Healthy => "healthy",
            Self::Unhealthy => "unhealthy",
            Self::Draining => "draining",
        }
    }
}

/// One check, counted from 1. The result of an older one is ignored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Check(pub u64);

#[derive(Debug)]
pub struct HealthMachine {
    thresholds: Thresholds,
    verdict: Verdict,
    /// Results in a row that speak against the verdict.
    against: u32,
    check: Check,
    next: Next,
    /// Checked only while calls have unlisted it.
    unchecked: bool,
    /// Calls in a row that were not taken, and when the first of them was.
    failed: Option<(u32, Instant)>,
    /// Calls have unlisted it: the time until the check after the next.
    recheck: Option<Duration>,
}

#[derive(Clone, Copy, Debug)]
enum Next {
    Start { at: Instant },
    Result { by: Instant, next_at: Instant },
    Nothing,
}

impl HealthMachine {
    /// A machine whose first check is due now. Thresholds of 0 count as 1.
    pub fn new(thresholds: Thresholds, now: Instant) -> Self {
        Self {
            thresholds,
            verdict: Verdict::Unknown,
            against: 0,
            check: Check(0),
            next: Next::Start { at: now },
            unchecked: false,
            failed: None,
            recheck: None,
        }
    }

    /// A machine of a service without a check: healthy until calls say otherwise.
    pub fn unchecked(thresholds: Thresholds, now: Instant) -> Self {
        Self {
            verdict: Verdict::Healthy,
            next: Next::Nothing,
            unchecked: true,
            ..Self::new(thresholds, now)
        }
    }

    /// Returns the check to be started now, if one is due. One that runs still is given up then.
    pub fn handle_timeout(&mut self, now: Instant) -> Option<Check> {
        if let Next::Result { by, next_at } = self.next
            && by <= now
        {
            self.next = Next::Start { at: next_at };
            self.judge(false);
        }
        match self.next {
            Next::Start { at } if at <= now => {
                self.check.0 += 1;
                let interval = self.thresholds.interval;
                let wait = self.recheck.map_or(interval, |wait| wait.min(interval));
                self.recheck = self.recheck.map(|_| wait * 2);
                self.next = Next::Result {
                    by: now + self.thresholds.timeout,
                    next_at: now + wait,
                };
                Some(self.check)
            }
            Next::Start { .. } | Next::Result { .. } | Next::Nothing => None,
        }
    }

    pub fn handle_result(&mut self, check: Check, good: bool) {
        if let Next::Result { next_at, .. } = self.next
            && check == self.check
        {
            self.next = Next::Start { at: next_at };
            self.judge(good);
        }
    }

    /// What became of a call: whether the program took the connection.
    pub fn handle_call(&mut self, good: bool, now: Instant) {
        if good || self.verdict != Verdict::Healthy {
            self.failed = None;
            return;
        }
        let (count, since) = match self.failed {
            Some((count, since)) if now < since + CALLS_WINDOW => (count + 1, since),
            Some(_) | None => (1, now),
        };
        self.failed = Some((count, since));
        if CALLS_FALL <= count {
            self.unlist(now);
        }
    }

    /// Calls failed, seen here or by whoever had the service before. A check that runs still saw the time before them: its
    /// result does not count.
    pub fn unlist(&mut self, now: Instant) {
        if self.verdict == Verdict::Draining {
            return;
        }
        self.verdict = Verdict::Unhealthy;
        self.against = 0;
        self.failed = None;
        let wait = RECHECK.min(self.thresholds.interval);
        self.recheck = Some(wait);
        self.next = Next::Start { at: now + wait };
    }

    /// Whether a call that is taken changes anything.
    pub fn counts_calls(&self) -> bool {
        self.failed.is_some()
    }

    /// The service goes away: it is unlisted now and not checked any more.
    pub fn drain(&mut self) {
        self.verdict = Verdict::Draining;
        self.next = Next::Nothing;
    }

    pub fn verdict(&self) -> Verdict {
        self.verdict
    }

    pub fn poll_timeout(&self) -> Option<Instant> {
        match self.next {
            Next::Start { at } => Some(at),
            Next::Result { by, .. } => Some(by),
            Next::Nothing => None,
        }
    }

    fn judge(&mut self, good: bool) {
        let (agrees, needed) = match self.verdict {
            Verdict::Unknown => (false, 1),
            Verdict::Healthy => (good, self.thresholds.fall),
            Verdict::Unhealthy => (!good, self.thresholds.rise),
            Verdict::Draining => return,
        };
        if agrees {
            self.against = 0;
            return;
        }
        self.against += 1;
        if needed <= self.against {
            self.against = 0;
            self.verdict = if good {
                Verdict::Healthy
            } else {
                Verdict::Unhealthy
            };
            self.failed = None;
        }
        if self.verdict == Verdict::Healthy {
            self.recheck = None;
            if self.unchecked {
                self.next = Next::Nothing;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    const THRESHOLDS: Thresholds = Thresholds {
        interval: Duration::from_secs(5),
        timeout: Duration::from_secs(1),
        rise: 2,
        fall: 3,
    };

    #[test]
    fn the_first_result_decides() {
        for (good, verdict) in [(true, Verdict::Healthy), (false, Verdict::Unhealthy)] {
            let mut service = Service::new();
            assert_eq!(service.machine.verdict(), Verdict::Unknown);
            service.check(good);
            assert_eq!(service.machine.verdict(), verdict);
        }
    }

    #[test]
    fn only_results_in_a_row_change_it() {
        let mut service = Service::new();
        for (good, verdict) in [
            (true, Verdict::Healthy),
            (false, Verdict::Healthy),
            (false, Verdict::Healthy),
            (true, Verdict::Healthy),
            (false, Verdict::Healthy),
            (false, Verdict::Healthy),
            (false, Verdict::Unhealthy),
            (true, Verdict::Unhealthy),
            (false, Verdict::Unhealthy),
            (true, Verdict::Unhealthy),
            (true, Verdict::Healthy),
        ] {
            service.check(good);
            assert_eq!(service.machine.verdict(), verdict);
        }
    }

    #[test]
    fn a_check_without_a_result_failed_and_its_late_result_is_ignored() {
        let mut service = Service::new();
        let check = service.start();
        service.now += THRESHOLDS.timeout;
        assert_eq!(service.machine.handle_timeout(service.now), None);
        assert_eq!(service.machine.verdict(), Verdict::Unhealthy);
        service.machine.handle_result(check, true);
        service.machine.handle_result(check, true);
        assert_eq!(service.machine.verdict(), Verdict::Unhealthy);
    }

    #[test]
    fn checks_begin_an_interval_apart() {
        let mut service = Service::new();
        let start = service.now;
        for n in 0..5 {
            let check = service.start();
            assert_eq!(service.now, start + THRESHOLDS.interval * n);
            service.machine.handle_result(check, true);
        }
    }

    #[test]
    fn calls_in_a_row_unlist_and_only_checks_bring_back() {
        let mut service = Service::new();
        service.check(true);
        let machine = &mut service.machine;
        for good in [false, false, true, false, false] {
            machine.handle_call(good, service.now);
            assert_eq!(machine.verdict(), Verdict::Healthy);
        }
        assert!(machine.counts_calls());
        machine.handle_call(false, service.now);
        assert_eq!(machine.verdict(), Verdict::Unhealthy);
        for _ in 0..10 {
            machine.handle_call(true, service.now);
        }
        assert_eq!(machine.verdict(), Verdict::Unhealthy);
        service.check(true);
        assert_eq!(service.machine.verdict(), Verdict::Unhealthy);
        service.check(true);
        assert_eq!(service.machine.verdict(), Verdict::Healthy);
    }

    #[test]
    fn calls_that_failed_long_ago_do_not_count() {
        let mut service = Service::new();
        service.check(true);
        for _ in 0..20 {
            service.machine.handle_call(false, service.now);
            service.now += CALLS_WINDOW / 2;
            assert_eq!(service.machine.verdict(), Verdict::Healthy);
        }
    }

    #[test]
    fn a_check_from_before_the_failed_calls_does_not_count_and_the_next_come_soon() {
        let mut service = Service::new();
        service.check(true);
        let early = service.start();
        for _ in 0..CALLS_FALL {
            service.machine.handle_call(false, service.now);
        }
        service.machine.handle_result(early, true);
        assert_eq!(service.machine.verdict(), Verdict::Unhealthy);
        let mut waits = Vec::new();
        for _ in 0..6 {
            let before = service.now;
            service.check(false);
            waits.push((service.now - before).as_secs());
        }
        assert_eq!(waits, [1, 1, 2, 4, 5, 5]);
        service.check(true);
        service.check(true);
        assert_eq!(service.machine.verdict(), Verdict::Healthy);
        let before = service.now;
        service.start();
        assert_eq!(service.now - before, THRESHOLDS.interval);
    }

    #[test]
    fn a_service_without_a_check_is_checked_while_calls_have_unlisted_it() {
        let mut service = Service::new();
        service.machine = HealthMachine::unchecked(THRESHOLDS, service.now);
        assert_eq!(service.machine.verdict(), Verdict::Healthy);
        for _ in 0..3 {
            assert_eq!(service.machine.poll_timeout(), None);
            for _ in 0..CALLS_FALL {
                service.machine.handle_call(false, service.now);
            }
            assert_eq!(service.machine.verdict(), Verdict::Unhealthy);
            for good in [false, true, false, true, true] {
                assert_eq!(service.machine.verdict(), Verdict::Unhealthy);
                service.check(good);
            }
            assert_eq!(service.machine.verdict(), Verdict::Healthy);
        }
    }

    #[test]
    fn draining_is_final() {
        let mut service = Service::new();
        let check = service.start();
        service.machine.drain();
        service.machine.handle_result(check, true);
        for _ in 0..CALLS_FALL {
            service.machine.handle_call(false, service.now);
        }
        service.machine.unlist(service.now);
        assert_eq!(service.machine.verdict(), Verdict::Draining);
        assert_eq!(service.machine.poll_timeout(), None);
    }

    /// The goal: the verdict turns exactly when the last results in a row are long enough. Method: a seeded
    /// random walk beside a model that keeps every result.
    #[test]
    fn it_agrees_with_the_whole_history() {
        for seed in 0..500 {
            let mut rng = Rng::new(seed);
            let mut service = Service::new();
            let mut verdict = Verdict::Unknown;
            let mut history: Vec<bool> = Vec::new();
            for _ in 0..200 {
                let check = service.start();
                let good = match rng.below(3) {
                    0 => {
                        service.now += THRESHOLDS.timeout;
                        service.machine.handle_timeout(service.now);
                        false
                    }
                    result => {
                        service.machine.handle_result(check, result == 1);
                        result == 1
                    }
                };
                history.push(good);
                let row = history.iter().rev().take_while(|g| **g == good).count();
                let needed = match (verdict, good) {
                    (Verdict::Unknown, _) => 1,
                    (_, true) => THRESHOLDS.rise as usize,
                    (_, false) => THRESHOLDS.fall as usize,
                };
                if needed <= row {
                    verdict = if good {
                        Verdict::Healthy
                    } else {
                        Verdict::Unhealthy
                    };
                }
                assert_eq!(service.machine.verdict(), verdict, "seed {seed}");
            }
        }
    }

    struct Service {
        machine: HealthMachine,
        now: Instant,
    }

    impl Service {
        #[expect(
            clippy::disallowed_methods,
            reason = "a test needs one Instant to begin with"
        )]
        fn new() -> Self {
            let now = Instant::now();
            Self {
                machine: HealthMachine::new(THRESHOLDS, now),
                now,
            }
        }

        fn start(&mut self) -> Check {
            self.now = self.now.max(self.machine.poll_timeout().unwrap());
            self.machine.handle_timeout(self.now).unwrap()
        }

        fn check(&mut self, good: bool) {
            let check = self.start();
            self.machine.handle_result(check, good);
        }
    }
}
