//! Processes on a host: commands that end, and servers that stay.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::host::Host;
use crate::wait::{SOON, wait_until};

/// Makes a cgroup the shell's own, gives it the host's resolv.conf (and directories, if it has its own), and becomes
/// the program.
const ENTER: &str = r#"echo $$ > "$1/cgroup.procs" &&
    for own in "$3"/*; do [ ! -d "$own" ] || mount --bind "$own" "/${own##*/}" || exit; done &&
    mount --bind "$2" /etc/resolv.conf && shift 3 && exec "$@""#;

/// Descriptors that a child can be given.
const DESCRIPTORS_MAX: usize = 64;

/// A command to be run on a host.
#[derive(Debug)]
#[must_use]
pub struct Cmd {
    host: Host,
    words: Vec<String>,
    user: Option<u32>,
    cgroup: String,
    deadline: Duration,
    environment: Vec<(String, String)>,
    /// It finds them from 3 on.
    descriptors: Vec<OwnedFd>,
}

/// What a command left behind.
#[derive(Debug)]
pub struct Output {
    pub command: String,
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
}

/// A process that stays until it is stopped or dropped.
#[derive(Debug)]
pub struct Process {
    child: Child,
    name: String,
    log: PathBuf,
    kept: bool,
}

impl Cmd {
    pub(crate) fn new(host: Host, words: Vec<String>) -> Self {
        Self {
            host,
            words,
            user: None,
            cgroup: "shell".to_owned(),
            deadline: SOON,
            environment: Vec::new(),
            descriptors: Vec::new(),
        }
    }

    /// Runs as this user (and the group of the same number), without its other groups.
    pub fn user(mut self, uid: u32) -> Self {
        self.user = Some(uid);
        self
    }

    /// Runs in this cgroup of the host (default: `shell`).
    pub fn cgroup(mut self, name: &str) -> Self {
        self.cgroup = name.to_owned();
        self
    }

    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Is given these descriptors, from 3 on.
    pub fn descriptors(mut self, descriptors: Vec<OwnedFd>) -> Self {
        self.descriptors = descriptors;
        self
    }

    /// After this the command is killed and the test fails (default: [`SOON`]).
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// Runs to the end, whatever it is.
    #[track_caller]
    pub fn output(self) -> Output {
        let mut child = self
            .command()
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("nsenter of util-linux");
        let stdout = child.stdout.take().map(collect);
        let stderr = child.stderr.take().map(collect);
        let end = Instant::now() + self.deadline;
        let status = loop {
            if let Some(status) = child.try_wait().expect("waitpid") {
                break status;
            }
            if end < Instant::now() {
                drop(child.kill());
                panic!("{:?} did not end within {:?}", self.words, self.deadline);
            }
            std::thread::sleep(Duration::from_millis(2));
        };
        let text = |thread: Option<std::thread::JoinHandle<String>>| {
            thread.and_then(|t| t.join().ok()).unwrap_or_default()
        };
        Output {
            command: self.words.join(" "),
            status,
            stdout: text(stdout),
            stderr: text(stderr),
        }
    }

    /// Runs to the end, which must be a good one.
    #[track_caller]
    pub fn ok(self) -> String {
        self.output().ok()
    }

    /// Starts and leaves it running, its output in the site's logs.
    #[track_caller]
    pub fn spawn(self, name: &str) -> Process {
        let log = self.host.log(name);
        let file = open_log(&log);
        let errors = file.try_clone().expect("a descriptor");
        let mut command = self.command();
        give(&mut command, &self.descriptors);
        let child = command.stdout(file).stderr(errors).spawn();
        Process {
            child: child.expect("nsenter of util-linux"),
            name: format!("{} on {}", name, self.host.name()),
            log,
            kept: self.host.is_kept(),
        }
    }

    fn command(&self) -> Command {
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--net=/run/netns/{}", self.host.namespace()))
            .args(["unshare", "--mount", "--propagation", "private"])
            .args(["sh", "-c", ENTER, "sh"])
            .arg(self.host.cgroup(&self.cgroup))
            .arg(self.host.resolv_conf())
            .arg(self.host.own_root());
        if let Some(uid) = self.user {
            command
                .arg("setpriv")
                .arg(format!("--reuid={uid}"))
                .arg(format!("--regid={uid}"))
                .arg("--clear-groups");
        }
        command
            .args(&self.words)
            .envs(self.environment.iter().map(|(n, v)| (n, v)))
            .env_remove("http_proxy")
            .env_remove("https_proxy")
            .env_remove("HTTP_PROXY")
            .env_remove("HTTPS_PROXY")
            .env_remove("ALL_PROXY")
            .env_remove("all_proxy")
            .current_dir("/")
            .stdin(Stdio::null());
        command
    }
}

impl Output {
    /// The standard output of a command that must have succeeded.
    #[track_caller]
    pub fn ok(self) -> String {
        assert!(self.status.success(), "{self}");
        self.stdout
    }

    pub fn code(&self) -> i32 {
        self.status
            .code()
            .unwrap_or_else(|| 128 + self.status.signal().unwrap_or_default())
    }
}

/// Has the child find these at 3 and the numbers behind.
#[expect(unsafe_code, reason = "code between fork and exec")]
fn give(command: &mut Command, descriptors: &[OwnedFd]) {
    if descriptors.is_empty() {
        return;
    }
    let given: Vec<i32> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
    let step = move || {
        // First out of the way of each other.
        let away: [i32; DESCRIPTORS_MAX] = std::array::from_fn(|at| {
            let from = given.get(at).copied();
            // SAFETY: takes numbers only.
            from.map_or(-1, |from| unsafe {
                nix::libc::fcntl(from, nix::libc::F_DUPFD_CLOEXEC, 200)
            })
        });
        for (from, to) in away.into_iter().zip(3..).filter(|(from, _)| *from >= 0) {
            // SAFETY: takes numbers only.
            if unsafe { nix::libc::dup2(from, to) } < 0 {
                return Err(std::io::Error::last_os_error());
            }
        }
        Ok(())
    };
    assert!(descriptors.len() <= DESCRIPTORS_MAX, "too many descriptors");
    // SAFETY: the step makes system calls and allocates nothing.
    unsafe {
        std::os::unix::process::CommandExt::pre_exec(command, step);
    }
}

impl std::fmt::Display for Output {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "`{}` ended with {}\nstdout: {}\nstderr: {}",
            self.command,
            self.code(),
            self.stdout,
            self.stderr
        )
    }
}

impl Process {
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Whether it runs; if not, how it ended.
    pub fn is_alive(&mut self) -> Result<(), String> {
        match self.child.try_wait() {
            Ok(None) => Ok(()),
            Ok(Some(status)) => Err(format!("{} ended: {status}\n{}", self.name, self.log())),
            Err(error) => Err(error.to_string()),
        }
    }

    #[track_caller]
    pub fn signal(&self, signal: Signal) {
        kill(pid(self.pid()), signal).expect("the process is ours");
    }

    /// Asks it to end and waits for it.
    #[track_caller]
    pub fn stop(mut self) -> ExitStatus {
        self.signal(Signal::SIGTERM);
        self.wait()
    }

    /// `kill -9`, as a crash.
    #[track_caller]
    pub fn kill9(mut self) {
        self.signal(Signal::SIGKILL);
        self.wait();
    }

    #[track_caller]
    fn wait(&mut self) -> ExitStatus {
        wait_until(&format!("{} to end", self.name), SOON, || {
            match self.child.try_wait() {
                Ok(Some(status)) => Ok(status),
                _ => Err("it runs".to_owned()),
            }
        })
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if !self.kept {
            drop(self.child.kill());
            drop(self.child.wait());
        }
    }
}

fn pid(id: u32) -> Pid {
    Pid::from_raw(i32::try_from(id).expect("a pid"))
}

fn collect(mut from: impl std::io::Read + Send + 'static) -> std::thread::JoinHandle<String> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        drop(from.read_to_end(&mut bytes));
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

fn open_log(path: &Path) -> File {
    OpenOptions::new()
        .create(true)
        .append(true)
        .open(path)
        .unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}
