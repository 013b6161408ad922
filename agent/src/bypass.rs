//! `mesh-agent bypass`: root opens this host to plaintext for a time, e.g. to go on while the mesh is being mended. The
//! kernel closes it again (`capture/bypass.rs`); this file says who opened it and until when, for the holder, which keeps
//! the rules so, and for control, which notes it in its audit log.

use std::fmt;
use std::io::ErrorKind;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use mesh_api::duration;
use mesh_api::proto;
use mesh_runtime::{clock, files};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::{Uid, User};
use serde::{Deserialize, Serialize};

use crate::Mistyped;
use crate::alone;
use crate::capture::bypass::tables_are;
use crate::config::Config;
use crate::state::State;

pub(crate) const FILE: &str = "bypass.json";
/// Two texts and a few numbers.
const FILE_MAX: u64 = 4_096;
/// Shorter than that it might be over before it was seen to have begun.
const SHORTEST: Duration = Duration::from_secs(5);
/// Longest that a host may be open. Who needs longer makes its services permissive.
const LONGEST: Duration = Duration::from_secs(24 * 3_600);
/// Characters of the reason.
const WHY_MAX: usize = 200;
/// The holder looks every second; it may be writing thousands of rules.
const WAIT_MAX: Duration = Duration::from_secs(15);
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// Who logged in, whatever `sudo` made of him; without a login it is [`NOBODY`].
const LOGIN: &str = "/proc/self/loginuid";
const NOBODY: u32 = u32::MAX;

/// A host that is open, or was since its boot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Bypass {
    /// Unix time.
    pub(crate) begun_ms: u64,
    /// When it closes, or was closed by hand: Unix time.
    pub(crate) until_ms: u64,
    /// The same by a clock that nobody sets and that counts what is slept: milliseconds since the boot.
    until_boot_ms: u64,
    /// It ends with the boot, too.
    boot_id: String,
    pub(crate) by: String,
    pub(crate) why: String,
}

impl Bypass {
    /// How long the host is still open; `None`: it is closed.
    pub(crate) fn left(&self) -> Option<Duration> {
        let boot = clock::boot_id().ok()?;
        let left = self.until_boot_ms.saturating_sub(since_boot_ms());
        // More than was ever granted was not written by us.
        (boot == self.boot_id && left > 0).then(|| Duration::from_millis(left).min(LONGEST))
    }
}

/// That this host is open, for people and `status`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Open {
    pub(crate) left_s: u64,
    by: String,
    why: String,
}

impl Open {
    /// `None`: it is closed.
    pub(crate) fn of(bypass: &Bypass) -> Option<Self> {
        Some(Self {
            left_s: bypass.left()?.as_secs(),
            by: bypass.by.clone(),
            why: bypass.why.clone(),
        })
    }
}

impl fmt::Display for Open {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let left = duration::short(Duration::from_secs(self.left_s));
        write!(f, "for {left} more, opened by {} ({})", self.by, self.why)
    }
}

impl From<&Bypass> for proto::Bypass {
    fn from(bypass: &Bypass) -> Self {
        Self {
            begun_ms: bypass.begun_ms,
            until_ms: bypass.until_ms,
            by: bypass.by.clone(),
            why: bypass.why.clone(),
        }
    }
}

fn since_boot_ms() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_BOOTTIME).map(Duration::from);
    now.map_or(u64::MAX, |now| {
        u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
    })
}

/// The last one; `None`: there was none since the join.
pub(crate) fn read(file: &Path) -> anyhow::Result<Option<Bypass>> {
    let name = || {
        format!(
            "cannot read {}; remove it, the host is closed",
            file.display()
        )
    };
    let text = match files::read_bounded(file, FILE_MAX) {
        Err(error) if error.cause.kind() == ErrorKind::NotFound => return Ok(None),
        read => read.with_context(name)?,
    };
    serde_json::from_slice(&text).with_context(name)
}

/// How long the host is still open. What can not be read is said and opens nothing.
pub(crate) fn left(file: &Path) -> Option<Duration> {
    let bypass = read(file).unwrap_or_else(|error| {
        log::error!("{error:#}");
        None
    });
    bypass.and_then(|bypass| bypass.left())
}

/// What [`ask`] is told to do.
pub(crate) enum Wanted {
    Open { time: Duration, why: String },
    Closed,
}

/// Opens or closes this host, and waits until the kernel has it so. `guard` makes what stands without an agent so.
///
/// # Errors
/// Where it could not be done, and what to do then.
pub(crate) fn ask(
    config: &Config,
    wanted: Wanted,
    guard: impl FnOnce() -> anyhow::Result<()>,
) -> anyhow::Result<String> {
    ensure!(
        config.capture.enabled,
        "nothing is taken over or refused here (`capture.enabled = false`), so there is nothing to open"
    );
    let state = State::new(&config.state_dir);
    ensure!(
        state.membership()?.is_some(),
        "this host is in no mesh, so there is nothing to open"
    );
    let file = state.bypass_file();
    let bypass = match wanted {
        Wanted::Open { time, why } => opened(time, why)?,
        Wanted::Closed => match read(&file)? {
            Some(bypass) if bypass.left().is_some() => Bypass {
                until_ms: clock::now_ms(),
                until_boot_ms: 0,
                ..bypass
            },
            _ => return Ok("this host is closed already\n".to_owned()),
        },
    };
    files::write_private(&file, &serde_json::to_vec(&bypass)?)?;
    let left = bypass.left();
    match alone::holder(config)? {
        Some(_) => wait(config, left.is_some())?,
        None => guard()?,
    }
    Ok(match left {
        None => "closed: plaintext is refused again as before; what was opened in plaintext meanwhile goes on until it \
                 ends\n"
            .to_owned(),
        Some(_) => format!(
            "open until {}: plaintext callers are let in at every port, and calls to real addresses leave in plaintext; \
             calls by mesh names go on as they did\n`mesh-agent bypass --end` closes it before\n",
            clock::rfc3339(bypass.until_ms / 1000)
        ),
    })
}

fn opened(time: Duration, why: String) -> anyhow::Result<Bypass> {
    if !(SHORTEST..=LONGEST).contains(&time) {
        bail!(Mistyped(format!(
            "--for is {} to {}; what must be open for longer is made permissive (meshwork.io/transport)",
            duration::short(SHORTEST),
            duration::short(LONGEST)
        )));
    }
    if WHY_MAX < why.chars().count() || why.chars().any(char::is_control) {
        bail!(Mistyped(format!(
            "--why has {WHY_MAX} characters at most, all of one line"
        )));
    }
    let ms = u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
    let now_ms = clock::now_ms();
    Ok(Bypass {
        begun_ms: now_ms,
        until_ms: now_ms.saturating_add(ms),
        until_boot_ms: since_boot_ms().saturating_add(ms),
        boot_id: clock::boot_id().context("which boot this is can not be told")?,
        by: who(),
        why,
    })
}

/// The user of the login, else the one that runs this.
fn who() -> String {
    let login = std::fs::read_to_string(LOGIN).ok();
    let login = login.and_then(|text| text.trim().parse().ok());
    let uid = login.filter(|uid| *uid != NOBODY).map(Uid::from_raw);
    let uid = uid.unwrap_or_else(nix::unistd::getuid);
    match User::from_uid(uid) {
        Ok(Some(user)) => user.name,
        _ => format!("user {uid}"),
    }
}

/// Waits until the agent that runs has done it.
fn wait(config: &Config, open: bool) -> anyhow::Result<()> {
    let until = Instant::now() + WAIT_MAX;
    while !tables_are(&config.capture, open).context("cannot read the packet filter")? {
        ensure!(
            Instant::now() < until,
            "the agent did not do it within {} s; `systemctl stop mesh-agent`, then repeat this; its log may say why",
            WAIT_MAX.as_secs()
        );
        std::thread::sleep(LOOK_EVERY);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bypass() -> Bypass {
        opened(Duration::from_secs(60), "mending".to_owned()).unwrap()
    }

    #[test]
    fn it_is_open_for_its_time_in_its_boot_only() {
        let left = bypass().left().unwrap();
        assert!(left <= Duration::from_secs(60) && Duration::from_secs(50) < left);
        let over = Bypass {
            until_boot_ms: 1,
            ..bypass()
        };
        assert_eq!(over.left(), None);
        let of_another_boot = Bypass {
            boot_id: "another".to_owned(),
            ..bypass()
        };
        assert_eq!(of_another_boot.left(), None);
        let forged = Bypass {
            until_boot_ms: u64::MAX,
            ..bypass()
        };
        assert_eq!(forged.left(), Some(LONGEST));
    }

    #[test]
    fn what_can_not_be_granted_is_refused() {
        assert!(opened(LONGEST + Duration::from_secs(1), String::new()).is_err());
        assert!(opened(LONGEST, "x".repeat(WHY_MAX + 1)).is_err());
        assert!(opened(LONGEST, "two\nlines".to_owned()).is_err());
    }

    #[test]
    fn a_file_that_can_not_be_read_opens_nothing() {
        let scratch = crate::state::tests::Scratch::new();
        let file = scratch.0.bypass_file();
        assert_eq!(read(&file).unwrap(), None);
        std::fs::write(&file, "{}").unwrap();
        assert!(read(&file).is_err());
        let written = bypass();
        std::fs::write(&file, serde_json::to_vec(&written).unwrap()).unwrap();
        assert_eq!(read(&file).unwrap(), Some(written));
    }
}
