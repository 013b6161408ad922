//! The context file: where control is, which root to trust, and who the operator is. `mesh-control init`
//! writes the first one.

use std::fmt;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::failure::Failure;

/// Largest context file we read, in bytes: certificates and a token take 4 KiB.
const FILE_MAX: u64 = 64 * 1024;
/// Where the packages put it.
const SYSTEM: &str = "/etc/meshwork/admin.yaml";

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(crate) struct Context {
    /// `host:port` of each control, tried in turn.
    pub addresses: Vec<String>,
    /// PEM of the root that control must stand under. No other is trusted.
    pub root: String,
    /// The bearer token.
    pub token: String,
    /// A client certificate for other tools; meshctl uses the token.
    #[serde(default, rename = "certificate")]
    _certificate: Option<String>,
    #[serde(default, rename = "key")]
    _key: Option<String>,
}

impl fmt::Debug for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Context")
            .field("addresses", &self.addresses)
            .finish_non_exhaustive()
    }
}

impl Context {
    /// Reads `file`, else the first of the known places.
    pub(crate) fn load(file: Option<&Path>) -> Result<Self, Failure> {
        let path = match file {
            Some(path) => path.to_owned(),
            None => first_known()?,
        };
        let bad = |cause: &dyn fmt::Display| {
            Failure::usage(
                "read",
                path.display(),
                cause,
                "name the admin.yaml that `mesh-control init` wrote with --context or MESHCTL_CONTEXT",
            )
        };
        let facts = std::fs::metadata(&path).map_err(|e| bad(&e))?;
        if FILE_MAX < facts.len() {
            return Err(bad(&format!("it is larger than {FILE_MAX} bytes")));
        }
        if facts.mode() & 0o077 != 0 {
            return Err(Failure::usage(
                "use",
                path.display(),
                "it holds a credential and others may read it",
                "make it private (chmod 600) and, if others could log in, make a new credential",
            ));
        }
        let text = std::fs::read_to_string(&path).map_err(|e| bad(&e))?;
        let not_one = |cause: String| bad(&format!("it is no context file: {cause}"));
        let value: serde_json::Value =
            serde_norway::from_str(&text).map_err(|e| not_one(format!("it is not YAML: {e}")))?;
        if !value.is_object() {
            return Err(not_one(
                "it has none of addresses, root and token".to_owned(),
            ));
        }
        let context: Self = serde_json::from_value(value).map_err(|e| not_one(e.to_string()))?;
        if context.addresses.is_empty() {
            return Err(bad(&"`addresses` is empty"));
        }
        Ok(context)
    }
}

fn first_known() -> Result<PathBuf, Failure> {
    let home = std::env::var_os("HOME").map(PathBuf::from);
    let mine = home.map(|home| home.join(".config/meshwork/admin.yaml"));
    let places: Vec<PathBuf> = mine.into_iter().chain([PathBuf::from(SYSTEM)]).collect();
    places.iter().find(|path| path.exists()).cloned().ok_or_else(|| {
        let looked: Vec<String> = places.iter().map(|p| p.display().to_string()).collect();
        Failure::usage(
            "find",
            "the context file",
            format!("none at {}", looked.join(" or ")),
            "name the admin.yaml that `mesh-control init` wrote with --context or MESHCTL_CONTEXT",
        )
    })
}
