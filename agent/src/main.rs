//! Placeholder.
mod capture;
mod whose;
mod view;
mod relay;
mod peers;
mod outbound;
mod metrics;
mod inbound;
mod http;
mod data;
mod call;
mod dns;
mod health;
mod workloads;
mod holder;
fn main() {}
