//! How a connection works, and by what it may be ended.

use std::sync::Arc;
use std::time::Duration;

use mesh_core::stream::Limits;

use super::Budget;

/// A peer that said nothing for this long is asked; after as long again it is given up.
pub const KEEPALIVE: Duration = Duration::from_secs(30);

/// How a connection works.
#[derive(Clone, Debug)]
pub struct Settings {
    /// What this side is ready to bear.
    pub limits: Limits,
    /// After this much silence the peer is asked whether it lives.
    pub keepalive: Duration,
    /// What the connection's buffers count against.
    pub budget: Arc<Budget>,
}

impl From<Limits> for Settings {
    /// A connection that shares its bounds with no other.
    fn from(limits: Limits) -> Self {
        Self {
            limits,
            keepalive: KEEPALIVE,
            budget: Budget::new(usize::MAX),
        }
    }
}

/// A bound of this side by which a connection was ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bound {
    /// The peer said, or acknowledged, nothing for too long.
    Silence,
    /// The peer asked for answers and did not read them.
    Control,
    /// The budget is spent, the peer's party has more of it than is its own, and this connection went on growing.
    Buffers,
}
