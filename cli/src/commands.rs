//! One file a command; what they share.

pub(crate) mod authz;
pub(crate) mod backup;
pub(crate) mod check;
pub(crate) mod edges;
mod find;
pub(crate) mod get;
pub(crate) mod revoke;
pub(crate) mod status;
pub(crate) mod token;
pub(crate) mod write;

use serde_json::Value;

/// The namespace of the path of objects that are in none.
pub(crate) const NO_NAMESPACE: &str = "-";

/// The items of a list, whether it came as an array or as `{items: …}`.
pub(crate) fn items(list: &Value) -> &[Value] {
    let array = list.as_array().or_else(|| list.get("items")?.as_array());
    array.map_or(&[], Vec::as_slice)
}

/// The field at a JSON pointer as one short text; lists are joined by commas.
pub(crate) fn text(value: &Value, pointer: &str) -> String {
    value.pointer(pointer).map(plain).unwrap_or_default()
}

/// Any value as one short text.
pub(crate) fn plain(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        Value::Array(list) => list.iter().map(plain).collect::<Vec<_>>().join(","),
        other => other.to_string(),
    }
}
