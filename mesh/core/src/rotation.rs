//! Which of a few servers gets the next connection: in turn, with those that failed left out for a while.
//!
//! Made for servers of which nothing is known but whether they answered. One that failed comes back by a single
//! connection, which tries it; the others do not wait for that. Nobody is left out for good: when no better one answers,
//! those that are left out are tried too, so that a verdict on all of them does not refuse everything.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// How long the first failure leaves a server out; each further one in a row doubles it.
pub const OUT_FIRST: Duration = Duration::from_secs(1);
/// The longest: how late the return of a server may be noticed.
pub const OUT_MAX: Duration = Duration::from_secs(60);

/// The order of one group of servers, each known by a `T`.
#[derive(Clone, Debug)]
pub struct Rotation<T> {
    turn: usize,
    out: BTreeMap<T, Out>,
}

/// A server that failed and has not answered since.
#[derive(Clone, Copy, Debug)]
struct Out {
    failures: u32,
    until: Instant,
}

impl<T> Default for Rotation<T> {
    fn default() -> Self {
        Self {
            turn: 0,
            out: BTreeMap::new(),
        }
    }
}

impl<T: Copy + Ord> Rotation<T> {
    /// Whose turn it is, for who has a connection to it already and tells so by [`Rotation::took`].
    pub fn turn(&self, all: &[T], unfit: impl Fn(&T) -> bool, now: Instant) -> Option<T> {
        self.sorted(all, unfit, now).first().copied()
    }

    /// `server` had its turn.
    pub fn took(&mut self, all: &[T], server: T) {
        let at = all.iter().position(|one| *one == server);
        self.turn = at.map_or(0, |at| at + 1);
    }

    /// All servers in the order in which the next connection tries them; the first has had its turn then. `unfit` are
    /// those that something else knows to be down, as a health check; they come last, with those that are left out.
    ///
    /// `trial` is how long an attempt may take: until then nobody else tries a server that comes back.
    pub fn order(
        &mut self,
        all: &[T],
        unfit: impl Fn(&T) -> bool,
        trial: Duration,
        now: Instant,
    ) -> Vec<T> {
        self.out.retain(|server, _| all.contains(server));
        let order = self.sorted(all, unfit, now);
        // Only the first is sure to be tried.
        if let Some(first) = order.first().copied() {
            self.took(all, first);
            if let Some(out) = self.out.get_mut(&first) {
                out.until = now + trial;
            }
        }
        order
    }

    fn sorted(&self, all: &[T], unfit: impl Fn(&T) -> bool, now: Instant) -> Vec<T> {
        // The list may be another one than last time.
        let (later, earlier) = all.split_at(self.turn.checked_rem(all.len()).unwrap_or(0));
        let in_turn = earlier.iter().chain(later).copied();
        let is_out = |server: &T| self.out.get(server).is_some_and(|out| now < out.until);
        let (mut order, last): (Vec<T>, Vec<T>) =
            in_turn.partition(|server| !unfit(server) && !is_out(server));
        order.extend(last);
        order
    }

    /// `server` did not take a connection.
    pub fn failed(&mut self, server: T, now: Instant) {
        let out = self.out.entry(server).or_insert(Out {
            failures: 0,
            until: now,
        });
        out.failures = out.failures.saturating_add(1);
        let doubled =
            OUT_FIRST.saturating_mul(1_u32.checked_shl(out.failures - 1).unwrap_or(u32::MAX));
        out.until = now + doubled.min(OUT_MAX);
    }

    /// `server` took a connection.
    pub fn answered(&mut self, server: T) {
        self.out.remove(&server);
    }
}

#[cfg(test)]
#[expect(
    clippy::disallowed_methods,
    reason = "an Instant has no other beginning"
)]
mod tests {
    use super::*;

    const TRIAL: Duration = Duration::from_secs(5);

    fn fit(_: &u8) -> bool {
        false
    }

    #[test]
    fn each_has_its_turn() {
        let mut rotation = Rotation::default();
        let now = Instant::now();
        let mut firsts = Vec::new();
        for _ in 0..6 {
            let order = rotation.order(&[1, 2, 3], fit, TRIAL, now);
            assert_eq!(order.len(), 3);
            firsts.push(order[0]);
        }
        assert_eq!(firsts, [1, 2, 3, 1, 2, 3]);
        assert_eq!(rotation.order(&[], fit, TRIAL, now), [] as [u8; 0]);
        assert_eq!(rotation.order(&[9], fit, TRIAL, now), [9]);
    }

    #[test]
    fn a_kept_connection_takes_the_turn_of_its_server() {
        let mut rotation = Rotation::default();
        let now = Instant::now();
        let mut served = Vec::new();
        for _ in 0..6 {
            let turn = rotation.turn(&[1, 2, 3], |s| *s == 2, now).unwrap();
            assert_eq!(rotation.turn(&[1, 2, 3], |s| *s == 2, now), Some(turn));
            rotation.took(&[1, 2, 3], turn);
            served.push(turn);
        }
        assert_eq!(served, [1, 3, 1, 3, 1, 3], "none gets the share of another");
        assert_eq!(rotation.turn(&[], fit, now), None);
    }

    #[test]
    fn what_failed_comes_last_and_back_by_one_attempt() {
        let mut rotation = Rotation::default();
        let start = Instant::now();
        rotation.failed(1, start);
        for _ in 0..4 {
            assert_eq!(rotation.order(&[1, 2], fit, TRIAL, start), [2, 1]);
        }
        let later = start + OUT_FIRST;
        let firsts: Vec<u8> = (0..4)
            .map(|_| rotation.order(&[1, 2], fit, TRIAL, later)[0])
            .collect();
        assert_eq!(firsts.iter().filter(|f| **f == 1).count(), 1, "{firsts:?}");
        rotation.answered(1);
        let firsts: Vec<u8> = (0..4)
            .map(|_| rotation.order(&[1, 2], fit, TRIAL, later)[0])
            .collect();
        assert_eq!(firsts.iter().filter(|f| **f == 1).count(), 2, "{firsts:?}");
    }

    #[test]
    fn failures_in_a_row_double_up_to_a_bound() {
        let mut rotation = Rotation::default();
        let now = Instant::now();
        for n in 0..100_u32 {
            rotation.failed(1, now);
            let expected = OUT_FIRST.saturating_mul(1 << n.min(20)).min(OUT_MAX);
            let just_before = now + expected - Duration::from_millis(1);
            let mut looked = rotation.clone();
            assert_eq!(looked.order(&[1, 2], fit, TRIAL, just_before)[1], 1, "{n}");
            let mut looked = rotation.clone();
            let both = (0..2).map(|_| looked.order(&[1, 2], fit, TRIAL, now + expected)[0]);
            assert!(both.collect::<Vec<_>>().contains(&1), "{n}");
        }
    }

    #[test]
    fn when_none_is_left_all_are_tried() {
        let mut rotation = Rotation::default();
        let now = Instant::now();
        rotation.failed(1, now);
        let order = rotation.order(&[1, 2], |server| *server == 2, TRIAL, now);
        assert_eq!(order.len(), 2);
        assert!(order.contains(&1) && order.contains(&2));
        assert_eq!(rotation.order(&[1, 2, 3], |s| *s == 2, TRIAL, now)[0], 3);
    }

    #[test]
    fn what_is_no_more_listed_is_forgotten() {
        let mut rotation = Rotation::default();
        let now = Instant::now();
        rotation.failed(1, now);
        rotation.order(&[2], fit, TRIAL, now);
        assert!(rotation.out.is_empty());
    }
}
