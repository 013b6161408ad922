//! The direction of an exchange from the local program's HTTP/2 stream to the stream of the mesh.

use std::rc::Rc;
use std::task::{Context, Poll, ready};

use bytes::{Buf as _, Bytes};
use h2::RecvStream;
use h2::client::ResponseFuture;
use mesh_api::message::{self, Kind};
use mesh_runtime::mux::MuxStream;
use prometheus_client::metrics::counter::Counter;

use super::fields::{encode_response, encode_trailers};
use super::{Failed, Watch, grpc};
use crate::http::Sender;
use crate::relay::Activity;

/// Data up to this size is gathered with what is around it, so that a small call is one frame of the mesh. Larger
/// pieces go without another copy.
const GATHER_PIECE_MAX: usize = 4 * 1024;
/// What is gathered before it is sent.
const GATHER_MAX: usize = 16 * 1024;
/// What is kept of a request that nobody answered yet, so that it can go to another endpoint.
const REPLAY_MAX: usize = 16 * 1024;

/// Where the messages come from.
#[derive(Debug)]
enum Source {
    /// An app that has not answered yet.
    Answer(ResponseFuture),
    Body(RecvStream),
    /// The head was all.
    Nothing,
}

/// What both directions count and note.
#[derive(Clone, Copy)]
pub(crate) struct Notes<'a> {
    pub(crate) count: &'a Counter,
    pub(crate) activity: &'a Activity,
    pub(crate) watch: &'a Rc<Watch>,
    /// Whose the blocks are that come from the mesh.
    pub(crate) sender: Sender<'a>,
    /// Longest head.
    pub(crate) max: usize,
}

/// Takes no more of the program than the mesh takes: flow control is end to end.
#[derive(Debug)]
pub(crate) struct ToMesh {
    source: Source,
    /// Messages that are on their way; up to `sent` they are gone.
    out: Vec<u8>,
    sent: usize,
    /// `out` is the whole of what was sent so far.
    replayable: bool,
    /// Data whose prefix stands last in `out`.
    large: Bytes,
    /// What the program may send anew when all that is on its way is gone.
    held: usize,
    /// The last message is among what is on its way.
    last: bool,
    done: bool,
    /// The program broke off behind what is on its way.
    failed: Option<Failed>,
    /// The app said something.
    begun: bool,
    status: Option<u16>,
    grpc: grpc::Outcome,
}

impl ToMesh {
    /// A request: its head stands in `out` already. `last`: the head is all.
    pub(crate) fn request(out: Vec<u8>, body: RecvStream, last: bool) -> Self {
        let source = if last {
            Source::Nothing
        } else {
            Source::Body(body)
        };
        Self {
            out,
            last,
            replayable: true,
            ..Self::new(source)
        }
    }

    /// The answer that an app is going to give.
    pub(crate) fn response(answer: ResponseFuture) -> Self {
        Self::new(Source::Answer(answer))
    }

    fn new(source: Source) -> Self {
        Self {
            source,
            out: Vec::new(),
            sent: 0,
            replayable: false,
            large: Bytes::new(),
            held: 0,
            last: false,
            done: false,
            failed: None,
            begun: false,
            status: None,
            grpc: grpc::Outcome::default(),
        }
    }

    /// The status of the app's answer, once.
    pub(crate) fn take_status(&mut self) -> Option<u16> {
        self.status.take()
    }

    /// The status of a gRPC call that ended, once.
    pub(crate) fn take_grpc(&mut self) -> Option<Option<u16>> {
        self.grpc.take()
    }

    /// Whether the app said anything to a request.
    pub(crate) fn is_begun(&self) -> bool {
        self.begun
    }

    /// Whether the whole direction is sent.
    pub(crate) fn is_done(&self) -> bool {
        self.done
    }

    /// Goes back to the start, for another stream. False: a part of the start is gone.
    pub(crate) fn rewind(&mut self) -> bool {
        self.sent = 0;
        self.done = false;
        self.replayable
    }

    /// Keeps nothing for another try: there is an answer.
    pub(crate) fn settle(&mut self) {
        self.replayable = false;
    }

    /// Sends what is there; ready when the direction is sent whole.
    pub(crate) fn poll(
        &mut self,
        cx: &mut Context<'_>,
        stream: &MuxStream,
        notes: Notes<'_>,
    ) -> Poll<Result<(), Failed>> {
        if self.done {
            return Poll::Ready(Ok(()));
        }
        loop {
            ready!(self.poll_flush(cx, stream, notes))?;
            if self.last {
                stream.end();
                self.done = true;
                return Poll::Ready(Ok(()));
            }
            if let Some(failed) = self.failed {
                return Poll::Ready(Err(failed));
            }
            if !self.gather(cx, notes) {
                return Poll::Pending;
            }
        }
    }

    fn poll_flush(
        &mut self,
        cx: &mut Context<'_>,
        stream: &MuxStream,
        notes: Notes<'_>,
    ) -> Poll<Result<(), Failed>> {
        while self.sent < self.out.len() {
            let bytes = ready!(stream.poll_send(cx, &self.out[self.sent..]))?;
            self.sent += bytes;
            notes.count.inc_by(bytes as u64);
            notes.activity.note();
        }
        while !self.large.is_empty() {
            let bytes = ready!(stream.poll_send(cx, &self.large))?;
            self.large.advance(bytes);
            notes.count.inc_by(bytes as u64);
            notes.activity.note();
            self.release(bytes);
        }
        if !self.replayable {
            self.out.clear();
            self.sent = 0;
        }
        let held = std::mem::take(&mut self.held);
        self.release(held);
        Poll::Ready(Ok(()))
    }

    fn release(&mut self, bytes: usize) {
        if bytes > 0
            && let Source::Body(body) = &mut self.source
        {
            // A stream that is over has nothing to give back.
            let _ = body.flow_control().release_capacity(bytes);
        }
    }

    /// Adds what the program said to `out`. False: it said nothing. What it said before it broke off comes first.
    fn gather(&mut self, cx: &mut Context<'_>, notes: Notes<'_>) -> bool {
        let start = self.out.len();
        while !self.last && self.large.is_empty() && self.out.len() - start < GATHER_MAX {
            let whole = self.out.len();
            let more = match &mut self.source {
                Source::Answer(_) => self.gather_head(cx, notes),
                Source::Body(_) => self.gather_body(cx, notes),
                Source::Nothing => Ok(false),
            };
            match more {
                Ok(true) => (),
                Ok(false) => break,
                Err(failed) => {
                    self.out.truncate(whole);
                    self.failed = Some(failed);
                    break;
                }
            }
        }
        if self.out.len() > REPLAY_MAX || !self.large.is_empty() {
            self.replayable = false;
        }
        self.out.len() > start || self.failed.is_some()
    }

    fn gather_head(&mut self, cx: &mut Context<'_>, notes: Notes<'_>) -> Result<bool, Failed> {
        let Source::Answer(answer) = &mut self.source else {
            return Ok(false);
        };
        let malformed = |failed| match failed {
            Failed::Malformed(_) => {
                Failed::Malformed(mesh_core::reason::Reason::HttpResponseMalformed)
            }
            other => other,
        };
        if let Poll::Ready(Some(interim)) = answer.poll_informational(cx) {
            let (head, ()) = interim.map_err(|error| Failed::local(&error))?.into_parts();
            self.begun = true;
            encode_response(&head, Kind::Interim, false, notes.max, &mut self.out)
                .map_err(malformed)?;
            return Ok(true);
        }
        let Poll::Ready(response) = std::pin::Pin::new(answer).poll(cx) else {
            return Ok(false);
        };
        let (head, body) = response
            .map_err(|error| Failed::local(&error))?
            .into_parts();
        self.begun = true;
        self.last = body.is_end_stream();
        encode_response(&head, Kind::Head, self.last, notes.max, &mut self.out)
            .map_err(malformed)?;
        self.status = Some(head.status.as_u16());
        self.grpc.head(&head.headers, self.last);
        self.source = Source::Body(body);
        Ok(true)
    }

    fn gather_body(&mut self, cx: &mut Context<'_>, notes: Notes<'_>) -> Result<bool, Failed> {
        let Source::Body(body) = &mut self.source else {
            return Ok(false);
        };
        match body.poll_data(cx) {
            Poll::Pending => Ok(false),
            Poll::Ready(Some(data)) => {
                let data = data.map_err(|error| Failed::local(&error))?;
                self.last = body.is_end_stream();
                if self.last {
                    self.grpc.end(None);
                }
                if data.is_empty() && !self.last {
                    return Ok(true);
                }
                self.out
                    .extend(message::prefix(Kind::Data, self.last, data.len()));
                if data.len() <= GATHER_PIECE_MAX {
                    self.out.extend_from_slice(&data);
                    self.held += data.len();
                } else {
                    self.large = data;
                }
                Ok(true)
            }
            Poll::Ready(None) => {
                let Poll::Ready(trailers) = body.poll_trailers(cx) else {
                    return Ok(false);
                };
                let trailers = trailers.map_err(|error| Failed::local(&error))?;
                self.grpc.end(trailers.as_ref());
                match trailers {
                    Some(trailers) => encode_trailers(&trailers, notes.max, &mut self.out)?,
                    None => self.out.extend(message::prefix(Kind::Data, true, 0)),
                }
                self.last = true;
                Ok(true)
            }
        }
    }
}
