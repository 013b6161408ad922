//! A mixture of work that must all go well: what a soak runs.

use std::cell::Cell;
use std::io;
use std::path::Path;
use std::rc::Rc;

use mesh_core::rng::Rng;
use tokio::task::JoinSet;

use super::exchange::{Http, over_tcp, wanted};
use super::framing::{Body, Framing, Progress};
use super::{To, connect, in_time, say};

/// Connections that are kept and used, and workers whose connections are short.
const KEPT: u64 = 24;
const SHORT: u64 = 8;
/// Requests on a kept connection before it is closed and another opened.
const REQUESTS: u64 = 200;
/// Every so many calls one is large.
const LARGE_EVERY: u64 = 50;
const LARGE: u64 = 4 << 20;
const SMALL: u64 = 3000;

/// Works until the file is there.
pub(super) async fn run(to: To, seed: u64, until: &Path) -> io::Result<()> {
    let (calls, ended) = (Rc::new(Cell::new(0u64)), Rc::new(Cell::new(false)));
    let mut workers = JoinSet::new();
    for number in 0..KEPT + SHORT {
        let (calls, ended) = (Rc::clone(&calls), Rc::clone(&ended));
        let mut rng = Rng::new(seed.wrapping_add(number));
        let requests = if number < KEPT { REQUESTS } else { 1 };
        workers.spawn_local(async move {
            while !ended.get() {
                let done =
                    in_time("a connection's work", connection(to, &mut rng, requests)).await?;
                calls.set(calls.get() + done);
            }
            Ok::<(), io::Error>(())
        });
    }
    let file = async {
        super::appears(until).await;
        ended.set(true);
        std::future::pending::<()>().await
    };
    let work = async {
        while let Some(done) = workers.join_next().await {
            done.map_err(io::Error::other)??;
        }
        Ok::<(), io::Error>(())
    };
    tokio::select! {
        done = work => done?,
        () = file => (),
    }
    say(&format!("calls {}", calls.get()));
    Ok(())
}

async fn connection(to: To, rng: &mut Rng, requests: u64) -> io::Result<u64> {
    let size = |rng: &mut Rng| {
        if rng.below(LARGE_EVERY) == 0 {
            1 + rng.below(LARGE)
        } else {
            rng.below(SMALL)
        }
    };
    if rng.below(3) == 0 {
        let mut socket = connect(to.tcp).await?;
        let (up, down) = (size(rng), size(rng));
        let wanted = wanted(Framing::Close, down, rng.next_u64() >> 1);
        let sent = Body::new(up, rng.next_u64() >> 1);
        over_tcp(&mut socket, sent, wanted, &Progress::default()).await?;
        return Ok(1);
    }
    let mut http = Http::new(connect(to.http).await?);
    for done in 1..=requests {
        let (up, down) = (size(rng), size(rng));
        let framing = |rng: &mut Rng, bytes| {
            if rng.below(2) == 0 {
                Framing::Chunked
            } else {
                Framing::Length(bytes)
            }
        };
        let sent = (rng.below(2) == 0).then(|| {
            let body = Body::new(up, rng.next_u64() >> 1);
            (framing(rng, up), body)
        });
        let answer = wanted(framing(rng, down), down, rng.next_u64() >> 1);
        http.exchange(sent, answer).await?;
        if http.is_over() {
            return Ok(done);
        }
    }
    Ok(requests)
}
