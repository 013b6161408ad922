//! The catalogue as a file: JSON lines, the first says what it is, the last has the SHA-256 of all before it.
//! Exports are what a broken store is restored from, and what `backup` hands out. They hold no private key;
//! secrets are in them as hashes.

use std::fs;
use std::path::{Path, PathBuf};

use mesh_runtime::files::{self, FileError};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::catalogue::Catalogue;
use crate::catalogue::items::{Item, LoadError};
use crate::catalogue::objects::Digest;

/// Exports that are kept.
pub(crate) const KEPT: usize = 5;
/// Largest export that is read, in bytes: the largest catalogue has about 100 MiB.
const EXPORT_MAX: u64 = 1024 * 1024 * 1024;
const DIRECTORY: &str = "exports";
const FORMAT: &str = "meshwork export 1";

#[derive(Debug, thiserror::Error)]
pub(crate) enum ExportError {
    #[error(transparent)]
    File(#[from] FileError),
    #[error("{path} is no whole export: {cause}; use another one")]
    Broken { path: String, cause: String },
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Head {
    format: String,
    trust_domain: String,
    epoch: u64,
    revision: u64,
}

#[derive(Serialize)]
struct LineOut<'a> {
    key: &'a str,
    value: &'a RawValue,
}

#[derive(Deserialize)]
struct LineIn {
    key: String,
    value: Box<RawValue>,
}

#[derive(Serialize, Deserialize)]
struct Foot {
    items: usize,
    sha256: String,
}

/// The catalogue as the text of an export.
pub(crate) fn render(catalogue: &Catalogue) -> Result<String, serde_json::Error> {
    let head = Head {
        format: FORMAT.to_owned(),
        trust_domain: catalogue.settings.trust_domain.to_string(),
        epoch: catalogue.epoch,
        revision: catalogue.revision,
    };
    let mut text = serde_json::to_string(&head)? + "\n";
    let items = catalogue.items();
    for (key, value) in &items {
        let value: &RawValue = serde_json::from_slice(value)?;
        text += &serde_json::to_string(&LineOut { key, value })?;
        text.push('\n');
    }
    let foot = Foot {
        items: items.len(),
        sha256: Digest::of(text.as_bytes()).to_string(),
    };
    text += &serde_json::to_string(&foot)?;
    text.push('\n');
    Ok(text)
}

/// Reads the text of an export.
pub(crate) fn parse(text: &str) -> Result<Catalogue, String> {
    let body_end = text
        .trim_end()
        .rfind('\n')
        .ok_or("it has no checksum line; it is truncated")?
        + 1;
    let (body, foot) = text.split_at(body_end);
    let foot: Foot = serde_json::from_str(foot.trim())
        .map_err(|_| "its last line is no checksum; it is truncated")?;
    if Digest::of(body.as_bytes()).to_string() != foot.sha256 {
        return Err("its checksum is wrong; it was changed or damaged".to_owned());
    }
    let mut lines = body.lines();
    let head: Head = serde_json::from_str(lines.next().unwrap_or_default())
        .map_err(|e| format!("its first line is no head: {e}"))?;
    if head.format != FORMAT {
        return Err(format!("its format is `{}`, not `{FORMAT}`", head.format));
    }
    let items = lines.map(|line| {
        let line: LineIn = serde_json::from_str(line).map_err(|e| e.to_string())?;
        Ok((line.key, line.value.get().as_bytes().to_vec()))
    });
    let items = items.collect::<Result<Vec<Item>, String>>()?;
    Catalogue::load(&items).map_err(|e: LoadError| e.to_string())
}

/// Reads an export file.
pub(crate) fn read(path: &Path) -> Result<Catalogue, ExportError> {
    let broken = |cause: String| ExportError::Broken {
        path: path.display().to_string(),
        cause,
    };
    let bytes = files::read_bounded(path, EXPORT_MAX)?;
    let text = String::from_utf8(bytes).map_err(|_| broken("it is no text".to_owned()))?;
    parse(&text).map_err(broken)
}

/// Writes an export beside the store and drops the oldest ones.
pub(crate) fn write(state: &Path, catalogue: &Catalogue) -> Result<(), ExportError> {
    let directory = state.join(DIRECTORY);
    files::create_private_dir(&directory)?;
    // The epoch tells what a restored store writes from what was there before at the same revision.
    let name = format!(
        "{:020}-{:020}-{:020}.jsonl",
        crate::clock::now_ms(),
        catalogue.epoch,
        catalogue.revision
    );
    let path = directory.join(name);
    let text = render(catalogue).map_err(|e| ExportError::Broken {
        path: path.display().to_string(),
        cause: e.to_string(),
    })?;
    files::write_private(&path, text.as_bytes())?;
    let all = list(state);
    for old in all.iter().rev().skip(KEPT) {
        if let Err(error) = fs::remove_file(old) {
            log::warn!("cannot remove {}: {error}", old.display());
        }
    }
    Ok(())
}

/// The newest export that is whole.
pub(crate) fn newest(state: &Path) -> Option<(PathBuf, Catalogue)> {
    list(state)
        .into_iter()
        .rev()
        .find_map(|path| match read(&path) {
            Ok(catalogue) => Some((path, catalogue)),
            Err(error) => {
                log::warn!("skipping an export: {error}");
                None
            }
        })
}

/// All exports that are whole.
pub(crate) fn all(state: &Path) -> impl Iterator<Item = Catalogue> {
    list(state).into_iter().filter_map(|path| read(&path).ok())
}

/// Epoch and revision of the newest file, as its name says.
pub(crate) fn last(state: &Path) -> Option<(u64, u64)> {
    let newest = list(state).pop()?;
    let mut parts = newest.file_stem()?.to_str()?.split('-').skip(1);
    let mut number = || parts.next()?.parse().ok();
    Some((number()?, number()?))
}

/// The exports of `state`, oldest first.
fn list(state: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(state.join(DIRECTORY));
    let entries = entries.into_iter().flatten().flatten().map(|e| e.path());
    let mut all: Vec<PathBuf> = entries
        .filter(|p| p.extension().is_some_and(|e| e == "jsonl"))
        .collect();
    all.sort();
    all
}
