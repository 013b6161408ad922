//! One call of a service: its endpoints are known or asked for, one is picked, its agent dialled, a stream opened.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::hash::{Hash, Hasher};
use std::net::IpAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use mesh_api::header::{HEADER_MAX, Header, StreamKind};
use mesh_core::balance::{Balancer, Outcome};
use mesh_core::identity::SpiffeId;
use mesh_core::names::{Account, HostUid, ServiceName, TrustDomain};
use mesh_core::reason::{Fault, Reason};
use mesh_core::service::{Endpoint, Service};
use mesh_runtime::mux::MuxStream;
use tokio::sync::mpsc;

use crate::data::Thread;
use crate::limits::Limit;
use crate::peers::{self, Place};
use crate::places::{Party, Turn};
use crate::view::View;

/// How often one call is tried before it is given up.
const TRIES_MAX: usize = 3;

/// What an endpoint is known by to balancer and pool.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct EndpointKey {
    pub(crate) address: IpAddr,
    pub(crate) mesh_port: u16,
    pub(crate) account: Account,
    pub(crate) host: HostUid,
}

impl Hash for EndpointKey {
    /// Of what is short and tells nearly all apart: this is done for each call.
    fn hash<H: Hasher>(&self, state: &mut H) {
        (self.address, self.mesh_port).hash(state);
    }
}

impl EndpointKey {
    fn of(endpoint: &Endpoint) -> Self {
        Self {
            address: endpoint.address,
            mesh_port: endpoint.mesh_port,
            account: endpoint.account.clone(),
            host: endpoint.host.clone(),
        }
    }

    pub(crate) fn sni(&self, trust_domain: &TrustDomain) -> String {
        format!(
            "{}.{}.{trust_domain}",
            self.account.name, self.account.namespace
        )
    }
}

/// The balancers of one thread, by service.
#[derive(Debug, Default)]
pub(crate) struct Balancers(RefCell<BTreeMap<ServiceName, Rc<Balance>>>);

#[derive(Debug, Default)]
struct Balance {
    /// What the balancer was made from: replaced as a whole when control says so.
    endpoints: RefCell<Arc<Vec<Endpoint>>>,
    balancer: RefCell<Balancer<Rc<EndpointKey>>>,
    /// Since the last sweep.
    used: Cell<bool>,
    /// It is no longer among [`Balancers`].
    forgotten: Cell<bool>,
}

impl Balance {
    fn follow(&self, endpoints: &Arc<Vec<Endpoint>>, view: &View) {
        let mut known = self.endpoints.borrow_mut();
        if !Arc::ptr_eq(&known, endpoints) {
            let here = endpoints.iter().filter(|e| e.network == view.host.network);
            let here = here.map(|e| (Rc::new(EndpointKey::of(e)), e.health));
            self.balancer.borrow_mut().update(here);
            *known = Arc::clone(endpoints);
        }
    }
}

impl Balancers {
    fn of(&self, service: &ServiceName) -> Rc<Balance> {
        Rc::clone(self.0.borrow_mut().entry(service.clone()).or_default())
    }

    /// Forgets services that the picture no longer has, and says which of the others are in use: what nobody
    /// uses for a day is no longer subscribed.
    pub(crate) fn sweep(&self, view: &View, wants: &mpsc::Sender<ServiceName>) {
        self.0.borrow_mut().retain(|service, balance| {
            let known = view.endpoints.contains_key(service);
            balance.forgotten.set(!known);
            // When the channel is full, the next sweep says it.
            if known && balance.used.get() && wants.try_send(service.clone()).is_ok() {
                balance.used.set(false);
            }
            known
        });
    }
}

/// Who calls what.
#[derive(Debug)]
pub(crate) struct Caller {
    /// Its leaf is looked up for each call: it is renewed while connections live.
    pub(crate) id: SpiffeId,
    pub(crate) party: Party,
    pub(crate) service: Arc<Service>,
    pub(crate) port: u16,
    /// The address of the one host that is meant, where the caller dialled that and not the service's own.
    only: Option<IpAddr>,
    /// Of its last call, and mostly of the next one too.
    balance: RefCell<Option<Rc<Balance>>>,
    place: RefCell<Option<(Rc<EndpointKey>, Place)>>,
}

impl Caller {
    pub(crate) fn new(
        id: SpiffeId,
        party: Party,
        service: Arc<Service>,
        port: u16,
        only: Option<IpAddr>,
    ) -> Self {
        Self {
            id,
            party,
            service,
            port,
            only,
            balance: RefCell::default(),
            place: RefCell::default(),
        }
    }

    /// Whether it dialled a real address, and not the service's own.
    pub(crate) fn dialled_one(&self) -> bool {
        self.only.is_some()
    }

    fn balance(&self, thread: &Thread) -> Rc<Balance> {
        let mut last = self.balance.borrow_mut();
        match &*last {
            Some(balance) if !balance.forgotten.get() => Rc::clone(balance),
            _ => {
                let found = thread.balancers.of(&self.service.name);
                Rc::clone(last.insert(found))
            }
        }
    }

    /// Where connections to `endpoint` as this caller are.
    fn place(&self, thread: &Thread, endpoint: &Rc<EndpointKey>) -> Place {
        let mut last = self.place.borrow_mut();
        match &*last {
            Some((of, place)) if Rc::ptr_eq(of, endpoint) && !place.is_gone() => place.clone(),
            _ => {
                let found = thread.peers.place(&self.id.identity, endpoint);
                last.insert((Rc::clone(endpoint), found)).1.clone()
            }
        }
    }
}

/// Where one call was tried, in vain.
#[derive(Debug, Default)]
pub(crate) struct Tries {
    made: usize,
    /// They are passed over.
    failed: Vec<Rc<EndpointKey>>,
    /// Of these, those whose connection was given up under the call. That may have been a renewal: where no other is
    /// left, a new connection to them is tried, once.
    drained: Vec<Rc<EndpointKey>>,
    came_back: bool,
    last: Option<Reason>,
}

impl Tries {
    /// Returns whether a new connection was drained, too: then it is the endpoint that goes.
    pub(crate) fn note(&mut self, endpoint: &Rc<EndpointKey>, reason: Reason) -> bool {
        self.made += 1;
        self.last = Some(reason);
        self.failed.push(Rc::clone(endpoint));
        let drained = reason == Reason::Draining;
        if drained && !self.came_back {
            self.drained.push(Rc::clone(endpoint));
        }
        drained && self.came_back
    }

    /// There is none but those that failed. Whether some of them may be tried again.
    fn come_back(&mut self) -> bool {
        let drained = std::mem::take(&mut self.drained);
        self.failed.retain(|failed| !drained.contains(failed));
        self.came_back |= !drained.is_empty();
        !drained.is_empty()
    }

    pub(crate) fn are_used_up(&self) -> bool {
        self.made >= TRIES_MAX
    }

    /// That no endpoint is left says less than why those that were asked refused.
    fn reason(&self) -> Reason {
        self.last.unwrap_or(Reason::NoEndpoints)
    }
}

/// An open stream to an endpoint. It tells the balancer how the call went; dropped untold, it was cancelled.
#[derive(Debug)]
pub(crate) struct Call {
    pub(crate) stream: MuxStream,
    pub(crate) endpoint: Rc<EndpointKey>,
    started: Started,
    _turn: Option<Turn>,
}

#[derive(Debug)]
struct Started {
    balance: Rc<Balance>,
    endpoint: Rc<EndpointKey>,
    at: Instant,
    told: Cell<bool>,
}

impl Started {
    fn tell(&self, now: Instant, outcome: Outcome) {
        if !self.told.replace(true) {
            let mut balancer = self.balance.balancer.borrow_mut();
            balancer.finished(&self.endpoint, now, outcome);
        }
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        if !self.told.get() {
            self.tell(Instant::now(), Outcome::Cancelled);
        }
    }
}

impl Call {
    /// The endpoint answered. Returns the seconds since the call began.
    pub(crate) fn answered(&self) -> f64 {
        let now = Instant::now();
        let latency = now.saturating_duration_since(self.started.at);
        self.started.tell(now, Outcome::Success { latency });
        latency.as_secs_f64()
    }

    /// The endpoint failed the call for `reason`; a refusal by policy is an answer.
    pub(crate) fn failed(&self, reason: Reason) {
        self.started.tell(Instant::now(), outcome_of(reason));
    }
}

/// What a failure says of the endpoint: the caller's own faults, and a policy at work, say nothing.
fn outcome_of(reason: Reason) -> Outcome {
    match reason.fault() {
        // The connection ended, as each does some day.
        _ if reason == Reason::Draining => Outcome::Cancelled,
        Fault::Upstream => Outcome::Failure,
        _ if reason == Reason::Overloaded => Outcome::Failure,
        _ => Outcome::Cancelled,
    }
}

/// Opens a stream to an endpoint that did not fail yet, and notes each that does.
///
/// # Errors
/// The reason of the last try; nothing of this one reached an app.
pub(crate) async fn open(
    thread: &Rc<Thread>,
    caller: &Caller,
    kind: StreamKind,
    tries: &mut Tries,
) -> Result<Call, Reason> {
    if thread.metrics.limits.budget.is_spent() {
        thread.reached(Limit::Buffers);
        return Err(Reason::Overloaded);
    }
    // The picture must not be held while it is waited for.
    let known = known(&thread.view.borrow(), &caller.service.name);
    let endpoints = match known {
        Some(endpoints) => endpoints,
        None => ask(thread, &caller.service.name).await?,
    };
    let mut header = Vec::with_capacity(HEADER_MAX.min(128));
    Header {
        kind,
        service: caller.service.name.name.clone(),
        port: caller.port,
    }
    .encode(&mut header);
    while !tries.are_used_up() {
        let Some(started) = pick(thread, caller, &endpoints, &tries.failed) else {
            if tries.come_back() {
                continue;
            }
            break;
        };
        let endpoint = Rc::clone(&started.endpoint);
        let turn = match caller.party {
            Party::Workload(_) => None,
            Party::User(user) => match thread.turn(user, endpoint.address, kind) {
                Some(turn) => Some(turn),
                None => {
                    // The endpoint is not to blame, and another may have room.
                    thread.reached(Limit::Calls);
                    tries.note(&endpoint, Reason::Overloaded);
                    continue;
                }
            },
        };
        let leaf = thread.view.borrow().leaf(&caller.id.identity).cloned()?;
        let place = caller.place(thread, &endpoint);
        let opened = match peers::connection(thread, &place, &leaf, &endpoint).await {
            Ok(connections) => connections.open(thread, &header).await,
            // This agent has no room for a connection: no other endpoint changes that, and this one is not to blame.
            Err(Reason::Overloaded) => return Err(Reason::Overloaded),
            Err(reason) => Err(reason),
        };
        match opened {
            Ok(stream) => {
                return Ok(Call {
                    stream,
                    endpoint,
                    started,
                    _turn: turn,
                });
            }
            Err(reason) => {
                let outcome = if tries.note(&endpoint, reason) {
                    Outcome::Failure
                } else {
                    outcome_of(reason)
                };
                started.tell(Instant::now(), outcome);
                if reason == Reason::NoIdentity {
                    break;
                }
            }
        }
    }
    Err(tries.reason())
}

fn pick(
    thread: &Rc<Thread>,
    caller: &Caller,
    endpoints: &Arc<Vec<Endpoint>>,
    tried: &[Rc<EndpointKey>],
) -> Option<Started> {
    let at = Instant::now();
    let balance = caller.balance(thread);
    balance.follow(endpoints, &thread.view.borrow());
    let endpoint = {
        let mut balancer = balance.balancer.borrow_mut();
        let endpoint = match caller.only {
            None => balancer.pick(at, &mut thread.rng.borrow_mut(), tried)?,
            Some(address) => {
                let is_meant = |e: &Rc<EndpointKey>| e.address == address && !tried.contains(e);
                Rc::clone(balancer.find(is_meant)?)
            }
        };
        balancer.started(&endpoint, at);
        endpoint
    };
    balance.used.set(true);
    Some(Started {
        balance,
        endpoint,
        at,
        told: Cell::new(false),
    })
}

fn known(view: &View, service: &ServiceName) -> Option<Arc<Vec<Endpoint>>> {
    view.endpoints.get(service).cloned()
}

/// The endpoints of a service that nobody called yet. Control is asked, and the call is held for the answer.
async fn ask(thread: &Rc<Thread>, service: &ServiceName) -> Result<Arc<Vec<Endpoint>>, Reason> {
    let live = thread.view.borrow().live;
    let asked = thread.wants.try_send(service.clone());
    if !live {
        return Err(Reason::EndpointsUnknown);
    }
    if asked.is_err() || thread.held.get() >= thread.settings.held_max {
        thread.reached(Limit::Held);
        return Err(Reason::TooManyHeld);
    }
    let _held = Held::new(thread);
    let mut reader = thread.view.clone();
    let answer = async {
        reader
            .wait_for(|view| view.is_settled(service))
            .await
            .map(|view| known(&view, service))
    };
    let answer = tokio::time::timeout(thread.settings.hold, answer).await;
    match answer {
        Ok(Ok(Some(endpoints))) => Ok(endpoints),
        Err(_) => {
            thread.metrics.limits.reached(Limit::Hold);
            Err(Reason::EndpointsUnknown)
        }
        _ => Err(Reason::EndpointsUnknown),
    }
}

/// A call that waits for its endpoints, counted while it does.
struct Held<'a>(&'a Thread);

impl<'a> Held<'a> {
    fn new(thread: &'a Thread) -> Self {
        thread.held.set(thread.held.get() + 1);
        thread.metrics.limits.held.inc();
        Self(thread)
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.0.held.set(self.0.held.get() - 1);
        self.0.metrics.limits.held.dec();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endpoint(port: u16) -> Rc<EndpointKey> {
        Rc::new(EndpointKey {
            address: IpAddr::from([192, 0, 2, 1]),
            mesh_port: port,
            account: Account::parse("shop/web").unwrap(),
            host: "0123456789abcdef0123456789abcdef".parse().unwrap(),
        })
    }

    #[test]
    fn a_drained_connection_blames_its_endpoint_only_when_the_next_one_is_drained_too() {
        let (one, other) = (endpoint(1), endpoint(2));
        let mut tries = Tries::default();
        assert_eq!(tries.reason(), Reason::NoEndpoints);
        assert!(!tries.come_back(), "there is none");
        assert!(!tries.note(&one, Reason::Draining));
        assert!(!tries.note(&other, Reason::PeerUnreachable));
        assert_eq!(tries.failed, [Rc::clone(&one), Rc::clone(&other)]);
        assert!(tries.come_back());
        assert_eq!(tries.failed, [Rc::clone(&other)]);
        assert!(!tries.are_used_up());
        assert!(tries.note(&one, Reason::Draining), "it goes away");
        assert_eq!(tries.failed, [other, one]);
        assert_eq!(tries.reason(), Reason::Draining);
        assert!(!tries.come_back(), "once");
        assert!(tries.are_used_up());
        assert_eq!(outcome_of(Reason::Draining), Outcome::Cancelled);
    }
}
