//! One HTTP/1.1 request and its response, between a stream and the app.

use std::rc::Rc;
use std::time::Instant;

use mesh_core::http1::{self, Body, Framing, Request, Response};
use mesh_core::reason::Reason;
use mesh_runtime::mux::MuxStream;
use tokio::net::TcpStream;
use tokio::net::tcp::{ReadHalf, WriteHalf};

use super::{Admitted, Peer, app, carry};
use crate::http::{Broken, Sink as _, pump, read_head};
use crate::relay::{self, Activity, Open};

/// What the app learns of its caller. It replaces what came in under this name.
const CLIENT_ID: &str = "x-meshwork-client-id";

/// What `auto` already has: the app's connection and how much of the buffer was sent to it.
#[derive(Debug, Default)]
pub(super) struct Begun {
    pub(super) app: Option<(TcpStream, usize)>,
    pub(super) buffer: Vec<u8>,
}

/// How an exchange ended well.
enum Done {
    /// The app's connection waits for a next request.
    Clean,
    Over,
    Tunnel,
}

/// How it did not.
enum Failed {
    /// A kept connection was closed by the app before it answered: the request may go to a new one.
    NotTaken,
    Because(Reason),
}

pub(super) async fn serve(
    peer: &Rc<Peer>,
    admitted: &Rc<Admitted>,
    stream: &MuxStream,
    begun: Begun,
    activity: &Activity,
) -> Result<(), Reason> {
    let thread = peer.thread();
    let mut input = begun.buffer;
    let max = thread.settings.head_max;
    let parse = (max, |bytes: &[u8]| http1::parse_request(bytes, max));
    let request = match read_head(&mut &*stream, &mut input, activity, parse).await {
        Ok(Some(request)) => request,
        Ok(None) => return Ok(()),
        Err(broken) => return given_up(&broken),
    };
    let mut head = Vec::with_capacity(request.len + 96);
    http1::rewrite(
        &input[..request.len],
        Some(&format!("{CLIENT_ID}: {}", peer.id)),
        &mut head,
    );
    input.drain(..request.len);
    let mut exchange = Exchange {
        peer,
        admitted,
        stream,
        activity,
        request,
        head,
        input,
    };
    let (mut socket, mut sent) = match begun.app {
        Some((socket, sent)) => (socket, sent),
        None => match app::reuse(peer, admitted) {
            Some(mut kept) => match exchange.run(&mut kept, 0, true).await {
                Err(Failed::NotTaken) => (app::connect(thread, admitted, peer.address).await?, 0),
                outcome => return exchange.finish(kept, outcome).await,
            },
            None => (app::connect(thread, admitted, peer.address).await?, 0),
        },
    };
    // What was sent while the protocol was told is a part of the request's line, which is never rewritten.
    sent = sent.min(exchange.head.len());
    let outcome = exchange.run(&mut socket, sent, false).await;
    exchange.finish(socket, outcome).await
}

struct Exchange<'a> {
    peer: &'a Rc<Peer>,
    admitted: &'a Rc<Admitted>,
    stream: &'a MuxStream,
    activity: &'a Activity,
    request: Request,
    /// The request's head as the app gets it.
    head: Vec<u8>,
    /// What came behind the head.
    input: Vec<u8>,
}

impl Exchange<'_> {
    async fn finish(
        &self,
        mut socket: TcpStream,
        outcome: Result<Done, Failed>,
    ) -> Result<(), Reason> {
        match outcome {
            Ok(Done::Clean) => {
                self.stream.end();
                app::keep(self.peer, self.admitted, socket);
                Ok(())
            }
            Ok(Done::Over) => {
                self.stream.end();
                relay::settle(&socket);
                Ok(())
            }
            Ok(Done::Tunnel) => {
                let (_, mut writer) = socket.split();
                if writer.put(&self.input).await.is_err() {
                    return Err(Reason::AppReset);
                }
                carry(socket, self.stream, self.admitted, self.activity).await
            }
            Err(failed) => {
                relay::abort(socket);
                match failed {
                    Failed::Because(Reason::Cancelled) => Ok(()),
                    Failed::Because(reason) => Err(reason),
                    Failed::NotTaken => Err(Reason::AppReset),
                }
            }
        }
    }

    /// Request one way, response the other, at the same time.
    async fn run(
        &mut self,
        socket: &mut TcpStream,
        sent: usize,
        kept: bool,
    ) -> Result<Done, Failed> {
        let flow = &self.admitted.flow;
        let begun = Instant::now();
        let (mut reader, mut writer) = socket.split();
        // Without a body, and harmless to repeat: the app may have closed a kept connection just now.
        let idempotent = self.request.method.is_idempotent();
        let repeatable = kept && self.request.framing == Framing::None && idempotent;
        if writer.put(&self.head[sent..]).await.is_err() {
            return Err(if repeatable {
                Failed::NotTaken
            } else {
                Failed::Because(Reason::AppReset)
            });
        }
        flow.sent.inc_by(self.head.len() as u64);
        let open = Open::count(&flow.open);
        let mut body = Body::new(self.request.framing);
        let mut input = std::mem::take(&mut self.input);
        let count = (&flow.sent, self.activity);
        let mut stream = self.stream;
        let outcome = {
            let upload = upload(&mut stream, &mut writer, &mut input, &mut body, count);
            let download = self.respond(&mut reader, begun, repeatable);
            let mut upload = Box::pin(upload);
            let mut download = std::pin::pin!(download);
            tokio::select! {
                biased;
                done = &mut download => done,
                up = &mut upload => match up {
                    // The caller went away, or what it sends is no body: nobody waits for the answer.
                    Err(Broken::Stream(_)) => Err(Failed::Because(Reason::Cancelled)),
                    Err(Broken::Malformed(reason)) => Err(Failed::Because(reason)),
                    Err(Broken::Cut) => Err(Failed::Because(Reason::Cancelled)),
                    // The app takes no more of the request: it may have answered why.
                    Ok(()) | Err(Broken::Local) => download.await,
                },
            }
        };
        drop(open);
        self.input = input;
        match outcome {
            Ok(Done::Clean) if !body.is_done() => Ok(Done::Over),
            other => other,
        }
    }

    /// Passes the app's response on.
    async fn respond(
        &self,
        reader: &mut ReadHalf<'_>,
        begun: Instant,
        repeatable: bool,
    ) -> Result<Done, Failed> {
        let flow = &self.admitted.flow;
        let mut stream = self.stream;
        let mut output = Vec::new();
        let mut answered = false;
        let response: Response = loop {
            let max = self.peer.thread().settings.head_max;
            let parse = (max, |bytes: &[u8]| {
                http1::parse_response(bytes, &self.request, max)
            });
            let head = read_head(reader, &mut output, self.activity, parse).await;
            let response = match head {
                Ok(Some(response)) => response,
                Ok(None) | Err(Broken::Local) if repeatable && !answered && output.is_empty() => {
                    return Err(Failed::NotTaken);
                }
                Err(Broken::Malformed(_)) => {
                    return Err(Failed::Because(Reason::HttpResponseMalformed));
                }
                _ => return Err(Failed::Because(Reason::AppReset)),
            };
            answered = true;
            if !response.is_interim() {
                break response;
            }
            let interim = output.drain(..response.len).collect::<Vec<u8>>();
            stream.put(&interim).await.map_err(cancelled)?;
        };
        flow.response(response.status, begun.elapsed().as_secs_f64());
        // Head and what came of the body with it leave in one frame.
        let mut body = Body::new(response.framing);
        let bytes = body.advance(&output[response.len..]);
        let bytes = bytes.map_err(|_| Failed::Because(Reason::HttpResponseMalformed))?;
        let first = response.len + bytes;
        if response.has_ours {
            let mut head = Vec::with_capacity(first);
            http1::rewrite(&output[..response.len], None, &mut head);
            head.extend_from_slice(&output[response.len..first]);
            stream.put(&head).await.map_err(cancelled)?;
        } else {
            stream.put(&output[..first]).await.map_err(cancelled)?;
        }
        flow.received.inc_by(first as u64);
        output.drain(..first);
        if response.framing == Framing::Tunnel {
            return Ok(Done::Tunnel);
        }
        match pump(
            reader,
            &mut stream,
            &mut output,
            &mut body,
            (&flow.received, self.activity),
        )
        .await
        {
            Ok(()) if response.keep_alive && output.is_empty() => Ok(Done::Clean),
            Ok(()) => Ok(Done::Over),
            Err(Broken::Stream(_)) => Err(Failed::Because(Reason::Cancelled)),
            Err(Broken::Malformed(_)) => Err(Failed::Because(Reason::HttpResponseMalformed)),
            // Never a short body that looks whole: the reset says so.
            Err(_) => Err(Failed::Because(Reason::AppReset)),
        }
    }
}

/// Passes the request's body on. When it is through, or there is none, waits for nothing: the answer decides.
async fn upload(
    stream: &mut &MuxStream,
    writer: &mut WriteHalf<'_>,
    input: &mut Vec<u8>,
    body: &mut Body,
    count: (&prometheus_client::metrics::counter::Counter, &Activity),
) -> Result<(), Broken> {
    pump(stream, writer, input, body, count).await
}

fn cancelled(_: Broken) -> Failed {
    Failed::Because(Reason::Cancelled)
}

/// The request never came whole: the caller sees its own mistake, or went away.
fn given_up(broken: &Broken) -> Result<(), Reason> {
    match broken {
        Broken::Malformed(reason) => Err(*reason),
        _ => Ok(()),
    }
}
