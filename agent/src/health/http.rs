//! A check by HTTP/1.1: a path answers 2xx or 3xx.

use std::io;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// How much of an answer is read for its status line, in bytes.
const STATUS_LINE_MAX: usize = 64;

pub(super) async fn ask(mut stream: TcpStream, path: &str) -> io::Result<()> {
    let host = stream.peer_addr()?;
    let request = format!(
        "GET {path} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: mesh-agent\r\nAccept: */*\r\nConnection: close\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).await?;
    match read_status(&mut stream).await? {
        200..=399 => Ok(()),
        status => Err(io::Error::other(format!("{path} answered {status}"))),
    }
}

/// The status code of a response (RFC 9112 §4). Informational ones are not waited past: a check asks for none.
async fn read_status(stream: &mut TcpStream) -> io::Result<u16> {
    let malformed = || io::Error::new(io::ErrorKind::InvalidData, "the answer is not HTTP/1");
    let mut head = [0; STATUS_LINE_MAX];
    let mut length = 0;
    // `HTTP/1.1 200` and what ends the number.
    while length < 13 {
        match stream.read(&mut head[length..]).await? {
            0 => break,
            more => length += more,
        }
    }
    let head = &head[..length];
    let rest = head
        .strip_prefix(b"HTTP/1.1 ")
        .or_else(|| head.strip_prefix(b"HTTP/1.0 "))
        .ok_or_else(malformed)?;
    match rest {
        [code @ .., _] if rest.len() > 3 => {
            let digits = code.get(..3).ok_or_else(malformed)?;
            let ends = matches!(rest[3], b' ' | b'\r' | b'\n');
            let code = std::str::from_utf8(digits)
                .ok()
                .and_then(|d| d.parse().ok());
            code.filter(|_| ends).ok_or_else(malformed)
        }
        _ => Err(malformed()),
    }
}
