//! One HTTP/2 request and its response, between a stream and the app.

use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Instant;

use h2::Reason as Code;
use mesh_api::message::Reader;
use mesh_core::reason::Reason;
use mesh_runtime::mux::MuxStream;

use super::{Admitted, Peer};
use crate::http::Sender;
use crate::http2::{Failed, FromMesh, Head, Notes, ToMesh, read_request};
use crate::limits::Limit;
use crate::relay::{Activity, Open};

pub(crate) mod app;

/// A request that the app did not look at is sent once more.
const TRIES_MAX: usize = 2;

pub(super) async fn serve(
    peer: &Rc<Peer>,
    admitted: &Rc<Admitted>,
    stream: &MuxStream,
    activity: &Activity,
) -> Result<(), Reason> {
    let max = peer.thread().settings.head_max;
    // From the stream's begin: the other agent has the whole head before it opens one.
    let read = read_request(stream, (sender(peer), activity), max);
    let read = tokio::time::timeout(activity.head_timeout(), read).await;
    let (head, mut reader) = match read {
        Ok(Ok(Some(both))) => both,
        Ok(Ok(None) | Err(Failed::Mesh(_))) => return Ok(()),
        Ok(Err(failed)) => return Err(reason_of(failed)),
        Err(_) => {
            activity.ran_out(Limit::Head);
            return Err(Reason::Timeout);
        }
    };
    let open = Open::count(&admitted.flow.open);
    let begun = Instant::now();
    for tries_left in (0..TRIES_MAX).rev() {
        let lease = tokio::select! {
            lease = app::lease(peer, admitted) => lease?,
            _ = poll_fn(|cx| stream.poll_reset(cx)) => return Ok(()),
        };
        let exchange = Exchange {
            peer,
            admitted,
            stream,
            activity,
            begun,
        };
        match exchange.run(&lease, &head, reader).await {
            Outcome::Over => break,
            Outcome::Refused(reason) => return Err(reason),
            Outcome::NotTaken(untouched) => {
                lease.retire();
                match untouched {
                    Some(again) if tries_left > 0 => reader = again,
                    // The caller's own library knows that it may send it again.
                    _ => {
                        stream.reset_with_code(Code::REFUSED_STREAM.into());
                        break;
                    }
                }
            }
        }
    }
    drop(open);
    Ok(())
}

/// How a try with one connection of the app ended.
enum Outcome {
    Over,
    Refused(Reason),
    /// The app did not look at it. With the reader the request is as it was.
    NotTaken(Option<Reader>),
}

struct Exchange<'a> {
    peer: &'a Rc<Peer>,
    admitted: &'a Rc<Admitted>,
    stream: &'a MuxStream,
    activity: &'a Activity,
    begun: Instant,
}

impl Exchange<'_> {
    async fn run(&self, lease: &app::Lease, head: &Head, reader: Reader) -> Outcome {
        let max = self.peer.thread().settings.head_max;
        let (request, announced) = match head.request(self.peer.client_id(), max) {
            Ok(both) => both,
            Err(failed) => return Outcome::Refused(reason_of(failed)),
        };
        if request.extensions().get::<h2::ext::Protocol>().is_some() && !lease.takes_extended() {
            return Outcome::Refused(Reason::HttpUnsupported);
        }
        let (answer, body) = match lease.send(request, head.last) {
            Ok(both) => both,
            Err(error) => {
                log::debug!("a kept connection to an app is over: {error}");
                return Outcome::NotTaken(Some(reader));
            }
        };
        let mut down = FromMesh::request(body, reader, announced);
        let mut up = ToMesh::response(answer);
        let mut ended = None;
        let outcome = poll_fn(|cx| self.poll(cx, lease, (&mut down, &mut up), &mut ended)).await;
        match outcome {
            Ok(()) => {
                // The answer is whole; the app wants no more of the request.
                if let Some(code) = ended {
                    self.stream.reset_with_code(code.into());
                }
                Outcome::Over
            }
            Err(Failed::NotTaken) if !up.is_begun() => {
                let touched = down.is_touched();
                Outcome::NotTaken((!touched).then(|| down.into_reader()))
            }
            Err(Failed::NotTaken) => {
                self.stream.reset_with_code(Code::REFUSED_STREAM.into());
                Outcome::Over
            }
            Err(Failed::Reset(code)) => {
                self.stream.reset_with_code(code.into());
                self.admitted.flow.connection(false);
                Outcome::Over
            }
            Err(Failed::Mesh(reason)) => {
                if reason == Reason::StreamReset {
                    down.reset(Code::from(self.stream.reset_code()));
                }
                Outcome::Over
            }
            Err(Failed::Gone) => {
                self.admitted.flow.connection(false);
                Outcome::Refused(Reason::AppReset)
            }
            Err(Failed::Malformed(reason)) => Outcome::Refused(reason),
        }
    }

    /// Request one way, response the other, at the same time.
    fn poll(
        &self,
        cx: &mut Context<'_>,
        lease: &app::Lease,
        (down, up): (&mut FromMesh, &mut ToMesh),
        ended: &mut Option<Code>,
    ) -> Poll<Result<(), Failed>> {
        let flow = &self.admitted.flow;
        let notes = |count| Notes {
            count,
            activity: self.activity,
            watch: lease.watch(),
            sender: sender(self.peer),
            max: self.peer.thread().settings.head_max,
        };
        if ended.is_none() {
            // A reset that comes behind a whole answer takes nothing of it away.
            if let Poll::Ready(Failed::Reset(code)) = down.poll_reset(cx) {
                *ended = Some(code);
            } else if let Poll::Ready(Err(failed)) = down.poll(cx, self.stream, notes(&flow.sent)) {
                if failed != Failed::Gone {
                    return Poll::Ready(Err(failed));
                }
                // What the app said before it went is still good.
                *ended = Some(Code::NO_ERROR);
            }
        }
        let answered = up.poll(cx, self.stream, notes(&flow.received))?;
        if let Some(status) = up.take_status() {
            flow.response(status, self.begun.elapsed().as_secs_f64());
        }
        if let Some(status) = up.take_grpc() {
            flow.grpc(status);
        }
        if answered.is_ready() && (ended.is_some() || down.is_done()) {
            return Poll::Ready(Ok(()));
        }
        // The caller may give up while nothing of it is read.
        if !up.is_done() && self.stream.poll_reset(cx).is_ready() {
            let reason = self.stream.reset_reason().unwrap_or(Reason::Cancelled);
            return Poll::Ready(Err(Failed::Mesh(reason)));
        }
        Poll::Pending
    }
}

fn sender(peer: &Peer) -> Sender<'_> {
    Sender {
        heads: &peer.thread().heads,
        name: &peer.id,
    }
}

fn reason_of(failed: Failed) -> Reason {
    match failed {
        Failed::Mesh(reason) | Failed::Malformed(reason) => reason,
        Failed::Reset(_) | Failed::NotTaken | Failed::Gone => Reason::AppReset,
    }
}
