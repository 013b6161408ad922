//! `cargo xtask`: what a developer or CI does with a checkout. It sets up the machine, builds, runs, and cleans up
//! after itself, also after Ctrl-C.

mod apt;
mod base;
mod child;
mod envoy;
mod package;
mod test;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::child::Profile;
use crate::test::Tier;

#[derive(Debug, Parser)]
#[command(name = "cargo xtask", about = "Build, show, test and measure Meshwork")]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Three hosts on this machine, real servers and clients, and what the mesh does for them (needs root)
    Demo {
        /// Leave everything running afterwards
        #[arg(long)]
        keep: bool,
        /// End a demonstration that was kept
        #[arg(long, conflicts_with = "keep")]
        end: bool,
        /// Instead of that: six attacks, and how an operator learns of each
        #[arg(long, conflicts_with_all = ["keep", "end"])]
        attack: bool,
        /// Instead of that: machines that boot are installed from packages, join, call, are upgraded under load, and leave
        #[arg(long, conflicts_with_all = ["keep", "end", "attack"])]
        booted: bool,
    },
    /// Run the tests of these tiers, or of all that stand
    Test {
        #[arg(long, value_enum, value_name = "TIER")]
        tier: Vec<Tier>,
        /// Also check format and lints, each counted as one test
        #[arg(long)]
        lint: bool,
        /// Only tests whose name contains this
        filter: Option<String>,
    },
    /// Make the packages, deb and rpm, of the agent, of control and of meshctl, in target/package
    Package {
        /// Of what the tests build, for this machine's libc, instead of the release, which takes many minutes
        #[arg(long)]
        quick: bool,
    },
    /// Measure a pair of agents and the pairs of proxies it is compared with, in one interleaved run (needs root)
    Bench(Bench),
}

#[derive(Debug, Default, clap::Args)]
struct Bench {
    /// Two rounds of two seconds a cell instead of five of five
    #[arg(long)]
    quick: bool,
    /// Measure what the tests use instead of building with the release profile, which takes minutes longer
    #[arg(long)]
    dev: bool,
    #[arg(long, value_name = "NUMBER")]
    rounds: Option<usize>,
    /// Length of a cell
    #[arg(long, value_name = "NUMBER")]
    seconds: Option<u32>,
    /// Only these: http, tcp, grpc, bulk, short, idle, growth
    #[arg(long, value_name = "WORKLOAD[,..]")]
    only: Option<String>,
    /// Only these loads: c1, c32, c128, r2000
    #[arg(long, value_name = "LOAD[,..]")]
    load: Option<String>,
    /// Only these subjects: direct, meshwork, haproxy, envoy, relay
    #[arg(long, value_name = "SUBJECT[,..]")]
    subject: Option<String>,
    /// Write the figures as JSON to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Measure nothing: show the tables of such a file, in Markdown
    #[arg(long, value_name = "FILE")]
    show: Option<PathBuf>,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let done = child::watch_signals().and_then(|()| match args.command {
        Command::Demo { end: true, .. } => sweep(),
        Command::Demo { attack: true, .. } => demo(&["--attack"]),
        Command::Demo { booted: true, .. } => booted_demo(),
        Command::Demo { keep: true, .. } => demo(&["--keep"]),
        Command::Demo { .. } => demo(&[]),
        Command::Test { tier, lint, filter } => test::run(&tier, lint, filter.as_deref()),
        Command::Package { quick } => package::run(quick),
        Command::Bench(what) => bench(&what),
    });
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            child::say(&format!("error: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn demo(options: &[&str]) -> anyhow::Result<()> {
    apt::need_root("the demonstration makes network namespaces")?;
    apt::install(apt::DEMO)?;
    child::say("building everything: the first time that takes some minutes");
    child::build(Profile::Dev)?;
    run_demo(options)
}

fn booted_demo() -> anyhow::Result<()> {
    apt::need_root("the demonstration boots machines")?;
    test::prepare_booted()?;
    run_demo(&["--booted"])
}

fn run_demo(options: &[&str]) -> anyhow::Result<()> {
    child::owns_demo();
    let mut words = vec!["demo"];
    words.extend(options);
    let shown = child::site(Profile::Dev, &words);
    if shown.is_err() {
        child::sweep_all();
    }
    shown
}

fn sweep() -> anyhow::Result<()> {
    apt::need_root("removing network namespaces")?;
    child::build(Profile::Dev)?;
    child::site(Profile::Dev, &["sweep", "--demo"])
}

fn bench(what: &Bench) -> anyhow::Result<()> {
    let profile = match what.dev {
        true => Profile::Dev,
        false => Profile::Release,
    };
    let mut words = vec!["bench".to_owned()];
    words.extend(what.quick.then(|| "--quick".to_owned()));
    let path = |path: &Option<PathBuf>| path.as_ref().map(|path| path.display().to_string());
    for (option, value) in [
        ("--rounds", what.rounds.map(|rounds| rounds.to_string())),
        ("--seconds", what.seconds.map(|s| s.to_string())),
        ("--only", what.only.clone()),
        ("--load", what.load.clone()),
        ("--subject", what.subject.clone()),
        ("--json", path(&what.json)),
        ("--show", path(&what.show)),
    ] {
        words.extend(
            value
                .into_iter()
                .flat_map(|value| [option.to_owned(), value]),
        );
    }
    if what.show.is_none() {
        apt::need_root("the benchmark makes network namespaces")?;
        apt::install(apt::BENCH)?;
    }
    child::build(profile)?;
    let mut site = child::site_command(profile);
    let all = what.subject.as_deref().unwrap_or("envoy");
    if what.show.is_none() && all.contains("envoy") {
        site.env("MESH_ENVOY", envoy::install()?);
    }
    let done = child::run(site.args(words));
    if done.is_err() {
        child::sweep_all();
    }
    done
}

/// The directory of the checkout.
fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_owned()
}
