//! `meshctl token`: join tokens.

use http::Method;
use serde_json::{Value, json};

use super::{items, revoke, text};
use crate::args::{CreateToken, Format, TokenCommand};
use crate::client::{Ask, Client};
use crate::failure::Failure;
use crate::output;
use crate::table::Table;
use mesh_api::duration;

pub(crate) async fn run(client: &Client, command: TokenCommand) -> Result<(), Failure> {
    match command {
        TokenCommand::Create(create) => self::create(client, &create).await,
        TokenCommand::List { output } => list(client, output).await,
        TokenCommand::Revoke(revoke) => revoke::token(client, &revoke).await,
    }
}

async fn create(client: &Client, create: &CreateToken) -> Result<(), Failure> {
    let body = request(create)?;
    let answer = client
        .json(&Ask {
            operation: "create",
            object: "the join token",
            method: Method::POST,
            path: "/v1/tokens",
            body: Some(&body),
        })
        .await?;
    let token = text(&answer, "/token");
    output::note(&format!(
        "token {}: identities {}; services {}; {} use(s); expires {} (in {})",
        text(&answer, "/id"),
        text(&body, "/identities"),
        text(&body, "/services"),
        create.uses,
        text(&answer, "/expires"),
        duration::short(create.expires),
    ));
    output::note("shown this once; on the host run: mesh-agent join <token>");
    output::print(&format!("{token}\n"));
    Ok(())
}

/// What control is asked for. `--namespace` is short for all its accounts and services.
fn request(create: &CreateToken) -> Result<Value, Failure> {
    let whole = || create.namespace.iter().map(|ns| format!("{ns}/*"));
    let identities: Vec<String> = whole().chain(create.identity.iter().cloned()).collect();
    let mut services: Vec<String> = whole().chain(create.service.iter().cloned()).collect();
    if identities.is_empty() {
        return Err(Failure::usage(
            "create",
            "the join token",
            "it would allow no identity",
            "say what the host may be: --namespace NS, or --identity NS/ACCOUNT",
        ));
    }
    if services.is_empty() {
        services.clone_from(&identities);
    }
    Ok(json!({
        "name": create.name,
        "identities": identities,
        "services": services,
        "networks": create.network,
        "expiresIn": create.expires.as_secs(),
        "uses": create.uses,
        "replace": create.replace,
        "addresses": create.address,
    }))
}

async fn list(client: &Client, format: Format) -> Result<(), Failure> {
    let answer = client
        .json(&Ask {
            operation: "list",
            object: "the join tokens",
            method: Method::GET,
            path: "/v1/tokens",
            body: None,
        })
        .await?;
    output::show(&answer, format, table)
}

fn table(list: &Value) -> String {
    let mut table = Table::new(&[
        "ID",
        "NAME",
        "IDENTITIES",
        "SERVICES",
        "NETWORKS",
        "USED",
        "EXPIRES",
        "STATE",
    ]);
    for token in items(list) {
        let used = format!(
            "{}/{}",
            text(token, "/status/used"),
            text(token, "/spec/uses")
        );
        table.row(vec![
            text(token, "/metadata/name"),
            text(token, "/spec/name"),
            text(token, "/spec/identities"),
            text(token, "/spec/services"),
            text(token, "/spec/networks"),
            used,
            text(token, "/spec/expires"),
            text(token, "/status/state"),
        ]);
    }
    table.render()
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::args::{Args, Command};

    fn parsed(words: &[&str]) -> CreateToken {
        let all = ["meshctl", "token", "create"].iter().chain(words);
        let args = Args::try_parse_from(all).unwrap();
        match args.command {
            Command::Token {
                command: TokenCommand::Create(create),
            } => create,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_namespace_is_all_its_accounts_and_services() {
        let body = request(&parsed(&["--namespace", "shop"])).unwrap();
        assert_eq!(body["identities"], json!(["shop/*"]));
        assert_eq!(body["services"], json!(["shop/*"]));
        assert_eq!(
            (&body["expiresIn"], &body["uses"]),
            (&json!(3600), &json!(1))
        );
    }

    #[test]
    fn services_follow_identities_unless_named() {
        let body = request(&parsed(&["--identity", "a/b"])).unwrap();
        assert_eq!(body["services"], json!(["a/b"]));
        let body = request(&parsed(&["--identity", "a/b", "--service", "a/c"])).unwrap();
        assert_eq!(body["services"], json!(["a/c"]));
        assert!(request(&parsed(&["--service", "a/c"])).is_err());
    }
}
