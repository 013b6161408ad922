//! A check by a command. systemd runs it, as the user of the workload and confined: a worker may become nobody else, and
//! should not. What it says is read by a pipe of ours; see docs/decisions/0019-health-checks.md.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use mesh_api::workload_file::RunAs;
use nix::sys::stat::Mode;
use tokio::io::AsyncReadExt as _;
use tokio::net::unix::pipe::{OpenOptions, Receiver};
use tokio::process::Command;

use super::systemd;

/// How much of what a command says is kept, for the log.
const SAID_MAX: usize = 512;
/// The same of what systemd-run says.
const REFUSED_MAX: u64 = 2048;
/// Processes and threads that a command may have.
const TASKS_MAX: u32 = 128;

/// What the names of our transient units begin with.
const UNIT: &str = "mesh-check";

pub(super) async fn ask(
    dir: &Path,
    command: &[String],
    run_as: &RunAs,
    timeout: Duration,
) -> io::Result<()> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    systemd::booted()?;
    let user = user(run_as).await?;
    // Another worker's are other units.
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let unit = format!("{UNIT}-{}-{count}.service", std::process::id());
    let mut pipe = Pipe::make(dir.join(&unit))?;
    let mut child = Command::new("systemd-run")
        .args(arguments(&unit, &pipe.path, &user, command, timeout))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()?;
    let mut refused = Vec::new();
    let stderr = child.stderr.take();
    let ended = async {
        if let Some(stderr) = stderr {
            stderr.take(REFUSED_MAX).read_to_end(&mut refused).await?;
        }
        child.wait().await
    };
    let ended = tokio::select! {
        ended = ended => ended?,
        failed = pipe.drain() => return Err(failed),
    };
    pipe.rest();
    if ended.success() {
        return Ok(());
    }
    let program = command.first().map_or("", String::as_str);
    let (said, refused) = (line(&pipe.said), line(&refused));
    Err(io::Error::other(match said.as_str() {
        "" => format!("{program} failed and said nothing; systemd: {refused}"),
        said => format!("{program} failed: {said}"),
    }))
}

/// Whose rights a command has, as arguments of systemd-run.
async fn user(run_as: &RunAs) -> io::Result<Vec<String>> {
    let unit = match run_as {
        RunAs::User(user) => return Ok(vec![format!("--uid={user}")]),
        RunAs::Unit(unit) => unit,
    };
    let names = ["LoadState", "User", "Group", "SupplementaryGroups"];
    let said = systemd::properties(unit, &names).await?;
    let word = |name: &str| said.get(name).filter(|value| !value.is_empty());
    if word("LoadState").is_none_or(|state| state != "loaded") {
        return Err(io::Error::other(format!(
            "there is no unit {unit}, so nobody whose command it is"
        )));
    }
    let mut arguments = Vec::new();
    // A unit that names no user is root's.
    arguments.push(format!(
        "--uid={}",
        word("User").map_or("root", |user| user)
    ));
    arguments.extend(word("Group").map(|group| format!("--gid={group}")));
    arguments.extend(
        word("SupplementaryGroups")
            .map(|groups| format!("--property=SupplementaryGroups={groups}")),
    );
    Ok(arguments)
}

fn arguments(
    unit: &str,
    pipe: &Path,
    user: &[String],
    command: &[String],
    timeout: Duration,
) -> Vec<OsString> {
    let mut output = OsString::from("--property=StandardOutput=file:");
    output.push(pipe);
    let own = [
        "--quiet".to_owned(),
        "--no-ask-password".to_owned(),
        // Nothing is left of one that failed.
        "--collect".to_owned(),
        // systemd-run waits for its end by the job, which needs no bus.
        "--service-type=oneshot".to_owned(),
        format!("--unit={unit}"),
        "--description=Health check of a service in the mesh".to_owned(),
        format!("--property=TimeoutStartSec={}", timeout.as_secs()),
        // All of its processes, at once.
        "--property=KillMode=control-group".to_owned(),
        "--property=KillSignal=SIGKILL".to_owned(),
        "--property=NoNewPrivileges=yes".to_owned(),
        "--property=CapabilityBoundingSet=".to_owned(),
        format!("--property=TasksMax={TASKS_MAX}"),
        "--property=LimitCORE=0".to_owned(),
        "--property=StandardInput=null".to_owned(),
        "--property=StandardError=inherit".to_owned(),
        // The agent's log says what failed; systemd need not, every few seconds.
        "--property=LogLevelMax=emerg".to_owned(),
    ];
    let mut all: Vec<OsString> = own.into_iter().map(OsString::from).collect();
    all.push(output);
    all.extend(user.iter().map(OsString::from));
    all.push("--".into());
    // systemd would put its variables in.
    all.extend(command.iter().map(|word| word.replace('$', "$$").into()));
    all
}

/// A named pipe, which a command that systemd runs writes to.
#[derive(Debug)]
struct Pipe {
    path: PathBuf,
    receiver: Receiver,
    said: Vec<u8>,
}

impl Pipe {
    fn make(path: PathBuf) -> io::Result<Self> {
        if let Some(dir) = path.parent() {
            fs::create_dir_all(dir)?;
        }
        nix::unistd::mkfifo(&path, Mode::S_IRUSR | Mode::S_IWUSR)?;
        // A writer of our own, so that it does not end with the first of the command's.
        let receiver = OpenOptions::new().read_write(true).open_receiver(&path);
        match receiver {
            Ok(receiver) => Ok(Self {
                path,
                receiver,
                said: Vec::new(),
            }),
            Err(error) => {
                let _ = fs::remove_file(&path);
                Err(error)
            }
        }
    }

    /// Takes what the command says, for ever, and keeps the beginning: nobody waits for us to read.
    async fn drain(&mut self) -> io::Error {
        loop {
            if let Err(error) = self.receiver.readable().await {
                return error;
            }
            self.rest();
        }
    }

    /// Takes what is there.
    fn rest(&mut self) {
        let mut some = [0; 4096];
        while let Ok(more @ 1..) = self.receiver.try_read(&mut some) {
            let room = SAID_MAX.saturating_sub(self.said.len());
            self.said.extend_from_slice(&some[..more.min(room)]);
        }
    }
}

impl Drop for Pipe {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// What was said, on one line that harms no log.
fn line(said: &[u8]) -> String {
    let text = String::from_utf8_lossy(said);
    let plain = |c: char| if c.is_control() { ' ' } else { c };
    text.trim().chars().map(plain).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::tests::Scratch;
    use std::io::Write as _;

    #[test]
    fn a_command_is_handed_over_as_it_is() {
        let command = ["/bin/x", "$HOME ${A}", "--uid=root"].map(str::to_owned);
        let user = ["--uid=web".to_owned()];
        let all = arguments(
            "u",
            Path::new("/p"),
            &user,
            &command,
            Duration::from_secs(3),
        );
        let all: Vec<&str> = all.iter().map(|word| word.to_str().unwrap()).collect();
        let end = all.iter().position(|word| *word == "--").unwrap();
        assert_eq!(all[end + 1..], ["/bin/x", "$$HOME $${A}", "--uid=root"]);
        assert!(all[..end].contains(&"--uid=web"));
        assert!(all[..end].contains(&"--property=TimeoutStartSec=3"));
    }

    #[tokio::test]
    async fn the_beginning_of_what_is_said_is_kept_and_nobody_waits_for_the_rest() {
        let Scratch(state) = &Scratch::new();
        let mut pipe = Pipe::make(state.root().join("checks/one")).unwrap();
        let path = pipe.path.clone();
        let to = path.clone();
        let writer = tokio::task::spawn_blocking(move || {
            let mut file = fs::OpenOptions::new().write(true).open(to).unwrap();
            // More than a pipe holds.
            file.write_all(&vec![b'x'; 1024 * 1024]).unwrap();
        });
        tokio::select! {
            written = writer => written.unwrap(),
            failed = pipe.drain() => panic!("{failed}"),
        }
        pipe.rest();
        assert_eq!(pipe.said.len(), SAID_MAX);
        drop(pipe);
        assert!(!path.exists());
        assert_eq!(line(b"a\n\x1b[31mb\n"), "a  [31mb");
    }
}
