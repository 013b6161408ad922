//! What all connections of a process may hold together: bytes that came and were not read, and bytes that are to
//! leave and have not. Each connection has a ceiling of its own; a thousand ceilings are more than a host has.
//!
//! Nothing is stopped in the middle: who opens and accepts asks [`Budget::is_spent`] first, and what is open goes
//! on, and gives back.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Bytes in buffers, of all connections that were made with it, on whatever threads.
#[derive(Debug)]
pub struct Budget {
    held: AtomicUsize,
    max: usize,
}

impl Budget {
    /// At `max` bytes it is spent.
    pub fn new(max: usize) -> Arc<Self> {
        Arc::new(Self {
            held: AtomicUsize::new(0),
            max,
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
        self.held() >= self.max
    }
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

    /// The connection holds so much now.
    pub(super) fn note(&mut self, bytes: usize) {
        if bytes > self.noted {
            let more = bytes - self.noted;
            self.budget.held.fetch_add(more, Ordering::Relaxed);
        } else if bytes < self.noted {
            let less = self.noted - bytes;
            self.budget.held.fetch_sub(less, Ordering::Relaxed);
        }
        self.noted = bytes;
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.note(0);
    }
}
