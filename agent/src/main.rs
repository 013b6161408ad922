//! `mesh-agent`: takes over the traffic of a host's services, gives each its own identity and carries their calls.
//!
//! `run` starts the holder (`holder.rs`), which owns sockets and packet filter and keeps one worker (`worker.rs`) on
//! them. What happens to a call is read in `outbound.rs` and `inbound.rs`, what happens to a change in `control.rs`.

// What the host is: configuration, the join and what is on disk.
mod alone;
mod bypass;
mod check;
mod config;
mod containers;
mod discover;
mod explain;
mod join;
mod keys;
mod leave;
mod reload;
mod state;
mod status;
mod units;
// The kernel, and the process that speaks to it.
mod capture;
mod holder;
// The worker's parts.
mod admin;
mod control;
mod dns;
mod door;
mod drain;
mod drained;
mod explicit;
mod handing;
mod health;
mod leaves;
mod owners;
mod worker;
mod workloads;
// A call's way.
mod accept;
mod call;
mod data;
mod http;
mod http2;
mod inbound;
mod limits;
mod live;
mod metrics;
mod outbound;
mod peers;
mod places;
mod probe;
mod quiet;
mod reals;
mod relay;
mod urgent;
mod vanished;
mod view;
mod whose;

use std::ffi::OsString;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use clap::{CommandFactory as _, Parser, Subcommand, ValueEnum};
use mesh_core::names::Label;
use mesh_runtime::log::Target;
use mesh_runtime::{files, manual};

use alone::Alone;
use bypass::Wanted;
use config::Config;
use drained::Meant;
use holder::handover::Left;
use holder::{Confirmed, HolderConfig};
use join::Joined;
use state::State;
use status::Status;

#[derive(Debug, Parser)]
#[command(
    name = "mesh-agent",
    version,
    about = "The agent of a host in a Meshwork mesh"
)]
struct Cli {
    /// The configuration; missing is an error unless it is the default.
    #[arg(
        long,
        short,
        global = true,
        value_name = "FILE",
        help = "Configuration [default: /etc/meshwork/agent.toml]"
    )]
    config: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Make this host a member of a mesh, start its agent, and look whether all is well
    #[command(
        after_help = "Exit codes: 0 it is a member, also when it was before, and its agent serves; 1 it could not join, or its agent does not serve; 2 what was typed is wrong. The checks are shown and decide nothing: `mesh-agent check` does."
    )]
    Join {
        /// Join token, or `-` to read it from stdin [default: the systemd credential mesh.join-token]
        #[arg(env = "MESH_JOIN_TOKEN", hide_env_values = true)]
        token: Option<String>,
        /// Where other hosts reach this one [default: the address that control sees]
        #[arg(long)]
        address: Option<String>,
        /// Network that the address belongs to [default: the token's]
        #[arg(long)]
        network: Option<String>,
        /// Name of this host in the mesh [default: its own]
        #[arg(long)]
        host_name: Option<String>,
        /// Enrol only: do not enable and start mesh-agent.service. Implied without systemd, and with --config
        #[arg(long)]
        no_start: bool,
        /// Also write files for what listens on this host, as `discover --write` does
        #[arg(long, value_name = "NAMESPACE")]
        discover: Option<Label>,
    },
    /// Propose files for the programs that listen on this host, by their units
    Discover {
        /// Namespace of their services
        #[arg(long)]
        namespace: Label,
        /// Write those that are not there; the agent takes them up at once
        #[arg(long)]
        write: bool,
    },
    /// Order a unit of this host: started after the agent is ready, stopped before it, and a service drained before its stop
    Unit(units::Words),
    /// Stop the agent and remove every trace of the mesh from this host
    Leave,
    /// Take a service of this host out of the mesh: it is listed no more, and what is open ends by itself
    #[command(
        after_help = "Exit codes: 0 no call is open; 1 some still are, and it is not listed all the same; 2 what was typed is wrong."
    )]
    Drain {
        #[command(flatten)]
        meant: Meant,
        /// How long to wait until no call is open
        #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = mesh_api::duration::parse)]
        wait: Duration,
    },
    /// Put a drained service back
    Undrain {
        #[command(flatten)]
        meant: Meant,
    },
    /// Open this host to plaintext for a time, in an emergency
    #[command(
        after_help = "Plaintext callers are let in at every port, also where `strict`, and calls to real addresses leave in plaintext. It closes by itself, also when the agent is dead; operators of the mesh see who did it. Exit codes: 0 it is as was asked; 1 it could not be done; 2 what was typed is wrong."
    )]
    Bypass {
        /// How long, e.g. 10m; 24h at most. Again: from now on
        #[arg(long = "for", value_name = "DURATION", value_parser = mesh_api::duration::parse, required_unless_present = "end")]
        time: Option<Duration>,
        /// Why, for the audit log
        #[arg(long, value_name = "TEXT", default_value = "no reason given")]
        why: String,
        /// Close it now
        #[arg(long, conflicts_with_all = ["time", "why"])]
        end: bool,
    },
    /// Say how the agent stands
    Status {
        #[arg(long, short, value_enum, default_value_t = Output::Table)]
        output: Output,
    },
    /// Say what would happen to a call: identity, rule, endpoints
    #[command(
        after_help = "Exit codes: 0 the call is carried, or does not concern the mesh; 1 it is refused for a caller, or it can not be told; 2 what was typed is wrong."
    )]
    Explain {
        /// A name, an address or a URL, e.g. web.shop.mesh.internal:80, shop/web, 252.64.0.2:80
        destination: String,
        /// The calling workload, or `host` for programs that match none [default: all of this host]
        #[arg(long = "as", value_name = "NS/ACCOUNT")]
        caller: Option<String>,
        #[arg(long, short, value_enum, default_value_t = Output::Table)]
        output: Output,
    },
    /// Look at all that the mesh needs on this host: what is wrong, and what to do
    #[command(
        after_help = "Exit codes: 0 nothing failed (warnings may be); 1 a check failed; 2 what was typed is wrong."
    )]
    Check {
        /// Look again until nothing fails, for so long, e.g. 30s or 5m
        #[arg(long, value_name = "DURATION", value_parser = mesh_api::duration::parse)]
        wait: Option<Duration>,
        #[arg(long, short, value_enum, default_value_t = Output::Table)]
        output: Output,
    },
    /// Run the agent in the foreground
    Run,
    /// Go over to the program and the configuration on disk; open connections go on
    #[command(
        after_help = "Exit codes: 0 the agent has gone over; 1 it could not and goes on as before; 2 what was typed is wrong."
    )]
    Reload,
    /// Make what must stand before the network does, without an agent: the link, its routes and the guard
    Guard {
        /// Take all of that away instead, and what the host's resolver was told; this host stays a member. The agent must not run
        #[arg(long)]
        remove: bool,
    },
    /// Started by `run`
    #[command(hide = true)]
    Worker,
    /// Asked by `run` before it hands over
    #[command(hide = true)]
    TakesOver,
    /// Write manual pages and completions below a directory, for packages
    #[command(hide = true)]
    Manual { dir: PathBuf },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Output {
    Table,
    Json,
}

/// What was typed is wrong: exit code 2, as for what is no option at all.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Mistyped(pub(crate) String);

/// An agent that fails sooner than this after its start waits as long before it ends. Its unit starts it again after
/// 100 ms, for a crash must not be felt; what makes a start fail (a key that is gone, a wrong configuration) does not go away by
/// itself, and should not be tried and logged ten times a second.
const AT_ONCE: Duration = Duration::from_secs(2);

fn main() -> ExitCode {
    let begun = Instant::now();
    let cli = Cli::parse();
    let runs = matches!(cli.command, Command::Run);
    match dispatch(cli) {
        Ok(code) => code,
        Err(error) => {
            if runs {
                holder::handover::go_back(&error);
            }
            // A closed stderr must not hide the exit code.
            let _ = writeln!(std::io::stderr(), "mesh-agent: {error:#}");
            if runs && begun.elapsed() < AT_ONCE && std::env::var_os("NOTIFY_SOCKET").is_some() {
                std::thread::sleep(AT_ONCE);
            }
            match error.downcast_ref::<Mistyped>() {
                Some(_) => ExitCode::from(2),
                None => ExitCode::FAILURE,
            }
        }
    }
}

fn dispatch(cli: Cli) -> anyhow::Result<ExitCode> {
    let kept = holder::handover::kept_config().filter(|_| matches!(cli.command, Command::Run));
    let config = Config::load(kept.as_deref().or(cli.config.as_deref()))?;
    if matches!(
        cli.command,
        Command::Run
            | Command::Guard { .. }
            | Command::Join { .. }
            | Command::Leave
            | Command::Discover { .. }
            | Command::Check { .. }
            | Command::Reload
            | Command::Bypass { .. }
    ) {
        ensure!(
            nix::unistd::geteuid().is_root() || !config.capture.enabled,
            "mesh-agent needs root for this; run it with sudo, or without capture (capture.enabled = false)"
        );
    }
    match cli.command {
        Command::Run => {
            log_to(&config.log.level, config.log.to)?;
            run(&config, cli.config, kept)
        }
        Command::Reload => reload::reload(&config).and_then(|()| {
            say("the agent has gone over to the program and the configuration on disk\n")
        }),
        Command::TakesOver => {
            let Some(holder) = holder_config(&config, cli.config, None)? else {
                bail!("this host has not joined a mesh");
            };
            holder::handover::answer(&holder).map(|()| ExitCode::SUCCESS)
        }
        Command::Guard { remove } => {
            log_to(&config.log.level, config.log.to)?;
            match remove {
                true => leave::open(&config).map(|()| ExitCode::SUCCESS),
                false => guard(&config),
            }
        }
        Command::Worker => {
            log_to(&config.log.level, config.log.to)?;
            worker::run(config).or_else(|error| {
                log::error!("{error:#}; the worker ends");
                Ok(ExitCode::FAILURE)
            })
        }
        Command::Join {
            token,
            address,
            network,
            host_name,
            no_start,
            discover,
        } => {
            log_to("warn", Target::Stderr)?;
            let request = join::Request {
                token: join::read_token(token.as_deref())?,
                address,
                network,
                host_name,
            };
            // The unit reads the default configuration.
            let by_unit = !no_start && cli.config.is_none();
            join(&config, &request, by_unit, discover.as_ref())
        }
        Command::Discover { namespace, write } => {
            log_to("warn", Target::Stderr)?;
            discovered(&config, &namespace, write)
        }
        Command::Unit(words) => say(&words.heed()?),
        Command::Leave => {
            log_to("warn", Target::Stderr)?;
            if cli.config.is_none() && units::there() {
                units::stop(None)?;
                units::unorder_all()?;
            }
            say(&leave::leave(&config)?.to_string())
        }
        Command::Drain { meant, wait } => drain(&config, &meant, Some(wait)),
        Command::Undrain { meant } => drain(&config, &meant, None),
        Command::Bypass { time, why, .. } => {
            let wanted = time.map_or(Wanted::Closed, |time| Wanted::Open { time, why });
            say(&bypass::ask(&config, wanted, || guard(&config).map(drop))?)
        }
        Command::Status { output } => status(&config, output),
        Command::Check { wait, output } => check(&config, wait, output),
        Command::Explain {
            destination,
            caller,
            output,
        } => explain(&config, &destination, caller.as_deref(), output),
        Command::Manual { dir } => manual::write(Cli::command(), &dir)
            .map(|()| ExitCode::SUCCESS)
            .with_context(|| format!("cannot write below {}", dir.display())),
    }
}

fn log_to(level: &str, target: Target) -> anyhow::Result<()> {
    mesh_runtime::log::init(level, target).map_err(|error| anyhow::anyhow!(error))
}

/// Runs the holder. No thread may be started before it. `kept` is the configuration of a program that goes on.
fn run(
    config: &Config,
    config_path: Option<PathBuf>,
    kept: Option<PathBuf>,
) -> anyhow::Result<ExitCode> {
    let holder = holder_config(config, config_path, kept)?;
    let Some(holder) = holder else {
        bail!("this host has not joined a mesh; run `mesh-agent join <token>`");
    };
    files::create_private_dir(&config.runtime_dir)?;
    let left = Left::take()?;
    if left.is_none() {
        State::new(&config.state_dir).check_whole()?;
    }
    // Before anything is touched: what a running agent set up is not ours to take down.
    let lock = match &left {
        Some(left) => Alone::handed_over(left.lock()?),
        None => alone::alone(config)?,
    };
    // Also when the worker could not do it.
    holder::run(&holder, lock, left, || dns::keeper::pause(config))
}

/// At boot, before the agent and the network: a host that is in no mesh has nothing to guard.
fn guard(config: &Config) -> anyhow::Result<ExitCode> {
    if config.capture.enabled
        && let Some(holder) = holder_config(config, None, None)?
    {
        let confirmed = Confirmed::load(&holder);
        let (doors, reals) = (confirmed.doors(), confirmed.reals());
        capture::prepare(&holder.capture, &holder.ranges, doors, reals)?;
        let left = bypass::left(&holder.bypass_file);
        capture::bypass::open_guard(&holder.capture, left)
            .context("the guard can not be opened, or closed")?;
    }
    Ok(ExitCode::SUCCESS)
}

/// `None` before a join.
fn holder_config(
    config: &Config,
    config_path: Option<PathBuf>,
    kept: Option<PathBuf>,
) -> anyhow::Result<Option<HolderConfig>> {
    let state = State::new(&config.state_dir);
    state.check_owner()?;
    let Some(membership) = state.membership()? else {
        return Ok(None);
    };
    let vips = membership.host.vips;
    let ranges = capture::VipRanges::new(&vips.v4().to_string(), &vips.v6().to_string())?;
    let mut worker_arguments = vec![OsString::from("worker")];
    if let Some(path) = kept.or_else(|| config_path.clone()) {
        worker_arguments.extend(["--config".into(), path.into_os_string()]);
    }
    Ok(Some(HolderConfig {
        capture: config.capture.clone(),
        ranges,
        mesh: config.mesh_addresses(),
        dns: config.dns.clone(),
        worker_arguments,
        drain: config.holder_drain(),
        handover: config.holder_handover(),
        config: config_path,
        config_text: toml::to_string(config)?,
        config_copy: config.runtime_dir.join(reload::CONFIG_COPY),
        outcome_file: config.runtime_dir.join(reload::NAME),
        door_file: state.door_file(),
        bypass_file: state.bypass_file(),
        keep_link: true,
    }))
}

fn join(
    config: &Config,
    request: &join::Request,
    by_unit: bool,
    discover: Option<&Label>,
) -> anyhow::Result<ExitCode> {
    let unit = join::servable(config, by_unit)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let joined = runtime.block_on(join::join(config, request))?;
    let (membership, new) = match joined {
        Joined::New { membership, skewed } => {
            if skewed {
                say(
                    "this host's clock and control's differ by more than a minute: set it, or certificates are refused\n",
                )?;
            }
            (membership, true)
        }
        Joined::Already(membership) => (membership, false),
    };
    for lacking in join::lacking() {
        say(&format!("{lacking}\n"))?;
    }
    let host = &membership.host;
    say(&format!(
        "{} {} as host {} ({}) in network {} at {}\n",
        if new {
            "joined"
        } else {
            "this host has already joined"
        },
        host.trust_domain,
        host.name,
        host.uid,
        host.network,
        membership.address,
    ))?;
    if let Some(namespace) = discover {
        discovered(config, namespace, true)?;
    }
    let services = config.services_dir.display();
    let Some(before) = unit else {
        return say(&format!(
            "next: name its workloads in {services} and start the agent (`mesh-agent run`)\n"
        ));
    };
    let serving = join::serve(config, before, new)?;
    say(&format!(
        "{} runs, and is started at boot\n\n{}\n{}",
        units::AGENT,
        serving.checks.render(),
        serving.in_the_mesh(&services.to_string())
    ))
}

fn discovered(config: &Config, namespace: &Label, write: bool) -> anyhow::Result<ExitCode> {
    let discovered = discover::discover(config, namespace)?;
    if write {
        discover::write(config, &discovered.proposals)?;
    }
    say(&discovered.render(config, write))
}

fn drain(config: &Config, meant: &Meant, wait: Option<Duration>) -> anyhow::Result<ExitCode> {
    if let Some(unit) = meant.unit() {
        return say(&drained::ask_of_unit(config, unit, wait)?);
    }
    match drained::ask(config, meant.what(), wait)? {
        Some(said) => say(&said),
        None => Err(no_agent(config)?),
    }
}

fn status(config: &Config, output: Output) -> anyhow::Result<ExitCode> {
    let Some(status) = status::ask::<Status>(&config.admin_socket(), "/state")? else {
        return Err(no_agent(config)?);
    };
    match output {
        Output::Table => say(&status.render(leaves::now_ms() / 1000)),
        Output::Json => say(&(serde_json::to_string_pretty(&status)? + "\n")),
    }
}

fn explain(
    config: &Config,
    destination: &str,
    caller: Option<&str>,
    output: Output,
) -> anyhow::Result<ExitCode> {
    let Some(explanation) = explain::ask(&config.admin_socket(), destination, caller)? else {
        return Err(no_agent(config)?);
    };
    match output {
        Output::Table => say(&explanation.render())?,
        Output::Json => say(&(serde_json::to_string_pretty(&explanation)? + "\n"))?,
    };
    Ok(match explanation.is_carried() {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    })
}

fn check(config: &Config, wait: Option<Duration>, output: Output) -> anyhow::Result<ExitCode> {
    let checks = check::run(config, wait);
    match output {
        Output::Table => say(&checks.render())?,
        Output::Json => say(&(serde_json::to_string_pretty(&checks)? + "\n"))?,
    };
    Ok(match checks.is_failed() {
        true => ExitCode::FAILURE,
        false => ExitCode::SUCCESS,
    })
}

/// Why nothing answers at the admin socket.
fn no_agent(config: &Config) -> anyhow::Result<anyhow::Error> {
    let membership = State::new(&config.state_dir).membership()?;
    Ok(match membership {
        Some(membership) => anyhow::anyhow!(
            "the agent does not run (nothing answers at {}); this host is {} of {}",
            config.admin_socket().display(),
            membership.host.name,
            membership.host.trust_domain
        ),
        None => anyhow::anyhow!("this host has not joined a mesh; run `mesh-agent join <token>`"),
    })
}

fn say(text: &str) -> anyhow::Result<ExitCode> {
    std::io::stdout()
        .write_all(text.as_bytes())
        .context("cannot write to stdout")?;
    Ok(ExitCode::SUCCESS)
}
