//! Manual pages and completions of a command line, made of its definition. `cargo xtask package` asks each program
//! for its own.

use std::fs::{self, File};
use std::io;
use std::path::Path;

use clap::Command;
use clap_complete::Shell;

/// Writes `man/` (a page for each command) and `completions/` below `dir`.
///
/// # Errors
/// When something there can not be written.
pub fn write(mut command: Command, dir: &Path) -> io::Result<()> {
    let (man, completions) = (dir.join("man"), dir.join("completions"));
    fs::create_dir_all(&man)?;
    fs::create_dir_all(&completions)?;
    // Before the completions, which give the command a `help` that would have pages of its own.
    clap_mangen::generate_to(command.clone(), &man)?;
    let name = command.get_name().to_owned();
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        let path = completions.join(format!("{name}.{shell}"));
        clap_complete::generate(shell, &mut command, &name, &mut File::create(path)?);
    }
    Ok(())
}
