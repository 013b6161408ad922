//! Who did what, when, from where, and what came of it: JSON lines, appended, never changed.

use std::collections::VecDeque;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use mesh_core::reason::Reason;
use serde::Serialize;

use crate::clock;
use crate::limits::{self, Pace};

/// Size at which the file is rotated.
const FILE_MAX: u64 = 64 * 1024 * 1024;
/// Rotated files that are kept.
const KEPT: usize = 4;
/// How far back the operator API looks, in bytes: some ten thousand entries.
const TAIL_MAX: u64 = 4 * 1024 * 1024;
/// Most entries of one answer.
pub(crate) const LIMIT_MAX: usize = 10_000;
/// Refusals of one address in one kind of act before they are only counted: more than a fleet behind one address has when its
/// scope was narrowed. One more is written after each of the second: some 20 MB a day.
const REFUSALS_MAX: u32 = 1_000;
const REFUSALS_REFILL: Duration = Duration::from_secs(1);
/// Longest text of a field that a peer chose.
const FIELD_MAX: usize = 256;

/// Who asked for something, as far as it is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Actor {
    /// `operator/admin`, `host/vm-1`, `token/t-1`, `control`, or `unknown`.
    pub who: String,
    /// The address that the call came from; empty for control itself.
    pub from: String,
}

impl Actor {
    pub(crate) fn control() -> Self {
        Self {
            who: "control".to_owned(),
            from: String::new(),
        }
    }

    /// The address without a port; `None` for control itself.
    pub(crate) fn address(&self) -> Option<IpAddr> {
        let with_port = self.from.parse::<SocketAddr>().map(|a| a.ip());
        with_port.or_else(|_| self.from.parse()).ok()
    }
}

#[derive(Serialize)]
struct Entry<'a> {
    time: String,
    who: &'a str,
    from: &'a str,
    action: &'a str,
    object: &'a str,
    outcome: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<&'static str>,
    revision: u64,
}

#[derive(Debug)]
pub(crate) struct Audit {
    path: PathBuf,
    /// Held for one append only.
    file: Mutex<Open>,
    /// By address and kind of act.
    refusals: Pace<(IpAddr, String)>,
}

#[derive(Debug)]
struct Open {
    file: File,
    size: u64,
}

impl Audit {
    pub(crate) fn open(state: &Path) -> io::Result<Self> {
        let path = state.join("audit.jsonl");
        let open = open(&path)?;
        Ok(Self {
            path,
            file: Mutex::new(open),
            refusals: Pace::new(REFUSALS_MAX, REFUSALS_REFILL),
        })
    }

    /// Appends one entry. That the audit can not be written is loud, and stops nothing: what was committed is. False for a
    /// refusal of somebody who has had his share of them in this kind of act: who is refused without end must not rotate away
    /// what else is there. All are counted in metrics.
    pub(crate) fn append(
        &self,
        actor: &Actor,
        action: &str,
        object: &str,
        refused: Option<Reason>,
        revision: u64,
    ) -> bool {
        if let (Some(_), Some(address)) = (refused, actor.address()) {
            let who = (limits::key(address), cut(action).to_owned());
            if !self.refusals.take(who, 1, Instant::now()) {
                return false;
            }
        }
        let entry = Entry {
            time: clock::rfc3339(clock::now_s()),
            who: cut(&actor.who),
            from: cut(&actor.from),
            action,
            object: cut(object),
            outcome: if refused.is_some() { "refused" } else { "ok" },
            reason: refused.map(Reason::code),
            revision,
        };
        let written = serde_json::to_vec(&entry).map_err(io::Error::other);
        let written = written.and_then(|mut line| {
            line.push(b'\n');
            self.write(&line)
        });
        if let Err(error) = written {
            log::error!(action, object; "cannot append to {}: {error}", self.path.display());
        }
        true
    }

    fn write(&self, line: &[u8]) -> io::Result<()> {
        let mut open = self.lock();
        if FILE_MAX < open.size + line.len() as u64 {
            rotate(&self.path)?;
            *open = self::open(&self.path)?;
        }
        open.file.write_all(line)?;
        open.size += line.len() as u64;
        Ok(())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Open> {
        // A file position is no state that a panic could have left half done.
        self.file
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// The last `limit` entries, newest first.
    pub(crate) fn tail(&self, limit: usize) -> io::Result<Vec<serde_json::Value>> {
        let mut file = File::open(&self.path)?;
        let size = file.metadata()?.len();
        file.seek(SeekFrom::Start(size.saturating_sub(TAIL_MAX)))?;
        let mut text = Vec::new();
        file.take(TAIL_MAX).read_to_end(&mut text)?;
        let text = String::from_utf8_lossy(&text);
        let mut last = VecDeque::new();
        for line in text.lines() {
            // The first line may be cut.
            if let Ok(entry) = serde_json::from_str(line) {
                last.push_front(entry);
                last.truncate(limit.min(LIMIT_MAX));
            }
        }
        Ok(last.into())
    }
}

fn open(path: &Path) -> io::Result<Open> {
    let file = OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(path)?;
    let size = file.metadata()?.len();
    Ok(Open { file, size })
}

fn rotate(path: &Path) -> io::Result<()> {
    let numbered = |n: usize| path.with_extension(format!("jsonl.{n}"));
    for n in (1..KEPT).rev() {
        match fs::rename(numbered(n), numbered(n + 1)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    fs::rename(path, numbered(1))
}

/// At most [`FIELD_MAX`] bytes, at a character's end.
fn cut(text: &str) -> &str {
    let mut end = text.len().min(FIELD_MAX);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_come_back_newest_first() {
        let state = std::env::temp_dir().join(format!("meshwork-audit-{}", std::process::id()));
        fs::create_dir_all(&state).unwrap();
        let audit = Audit::open(&state).unwrap();
        let actor = Actor::control();
        for n in 0..5 {
            audit.append(&actor, "join", &format!("host/{n}"), None, n);
        }
        let long = "é".repeat(300);
        audit.append(&actor, "join", &long, Some(Reason::TokenUsed), 5);
        let tail = audit.tail(2).unwrap();
        assert_eq!(tail.len(), 2);
        assert_eq!(tail[0]["reason"], "token_used");
        assert_eq!(tail[0]["object"].as_str().unwrap().len(), FIELD_MAX);
        assert_eq!(tail[1]["object"], "host/4");
        fs::remove_dir_all(&state).unwrap();
    }
}
