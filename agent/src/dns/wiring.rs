//! How the host's resolver is brought to ask the agent: which way, and why. One is chosen at the agent's start, as the
//! configuration says or by what the host's resolver is.

use std::fmt;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{command, dnsmasq, resolv_conf, resolved};
use crate::config;

/// Where resolvers ask that read nothing but an address, as the C library does.
const PORT: u16 = 53;
/// Where those ask that can be told a port. Port 53 of our address would stand in the way of one that listens at all
/// addresses, as dnsmasq does by itself; and dnsmasq asks no server at its own port of an address of this host.
const PORT_BESIDE: u16 = 7453;
/// Both: what is asked at either is counted for its user.
pub(crate) const PORTS: [u16; 2] = [PORT, PORT_BESIDE];
/// How long a resolver on this host may take to accept a connection.
const ACCEPT: Duration = Duration::from_secs(1);

/// What the configuration says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Wiring {
    #[default]
    Auto,
    Resolved,
    Dnsmasq,
    ResolvConf,
    Off,
}

/// A way by which the host's resolver asks the agent for names of the mesh.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// A routing domain of our link.
    Resolved,
    /// A file in dnsmasq's directory.
    Dnsmasq,
    /// The first server of resolv.conf.
    ResolvConf,
    /// It is the operator's to do.
    Off,
}

impl Way {
    /// The word of the configuration.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Resolved => "resolved",
            Self::Dnsmasq => "dnsmasq",
            Self::ResolvConf => "resolv_conf",
            Self::Off => "off",
        }
    }

    /// At which port of its own address the agent answers.
    pub(crate) const fn port(self) -> u16 {
        match self {
            Self::Resolved | Self::Dnsmasq => PORT_BESIDE,
            Self::ResolvConf | Self::Off => PORT,
        }
    }

    /// Whether it works with an agent that answers at `port`, as one does whose sockets were handed over.
    pub(crate) const fn works_at(self, port: u16) -> bool {
        match self {
            Self::Resolved | Self::Off => true,
            Self::Dnsmasq => port != PORT,
            Self::ResolvConf => port == PORT,
        }
    }
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A way, and why that.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Chosen {
    pub(crate) way: Way,
    pub(crate) why: String,
}

/// Looks at the host where the configuration leaves it open.
pub(crate) fn choose(config: &config::Dns) -> Chosen {
    fixed(config).unwrap_or_else(|| decide(&Seen::look(config)))
}

/// The same for an agent that answers at `port` since before.
pub(crate) fn choose_at(config: &config::Dns, port: u16) -> Chosen {
    kept_at(choose(config), config.wiring, port)
}

/// Where nothing else was asked for, what works goes on until the agent is restarted.
fn kept_at(chosen: Chosen, wiring: Wiring, port: u16) -> Chosen {
    if wiring != Wiring::Auto || chosen.way != Way::Dnsmasq || chosen.way.works_at(port) {
        return chosen;
    }
    Chosen {
        way: Way::ResolvConf,
        why: format!(
            "names are answered at port {port} since before; a restart of the agent changes to dnsmasq"
        ),
    }
}

/// What the configuration decides by itself.
pub(crate) fn fixed(config: &config::Dns) -> Option<Chosen> {
    let no_file = config.resolv_conf.as_os_str().is_empty();
    let (way, why) = match config.wiring {
        _ if !config.enabled => (Way::Off, "names are not answered"),
        Wiring::Auto if no_file => (Way::Off, "`dns.resolv_conf` is empty"),
        Wiring::ResolvConf if no_file => (Way::Off, "`dns.resolv_conf` is empty"),
        Wiring::Auto => return None,
        Wiring::Resolved => (Way::Resolved, "`dns.wiring` says so"),
        Wiring::Dnsmasq => (Way::Dnsmasq, "`dns.wiring` says so"),
        Wiring::ResolvConf => (Way::ResolvConf, "`dns.wiring` says so"),
        Wiring::Off => (Way::Off, "`dns.wiring` says so"),
    };
    let why = why.to_owned();
    Some(Chosen { way, why })
}

/// What there is of resolvers on this host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Seen {
    file: String,
    /// The file is a link to one of systemd-resolved.
    is_resolveds: bool,
    /// The first server in it that is not the agent.
    first: Option<IpAddr>,
    resolved_answers: bool,
    dnsmasq_runs: bool,
}

impl Seen {
    fn look(config: &config::Dns) -> Self {
        let path = &config.resolv_conf;
        let first = resolv_conf::first_server(path);
        Self {
            file: path.display().to_string(),
            is_resolveds: resolv_conf::link_to_resolved(path).is_some(),
            first,
            resolved_answers: resolved::answers(),
            dnsmasq_runs: first.is_some_and(|ip| ip.is_loopback())
                && config.dnsmasq_dir.is_dir()
                && accepts(Ipv4Addr::LOCALHOST)
                && dnsmasq::is_active(),
        }
    }
}

fn decide(seen: &Seen) -> Chosen {
    let file = &seen.file;
    let stub = seen.first == Some(resolved::STUB.into());
    let (way, why) = if seen.resolved_answers && (seen.is_resolveds || stub) {
        (
            Way::Resolved,
            format!("{file} leads to systemd-resolved, which runs"),
        )
    } else if seen.first.is_some_and(|ip| ip.is_loopback()) && !stub && seen.dnsmasq_runs {
        (
            Way::Dnsmasq,
            format!("{file} leads to dnsmasq, which runs as a unit"),
        )
    } else {
        (
            Way::ResolvConf,
            format!("{file} leads to no resolver of this host that could be told of a domain"),
        )
    };
    Chosen { way, why }
}

/// Whether a resolver answers at an address of this host, in our own network namespace.
pub(super) fn accepts(ip: Ipv4Addr) -> bool {
    TcpStream::connect_timeout(&SocketAddr::new(ip.into(), PORT), ACCEPT).is_ok()
}

/// Whether the link is there. It goes with all that resolvers knew of it.
pub(super) fn link_stands(link: &str) -> bool {
    Path::new("/sys/class/net").join(link).exists()
}

/// Whether the link could carry anything: resolvers do not ask at one that can not.
pub(super) fn link_carries(link: &str) -> bool {
    let carrier = Path::new("/sys/class/net").join(link).join("carrier");
    fs::read_to_string(carrier).is_ok_and(|text| text.trim() == "1")
}

/// A command of the service manager; `None` without it.
pub(super) fn systemctl(words: &[&str]) -> Option<Result<String, command::Error>> {
    let booted = Path::new("/run/systemd/system").is_dir();
    booted.then(|| command::run("systemctl", words))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(wiring: &str) -> config::Dns {
        let text = format!("wiring = \"{wiring}\"");
        toml::from_str(&text).unwrap()
    }

    fn seen(first: &str) -> Seen {
        Seen {
            file: "/etc/resolv.conf".to_owned(),
            first: first.parse().ok(),
            ..Seen::default()
        }
    }

    #[test]
    fn what_the_configuration_says_is_done_without_a_look() {
        for (wiring, way) in [
            ("resolved", Way::Resolved),
            ("dnsmasq", Way::Dnsmasq),
            ("resolv_conf", Way::ResolvConf),
            ("off", Way::Off),
        ] {
            assert_eq!(fixed(&config(wiring)).unwrap().way, way);
            assert_eq!(way.name(), wiring);
            assert!(way.works_at(way.port()));
        }
        assert_eq!(fixed(&config("auto")), None);
        for wiring in ["auto", "resolv_conf"] {
            let mut config = config(wiring);
            config.resolv_conf = "".into();
            assert_eq!(fixed(&config).unwrap().way, Way::Off, "{wiring}");
        }
        let mut disabled = config("resolved");
        disabled.enabled = false;
        assert_eq!(fixed(&disabled).unwrap().way, Way::Off);
    }

    #[test]
    fn systemd_resolved_is_told_where_programs_ask_it_and_it_answers() {
        let stub = Seen {
            resolved_answers: true,
            ..seen("127.0.0.53")
        };
        assert_eq!(decide(&stub).way, Way::Resolved);
        // Its other file names the servers of the site, and is its own all the same.
        let uplink = Seen {
            is_resolveds: true,
            resolved_answers: true,
            ..seen("10.0.0.1")
        };
        assert_eq!(decide(&uplink).way, Way::Resolved);
        assert_eq!(decide(&seen("127.0.0.53")).way, Way::ResolvConf);
        // It runs, but programs of this host do not ask it.
        let beside = Seen {
            resolved_answers: true,
            ..seen("10.0.0.1")
        };
        assert_eq!(decide(&beside).way, Way::ResolvConf);
    }

    #[test]
    fn dnsmasq_is_told_where_programs_ask_it_and_it_runs() {
        let dnsmasq = Seen {
            dnsmasq_runs: true,
            ..seen("127.0.0.1")
        };
        assert_eq!(decide(&dnsmasq).way, Way::Dnsmasq);
        assert!(decide(&dnsmasq).why.contains("/etc/resolv.conf"));
        // Another resolver answers there.
        assert_eq!(decide(&seen("127.0.0.1")).way, Way::ResolvConf);
        let beside = Seen {
            dnsmasq_runs: true,
            ..seen("10.0.0.1")
        };
        assert_eq!(decide(&beside).way, Way::ResolvConf);
        // systemd-resolved stands in front of it.
        let behind = Seen {
            dnsmasq_runs: true,
            resolved_answers: true,
            ..seen("127.0.0.53")
        };
        assert_eq!(decide(&behind).way, Way::Resolved);
    }

    #[test]
    fn a_reload_under_dnsmasq_goes_on_with_what_works() {
        let chosen = || Chosen {
            way: Way::Dnsmasq,
            why: String::new(),
        };
        let at = |wiring, port| kept_at(chosen(), wiring, port).way;
        assert_eq!(at(Wiring::Auto, 53), Way::ResolvConf);
        assert_eq!(at(Wiring::Auto, 7453), Way::Dnsmasq);
        // Then it is refused, and says why.
        assert_eq!(at(Wiring::Dnsmasq, 53), Way::Dnsmasq);
    }

    #[test]
    fn each_way_works_at_the_ports_that_its_resolver_can_ask_at() {
        assert!(Way::Resolved.works_at(53) && Way::Resolved.works_at(7453));
        assert!(!Way::Dnsmasq.works_at(53) && !Way::ResolvConf.works_at(7453));
    }
}
