//! Files that must be whole, and private where they hold keys.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

/// A file operation that failed, with what it was about.
#[derive(Debug, thiserror::Error)]
#[error("cannot {operation} {path}: {cause}")]
pub struct FileError {
    pub operation: &'static str,
    pub path: String,
    /// Part of the text above, so not told again as its source.
    pub cause: io::Error,
}

fn fault<'a>(operation: &'static str, path: &'a Path) -> impl Fn(io::Error) -> FileError + 'a {
    move |cause| FileError {
        operation,
        path: path.display().to_string(),
        cause,
    }
}

/// Writes `path` so that a reader or a crash sees the old content or the new one, never a part. Mode 0644.
pub fn write_atomic(path: &Path, content: &[u8]) -> Result<(), FileError> {
    replace(path, content, 0o644)
}

/// As [`write_atomic`], readable by the owner only from its first byte on (0600).
pub fn write_private(path: &Path, content: &[u8]) -> Result<(), FileError> {
    replace(path, content, 0o600)
}

fn replace(path: &Path, content: &[u8], mode: u32) -> Result<(), FileError> {
    let directory = path
        .parent()
        .filter(|d| !d.as_os_str().is_empty())
        .unwrap_or_else(|| Path::new("."));
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".new-{}", std::process::id()));
    let temporary: PathBuf = directory.join(name);
    // What an earlier process of the same number left behind has its mode, not ours.
    let _ = fs::remove_file(&temporary);
    let written = (|| {
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(mode)
            .open(&temporary)?;
        file.write_all(content)?;
        file.sync_all()?;
        fs::rename(&temporary, path)?;
        File::open(directory)?.sync_all()
    })();
    written.map_err(|error| {
        let _ = fs::remove_file(&temporary);
        fault("write", path)(error)
    })
}

/// Reads a file of at most `max` bytes.
pub fn read_bounded(path: &Path, max: u64) -> Result<Vec<u8>, FileError> {
    let read = || {
        let mut content = Vec::new();
        File::open(path)?.take(max + 1).read_to_end(&mut content)?;
        if content.len() as u64 > max {
            let message = format!("it is larger than {max} bytes");
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, message));
        }
        Ok(content)
    };
    read().map_err(fault("read", path))
}

/// Makes a directory and its parents, open to the owner only (0700).
pub fn create_private_dir(path: &Path) -> Result<(), FileError> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(fault("create", path))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    #[test]
    fn private_files_are_private_and_whole() {
        let directory = std::env::temp_dir().join(format!("meshwork-files-{}", std::process::id()));
        create_private_dir(&directory).unwrap();
        let path = directory.join("key.pem");
        write_private(&path, b"one").unwrap();
        write_private(&path, b"two").unwrap();
        assert_eq!(read_bounded(&path, 3).unwrap(), b"two");
        assert!(
            read_bounded(&path, 2)
                .unwrap_err()
                .to_string()
                .contains("larger than 2")
        );
        assert_eq!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600
        );
        assert_eq!(fs::read_dir(&directory).unwrap().count(), 1);
        fs::remove_dir_all(&directory).unwrap();
    }
}
