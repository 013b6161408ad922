//! The whole mesh on hosts that are network namespaces: real binaries, real servers and clients. Needs root.
//! A refused case is proven by its reason code and counter, never by mere failure.

#![expect(clippy::unwrap_used, reason = "a test helper may panic")]

#[path = "namespaces/harness.rs"]
mod harness;
