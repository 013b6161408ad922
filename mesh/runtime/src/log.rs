//! Log to journald with fields, or to stderr for people and tests.

use std::io::Write as _;
use std::str::FromStr;

use log::kv::{Key, Value, VisitSource};
use log::{LevelFilter, Log, Metadata, Record};

use crate::clock;

/// Where records go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, serde::Deserialize, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Target {
    /// The journal where stderr leads there, as of a unit; else stderr.
    #[default]
    Auto,
    Journald,
    Stderr,
}

/// Starts logging for this process. `level` is one of off, error, warn, info, debug, trace.
///
/// # Errors
/// When the level is none, the journal is not reached, or logging was started before.
pub fn init(level: &str, target: Target) -> Result<(), String> {
    set_level(level)?;
    match target {
        Target::Auto if systemd_journal_logger::connected_to_journal() => {
            init(level, Target::Journald)
        }
        Target::Auto | Target::Stderr => log::set_logger(&Stderr).map_err(|e| e.to_string()),
        Target::Journald => systemd_journal_logger::JournalLog::new()
            .map_err(|e| format!("cannot reach journald: {e}; set log.to = \"stderr\""))?
            .install()
            .map_err(|e| e.to_string()),
    }
}

/// Changes the level while running.
pub fn set_level(level: &str) -> Result<(), String> {
    let level = LevelFilter::from_str(level).map_err(|_| {
        format!("log level `{level}` is not off, error, warn, info, debug or trace")
    })?;
    log::set_max_level(level);
    Ok(())
}

struct Stderr;

struct Fields<'a>(&'a mut String);

impl<'kvs> VisitSource<'kvs> for Fields<'_> {
    fn visit_pair(&mut self, key: Key<'kvs>, value: Value<'kvs>) -> Result<(), log::kv::Error> {
        use std::fmt::Write as _;
        let value = value.to_string();
        // A field that does not apply says nothing.
        if !value.is_empty() {
            let _ = write!(self.0, " {key}={value}");
        }
        Ok(())
    }
}

impl Log for Stderr {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let mut line = format!(
            "{} {} {}: {}",
            clock::rfc3339_ms(clock::now_ms()),
            record.level(),
            record.target(),
            record.args()
        );
        let _ = record.key_values().visit(&mut Fields(&mut line));
        // A peer's text may be in a field: one record stays one line.
        line.retain(|c| !c.is_control());
        line.push('\n');
        // One write a record, so that the lines of two processes do not mix. A closed stderr stops nothing.
        let _ = std::io::stderr().lock().write_all(line.as_bytes());
    }

    fn flush(&self) {}
}
