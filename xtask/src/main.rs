//! `cargo xtask`: what a developer or CI does with a checkout. It sets up the machine, builds, runs, and cleans up
//! after itself, also after Ctrl-C.

mod apt;
mod child;
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
    /// Measure CPU-microseconds per request of a pair of agents (needs root)
    Bench {
        /// Two rounds instead of five
        #[arg(long)]
        quick: bool,
        /// Build with the release profile, which takes minutes longer; otherwise what the tests use is measured
        #[arg(long)]
        release: bool,
        /// Write the figures as JSON to this file
        #[arg(long, value_name = "FILE")]
        json: Option<PathBuf>,
    },
}

fn main() -> ExitCode {
    let args = Args::parse();
    let done = child::watch_signals().and_then(|()| match args.command {
        Command::Demo { end: true, .. } => sweep(),
        Command::Demo { keep, .. } => demo(keep),
        Command::Test { tier, lint, filter } => test::run(&tier, lint, filter.as_deref()),
        Command::Bench {
            quick,
            release,
            json,
        } => bench(quick, release, json.as_deref()),
    });
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            child::say(&format!("error: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn demo(keep: bool) -> anyhow::Result<()> {
    apt::need_root("the demonstration makes network namespaces")?;
    apt::install(apt::DEMO)?;
    child::build(Profile::Dev)?;
    child::owns_demo();
    let mut words = vec!["demo"];
    words.extend(keep.then_some("--keep"));
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

fn bench(quick: bool, release: bool, json: Option<&Path>) -> anyhow::Result<()> {
    apt::need_root("the benchmark makes network namespaces")?;
    apt::install(apt::BENCH)?;
    let profile = if release {
        Profile::Release
    } else {
        Profile::Dev
    };
    child::build(profile)?;
    let mut words = vec!["bench"];
    words.extend(quick.then_some("--quick"));
    let json = json.map(|path| path.display().to_string());
    if let Some(path) = &json {
        words.extend(["--json", path]);
    }
    let measured = child::site(profile, &words);
    if measured.is_err() {
        child::sweep_all();
    }
    measured
}

/// The directory of the checkout.
fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_owned()
}
