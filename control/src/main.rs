//! `mesh-control`: the certificate authority, the registry, policy, distribution to agents and the operator
//! API of a mesh.
//!
//! The way of a change: a caller ([`rpc`], [`api`], [`lease`]) asks the [`writer`]; it takes the command through
//! [`catalogue`] to the next moment, makes that durable in the [`store`] and publishes it; sessions see it and
//! send what their agents lack.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::{Args, CommandFactory as _, Parser, Subcommand};
use mesh_core::names::TrustDomain;

mod acks;
mod api;
mod audit;
mod auth;
mod bypasses;
mod ca;
mod catalogue;
mod clock;
mod clocks;
mod config;
mod control;
mod edges;
mod expiry;
mod export;
mod exporter;
mod init;
mod issuer;
mod lease;
mod limits;
mod metrics;
mod owner;
mod prover;
mod refusal;
mod restore;
mod rpc;
mod run;
mod server;
mod server_names;
mod store;
mod writer;

use config::Config;

/// Control of a Meshwork mesh.
#[derive(Debug, Parser)]
#[command(name = "mesh-control", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Makes a new mesh: authority, settings, first policy, and the operator's credential.
    Init(Init),
    /// Serves agents and operators.
    Run(Run),
    /// Puts a backup in the place of the store; control must be stopped.
    Restore(Restore),
    /// Puts another issuing certificate, of the same root, in the place of the one in use; control must be stopped.
    RenewIssuer(RenewIssuer),
    /// Writes manual pages and completions below a directory, for packages.
    #[command(hide = true)]
    Manual { dir: PathBuf },
}

#[derive(Debug, Args)]
struct Init {
    /// The trust domain of all identities: a DNS name, never to be changed.
    #[arg(long, value_name = "NAME")]
    trust_domain: TrustDomain,
    /// Where the mesh is kept: store, keys, exports, audit log.
    #[arg(long, value_name = "DIR", default_value = "/var/lib/meshwork-control")]
    state_dir: PathBuf,
    /// Mesh names are <service>.<namespace>.<this>.
    #[arg(long, value_name = "NAME", default_value = "mesh.internal")]
    dns_suffix: String,
    /// Virtual IPv4 addresses of services [default: 252.64.0.0/12]
    #[arg(long, value_name = "CIDR")]
    vip4_range: Option<String>,
    /// Virtual IPv6 addresses of services [default: fd6d:6573:6800::/64]
    #[arg(long, value_name = "CIDR")]
    vip6_range: Option<String>,
    /// Where hosts reach control, host:port; may be repeated. It goes into every join token [default: this host's
    /// name, port 7440]
    #[arg(long = "address", value_name = "HOST:PORT")]
    addresses: Vec<String>,
    /// Your root certificate (PEM).
    #[arg(long, value_name = "FILE")]
    root_cert: Option<PathBuf>,
    /// Its key; used once to sign the issuing certificate, not copied.
    #[arg(
        long,
        value_name = "FILE",
        requires = "root_cert",
        conflicts_with = "issuer_cert"
    )]
    root_key: Option<PathBuf>,
    /// Your issuing certificate (PEM), where the root's key stays elsewhere.
    #[arg(long, value_name = "FILE", requires_all = ["issuer_key", "root_cert"])]
    issuer_cert: Option<PathBuf>,
    /// The key of the issuing certificate.
    #[arg(long, value_name = "FILE", requires = "issuer_cert")]
    issuer_key: Option<PathBuf>,
}

#[derive(Debug, Args)]
struct Run {
    /// Configuration file [default: /etc/meshwork/control.toml, if it exists]
    #[arg(long, value_name = "FILE", env = "MESH_CONTROL_CONFIG")]
    config: Option<PathBuf>,
    /// Overrides the configuration.
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// Overrides the configuration; may be repeated.
    #[arg(long, value_name = "ADDRESS:PORT", value_parser = config::address)]
    listen: Vec<SocketAddr>,
    /// Prints the configuration in force and ends.
    #[arg(long)]
    print_config: bool,
}

#[derive(Debug, Args)]
struct Restore {
    /// What `meshctl backup`, or control itself, wrote.
    file: PathBuf,
    /// Where the mesh is kept.
    #[arg(long, value_name = "DIR", default_value = "/var/lib/meshwork-control")]
    state_dir: PathBuf,
    /// Sets a store that is there aside.
    #[arg(long)]
    force: bool,
}

#[derive(Debug, Args)]
struct RenewIssuer {
    /// Where the mesh is kept.
    #[arg(long, value_name = "DIR", default_value = "/var/lib/meshwork-control")]
    state_dir: PathBuf,
    /// The root's key, which signs a new certificate once [default: ca/root.key in the state directory]
    #[arg(long, value_name = "FILE", conflicts_with = "issuer_cert")]
    root_key: Option<PathBuf>,
    /// Your issuing certificate (PEM), where the root's key stays elsewhere.
    #[arg(long, value_name = "FILE", requires = "issuer_key")]
    issuer_cert: Option<PathBuf>,
    /// The key of the issuing certificate.
    #[arg(long, value_name = "FILE", requires = "issuer_cert")]
    issuer_key: Option<PathBuf>,
}

fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Command::Init(args) => init(args),
        Command::Run(args) => run(args),
        Command::Restore(args) => {
            let work = || restore::restore(&args.file, &args.state_dir, args.force);
            owner::kept(&args.state_dir, work).map(|told| print(&told))
        }
        Command::RenewIssuer(args) => renew_issuer(args),
        Command::Manual { dir } => mesh_runtime::manual::write(Cli::command(), &dir)
            .with_context(|| format!("cannot write below {}", dir.display())),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            complain(&format!("mesh-control: {}\n", in_one_line(&error)));
            ExitCode::FAILURE
        }
    }
}

fn init(args: Init) -> anyhow::Result<()> {
    let origin = match (
        args.root_cert,
        args.root_key,
        args.issuer_cert,
        args.issuer_key,
    ) {
        (None, ..) => ca::Origin::New,
        (Some(cert), Some(key), None, None) => ca::Origin::Root { cert, key },
        (Some(root), None, Some(cert), Some(key)) => ca::Origin::Issuer { root, cert, key },
        _ => {
            anyhow::bail!("say --root-cert with --root-key, or with --issuer-cert and --issuer-key")
        }
    };
    let told = init::init(&init::Plan {
        state_dir: args.state_dir,
        trust_domain: args.trust_domain,
        dns_suffix: args.dns_suffix,
        vip4_range: args.vip4_range,
        vip6_range: args.vip6_range,
        addresses: args.addresses,
        origin,
    })?;
    print(&told);
    Ok(())
}

fn renew_issuer(args: RenewIssuer) -> anyhow::Result<()> {
    let state = args.state_dir;
    let new = match (args.issuer_cert, args.issuer_key) {
        (Some(cert), Some(key)) => ca::NewIssuer::Given { cert, key },
        _ => ca::NewIssuer::Signed {
            root_key: args
                .root_key
                .unwrap_or_else(|| state.join("ca").join("root.key")),
        },
    };
    print(&owner::kept(&state, || issuer::renew(&state, &new))?);
    Ok(())
}

fn run(args: Run) -> anyhow::Result<()> {
    let mut config = Config::load(args.config.as_deref())?;
    if let Some(state_dir) = args.state_dir {
        config.state_dir = state_dir;
    }
    if !args.listen.is_empty() {
        config.listen = args.listen;
    }
    config.admin_socket = config.admin_socket();
    if args.print_config {
        print(&toml::to_string(&config)?);
        return Ok(());
    }
    mesh_runtime::log::init(&config.log.level, config.log.to).map_err(anyhow::Error::msg)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    runtime.block_on(run::run(config))
}

/// An error and its causes. Some errors end with the text of their cause: that is said once.
fn in_one_line(error: &anyhow::Error) -> String {
    let mut line = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if !line.is_empty() {
            if line.ends_with(&cause) {
                continue;
            }
            line += ": ";
        }
        line += &cause;
    }
    line
}

/// A closed stdout stops nothing: what was done is done.
fn print(text: &str) {
    use std::io::Write as _;
    let _ = std::io::stdout().write_all(text.as_bytes());
}

fn complain(text: &str) {
    use std::io::Write as _;
    let _ = std::io::stderr().write_all(text.as_bytes());
}

#[cfg(test)]
mod tests;

#[cfg(test)]
mod command_line {
    use super::*;

    #[test]
    fn the_help_names_the_default_ranges() {
        let mut command = Cli::command();
        command.clone().debug_assert();
        let init = command.find_subcommand_mut("init").unwrap();
        let help = init.render_long_help().to_string();
        let ranges = mesh_core::vip::VipRanges::default();
        for range in [ranges.v4().to_string(), ranges.v6().to_string()] {
            assert!(help.contains(&format!("[default: {range}]")), "{help}");
        }
    }

    #[test]
    fn a_cause_is_said_once() {
        let cause = || std::io::Error::from_raw_os_error(13);
        let error = anyhow::Error::new(cause()).context(format!("cannot read x: {}", cause()));
        assert_eq!(in_one_line(&error).matches("denied").count(), 1);
        let error = anyhow::Error::new(cause()).context("cannot start");
        assert!(in_one_line(&error).starts_with("cannot start: Permission"));
    }
}
