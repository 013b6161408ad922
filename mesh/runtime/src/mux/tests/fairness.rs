//! How long a small call waits behind bulk transfers, in bytes that leave before it: no clock, so no doubt.

use mesh_api::frame::{PREFIX_LEN, Prefix};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex};
use tokio::task::{spawn_local, yield_now};

use super::super::*;
use super::local;
use mesh_core::stream::Limits;

/// The carrier's own buffer.
const CARRIER: usize = 10_000;
const CALLS: usize = 50;

/// Beside one bulk transfer: what it may queue in two rounds, at most.
#[test]
fn a_small_call_waits_behind_two_shares_of_a_bulk_transfer() {
    local(async {
        let worst = worst_wait(1).await;
        assert!(worst <= 2 * QUANTUM + CARRIER + SLACK, "{worst} bytes");
    });
}

/// Beside many: what the output holds already, and once more as much at most. It does not grow with their number: one
/// share of each would be eight times that.
#[test]
fn a_small_call_waits_behind_a_full_output_and_no_more() {
    local(async {
        let worst = worst_wait(32).await;
        assert!(worst <= 2 * OUTPUT_MAX + CARRIER + SLACK, "{worst} bytes");
    });
}

/// Prefixes, one frame over a bound that was not reached yet, and what the driver sealed before.
const SLACK: usize = 64 * 1024;

/// The most bytes that left between a call's wish and its first byte, beside `bulk` streams that never pause. Each
/// call asks for a new stream.
async fn worst_wait(bulk: usize) -> usize {
    let (a, b) = duplex(CARRIER);
    let (client, _incoming, driver) = connection(a, Side::Client, Limits::DEFAULT);
    spawn_local(driver);
    let mut peer = Peer {
        carrier: b,
        buffer: Vec::new(),
        left: 0,
    };
    peer.greet().await;
    for _ in 0..bulk {
        let client = client.clone();
        spawn_local(async move {
            let stream = client.open(b"bulk").await.unwrap();
            let block = vec![7; 100_000];
            while stream.send(&block).await.is_ok() {}
        });
    }
    // Each has had its first share by then, and is nobody who comes new.
    while peer.left < 2 * (bulk + 1) * QUANTUM {
        peer.next().await;
    }
    let mut worst = 0;
    for _ in 0..CALLS {
        let from = peer.left;
        let call = {
            let client = client.clone();
            spawn_local(async move {
                let stream = client.open(b"call").await.unwrap();
                stream.send(b"a small request").await.unwrap();
                stream
            })
        };
        // The wish is uttered before the peer reads on.
        yield_now().await;
        while peer.next().await != *b"a small request" {}
        worst = worst.max(peer.left - from);
        drop(call.await.unwrap());
    }
    worst
}

/// Reads frames as a peer whose credit never ends.
struct Peer {
    carrier: DuplexStream,
    buffer: Vec<u8>,
    /// Bytes that have left the connection.
    left: usize,
}

impl Peer {
    async fn greet(&mut self) {
        let limits = Limits {
            stream_credit: 1 << 28,
            connection_credit: 1 << 30,
            ..Limits::DEFAULT
        };
        let mut hello = Vec::new();
        let version = mesh_core::stream::VERSION;
        frame::encode(&Frame::Hello { version, limits }, &mut hello);
        self.carrier.write_all(&hello).await.unwrap();
    }

    /// The data of the next frame, if it has some.
    async fn next(&mut self) -> Vec<u8> {
        loop {
            if let Some(head) = self.buffer.first_chunk::<PREFIX_LEN>() {
                let prefix = Prefix::decode(*head, Limits::DEFAULT.max_frame).unwrap();
                let length = PREFIX_LEN + prefix.length;
                if length <= self.buffer.len() {
                    let bytes: Vec<u8> = self.buffer.drain(..length).collect();
                    self.left += length;
                    return match prefix.frame(&bytes[PREFIX_LEN..]).unwrap() {
                        Frame::Data { data, .. } => data.to_vec(),
                        _ => Vec::new(),
                    };
                }
            }
            assert!(self.carrier.read_buf(&mut self.buffer).await.unwrap() > 0);
        }
    }
}
