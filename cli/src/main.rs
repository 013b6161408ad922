//! `meshctl`: the operator's command line. It speaks to the operator API of control and keeps no state.

mod args;
mod client;
mod commands;
mod context;
mod failure;
mod output;
mod table;

use std::process::ExitCode;

use clap::{CommandFactory as _, Parser as _};
use mesh_runtime::manual;

use crate::args::{Args, Command};
use crate::client::Client;
use crate::context::Context;
use crate::failure::Failure;

fn main() -> ExitCode {
    let args = Args::parse();
    match run(args) {
        Ok(code) => code,
        Err(failure) => {
            output::error(&failure.to_string());
            failure.exit_code()
        }
    }
}

fn run(args: Args) -> Result<ExitCode, Failure> {
    if let Command::Manual { dir } = &args.command {
        return match manual::write(Args::command(), dir) {
            Ok(()) => Ok(ExitCode::SUCCESS),
            Err(error) => Err(Failure::usage(
                "write below",
                dir.display(),
                error,
                "name another",
            )),
        };
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::local("start", "the runtime", error, "free some memory"))?;
    let client = Client::new(Context::load(args.context.as_deref())?)?;
    runtime.block_on(async {
        let done = match args.command {
            Command::Check { wait, output } => {
                return commands::check::run(&client, wait, output).await;
            }
            Command::Edges(edges) => commands::edges::run(&client, &edges).await,
            Command::Authz(authz) => commands::authz::run(&client, &authz).await,
            Command::Token { command } => commands::token::run(&client, command).await,
            Command::Get(get) => commands::get::run(&client, get).await,
            Command::Apply(apply) => commands::write::apply(&client, apply).await,
            Command::Delete(delete) => commands::write::delete(&client, delete).await,
            Command::Revoke { command } => commands::revoke::run(&client, &command).await,
            Command::Status { output } => commands::status::run(&client, output).await,
            Command::Backup { out } => commands::backup::run(&client, &out).await,
            Command::Manual { .. } => Ok(()),
        };
        done.map(|()| ExitCode::SUCCESS)
    })
}
