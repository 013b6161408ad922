//! HTTP/2 and gRPC of a caller: each request is a stream of its own, to an endpoint of its own.

use std::cell::{Cell, RefCell};
use std::future::{Future as _, poll_fn};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use h2::server::{Connection, SendResponse};
use h2::{Reason as Code, RecvStream};
use http::header::CONTENT_TYPE;
use http::request::Parts;
use http::{HeaderValue, Method, Request, Response, StatusCode};
use mesh_api::header::StreamKind;
use mesh_core::reason::Reason;
use mesh_core::service::Protocol;
use tokio::net::TcpStream;
use tokio::task::spawn_local;
use tokio::time::{Instant, Sleep};

use super::tcp;
use crate::call::{self, Call, Caller, EndpointKey, Tries};
use crate::data::Thread;
use crate::http::Sender;
use crate::http2::{self, Begins, Failed, FromMesh, Notes, ToMesh, Watch, Watched, fields, grpc};
use crate::limits::Limit;
use crate::metrics::Flow;
use crate::relay::{self, Activity, Open};

/// How long a connection that was told to go, and carries nothing, may stay.
const FAREWELL: Duration = Duration::from_secs(5);
/// Endpoints whose counters a connection remembers.
const FLOWS_MAX: usize = 64;

/// What the requests of one connection share.
struct Shared {
    thread: Rc<Thread>,
    caller: Caller,
    protocol: Protocol,
    watch: Rc<Watch>,
    activity: Activity,
    requests: Cell<usize>,
    flows: RefCell<Vec<(Rc<EndpointKey>, Arc<Flow>)>>,
}

/// `early` is what was read of the connection before.
pub(super) async fn serve(
    thread: &Rc<Thread>,
    caller: Caller,
    protocol: Protocol,
    mut client: TcpStream,
    early: Vec<u8>,
) {
    let dialled_one = caller.dialled_one();
    if !dialled_one {
        // A message says itself where it ends: an end of the connection never makes it look whole.
        relay::settle(&client);
    }
    converse(thread, caller, protocol, &mut client, early).await;
    if dialled_one {
        super::end(thread, client).await;
    }
}

async fn converse(
    thread: &Rc<Thread>,
    caller: Caller,
    protocol: Protocol,
    client: &mut TcpStream,
    early: Vec<u8>,
) {
    let watch = Watch::new(Begins::Preface);
    let handshake = http2::server(thread.settings.head_max).handshake::<_, Bytes>(Watched::new(
        client,
        early,
        Rc::clone(&watch),
    ));
    let shaken = tokio::time::timeout(thread.settings.handshake, handshake).await;
    let mut connection = match shaken {
        Ok(Ok(connection)) => connection,
        Ok(Err(error)) => {
            log::debug!("a caller does not speak HTTP/2: {error}");
            let reason = if error.is_io() {
                Reason::Cancelled
            } else {
                Reason::HttpMalformed
            };
            return super::note_refusal(thread, &caller, reason);
        }
        Err(_) => {
            thread.metrics.limits.reached(Limit::Handshake);
            return super::note_refusal(thread, &caller, Reason::Timeout);
        }
    };
    let shared = Rc::new(Shared {
        thread: Rc::clone(thread),
        caller,
        protocol,
        watch,
        activity: Activity::new(thread),
        requests: Cell::new(0),
        flows: RefCell::default(),
    });
    if let Some(reason) = accept(&shared, &mut connection).await {
        if reason == Reason::HttpFlood {
            thread.metrics.limits.reached(Limit::Floods);
        }
        super::note_refusal(thread, &shared.caller, reason);
    }
}

/// Takes requests until the connection is over; says why it was ended, if that was not in order.
async fn accept(
    shared: &Rc<Shared>,
    connection: &mut Connection<Watched<&mut TcpStream>, Bytes>,
) -> Option<Reason> {
    let thread = &shared.thread;
    let mut draining = thread.draining.subscribe();
    let mut drain = std::pin::pin!(draining.wait_for(|draining| *draining));
    let mut quiet = std::pin::pin!(quiet(shared));
    let mut farewell = None;
    let mut flooded = false;
    poll_fn(|cx| {
        loop {
            if let Some(over) = &mut farewell {
                let over: &mut Pin<Box<Sleep>> = over;
                if over.as_mut().poll(cx).is_ready() {
                    if shared.requests.get() == 0 {
                        return Poll::Ready(None);
                    }
                    over.as_mut().reset(Instant::now() + FAREWELL);
                    continue;
                }
            } else if drain.as_mut().poll(cx).is_ready() || quiet.as_mut().poll(cx).is_ready() {
                connection.graceful_shutdown();
                farewell = Some(Box::pin(tokio::time::sleep(FAREWELL)));
                continue;
            }
            let accepted = connection.poll_accept(cx);
            if shared.watch.is_flooded() && !flooded {
                flooded = true;
                connection.abrupt_shutdown(Code::ENHANCE_YOUR_CALM);
                continue;
            }
            return match accepted {
                Poll::Ready(Some(Ok((request, respond)))) => {
                    begin(shared, request, respond);
                    continue;
                }
                Poll::Ready(Some(Err(error))) => Poll::Ready(ended(&error, flooded)),
                Poll::Ready(None) => Poll::Ready(flooded.then_some(Reason::HttpFlood)),
                Poll::Pending => Poll::Pending,
            };
        }
    })
    .await
}

/// Completes when the connection carried no request for the idle time.
async fn quiet(shared: &Shared) {
    loop {
        shared.activity.silent(shared.thread.settings.idle).await;
        // The silence of a request is its own to judge.
        if shared.requests.get() == 0 {
            return shared.activity.ran_out(Limit::Idle);
        }
    }
}

/// Why a connection broke; a caller that just goes away is no refusal.
fn ended(error: &h2::Error, flooded: bool) -> Option<Reason> {
    log::debug!("a caller's HTTP/2 connection is over: {error}");
    match error.reason() {
        _ if flooded => Some(Reason::HttpFlood),
        Some(Code::ENHANCE_YOUR_CALM) if error.is_library() => Some(Reason::HttpFlood),
        Some(_) if error.is_library() => Some(Reason::HttpMalformed),
        _ => None,
    }
}

fn begin(shared: &Rc<Shared>, request: Request<RecvStream>, respond: SendResponse<Bytes>) {
    shared.activity.note();
    shared.requests.set(shared.requests.get() + 1);
    let shared = Rc::clone(shared);
    spawn_local(async move {
        serve_request(&shared, request, respond).await;
        shared.requests.set(shared.requests.get() - 1);
        shared.activity.note();
    });
}

/// How an attempt ended that reached no answer.
enum Unanswered {
    Refused(Reason, SendResponse<Bytes>),
    /// The caller has its end, or wants none.
    Over,
}

/// Carries one request; tries other endpoints while that can do no harm.
async fn serve_request(
    shared: &Rc<Shared>,
    request: Request<RecvStream>,
    mut respond: SendResponse<Bytes>,
) {
    let (request, body) = request.into_parts();
    let form = Form::of(&request);
    let mut block = Vec::with_capacity(512);
    let last = body.is_end_stream();
    let max = shared.thread.settings.head_max;
    if let Err(failed) = fields::encode_request(&request, last, max, &mut block) {
        return refuse(shared, respond, form, reason_of(failed));
    }
    drop(request);
    let mut up = ToMesh::request(block, body, last);
    let mut tries = Tries::default();
    let reason = loop {
        let open = call::open(
            &shared.thread,
            &shared.caller,
            StreamKind::Http2,
            &mut tries,
        );
        let opened = tokio::select! {
            opened = open => opened,
            _ = poll_fn(|cx| respond.poll_reset(cx)) => return,
        };
        let call = match opened {
            Ok(call) => call,
            Err(reason) => break reason,
        };
        match attempt(shared, &call, &mut up, respond, form).await {
            Unanswered::Over => return,
            Unanswered::Refused(reason, caller) => {
                respond = caller;
                tries.note(&call.endpoint, reason);
                if !reason.is_retryable() || tries.are_used_up() || !up.rewind() {
                    break reason;
                }
            }
        }
    };
    refuse(shared, respond, form, reason);
}

async fn attempt(
    shared: &Rc<Shared>,
    call: &Call,
    up: &mut ToMesh,
    respond: SendResponse<Bytes>,
    form: Form,
) -> Unanswered {
    let flow = shared.flow_of(call);
    let open = Open::count(&flow.open);
    let activity = Activity::new(&shared.thread);
    let max = shared.thread.settings.head_max;
    let mut down = FromMesh::response(respond, form.head, max);
    let exchange = Exchange {
        shared,
        call,
        flow: &flow,
        activity: &activity,
        form,
    };
    let outcome = tokio::select! {
        biased;
        outcome = poll_fn(|cx| exchange.poll(cx, up, &mut down)) => outcome,
        () = activity.ceased(shared.thread.settings.idle) => Err(Failed::Mesh(Reason::Timeout)),
    };
    drop(open);
    let Err(failed) = outcome else {
        return Unanswered::Over;
    };
    if down.is_begun() {
        // h2 forgets what it has not written when a stream is reset: what came before goes first.
        tokio::task::yield_now().await;
    }
    exchange.ended(failed, down)
}

struct Exchange<'a> {
    shared: &'a Rc<Shared>,
    call: &'a Call,
    flow: &'a Arc<Flow>,
    activity: &'a Activity,
    form: Form,
}

impl Exchange<'_> {
    /// Request one way, response the other, at the same time.
    fn poll(
        &self,
        cx: &mut Context<'_>,
        up: &mut ToMesh,
        down: &mut FromMesh,
    ) -> Poll<Result<(), Failed>> {
        let stream = &self.call.stream;
        // A caller that gave up wants nothing more, whatever is on its way.
        if let Poll::Ready(failed) = down.poll_reset(cx) {
            return Poll::Ready(if down.is_done() { Ok(()) } else { Err(failed) });
        }
        let sent = match up.poll(cx, stream, self.notes(&self.flow.sent)) {
            Poll::Pending => false,
            // The answer to a request that is no longer wanted says why.
            Poll::Ready(Ok(()) | Err(Failed::Mesh(_))) => true,
            Poll::Ready(Err(failed)) => return Poll::Ready(Err(failed)),
        };
        let received = down.poll(cx, stream, self.notes(&self.flow.received))?;
        if let Some(status) = down.take_status() {
            up.settle();
            self.flow.response(status, self.call.answered());
        }
        if let Some(status) = down.take_grpc() {
            self.flow.grpc(status);
        }
        if received.is_pending() {
            return Poll::Pending;
        }
        if sent || stream.poll_reset(cx).is_ready() {
            return Poll::Ready(Ok(()));
        }
        Poll::Pending
    }

    fn notes<'n>(&'n self, count: &'n prometheus_client::metrics::counter::Counter) -> Notes<'n> {
        Notes {
            count,
            activity: self.activity,
            watch: &self.shared.watch,
            sender: Sender {
                heads: &self.shared.thread.heads,
                name: &self.call.endpoint.account,
            },
            max: self.shared.thread.settings.head_max,
        }
    }

    /// Tells both sides how the exchange broke, as far as they do not know it.
    fn ended(&self, failed: Failed, mut down: FromMesh) -> Unanswered {
        let stream = &self.call.stream;
        let reason = match failed {
            Failed::Reset(code) => {
                stream.reset_with_code(code.into());
                return Unanswered::Over;
            }
            // The stream is dropped: the other agent hears that nobody waits any more.
            Failed::Gone | Failed::NotTaken => return Unanswered::Over,
            Failed::Mesh(Reason::StreamReset) => {
                let code = Code::from(stream.reset_code());
                self.call.failed(Reason::StreamReset);
                self.flow.connection(false);
                down.reset(code);
                return Unanswered::Over;
            }
            Failed::Mesh(reason) | Failed::Malformed(reason) => reason,
        };
        match down.unanswered() {
            Ok(respond) => {
                self.call.failed(reason);
                self.flow.refused(reason.http_status());
                if self.form.grpc {
                    self.flow.grpc(Some(grpc_status(reason)));
                }
                Unanswered::Refused(reason, respond)
            }
            Err(mut body) => {
                super::note_refusal(&self.shared.thread, &self.shared.caller, reason);
                self.flow.connection(false);
                body.send_reset(Code::INTERNAL_ERROR);
                Unanswered::Over
            }
        }
    }
}

impl Shared {
    fn flow_of(&self, call: &Call) -> Arc<Flow> {
        let mut flows = self.flows.borrow_mut();
        if let Some((_, flow)) = flows.iter().find(|(of, _)| Rc::ptr_eq(of, &call.endpoint)) {
            return Arc::clone(flow);
        }
        let flow = tcp::flow(&self.thread, &self.caller, call, self.protocol.as_str());
        if flows.len() >= FLOWS_MAX {
            flows.clear();
        }
        flows.push((Rc::clone(&call.endpoint), Arc::clone(&flow)));
        flow
    }
}

/// In which form the caller reads an answer.
#[derive(Clone, Copy, Debug)]
struct Form {
    head: bool,
    grpc: bool,
}

impl Form {
    fn of(request: &Parts) -> Self {
        Self {
            head: request.method == Method::HEAD,
            grpc: grpc::is_call(&request.headers),
        }
    }
}

fn reason_of(failed: Failed) -> Reason {
    match failed {
        Failed::Mesh(reason) | Failed::Malformed(reason) => reason,
        Failed::Reset(_) | Failed::NotTaken | Failed::Gone => Reason::Cancelled,
    }
}

/// Answers a caller with a refusal of this agent, in the form that it reads.
fn refuse(shared: &Shared, mut respond: SendResponse<Bytes>, form: Form, reason: Reason) {
    super::note_refusal(&shared.thread, &shared.caller, reason);
    shared.watch.answered();
    let mut response = Response::new(());
    let code = HeaderValue::from_static(reason.code());
    let text = reason.text();
    let headers = response.headers_mut();
    headers.insert("x-meshwork-reason", code);
    if form.grpc {
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
        headers.insert("grpc-status", HeaderValue::from(grpc_status(reason)));
        let message = HeaderValue::try_from(format!("{reason}: {}", percent_encoded(text)));
        headers.extend(
            message.map(|message| (http::HeaderName::from_static("grpc-message"), message)),
        );
    } else {
        let text_type = HeaderValue::from_static("text/plain; charset=utf-8");
        headers.insert(CONTENT_TYPE, text_type);
        let status = StatusCode::from_u16(reason.http_status());
        *response.status_mut() = status.unwrap_or(StatusCode::SERVICE_UNAVAILABLE);
    }
    let last = form.grpc || form.head;
    match respond.send_response(response, last) {
        Ok(mut body) if !last => {
            if let Err(error) = body.send_data(Bytes::from(format!("{text}\n")), true) {
                log::debug!("a refused caller is gone: {error}");
            }
        }
        Ok(_) => (),
        Err(error) => log::debug!("a refused caller is gone: {error}"),
    }
}

/// The gRPC status that tells a caller the most of a refusal.
fn grpc_status(reason: Reason) -> u16 {
    match (reason, reason.http_status()) {
        (Reason::Overloaded | Reason::TooManyHeld | Reason::HttpFlood, _) => 8,
        (Reason::Timeout, _) => 4,
        (Reason::Cancelled, _) => 1,
        (_, 403) => 7,
        (_, 400 | 431) => 13,
        (_, 500) => 13,
        (_, 501) => 12,
        _ => 14,
    }
}

/// What gRPC asks of a message: printable ASCII, with `%` as its escape.
fn percent_encoded(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        if (b' '..=b'~').contains(&byte) && byte != b'%' {
            encoded.push(char::from(byte));
        } else {
            encoded.push_str(&format!("%{byte:02X}"));
        }
    }
    encoded
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_refusal_has_the_status_that_a_grpc_client_acts_on() {
        for (reason, expected) in [
            (Reason::NotAllowed, 7),
            (Reason::Timeout, 4),
            (Reason::Overloaded, 8),
            (Reason::NoEndpoints, 14),
            (Reason::AppReset, 14),
            (Reason::HttpMalformed, 13),
            (Reason::Internal, 13),
            (Reason::HttpUnsupported, 12),
        ] {
            assert_eq!(grpc_status(reason), expected, "{reason}");
        }
    }

    #[test]
    fn every_text_can_be_a_grpc_message() {
        assert_eq!(percent_encoded("50 % of é"), "50 %25 of %C3%A9");
        for reason in Reason::ALL {
            HeaderValue::try_from(percent_encoded(reason.text())).unwrap();
        }
    }
}
