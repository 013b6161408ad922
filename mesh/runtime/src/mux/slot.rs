//! What a connection keeps of each stream, beside its rules.

use std::task::Waker;

use mesh_core::reason::Reason;

use super::Place;
use super::received::Received;

/// A stream's bytes and who waits for them.
#[derive(Debug, Default)]
pub(super) struct Slot {
    pub(super) received: Received,
    pub(super) ended: bool,
    pub(super) reset: Option<Reason>,
    /// What the app said with its reset.
    pub(super) code: u32,
    pub(super) accepted: bool,
    pub(super) round: u64,
    pub(super) sent_in_round: usize,
    /// Its place among those who wait to write.
    pub(super) place: Option<Place>,
    /// What it has had on the scale of [`Shared::fair`].
    pub(super) had: u64,
    pub(super) reader: Option<Waker>,
    pub(super) writer: Option<Waker>,
    /// Who only wants to know of a reset.
    pub(super) watcher: Option<Waker>,
}

impl Slot {
    /// The stream is reset; who first said why is heard.
    pub(super) fn end_by(&mut self, reason: Reason) {
        self.reset.get_or_insert(reason);
        wake(&mut self.reader);
        wake(&mut self.writer);
        wake(&mut self.watcher);
    }
}

/// Wakes who waits, once.
pub(super) fn wake(waker: &mut Option<Waker>) {
    if let Some(waker) = waker.take() {
        waker.wake();
    }
}
