//! Programs in Go: the module `tests/go`, built once a run into `target/mesh-tests-go`.
//!
//! Its `go.mod` asks for no more than Debian's Go, so no toolchain is downloaded; what it depends on comes through
//! the module proxy at the first build, each module checked against `go.sum`.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// Where a Go may be that is not in a user's PATH.
const PLACES: &[&str] = &["/usr/local/go/bin", "/usr/bin"];

/// `grpc`, `torture` or `web` of `tests/go`.
#[track_caller]
pub fn program(name: &str) -> PathBuf {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(build).join(name)
}

#[track_caller]
fn build() -> PathBuf {
    let out = crate::root().join("target/mesh-tests-go");
    let places = PLACES.iter().map(|dir| Path::new(dir).join("go"));
    let go = places.into_iter().find(|path| path.exists());
    let output = Command::new(go.unwrap_or_else(|| "go".into()))
        .args(["build", "-trimpath", "-buildvcs=false", "-o"])
        // With the separator at its end it is a directory, made if it is not there.
        .arg(format!("{}/", out.display()))
        .arg("./...")
        .current_dir(crate::root().join("tests/go"))
        .output()
        .expect("Go (Debian's golang-go, which `cargo xtask test` installs)");
    assert!(
        output.status.success(),
        "building tests/go failed; it needs Go 1.19 and the module proxy:\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
    out
}
