//! `meshwork-site`: what `cargo xtask` runs as root: the demonstration, the benchmark, and the sweep after a run
//! that was killed.

use std::path::PathBuf;

use clap::{Parser, Subcommand};
use meshwork_tests::bench::{self, Load, Options, Part, Subject};
use meshwork_tests::load::Plan;
use meshwork_tests::site::Site;

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
        /// Show six attacks that fail
        #[arg(long, conflicts_with = "keep")]
        attack: bool,
        /// Leave everything running
        #[arg(long)]
        keep: bool,
        /// Show the life of machines that boot
        #[arg(long, conflicts_with_all = ["attack", "keep"])]
        booted: bool,
    },
    /// Measure a pair of agents and what it is compared with
    Bench {
        #[arg(long)]
        quick: bool,
        #[arg(long)]
        rounds: Option<usize>,
        #[arg(long)]
        seconds: Option<u64>,
        #[arg(long, value_enum, value_delimiter = ',')]
        only: Vec<Part>,
        #[arg(long, value_enum, value_delimiter = ',')]
        load: Vec<Load>,
        #[arg(long, value_enum, value_delimiter = ',')]
        subject: Vec<Subject>,
        #[arg(long)]
        json: Option<PathBuf>,
        /// Show the tables of such a file instead
        #[arg(long)]
        show: Option<PathBuf>,
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
        /// A connection for each request
        #[arg(long)]
        close: bool,
    },
    /// Connections that stand open, for the benchmark
    Hold {
        #[arg(long)]
        url: String,
        #[arg(long)]
        connections: u32,
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
        Command::Demo { attack: true, .. } => {
            meshwork_tests::sweep::demo();
            meshwork_tests::attack::run(&Site::demo(false));
        }
        Command::Demo { booted: true, .. } => meshwork_tests::booted::demo::run(),
        Command::Demo { keep, .. } => meshwork_tests::demo::run(keep),
        Command::Bench {
            show: Some(json), ..
        } => bench::show(&json),
        Command::Bench {
            quick,
            rounds,
            seconds,
            only,
            load,
            subject,
            json,
            show: None,
        } => drop(bench::run(&Options {
            quick,
            rounds,
            seconds,
            only,
            loads: load,
            subjects: subject,
            json,
        })),
        Command::Load {
            url,
            rate,
            connections,
            seconds,
            close,
        } => meshwork_tests::load::run(&Plan {
            url,
            rate,
            connections,
            seconds,
            close,
        }),
        Command::Hold { url, connections } => meshwork_tests::load::hold(&url, connections),
        Command::Sweep { demo } => {
            meshwork_tests::sweep::dead_tests();
            if demo {
                meshwork_tests::sweep::demo();
            }
        }
    }
}
