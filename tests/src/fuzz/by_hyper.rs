//! The second reader of HTTP/1: hyper, as many apps use it, over bytes in memory.

use std::cell::{Cell, RefCell};
use std::io;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use hyper::rt::{Read, ReadBufCursor, Write};
use hyper::service::service_fn;
use hyper::{HeaderMap, Method, Request, Response, StatusCode};

use super::reading::{Message, Seen, latin1};

/// Turns of a reader that gets a few hundred bytes: one that needs more stands still.
const TURNS_MAX: usize = 100_000;

/// Bytes that come in pieces, then the end; what is written is dropped.
struct Tape<'a> {
    bytes: &'a [u8],
    piece: usize,
    /// Nothing comes before something was written: a server that speaks first would be in error.
    asked: Rc<Cell<bool>>,
}

impl Read for Tape<'_> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        mut buffer: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        if !self.asked.get() {
            return Poll::Pending;
        }
        let bytes = self.bytes.len().min(self.piece).min(buffer.remaining());
        let (now, later) = self.bytes.split_at(bytes);
        buffer.put_slice(now);
        self.bytes = later;
        Poll::Ready(Ok(()))
    }
}

impl Write for Tape<'_> {
    fn poll_write(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.asked.set(true);
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// The requests that hyper's server reads from `bytes`, which come `piece` at a time.
pub fn requests(bytes: &[u8], piece: usize) -> Vec<Seen> {
    let seen = Rc::new(RefCell::new(Vec::new()));
    let service = service_fn(|request: Request<Incoming>| {
        let seen = Rc::clone(&seen);
        async move {
            let (head, body) = request.into_parts();
            let (body, whole) = collect(body).await;
            let line = vec![
                head.method.to_string(),
                latin1(head.uri.to_string().as_bytes()),
            ];
            let message = Message {
                line,
                headers: headers(&head.headers),
                body,
            };
            seen.borrow_mut().push(Seen { message, whole });
            let mut answer = Response::new(String::new());
            if head.method == Method::CONNECT {
                *answer.status_mut() = StatusCode::METHOD_NOT_ALLOWED;
            }
            Ok::<_, hyper::Error>(answer)
        }
    });
    let tape = Tape {
        bytes,
        piece,
        asked: Rc::new(Cell::new(true)),
    };
    let mut builder = hyper::server::conn::http1::Builder::new();
    let mut connection = pin!(builder.half_close(true).serve_connection(tape, service));
    let mut context = Context::from_waker(Waker::noop());
    for _ in 0..TURNS_MAX {
        // How it ends, a refusal included, shows in what was seen.
        if connection.as_mut().poll(&mut context).is_ready() {
            return seen.take();
        }
    }
    panic!(
        "hyper stands still over {:?}",
        String::from_utf8_lossy(bytes)
    );
}

/// The answer to a request of `method` that hyper's client reads from `bytes`. `None`: it refuses.
pub fn response(bytes: &[u8], piece: usize, method: &str) -> Option<Seen> {
    let tape = Tape {
        bytes,
        piece,
        asked: Rc::default(),
    };
    let mut context = Context::from_waker(Waker::noop());
    let handshake = pin!(hyper::client::conn::http1::handshake(tape));
    let Poll::Ready(Ok((mut sender, connection))) = handshake.poll(&mut context) else {
        panic!("hyper's handshake is only a constructor");
    };
    let request = Request::builder()
        .method(method)
        .uri(if method == "CONNECT" { "a:443" } else { "/" });
    let request = request
        .header("host", "a")
        .body(String::new())
        .expect("a request of our own");
    let exchange = async move {
        let (head, body) = sender.send_request(request).await.ok()?.into_parts();
        let (body, whole) = collect(body).await;
        let line = vec![head.status.as_u16().to_string()];
        let message = Message {
            line,
            headers: headers(&head.headers),
            body,
        };
        Some(Seen { message, whole })
    };
    let (mut connection, mut exchange) = (pin!(connection), pin!(exchange));
    let mut over = false;
    for _ in 0..TURNS_MAX {
        over = over || connection.as_mut().poll(&mut context).is_ready();
        if let Poll::Ready(seen) = exchange.as_mut().poll(&mut context) {
            return seen;
        }
    }
    panic!(
        "hyper stands still over {:?}",
        String::from_utf8_lossy(bytes)
    );
}

async fn collect(mut body: Incoming) -> (Vec<u8>, bool) {
    let mut bytes = Vec::new();
    while let Some(frame) = body.frame().await {
        match frame {
            Ok(frame) => bytes.extend(frame.data_ref().into_iter().flatten()),
            Err(_) => return (bytes, false),
        }
    }
    (bytes, true)
}

fn headers(map: &HeaderMap) -> Vec<(String, Vec<u8>)> {
    let mut headers: Vec<_> = map
        .iter()
        .map(|(name, value)| (name.as_str().to_owned(), value.as_bytes().to_vec()))
        .collect();
    headers.sort_by(|a, b| a.0.cmp(&b.0));
    headers
}
