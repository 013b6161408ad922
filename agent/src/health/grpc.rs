//! A check by gRPC's health protocol (grpc.health.v1), over HTTP/2 by prior knowledge.

use std::convert::Infallible;
use std::io;
use std::time::Duration;

use bytes::{BufMut as _, Bytes, BytesMut};
use h2::RecvStream;
use h2::client::{Builder, Connection, SendRequest};
use http::header::{CONTENT_TYPE, TE, USER_AGENT};
use http::{HeaderMap, Method, Request, Version};
use prost::Message as _;
use tokio::net::TcpStream;

use crate::http2::grpc;

const PATH: &str = "/grpc.health.v1.Health/Check";
/// The answer is a few bytes; what is more is none.
const ANSWER_MAX: usize = 1024;
/// Longest head, as RFC 9113 §6.5.2 measures it.
const HEAD_MAX: u32 = 16 * 1024;
/// Of the text that goes with a status.
const TEXT_MAX: usize = 200;
/// What stands before a message: whether it is compressed, and its length.
const PREFIX_LEN: usize = 5;
/// How long the end of the connection may take: a server should not see it broken off.
const FAREWELL: Duration = Duration::from_millis(100);
/// `ServingStatus`.
const SERVING: i32 = 1;
const NOT_SERVING: i32 = 2;
const SERVICE_UNKNOWN: i32 = 3;
/// Codes of gRPC.
const NOT_FOUND: u16 = 5;
const UNIMPLEMENTED: u16 = 12;

#[derive(Clone, PartialEq, prost::Message)]
struct HealthCheckRequest {
    #[prost(string, tag = "1")]
    service: String,
}

#[derive(Clone, Copy, PartialEq, prost::Message)]
struct HealthCheckResponse {
    #[prost(int32, tag = "1")]
    status: i32,
}

/// Asks for `service`; empty: for the server as a whole.
pub(super) async fn ask(stream: TcpStream, service: &str) -> io::Result<()> {
    let host = stream.peer_addr()?.to_string();
    let mut builder = Builder::new();
    builder.enable_push(false).max_header_list_size(HEAD_MAX);
    let (client, mut connection) = builder
        .handshake::<_, Bytes>(stream)
        .await
        .map_err(io::Error::other)?;
    let answer = tokio::select! {
        biased;
        answer = exchange(client, &host, service) => answer,
        never = drive(&mut connection) => match never {},
    };
    drop(tokio::time::timeout(FAREWELL, connection).await);
    answer
}

/// Moves what the exchange sends and gets, which also learns of the connection's end.
async fn drive(connection: &mut Connection<TcpStream, Bytes>) -> Infallible {
    drop(connection.await);
    std::future::pending().await
}

async fn exchange(client: SendRequest<Bytes>, host: &str, service: &str) -> io::Result<()> {
    let mut client = client.ready().await.map_err(io::Error::other)?;
    let request = Request::builder()
        .method(Method::POST)
        .version(Version::HTTP_2)
        .uri(format!("http://{host}{PATH}"))
        .header(CONTENT_TYPE, "application/grpc")
        .header(TE, "trailers")
        .header(USER_AGENT, "mesh-agent")
        .body(())
        .map_err(io::Error::other)?;
    let (response, mut body) = client
        .send_request(request, false)
        .map_err(io::Error::other)?;
    body.send_data(message(service), true)
        .map_err(io::Error::other)?;
    let response = response.await.map_err(io::Error::other)?;
    if response.status() != http::StatusCode::OK || !grpc::is_call(response.headers()) {
        let status = response.status().as_u16();
        return Err(malformed(&format!(
            "it answered {status}, which is no gRPC"
        )));
    }
    let (head, body) = response.into_parts();
    // Without a body the head has the status.
    if body.is_end_stream() {
        well(&head.headers, service)?;
        return Err(malformed("it answered without a message"));
    }
    let (message, trailers) = read(body).await?;
    well(&trailers, service)?;
    judge(&message, service)
}

/// The request with its prefix.
fn message(service: &str) -> Bytes {
    let request = HealthCheckRequest {
        service: service.to_owned(),
    };
    let length = request.encoded_len();
    let mut message = BytesMut::with_capacity(PREFIX_LEN + length);
    message.put_u8(0);
    // A name of at most some hundred bytes.
    message.put_u32(u32::try_from(length).unwrap_or(u32::MAX));
    message.extend_from_slice(&request.encode_to_vec());
    message.freeze()
}

async fn read(mut body: RecvStream) -> io::Result<(Vec<u8>, HeaderMap)> {
    let mut message = Vec::new();
    while let Some(data) = body.data().await {
        let data = data.map_err(io::Error::other)?;
        if message.len() + data.len() > ANSWER_MAX {
            return Err(malformed(&format!(
                "its answer is longer than {ANSWER_MAX} bytes"
            )));
        }
        message.extend_from_slice(&data);
        body.flow_control()
            .release_capacity(data.len())
            .map_err(io::Error::other)?;
    }
    let trailers = body.trailers().await.map_err(io::Error::other)?;
    Ok((message, trailers.unwrap_or_default()))
}

/// Whether the call ended well, as its last fields say.
fn well(fields: &HeaderMap, service: &str) -> io::Result<()> {
    let text = |name: &str| fields.get(name).and_then(|value| value.to_str().ok());
    let Some(status) = text("grpc-status").and_then(|status| status.parse::<u16>().ok()) else {
        return Err(malformed("its answer has no grpc-status"));
    };
    Err(io::Error::other(match status {
        0 => return Ok(()),
        UNIMPLEMENTED => {
            "it does not implement grpc.health.v1.Health: serve that, or use another check"
                .to_owned()
        }
        NOT_FOUND => format!("it knows no gRPC service `{service}`"),
        status => {
            let said: String = text("grpc-message")
                .unwrap_or_default()
                .chars()
                .take(TEXT_MAX)
                .collect();
            format!("it answered with gRPC status {status}: {said}")
        }
    }))
}

fn judge(message: &[u8], service: &str) -> io::Result<()> {
    let Some((prefix, rest)) = message.split_at_checked(PREFIX_LEN) else {
        return Err(malformed("its answer ends within a message"));
    };
    let length = u32::from_be_bytes([prefix[1], prefix[2], prefix[3], prefix[4]]);
    if prefix[0] != 0 || usize::try_from(length) != Ok(rest.len()) {
        return Err(malformed("its answer is not one plain message"));
    }
    let answer =
        HealthCheckResponse::decode(rest).map_err(|error| malformed(&error.to_string()))?;
    let of = match service {
        "" => String::new(),
        service => format!(" of {service}"),
    };
    let status = match answer.status {
        SERVING => return Ok(()),
        NOT_SERVING => "NOT_SERVING".to_owned(),
        SERVICE_UNKNOWN => "SERVICE_UNKNOWN".to_owned(),
        other => format!("{other}"),
    };
    Err(io::Error::other(format!("its status{of} is {status}")))
}

fn malformed(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::Response;
    use tokio::net::TcpListener;

    /// What a server does with the one call that it gets.
    struct Answer {
        head: &'static [(&'static str, &'static str)],
        /// `None`: the head is all.
        body: Option<Vec<u8>>,
        trailers: &'static [(&'static str, &'static str)],
    }

    const GRPC: (&str, &str) = ("content-type", "application/grpc");
    const FINE: &[(&str, &str)] = &[("grpc-status", "0")];

    fn framed(message: &[u8]) -> Vec<u8> {
        let mut framed = vec![0, 0, 0, 0, u8::try_from(message.len()).unwrap()];
        framed.extend_from_slice(message);
        framed
    }

    async fn judged(answer: Answer) -> io::Result<()> {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = tokio::spawn(async move {
            let (stream, _) = listener.accept().await.unwrap();
            let mut connection = h2::server::handshake(stream).await.unwrap();
            while let Some(Ok((request, mut respond))) = connection.accept().await {
                assert_eq!(request.uri().path(), PATH);
                assert_eq!(request.headers()["te"], "trailers");
                let mut response = Response::new(());
                let fields = |of: &[(&'static str, &'static str)]| -> HeaderMap {
                    let field = |(n, v): &(&'static str, &'static str)| {
                        (n.parse().unwrap(), v.parse().unwrap())
                    };
                    of.iter().map(field).collect()
                };
                *response.headers_mut() = fields(answer.head);
                let last = answer.body.is_none();
                let mut stream = respond.send_response(response, last).unwrap();
                if let Some(body) = &answer.body {
                    stream.send_data(body.clone().into(), false).unwrap();
                    stream.send_trailers(fields(answer.trailers)).unwrap();
                }
            }
        });
        let stream = TcpStream::connect(address).await.unwrap();
        let result = tokio::time::timeout(Duration::from_secs(30), ask(stream, "shop.Cart"));
        let result = result.await.unwrap();
        server.abort();
        result
    }

    #[tokio::test]
    async fn only_serving_is_healthy() {
        let said = |status: u8| Answer {
            head: &[GRPC],
            body: Some(framed(&[8, status])),
            trailers: FINE,
        };
        judged(said(1)).await.unwrap();
        for (status, word) in [
            (2, "NOT_SERVING"),
            (3, "SERVICE_UNKNOWN"),
            (0, "is 0"),
            (9, "is 9"),
        ] {
            let error = judged(said(status)).await.unwrap_err().to_string();
            assert!(error.contains(word), "{status}: {error}");
        }
    }

    #[tokio::test]
    async fn what_is_no_good_answer_is_a_failure() {
        let only = |head| Answer {
            head,
            body: None,
            trailers: &[],
        };
        let whole = |body, trailers| Answer {
            head: &[GRPC],
            body: Some(body),
            trailers,
        };
        let serving = || framed(&[8, 1]);
        for (answer, word) in [
            (only(&[GRPC, ("grpc-status", "12")]), "does not implement"),
            (
                only(&[GRPC, ("grpc-status", "5")]),
                "knows no gRPC service `shop.Cart`",
            ),
            (
                only(&[GRPC, ("grpc-status", "14"), ("grpc-message", "later")]),
                "status 14: later",
            ),
            (only(&[GRPC, ("grpc-status", "0")]), "without a message"),
            (only(&[GRPC]), "no grpc-status"),
            (only(&[("content-type", "text/html")]), "no gRPC"),
            (whole(serving(), &[("grpc-status", "13")]), "status 13"),
            (whole(serving(), &[]), "no grpc-status"),
            (whole(vec![0; ANSWER_MAX + 1], FINE), "longer than"),
            (whole(vec![0, 0], FINE), "within a message"),
            (whole(vec![1, 0, 0, 0, 2, 8, 1], FINE), "not one plain"),
            (whole(vec![0, 0, 0, 0, 9, 8, 1], FINE), "not one plain"),
            (whole(framed(&[255]), FINE), "decode"),
        ] {
            let error = judged(answer).await.unwrap_err().to_string();
            assert!(error.contains(word), "{word}: {error}");
        }
    }

    #[tokio::test]
    async fn a_server_that_speaks_no_http2_is_a_failure() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = tokio::spawn(async move {
            let (stream, _) = listener.accept().await.unwrap();
            stream.writable().await.unwrap();
            stream
                .try_write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                .unwrap();
        });
        let stream = TcpStream::connect(address).await.unwrap();
        let asked = tokio::time::timeout(Duration::from_secs(30), ask(stream, ""));
        asked.await.unwrap().unwrap_err();
        server.await.unwrap();
    }
}
