//! What both agents do with HTTP/2: how much a local program may ask for, and the two directions of one exchange
//! between an HTTP/2 stream of that program and a stream of the mesh.

use h2::Reason as Code;
use mesh_api::message::MessageError;
use mesh_core::reason::Reason;
use mesh_runtime::mux::StreamError;

pub(crate) mod fields;
mod from_mesh;
pub(crate) mod grpc;
mod to_mesh;
mod watch;

pub(crate) use from_mesh::{FromMesh, Head, read_request};
pub(crate) use to_mesh::{Notes, ToMesh};
pub(crate) use watch::{Begins, FRAME_HEAD_LEN, Watch, Watched, begins_as_server};

/// Requests that a caller may have open on one connection. RFC 9113 §5.1.2 advises 100 at least; load tools use 128.
const STREAMS_MAX: u32 = 256;
/// Bytes of one stream that wait to be taken. A round trip on one host is short: more brings nothing.
const STREAM_WINDOW: u32 = 64 * 1024;
/// As much as all streams together may have, so that those that nobody reads never hold back another.
const CONNECTION_WINDOW: u32 = STREAMS_MAX * STREAM_WINDOW;
/// Bytes that a stream keeps for a program that does not read, beside its window.
const SEND_BUFFER_MAX: usize = 64 * 1024;
/// Streams that a caller reset before they were looked at; more ends the connection (rapid reset).
const RESET_UNSEEN_MAX: usize = 32;
/// Streams that were reset by this side because the program broke the rules; more ends the connection.
const RESET_BY_ERROR_MAX: usize = 256;
/// Streams that this side reset and still remembers, so that late frames of theirs are no error.
const RESET_REMEMBERED_MAX: usize = 256;

/// How a caller's connection is served; `head_max` bounds a head as RFC 9113 §6.5.2 measures it.
pub(crate) fn server(head_max: usize) -> h2::server::Builder {
    let mut builder = h2::server::Builder::new();
    builder
        .max_concurrent_streams(STREAMS_MAX)
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_send_buffer_size(SEND_BUFFER_MAX)
        .max_header_list_size(u32::try_from(head_max).unwrap_or(u32::MAX))
        .max_pending_accept_reset_streams(RESET_UNSEEN_MAX)
        .max_local_error_reset_streams(Some(RESET_BY_ERROR_MAX))
        .max_concurrent_reset_streams(RESET_REMEMBERED_MAX)
        .enable_connect_protocol();
    builder
}

/// How an app is called.
pub(crate) fn client(head_max: usize) -> h2::client::Builder {
    let mut builder = h2::client::Builder::new();
    builder
        .enable_push(false)
        .initial_max_send_streams(0)
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_send_buffer_size(SEND_BUFFER_MAX)
        .max_header_list_size(u32::try_from(head_max).unwrap_or(u32::MAX))
        .max_local_error_reset_streams(Some(RESET_BY_ERROR_MAX))
        .max_concurrent_reset_streams(RESET_REMEMBERED_MAX);
    builder
}

/// The most requests that one connection to an app carries at once, whatever the app allows: as many as have a
/// window of their own.
pub(crate) const APP_STREAMS_MAX: usize = STREAMS_MAX as usize;

/// How an exchange broke, and on which side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Failed {
    /// The stream to the other agent was reset.
    Mesh(Reason),
    /// The local program ended its stream with this code.
    Reset(Code),
    /// The app did not look at the request and says so: it may be sent again.
    NotTaken,
    /// The local program's connection is over.
    Gone,
    /// What one of the two sent breaks the rules of HTTP.
    Malformed(Reason),
}

impl Failed {
    /// What `error` of the local connection says.
    fn local(error: &h2::Error) -> Self {
        match error.reason() {
            Some(Code::REFUSED_STREAM) if error.is_reset() && error.is_remote() => Self::NotTaken,
            Some(code) if error.is_reset() && error.is_remote() => Self::Reset(code),
            // It says which stream was the last to be looked at; only later ones end by it.
            _ if error.is_go_away() && error.is_remote() => Self::NotTaken,
            // The program broke a rule that its own streams are held to.
            Some(_) if error.is_reset() && error.is_library() => {
                Self::Malformed(Reason::HttpResponseMalformed)
            }
            _ => Self::Gone,
        }
    }
}

impl From<StreamError> for Failed {
    fn from(error: StreamError) -> Self {
        match error {
            StreamError::Reset(reason) => Self::Mesh(reason),
            StreamError::Local(_) => Self::Gone,
        }
    }
}

impl From<MessageError> for Failed {
    fn from(error: MessageError) -> Self {
        log::debug!("an HTTP/2 exchange can not be read: {error}");
        Self::Malformed(match error {
            MessageError::TooLarge => Reason::HttpHeadTooLarge,
            MessageError::Cut => Reason::PeerLost,
            MessageError::Order(_) | MessageError::Block => Reason::HttpMalformed,
        })
    }
}
