//! The agent's configuration: one TOML file, every key optional, unknown keys refused. `systemd/agent.toml` shows all
//! of them with their defaults.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, ensure};
use mesh_runtime::log::Target;
use serde::{Deserialize, Serialize};

use crate::capture::CaptureSettings;
use crate::data::DataSettings;

/// Where the file is looked for; only here it may be missing.
pub(crate) const DEFAULT_PATH: &str = "/etc/meshwork/agent.toml";
/// How much longer the holder waits for a draining worker than the worker for its calls.
const DRAIN_MARGIN: Duration = Duration::from_secs(5);
/// Longest of the settable times, in seconds: a day.
const SECONDS_MAX: u64 = 24 * 3600;
/// Threads that are of use: one serves tens of thousands of calls a second.
const THREADS_MAX: usize = 64;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Config {
    pub(crate) state_dir: PathBuf,
    pub(crate) runtime_dir: PathBuf,
    pub(crate) services_dir: PathBuf,
    pub(crate) mesh: Mesh,
    pub(crate) dns: Dns,
    pub(crate) log: Log,
    pub(crate) timeouts: Timeouts,
    pub(crate) limits: Limits,
    pub(crate) capture: CaptureSettings,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Mesh {
    pub(crate) listen_port: u16,
    pub(crate) listen: Vec<IpAddr>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Dns {
    pub(crate) enabled: bool,
    /// Empty: no file is changed.
    pub(crate) resolv_conf: PathBuf,
    /// Empty: those that stood in `resolv_conf`.
    pub(crate) upstreams: Vec<SocketAddr>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Log {
    pub(crate) level: String,
    pub(crate) to: Target,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Timeouts {
    pub(crate) connect_s: u64,
    pub(crate) handshake_s: u64,
    pub(crate) idle_s: u64,
    pub(crate) hold_s: u64,
    pub(crate) drain_s: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Limits {
    pub(crate) threads: usize,
    pub(crate) connections: usize,
    pub(crate) held: usize,
    pub(crate) http_head_bytes: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            state_dir: "/var/lib/meshwork-agent".into(),
            runtime_dir: "/run/meshwork-agent".into(),
            services_dir: "/etc/meshwork/services.d".into(),
            mesh: Mesh::default(),
            dns: Dns::default(),
            log: Log::default(),
            timeouts: Timeouts::default(),
            limits: Limits::default(),
            capture: CaptureSettings::default(),
        }
    }
}

impl Default for Mesh {
    fn default() -> Self {
        Self {
            listen_port: crate::holder::MESH_PORT,
            listen: vec![Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()],
        }
    }
}

impl Default for Dns {
    fn default() -> Self {
        Self {
            enabled: true,
            resolv_conf: "/etc/resolv.conf".into(),
            upstreams: Vec::new(),
        }
    }
}

impl Default for Log {
    fn default() -> Self {
        Self {
            level: "info".to_owned(),
            to: Target::default(),
        }
    }
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            connect_s: 5,
            handshake_s: 10,
            idle_s: 3600,
            hold_s: 5,
            drain_s: 30,
        }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            threads: 1,
            connections: 65_536,
            held: 1_024,
            http_head_bytes: 64 * 1024,
        }
    }
}

impl Config {
    /// Reads the file that was named, or the default one if it is there.
    pub(crate) fn load(named: Option<&Path>) -> anyhow::Result<Self> {
        let path = named.unwrap_or_else(|| Path::new(DEFAULT_PATH));
        let config: Self = if named.is_none() && !path.exists() {
            Self::default()
        } else {
            mesh_runtime::config::load(path)?
        };
        config
            .check()
            .with_context(|| format!("the configuration {} can not be used", path.display()))?;
        Ok(config)
    }

    fn check(&self) -> anyhow::Result<()> {
        self.capture.check()?;
        ensure!(
            self.mesh.listen_port != 0,
            "mesh.listen_port is 0; use 1 to 65535"
        );
        ensure!(
            !self.mesh.listen.is_empty(),
            "mesh.listen is empty; name an address, e.g. \"0.0.0.0\""
        );
        let times = [
            ("connect_s", self.timeouts.connect_s),
            ("handshake_s", self.timeouts.handshake_s),
            ("idle_s", self.timeouts.idle_s),
            ("hold_s", self.timeouts.hold_s),
            ("drain_s", self.timeouts.drain_s),
        ];
        for (key, seconds) in times {
            ensure!(
                (1..=SECONDS_MAX).contains(&seconds),
                "timeouts.{key} is {seconds}; use 1 to {SECONDS_MAX}"
            );
        }
        let limits = &self.limits;
        let bounded = [
            ("threads", limits.threads, 1, THREADS_MAX),
            ("connections", limits.connections, 1, 10_000_000),
            ("held", limits.held, 1, 1_000_000),
            (
                "http_head_bytes",
                limits.http_head_bytes,
                1_024,
                1024 * 1024,
            ),
        ];
        for (key, value, min, max) in bounded {
            ensure!(
                (min..=max).contains(&value),
                "limits.{key} is {value}; use {min} to {max}"
            );
        }
        Ok(())
    }

    pub(crate) fn admin_socket(&self) -> PathBuf {
        self.runtime_dir.join("agent.sock")
    }

    pub(crate) fn mesh_addresses(&self) -> Vec<SocketAddr> {
        let port = self.mesh.listen_port;
        let addresses = self.mesh.listen.iter();
        addresses.map(|ip| SocketAddr::new(*ip, port)).collect()
    }

    /// How long a worker lets open calls end.
    pub(crate) fn drain(&self) -> Duration {
        Duration::from_secs(self.timeouts.drain_s)
    }

    /// How long the holder lets a worker end.
    pub(crate) fn holder_drain(&self) -> Duration {
        self.drain() + DRAIN_MARGIN
    }

    /// The resolver's file, if it is to be changed.
    pub(crate) fn resolv_conf(&self) -> Option<&Path> {
        let wire = self.dns.enabled && !self.dns.resolv_conf.as_os_str().is_empty();
        wire.then_some(self.dns.resolv_conf.as_path())
    }

    pub(crate) fn data(&self) -> DataSettings {
        let Timeouts {
            connect_s,
            handshake_s,
            idle_s,
            hold_s,
            drain_s: _,
        } = self.timeouts;
        DataSettings {
            connect: Duration::from_secs(connect_s),
            handshake: Duration::from_secs(handshake_s),
            idle: Duration::from_secs(idle_s),
            hold: Duration::from_secs(hold_s),
            held_max: self.limits.held,
            connections_max: self.limits.connections,
            head_max: self.limits.http_head_bytes,
            app_mark: self.capture.marks().app(),
            threads: self.limits.threads,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> anyhow::Result<Config> {
        let config: Config = mesh_runtime::config::parse("agent.toml", text)?;
        config.check()?;
        Ok(config)
    }

    #[test]
    fn the_shipped_file_shows_every_key_with_its_default() {
        let text = include_str!("../../systemd/agent.toml");
        assert_eq!(parse(text).unwrap(), Config::default());
        let defaults = toml::Value::try_from(Config::default()).unwrap();
        let shipped: toml::Value = toml::from_str(text).unwrap();
        assert_eq!(shipped, defaults, "a key is missing in systemd/agent.toml");
    }

    #[test]
    fn mistakes_are_refused_with_their_key() {
        assert_eq!(parse("").unwrap(), Config::default());
        for (text, expected) in [
            ("state = \"x\"", "agent.toml:1"),
            ("[mesh]\nlisten_prt = 1", "agent.toml:2"),
            ("[capture]\ntabel = \"x\"", "agent.toml:2"),
            ("[mesh]\nlisten_port = 0", "listen_port"),
            ("[mesh]\nlisten = []", "mesh.listen"),
            ("[timeouts]\ndrain_s = 0", "drain_s"),
            ("[limits]\nheld = 0", "held"),
            ("[log]\nto = \"syslog\"", "agent.toml:2"),
            ("[dns]\nupstreams = [\"10.0.0.1\"]", "agent.toml:2"),
        ] {
            let error = format!("{:#}", parse(text).unwrap_err());
            assert!(error.contains(expected), "{text}: {error}");
        }
    }

    #[test]
    fn only_the_default_file_may_be_missing() {
        let missing = Path::new("/nonexistent/agent.toml");
        let error = Config::load(Some(missing)).unwrap_err().to_string();
        assert!(error.contains("/nonexistent/agent.toml"), "{error}");
    }
}
