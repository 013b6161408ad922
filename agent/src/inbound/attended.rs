//! What ends a stream while it is served, whatever its kind.

use std::future::poll_fn;
use std::pin::Pin;
use std::task::Poll;

use mesh_core::reason::Reason;
use mesh_runtime::mux::MuxStream;

use super::{Admitted, Peer};
use crate::relay::Activity;

/// A stream that is being served, and what may end it.
pub(super) struct Attended<'a> {
    pub(super) peer: &'a Peer,
    pub(super) stream: &'a MuxStream,
    pub(super) admitted: &'a Admitted,
    pub(super) activity: &'a Activity,
}

impl Attended<'_> {
    /// Goes `way` to its end, if nothing ends it before; with `gives_up` that the caller is gone does.
    pub(super) async fn run(
        &self,
        mut way: Pin<&mut dyn Future<Output = Result<(), Reason>>>,
        gives_up: bool,
    ) -> Result<(), Reason> {
        poll_fn(|cx| {
            // What came before a reset is delivered before the reset is heard.
            if let Poll::Ready(outcome) = way.as_mut().poll(cx) {
                return Poll::Ready(outcome);
            }
            // What its call holds here is given up at once. Other kinds tell the app how the caller ended.
            if gives_up && self.stream.poll_reset(cx).is_ready() {
                return Poll::Ready(Ok(()));
            }
            if self.admitted.revoked.get() {
                return Poll::Ready(Err(Reason::NotAllowed));
            }
            if self.activity.has_vanished() {
                let service = &self.admitted.header.service;
                log::info!(service:% = service; "a plaintext endpoint is gone without a word");
                return Poll::Ready(Err(Reason::AppReset));
            }
            let idle = self.peer.thread.settings.idle;
            let ceased = self.activity.poll_ceased(cx, idle);
            ceased.map(|()| Err(Reason::Timeout))
        })
        .await
    }
}
