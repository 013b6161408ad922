//! The direction of an exchange from the stream of the mesh to the local program's HTTP/2 stream.

use std::future::poll_fn;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use h2::server::SendResponse;
use h2::{Reason as Code, SendStream};
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode};
use mesh_api::message::{Kind, MessageError, Part, Reader, Side};
use mesh_core::reason::Reason;
use mesh_runtime::mux::MuxStream;

use super::fields::{content_length, decode_request, decode_response, decode_trailers};
use super::to_mesh::Notes;
use super::{Failed, grpc};
use crate::http::{Sender, Unfinished};
use crate::limits::Limit;
use crate::relay::Activity;

/// Data that is handed to h2 at once.
const PIECE_MAX: usize = 32 * 1024;

/// Where the messages go.
enum Sink {
    /// A caller that has no answer yet.
    Respond(SendResponse<Bytes>),
    Body(SendStream<Bytes>),
}

/// Takes no more of the mesh than the program takes: flow control is end to end.
pub(crate) struct FromMesh {
    sink: Sink,
    reader: Reader,
    /// What is still to come of the length that the head announced.
    announced: Option<u64>,
    /// The request was HEAD: the answer's length is that of another.
    headless: bool,
    touched: bool,
    done: bool,
    /// The status of the answer, until it is asked for.
    status: Option<u16>,
    grpc: grpc::Outcome,
    unfinished: Unfinished,
}

/// What was read of the mesh.
enum Message {
    Interim(Response<()>),
    Head(Response<()>, bool),
    Trailers(HeaderMap),
    Data(Bytes, bool),
    /// Not enough for any of them.
    Nothing,
}

impl FromMesh {
    /// The answer to a caller's request.
    pub(crate) fn response(respond: SendResponse<Bytes>, head: bool, max: usize) -> Self {
        Self {
            headless: head,
            ..Self::new(Sink::Respond(respond), Reader::new(Side::Response, max))
        }
    }

    /// What follows the head of a request to an app.
    ///
    /// # Errors
    /// When the head announces a length that is none.
    pub(crate) fn request(body: SendStream<Bytes>, reader: Reader, announced: Option<u64>) -> Self {
        Self {
            done: reader.is_over(),
            announced,
            ..Self::new(Sink::Body(body), reader)
        }
    }

    fn new(sink: Sink, reader: Reader) -> Self {
        Self {
            sink,
            reader,
            announced: None,
            headless: false,
            touched: false,
            done: false,
            status: None,
            grpc: grpc::Outcome::default(),
            unfinished: Unfinished::default(),
        }
    }

    /// The status that went to the caller, once.
    pub(crate) fn take_status(&mut self) -> Option<u16> {
        self.status.take()
    }

    /// The status of a gRPC call that ended, once.
    pub(crate) fn take_grpc(&mut self) -> Option<Option<u16>> {
        self.grpc.take()
    }

    /// Whether the caller has a part of its answer.
    pub(crate) fn is_begun(&self) -> bool {
        matches!(self.sink, Sink::Body(_))
    }

    /// Whether the direction is through.
    pub(crate) fn is_done(&self) -> bool {
        self.done
    }

    /// Whether something of the body went to the app.
    pub(crate) fn is_touched(&self) -> bool {
        self.touched
    }

    /// The unanswered caller, and what was read so far, for another try or for a refusal. `None`: it has an answer.
    pub(crate) fn unanswered(self) -> Result<SendResponse<Bytes>, SendStream<Bytes>> {
        match self.sink {
            Sink::Respond(respond) => Ok(respond),
            Sink::Body(body) => Err(body),
        }
    }

    /// What reads the rest of a request, for another try of it.
    pub(crate) fn into_reader(self) -> Reader {
        self.reader
    }

    /// Ready when the local program ended the stream before its time.
    pub(crate) fn poll_reset(&mut self, cx: &mut Context<'_>) -> Poll<Failed> {
        let reset = match &mut self.sink {
            Sink::Respond(respond) => respond.poll_reset(cx),
            Sink::Body(body) => body.poll_reset(cx),
        };
        match ready!(reset) {
            Ok(code) => Poll::Ready(Failed::Reset(code)),
            Err(error) => Poll::Ready(Failed::local(&error)),
        }
    }

    /// Tells the local program that the other end broke off with `code`.
    pub(crate) fn reset(&mut self, code: Code) {
        match &mut self.sink {
            Sink::Respond(respond) => respond.send_reset(code),
            Sink::Body(body) => body.send_reset(code),
        }
    }

    /// Passes on what is there; ready when the direction is through.
    pub(crate) fn poll(
        &mut self,
        cx: &mut Context<'_>,
        stream: &MuxStream,
        notes: Notes<'_>,
    ) -> Poll<Result<(), Failed>> {
        while !self.done {
            let mut room = usize::MAX;
            if self.reader.data_left() > 0 {
                room = ready!(self.poll_room(cx, stream))?;
            }
            let message = ready!(self.poll_read(cx, stream, room, notes))?;
            self.pass(message, notes)?;
        }
        Poll::Ready(Ok(()))
    }

    /// How much of the data that came the program takes now.
    fn poll_room(
        &mut self,
        cx: &mut Context<'_>,
        stream: &MuxStream,
    ) -> Poll<Result<usize, Failed>> {
        let mut there = 0;
        let looked = stream.poll_recv_with(cx, |_, bytes| {
            there = bytes.len();
            Poll::Ready(Ok(0))
        });
        if ready!(looked)?.is_none() {
            return Poll::Ready(Err(MessageError::Cut.into()));
        }
        let Sink::Body(body) = &mut self.sink else {
            return Poll::Ready(Err(MessageError::Block.into()));
        };
        let wanted = there.min(self.reader.data_left()).min(PIECE_MAX);
        body.reserve_capacity(wanted);
        while body.capacity() == 0 {
            match ready!(body.poll_capacity(cx)) {
                Some(Ok(_)) => (),
                Some(Err(error)) => return Poll::Ready(Err(Failed::local(&error))),
                // The stream takes no more data: it was reset, and who asks for resets hears of it.
                None => return Poll::Ready(Err(Failed::Gone)),
            }
        }
        Poll::Ready(Ok(body.capacity().min(wanted)))
    }

    fn poll_read(
        &mut self,
        cx: &mut Context<'_>,
        stream: &MuxStream,
        room: usize,
        notes: Notes<'_>,
    ) -> Poll<Result<Message, Failed>> {
        let mut message = Ok(Message::Nothing);
        let reader = &mut self.reader;
        let read = stream.poll_recv_with(cx, |_, bytes| {
            // A prefix is read by itself, so that no data is taken before there is room for it.
            let take = match reader.prefix_left() {
                0 => room,
                left => left,
            };
            let bytes = &bytes[..bytes.len().min(take)];
            match read_one(reader, bytes, notes.max) {
                Ok((used, read)) => {
                    message = Ok(read);
                    Poll::Ready(Ok(used))
                }
                Err(failed) => {
                    message = Err(failed);
                    Poll::Ready(Ok(0))
                }
            }
        });
        let Some(used) = ready!(read)? else {
            return Poll::Ready(Err(MessageError::Cut.into()));
        };
        notes.count.inc_by(used as u64);
        notes.activity.note();
        if !self.unfinished.note(notes.sender, self.reader.held()) {
            notes.activity.ran_out(Limit::Heads);
            return Poll::Ready(Err(Failed::Malformed(Reason::HeadDropped)));
        }
        Poll::Ready(message)
    }

    fn pass(&mut self, message: Message, notes: Notes<'_>) -> Result<(), Failed> {
        let local = |error: h2::Error| Failed::local(&error);
        match (message, &mut self.sink) {
            (Message::Nothing, _) => return Ok(()),
            (Message::Interim(response), Sink::Respond(respond)) => {
                respond.send_informational(response).map_err(local)?;
            }
            (Message::Head(response, last), Sink::Respond(respond)) => {
                let status = response.status();
                let bodiless = self.headless
                    || matches!(status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED);
                if !bodiless {
                    self.announced = content_length(response.headers())?;
                }
                if last && self.announced.is_some_and(|left| left > 0) {
                    return Err(Failed::Malformed(Reason::HttpMalformed));
                }
                self.grpc.head(response.headers(), last);
                let body = respond.send_response(response, last).map_err(local)?;
                self.status = Some(status.as_u16());
                self.done = last;
                notes.watch.answered();
                self.sink = Sink::Body(body);
            }
            (Message::Data(data, last), Sink::Body(body)) => {
                self.touched = true;
                if let Some(left) = &mut self.announced {
                    *left = left
                        .checked_sub(data.len() as u64)
                        .ok_or(Failed::Malformed(Reason::HttpMalformed))?;
                }
                if last && self.announced.is_some_and(|left| left > 0) {
                    return Err(Failed::Malformed(Reason::HttpMalformed));
                }
                if last {
                    self.grpc.end(None);
                }
                body.send_data(data, last).map_err(local)?;
                self.done = last;
                notes.watch.pay();
            }
            (Message::Trailers(trailers), Sink::Body(body)) => {
                self.touched = true;
                if self.announced.is_some_and(|left| left > 0) {
                    return Err(Failed::Malformed(Reason::HttpMalformed));
                }
                self.grpc.end(Some(&trailers));
                body.send_trailers(trailers).map_err(local)?;
                self.done = true;
                notes.watch.pay();
            }
            _ => return Err(Failed::Malformed(Reason::HttpMalformed)),
        }
        Ok(())
    }
}

fn read_one(reader: &mut Reader, bytes: &[u8], max: usize) -> Result<(usize, Message), Failed> {
    let (used, part) = reader.read(bytes)?;
    let message = match part {
        None => Message::Nothing,
        Some(Part::Data { data, last }) => Message::Data(Bytes::copy_from_slice(data), last),
        Some(Part::Block { kind, block, last }) => match kind {
            Kind::Interim => Message::Interim(decode_response(block, kind, max)?),
            Kind::Head => Message::Head(decode_response(block, kind, max)?, last),
            Kind::Trailers => Message::Trailers(decode_trailers(block, max)?),
            Kind::Data => Message::Nothing,
        },
    };
    Ok((used, message))
}

/// A request's head as it came.
pub(crate) struct Head {
    block: Vec<u8>,
    /// Nothing follows it.
    pub(crate) last: bool,
}

impl Head {
    /// The request for the app, and the length that its body must have.
    ///
    /// # Errors
    /// Why the app must not see it.
    pub(crate) fn request(
        &self,
        client_id: &HeaderValue,
        max: usize,
    ) -> Result<(Request<()>, Option<u64>), Failed> {
        let request = decode_request(&self.block, client_id, max)?;
        let announced = content_length(request.headers())?;
        if self.last && announced.is_some_and(|length| length > 0) {
            return Err(Failed::Malformed(Reason::HttpMalformed));
        }
        Ok((request, announced))
    }
}

/// Reads the head of a request. `None`: the stream ended before it began.
///
/// # Errors
/// When what comes is no head.
pub(crate) async fn read_request(
    stream: &MuxStream,
    (sender, activity): (Sender<'_>, &Activity),
    max: usize,
) -> Result<Option<(Head, Reader)>, Failed> {
    let mut reader = Reader::new(Side::Request, max);
    let mut unfinished = Unfinished::default();
    let mut begun = false;
    loop {
        let mut head = Ok(None);
        let read = poll_fn(|cx| {
            stream.poll_recv_with(cx, |_, bytes| {
                let take = match reader.prefix_left() {
                    0 => bytes.len(),
                    left => bytes.len().min(left),
                };
                let used = match reader.read(&bytes[..take]) {
                    Ok((used, part)) => {
                        if let Some(Part::Block { block, last, .. }) = part {
                            let block = block.to_vec();
                            head = Ok(Some(Head { block, last }));
                        }
                        used
                    }
                    Err(error) => {
                        head = Err(error);
                        0
                    }
                };
                Poll::Ready(Ok(used))
            })
        });
        match read.await? {
            None if !begun => return Ok(None),
            None => return Err(MessageError::Cut.into()),
            Some(_) => begun = true,
        }
        if let Some(head) = head? {
            return Ok(Some((head, reader)));
        }
        if !unfinished.note(sender, reader.held()) {
            activity.ran_out(Limit::Heads);
            return Err(Failed::Malformed(Reason::Overloaded));
        }
    }
}
