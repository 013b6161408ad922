//! The benchmark: nginx with a body of 100 bytes, called directly and through a pair of agents, in interleaved
//! rounds of one run, so that a busy machine bears on both alike. What counts is the CPU of the pair per request.

#![expect(clippy::print_stdout, reason = "figures are what it is for")]

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use crate::agent::{Agent, Owner};
use crate::control::{Control, TokenOptions};
use crate::host::Host;
use crate::site::Site;
use crate::{binary, servers};

/// Rounds of a full run: the median of five bears two bad ones.
const ROUNDS: usize = 5;
const ROUNDS_QUICK: usize = 2;
/// Length of one cell. CPU time is counted in ticks of 10 ms, so that 1 % wants a second of it.
const CELL: Duration = Duration::from_secs(5);
const CELL_QUICK: Duration = Duration::from_secs(2);
/// The steady load, in requests a second, and its connections.
const RATE: u32 = 2_000;
const RATE_CONNECTIONS: u32 = 32;
const WORKLOAD: &str = "http1-100-bytes";

/// What one cell measured, by metric.
type Figures = BTreeMap<&'static str, f64>;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Load {
    /// As fast as so many connections go.
    Connections(u32),
    /// A steady rate.
    Rate,
}

impl Load {
    const ALL: [Self; 4] = [
        Self::Connections(1),
        Self::Connections(32),
        Self::Connections(128),
        Self::Rate,
    ];

    fn name(self) -> String {
        match self {
            Self::Connections(count) => format!("c{count}"),
            Self::Rate => format!("{RATE}/s"),
        }
    }
}

struct Pair {
    client: Host,
    agents: [Agent; 2],
    direct: String,
    mesh: String,
    cell: Duration,
}

/// Measures, prints, and writes JSON if a file is named.
pub fn run(quick: bool, json: Option<&Path>) {
    let site = Site::new("bench");
    let control = Control::start(&site);
    let [server, client] = ["server", "client"].map(|name| site.host(name));
    let agents = [&server, &client].map(|host| control.join(host, &TokenOptions::default()));
    agents[0].serve("web", &Owner::Cgroup("web".to_owned()), &[(80, "http")]);
    agents[1].serve("client", &Owner::Cgroup("client".to_owned()), &[]);
    let body = "x".repeat(100);
    let location = format!("access_log off; location / {{ return 200 \"{body}\"; }}");
    let _web = servers::nginx(&server, "web", 80, &location);
    control.wait_endpoints("shop/web", 1);
    let pair = Pair {
        direct: format!("http://{}/", server.v4()),
        mesh: "http://web.shop.mesh.internal/".to_owned(),
        client,
        agents,
        cell: if quick { CELL_QUICK } else { CELL },
    };
    let rounds = if quick { ROUNDS_QUICK } else { ROUNDS };
    let mut cells: BTreeMap<(Load, &str), Vec<Figures>> = BTreeMap::new();
    for round in 0..rounds {
        for load in Load::ALL {
            for subject in ["direct", "meshwork"] {
                let figures = pair.measure(subject, load);
                println!(
                    "round {round}: {} {subject}: {}",
                    load.name(),
                    shown(&figures)
                );
                cells.entry((load, subject)).or_default().push(figures);
            }
        }
    }
    let results = results(&cells);
    print(&results);
    if let Some(path) = json {
        let text = serde_json::to_string_pretty(&results).expect("JSON");
        std::fs::write(path, text + "\n").unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    }
}

impl Pair {
    fn measure(&self, subject: &str, load: Load) -> Figures {
        let url = if subject == "direct" {
            &self.direct
        } else {
            &self.mesh
        };
        let seconds = self.cell.as_secs();
        let line = match load {
            Load::Connections(count) => {
                let threads = count.min(2);
                format!("wrk --latency -t{threads} -c{count} -d{seconds}s {url}")
            }
            Load::Rate => format!(
                "{} load --url {url} --rate {RATE} --connections {RATE_CONNECTIONS} --seconds {seconds}",
                binary("meshwork-site").display()
            ),
        };
        let before = self.cpu_us();
        let command = self.client.cmd(&line).cgroup("client");
        let output = command.deadline(self.cell + Duration::from_secs(30)).ok();
        let used = self.cpu_us() - before;
        let mut figures = match load {
            Load::Connections(_) => of_wrk(&output),
            Load::Rate => of_load(&output),
        };
        let requests = figures.remove("requests").unwrap_or_default();
        assert!(0.0 < requests, "no request was answered: {output}");
        if subject == "meshwork" {
            figures.insert("cpu_us_per_request", used / requests);
        }
        figures
    }

    /// User and system time of both agents so far, in microseconds.
    fn cpu_us(&self) -> f64 {
        let pids = self.agents.iter().flat_map(Agent::pids);
        pids.map(cpu_us_of).sum()
    }
}

fn cpu_us_of(pid: u32) -> f64 {
    // Fields 14 and 15 (proc_pid_stat(5)), counted after the name, which may hold blanks. In ticks of 10 ms.
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let fields = stat
        .rsplit(')')
        .next()
        .unwrap_or_default()
        .split_whitespace();
    let ticks: f64 = fields
        .skip(11)
        .take(2)
        .filter_map(|f| f.parse::<f64>().ok())
        .sum();
    ticks * 10_000.0
}

/// Reads what wrk prints.
fn of_wrk(text: &str) -> Figures {
    let mut figures = Figures::new();
    for line in text.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.as_slice() {
            ["50%", value] => drop(figures.insert("p50_us", micros(value))),
            ["99%", value] => drop(figures.insert("p99_us", micros(value))),
            ["Requests/sec:", value] => {
                figures.insert("requests_per_second", value.parse().unwrap_or_default());
            }
            [count, "requests", "in", ..] => {
                figures.insert("requests", count.parse().unwrap_or_default());
            }
            ["Non-2xx", ..] | ["Socket", "errors:", ..] => {
                panic!("not every call was answered: {text}")
            }
            _ => {}
        }
    }
    figures
}

/// `1.23ms` and the like of wrk.
fn micros(text: &str) -> f64 {
    let split = text
        .find(|c: char| c.is_ascii_alphabetic())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let scale = match unit {
        "us" => 1.0,
        "ms" => 1e3,
        "s" => 1e6,
        _ => f64::NAN,
    };
    number.parse::<f64>().unwrap_or(f64::NAN) * scale
}

/// Reads what `meshwork-site load` prints.
fn of_load(text: &str) -> Figures {
    let value: Value = serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}"));
    let number = |name: &str| value.get(name).and_then(Value::as_f64).unwrap_or(f64::NAN);
    assert!(
        number("errors") == 0.0,
        "not every call was answered: {text}"
    );
    Figures::from([
        ("requests", number("requests")),
        ("requests_per_second", number("requests_per_second")),
        ("p50_us", number("p50_us")),
        ("p99_us", number("p99_us")),
    ])
}

fn shown(figures: &Figures) -> String {
    let parts: Vec<String> = figures.iter().map(|(n, v)| format!("{n} {v:.1}")).collect();
    parts.join(", ")
}

/// The median of the rounds, one object a figure.
fn results(cells: &BTreeMap<(Load, &str), Vec<Figures>>) -> Vec<Value> {
    let mut results = Vec::new();
    for ((load, subject), rounds) in cells {
        let names = rounds.first().into_iter().flat_map(Figures::keys);
        for name in names {
            let values = rounds
                .iter()
                .filter_map(|figures| figures.get(name).copied());
            let unit = match *name {
                "requests_per_second" => "1/s",
                _ => "us",
            };
            results.push(json!({
                "subject": subject,
                "workload": WORKLOAD,
                "load": load.name(),
                "metric": name,
                "value": median(values.collect()),
                "unit": unit,
            }));
        }
    }
    results
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() % 2 {
        0 if middle != 0 => f64::midpoint(values[middle - 1], values[middle]),
        _ => values.get(middle).copied().unwrap_or(f64::NAN),
    }
}

fn print(results: &[Value]) {
    println!("\nmedian of the rounds:");
    for result in results {
        let text = |name: &str| result[name].as_str().unwrap_or_default().to_owned();
        println!(
            "{:8} {:9} {:20} {:10.1} {}",
            text("load"),
            text("subject"),
            text("metric"),
            result["value"].as_f64().unwrap_or(f64::NAN),
            text("unit")
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_wrk_prints_is_read() {
        let text = "  Latency Distribution\n     50%  363.00us\n     75%  1ms\n     99%    1.20ms\n  \
                    10000 requests in 5.00s, 2.1MB read\nRequests/sec:   2000.50\n";
        let figures = of_wrk(text);
        assert_eq!(figures["p50_us"], 363.0);
        assert_eq!(figures["p99_us"], 1200.0);
        assert_eq!(figures["requests"], 10_000.0);
        assert_eq!(figures["requests_per_second"], 2000.5);
    }

    #[test]
    fn medians() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(vec![4.0, 1.0]), 2.5);
    }
}
