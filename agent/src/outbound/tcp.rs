//! A connection as one stream of bytes.

use std::rc::Rc;
use std::sync::Arc;

use mesh_api::header::StreamKind;
use mesh_core::reason::Reason;
use mesh_runtime::mux::StreamError;
use tokio::net::TcpStream;

use crate::call::{self, Call, Caller, Tries};
use crate::data::Thread;
use crate::metrics::{Direction, Flow, FlowLabels};
use crate::relay::{self, Activity, Local, Open};

pub(super) async fn serve(
    thread: &Rc<Thread>,
    caller: &Caller,
    client: TcpStream,
    activity: &Activity,
) {
    match connect(thread, caller).await {
        Ok(call) => {
            let flow = flow(thread, caller, &call, "tcp");
            carry(thread, caller, &call, client, (&flow, activity)).await;
        }
        Err(reason) => {
            super::note_refusal(thread, caller, reason);
            relay::abort(client);
        }
    }
}

/// Opens a stream whose app took the connection. Nothing was read from the client yet, so an endpoint whose app
/// does not answer is passed over.
async fn connect(thread: &Rc<Thread>, caller: &Caller) -> Result<Call, Reason> {
    let mut tries = Tries::default();
    loop {
        let call = call::open(thread, caller, StreamKind::Tcp, &mut tries).await?;
        match accepted(thread, &call).await {
            Ok(()) => return Ok(call),
            Err(reason) => {
                call.failed(reason);
                tries.note(&call.endpoint, reason);
                // Nothing of the caller was sent: a peer that is gone without a word did nothing either.
                let harmless =
                    reason.is_retryable() || matches!(reason, Reason::PeerLost | Reason::Timeout);
                if !harmless || tries.are_used_up() {
                    return Err(reason);
                }
            }
        }
    }
}

/// Waits until the called app took the connection.
pub(super) async fn accepted(thread: &Thread, call: &Call) -> Result<(), Reason> {
    let bound = thread.settings.connect * 2;
    let accepted = tokio::time::timeout(bound, call.stream.accepted()).await;
    accepted.unwrap_or(Err(Reason::Timeout))
}

/// Relays a call whose stream is open until both ends are through.
pub(super) async fn carry(
    thread: &Thread,
    caller: &Caller,
    call: &Call,
    mut client: TcpStream,
    (flow, activity): (&Flow, &Activity),
) {
    flow.connected(call.answered());
    let open = Open::count(&flow.open);
    let outcome = tokio::select! {
        biased;
        outcome = relay::relay(&mut client, &call.stream, Local::Caller, flow, activity) => outcome,
        () = activity.ceased(thread.settings.idle) => Err(StreamError::Reset(Reason::Timeout)),
    };
    drop(open);
    flow.connection(outcome.is_ok());
    match outcome {
        Ok(()) => relay::settle(&client),
        Err(StreamError::Reset(reason)) => {
            super::note_refusal(thread, caller, reason);
            relay::abort(client);
        }
        // Our own client went away; dropping the stream tells the other side.
        Err(StreamError::Local(error)) => log::debug!("the caller's connection broke: {error}"),
    }
}

/// The counters between this caller and this endpoint.
pub(super) fn flow(
    thread: &Thread,
    caller: &Caller,
    call: &Call,
    protocol: &'static str,
) -> Arc<Flow> {
    let called = &call.endpoint.account;
    thread.metrics.flow(&FlowLabels {
        direction: Direction::Outbound,
        src: caller.id.to_string(),
        dst: caller.service.name.to_string(),
        port: caller.port,
        tls: format!(
            "spiffe://{}/ns/{}/sa/{}",
            caller.id.trust_domain, called.namespace, called.name
        ),
        protocol,
    })
}
