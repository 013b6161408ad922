//! Two connections over an in-memory carrier.

mod fairness;
mod openers;
mod simulation;

use std::cell::Cell;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use super::*;
use mesh_core::stream::Limits;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf, duplex};
use tokio::task::{LocalSet, spawn_local};

fn local<F: Future<Output = ()>>(test: F) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let deadline = Duration::from_secs(60);
    LocalSet::new().block_on(&runtime, async {
        let outcome = tokio::time::timeout(deadline, test).await;
        outcome.expect("the test stands still");
    });
}

fn pair(limits: Limits) -> (Mux, Incoming) {
    let (a, b) = duplex(10_000);
    let (client, _, driver) = connection(a, Side::Client, limits);
    spawn_local(driver);
    let (_, incoming, driver) = connection(b, Side::Server, limits);
    spawn_local(driver);
    (client, incoming)
}

async fn echo(mut incoming: Incoming) {
    while let Some((stream, _)) = incoming.next().await {
        spawn_local(async move {
            let mut bytes = Vec::new();
            while let Ok(Some(_)) = stream.recv(&mut bytes, usize::MAX).await {
                stream.send(&bytes).await.unwrap();
                bytes.clear();
            }
            stream.end();
        });
    }
}

async fn read_all(stream: &mut MuxStream) -> Result<Vec<u8>, StreamError> {
    let mut bytes = Vec::new();
    while stream.recv(&mut bytes, usize::MAX).await?.is_some() {}
    Ok(bytes)
}

#[test]
fn many_streams_keep_their_bytes_apart() {
    local(async {
        let (client, incoming) = pair(Limits::DEFAULT);
        spawn_local(echo(incoming));
        let mut tasks = Vec::new();
        for n in 0..200_u32 {
            let client = client.clone();
            tasks.push(spawn_local(async move {
                let mut stream = client.open(b"header").await.unwrap();
                let data = n.to_be_bytes().repeat(1 + n as usize * 50);
                stream.send(&data).await.unwrap();
                stream.end();
                assert_eq!(read_all(&mut stream).await.unwrap(), data);
            }));
        }
        for task in tasks {
            task.await.unwrap();
        }
        assert_eq!(client.open_streams(), 0);
    });
}

#[test]
fn an_ended_connection_says_why_at_both_ends_and_waits_for_nobody() {
    local(async {
        let (client, mut incoming) = pair(Limits::DEFAULT);
        let open = client.open(b"header").await.unwrap();
        let (served, _) = incoming.next().await.unwrap();
        client.end(Reason::PeerRevoked);
        let mut bytes = Vec::new();
        for stream in [&open, &served] {
            let ended = stream.recv(&mut bytes, 1).await;
            assert!(
                matches!(ended, Err(StreamError::Reset(Reason::PeerRevoked))),
                "{ended:?}"
            );
        }
        let refused = client.open(b"header").await.err();
        assert_eq!(refused, Some(Reason::PeerRevoked));
        assert!(incoming.next().await.is_none());
        // A peer that reads nothing does not keep it.
        let (a, _unread) = duplex(1);
        let (stuck, _, driver) = connection(a, Side::Client, Limits::DEFAULT);
        let driver = spawn_local(driver);
        stuck.end(Reason::PeerRevoked);
        assert_eq!(driver.await.unwrap(), Reason::PeerRevoked);
    });
}

#[test]
fn an_end_leaves_with_the_last_data() {
    let (carrier, _) = duplex(1);
    let (mux, _, _driver) = connection(carrier, Side::Client, Limits::DEFAULT);
    let hello = Frame::Hello {
        version: mesh_core::stream::VERSION,
        limits: Limits::DEFAULT,
    };
    mux.0.borrow_mut().handle(&hello).unwrap();
    let mut cx = Context::from_waker(Waker::noop());
    let open = || match mux.poll_open(&cx, b"header", &mut Opener::begin(&mux.0)) {
        Poll::Ready(Ok(stream)) => stream,
        other => panic!("no stream: {other:?}"),
    };
    let (one, other, silent) = (open(), open(), open());
    mux.0.borrow_mut().output.clear();
    for stream in [&one, &other] {
        assert!(stream.poll_send(&mut cx, b"data").is_ready());
    }
    other.end();
    one.end();
    silent.end();
    let frames: Vec<u8> = [
        frame::data_prefix(1, 4, false).as_slice(),
        b"data",
        &frame::data_prefix(3, 4, true),
        b"data",
        &frame::data_prefix(1, 0, true),
        &frame::data_prefix(5, 0, true),
    ]
    .concat();
    assert_eq!(mux.0.borrow().output, frames);
}

/// A carrier that counts how often it took something.
struct Counted<C>(C, Rc<Cell<usize>>);

impl<C: AsyncRead + Unpin> AsyncRead for Counted<C> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buffer)
    }
}

impl<C: AsyncWrite + Unpin> AsyncWrite for Counted<C> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.0).poll_write(cx, bytes);
        if written.is_ready() {
            self.1.set(self.1.get() + 1);
        }
        written
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

/// What many streams have to say in one turn of the loop leaves in one write, with their ends, at both sides.
#[test]
fn a_turn_of_the_loop_is_one_write_whatever_the_number_of_streams() {
    const STREAMS: usize = 500;
    local(async {
        let (a, b) = duplex(1 << 20);
        let [ours, theirs] = [(), ()].map(|()| Rc::new(Cell::new(0)));
        let carrier = Counted(a, Rc::clone(&ours));
        let (client, _, driver) = connection(carrier, Side::Client, Limits::DEFAULT);
        spawn_local(driver);
        let carrier = Counted(b, Rc::clone(&theirs));
        let (_, incoming, driver) = connection(carrier, Side::Server, Limits::DEFAULT);
        spawn_local(driver);
        spawn_local(echo(incoming));
        let go = Rc::new(tokio::sync::Notify::new());
        let mut tasks = Vec::new();
        for _ in 0..STREAMS {
            let (stream, go) = (client.open(b"header").await.unwrap(), Rc::clone(&go));
            tasks.push(spawn_local(async move {
                let mut stream = stream;
                go.notified().await;
                stream.send(b"small").await.unwrap();
                stream.end();
                assert_eq!(read_all(&mut stream).await.unwrap(), b"small");
            }));
        }
        // All that was to be said of the opening is said, and every task waits.
        for _ in 0..10 * STREAMS {
            tokio::task::yield_now().await;
        }
        let before = (ours.get(), theirs.get());
        go.notify_waiters();
        for task in tasks {
            task.await.unwrap();
        }
        let writes = (ours.get() - before.0, theirs.get() - before.1);
        assert_eq!(writes, (1, 1));
    });
}

#[test]
fn a_reader_that_stands_still_holds_back_its_own_stream_only() {
    local(async {
        let (client, mut incoming) = pair(Limits::DEFAULT);
        let slow = client.open(b"slow").await.unwrap();
        let filled = spawn_local(async move {
            let _ = slow.send(&vec![1; 4 << 20]).await;
        });
        let (held, _) = incoming.next().await.unwrap();
        spawn_local(echo(incoming));
        let mut small = client.open(b"small").await.unwrap();
        small.send(b"hello").await.unwrap();
        small.end();
        assert_eq!(read_all(&mut small).await.unwrap(), b"hello");
        assert!(!filled.is_finished());
        held.reset(Reason::Overloaded);
        filled.await.unwrap();
    });
}

#[test]
fn a_reset_carries_its_reason_and_a_lost_carrier_ends_all() {
    local(async {
        let (a, b) = duplex(10_000);
        let (client, _, driver) = connection(a, Side::Client, Limits::DEFAULT);
        spawn_local(driver);
        let (_, mut incoming, driver) = connection(b, Side::Server, Limits::DEFAULT);
        let server = spawn_local(driver);
        let refused = client.open(b"x").await.unwrap();
        let (stream, header) = incoming.next().await.unwrap();
        assert_eq!(header, b"x");
        stream.reset(Reason::NotAllowed);
        assert_eq!(refused.accepted().await, Err(Reason::NotAllowed));
        assert_eq!(refused.reset_code(), 0);
        let ended = client.open(b"w").await.unwrap();
        let (stream, _) = incoming.next().await.unwrap();
        stream.reset_with_code(8);
        assert_eq!(ended.accepted().await, Err(Reason::StreamReset));
        assert_eq!(ended.reset_code(), 8);
        drop(stream);
        let mut open = client.open(b"y").await.unwrap();
        server.abort();
        assert!(matches!(
            read_all(&mut open).await,
            Err(StreamError::Reset(Reason::PeerLost))
        ));
        assert!(client.closed().is_some());
        assert!(client.open(b"z").await.is_err());
    });
}

#[test]
fn frames_that_break_the_rules_close_the_connection() {
    local(async {
        let (a, mut b) = duplex(10_000);
        let (client, _, driver) = connection(a, Side::Client, Limits::DEFAULT);
        let driver = spawn_local(driver);
        b.write_all(&[0, 0, 0, 99, 0, 0, 0, 0]).await.unwrap();
        assert_eq!(driver.await.unwrap(), Reason::ProtocolError);
        assert_eq!(client.closed(), Some(Reason::ProtocolError));
        let mut rest = Vec::new();
        b.read_to_end(&mut rest).await.unwrap();
    });
}

#[test]
fn going_away_lets_open_streams_finish() {
    local(async {
        let (a, b) = duplex(10_000);
        let (client, _, driver) = connection(a, Side::Client, Limits::DEFAULT);
        spawn_local(driver);
        let (server, incoming, driver) = connection(b, Side::Server, Limits::DEFAULT);
        spawn_local(driver);
        spawn_local(echo(incoming));
        let mut open = client.open(b"x").await.unwrap();
        open.send(b"one").await.unwrap();
        let mut bytes = Vec::new();
        open.recv(&mut bytes, 100).await.unwrap();
        server.retire(Reason::Draining);
        while client.room() != Room::Over {
            tokio::task::yield_now().await;
        }
        open.send(b"two").await.unwrap();
        open.end();
        assert_eq!(read_all(&mut open).await.unwrap(), b"two");
        let after = client.open(b"y").await.unwrap_err();
        assert!(
            matches!(after, Reason::Draining | Reason::PeerLost),
            "{after}"
        );
        while client.closed().is_none() {
            tokio::task::yield_now().await;
        }
    });
}

#[test]
fn a_reader_that_is_never_through_keeps_only_what_it_has_not_read() {
    local(async {
        let (client, mut incoming) = pair(Limits::DEFAULT);
        let stream = client.open(b"x").await.unwrap();
        spawn_local(async move {
            let block = vec![7; 100_000];
            while stream.send(&block).await.is_ok() {}
        });
        let (stream, _) = incoming.next().await.unwrap();
        let mut bytes = Vec::new();
        let mut total = 0;
        while total < 64 << 20 {
            bytes.clear();
            // Always less than what is there.
            total += stream.recv(&mut bytes, 5_000).await.unwrap().unwrap();
            let shared = incoming.0.borrow();
            let held: usize = shared.slots.values().map(|s| s.received.len()).sum();
            assert!(
                held <= 4 * Limits::DEFAULT.stream_credit as usize,
                "{held} bytes held"
            );
        }
    });
}

#[test]
fn output_that_never_runs_dry_does_not_grow_and_all_streams_have_their_share() {
    local(async {
        let (client, mut incoming) = pair(Limits::DEFAULT);
        let counts: Vec<Rc<Cell<usize>>> = (0..24).map(|_| Rc::default()).collect();
        for count in &counts {
            let (client, count) = (client.clone(), Rc::clone(count));
            spawn_local(async move {
                let block = vec![7; 50_000];
                loop {
                    let stream = client.open(b"x").await.unwrap();
                    stream.send(&block).await.unwrap();
                    stream.end();
                    count.set(count.get() + 1);
                }
            });
        }
        for _ in 0..2_000 {
            let (mut stream, _) = incoming.next().await.unwrap();
            spawn_local(async move { read_all(&mut stream).await.map(drop) });
            let held = client.0.borrow().output.len();
            assert!(held <= 3 * OUTPUT_MAX, "{held} bytes held");
        }
        let (least, most) = (
            counts.iter().map(|c| c.get()).min(),
            counts.iter().map(|c| c.get()).max(),
        );
        let (least, most) = (least.unwrap(), most.unwrap());
        assert!(least * 4 >= most, "shares from {least} to {most}");
    });
}

#[test]
fn a_peer_that_asks_and_never_reads_is_given_up() {
    local(async {
        let (a, mut b) = duplex(10_000);
        let (_client, _, driver) = connection(a, Side::Client, Limits::DEFAULT);
        let driver = spawn_local(driver);
        let mut bytes = Vec::new();
        let limits = Limits::DEFAULT;
        frame::encode(&Frame::Hello { version: 1, limits }, &mut bytes);
        b.write_all(&bytes).await.unwrap();
        bytes.clear();
        (0..50).for_each(|nonce| frame::encode(&Frame::Ping { nonce }, &mut bytes));
        // Paced: between two writes all that can be done is done.
        let mut sent = 0;
        while b.write_all(&bytes).await.is_ok() && sent < 400_000 {
            sent += 50;
            tokio::task::yield_now().await;
        }
        drop(b);
        assert!(sent < 400_000, "nobody minds {sent} pings without a reader");
        assert_eq!(driver.await.unwrap(), Reason::ProtocolError);
    });
}

/// What is held is counted while it is held, whoever lets it go: the reader, the writer, or the end of all.
#[test]
fn a_budget_knows_what_all_connections_hold() {
    local(async {
        let budget = Budget::new(100_000);
        let settings = Settings {
            budget: Arc::clone(&budget),
            ..Settings::from(Limits::DEFAULT)
        };
        let (a, b) = duplex(10_000);
        let (client, _, driver) = connection(a, Side::Client, settings.clone());
        spawn_local(driver);
        let (_, mut incoming, driver) = connection(b, Side::Server, settings);
        spawn_local(driver);
        let mut slow = Vec::new();
        for _ in 0..2 {
            let stream = client.open(b"slow").await.unwrap();
            stream.send(&[1; 60_000]).await.unwrap();
            slow.push((stream, incoming.next().await.unwrap().0));
        }
        while !budget.is_spent() || budget.held() < 120_000 {
            tokio::task::yield_now().await;
        }
        assert_eq!(budget.held(), 120_000, "received and not read");
        let mut bytes = Vec::new();
        let taken = slow[0].1.recv(&mut bytes, 50_000).await.unwrap();
        assert_eq!(budget.held(), 120_000 - taken.unwrap());
        assert!(!budget.is_spent(), "who reads makes room");
        let (ours, theirs) = slow.pop().unwrap();
        drop((ours, theirs));
        while budget.held() > 60_000 - taken.unwrap() {
            tokio::task::yield_now().await;
        }
        drop((client, incoming, slow));
        while budget.held() > 0 {
            tokio::task::yield_now().await;
        }
    });
}

#[test]
fn a_party_that_overdraws_the_budget_loses_what_grows_and_others_go_on() {
    local(async {
        let budget = Budget::new(100_000);
        let connect = || {
            let (a, b) = duplex(10_000);
            let (client, _, driver) = connection(a, Side::Client, Limits::DEFAULT);
            spawn_local(driver);
            let settings = Settings {
                budget: budget.part(),
                ..Settings::from(Limits::DEFAULT)
            };
            let (server, incoming, driver) = connection(b, Side::Server, settings);
            spawn_local(driver);
            (client, server, incoming)
        };
        let (other, _other, incoming) = connect();
        spawn_local(echo(incoming));
        let (greedy, at_server, mut incoming) = connect();
        let mut kept = Vec::new();
        while let Ok(stream) = greedy.open(b"greedy").await {
            let sent = stream.send(&[1; 60_000]).await;
            kept.push((stream, incoming.next().await));
            if sent.is_err() {
                break;
            }
        }
        assert!(kept.len() >= 2, "the first one is within the budget");
        let lost = read_all(&mut kept[0].0).await;
        assert!(
            matches!(lost, Err(StreamError::Reset(Reason::Overloaded))),
            "{lost:?}"
        );
        assert_eq!(at_server.ended_by(), Some(Bound::Buffers));
        let mut stream = other.open(b"other").await.unwrap();
        stream.send(&[2; 1_000]).await.unwrap();
        stream.end();
        assert_eq!(read_all(&mut stream).await.unwrap(), [2; 1_000]);
    });
}

/// What a peer still says is read until it ends, too: a socket that is closed before would be reset, and the peer would
/// lose what it has not read.
#[test]
fn who_ends_a_connection_hears_its_peer_out() {
    local(async {
        let (a, mut b) = duplex(10_000);
        let (client, _, driver) = connection(a, Side::Client, Limits::DEFAULT);
        let driver = spawn_local(driver);
        client.retire(Reason::Draining);
        let mut said = Vec::new();
        b.read_to_end(&mut said).await.unwrap();
        assert!(!said.is_empty(), "its hello and its farewell");
        // More than the carrier holds: it passes only if somebody reads.
        b.write_all(&[0; 100_000]).await.unwrap();
        assert!(!driver.is_finished(), "the peer has not ended");
        drop(b);
        assert_eq!(driver.await.unwrap(), Reason::Cancelled);
    });
}

#[test]
fn a_peer_that_never_ends_is_not_waited_for_without_end() {
    local(async {
        let (a, b) = duplex(10_000);
        let (client, _, driver) = connection(a, Side::Client, Limits::DEFAULT);
        let driver = spawn_local(driver);
        client.close();
        assert_eq!(driver.await.unwrap(), Reason::Cancelled);
        drop(b);
    });
}
