//! The tree obeys its own rules. Each test names the rule it keeps; the fix is in the message.

#![expect(clippy::unwrap_used, reason = "a test helper may panic")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use mesh_core::reason::Reason;
use meshwork_tests::root;
use serde_json::Value;

const CODE_LINES_MAX: usize = 600;

/// Where a third-party crate may be named. One crate, one place to replace it.
const HOMES: &[(&str, &[&str])] = &[
    ("hickory_", &["agent/src/dns"]),
    ("kube::", &[]),
    ("netlink_", &["agent/src/capture"]),
    ("quinn::", &[]),
    ("sled::", &["control/src/store.rs"]),
    (
        "tokio::",
        &["agent/", "cli/", "control/", "mesh/runtime/", "tests/"],
    ),
    (
        "clap::",
        &[
            "agent/",
            "cli/",
            "control/",
            "mesh/runtime/src/manual.rs",
            "tests/",
            "xtask/",
        ],
    ),
    (
        "tonic::",
        &["agent/", "control/", "mesh/api/", "mesh/runtime/", "tests/"],
    ),
    (
        "anyhow::",
        &["agent/", "cli/", "control/", "tests/", "xtask/"],
    ),
];

/// Who may depend on whom, of our own crates. Binaries never depend on each other.
const LAYERS: &[(&str, &[&str])] = &[
    ("mesh-core", &[]),
    ("mesh-api", &["mesh-core"]),
    ("mesh-runtime", &["mesh-core", "mesh-api"]),
    ("mesh-agent", &["mesh-core", "mesh-api", "mesh-runtime"]),
    ("mesh-control", &["mesh-core", "mesh-api", "mesh-runtime"]),
    ("meshctl", &["mesh-core", "mesh-api", "mesh-runtime"]),
    ("meshwork-tests", &["mesh-core", "mesh-api", "mesh-runtime"]),
    ("xtask", &[]),
];

/// Licences under which we may ship somebody's code without asking.
const LICENCES: &[&str] = &[
    "0BSD",
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "CC0-1.0",
    "CDLA-Permissive-2.0",
    "ISC",
    "MIT",
    "MIT-0",
    "MPL-2.0",
    "MPL-2.0+",
    "OpenSSL",
    "Unicode-3.0",
    "Unlicense",
    "Zlib",
];

/// Crates that must not come in, and why.
const BANNED: &[(&str, &str)] = &[
    ("openssl-sys", "TLS is rustls"),
    (
        "ring",
        "cryptography is aws-lc-rs; two providers make rustls choose at run time",
    ),
    ("rustables", "GPL-3"),
    ("serde_yaml", "unmaintained; use serde_norway"),
];

/// Where calls are carried: what begins so.
const DATA_PATH: &[&str] = &[
    "agent/src/accept",
    "agent/src/call",
    "agent/src/data",
    "agent/src/drain",
    "agent/src/http",
    "agent/src/inbound",
    "agent/src/limits",
    "agent/src/outbound",
    "agent/src/peers",
    "agent/src/places",
    "agent/src/quiet",
    "agent/src/relay",
    "agent/src/vanished",
    "mesh/api/src/header",
    "mesh/api/src/message",
    "mesh/core/src/balance",
    "mesh/core/src/http1",
    "mesh/core/src/rotation",
    "mesh/core/src/stream",
    "mesh/runtime/src/buffers",
    "mesh/runtime/src/mux",
    "mesh/runtime/src/tls",
];

/// A number whose name has one of these is a bound; a time always is.
const BOUNDS: &[&str] = &[
    "MAX", "MIN", "QUANTUM", "RESERVED", "SHARES", "SWEEPS", "TICKS", "TRIES", "TURN", "WINDOW",
];

/// Places that only exist on the machine where somebody wrote the text.
const MACHINE_PATHS: &[&str] = &["/root/", "/home/", "/Users/"];

#[test]
fn every_module_says_what_it_is() {
    check(|path, text| {
        let says = text.starts_with("//! ") && !text.starts_with("//! To be written");
        (!says).then(|| format!("{path}: begin with a `//!` line that says what it is"))
    });
}

#[test]
fn files_stay_small() {
    check(|path, text| {
        let code = text
            .lines()
            .take_while(|line| !line.starts_with("#[cfg(test)]"))
            .count();
        (CODE_LINES_MAX < code).then(|| format!("{path}: {code} lines of code; split it by stage"))
    });
}

#[test]
fn third_party_crates_stay_home() {
    check(|path, text| {
        let (name, homes) = HOMES.iter().find(|(name, homes)| {
            names_crate(text, name) && !homes.iter().any(|home| path.starts_with(home))
        })?;
        (path != "tests/tests/tidy.rs")
            .then(|| format!("{path}: names `{name}`, at home in {homes:?}"))
    });
}

/// Whether `name` stands in code, not as the tail of a longer word.
fn names_crate(text: &str, name: &str) -> bool {
    let code = text
        .lines()
        .filter(|line| !line.trim_start().starts_with("//"));
    code.into_iter().any(|line| {
        line.match_indices(name).any(|(at, _)| {
            let before = line[..at].chars().next_back();
            !before.is_some_and(|c| c.is_alphanumeric() || matches!(c, '_' | ':' | '-' | '"'))
        })
    })
}

/// Every path that ARCHITECTURE.md puts in backticks exists.
#[test]
fn the_map_is_true() {
    let map = fs::read_to_string(root().join("docs/ARCHITECTURE.md"))
        .expect("docs/ARCHITECTURE.md is the map of the tree; write it");
    let lost: Vec<&str> = map
        .split('`')
        .skip(1)
        .step_by(2)
        .filter(|word| word.contains('/') && word.ends_with(".rs") && !root().join(word).exists())
        .collect();
    assert!(
        lost.is_empty(),
        "docs/ARCHITECTURE.md names files that are gone: {lost:?}"
    );
}

/// Operators meet reasons in logs, metrics and headers; the page says what each means.
#[test]
fn every_reason_is_documented() {
    let page = fs::read_to_string(root().join("docs/reasons.md")).unwrap_or_default();
    let missing: Vec<String> = Reason::ALL
        .iter()
        .map(|reason| reason_line(*reason))
        .filter(|line| !page.lines().any(|l| l == line))
        .collect();
    assert!(
        missing.is_empty(),
        "docs/reasons.md has not these lines:\n{}",
        missing.join("\n")
    );
}

fn reason_line(reason: Reason) -> String {
    format!(
        "| `{}` | {:?} | {} | {} |",
        reason.code(),
        reason.fault(),
        reason.http_status(),
        reason.text()
    )
}

/// What is captured and what fails closed or open is a promise: each line of those tables names tests, which exist.
#[test]
fn every_line_about_interception_has_a_test() {
    let page = fs::read_to_string(root().join("docs/interception.md")).unwrap();
    let mut in_table = false;
    let mut rows = 0;
    let mut wrong = Vec::new();
    for line in page.lines() {
        let last = line.trim_end_matches('|').rsplit('|').next().unwrap_or("");
        if !line.starts_with('|') {
            in_table = false;
        } else if last.trim() == "test" {
            in_table = true;
        } else if in_table && !line.starts_with("|---") {
            rows += 1;
            let tests: Vec<&str> = last.split('`').skip(1).step_by(2).collect();
            if tests.is_empty() || !tests.iter().all(|test| is_hosts_test(test)) {
                wrong.push(line);
            }
        }
    }
    assert!(rows > 30, "only {rows} lines were found");
    assert!(
        wrong.is_empty(),
        "docs/interception.md: these lines name no test of tests/tests/namespaces/ or booted/: {wrong:#?}"
    );
}

/// `module::function` of the namespaces or booted tier.
fn is_hosts_test(name: &str) -> bool {
    let Some((module, function)) = name.split_once("::") else {
        return false;
    };
    ["namespaces", "booted"].iter().any(|tier| {
        let file = root().join(format!("tests/tests/{tier}/{module}.rs"));
        let text = fs::read_to_string(file).unwrap_or_default();
        text.contains(&format!("#[test]\nfn {function}()"))
    })
}

/// Every constant that bounds the data path stands in docs/reference.md with its value.
#[test]
fn every_bound_of_the_data_path_is_documented() {
    let page = fs::read_to_string(root().join("docs/reference.md")).unwrap_or_default();
    let listed: Vec<&str> = page
        .lines()
        .filter(|line| line.starts_with("| `") && line.contains("::"))
        .collect();
    let mut rows = Vec::new();
    for file in files_below(&root(), "rs") {
        let path = file.strip_prefix(root()).unwrap().to_string_lossy();
        if DATA_PATH.iter().any(|part| path.starts_with(part)) && !path.contains("/tests") {
            let text = fs::read_to_string(&file).unwrap();
            let code = text.lines().take_while(|line| *line != "#[cfg(test)]");
            let place = path.trim_end_matches(".rs").replace("/src/", "/");
            rows.extend(
                code.filter_map(bound)
                    .map(|(name, value)| format!("| `{place}::{name}` | {value} | ")),
            );
        }
    }
    let of = |row: &String| listed.iter().filter(|line| line.starts_with(row)).count();
    let missing: Vec<&String> = rows.iter().filter(|row| of(row) != 1).collect();
    assert!(
        missing.is_empty() && rows.len() == listed.len(),
        "docs/reference.md must have these rows, each once: {missing:#?}\nand no others: {} for {} constants",
        listed.len(),
        rows.len()
    );
}

/// A constant that is a bound: its name, and its value as a reader of the page sees it.
fn bound(line: &str) -> Option<(&str, String)> {
    let (_, declared) = line.split_once("const ")?;
    let (name, rest) = declared.split_once(": ")?;
    let (kind, value) = rest.trim_end_matches(';').split_once(" = ")?;
    let number = ["usize", "u16", "u32", "u64"].contains(&kind);
    let bounds = BOUNDS.iter().any(|word| name.contains(word));
    if kind != "Duration" && !(number && bounds) {
        return None;
    }
    let time = |function: &str, unit: &str| {
        let inner = value.strip_prefix(function)?.strip_suffix(')')?;
        Some(format!("{} {unit}", inner.replace('_', "")))
    };
    let plain = |c: char| c.is_ascii_digit() || "_ *<".contains(c);
    let shown = time("Duration::from_secs(", "s")
        .or_else(|| time("Duration::from_millis(", "ms"))
        .or_else(|| value.chars().all(plain).then(|| value.replace('_', "")))
        .unwrap_or_else(|| format!("`{value}`"));
    Some((name, shown))
}

#[test]
fn texts_name_no_path_of_a_machine() {
    let mut files = vec![root().join("README.md")];
    files.extend(files_below(&root().join("docs"), "md"));
    let mut broken = Vec::new();
    for file in files {
        let text = fs::read_to_string(&file).unwrap_or_default();
        let found = MACHINE_PATHS.iter().filter(|path| text.contains(*path));
        broken.extend(found.map(|path| format!("{}: names {path}", file.display())));
    }
    assert!(broken.is_empty(), "\n{}", broken.join("\n"));
}

#[test]
fn dependencies_point_one_way() {
    let metadata = cargo(&["metadata", "--format-version=1", "--locked", "--no-deps"]);
    let metadata: Value = serde_json::from_str(&metadata).unwrap();
    let mut broken = Vec::new();
    for package in metadata["packages"].as_array().unwrap() {
        let name = package["name"].as_str().unwrap();
        let Some((_, allowed)) = LAYERS.iter().find(|(layer, _)| *layer == name) else {
            broken.push(format!("{name} is in no layer; add it to LAYERS"));
            continue;
        };
        for dependency in package["dependencies"].as_array().unwrap() {
            let on = dependency["name"].as_str().unwrap();
            if LAYERS.iter().any(|(layer, _)| *layer == on) && !allowed.contains(&on) {
                broken.push(format!("{name} depends on {on}"));
            }
        }
    }
    assert!(broken.is_empty(), "\n{}", broken.join("\n"));
}

#[test]
fn licences_are_ones_we_may_ship() {
    let built = built_crates();
    let broken: Vec<_> = built
        .iter()
        .filter(|(_, licence)| !may_ship(licence))
        .collect();
    assert!(broken.is_empty(), "{broken:#?}");
}

/// Of an SPDX expression: one side of each OR, all sides of each AND.
fn may_ship(expression: &str) -> bool {
    // Old manifests write `MIT/Apache-2.0`. Where AND and OR mix, the ones met so far have all parts fine.
    let plain = expression.replace('/', " OR ").replace(['(', ')'], "");
    plain
        .split(" AND ")
        .all(|all| all.split(" OR ").any(|one| LICENCES.contains(&one.trim())))
}

#[test]
fn banned_crates_stay_out() {
    let built = built_crates();
    for (name, why) in BANNED {
        assert!(!built.contains_key(*name), "{name} came in: {why}");
    }
}

/// Versions are named once, in the workspace.
#[test]
fn versions_stand_in_the_workspace() {
    for manifest in files_below(&root(), "toml") {
        let path = manifest.strip_prefix(root()).unwrap().to_owned();
        let own_workspace = path == Path::new("Cargo.toml") || path == Path::new("fuzz/Cargo.toml");
        if path.file_name().unwrap() != "Cargo.toml" || own_workspace {
            continue;
        }
        let text = fs::read_to_string(&manifest).unwrap();
        let dependencies = text.split("dependencies]").skip(1);
        for line in dependencies.flat_map(|s| s.split("\n[").next().unwrap_or_default().lines()) {
            let own = line.contains('=') && !line.contains("workspace = true");
            assert!(
                !own,
                "{}: `{line}`; write `.workspace = true`",
                path.display()
            );
        }
    }
}

/// Every crate that is really built for this platform, with its licence.
fn built_crates() -> BTreeMap<String, String> {
    let format = "{p}|{l}";
    let text = cargo(&[
        "tree",
        "--locked",
        "--workspace",
        "--prefix=none",
        "--format",
        format,
    ]);
    let lines = text.lines().filter_map(|line| line.split_once('|'));
    lines
        .map(|(package, licence)| {
            let name = package.split(' ').next().unwrap_or_default();
            (name.to_owned(), licence.trim_end_matches(" (*)").to_owned())
        })
        .collect()
}

fn cargo(words: &[&str]) -> String {
    let output = Command::new(env!("CARGO"))
        .args(words)
        .current_dir(root())
        .output()
        .unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "cargo {words:?}: {errors}");
    String::from_utf8(output.stdout).unwrap()
}

#[track_caller]
fn check(rule: impl Fn(&str, &str) -> Option<String>) {
    let mut broken = Vec::new();
    for file in files_below(&root(), "rs") {
        let path = file
            .strip_prefix(root())
            .unwrap()
            .to_string_lossy()
            .into_owned();
        broken.extend(rule(&path, &fs::read_to_string(&file).unwrap()));
    }
    assert!(broken.is_empty(), "\n{}", broken.join("\n"));
}

fn files_below(dir: &Path, extension: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).into_iter().flatten() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if path.is_dir() && name != "target" && !name.starts_with('.') {
            found.extend(files_below(&path, extension));
        } else if path.extension().is_some_and(|ext| ext == extension) {
            found.push(path);
        }
    }
    found.sort();
    found
}
