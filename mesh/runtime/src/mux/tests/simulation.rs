//! Whole connections in seeded runs: a carrier that takes and gives any number of bytes when it likes, limits as small as
//! a peer may say, owners that pause, read a little, reset and open more streams than there is room for. Nothing
//! stands still, every byte comes once and in its place, and nothing of a stream stays behind.

use std::io;
use std::pin::Pin;

use mesh_core::rng::Rng;
use mesh_core::stream::Limits;
use tokio::io::{AsyncRead, AsyncWrite, DuplexStream, ReadBuf, duplex};
use tokio::task::{JoinHandle, spawn_local, yield_now};

use super::super::*;
use super::local;

const SEEDS: u64 = 150;
/// Streams that each side opens in a run, behind and beside each other.
const STREAMS: u64 = 12;
/// A prime: no shift by a frame or a window is overlooked.
const PERIOD: usize = 251;

#[test]
fn over_any_carrier_every_byte_comes_once_and_nothing_stands_still() {
    let only = std::env::var("MESHWORK_SEED").ok();
    let only = only.map(|seed| seed.parse::<u64>().unwrap());
    for seed in only.map_or(0..SEEDS, |seed| seed..seed + 1) {
        let named = Named(seed);
        local(run(Rng::new(seed)));
        std::mem::forget(named);
    }
}

/// Dropped by a panic only: says which seed it was.
struct Named(u64);

impl Drop for Named {
    #[expect(clippy::print_stderr, reason = "a test says how to run it again")]
    fn drop(&mut self) {
        eprintln!("MESHWORK_SEED={} runs this connection alone", self.0);
    }
}

async fn run(mut rng: Rng) {
    let (a, b) = duplex(1 + rng.below(40_000) as usize);
    let (client, to_client, client_driver) = end(a, Side::Client, &mut rng);
    let (server, to_server, server_driver) = end(b, Side::Server, &mut rng);
    let drivers = [spawn_local(client_driver), spawn_local(server_driver)];
    let acceptors =
        [(to_client, rng.next_u64()), (to_server, rng.next_u64())].map(|(mut incoming, seed)| {
            spawn_local(async move {
                let mut rng = Rng::new(seed);
                let mut tasks = Vec::new();
                while let Some((stream, header)) = incoming.next().await {
                    let plan = Plan::read(&header);
                    tasks.push(spawn_local(plan.carry_out(stream, false, rng.next_u64())));
                }
                join(tasks).await;
            })
        });
    let mut openers = Vec::new();
    for _ in 0..STREAMS {
        for mux in [&client, &server] {
            let (mux, seed) = (mux.clone(), rng.next_u64());
            openers.push(spawn_local(async move {
                let mut rng = Rng::new(seed);
                pause(&mut rng, 400).await;
                let plan = Plan::new(&mut rng);
                let stream = mux.open(&plan.header()).await.unwrap();
                plan.carry_out(stream, true, rng.next_u64()).await;
            }));
        }
    }
    join(openers).await;
    for mux in [&client, &server] {
        while mux.open_streams() > 0 {
            yield_now().await;
        }
    }
    // Each side had its say; the acceptors end with the connection, and then nothing is held.
    client.close();
    for driver in drivers {
        let reason = driver.await.unwrap();
        assert!(
            matches!(reason, Reason::Cancelled | Reason::PeerLost),
            "{reason}"
        );
    }
    for acceptor in acceptors {
        acceptor.await.unwrap();
    }
    for mux in [client, server] {
        let shared = mux.0.borrow();
        assert!(
            shared.slots.is_empty(),
            "streams stay behind: {:?}",
            shared.slots
        );
    }
}

fn end(carrier: DuplexStream, side: Side, rng: &mut Rng) -> (Mux, Incoming, Driver<Ragged>) {
    let stream_credit = 4096 + rng.below(3) as u32 * 5_000;
    let limits = Limits {
        max_streams: 1 + rng.below(8) as u32,
        stream_credit,
        connection_credit: stream_credit * (1 + rng.below(4) as u32),
        max_frame: 1024 + rng.below(3) as u32 * 3_000,
    };
    let ragged = Ragged {
        carrier,
        rng: Rng::new(rng.next_u64()),
    };
    connection(ragged, side, limits)
}

async fn join(tasks: Vec<JoinHandle<()>>) {
    for task in tasks {
        task.await.unwrap();
    }
}

async fn pause(rng: &mut Rng, most: u64) {
    for _ in 0..rng.below(most) {
        yield_now().await;
    }
}

/// What both owners of a stream will do; the header tells the other.
#[derive(Clone, Copy)]
struct Plan {
    salt: u8,
    there: u32,
    back: u32,
    /// Who resets the stream before its end, if anybody.
    resets: Resets,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Resets {
    Nobody,
    Opener,
    Acceptor,
    Both,
}

impl Plan {
    fn new(rng: &mut Rng) -> Self {
        let mut length = || match rng.below(4) {
            0 => 0,
            1 | 2 => rng.below(500) as u32,
            _ => rng.below(60_000) as u32,
        };
        let (there, back) = (length(), length());
        let resets = match rng.below(8) {
            0 => Resets::Opener,
            1 => Resets::Acceptor,
            2 => Resets::Both,
            _ => Resets::Nobody,
        };
        Self {
            salt: rng.next_u64() as u8,
            there,
            back,
            resets,
        }
    }

    fn header(&self) -> Vec<u8> {
        let mut header = vec![self.salt, self.resets as u8];
        header.extend(self.there.to_be_bytes());
        header.extend(self.back.to_be_bytes());
        header
    }

    fn read(header: &[u8]) -> Self {
        let number = |at: usize| u32::from_be_bytes(header[at..at + 4].try_into().unwrap());
        let resets = [
            Resets::Nobody,
            Resets::Opener,
            Resets::Acceptor,
            Resets::Both,
        ];
        let resets = resets[usize::from(header[1])];
        Self {
            salt: header[0],
            there: number(2),
            back: number(6),
            resets,
        }
    }

    fn reason(opener: bool) -> Reason {
        if opener {
            Reason::Timeout
        } else {
            Reason::NotAllowed
        }
    }

    async fn carry_out(self, stream: MuxStream, opener: bool, seed: u64) {
        let mut rng = Rng::new(seed);
        let (mine, theirs) = if opener {
            (self.there, self.back)
        } else {
            (self.back, self.there)
        };
        let (i, they) = match self.resets {
            Resets::Nobody => (false, false),
            Resets::Both => (true, true),
            one => (
                (one == Resets::Opener) == opener,
                (one == Resets::Opener) != opener,
            ),
        };
        let doom_after = if i { rng.below(200) } else { u64::MAX };
        let whole = async {
            let send = send(&stream, self.salt, mine as usize, Rng::new(rng.next_u64()));
            let receive = receive(
                &stream,
                self.salt,
                theirs as usize,
                Rng::new(rng.next_u64()),
            );
            tokio::join!(send, receive)
        };
        let doom = async {
            for _ in 0..doom_after {
                yield_now().await;
            }
        };
        let outcome = tokio::select! {
            outcome = whole => Some(outcome),
            () = doom => None,
        };
        match outcome {
            None => stream.reset(Self::reason(opener)),
            Some((sent, received)) => {
                for failed in [sent.err(), received.err()].into_iter().flatten() {
                    assert!(they, "nobody was to reset this stream: {failed}");
                    let said = Self::reason(!opener);
                    assert!(
                        matches!(failed, StreamError::Reset(reason) if reason == said),
                        "{failed}, not {said}"
                    );
                }
            }
        }
    }
}

async fn send(
    stream: &MuxStream,
    salt: u8,
    length: usize,
    mut rng: Rng,
) -> Result<(), StreamError> {
    let mut sent = 0;
    while sent < length {
        pause(&mut rng, 4).await;
        let piece = (1 + rng.below(9_000) as usize).min(length - sent);
        let data: Vec<u8> = (sent..sent + piece).map(|at| content(salt, at)).collect();
        stream.send(&data).await?;
        sent += piece;
    }
    stream.end();
    Ok(())
}

async fn receive(
    stream: &MuxStream,
    salt: u8,
    length: usize,
    mut rng: Rng,
) -> Result<(), StreamError> {
    let mut got = 0;
    let mut bytes = Vec::new();
    // Now and then a reader stands still for long: others must go on.
    let patience = if rng.below(6) == 0 { 300 } else { 4 };
    loop {
        pause(&mut rng, patience).await;
        bytes.clear();
        let most = 1 + rng.below(9_000) as usize;
        if stream.recv(&mut bytes, most).await?.is_none() {
            assert_eq!(got, length, "a stream ended early");
            return Ok(());
        }
        for (at, byte) in bytes.iter().enumerate() {
            assert_eq!(
                *byte,
                content(salt, got + at),
                "byte {} of stream with salt {salt}",
                got + at
            );
        }
        got += bytes.len();
    }
}

fn content(salt: u8, at: usize) -> u8 {
    ((at + usize::from(salt)) % PERIOD) as u8
}

/// A carrier that is never ready for as much as one would like, and sometimes not at all.
struct Ragged {
    carrier: DuplexStream,
    rng: Rng,
}

impl Ragged {
    /// How much passes now; `None`: nothing, try again.
    fn width(&mut self, cx: &Context<'_>) -> Option<usize> {
        match self.rng.below(4) {
            0 => {
                cx.waker().wake_by_ref();
                None
            }
            1 => Some(1 + self.rng.below(20) as usize),
            _ => Some(1 + self.rng.below(30_000) as usize),
        }
    }
}

impl AsyncRead for Ragged {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        out: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let Some(width) = self.width(cx) else {
            return Poll::Pending;
        };
        let mut piece = vec![0; width.min(out.remaining())];
        let mut part = ReadBuf::new(&mut piece);
        let read = Pin::new(&mut self.carrier).poll_read(cx, &mut part);
        out.put_slice(part.filled());
        read
    }
}

impl AsyncWrite for Ragged {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let Some(width) = self.width(cx) else {
            return Poll::Pending;
        };
        Pin::new(&mut self.carrier).poll_write(cx, &bytes[..width.min(bytes.len())])
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.carrier).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.carrier).poll_shutdown(cx)
    }
}
