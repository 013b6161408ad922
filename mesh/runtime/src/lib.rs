//! What every daemon of the mesh needs: TLS with SPIFFE identities, the stream layer over a socket, log,
//! configuration, files, the admin socket, the service manager and an orderly end.

pub mod admin;
mod buffers;
pub mod clock;
pub mod config;
pub mod files;
pub mod log;
pub mod manual;
pub mod mux;
pub mod notify;
pub mod signals;
pub mod tls;

/// The version of the program: all of the workspace have one. What a program says of itself in several places it has from
/// here, where the tests that make newer packages find it.
#[inline(never)]
pub fn version() -> &'static str {
    env!("CARGO_PKG_VERSION")
}
