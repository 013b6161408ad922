//! Large buffers of a thread, lent to whoever has bytes under way. An idle connection has none, and a busy one gets
//! memory that is warm: asking the allocator for this much each time costs page faults, a fifth of a bulk transfer.

use std::cell::RefCell;

/// What each holds: 64 KiB of content and what TLS records add to it.
pub(crate) const LEN: usize = 65 * 1024;
/// Kept for the next user, a thread: 4 MiB.
const KEPT_MAX: usize = 64;

thread_local! {
    static KEPT: RefCell<Vec<Vec<u8>>> = const { RefCell::new(Vec::new()) };
}

/// An empty buffer with room for [`LEN`] bytes.
pub(crate) fn take() -> Vec<u8> {
    let kept = KEPT.with_borrow_mut(Vec::pop);
    kept.unwrap_or_else(|| Vec::with_capacity(LEN))
}

/// Gives back what [`take`] gave; other buffers, and what is too many, go to the allocator.
pub(crate) fn give(mut buffer: Vec<u8>) {
    if buffer.capacity() != LEN {
        return;
    }
    buffer.clear();
    KEPT.with_borrow_mut(|kept| {
        if kept.len() < KEPT_MAX {
            kept.push(buffer);
        }
    });
}
