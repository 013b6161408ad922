//! Newer packages of the agent, made of the one that was built.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::machine::Machine;

/// Where a host finds it: what is left there is of no consequence.
const PLACE: &str = "var/tmp";

/// The version that was built.
pub const BUILT: &str = env!("CARGO_PKG_VERSION");

/// A package of the agent that is newer than the one that was built. Its program calls itself by that version, and can be
/// made to differ in more.
#[derive(Clone, Debug)]
pub struct Newer {
    pub version: String,
    file: PathBuf,
}

impl Newer {
    /// The version after `last`; each of `words` stands in its program for the one beside it.
    ///
    /// The words of a program are of fixed length: new ones are as long as those that they replace.
    #[track_caller]
    pub fn after(last: &str, words: &[(&str, &str)], dir: &Path) -> Self {
        let version = successor(last);
        let built = crate::root().join("target/package");
        let built = only(&built, "meshwork-agent_", ".deb");
        let tree = dir.join(format!("package-{version}"));
        run(Command::new("dpkg-deb")
            .arg("--raw-extract")
            .args([&built, &tree]));
        let program = tree.join("usr/bin/mesh-agent");
        let mut bytes = fs::read(&program).expect("its program");
        for (old, new) in words.iter().chain(&[(BUILT, version.as_str())]) {
            replace(&mut bytes, old, new);
        }
        fs::write(&program, bytes).expect("its program");
        let control = tree.join("DEBIAN/control");
        let text = fs::read_to_string(&control).expect("its control file");
        let of = |version: &str| format!("Version: {version}-1\n");
        assert!(text.contains(&of(BUILT)), "{text}");
        fs::write(&control, text.replace(&of(BUILT), &of(&version))).expect("its control file");
        // Of the program that it had.
        drop(fs::remove_file(tree.join("DEBIAN/md5sums")));
        let name = built.file_name().expect("a name").to_string_lossy();
        let file = dir.join(name.replace(BUILT, &version));
        run(Command::new("dpkg-deb")
            .args(["--root-owner-group", "-Zgzip", "-z1", "--build"])
            .args([&tree, &file]));
        fs::remove_dir_all(&tree).expect("a directory of ours");
        Self { version, file }
    }

    /// Brings it to a host; returns the command line that installs it there.
    #[track_caller]
    pub fn bring(&self, machine: &Machine) -> String {
        let name = self.file.file_name().expect("a name").to_string_lossy();
        let to = machine.path(PLACE).join(&*name);
        fs::copy(&self.file, to).expect("a file of the machine");
        format!("apt-get install -y -q /{PLACE}/{name}")
    }
}

/// The next version, of as many letters.
fn successor(version: &str) -> String {
    let mut next: Vec<u8> = version.into();
    for digit in next.iter_mut().rev().filter(|byte| byte.is_ascii_digit()) {
        if *digit < b'9' {
            *digit += 1;
            break;
        }
        *digit = b'0';
    }
    let next = String::from_utf8(next).expect("digits and dots");
    assert!(
        version < next.as_str(),
        "there is no version after {version}"
    );
    next
}

#[track_caller]
fn replace(bytes: &mut [u8], old: &str, new: &str) {
    assert_eq!(old.len(), new.len(), "`{old}` and `{new}`");
    let mut replaced = 0;
    let mut at = 0;
    while let Some(found) = bytes[at..]
        .windows(old.len())
        .position(|w| w == old.as_bytes())
    {
        at += found;
        bytes[at..at + new.len()].copy_from_slice(new.as_bytes());
        at += new.len();
        replaced += 1;
    }
    assert!(0 < replaced, "the program has no `{old}`");
}

/// The only file of that name in a directory.
#[track_caller]
fn only(dir: &Path, begin: &str, end: &str) -> PathBuf {
    let entries = fs::read_dir(dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
    let found = entries.flatten().map(|entry| entry.path()).filter(|path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        name.starts_with(begin) && name.ends_with(end)
    });
    let found: Vec<PathBuf> = found.collect();
    let [one] = &found[..] else {
        panic!("one {begin}*{end} in {}, not {found:?}", dir.display());
    };
    one.clone()
}

#[track_caller]
fn run(command: &mut Command) {
    let output = command.output().expect("dpkg-deb");
    assert!(output.status.success(), "{command:?}: {output:?}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_next_version_has_as_many_letters() {
        for (version, next) in [("0.1.0", "0.1.1"), ("0.1.9", "0.2.0"), ("0.9.9", "1.0.0")] {
            assert_eq!(successor(version), next);
        }
    }
}
