//! A host that boots: systemd as its first process, a root of its own, real packages. Its network is a host of the
//! site; what the kernel knew of it goes when it is switched off.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use crate::cgroup;
use crate::host::{Host, RESOLV_CONF};
use crate::process::{Cmd, Output, Process};
use crate::wait::{SOON, check, wait_until};

/// Where it finds the packages that `cargo xtask package --quick` made.
pub const PACKAGES: &str = "/packages";
/// Its programs' environment: nothing of ours.
const ENVIRONMENT: [&str; 6] = [
    "env",
    "-i",
    "PATH=/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME=/root",
    "LANG=C.UTF-8",
    "DEBIAN_FRONTEND=noninteractive",
];
/// Enters the cgroup of version 1 too, where there is one, and becomes the program.
const ENTER: &str =
    r#"[ -z "$1" ] || { mkdir -p "$1" && echo $$ > "$1/cgroup.procs"; } && shift && exec "$@""#;

#[derive(Debug)]
pub struct Machine {
    pub host: Host,
    nspawn: Option<Process>,
    /// Its first process, as we see it.
    leader: u32,
}

impl Machine {
    /// A host that was installed and never booted.
    #[track_caller]
    pub fn new(host: &Host) -> Self {
        let base = crate::root().join("target/booted/base");
        assert!(
            base.join("whole").exists(),
            "{} is not there; run `cargo xtask test --tier booted`",
            base.display()
        );
        let dir = host.dir();
        for name in ["upper", "work", "root"] {
            fs::create_dir_all(dir.join(name)).expect("a directory");
        }
        let options = format!(
            "lowerdir={},upperdir={},workdir={}",
            base.join("root").display(),
            dir.join("upper").display(),
            dir.join("work").display()
        );
        let mount = Command::new("mount")
            .args(["-t", "overlay", "overlay", "-o", &options])
            .arg(dir.join("root"))
            .output()
            .expect("`mount` of util-linux");
        assert!(mount.status.success(), "{mount:?}");
        let machine = Self {
            host: host.clone(),
            nspawn: None,
            leader: 0,
        };
        machine.write("etc/hostname", &format!("{}\n", host.name()));
        machine.write("etc/resolv.conf", RESOLV_CONF);
        // Not the one that systemd-nspawn would give to all of them.
        let id = u32::from(host.v4());
        machine.write("etc/machine-id", &format!("{id:032x}\n"));
        // The journal is kept: it tells why a test failed.
        fs::create_dir_all(machine.path("var/log/journal")).expect("a directory");
        machine
    }

    /// A host that booted.
    #[track_caller]
    pub fn booted(host: &Host) -> Self {
        let mut machine = Self::new(host);
        machine.boot();
        machine
    }

    /// A file of its root, as we see it.
    pub fn path(&self, file: &str) -> PathBuf {
        self.host.dir().join("root").join(file)
    }

    /// Writes a file of its root, and the directories that lead to it.
    pub fn write(&self, file: &str, text: &str) {
        let path = self.path(file);
        let dir = path.parent().expect("it is below the root");
        fs::create_dir_all(dir).expect("a directory");
        // A link of the machine leads into our own root here.
        let real = dir.canonicalize().expect("a directory");
        let root = self.path("").canonicalize().expect("its root");
        assert!(real.starts_with(root), "{} is a link", dir.display());
        drop(fs::remove_file(&path));
        fs::write(path, text).expect("a file of the machine");
    }

    /// Boots and waits until all units stand.
    #[track_caller]
    pub fn boot(&mut self) {
        self.boot_with(&[]);
    }

    /// Boots with these words for systemd-nspawn, as `--set-credential=…`.
    #[track_caller]
    pub fn boot_with(&mut self, words: &[String]) {
        self.start(words);
        wait_until(
            &format!("{} to have booted", self.host.name()),
            SOON,
            || {
                let state = self
                    .run("systemctl is-system-running; systemctl list-units --failed --no-legend");
                check(state.stdout.starts_with("running"), state.to_string())
            },
        );
    }

    #[track_caller]
    fn start(&mut self, words: &[String]) {
        assert!(self.nspawn.is_none(), "it runs already");
        let namespace = self.host.namespace();
        let old = cgroup::version1().map(|root| root.join(self.host.cgroup_name("boot")));
        let old = old.unwrap_or_default().display().to_string();
        let mut all: Vec<String> = ["sh", "-c", ENTER, "sh", &old, "systemd-nspawn"]
            .map(str::to_owned)
            .to_vec();
        all.extend([
            "--boot".to_owned(),
            "--quiet".to_owned(),
            "--register=no".to_owned(),
            "--keep-unit".to_owned(),
            format!("--machine={namespace}"),
            format!("--hostname={}", self.host.name()),
            format!("--network-namespace-path=/run/netns/{namespace}"),
            "--capability=CAP_NET_ADMIN,CAP_NET_RAW".to_owned(),
            "--resolv-conf=off".to_owned(),
            "--timezone=off".to_owned(),
            "--link-journal=no".to_owned(),
            "--console=pipe".to_owned(),
            format!(
                "--bind-ro={}:{PACKAGES}",
                crate::root().join("target/package").display()
            ),
        ]);
        all.extend_from_slice(words);
        all.extend(["-D".to_owned(), self.path("").display().to_string()]);
        let nspawn = self.host.program(all).cgroup("boot");
        // cgroup2 for it, also where the machine has version 1 beside it.
        let nspawn = nspawn.env("SYSTEMD_NSPAWN_UNIFIED_HIERARCHY", "1");
        let mut nspawn = nspawn.spawn("console");
        self.leader = wait_until("its first process", SOON, || {
            nspawn.is_alive().unwrap_or_else(|e| panic!("{e}"));
            let procs = self
                .host
                .cgroup("boot")
                .join("payload/init.scope/cgroup.procs");
            let text = fs::read_to_string(procs).unwrap_or_default();
            let mut pids = text.lines().filter_map(|line| line.parse().ok());
            pids.find(|pid| is_first(*pid)).ok_or_else(|| text.clone())
        });
        self.nspawn = Some(nspawn);
    }

    /// Shuts down in order and is switched off.
    #[track_caller]
    pub fn power_off(&mut self) {
        let nspawn = self.nspawn.take().expect("it runs");
        nspawn.stop();
        self.host.forget();
    }

    /// As when somebody pulls the plug.
    #[track_caller]
    pub fn lose_power(&mut self) {
        self.nspawn.take().expect("it runs").kill9();
        cgroup::kill(&self.host.cgroup("boot")).expect("its cgroup");
        self.host.forget();
    }

    #[track_caller]
    pub fn reboot(&mut self) {
        self.power_off();
        self.boot();
    }

    /// A command line for the shell of root on it.
    pub fn cmd(&self, line: &str) -> Cmd {
        let target = self.leader.to_string();
        let enter = ["nsenter", "--target", &target];
        let namespaces = ["--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup"];
        let words = enter.into_iter().chain(namespaces).chain(ENVIRONMENT);
        let words = words.chain(["sh", "-c", line]);
        self.host.program(words).cgroup("boot/payload/init.scope")
    }

    /// Runs a command line to its end.
    #[track_caller]
    pub fn run(&self, line: &str) -> Output {
        self.cmd(line).output()
    }

    /// Runs a command line that must succeed and returns what it wrote.
    #[track_caller]
    pub fn ok(&self, line: &str) -> String {
        self.run(line).ok()
    }

    /// A command line as one of the programs of a unit that runs.
    pub fn in_unit(&self, unit: &str, line: &str) -> Cmd {
        self.cmd(&format!(
            "echo $$ > /sys/fs/cgroup/system.slice/{unit}.service/cgroup.procs && {line}"
        ))
    }

    /// What its journal says of a unit since it was installed.
    pub fn journal(&self, unit: &str) -> String {
        let output = Command::new("journalctl")
            .arg("--directory")
            .arg(self.path("var/log/journal"))
            .args(["--no-pager", "--output", "short-precise"])
            .args((!unit.is_empty()).then(|| format!("--unit={unit}")))
            .output();
        output.map_or_else(
            |error| error.to_string(),
            |output| String::from_utf8_lossy(&output.stdout).into_owned(),
        )
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if std::thread::panicking() {
            drop(fs::write(self.host.log("journal"), self.journal("")));
        }
    }
}

/// Whether a process is the first of its namespace.
fn is_first(pid: u32) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("NSpid:"));
    let numbers = line.unwrap_or_default().split_whitespace().skip(1);
    numbers.last() == Some("1")
}
