//! The whole mesh on hosts that are network namespaces: real binaries, real servers and clients. Needs root.
//! A refused case is proven by its reason code and counter, never by mere failure.

#[path = "namespaces/harness.rs"]
mod harness;
