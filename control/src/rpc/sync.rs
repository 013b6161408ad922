//! `Sync`: the session of one agent, one task each. It hears the agent, keeps its lease, and sends what the
//! [`Outbox`] has whenever the transport has room.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use mesh_api::proto::from_agent::Message;
use mesh_api::{proto, sync};
use mesh_core::edge::EdgeReport;
use mesh_core::lease::{LEASE, SessionId};
use mesh_core::names::{HostUid, ServiceName};
use mesh_core::reason::Reason;
use mesh_core::revocation::Revocation;
use mesh_runtime::clock::rfc3339;
use mesh_runtime::tls::verify;
use rustls_pki_types::CertificateDer;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Status, Streaming};

use super::join::version;
use super::outbox::{Have, Outbox};
use super::{name, port, report};
use crate::audit::Actor;
use crate::auth::Peer;
use crate::catalogue::command::Command;
use crate::catalogue::objects::Host;
use crate::clock;
use crate::control::Control;
use crate::refusal::Refusal;

/// How long an agent may take for its first message.
const HELLO_MAX: Duration = Duration::from_secs(10);
/// How long an agent may take to make room for the reason of its session's end.
const FAREWELL_MAX: Duration = Duration::from_secs(1);
/// Messages between the session and the transport: one in the making, one under way. More would age there.
const READY: usize = 2;
/// Most services of a subscription.
const SUBSCRIBE_MAX: usize = 10_000;
/// Longest boot id, in bytes.
const BOOT_ID_MAX: usize = 64;

type Answers = mpsc::Sender<Result<proto::FromControl, Status>>;

struct Session {
    control: Arc<Control>,
    uid: HostUid,
    actor: Actor,
    id: SessionId,
    outbox: Outbox,
    /// It named a revocation that is none of ours.
    disbelieved: bool,
}

/// Starts the session's task and returns its answers.
pub(super) fn start(
    control: &Arc<Control>,
    host: &Host,
    peer: &Peer,
    inbound: Streaming<proto::FromAgent>,
) -> ReceiverStream<Result<proto::FromControl, Status>> {
    let (answers, stream) = mpsc::channel(READY);
    let actor = Actor {
        who: format!("host/{}", host.name),
        from: peer.from(),
    };
    let control = Arc::clone(control);
    let uid = host.uid.clone();
    let tasks = control.sessions.clone();
    tasks.spawn(async move {
        if let Err(refusal) = serve(&control, &uid, &actor, inbound, &answers).await {
            let host = actor.who.as_str();
            match refusal.reason {
                // Life's course: of no interest to an audit.
                Reason::Draining | Reason::Timeout => log::info!(host; "session ended: {refusal}"),
                _ => control.refused(&actor, "sync", uid.as_str(), &refusal),
            }
            // The agent may be gone, or read nothing.
            let _ = timeout(FAREWELL_MAX, answers.send(Err(refusal.into()))).await;
        }
    });
    ReceiverStream::new(stream)
}

async fn serve(
    control: &Arc<Control>,
    uid: &HostUid,
    actor: &Actor,
    mut inbound: Streaming<proto::FromAgent>,
    answers: &Answers,
) -> Result<(), Refusal> {
    let Some(hello) = hello(&mut inbound).await? else {
        return Ok(());
    };
    let end = CancellationToken::new();
    let id = control
        .leases
        .opened(uid, &hello.boot_id, end.clone())
        .await?;
    control.metrics.sessions.inc();
    let result = match greet(control, uid, actor, id, &hello).await {
        Ok(mut session) => session.run(inbound, answers, &end).await,
        Err(refusal) => Err(refusal),
    };
    control.metrics.sessions.dec();
    control.clocks.forget(uid);
    control.leases.closed(uid, id).await;
    if !control.writer.now().hosts.contains_key(uid) {
        control.edges.forget(uid);
        control.bypasses.forget(uid);
    }
    result
}

/// The first message. `None` when the agent went away before it.
async fn hello(inbound: &mut Streaming<proto::FromAgent>) -> Result<Option<proto::Hello>, Refusal> {
    let first = timeout(HELLO_MAX, inbound.message()).await;
    let first = first.map_err(|_| Refusal::new(Reason::Timeout, "no Hello came in time"))?;
    let Ok(Some(first)) = first else {
        return Ok(None);
    };
    match first.message {
        Some(Message::Hello(hello)) if hello.boot_id.len() <= BOOT_ID_MAX => Ok(Some(hello)),
        _ => Err(Refusal::invalid("the first message is not a Hello")),
    }
}

/// Takes over what the agent says of itself and makes its session.
async fn greet(
    control: &Arc<Control>,
    uid: &HostUid,
    actor: &Actor,
    id: SessionId,
    hello: &proto::Hello,
) -> Result<Session, Refusal> {
    let address = (!hello.address.is_empty()).then(|| hello.address.parse::<IpAddr>());
    let address = address
        .transpose()
        .map_err(|_| Refusal::invalid("the address of the Hello is no IP address"))?;
    let command = Command::Hello {
        uid: uid.clone(),
        version: version(&hello.version),
        address: address.map(|a| a.to_canonical()),
        mesh_port: port(hello.mesh_port)?,
    };
    control.writer.ask(actor.clone(), command).await?;
    let now = control.writer.now();
    let host = now.hosts.get(uid).ok_or(Reason::HostRevoked)?;
    log::info!(host = host.name.as_str(), version = host.version.as_str(); "session opened");
    let welcome = proto::Welcome {
        epoch: now.epoch,
        capabilities: Vec::new(),
        host_name: host.name.to_string(),
        mesh: Some(control.mesh_settings()),
        version: env!("CARGO_PKG_VERSION").to_owned(),
    };
    let same = |epoch: u64, revision: u64| (epoch == now.epoch).then_some(revision);
    let have = Have {
        index: same(hello.epoch, hello.index_revision),
        revocations: same(hello.revocations_epoch, hello.revocations_revision),
    };
    Ok(Session {
        control: Arc::clone(control),
        uid: uid.clone(),
        actor: actor.clone(),
        id,
        outbox: Outbox::new(uid.clone(), have, welcome, control.bundle.clone()),
        disbelieved: false,
    })
}

impl Session {
    async fn run(
        &mut self,
        mut inbound: Streaming<proto::FromAgent>,
        answers: &Answers,
        end: &CancellationToken,
    ) -> Result<(), Refusal> {
        let mut catalogue = self.control.writer.watch();
        let mut news = true;
        let mut silent_at = Instant::now() + LEASE;
        loop {
            tokio::select! {
                message = inbound.message() => {
                    let Ok(Some(message)) = message else {
                        return Ok(());
                    };
                    silent_at = Instant::now() + LEASE;
                    self.control.leases.beat(&self.uid, self.id).await;
                    self.handle(message).await?;
                    news = true;
                }
                changed = catalogue.changed() => {
                    let gone = !catalogue.borrow_and_update().hosts.contains_key(&self.uid);
                    if changed.is_err() || gone {
                        return Err(self.ended());
                    }
                    news = true;
                }
                room = answers.reserve(), if news => {
                    let Ok(room) = room else {
                        return Ok(());
                    };
                    let now = self.control.writer.now();
                    match self.outbox.next(&now, |revoked| self.control.signed(revoked)) {
                        Some(message) => room.send(Ok(message)),
                        None => news = false,
                    }
                }
                () = end.cancelled() => return Err(self.ended()),
                () = self.control.stopping.cancelled() => {
                    return Err(Refusal::new(Reason::Draining, "control is stopping; connect again"));
                }
                () = tokio::time::sleep_until(silent_at) => {
                    return Err(Refusal::new(Reason::Timeout, "the agent was silent for a lease"));
                }
            }
        }
    }

    /// Why control ends the session.
    fn ended(&self) -> Refusal {
        if !self.control.writer.now().hosts.contains_key(&self.uid) {
            return Reason::HostRevoked.into();
        }
        Refusal::new(
            Reason::Draining,
            "a newer session of this host took the place of this one",
        )
    }

    async fn handle(&mut self, message: proto::FromAgent) -> Result<(), Refusal> {
        match message.message {
            Some(Message::Hello(_)) => Err(Refusal::invalid("a second Hello in one session")),
            Some(Message::Beat(beat)) => {
                let now_ms = clock::now_ms();
                self.control.clocks.heard(&self.uid, beat.time_ms, now_ms);
                self.outbox.beat(beat.sequence, now_ms);
                Ok(())
            }
            Some(Message::Report(report)) => {
                let read = report::read(&report)?;
                let command = Command::Report {
                    uid: self.uid.clone(),
                    workloads: read.workloads,
                };
                self.control.writer.ask(self.actor.clone(), command).await?;
                if let Some(bypass) = &read.bypass {
                    self.bypassed(bypass);
                }
                self.outbox.reported(report.generation, read.problems);
                Ok(())
            }
            Some(Message::Subscribe(subscribe)) => self.subscribe(&subscribe),
            Some(Message::Ack(ack)) => self.acked(&ack).await,
            Some(Message::Revocations(known)) => self.merge(&known).await,
            Some(Message::Edges(edges)) => self.edges(&edges),
            // A newer agent may say more.
            None => Ok(()),
        }
    }

    /// Root of the host opened it to plaintext, or closed it.
    fn bypassed(&self, bypass: &proto::Bypass) {
        if self.control.bypasses.heard(&self.uid, bypass) {
            let [from, to] = [bypass.begun_ms, bypass.until_ms].map(|ms| rfc3339(ms / 1000));
            let (by, why) = (&bypass.by, &bypass.why);
            let said = format!("plaintext from {from} to {to}, by {by} ({why})");
            self.control.audited(&self.actor, "bypass", &said);
            log::warn!(host:% = self.actor.who; "a host was opened to {said}");
        }
    }

    /// What the agent has on disk and in use by now. That of the bundle is kept: roots are changed by it.
    async fn acked(&self, ack: &proto::Ack) -> Result<(), Refusal> {
        let (bundle, now) = (ack.bundle_number, self.control.writer.now());
        if self.control.bundle.number < bundle {
            return Err(Refusal::invalid(format!(
                "the acknowledged bundle {bundle} was never sent"
            )));
        }
        self.control.acks.note(&self.uid, *ack);
        if now.hosts.get(&self.uid).is_some_and(|h| h.bundle == bundle) {
            return Ok(());
        }
        let uid = self.uid.clone();
        let command = Command::Acked { uid, bundle };
        self.control.writer.ask(self.actor.clone(), command).await?;
        Ok(())
    }

    /// Takes over revocations of an earlier epoch. Only what an issuer signed that this mesh's root signed is believed.
    async fn merge(&mut self, known: &proto::Revocations) -> Result<(), Refusal> {
        if self.disbelieved {
            return Ok(());
        }
        let known = sync::revocations(known).map_err(|e| Refusal::invalid(e.to_string()))?;
        let now = self.control.writer.now();
        let new = known.into_iter();
        let new = new
            .filter(|one| !now.revoked.contains_key(&one.subject) && !one.is_over(clock::now_s()));
        let new: Vec<Revocation> = new.collect();
        let domain = &self.control.settings.trust_domain;
        // Each of the few is looked at once.
        let issuers: BTreeSet<&Arc<[u8]>> = new.iter().map(|one| &one.issuer).collect();
        let issuers = issuers.into_iter();
        let ours: BTreeSet<_> = issuers.filter(|i| self.control.ca.has_issued(i)).collect();
        let forged = |one: &&Revocation| {
            let statement = one.subject.statement(domain, one.at_s);
            let issuer = CertificateDer::from(&*one.issuer);
            !ours.contains(&one.issuer)
                || !verify::has_signed(&issuer, statement.as_bytes(), &one.signature)
        };
        if let Some(forged) = new.iter().find(forged) {
            // The root may be another one now, so the session goes on; it is not asked again.
            self.disbelieved = true;
            let message = format!(
                "a revocation of {} is not signed by an issuer under this mesh's root; nothing of what this agent knows is \
                 taken over",
                now.host_label(&forged.subject.host)
            );
            let refusal = Refusal::new(Reason::Invalid, message);
            self.control.refused(
                &self.actor,
                "merge revocations",
                self.uid.as_str(),
                &refusal,
            );
            return Ok(());
        }
        if !new.is_empty() {
            let command = Command::MergeRevocations(new);
            self.control.writer.ask(self.actor.clone(), command).await?;
        }
        Ok(())
    }

    /// Of callers a host tells only what concerns services that it reports itself.
    fn edges(&mut self, edges: &proto::Edges) -> Result<(), Refusal> {
        let mut report =
            EdgeReport::try_from(edges).map_err(|error| Refusal::invalid(error.to_string()))?;
        let now = self.control.writer.now();
        let Some(host) = now.hosts.get(&self.uid) else {
            return Err(Reason::HostRevoked.into());
        };
        report.edges.retain(|(key, _)| host.serves(&key.service));
        report.watched.retain(|port| host.serves(&port.service));
        self.control.edges.put(&self.uid, report);
        Ok(())
    }

    fn subscribe(&mut self, subscribe: &proto::Subscribe) -> Result<(), Refusal> {
        let count = subscribe.services.len();
        if SUBSCRIBE_MAX < count {
            return Err(Refusal::invalid(format!(
                "a subscription to {count} services; at most {SUBSCRIBE_MAX} may be"
            )));
        }
        let wanted = subscribe.services.iter().map(|service| {
            Ok(ServiceName {
                namespace: name(&service.namespace)?,
                name: name(&service.name)?,
            })
        });
        let wanted = wanted.collect::<Result<Vec<_>, Refusal>>()?;
        self.outbox.subscribe(wanted);
        Ok(())
    }
}
