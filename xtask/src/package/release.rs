//! Release binaries that run wherever there is glibc 2.28: linked by zig, which knows the symbols of that version.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context as _;

use super::{PACKAGES, output, selection};
use crate::{child, root};

/// Of RHEL 8 and Debian 10: the oldest that we run on.
const GLIBC: (u32, u32) = (2, 28);
const ZIGBUILD: &str = "cargo-zigbuild==0.24.0";
const ZIG: &str = "ziglang==0.17.1";

/// Builds all programs; returns where they are.
pub(super) fn build() -> anyhow::Result<PathBuf> {
    let tools = zig()?;
    let arch = std::env::consts::ARCH;
    let triple = format!("{arch}-unknown-linux-gnu");
    child::say("building the release: with all optimisations that takes many minutes");
    let mut words = vec![
        "zigbuild".to_owned(),
        "--release".to_owned(),
        "--locked".to_owned(),
    ];
    words.extend([
        "--target".to_owned(),
        format!("{triple}.{}.{}", GLIBC.0, GLIBC.1),
    ]);
    words.extend(selection().map(str::to_owned));
    let mut cargo = Command::new(tools.join("bin/cargo-zigbuild"));
    cargo
        .args(words)
        .current_dir(root())
        .env("CARGO_TARGET_DIR", child::target_dir())
        .env("CARGO_ZIGBUILD_ZIG_PATH", tools.join("ziglang/zig"))
        // Each triple of glibc's version has one of its own, so what it compiled is found again.
        .env("ZIG_GLOBAL_CACHE_DIR", tools.join("cache"));
    child::run(&mut cargo)?;
    let built = child::target_dir().join(triple).join("release");
    for (_, program, _) in PACKAGES {
        check_symbols(&built.join(program))?;
    }
    Ok(built)
}

/// Both come from PyPI, whose wheels carry the programs.
fn zig() -> anyhow::Result<PathBuf> {
    let dir = child::target_dir().join("tools/zig");
    if !dir.join("bin/cargo-zigbuild").exists() || !dir.join("ziglang/zig").exists() {
        child::say(&format!(
            "installing {ZIGBUILD} and {ZIG} in {}",
            dir.display()
        ));
        let mut pip = Command::new("/usr/bin/python3");
        pip.args([
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--upgrade",
            "--target",
        ])
        .args([dir.as_os_str(), ZIGBUILD.as_ref(), ZIG.as_ref()])
        .stdout(std::io::stderr());
        child::run(&mut pip)?;
    }
    Ok(dir)
}

/// Refuses a program that a host with the promised libc could not start.
fn check_symbols(program: &Path) -> anyhow::Result<()> {
    let table = output(Command::new("objdump").arg("-T").arg(program))?;
    let newest = newest_glibc(&table)
        .with_context(|| format!("no symbol of glibc in {}", program.display()))?;
    anyhow::ensure!(
        newest <= GLIBC,
        "{} needs glibc {}.{}, and we promise {}.{}",
        program.display(),
        newest.0,
        newest.1,
        GLIBC.0,
        GLIBC.1
    );
    child::say(&format!(
        "{} needs glibc {}.{} or newer",
        program.display(),
        newest.0,
        newest.1
    ));
    Ok(())
}

/// `… GLIBC_2.28  fcntl64`
fn newest_glibc(table: &str) -> Option<(u32, u32)> {
    let versions = table.split("GLIBC_").skip(1).filter_map(|rest| {
        let word: String = rest
            .chars()
            .take_while(|c| c.is_ascii_digit() || *c == '.')
            .collect();
        let mut numbers = word.split('.').map(str::parse);
        Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
    });
    versions.max()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_symbol_decides() {
        let table = "0000 DF *UND* 0000 (GLIBC_2.2.5) read\n0000 DF *UND* 0000 (GLIBC_2.28) fcntl64\n\
                     0000 DF *UND* 0000 (GLIBC_2.4) x\n0000 DF *UND* 0000 (GLIBC_PRIVATE) y\n";
        assert_eq!(newest_glibc(table), Some((2, 28)));
        assert_eq!(newest_glibc("0000 g DF .text 0001 main"), None);
    }
}
