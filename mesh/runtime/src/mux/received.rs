//! What a stream received and its reader has not taken.

use std::collections::VecDeque;

use crate::buffers;

/// An emptied part that is larger is not kept for the next.
const SMALL_MAX: usize = 4096;
/// From here on a part comes in a buffer of the thread's, so that little never takes much.
const LARGE_MIN: usize = buffers::LEN / 4;

/// Bytes in the order in which they came. Empty, it holds at most [`SMALL_MAX`].
#[derive(Debug, Default)]
pub(super) struct Received {
    /// Mostly all there is.
    front: Vec<u8>,
    /// Of it.
    taken: usize,
    behind: VecDeque<Vec<u8>>,
    len: usize,
}

impl Received {
    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub(super) fn push(&mut self, mut data: &[u8]) {
        if self.len == 0 && self.front.capacity() < data.len() && data.len() >= LARGE_MIN {
            buffers::give(std::mem::replace(&mut self.front, buffers::take()));
        }
        self.len += data.len();
        while !data.is_empty() {
            let last = self.behind.back_mut().unwrap_or(&mut self.front);
            let room = buffers::LEN - last.len();
            let (part, rest) = data.split_at(room.min(data.len()));
            last.extend_from_slice(part);
            data = rest;
            if !data.is_empty() {
                self.behind.push_back(if data.len() >= LARGE_MIN {
                    buffers::take()
                } else {
                    Vec::new()
                });
            }
        }
    }

    /// The first bytes; not all, where they do not lie together.
    pub(super) fn front(&self) -> &[u8] {
        &self.front[self.taken..]
    }

    /// Forgets the first `bytes` of [`Self::front`].
    pub(super) fn take(&mut self, bytes: usize) {
        self.taken += bytes;
        self.len -= bytes;
        if !self.front().is_empty() {
            return;
        }
        self.taken = 0;
        match self.behind.pop_front() {
            Some(next) => buffers::give(std::mem::replace(&mut self.front, next)),
            None if self.front.capacity() <= SMALL_MAX => self.front.clear(),
            None => buffers::give(std::mem::take(&mut self.front)),
        }
    }
}

impl Drop for Received {
    fn drop(&mut self) {
        buffers::give(std::mem::take(&mut self.front));
        self.behind.drain(..).for_each(buffers::give);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_come_out_as_they_came_in() {
        let mut rng = mesh_core::rng::Rng::new(7);
        let mut received = Received::default();
        let (mut next_in, mut next_out) = (0_u32, 0_u32);
        for _ in 0..2_000 {
            let count = [1, 40, 1000, 30_000][rng.below(4) as usize];
            let data: Vec<u8> = (next_in..next_in + count).map(|n| n as u8).collect();
            next_in += count;
            received.push(&data);
            for _ in 0..rng.below(4) {
                let front = received.front();
                let bytes = front.len().min(rng.below(40_000) as usize);
                for byte in &front[..bytes] {
                    assert_eq!(*byte, next_out as u8);
                    next_out += 1;
                }
                received.take(bytes);
            }
            assert_eq!(received.len(), (next_in - next_out) as usize);
            assert_eq!(received.is_empty(), received.front().is_empty());
        }
    }
}
