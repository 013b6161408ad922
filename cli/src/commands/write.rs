//! `meshctl apply` and `meshctl delete`.

use std::io::Read as _;
use std::path::Path;

use http::Method;
use mesh_api::resource;
use serde_json::Value;

use super::{NO_NAMESPACE, items, text};
use crate::args::{Apply, Deletable, Delete};
use crate::client::{Ask, Client};
use crate::failure::Failure;
use crate::output;

/// Largest file that is applied, in bytes: `APPLY_MAX` resources of about 3 KiB.
const FILE_MAX: u64 = 32 * 1024 * 1024;
/// The namespace of a service when none was typed, as in Kubernetes.
const DEFAULT_NAMESPACE: &str = "default";

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
    let (path, object) = target(&delete);
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
    let end = text(&answer, "/certificatesEnd");
    if !end.is_empty() {
        output::note(&format!(
            "its session ended and its endpoints are gone; none of its certificates is renewed, but those that it \
             has open other hosts' mesh ports until {end} at most"
        ));
    }
    Ok(())
}

fn target(delete: &Delete) -> (String, String) {
    let (plural, word, otherwise) = match delete.kind {
        Deletable::Service => ("services", "service", DEFAULT_NAMESPACE),
        Deletable::Host => ("hosts", "host", NO_NAMESPACE),
        Deletable::Policy => ("policies", "policy", NO_NAMESPACE),
    };
    let (namespace, name) = match delete.name.split_once('/') {
        Some(pair) => pair,
        None => (
            delete.namespace.as_deref().unwrap_or(otherwise),
            delete.name.as_str(),
        ),
    };
    let namespace = if delete.kind == Deletable::Host {
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
        let delete = |kind, name: &str, namespace: Option<&str>| {
            target(&Delete {
                kind,
                name: name.to_owned(),
                namespace: namespace.map(str::to_owned),
            })
        };
        let (path, object) = delete(Deletable::Service, "web", Some("shop"));
        assert_eq!(
            (path.as_str(), object.as_str()),
            ("/v1/services/shop/web", "service shop/web")
        );
        let (path, object) = delete(Deletable::Policy, "everyone", None);
        assert_eq!(
            (path.as_str(), object.as_str()),
            ("/v1/policies/-/everyone", "policy everyone")
        );
        let (path, _) = delete(Deletable::Host, "vm-1", Some("shop"));
        assert_eq!(path, "/v1/hosts/-/vm-1");
    }
}
