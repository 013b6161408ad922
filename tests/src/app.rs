//! The program at either end of the torture tests: a server that gives and takes bodies in every framing, and
//! callers that check each of them to the last byte. It runs in a cgroup of its own, as a workload does.
//!
//! A body is made from a seed where it is sent and digested where it is taken, so gigabytes need no disk. What a
//! caller finds out is a line of its output each; what must not be makes it end with 1.

mod bodies;
mod churn;
mod crowd;
mod exchange;
mod fair;
mod framing;
mod mixed;
mod relay;
mod resets;
mod seeded;
mod serve;

use std::io::Write as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use tokio::net::TcpStream;

/// Between two looks for a file: the way in which a test tells a running app to go on.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// How long anything that should go on may stand still on a busy machine before it hangs.
const STUCK: Duration = Duration::from_secs(60);

/// Where the app is reached: the same server speaks both on two ports.
#[derive(Clone, Copy, Debug, clap::Args)]
pub struct To {
    #[arg(long)]
    http: SocketAddr,
    #[arg(long)]
    tcp: SocketAddr,
}

#[derive(Debug, clap::Parser)]
#[command(name = "meshwork-app", about = "Either end of a torture test")]
pub enum Task {
    /// Serve HTTP/1.1 and plain bytes
    Serve {
        #[arg(long)]
        http: u16,
        #[arg(long)]
        tcp: u16,
    },
    /// Pass bytes between two connections, and do nothing else
    Relay {
        #[arg(long)]
        listen: SocketAddr,
        #[arg(long)]
        to: SocketAddr,
    },
    /// Pass bodies of this size both ways in every framing, one after the other
    Bodies {
        #[command(flatten)]
        to: To,
        #[arg(long)]
        bytes: u64,
    },
    /// Pass endless bodies both ways in every framing at once, until they are cut
    Endless {
        #[command(flatten)]
        to: To,
    },
    /// Hold many connections at once, each with requests of its own
    Crowd {
        #[command(flatten)]
        to: To,
        #[arg(long)]
        connections: usize,
        #[arg(long)]
        requests: usize,
    },
    /// Hold many connections without a word, until the file is there
    Idle {
        #[command(flatten)]
        to: To,
        #[arg(long)]
        connections: usize,
        #[arg(long)]
        until: PathBuf,
    },
    /// Open, use and close connections
    Churn {
        #[command(flatten)]
        to: To,
        #[arg(long)]
        times: usize,
        #[arg(long)]
        parallel: usize,
    },
    /// Readers that stand still until the file is there, beside callers that do not
    SlowReaders {
        #[command(flatten)]
        to: To,
        #[arg(long)]
        readers: usize,
        #[arg(long)]
        bytes: u64,
        #[arg(long)]
        until: PathBuf,
    },
    /// Writers of single bytes
    SlowWriters {
        #[command(flatten)]
        to: To,
        #[arg(long)]
        writers: usize,
        #[arg(long)]
        bytes: u64,
    },
    /// Small calls while bulk transfers run
    Fair {
        #[command(flatten)]
        to: To,
        #[arg(long)]
        bytes: u64,
    },
    /// Exchanges that either end resets at random
    Resets {
        #[command(flatten)]
        to: To,
        #[arg(long)]
        seed: u64,
        #[arg(long)]
        times: u64,
    },
    /// A mixture of all that goes well, until the file is there
    Mixed {
        #[command(flatten)]
        to: To,
        #[arg(long)]
        seed: u64,
        #[arg(long)]
        until: PathBuf,
    },
}

/// Runs a task to its end.
pub fn run(task: Task) -> ExitCode {
    raise_descriptors();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    let local = tokio::task::LocalSet::new();
    let done = local.block_on(&runtime, async {
        match task {
            Task::Serve { http, tcp } => serve::run(http, tcp).await,
            Task::Relay { listen, to } => relay::run(listen, to),
            Task::Bodies { to, bytes } => bodies::whole(to, bytes).await,
            Task::Endless { to } => bodies::endless(to).await,
            Task::Crowd {
                to,
                connections,
                requests,
            } => crowd::run(to, connections, requests).await,
            Task::Idle {
                to,
                connections,
                until,
            } => crowd::idle(to, connections, &until).await,
            Task::Churn {
                to,
                times,
                parallel,
            } => churn::run(to, times, parallel).await,
            Task::SlowReaders {
                to,
                readers,
                bytes,
                until,
            } => fair::slow_readers(to, readers, bytes, &until).await,
            Task::SlowWriters { to, writers, bytes } => {
                fair::slow_writers(to, writers, bytes).await
            }
            Task::Fair { to, bytes } => fair::run(to, bytes).await,
            Task::Resets { to, seed, times } => resets::run(to, seed, times).await,
            Task::Mixed { to, seed, until } => mixed::run(to, seed, &until).await,
        }
    });
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say(&format!("failed: {error}"));
            ExitCode::FAILURE
        }
    }
}

/// As many sockets as the machine allows.
fn raise_descriptors() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
}

/// One line of the result, at once: a test may wait for it.
fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    drop(writeln!(out, "{line}").and_then(|()| out.flush()));
}

async fn connect(to: SocketAddr) -> std::io::Result<TcpStream> {
    let socket = TcpStream::connect(to).await?;
    socket.set_nodelay(true)?;
    Ok(socket)
}

/// Until a test has made the file.
async fn appears(file: &Path) {
    while !file.exists() {
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// What should go on must not hang.
async fn in_time<T>(
    what: &str,
    work: impl Future<Output = std::io::Result<T>>,
) -> std::io::Result<T> {
    let named = |e: std::io::Error| std::io::Error::new(e.kind(), format!("{what}: {e}"));
    match tokio::time::timeout(STUCK, work).await {
        Ok(done) => done.map_err(named),
        Err(_) => Err(std::io::Error::other(format!("{what}: stuck"))),
    }
}

fn wrong(what: impl Into<String>) -> std::io::Error {
    std::io::Error::other(what.into())
}
