//! Bodies both ways in every framing: whole ones, and endless ones that somebody cuts.

use std::cell::Cell;
use std::io;
use std::rc::Rc;

use tokio::io::AsyncWriteExt as _;
use tokio::task::spawn_local;

use super::exchange::{Http, Wanted, over_tcp, wanted};
use super::framing::{Body, Framing, Progress, give};
use super::{To, connect, say};

/// Longer than any test: a body that only ends by being cut.
const ENDLESS: u64 = 1 << 46;
/// Behind every buffer on the way: what is cut then is in the middle, at both ends.
const MIDDLE: u64 = 4 << 20;

/// Passes bodies of `bytes` in every framing and direction.
pub(super) async fn whole(to: To, bytes: u64) -> io::Result<()> {
    let one = wanted(Framing::Length(1), 1, 1);
    let none = || async { connect(to.http).await.map(Http::new) };
    for framing in [Framing::Length(bytes), Framing::Chunked, Framing::Close] {
        none()
            .await?
            .exchange(None, wanted(framing, bytes, 11))
            .await?;
        say(&format!("down {framing:?}"));
    }
    for framing in [Framing::Length(bytes), Framing::Chunked] {
        let body = Some((framing, Body::new(bytes, 12)));
        none().await?.exchange(body, one).await?;
        say(&format!("up {framing:?}"));
    }
    let mut socket = connect(to.tcp).await?;
    let sent = Body::new(bytes, 13);
    let both = wanted(Framing::Close, bytes, 11);
    over_tcp(&mut socket, sent, both, &Progress::default()).await?;
    say("both ways tcp");
    Ok(())
}

/// A transfer that is cut, and what its caller made of it.
struct Transfer {
    name: String,
    progress: Progress,
}

/// Starts a transfer of every kind, says `flowing` when all are in their middle, and how each ended when all have.
pub(super) async fn endless(to: To) -> io::Result<()> {
    let mut transfers = Vec::new();
    let (ended, good) = (Rc::new(Cell::new(0)), Rc::new(Cell::new(true)));
    let mut start = |name: String, work: Work| {
        let progress = work.progress.clone();
        let (told, ended, good) = (name.clone(), Rc::clone(&ended), Rc::clone(&good));
        spawn_local(async move {
            let outcome = work.run().await;
            good.set(good.get() && outcome.is_err());
            match outcome {
                Ok(()) => say(&format!("{told} LOOKS WHOLE")),
                Err(error) => say(&format!("{told} cut: {error}")),
            }
            ended.set(ended.get() + 1);
        });
        transfers.push(Transfer { name, progress });
    };
    // Those that flow, and those that stand in the middle with nothing under way.
    for stop in [None, Some(MIDDLE)] {
        let body = Body {
            stop,
            ..Body::new(ENDLESS, 21)
        };
        let standing = if stop.is_some() { "standing " } else { "" };
        for framing in [Framing::Length(ENDLESS), Framing::Chunked, Framing::Close] {
            let down = Wanted {
                body,
                framing,
                reset: false,
            };
            start(
                format!("{standing}down {framing:?}"),
                Work::new(to, Kind::Down(down)),
            );
            if framing != Framing::Close {
                start(
                    format!("{standing}up {framing:?}"),
                    Work::new(to, Kind::Up(framing, body)),
                );
            }
        }
        start(
            format!("{standing}down tcp"),
            Work::new(to, Kind::TcpDown(body)),
        );
        start(
            format!("{standing}up tcp"),
            Work::new(to, Kind::TcpUp(body)),
        );
    }
    let all = transfers.len();
    loop {
        if transfers.iter().all(|t| t.progress.get() >= MIDDLE) {
            break;
        }
        if ended.get() > 0 {
            let late = transfers.iter().filter(|t| t.progress.get() < MIDDLE);
            let late: Vec<&str> = late.map(|t| t.name.as_str()).collect();
            return Err(io::Error::other(format!(
                "something ended before {late:?} were under way"
            )));
        }
        tokio::time::sleep(super::LOOK_EVERY).await;
    }
    say("flowing");
    while ended.get() < all {
        tokio::time::sleep(super::LOOK_EVERY).await;
    }
    say(&format!("ended {all}"));
    if good.get() {
        Ok(())
    } else {
        Err(io::Error::other("a body that was cut looks whole"))
    }
}

enum Kind {
    Down(Wanted),
    Up(Framing, Body),
    TcpDown(Body),
    TcpUp(Body),
}

struct Work {
    to: To,
    kind: Kind,
    progress: Progress,
}

impl Work {
    fn new(to: To, kind: Kind) -> Self {
        Self {
            to,
            kind,
            progress: Progress::default(),
        }
    }

    /// `Ok` when the message seems whole: then its caller was deceived.
    async fn run(self) -> io::Result<()> {
        let progress = &self.progress;
        match self.kind {
            Kind::Down(wanted) => {
                let mut http = Http::new(connect(self.to.http).await?);
                let path = format!("/give?{}", wanted.to_query());
                http.ask(&path, None).await?;
                http.answer(progress).await.map(|_| ())
            }
            Kind::Up(framing, body) => {
                let path = format!("/give?{}", wanted(Framing::Length(1), 1, 1).to_query());
                let mut http = Http::new(connect(self.to.http).await?);
                let head = format!(
                    "POST {path} HTTP/1.1\r\nhost: app\r\n{}\r\n",
                    super::exchange::framing_field(framing)
                );
                let mut socket = http.into_socket();
                socket.write_all(head.as_bytes()).await?;
                sending(&mut socket, framing, body, progress).await?;
                // It stands: the caller waits for an answer that can not come.
                http = Http::new(socket);
                http.answer(&Progress::default()).await.map(|_| ())
            }
            Kind::TcpDown(body) => {
                let mut socket = connect(self.to.tcp).await?;
                let wanted = Wanted {
                    body,
                    framing: Framing::Close,
                    reset: false,
                };
                let first = format!("give {}\n", wanted.to_query());
                socket.write_all(first.as_bytes()).await?;
                let mut reader = tokio::io::BufReader::new(socket);
                super::framing::take(&mut reader, Framing::Close, progress)
                    .await
                    .map(|_| ())
            }
            Kind::TcpUp(body) => {
                let mut socket = connect(self.to.tcp).await?;
                let first = format!("give {}\n", wanted(Framing::Close, 0, 1).to_query());
                socket.write_all(first.as_bytes()).await?;
                sending(&mut socket, Framing::Close, body, progress).await?;
                let mut reader = tokio::io::BufReader::new(socket);
                super::framing::take(&mut reader, Framing::Close, &Progress::default())
                    .await
                    .map(|_| ())
            }
        }
    }
}

/// Sends a body and notes how far it is.
async fn sending(
    socket: &mut tokio::net::TcpStream,
    framing: Framing,
    body: Body,
    progress: &Progress,
) -> io::Result<()> {
    let mut noted = Noted {
        socket,
        progress: progress.clone(),
    };
    give(&mut noted, framing, body).await.map(|_| ())
}

struct Noted<'a> {
    socket: &'a mut tokio::net::TcpStream,
    progress: Progress,
}

impl tokio::io::AsyncWrite for Noted<'_> {
    fn poll_write(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
        bytes: &[u8],
    ) -> std::task::Poll<io::Result<usize>> {
        let written = std::pin::Pin::new(&mut *self.socket).poll_write(cx, bytes);
        if let std::task::Poll::Ready(Ok(bytes)) = &written {
            self.progress.add(*bytes);
        }
        written
    }

    fn poll_flush(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<io::Result<()>> {
        std::pin::Pin::new(&mut *self.socket).poll_flush(cx)
    }

    fn poll_shutdown(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<io::Result<()>> {
        std::pin::Pin::new(&mut *self.socket).poll_shutdown(cx)
    }
}
