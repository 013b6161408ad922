//! The seeds of the fuzz targets, and what their runs once found: each passes in its target.

use std::fs;
use std::path::Path;

use meshwork_tests::fuzz;

/// A target by its name in `fuzz/`.
type Target = (&'static str, fn(&[u8]));

const TARGETS: &[Target] = &[
    ("chunked_body", fuzz::chunked_body),
    ("dns", |bytes| {
        fuzz::names::dns(bytes);
    }),
    ("frames", fuzz::frames),
    ("header", fuzz::header),
    ("http1_request_head", fuzz::http1_request_head),
    ("http1_requests_against_hyper", |bytes| {
        fuzz::requests_against_hyper(bytes);
    }),
    ("http1_response_head", fuzz::http1_response_head),
    ("http1_responses_against_hyper", |bytes| {
        fuzz::responses_against_hyper(bytes);
    }),
    ("message", |bytes| {
        fuzz::message(bytes);
    }),
    ("sync", fuzz::sync),
    ("tls_records", fuzz::tls_records),
    ("token", fuzz::token),
    ("workload_file", fuzz::workload_file),
];

#[test]
fn every_seed_passes_in_its_target() {
    let fuzz = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz");
    let names = |folder: &str| {
        let entries = fs::read_dir(fuzz.join(folder)).unwrap();
        let paths = entries.map(|entry| entry.unwrap().path());
        let mut names: Vec<String> = paths
            .map(|path| path.file_stem().unwrap().to_str().unwrap().to_owned())
            .collect();
        names.sort_unstable();
        names
    };
    let known: Vec<&str> = TARGETS.iter().map(|(name, _)| *name).collect();
    assert_eq!(names("fuzz_targets"), known);
    for (name, run) in TARGETS {
        let seeds = fuzz.join("corpus").join(name);
        let files: Vec<_> = fs::read_dir(&seeds).unwrap().collect();
        assert!(!files.is_empty(), "{name} has no seed");
        for file in files {
            run(&fs::read(file.unwrap().path()).unwrap());
        }
    }
}
