//! One call of a service: its endpoints are known or asked for, one is picked, its agent dialled, a stream opened.

use std::cell::Cell;
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
use crate::view::View;

/// Endpoints that one call tries before it gives up.
pub(crate) const TRIES_MAX: usize = 3;

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
pub(crate) struct Balancers(BTreeMap<ServiceName, Balance>);

#[derive(Debug)]
struct Balance {
    /// What the balancer was made from: replaced as a whole when control says so.
    endpoints: Arc<Vec<Endpoint>>,
    balancer: Balancer<Rc<EndpointKey>>,
    /// Since the last sweep.
    used: bool,
}

impl Balancers {
    fn of(
        &mut self,
        service: &ServiceName,
        endpoints: &Arc<Vec<Endpoint>>,
        view: &View,
    ) -> &mut Balance {
        let fresh = || Balance {
            endpoints: Arc::default(),
            balancer: Balancer::new(),
            used: false,
        };
        let balance = self.0.entry(service.clone()).or_insert_with(fresh);
        if !Arc::ptr_eq(&balance.endpoints, endpoints) {
            let here = endpoints.iter().filter(|e| e.network == view.host.network);
            balance
                .balancer
                .update(here.map(|e| (Rc::new(EndpointKey::of(e)), e.health)));
            balance.endpoints = Arc::clone(endpoints);
        }
        balance
    }

    /// Forgets services that the picture no longer has, and says which of the others are in use: what nobody
    /// uses for a day is no longer subscribed.
    pub(crate) fn sweep(&mut self, view: &View, wants: &mpsc::Sender<ServiceName>) {
        self.0
            .retain(|service, _| view.endpoints.contains_key(service));
        for (service, balance) in &mut self.0 {
            // When the channel is full, the next sweep says it.
            if balance.used && wants.try_send(service.clone()).is_ok() {
                balance.used = false;
            }
        }
    }
}

/// Who calls what.
#[derive(Debug)]
pub(crate) struct Caller {
    /// Its leaf is looked up for each call: it is renewed while connections live.
    pub(crate) id: SpiffeId,
    pub(crate) service: Arc<Service>,
    pub(crate) port: u16,
}

/// An open stream to an endpoint. It tells the balancer how the call went; dropped untold, it was cancelled.
#[derive(Debug)]
pub(crate) struct Call {
    pub(crate) stream: MuxStream,
    pub(crate) endpoint: Rc<EndpointKey>,
    started: Started,
}

#[derive(Debug)]
struct Started {
    thread: Rc<Thread>,
    service: ServiceName,
    endpoint: Rc<EndpointKey>,
    at: Instant,
    told: Cell<bool>,
}

impl Started {
    fn tell(&self, outcome: Outcome) {
        if !self.told.replace(true)
            && let Some(balance) = self.thread.balancers.borrow_mut().0.get_mut(&self.service)
        {
            balance
                .balancer
                .finished(&self.endpoint, Instant::now(), outcome);
        }
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        self.tell(Outcome::Cancelled);
    }
}

impl Call {
    /// The endpoint answered. Returns the seconds since the call began.
    pub(crate) fn answered(&self) -> f64 {
        let latency = self.started.at.elapsed();
        self.started.tell(Outcome::Success { latency });
        latency.as_secs_f64()
    }

    /// The endpoint failed the call for `reason`; a refusal by policy is an answer.
    pub(crate) fn failed(&self, reason: Reason) {
        self.started.tell(outcome_of(reason));
    }
}

/// What a failure says of the endpoint: the caller's own faults, and a policy at work, say nothing.
fn outcome_of(reason: Reason) -> Outcome {
    match reason.fault() {
        Fault::Upstream => Outcome::Failure,
        _ if reason == Reason::Overloaded => Outcome::Failure,
        _ => Outcome::Cancelled,
    }
}

/// Opens a stream to an endpoint other than those in `tried`, and adds each that fails.
///
/// # Errors
/// The reason of the last failure; nothing reached an app.
pub(crate) async fn open(
    thread: &Rc<Thread>,
    caller: &Caller,
    kind: StreamKind,
    tried: &mut Vec<Rc<EndpointKey>>,
) -> Result<Call, Reason> {
    let service = &caller.service.name;
    if thread.metrics.limits.budget.is_spent() {
        thread.reached(Limit::Buffers);
        return Err(Reason::Overloaded);
    }
    let endpoints = endpoints(thread, service).await?;
    let mut header = Vec::with_capacity(HEADER_MAX.min(128));
    Header {
        kind,
        service: service.name.clone(),
        port: caller.port,
    }
    .encode(&mut header);
    let mut last = Reason::NoEndpoints;
    while tried.len() < TRIES_MAX {
        let Some(started) = pick(thread, service, &endpoints, tried) else {
            break;
        };
        let endpoint = Rc::clone(&started.endpoint);
        let leaf = thread.view.borrow().leaf(&caller.id.identity).cloned()?;
        let opened = match thread.peers.connection(thread, &leaf, &endpoint).await {
            Ok(mux) => tokio::time::timeout(thread.settings.connect, mux.open(&header))
                .await
                .unwrap_or_else(|_| {
                    thread.metrics.limits.reached(Limit::Streams);
                    Err(Reason::Overloaded)
                }),
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
                });
            }
            Err(reason) => {
                started.tell(outcome_of(reason));
                tried.push(endpoint);
                last = reason;
                if reason == Reason::NoIdentity {
                    break;
                }
            }
        }
    }
    Err(last)
}

fn pick(
    thread: &Rc<Thread>,
    service: &ServiceName,
    endpoints: &Arc<Vec<Endpoint>>,
    tried: &[Rc<EndpointKey>],
) -> Option<Started> {
    let now = Instant::now();
    let mut balancers = thread.balancers.borrow_mut();
    let balance = balancers.of(service, endpoints, &thread.view.borrow());
    let endpoint = balance
        .balancer
        .pick(now, &mut thread.rng.borrow_mut(), tried)?;
    balance.balancer.started(&endpoint, now);
    balance.used = true;
    Some(Started {
        thread: Rc::clone(thread),
        service: service.clone(),
        endpoint,
        at: now,
        told: Cell::new(false),
    })
}

/// The endpoints of a service. At first use control is asked, and the call is held for the answer.
async fn endpoints(
    thread: &Rc<Thread>,
    service: &ServiceName,
) -> Result<Arc<Vec<Endpoint>>, Reason> {
    let known = |view: &View| view.endpoints.get(service).cloned();
    let view = thread.view();
    if let Some(endpoints) = known(&view) {
        return Ok(endpoints);
    }
    let asked = thread.wants.try_send(service.clone());
    if !view.live {
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
            .wait_for(|view| view.endpoints.contains_key(service))
            .await
            .map(|view| known(&view))
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
