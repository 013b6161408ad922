//! A connection whose protocol is not declared. A stream is opened at once and the other agent connects to the
//! app: whoever speaks first is heard without waiting. HTTP/1.1 if the caller's first bytes are a request, HTTP/2 if they
//! are its preface, else bytes.

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;

use mesh_api::header::StreamKind;
use mesh_core::http1::{self, Sniff};
use mesh_core::reason::Reason;
use mesh_core::service::Protocol;
use tokio::net::TcpStream;
use tokio_util::io::poll_read_buf;

use super::{http, http2, tcp};
use crate::call::{self, Call, Caller, Tries};
use crate::data::Thread;
use crate::relay::{self, Activity};
use crate::urgent::Reader;

/// A call that was refused before the caller said a word: so long its first bytes may take to tell in which
/// form the refusal is wanted.
const REFUSED_WAIT: Duration = Duration::from_secs(1);

/// What came first.
enum First {
    Request,
    /// An HTTP/2 client's preface.
    Preface,
    /// Bytes of another protocol, the app's word, or an end.
    Bytes,
    Refused(Reason),
    /// The caller reset its connection.
    Gone,
}

pub(super) async fn serve(
    thread: &Rc<Thread>,
    caller: Caller,
    mut client: TcpStream,
    activity: &Activity,
) {
    let mut buffer = Vec::new();
    let mut tries = Tries::default();
    let reason = loop {
        let call = match call::open(thread, &caller, StreamKind::Auto, &mut tries).await {
            Ok(call) => call,
            Err(reason) => break reason,
        };
        let mut sent = 0;
        let first = tokio::select! {
            first = first(&mut client, &call, &mut buffer, &mut sent) => first,
            () = activity.ceased(thread.settings.idle) => break Reason::Timeout,
        };
        let refused = match first {
            First::Request => {
                let begun = http::Begun {
                    call: Some((call, sent)),
                    buffer,
                };
                return http::continue_with(thread, &caller, client, begun, activity).await;
            }
            // Each request is a stream of its own: this one was never any's.
            First::Preface => {
                drop(call);
                return http2::serve(thread, caller, Protocol::Http2, client, buffer).await;
            }
            // The balancer hears of an answer only when there is one.
            First::Bytes => match tcp::accepted(thread, &call).await {
                Ok(()) => {
                    let flow = tcp::flow(thread, &caller, &call, "tcp");
                    flow.sent.inc_by(sent as u64);
                    return tcp::carry(thread, &caller, &call, client, (&flow, activity)).await;
                }
                Err(reason) => reason,
            },
            First::Refused(reason) => reason,
            // The call is dropped: the app sees a reset, too.
            First::Gone => return relay::abort(client),
        };
        call.failed(refused);
        tries.note(&call.endpoint, refused);
        // What was sent is still in the buffer, and no app had it.
        if !refused.is_retryable() || tries.are_used_up() {
            break refused;
        }
    };
    refuse(thread, caller, client, buffer, reason).await;
}

/// Passes the caller's first bytes on while looking at them. The other agent looks at the same bytes in the same
/// way, so both come to the same answer.
async fn first(
    client: &mut TcpStream,
    call: &Call,
    buffer: &mut Vec<u8>,
    sent: &mut usize,
) -> First {
    let mut reader = Reader::new(client.split().0);
    loop {
        let seen = http1::sniff(buffer);
        match seen {
            Sniff::Http1 => return First::Request,
            Sniff::Http2 => return First::Preface,
            Sniff::Other | Sniff::More => (),
        }
        if call.stream.send(&buffer[*sent..]).await.is_err() {
            return match call.stream.reset_reason() {
                Some(reason) => First::Refused(reason),
                None => First::Bytes,
            };
        }
        *sent = buffer.len();
        if seen == Sniff::Other {
            return First::Bytes;
        }
        match poll_fn(|cx| poll_either(cx, &mut reader, call, buffer)).await {
            Ok(true) => (),
            Ok(false) => {
                return match call.stream.reset_reason() {
                    Some(reason) => First::Refused(reason),
                    None => First::Bytes,
                };
            }
            Err(error) => {
                log::debug!("the caller's connection broke: {error}");
                return First::Gone;
            }
        }
    }
}

/// True when the caller spoke; false when the app did, or one of them ended. The kernel tells an error once: whoever read
/// on behind it would take it for a proper end.
fn poll_either(
    cx: &mut Context<'_>,
    client: &mut Reader<'_>,
    call: &Call,
    buffer: &mut Vec<u8>,
) -> Poll<io::Result<bool>> {
    if call.stream.poll_readable(cx).is_ready() {
        return Poll::Ready(Ok(false));
    }
    // The relay meets the end again.
    poll_read_buf(Pin::new(client), cx, buffer).map_ok(|bytes| bytes > 0)
}

/// An HTTP caller gets the refusal as a response, others a reset.
async fn refuse(
    thread: &Rc<Thread>,
    caller: Caller,
    mut client: TcpStream,
    mut buffer: Vec<u8>,
    reason: Reason,
) {
    let speaks = async {
        let mut reader = Reader::new(client.split().0);
        loop {
            let seen = http1::sniff(&buffer);
            if seen != Sniff::More {
                return seen;
            }
            let read = poll_fn(|cx| poll_read_buf(Pin::new(&mut reader), cx, &mut buffer)).await;
            if !matches!(read, Ok(1..)) {
                return Sniff::Other;
            }
        }
    };
    let speaks = tokio::time::timeout(REFUSED_WAIT, speaks).await;
    if speaks == Ok(Sniff::Http2) {
        // Each request has a try, and a refusal, of its own.
        return http2::serve(thread, caller, Protocol::Http2, client, buffer).await;
    }
    super::note_refusal(thread, &caller, reason);
    if speaks == Ok(Sniff::Http1) {
        http::answer_and_close(thread, &caller, client, reason).await;
    } else {
        relay::abort(client);
    }
}
