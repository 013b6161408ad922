//! One HTTP/1.1 request and its response, between a stream and the app. A request that logs its connection in (NTLM,
//! Negotiate) makes the stream the caller's connection: what follows on it goes on the same connection to the app.

use std::io::ErrorKind;
use std::rc::Rc;
use std::time::Instant;

use mesh_core::http1::{self, Body, Framing, Request, Response};
use mesh_core::reason::Reason;
use mesh_runtime::mux::MuxStream;
use tokio::net::TcpStream;
use tokio::net::tcp::{ReadHalf, WriteHalf};

use super::{Admitted, Peer, app, carry};
use crate::http::{Broken, Sender, Sink as _, forget, pump, read_head};
use crate::relay::{self, Activity, Open};

/// What the app learns of its caller. It replaces what came in under this name.
pub(super) const CLIENT_ID: &str = "x-meshwork-client-id";

/// What is under way of one exchange. It serves the next one when that is through.
#[derive(Debug, Default)]
pub(super) struct Buffers {
    /// Read of the stream.
    input: Vec<u8>,
    /// The request's head as the app gets it, and what came of its body with it.
    head: Vec<u8>,
    /// Read of the app.
    output: Vec<u8>,
}

impl Buffers {
    pub(super) fn of(input: Vec<u8>) -> Self {
        Self {
            input,
            ..Self::default()
        }
    }

    /// Forgets what is in them, and all but little of the memory.
    pub(super) fn reset(&mut self) {
        for buffer in [&mut self.input, &mut self.head, &mut self.output] {
            forget(buffer);
        }
    }
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

/// Serves a stream of which `buffers.input` was read, on `app` if there is a connection already, to which so many bytes
/// of that were sent.
pub(super) async fn serve(
    peer: &Rc<Peer>,
    admitted: &Rc<Admitted>,
    stream: &MuxStream,
    (mut app, buffers): (Option<(TcpStream, usize)>, &mut Buffers),
    activity: &Activity,
) -> Result<(), Reason> {
    let mut served = Served {
        peer,
        admitted,
        stream,
        activity,
        buffers,
        bound: false,
    };
    while let Some(exchange) = served.next(app.as_ref()).await? {
        // What was sent while the protocol was told is a part of the request's line, which is never rewritten.
        match served.carry_one(exchange, app.take()).await? {
            Some(socket) => app = Some((socket, 0)),
            None => break,
        }
    }
    Ok(())
}

/// A stream and what was read of it.
struct Served<'a> {
    peer: &'a Rc<Peer>,
    admitted: &'a Rc<Admitted>,
    stream: &'a MuxStream,
    activity: &'a Activity,
    buffers: &'a mut Buffers,
    /// The stream is its caller's connection, and has a connection to the app for itself.
    bound: bool,
}

/// A request, judged.
struct Exchange {
    request: Request,
    /// What is still to come of its body.
    body: Body,
}

impl Served<'_> {
    /// The next request: there is one, but on a bound stream. `app` is the connection that waits for it.
    async fn next(&mut self, app: Option<&(TcpStream, usize)>) -> Result<Option<Exchange>, Reason> {
        let waiting = app.filter(|_| self.bound).map(|(socket, _)| socket);
        let max = self.peer.thread().settings.head_max;
        let parse = (max, |bytes: &[u8]| http1::parse_request(bytes, max));
        let sender = Sender {
            heads: &self.peer.thread().heads,
            name: &self.peer.id,
        };
        let mut stream = self.stream;
        let head = tokio::select! {
            biased;
            head = read_head(&mut stream, &mut self.buffers.input, self.activity, sender, parse) => head,
            // The app ends what belongs to this caller: so do we.
            () = spoken(waiting) => Ok(None),
        };
        let request = match head {
            Ok(Some(request)) => request,
            Ok(None) => {
                self.stream.end();
                return Ok(None);
            }
            // The caller sees its own mistake, or went away.
            Err(Broken::Malformed(reason)) => return Err(reason),
            Err(_) => return Ok(None),
        };
        // What came of the body is judged before the app hears of the request.
        let Buffers { input, head, .. } = &mut *self.buffers;
        let mut body = Body::new(request.framing);
        let bytes = body.advance(&input[request.len..])?;
        let line = &self.peer.client_line;
        head.clear();
        head.reserve(request.len + line.len() + 2 + bytes);
        let read = &input[..request.len];
        if request.has_ours {
            http1::rewrite(read, Some(line), head);
        } else {
            http1::insert(read, line, head);
        }
        head.extend_from_slice(&input[request.len..request.len + bytes]);
        input.drain(..request.len + bytes);
        self.bound |= request.binds;
        Ok(Some(Exchange { request, body }))
    }

    /// Serves one request: on `app` (to which so many bytes of it were sent already), a kept connection or a new one.
    /// Returns the connection if the stream's next request belongs on it.
    async fn carry_one(
        &mut self,
        mut exchange: Exchange,
        app: Option<(TcpStream, usize)>,
    ) -> Result<Option<TcpStream>, Reason> {
        let (peer, admitted) = (self.peer, self.admitted);
        let mut kept = false;
        let (mut socket, sent) = match app {
            Some(app) => app,
            // A login begins on a connection that nobody used.
            None if self.bound => (self.connect().await?, 0),
            None => match app::reuse(peer, admitted) {
                Some(socket) => {
                    kept = true;
                    (socket, 0)
                }
                None => (self.connect().await?, 0),
            },
        };
        if self.bound {
            relay::guard(&socket);
        }
        let sent = sent.min(self.buffers.head.len());
        let mut outcome = self.run(&mut exchange, &mut socket, sent, kept).await;
        if matches!(outcome, Err(Failed::NotTaken)) {
            socket = self.connect().await?;
            outcome = self.run(&mut exchange, &mut socket, 0, false).await;
        }
        if !self.bound {
            self.activity.look_at(None);
        }
        match outcome {
            Ok(Done::Clean) if self.bound => {
                relay::settle(&socket);
                Ok(Some(socket))
            }
            Ok(Done::Clean) => {
                self.stream.end();
                app::keep(peer, admitted, socket);
                Ok(None)
            }
            Ok(Done::Over) => {
                self.stream.end();
                relay::settle(&socket);
                Ok(None)
            }
            Ok(Done::Tunnel) => {
                let (_, mut writer) = socket.split();
                if writer.put(&self.buffers.input).await.is_err() {
                    return Err(Reason::AppReset);
                }
                carry(socket, self.stream, admitted, self.activity).await?;
                Ok(None)
            }
            Err(failed) => {
                relay::abort(socket);
                match failed {
                    Failed::Because(Reason::Cancelled) => Ok(None),
                    Failed::Because(reason) => Err(reason),
                    Failed::NotTaken => Err(Reason::AppReset),
                }
            }
        }
    }

    async fn connect(&self) -> Result<TcpStream, Reason> {
        app::connect(self.peer.thread(), self.admitted, self.peer.address).await
    }

    /// Request one way, response the other, at the same time.
    async fn run(
        &mut self,
        exchange: &mut Exchange,
        socket: &mut TcpStream,
        sent: usize,
        kept: bool,
    ) -> Result<Done, Failed> {
        let admitted = self.admitted;
        let flow = &admitted.flow;
        let begun = Instant::now();
        self.activity.look_at(admitted.far(socket));
        let (mut reader, mut writer) = socket.split();
        let request = exchange.request;
        // Without a body, and harmless to repeat: the app may have closed a kept connection just now.
        let repeatable = kept && request.framing == Framing::None && request.method.is_idempotent();
        if writer.put(&self.buffers.head[sent..]).await.is_err() {
            return Err(if repeatable {
                Failed::NotTaken
            } else {
                Failed::Because(Reason::AppReset)
            });
        }
        flow.sent.inc_by(self.buffers.head.len() as u64);
        if !repeatable {
            forget(&mut self.buffers.head);
        }
        let _open = Open::count(&flow.open);
        let body = &mut exchange.body;
        // A body that was judged to its end need not be written to its end.
        let mut uploaded = body.is_done();
        let mut output = std::mem::take(&mut self.buffers.output);
        output.clear();
        let answer = (begun, repeatable, &mut output);
        let outcome = if uploaded {
            self.respond(&request, &mut reader, answer).await
        } else {
            let mut input = std::mem::take(&mut self.buffers.input);
            let outcome = {
                let upload = self.upload(&mut writer, &mut input, body);
                let download = self.respond(&request, &mut reader, answer);
                let mut upload = Box::pin(upload);
                let mut download = std::pin::pin!(download);
                tokio::select! {
                    biased;
                    done = &mut download => done,
                    up = &mut upload => match up {
                        Err(reason) => Err(Failed::Because(reason)),
                        Ok(whole) => {
                            uploaded = whole;
                            download.await
                        }
                    },
                }
            };
            self.buffers.input = input;
            outcome
        };
        self.buffers.output = output;
        match outcome {
            // Nobody knows where the body ends and the tunnel begins.
            Ok(Done::Tunnel) if !uploaded => Err(Failed::Because(Reason::HttpResponseMalformed)),
            // The app may take the rest of the body, or a body that it did not expect, for a next request.
            Ok(Done::Clean) if !uploaded || request.has_odd_body() => Ok(Done::Over),
            other => other,
        }
    }

    /// Passes the rest of the request's body on. False: the app did not take all of it.
    async fn upload(
        &self,
        writer: &mut WriteHalf<'_>,
        input: &mut Vec<u8>,
        body: &mut Body,
    ) -> Result<bool, Reason> {
        let count = (&self.admitted.flow.sent, self.activity);
        match pump(&mut &*self.stream, writer, input, body, count).await {
            Ok(()) => Ok(true),
            // The app takes no more of the request: it may have answered why.
            Err(Broken::Local) => Ok(false),
            Err(Broken::Malformed(reason)) => Err(reason),
            // The caller went away: nobody waits for the answer.
            Err(Broken::Stream(_) | Broken::Cut) => Err(Reason::Cancelled),
        }
    }

    /// Passes the app's response on.
    async fn respond(
        &self,
        request: &Request,
        reader: &mut ReadHalf<'_>,
        (begun, repeatable, output): (Instant, bool, &mut Vec<u8>),
    ) -> Result<Done, Failed> {
        let flow = &self.admitted.flow;
        let mut stream = self.stream;
        let mut heard = false;
        let (response, mut body) = loop {
            let response = match self.response_head(request, reader, output).await {
                Ok(Some(response)) => response,
                Ok(None) | Err(Broken::Local) if repeatable && !heard && output.is_empty() => {
                    return Err(Failed::NotTaken);
                }
                Err(Broken::Malformed(reason)) => return Err(Failed::Because(reason)),
                _ => return Err(Failed::Because(Reason::AppReset)),
            };
            // Some servers say so that they have closed an idle connection (RFC 9110 §15.5.9).
            if repeatable && !heard && response.status == 408 && !response.keep_alive {
                return Err(Failed::NotTaken);
            }
            heard = true;
            // Head and what came of the body with it are judged, and leave, together.
            let mut body = Body::new(response.framing);
            let bytes = body.advance(&output[response.len..]);
            let first = response.len + bytes.map_err(|_| malformed())?;
            if !response.is_interim() {
                flow.response(response.status, begun.elapsed().as_secs_f64());
            }
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
            if !response.is_interim() {
                break (response, body);
            }
        };
        if response.framing == Framing::Tunnel {
            return Ok(Done::Tunnel);
        }
        let count = (&flow.received, self.activity);
        // Whose login a challenge begins is not known here, if the request did not.
        let shared = self.bound || !response.binds;
        match pump(reader, &mut stream, output, &mut body, count).await {
            Ok(()) if response.keep_alive && request.keep_alive && output.is_empty() && shared => {
                Ok(Done::Clean)
            }
            Ok(()) => Ok(Done::Over),
            Err(Broken::Stream(_)) => Err(Failed::Because(Reason::Cancelled)),
            Err(Broken::Malformed(_)) => Err(malformed()),
            // Never a short body that looks whole: the reset says so.
            Err(_) => Err(Failed::Because(Reason::AppReset)),
        }
    }

    async fn response_head(
        &self,
        request: &Request,
        reader: &mut ReadHalf<'_>,
        output: &mut Vec<u8>,
    ) -> Result<Option<Response>, Broken> {
        let thread = self.peer.thread();
        let max = thread.settings.head_max;
        let parse = (max, |bytes: &[u8]| {
            http1::parse_response(bytes, request, max)
        });
        let sender = Sender {
            heads: &thread.heads,
            name: &self.admitted.server,
        };
        let head = read_head(reader, output, self.activity, sender, parse).await;
        head.map_err(Broken::behind_request)
    }
}

/// Completes when a waiting app says something, be it that it ends.
async fn spoken(app: Option<&TcpStream>) {
    let Some(app) = app else {
        return std::future::pending().await;
    };
    loop {
        let ready = app.readable().await;
        let read = ready.and_then(|()| app.try_read(&mut [0]));
        if !matches!(read, Err(error) if error.kind() == ErrorKind::WouldBlock) {
            return;
        }
    }
}

fn malformed() -> Failed {
    Failed::Because(Reason::HttpResponseMalformed)
}

fn cancelled(_: Broken) -> Failed {
    Failed::Because(Reason::Cancelled)
}
