//! Many connections at once: busy ones, and ones without a word.

use std::io;
use std::path::Path;
use std::rc::Rc;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::{Barrier, Semaphore};
use tokio::task::JoinSet;

use super::exchange::{Http, wanted};
use super::framing::{Body, Framing};
use super::{To, appears, connect, in_time, say, wrong};

/// Handshakes under way at once: more than a listener's queue would be dropped and sent again a second later.
const OPENING: usize = 128;

/// Opens `connections`; when all stand, each makes its requests, each with an answer of its own.
pub(super) async fn run(to: To, connections: usize, requests: usize) -> io::Result<()> {
    let opening = Rc::new(Semaphore::new(OPENING));
    let all = Rc::new(Barrier::new(connections));
    let mut callers = JoinSet::new();
    for number in 0..connections {
        let (opening, all) = (Rc::clone(&opening), Rc::clone(&all));
        callers.spawn_local(async move {
            let mut http = {
                let _one = opening.acquire().await.map_err(io::Error::other)?;
                let mut http = Http::new(connect(to.http).await?);
                in_time("the first request", call(&mut http, number, 0)).await?;
                http
            };
            all.wait().await;
            for request in 1..requests {
                in_time("a request", call(&mut http, number, request)).await?;
            }
            // Nobody closes before all are through.
            all.wait().await;
            Ok::<(), io::Error>(())
        });
    }
    while let Some(done) = callers.join_next().await {
        done.map_err(io::Error::other)??;
    }
    say(&format!("answered {}", connections * requests));
    Ok(())
}

/// The seed and length of an answer are the call's own, so that answers can not be mixed up unseen.
async fn call(http: &mut Http, number: usize, request: usize) -> io::Result<()> {
    let own = (number * 1000 + request) as u64;
    let bytes = 1 + own % 3001;
    let sent = (request % 3 == 1).then(|| (Framing::Chunked, Body::new(own % 701, own)));
    let framing = if request.is_multiple_of(2) {
        Framing::Length(bytes)
    } else {
        Framing::Chunked
    };
    http.exchange(sent, wanted(framing, bytes, own)).await
}

/// Opens `connections`, says a word on each, and one more on each when the file is there.
pub(super) async fn idle(to: To, connections: usize, until: &Path) -> io::Result<()> {
    let opening = Rc::new(Semaphore::new(OPENING));
    let mut opened = JoinSet::new();
    for _ in 0..connections {
        let opening = Rc::clone(&opening);
        opened.spawn_local(async move {
            let _one = opening.acquire().await.map_err(io::Error::other)?;
            in_time("a connection", async {
                let mut socket = connect(to.tcp).await?;
                socket.write_all(b"echo\n").await?;
                word(&mut socket, b"first").await?;
                Ok(socket)
            })
            .await
        });
    }
    let mut idle = Vec::new();
    while let Some(done) = opened.join_next().await {
        idle.push(done.map_err(io::Error::other)??);
    }
    say(&format!("open {}", idle.len()));
    appears(until).await;
    for socket in &mut idle {
        in_time("a word after silence", word(socket, b"again")).await?;
    }
    say(&format!("alive {}", idle.len()));
    Ok(())
}

async fn word(socket: &mut TcpStream, word: &[u8; 5]) -> io::Result<()> {
    socket.write_all(word).await?;
    let mut heard = [0; 5];
    socket.read_exact(&mut heard).await?;
    if heard == *word {
        Ok(())
    } else {
        Err(wrong(format!("heard {heard:?}")))
    }
}
