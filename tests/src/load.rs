//! A steady load: so many requests a second over kept connections, each timed from when it was due, so that a
//! server that stalls is charged for those who wait (wrk can not do this).

#![expect(clippy::print_stdout, reason = "its figures are its result")]

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpStream, ToSocketAddrs as _};
use std::time::{Duration, Instant};

use serde_json::json;

/// A call that takes longer has failed.
const CALL_MAX: Duration = Duration::from_secs(10);

/// What to send where.
#[derive(Clone, Debug)]
pub struct Plan {
    /// `http://host[:port]/path`
    pub url: String,
    pub rate: u32,
    pub connections: u32,
    pub seconds: u32,
    /// A connection for each request.
    pub close: bool,
}

/// Runs the plan and prints its figures as JSON.
pub fn run(plan: &Plan) {
    let start = Instant::now() + Duration::from_millis(50);
    let workers: Vec<_> = (0..plan.connections)
        .map(|number| {
            let plan = plan.clone();
            std::thread::spawn(move || connection(&plan, number, start))
        })
        .collect();
    let mut latencies = Vec::new();
    let mut errors = 0;
    for worker in workers {
        let (mine, failed) = worker.join().expect("a connection's thread");
        latencies.extend(mine);
        errors += failed;
    }
    latencies.sort();
    let elapsed = start.elapsed().as_secs_f64();
    let at = |part: f64| {
        let index = (latencies.len() as f64 * part) as usize;
        let found = latencies.get(index).or_else(|| latencies.last());
        found.map(|latency| latency.as_secs_f64() * 1e6)
    };
    println!(
        "{}",
        json!({
            "requests": latencies.len(),
            "errors": errors,
            "requests_per_second": latencies.len() as f64 / elapsed,
            "p50_us": at(0.5),
            "p99_us": at(0.99),
        })
    );
}

/// Opens so many connections, makes one call on each, says so, and holds them until it is killed.
pub fn hold(url: &str, connections: u32) {
    let plan = Plan {
        url: url.to_owned(),
        rate: 0,
        connections,
        seconds: 0,
        close: false,
    };
    let held: Vec<_> = (0..connections)
        .map(|number| {
            let mut stream = None;
            call(&plan, &mut stream).unwrap_or_else(|e| panic!("connection {number}: {e}"));
            stream
        })
        .collect();
    let (host, _) = host_and_path(url);
    println!("{} open to {host}", held.len());
    loop {
        std::thread::park();
    }
}

/// One connection's share: its latencies and how many calls failed.
fn connection(plan: &Plan, number: u32, start: Instant) -> (Vec<Duration>, usize) {
    let mut latencies = Vec::new();
    let mut failed = 0;
    let mut stream = None;
    let between = Duration::from_secs(1) * plan.connections / plan.rate;
    let offset = Duration::from_secs(1) * number / plan.rate;
    for turn in 0.. {
        let due = start + offset + between * turn;
        if start + Duration::from_secs(plan.seconds.into()) <= due {
            break;
        }
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
        match call(plan, &mut stream) {
            Ok(()) => {
                latencies.push(due.elapsed());
                if plan.close {
                    stream = None;
                }
            }
            Err(_) => {
                stream = None;
                failed += 1;
            }
        }
    }
    (latencies, failed)
}

fn call(plan: &Plan, stream: &mut Option<BufReader<TcpStream>>) -> std::io::Result<()> {
    let (host, path) = host_and_path(&plan.url);
    let reader = match stream {
        Some(reader) => reader,
        None => stream.insert(BufReader::new(connect(host)?)),
    };
    let close = if plan.close {
        "Connection: close\r\n"
    } else {
        ""
    };
    let request = format!("GET /{path} HTTP/1.1\r\nHost: {host}\r\n{close}\r\n");
    reader.get_mut().write_all(request.as_bytes())?;
    let mut line = String::new();
    let mut length = 0;
    let mut good = false;
    loop {
        line.clear();
        if reader.read_line(&mut line)? == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        let lower = line.trim_end().to_ascii_lowercase();
        if let Some(value) = lower.strip_prefix("content-length: ") {
            length = value.parse().unwrap_or_default();
        }
        good |= lower.starts_with("http/1.1 200");
        if lower.is_empty() {
            break;
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body)?;
    if good {
        Ok(())
    } else {
        Err(std::io::Error::other("not 200"))
    }
}

fn host_and_path(url: &str) -> (&str, &str) {
    let rest = url.strip_prefix("http://").unwrap_or(url);
    rest.split_once('/').unwrap_or((rest, ""))
}

fn connect(host: &str) -> std::io::Result<TcpStream> {
    let with_port = if host.contains(':') {
        host.to_owned()
    } else {
        format!("{host}:80")
    };
    let mut addresses = with_port.to_socket_addrs()?;
    let none = || std::io::Error::other("no address");
    let stream = TcpStream::connect_timeout(&addresses.next().ok_or_else(none)?, CALL_MAX)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(CALL_MAX))?;
    Ok(stream)
}
