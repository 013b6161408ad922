//! `meshctl authz`: who may call what, and by which rule.

use http::Method;
use serde_json::Value;

use super::{items, text};
use crate::args::Authz;
use crate::client::{Ask, Client};
use crate::failure::Failure;
use crate::output;
use crate::table::Table;

pub(crate) async fn run(client: &Client, authz: &Authz) -> Result<(), Failure> {
    let object = match &authz.service {
        Some(name) => format!("who may call {name}"),
        None => "who may call what".to_owned(),
    };
    let answer = client
        .json(&Ask {
            operation: "get",
            object: &object,
            method: Method::GET,
            path: &path(authz)?,
            body: None,
        })
        .await?;
    output::show(&answer, authz.output, |value| match &authz.from {
        Some(_) => decisions(value),
        None => rules(value),
    })
}

fn path(authz: &Authz) -> Result<String, Failure> {
    let fields = [
        ("service", &authz.service),
        ("namespace", &authz.namespace),
        ("from", &authz.from),
    ];
    let mut query = Vec::new();
    for (key, value) in fields {
        let Some(value) = value else { continue };
        // Names, colons and slashes need no escape in a query; nothing else is part of a name.
        let plain = |c: char| c.is_ascii_alphanumeric() || "-./:".contains(c);
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
    let mark = if query.is_empty() { "" } else { "?" };
    Ok(format!("/v1/authz{mark}{}", query.join("&")))
}

fn rules(list: &Value) -> String {
    let mut table = Table::new(&["SERVICE", "PORTS", "LEVEL", "RULE", "ENFORCE", "CALLERS"]);
    for item in items(list) {
        let none = item.get("rule").is_none_or(Value::is_null);
        let ports = text(item, "/ports");
        table.row(vec![
            text(item, "/service"),
            if ports.is_empty() {
                "all".to_owned()
            } else {
                ports
            },
            text(item, "/level"),
            text(item, "/rule"),
            text(item, "/enforce"),
            match none {
                true => "nobody: no policy has a rule".to_owned(),
                false => text(item, "/callers").replace(',', ", "),
            },
        ]);
    }
    table.render()
}

fn decisions(list: &Value) -> String {
    let mut table = Table::new(&["SERVICE", "PORT", "FROM", "DECISION", "BY"]);
    for item in items(list) {
        table.row(vec![
            text(item, "/service"),
            text(item, "/port"),
            text(item, "/from"),
            text(item, "/decision"),
            text(item, "/by"),
        ]);
    }
    table.render()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::args::Format;

    fn authz(service: Option<&str>, from: Option<&str>) -> Authz {
        Authz {
            service: service.map(str::to_owned),
            from: from.map(str::to_owned),
            namespace: None,
            output: Format::Table,
        }
    }

    #[test]
    fn questions_are_written_as_asked() {
        for (service, from, expected) in [
            (None, None, "/v1/authz"),
            (Some("shop/web"), None, "/v1/authz?service=shop/web"),
            (
                Some("shop/web"),
                Some("host:vm-1"),
                "/v1/authz?service=shop/web&from=host:vm-1",
            ),
        ] {
            assert_eq!(path(&authz(service, from)).unwrap(), expected);
        }
        assert!(path(&authz(Some("a&b=c"), None)).is_err());
    }

    #[test]
    fn nobody_is_said_in_words() {
        let list = json!({"items": [
            {"service": "shop/web", "level": "mesh", "rule": "everyone/all", "enforce": "on",
                "ports": [], "callers": ["everyone of a.b", "plaintext from 0.0.0.0/0"]},
            {"service": "shop/db", "level": null, "rule": null, "enforce": "on", "ports": [], "callers": []},
        ]});
        let page = rules(&list);
        assert!(
            page.contains("everyone of a.b, plaintext from 0.0.0.0/0"),
            "{page}"
        );
        assert!(page.contains("nobody: no policy has a rule"), "{page}");
    }
}
