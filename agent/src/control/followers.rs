//! Workers that others have taken over from, and which bundle each of them judges by: a bundle is in use when all of this
//! host's processes use it. Each keeps a file, locked for as long as it lives, so that one that was killed is waited for by nobody.

use std::fs::{self, File, TryLockError};
use std::io;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use mesh_api::proto;
use mesh_runtime::files;

use super::Shell;
use super::keep::Persisted;

/// The file of one, with the bundle's number, eight bytes in network order.
#[derive(Debug)]
pub(super) struct Follower {
    file: File,
    path: PathBuf,
    bundle: u64,
}

impl Follower {
    /// From here on whoever asks is told of us.
    pub(super) fn begin(directory: &Path, bundle: u64) -> anyhow::Result<Self> {
        files::create_private_dir(directory)?;
        let id = std::process::id();
        let path = directory.join(id.to_string());
        // It is seen when it is locked: before that it would look as if its process had ended.
        let unseen = directory.join(format!("new-{id}"));
        let begin = || {
            let mut options = File::options();
            let file = options.create(true).write(true).truncate(false).mode(0o600);
            let file = file.open(&unseen)?;
            file.lock()?;
            file.write_all_at(&bundle.to_be_bytes(), 0)?;
            fs::rename(&unseen, &path)?;
            io::Result::Ok(file)
        };
        let file = begin().with_context(|| format!("cannot write {}", path.display()))?;
        Ok(Self { file, path, bundle })
    }

    pub(super) fn uses(&mut self, bundle: u64) -> io::Result<()> {
        if self.bundle != bundle {
            self.file.write_all_at(&bundle.to_be_bytes(), 0)?;
            self.bundle = bundle;
        }
        Ok(())
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        // A file that stays is not locked, and so is nobody's.
        let _ = fs::remove_file(&self.path);
    }
}

/// The oldest bundle that one of them uses; `None`: there are none.
pub(super) fn oldest(directory: &Path) -> io::Result<Option<u64>> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        entries => entries?,
    };
    let mut oldest = None;
    for entry in entries {
        let entry = entry?;
        let is_pid = |name: &str| name.parse::<u32>().is_ok();
        if !entry.file_name().to_str().is_some_and(is_pid) {
            continue;
        }
        let file = match File::open(entry.path()) {
            // It ended just now.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            file => file?,
        };
        match file.try_lock_shared() {
            // It was killed.
            Ok(()) => (),
            Err(TryLockError::WouldBlock) => {
                let mut number = [0; 8];
                file.read_exact_at(&mut number, 0)?;
                let number = u64::from_be_bytes(number);
                oldest = Some(oldest.map_or(number, |oldest: u64| oldest.min(number)));
            }
            Err(TryLockError::Error(error)) => return Err(error),
        }
    }
    Ok(oldest)
}

impl Shell {
    /// A bundle is in use when those use it, too, that this worker has taken over from.
    pub(super) fn ack(&mut self, persisted: Persisted) -> proto::Ack {
        let mut ack = persisted.ack(self.mirror.epoch());
        let oldest = self.oldest_bundle();
        self.followed = ack.bundle_number <= oldest;
        ack.bundle_number = ack.bundle_number.min(oldest);
        self.acknowledged = ack.bundle_number;
        ack
    }

    /// Of those that this worker has taken over from. Where that can not be told, what was said last.
    pub(super) fn oldest_bundle(&self) -> u64 {
        match oldest(&self.links.state.followers()) {
            Ok(oldest) => oldest.unwrap_or(u64::MAX),
            Err(error) => {
                if self.followed {
                    log::warn!(
                        "cannot see which bundle workers use that drain: {error}; control is told of no newer one"
                    );
                }
                self.acknowledged
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_of_those_that_live_counts() {
        let directory = std::env::temp_dir().join(format!("followers-{}", std::process::id()));
        assert_eq!(oldest(&directory).unwrap(), None);
        let mut one = Follower::begin(&directory, 3).unwrap();
        assert_eq!(oldest(&directory).unwrap(), Some(3));
        // Another process, which is behind.
        let other = directory.join("1");
        let file = File::create(&other).unwrap();
        file.lock().unwrap();
        file.write_all_at(&2_u64.to_be_bytes(), 0).unwrap();
        one.uses(4).unwrap();
        assert_eq!(oldest(&directory).unwrap(), Some(2));
        drop(file);
        assert_eq!(oldest(&directory).unwrap(), Some(4));
        drop(one);
        assert_eq!(oldest(&directory).unwrap(), None);
        fs::remove_dir_all(&directory).unwrap();
    }
}
