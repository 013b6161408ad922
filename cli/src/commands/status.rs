//! `meshctl status`: how control and the mesh are, one fact a line.

use http::Method;
use serde_json::Value;

use super::{items, plain, text};
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

/// Names are made of plain words and nested ones are joined, so that a newer control's facts show too.
fn facts(table: &mut Table, prefix: &str, value: &Value) {
    let Value::Object(fields) = value else {
        table.row(vec![prefix.to_owned(), plain(value)]);
        return;
    };
    for (name, value) in fields {
        match name.as_str() {
            // Tells restored stores apart, for agents.
            "epoch" => {}
            "hosts" => table.row(vec!["hosts".to_owned(), hosts(value)]),
            "certificates" => {
                for certificate in items(value) {
                    let name = format!("certificate {}", text(certificate, "/name"));
                    table.row(vec![name, life(certificate)]);
                }
            }
            "autonomyHours" => table.row(vec![
                "runs without control".to_owned(),
                format!("{} h", plain(value)),
            ]),
            _ => facts(table, format!("{prefix} {}", words(name)).trim(), value),
        }
    }
}

/// When a certificate ends, and what alarm that gives.
fn life(certificate: &Value) -> String {
    let days = text(certificate, "/daysLeft");
    let ends = format!("ends {}, {days} d left", text(certificate, "/ends"));
    match text(certificate, "/alarm").as_str() {
        "" => ends,
        alarm => format!("{ends}: {alarm}"),
    }
}

/// `live` and `stale` as always, and whatever else is not none.
fn hosts(counts: &Value) -> String {
    let count = |state: &str| counts.get(state).and_then(Value::as_u64).unwrap_or(0);
    let mut text = format!("{} live, {} stale", count("live"), count("stale"));
    if 0 < count("held") {
        text += &format!(
            " ({} held as live: too many fell silent at once)",
            count("held")
        );
    }
    text
}

/// `trustDomain` as `trust domain`.
fn words(name: &str) -> String {
    let mut words = String::new();
    for letter in name.chars() {
        if letter.is_ascii_uppercase() {
            words.push(' ');
        }
        words.push(letter.to_ascii_lowercase());
    }
    words
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn facts_are_said_in_plain_words() {
        let mut table = Table::new(&["FACT", "VALUE"]);
        let status = json!({
            "hosts": {"live": 2, "stale": 0, "held": 0},
            "epoch": "123",
            "ca": {"rootPin": "ab"},
            "version": "0.1.0",
            "certificates": [
                {"name": "root", "ends": "2036-11-20T00:00:00Z", "daysLeft": 3650, "alarm": null},
                {"name": "issuer", "ends": "2026-12-01T00:00:00Z", "daysLeft": 8, "alarm": "act"},
            ],
        });
        facts(&mut table, "", &status);
        let page = table.render();
        let lines: Vec<String> = page
            .lines()
            .map(|l| l.split_whitespace().collect::<Vec<_>>().join(" "))
            .collect();
        for line in [
            "hosts 2 live, 0 stale",
            "ca root pin ab",
            "version 0.1.0",
            "certificate root ends 2036-11-20T00:00:00Z, 3650 d left",
            "certificate issuer ends 2026-12-01T00:00:00Z, 8 d left: act",
        ] {
            assert!(lines.iter().any(|l| l == line), "{line}: {page}");
        }
        assert!(!page.contains("epoch"), "{page}");
    }
}
