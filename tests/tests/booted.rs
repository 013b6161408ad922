//! Hosts that boot with systemd, installed from our packages by dpkg and by rpm. Needs root.

#[path = "booted/control.rs"]
mod control;
#[path = "booted/crash.rs"]
mod crash;
#[path = "booted/discover.rs"]
mod discover;
#[path = "booted/early.rs"]
mod early;
#[path = "booted/health.rs"]
mod health;
#[path = "booted/join.rs"]
mod join;
#[path = "booted/life.rs"]
mod life;
#[path = "booted/names.rs"]
mod names;
#[path = "booted/networkd.rs"]
mod networkd;
#[path = "booted/security.rs"]
mod security;
#[path = "booted/upgrade.rs"]
mod upgrade;
