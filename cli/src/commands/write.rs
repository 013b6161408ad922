//! `meshctl apply` and `meshctl delete`.

use std::io::Read as _;
use std::path::Path;

use http::Method;
use mesh_api::resource;
use serde_json::Value;

use super::find::{self, Wanted};
use super::{NO_NAMESPACE, items, revoke, text};
use crate::args::{Apply, Deletable, Delete};
use crate::client::{Ask, Client};
use crate::failure::Failure;
use crate::output;

/// Largest file that is applied, in bytes: `APPLY_MAX` resources of about 3 KiB.
const FILE_MAX: u64 = 32 * 1024 * 1024;

pub(crate) async fn apply(client: &Client, apply: Apply) -> Result<(), Failure> {
    let name = apply.file.display().to_string();
    let bad = |cause: &dyn std::fmt::Display| {
        Failure::usage(
            "apply",
            &name,
            cause,
            "correct the file; nothing was changed",
        )
    };
    let file = read(&apply.file).map_err(|e| bad(&e))?;
    let resources = resource::parse_all(&file).map_err(|e| bad(&e))?;
    if resources.is_empty() {
        return Err(bad(&"it has no resource"));
    }
    let body = serde_json::to_value(&resources).map_err(|e| bad(&e))?;
    let answer = client
        .json(&Ask {
            operation: "apply",
            object: &name,
            method: Method::POST,
            path: if apply.dry_run {
                "/v1/apply?dryRun=true"
            } else {
                "/v1/apply"
            },
            body: Some(&body),
        })
        .await?;
    for result in results(&answer) {
        let message = text(result, "/message");
        let colon = if message.is_empty() { "" } else { ": " };
        let object = text(result, "/object");
        let done = done(&text(result, "/action"), apply.dry_run);
        output::print(&format!("{object} {done}{colon}{message}\n"));
        output::warnings(&object, result);
    }
    Ok(())
}

/// What was done, or would be.
fn done(action: &str, dry_run: bool) -> String {
    match (action, dry_run) {
        (action, false) => action.to_owned(),
        ("unchanged", true) => "unchanged (dry run)".to_owned(),
        (action, true) => format!("would be {action} (dry run)"),
    }
}

fn results(answer: &Value) -> &[Value] {
    match answer.get("results").and_then(Value::as_array) {
        Some(results) => results,
        None => items(answer),
    }
}

fn read(path: &Path) -> std::io::Result<String> {
    let mut file: Box<dyn std::io::Read> = if path == Path::new("-") {
        Box::new(std::io::stdin())
    } else {
        Box::new(std::fs::File::open(path)?)
    };
    let mut text = String::new();
    file.by_ref().take(FILE_MAX + 1).read_to_string(&mut text)?;
    if FILE_MAX < text.len() as u64 {
        let message = format!("it is larger than {FILE_MAX} bytes; split it");
        return Err(std::io::Error::other(message));
    }
    Ok(text)
}

pub(crate) async fn delete(client: &Client, delete: Delete) -> Result<(), Failure> {
    let namespace = match &delete.namespace {
        Some(namespace) => namespace.clone(),
        None if delete.kind == Deletable::Host || delete.name.contains('/') => {
            NO_NAMESPACE.to_owned()
        }
        None => {
            let wanted = Wanted {
                operation: "delete",
                kind: words(delete.kind).0,
                name: &delete.name,
            };
            find::namespace(client, wanted).await?
        }
    };
    let (path, object) = target(delete.kind, &namespace, &delete.name);
    let answer = client
        .json(&Ask {
            operation: "delete",
            object: &object,
            method: Method::DELETE,
            path: &path,
            body: None,
        })
        .await?;
    output::print(&format!("{object} deleted\n"));
    output::warnings(&object, &answer);
    if delete.kind == Deletable::Host {
        revoke::tell(&answer);
    }
    Ok(())
}

/// As in paths, and as in messages.
fn words(kind: Deletable) -> (&'static str, &'static str) {
    match kind {
        Deletable::Service => ("services", "service"),
        Deletable::Host => ("hosts", "host"),
        Deletable::Policy => ("policies", "policy"),
    }
}

/// The path of what is deleted, and its whole name.
fn target(kind: Deletable, namespace: &str, name: &str) -> (String, String) {
    let (plural, word) = words(kind);
    let (namespace, name) = name.split_once('/').unwrap_or((namespace, name));
    let namespace = if kind == Deletable::Host || namespace.is_empty() {
        NO_NAMESPACE
    } else {
        namespace
    };
    let object = if namespace == NO_NAMESPACE {
        format!("{word} {name}")
    } else {
        format!("{word} {namespace}/{name}")
    };
    (format!("/v1/{plural}/{namespace}/{name}"), object)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_deleted_is_named_whole() {
        let (path, object) = target(Deletable::Service, "shop", "web");
        assert_eq!(
            (path.as_str(), object.as_str()),
            ("/v1/services/shop/web", "service shop/web")
        );
        let (path, object) = target(Deletable::Policy, "-", "everyone");
        assert_eq!(
            (path.as_str(), object.as_str()),
            ("/v1/policies/-/everyone", "policy everyone")
        );
        let (path, _) = target(Deletable::Host, "shop", "vm-1");
        assert_eq!(path, "/v1/hosts/-/vm-1");
    }
}
