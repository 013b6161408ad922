//! dnsmasq: a file of ours in its directory, by which it asks the agent for names under the mesh's suffix.
//!
//! It reads such a file at its start only, so it is started anew when the file changed, which is at the join and when
//! this host leaves: the file stays while the agent is stopped. Only who has all of root's rights can do that. The agent
//! has not, so a unit does it that watches the file (`mesh-names.path`); commands do it themselves.

use std::fmt::Write as _;
use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use mesh_runtime::files::{self, FileError};

use super::command::{self, run};
use super::wiring::systemctl;

/// Its name in dnsmasq's directory.
const NAME: &str = "meshwork.conf";
const UNIT: &str = "dnsmasq.service";
/// Begins the first line. Never change it: it is how a file of an earlier version is found.
const MARK: &str = "# meshwork: made by the mesh-agent of ";
const MAIN: &str = "/etc/dnsmasq.conf";
/// What Debian's dnsmasq leaves out of its directory; others leave out less.
const LEFT_OUT: &str = ",.dpkg-dist,.dpkg-old,.dpkg-new";
/// A larger file is not ours, in bytes.
const FILE_MAX: u64 = 64 * 1024;
/// The capability that the service manager asks of those who order it about.
const CAP_SYS_ADMIN: u64 = 21;

#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("{} is no directory; install dnsmasq, or set `dns.dnsmasq_dir` or another `dns.wiring`", .0.display())]
    NoDirectory(PathBuf),
    #[error("{} is not the agent's; move it away, or set another `dns.wiring`", .0.display())]
    NotOurs(PathBuf),
    #[error(
        "dnsmasq does not take its configuration with our file, which is not put in place: {0}"
    )]
    Refused(command::Error),
    #[error("dnsmasq goes on with our file, which is gone: {0}; `systemctl restart dnsmasq`")]
    Restart(command::Error),
    #[error(transparent)]
    File(#[from] FileError),
    #[error("can not remove {}: {cause}", path.display())]
    Remove { path: PathBuf, cause: io::Error },
}

/// Whose file it is, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) dir: PathBuf,
    /// Tells agents of one machine apart.
    pub(crate) state_dir: PathBuf,
    /// For a configuration that is tried.
    pub(crate) runtime_dir: PathBuf,
}

/// What it is to ask the agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Wish {
    pub(crate) server: SocketAddr,
    pub(crate) domains: Vec<String>,
}

/// Whether dnsmasq runs as a unit of this host.
pub(super) fn is_active() -> bool {
    systemctl(&["is-active", "--quiet", UNIT]).is_some_and(|answer| answer.is_ok())
}

impl Place {
    fn file(&self) -> PathBuf {
        self.dir.join(NAME)
    }

    fn mark(&self) -> String {
        format!("{MARK}{}", self.state_dir.display())
    }

    /// Puts the file in place, if dnsmasq takes it. True if it was not there, or another.
    pub(crate) fn wire(&self, wish: &Wish) -> Result<bool, Error> {
        let text = self.render(wish);
        let path = self.file();
        match self.read()? {
            Some(old) if old == text => return Ok(false),
            Some(old) if !self.is_ours(&old) => return Err(Error::NotOurs(path)),
            _ => {}
        }
        if !self.dir.is_dir() {
            return Err(Error::NoDirectory(self.dir.clone()));
        }
        self.try_out(&text)?;
        files::write_atomic(&path, text.as_bytes())?;
        Ok(true)
    }

    pub(crate) fn is_wired(&self, wish: &Wish) -> Result<bool, Error> {
        Ok(self.read()?.as_deref() == Some(&self.render(wish)))
    }

    /// Takes the file away. True if there was one of ours.
    pub(crate) fn unwire(&self) -> Result<bool, Error> {
        let path = self.file();
        // One that can not be read is not ours.
        if !self
            .read()
            .is_ok_and(|old| old.is_some_and(|old| self.is_ours(&old)))
        {
            return Ok(false);
        }
        fs::remove_file(&path).map_err(|cause| Error::Remove { path, cause })?;
        Ok(true)
    }

    /// The same, and has dnsmasq started anew if it runs. Who may not do that leaves all as it is.
    pub(crate) fn unwire_and_restart(&self) -> Result<bool, Error> {
        if !may_restart() || !self.unwire()? {
            return Ok(false);
        }
        match systemctl(&["try-restart", UNIT]) {
            Some(Err(error)) => Err(Error::Restart(error)),
            _ => Ok(true),
        }
    }

    fn is_ours(&self, text: &str) -> bool {
        text.lines().next() == Some(&self.mark())
    }

    fn read(&self) -> Result<Option<String>, Error> {
        let path = self.file();
        if !path.exists() {
            return Ok(None);
        }
        let bytes = files::read_bounded(&path, FILE_MAX)?;
        Ok(Some(String::from_utf8_lossy(&bytes).into_owned()))
    }

    fn render(&self, wish: &Wish) -> String {
        let (ip, port) = (wish.server.ip(), wish.server.port());
        let mut text = format!(
            "{}\n# It is taken away when this host leaves the mesh; changes of it are lost.\n",
            self.mark()
        );
        for domain in &wish.domains {
            let _ = writeln!(text, "server=/{domain}/{ip}#{port}");
        }
        // Virtual addresses are no public ones: `stop-dns-rebind` would keep them from programs.
        if let Some(suffix) = wish.domains.first() {
            let _ = writeln!(text, "rebind-domain-ok=/{suffix}/");
        }
        text
    }

    /// Asks dnsmasq about its whole configuration with ours. It is not started for that.
    fn try_out(&self, text: &str) -> Result<(), Error> {
        let mut whole = String::new();
        if Path::new(MAIN).exists() {
            let _ = writeln!(whole, "conf-file={MAIN}");
        }
        let _ = writeln!(whole, "conf-dir={}{LEFT_OUT}", self.dir.display());
        whole.push_str(text);
        let path = self.runtime_dir.join("dnsmasq.conf");
        files::write_private(&path, whole.as_bytes())?;
        let option = format!("--conf-file={}", path.display());
        let tried = run("dnsmasq", &["--test", &option]);
        // It is of no use to anyone.
        drop(fs::remove_file(&path));
        tried.map(drop).map_err(Error::Refused)
    }
}

/// Whether the service manager would obey us.
fn may_restart() -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let effective = effective.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok());
    effective.is_some_and(|caps| caps & (1 << CAP_SYS_ADMIN) != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(name: &str) -> Place {
        let dir = std::env::temp_dir().join(format!("meshwork-{name}-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        Place {
            runtime_dir: dir.clone(),
            dir,
            state_dir: "/var/lib/meshwork-agent".into(),
        }
    }

    fn wish() -> Wish {
        Wish {
            server: "252.64.0.1:7453".parse().unwrap(),
            domains: vec!["mesh.internal".to_owned(), "64.252.in-addr.arpa".to_owned()],
        }
    }

    #[test]
    fn the_file_sends_the_domains_to_the_agent_and_nothing_else() {
        assert_eq!(
            place("dnsmasq-text").render(&wish()),
            "# meshwork: made by the mesh-agent of /var/lib/meshwork-agent\n\
             # It is taken away when this host leaves the mesh; changes of it are lost.\n\
             server=/mesh.internal/252.64.0.1#7453\n\
             server=/64.252.in-addr.arpa/252.64.0.1#7453\n\
             rebind-domain-ok=/mesh.internal/\n"
        );
    }

    #[test]
    fn only_a_file_of_this_agent_is_touched() {
        let place = place("dnsmasq-ours");
        let path = place.file();
        for foreign in [
            "server=/mesh.internal/10.0.0.1\n",
            "",
            &format!("{MARK}/srv/other\n"),
        ] {
            fs::write(&path, foreign).unwrap();
            assert!(matches!(place.wire(&wish()), Err(Error::NotOurs(_))));
            assert!(!place.unwire().unwrap());
            assert_eq!(fs::read_to_string(&path).unwrap(), foreign);
        }
        fs::write(&path, place.render(&wish())).unwrap();
        assert!(place.is_wired(&wish()).unwrap());
        assert!(
            !place.wire(&wish()).unwrap(),
            "a second time changes nothing"
        );
        let other = Wish {
            domains: vec!["other.internal".to_owned()],
            ..wish()
        };
        assert!(!place.is_wired(&other).unwrap());
        assert!(place.unwire().unwrap());
        assert!(!path.exists() && !place.unwire().unwrap());
        fs::remove_dir(&place.dir).unwrap();
    }
}
