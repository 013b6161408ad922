//! Another program takes the holder's place: the one that a newer package put on disk, or this one with another
//! configuration. The process stays the same, and with it its number, its children and its open descriptors.
//!
//! 1. *Ask.* The program on disk is asked in a process of its own whether it can read what it would be given. Nothing has
//!    changed if it can not ([`Question`]).
//! 2. *Become.* The holder executes it. What it is given is a file in memory that names the descriptors ([`Handover`]).
//! 3. *Try.* The new holder starts a worker of its own, which loads everything and then stands by. The worker of before goes
//!    on meanwhile (`holder/trial.rs`).
//! 4. *Take over*, or *go back*: the program of before is executed again, and finds everything as it left it.

use std::ffi::{CString, OsStr, OsString};
use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::ffi::OsStringExt as _;
use std::os::unix::fs::FileExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use super::confirmed::Standing;
use super::protocol::DesiredWorkload;
use super::worker_process;
use super::{HolderConfig, confirmed};
use crate::capture::CaptureSettings;
use crate::dns::wiring;

/// Where the new program finds the file, by the number of its descriptor.
const PLACE: &str = "MESHWORK_HANDOVER";
/// Why the program after this one gave up.
const GAVE_UP: &str = "MESHWORK_GAVE_UP";
/// Where a program that is executed again finds the configuration that it had: the one on disk may be of the newer one.
const CONFIG: &str = "MESHWORK_CONFIG";
/// The form of the file. One that is not known is refused by the program that is asked.
const FORM: u32 = 3;
/// Workloads, doors and real addresses as one message of a worker has them, doors twice, and the names of descriptors.
const BYTES_MAX: u64 = 8 * 1024 * 1024;
/// How long a program may take to say that it can read the file.
const ANSWER_MAX: Duration = Duration::from_secs(10);
/// What it says then.
pub(crate) const ANSWER: &str = "takes over\n";
/// How much of what it says instead is passed on, in bytes.
const REASON_MAX: u64 = 400;

/// What the file says. Descriptors are numbers of the process.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Handover {
    pub(super) form: u32,
    /// Where the program is looked for on disk.
    pub(super) program: PathBuf,
    /// The program that hands over.
    pub(super) old: RawFd,
    pub(super) lock: RawFd,
    /// Where the mesh port listens, or would if the host had the family.
    pub(super) addresses: Vec<SocketAddr>,
    pub(super) mesh: Vec<RawFd>,
    pub(super) dns_udp: Vec<RawFd>,
    pub(super) dns_tcp: Vec<RawFd>,
    /// Their port; 0: there are none.
    #[serde(default)]
    pub(super) names: u16,
    pub(super) listeners: Vec<LeftListener>,
    pub(super) table: Option<LeftRules>,
    pub(super) settings: CaptureSettings,
    pub(super) vip4: String,
    pub(super) vip6: String,
    /// The one that serves, if there is one now.
    pub(super) worker: Option<LeftWorker>,
    pub(super) draining: Vec<LeftWorker>,
    /// As the kernel knows them.
    pub(super) workloads: Vec<DesiredWorkload>,
    pub(super) standing: Standing,
    /// Where the state is, and what goes with a boot.
    pub(super) places: [PathBuf; 2],
    /// A copy of the configuration that the program had.
    pub(super) config: PathBuf,
    pub(super) repaired: u64,
    /// Reloads that came to an end, whichever.
    pub(super) reloads: u64,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct LeftListener {
    pub(super) number: u16,
    pub(super) label: String,
    pub(super) v4: Option<RawFd>,
    pub(super) v6: Option<RawFd>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct LeftRules {
    pub(super) socket: RawFd,
    pub(super) sequence: u32,
    pub(super) levels: Vec<u8>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct LeftWorker {
    pub(super) pid: i32,
    pub(super) link: RawFd,
    pub(super) age_ms: u64,
    /// Of one that drains: how long it may go on.
    pub(super) left_ms: u64,
}

/// Directories that all programs of one run have in common.
pub(super) fn places(config: &HolderConfig) -> [PathBuf; 2] {
    [config.door_file.clone(), config.outcome_file.clone()]
}

impl Handover {
    /// The form that this program writes.
    pub(super) const fn form() -> u32 {
        FORM
    }

    fn descriptors(&self) -> Vec<RawFd> {
        let listeners = self.listeners.iter().flat_map(|l| [l.v4, l.v6]).flatten();
        let workers = self.worker.iter().chain(&self.draining).map(|w| w.link);
        let table = self.table.iter().map(|table| table.socket);
        let sockets = self.mesh.iter().chain(&self.dns_udp).chain(&self.dns_tcp);
        [self.old, self.lock]
            .into_iter()
            .chain(sockets.copied())
            .chain(listeners)
            .chain(workers)
            .chain(table)
            .collect()
    }

    /// Whether this program can go on from there with this configuration.
    pub(super) fn fits(&self, config: &HolderConfig) -> anyhow::Result<()> {
        ensure!(
            self.form == FORM,
            "what it would be given has the form {}, and it knows {FORM}; restart the agent",
            self.form
        );
        let ranges = (config.ranges.v4.to_string(), config.ranges.v6.to_string());
        ensure!(
            self.settings == config.capture && (&self.vip4, &self.vip6) == (&ranges.0, &ranges.1),
            "what stands under [capture], or the mesh's address ranges, changed: that needs a restart of the agent"
        );
        ensure!(
            self.addresses == config.mesh,
            "where the mesh port listens changed: that needs a restart of the agent"
        );
        ensure!(
            self.places == places(config),
            "state_dir or runtime_dir changed: that needs a restart of the agent"
        );
        confirmed::Confirmed::handed_over(config, &self.standing)?;
        if let Some(chosen) = wiring::fixed(&config.dns)
            && self.names != 0
        {
            ensure!(
                chosen.way.works_at(self.names),
                "`dns.wiring` is {} now, for which names must be answered at another port than {}: that needs a restart \
                 of the agent",
                chosen.way,
                self.names
            );
        }
        Ok(())
    }

    fn write(&self) -> io::Result<OwnedFd> {
        let memory = memfd_create(c"meshwork-handover", MFdFlags::MFD_CLOEXEC)?;
        let mut file = File::from(memory);
        serde_json::to_writer(&mut file, self)?;
        Ok(file.into())
    }

    fn read(file: &File) -> anyhow::Result<Self> {
        let length = file.metadata()?.len();
        ensure!(length <= BYTES_MAX, "it is larger than {BYTES_MAX} bytes");
        let mut bytes = vec![0; usize::try_from(length)?];
        file.read_exact_at(&mut bytes, 0)?;
        Ok(serde_json::from_slice(&bytes)?)
    }
}

/// What was left to this program, with its descriptors. All stay open, so that the program before this one finds them
/// again, until this value goes.
#[derive(Debug)]
pub(crate) struct Left {
    pub(super) state: Handover,
    file: OwnedFd,
    open: Vec<OwnedFd>,
    /// Why the program after this one gave up, if there was one.
    pub(super) given_up: Option<String>,
}

impl Left {
    /// What the program before this one left. To be called once, before anything else opens descriptors.
    ///
    /// # Errors
    /// When it can not be read. The caller goes [back](go_back).
    pub(crate) fn take() -> anyhow::Result<Option<Self>> {
        let Some(place) = std::env::var_os(PLACE) else {
            return Ok(None);
        };
        let number: Option<RawFd> = place.to_str().and_then(|text| text.parse().ok());
        let number = number.with_context(|| format!("{PLACE} names no descriptor"))?;
        let file = File::from(own(number)?);
        let state = Handover::read(&file).context("what was handed over can not be read")?;
        let open = state.descriptors().into_iter().map(own);
        let open = open.collect::<io::Result<Vec<_>>>();
        Ok(Some(Self {
            open: open.context("what was handed over is not open")?,
            state,
            file: file.into(),
            given_up: std::env::var(GAVE_UP).ok(),
        }))
    }

    /// A descriptor of one's own for what the file names.
    pub(super) fn copy(&self, number: RawFd) -> io::Result<OwnedFd> {
        let found = self.open.iter().find(|open| open.as_raw_fd() == number);
        let found = found.ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
        found.try_clone()
    }

    pub(super) fn copies<T: From<OwnedFd>>(&self, numbers: &[RawFd]) -> io::Result<Vec<T>> {
        let copies = numbers.iter().map(|number| self.copy(*number).map(T::from));
        copies.collect()
    }

    /// The lock of the one agent.
    pub(crate) fn lock(&self) -> io::Result<OwnedFd> {
        self.copy(self.state.lock)
    }

    /// Executes the program of before again. Returns only if that fails.
    pub(crate) fn go_back(self, why: &str) -> anyhow::Error {
        let why: String = why.chars().take(REASON_MAX as usize).collect();
        log::error!("the new program gives up, and the one before it goes on: {why}");
        let environment = [
            (PLACE, self.file.as_raw_fd().to_string()),
            (GAVE_UP, why.replace('\0', " ")),
            (CONFIG, self.state.config.display().to_string()),
        ];
        let open = self.open.iter().map(AsFd::as_fd);
        let open: Vec<_> = open.chain([self.file.as_fd()]).collect();
        let run = |arguments: &[CString], environment: &[CString]| {
            let old = open.iter().find(|fd| fd.as_raw_fd() == self.state.old);
            let old = old.ok_or(nix::Error::ENOENT)?;
            nix::unistd::fexecve(old, arguments, environment).map(|never| match never {})
        };
        let error = execute(&self.state.program, &environment, &open, run);
        anyhow::Error::new(error).context("the program before this one could not be executed again")
    }
}

/// Goes back to the program before this one, if there is one and this one has not begun with what it left.
pub(crate) fn go_back(error: &anyhow::Error) {
    match Left::take() {
        // That program has gone back already, and has the same fault by now.
        Ok(Some(left)) if left.given_up.is_none() => {
            let failed = left.go_back(&format!("{error:#}"));
            log::error!("{failed:#}");
        }
        Ok(_) => {}
        Err(error) => log::error!("{error:#}"),
    }
}

/// A program that is being asked.
#[derive(Debug)]
pub(super) struct Question {
    child: Child,
    pub(super) until: Instant,
}

impl Question {
    /// Asks the program whether it could take over from here.
    pub(super) fn ask(state: &Handover, config: Option<&Path>) -> io::Result<Self> {
        let mut stdin = File::from(state.write()?);
        io::Seek::rewind(&mut stdin)?;
        let mut command = Command::new(&state.program);
        command.arg0("mesh-agent").arg("takes-over");
        if let Some(config) = config {
            command.arg("--config").arg(config);
        }
        forget_handover(&mut command);
        command
            .stdin(stdin)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        Ok(Self {
            child: worker_process::ask(command)?,
            until: Instant::now() + ANSWER_MAX,
        })
    }

    /// `None` while there is no answer; why not, when it will not take over.
    pub(super) fn answer(&mut self) -> Option<Result<(), String>> {
        let pid = i32::try_from(self.child.id()).ok()?;
        let ended = match worker_process::ended(Pid::from_raw(pid)) {
            Ok(Some(ended)) => ended,
            Ok(None) if Instant::now() < self.until => return None,
            Ok(None) => {
                let _ = self.child.kill();
                let _ = self.child.wait();
                return Some(Err(format!(
                    "it did not answer within {} s",
                    ANSWER_MAX.as_secs()
                )));
            }
            Err(error) => return Some(Err(error.to_string())),
        };
        let said = said(self.child.stdout.take());
        if ended.is_success() && said == ANSWER {
            return Some(Ok(()));
        }
        let why = said_last(&said_or(said, self.child.stderr.take()));
        Some(Err(match (why, ended) {
            (Some(why), _) => why,
            (None, ended) => format!("it ended with {ended} and said nothing; is it a mesh-agent?"),
        }))
    }

    /// Becomes the program that was asked. Returns only if that fails.
    pub(super) fn become_it(
        self,
        state: &Handover,
        open: &[BorrowedFd<'_>],
    ) -> io::Result<io::Error> {
        // It may have changed since it was asked.
        let file = state.write()?;
        let environment = [
            (PLACE, file.as_raw_fd().to_string()),
            (GAVE_UP, String::new()),
            (CONFIG, String::new()),
        ];
        let open: Vec<_> = open.iter().copied().chain([file.as_fd()]).collect();
        let run = |arguments: &[CString], environment: &[CString]| {
            let program = text(state.program.as_os_str())?;
            nix::unistd::execve(&program, arguments, environment).map(|never| match never {})
        };
        Ok(execute(&state.program, &environment, &open, run))
    }
}

/// Whatever is started from here is not the program that was handed over to.
pub(super) fn forget_handover(command: &mut Command) {
    for name in [PLACE, GAVE_UP, CONFIG] {
        command.env_remove(name);
    }
}

/// The configuration that a program has which is executed again.
pub(crate) fn kept_config() -> Option<PathBuf> {
    std::env::var_os(GAVE_UP)?;
    std::env::var_os(CONFIG).map(PathBuf::from)
}

/// All that it wrote, up to a bound. It has ended, so this does not wait; another that it started may.
fn said(pipe: Option<impl io::Read + AsFd>) -> String {
    let Some(pipe) = pipe else {
        return String::new();
    };
    let flags = nix::fcntl::OFlag::O_NONBLOCK;
    if fcntl(&pipe, FcntlArg::F_SETFL(flags)).is_err() {
        return String::new();
    }
    let mut bytes = Vec::new();
    // What comes before an error counts.
    let _ = pipe.take(REASON_MAX).read_to_end(&mut bytes);
    String::from_utf8_lossy(&bytes).into_owned()
}

fn said_or(said: String, errors: Option<std::process::ChildStderr>) -> String {
    let errors = self::said(errors);
    if errors.is_empty() { said } else { errors }
}

fn said_last(text: &str) -> Option<String> {
    let line = text.lines().rev().find(|line| !line.trim().is_empty())?;
    let clean: String = line.chars().filter(|c| !c.is_control()).collect();
    Some(clean)
}

/// Executes a program in this process with these descriptors open. Returns only if that fails.
fn execute(
    program: &Path,
    set: &[(&str, String)],
    open: &[BorrowedFd<'_>],
    run: impl FnOnce(&[CString], &[CString]) -> nix::Result<()>,
) -> io::Error {
    let attempt = || -> nix::Result<()> {
        let own = std::env::args_os().skip(1);
        let arguments = std::iter::once(program.as_os_str().to_owned()).chain(own);
        let arguments = arguments
            .map(|word| text(&word))
            .collect::<Result<Vec<_>, _>>()?;
        let kept = std::env::vars_os().filter(|(name, _)| set.iter().all(|(set, _)| name != set));
        let new = set.iter().filter(|(_, value)| !value.is_empty());
        let new = new.map(|(name, value)| (OsString::from(name), OsString::from(value)));
        let environment = kept.chain(new).map(|(mut name, value)| {
            name.push("=");
            name.push(value);
            text(&name)
        });
        let environment = environment.collect::<Result<Vec<_>, _>>()?;
        inherit(open, FdFlag::empty())?;
        run(&arguments, &environment)
    };
    let error = attempt().err().unwrap_or(nix::Error::ENOEXEC);
    // Whatever else is started from here must not have them.
    let _ = inherit(open, FdFlag::FD_CLOEXEC);
    error.into()
}

fn inherit(open: &[BorrowedFd<'_>], flag: FdFlag) -> nix::Result<()> {
    for descriptor in open {
        fcntl(descriptor, FcntlArg::F_SETFD(flag))?;
    }
    Ok(())
}

fn text(word: &OsStr) -> nix::Result<CString> {
    CString::new(word.to_owned().into_vec()).map_err(|_| nix::Error::EINVAL)
}

/// Where the program is on disk: as it was called, so that a link may lead to another one later.
pub(super) fn program() -> io::Result<PathBuf> {
    let called = std::env::args_os().next().map(PathBuf::from);
    match called {
        Some(called) if called.is_absolute() && called.exists() => Ok(called),
        _ => {
            let own = std::env::current_exe()?.into_os_string().into_vec();
            // What the kernel says of one that was replaced.
            let own = own
                .strip_suffix(b" (deleted)")
                .map(<[u8]>::to_vec)
                .unwrap_or(own);
            Ok(OsString::from_vec(own).into())
        }
    }
}

/// Answers the program that asks whether this one could take its place; `config` is this one's.
pub(crate) fn answer(config: &HolderConfig) -> anyhow::Result<()> {
    let mut bytes = Vec::new();
    let stdin = io::stdin().lock();
    stdin.take(BYTES_MAX + 1).read_to_end(&mut bytes)?;
    if bytes.is_empty() {
        bail!("this is asked by `mesh-agent run`, when it is to hand over");
    }
    let state: Handover =
        serde_json::from_slice(&bytes).context("what it would be given can not be read")?;
    state.fits(config)?;
    io::stdout().write_all(ANSWER.as_bytes())?;
    Ok(())
}

/// Makes a descriptor that was inherited by number ours.
#[expect(unsafe_code, reason = "descriptors that were inherited by number")]
fn own(number: RawFd) -> io::Result<OwnedFd> {
    if number < 0 {
        return Err(io::ErrorKind::InvalidData.into());
    }
    // SAFETY: it is no negative number; it is only looked at here, and not used when it is not open.
    let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
    fcntl(borrowed, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
    // SAFETY: it is open, and the program before this one left it for this place alone, which is reached once.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}
