//! HTTP/1.1 of a caller: each request is a stream of its own, to an endpoint of its own.

use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use mesh_api::header::StreamKind;
use mesh_core::http1::{self, Body, Framing, Request, Response};
use mesh_core::reason::Reason;
use mesh_runtime::mux::MuxStream;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::net::tcp::{ReadHalf, WriteHalf};

use super::tcp;
use crate::call::{self, Call, Caller, EndpointKey, TRIES_MAX};
use crate::data::Thread;
use crate::http::{Broken, Sink as _, pump, read_head};
use crate::limits::Limit;
use crate::metrics::Flow;
use crate::relay::{self, Activity, Open};

/// How long what a refused caller still sends is taken and thrown away, so that it can read its answer.
const LINGER: Duration = Duration::from_secs(2);

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
    /// Something did, or the caller is gone.
    Broken,
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
        flow: None,
    };
    let mut draining = thread.draining.subscribe();
    loop {
        let (mut reader, mut writer) = client.split();
        let max = thread.settings.head_max;
        let parse = (max, |bytes: &[u8]| http1::parse_request(bytes, max));
        let head = tokio::select! {
            head = read_head(&mut reader, &mut exchange.input, activity, parse) => head,
            () = activity.ceased(thread.settings.idle) => Ok(None),
            _ = draining.wait_for(|draining| *draining), if exchange.input.is_empty() => Ok(None),
        };
        let request = match head {
            Ok(Some(request)) => request,
            // Between two requests an end is a proper end.
            Ok(None) => return relay::settle(&client),
            Err(Broken::Malformed(reason)) => {
                super::note_refusal(thread, caller, reason);
                return answer_and_close(client, reason).await;
            }
            Err(_) => return,
        };
        let next = tokio::select! {
            next = exchange.run(&request, &mut reader, &mut writer) => next,
            () = activity.ceased(thread.settings.idle) => {
                super::note_refusal(thread, caller, Reason::Timeout);
                Next::Abort
            }
        };
        match next {
            Next::KeepAlive => (),
            Next::Close => return close(client).await,
            Next::Abort => return relay::abort(client),
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
    /// The counters of the last exchange: mostly the next one's too.
    flow: Option<(Rc<EndpointKey>, Arc<Flow>)>,
}

impl Exchange<'_> {
    /// Carries a request whose head is whole in `input`; tries other endpoints while that can do no harm.
    async fn run(
        &mut self,
        request: &Request,
        reader: &mut ReadHalf<'_>,
        writer: &mut WriteHalf<'_>,
    ) -> Next {
        let mut tried = Vec::new();
        let mut last = None;
        let reason = loop {
            let (call, sent) = match self.begun.take() {
                Some(begun) => begun,
                None => match call::open(self.thread, self.caller, StreamKind::Http1, &mut tried)
                    .await
                {
                    Ok(call) => (call, 0),
                    // That no other endpoint is left says less than why those that were asked refused.
                    Err(reason) => break last.unwrap_or(reason),
                },
            };
            let endpoint = Rc::clone(&call.endpoint);
            match self.attempt(request, call, sent, reader, writer).await {
                Ok(next) => return next,
                Err(Failed::Broken) => return Next::Abort,
                Err(Failed::Unanswered(reason)) => {
                    tried.push(endpoint);
                    // With its body still in the buffer, or without one, the request is as it was.
                    let whole = request.framing == Framing::None;
                    if !whole || !reason.is_retryable() || tried.len() >= TRIES_MAX {
                        break reason;
                    }
                    last = Some(reason);
                }
            }
        };
        super::note_refusal(self.thread, self.caller, reason);
        let keep = request.framing == Framing::None && request.keep_alive;
        if writer.put(refusal(reason, keep).as_bytes()).await.is_err() || !keep {
            return Next::Close;
        }
        self.input.drain(..request.len);
        Next::KeepAlive
    }

    async fn attempt(
        &mut self,
        request: &Request,
        call: Call,
        sent: usize,
        reader: &mut ReadHalf<'_>,
        writer: &mut WriteHalf<'_>,
    ) -> Result<Next, Failed> {
        let flow = self.flow_of(&call);
        let open = Open::count(&flow.open);
        let outcome = self
            .exchange(request, &call, &flow, sent, (reader, writer))
            .await;
        drop(open);
        match outcome {
            Ok(Answered::KeepAlive) => Ok(Next::KeepAlive),
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
        request: &Request,
        call: &Call,
        flow: &Arc<Flow>,
        sent: usize,
        (reader, writer): (&mut ReadHalf<'_>, &mut WriteHalf<'_>),
    ) -> Result<Answered, Failed> {
        let stream = &call.stream;
        let count = (&flow.sent, self.activity);
        // The head stays in the buffer until an answer began, so that it can be sent again.
        let whole = request.framing == Framing::None;
        if let Err(broken) = (&mut &*stream)
            .put(&self.input[sent.min(request.len)..request.len])
            .await
        {
            return Err(unanswered(&broken));
        }
        flow.sent.inc_by(request.len as u64);
        if whole {
            if request.method != http1::Method::Connect && !request.upgrade {
                stream.end();
            }
            let thread = self.thread;
            let answered = tokio::select! {
                answered = respond(self, request, call, flow, writer) => answered?,
                () = abandoned(reader, thread) => return Err(Failed::Broken),
            };
            self.input.drain(..request.len);
            if answered != Answered::Tunnel {
                stream.end();
            }
            return Ok(answered);
        }
        self.input.drain(..request.len);
        let mut input = std::mem::take(&mut self.input);
        let mut body = Body::new(request.framing);
        let upload = async {
            let pumped = pump(reader, &mut &*stream, &mut input, &mut body, count).await;
            if pumped.is_ok() && !request.upgrade {
                stream.end();
            }
            pumped
        };
        let download = respond(self, request, call, flow, writer);
        let (uploaded, answered) = both(upload, download).await;
        self.input = input;
        match (uploaded, answered?) {
            // The answer came before all of the request was taken: this connection has no next request.
            (None | Some(Err(_)), Answered::KeepAlive) => Ok(Answered::Close),
            (_, answered) => Ok(answered),
        }
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
        // Its next request: it is there.
        Ok(_) => std::future::pending().await,
    }
}

/// Runs both; when the download is through first, the upload is given up. An upload that fails is no reason to
/// keep an answer from the caller.
async fn both<U, D>(
    upload: impl Future<Output = U>,
    download: impl Future<Output = D>,
) -> (Option<U>, D) {
    let mut upload = Box::pin(upload);
    let mut download = std::pin::pin!(download);
    tokio::select! {
        biased;
        down = &mut download => (None, down),
        up = &mut upload => {
            let down = download.await;
            (Some(up), down)
        }
    }
}

/// Passes the response on.
async fn respond(
    exchange: &mut Exchange<'_>,
    request: &Request,
    call: &Call,
    flow: &Arc<Flow>,
    writer: &mut WriteHalf<'_>,
) -> Result<Answered, Failed> {
    let (thread, activity) = (exchange.thread, exchange.activity);
    let output = &mut exchange.output;
    let mut stream: &MuxStream = &call.stream;
    output.clear();
    let mut answered = false;
    let response = loop {
        let max = thread.settings.head_max;
        let parse = (max, |bytes: &[u8]| {
            http1::parse_response(bytes, request, max)
        });
        let response: Response = match read_head(&mut stream, output, activity, parse).await {
            Ok(Some(response)) => response,
            Ok(None) | Err(Broken::Cut) if !answered => {
                return Err(Failed::Unanswered(Reason::AppReset));
            }
            Err(broken) if !answered => return Err(unanswered(&broken)),
            _ => return Err(Failed::Broken),
        };
        answered = true;
        let seconds = if response.is_interim() {
            0.0
        } else {
            call.answered()
        };
        let head = &output[..response.len];
        let written = if response.has_ours {
            let mut head_without_ours = Vec::with_capacity(head.len());
            http1::rewrite(head, None, &mut head_without_ours);
            writer.put(&head_without_ours).await
        } else if !response.is_interim()
            && matches!(response.framing, Framing::Length(_) | Framing::Chunked)
        {
            // Head and what came of the body with it leave together, below.
            Ok(())
        } else {
            writer.put(head).await
        };
        if written.is_err() {
            return Err(Failed::Broken);
        }
        flow.received.inc_by(response.len as u64);
        if !response.is_interim() {
            flow.response(response.status, seconds);
            break response;
        }
        output.drain(..response.len);
    };
    let mut body = Body::new(response.framing);
    if !response.has_ours && matches!(response.framing, Framing::Length(_) | Framing::Chunked) {
        let bytes = body
            .advance(&output[response.len..])
            .map_err(|_| Failed::Broken)?;
        flow.received.inc_by(bytes as u64);
        if writer.put(&output[..response.len + bytes]).await.is_err() {
            return Err(Failed::Broken);
        }
        output.drain(..response.len + bytes);
    } else {
        output.drain(..response.len);
    }
    if response.framing == Framing::Tunnel {
        if writer.put(output).await.is_err() {
            return Err(Failed::Broken);
        }
        return Ok(Answered::Tunnel);
    }
    match pump(
        &mut stream,
        writer,
        output,
        &mut body,
        (&flow.received, activity),
    )
    .await
    {
        Ok(()) if response.keep_alive && request.keep_alive && output.is_empty() => {
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
fn refusal(reason: Reason, keep_alive: bool) -> String {
    let status = reason.http_status();
    let phrase = match status {
        400 => "Bad Request",
        403 => "Forbidden",
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
    format!(
        "HTTP/1.1 {status} {phrase}\r\ncontent-type: text/plain; charset=utf-8\r\ncontent-length: {}\r\n\
         x-meshwork-reason: {reason}\r\n{connection}\r\n{text}\n",
        text.len() + 1
    )
}

/// Answers a caller whose connection can not go on.
pub(super) async fn answer_and_close(mut client: TcpStream, reason: Reason) {
    if client
        .write_all(refusal(reason, false).as_bytes())
        .await
        .is_ok()
    {
        close(client).await;
    }
}

/// Closes so that what was written arrives: unread input would turn the end into a reset.
async fn close(mut client: TcpStream) {
    relay::settle(&client);
    if client.shutdown().await.is_err() {
        return;
    }
    let mut scrap = vec![0; 4096];
    let drained = async { while matches!(client.read(&mut scrap).await, Ok(1..)) {} };
    let _ = tokio::time::timeout(LINGER, drained).await;
}
