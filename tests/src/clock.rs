//! A wall clock of one host's programs that is off, by libfaketime. Nothing else of the host is, and time that only passes
//! is right.

use std::fs;
use std::path::PathBuf;

use crate::host::Host;
use crate::process::Cmd;

/// The command sees the clock of [`step`] from its start on, as do its children.
pub(crate) fn off(command: Cmd, host: &Host) -> Cmd {
    command
        .env("LD_PRELOAD", &library())
        .env("FAKETIME_TIMESTAMP_FILE", &file(host).to_string_lossy())
        .env("FAKETIME_NO_CACHE", "1")
        .env("FAKETIME_DONT_FAKE_MONOTONIC", "1")
        .env("DONT_FAKE_MONOTONIC", "1")
}

/// From now on the wall clock of such a command is so many seconds off.
#[track_caller]
pub(crate) fn step(host: &Host, seconds: i64) {
    let new = file(host).with_extension("new");
    fs::write(&new, format!("{seconds:+}s\n")).expect("a clock");
    fs::rename(new, file(host)).expect("a clock");
}

fn file(host: &Host) -> PathBuf {
    host.dir().join("clock")
}

/// The library of Debian's `faketime`. Its program would stand between us and the command.
fn library() -> String {
    let places = fs::read_dir("/usr/lib").expect("/usr/lib");
    let mut files = places
        .filter_map(Result::ok)
        .map(|place| place.path().join("faketime/libfaketimeMT.so.1"));
    let file = files.find(|path| path.exists());
    let file = file.expect("libfaketime; `cargo xtask test` installs it");
    file.display().to_string()
}
