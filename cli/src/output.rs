//! Writing to the terminal. A reader that went away (`| head`) is no error.

use std::io::Write as _;

use serde_json::Value;

use crate::args::Format;
use crate::failure::Failure;

/// Writes `text` to stdout as it is.
pub(crate) fn print(text: &str) {
    let mut stdout = std::io::stdout().lock();
    let written = stdout.write_all(text.as_bytes());
    drop(written.and_then(|()| stdout.flush()));
}

/// Facts beside the result: to stderr, so that stdout can be piped.
pub(crate) fn note(text: &str) {
    drop(writeln!(std::io::stderr().lock(), "{text}"));
}

/// What control warns of: said, and no failure.
pub(crate) fn warnings(object: &str, answer: &Value) {
    let warnings = answer.get("warnings").and_then(Value::as_array);
    for warning in warnings.into_iter().flatten().filter_map(Value::as_str) {
        note(&format!("warning: {object}: {warning}"));
    }
}

pub(crate) fn error(text: &str) {
    note(&format!("meshctl: {text}"));
}

/// Prints `value` as asked; `table` makes the table form.
pub(crate) fn show(
    value: &Value,
    format: Format,
    table: impl FnOnce(&Value) -> String,
) -> Result<(), Failure> {
    let bad = |error: &dyn std::fmt::Display| {
        Failure::local("write", "the answer", error, "use another -o")
    };
    let text = match format {
        Format::Table => table(value),
        Format::Json => serde_json::to_string_pretty(value).map_err(|e| bad(&e))? + "\n",
        Format::Yaml => serde_norway::to_string(value).map_err(|e| bad(&e))?,
    };
    print(&text);
    Ok(())
}
