//! Finds an object by its bare name in all namespaces, so that nobody is told "not found" for want of `-n`.

use http::Method;
use serde_json::Value;

use super::{NO_NAMESPACE, items, text};
use crate::client::{Ask, Client};
use crate::failure::Failure;

/// Names that are proposed at most: more are no help.
const PROPOSED_MAX: usize = 5;
/// How many letters a mistyped name may be off.
const MISTYPED_MAX: usize = 2;

/// What is looked for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wanted<'a> {
    /// For messages: what is to be done.
    pub operation: &'a str,
    /// As in paths: `services`.
    pub kind: &'a str,
    pub name: &'a str,
}

/// The namespace of the only object of this name; `-` for one that is in none.
pub(crate) async fn namespace(client: &Client, wanted: Wanted<'_>) -> Result<String, Failure> {
    let path = format!("/v1/{}", wanted.kind);
    let object = format!("{} {}", wanted.kind, wanted.name);
    let ask = Ask {
        operation: wanted.operation,
        object: &object,
        method: Method::GET,
        path: &path,
        body: None,
    };
    let list = client.json(&ask).await?;
    choose(wanted, &names(&list))
}

fn names(list: &Value) -> Vec<(String, String)> {
    let name = |item: &Value| {
        let namespace = text(item, "/metadata/namespace");
        let namespace = if namespace.is_empty() {
            NO_NAMESPACE.to_owned()
        } else {
            namespace
        };
        (namespace, text(item, "/metadata/name"))
    };
    items(list).iter().map(name).collect()
}

fn choose(wanted: Wanted<'_>, all: &[(String, String)]) -> Result<String, Failure> {
    let Wanted {
        operation,
        kind,
        name,
    } = wanted;
    let same: Vec<_> = all.iter().filter(|(_, other)| other == name).collect();
    let object = format!("{kind} {name}");
    match same.as_slice() {
        [(namespace, _)] => Ok(namespace.clone()),
        [] => {
            let near = all.iter().filter(|(_, other)| resembles(name, other));
            let near: Vec<_> = near.collect();
            let mut message = format!("there is no {kind}/{name} in any namespace");
            if !near.is_empty() {
                message += &format!("; did you mean {}?", proposed(&near));
            }
            Err(Failure::refused(operation, &object, "not_found", &message))
        }
        several => Err(Failure::usage(
            operation,
            object,
            format!("there are several; did you mean {}?", proposed(several)),
            "say the namespace with -n, or NAMESPACE/NAME",
        )),
    }
}

fn proposed(found: &[&(String, String)]) -> String {
    let shown = found.iter().take(PROPOSED_MAX);
    let shown = shown.map(|(namespace, name)| match namespace.as_str() {
        NO_NAMESPACE => format!("/{name}"),
        namespace => format!("{namespace}/{name}"),
    });
    let shown: Vec<String> = shown.collect();
    let more = if PROPOSED_MAX < found.len() {
        ", …"
    } else {
        ""
    };
    shown.join(" or ") + more
}

fn resembles(typed: &str, name: &str) -> bool {
    let within = |long: &str, short: &str| 3 <= short.len() && long.contains(short);
    within(name, typed) || within(typed, name) || distance(typed, name) <= MISTYPED_MAX
}

/// How many letters must be put in, taken out or changed.
fn distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.chars().count()).collect();
    for (n, x) in a.chars().enumerate() {
        let mut corner = n;
        let mut left = n + 1;
        for (cell, y) in row.iter_mut().skip(1).zip(b.chars()) {
            let best = (corner + usize::from(x != y)).min(left + 1).min(*cell + 1);
            corner = std::mem::replace(cell, best);
            left = best;
        }
        if let Some(first) = row.first_mut() {
            *first = n + 1;
        }
    }
    row.last().copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(name: &str) -> Result<String, String> {
        let all = [
            ("shop", "web"),
            ("shop", "api"),
            ("bank", "api"),
            ("-", "everyone"),
        ];
        let all = all.map(|(ns, name)| (ns.to_owned(), name.to_owned()));
        let wanted = Wanted {
            operation: "get",
            kind: "services",
            name,
        };
        choose(wanted, &all).map_err(|failure| failure.to_string())
    }

    #[test]
    fn a_bare_name_is_found_where_it_is_or_others_are_proposed() {
        assert_eq!(chosen("web").unwrap(), "shop");
        assert_eq!(chosen("everyone").unwrap(), "-");
        let several = chosen("api").unwrap_err();
        assert!(
            several.contains("did you mean shop/api or bank/api?"),
            "{several}"
        );
        let mistyped = chosen("wbe").unwrap_err();
        assert!(mistyped.contains("did you mean shop/web?"), "{mistyped}");
        assert!(mistyped.contains("not_found"), "{mistyped}");
        assert!(!chosen("something").unwrap_err().contains("did you mean"));
    }

    #[test]
    fn distances_are_letters() {
        for (a, b, letters) in [
            ("web", "web", 0),
            ("web", "wep", 1),
            ("", "abc", 3),
            ("kitten", "sitting", 3),
        ] {
            assert_eq!(distance(a, b), letters, "{a} {b}");
        }
    }
}
