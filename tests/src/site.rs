//! A site: hosts as network namespaces, joined by a bridge in a namespace of its own, so that the machine's own
//! network never sees any of it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::host::Host;
use crate::{cgroup, sweep};

/// How much of each log a failing test shows.
const TAIL_LINES: usize = 40;
/// `ip netns add` prepares `/run/netns` at its first use, which two at once get wrong.
static NETNS: Mutex<()> = Mutex::new(());
static NUMBER: AtomicU32 = AtomicU32::new(0);

/// Everything made for one test. Dropping it removes it all.
#[derive(Debug)]
pub struct Site {
    shared: Arc<Shared>,
}

#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) prefix: String,
    /// State of the hosts; short, since it holds unix sockets.
    pub(crate) dir: PathBuf,
    /// In `dir`, so that two runs at once keep theirs apart.
    pub(crate) logs: PathBuf,
    /// Where they are kept when the test fails.
    kept_logs: PathBuf,
    pub(crate) cgroup: PathBuf,
    pub(crate) kept: bool,
    hosts: AtomicU32,
}

impl Site {
    /// A site for the test `name`; its logs are in `target/mesh-tests/<name>/` if it fails.
    #[track_caller]
    pub fn new(name: &str) -> Self {
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let prefix = format!("{}{}-{number}", sweep::TEST_PREFIX, std::process::id());
        Self::with_prefix(prefix, name, false)
    }

    /// The site of the demonstration; a `kept` one outlives this process until [`sweep::demo`].
    #[track_caller]
    pub fn demo(kept: bool) -> Self {
        Self::with_prefix(sweep::DEMO_PREFIX.to_owned(), "demo", kept)
    }

    #[track_caller]
    fn with_prefix(prefix: String, name: &str, kept: bool) -> Self {
        assert!(
            nix::unistd::geteuid().is_root(),
            "network namespaces need root; run this as root"
        );
        let dir = std::env::temp_dir().join(&prefix);
        let shared = Shared {
            logs: dir.join("logs"),
            kept_logs: crate::root().join("target/mesh-tests").join(name),
            dir,
            cgroup: cgroup::root().join(&prefix),
            prefix,
            kept,
            hosts: AtomicU32::new(0),
        };
        fs::create_dir_all(&shared.logs).expect("a directory for state");
        fs::create_dir_all(&shared.cgroup).expect("a cgroup");
        let bridge = shared.bridge_namespace();
        add_namespace(&bridge);
        ip(&format!("-n {bridge} link add br0 type bridge"));
        ip(&format!("-n {bridge} link set br0 up"));
        Self {
            shared: Arc::new(shared),
        }
    }

    /// A new host: 10.77.0.N and fd77::N on `eth0`.
    #[track_caller]
    pub fn host(&self, name: &str) -> Host {
        let number = self.shared.hosts.fetch_add(1, Ordering::Relaxed) + 10;
        let number = u8::try_from(number).expect("at most 245 hosts");
        let host = Host::new(Arc::clone(&self.shared), name, number);
        plug(&self.shared, &host);
        host
    }

    /// The first part of the names of all that was made.
    pub fn prefix(&self) -> &str {
        &self.shared.prefix
    }
}

impl Shared {
    pub(crate) fn bridge_namespace(&self) -> String {
        format!("{}-br", self.prefix)
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        if self.kept {
            return;
        }
        if std::thread::panicking() {
            show_logs(&self.logs);
            keep_logs(&self.logs, &self.kept_logs);
        }
        sweep::site(&self.prefix);
    }
}

/// Copies what a failed test logged to where it outlives the site. What can not be copied was shown.
fn keep_logs(from: &Path, to: &Path) {
    drop(fs::remove_dir_all(to));
    drop(fs::create_dir_all(to));
    for entry in fs::read_dir(from).into_iter().flatten().flatten() {
        drop(fs::copy(entry.path(), to.join(entry.file_name())));
    }
}

#[expect(
    clippy::print_stderr,
    reason = "this is what the reader of a failed test needs"
)]
fn show_logs(logs: &Path) {
    let Ok(entries) = fs::read_dir(logs) else {
        return;
    };
    for entry in entries.flatten() {
        let path = entry.path();
        let bytes = fs::read(&path).unwrap_or_default();
        let text = String::from_utf8_lossy(&bytes);
        let lines: Vec<&str> = text.lines().collect();
        let tail = &lines[lines.len().saturating_sub(TAIL_LINES)..];
        eprintln!("--- the end of {}\n{}", path.display(), tail.join("\n"));
    }
}

/// Makes a host's namespace and connects it to the others'.
#[track_caller]
pub(crate) fn plug(site: &Shared, host: &Host) {
    let (namespace, bridge) = (host.namespace(), site.bridge_namespace());
    let peer = host.peer();
    add_namespace(&namespace);
    ip(&format!("-n {namespace} link set lo up"));
    ip(&format!(
        "link add eth0 netns {namespace} type veth peer name {peer} netns {bridge}"
    ));
    ip(&format!("-n {bridge} link set {peer} master br0 up"));
    ip(&format!(
        "-n {namespace} address add {}/24 dev eth0",
        host.v4()
    ));
    // The same at each boot, and with it the address of the link.
    ip(&format!(
        "-n {namespace} link set eth0 address 02:77:00:00:00:{:02x}",
        host.v4().octets()[3]
    ));
    // Without duplicate address detection: the test need not wait for it.
    ip(&format!(
        "-n {namespace} address add {}/64 dev eth0 nodad",
        host.v6()
    ));
    ip(&format!("-n {namespace} link set eth0 up"));
}

/// Takes it away with all that the kernel knew of the host.
#[track_caller]
pub(crate) fn unplug(site: &Shared, host: &Host) {
    // A namespace that goes takes its link along only later.
    ip(&format!(
        "-n {} link delete {}",
        site.bridge_namespace(),
        host.peer()
    ));
    ip(&format!("netns delete {}", host.namespace()));
}

#[track_caller]
fn add_namespace(name: &str) {
    let _one = NETNS.lock().unwrap_or_else(PoisonError::into_inner);
    ip(&format!("netns add {name}"));
}

/// Runs `ip` with these words.
#[track_caller]
pub(crate) fn ip(words: &str) {
    let output = Command::new("ip")
        .args(words.split_whitespace())
        .output()
        .expect("`ip` of iproute2");
    assert!(
        output.status.success(),
        "`ip {words}`: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}
