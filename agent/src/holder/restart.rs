//! When the next worker may start, after one that ended by itself.

use std::time::{Duration, Instant};

/// A worker that lived so long did not die of what it finds at its start: it is replaced at once.
const STEADY: Duration = Duration::from_secs(10);
const BACKOFF_FIRST: Duration = Duration::from_millis(100);
/// The longest pause.
pub(super) const BACKOFF_LAST: Duration = Duration::from_secs(5);

/// When the next worker may start.
#[derive(Debug, Default)]
pub(super) struct Restart {
    not_before: Option<Instant>,
    pause: Duration,
}

impl Restart {
    /// Tells that a worker ended which had lived for `life`; returns the pause.
    pub(super) fn ended(&mut self, life: Duration, now: Instant) -> Duration {
        let pause = if life >= STEADY {
            Duration::ZERO
        } else {
            self.pause
        };
        self.not_before = Some(now + pause);
        self.pause = (pause * 2).clamp(BACKOFF_FIRST, BACKOFF_LAST);
        pause
    }

    pub(super) fn wait(&self, now: Instant) -> Duration {
        self.not_before
            .map_or(Duration::ZERO, |at| at.saturating_duration_since(now))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_is_replaced_at_once_and_then_ever_later() {
        let now = Instant::now();
        let mut restart = Restart::default();
        let pauses: Vec<u128> = (0..9)
            .map(|_| restart.ended(Duration::from_secs(1), now).as_millis())
            .collect();
        assert_eq!(pauses, [0, 100, 200, 400, 800, 1_600, 3_200, 5_000, 5_000]);
        assert_eq!(restart.wait(now), BACKOFF_LAST);
        assert_eq!(restart.ended(STEADY, now), Duration::ZERO);
        assert_eq!(restart.ended(Duration::ZERO, now), BACKOFF_FIRST);
    }
}
