//! What `mesh-agent check` and `meshctl check` find: named checks, each with what was found and what to do.

use std::fmt::{self, Write as _};

use serde::{Deserialize, Serialize};

/// Details that a page shows of one check; JSON has all.
const DETAILS_MAX: usize = 10;

/// How a check came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    Ok,
    /// It could not be made, and why it could not is a check of its own.
    Skipped,
    /// It works, and somebody should look.
    Warning,
    Failed,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ok => "ok",
            Self::Skipped => "skipped",
            Self::Warning => "WARNING",
            Self::Failed => "FAILED",
        })
    }
}

/// One check. Names are stable: scripts ask for them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    pub name: String,
    pub verdict: Verdict,
    /// What was found, in a line.
    pub found: String,
    /// The objects that it is about.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub details: Vec<String>,
    /// What to do; empty where nothing is to be done.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub remedy: String,
}

impl Check {
    fn new(name: &str, verdict: Verdict, found: impl Into<String>) -> Self {
        Self {
            name: name.to_owned(),
            verdict,
            found: found.into(),
            details: Vec::new(),
            remedy: String::new(),
        }
    }

    pub fn ok(name: &str, found: impl Into<String>) -> Self {
        Self::new(name, Verdict::Ok, found)
    }

    pub fn skipped(name: &str, why: impl Into<String>) -> Self {
        Self::new(name, Verdict::Skipped, why)
    }

    pub fn warning(name: &str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        let remedy = remedy.into();
        Self {
            remedy,
            ..Self::new(name, Verdict::Warning, found)
        }
    }

    pub fn failed(name: &str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        let remedy = remedy.into();
        Self {
            remedy,
            ..Self::new(name, Verdict::Failed, found)
        }
    }

    /// The same with the objects that it is about.
    pub fn about(mut self, details: impl IntoIterator<Item = String>) -> Self {
        self.details.extend(details);
        self
    }
}

/// All checks of one subject.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Checks {
    pub checks: Vec<Check>,
}

impl Checks {
    /// Whether one failed: the exit code of both commands.
    pub fn is_failed(&self) -> bool {
        self.count(Verdict::Failed) > 0
    }

    fn count(&self, verdict: Verdict) -> usize {
        self.checks.iter().filter(|c| c.verdict == verdict).count()
    }

    /// The page for people.
    pub fn render(&self) -> String {
        let mut page = String::new();
        // Writing to a string does not fail.
        let _ = self.write(&mut page);
        page
    }

    fn write(&self, page: &mut String) -> fmt::Result {
        let names = self.checks.iter().map(|c| c.name.chars().count());
        let width = names.max().unwrap_or_default();
        for check in &self.checks {
            let verdict = check.verdict.to_string();
            let found = printable(&check.found);
            writeln!(page, "{verdict:<7}  {:<width$}  {found}", check.name)?;
            let indent = " ".repeat(width + 11);
            for detail in check.details.iter().take(DETAILS_MAX) {
                writeln!(page, "{indent}- {}", printable(detail))?;
            }
            if DETAILS_MAX < check.details.len() {
                let more = check.details.len() - DETAILS_MAX;
                writeln!(page, "{indent}- and {more} more (-o json)")?;
            }
            if !check.remedy.is_empty() {
                writeln!(page, "{indent}do: {}", printable(&check.remedy))?;
            }
        }
        let counts = [
            (Verdict::Failed, "failed"),
            (Verdict::Warning, "warnings"),
            (Verdict::Skipped, "skipped"),
            (Verdict::Ok, "ok"),
        ];
        let words = counts.map(|(verdict, word)| format!("{} {word}", self.count(verdict)));
        writeln!(page, "\n{}", words.join(", "))
    }
}

/// Names come from hosts: control characters are shown, not obeyed.
fn printable(text: &str) -> String {
    text.chars()
        .flat_map(|c| {
            let shown: String = if c.is_control() {
                c.escape_default().collect()
            } else {
                c.to_string()
            };
            shown.chars().collect::<Vec<_>>()
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checks() -> Checks {
        let details = (0..12).map(|n| format!("host vm-{n}\u{1b}"));
        Checks {
            checks: vec![
                Check::ok("control", "live"),
                Check::warning("plaintext", "12 callers", "make it strict").about(details),
                Check::skipped("peers", "no agent runs"),
            ],
        }
    }

    #[test]
    fn the_page_says_what_was_found_and_what_to_do() {
        let page = checks().render();
        let expected = "ok       control    live\n\
             WARNING  plaintext  12 callers\n                    - host vm-0\\u{1b}\n";
        assert!(page.starts_with(expected), "{page}");
        for part in [
            "- and 2 more (-o json)\n",
            "do: make it strict\n",
            "skipped  peers      no agent runs\n",
            "\n0 failed, 1 warnings, 1 skipped, 1 ok\n",
        ] {
            assert!(page.contains(part), "{part} is missing:\n{page}");
        }
    }

    #[test]
    fn only_what_failed_fails_the_whole_and_json_reads_back() {
        let mut all = checks();
        assert!(!all.is_failed());
        all.checks.push(Check::failed("rules", "none", "restart"));
        assert!(all.is_failed());
        let text = serde_json::to_string(&all).unwrap();
        assert!(text.contains(r#""verdict":"failed""#), "{text}");
        assert_eq!(serde_json::from_str::<Checks>(&text).unwrap(), all);
    }
}
