//! What is asked of a subject, how often at once, with which tool, and how the tool's words are read.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::ValueEnum;
use serde_json::Value;

use super::figures::{Figures, Metric};
use super::subjects::{Subject, Way};
use crate::binary;

/// The steady load, in requests a second, and its connections.
const RATE: u32 = 2_000;
const RATE_CONNECTIONS: u32 = 32;
/// An answer that takes longer is an error; a loaded machine is given time.
const ANSWER_MAX_SECONDS: u32 = 30;
/// As many calls at once on one HTTP/2 connection; more take another one, since servers allow about a hundred.
const STREAMS_MAX: u32 = 32;
pub(super) const SMALL_BODY: usize = 100;
pub(super) const BULK_BODY: usize = 1 << 20;
/// Bulk transfers at once beside the small calls of [`Workload::Fair`].
const FAIR_BULKS: u32 = 4;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Workload {
    /// HTTP/1.1 requests with a body of 100 bytes, over kept connections
    Http,
    /// The same bytes over a port that is declared as TCP
    Tcp,
    /// Unary gRPC calls of 100 bytes
    Grpc,
    /// Bodies of 1 MiB over a TCP port
    Bulk,
    /// A TCP connection for each request of 100 bytes
    Short,
    /// HTTP/1.1 requests with a body of 100 bytes while bodies of 1 MiB pass the same pair
    Fair,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Load {
    /// One call at a time
    C1,
    /// 32 at a time
    C32,
    /// 128 at a time
    C128,
    /// 2,000 requests a second
    R2000,
}

impl Workload {
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Http => "http",
            Self::Tcp => "tcp",
            Self::Grpc => "grpc",
            Self::Bulk => "bulk",
            Self::Short => "short",
            Self::Fair => "fair",
        }
    }

    pub(super) const fn way(self) -> Way {
        match self {
            Self::Http | Self::Fair => Way::Http,
            Self::Grpc => Way::Grpc,
            Self::Tcp | Self::Bulk | Self::Short => Way::Tcp,
        }
    }

    /// Two thousand bodies of 1 MiB a second are more than the machines of this benchmark carry, and beside bulk
    /// what waits for its own kind says nothing.
    pub(super) fn has(self, load: Load) -> bool {
        match self {
            Self::Bulk => load != Load::R2000,
            Self::Fair => matches!(load, Load::C1 | Load::C32),
            _ => true,
        }
    }

    /// gRPC is compared with Envoy only: HAProxy's form of it is HTTP/2 as in `http`.
    pub(super) fn is_of(self, subject: Subject) -> bool {
        (self, subject) != (Self::Grpc, Subject::Haproxy)
    }

    const fn path(self) -> &'static str {
        match self {
            Self::Bulk => "/bulk",
            Self::Grpc => "/bench.Echo/Unary",
            _ => "/",
        }
    }
}

impl Load {
    pub const ALL: [Self; 4] = [Self::C1, Self::C32, Self::C128, Self::R2000];

    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::C1 => "c1",
            Self::C32 => "c32",
            Self::C128 => "c128",
            Self::R2000 => "r2000",
        }
    }

    /// How many calls to keep going at once; `None` for the steady rate.
    const fn at_once(self) -> Option<u32> {
        match self {
            Self::C1 => Some(1),
            Self::C32 => Some(32),
            Self::C128 => Some(128),
            Self::R2000 => None,
        }
    }
}

/// The command line that loads `http://{authority}` for so long; `scratch` is a directory for the tool.
pub(super) fn command(
    workload: Workload,
    load: Load,
    authority: &str,
    cell: Duration,
    scratch: &Path,
) -> String {
    let seconds = cell.as_secs();
    let url = format!("http://{authority}{}", workload.path());
    match (workload, load.at_once()) {
        (Workload::Grpc, at_once) => {
            let count = at_once.unwrap_or(RATE_CONNECTIONS);
            let connections = count.div_ceil(STREAMS_MAX);
            let rate = match at_once {
                Some(_) => String::new(),
                None => format!("--rps={RATE} "),
            };
            let message = scratch.join("message");
            std::fs::write(&message, grpc_message()).expect("a file");
            // It would append to what it logged the last time.
            std::fs::write(h2load_log(scratch), "").expect("a file");
            format!(
                "h2load -D{seconds} -c{connections} -m{} {rate}-d {} --log-file={} -H 'te: trailers' \
                 -H 'content-type: application/grpc' {url}",
                count / connections,
                message.display(),
                h2load_log(scratch).display()
            )
        }
        (_, Some(count)) => {
            let threads = count.min(2);
            let bulk = match workload {
                Workload::Fair => format!(
                    "wrk --timeout {ANSWER_MAX_SECONDS}s -t1 -c{FAIR_BULKS} -d{seconds}s {url}bulk > {} & ",
                    bulk_log(scratch).display()
                ),
                _ => String::new(),
            };
            let last = match workload {
                Workload::Fair => " && wait $!",
                _ => "",
            };
            let close = match workload {
                Workload::Short => "-H 'Connection: close' ",
                _ => "",
            };
            format!(
                "{bulk}wrk --latency --timeout {ANSWER_MAX_SECONDS}s -t{threads} -c{count} -d{seconds}s {close}{url}{last}"
            )
        }
        (_, None) => {
            let close = match workload {
                Workload::Short => " --close",
                _ => "",
            };
            format!(
                "{} load --url {url} --rate {RATE} --connections {RATE_CONNECTIONS} --seconds {seconds}{close}",
                binary("meshwork-site").display()
            )
        }
    }
}

/// One uncompressed message in gRPC's framing: a flag, its length, its bytes.
fn grpc_message() -> Vec<u8> {
    let length = u32::try_from(SMALL_BODY).unwrap_or(u32::MAX);
    let mut message = vec![0];
    message.extend(length.to_be_bytes());
    message.resize(message.len() + SMALL_BODY, b'x');
    message
}

fn bulk_log(scratch: &Path) -> PathBuf {
    scratch.join("bulk.log")
}

fn h2load_log(scratch: &Path) -> PathBuf {
    scratch.join("h2load.log")
}

/// What the tool of [`command`] said: how many requests were answered, and its figures.
pub(super) fn read(workload: Workload, load: Load, output: &str, scratch: &Path) -> (f64, Figures) {
    let (requests, figures) = match (workload, load.at_once()) {
        (Workload::Grpc, _) => {
            let log = std::fs::read_to_string(h2load_log(scratch)).unwrap_or_default();
            of_h2load(output, &log)
        }
        (Workload::Fair, _) => {
            let (requests, mut figures) = of_wrk(output);
            let log = std::fs::read_to_string(bulk_log(scratch)).unwrap_or_default();
            let bodies = of_wrk(&log).1.get(&Metric::Rps).copied();
            let bulk = bodies.unwrap_or(f64::NAN) * BULK_BODY as f64 / 1e6;
            figures.insert(Metric::BulkRate, bulk);
            (requests, figures)
        }
        (_, Some(_)) => of_wrk(output),
        (_, None) => of_load(output),
    };
    assert!(0.0 < requests, "no request was answered: {output}");
    (requests, figures)
}

/// Reads what h2load prints, and its log of all calls: start, status and microseconds of each.
fn of_h2load(text: &str, log: &str) -> (f64, Figures) {
    // finished in 5.00s, 2000.50 req/s, 1.2MB/s
    let words = text.lines().find_map(|l| l.strip_prefix("finished in "));
    let rps = words.and_then(|words| words.split(' ').nth(1)?.parse::<f64>().ok());
    let mut times = Vec::new();
    for line in log.lines() {
        let mut columns = line.split('\t').skip(1);
        assert_eq!(
            columns.next(),
            Some("200"),
            "not every call was answered: {text}"
        );
        times.extend(columns.next().and_then(|time| time.parse::<f64>().ok()));
    }
    times.sort_by(f64::total_cmp);
    let at = |part: f64| times.get((times.len() as f64 * part) as usize);
    let figures = Figures::from([
        (Metric::Rps, rps.unwrap_or(f64::NAN)),
        (Metric::P50, at(0.50).copied().unwrap_or(f64::NAN)),
        (Metric::P99, at(0.99).copied().unwrap_or(f64::NAN)),
    ]);
    (times.len() as f64, figures)
}

/// Reads what wrk prints.
fn of_wrk(text: &str) -> (f64, Figures) {
    let mut requests = 0.0;
    let mut figures = Figures::new();
    for line in text.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.as_slice() {
            ["50%", value] => drop(figures.insert(Metric::P50, micros(value))),
            ["99%", value] => drop(figures.insert(Metric::P99, micros(value))),
            ["Requests/sec:", value] => {
                figures.insert(Metric::Rps, value.parse().unwrap_or(f64::NAN));
            }
            [count, "requests", "in", ..] => requests = count.parse().unwrap_or_default(),
            ["Non-2xx", ..] | ["Socket", "errors:", ..] => {
                panic!("not every call was answered: {text}")
            }
            _ => {}
        }
    }
    (requests, figures)
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
fn of_load(text: &str) -> (f64, Figures) {
    let value: Value = serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}"));
    let number = |name: &str| value.get(name).and_then(Value::as_f64).unwrap_or(f64::NAN);
    assert!(
        number("errors") == 0.0,
        "not every call was answered: {text}"
    );
    let figures = Figures::from([
        (Metric::Rps, number("requests_per_second")),
        (Metric::P50, number("p50_us")),
        (Metric::P99, number("p99_us")),
    ]);
    (number("requests"), figures)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_wrk_prints_is_read() {
        let text = "  Latency Distribution\n     50%  363.00us\n     75%  1ms\n     99%    1.20ms\n  \
                    10000 requests in 5.00s, 2.1MB read\nRequests/sec:   2000.50\n";
        let (requests, figures) = of_wrk(text);
        assert_eq!(requests, 10_000.0);
        assert_eq!(figures[&Metric::P50], 363.0);
        assert_eq!(figures[&Metric::P99], 1200.0);
        assert_eq!(figures[&Metric::Rps], 2000.5);
    }

    #[test]
    fn what_h2load_prints_is_read() {
        let text = "finished in 5.00s, 2000.50 req/s, 1.2MB/s\nrequests: 10 total\n";
        let log = "17\t200\t30\n18\t200\t10\n19\t200\t20\n";
        let (requests, figures) = of_h2load(text, log);
        assert_eq!(requests, 3.0);
        assert_eq!(figures[&Metric::Rps], 2000.5);
        assert_eq!(figures[&Metric::P50], 20.0);
        assert_eq!(figures[&Metric::P99], 30.0);
    }

    #[test]
    #[should_panic(expected = "not every call was answered")]
    fn a_call_that_failed_fails_the_run() {
        of_wrk("  10 requests in 5.00s, 2.1MB read\n  Non-2xx or 3xx responses: 3\n");
    }
}
