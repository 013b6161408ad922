//! `cargo xtask package`: the packages of the agent, of control and of the operator's command line, as deb and rpm,
//! with what belongs to them: manual pages, completions, licences, debug information beside, checksums, the installer.

mod licences;
mod lint;
mod release;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context as _;

use crate::child::{self, Profile};
use crate::{apt, root};

/// A folder of the workspace, its program, and the name of its package.
const PACKAGES: [(&str, &str, &str); 3] = [
    ("agent", "mesh-agent", "meshwork-agent"),
    ("control", "mesh-control", "meshwork-control"),
    ("cli", "meshctl", "meshwork-cli"),
];

/// What makes the packages, in one version each.
const CARGO_DEB: (&str, &str) = ("cargo-deb", "3.8.0");
const CARGO_RPM: (&str, &str) = ("cargo-generate-rpm", "0.21.1");

/// Where the packages are.
pub(crate) fn dir() -> PathBuf {
    // Not the target directory that may be set: the manifests name files in it.
    root().join("target/package")
}

/// Makes the packages. `quick`: of what the tests build, for this machine's libc.
pub(crate) fn run(quick: bool) -> anyhow::Result<()> {
    apt::install(apt::PACKAGE)?;
    let cargo_deb = tool(CARGO_DEB)?;
    let cargo_rpm = tool(CARGO_RPM)?;
    let built = match quick {
        true => {
            // All of it, as the tests do: of fewer packages cargo would build the libraries with other features, anew.
            child::build(Profile::Dev)?;
            child::bin_dir(Profile::Dev)
        }
        false => release::build()?,
    };
    let dir = dir();
    // Nothing of an earlier run may be taken for this one's.
    if dir.exists() {
        fs::remove_dir_all(&dir).with_context(|| format!("removing {}", dir.display()))?;
    }
    let time = commit_time()?;
    for (folder, program, package) in PACKAGES {
        let stage = dir.join("stage").join(program);
        make_dir(&stage)?;
        split(
            &built.join(program),
            &stage.join(program),
            &dir.join("debug"),
        )?;
        child::run(Command::new(stage.join(program)).arg("manual").arg(&stage))?;
        write(&stage.join("licences"), &licences::all(program)?)?;
        for page in pages(&stage.join("man"))? {
            gzip(&page)?;
        }
        gzip(&stage.join("licences"))?;
        write(&stage.join("changelog"), &changelog(package, &time)?)?;

        let mut deb = Command::new(&cargo_deb);
        deb.args([
            "--no-build",
            "--no-strip",
            "--locked",
            "--quiet",
            "--package",
            program,
            "--output",
        ]);
        make(deb.arg(&dir), &time)?;
        let mut rpm = Command::new(&cargo_rpm);
        rpm.args(["--auto-req", "builtin", "--package", folder, "--output"]);
        make(rpm.arg(&dir), &time)?;
    }
    let installer = "packaging/install.sh";
    fs::copy(root().join(installer), dir.join("install.sh")).context(installer)?;
    lint::all(&packages()?)?;
    checksums()?;
    show()
}

/// The programs, as cargo is told.
fn selection() -> impl Iterator<Item = &'static str> {
    PACKAGES
        .iter()
        .flat_map(|(_, program, _)| ["--package", *program])
}

/// A subcommand of cargo, below the target directory; installed there at first use.
fn tool((name, version): (&str, &str)) -> anyhow::Result<PathBuf> {
    let home = child::target_dir()
        .join("tools")
        .join(format!("{name}-{version}"));
    let program = home.join("bin").join(name);
    if !program.exists() {
        child::say(&format!(
            "installing {name} {version} in {}",
            home.display()
        ));
        let mut install = child::cargo(&[
            "install",
            "--quiet",
            "--locked",
            name,
            "--version",
            version,
            "--root",
        ]);
        install
            .arg(&home)
            .env("CARGO_TARGET_DIR", child::target_dir().join("tools/build"))
            // It runs for seconds: a build that takes minutes is no gain.
            .env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "1")
            .env("CARGO_PROFILE_RELEASE_LTO", "off")
            .env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "16");
        child::run(&mut install)?;
    }
    Ok(program)
}

/// Puts a program without its debug information to `to`, and that into `debug`.
fn split(from: &Path, to: &Path, debug: &Path) -> anyhow::Result<()> {
    make_dir(debug)?;
    let name = from.file_name().context("a program has a name")?;
    let apart = debug.join(name).with_extension("debug");
    let objcopy = || Command::new("objcopy");
    child::run(objcopy().arg("--only-keep-debug").args([from, &apart]))?;
    let link = format!("--add-gnu-debuglink={}", apart.display());
    child::run(objcopy().args(["--strip-all", &link]).args([from, to]))
}

fn pages(dir: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let entries = fs::read_dir(dir).with_context(|| format!("reading {}", dir.display()))?;
    entries.map(|entry| Ok(entry?.path())).collect()
}

fn gzip(file: &Path) -> anyhow::Result<()> {
    // Without name and time, so that the same source gives the same package.
    child::run(
        Command::new("gzip")
            .args(["-9", "--no-name", "--force"])
            .arg(file),
    )
}

/// In Debian's form; what changed is told by CHANGELOG.md of the source.
fn changelog(package: &str, time: &str) -> anyhow::Result<String> {
    let version = env!("CARGO_PKG_VERSION");
    let date =
        output(Command::new("date").args(["--utc", "--rfc-email", "--date", &format!("@{time}")]))?;
    Ok(format!(
        "{package} ({version}-1) unstable; urgency=medium\n\n  * Version {version}; CHANGELOG.md of the source tells \
         what it does.\n\n -- Meshwork developers <developers@meshwork.invalid>  {date}\n"
    ))
}

/// When the commit was made that is packaged, in seconds.
fn commit_time() -> anyhow::Result<String> {
    output(
        Command::new("git")
            .args(["log", "-1", "--format=%ct"])
            .current_dir(root()),
    )
}

fn make(command: &mut Command, time: &str) -> anyhow::Result<()> {
    command
        .current_dir(root())
        .env("SOURCE_DATE_EPOCH", time)
        // Results are ours to tell.
        .stdout(std::io::stderr());
    child::run(command)
}

/// All that were made, by name.
fn packages() -> anyhow::Result<Vec<PathBuf>> {
    let mut found = pages(&dir())?;
    found.retain(|path| {
        path.extension()
            .is_some_and(|end| end == "deb" || end == "rpm")
    });
    found.sort();
    anyhow::ensure!(
        found.len() == 2 * PACKAGES.len(),
        "these were made: {found:?}"
    );
    Ok(found)
}

/// What the installer compares.
fn checksums() -> anyhow::Result<()> {
    let mut sum = Command::new("sha256sum");
    for package in packages()? {
        sum.arg(package.file_name().unwrap_or_default());
    }
    let sums = output(sum.current_dir(dir()))?;
    write(&dir().join("SHA256SUMS"), &(sums + "\n"))
}

/// Says what there is, and how large.
fn show() -> anyhow::Result<()> {
    let mut lines = String::new();
    let mut row = |path: &Path| -> anyhow::Result<()> {
        let name = path
            .strip_prefix(dir())
            .unwrap_or(path)
            .display()
            .to_string();
        let mib = fs::metadata(path)?.len() as f64 / f64::from(1 << 20);
        lines += &format!("{name:<44} {mib:>7.1} MiB\n");
        Ok(())
    };
    for package in packages()? {
        row(&package)?;
    }
    for (_, program, _) in PACKAGES {
        row(&dir().join("stage").join(program).join(program))?;
        row(&dir().join("debug").join(program).with_extension("debug"))?;
    }
    lines += &format!(
        "in {}; install.sh and SHA256SUMS beside them\n",
        dir().display()
    );
    child::print(&lines);
    Ok(())
}

fn make_dir(dir: &Path) -> anyhow::Result<()> {
    fs::create_dir_all(dir).with_context(|| format!("making {}", dir.display()))
}

fn write(path: &Path, text: &str) -> anyhow::Result<()> {
    fs::write(path, text).with_context(|| format!("writing {}", path.display()))
}

/// What a short command says, without its last newline.
fn output(command: &mut Command) -> anyhow::Result<String> {
    let mut lines = Vec::new();
    child::run_lines(command, |line| lines.push(line.to_owned()))?;
    Ok(lines.join("\n"))
}
