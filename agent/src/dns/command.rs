//! Runs a program of the host to its end, for a bounded time.

use std::io::{self, Read as _};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// How long one may take. They ask a daemon of this host, which answers in milliseconds, or is stuck.
const MAX: Duration = Duration::from_secs(5);
/// Between two looks whether it has ended.
const LOOK: Duration = Duration::from_millis(5);
/// What is taken of its output, in bytes.
const OUTPUT_MAX: u64 = 16 * 1024;

#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("`{line}` can not be started: {cause}; is the program installed?")]
    Start { line: String, cause: io::Error },
    #[error("`{line}` failed: {said}")]
    Failed { line: String, said: String },
    #[error("`{line}` did not end in {} s and was killed", MAX.as_secs())]
    Late { line: String },
}

/// Runs it and returns what it wrote to stdout.
pub(crate) fn run(program: &str, words: &[&str]) -> Result<String, Error> {
    let line = || format!("{program} {}", words.join(" "));
    let start = |cause| Error::Start {
        line: line(),
        cause,
    };
    let mut child = Command::new(program)
        .args(words)
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(start)?;
    let Some(status) = ended(&mut child).map_err(start)? else {
        return Err(Error::Late { line: line() });
    };
    // Both are in the pipes, which hold as much as any of these programs writes.
    let (out, errors) = (text(child.stdout.take()), text(child.stderr.take()));
    if status.success() {
        return Ok(out);
    }
    let said = [errors.trim(), out.trim()];
    let said = said.into_iter().find(|text| !text.is_empty());
    Err(Error::Failed {
        line: line(),
        said: said.map_or_else(|| status.to_string(), str::to_owned),
    })
}

/// `None`: it was killed.
fn ended(child: &mut Child) -> io::Result<Option<ExitStatus>> {
    let until = Instant::now() + MAX;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if until <= Instant::now() {
            child.kill()?;
            child.wait()?;
            return Ok(None);
        }
        std::thread::sleep(LOOK);
    }
}

fn text(pipe: Option<impl io::Read>) -> String {
    let mut bytes = Vec::new();
    if let Some(pipe) = pipe {
        // What was read until an error is all there is to say.
        drop(pipe.take(OUTPUT_MAX).read_to_end(&mut bytes));
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_it_wrote_is_returned_and_failures_name_the_line() {
        assert_eq!(run("echo", &["a", "b"]).unwrap(), "a b\n");
        let failed = run("sh", &["-c", "echo no such link >&2; exit 1"]).unwrap_err();
        assert!(
            failed.to_string().contains("failed: no such link"),
            "{failed}"
        );
        let silent = run("false", &[]).unwrap_err().to_string();
        assert!(silent.contains("exit status: 1"), "{silent}");
        let absent = run("no-such-program-of-ours", &["x"]).unwrap_err();
        assert!(matches!(absent, Error::Start { .. }), "{absent}");
    }

    #[test]
    fn one_that_does_not_end_is_killed() {
        let late = run("sleep", &["600"]).unwrap_err();
        assert!(matches!(late, Error::Late { .. }), "{late}");
    }
}
