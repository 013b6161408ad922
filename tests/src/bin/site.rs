//! `meshwork-site`: what `cargo xtask` runs as root: the demonstration, the benchmark, and the sweep after a run
//! that was killed.

use std::path::PathBuf;

use clap::{Parser, Subcommand};
use meshwork_tests::load::Plan;

#[derive(Debug, Parser)]
#[command(
    name = "meshwork-site",
    about = "Sites of network namespaces for `cargo xtask`"
)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Show the mesh at work
    Demo {
        /// Leave everything running
        #[arg(long)]
        keep: bool,
    },
    /// Measure a pair of agents
    Bench {
        #[arg(long)]
        quick: bool,
        #[arg(long)]
        json: Option<PathBuf>,
    },
    /// A steady load, for the benchmark
    Load {
        #[arg(long)]
        url: String,
        #[arg(long)]
        rate: u32,
        #[arg(long)]
        connections: u32,
        #[arg(long)]
        seconds: u32,
    },
    /// Remove what dead test runs and the demonstration left
    Sweep {
        /// Also end a demonstration that was kept
        #[arg(long)]
        demo: bool,
    },
}

fn main() {
    match Args::parse().command {
        Command::Demo { keep } => meshwork_tests::demo::run(keep),
        Command::Bench { quick, json } => meshwork_tests::bench::run(quick, json.as_deref()),
        Command::Load {
            url,
            rate,
            connections,
            seconds,
        } => meshwork_tests::load::run(&Plan {
            url,
            rate,
            connections,
            seconds,
        }),
        Command::Sweep { demo } => {
            meshwork_tests::sweep::dead_tests();
            if demo {
                meshwork_tests::sweep::demo();
            }
        }
    }
}
