//! The state directory (0700): what the join gave this host, its keys, and the last good state of the mesh.
//!
//! `agent.json` is the commit of a join: without it there is none, whatever else lies there. What control sent is kept
//! with a checksum (`mesh_api::stored`); a file that is damaged is reported and left out, never a reason to stop.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use mesh_api::stored::{self, STORED_MAX};
use mesh_api::sync::MeshSettings;
use mesh_api::{proto, stored::StoredError};
use mesh_core::identity::{Identity, SpiffeId};
use mesh_core::names::{HostUid, Label, Network, ServiceName, TrustDomain};
use mesh_runtime::files::{self, FileError};
use nix::unistd::{Uid, User};
use prost::Message;
use serde::{Deserialize, Serialize};

use crate::reals::Reals;
use crate::view::HostFacts;

/// Largest file that is not of [`stored`], in bytes: a key, a chain, or `agent.json`.
const SMALL_MAX: u64 = 64 * 1024;
const DOOR_FILE: &str = "door.json";
const REALS_FILE: &str = "reals.json";
const FOLLOWERS: &str = "followers";
/// Its largest size: 4,096 addresses with the names of their services.
const REALS_FILE_MAX: u64 = 1024 * 1024;
/// The form of `agent.json` that this version reads and writes.
const FORM: u32 = 1;

/// What the join gave this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Membership {
    pub(crate) host: HostFacts,
    /// Where peers reach this host; at the time of the join, where it moves.
    pub(crate) address: String,
    /// The address is the one from which this host reaches control, whichever that is at the time. It is not where the
    /// operator said one, nor behind an address translation, where control saw another.
    pub(crate) moves: bool,
    /// Where control answers: `host:port`.
    pub(crate) control: Vec<String>,
    /// The token of the join, by its public id.
    pub(crate) token_id: String,
}

impl Membership {
    pub(crate) fn agent_id(&self) -> SpiffeId {
        SpiffeId {
            trust_domain: self.host.trust_domain.clone(),
            identity: Identity::Agent(self.host.uid.clone()),
        }
    }
}

/// [`Membership`] as it is written.
#[derive(Serialize, Deserialize)]
struct Form {
    form: u32,
    host_uid: String,
    host_name: String,
    trust_domain: String,
    network: String,
    address: String,
    moves: bool,
    control: Vec<String>,
    token_id: String,
    dns_suffix: String,
    vip4_range: String,
    vip6_range: String,
}

impl From<&Membership> for Form {
    fn from(membership: &Membership) -> Self {
        let host = &membership.host;
        Self {
            form: FORM,
            host_uid: host.uid.to_string(),
            host_name: host.name.to_string(),
            trust_domain: host.trust_domain.to_string(),
            network: host.network.to_string(),
            address: membership.address.clone(),
            moves: membership.moves,
            control: membership.control.clone(),
            token_id: membership.token_id.clone(),
            dns_suffix: host.dns_suffix.clone(),
            vip4_range: host.vips.v4().to_string(),
            vip6_range: host.vips.v6().to_string(),
        }
    }
}

impl TryFrom<Form> for Membership {
    type Error = anyhow::Error;

    fn try_from(form: Form) -> anyhow::Result<Self> {
        if form.form != FORM {
            bail!("its form is {}, this version knows {FORM}", form.form);
        }
        let mesh = MeshSettings::try_from(&proto::MeshSettings {
            dns_suffix: form.dns_suffix,
            vip4_range: form.vip4_range,
            vip6_range: form.vip6_range,
        })?;
        Ok(Self {
            host: HostFacts {
                uid: form.host_uid.parse::<HostUid>()?,
                name: form.host_name.parse::<Label>()?,
                trust_domain: form.trust_domain.parse::<TrustDomain>()?,
                network: form.network.parse::<Network>()?,
                vips: mesh.vips,
                dns_suffix: mesh.dns_suffix,
            },
            address: form.address,
            moves: form.moves,
            control: form.control,
            token_id: form.token_id,
        })
    }
}

/// A file of what control sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kept {
    Bundle,
    Index,
    Endpoints,
    Policies,
    /// Not control's: who called, and since when.
    Edges,
    Revocations,
}

/// Inode and time of a file: each writing makes another.
pub(crate) type Stamp = (u64, i64, i64);

impl Kept {
    pub(crate) const ALL: [Self; 6] = [
        Self::Bundle,
        Self::Index,
        Self::Endpoints,
        Self::Policies,
        Self::Edges,
        Self::Revocations,
    ];

    const fn name(self) -> &'static str {
        match self {
            Self::Bundle => "bundle",
            Self::Index => "index",
            Self::Endpoints => "endpoints",
            Self::Policies => "policies",
            Self::Edges => "edges",
            Self::Revocations => "revocations",
        }
    }
}

/// A key with its certificate chain, as PEM.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Pair {
    pub(crate) key: String,
    pub(crate) chain: String,
}

/// The directory.
#[derive(Clone, Debug)]
pub(crate) struct State {
    root: PathBuf,
}

impl State {
    pub(crate) fn new(root: &Path) -> Self {
        Self {
            root: root.to_owned(),
        }
    }

    /// Makes the directory if it is not there; true if it was made.
    pub(crate) fn create(&self) -> Result<bool, FileError> {
        let made = !self.root.exists();
        files::create_private_dir(&self.root)?;
        Ok(made)
    }

    /// Checks that the agent may read and write all of it, and nobody else may write. A worker is root without root's
    /// privileges, so that another's files are closed to it; better to hear it before one is started.
    pub(crate) fn check_owner(&self) -> anyhow::Result<()> {
        let names = ["agent.json", "agent.key", "agent.crt", "bundle", "leaves"];
        let paths = names.map(|name| self.root.join(name));
        for path in [&self.root].into_iter().chain(&paths) {
            let facts = match fs::metadata(path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                facts => facts.with_context(|| format!("cannot look at {}", path.display()))?,
            };
            let (shown, root) = (path.display(), self.root.display());
            let own = nix::unistd::geteuid();
            if facts.uid() != own.as_raw() {
                let (is, be) = (user(facts.uid().into()), user(own));
                bail!("{shown} is owned by {is}; `chown -R {be}: {root}`");
            }
            let needed = if facts.is_dir() { 0o700 } else { 0o600 };
            if facts.mode() & needed != needed || facts.mode() & 0o022 != 0 {
                let mode = facts.mode() & 0o7777;
                bail!("{shown} has mode {mode:04o}; `chmod {needed:04o} {shown}`");
            }
        }
        Ok(())
    }

    /// Checks that what only a join gives is there; all else control gives again.
    pub(crate) fn check_whole(&self) -> anyhow::Result<()> {
        let names = ["agent.key", Kept::Bundle.name()];
        let mut paths = names.iter().map(|name| self.root.join(name));
        match paths.find(|path| !path.exists()) {
            None => Ok(()),
            Some(lost) => bail!(
                "{} is missing, without which this host can not prove what it is: put it back from a copy of the \
                 directory, or `mesh-agent leave`, then `mesh-agent join` with a token of `--replace`",
                lost.display()
            ),
        }
    }

    /// What becomes of plaintext callers, as the holder keeps it.
    pub(crate) fn door_file(&self) -> PathBuf {
        self.root.join(DOOR_FILE)
    }

    /// Who opened this host to plaintext, and until when.
    pub(crate) fn bypass_file(&self) -> PathBuf {
        self.root.join(crate::bypass::FILE)
    }

    /// What workers that others have taken over from say of themselves.
    pub(crate) fn followers(&self) -> PathBuf {
        self.root.join(FOLLOWERS)
    }

    /// At which real addresses calls were taken over last. A file that can not be read is as none.
    pub(crate) fn reals(&self) -> Reals {
        let path = self.root.join(REALS_FILE);
        let read = || -> anyhow::Result<Reals> {
            let Some(content) = read_if_there(&path, REALS_FILE_MAX)? else {
                return Ok(Reals::new());
            };
            let kept: BTreeMap<SocketAddr, String> = serde_json::from_slice(&content)?;
            let pairs = kept
                .into_iter()
                .map(|(address, service)| Ok((address, ServiceName::parse(&service)?)));
            pairs.collect()
        };
        read().unwrap_or_else(|error| {
            log::warn!(
                "{} is of no use and is left out: {error:#}; what control no more lists may be called in plaintext",
                path.display()
            );
            Reals::new()
        })
    }

    pub(crate) fn set_reals(&self, reals: &Reals) -> anyhow::Result<()> {
        let reals: BTreeMap<_, _> = reals.iter().map(|(a, s)| (a, s.to_string())).collect();
        let text = serde_json::to_vec(&reals)?;
        files::write_private(&self.root.join(REALS_FILE), &text)?;
        Ok(())
    }

    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// What the join gave this host; `None` before a join.
    pub(crate) fn membership(&self) -> anyhow::Result<Option<Membership>> {
        let path = self.root.join("agent.json");
        let Some(content) = read_if_there(&path, SMALL_MAX)? else {
            return Ok(None);
        };
        let read = || Membership::try_from(serde_json::from_slice::<Form>(&content)?);
        let membership = read().with_context(|| {
            format!(
                "{} can not be read; restore it, or `mesh-agent leave` and join again",
                path.display()
            )
        })?;
        Ok(Some(membership))
    }

    /// Commits a join.
    pub(crate) fn set_membership(&self, membership: &Membership) -> anyhow::Result<()> {
        let text = serde_json::to_string_pretty(&Form::from(membership))?;
        files::write_private(&self.root.join("agent.json"), text.as_bytes())?;
        Ok(())
    }

    /// The key of the agent's own credential, from before the join's call on.
    pub(crate) fn agent_key(&self) -> Result<Option<String>, FileError> {
        read_text(&self.root.join("agent.key"))
    }

    pub(crate) fn set_agent_key(&self, key: &str) -> Result<(), FileError> {
        files::write_private(&self.root.join("agent.key"), key.as_bytes())
    }

    /// Removes what an earlier membership may have left, but for the key: it is not this mesh's.
    pub(crate) fn forget_mesh(&self) -> anyhow::Result<()> {
        for name in Kept::ALL.map(Kept::name).into_iter().chain([
            "contact",
            DOOR_FILE,
            REALS_FILE,
            FOLLOWERS,
            crate::drained::FILE,
            crate::bypass::FILE,
            "leaves",
            "agent.crt",
        ]) {
            remove(&self.root.join(name))?;
        }
        Ok(())
    }

    /// Takes a join back that did not come to serve. The key stays: with it the same token joins again.
    pub(crate) fn take_back(&self) -> anyhow::Result<()> {
        remove(&self.root.join("agent.json"))?;
        self.forget_mesh()
    }

    /// Forgets the key of a join that was refused.
    pub(crate) fn remove_agent_key(&self) {
        let _ = fs::remove_file(self.root.join("agent.key"));
    }

    /// The agent's own credential.
    pub(crate) fn agent(&self) -> Result<Option<Pair>, FileError> {
        let chain = read_text(&self.root.join("agent.crt"))?;
        Ok(self
            .agent_key()?
            .zip(chain)
            .map(|(key, chain)| Pair { key, chain }))
    }

    pub(crate) fn set_agent_chain(&self, chain: &str) -> Result<(), FileError> {
        files::write_private(&self.root.join("agent.crt"), chain.as_bytes())
    }

    /// The leaf of this name: `<namespace>.<account>` or `host`.
    pub(crate) fn leaf(&self, name: &str) -> Result<Option<Pair>, FileError> {
        let key = read_text(&self.leaf_path(name, "key"))?;
        let chain = read_text(&self.leaf_path(name, "crt"))?;
        Ok(key.zip(chain).map(|(key, chain)| Pair { key, chain }))
    }

    /// The key is written first: one without its certificate is as good as none.
    pub(crate) fn set_leaf(&self, name: &str, pair: &Pair) -> Result<(), FileError> {
        files::create_private_dir(&self.root.join("leaves"))?;
        files::write_private(&self.leaf_path(name, "key"), pair.key.as_bytes())?;
        files::write_private(&self.leaf_path(name, "crt"), pair.chain.as_bytes())
    }

    pub(crate) fn remove_leaf(&self, name: &str) {
        for extension in ["crt", "key"] {
            let path = self.leaf_path(name, extension);
            if let Err(error) = fs::remove_file(&path)
                && error.kind() != io::ErrorKind::NotFound
            {
                log::warn!("cannot remove {}: {error}", path.display());
            }
        }
    }

    /// The names of all leaves that are kept.
    pub(crate) fn leaf_names(&self) -> Vec<String> {
        let Ok(entries) = fs::read_dir(self.root.join("leaves")) else {
            return Vec::new();
        };
        let names = entries.filter_map(|entry| {
            let name = entry.ok()?.file_name().into_string().ok()?;
            name.strip_suffix(".key").map(str::to_owned)
        });
        names.collect()
    }

    fn leaf_path(&self, name: &str, extension: &str) -> PathBuf {
        self.root.join("leaves").join(format!("{name}.{extension}"))
    }

    /// What was kept; a damaged file is reported and is as none.
    pub(crate) fn kept<M: Message + Default>(&self, what: Kept) -> Option<M> {
        self.kept_whole(what).unwrap_or_else(|error| {
            log::warn!(
                file:% = self.file(what).display(), error:% = error;
                "a file of the state directory is of no use and is left out; control sends its content again"
            );
            None
        })
    }

    /// What was kept, where a damaged file is not as none.
    pub(crate) fn kept_whole<M: Message + Default>(
        &self,
        what: Kept,
    ) -> Result<Option<M>, KeptError> {
        let content = read_if_there(&self.file(what), STORED_MAX)?;
        Ok(content.map(|c| stored::unseal(&c)).transpose()?)
    }

    pub(crate) fn file(&self, what: Kept) -> PathBuf {
        self.root.join(what.name())
    }

    pub(crate) fn keep(&self, what: Kept, message: &impl Message) -> Result<(), FileError> {
        files::write_private(&self.file(what), &stored::seal(message))
    }

    /// What tells each file of what control sent from the one that was there before; a missing one is `None`.
    pub(crate) fn stamps(&self) -> [Option<Stamp>; Kept::ALL.len()] {
        Kept::ALL.map(|what| {
            let facts = fs::metadata(self.file(what)).ok()?;
            Some((facts.ino(), facts.mtime(), facts.mtime_nsec()))
        })
    }

    /// When control was last heard; Unix time, milliseconds.
    pub(crate) fn contact(&self) -> Option<u64> {
        let text = read_text(&self.root.join("contact")).ok()??;
        text.trim().parse().ok()
    }

    pub(crate) fn set_contact(&self, unix_ms: u64) -> Result<(), FileError> {
        let text = format!("{unix_ms}\n");
        files::write_private(&self.root.join("contact"), text.as_bytes())
    }

    /// Removes all that is ours, and the directory, unless somebody put something else into it.
    pub(crate) fn clear(&self) -> anyhow::Result<()> {
        let entries = match fs::read_dir(&self.root) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            entries => entries.with_context(|| format!("cannot list {}", self.root.display()))?,
        };
        // First what makes it a member: whatever is left then belongs to nobody.
        for name in ["agent.json", "agent.key"] {
            remove(&self.root.join(name))?;
        }
        self.forget_mesh()?;
        for entry in entries {
            let path = entry?.path();
            // Of a file that was being written when the agent was killed.
            if path
                .extension()
                .is_some_and(|e| e.as_encoded_bytes().starts_with(b"new-"))
            {
                remove(&path)?;
            }
        }
        let _ = fs::remove_dir(&self.root);
        Ok(())
    }
}

/// Why a file that was kept is of no use.
#[derive(Debug, thiserror::Error)]
pub(crate) enum KeptError {
    #[error(transparent)]
    File(#[from] FileError),
    #[error(transparent)]
    Stored(#[from] StoredError),
}

/// A user's name, or number if it has none.
fn user(uid: Uid) -> String {
    match User::from_uid(uid) {
        Ok(Some(user)) => user.name,
        _ => uid.to_string(),
    }
}

fn remove(path: &Path) -> anyhow::Result<()> {
    let removed = if path.is_dir() {
        fs::remove_dir_all(path)
    } else {
        fs::remove_file(path)
    };
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

fn read_if_there(path: &Path, max: u64) -> Result<Option<Vec<u8>>, FileError> {
    match files::read_bounded(path, max) {
        Ok(content) => Ok(Some(content)),
        Err(error) if error.cause.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

fn read_text(path: &Path) -> Result<Option<String>, FileError> {
    let content = read_if_there(path, SMALL_MAX)?;
    Ok(content.map(|c| String::from_utf8_lossy(&c).into_owned()))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use mesh_api::stored::StoredPolicies;
    use mesh_core::vip::VipRanges;
    use std::os::unix::fs::PermissionsExt as _;
    use std::sync::atomic::{AtomicU32, Ordering};

    /// A state directory that goes with the value.
    pub(crate) struct Scratch(pub(crate) State);

    impl Scratch {
        pub(crate) fn new() -> Self {
            static NEXT: AtomicU32 = AtomicU32::new(0);
            let number = NEXT.fetch_add(1, Ordering::Relaxed);
            let name = format!("meshwork-state-{}-{number}", std::process::id());
            let state = State::new(&std::env::temp_dir().join(name));
            state.create().unwrap();
            Self(state)
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(self.0.root());
        }
    }

    pub(crate) fn membership() -> Membership {
        Membership {
            host: HostFacts {
                uid: "0".repeat(32).parse().unwrap(),
                name: "vm-1".parse().unwrap(),
                trust_domain: "corp.example.com".parse().unwrap(),
                network: Network::default_network(),
                vips: VipRanges::default(),
                dns_suffix: "mesh.internal".to_owned(),
            },
            address: "10.0.0.1".to_owned(),
            moves: true,
            control: vec!["10.0.0.9:7440".to_owned()],
            token_id: "t-1".to_owned(),
        }
    }

    #[test]
    fn everything_reads_back_and_is_private() {
        let Scratch(state) = &Scratch::new();
        assert_eq!(state.membership().unwrap(), None);
        assert!(state.agent().unwrap().is_none());
        state.set_membership(&membership()).unwrap();
        assert_eq!(state.membership().unwrap(), Some(membership()));
        let pair = Pair {
            key: "key".to_owned(),
            chain: "chain".to_owned(),
        };
        state.set_leaf("shop.web", &pair).unwrap();
        assert!(state.leaf("shop.web").unwrap() == Some(pair));
        assert_eq!(state.leaf_names(), ["shop.web"]);
        state.set_agent_key("k").unwrap();
        assert!(state.agent().unwrap().is_none(), "a key alone is none");
        state.set_contact(7).unwrap();
        assert_eq!(state.contact(), Some(7));
        for file in ["agent.json", "agent.key", "leaves/shop.web.key"] {
            let mode = fs::metadata(state.root().join(file)).unwrap().permissions();
            assert_eq!(mode.mode() & 0o777, 0o600, "{file}");
        }
        state.remove_leaf("shop.web");
        assert!(state.leaf_names().is_empty());
        let theirs = state.root().join("notes");
        fs::write(&theirs, "").unwrap();
        fs::write(state.root().join("index.new-4711"), "").unwrap();
        state.clear().unwrap();
        assert_eq!(fs::read_dir(state.root()).unwrap().count(), 1);
        fs::remove_file(theirs).unwrap();
        state.clear().unwrap();
        assert!(!state.root().exists());
    }

    #[test]
    fn a_directory_that_the_agent_may_not_use_is_named_with_the_remedy() {
        let Scratch(state) = &Scratch::new();
        state.check_owner().unwrap();
        for (mode, good) in [(0o755, true), (0o700, true), (0o777, false), (0o500, false)] {
            fs::set_permissions(state.root(), fs::Permissions::from_mode(mode)).unwrap();
            assert_eq!(state.check_owner().is_ok(), good, "{mode:o}");
        }
        let error = state.check_owner().unwrap_err().to_string();
        assert!(error.contains("has mode 0500; `chmod 0700"), "{error}");
        fs::set_permissions(state.root(), fs::Permissions::from_mode(0o700)).unwrap();
        let missing = State::new(&state.root().join("none"));
        missing.check_owner().unwrap();
        if nix::unistd::geteuid().is_root() {
            std::os::unix::fs::chown(state.root(), Some(65_534), None).unwrap();
            let error = state.check_owner().unwrap_err().to_string();
            assert!(
                error.contains("is owned by") && error.contains("chown -R root:"),
                "{error}"
            );
        }
    }

    #[test]
    fn a_damaged_file_is_as_none() {
        let Scratch(state) = &Scratch::new();
        let kept = StoredPolicies {
            epoch: 1,
            received_ms: 2,
            update: None,
        };
        assert_eq!(state.kept::<StoredPolicies>(Kept::Policies), None);
        state.keep(Kept::Policies, &kept).unwrap();
        assert_eq!(state.kept(Kept::Policies), Some(kept));
        let path = state.root().join("policies");
        let whole = fs::read(&path).unwrap();
        fs::write(&path, &whole[..whole.len() - 1]).unwrap();
        assert_eq!(state.kept::<StoredPolicies>(Kept::Policies), None);
        fs::write(&path, "").unwrap();
        assert_eq!(state.kept::<StoredPolicies>(Kept::Policies), None);
    }

    #[test]
    fn a_membership_of_another_form_or_with_bad_names_says_what_to_do() {
        let Scratch(state) = &Scratch::new();
        state.set_membership(&membership()).unwrap();
        let path = state.root().join("agent.json");
        let good = fs::read_to_string(&path).unwrap();
        for (change, with) in [
            ("\"form\": 1", "\"form\": 2"),
            ("vm-1", "VM 1"),
            ("252.64.0.0/12", "252.64.0.0"),
            ("{", ""),
        ] {
            fs::write(&path, good.replacen(change, with, 1)).unwrap();
            let error = format!("{:#}", state.membership().unwrap_err());
            assert!(error.contains("mesh-agent leave"), "{error}");
        }
    }
}
