//! Connections that are opened, used once and closed.

use std::cell::Cell;
use std::io;
use std::rc::Rc;

use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use super::exchange::{Http, over_tcp, wanted};
use super::framing::{Body, Framing, Progress};
use super::{To, connect, in_time, say, wrong};

/// A body that has to come whole, small enough that opening and closing is the work.
const BYTES: u64 = 200;

/// Opens and closes `times` connections, `parallel` at once; every second one is HTTP.
pub(super) async fn run(to: To, times: usize, parallel: usize) -> io::Result<()> {
    let begun = Rc::new(Cell::new(0));
    let mut workers = JoinSet::new();
    for _ in 0..parallel {
        let begun = Rc::clone(&begun);
        workers.spawn_local(async move {
            loop {
                let turn = begun.get();
                if turn >= times {
                    return Ok::<(), io::Error>(());
                }
                begun.set(turn + 1);
                in_time(&format!("connection {turn}"), once(to, turn as u64)).await?;
            }
        });
    }
    while let Some(done) = workers.join_next().await {
        done.map_err(io::Error::other)??;
    }
    say(&format!("closed {times}"));
    Ok(())
}

async fn once(to: To, turn: u64) -> io::Result<()> {
    if turn.is_multiple_of(2) {
        let mut http = Http::new(connect(to.http).await?);
        // The length of the answer is the call's own: an answer of another call does not fit.
        let length = BYTES + turn % 97;
        let wanted = wanted(Framing::Length(length), length, turn);
        http.exchange(None, wanted).await?;
        return over(http.into_socket()).await;
    }
    let mut socket = connect(to.tcp).await?;
    let sent = Body::new(BYTES, turn);
    let wanted = wanted(Framing::Close, BYTES, turn + 1);
    over_tcp(&mut socket, sent, wanted, &Progress::default()).await
}

/// Ends our direction and hears the other's end: an orderly close, whose wait is not on our side of the pair.
async fn over(mut socket: TcpStream) -> io::Result<()> {
    use tokio::io::AsyncReadExt as _;
    socket.shutdown().await?;
    match socket.read(&mut [0]).await? {
        0 => Ok(()),
        _ => Err(wrong("bytes behind the answer")),
    }
}
