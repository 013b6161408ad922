//! `cargo xtask test`: the tiers, their minutes, and one closing line.

use std::io::Write as _;
use std::time::Instant;

use clap::ValueEnum;

use crate::{apt, base, child, package};

/// How long the soak works when it is asked for by name; in a run of the whole tier it says itself.
const SOAK_SECONDS: &str = "300";
/// Sites wait more than they compute, so more run at once than there are cores.
const NAMESPACE_THREADS: &str = "--test-threads=3";
/// The same of hosts that boot, each of which is three or more.
const BOOTED_THREADS: &str = "--test-threads=2";

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Tier {
    /// Pure logic and seeded simulations, and the rules of the tree
    Unit,
    /// Golden bytes and hostile input for every parser of ours
    Wire,
    /// Real binaries, servers and clients in network namespaces (needs root)
    Namespaces,
    /// Installed packages on a booted systemd
    Booted,
    /// Real Kubernetes clusters
    Clusters,
}

/// What libtest counted.
#[derive(Clone, Copy, Debug, Default)]
struct Count {
    passed: usize,
    failed: usize,
}

impl Count {
    fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
    }

    fn ran(self) -> bool {
        0 < self.passed + self.failed
    }
}

impl Tier {
    const STANDING: [Self; 4] = [Self::Unit, Self::Wire, Self::Namespaces, Self::Booted];

    fn name(self) -> String {
        let value = self.to_possible_value();
        value.map(|v| v.get_name().to_owned()).unwrap_or_default()
    }

    /// The calls of `cargo test` that make the tier up.
    fn commands(self) -> &'static [&'static [&'static str]] {
        match self {
            Self::Unit => &[
                &[
                    "--workspace",
                    "--exclude",
                    "meshwork-tests",
                    "--lib",
                    "--bins",
                ],
                &["--package", "meshwork-tests", "--lib", "--test", "tidy"],
            ],
            Self::Wire => &[&["--package", "meshwork-tests", "--test", "wire"]],
            Self::Namespaces => &[&["--package", "meshwork-tests", "--test", "namespaces"]],
            Self::Booted => &[&["--package", "meshwork-tests", "--test", "booted"]],
            Self::Clusters => &[],
        }
    }
}

pub(crate) fn run(tiers: &[Tier], lint: bool, filter: Option<&str>) -> anyhow::Result<()> {
    let tiers = if tiers.is_empty() {
        &Tier::STANDING
    } else {
        tiers
    };
    for tier in tiers {
        anyhow::ensure!(
            Tier::STANDING.contains(tier),
            "tier {} does not stand yet; these do: unit, wire, namespaces, booted",
            tier.name()
        );
    }
    let mut total = Count::default();
    if lint {
        total.add(timed("lint", lints));
    }
    for tier in tiers {
        let count = timed(&tier.name(), || {
            prepare(*tier).map_or_else(|error| failed(&error), |()| tests(*tier, filter))
        });
        total.add(count);
        if !count.ran() && filter.is_none() {
            child::say(&format!(
                "tier {} ran nothing; that is a failure",
                tier.name()
            ));
            total.failed += 1;
        }
    }
    if !total.ran() {
        child::say("no test has such a name; that is a failure");
        total.failed += 1;
    }
    let line = format!("{} passed, {} failed", total.passed, total.failed);
    drop(writeln!(std::io::stdout().lock(), "{line}"));
    anyhow::ensure!(total.failed == 0, "tests failed");
    Ok(())
}

fn timed(name: &str, run: impl FnOnce() -> Count) -> Count {
    let start = Instant::now();
    let count = run();
    child::say(&format!(
        "tier {name}: {} passed, {} failed in {:.1} minutes",
        count.passed,
        count.failed,
        start.elapsed().as_secs_f64() / 60.0
    ));
    count
}

fn failed(error: &anyhow::Error) -> Count {
    child::say(&format!("error: {error:#}"));
    Count {
        passed: 0,
        failed: 1,
    }
}

/// Format, lints, and whether the fuzz targets compile, each one check.
fn lints() -> Count {
    let mut count = Count::default();
    let words: [&[&str]; 3] = [
        &["fmt", "--all", "--check"],
        &[
            "clippy",
            "--workspace",
            "--all-targets",
            "--locked",
            "--",
            "-D",
            "warnings",
        ],
        &[
            "check",
            "--manifest-path",
            "fuzz/Cargo.toml",
            "--locked",
            "--target-dir",
            "target/fuzz",
        ],
    ];
    for words in words {
        let mut command = child::cargo(words);
        // Who fuzzes builds libFuzzer; that the targets still fit what they feed is seen without it.
        command.env("CUSTOM_LIBFUZZER_PATH", "/none/libfuzzer.a");
        match child::run(&mut command) {
            Ok(()) => count.passed += 1,
            Err(error) => count.add(failed(&error)),
        }
    }
    count
}

fn prepare(tier: Tier) -> anyhow::Result<()> {
    if tier == Tier::Wire {
        return apt::install(apt::WIRE);
    }
    match tier {
        Tier::Namespaces => {
            apt::need_root("the namespaces tier makes network namespaces")?;
            apt::install(apt::NAMESPACES)?;
        }
        Tier::Booted => {
            apt::need_root("the booted tier boots hosts")?;
            return prepare_booted();
        }
        _ => return Ok(()),
    }
    build_and_sweep()
}

/// All that hosts need which boot, and are installed from packages of what the tests build.
pub(crate) fn prepare_booted() -> anyhow::Result<()> {
    apt::install(apt::BOOTED)?;
    base::make()?;
    package::run(true)?;
    build_and_sweep()
}

fn build_and_sweep() -> anyhow::Result<()> {
    child::build(child::Profile::Dev)?;
    // What an earlier run left when it was killed together with us.
    child::site(child::Profile::Dev, &["sweep"])
}

fn tests(tier: Tier, filter: Option<&str>) -> Count {
    let mut count = Count::default();
    for selection in tier.commands() {
        let mut words = vec!["test", "--no-fail-fast", "--locked"];
        words.extend(*selection);
        words.extend(filter);
        words.push("--");
        words.extend(match tier {
            Tier::Namespaces => Some(NAMESPACE_THREADS),
            Tier::Booted => Some(BOOTED_THREADS),
            _ => None,
        });
        let soak = filter.is_some_and(|filter| filter.contains("soak"));
        // It says how the memory goes.
        words.extend(soak.then_some("--nocapture"));
        let mut counted = Count::default();
        let mut command = child::cargo(&words);
        if soak {
            command.env("MESH_SOAK_SECONDS", SOAK_SECONDS);
        }
        let ended = child::run_lines(&mut command, |line| {
            drop(writeln!(std::io::stdout().lock(), "{line}"));
            counted.add(result_of(line).unwrap_or_default());
        });
        // It failed without a failed test: it did not compile, or a test binary died.
        if let Err(error) = ended
            && counted.failed == 0
        {
            counted.add(failed(&error));
        }
        count.add(counted);
    }
    count
}

/// `test result: ok. 3 passed; 0 failed; …`
fn result_of(line: &str) -> Option<Count> {
    let (_, counts) = line
        .trim()
        .strip_prefix("test result: ")?
        .split_once(". ")?;
    let number = |word: &str| {
        let part = counts.split("; ").find(|part| part.ends_with(word))?;
        part.split(' ').next()?.parse().ok()
    };
    Some(Count {
        passed: number(" passed")?,
        failed: number(" failed")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_of_libtest_are_counted() {
        let line = "test result: FAILED. 12 passed; 3 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.01s";
        let count = result_of(line).unwrap();
        assert_eq!((count.passed, count.failed), (12, 3));
        assert!(result_of("test result_of ... ok").is_none());
    }
}
