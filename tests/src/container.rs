//! Containers on a host, as podman runs them: on a bridge, behind address translation, each in a network namespace of its own.

use std::fs;
use std::path::PathBuf;

use crate::host::Host;
use crate::process::{Cmd, Process};
use crate::wait::{SOON, check, wait_until};

/// Becomes podman with a state of the host's own. Where version 1 is mounted beside cgroup2, podman is shown the latter only.
const PODMAN: &str = r#"[ ! -e /sys/fs/cgroup/unified ] || mount --bind /sys/fs/cgroup/unified /sys/fs/cgroup || exit
    dir=$0; exec podman --root "$dir/root" --runroot "$dir/runroot" --tmpdir "$dir/tmp" --storage-driver vfs \
    --cgroup-manager cgroupfs --network-backend netavark --events-backend none "$@""#;

/// Programs are the machine's, all else is the container's own.
const ROOTFS: [&str; 13] = [
    "bin", "dev", "etc", "lib", "lib64", "proc", "root", "run", "sbin", "sys", "tmp", "usr", "var",
];
const SHARED: [&str; 5] = ["/bin", "/lib", "/lib64", "/sbin", "/usr"];

/// A container that runs. It ends with this value.
#[derive(Debug)]
pub struct Container {
    host: Host,
    pid: u32,
    process: Process,
}

/// A command of podman.
fn podman(host: &Host, words: &[&str]) -> Cmd {
    let dir = host.subdir("podman", None).display().to_string();
    let mut all = vec!["sh", "-c", PODMAN, &dir];
    all.extend(words);
    host.program(all)
}

/// A network of both families whose bridge has this name: 10.`number`.0.0/24 and `fd88:<number>::/64`. The host has an `/etc`
/// of its own.
#[track_caller]
pub fn network(host: &Host, bridge: &str, number: u8) {
    let text = format!(
        r#"{{"name": "{bridge}", "id": "{number:064}", "driver": "bridge", "network_interface": "{bridge}",
        "created": "2024-01-01T00:00:00Z", "ipv6_enabled": true, "internal": false, "dns_enabled": false,
        "subnets": [{{"subnet": "10.{number}.0.0/24", "gateway": "10.{number}.0.1"}},
                    {{"subnet": "fd88:{number}::/64", "gateway": "fd88:{number}::1"}}],
        "ipam_options": {{"driver": "host-local"}}}}"#
    );
    let dir = host.own_root().join("etc/containers/networks");
    fs::create_dir_all(&dir).expect("a directory");
    fs::write(dir.join(format!("{bridge}.json")), text).expect("a network");
}

impl Container {
    /// Runs a command line on this network, in a cgroup below that of the container's name; `options` are of `podman run`.
    #[track_caller]
    pub fn run(host: &Host, name: &str, network: &str, options: &[&str], line: &str) -> Self {
        let rootfs = host.subdir(&format!("{name}-rootfs"), None);
        for dir in ROOTFS {
            fs::create_dir_all(rootfs.join(dir)).expect("a directory");
        }
        let rootfs = rootfs.display().to_string();
        let pid_file = host.dir().join(format!("{name}.pid"));
        drop(fs::remove_file(&pid_file));
        let (pid_text, network) = (
            pid_file.display().to_string(),
            format!("--network={network}"),
        );
        let shared = SHARED.map(|dir| format!("--volume={dir}:{dir}:ro"));
        let mut words = vec![
            "run",
            "--rm",
            "--name",
            name,
            "--pidfile",
            &pid_text,
            "--cgroups=disabled",
            "--ulimit=nofile=1024:1024",
            "--ulimit=nproc=4096:4096",
            &network,
        ];
        words.extend(shared.iter().map(String::as_str));
        words.extend(options);
        words.extend(["--rootfs", &rootfs, "/bin/sh", "-c", line]);
        let mut process = podman(host, &words)
            .cgroup(&format!("{name}/payload"))
            .spawn(name);
        let pid = wait_until(&format!("the container {name}"), SOON, || {
            process.is_alive()?;
            number(&pid_file)
        });
        Self {
            host: host.clone(),
            pid,
            process,
        }
    }

    /// A command line in it.
    pub fn cmd(&self, line: &str) -> Cmd {
        let target = format!("--target={}", self.pid);
        self.host.program([
            "nsenter", &target, "--net", "--mount", "--uts", "sh", "-c", line,
        ])
    }

    /// A process of the host in its network that does nothing.
    pub fn beside(&self) -> Cmd {
        let target = format!("--target={}", self.pid);
        self.host
            .program(["nsenter", &target, "--net", "sleep", "1000"])
    }

    /// Its first address of a family (`4` or `6`) that reaches beyond the link.
    #[track_caller]
    pub fn address(&self, family: u8) -> String {
        let line = format!("ip -{family} -brief address show dev eth0 scope global");
        let text = self.cmd(&line).ok();
        let address = text
            .split_whitespace()
            .nth(2)
            .and_then(|a| a.split('/').next());
        address
            .unwrap_or_else(|| panic!("no address: {text}"))
            .to_owned()
    }

    /// Waits until something listens in it.
    #[track_caller]
    pub fn wait_listening(&self, port: u16) {
        wait_until("a server in a container", SOON, || {
            let listeners = self.cmd(&format!("ss -Hltn sport = :{port}")).ok();
            check(!listeners.trim().is_empty(), "nobody listens")
        });
    }

    /// Ends it, with its network.
    #[track_caller]
    pub fn end(self) {
        let (host, pid) = (self.host.clone(), self.pid);
        drop(self.process);
        let name = host.name().to_owned();
        nix::sys::signal::kill(
            nix::unistd::Pid::from_raw(i32::try_from(pid).expect("a pid")),
            nix::sys::signal::Signal::SIGKILL,
        )
        .expect("ours");
        wait_until(&format!("a container of {name} to end"), SOON, || {
            check(!PathBuf::from(format!("/proc/{pid}")).exists(), "it lives")
        });
    }
}

fn number(file: &std::path::Path) -> Result<u32, String> {
    let text = fs::read_to_string(file).map_err(|e| e.to_string())?;
    text.trim()
        .parse()
        .map_err(|_| format!("no number: {text}"))
}
