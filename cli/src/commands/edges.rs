//! `meshctl edges`: who really calls what, with which identity or in plaintext, and since when.

use http::Method;
use serde_json::Value;

use super::{items, text};
use crate::args::Edges;
use crate::client::{Ask, Client};
use crate::failure::Failure;
use crate::output;
use crate::table::Table;

pub(crate) async fn run(client: &Client, edges: &Edges) -> Result<(), Failure> {
    let answer = client
        .json(&Ask {
            operation: "get",
            object: "edges",
            method: Method::GET,
            path: &path(edges)?,
            body: None,
        })
        .await?;
    output::show(&answer, edges.output, table)?;
    for proposal in list(&answer, "/proposals") {
        output::note(&format!(
            "{} port {} saw no plaintext caller since {}: `transport: strict` would refuse nobody",
            text(proposal, "/service"),
            text(proposal, "/port"),
            text(proposal, "/since")
        ));
    }
    for host in list(&answer, "/overflowed") {
        output::note(&format!(
            "host {} has more callers than can be told apart: the list is not whole",
            super::plain(host)
        ));
    }
    Ok(())
}

fn list<'a>(answer: &'a Value, pointer: &str) -> &'a [Value] {
    let list = answer.pointer(pointer).and_then(Value::as_array);
    list.map_or(&[], Vec::as_slice)
}

fn path(edges: &Edges) -> Result<String, Failure> {
    let mut query = Vec::new();
    for (key, value) in [("service", &edges.service), ("namespace", &edges.namespace)] {
        let Some(value) = value else { continue };
        let plain = |c: char| c.is_ascii_alphanumeric() || "-/".contains(c);
        if !value.chars().all(plain) {
            let cause = "it has characters that no name has";
            return Err(Failure::usage(
                "ask about",
                value,
                cause,
                "correct the name",
            ));
        }
        query.push(format!("{key}={value}"));
    }
    if edges.plaintext {
        query.push("plaintext=true".to_owned());
    }
    let mark = if query.is_empty() { "" } else { "?" };
    Ok(format!("/v1/edges{mark}{}", query.join("&")))
}

fn table(answer: &Value) -> String {
    let mut table = Table::new(&[
        "SERVICE", "PORT", "CALLER", "TLS", "VERDICT", "CALLS", "SINCE", "LAST", "HOSTS",
    ]);
    for edge in items(answer) {
        table.row(vec![
            text(edge, "/service"),
            text(edge, "/port"),
            text(edge, "/caller"),
            text(edge, "/tls"),
            text(edge, "/verdict"),
            text(edge, "/calls"),
            text(edge, "/since"),
            text(edge, "/last"),
            text(edge, "/hosts"),
        ]);
    }
    table.render()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::args::Format;

    #[test]
    fn what_is_asked_is_asked_of_control() {
        let edges = |service: Option<&str>, plaintext| Edges {
            service: service.map(str::to_owned),
            namespace: None,
            plaintext,
            output: Format::Table,
        };
        assert_eq!(path(&edges(None, false)).unwrap(), "/v1/edges");
        assert_eq!(
            path(&edges(Some("shop/web"), true)).unwrap(),
            "/v1/edges?service=shop/web&plaintext=true"
        );
        assert!(path(&edges(Some("a&b"), false)).is_err());
    }

    #[test]
    fn an_edge_is_a_line() {
        let answer = json!({"items": [{"service": "shop/web", "port": 80, "caller": "10.0.0.5",
            "tls": "plaintext", "verdict": "audited", "calls": 3, "since": "2026-01-01T00:00:00Z",
            "last": "2026-01-02T00:00:00Z", "hosts": ["vm-1", "vm-2"]}]});
        let page = table(&answer);
        let line = page.lines().nth(1).unwrap_or_default();
        let words: Vec<&str> = line.split_whitespace().collect();
        assert_eq!(
            words[..6],
            ["shop/web", "80", "10.0.0.5", "plaintext", "audited", "3"]
        );
        assert!(line.ends_with("vm-1,vm-2"), "{line}");
    }
}
