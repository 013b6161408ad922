//! What a service manager is told: ready, stopping, alive. Without one nothing is said.

use std::time::{Duration, Instant};

use sd_notify::NotifyState;

/// Everything is bound and served.
pub fn ready() {
    tell(NotifyState::Ready);
}

/// No new work is taken from now on.
pub fn stopping() {
    tell(NotifyState::Stopping);
}

fn tell(state: NotifyState<'_>) {
    if let Err(error) = sd_notify::notify(&[state]) {
        log::warn!(
            "the service manager can not be told how we are: {error}; it may take us for dead"
        );
    }
}

/// The sign of life that `WatchdogSec` of the unit asks for.
#[derive(Debug)]
pub struct Watchdog {
    /// `None`: nobody asks.
    every: Option<Duration>,
    next: Instant,
}

impl Watchdog {
    /// Half of the time that we are given, as sd_watchdog_enabled(3) advises.
    #[must_use]
    pub fn new(now: Instant) -> Self {
        Self {
            every: sd_notify::watchdog_enabled().map(|given| given / 2),
            next: now,
        }
    }

    /// How often a sign is due.
    #[must_use]
    pub fn every(&self) -> Option<Duration> {
        self.every
    }

    /// To be called by what must not hang, at least every [`Self::every`]; gives the sign when it is due.
    pub fn alive(&mut self, now: Instant) {
        let Some(every) = self.every else { return };
        if self.next <= now {
            tell(NotifyState::Watchdog);
            // Called a bit before it is due, it must not be late by a whole turn.
            self.next = now + every / 2;
        }
    }
}
