//! The way of an outgoing connection: whose is it, whither, then its protocol's way. Read down.

use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;

use mesh_core::identity::{Identity, SpiffeId};
use mesh_core::names::Account;
use mesh_core::reason::Reason;
use mesh_core::service::{Port, Protocol, Service};
use tokio::net::TcpStream;

use crate::call::Caller;
use crate::capture::sockdiag::Owner;
use crate::data::Thread;
use crate::metrics::Direction;
use crate::relay::{self, Activity};
use crate::view::View;

mod auto;
mod http;
mod http2;
mod tcp;

/// Serves one captured connection to its end. `whose` is what the kernel said at the SYN.
pub(crate) async fn serve(
    thread: &Rc<Thread>,
    whose: Option<Account>,
    client: TcpStream,
    from: SocketAddr,
) {
    let to = match client.local_addr() {
        Ok(to) => canonical(to),
        Err(error) => {
            log::debug!("a captured connection is gone: {error}");
            return;
        }
    };
    let view = thread.view();
    let source = whose_identity(thread, &view, whose, canonical(from), to);
    let called = source.and_then(|identity| whither(&view, to).map(|called| (identity, called)));
    let (identity, service, port) = match called {
        Ok((identity, (service, port))) => (identity, service, port),
        Err(reason) => return refuse(thread, client, reason, from, to),
    };
    let id = SpiffeId {
        trust_domain: view.host.trust_domain.clone(),
        identity,
    };
    if let Err(reason) = view.leaf(&id.identity) {
        return refuse(thread, client, reason, from, to);
    }
    drop(view);
    relay::guard(&client);
    let caller = Caller::new(id, service, port.number);
    let activity = Activity::new(thread);
    match port.protocol {
        Protocol::Tcp => Box::pin(tcp::serve(thread, &caller, client, &activity)).await,
        Protocol::Http2 | Protocol::Grpc => {
            let early = Vec::new();
            Box::pin(http2::serve(thread, caller, port.protocol, client, early)).await;
        }
        Protocol::Http => Box::pin(http::serve(thread, &caller, client, &activity)).await,
        Protocol::Auto => Box::pin(auto::serve(thread, caller, client, &activity)).await,
    }
}

/// Who calls. The listener says it for a mapped workload; for others the kernel is asked, and an answer that does
/// not say it is nobody: never a guess.
fn whose_identity(
    thread: &Thread,
    view: &View,
    whose: Option<Account>,
    from: SocketAddr,
    to: SocketAddr,
) -> Result<Identity, Reason> {
    if let Some(account) = whose {
        return Ok(Identity::Workload(account));
    }
    match thread.diag.borrow_mut().owner_of(from, to) {
        Ok(Owner::Known(owner)) => match view.owners.find(owner.uid, Some(owner.cgroup)) {
            Ok(Some(account)) => Ok(Identity::Workload(account.clone())),
            Ok(None) => Ok(Identity::Host(view.host.name.clone())),
            Err(error) => {
                log::warn!("whose a connection is can not be told: {error}");
                Err(Reason::CallerUnknown)
            }
        },
        Ok(Owner::Unknown) => Err(Reason::CallerUnknown),
        Err(error) => {
            log::warn!("the kernel can not be asked whose a connection is: {error}");
            Err(Reason::CallerUnknown)
        }
    }
}

/// What is called: the service that has the destination as its virtual address, and its declared port.
fn whither(view: &View, to: SocketAddr) -> Result<(Arc<Service>, Port), Reason> {
    if !view.host.vips.contains(to.ip()) {
        return Err(Reason::NotCaptured);
    }
    let service = view
        .index
        .as_ref()
        .and_then(|index| index.by_address(to.ip()));
    let service = service.ok_or(Reason::NoSuchService)?;
    let port = service.port(to.port()).ok_or(Reason::NoSuchPort)?;
    Ok((Arc::clone(service), port.clone()))
}

fn refuse(thread: &Thread, client: TcpStream, reason: Reason, from: SocketAddr, to: SocketAddr) {
    thread.metrics.refused(Direction::Outbound, reason);
    if thread.refusals.borrow_mut().passes() {
        log::info!(from:% = from, to:% = to, reason:% = reason; "refused a call: {}", reason.text());
    }
    relay::abort(client);
}

/// Says why a call of a known caller failed: in log and metric.
fn note_refusal(thread: &Thread, caller: &Caller, reason: Reason) {
    thread.metrics.refused(Direction::Outbound, reason);
    if !thread.refusals.borrow_mut().passes() {
        return;
    }
    log::info!(
        src:% = caller.id, dst:% = caller.service.name, port = caller.port, reason:% = reason;
        "a call failed: {}", reason.text()
    );
}

fn canonical(address: SocketAddr) -> SocketAddr {
    let ip = match address.ip() {
        IpAddr::V6(v6) => v6.to_ipv4_mapped().map_or(IpAddr::V6(v6), IpAddr::V4),
        v4 => v4,
    };
    SocketAddr::new(ip, address.port())
}
