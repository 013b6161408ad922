//! `meshctl status`: how control and the mesh are, one fact a line.

use http::Method;
use serde_json::Value;

use super::plain;
use crate::args::Format;
use crate::client::{Ask, Client};
use crate::failure::Failure;
use crate::output;
use crate::table::Table;

pub(crate) async fn run(client: &Client, format: Format) -> Result<(), Failure> {
    let answer = client
        .json(&Ask {
            operation: "get",
            object: "the status of control",
            method: Method::GET,
            path: "/v1/status",
            body: None,
        })
        .await?;
    output::show(&answer, format, |value| {
        let mut table = Table::new(&["FACT", "VALUE"]);
        facts(&mut table, "", value);
        table.render()
    })
}

/// Nested objects become dotted names, so that a newer control's facts show too.
fn facts(table: &mut Table, prefix: &str, value: &Value) {
    match value {
        Value::Object(fields) => {
            for (name, value) in fields {
                let dot = if prefix.is_empty() { "" } else { "." };
                facts(table, &format!("{prefix}{dot}{name}"), value);
            }
        }
        other => table.row(vec![prefix.to_owned(), plain(other)]),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn nested_facts_have_dotted_names() {
        let mut table = Table::new(&["FACT", "VALUE"]);
        facts(
            &mut table,
            "",
            &json!({"hosts": {"live": 3}, "version": "0.1.0"}),
        );
        assert_eq!(
            table.render(),
            "FACT        VALUE\nhosts.live  3\nversion     0.1.0\n"
        );
    }
}
