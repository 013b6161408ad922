//! Placeholder.
mod capture;
mod dns;
mod holder;
fn main() {}
