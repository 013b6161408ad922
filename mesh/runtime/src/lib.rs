//! What every daemon of the mesh needs: TLS with SPIFFE identities, the stream layer over a socket, log,
//! configuration, files, the admin socket and an orderly end.

pub mod admin;
mod buffers;
pub mod clock;
pub mod config;
pub mod files;
pub mod log;
pub mod mux;
pub mod signals;
pub mod tls;
