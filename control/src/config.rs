//! The configuration of `mesh-control run`. `systemd/control.toml` documents every key.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use mesh_runtime::config::ConfigError;
use mesh_runtime::log::Target;
use serde::{Deserialize, Deserializer, Serialize};

/// Read when no other file is named, if it exists.
const DEFAULT_PATH: &str = "/etc/meshwork/control.toml";
/// Port of control.
pub(crate) const PORT: u16 = 7440;
const HOUR: Duration = Duration::from_secs(3600);

/// All of it. Unknown keys are errors.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Config {
    pub state_dir: PathBuf,
    #[serde(deserialize_with = "addresses")]
    pub listen: Vec<SocketAddr>,
    /// DNS names and addresses of control's certificate, beside those it knows.
    pub names: Vec<String>,
    /// Empty: `control.sock` in `state_dir`.
    pub admin_socket: PathBuf,
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
            admin_socket: PathBuf::new(),
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
            to: Target::Auto,
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
    /// Reads the file that was named, or the default one if it is there.
    pub(crate) fn load(named: Option<&Path>) -> Result<Self, ConfigError> {
        match named {
            Some(path) => mesh_runtime::config::load(path),
            None if Path::new(DEFAULT_PATH).exists() => {
                mesh_runtime::config::load(Path::new(DEFAULT_PATH))
            }
            None => Ok(Self::default()),
        }
    }

    pub(crate) fn admin_socket(&self) -> PathBuf {
        if self.admin_socket.as_os_str().is_empty() {
            return self.state_dir.join("control.sock");
        }
        self.admin_socket.clone()
    }
}

/// Reads an address to listen on, in words that say its form.
pub(crate) fn address(text: &str) -> Result<SocketAddr, String> {
    text.parse().map_err(|_| {
        format!("`{text}` is no address with a port; write it like 0.0.0.0:{PORT} or [::]:{PORT}")
    })
}

fn addresses<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<SocketAddr>, D::Error> {
    let texts = Vec::<String>::deserialize(from)?;
    let addresses = texts.iter().map(|text| address(text));
    addresses
        .collect::<Result<_, _>>()
        .map_err(serde::de::Error::custom)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shipped_file_says_the_defaults() {
        let text = include_str!("../../systemd/control.toml");
        let shipped: Config = mesh_runtime::config::parse("control.toml", text).unwrap();
        assert_eq!(shipped, Config::default());
        let keys: toml::Table = toml::from_str(text).unwrap();
        let all = toml::Table::try_from(Config::default()).unwrap();
        assert_eq!(keys, all, "it has every key");
        let unknown = format!("{text}\n[leaves2]\n");
        assert!(mesh_runtime::config::parse::<Config>("control.toml", &unknown).is_err());
    }

    #[test]
    fn an_address_without_its_host_is_told_the_form() {
        let parsed = mesh_runtime::config::parse::<Config>("c.toml", "listen = [\"7440\"]\n");
        let error = parsed.unwrap_err().to_string();
        assert!(error.contains("0.0.0.0:7440"), "{error}");
    }
}
