//! What operators see of the session.

use std::net::IpAddr;

use mesh_api::sync::Problem;
use mesh_core::session::{Installed, Phase};

use super::Ended;

/// How the session stands, for `status`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SessionStatus {
    pub(crate) phase: Phase,
    /// Of the live session, or the one last tried.
    pub(crate) address: String,
    /// Where peers reach this host, if it moves and control was reached since the start.
    pub(crate) own_address: Option<IpAddr>,
    /// When control was last known to be heard, Unix milliseconds; 0: never. What is in use is as old.
    pub(crate) heard_ms: u64,
    pub(crate) last_error: Option<Ended>,
    pub(crate) control_version: String,
    pub(crate) installed: Option<Installed>,
    /// This host's clock less control's, milliseconds.
    pub(crate) clock_offset_ms: Option<i64>,
    /// What control does not list of what this host reports.
    pub(crate) problems: Vec<Problem>,
}

impl Default for SessionStatus {
    fn default() -> Self {
        Self {
            phase: Phase::Waiting,
            address: String::new(),
            own_address: None,
            heard_ms: 0,
            last_error: None,
            control_version: String::new(),
            installed: None,
            clock_offset_ms: None,
            problems: Vec::new(),
        }
    }
}
