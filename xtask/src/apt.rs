//! What the demonstration and the tests need from Debian, installed at first use.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;

use anyhow::Context as _;

use crate::child;

/// A program (a name in the usual directories, or a pattern with one `*` directory) and the package that has it.
type Need = (&'static str, &'static str);

const BASE: &[Need] = &[
    ("ip", "iproute2"),
    ("nft", "nftables"),
    ("nsenter", "util-linux"),
    ("curl", "curl"),
];

pub(crate) const DEMO: &[Need] = &[
    ("nginx", "nginx-light"),
    ("redis-server", "redis-server"),
    ("redis-cli", "redis-tools"),
];

pub(crate) const BENCH: &[Need] = &[
    ("nginx", "nginx-light"),
    ("wrk", "wrk"),
    ("haproxy", "haproxy"),
    ("h2load", "nghttp2-client"),
    ("nghttpd", "nghttp2-server"),
    // Envoy comes by pip.
    ("/usr/lib/python3/dist-packages/pip", "python3-pip"),
];

pub(crate) const NAMESPACES: &[Need] = &[
    ("nginx", "nginx-light"),
    ("redis-server", "redis-server"),
    ("redis-cli", "redis-tools"),
    ("/usr/lib/postgresql/*/bin/initdb", "postgresql"),
    ("psql", "postgresql-client"),
    ("mariadbd", "mariadb-server-core"),
    ("mariadb", "mariadb-client-core"),
    ("nghttpd", "nghttp2-server"),
    ("nghttp", "nghttp2-client"),
    ("wrk", "wrk"),
    ("haproxy", "haproxy"),
    ("/usr/lib/python3/dist-packages/grpc", "python3-grpcio"),
    ("/usr/lib/python3/dist-packages/h2", "python3-h2"),
    (
        "/usr/lib/python3/dist-packages/hypercorn",
        "python3-hypercorn",
    ),
    ("apache2", "apache2-bin"),
    ("node", "nodejs"),
    ("go", "golang-go"),
    ("h2load", "nghttp2-client"),
    (
        "/usr/lib/python3/dist-packages/websockets",
        "python3-websockets",
    ),
    ("sshd", "openssh-server"),
    ("ssh", "openssh-client"),
    ("tcpdump", "tcpdump"),
    ("openssl", "openssl"),
    ("python3", "python3"),
    ("ufw", "ufw"),
    ("firewalld", "firewalld"),
    ("dbus-daemon", "dbus-daemon"),
    ("faketime", "faketime"),
    ("podman", "podman"),
    ("crun", "crun"),
    ("/usr/lib/podman/netavark", "netavark"),
    ("iptables", "iptables"),
];

pub(crate) const PACKAGE: &[Need] = &[
    ("dpkg-deb", "dpkg"),
    // It finds what a program is linked to.
    ("dpkg-shlibdeps", "dpkg-dev"),
    ("objcopy", "binutils"),
    ("gzip", "gzip"),
    ("git", "git"),
    ("lintian", "lintian"),
    ("rpmlint", "rpmlint"),
    // rpmlint reads packages by it, and does not depend on it.
    ("rpm", "rpm"),
    // Zig comes by pip.
    ("/usr/lib/python3/dist-packages/pip", "python3-pip"),
];

/// Beside what packages are made with.
pub(crate) const BOOTED: &[Need] = &[
    ("debootstrap", "debootstrap"),
    ("systemd-nspawn", "systemd-container"),
    ("journalctl", "systemd"),
];

/// A second reader of HTTP/1 beside ours.
pub(crate) const WIRE: &[Need] = &[("node", "nodejs")];

/// Where Debian keeps programs, and where a Go that is not from Debian is.
const PLACES: &[&str] = &[
    "/usr/sbin",
    "/usr/bin",
    "/sbin",
    "/bin",
    "/usr/local/bin",
    "/usr/local/go/bin",
];
/// Asked by Debian's packages before they start a service: 101 forbids it.
const START_POLICY: &str = "/usr/sbin/policy-rc.d";

/// Says what needs root when we are not.
pub(crate) fn need_root(why: &str) -> anyhow::Result<()> {
    anyhow::ensure!(
        nix::unistd::geteuid().is_root(),
        "{why}: run it as root (e.g. sudo env \"PATH=$PATH\" cargo xtask …), with Linux 5.14 or newer, cgroup2 \
         and nftables; nothing outside of its own namespaces, cgroups and target/ is changed"
    );
    Ok(())
}

/// Installs what is missing of `needs` and of what everything needs.
pub(crate) fn install(needs: &[Need]) -> anyhow::Result<()> {
    let missing: Vec<&str> = BASE
        .iter()
        .chain(needs)
        .filter(|(program, _)| !is_there(program))
        .map(|(_, package)| *package)
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    child::say(&format!("installing {}", missing.join(" ")));
    need_root("installing them")?;
    let policy = StartPolicy::forbid()?;
    apt(&["update", "-q"])?;
    let mut words = vec!["install", "-q", "-y", "--no-install-recommends"];
    words.extend(&missing);
    apt(&words)?;
    drop(policy);
    Ok(())
}

fn is_there(program: &str) -> bool {
    match program.split_once("/*/") {
        Some((before, after)) => {
            let dirs = fs::read_dir(before).into_iter().flatten().flatten();
            dirs.map(|e| e.path().join(after)).any(|path| path.exists())
        }
        None if program.starts_with('/') => Path::new(program).exists(),
        None => PLACES
            .iter()
            .any(|dir| Path::new(dir).join(program).exists()),
    }
}

fn apt(words: &[&str]) -> anyhow::Result<()> {
    let mut command = Command::new("apt-get");
    command
        .args(words)
        .env("DEBIAN_FRONTEND", "noninteractive")
        // Progress belongs to stderr: our stdout closes with the count of tests.
        .stdout(std::io::stderr());
    child::run(&mut command).with_context(|| {
        let words: Vec<&OsStr> = command.get_args().collect();
        format!("apt-get {words:?}; without Debian or its mirror install the packages by hand")
    })
}

/// While it lives, packages start no service on this machine: the tests start their own.
struct StartPolicy {
    ours: bool,
}

impl StartPolicy {
    fn forbid() -> anyhow::Result<Self> {
        let path = Path::new(START_POLICY);
        let ours = !path.exists();
        if ours {
            fs::write(path, "#!/bin/sh\nexit 101\n").context(START_POLICY)?;
            fs::set_permissions(path, fs::Permissions::from_mode(0o755)).context(START_POLICY)?;
        }
        Ok(Self { ours })
    }
}

impl Drop for StartPolicy {
    fn drop(&mut self) {
        if self.ours {
            drop(fs::remove_file(START_POLICY));
        }
    }
}
