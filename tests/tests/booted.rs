//! Hosts that boot with systemd, installed from our packages by dpkg and by rpm. Needs root.

#[path = "booted/crash.rs"]
mod crash;
#[path = "booted/join.rs"]
mod join;
#[path = "booted/life.rs"]
mod life;
#[path = "booted/mesh.rs"]
mod mesh;
