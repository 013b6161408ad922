//! The root that every host of the booted tier begins with: Debian, unpacked once below the target directory.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::Context as _;

use crate::{child, root};

/// The oldest Debian with all that the agent needs.
const SUITE: &str = "bookworm";
/// Beside what Debian can not be without. `rpm` since one of the hosts is installed by it; `systemd-resolved` and `dnsmasq`
/// for the hosts that turn them on; from `wrk` on what an upgrade may not cut.
const PACKAGES: &str = "systemd-sysv,dbus,nftables,iproute2,procps,curl,nginx-light,rpm,systemd-resolved,dnsmasq,\
     wrk,postgresql,python3-grpcio,python3-websockets";
/// What would work at times of its own, or stand in a test's way.
const DISABLED: &[&str] = &[
    "apt-daily.timer",
    "apt-daily-upgrade.timer",
    "dnsmasq.service",
    "dpkg-db-backup.timer",
    "e2scrub_all.timer",
    "e2scrub_reap.service",
    "fstrim.timer",
    "nginx.service",
    "systemd-resolved.service",
    "postgresql.service",
];
/// The package of systemd-resolved makes it a link to a file of its own.
const RESOLV_CONF: &str = "etc/resolv.conf";

/// Makes it unless it is there.
pub(crate) fn make() -> anyhow::Result<()> {
    let dir: PathBuf = root().join("target/booted/base");
    // It says what it was made of, and is written last.
    let whole = dir.join("whole");
    let of = format!("{SUITE} {PACKAGES} {}\n", DISABLED.join(" "));
    if fs::read_to_string(&whole).is_ok_and(|text| text == of) {
        return Ok(());
    }
    if dir.exists() {
        fs::remove_dir_all(&dir).with_context(|| format!("removing {}", dir.display()))?;
    }
    fs::create_dir_all(&dir).with_context(|| format!("making {}", dir.display()))?;
    child::say("unpacking a Debian for hosts that boot: once, some minutes");
    let system = dir.join("root");
    let mut debootstrap = Command::new("debootstrap");
    debootstrap
        .args(["--variant=minbase", &format!("--include={PACKAGES}"), SUITE])
        .arg(&system)
        .stdout(std::io::stderr());
    child::run(&mut debootstrap)?;
    child::run(
        Command::new("systemctl")
            .arg("--quiet")
            .arg("--root")
            .arg(&system)
            .arg("disable")
            .args(DISABLED),
    )?;
    let resolv_conf = system.join(RESOLV_CONF);
    fs::remove_file(&resolv_conf).with_context(|| format!("removing {}", resolv_conf.display()))?;
    fs::write(&resolv_conf, "").with_context(|| format!("writing {}", resolv_conf.display()))?;
    for dir in ["var/cache/apt/archives", "var/lib/apt/lists"] {
        let path = system.join(dir);
        fs::remove_dir_all(&path).with_context(|| format!("removing {}", path.display()))?;
        fs::create_dir(&path).with_context(|| format!("making {}", path.display()))?;
    }
    fs::write(&whole, of).with_context(|| format!("writing {}", whole.display()))
}
