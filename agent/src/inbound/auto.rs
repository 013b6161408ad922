//! A stream whose protocol is not declared: the app is connected at once, and whoever speaks first is heard. HTTP/2 does
//! not come by here: the caller's agent knows its preface, too, and makes each request a stream of its own. As bytes it
//! would carry whatever `x-meshwork-client-id` its sender writes.

use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::Instant;

use mesh_core::http1::{self, Sniff};
use mesh_core::reason::Reason;
use mesh_runtime::mux::MuxStream;
use tokio::io::{AsyncWriteExt as _, ReadBuf};
use tokio::net::TcpStream;

use super::{Admitted, Peer, app, carry, http};
use crate::http2::{FRAME_HEAD_LEN, begins_as_server};
use crate::relay::Activity;

/// Bytes of the caller that are taken before the protocol is told.
const SNIFF_READ: usize = 16 * 1024;

pub(super) async fn serve(
    peer: &Rc<Peer>,
    admitted: &Rc<Admitted>,
    stream: &MuxStream,
    activity: &Activity,
) -> Result<(), Reason> {
    let begun = Instant::now();
    let mut app = app::connect(peer.thread(), admitted, peer.address).await?;
    stream.accept();
    let mut buffer = Vec::new();
    let mut sent = 0;
    loop {
        let seen = http1::sniff(&buffer);
        match seen {
            Sniff::Http1 => {
                let mut buffers = http::Buffers::of(buffer);
                let begun = (Some((app, sent)), &mut buffers);
                return http::serve(peer, admitted, stream, begun, activity).await;
            }
            Sniff::Http2 => return Err(Reason::HttpMalformed),
            Sniff::Other | Sniff::More => (),
        }
        app.write_all(&buffer[sent..])
            .await
            .map_err(|_| Reason::AppReset)?;
        sent = buffer.len();
        let spoke = seen != Sniff::Other && caller_spoke(&mut app, stream).await?;
        if !spoke {
            break;
        }
        match stream.recv(&mut buffer, SNIFF_READ).await {
            Ok(Some(_)) => (),
            // The relay meets the end again.
            Ok(None) => break,
            Err(_) => return Ok(()),
        }
    }
    admitted.flow.connected(begun.elapsed().as_secs_f64());
    admitted.flow.sent.inc_by(sent as u64);
    carry(app, stream, admitted, activity).await
}

/// False when the app spoke first. Settings of HTTP/2 are no first word: a client of it speaks without having them, and
/// before it did it can not be told whether its bytes may pass.
///
/// # Errors
/// The app reset its connection. The kernel tells that once: the relay would take what follows for a proper end.
async fn caller_spoke(app: &mut TcpStream, stream: &MuxStream) -> Result<bool, Reason> {
    poll_fn(|cx: &mut Context<'_>| {
        if stream.poll_readable(cx).is_ready() {
            return Poll::Ready(Ok(true));
        }
        let mut first = [0; FRAME_HEAD_LEN];
        let mut first = ReadBuf::new(&mut first);
        if let Err(error) = ready!(app.poll_peek(cx, &mut first)) {
            log::debug!("an app's connection broke: {error}");
            return Poll::Ready(Err(Reason::AppReset));
        }
        if begins_as_server(first.filled()) {
            return Poll::Pending;
        }
        Poll::Ready(Ok(false))
    })
    .await
}
