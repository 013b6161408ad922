//! Those who are slow and those who take much, beside small calls that must not wait for them.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use super::exchange::{Http, over_tcp, wanted};
use super::framing::{Body, Framing, Progress, take};
use super::seeded::{Digest, sum_of};
use super::{To, appears, connect, in_time, say, wrong};

/// Small calls that must get through beside readers that stand still.
const SMALL_CALLS: usize = 300;
/// Bulk transfers at once in each direction and protocol.
const BULKS: u64 = 2;

/// A small call over HTTP or plain bytes.
async fn small(to: To, http: &mut Http, echo: &mut TcpStream, turn: u64) -> io::Result<()> {
    if turn.is_multiple_of(2) {
        return http
            .exchange(None, wanted(Framing::Length(100), 100, turn))
            .await;
    }
    echo.write_all(&turn.to_le_bytes()).await?;
    let mut heard = [0; 8];
    echo.read_exact(&mut heard).await?;
    if heard != turn.to_le_bytes() {
        return Err(wrong(format!("heard {heard:?} for {turn}")));
    }
    if turn % 20 == 1 {
        // New connections get through as well as open ones.
        http_once(to, turn).await?;
    }
    Ok(())
}

async fn http_once(to: To, turn: u64) -> io::Result<()> {
    let mut http = Http::new(connect(to.http).await?);
    http.exchange(None, wanted(Framing::Chunked, 100, turn))
        .await
}

async fn callers(to: To) -> io::Result<(Http, TcpStream)> {
    let http = Http::new(connect(to.http).await?);
    let mut echo = connect(to.tcp).await?;
    echo.write_all(b"echo\n").await?;
    Ok((http, echo))
}

/// Bulk transfers of `bytes` each, both ways, and small calls until the first of them is through. Says how many of
/// these were answered meanwhile.
pub(super) async fn run(to: To, bytes: u64) -> io::Result<()> {
    let state = Arc::new(Bulk::default());
    let of_thread = Arc::clone(&state);
    // On a thread of its own: what is measured is the mesh's fairness, not this program's.
    let thread = std::thread::spawn(move || bulk(to, bytes, &of_thread));
    let (mut http, mut echo) = callers(to).await?;
    let mut answered = 0;
    while !state.ended.load(Ordering::Relaxed) {
        in_time("a small call", small(to, &mut http, &mut echo, answered)).await?;
        // Counted while the bulk is really flowing.
        answered += u64::from(state.flowing.load(Ordering::Relaxed));
    }
    thread.join().map_err(|_| wrong("the bulk panicked"))??;
    say(&format!("answered {answered}"));
    Ok(())
}

/// What the bulk's thread says of it.
#[derive(Debug, Default)]
struct Bulk {
    flowing: AtomicBool,
    /// The first of them is through.
    ended: AtomicBool,
}

fn bulk(to: To, bytes: u64, state: &Bulk) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let local = tokio::task::LocalSet::new();
    let done = local.block_on(&runtime, async {
        let mut bulks = JoinSet::new();
        let progress = Progress::default();
        for number in 0..BULKS {
            let progress = progress.clone();
            bulks.spawn_local(async move {
                let mut socket = connect(to.tcp).await?;
                let wanted = wanted(Framing::Close, bytes, number);
                over_tcp(&mut socket, Body::new(bytes, number), wanted, &progress).await
            });
            bulks.spawn_local(async move {
                let mut http = Http::new(connect(to.http).await?);
                let down = wanted(Framing::Chunked, bytes, number);
                http.exchange(None, down).await?;
                let up = Some((Framing::Length(bytes), Body::new(bytes, number)));
                http.exchange(up, wanted(Framing::Length(1), 1, 1)).await
            });
        }
        while progress.get() == 0 && !bulks.is_empty() {
            tokio::task::yield_now().await;
        }
        state.flowing.store(true, Ordering::Relaxed);
        while let Some(done) = bulks.join_next().await {
            state.ended.store(true, Ordering::Relaxed);
            done.map_err(io::Error::other)??;
        }
        Ok(())
    });
    state.ended.store(true, Ordering::Relaxed);
    done
}

/// `readers` ask for `bytes` each and read nothing until the file is there; small calls go on meanwhile.
pub(super) async fn slow_readers(
    to: To,
    readers: usize,
    bytes: u64,
    until: &Path,
) -> io::Result<()> {
    let mut standing = Vec::new();
    for number in 0..readers as u64 {
        let wanted = wanted(Framing::Length(bytes), bytes, number);
        if number.is_multiple_of(2) {
            let mut http = Http::new(connect(to.http).await?);
            http.ask(&format!("/give?{}", wanted.to_query()), None)
                .await?;
            // An answer that has begun holds what it holds.
            standing.push(http.into_socket());
        } else {
            let mut socket = connect(to.tcp).await?;
            let first = format!("give {}\n", wanted.to_query());
            socket.write_all(first.as_bytes()).await?;
            standing.push(socket);
        }
    }
    for socket in &standing {
        in_time("the first bytes", socket.readable()).await?;
    }
    let (mut http, mut echo) = callers(to).await?;
    for turn in 0..SMALL_CALLS as u64 {
        in_time(
            "a small call beside readers that stand still",
            small(to, &mut http, &mut echo, turn),
        )
        .await?;
    }
    say(&format!("answered {SMALL_CALLS}"));
    appears(until).await;
    let mut reading = JoinSet::new();
    for (number, socket) in standing.into_iter().enumerate() {
        reading.spawn_local(in_time_whole(number, socket, bytes));
    }
    while let Some(done) = reading.join_next().await {
        done.map_err(io::Error::other)??;
    }
    say(&format!("whole {readers}"));
    Ok(())
}

async fn in_time_whole(number: usize, socket: TcpStream, bytes: u64) -> io::Result<()> {
    let mut reader = BufReader::new(socket);
    let progress = Progress::default();
    let got = if number.is_multiple_of(2) {
        let head = super::exchange::head(&mut reader, Framing::Close).await?;
        let head = head.ok_or_else(|| wrong("no answer"))?;
        take(&mut reader, head.framing, &progress).await?
    } else {
        let sum = take(&mut reader, Framing::Length(bytes), &progress).await?;
        reader.get_mut().shutdown().await?;
        let taken = super::framing::line(&mut reader).await?;
        super::exchange::check("sent", &Digest::new().finish().to_string(), &taken)?;
        sum
    };
    let expected = sum_of(number as u64, bytes).to_string();
    super::exchange::check("got", &expected, &got.to_string())
}

/// Writers of one byte at a time, over HTTP in both framings and plain bytes, answered in the same way.
pub(super) async fn slow_writers(to: To, writers: usize, bytes: u64) -> io::Result<()> {
    let mut writing = JoinSet::new();
    for number in 0..writers as u64 {
        writing.spawn_local(async move {
            let body = |seed| Body {
                step: 1,
                ..Body::new(bytes, seed)
            };
            let mut wanted = wanted(Framing::Length(bytes), bytes, number);
            wanted.body.step = 1;
            if number % 3 == 0 {
                let mut socket = connect(to.tcp).await?;
                let progress = Progress::default();
                return over_tcp(&mut socket, body(number), wanted, &progress).await;
            }
            let mut http = Http::new(connect(to.http).await?);
            let framing = if number % 3 == 1 {
                Framing::Length(bytes)
            } else {
                wanted.framing = Framing::Chunked;
                Framing::Chunked
            };
            http.exchange(Some((framing, body(number))), wanted).await
        });
    }
    while let Some(done) = writing.join_next().await {
        done.map_err(io::Error::other)??;
    }
    say(&format!("whole {writers}"));
    Ok(())
}
