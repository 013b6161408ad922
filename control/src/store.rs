//! The durable map behind the writer: sled, and the only file that names it. A commit is one batch and one
//! flush; what was answered survives a kill. What can not be opened is moved aside, never deleted at once, and
//! the newest good export takes its place under a new epoch.

use std::fs;
use std::io::ErrorKind;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::catalogue::draft::Op;
use crate::catalogue::items::{Item, META_KEY, Meta};
use crate::catalogue::{Catalogue, items};
use crate::{export, restore};

/// Bytes that sled keeps of its files in memory: the catalogue itself is in memory anyway.
const CACHE: u64 = 16 * 1024 * 1024;
/// How long to wait for the lock of the files, and between looks at it.
const LOCK_MAX: Duration = Duration::from_secs(2);
const LOCK_RETRY: Duration = Duration::from_millis(20);
/// Broken stores that are kept for inspection.
const BROKEN_KEPT: usize = 2;
const DIRECTORY: &str = "store";
const BROKEN: &str = "store.broken-";

#[derive(Debug, thiserror::Error)]
pub(crate) enum StoreError {
    #[error("another mesh-control has the store {path}; end it, or name another --state-dir")]
    Busy { path: String },
    #[error(
        "cannot open the store {path}: {cause}; it must belong to the user that runs mesh-control"
    )]
    Denied { path: String, cause: std::io::Error },
    #[error("cannot open the store {path}: {cause}")]
    Unreadable { path: String, cause: String },
    #[error("cannot commit to the store: {0}")]
    Commit(String),
    #[error("the store is at revision {found}, the writer expected {expected}: two writers?")]
    Raced { expected: u64, found: u64 },
    #[error(
        "{0} has no store and no export; run `mesh-control init`, or `mesh-control restore` with a backup"
    )]
    Missing(String),
    #[error(transparent)]
    Export(#[from] export::ExportError),
}

#[derive(Debug)]
pub(crate) struct Store {
    db: sled::Db,
    revision: u64,
}

/// A store that was opened, with all that was in it.
#[derive(Debug)]
pub(crate) struct Opened {
    pub store: Store,
    pub catalogue: Catalogue,
    /// What was lost, if the store was broken.
    pub lost: Option<String>,
}

impl Store {
    /// Whether `state` has a store.
    pub(crate) fn exists(state: &Path) -> bool {
        state.join(DIRECTORY).exists()
    }

    /// Makes the store of a new catalogue.
    pub(crate) fn create(state: &Path, catalogue: &Catalogue) -> Result<Self, StoreError> {
        let path = state.join(DIRECTORY);
        let db = open_db(&path)?;
        let mut store = Self { db, revision: 0 };
        let puts = catalogue.items().into_iter();
        let puts: Vec<Op> = puts.map(|(key, value)| Op::Put(key, value)).collect();
        store.write(&puts)?;
        store.revision = catalogue.revision;
        Ok(store)
    }

    /// Opens the store of `state`; falls back to the newest export. `epoch` is for the fallback.
    pub(crate) fn open(state: &Path, epoch: u64) -> Result<Opened, StoreError> {
        let path = state.join(DIRECTORY);
        if !path.exists() && export::newest(state).is_none() {
            return Err(StoreError::Missing(state.display().to_string()));
        }
        let broken = if path.exists() {
            match Self::read(&path) {
                Ok((store, catalogue)) => {
                    return Ok(Opened {
                        store,
                        catalogue,
                        lost: None,
                    });
                }
                Err(StoreError::Unreadable { cause, .. }) => cause,
                Err(other) => return Err(other),
            }
        } else {
            "its directory is gone".to_owned()
        };
        Self::recover(state, &path, epoch, &broken)
    }

    /// Reads what the store of `state` has, and lets go of it.
    pub(crate) fn peek(state: &Path) -> Result<Catalogue, StoreError> {
        Ok(Self::read(&state.join(DIRECTORY))?.1)
    }

    fn read(path: &Path) -> Result<(Self, Catalogue), StoreError> {
        let unreadable = |cause: String| StoreError::Unreadable {
            path: path.display().to_string(),
            cause,
        };
        // sled panics on some broken files instead of answering.
        let read = catch_unwind(AssertUnwindSafe(|| {
            let db = open_db(path)?;
            let items = read_all(&db).map_err(unreadable)?;
            Ok::<_, StoreError>((db, items))
        }));
        let (db, items) = read.map_err(|_| unreadable("sled panicked at open".to_owned()))??;
        let catalogue = Catalogue::load(&items).map_err(|e| unreadable(e.to_string()))?;
        catalogue.allocator().map_err(unreadable)?;
        let revision = catalogue.revision;
        Ok((Self { db, revision }, catalogue))
    }

    fn recover(state: &Path, path: &Path, epoch: u64, broken: &str) -> Result<Opened, StoreError> {
        let unreadable = |cause: String| StoreError::Unreadable {
            path: path.display().to_string(),
            cause,
        };
        let Some((file, catalogue)) = export::newest(state) else {
            return Err(unreadable(format!(
                "{broken}, and there is no whole export; restore a backup with `mesh-control restore`"
            )));
        };
        let renewed =
            restore::renew(catalogue, &[], epoch, crate::clock::now_s()).map_err(unreadable)?;
        let catalogue = renewed.catalogue;
        let aside = Self::set_aside(state)?;
        let store = Self::create(state, &catalogue)?;
        let lost = format!(
            "the store could not be opened ({broken}); {} of revision {} took its place, changes after it are \
             lost, {} join tokens that could have been used were revoked; the broken files are in {}",
            file.display(),
            catalogue.revision,
            renewed.tokens,
            aside.display()
        );
        Ok(Opened {
            store,
            catalogue,
            lost: Some(lost),
        })
    }

    /// Moves the files of a store out of the way and returns where they are.
    pub(crate) fn set_aside(state: &Path) -> Result<PathBuf, StoreError> {
        let path = state.join(DIRECTORY);
        let aside = state.join(format!("{BROKEN}{}", crate::clock::now_ms()));
        if path.exists() {
            fs::rename(&path, &aside).map_err(|e| StoreError::Unreadable {
                path: path.display().to_string(),
                cause: format!("it can not be moved aside: {e}"),
            })?;
        }
        drop_old(state);
        Ok(aside)
    }

    /// Writes one group of changes on top of revision `expected`. Durable when it returns.
    pub(crate) fn commit(
        &mut self,
        expected: u64,
        meta: &Meta,
        ops: &[Op],
    ) -> Result<u64, StoreError> {
        if self.revision != expected {
            return Err(StoreError::Raced {
                expected,
                found: self.revision,
            });
        }
        let mut all = ops.to_vec();
        all.push(Op::Put(META_KEY.to_owned(), items::encode(meta)));
        self.write(&all)?;
        self.revision = meta.revision;
        Ok(self.revision)
    }

    fn write(&self, ops: &[Op]) -> Result<(), StoreError> {
        let commit = |e: sled::Error| StoreError::Commit(e.to_string());
        let mut batch = sled::Batch::default();
        for op in ops {
            match op {
                Op::Put(key, value) => batch.insert(key.as_bytes(), value.as_slice()),
                Op::Remove(key) => batch.remove(key.as_bytes()),
            }
        }
        self.db.apply_batch(batch).map_err(commit)?;
        self.db.flush().map_err(commit)?;
        Ok(())
    }

    /// Bytes on disk, for metrics.
    pub(crate) fn size(&self) -> u64 {
        self.db.size_on_disk().unwrap_or(0)
    }
}

/// Opens the files. Whoever held them a moment ago, a control that is being restarted, may take a little to let
/// go of their lock.
fn open_db(path: &Path) -> Result<sled::Db, StoreError> {
    let give_up = Instant::now() + LOCK_MAX;
    loop {
        let opened = sled::Config::new()
            .path(path)
            .cache_capacity(CACHE)
            .mode(sled::Mode::LowSpace)
            // Every commit flushes itself.
            .flush_every_ms(None)
            .open();
        let error = match opened {
            Ok(db) => return Ok(db),
            Err(error) => error,
        };
        let cause = error.to_string();
        let path = path.display().to_string();
        match error {
            // The lock of another process, or permissions: nothing is broken.
            sled::Error::Io(io) if !is_content(io.kind()) => {
                if give_up <= Instant::now() {
                    return Err(if is_lock(&io) {
                        StoreError::Busy { path }
                    } else {
                        StoreError::Denied { path, cause: io }
                    });
                }
                std::thread::sleep(LOCK_RETRY);
            }
            _ => return Err(StoreError::Unreadable { path, cause }),
        }
    }
}

/// Whether somebody else has the files. sled tells that by its text alone.
fn is_lock(error: &std::io::Error) -> bool {
    error.kind() == ErrorKind::WouldBlock || error.to_string().contains("could not acquire lock")
}

/// Whether an error speaks of what is in the files.
fn is_content(kind: ErrorKind) -> bool {
    matches!(
        kind,
        ErrorKind::UnexpectedEof | ErrorKind::InvalidData | ErrorKind::InvalidInput
    )
}

fn read_all(db: &sled::Db) -> Result<Vec<Item>, String> {
    let items = db.iter().map(|item| {
        let (key, value) = item.map_err(|e| e.to_string())?;
        let key = String::from_utf8(key.to_vec()).map_err(|_| "a key is no text".to_owned())?;
        Ok((key, value.to_vec()))
    });
    items.collect()
}

/// Broken stores beyond the newest few go: space is bounded.
fn drop_old(state: &Path) {
    let entries = fs::read_dir(state).into_iter().flatten().flatten();
    let paths = entries.map(|e| e.path());
    let is_broken = |p: &PathBuf| {
        let name = p.file_name().and_then(|n| n.to_str());
        name.is_some_and(|n| n.starts_with(BROKEN))
    };
    let mut broken: Vec<PathBuf> = paths.filter(is_broken).collect();
    broken.sort();
    let spare = broken.len().saturating_sub(BROKEN_KEPT);
    for old in broken.drain(..spare) {
        if let Err(error) = fs::remove_dir_all(&old) {
            log::warn!("cannot remove {}: {error}", old.display());
        }
    }
}

#[cfg(test)]
mod tests;
