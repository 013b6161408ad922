//! Placeholder.
mod capture;
mod holder;
fn main() {}
