//! What all connections of a process may hold together: bytes that came and were not read, and bytes that are to
//! leave and have not. Each connection has a ceiling of its own; a thousand ceilings are more than a host has.
//!
//! Who opens and accepts asks [`Budget::is_spent`] first; what is open goes on, and gives back.
//!
//! A party that has many connections has a part of the budget: the last quarter of the whole is for parties that hold
//! little, so that nobody locks the others out. What is open may grow into that quarter; when the whole is spent, a
//! connection that still grows is ended if its party holds more than its own.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Bytes in buffers, of all connections that were made with it, on whatever threads.
#[derive(Debug)]
pub struct Budget {
    held: AtomicUsize,
    max: usize,
    /// What this is a part of.
    whole: Option<Arc<Self>>,
}

impl Budget {
    /// At `max` bytes it is spent.
    pub fn new(max: usize) -> Arc<Self> {
        Arc::new(Self {
            held: AtomicUsize::new(0),
            max,
            whole: None,
        })
    }

    /// For the connections of one party: what it holds is held of the whole, too.
    pub fn part(self: &Arc<Self>) -> Arc<Self> {
        Arc::new(Self {
            held: AtomicUsize::new(0),
            max: self.max,
            whole: Some(Arc::clone(self)),
        })
    }

    /// Bytes that are held now.
    pub fn held(&self) -> usize {
        self.held.load(Ordering::Relaxed)
    }

    /// Bytes at which it is spent.
    pub fn max(&self) -> usize {
        self.max
    }

    /// Whether there should be no new streams and connections now.
    pub fn is_spent(&self) -> bool {
        let Some(whole) = &self.whole else {
            return self.held() >= self.max;
        };
        whole.is_spent() || is_for_others(whole.held(), self.held(), whole.max)
    }

    /// Whether a connection of this party that grows is to be ended.
    fn is_overdrawn(&self) -> bool {
        self.whole.as_ref().is_some_and(|whole| {
            whole.is_spent() && is_for_others(whole.held(), self.held(), whole.max)
        })
    }

    fn add(&self, bytes: usize) {
        self.held.fetch_add(bytes, Ordering::Relaxed);
        if let Some(whole) = &self.whole {
            whole.add(bytes);
        }
    }

    fn sub(&self, bytes: usize) {
        self.held.fetch_sub(bytes, Ordering::Relaxed);
        if let Some(whole) = &self.whole {
            whole.sub(bytes);
        }
    }
}

/// Whether what is left of `max`, when `used` are in use, is for others than a party that has `own` of them: the last
/// quarter is for those who have little, a quarter of that at most. One alone can have three quarters.
pub fn is_for_others(used: usize, own: usize, max: usize) -> bool {
    let reserve = max / 4;
    used >= max - reserve && own >= (reserve / 4).max(1)
}

/// What one connection has of the budget. Gives it back when the connection is gone.
#[derive(Debug)]
pub(super) struct Share {
    budget: Arc<Budget>,
    noted: usize,
}

impl Share {
    pub(super) fn of(budget: Arc<Budget>) -> Self {
        Self { budget, noted: 0 }
    }

    /// The connection holds so much now; true when it grew and must not.
    pub(super) fn note(&mut self, bytes: usize) -> bool {
        let grew = bytes > self.noted;
        if grew {
            self.budget.add(bytes - self.noted);
        } else if bytes < self.noted {
            self.budget.sub(self.noted - bytes);
        }
        self.noted = bytes;
        grew && self.budget.is_overdrawn()
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let _ = self.note(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_quarter_is_for_parties_that_hold_little() {
        let whole = Budget::new(1_600);
        let (greedy, other) = (whole.part(), whole.part());
        let mut much = Share::of(Arc::clone(&greedy));
        much.note(1_199);
        assert!(!greedy.is_spent(), "one alone has three quarters");
        much.note(1_200);
        assert!(greedy.is_spent() && !other.is_spent() && !whole.is_spent());
        let mut little = Share::of(Arc::clone(&other));
        little.note(99);
        assert!(!other.is_spent());
        little.note(100);
        assert!(other.is_spent(), "it has its share of the rest");
        assert!(!whole.part().is_spent(), "who comes anew has room");
        drop(much);
        assert!(!other.is_spent() && !greedy.is_spent());
        assert_eq!((whole.held(), greedy.held(), other.held()), (100, 0, 100));
        assert!(!little.note(1_599), "it is not spent");
        assert!(little.note(1_600), "it is");
        assert!(whole.is_spent() && whole.part().is_spent());
        let mut new = Share::of(whole.part());
        assert!(!new.note(99), "it has its own");
        assert!(!little.note(1_590), "it shrinks");
    }
}
