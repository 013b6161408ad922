//! The harness of the tiers above unit tests: sites of network namespaces in which the real binaries, real
//! servers and real clients run. It needs root and Linux, and says so instead of skipping.
//!
//! A [`site::Site`] owns everything it made; dropping it kills, unmounts and removes all of it. Helpers panic
//! with what they saw, since a test can do nothing better.

pub mod agent;
pub mod app;
pub mod attack;
pub mod bench;
pub mod booted;
pub mod cgroup;
mod clock;
pub mod container;
pub mod control;
pub mod demo;
pub mod facts;
pub mod fuzz;
pub mod host;
pub mod load;
pub mod machine;
pub mod manager;
pub mod mesh;
pub mod metrics;
pub mod process;
pub mod raw;
pub mod servers;
pub mod site;
pub mod sweep;
pub mod wait;

use std::path::{Path, PathBuf};

/// The directory of the checkout.
pub fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_owned()
}

/// One of our binaries, as `cargo xtask` built it.
pub fn binary(name: &str) -> PathBuf {
    let dir = std::env::var_os("MESH_BIN_DIR").map(PathBuf::from);
    let path = dir
        .unwrap_or_else(|| root().join("target/debug"))
        .join(name);
    assert!(
        path.exists(),
        "{} is not built; run `cargo xtask test`, or `cargo build --workspace` before `cargo test`",
        path.display()
    );
    path
}
