//! Maps by a stream's id. Ids are given out one after another by rules that both sides keep to ([`super::Violation`]), so
//! nobody can choose some that collide: no hash that guards against that is needed, and it is asked many times a call.

#![expect(
    clippy::disallowed_types,
    reason = "this hash has no seed, so that the order is the same in every run"
)]

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

/// What belongs to each stream.
pub type Streams<V> = HashMap<u32, V, BuildHasherDefault<IdHasher>>;

/// Spreads an id over all bits (Fibonacci hashing: Knuth, The Art of Computer Programming 3, §6.4).
#[derive(Clone, Copy, Debug, Default)]
pub struct IdHasher(u64);

impl Hasher for IdHasher {
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u32(u32::from(*byte));
        }
    }

    fn write_u32(&mut self, id: u32) {
        self.0 = (self.0 ^ u64::from(id)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }

    fn finish(&self) -> u64 {
        // The table takes its place from the low bits, which depend on few of the id's.
        self.0.rotate_left(32)
    }
}
