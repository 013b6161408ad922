//! Hands a query to the upstream servers as it is, and their answer back as it is.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::timeout;

/// How long one server is waited for before the next is tried: three fit within a stub's own 5 s, nearly.
const SERVER_WAIT: Duration = Duration::from_secs(2);
/// The same by TCP, where large answers and a handshake take longer.
const TCP_SERVER_WAIT: Duration = Duration::from_secs(5);
const HEADER: usize = 12;

/// The first answer of `upstreams`, tried in turn. Each query has a socket of its own, so that its random
/// port must be guessed together with its id (RFC 5452 §9.2).
pub(super) async fn by_udp(query: &[u8], upstreams: &[SocketAddr]) -> Option<Vec<u8>> {
    for upstream in upstreams {
        match timeout(SERVER_WAIT, ask_udp(query, *upstream)).await {
            Ok(Ok(answer)) => return Some(answer),
            Ok(Err(error)) => log::debug!("DNS server {upstream} can not be asked: {error}"),
            Err(_) => log::debug!("DNS server {upstream} did not answer within {SERVER_WAIT:?}"),
        }
    }
    None
}

/// As [`by_udp`], for a query that came by TCP.
pub(super) async fn by_tcp(query: &[u8], upstreams: &[SocketAddr]) -> Option<Vec<u8>> {
    for upstream in upstreams {
        match timeout(TCP_SERVER_WAIT, ask_tcp(query, *upstream)).await {
            Ok(Ok(answer)) => return Some(answer),
            Ok(Err(error)) => log::debug!("DNS server {upstream} can not be asked by TCP: {error}"),
            Err(_) => log::debug!("DNS server {upstream} did not answer by TCP in time"),
        }
    }
    None
}

async fn ask_udp(query: &[u8], upstream: SocketAddr) -> io::Result<Vec<u8>> {
    let any: SocketAddr = match upstream {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let socket = UdpSocket::bind(any).await?;
    // The kernel then takes packets of this server only, and tells when it refuses.
    socket.connect(upstream).await?;
    socket.send(query).await?;
    loop {
        let ready = socket.ready(Interest::READABLE | Interest::ERROR).await?;
        if ready.is_error() {
            // Refused: the next server is tried at once.
            let error = socket.take_error()?;
            return Err(error.unwrap_or_else(|| io::ErrorKind::ConnectionRefused.into()));
        }
        // Made only now: a thousand waiting queries must not hold a thousand buffers.
        let mut answer = vec![0; super::MESSAGE_MAX];
        match socket.try_recv(&mut answer) {
            Ok(length) => {
                answer.truncate(length);
                if belongs_to(&answer, query) {
                    answer.shrink_to_fit();
                    return Ok(answer);
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => (),
            Err(error) => return Err(error),
        }
    }
}

async fn ask_tcp(query: &[u8], upstream: SocketAddr) -> io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect(upstream).await?;
    write_message(&mut stream, query).await?;
    let answer = read_message(&mut stream).await?;
    if belongs_to(&answer, query) {
        Ok(answer)
    } else {
        Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "the answer is to another query",
        ))
    }
}

/// Reads one message with its length in front (RFC 1035 §4.2.2).
pub(super) async fn read_message(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let length = stream.read_u16().await?;
    let mut message = vec![0; length.into()];
    stream.read_exact(&mut message).await?;
    Ok(message)
}

pub(super) async fn write_message(stream: &mut TcpStream, message: &[u8]) -> io::Result<()> {
    let length = u16::try_from(message.len()).map_err(io::Error::other)?;
    // In one write: some servers and middleboxes want both in one segment (RFC 7766 §8).
    let mut framed = Vec::with_capacity(2 + message.len());
    framed.extend(length.to_be_bytes());
    framed.extend(message);
    stream.write_all(&framed).await
}

/// Whether `answer` is one to `query`: the same id, and the same question if it repeats one.
fn belongs_to(answer: &[u8], query: &[u8]) -> bool {
    if answer.len() < HEADER || query.len() < HEADER || answer[..2] != query[..2] {
        return false;
    }
    let is_response = answer[2] & 0x80 != 0;
    let questions = u16::from_be_bytes([answer[4], answer[5]]);
    let same = || match question(query) {
        Some(asked) => answer
            .get(HEADER..HEADER + asked.len())
            .is_some_and(|repeated| repeated.eq_ignore_ascii_case(asked)),
        // We could not tell its question: the server can.
        None => true,
    };
    is_response && (questions == 0 || same())
}

/// The bytes of the first question: a name without pointers, type and class.
fn question(message: &[u8]) -> Option<&[u8]> {
    let mut end = HEADER;
    loop {
        let length = usize::from(*message.get(end)?);
        match length {
            0 => break,
            1..=63 => end += 1 + length,
            _ => return None,
        }
    }
    message.get(HEADER..end + 5)
}

#[cfg(test)]
mod tests {
    use super::*;

    const QUERY: &[u8] = b"\x12\x34\x01\0\0\x01\0\0\0\0\0\0\x01A\x03com\0\0\x01\0\x01";

    #[test]
    fn only_the_answer_to_the_query_is_taken() {
        let with = |change: fn(&mut Vec<u8>)| {
            let mut answer = QUERY.to_vec();
            answer[2] |= 0x80;
            answer.extend([1, 2, 3]);
            change(&mut answer);
            belongs_to(&answer, QUERY)
        };
        assert!(with(|_| ()));
        assert!(with(|a| a[13] = b'a'), "another case");
        assert!(with(|a| {
            a[5] = 0;
            a.truncate(HEADER);
        }));
        assert!(!with(|a| a[1] = 0), "another id");
        assert!(!with(|a| a[2] = 1), "a query");
        assert!(!with(|a| a[13] = b'b'), "another name");
        assert!(!with(|a| a.truncate(20)));
        assert!(!with(|a| a.truncate(5)));
    }
}
