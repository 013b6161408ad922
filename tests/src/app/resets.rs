//! Exchanges that either end resets in their middle, at random by a seed.

use std::cell::Cell;
use std::io;
use std::rc::Rc;

use mesh_core::rng::Rng;
use tokio::io::AsyncWriteExt as _;
use tokio::task::JoinSet;

use super::exchange::{Http, Wanted, over_tcp, reset};
use super::framing::{Body, Framing, Progress, give};
use super::{To, connect, in_time, say, wrong};

/// At once.
const PARALLEL: u64 = 32;
/// Beyond a stream's credit, so that resets also meet senders that wait for it.
const BYTES_MAX: u64 = 2 << 20;

/// Who resets, after how many bytes.
#[derive(Clone, Copy, Debug)]
enum Fault {
    Nobody,
    /// The caller, when it has sent so much of its body.
    Sending(u64),
    /// The caller, when it has got at least so much of the answer.
    Getting(u64),
    /// The server, when it has given so much.
    Server(u64),
}

/// One exchange, drawn by chance.
#[derive(Clone, Copy, Debug)]
struct Plan {
    tcp: bool,
    up: u64,
    down: u64,
    chunked: bool,
    seed: u64,
    fault: Fault,
}

impl Plan {
    fn draw(rng: &mut Rng) -> Self {
        // Small ones as often as large ones.
        let mut size = || {
            let limit = 1 << rng.below(22);
            1 + rng.below(BYTES_MAX.min(limit))
        };
        let (up, down) = (size(), size());
        let fault = match rng.below(4) {
            0 => Fault::Nobody,
            1 => Fault::Sending(rng.below(up)),
            2 => Fault::Getting(rng.below(down)),
            _ => Fault::Server(rng.below(down)),
        };
        Self {
            tcp: rng.below(2) == 0,
            up,
            down,
            chunked: rng.below(2) == 0,
            seed: rng.next_u64() >> 1,
            fault,
        }
    }

    fn framing(&self, bytes: u64) -> Framing {
        if self.chunked {
            Framing::Chunked
        } else {
            Framing::Length(bytes)
        }
    }

    fn wanted(&self) -> Wanted {
        let mut body = Body::new(self.down, self.seed);
        let server = match self.fault {
            Fault::Server(at) => Some(at),
            _ => None,
        };
        body.stop = server;
        Wanted {
            body,
            framing: self.framing(self.down),
            reset: server.is_some(),
        }
    }
}

/// Runs `times` exchanges drawn from `seed`.
pub(super) async fn run(to: To, seed: u64, times: u64) -> io::Result<()> {
    let rng = Rc::new(std::cell::RefCell::new(Rng::new(seed)));
    let begun = Rc::new(Cell::new(0));
    let (whole, cut) = (Rc::new(Cell::new(0)), Rc::new(Cell::new(0)));
    let mut workers = JoinSet::new();
    for _ in 0..PARALLEL {
        let (rng, begun) = (Rc::clone(&rng), Rc::clone(&begun));
        let (whole, cut) = (Rc::clone(&whole), Rc::clone(&cut));
        workers.spawn_local(async move {
            while begun.get() < times {
                begun.set(begun.get() + 1);
                let plan = Plan::draw(&mut rng.borrow_mut());
                let met = in_time(&format!("{plan:?}"), met(to, plan)).await?;
                let count = if met { &whole } else { &cut };
                count.set(count.get() + 1);
            }
            Ok::<(), io::Error>(())
        });
    }
    while let Some(done) = workers.join_next().await {
        done.map_err(io::Error::other)??;
    }
    say(&format!("whole {} cut {}", whole.get(), cut.get()));
    Ok(())
}

/// Whether the exchange came through; what the plan forbids is an error.
async fn met(to: To, plan: Plan) -> io::Result<bool> {
    let outcome = match (plan.fault, plan.tcp) {
        (Fault::Nobody | Fault::Server(_), true) => {
            let mut socket = connect(to.tcp).await?;
            let sent = Body::new(plan.up, plan.seed);
            over_tcp(&mut socket, sent, plan.wanted(), &Progress::default()).await
        }
        (Fault::Nobody | Fault::Server(_), false) => {
            let mut http = Http::new(connect(to.http).await?);
            let body = Body::new(plan.up, plan.seed);
            let sent = Some((plan.framing(plan.up), body));
            http.exchange(sent, plan.wanted()).await
        }
        (Fault::Sending(at), _) => return sending(to, plan, at).await,
        (Fault::Getting(at), _) => return getting(to, plan, at).await,
    };
    match (plan.fault, outcome) {
        (Fault::Nobody, Ok(())) => Ok(true),
        (Fault::Nobody, Err(error)) => Err(error),
        (_, Err(_)) => Ok(false),
        (_, Ok(())) => Err(wrong("what the server cut looks whole")),
    }
}

async fn sending(to: To, plan: Plan, at: u64) -> io::Result<bool> {
    let body = Body {
        stop: Some(at),
        ..Body::new(plan.up, plan.seed)
    };
    let query = plan.wanted().to_query();
    let socket = if plan.tcp {
        let mut socket = connect(to.tcp).await?;
        let first = format!("give {query}\n");
        socket.write_all(first.as_bytes()).await?;
        give(&mut socket, Framing::Close, body).await?;
        socket
    } else {
        let mut http = Http::new(connect(to.http).await?);
        let sent = Some((plan.framing(plan.up), body));
        http.ask(&format!("/give?{query}"), sent).await?;
        http.into_socket()
    };
    reset(socket);
    Ok(false)
}

async fn getting(to: To, plan: Plan, at: u64) -> io::Result<bool> {
    let query = plan.wanted().to_query();
    let mut socket = if plan.tcp {
        let mut socket = connect(to.tcp).await?;
        let first = format!("give {query}\n");
        socket.write_all(first.as_bytes()).await?;
        socket
    } else {
        let mut http = Http::new(connect(to.http).await?);
        http.ask(&format!("/give?{query}"), None).await?;
        http.into_socket()
    };
    let mut got = 0;
    let mut buffer = vec![0; 16 * 1024];
    while got <= at {
        use tokio::io::AsyncReadExt as _;
        match socket.read(&mut buffer).await? {
            0 => return Err(wrong("an end before the answer's")),
            bytes => got += bytes as u64,
        }
    }
    reset(socket);
    Ok(false)
}
