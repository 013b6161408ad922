//! `meshwork-site`: what `cargo xtask` runs as root: the demonstration, the benchmark, and the sweep after a run
//! that was killed.

use clap::{Parser, Subcommand};

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
        Command::Sweep { demo } => {
            meshwork_tests::sweep::dead_tests();
            if demo {
                meshwork_tests::sweep::demo();
            }
        }
    }
}
