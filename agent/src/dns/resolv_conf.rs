//! resolv.conf: which servers stood there, and our own line in front of them.
//!
//! Our part is the first two lines of the file, a marked comment and a `nameserver` line. Everything behind
//! them stays as it was, byte for byte, so that taking them away restores the file; a resolver tries the
//! servers that stood there when the agent is dead. The file is written in place, since in containers and
//! network namespaces it is a bind mount, which can not be replaced by renaming.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV6};
use std::path::{Path, PathBuf};

use nix::net::if_::if_nametoindex;

/// Servers that glibc and musl use; lines behind them are ignored (resolv.conf(5), MAXNS).
pub(crate) const SERVERS_MAX: usize = 3;
/// Larger files are not resolv.conf, in bytes.
const FILE_MAX: u64 = 64 * 1024;
const PORT: u16 = 53;
/// Begins our comment. Never change it: it is how lines of earlier versions are found.
const MARK: &str = "# meshwork:";
const COMMENT: &str =
    "# meshwork: mesh-agent wrote this line and the next, and takes them away when it stops";
/// In place of [`COMMENT`] where there was no file.
const COMMENT_NEW: &str =
    "# meshwork: mesh-agent made this file, and takes it away when it stops (no file before)";
/// Where systemd-resolved keeps its files, and the one that comes with it.
const RESOLVED: [&str; 2] = ["systemd/resolve/", "lib/systemd/resolv.conf"];

#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error(
        "{} is systemd-resolved's ({}) and is not changed; when that runs, restart the agent, or set \
         `dns.wiring = \"resolved\"`; else write a file of the site's there",
        path.display(),
        target.display()
    )]
    Resolved { path: PathBuf, target: PathBuf },
    #[error("{} has {size} bytes, which no resolv.conf has; look what it is", path.display())]
    TooLarge { path: PathBuf, size: u64 },
    #[error("can not {verb} {}: {cause}; is it on a read-only file system, or owned by another?", path.display())]
    Io {
        verb: &'static str,
        path: PathBuf,
        cause: io::Error,
    },
}

/// What [`wire`] found and did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Wired {
    /// Whether the file was changed; false when our lines stood there already.
    pub(crate) changed: bool,
    /// Servers that resolvers do not reach by themselves any more, since ours took a place.
    pub(crate) displaced: usize,
}

/// Puts `address` in front of the servers of the file at `path`. May be repeated at any time: lines of ours
/// that another program removed come back, an older address of ours is replaced.
pub(crate) fn wire(path: &Path, address: IpAddr) -> Result<Wired, Error> {
    refuse_resolved(path)?;
    let old = read(path)?;
    let comment = match &old {
        Some(old) if !made_by_us(old) => COMMENT,
        _ => COMMENT_NEW,
    };
    let rest = old.as_deref().map_or("", without_ours);
    let new = format!("{comment}\nnameserver {address}\n{rest}");
    let changed = old.as_deref() != Some(new.as_str());
    if changed {
        write(path, &new)?;
    }
    let others = servers(rest).into_iter().filter(|s| s.ip() != address);
    Ok(Wired {
        displaced: others.count().saturating_sub(SERVERS_MAX - 1),
        changed,
    })
}

/// Takes our lines away. True if there were any; the file goes if we made it and nobody wrote to it since.
pub(crate) fn unwire(path: &Path) -> Result<bool, Error> {
    let Some(old) = read(path)? else {
        return Ok(false);
    };
    let rest = without_ours(&old);
    if rest.len() == old.len() {
        return Ok(false);
    }
    if made_by_us(&old) && rest.is_empty() {
        // A bind mount can not be removed: leave it empty then.
        if fs::remove_file(path).is_ok() {
            return Ok(true);
        }
    }
    write(path, rest)?;
    Ok(true)
}

/// Whether our lines stand in the file, with this address.
pub(crate) fn is_wired(path: &Path, address: IpAddr) -> Result<bool, Error> {
    let text = read(path)?.unwrap_or_default();
    let ours = &text[..text.len() - without_ours(&text).len()];
    Ok(ours.ends_with(&format!("\nnameserver {address}\n")))
}

/// The servers of the file at `path` without ours. Without a file a resolver asks this host.
pub(crate) fn upstreams(path: &Path) -> Result<Vec<SocketAddr>, Error> {
    let text = read(path)?.unwrap_or_default();
    Ok(servers(without_ours(&text)))
}

/// The first of them, if the file names any.
pub(crate) fn first_server(path: &Path) -> Option<IpAddr> {
    let text = read(path).ok()??;
    named(without_ours(&text)).first().map(SocketAddr::ip)
}

/// The servers of a resolv.conf, as a resolver reads them; without any line it asks this host (resolv.conf(5)).
fn servers(text: &str) -> Vec<SocketAddr> {
    let found = named(text);
    match found.is_empty() {
        true => vec![(Ipv4Addr::LOCALHOST, PORT).into()],
        false => found,
    }
}

fn named(text: &str) -> Vec<SocketAddr> {
    let mut found: Vec<SocketAddr> = Vec::new();
    for line in text.lines() {
        let mut words = line.split_ascii_whitespace();
        if words.next() == Some("nameserver")
            && let Some(address) = words.next().and_then(server)
            && !found.contains(&address)
        {
            found.push(address);
        }
    }
    found
}

/// An address, for IPv6 perhaps with its link: `fe80::1%eth0`.
fn server(text: &str) -> Option<SocketAddr> {
    let Some((address, link)) = text.split_once('%') else {
        return text.parse::<IpAddr>().ok().map(|ip| (ip, PORT).into());
    };
    let index = link.parse().ok().or_else(|| if_nametoindex(link).ok())?;
    let address = address.parse().ok()?;
    Some(SocketAddrV6::new(address, PORT, 0, index).into())
}

/// The text behind our lines; all of it if they are not there.
fn without_ours(text: &str) -> &str {
    if !text.starts_with(MARK) {
        return text;
    }
    let Some((_, behind)) = text.split_once('\n') else {
        return "";
    };
    match behind.split_once('\n') {
        Some((ours, rest)) if ours.starts_with("nameserver ") => rest,
        // Someone took our server away and left the comment.
        _ => behind,
    }
}

fn made_by_us(text: &str) -> bool {
    text.starts_with(COMMENT_NEW)
}

/// Where the file leads, if that is one of systemd-resolved.
pub(crate) fn link_to_resolved(path: &Path) -> Option<PathBuf> {
    let target = fs::read_link(path).ok()?;
    let is_its = RESOLVED
        .iter()
        .any(|part| target.to_string_lossy().contains(part));
    is_its.then_some(target)
}

fn refuse_resolved(path: &Path) -> Result<(), Error> {
    match link_to_resolved(path) {
        Some(target) => Err(Error::Resolved {
            path: path.to_owned(),
            target,
        }),
        None => Ok(()),
    }
}

/// `None` if there is no file.
fn read(path: &Path) -> Result<Option<String>, Error> {
    let fail = |cause| Error::Io {
        verb: "read",
        path: path.to_owned(),
        cause,
    };
    match fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(fail(error)),
        Ok(metadata) if FILE_MAX < metadata.len() => {
            return Err(Error::TooLarge {
                path: path.to_owned(),
                size: metadata.len(),
            });
        }
        Ok(_) => (),
    }
    fs::read_to_string(path).map(Some).map_err(fail)
}

/// Writes in place, by one call before the file is cut: whoever reads meanwhile sees whole lines of the old
/// or the new text.
fn write(path: &Path, text: &str) -> Result<(), Error> {
    let fail = |cause| Error::Io {
        verb: "write",
        path: path.to_owned(),
        cause,
    };
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .map_err(fail)?;
    file.write_all(text.as_bytes()).map_err(fail)?;
    file.set_len(text.len() as u64).map_err(fail)?;
    file.sync_all().map_err(fail)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    const OURS: IpAddr = IpAddr::V4(Ipv4Addr::new(252, 64, 0, 1));

    #[test]
    fn wiring_and_back_leaves_every_byte() {
        for text in [
            "",
            "nameserver 10.0.0.1",
            "# made by dhclient\nsearch corp.example.com\nnameserver 10.0.0.1\noptions edns0\n",
            "nameserver 10.0.0.1\r\n\n\n",
        ] {
            let file = File::with(Some(text));
            let inode = fs::metadata(&file.path).unwrap().ino();
            assert!(file.wire().changed);
            assert!(is_wired(&file.path, OURS).unwrap());
            let wired = file.text();
            assert!(wired.contains("\nnameserver 252.64.0.1\n"));
            assert!(wired.ends_with(text));
            assert!(!file.wire().changed, "a second time changes nothing");
            assert_eq!(file.text(), wired);
            assert!(unwire(&file.path).unwrap());
            assert_eq!(file.text(), text);
            assert!(!unwire(&file.path).unwrap());
            assert_eq!(fs::metadata(&file.path).unwrap().ino(), inode, "in place");
        }
    }

    #[test]
    fn servers_that_stood_there_are_found() {
        let file = File::with(Some(
            "nameserver 10.0.0.1\n#nameserver 10.9.9.9\n nameserver\t10.0.0.2 \nnameserver nonsense\n\
             nameserver fd00::1\nnameserver 10.0.0.1\nnameserver fe80::1%7\n",
        ));
        let wired = file.wire();
        let expected: Vec<SocketAddr> = [
            "10.0.0.1:53",
            "10.0.0.2:53",
            "[fd00::1]:53",
            "[fe80::1%7]:53",
        ]
        .map(|a| a.parse().unwrap())
        .to_vec();
        assert_eq!(upstreams(&file.path).unwrap(), expected);
        assert_eq!(wired.displaced, 2);
        file.wire();
        assert_eq!(
            upstreams(&file.path).unwrap(),
            expected,
            "ours is not among them"
        );
        assert_eq!(first_server(&file.path), Some("10.0.0.1".parse().unwrap()));
        let none = File::with(Some("search example.com\n"));
        assert_eq!(
            upstreams(&none.path).unwrap(),
            ["127.0.0.1:53".parse().unwrap()]
        );
        assert_eq!(first_server(&none.path), None);
    }

    #[test]
    fn what_others_changed_stays() {
        let file = File::with(Some("nameserver 10.0.0.1\n"));
        file.wire();
        fs::write(&file.path, file.text() + "options rotate\n").unwrap();
        unwire(&file.path).unwrap();
        assert_eq!(file.text(), "nameserver 10.0.0.1\noptions rotate\n");
        // A DHCP client wrote the file anew: our lines come back.
        file.wire();
        fs::write(&file.path, "nameserver 10.0.0.9\n").unwrap();
        assert!(!is_wired(&file.path, OURS).unwrap());
        assert!(!unwire(&file.path).unwrap());
        let wired = file.wire();
        assert!(wired.changed);
        assert_eq!(
            upstreams(&file.path).unwrap(),
            ["10.0.0.9:53".parse().unwrap()]
        );
        // Someone removed our server only.
        fs::write(
            &file.path,
            format!("{COMMENT}\n# mine\nnameserver 10.0.0.9\n"),
        )
        .unwrap();
        unwire(&file.path).unwrap();
        assert_eq!(file.text(), "# mine\nnameserver 10.0.0.9\n");
    }

    #[test]
    fn another_address_of_ours_replaces_the_old_one() {
        let file = File::with(Some("nameserver 10.0.0.1\n"));
        wire(&file.path, "252.64.0.9".parse().unwrap()).unwrap();
        file.wire();
        assert_eq!(file.text().matches("nameserver").count(), 2);
        unwire(&file.path).unwrap();
        assert_eq!(file.text(), "nameserver 10.0.0.1\n");
    }

    #[test]
    fn a_file_that_was_not_there_goes_again_unless_others_use_it() {
        let file = File::with(None);
        file.wire();
        file.wire();
        unwire(&file.path).unwrap();
        assert!(!file.path.exists());
        file.wire();
        fs::write(&file.path, file.text() + "options rotate\n").unwrap();
        file.wire();
        unwire(&file.path).unwrap();
        assert_eq!(file.text(), "options rotate\n");
    }

    #[test]
    fn the_file_of_systemd_resolved_is_refused() {
        let file = File::with(None);
        std::os::unix::fs::symlink("../run/systemd/resolve/stub-resolv.conf", &file.path).unwrap();
        let error = wire(&file.path, OURS).unwrap_err();
        assert!(matches!(error, Error::Resolved { .. }));
        assert!(error.to_string().contains("dns.wiring"));
    }

    struct File {
        path: PathBuf,
    }

    impl File {
        fn with(text: Option<&str>) -> Self {
            use std::sync::atomic::{AtomicU32, Ordering};
            static NEXT: AtomicU32 = AtomicU32::new(0);
            let number = NEXT.fetch_add(1, Ordering::Relaxed);
            let name = format!("meshwork-resolv-{}-{number}", std::process::id());
            let path = std::env::temp_dir().join(name);
            if let Some(text) = text {
                fs::write(&path, text).unwrap();
            }
            Self { path }
        }

        fn wire(&self) -> Wired {
            wire(&self.path, OURS).unwrap()
        }

        fn text(&self) -> String {
            fs::read_to_string(&self.path).unwrap()
        }
    }

    impl Drop for File {
        fn drop(&mut self) {
            // Gone already in some tests.
            drop(fs::remove_file(&self.path));
        }
    }
}
