//! The cgroup tree: where it is mounted, which directories belong to an owner, and when that changes.
//!
//! The kernel knows a cgroup by the inode of its directory. A unit that restarts gets a new one, so the owner's
//! directories are looked up anew whenever a directory of interest comes or goes.

mod watch;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::{DirEntryExt, MetadataExt};
use std::path::{Component, Path, PathBuf};

use thiserror::Error;

use super::CgroupRef;
pub(crate) use watch::CgroupWatch;

/// Slices are nested by the dashes of their names; systemd's own go three deep.
const SLICE_DEPTH_MAX: usize = 8;
/// Directories looked at to find one cgroup: more than a full host has, and no loop.
const DIRECTORIES_MAX: usize = 50_000;
/// The kernel's `socket cgroupv2` takes a byte.
const LEVEL_MAX: usize = 255;
const MOUNTINFO: &str = "/proc/self/mountinfo";

/// Whose processes a workload is, as the services file says.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum OwnerPath {
    /// A system unit, wherever below the slices it stands: `x.service`, `x@1.service`.
    Unit(String),
    /// A directory below the root of the tree.
    Cgroup(PathBuf),
}

#[derive(Debug, Error)]
pub(crate) enum CgroupError {
    #[error("could not read {MOUNTINFO}")]
    Mounts(#[source] io::Error),
    #[error("no cgroup2 file system is mounted; owners `unit` and `cgroup` need one")]
    NotMounted,
    #[error("could not read the cgroup directory {}", path.display())]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("`{text}` is not {wanted}")]
    Owner { text: String, wanted: &'static str },
    #[error("could not watch the cgroup directory {}", path.display())]
    Watch {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

impl OwnerPath {
    /// A unit's name; `.service` is understood where there is no type.
    pub(crate) fn unit(name: &str) -> Result<Self, CgroupError> {
        let wrong = || CgroupError::Owner {
            text: name.chars().take(130).collect(),
            wanted: "the name of a service or scope unit",
        };
        let allowed = |c: char| c.is_ascii_alphanumeric() || ":-_.\\@".contains(c);
        if name.is_empty()
            || name.len() > 255
            || name.starts_with('.')
            || !name.chars().all(allowed)
        {
            return Err(wrong());
        }
        match name.rsplit_once('.') {
            Some((_, "service" | "scope" | "socket")) => Ok(Self::Unit(name.to_owned())),
            Some((_, "slice" | "timer" | "target" | "mount" | "path" | "device" | "swap")) => {
                Err(wrong())
            }
            _ => Ok(Self::Unit(format!("{name}.service"))),
        }
    }

    /// A path relative to the root of the tree; a leading `/` is not minded.
    pub(crate) fn cgroup(path: &str) -> Result<Self, CgroupError> {
        let relative = Path::new(path.trim_start_matches('/'));
        let plain = relative
            .components()
            .all(|c| matches!(c, Component::Normal(_)));
        // The root itself would be every process of the host.
        if !plain || relative.as_os_str().is_empty() || relative.components().count() > LEVEL_MAX {
            return Err(CgroupError::Owner {
                text: path.chars().take(130).collect(),
                wanted: "a directory below the root of the cgroup tree",
            });
        }
        Ok(Self::Cgroup(relative.to_owned()))
    }

    /// The socket unit that may listen in the place of a service.
    pub(crate) fn socket_unit(&self) -> Option<Self> {
        match self {
            Self::Unit(name) => {
                let stem = name.strip_suffix(".service")?;
                Some(Self::Unit(format!("{stem}.socket")))
            }
            Self::Cgroup(_) => None,
        }
    }
}

/// A directory of the tree.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Directory {
    /// Relative to the root.
    pub(crate) path: PathBuf,
    pub(crate) cgroup: CgroupRef,
}

/// The mounted cgroup2 tree.
#[derive(Clone, Debug)]
pub(crate) struct CgroupTree {
    root: PathBuf,
}

impl CgroupTree {
    /// Finds the tree among the mounts: /sys/fs/cgroup, or /sys/fs/cgroup/unified on hosts that still have version 1.
    pub(crate) fn find() -> Result<Self, CgroupError> {
        let mounts = fs::read_to_string(MOUNTINFO).map_err(CgroupError::Mounts)?;
        cgroup2_mount(&mounts)
            .map(Self::at)
            .ok_or(CgroupError::NotMounted)
    }

    pub(crate) const fn at(root: PathBuf) -> Self {
        Self { root }
    }

    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// The directories of an owner that exist now: none while the unit is down, more than one only for equal names
    /// in several slices.
    pub(crate) fn resolve(&self, owner: &OwnerPath) -> Result<Vec<Directory>, CgroupError> {
        match owner {
            OwnerPath::Cgroup(path) => Ok(self.directory(path)?.into_iter().collect()),
            OwnerPath::Unit(name) => {
                let mut found = Vec::new();
                for slice in self.slices()? {
                    found.extend(self.directory(&slice.join(name))?);
                }
                Ok(found)
            }
        }
    }

    /// Whether the cgroup `id` is `directory` or below it. A cgroup that is gone is in none.
    pub(crate) fn contains(&self, directory: &Path, id: u64) -> Result<bool, CgroupError> {
        let Some(top) = self.directory(directory)? else {
            return Ok(false);
        };
        if top.cgroup.id == id {
            return Ok(true);
        }
        let mut pending = vec![directory.to_owned()];
        let mut looked_at = 0;
        while let Some(path) = pending.pop() {
            for (name, inode) in self.children(&path)? {
                if inode == id {
                    return Ok(true);
                }
                pending.push(path.join(name));
            }
            looked_at += 1;
            if looked_at > DIRECTORIES_MAX {
                return Ok(false);
            }
        }
        Ok(false)
    }

    /// All cgroups by their ids, as far as there are not too many.
    pub(crate) fn by_id(&self) -> Result<BTreeMap<u64, PathBuf>, CgroupError> {
        let mut found = BTreeMap::new();
        let mut pending = vec![PathBuf::new()];
        while let Some(path) = pending.pop() {
            for (name, inode) in self.children(&path)? {
                if found.len() >= DIRECTORIES_MAX {
                    return Ok(found);
                }
                let child = path.join(name);
                found.insert(inode, child.clone());
                pending.push(child);
            }
        }
        Ok(found)
    }

    /// The root and all slices below it: where systemd puts system units.
    fn slices(&self) -> Result<Vec<PathBuf>, CgroupError> {
        let mut slices = vec![PathBuf::new()];
        let mut next = 0;
        while let Some(path) = slices.get(next).cloned() {
            next += 1;
            if path.components().count() >= SLICE_DEPTH_MAX || slices.len() > DIRECTORIES_MAX {
                continue;
            }
            let children = self.children(&path)?;
            slices.extend(
                children
                    .into_iter()
                    .filter(|(name, _)| name.ends_with(".slice"))
                    .map(|(name, _)| path.join(name)),
            );
        }
        Ok(slices)
    }

    fn directory(&self, path: &Path) -> Result<Option<Directory>, CgroupError> {
        match fs::symlink_metadata(self.root.join(path)) {
            Ok(found) if found.is_dir() => {
                let depth = path.components().count();
                Ok(u8::try_from(depth).ok().map(|level| Directory {
                    path: path.to_owned(),
                    cgroup: CgroupRef {
                        id: found.ino(),
                        level,
                    },
                }))
            }
            Ok(_) => Ok(None),
            Err(error) if is_gone(&error) => Ok(None),
            Err(source) => Err(self.read_error(path, source)),
        }
    }

    /// Names and inodes of the directories in one; none if it is gone.
    pub(super) fn children(&self, path: &Path) -> Result<Vec<(String, u64)>, CgroupError> {
        let entries = match fs::read_dir(self.root.join(path)) {
            Ok(entries) => entries,
            Err(error) if is_gone(&error) => return Ok(Vec::new()),
            Err(source) => return Err(self.read_error(path, source)),
        };
        let mut children = Vec::new();
        for entry in entries {
            let entry = match entry {
                Ok(entry) => entry,
                Err(error) if is_gone(&error) => break,
                Err(source) => return Err(self.read_error(path, source)),
            };
            // A name that is no UTF-8 is no unit's.
            if entry.file_type().is_ok_and(|kind| kind.is_dir())
                && let Ok(name) = entry.file_name().into_string()
            {
                children.push((name, entry.ino()));
            }
        }
        Ok(children)
    }

    fn read_error(&self, path: &Path, source: io::Error) -> CgroupError {
        CgroupError::Read {
            path: self.root.join(path),
            source,
        }
    }
}

/// A directory may go between being seen and being read; reading a removed cgroup answers ENODEV.
fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ENODEV)
}

/// The numeric id of a user given by name or number.
pub(crate) fn uid_of(user: &str) -> Result<u32, CgroupError> {
    if let Ok(uid) = user.parse::<u32>() {
        // The kernel's "no user".
        if uid != u32::MAX {
            return Ok(uid);
        }
    } else if let Ok(Some(found)) = nix::unistd::User::from_name(user) {
        return Ok(found.uid.as_raw());
    }
    Err(CgroupError::Owner {
        text: user.chars().take(130).collect(),
        wanted: "a user of this host",
    })
}

/// Bytes of memory that this process may have by its own cgroup and those above it; `None`: as many as there are.
pub(crate) fn memory_max() -> Option<usize> {
    let mounts = fs::read_to_string(MOUNTINFO).ok()?;
    let own = fs::read_to_string("/proc/self/cgroup").ok()?;
    let own = own.lines().find_map(|line| line.strip_prefix("0::/"))?;
    let root = cgroup2_mount(&mounts)?;
    let own = root.join(own);
    let within = own.ancestors().take_while(|dir| dir.starts_with(&root));
    let limits = within.filter_map(|dir| fs::read_to_string(dir.join("memory.max")).ok());
    // `max` is no number.
    limits
        .filter_map(|text| text.trim().parse::<usize>().ok())
        .min()
}

/// The mount point of the first cgroup2 file system. Fields: id, parent, device, root, mount point, options, notes,
/// `-`, type, source, options.
fn cgroup2_mount(mountinfo: &str) -> Option<PathBuf> {
    mountinfo.lines().find_map(|line| {
        let (place, kind) = line.split_once(" - ")?;
        kind.starts_with("cgroup2 ")
            .then(|| place.split(' ').nth(4))?
            .map(|path| PathBuf::from(unescape(path)))
    })
}

/// The kernel writes blanks, tabs, newlines and backslashes as three octal digits.
fn unescape(text: &str) -> String {
    [
        ("\\040", " "),
        ("\\011", "\t"),
        ("\\012", "\n"),
        ("\\134", "\\"),
    ]
    .iter()
    .fold(text.to_owned(), |text, (code, plain)| {
        text.replace(code, plain)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree() -> (tempdir::Dir, CgroupTree) {
        let dir = tempdir::Dir::new();
        let tree = CgroupTree::at(dir.path().to_owned());
        (dir, tree)
    }

    /// A directory that goes with its value.
    mod tempdir {
        use std::path::{Path, PathBuf};
        use std::sync::atomic::{AtomicU32, Ordering};

        pub(super) struct Dir(PathBuf);
        static NEXT: AtomicU32 = AtomicU32::new(0);

        impl Dir {
            pub(super) fn new() -> Self {
                let number = NEXT.fetch_add(1, Ordering::Relaxed);
                let name = format!("mesh-cgroup-{}-{number}", std::process::id());
                let path = std::env::temp_dir().join(name);
                std::fs::create_dir_all(&path).unwrap();
                Self(path)
            }

            pub(super) fn path(&self) -> &Path {
                &self.0
            }
        }

        impl Drop for Dir {
            fn drop(&mut self) {
                let _ = std::fs::remove_dir_all(&self.0);
            }
        }
    }

    fn inode(path: &Path) -> u64 {
        fs::metadata(path).unwrap().ino()
    }

    #[test]
    fn the_mount_is_found_on_both_kinds_of_host() {
        let hybrid = "25 20 0:22 / /sys/fs/cgroup ro - tmpfs tmpfs ro\n\
            30 25 0:27 / /sys/fs/cgroup/a\\040b rw,nosuid shared:9 - cgroup2 cgroup2 rw\n";
        assert_eq!(
            cgroup2_mount(hybrid),
            Some(PathBuf::from("/sys/fs/cgroup/a b"))
        );
        assert_eq!(cgroup2_mount("30 25 0:27 / /x rw - cgroup cgroup rw"), None);
        assert_eq!(cgroup2_mount("broken"), None);
    }

    #[test]
    fn units_are_found_below_any_slice_with_their_level() {
        let (dir, tree) = tree();
        let deep = dir
            .path()
            .join("system.slice/system-pg.slice/pg@15.service");
        fs::create_dir_all(&deep).unwrap();
        fs::create_dir_all(dir.path().join("system.slice/web.service/child")).unwrap();
        let pg = tree.resolve(&OwnerPath::unit("pg@15").unwrap()).unwrap();
        assert_eq!(
            pg,
            [Directory {
                path: "system.slice/system-pg.slice/pg@15.service".into(),
                cgroup: CgroupRef {
                    id: inode(&deep),
                    level: 3
                }
            }]
        );
        let web = OwnerPath::unit("web.service").unwrap();
        assert_eq!(tree.resolve(&web).unwrap()[0].cgroup.level, 2);
        // A service of a user's own manager, or of a container, is none of the system's.
        fs::create_dir_all(dir.path().join("x.scope/other.service")).unwrap();
        let other = OwnerPath::unit("other").unwrap();
        assert_eq!(tree.resolve(&other).unwrap(), []);
    }

    #[test]
    fn containment_is_by_inode_at_any_depth() {
        let (dir, tree) = tree();
        let child = dir.path().join("system.slice/web.service/a/b");
        fs::create_dir_all(&child).unwrap();
        let web = Path::new("system.slice/web.service");
        assert!(tree.contains(web, inode(&child)).unwrap());
        assert!(tree.contains(web, inode(&dir.path().join(web))).unwrap());
        assert!(!tree.contains(web, inode(dir.path())).unwrap());
        assert!(!tree.contains(Path::new("gone"), inode(&child)).unwrap());
    }

    #[test]
    fn owners_that_are_no_directory_below_the_root_are_refused() {
        for bad in ["", "/", "..", "a/../b", "../x"] {
            assert!(OwnerPath::cgroup(bad).is_err(), "{bad}");
        }
        assert!(OwnerPath::cgroup("/a/b").is_ok());
        for bad in [
            "",
            ".",
            "../x",
            "a/b.service",
            "system.slice",
            "x.timer",
            "a b",
        ] {
            assert!(OwnerPath::unit(bad).is_err(), "{bad}");
        }
        let web = OwnerPath::unit("web").unwrap();
        assert_eq!(web, OwnerPath::Unit("web.service".to_owned()));
        assert_eq!(
            web.socket_unit(),
            Some(OwnerPath::Unit("web.socket".to_owned()))
        );
        assert_eq!(uid_of("root").unwrap(), 0);
        assert!(uid_of("4294967295").is_err() && uid_of("no such user").is_err());
    }

    #[tokio::test]
    async fn a_restarted_unit_is_noticed_with_its_new_inode() {
        let (dir, tree) = tree();
        let unit = dir.path().join("system.slice/web.service");
        let web = OwnerPath::unit("web").unwrap();
        let mut watch = CgroupWatch::new(tree.clone()).unwrap();
        assert_eq!(watch.follow(vec![web.clone()]).unwrap()[&web], []);
        // The slice itself is new, so that two levels have to be followed.
        fs::create_dir_all(&unit).unwrap();
        let deadline = std::time::Duration::from_secs(10);
        let found = tokio::time::timeout(deadline, watch.changed())
            .await
            .unwrap()
            .unwrap();
        assert_eq!(found[&web][0].cgroup.id, inode(&unit));
        fs::remove_dir(&unit).unwrap();
        let found = tokio::time::timeout(deadline, watch.changed())
            .await
            .unwrap()
            .unwrap();
        assert_eq!(found[&web], []);
        // Others' directories wake nobody: the next answer is the unit's.
        fs::create_dir_all(dir.path().join("system.slice/other.service")).unwrap();
        fs::create_dir(&unit).unwrap();
        let found = tokio::time::timeout(deadline, watch.changed())
            .await
            .unwrap()
            .unwrap();
        assert_eq!(found[&web][0].cgroup.id, inode(&unit));
    }
}
