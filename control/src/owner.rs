//! Whose the state directory is. Root may do what needs a stopped control, and what it makes there must be the
//! daemon's all the same.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, lchown};
use std::path::Path;

use anyhow::Context as _;

/// Does `work` on a state directory; what is in it then belongs to the directory's owner, whether it went well or not.
pub(crate) fn kept<T>(state: &Path, work: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<T> {
    // One that is not there yet becomes ours as a whole: systemd gives it to the daemon at its first start.
    let owner = fs::symlink_metadata(state).map(|facts| (facts.uid(), facts.gid()));
    let done = work();
    if let Ok(owner) = owner
        && nix::unistd::geteuid().is_root()
    {
        give(state, owner).with_context(|| {
            format!(
                "not all of {} belongs to its owner; `chown -R {}:{}` it before control starts",
                state.display(),
                owner.0,
                owner.1
            )
        })?;
    }
    done
}

/// No link is followed: what it leads to is not the directory's.
fn give(path: &Path, owner: (u32, u32)) -> std::io::Result<()> {
    let facts = fs::symlink_metadata(path)?;
    if (facts.uid(), facts.gid()) != owner {
        lchown(path, Some(owner.0), Some(owner.1))?;
    }
    if facts.is_dir() {
        for entry in fs::read_dir(path)? {
            give(&entry?.path(), owner)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_root_makes_belongs_to_the_owner_of_the_directory() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let state = std::env::temp_dir().join(format!("meshwork-owner-{}", std::process::id()));
        let outside = state.with_extension("outside");
        fs::create_dir(&state).unwrap();
        fs::write(&outside, "").unwrap();
        lchown(&state, Some(65_534), Some(65_534)).unwrap();
        let failed: anyhow::Result<()> = kept(&state, || {
            fs::create_dir(state.join("store"))?;
            fs::write(state.join("store/db"), "")?;
            std::os::unix::fs::symlink(&outside, state.join("link"))?;
            anyhow::bail!("half of it")
        });
        assert_eq!(failed.unwrap_err().to_string(), "half of it");
        for name in ["store", "store/db", "link"] {
            let facts = fs::symlink_metadata(state.join(name)).unwrap();
            assert_eq!((facts.uid(), facts.gid()), (65_534, 65_534), "{name}");
        }
        assert_eq!(fs::metadata(&outside).unwrap().uid(), 0);
        fs::remove_dir_all(&state).unwrap();
        fs::remove_file(&outside).unwrap();
    }
}
