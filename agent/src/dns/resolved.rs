//! systemd-resolved: the mesh's suffix as a routing domain of our link, through `resolvectl`, which comes with it.
//!
//! It asks at a link for the names under that link's domains only, when the link is not to be asked for the others, as
//! ours is not. What is set this way it keeps until the link goes or somebody reverts it.

use std::collections::BTreeSet;
use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use super::command::{self, run};
use super::wiring::{accepts, link_carries, link_stands};

/// Where it answers programs.
pub(super) const STUB: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 53);
const RUNTIME: &str = "/run/systemd/resolve";

#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error(
        "systemd-resolved does not answer at 127.0.0.53; start it (`systemctl enable --now systemd-resolved`), leave \
         DNSStubListener= of resolved.conf on, or set another `dns.wiring`"
    )]
    Silent,
    #[error(
        "the link {link} has no carrier, and systemd-resolved asks at none without; a link without ports loses it when \
         another program sets its address: keep {link} from udev and network managers, then \
         `systemctl stop mesh-agent mesh-guard && systemctl start mesh-agent` makes it anew"
    )]
    NoCarrier { link: String },
    #[error(transparent)]
    Command(#[from] command::Error),
}

/// What it is to know of our link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Wish {
    pub(crate) link: String,
    pub(crate) server: SocketAddr,
    /// Names under these go to the server, and no others.
    pub(crate) domains: Vec<String>,
}

/// The link, and what it leaves in files when it starts, or when somebody sets anything of a link. A change of it asks for a closer look.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Trace(Vec<Option<(u64, i64, i64)>>);

impl Trace {
    pub(crate) fn of(link: &str) -> Self {
        let index = fs::read_to_string(Path::new("/sys/class/net").join(link).join("ifindex"));
        let index = index.unwrap_or_default().trim().to_owned();
        let files = [format!("netif/{index}"), "io.systemd.Resolve".to_owned()];
        let seen = files.map(|file| {
            let metadata = fs::metadata(Path::new(RUNTIME).join(file)).ok()?;
            Some((metadata.ino(), metadata.mtime(), metadata.mtime_nsec()))
        });
        let seen = seen.into_iter();
        // Another link of the same name, or one that lost its carrier.
        let carries = i64::from(link_carries(link));
        let link = index.parse().ok().map(|index: u64| (index, carries, 0));
        Self(seen.chain([link]).collect())
    }
}

/// Whether it answers programs, in our own network namespace: another one's would take our link's number for another link.
pub(super) fn answers() -> bool {
    Path::new(RUNTIME).is_dir() && accepts(STUB)
}

/// Makes it know what it does not. True if anything was set.
pub(crate) fn wire(wish: &Wish) -> Result<bool, Error> {
    if !answers() {
        return Err(Error::Silent);
    }
    let link = wish.link.as_str();
    if link_stands(link) && !link_carries(link) {
        return Err(Error::NoCarrier {
            link: link.to_owned(),
        });
    }
    if is_wired(wish)? {
        return Ok(false);
    }
    // The server last: without one nothing is asked there, whatever else is half set.
    run("resolvectl", &["default-route", link, "no"])?;
    for protocol in ["llmnr", "mdns", "dnssec", "dnsovertls"] {
        run("resolvectl", &[protocol, link, "no"])?;
    }
    let domains = wish.routing();
    let mut words = vec!["domain", link];
    words.extend(domains.iter().map(String::as_str));
    run("resolvectl", &words)?;
    run("resolvectl", &["dns", link, &wish.server.to_string()])?;
    Ok(true)
}

/// Whether it knows server and domains of our link.
pub(crate) fn is_wired(wish: &Wish) -> Result<bool, Error> {
    let link = wish.link.as_str();
    let servers = values(&run("resolvectl", &["dns", link])?);
    let server = [wish.server.to_string(), wish.server.ip().to_string()];
    // Port 53 is not shown.
    let shown = server
        .into_iter()
        .take(if wish.server.port() == 53 { 2 } else { 1 });
    if servers.len() != 1 || !shown.into_iter().any(|s| servers.contains(&s)) {
        return Ok(false);
    }
    Ok(values(&run("resolvectl", &["domain", link])?) == wish.routing())
}

/// Makes it forget what it knows of our link. True if there was anything.
pub(crate) fn unwire(link: &str) -> Result<bool, Error> {
    if !link_stands(link) || !answers() || values(&run("resolvectl", &["dns", link])?).is_empty() {
        return Ok(false);
    }
    run("resolvectl", &["revert", link])?;
    Ok(true)
}

impl Wish {
    /// As `resolvectl` writes domains by which questions are routed, and which nothing is searched in.
    fn routing(&self) -> BTreeSet<String> {
        self.domains.iter().map(|d| format!("~{d}")).collect()
    }
}

/// What `resolvectl dns LINK` or `domain LINK` shows: `Link 5 (mesh0): 252.64.0.1:7453`.
fn values(shown: &str) -> BTreeSet<String> {
    let (_, values) = shown.split_once("): ").unwrap_or_default();
    values.split_whitespace().map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_resolvectl_shows_is_read() {
        assert!(values("Link 5 (mesh0):\n").is_empty());
        assert!(values("").is_empty());
        let one = values("Link 5 (mesh0): 252.64.0.1:7453\n");
        assert_eq!(one, ["252.64.0.1:7453".to_owned()].into());
        let wish = Wish {
            link: "mesh0".to_owned(),
            server: "252.64.0.1:7453".parse().unwrap(),
            domains: vec!["mesh.internal".to_owned(), "64.252.in-addr.arpa".to_owned()],
        };
        let shown = "Link 5 (mesh0): ~mesh.internal ~64.252.in-addr.arpa\n";
        assert_eq!(values(shown), wish.routing());
    }
}
