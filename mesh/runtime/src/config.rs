//! Reading a daemon's TOML configuration: unknown keys are errors with their line.

use std::path::Path;

use serde::de::DeserializeOwned;

use crate::files::{self, FileError};

/// Largest configuration file, in bytes.
pub const CONFIG_MAX: u64 = 1024 * 1024;

/// Why a configuration can not be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error(transparent)]
    File(#[from] FileError),
    #[error("{path}:{line}: {message}; correct the file and start again")]
    Form {
        path: String,
        line: usize,
        message: String,
    },
}

/// Reads `path`. A missing file is an error: the caller decides whether one is needed.
pub fn load<T: DeserializeOwned>(path: &Path) -> Result<T, ConfigError> {
    let content = files::read_bounded(path, CONFIG_MAX)?;
    parse(
        &path.display().to_string(),
        &String::from_utf8_lossy(&content),
    )
}

/// Reads configuration text that came from `path`.
pub fn parse<T: DeserializeOwned>(path: &str, text: &str) -> Result<T, ConfigError> {
    toml::from_str(text).map_err(|error| {
        let start = error.span().map_or(0, |span| span.start);
        let line = text
            .as_bytes()
            .iter()
            .take(start)
            .filter(|b| **b == b'\n')
            .count()
            + 1;
        // The numbers of this size are ports.
        let message = (error.message().trim().replace('\n', " "))
            .replace("expected u16", "expected a number from 1 to 65535");
        ConfigError::Form {
            path: path.to_owned(),
            line,
            message,
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, serde::Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Form {
        #[expect(dead_code, reason = "only its reading is tested")]
        listen: String,
        #[serde(default)]
        #[expect(dead_code, reason = "only its reading is tested")]
        port: u16,
    }

    #[test]
    fn an_unknown_key_is_named_with_its_line() {
        let error = parse::<Form>("agent.toml", "listen = \"a\"\nlisten_on = 1\n").unwrap_err();
        let text = error.to_string();
        assert!(
            text.starts_with("agent.toml:2: ") && text.contains("listen_on"),
            "{text}"
        );
    }

    #[test]
    fn what_is_no_port_is_told_what_ports_are() {
        for value in ["\"x\"", "70000", "-1"] {
            let text = format!("listen = \"a\"\nport = {value}\n");
            let error = parse::<Form>("agent.toml", &text).unwrap_err().to_string();
            assert!(error.contains("from 1 to 65535"), "{error}");
        }
    }
}
