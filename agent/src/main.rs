//! Placeholder.
mod capture;
mod dns;
mod health;
mod workloads;
mod holder;
fn main() {}
