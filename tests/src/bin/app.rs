//! `meshwork-app`: the program at either end of the torture tests.

use clap::Parser as _;
use meshwork_tests::app::{Task, run};

fn main() -> std::process::ExitCode {
    run(Task::parse())
}
