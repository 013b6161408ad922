//! A host: one network namespace, one directory, one resolv.conf, one cgroup for each of its workloads.

use std::fs;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use crate::process::{Cmd, Output};
use crate::site::{self, Shared, ip};
use crate::wait::wait_until;

/// What stands in a host's resolv.conf before an agent comes: a server of the site that does not exist.
pub(crate) const RESOLV_CONF: &str = "nameserver 10.77.0.1\noptions timeout:1 attempts:1\n";

/// One machine of a site. Clones are the same machine.
#[derive(Clone, Debug)]
pub struct Host {
    site: Arc<Shared>,
    name: String,
    number: u8,
}

impl Host {
    pub(crate) fn new(site: Arc<Shared>, name: &str, number: u8) -> Self {
        let host = Self {
            site,
            name: name.to_owned(),
            number,
        };
        fs::create_dir_all(host.dir()).expect("a directory for the host");
        fs::write(host.resolv_conf(), RESOLV_CONF).expect("a resolv.conf");
        host
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn v4(&self) -> Ipv4Addr {
        Ipv4Addr::new(10, 77, 0, self.number)
    }

    pub fn v6(&self) -> Ipv6Addr {
        Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, self.number.into())
    }

    /// The name of its network namespace.
    pub fn namespace(&self) -> String {
        format!("{}-{}", self.site.prefix, self.name)
    }

    /// The other end of its `eth0`, at the bridge.
    pub(crate) fn peer(&self) -> String {
        format!("h{}", self.number)
    }

    /// The kernel forgets all that it knew of this host, as at a boot. No process of it may be left.
    #[track_caller]
    pub(crate) fn forget(&self) {
        site::unplug(&self.site, self);
        site::plug(&self.site, self);
    }

    /// Its directory, which any user may enter.
    pub fn dir(&self) -> PathBuf {
        self.site.dir.join(&self.name)
    }

    pub fn resolv_conf(&self) -> PathBuf {
        self.dir().join("resolv.conf")
    }

    /// Gives the host an `/etc`, a copy of the machine's, and a `/run` of its own: what changes there then was
    /// changed on this host.
    #[track_caller]
    pub fn own_etc_and_run(&self) {
        let root = self.own_root();
        fs::create_dir_all(root.join("run")).expect("a directory");
        let copy = Command::new("cp").args(["-a", "/etc"]).arg(&root).output();
        let copy = copy.expect("`cp` of coreutils");
        assert!(copy.status.success(), "{copy:?}");
        // It may lead out of the copy, and is what the host's own is mounted on.
        let resolv_conf = root.join("etc/resolv.conf");
        drop(fs::remove_file(&resolv_conf));
        fs::write(resolv_conf, "").expect("a resolv.conf");
    }

    /// Directories that stand in the place of the machine's for this host.
    pub(crate) fn own_root(&self) -> PathBuf {
        self.dir().join("own")
    }

    /// A subdirectory that belongs to `user`, for a server's files.
    #[track_caller]
    pub fn subdir(&self, name: &str, user: Option<u32>) -> PathBuf {
        let path = self.dir().join(name);
        fs::create_dir_all(&path).expect("a directory");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("its mode");
        std::os::unix::fs::chown(&path, user, user).expect("its owner");
        path
    }

    /// The cgroup of that name, made at first use.
    #[track_caller]
    pub fn cgroup(&self, name: &str) -> PathBuf {
        let path = self.site.cgroup.join(&self.name).join(name);
        fs::create_dir_all(&path).expect("a cgroup");
        path
    }

    /// The same, as services.d names it: relative to the root of cgroup2.
    pub fn cgroup_name(&self, name: &str) -> String {
        format!("{}/{}/{name}", self.site.prefix, self.name)
    }

    /// A command line for the shell.
    pub fn cmd(&self, line: &str) -> Cmd {
        self.program(["sh", "-c", line])
    }

    /// A program and its arguments, as they are.
    pub fn program<S: Into<String>>(&self, words: impl IntoIterator<Item = S>) -> Cmd {
        Cmd::new(self.clone(), words.into_iter().map(Into::into).collect())
    }

    /// Runs a command line to its end, as root and outside of any workload.
    #[track_caller]
    pub fn run(&self, line: &str) -> Output {
        self.cmd(line).output()
    }

    /// Runs a command line that must succeed and returns what it wrote.
    #[track_caller]
    pub fn ok(&self, line: &str) -> String {
        self.run(line).ok()
    }

    /// Waits until somebody listens on this TCP port.
    #[track_caller]
    pub fn wait_listening(&self, port: u16, deadline: Duration) {
        wait_until(
            &format!("a listener on {port} of {}", self.name),
            deadline,
            || {
                let listeners = self.ok(&format!("ss -Hltn sport = :{port}"));
                crate::wait::check(!listeners.trim().is_empty(), "nobody listens")
            },
        );
    }

    /// Runs a Python script of the system's interpreter, which `apt` has libraries for.
    pub fn python(&self, name: &str, script: &str) -> Cmd {
        let path = self.dir().join(format!("{name}.py"));
        fs::write(&path, script).expect("a script");
        self.program(["/usr/bin/python3".to_owned(), path.display().to_string()])
    }

    /// Runs `what` on a thread whose sockets are this host's.
    #[track_caller]
    pub fn inside<T: Send>(&self, what: impl FnOnce() -> T + Send) -> T {
        let path = format!("/run/netns/{}", self.namespace());
        let inside = || {
            let namespace = fs::File::open(&path).expect("the host's namespace");
            nix::sched::setns(namespace, nix::sched::CloneFlags::CLONE_NEWNET).expect("setns");
            what()
        };
        std::thread::scope(|scope| {
            let thread = scope.spawn(inside);
            thread
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Takes the link to the others down or up.
    #[track_caller]
    pub fn set_link(&self, up: bool) {
        let state = if up { "up" } else { "down" };
        ip(&format!("-n {} link set eth0 {state}", self.namespace()));
    }

    pub(crate) fn log(&self, name: &str) -> PathBuf {
        self.site.logs.join(format!("{}-{name}.log", self.name))
    }

    pub(crate) fn is_kept(&self) -> bool {
        self.site.kept
    }
}
