//! The configuration of `mesh-control run`. `systemd/control.toml` documents every key.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use mesh_runtime::log::Target;
use serde::{Deserialize, Serialize};

/// Port of control.
pub(crate) const PORT: u16 = 7440;
const HOUR: Duration = Duration::from_secs(3600);

/// All of it. Unknown keys are errors.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Config {
    pub state_dir: PathBuf,
    pub listen: Vec<SocketAddr>,
    /// DNS names and addresses of control's certificate, beside those it knows.
    pub names: Vec<String>,
    /// Default: `control.sock` in `state_dir`.
    pub admin_socket: Option<PathBuf>,
    /// An endpoint is listed only after control reached its host's agent at the address that it claims.
    pub prove_addresses: bool,
    pub leaves: Leaves,
    pub log: Log,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Leaves {
    pub workload_hours: u32,
    pub agent_days: u32,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Log {
    pub level: String,
    pub to: Target,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            state_dir: PathBuf::from("/var/lib/meshwork-control"),
            listen: vec![SocketAddr::from(([0, 0, 0, 0], PORT))],
            names: Vec::new(),
            admin_socket: None,
            prove_addresses: true,
            leaves: Leaves::default(),
            log: Log::default(),
        }
    }
}

impl Default for Leaves {
    fn default() -> Self {
        Self {
            workload_hours: 48,
            agent_days: 30,
        }
    }
}

impl Default for Log {
    fn default() -> Self {
        Self {
            level: "info".to_owned(),
            to: Target::Stderr,
        }
    }
}

impl Leaves {
    pub(crate) fn workload(self) -> Duration {
        HOUR * self.workload_hours.clamp(1, 24 * 365)
    }

    pub(crate) fn agent(self) -> Duration {
        HOUR * 24 * self.agent_days.clamp(1, 365)
    }

    /// How long the mesh runs without control: leaves are renewed from a third of their life on.
    pub(crate) fn autonomy(self) -> Duration {
        self.workload() * 2 / 3
    }
}

impl Config {
    pub(crate) fn admin_socket(&self) -> PathBuf {
        let default = || self.state_dir.join("control.sock");
        self.admin_socket.clone().unwrap_or_else(default)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shipped_file_says_the_defaults() {
        let text = include_str!("../../systemd/control.toml");
        let shipped: Config = mesh_runtime::config::parse("control.toml", text).unwrap();
        let expected = Config {
            admin_socket: Some(PathBuf::from("/run/meshwork-control/control.sock")),
            log: Log {
                to: Target::Journald,
                ..Log::default()
            },
            ..Config::default()
        };
        assert_eq!(shipped, expected);
        let unknown = format!("{text}\n[leaves2]\n");
        assert!(mesh_runtime::config::parse::<Config>("control.toml", &unknown).is_err());
    }
}
