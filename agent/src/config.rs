//! The agent's configuration: one TOML file, every key optional, unknown keys refused. `systemd/agent.toml` shows all
//! of them with their defaults.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, ensure};
use mesh_core::stream;
use mesh_runtime::log::Target;
use serde::{Deserialize, Serialize};
use socket2::TcpKeepalive;

use crate::capture::CaptureSettings;
use crate::data::DataSettings;
use crate::dns::wiring::Wiring;

/// Where the file is looked for; only here it may be missing.
pub(crate) const DEFAULT_PATH: &str = "/etc/meshwork/agent.toml";
/// How much longer the holder waits for a draining worker than the worker for its calls.
const DRAIN_MARGIN: Duration = Duration::from_secs(5);
/// Longest of the settable times, in seconds: a day.
const SECONDS_MAX: u64 = 24 * 3600;
/// Longest silence before a program's kernel is asked: twice as long, and the packet filter forgets the way back from
/// an app.
const KEEPALIVE_S_MAX: u64 = 60;
/// A mesh connection that is never asked after is not noticed to be gone.
const PEER_KEEPALIVE_S_MAX: u64 = 600;
const KIB: usize = 1024;
const MIB: usize = 1024 * KIB;
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
    pub(crate) keepalive: Keepalive,
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
    pub(crate) wiring: Wiring,
    /// Empty: no file is changed.
    pub(crate) resolv_conf: PathBuf,
    pub(crate) dnsmasq_dir: PathBuf,
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
    pub(crate) head_s: u64,
    pub(crate) idle_s: u64,
    /// 0: never.
    pub(crate) tcp_idle_s: u64,
    pub(crate) half_closed_s: u64,
    pub(crate) hold_s: u64,
    pub(crate) drain_s: u64,
    pub(crate) handover_s: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Keepalive {
    pub(crate) idle_s: u64,
    pub(crate) interval_s: u64,
    pub(crate) probes: u32,
    pub(crate) peer_s: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Limits {
    pub(crate) threads: usize,
    pub(crate) connections: usize,
    pub(crate) held: usize,
    pub(crate) http_head_bytes: usize,
    pub(crate) streams: u32,
    pub(crate) stream_kib: usize,
    pub(crate) connection_kib: usize,
    pub(crate) buffer_mib: usize,
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
            keepalive: Keepalive::default(),
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
            wiring: Wiring::Auto,
            resolv_conf: "/etc/resolv.conf".into(),
            dnsmasq_dir: "/etc/dnsmasq.d".into(),
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
            head_s: 30,
            idle_s: 3600,
            tcp_idle_s: 0,
            half_closed_s: 60,
            hold_s: 5,
            drain_s: 30,
            handover_s: 3600,
        }
    }
}

impl Default for Keepalive {
    fn default() -> Self {
        Self {
            idle_s: 60,
            interval_s: 15,
            probes: 4,
            peer_s: mesh_runtime::mux::KEEPALIVE.as_secs(),
        }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            threads: 1,
            connections: 65_536,
            held: 1_024,
            http_head_bytes: 64 * KIB,
            streams: stream::Limits::DEFAULT.max_streams,
            stream_kib: stream::Limits::DEFAULT.stream_credit as usize / KIB,
            connection_kib: stream::Limits::DEFAULT.connection_credit as usize / KIB,
            buffer_mib: 256,
        }
    }
}

impl Config {
    /// Reads the file that was named, or the default one if it is there.
    pub(crate) fn load(named: Option<&Path>) -> anyhow::Result<Self> {
        let path = named.unwrap_or_else(|| Path::new(DEFAULT_PATH));
        let mut config: Self = if named.is_none() && !path.exists() {
            Self::default()
        } else {
            mesh_runtime::config::load(path)?
        };
        config
            .check()
            .with_context(|| format!("the configuration {} can not be used", path.display()))?;
        // Names lead to virtual addresses, which lead nowhere then.
        config.dns.enabled &= config.capture.enabled;
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
        let times = &self.timeouts;
        let keepalive = &self.keepalive;
        let bounded = [
            ("timeouts.connect_s", times.connect_s, 1, SECONDS_MAX),
            ("timeouts.handshake_s", times.handshake_s, 1, SECONDS_MAX),
            ("timeouts.head_s", times.head_s, 1, SECONDS_MAX),
            ("timeouts.idle_s", times.idle_s, 1, SECONDS_MAX),
            (
                "timeouts.tcp_idle_s",
                times.tcp_idle_s,
                0,
                365 * SECONDS_MAX,
            ),
            (
                "timeouts.half_closed_s",
                times.half_closed_s,
                1,
                SECONDS_MAX,
            ),
            ("timeouts.hold_s", times.hold_s, 1, SECONDS_MAX),
            ("timeouts.drain_s", times.drain_s, 1, SECONDS_MAX),
            ("timeouts.handover_s", times.handover_s, 1, SECONDS_MAX),
            ("keepalive.idle_s", keepalive.idle_s, 1, KEEPALIVE_S_MAX),
            (
                "keepalive.interval_s",
                keepalive.interval_s,
                1,
                KEEPALIVE_S_MAX,
            ),
            ("keepalive.probes", keepalive.probes.into(), 1, 100),
            (
                "keepalive.peer_s",
                keepalive.peer_s,
                1,
                PEER_KEEPALIVE_S_MAX,
            ),
        ];
        for (key, value, min, max) in bounded {
            ensure!(
                (min..=max).contains(&value),
                "{key} is {value}; use {min} to {max}"
            );
        }
        let limits = &self.limits;
        let bounded = [
            ("threads", limits.threads, 1, THREADS_MAX),
            ("connections", limits.connections, 1, 10_000_000),
            ("held", limits.held, 1, 1_000_000),
            ("http_head_bytes", limits.http_head_bytes, KIB, MIB),
            ("streams", limits.streams as usize, 1, 1 << 20),
            ("stream_kib", limits.stream_kib, 64, 1 << 18),
            (
                "connection_kib",
                limits.connection_kib,
                limits.stream_kib,
                1 << 20,
            ),
            ("buffer_mib", limits.buffer_mib, 1, 1 << 20),
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

    /// Ports without an input door.
    pub(crate) fn keep_open(&self) -> Vec<u16> {
        let mut ports = self.capture.keep_open.clone();
        ports.push(self.mesh.listen_port);
        ports
    }

    /// How long a worker lets open calls end.
    pub(crate) fn drain(&self) -> Duration {
        Duration::from_secs(self.timeouts.drain_s)
    }

    /// How long open connections go on when another worker has taken over.
    pub(crate) fn handover(&self) -> Duration {
        Duration::from_secs(self.timeouts.handover_s)
    }

    /// How long the holder lets such a worker end.
    pub(crate) fn holder_handover(&self) -> Duration {
        self.handover() + DRAIN_MARGIN
    }

    /// How long the holder lets a worker end.
    pub(crate) fn holder_drain(&self) -> Duration {
        self.drain() + DRAIN_MARGIN
    }

    /// Bytes that the buffers of all mesh connections may hold: what is set, and at most half of what the service
    /// manager lets the agent have.
    pub(crate) fn buffer_max(&self) -> usize {
        let set = self.limits.buffer_mib.saturating_mul(MIB);
        crate::capture::cgroup::memory_max().map_or(set, |memory| set.min(memory / 2))
    }

    pub(crate) fn data(&self) -> DataSettings {
        let seconds = Duration::from_secs;
        let (times, limits, keepalive) = (&self.timeouts, &self.limits, &self.keepalive);
        let kib = |kib: usize| u32::try_from(kib * KIB).unwrap_or(u32::MAX);
        DataSettings {
            connect: seconds(times.connect_s),
            handshake: seconds(times.handshake_s),
            head: seconds(times.head_s),
            idle: seconds(times.idle_s),
            tcp_idle: (times.tcp_idle_s > 0).then(|| seconds(times.tcp_idle_s)),
            half_closed: seconds(times.half_closed_s),
            hold: seconds(times.hold_s),
            keepalive: TcpKeepalive::new()
                .with_time(seconds(keepalive.idle_s))
                .with_interval(seconds(keepalive.interval_s))
                .with_retries(keepalive.probes),
            peer_keepalive: seconds(keepalive.peer_s),
            streams: stream::Limits {
                max_streams: limits.streams,
                stream_credit: kib(limits.stream_kib),
                connection_credit: kib(limits.connection_kib),
                ..stream::Limits::DEFAULT
            },
            held_max: limits.held,
            connections_max: limits.connections,
            head_max: limits.http_head_bytes,
            app_mark: self.capture.marks().app(),
            threads: limits.threads,
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
            (
                "[limits]\nstream_kib = 1024\nconnection_kib = 512",
                "use 1024 to",
            ),
            ("[limits]\nbuffer_mib = 0", "limits.buffer_mib is 0"),
            (
                "[keepalive]\nidle_s = 61",
                "keepalive.idle_s is 61; use 1 to 60",
            ),
            ("[keepalive]\npeer_s = 0", "keepalive.peer_s"),
            ("[timeouts]\nhead_s = 0", "timeouts.head_s"),
            ("[log]\nto = \"syslog\"", "agent.toml:2"),
            ("[dns]\nwiring = \"on\"", "agent.toml:2"),
            ("[dns]\nupstreams = [\"10.0.0.1\"]", "agent.toml:2"),
        ] {
            let error = format!("{:#}", parse(text).unwrap_err());
            assert!(error.contains(expected), "{text}: {error}");
        }
    }

    /// Each bound that can be set: below the least and above the most the error names the key, what it is and what it may be.
    #[test]
    fn a_bound_out_of_its_range_is_refused_with_key_and_range() {
        const DAY: u64 = 24 * 3600;
        for (section, key, min, max) in [
            ("timeouts", "connect_s", 1, DAY),
            ("timeouts", "handshake_s", 1, DAY),
            ("timeouts", "head_s", 1, DAY),
            ("timeouts", "idle_s", 1, DAY),
            ("timeouts", "tcp_idle_s", 0, 365 * DAY),
            ("timeouts", "half_closed_s", 1, DAY),
            ("timeouts", "hold_s", 1, DAY),
            ("timeouts", "drain_s", 1, DAY),
            ("timeouts", "handover_s", 1, DAY),
            ("keepalive", "idle_s", 1, 60),
            ("keepalive", "interval_s", 1, 60),
            ("keepalive", "probes", 1, 100),
            ("keepalive", "peer_s", 1, 600),
            ("limits", "threads", 1, 64),
            ("limits", "connections", 1, 10_000_000),
            ("limits", "held", 1, 1_000_000),
            ("limits", "http_head_bytes", 1024, 1024 * 1024),
            ("limits", "streams", 1, 1 << 20),
            ("limits", "stream_kib", 64, 1 << 18),
            ("limits", "connection_kib", 512, 1 << 20),
            ("limits", "buffer_mib", 1, 1 << 20),
        ] {
            let set = |value: u64| {
                let more = if (key, value) == ("stream_kib", max) {
                    format!("connection_kib = {value}")
                } else {
                    String::new()
                };
                parse(&format!("[{section}]\n{key} = {value}\n{more}\n"))
            };
            for value in [min, max] {
                set(value).unwrap_or_else(|error| panic!("{key} = {value}: {error}"));
            }
            for value in [min.checked_sub(1), Some(max + 1)].into_iter().flatten() {
                let error = format!("{:#}", set(value).unwrap_err());
                let expected = format!("{section}.{key} is {value}; use {min} to {max}");
                assert_eq!(error, expected);
            }
            let error = parse(&format!("[{section}]\n{key} = \"1\"\n"));
            let error = format!("{:#}", error.unwrap_err());
            assert!(error.contains("agent.toml:2"), "{key}: {error}");
        }
    }

    /// What the kernel is told of a program's connection.
    #[test]
    fn keep_alive_is_set_as_configured() {
        let config = parse("[keepalive]\nidle_s = 7\ninterval_s = 3\nprobes = 2\n").unwrap();
        let socket =
            socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
        socket.set_tcp_keepalive(&config.data().keepalive).unwrap();
        assert!(socket.keepalive().unwrap());
        assert_eq!(socket.tcp_keepalive_time().unwrap(), Duration::from_secs(7));
        let interval = socket.tcp_keepalive_interval().unwrap();
        assert_eq!(interval, Duration::from_secs(3));
        assert_eq!(socket.tcp_keepalive_retries().unwrap(), 2);
    }

    #[test]
    fn whatever_is_accepted_the_other_agent_accepts_too() {
        let extremes = [
            "",
            "[limits]\nstreams = 1\nstream_kib = 64\nconnection_kib = 64",
            "[limits]\nstreams = 1048576\nstream_kib = 262144\nconnection_kib = 1048576",
        ];
        for text in extremes {
            let config = parse(text).unwrap();
            assert!(config.data().streams.are_sane(), "{text}");
            assert!(config.buffer_max() > 0);
        }
        assert_eq!(parse("").unwrap().data().streams, stream::Limits::DEFAULT);
    }

    #[test]
    fn only_the_default_file_may_be_missing() {
        let missing = Path::new("/nonexistent/agent.toml");
        let error = Config::load(Some(missing)).unwrap_err().to_string();
        assert!(error.contains("/nonexistent/agent.toml"), "{error}");
    }
}
