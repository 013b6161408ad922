//! A short form of the benchmark: it proves that every subject answers every workload and that each figure comes out.
//! What the figures are is no matter of a test.

use meshwork_tests::bench::{self, Load, Options, Part, Subject, Workload};
use serde_json::Value;

#[test]
fn the_benchmark_gives_every_figure() {
    let loaded = [
        Workload::Http,
        Workload::Tcp,
        Workload::Grpc,
        Workload::Bulk,
        Workload::Short,
        Workload::Fair,
    ];
    let mut only: Vec<Part> = loaded.map(Part::Load).into();
    only.push(Part::Idle);
    let figures = bench::run(&Options {
        rounds: Some(1),
        seconds: Some(2),
        only,
        loads: vec![Load::C32, Load::R2000],
        // Envoy is no package of Debian.
        subjects: vec![Subject::Direct, Subject::Meshwork, Subject::Haproxy],
        ..Options::default()
    });
    let figures = figures.as_array().unwrap();
    let get = |subject: &str, workload: &str, load: &str, metric: &str| {
        let is = |figure: &&Value| {
            figure["subject"] == subject
                && figure["workload"] == workload
                && figure["load"] == load
                && figure["metric"] == metric
        };
        let found = figures.iter().find(is);
        let value = found.and_then(|figure| figure["value"].as_f64());
        value.unwrap_or_else(|| panic!("no {metric} of {subject}, {workload} {load}: {figures:?}"))
    };
    for subject in ["direct", "meshwork", "haproxy"] {
        for workload in ["http", "tcp", "grpc", "bulk", "short"] {
            for load in ["c32", "r2000"] {
                if (workload, load) == ("bulk", "r2000")
                    || (workload, subject) == ("grpc", "haproxy")
                {
                    continue;
                }
                for metric in ["rps", "p50_us", "p99_us"] {
                    assert!(0.0 < get(subject, workload, load, metric));
                }
                if subject == "direct" {
                    continue;
                }
                let cpu = match workload {
                    "bulk" => "cpu_s_per_gb",
                    _ => "cpu_us_per_request",
                };
                assert!(0.0 < get(subject, workload, load, cpu));
                assert!(0.0 < get(subject, workload, load, "rss_mib"));
            }
        }
    }
    for subject in ["direct", "meshwork", "haproxy"] {
        for metric in ["p50_us", "p99_us", "bulk_mb_per_s"] {
            assert!(0.0 < get(subject, "fair", "c32", metric));
        }
    }
    for open in ["none", "http1000", "tcp1000"] {
        assert!(0.0 < get("meshwork", "idle", open, "rss_mib"));
    }
}
