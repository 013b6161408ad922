//! The figures: medians over rounds, as JSON and as tables, and whether they reach the targets.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde_json::{Value, json};

/// What one cell measured.
pub(super) type Figures = BTreeMap<Metric, f64>;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Metric {
    CpuPerRequest,
    CpuPerGb,
    Rps,
    P50,
    P99,
    BulkRate,
    Rss,
}

impl Metric {
    pub(super) const ALL: [Self; 7] = [
        Self::CpuPerRequest,
        Self::CpuPerGb,
        Self::Rps,
        Self::P50,
        Self::P99,
        Self::BulkRate,
        Self::Rss,
    ];

    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::CpuPerRequest => "cpu_us_per_request",
            Self::CpuPerGb => "cpu_s_per_gb",
            Self::Rps => "rps",
            Self::P50 => "p50_us",
            Self::P99 => "p99_us",
            Self::BulkRate => "bulk_mb_per_s",
            Self::Rss => "rss_mib",
        }
    }

    const fn unit(self) -> &'static str {
        match self {
            Self::CpuPerRequest => "us",
            Self::CpuPerGb => "s/GB",
            Self::Rps => "1/s",
            Self::P50 | Self::P99 => "us",
            Self::BulkRate => "MB/s",
            Self::Rss => "MiB",
        }
    }

    fn shown(self, value: f64) -> String {
        match self {
            Self::CpuPerGb => format!("{value:.2}"),
            Self::CpuPerRequest | Self::Rss => format!("{value:.1}"),
            Self::Rps | Self::P50 | Self::P99 | Self::BulkRate => format!("{value:.0}"),
        }
    }
}

/// Where a figure stands.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Place {
    pub(super) workload: String,
    pub(super) load: String,
    pub(super) subject: String,
}

/// One of the project's targets: a figure of the agents, alone or over another figure, is at most `limit`.
struct Target {
    says: &'static str,
    metric: Metric,
    of: [&'static str; 3],
    over: Option<[&'static str; 3]>,
    limit: f64,
}

/// Places are `[workload, load, subject]`.
const TARGETS: &[Target] = &[
    Target {
        says: "http, 32 connections, CPU per request, of HAProxy with HTTP/2 between",
        metric: Metric::CpuPerRequest,
        of: ["http", "c32", "meshwork"],
        over: Some(["http", "c32", "haproxy"]),
        limit: 0.60,
    },
    Target {
        says: "tcp, 32 connections, CPU per request, of HAProxy",
        metric: Metric::CpuPerRequest,
        of: ["tcp", "c32", "meshwork"],
        over: Some(["tcp", "c32", "haproxy"]),
        limit: 0.50,
    },
    Target {
        says: "bulk, 32 connections, CPU per GB, of HAProxy tcp",
        metric: Metric::CpuPerGb,
        of: ["bulk", "c32", "meshwork"],
        over: Some(["bulk", "c32", "haproxy"]),
        limit: 0.55,
    },
    Target {
        says: "http at 2,000 requests/s, p50, of HAProxy tcp",
        metric: Metric::P50,
        of: ["http", "r2000", "meshwork"],
        over: Some(["tcp", "r2000", "haproxy"]),
        limit: 0.65,
    },
    Target {
        says: "short, 32 connections, CPU per connection, of HAProxy tcp",
        metric: Metric::CpuPerRequest,
        of: ["short", "c32", "meshwork"],
        over: Some(["short", "c32", "haproxy"]),
        limit: 0.50,
    },
    Target {
        says: "grpc unary, 32 streams, CPU per call, of Envoy",
        metric: Metric::CpuPerRequest,
        of: ["grpc", "c32", "meshwork"],
        over: Some(["grpc", "c32", "envoy"]),
        limit: 0.50,
    },
    Target {
        says: "MiB of an agent with 1,000 open TCP connections",
        metric: Metric::Rss,
        of: ["idle", "tcp1000", "meshwork"],
        over: None,
        limit: 40.0,
    },
    Target {
        says: "MiB of an agent with 1,000 open HTTP connections",
        metric: Metric::Rss,
        of: ["idle", "http1000", "meshwork"],
        over: None,
        limit: 40.0,
    },
    Target {
        says: "http, 32 connections, CPU per request with 1,000 services, endpoints and rules, of that with 1",
        metric: Metric::CpuPerRequest,
        of: ["growth", "n1000", "meshwork"],
        over: Some(["growth", "n1", "meshwork"]),
        limit: 1.10,
    },
];

/// The medians of a run.
#[derive(Debug, Default)]
pub(super) struct Report {
    medians: BTreeMap<(Place, Metric), f64>,
}

impl Report {
    /// The median of the rounds of each place.
    pub(super) fn of(cells: &BTreeMap<Place, Vec<Figures>>) -> Self {
        let mut report = Self::default();
        for (place, rounds) in cells {
            for metric in Metric::ALL {
                let values: Vec<f64> = rounds
                    .iter()
                    .filter_map(|f| f.get(&metric).copied())
                    .collect();
                if let Some(median) = median(values) {
                    report.medians.insert((place.clone(), metric), median);
                }
            }
        }
        report
    }

    /// What [`Report::json`] wrote.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let value: Value = serde_json::from_str(text).map_err(|e| e.to_string())?;
        let mut report = Self::default();
        for figure in value.as_array().ok_or("not an array of figures")? {
            let word = |name: &str| {
                let found = figure.get(name).and_then(Value::as_str);
                found
                    .map(str::to_owned)
                    .ok_or_else(|| format!("{figure} has no {name}"))
            };
            let name = word("metric")?;
            let metric = Metric::ALL.into_iter().find(|m| m.name() == name);
            let place = Place {
                workload: word("workload")?,
                load: word("load")?,
                subject: word("subject")?,
            };
            let value = figure.get("value").and_then(Value::as_f64);
            let (Some(metric), Some(value)) = (metric, value) else {
                return Err(format!("{figure} is no figure of the benchmark"));
            };
            report.medians.insert((place, metric), value);
        }
        Ok(report)
    }

    pub(super) fn json(&self) -> Value {
        let figures = self.medians.iter().map(|((place, metric), value)| {
            json!({
                "subject": place.subject,
                "workload": place.workload,
                "load": place.load,
                "metric": metric.name(),
                "value": value,
                "unit": metric.unit(),
            })
        });
        figures.collect()
    }

    /// A table for each workload and one of the targets, in Markdown, which reads well in a terminal too.
    pub(super) fn tables(&self) -> String {
        let mut text = String::new();
        let mut workloads: Vec<&str> = Vec::new();
        for (place, _) in self.medians.keys() {
            if !workloads.contains(&place.workload.as_str()) {
                workloads.push(&place.workload);
            }
        }
        for workload in workloads {
            self.table(workload, &mut text);
        }
        self.targets(&mut text);
        text
    }

    fn table(&self, workload: &str, text: &mut String) {
        let here = |place: &Place| place.workload == workload;
        let metrics: Vec<Metric> = Metric::ALL
            .into_iter()
            .filter(|metric| {
                self.medians
                    .keys()
                    .any(|(place, m)| here(place) && m == metric)
            })
            .collect();
        let names: Vec<&str> = metrics.iter().map(|m| m.name()).collect();
        let mut rows = vec![
            [&[workload, "subject"], names.as_slice()]
                .concat()
                .iter()
                .map(|s| (*s).to_owned())
                .collect(),
        ];
        let mut places: Vec<&Place> = self
            .medians
            .keys()
            .map(|(place, _)| place)
            .filter(|p| here(p))
            .collect();
        places.dedup();
        // c1, c32, c128, r2000; n1, n100, n1000.
        places.sort_by_key(|place| (place.load.len(), *place));
        for place in places {
            let mut row = vec![place.load.clone(), place.subject.clone()];
            row.extend(metrics.iter().map(|metric| {
                let value = self.medians.get(&(place.clone(), *metric));
                value.map_or_else(|| "-".to_owned(), |value| metric.shown(*value))
            }));
            rows.push(row);
        }
        lay_out(&rows, text);
    }

    fn targets(&self, text: &mut String) {
        let header = ["target", "at most", "measured", ""]
            .map(str::to_owned)
            .to_vec();
        let mut rows = vec![header];
        for target in TARGETS {
            let Some(value) = self.get(target.of, target.metric) else {
                continue;
            };
            let value = match target.over {
                None => value,
                Some(place) => match self.get(place, target.metric) {
                    Some(other) => value / other,
                    None => continue,
                },
            };
            let met = if value <= target.limit {
                "met"
            } else {
                "missed"
            };
            rows.push(vec![
                target.says.to_owned(),
                format!("{:.2}", target.limit),
                format!("{value:.3}"),
                met.to_owned(),
            ]);
        }
        if 1 < rows.len() {
            lay_out(&rows, text);
        }
    }

    fn get(&self, [workload, load, subject]: [&str; 3], metric: Metric) -> Option<f64> {
        let place = Place {
            workload: workload.to_owned(),
            load: load.to_owned(),
            subject: subject.to_owned(),
        };
        self.medians.get(&(place, metric)).copied()
    }
}

/// A Markdown table with columns of even width, the first row its header.
fn lay_out(rows: &[Vec<String>], text: &mut String) {
    let columns = rows.first().map_or(0, Vec::len);
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max();
    let widths: Vec<usize> = (0..columns).map(|c| width(c).unwrap_or(0)).collect();
    for (number, row) in rows.iter().enumerate() {
        let cells: Vec<String> = row
            .iter()
            .zip(&widths)
            .map(|(cell, &width)| format!("{cell:width$}"))
            .collect();
        // Writing to memory does not fail.
        let _ = writeln!(text, "| {} |", cells.join(" | "));
        if number == 0 {
            let lines: Vec<String> = widths.iter().map(|width| "-".repeat(width + 2)).collect();
            let _ = writeln!(text, "|{}|", lines.join("|"));
        }
    }
    text.push('\n');
}

/// One line of figures, as they come.
pub(super) fn line(figures: &Figures) -> String {
    let parts: Vec<String> = figures
        .iter()
        .map(|(metric, value)| format!("{} {}", metric.name(), metric.shown(*value)))
        .collect();
    parts.join(", ")
}

fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    let upper = *values.get(middle)?;
    Some(match values.len() % 2 {
        0 => f64::midpoint(values[middle - 1], upper),
        _ => upper,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(workload: &str, load: &str, subject: &str) -> Place {
        Place {
            workload: workload.to_owned(),
            load: load.to_owned(),
            subject: subject.to_owned(),
        }
    }

    fn cpu(values: &[f64]) -> Vec<Figures> {
        let round = |value: &f64| Figures::from([(Metric::CpuPerRequest, *value)]);
        values.iter().map(round).collect()
    }

    #[test]
    fn medians() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(vec![4.0, 1.0]), Some(2.5));
        assert_eq!(median(vec![]), None);
    }

    #[test]
    fn what_was_written_is_read_again_and_the_targets_judge_it() {
        let cells = BTreeMap::from([
            (place("http", "c32", "meshwork"), cpu(&[30.0, 90.0, 31.0])),
            (place("http", "c32", "haproxy"), cpu(&[62.0, 60.0, 64.0])),
            (place("tcp", "c32", "meshwork"), cpu(&[60.0])),
            (place("tcp", "c32", "haproxy"), cpu(&[100.0])),
        ]);
        let report = Report::parse(&Report::of(&cells).json().to_string()).unwrap();
        let tables = report.tables();
        let line = |start: &str| tables.lines().find(|l| l.starts_with(start)).unwrap();
        assert!(
            line("| http, 32").contains("| 0.60    | 0.500    | met"),
            "{tables}"
        );
        assert!(
            line("| tcp, 32").contains("| 0.50    | 0.600    | missed"),
            "{tables}"
        );
        assert!(line("| c32  | meshwork").contains("31.0"), "{tables}");
    }
}
