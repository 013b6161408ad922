//! Follows the directories of owners: inotify on every directory in which one may appear.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::io;
use std::path::{Path, PathBuf};

use inotify::{EventMask, Inotify, WatchDescriptor, WatchMask};
use tokio::io::unix::AsyncFd;

use super::{CgroupError, CgroupTree, Directory, OwnerPath, is_gone};

/// Room for some hundred events; more stay queued in the kernel.
const EVENT_BYTES: usize = 16 * 1024;
/// While watches are set up, directories may come; a tree that changes faster than this is looked at again at the next
/// event.
const SETTLE_ROUNDS: usize = 8;

/// The directories of each owner.
pub(crate) type Resolved = BTreeMap<OwnerPath, Vec<Directory>>;

/// Tells when an owner's directories change.
#[derive(Debug)]
pub(crate) struct CgroupWatch {
    tree: CgroupTree,
    events: AsyncFd<Inotify>,
    owners: Vec<OwnerPath>,
    watched: BTreeMap<PathBuf, WatchDescriptor>,
    resolved: Resolved,
}

impl CgroupWatch {
    /// Must be called on a tokio runtime.
    pub(crate) fn new(tree: CgroupTree) -> Result<Self, CgroupError> {
        let events = Inotify::init()
            .and_then(register)
            .map_err(|source| CgroupError::Watch {
                path: tree.root().to_owned(),
                source,
            })?;
        Ok(Self {
            tree,
            events,
            owners: Vec::new(),
            watched: BTreeMap::new(),
            resolved: BTreeMap::new(),
        })
    }

    /// Follows these owners from now on, instead of those before, and says where they are.
    pub(crate) fn follow(&mut self, owners: Vec<OwnerPath>) -> Result<&Resolved, CgroupError> {
        self.owners = owners;
        self.resolved = self.look()?;
        Ok(&self.resolved)
    }

    /// Waits until an owner's directories are others than those last told. Cancel safe.
    pub(crate) async fn changed(&mut self) -> Result<&Resolved, CgroupError> {
        loop {
            if self.relevant_event().await? {
                let found = self.look()?;
                if found != self.resolved {
                    self.resolved = found;
                    return Ok(&self.resolved);
                }
            }
        }
    }

    /// Takes what inotify has and says whether it can concern an owner.
    async fn relevant_event(&mut self) -> Result<bool, CgroupError> {
        let Self {
            events,
            owners,
            tree,
            ..
        } = self;
        let failed = |source| CgroupError::Watch {
            path: tree.root().to_owned(),
            source,
        };
        let mut ready = events.readable_mut().await.map_err(failed)?;
        let mut buffer = [0; EVENT_BYTES];
        let outcome = ready.try_io(|fd| {
            let events = fd.get_mut().read_events(&mut buffer)?;
            // Every event is looked at: the iterator must be run to its end.
            Ok(events.fold(false, |relevant, event| {
                relevant
                    || event.mask.contains(EventMask::Q_OVERFLOW)
                    || event.name.is_some_and(|name| concerns(owners, name))
            }))
        });
        match outcome {
            Ok(relevant) => relevant.map_err(failed),
            Err(_not_ready) => Ok(false),
        }
    }

    /// Watches what has to be watched and resolves all owners, until nothing new was found to watch.
    fn look(&mut self) -> Result<Resolved, CgroupError> {
        let mut resolved = Resolved::new();
        for _ in 0..SETTLE_ROUNDS {
            let added = self.watch_parents()?;
            resolved = self
                .owners
                .iter()
                .map(|owner| Ok((owner.clone(), self.tree.resolve(owner)?)))
                .collect::<Result<_, CgroupError>>()?;
            if !added {
                break;
            }
        }
        Ok(resolved)
    }

    /// Sets and drops watches. True if one was added, so that something may have come before it stood.
    fn watch_parents(&mut self) -> Result<bool, CgroupError> {
        let mut wanted = BTreeSet::new();
        for owner in &self.owners {
            match owner {
                OwnerPath::Unit(_) => wanted.extend(self.tree.slices()?),
                OwnerPath::Cgroup(path) => {
                    wanted.extend(path.ancestors().skip(1).map(Path::to_owned))
                }
            }
        }
        let mut watches = self.events.get_ref().watches();
        self.watched.retain(|path, descriptor| {
            let keep = wanted.contains(path) && self.tree.root().join(path).is_dir();
            if !keep {
                // The kernel has dropped it already where the directory is gone.
                let _ = watches.remove(descriptor.clone());
            }
            keep
        });
        let mask = WatchMask::CREATE
            | WatchMask::DELETE
            | WatchMask::MOVED_FROM
            | WatchMask::MOVED_TO
            | WatchMask::ONLYDIR;
        let mut added = false;
        for path in wanted {
            let full = self.tree.root().join(&path);
            // Asked again also for known ones: the same path may be another directory by now.
            match watches.add(&full, mask) {
                Ok(descriptor) => {
                    added |= self.watched.insert(path, descriptor.clone()) != Some(descriptor);
                }
                Err(source) if is_gone(&source) => {}
                Err(source) => return Err(CgroupError::Watch { path: full, source }),
            }
        }
        Ok(added)
    }
}

/// Whether a name that came or went is an owner's, or that of a directory above one.
fn concerns(owners: &[OwnerPath], name: &OsStr) -> bool {
    owners.iter().any(|owner| match owner {
        OwnerPath::Unit(unit) => {
            name == OsStr::new(unit) || name.to_str().is_some_and(|n| n.ends_with(".slice"))
        }
        OwnerPath::Cgroup(path) => path.iter().any(|part| part == name),
    })
}

#[expect(unsafe_code, reason = "tokio wants a promise about the descriptor")]
fn register(inotify: Inotify) -> io::Result<AsyncFd<Inotify>> {
    // SAFETY: an `Inotify` keeps one descriptor from its making to its end, and it is only used through the `AsyncFd`.
    unsafe { AsyncFd::register(inotify) }.map_err(io::Error::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_on_the_way_to_an_owner_matter() {
        let owners = [
            OwnerPath::Unit("web.service".to_owned()),
            OwnerPath::Cgroup("jobs/batch/one".into()),
        ];
        for (name, expected) in [
            ("web.service", true),
            ("system-x.slice", true),
            ("batch", true),
            ("other.service", false),
        ] {
            assert_eq!(concerns(&owners, OsStr::new(name)), expected, "{name}");
        }
    }
}
