//! The way of an outgoing connection: whose is it, whither, then its protocol's way. Read down.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_api::workload_file::CallAt;
use mesh_core::identity::{Identity, SpiffeId};
use mesh_core::names::Account;
use mesh_core::reason::Reason;
use mesh_core::service::{Port, Protocol, Service};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;

use crate::call::Caller;
use crate::capture::peer::{self, Process};
use crate::capture::sockdiag::Owner;
use crate::data::Thread;
use crate::metrics::Direction;
use crate::places::Party;
use crate::relay::{self, Activity};
use crate::vanished;
use crate::view::View;

mod auto;
mod http;
mod http2;
mod tcp;

/// How long what a caller still sends is taken and thrown away, so that it can read its answer.
const LINGER: Duration = Duration::from_secs(2);

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
    let called = source.and_then(|caller| whither(&view, to).map(|called| (caller, called)));
    let (caller, called) = match called {
        Ok(called) => called,
        Err(reason) => return refuse(thread, client, reason, from, to),
    };
    carry(thread, view, caller, called, client).await;
}

/// Serves one connection to a local port to its end.
pub(crate) async fn serve_port(
    thread: &Rc<Thread>,
    at: &CallAt,
    client: TcpStream,
    from: SocketAddr,
) {
    let view = thread.view();
    let caller = match client.local_addr() {
        Ok(to) => whose_identity(thread, &view, None, canonical(from), canonical(to)),
        Err(error) => {
            log::debug!("a local connection is gone: {error}");
            return;
        }
    };
    serve_local(thread, view, at, caller, client).await;
}

/// The same of a unix socket.
pub(crate) async fn serve_socket(thread: &Rc<Thread>, at: &CallAt, client: UnixStream) {
    let view = thread.view();
    let caller = match peer::connected(&client, view.owners.tree.as_ref()) {
        Ok(Some(process)) => whose_process(&view, process),
        Ok(None) => Err(Reason::CallerUnknown),
        Err(error) => {
            log::warn!("the kernel can not be asked who is at a socket: {error}");
            Err(Reason::CallerUnknown)
        }
    };
    // Both kinds of streams are read, written and shut alike; what only TCP can is refused by the kernel, and not needed.
    let client = client.into_std().map(OwnedFd::from);
    let client = client.and_then(|fd| TcpStream::from_std(fd.into()));
    match client {
        Ok(client) => serve_local(thread, view, at, caller, client).await,
        Err(error) => log::warn!("a local connection can not be served: {error}"),
    }
}

/// Serves a call to a local port or socket, which belongs to one workload.
async fn serve_local(
    thread: &Rc<Thread>,
    view: Arc<View>,
    at: &CallAt,
    caller: Result<Whose, Reason>,
    client: TcpStream,
) {
    let called = caller.and_then(|caller| {
        let mut workloads = view.workloads.workloads.iter();
        let found = workloads.find_map(|workload| {
            let call = workload.calls.iter().find(|call| call.at == *at)?;
            Some((&workload.account, call))
        });
        // Its file is gone, and the listener goes.
        let (account, call) = found.ok_or(Reason::NoSuchService)?;
        if caller.identity != Identity::Workload(account.clone()) {
            return Err(Reason::NotTheOwner);
        }
        let index = view.index.as_ref();
        let service = index.and_then(|index| index.get(&call.service));
        let service = service.ok_or(Reason::NoSuchService)?;
        let port = service.port(call.port).ok_or(Reason::NoSuchPort)?;
        let called = Called {
            service: Arc::clone(service),
            port: port.clone(),
            only: None,
        };
        Ok((caller, called))
    });
    match called {
        Ok((caller, called)) => carry(thread, view, caller, called, client).await,
        Err(reason) => {
            thread.metrics.refused(Direction::Outbound, reason);
            if thread.refusals.borrow_mut().passes() {
                log::info!(at:% = at, reason:% = reason; "refused a call: {}", reason.text());
            }
            relay::abort(client);
        }
    }
}

/// Carries the call of a known caller by its protocol's way.
async fn carry(
    thread: &Rc<Thread>,
    view: Arc<View>,
    caller: Whose,
    called: Called,
    client: TcpStream,
) {
    let id = SpiffeId {
        trust_domain: view.host.trust_domain.clone(),
        identity: caller.identity,
    };
    if let Err(reason) = view.leaf(&id.identity) {
        thread.metrics.refused(Direction::Outbound, reason);
        if thread.refusals.borrow_mut().passes() {
            log::info!(src:% = id, dst:% = called.service.name, reason:% = reason; "refused a call: {}", reason.text());
        }
        return relay::abort(client);
    }
    // A picture must not live as long as a connection.
    drop(view);
    let Some(_place) = thread.place(caller.party.clone()) else {
        return relay::abort(client);
    };
    let port = called.port;
    let caller = Caller::new(id, caller.party, called.service, port.number, called.only);
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

/// Closes a caller's connection so that what was written arrives: unread input would turn the end into a reset.
async fn close(thread: &Thread, caller: &Caller, mut client: TcpStream) {
    if caller.dialled_one() {
        return end(thread, client).await;
    }
    relay::settle(&client);
    if client.shutdown().await.is_ok() {
        let _ = timeout(LINGER, drain(&mut client)).await;
    }
}

/// The same of one that dialled a real address. If it goes on writing it must find no end to which its kernel alone would
/// answer: when our socket and its flow are forgotten, what it writes would leave for that address as it is. So it is reset
/// unless it has ended too, once it has taken all that was written, or takes nothing for as long as a call may be silent.
async fn end(thread: &Thread, mut client: TcpStream) {
    if client.shutdown().await.is_err() {
        return;
    }
    let given_up = Instant::now() + thread.settings.idle;
    loop {
        match timeout(LINGER, drain(&mut client)).await {
            Ok(true) => return relay::settle(&client),
            Ok(false) => return,
            Err(_) if vanished::has_all(client.as_raw_fd()) || given_up < Instant::now() => return,
            Err(_) => (),
        }
    }
}

/// Takes and throws away what still comes. True when it ended well.
async fn drain(client: &mut TcpStream) -> bool {
    let mut scrap = vec![0; 4096];
    loop {
        match client.read(&mut scrap).await {
            Ok(0) => return true,
            Ok(_) => (),
            Err(_) => return false,
        }
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
) -> Result<Whose, Reason> {
    if let Some(account) = whose {
        return Ok(Whose::workload(account));
    }
    match thread.diag.borrow_mut().owner_of(from, to) {
        Ok(Owner::Known(owner)) => whose_by(view, owner.uid, Some(owner.cgroup)),
        Ok(Owner::Unknown) => Err(Reason::CallerUnknown),
        Err(error) => {
            log::warn!("the kernel can not be asked whose a connection is: {error}");
            Err(Reason::CallerUnknown)
        }
    }
}

/// A caller.
struct Whose {
    identity: Identity,
    party: Party,
}

impl Whose {
    fn workload(account: Account) -> Self {
        Self {
            identity: Identity::Workload(account.clone()),
            party: Party::Workload(account),
        }
    }
}

/// Where the kernel can not hold a process while it is looked at, its user is sure and its cgroup is not: then who is told by
/// its cgroup is nobody.
fn whose_process(view: &View, process: Process) -> Result<Whose, Reason> {
    let whose = whose_by(view, process.uid, process.cgroup)?;
    if process.held || whose.party == whose_by(view, process.uid, None)?.party {
        Ok(whose)
    } else {
        Err(Reason::CallerUnknown)
    }
}

fn whose_by(view: &View, uid: u32, cgroup: Option<u64>) -> Result<Whose, Reason> {
    match view.owners.find(uid, cgroup) {
        Ok(Some(account)) => Ok(Whose::workload(account.clone())),
        Ok(None) => Ok(Whose {
            identity: Identity::Host(view.host.name.clone()),
            party: Party::User(uid),
        }),
        Err(error) => {
            log::warn!("whose a connection is can not be told: {error}");
            Err(Reason::CallerUnknown)
        }
    }
}

/// What is called.
struct Called {
    service: Arc<Service>,
    port: Port,
    /// The one host that was meant.
    only: Option<IpAddr>,
}

/// What is called: the service that has the destination as its virtual address, or one of whose hosts has it as its own
/// where the service asks for that; and its declared port.
fn whither(view: &View, to: SocketAddr) -> Result<Called, Reason> {
    let index = view.index.as_ref();
    let (service, only) = if view.host.vips.contains(to.ip()) {
        (index.and_then(|index| index.by_address(to.ip())), None)
    } else {
        let name = view.reals.get(&to).ok_or_else(|| unknown_real(to))?;
        (index.and_then(|index| index.get(name)), Some(to.ip()))
    };
    let service = service.ok_or(Reason::NoSuchService)?;
    let port = service.port(to.port()).ok_or(Reason::NoSuchPort)?;
    Ok(Called {
        service: Arc::clone(service),
        port: port.clone(),
        only,
    })
}

/// The kernel leads real addresses here that were kept from before; whose they are may be forgotten. Nothing leads our own
/// listener's here.
fn unknown_real(to: SocketAddr) -> Reason {
    match to.ip().is_loopback() {
        true => Reason::NotCaptured,
        false => Reason::EndpointsUnknown,
    }
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
