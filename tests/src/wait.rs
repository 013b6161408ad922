//! Waiting for a condition with a deadline: the only way in which these tests wait.

use std::time::{Duration, Instant};

/// Between two looks. Short against what is waited for, long against the cost of a look.
const STEP: Duration = Duration::from_millis(20);

/// How long most things may take on a busy machine of two cores before something is wrong.
pub const SOON: Duration = Duration::from_secs(30);

/// Looks until `condition` gives a value and returns it; after `deadline` panics with the last failure.
#[track_caller]
pub fn wait_until<T>(
    what: &str,
    deadline: Duration,
    mut condition: impl FnMut() -> Result<T, String>,
) -> T {
    let end = Instant::now() + deadline;
    loop {
        match condition() {
            Ok(value) => return value,
            Err(last) if end < Instant::now() => {
                panic!("waited {deadline:?} for {what}; last: {last}")
            }
            Err(_) => std::thread::sleep(STEP),
        }
    }
}

/// `Ok` if it is so, else `otherwise` as the failure.
pub fn check(is_so: bool, otherwise: impl Into<String>) -> Result<(), String> {
    if is_so { Ok(()) } else { Err(otherwise.into()) }
}
