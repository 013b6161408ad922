//! Whether a service counts as healthy, from the results of its checks, as a pure state machine.
//!
//! The first result decides at once: a service is not listed before it, and waits for no more than it.
//! Afterwards only [`Thresholds::rise`] good or [`Thresholds::fall`] bad results in a row change anything.

use std::time::{Duration, Instant};

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
                self.next = Next::Result {
                    by: now + self.thresholds.timeout,
                    next_at: now + self.thresholds.interval,
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
    fn draining_is_final() {
        let mut service = Service::new();
        let check = service.start();
        service.machine.drain();
        service.machine.handle_result(check, true);
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
