//! The server: HTTP/1.1 on one port, plain bytes on the other.

use std::io::{self, ErrorKind};
use std::net::{Ipv6Addr, SocketAddr};

use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::task::spawn_local;

use super::exchange::{Wanted, forever, framing_field, head, reset};
use super::framing::{Framing, Progress, give, line, take};
use super::say;

/// As deep as the kernel allows.
const BACKLOG: u32 = 4096;

fn listen(port: u16) -> io::Result<TcpListener> {
    let socket = TcpSocket::new_v6()?;
    socket.set_reuseaddr(true)?;
    socket.bind(SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), port))?;
    socket.listen(BACKLOG)
}

/// Serves until it is killed.
pub(super) async fn run(http: u16, tcp: u16) -> io::Result<()> {
    let (http, tcp) = (listen(http)?, listen(tcp)?);
    spawn_local(async move {
        while let Ok((socket, _)) = http.accept().await {
            spawn_local(async move {
                drop(socket.set_nodelay(true));
                if let Err(error) = serve_http(socket).await {
                    say(&format!("http ended: {error}"));
                }
            });
        }
    });
    while let Ok((socket, _)) = tcp.accept().await {
        spawn_local(async move {
            drop(socket.set_nodelay(true));
            if let Err(error) = serve_tcp(socket).await {
                say(&format!("tcp ended: {error}"));
            }
        });
    }
    Err(io::Error::other("cannot accept"))
}

async fn serve_http(socket: TcpStream) -> io::Result<()> {
    let mut reader = BufReader::with_capacity(64 * 1024, socket);
    while let Some(head) = head(&mut reader, Framing::Length(0)).await? {
        let taken = take(&mut reader, head.framing, &Progress::default()).await;
        let taken = match taken {
            Ok(taken) => taken,
            Err(error) => {
                say(&format!("http upload cut: {error}"));
                return Err(error);
            }
        };
        say_long("http", taken.bytes);
        let query = head.word.split_once('?').map_or("", |(_, query)| query);
        let wanted = Wanted::of_query(query).ok_or(ErrorKind::InvalidInput)?;
        let socket = reader.get_mut();
        let text = format!(
            "HTTP/1.1 200 OK\r\nx-taken: {taken}\r\n{}\r\n",
            framing_field(wanted.framing)
        );
        socket.write_all(text.as_bytes()).await?;
        give(socket, wanted.framing, wanted.body).await?;
        if wanted.reset {
            reset(reader.into_inner());
            return Ok(());
        }
        if wanted.body.stop.is_some() {
            forever().await;
        }
        if wanted.framing == Framing::Close {
            return Ok(());
        }
    }
    Ok(())
}

/// An upload that a test has cut must not be found here.
fn say_long(way: &str, bytes: u64) {
    if bytes > 1 << 20 {
        say(&format!("{way} upload whole: {bytes}"));
    }
}

async fn serve_tcp(socket: TcpStream) -> io::Result<()> {
    let mut reader = BufReader::with_capacity(64 * 1024, socket);
    // A health check says nothing.
    if reader.fill_buf().await?.is_empty() {
        return Ok(());
    }
    let first = line(&mut reader).await?;
    if first == "echo" {
        return echo(reader).await;
    }
    let wanted = first.strip_prefix("give ").and_then(Wanted::of_query);
    let wanted = wanted.ok_or(ErrorKind::InvalidInput)?;
    let early = reader.buffer().to_vec();
    let mut socket = reader.into_inner();
    let done = {
        let (reader, mut writer) = socket.split();
        let mut reader = BufReader::with_capacity(64 * 1024, early.as_slice().chain(reader));
        let gives = async {
            give(&mut writer, Framing::Close, wanted.body).await?;
            Ok(writer)
        };
        let progress = Progress::default();
        let takes = take(&mut reader, Framing::Close, &progress);
        if wanted.reset {
            // What the caller still sends is nobody's: the connection goes as soon as the body stops.
            tokio::select! {
                given = gives => given.map(|_| None),
                taken = async { takes.await?; forever().await } => taken,
            }
        } else {
            match tokio::try_join!(takes, gives) {
                Ok((taken, mut writer)) => {
                    say_long("tcp", taken.bytes);
                    if wanted.body.stop.is_some() {
                        forever().await;
                    }
                    writer.write_all(format!("{taken}\n").as_bytes()).await?;
                    writer.shutdown().await?;
                    Ok(Some(taken))
                }
                Err(error) => Err(error),
            }
        }
    };
    if let Err(error) = &done {
        say(&format!("tcp upload cut: {error}"));
    }
    if wanted.reset {
        reset(socket);
    }
    done.map(|_| ())
}

async fn echo(mut reader: BufReader<TcpStream>) -> io::Result<()> {
    let mut buffer = vec![0; 4096];
    loop {
        let bytes = reader.read(&mut buffer).await?;
        if bytes == 0 {
            return Ok(());
        }
        reader.get_mut().write_all(&buffer[..bytes]).await?;
    }
}
