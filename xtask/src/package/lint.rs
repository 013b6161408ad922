//! What the distributions' own checks say of the packages. A finding is mended, or overridden with its reason:
//! `packaging/*/lintian-overrides` and `packaging/rpmlint.toml`.

use std::path::PathBuf;
use std::process::Command;

use crate::{child, root};

pub(super) fn all(packages: &[PathBuf]) -> anyhow::Result<()> {
    let (debs, rpms): (Vec<_>, Vec<_>) = packages
        .iter()
        .partition(|path| path.extension().is_some_and(|e| e == "deb"));
    let mut lintian = Command::new("lintian");
    lintian
        .args(["--fail-on", "error,warning", "--allow-root"])
        .args(debs);
    child::run(lintian.stdout(std::io::stderr()))?;
    let mut rpmlint = Command::new("rpmlint");
    rpmlint
        .args(["--strict", "--config"])
        .arg(root().join("packaging/rpmlint.toml"))
        .args(rpms);
    child::run(rpmlint.stdout(std::io::stderr()))
}
