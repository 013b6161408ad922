//! Bytes made from a seed, and the digest of bytes.

use std::cell::RefCell;

use aws_lc_rs::digest::{Context, SHA256};
use mesh_core::rng::Rng;

/// What was sent or taken of a body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Sum {
    pub(super) bytes: u64,
    pub(super) sha256: String,
}

impl std::fmt::Display for Sum {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.bytes, self.sha256)
    }
}

/// Counts and digests.
#[derive(Debug)]
pub(super) struct Digest {
    bytes: u64,
    context: DebugContext,
}

/// The library's context says nothing of itself.
struct DebugContext(Context);

impl std::fmt::Debug for DebugContext {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SHA-256")
    }
}

impl Digest {
    pub(super) fn new() -> Self {
        Self {
            bytes: 0,
            context: DebugContext(Context::new(&SHA256)),
        }
    }

    pub(super) fn add(&mut self, bytes: &[u8]) {
        self.bytes += bytes.len() as u64;
        self.context.0.update(bytes);
    }

    pub(super) fn finish(self) -> Sum {
        use std::fmt::Write as _;
        let mut sha256 = String::new();
        for byte in self.context.0.finish().as_ref() {
            write!(sha256, "{byte:02x}").expect("to memory");
        }
        Sum {
            bytes: self.bytes,
            sha256,
        }
    }
}

/// The bytes of a seed.
#[derive(Debug)]
pub(super) struct Seeded(Rng);

impl Seeded {
    pub(super) const fn new(seed: u64) -> Self {
        Self(Rng::new(seed))
    }

    /// The next bytes, in words of eight: a body is filled in steps that are multiples of it, but for its last.
    pub(super) fn fill(&mut self, buffer: &mut [u8]) {
        for word in buffer.chunks_mut(8) {
            let next = self.0.next_u64().to_le_bytes();
            word.copy_from_slice(&next[..word.len()]);
        }
    }
}

thread_local! {
    /// The last sum that was asked for: the same large body comes in several framings.
    static LAST: RefCell<Option<(u64, u64, Sum)>> = const { RefCell::new(None) };
}

/// What a whole body of this seed sums up to.
pub(super) fn sum_of(seed: u64, bytes: u64) -> Sum {
    LAST.with_borrow_mut(|last| match last {
        Some((s, b, sum)) if (*s, *b) == (seed, bytes) => sum.clone(),
        _ => {
            let sum = summed(seed, bytes);
            *last = Some((seed, bytes, sum.clone()));
            sum
        }
    })
}

fn summed(seed: u64, bytes: u64) -> Sum {
    let (mut seeded, mut digest) = (Seeded::new(seed), Digest::new());
    let mut buffer = vec![0; 64 * 1024];
    let mut left = bytes;
    while left > 0 {
        let step = usize::try_from(left).map_or(buffer.len(), |left| left.min(buffer.len()));
        seeded.fill(&mut buffer[..step]);
        digest.add(&buffer[..step]);
        left -= step as u64;
    }
    digest.finish()
}
