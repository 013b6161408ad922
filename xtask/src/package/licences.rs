//! The licences of the crates that a program contains.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use serde_json::Value;

use crate::child;

/// How the files begin, in capitals, that hold a licence or what it asks to be passed on.
const FILES: [&str; 5] = ["LICENSE", "LICENCE", "COPYING", "NOTICE", "UNLICENSE"];

/// A crate that is not ours.
struct Crate {
    title: String,
    dir: PathBuf,
}

/// A list of the crates in `program`, then each text once with the crates that it is of.
pub(super) fn all(program: &str) -> anyhow::Result<String> {
    let mut list = format!("{program} contains the code of these crates.\n\n");
    let mut texts: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for of in crates(program)? {
        list += &format!("{}\n", of.title);
        for text in licences(&of.dir)? {
            let name = of.title.split(" (").next().unwrap_or_default();
            texts.entry(text).or_default().push(name.to_owned());
        }
    }
    for (text, names) in texts {
        let line = "-".repeat(100);
        list += &format!("\n{line}\nOf {}:\n\n{}\n", names.join(", "), text.trim());
    }
    Ok(list)
}

/// By what cargo resolved, without what only builds or tests need.
fn crates(program: &str) -> anyhow::Result<Vec<Crate>> {
    let triple = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    let mut text = String::new();
    let words = [
        "metadata",
        "--format-version=1",
        "--locked",
        "--filter-platform",
        &triple,
    ];
    child::run_lines(&mut child::cargo(&words), |line| text += line)?;
    let metadata: Value = serde_json::from_str(&text).context("what `cargo metadata` says")?;
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let word = |value: &Value| value.as_str().unwrap_or_default().to_owned();

    let packages = list(&metadata["packages"]);
    let by_id: BTreeMap<String, &Value> = packages.iter().map(|p| (word(&p["id"]), p)).collect();
    let nodes = list(&metadata["resolve"]["nodes"]);
    let node_of: BTreeMap<String, &Value> = nodes.iter().map(|n| (word(&n["id"]), n)).collect();
    let first = packages.iter().find(|p| p["name"] == program);
    let mut waiting = vec![word(
        &first.with_context(|| format!("no crate {program}"))?["id"],
    )];
    let mut seen = BTreeSet::new();
    while let Some(id) = waiting.pop() {
        for dependency in node_of
            .get(&id)
            .map(|node| list(&node["deps"]))
            .unwrap_or_default()
        {
            let is_normal = list(&dependency["dep_kinds"])
                .iter()
                .any(|kind| kind["kind"].is_null());
            let id = word(&dependency["pkg"]);
            if is_normal && seen.insert(id.clone()) {
                waiting.push(id);
            }
        }
    }
    let mut found: Vec<Crate> = seen
        .iter()
        .filter_map(|id| by_id.get(id))
        // Ours have no registry.
        .filter(|package| !package["source"].is_null())
        .map(|package| Crate {
            title: format!(
                "{} {} ({}) {}",
                word(&package["name"]),
                word(&package["version"]),
                word(&package["license"]),
                word(&package["repository"])
            ),
            dir: Path::new(&word(&package["manifest_path"]))
                .parent()
                .unwrap_or_else(|| Path::new("/"))
                .to_owned(),
        })
        .collect();
    found.sort_by(|a, b| a.title.cmp(&b.title));
    anyhow::ensure!(!found.is_empty(), "cargo knows no dependency of {program}");
    Ok(found)
}

fn licences(dir: &Path) -> anyhow::Result<Vec<String>> {
    let mut texts = Vec::new();
    for path in super::pages(dir)? {
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .to_uppercase();
        if path.is_file() && FILES.iter().any(|begin| name.starts_with(begin)) {
            let bytes = fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
            texts.push(String::from_utf8_lossy(&bytes).replace('\r', ""));
        }
    }
    Ok(texts)
}
