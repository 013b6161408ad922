//! `meshctl revoke`: what must no more be believed. There is no way back.

use http::Method;
use serde_json::Value;

use super::{NO_NAMESPACE, text};
use crate::args::{RevokeCommand, RevokeToken};
use crate::client::{Ask, Client};
use crate::failure::Failure;
use crate::output;

pub(crate) async fn run(client: &Client, command: &RevokeCommand) -> Result<(), Failure> {
    match command {
        RevokeCommand::Host { name } => {
            let path = format!("/v1/hosts/{NO_NAMESPACE}/{name}:revoke");
            let answer = ask(client, &format!("host {name}"), &path).await?;
            tell(&answer);
        }
        RevokeCommand::Workload { account, host } => {
            let object = format!("workload {account} on host {host}");
            let Some((namespace, name)) = account.split_once('/') else {
                return Err(Failure::usage(
                    "revoke",
                    object,
                    "it has no namespace",
                    "write it as NAMESPACE/ACCOUNT",
                ));
            };
            let path = format!("/v1/workloads/{namespace}/{name}:revoke?host={host}");
            let answer = ask(client, &object, &path).await?;
            output::warnings(&object, &answer);
            tell(&answer);
        }
        RevokeCommand::Token(revoke) => token(client, revoke).await?,
    }
    Ok(())
}

/// Also `meshctl token revoke`.
pub(crate) async fn token(client: &Client, revoke: &RevokeToken) -> Result<(), Failure> {
    let id = &revoke.id;
    let (object, query) = if revoke.hosts {
        (format!("token {id} with its hosts"), "?hosts=true")
    } else {
        (format!("token {id}"), "")
    };
    let path = format!("/v1/tokens/{NO_NAMESPACE}/{id}:revoke{query}");
    let answer = ask(client, &object, &path).await?;
    if revoke.hosts {
        tell(&answer);
    }
    Ok(())
}

async fn ask(client: &Client, object: &str, path: &str) -> Result<Value, Failure> {
    let answer = client
        .json(&Ask {
            operation: "revoke",
            object,
            method: Method::POST,
            path,
            body: None,
        })
        .await?;
    output::print(&format!("{object} revoked\n"));
    Ok(answer)
}

/// Who refuses it from now on.
pub(crate) fn tell(answer: &Value) {
    let (connected, away) = (
        text(answer, "/agents/connected"),
        text(answer, "/agents/away"),
    );
    output::note(&format!(
        "{connected} connected host(s) refuse its certificates from now on and end what is open with it; {away} that are \
         away do so when they are back; see `meshctl get revocations`"
    ));
}
