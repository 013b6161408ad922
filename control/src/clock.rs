//! Wall-clock time as control stores and shows it.

pub(crate) use mesh_runtime::clock::{now_ms, rfc3339};

/// Unix time, seconds.
pub(crate) fn now_s() -> u64 {
    now_ms() / 1000
}
