//! `mesh-agent check`: what an operator would look at on a host, named and judged. It runs beside the agent, as root, and
//! says something when no agent runs, too. This gathers; `check/judge.rs` concludes.

mod judge;

use std::net::{IpAddr, ToSocketAddrs as _};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use mesh_api::check::Checks;
use mesh_runtime::tls::leaf::validity;
use nix::sys::statvfs::{FsFlags, statvfs};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject as _;

use crate::bypass::{self, Open};
use crate::capture::VipRanges;
use crate::capture::inspect::{Inspection, inspect};
use crate::capture::sockdiag::{Listener, SockDiag};
use crate::config::Config;
use crate::leaves::now_ms;
use crate::probe::Probed;
use crate::state::{Membership, State};
use crate::status::{self, Status};

/// How long the resolver may take for one name: two servers that do not answer, by default.
const NAME_MAX: Duration = Duration::from_secs(12);
/// Between two rounds of `--wait`.
const ROUND: Duration = Duration::from_secs(1);
const CONNTRACK_COUNT: &str = "/proc/sys/net/netfilter/nf_conntrack_count";
const CONNTRACK_MAX: &str = "/proc/sys/net/netfilter/nf_conntrack_max";

/// All that the checks are made of. What could not be found out says why.
#[derive(Debug)]
struct Facts {
    now_s: i64,
    /// `None`: this host has not joined.
    membership: Result<Option<Membership>, String>,
    /// `None`: no agent runs.
    status: Result<Option<Status>, String>,
    /// Agents of other hosts that are in use.
    peers: Result<Vec<Probed>, String>,
    /// Whether anything is to be taken over.
    captures: bool,
    kernel: Result<Inspection, String>,
    /// Root opened it to plaintext.
    bypass: Result<Option<Open>, String>,
    /// Who listens on the mesh port.
    mesh_port: Result<Vec<Listener>, String>,
    mesh_port_number: u16,
    /// What the host's resolver says of a service, and what it should say.
    name: Option<Resolved>,
    /// Connections that the kernel tracks, and how many it can.
    tracked: Option<(u64, u64)>,
    certificates: Vec<Certificate>,
    /// Where the state is.
    disk: Result<Disk, String>,
}

#[derive(Debug)]
struct Resolved {
    name: String,
    expected: Vec<IpAddr>,
    answer: Result<Vec<IpAddr>, String>,
}

/// The file system of a directory.
#[derive(Debug)]
struct Disk {
    directory: PathBuf,
    /// For who is not root, in bytes.
    free: u64,
    /// How many more files there can be; `None`: they are not counted.
    files: Option<u64>,
    read_only: bool,
}

impl Disk {
    fn of(directory: &Path) -> Result<Self, String> {
        let found = statvfs(directory)
            .map_err(|e| format!("{} can not be looked at: {e}", directory.display()))?;
        Ok(Self {
            directory: directory.to_owned(),
            free: found.blocks_available() * found.fragment_size(),
            files: (found.files() > 0).then(|| found.files_available()),
            read_only: found.flags().contains(FsFlags::ST_RDONLY),
        })
    }
}

/// A certificate on disk.
#[derive(Clone, Debug)]
struct Certificate {
    what: String,
    not_before_s: i64,
    not_after_s: i64,
}

/// Checks once, or until nothing fails or `wait` is over.
pub(crate) fn run(config: &Config, wait: Option<Duration>) -> Checks {
    let end = Instant::now() + wait.unwrap_or_default();
    loop {
        let checks = judge::judge(&gather(config));
        if !checks.is_failed() || end <= Instant::now() {
            return checks;
        }
        std::thread::sleep(ROUND.min(end.saturating_duration_since(Instant::now())));
    }
}

fn gather(config: &Config) -> Facts {
    let text = |error: anyhow::Error| format!("{error:#}");
    let state = State::new(&config.state_dir);
    let membership = state.membership().map_err(text);
    let socket = config.admin_socket();
    let status = status::ask::<Status>(&socket, "/state").map_err(text);
    let runs = matches!(status, Ok(Some(_)));
    let peers = match runs {
        true => status::ask(&socket, "/peers").map_err(text),
        false => Ok(None),
    };
    let port = config.mesh.listen_port;
    let joined = membership.as_ref().ok().and_then(Option::as_ref);
    Facts {
        now_s: i64::try_from(now_ms() / 1000).unwrap_or(i64::MAX),
        peers: peers.map(Option::unwrap_or_default),
        captures: config.capture.enabled,
        kernel: match joined {
            Some(membership) if config.capture.enabled => look(config, membership),
            Some(_) => Err("nothing is captured".to_owned()),
            None => Err("this host has not joined a mesh".to_owned()),
        },
        bypass: bypass::read(&state.bypass_file())
            .map(|bypass| bypass.as_ref().and_then(Open::of))
            .map_err(text),
        mesh_port: SockDiag::open()
            .and_then(|mut diag| diag.listeners(port))
            .map_err(|e| format!("the kernel can not be asked who listens: {e}")),
        mesh_port_number: port,
        name: status
            .as_ref()
            .ok()
            .and_then(Option::as_ref)
            .filter(|_| config.dns.enabled)
            .and_then(resolved),
        tracked: number(CONNTRACK_COUNT).zip(number(CONNTRACK_MAX)),
        certificates: certificates(&state),
        disk: Disk::of(state.root()),
        membership,
        status,
    }
}

fn look(config: &Config, membership: &Membership) -> Result<Inspection, String> {
    let vips = membership.host.vips;
    let ranges = VipRanges::new(&vips.v4().to_string(), &vips.v6().to_string());
    inspect(&config.capture, &ranges.map_err(|e| e.to_string())?)
}

fn number(path: &str) -> Option<u64> {
    std::fs::read_to_string(Path::new(path))
        .ok()?
        .trim()
        .parse()
        .ok()
}

/// Asks the host's resolver for a service that the agent knows.
fn resolved(status: &Status) -> Option<Resolved> {
    let example = status.index.as_ref()?.example.as_ref()?;
    let name = example.dns_name.clone();
    let (answer_by, answer) = mpsc::sync_channel(1);
    let asked = (name.clone(), 0);
    // The resolver can not be told how long it may take; a thread that still waits ends with this process.
    std::thread::spawn(move || {
        let addresses = asked.to_socket_addrs();
        let addresses = addresses.map(|all| all.map(|a| a.ip()).collect::<Vec<_>>());
        let _ = answer_by.send(addresses.map_err(|e| e.to_string()));
    });
    let answer = answer.recv_timeout(NAME_MAX);
    let expected = [&example.vip4, &example.vip6];
    Some(Resolved {
        name,
        expected: expected
            .into_iter()
            .filter_map(|ip| ip.parse().ok())
            .collect(),
        answer: answer
            .unwrap_or_else(|_| Err(format!("no answer within {} s", NAME_MAX.as_secs()))),
    })
}

/// Leaves and credential on disk, and what issued them.
fn certificates(state: &State) -> Vec<Certificate> {
    let mut found: Vec<Certificate> = Vec::new();
    let mut add = |what: String, chain: &str| {
        let certificates = CertificateDer::pem_slice_iter(chain.as_bytes());
        for (depth, der) in certificates.filter_map(Result::ok).enumerate() {
            let what = match depth {
                0 => what.clone(),
                _ => "the issuing certificate".to_owned(),
            };
            let Ok((not_before_s, not_after_s)) = validity(&der) else {
                continue;
            };
            if depth == 0
                || !found
                    .iter()
                    .any(|c| c.what == what && c.not_after_s == not_after_s)
            {
                found.push(Certificate {
                    what,
                    not_before_s,
                    not_after_s,
                });
            }
        }
    };
    if let Ok(Some(pair)) = state.agent() {
        add("the agent's credential".to_owned(), &pair.chain);
    }
    for name in state.leaf_names() {
        if let Ok(Some(pair)) = state.leaf(&name) {
            add(format!("the certificate of {name}"), &pair.chain);
        }
    }
    found
}
