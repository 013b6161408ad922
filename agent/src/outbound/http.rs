//! HTTP/1.1 of a caller: each request is a stream of its own, to an endpoint of its own. From a request on that logs
//! its connection in (NTLM, Negotiate) the caller's connection is one stream, which ends with it.

use std::cell::Cell;
use std::future::poll_fn;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use mesh_api::header::StreamKind;
use mesh_core::http1::{self, Body, Framing, Method, Request, Response};
use mesh_core::reason::Reason;
use mesh_runtime::mux::MuxStream;
use tokio::io::{AsyncWriteExt as _, Interest};
use tokio::net::TcpStream;
use tokio::net::tcp::{ReadHalf, WriteHalf};

use super::tcp;
use crate::call::{self, Call, Caller, EndpointKey, Tries};
use crate::data::Thread;
use crate::http::{Broken, Sender, Sink as _, pump, read_head};
use crate::limits::Limit;
use crate::metrics::Flow;
use crate::relay::{self, Activity, Open};

/// The header line that ends a connection with this answer.
const LAST: &str = "connection: close";

/// What `auto` already has of the first request: its stream, how much of the buffer was sent on it, the buffer.
#[derive(Debug, Default)]
pub(super) struct Begun {
    pub(super) call: Option<(Call, usize)>,
    pub(super) buffer: Vec<u8>,
}

/// After an exchange.
enum Next {
    /// The caller may send another request.
    KeepAlive,
    Close,
    /// The response was cut in the middle: the caller must see that.
    Abort,
    /// The request is none: the caller is told so.
    Refuse(Reason),
    /// The exchange became a tunnel.
    Tunnel(Call, Arc<Flow>),
}

/// How a response ended.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Answered {
    KeepAlive,
    Close,
    Cut,
    Tunnel,
}

/// What may be done about a failed exchange.
enum Failed {
    /// Nothing of the response reached the caller yet.
    Unanswered(Reason),
    /// Nothing did, and the fault is the caller's.
    Malformed(Reason),
    /// Something did, or the caller is gone.
    Broken,
}

/// A request whose head is whole at the start of the input.
struct Begin {
    request: Request,
    /// Bytes of it that are there, head and body.
    ready: usize,
    /// What is still to come of its body.
    body: Body,
}

pub(super) async fn serve(
    thread: &Rc<Thread>,
    caller: &Caller,
    client: TcpStream,
    activity: &Activity,
) {
    continue_with(thread, caller, client, Begun::default(), activity).await;
}

pub(super) async fn continue_with(
    thread: &Rc<Thread>,
    caller: &Caller,
    mut client: TcpStream,
    begun: Begun,
    activity: &Activity,
) {
    let mut exchange = Exchange {
        thread,
        caller,
        activity,
        input: begun.buffer,
        output: Vec::new(),
        begun: begun.call,
        bound: None,
        flow: None,
    };
    let mut draining = thread.draining.subscribe();
    let sender = Sender {
        heads: &thread.heads,
        name: &caller.party,
    };
    // Where another worker serves, a connection ends with its next answer: an end between two requests may meet a request.
    let mut drained = pin!(async {
        let told = draining.wait_for(|draining| *draining).await.is_ok();
        if told && thread.handed_over.get() {
            std::future::pending::<()>().await;
        }
    });
    let mut ceased = pin!(activity.ceased(thread.settings.idle));
    loop {
        let (mut reader, mut writer) = client.split();
        let max = thread.settings.head_max;
        let parse = (max, |bytes: &[u8]| http1::parse_request(bytes, max));
        let mut ended_by_caller = false;
        let head = tokio::select! {
            biased;
            // A caller that always has a next request ready does not hold up the end.
            () = async {}, if exchange.input.is_empty() && thread.stops() => Ok(None),
            head = read_head(&mut reader, &mut exchange.input, activity, sender, parse) => {
                ended_by_caller = true;
                head
            }
            // The app ended what was this caller's.
            () = ended(exchange.bound.as_ref()), if exchange.input.is_empty() => Ok(None),
            () = &mut ceased => Ok(None),
            () = &mut drained, if exchange.input.is_empty() => Ok(None),
        };
        let request = match head {
            Ok(Some(request)) => request,
            // Between two requests an end is a proper end.
            Ok(None) => {
                if let Some(call) = &exchange.bound {
                    call.stream.end();
                }
                if ended_by_caller || !caller.dialled_one() {
                    relay::settle(&client);
                    return;
                }
                return super::end(thread, client).await;
            }
            Err(Broken::Malformed(reason)) => {
                // The service had nothing to do with it.
                let reason = match reason {
                    Reason::Timeout => Reason::HttpHeadTimeout,
                    other => other,
                };
                super::note_refusal(thread, caller, reason);
                return answer_and_close(thread, caller, client, reason).await;
            }
            Err(_) => return,
        };
        let next = tokio::select! {
            biased;
            next = exchange.begin(request, &mut reader, &mut writer) => next,
            () = &mut ceased => {
                super::note_refusal(thread, caller, Reason::Timeout);
                Next::Abort
            }
        };
        match next {
            Next::KeepAlive => (),
            Next::Close => return super::close(thread, caller, client).await,
            Next::Abort => return relay::abort(client),
            Next::Refuse(reason) => {
                super::note_refusal(thread, caller, reason);
                return answer_and_close(thread, caller, client, reason).await;
            }
            Next::Tunnel(call, flow) => {
                // What the caller sent right behind its request belongs to the tunnel.
                let early = &exchange.input;
                if !early.is_empty() && call.stream.send(early).await.is_err() {
                    return relay::abort(client);
                }
                return tcp::carry(thread, caller, &call, client, (&flow, activity)).await;
            }
        }
    }
}

/// One request at a time of one caller's connection.
struct Exchange<'a> {
    thread: &'a Rc<Thread>,
    caller: &'a Caller,
    activity: &'a Activity,
    /// Read from the caller: the head of this request, then its body, then the next.
    input: Vec<u8>,
    /// Read from the stream.
    output: Vec<u8>,
    begun: Option<(Call, usize)>,
    /// The stream that all further requests go on, since a login belongs to its connection.
    bound: Option<Call>,
    /// The counters of the last exchange: mostly the next one's too.
    flow: Option<(Rc<EndpointKey>, Arc<Flow>)>,
}

impl Exchange<'_> {
    /// What came of the body is judged before anybody hears of the request.
    async fn begin(
        &mut self,
        request: Request,
        reader: &mut ReadHalf<'_>,
        writer: &mut WriteHalf<'_>,
    ) -> Next {
        let mut body = Body::new(request.framing);
        match body.advance(&self.input[request.len..]) {
            Ok(bytes) => {
                let ready = request.len + bytes;
                let begin = Begin {
                    request,
                    ready,
                    body,
                };
                self.run(&begin, reader, writer).await
            }
            Err(reason) => Next::Refuse(reason),
        }
    }

    /// Carries a request; tries other endpoints while that can do no harm.
    async fn run(
        &mut self,
        begin: &Begin,
        reader: &mut ReadHalf<'_>,
        writer: &mut WriteHalf<'_>,
    ) -> Next {
        let request = &begin.request;
        let mut tries = Tries::default();
        let was_bound = self.bound.is_some();
        let reason = loop {
            let (call, sent) = match (self.bound.take(), self.begun.take()) {
                (Some(bound), _) => (bound, 0),
                (None, Some(begun)) => begun,
                (None, None) => {
                    let opened =
                        call::open(self.thread, self.caller, StreamKind::Http1, &mut tries);
                    match opened.await {
                        Ok(call) => (call, 0),
                        Err(reason) => break reason,
                    }
                }
            };
            let endpoint = Rc::clone(&call.endpoint);
            let bind = was_bound || request.binds;
            match self
                .attempt(begin, call, (sent, bind), reader, writer)
                .await
            {
                Ok(next) => return next,
                Err(Failed::Broken) => return Next::Abort,
                Err(Failed::Malformed(reason)) => return Next::Refuse(reason),
                Err(Failed::Unanswered(reason)) => {
                    tries.note(&endpoint, reason);
                    // All of it is still in the buffer, or it can not be sent again.
                    let whole = begin.body.is_done();
                    let again = whole && !was_bound && reason.is_retryable();
                    if !again || tries.are_used_up() {
                        break reason;
                    }
                }
            }
        };
        super::note_refusal(self.thread, self.caller, reason);
        // A login that is lost ends the connection that it was of.
        let keep = begin.body.is_done() && request.keep_alive && !was_bound;
        let answer = refusal(reason, request.method == Method::Head, keep);
        if writer.put(answer.as_bytes()).await.is_err() || !keep {
            return Next::Close;
        }
        self.input.drain(..begin.ready);
        Next::KeepAlive
    }

    async fn attempt(
        &mut self,
        begin: &Begin,
        call: Call,
        (sent, bind): (usize, bool),
        reader: &mut ReadHalf<'_>,
        writer: &mut WriteHalf<'_>,
    ) -> Result<Next, Failed> {
        let flow = self.flow_of(&call);
        let open = Open::count(&flow.open);
        let outcome = self
            .exchange(begin, &call, &flow, (sent, bind), (reader, writer))
            .await;
        drop(open);
        match outcome {
            Ok(Answered::KeepAlive) => {
                self.bound = bind.then_some(call);
                Ok(Next::KeepAlive)
            }
            Ok(Answered::Close) => Ok(Next::Close),
            Ok(Answered::Cut) => Ok(Next::Abort),
            Ok(Answered::Tunnel) => Ok(Next::Tunnel(call, flow)),
            Err(failed) => {
                if let Failed::Unanswered(reason) = &failed {
                    call.failed(*reason);
                    flow.refused(reason.http_status());
                }
                Err(failed)
            }
        }
    }

    fn flow_of(&mut self, call: &Call) -> Arc<Flow> {
        if let Some((endpoint, flow)) = &self.flow
            && Rc::ptr_eq(endpoint, &call.endpoint)
        {
            return Arc::clone(flow);
        }
        let flow = tcp::flow(self.thread, self.caller, call, "http");
        self.flow = Some((Rc::clone(&call.endpoint), Arc::clone(&flow)));
        flow
    }

    /// Request one way, response the other, at the same time.
    async fn exchange(
        &mut self,
        begin: &Begin,
        call: &Call,
        flow: &Arc<Flow>,
        (sent, bind): (usize, bool),
        (reader, writer): (&mut ReadHalf<'_>, &mut WriteHalf<'_>),
    ) -> Result<Answered, Failed> {
        let (stream, request, thread) = (&call.stream, &begin.request, self.thread);
        let more_may_follow = bind || request.upgrade || request.method == Method::Connect;
        let sent = sent.min(begin.ready);
        if let Err(broken) = (&mut &*stream).put(&self.input[sent..begin.ready]).await {
            return Err(unanswered(&broken));
        }
        flow.sent.inc_by(begin.ready as u64);
        let answer = Answer {
            request,
            call,
            flow,
            begun: bind.then(Instant::now),
            heard: Cell::new(false),
        };
        if begin.body.is_done() {
            if !more_may_follow {
                stream.end();
            }
            let answered = tokio::select! {
                biased;
                answered = respond(self, &answer, writer) => answered?,
                () = abandoned(reader, thread) => return Err(Failed::Broken),
            };
            // Until now it could be sent again.
            self.input.drain(..begin.ready);
            if answered != Answered::Tunnel && !bind {
                stream.end();
            }
            return Ok(answered);
        }
        self.input.drain(..begin.ready);
        let mut input = std::mem::take(&mut self.input);
        let mut body = begin.body.clone();
        let count = (&flow.sent, self.activity);
        let (uploaded, answered) = {
            let mut upload = Box::pin(async {
                let pumped = pump(reader, &mut &*stream, &mut input, &mut body, count).await;
                if pumped.is_ok() && !more_may_follow {
                    stream.end();
                }
                pumped
            });
            let mut download = std::pin::pin!(respond(self, &answer, writer));
            let uploaded = tokio::select! {
                biased;
                answered = &mut download => Err(answered),
                uploaded = &mut upload => Ok(uploaded),
            };
            drop(upload);
            match uploaded {
                Err(answered) => (false, answered),
                Ok(Ok(())) => tokio::select! {
                    answered = download => (true, answered),
                    () = abandoned(reader, thread) => return Err(Failed::Broken),
                },
                // An upload that fails is no reason to keep an answer from the caller that is under way.
                Ok(Err(_)) if answer.heard.get() => (false, download.await),
                Ok(Err(Broken::Stream(_))) => (false, download.await),
                Ok(Err(Broken::Malformed(reason))) => return Err(Failed::Malformed(reason)),
                Ok(Err(Broken::Local | Broken::Cut)) => return Err(Failed::Broken),
            }
        };
        self.input = input;
        match (uploaded, answered?) {
            // The answer came before all of the request was taken: this connection has no next request.
            (false, Answered::KeepAlive) => Ok(Answered::Close),
            // Nobody knows where the body ends and the tunnel begins.
            (false, Answered::Tunnel) => Err(Failed::Broken),
            (_, answered) => Ok(answered),
        }
    }
}

/// Completes when a bound stream has something to say though nothing was asked: it ended.
async fn ended(bound: Option<&Call>) {
    match bound {
        Some(call) => poll_fn(|cx| call.stream.poll_readable(cx)).await,
        None => std::future::pending().await,
    }
}

/// Completes when the caller is gone: at once when it reset its connection, a while after it closed its side, for
/// that may be all that a caller has to say.
async fn abandoned(reader: &mut ReadHalf<'_>, thread: &Thread) {
    match reader.peek(&mut [0]).await {
        Err(_) => (),
        Ok(0) => {
            tokio::time::sleep(thread.settings.half_closed).await;
            thread.metrics.limits.reached(Limit::HalfClosed);
        }
        // Its next request: it is there until it resets.
        Ok(_) => drop(reader.ready(Interest::ERROR).await),
    }
}

/// What is waited for.
struct Answer<'a> {
    request: &'a Request,
    call: &'a Call,
    flow: &'a Arc<Flow>,
    /// When the request began, if the call is older.
    begun: Option<Instant>,
    /// The caller has, or is getting, its head.
    heard: Cell<bool>,
}

/// Passes the response on.
async fn respond(
    exchange: &mut Exchange<'_>,
    answer: &Answer<'_>,
    writer: &mut WriteHalf<'_>,
) -> Result<Answered, Failed> {
    let (thread, activity) = (exchange.thread, exchange.activity);
    let (request, call, flow) = (answer.request, answer.call, answer.flow);
    let output = &mut exchange.output;
    let mut stream: &MuxStream = &call.stream;
    output.clear();
    let max = thread.settings.head_max;
    let (response, mut body, last): (Response, Body, bool) = loop {
        let parse = (max, |bytes: &[u8]| {
            http1::parse_response(bytes, request, max)
        });
        let sender = Sender {
            heads: &thread.heads,
            name: &call.endpoint.account,
        };
        let head = read_head(&mut stream, output, activity, sender, parse).await;
        let head = head.map_err(Broken::behind_request);
        let response = match head {
            Ok(Some(response)) => response,
            Ok(None) => return Err(Failed::Unanswered(Reason::AppReset)),
            Err(broken) => return Err(unanswered(&broken)),
        };
        // Head and what came of the body with it are judged, and leave, together.
        let mut body = Body::new(response.framing);
        let bytes = body.advance(&output[response.len..]);
        let bytes = bytes.map_err(|_| Failed::Unanswered(Reason::HttpResponseMalformed))?;
        let first = response.len + bytes;
        if !response.is_interim() {
            answer.heard.set(true);
            let since_open = call.answered();
            let begun = answer.begun.map(|begun| begun.elapsed().as_secs_f64());
            flow.response(response.status, begun.unwrap_or(since_open));
        }
        // Its caller comes again to the worker that serves now.
        let last = thread.handed_over.get()
            && !response.is_interim()
            && response.framing != Framing::Tunnel
            && answer.begun.is_none();
        let written = if response.has_ours || last {
            let mut rewritten = Vec::with_capacity(first + 2 * LAST.len());
            let insert = last.then_some(LAST);
            http1::rewrite(&output[..response.len], insert, &mut rewritten);
            rewritten.extend_from_slice(&output[response.len..first]);
            writer.put(&rewritten).await
        } else {
            writer.put(&output[..first]).await
        };
        if written.is_err() {
            return Err(Failed::Broken);
        }
        flow.received.inc_by(first as u64);
        output.drain(..first);
        if !response.is_interim() {
            break (response, body, last);
        }
    };
    if response.framing == Framing::Tunnel {
        return Ok(Answered::Tunnel);
    }
    let count = (&flow.received, activity);
    match pump(&mut stream, writer, output, &mut body, count).await {
        Ok(()) if response.keep_alive && request.keep_alive && output.is_empty() && !last => {
            Ok(Answered::KeepAlive)
        }
        Ok(()) => Ok(Answered::Close),
        Err(_) => Ok(Answered::Cut),
    }
}

fn unanswered(broken: &Broken) -> Failed {
    match broken {
        Broken::Stream(reason) | Broken::Malformed(reason) => Failed::Unanswered(*reason),
        Broken::Cut => Failed::Unanswered(Reason::AppReset),
        Broken::Local => Failed::Broken,
    }
}

/// A refusal as an HTTP response of this agent.
fn refusal(reason: Reason, to_head: bool, keep_alive: bool) -> String {
    let status = reason.http_status();
    let phrase = match status {
        400 => "Bad Request",
        403 => "Forbidden",
        408 => "Request Timeout",
        431 => "Request Header Fields Too Large",
        502 => "Bad Gateway",
        504 => "Gateway Timeout",
        _ => "Service Unavailable",
    };
    let text = reason.text();
    let connection = if keep_alive {
        ""
    } else {
        "connection: close\r\n"
    };
    let length = text.len() + 1;
    let head = format!(
        "HTTP/1.1 {status} {phrase}\r\ncontent-type: text/plain; charset=utf-8\r\ncontent-length: {length}\r\n\
         x-meshwork-reason: {reason}\r\n{connection}\r\n"
    );
    if to_head {
        head
    } else {
        format!("{head}{text}\n")
    }
}

/// Answers a caller whose connection can not go on.
pub(super) async fn answer_and_close(
    thread: &Thread,
    caller: &Caller,
    mut client: TcpStream,
    reason: Reason,
) {
    if client
        .write_all(refusal(reason, false, false).as_bytes())
        .await
        .is_ok()
    {
        super::close(thread, caller, client).await;
    }
}
