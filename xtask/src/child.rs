//! Child processes: each in a process group of its own, ended and swept when we are told to end.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

/// How long a child's group may take to end before it is killed.
const END_MAX: Duration = Duration::from_secs(3);
/// As shells report an end by Ctrl-C.
const INTERRUPTED: i32 = 130;

/// The process group of the child that runs; 0 for none.
static GROUP: AtomicI32 = AtomicI32::new(0);
static ENDING: AtomicBool = AtomicBool::new(false);
static DEMO: AtomicBool = AtomicBool::new(false);

/// Writes a line to stderr; stdout is for results.
pub(crate) fn say(text: &str) {
    drop(writeln!(std::io::stderr().lock(), "{text}"));
}

/// Writes results to stdout.
pub(crate) fn print(text: &str) {
    drop(std::io::stdout().lock().write_all(text.as_bytes()));
}

/// From now on a signal to end kills the running child's group and sweeps.
pub(crate) fn watch_signals() -> anyhow::Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP]).context("signal handlers")?;
    std::thread::spawn(move || {
        if signals.forever().next().is_some() {
            ENDING.store(true, Ordering::SeqCst);
            say("ending: killing what runs and removing what it made");
            end_group();
            sweep_all();
            std::process::exit(INTERRUPTED);
        }
    });
    Ok(())
}

fn end_group() {
    let group = GROUP.load(Ordering::SeqCst);
    if group == 0 {
        return;
    }
    let group = Pid::from_raw(group);
    let _ = killpg(group, Signal::SIGTERM);
    let end = Instant::now() + END_MAX;
    // The group is gone when nobody is left to be signalled; its leader is reaped by the main thread.
    while killpg(group, None).is_ok() && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(20));
    }
    let _ = killpg(group, Signal::SIGKILL);
}

/// Removes what dead tests left, and the demonstration if it is this run's, by whichever program was built.
pub(crate) fn sweep_all() {
    if !nix::unistd::geteuid().is_root() {
        return;
    }
    let built = [Profile::Dev, Profile::Release].map(|p| bin_dir(p).join("meshwork-site"));
    let Some(site) = built.iter().find(|path| path.exists()) else {
        return;
    };
    let mut command = Command::new(site);
    command.arg("sweep");
    if DEMO.load(Ordering::SeqCst) {
        command.arg("--demo");
    }
    drop(command.status());
}

/// From now on what [`sweep_all`] removes includes the demonstration: one that was kept earlier is not ours to end.
pub(crate) fn owns_demo() {
    DEMO.store(true, Ordering::SeqCst);
}

/// How the binaries are built.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Profile {
    Dev,
    Release,
}

pub(crate) fn target_dir() -> PathBuf {
    let target = std::env::var_os("CARGO_TARGET_DIR").map(PathBuf::from);
    target.unwrap_or_else(|| crate::root().join("target"))
}

/// Where cargo puts the binaries.
pub(crate) fn bin_dir(profile: Profile) -> PathBuf {
    target_dir().join(match profile {
        Profile::Dev => "debug",
        Profile::Release => "release",
    })
}

/// Runs to a good end.
pub(crate) fn run(command: &mut Command) -> anyhow::Result<()> {
    let child = spawn(command)?;
    finish(child, command)
}

/// Runs to its end and hands each line of its stdout to `line` as it comes.
pub(crate) fn run_lines(command: &mut Command, mut line: impl FnMut(&str)) -> anyhow::Result<()> {
    let mut child = spawn(command.stdout(Stdio::piped()))?;
    if let Some(stdout) = child.stdout.take() {
        // A line may hold whatever a failing test printed.
        for text in BufReader::new(stdout).split(b'\n') {
            line(&String::from_utf8_lossy(
                &text.context("reading its output")?,
            ));
        }
    }
    finish(child, command)
}

fn spawn(command: &mut Command) -> anyhow::Result<Child> {
    let spawned = command.process_group(0).stdin(Stdio::null()).spawn();
    let child = spawned.with_context(|| format!("starting {}", name(command)))?;
    GROUP.store(i32::try_from(child.id())?, Ordering::SeqCst);
    Ok(child)
}

fn finish(mut child: Child, command: &Command) -> anyhow::Result<()> {
    let status = child.wait();
    if ENDING.load(Ordering::SeqCst) {
        // The thread that watches signals ends this process when all is swept.
        loop {
            std::thread::park();
        }
    }
    GROUP.store(0, Ordering::SeqCst);
    let status = status?;
    anyhow::ensure!(status.success(), "{} ended with {status}", name(command));
    Ok(())
}

fn name(command: &Command) -> String {
    let program = PathBuf::from(command.get_program());
    let program = program
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    let first = command
        .get_args()
        .next()
        .unwrap_or_default()
        .to_string_lossy();
    format!("{program} {first}")
}

/// `cargo` in the checkout, with the places of binaries said to tests.
pub(crate) fn cargo(words: &[&str]) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command
        .args(words)
        .current_dir(crate::root())
        .env("MESH_BIN_DIR", bin_dir(Profile::Dev));
    command
}

/// Builds every binary.
pub(crate) fn build(profile: Profile) -> anyhow::Result<()> {
    let mut words = vec!["build", "--quiet", "--workspace", "--bins", "--locked"];
    words.extend((profile == Profile::Release).then_some("--release"));
    run(&mut cargo(&words))
}

/// Runs `meshwork-site`.
pub(crate) fn site(profile: Profile, words: &[&str]) -> anyhow::Result<()> {
    run(site_command(profile).args(words))
}

pub(crate) fn site_command(profile: Profile) -> Command {
    let dir = bin_dir(profile);
    let mut command = Command::new(dir.join("meshwork-site"));
    command.env("MESH_BIN_DIR", dir);
    command
}
