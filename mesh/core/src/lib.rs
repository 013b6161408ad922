//! What Meshwork is about, as values and decisions: names, identities, services, policy, balancing and the
//! state machines. Nothing here does I/O, reads a clock or knows an async runtime; whoever calls passes `now`
//! and a seed, so that every decision can be replayed.

pub mod balance;
pub mod edge;
pub mod expiry;
pub mod health;
pub mod http1;
pub mod identity;
pub mod lease;
pub mod names;
pub mod policy;
pub mod reason;
pub mod renewal;
pub mod revocation;
pub mod rng;
pub mod rotation;
pub mod service;
pub mod session;
pub mod stream;
pub mod vip;
