//! A real `mesh-agent` on a host.

use std::fmt::Write as _;
use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::signal::Signal;

use crate::binary;
use crate::clock;
use crate::host::Host;
use crate::manager::Manager;
use crate::metrics::Metrics;
use crate::process::{Cmd, Output, Process};
use crate::wait::{SOON, check, wait_until};

/// Where agents listen for each other.
pub const MESH_PORT: u16 = 7441;

#[derive(Debug)]
pub struct Agent {
    pub host: Host,
    process: Option<Process>,
}

/// Which processes a workload's file names.
#[derive(Clone, Debug)]
pub enum Owner {
    /// The cgroup of this name on the host.
    Cgroup(String),
    User(u32),
    /// A systemd unit, by its name.
    Unit(String),
}

impl Agent {
    /// An agent that has not joined yet, with its configuration written.
    #[track_caller]
    pub fn new(host: &Host) -> Self {
        let agent = Self {
            host: host.clone(),
            process: None,
        };
        for dir in ["state", "run", "services.d"] {
            fs::create_dir_all(host.dir().join(dir)).expect("a directory");
        }
        agent.configure("");
        agent
    }

    /// Writes the configuration anew with more lines at its end.
    pub fn configure(&self, more: &str) {
        let dir = self.host.dir();
        let dir = dir.display();
        let text = format!(
            "state_dir = \"{dir}/state\"\nruntime_dir = \"{dir}/run\"\nservices_dir = \"{dir}/services.d\"\n\n\
             [log]\nlevel = \"info\"\nto = \"stderr\"\n{more}"
        );
        fs::write(self.config(), text).expect("a configuration");
    }

    /// One command of `mesh-agent` with this host's configuration.
    #[track_caller]
    pub fn command(&self, words: &str) -> Output {
        let program = binary("mesh-agent");
        let config = self.config();
        self.host
            .cmd(&format!(
                "{} --config {} {words}",
                program.display(),
                config.display()
            ))
            .output()
    }

    #[track_caller]
    pub fn join(&self, token: &str) -> Output {
        self.command(&format!(
            "join {token} --host-name {} --address {}",
            self.host.name(),
            self.host.v4()
        ))
    }

    /// Starts it and waits until it is ready.
    #[track_caller]
    pub fn started(mut self) -> Self {
        self.start();
        self
    }

    #[track_caller]
    pub fn start(&mut self) {
        self.spawn();
        self.wait_ready();
    }

    /// Starts it without waiting.
    #[track_caller]
    pub fn spawn(&mut self) {
        self.process = Some(self.to_run().spawn("agent"));
    }

    /// Starts it under a service manager, with what that keeps, and does not wait.
    #[track_caller]
    pub fn spawn_under(&mut self, manager: &Manager) {
        let (names, descriptors): (Vec<_>, Vec<_>) = manager.kept().into_iter().unzip();
        // Whoever executes the program has its number already.
        let mut words = vec!["sh".to_owned(), "-c".to_owned()];
        words.push("LISTEN_PID=$$ exec \"$@\"".to_owned());
        words.push("sh".to_owned());
        words.extend(self.words());
        let command = self.host.program(words).cgroup("agent");
        let mut command = command.env("NOTIFY_SOCKET", &manager.socket().to_string_lossy());
        if !descriptors.is_empty() {
            command = command
                .env("LISTEN_FDS", &descriptors.len().to_string())
                .env("LISTEN_FDNAMES", &names.join(":"))
                .descriptors(descriptors);
        }
        self.process = Some(command.spawn("agent"));
    }

    /// Kills the holder; its worker dies with it.
    #[track_caller]
    pub fn kill_holder(&mut self) {
        self.process.take().expect("the agent runs").kill9();
        let procs = self.host.cgroup("agent").join("cgroup.procs");
        wait_until("the worker to die with its holder", SOON, || {
            let left = fs::read_to_string(&procs).unwrap_or_default();
            check(left.is_empty(), left)
        });
    }

    /// Starts it with a wall clock that is so many seconds off; nothing else of the host is.
    #[track_caller]
    pub fn start_off_clock(&mut self, seconds: i64) {
        self.step_clock(seconds);
        let command = clock::off(self.to_run(), &self.host);
        self.process = Some(command.spawn("agent"));
        self.wait_ready();
    }

    /// From now on the wall clock of an agent that was started off the clock is so many seconds off.
    #[track_caller]
    pub fn step_clock(&self, seconds: i64) {
        clock::step(&self.host, seconds);
    }

    /// Starts it with so many descriptors at the most.
    #[track_caller]
    pub fn start_with_descriptors(&mut self, most: usize) {
        let limit = "ulimit -n \"$0\" && exec \"$@\"";
        let mut words = vec!["sh".to_owned(), "-c".to_owned(), limit.to_owned()];
        words.push(most.to_string());
        words.extend(self.words());
        let command = self.host.program(words).cgroup("agent");
        self.process = Some(command.spawn("agent"));
        self.wait_ready();
    }

    /// An agent on `host` that has all files of this one, as a copied disk has.
    #[track_caller]
    pub fn cloned(&self, host: &Host) -> Self {
        let clone = Self::new(host);
        let copied = std::process::Command::new("cp")
            .arg("-a")
            .arg(self.host.dir().join("state/."))
            .arg(host.dir().join("state"))
            .status();
        assert!(copied.expect("cp").success(), "the state is not copied");
        clone
    }

    /// Starts it as in another boot of the kernel than the other agents here, without waiting.
    #[track_caller]
    pub fn spawn_in_boot(&mut self, boot_id: &str) {
        let file = self.host.dir().join("boot_id");
        fs::write(&file, format!("{boot_id}\n")).expect("a boot id");
        // Every command has mounts of its own.
        let mount = "mount --bind \"$0\" /proc/sys/kernel/random/boot_id && exec \"$@\"";
        let mut words = vec!["sh".to_owned(), "-c".to_owned(), mount.to_owned()];
        words.push(file.display().to_string());
        words.extend(self.words());
        let command = self.host.program(words).cgroup("agent");
        self.process = Some(command.spawn("agent"));
    }

    fn to_run(&self) -> Cmd {
        self.host.program(self.words()).cgroup("agent")
    }

    /// The program that this host runs: its own, where one was installed.
    pub fn program(&self) -> PathBuf {
        let own = self.host.dir().join("bin/mesh-agent");
        if own.exists() {
            own
        } else {
            binary("mesh-agent")
        }
    }

    /// Puts a program in the place of the host's own in one moment, as a package does. It is another file than any before.
    #[track_caller]
    pub fn install(&self, program: &Path) {
        let dir = self.host.dir().join("bin");
        fs::create_dir_all(&dir).expect("a directory");
        let new = dir.join("mesh-agent.new");
        drop(fs::remove_file(&new));
        fs::copy(program, &new).expect("a copy of a program");
        fs::rename(new, dir.join("mesh-agent")).expect("its name");
    }

    /// The file that a process of the agent runs.
    #[track_caller]
    pub fn runs(&self, pid: u32) -> u64 {
        let exe = fs::metadata(format!("/proc/{pid}/exe")).expect("a process");
        std::os::unix::fs::MetadataExt::ino(&exe)
    }

    /// The process that stays.
    #[track_caller]
    pub fn holder(&self) -> u32 {
        self.process.as_ref().map(Process::pid).expect("it runs")
    }

    /// `mesh-agent reload`, by the program that is installed now, unless that is none.
    #[track_caller]
    pub fn reload(&self) -> Output {
        let config = self.config();
        let words = [
            binary("mesh-agent").display().to_string(),
            "--config".to_owned(),
            config.display().to_string(),
            "reload".to_owned(),
        ];
        self.host.program(words).deadline(SOON * 3).output()
    }

    fn words(&self) -> [String; 4] {
        let program = self.program().display().to_string();
        let config = self.config().display().to_string();
        [program, "--config".to_owned(), config, "run".to_owned()]
    }

    #[track_caller]
    pub fn wait_ready(&mut self) {
        let process = self.process.as_mut().expect("the agent runs");
        let socket = self.host.dir().join("run/agent.sock");
        wait_until(
            &format!("the agent of {} to be ready", self.host.name()),
            SOON,
            || {
                process.is_alive().unwrap_or_else(|e| panic!("{e}"));
                let (status, body) = get(&socket, "/ready")?;
                check(status == 200, format!("{status} {body}"))
            },
        );
    }

    /// Asks it to end; [`Self::stop`] waits until it has.
    #[track_caller]
    pub fn begin_stop(&self) {
        let process = self.process.as_ref().expect("the agent runs");
        process.signal(Signal::SIGTERM);
    }

    #[track_caller]
    pub fn stop(&mut self) {
        let process = self.process.take().expect("the agent runs");
        let status = process.stop();
        assert!(status.success(), "the agent did not end well: {status}");
    }

    /// The whole agent dies at once, as when the machine kills it: holder and worker.
    #[track_caller]
    pub fn kill9(&mut self) {
        self.process.take().expect("the agent runs").kill9();
        crate::cgroup::kill(&self.host.cgroup("agent")).expect("the agent's cgroup");
    }

    /// Kills the worker; the holder lives. Returns when a new one is ready.
    #[track_caller]
    pub fn kill_worker(&mut self) {
        let old = self.worker();
        self.kill_worker_now();
        wait_until("a new worker", SOON, || {
            let new = self.workers();
            check(!new.is_empty() && !new.contains(&old), format!("{new:?}"))
        });
        self.wait_ready();
    }

    /// Kills the worker; the holder lives. The new one may not be ready yet.
    #[track_caller]
    pub fn kill_worker_now(&self) {
        self.signal_worker(Signal::SIGKILL);
    }

    #[track_caller]
    pub fn signal_worker(&self, signal: Signal) {
        let pid = i32::try_from(self.worker()).expect("a pid");
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), signal).expect("ours");
    }

    /// The pid of the worker, as soon as it is the only one: one that drains without an open connection ends at once.
    #[track_caller]
    pub fn worker(&self) -> u32 {
        let mut workers = Vec::new();
        wait_until("the only worker", SOON, || {
            workers = self.workers();
            check(
                workers.len() == 1,
                format!("{}: {workers:?}", self.host.name()),
            )
        });
        workers[0]
    }

    /// All processes of the agent: the holder and its worker.
    pub fn pids(&self) -> Vec<u32> {
        let procs = self.host.cgroup("agent").join("cgroup.procs");
        let text = fs::read_to_string(procs).unwrap_or_default();
        text.lines().filter_map(|line| line.parse().ok()).collect()
    }

    /// All of its workers, also those that drain.
    pub fn workers(&self) -> Vec<u32> {
        let holder = self.process.as_ref().map(Process::pid);
        self.pids()
            .into_iter()
            .filter(|pid| Some(*pid) != holder)
            .collect()
    }

    /// Resident memory of holder and worker together, in KiB.
    pub fn rss_kib(&self) -> u64 {
        let of = |pid: u32| {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
            let number = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
            number.unwrap_or(0)
        };
        self.pids().into_iter().map(of).sum()
    }

    /// Open descriptors of the worker.
    #[track_caller]
    pub fn descriptors(&self) -> usize {
        let fds = fs::read_dir(format!("/proc/{}/fd", self.worker()));
        fds.map_or(0, Iterator::count)
    }

    /// What the agent has logged since it was first started.
    pub fn log(&self) -> String {
        self.process.as_ref().map(Process::log).unwrap_or_default()
    }

    /// One answer of the admin socket.
    #[track_caller]
    pub fn admin(&self, path: &str) -> String {
        let socket = self.host.dir().join("run/agent.sock");
        wait_until(&format!("{path} of the admin socket"), SOON, || {
            let (status, body) = get(&socket, path)?;
            check(status == 200, format!("{status} {body}")).map(|()| body)
        })
    }

    #[track_caller]
    pub fn metrics(&self) -> Metrics {
        Metrics::parse(&self.admin("/metrics"))
    }

    /// How often it refused for this reason.
    #[track_caller]
    pub fn refused(&self, reason: &str) -> f64 {
        self.metrics()
            .sum("mesh_refused_total", &[("reason", reason)])
    }

    /// Waits until it has refused for this reason more than `before` times.
    #[track_caller]
    pub fn wait_refused(&self, reason: &str, before: f64) {
        wait_until(&format!("a refusal for {reason}"), SOON, || {
            let now = self.refused(reason);
            check(
                before < now,
                format!("it was counted {now} times, before {before}"),
            )
        });
    }

    /// Writes a file of services.d, whole, as an editor does.
    pub fn write_file(&self, name: &str, text: &str) {
        let dir = self.host.dir().join("services.d");
        let new = dir.join(format!(".{name}.new"));
        fs::write(&new, text).expect("a file of services.d");
        fs::rename(new, dir.join(name)).expect("its name");
    }

    /// A workload of namespace `shop` with one service of its name: `ports` as `(number, protocol)`.
    pub fn serve(&self, account: &str, owner: &Owner, ports: &[(u16, &str)]) {
        let mut text = format!(
            "namespace = \"shop\"\n[owner]\n{}\n",
            self.owner_line(owner)
        );
        if !ports.is_empty() {
            let ports: Vec<String> = ports
                .iter()
                .map(|(port, protocol)| format!("{{ port = {port}, protocol = \"{protocol}\" }}"))
                .collect();
            write!(text, "[[service]]\nports = [{}]\n", ports.join(", ")).expect("to memory");
            text.push_str("check = { tcp = true, interval_s = 1 }\n");
        }
        self.write_file(&format!("{account}.toml"), &text);
    }

    /// The line of `[owner]`.
    pub fn owner_line(&self, owner: &Owner) -> String {
        match owner {
            Owner::Cgroup(name) => format!("cgroup = \"{}\"", self.host.cgroup_name(name)),
            Owner::User(uid) => format!("user = \"{uid}\""),
            Owner::Unit(name) => format!("unit = \"{name}\""),
        }
    }

    pub fn config(&self) -> PathBuf {
        self.host.dir().join("agent.toml")
    }
}

/// `GET path` over a unix socket.
pub(crate) fn get(socket: &Path, path: &str) -> Result<(u16, String), String> {
    let fault = |e: std::io::Error| format!("{}: {e}", socket.display());
    let mut stream = UnixStream::connect(socket).map_err(fault)?;
    let limit = Some(Duration::from_secs(5));
    stream.set_read_timeout(limit).map_err(fault)?;
    // HTTP/1.0: the answer ends with the connection and is never chunked.
    write!(stream, "GET {path} HTTP/1.0\r\nHost: agent\r\n\r\n").map_err(fault)?;
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).map_err(fault)?;
    let text = String::from_utf8_lossy(&bytes).into_owned();
    let (head, body) = text.split_once("\r\n\r\n").ok_or("no HTTP answer")?;
    let status = head.split(' ').nth(1).and_then(|s| s.parse().ok());
    Ok((status.ok_or("no HTTP status")?, body.to_owned()))
}
