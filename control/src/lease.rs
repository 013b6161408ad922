//! The task that owns the leases: who hears of beats, counts down, and tells the catalogue of transitions.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use mesh_core::lease::{Cloned, Leases, SessionId, Settings, Transition};
use mesh_core::names::HostUid;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

use crate::audit::Actor;
use crate::catalogue::Catalogue;
use crate::catalogue::command::Command;
use crate::refusal::Refusal;
use crate::writer::Writer;

/// Events that wait: a beat of each of a thousand hosts. Who finds it full waits.
const QUEUE: usize = 1024;
/// How long to sleep when no lease runs.
const IDLE: Duration = Duration::from_secs(3600);

enum Event {
    Opened {
        uid: HostUid,
        boot_id: String,
        end: CancellationToken,
        answer: oneshot::Sender<Result<SessionId, Cloned>>,
    },
    Beat(HostUid, SessionId),
    Closed(HostUid, SessionId),
}

/// The way to the leases, for sessions.
#[derive(Clone, Debug)]
pub(crate) struct LeaseHandle {
    queue: mpsc::Sender<Event>,
    held: Arc<AtomicU64>,
}

pub(crate) struct LeaseLoop {
    events: mpsc::Receiver<Event>,
    held: Arc<AtomicU64>,
    writer: Writer,
    catalogue: watch::Receiver<Arc<Catalogue>>,
    /// Revocations up to here were carried out.
    seen: u64,
    leases: Leases,
    sessions: BTreeMap<SessionId, CancellationToken>,
    last_session: u64,
}

impl LeaseHandle {
    pub(crate) fn new(writer: &Writer) -> (Self, LeaseLoop) {
        let (queue, events) = mpsc::channel(QUEUE);
        let held = Arc::new(AtomicU64::new(0));
        let now = writer.now();
        let of = |live: bool| {
            let hosts = now.hosts.values().filter(move |h| h.live == live);
            hosts.map(|h| h.uid.clone())
        };
        let leases = Leases::new(Settings::default(), of(true), of(false), Instant::now());
        let lease_loop = LeaseLoop {
            events,
            held: Arc::clone(&held),
            catalogue: writer.watch(),
            seen: now.revision,
            writer: writer.clone(),
            leases,
            sessions: BTreeMap::new(),
            last_session: 0,
        };
        (Self { queue, held }, lease_loop)
    }

    /// A session begins; `end` is cancelled when another takes its place or the host is removed.
    pub(crate) async fn opened(
        &self,
        uid: &HostUid,
        boot_id: &str,
        end: CancellationToken,
    ) -> Result<SessionId, Refusal> {
        let (answer, answered) = oneshot::channel();
        let event = Event::Opened {
            uid: uid.clone(),
            boot_id: boot_id.to_owned(),
            end,
            answer,
        };
        // Both fail only when the task ended, and then the daemon is ending.
        let sent = self.queue.send(event).await;
        sent.map_err(|_| Refusal::internal())?;
        let opened = answered.await.map_err(|_| Refusal::internal())?;
        opened.map_err(|cloned| {
            Refusal::new(mesh_core::reason::Reason::HostCloned, cloned.to_string())
        })
    }

    pub(crate) async fn beat(&self, uid: &HostUid, session: SessionId) {
        let _ = self.queue.send(Event::Beat(uid.clone(), session)).await;
    }

    pub(crate) async fn closed(&self, uid: &HostUid, session: SessionId) {
        let _ = self.queue.send(Event::Closed(uid.clone(), session)).await;
    }

    /// How many silent hosts are not expired because they are too many.
    pub(crate) fn held(&self) -> u64 {
        self.held.load(Ordering::Relaxed)
    }
}

impl LeaseLoop {
    /// Runs until every [`LeaseHandle`] is dropped.
    pub(crate) async fn run(mut self) {
        loop {
            let wake = self.leases.poll_timeout();
            let wake = wake.unwrap_or_else(|| Instant::now() + IDLE);
            tokio::select! {
                event = self.events.recv() => match event {
                    Some(event) => self.handle(event),
                    None => return,
                },
                changed = self.catalogue.changed() => match changed {
                    Ok(()) => self.drop_removed(),
                    Err(_) => return,
                },
                () = tokio::time::sleep_until(wake.into()) => {
                    self.leases.handle_timeout(Instant::now());
                }
            }
            self.tell().await;
        }
    }

    fn handle(&mut self, event: Event) {
        let now = Instant::now();
        match event {
            Event::Opened {
                uid,
                boot_id,
                end,
                answer,
            } => {
                self.last_session += 1;
                let session = SessionId(self.last_session);
                let opened = self.leases.opened(&uid, session, &boot_id, now);
                let opened = opened.map(|replaced| {
                    if let Some(old) = replaced.and_then(|old| self.sessions.remove(&old)) {
                        old.cancel();
                    }
                    self.sessions.insert(session, end);
                    session
                });
                if let Err(cloned) = &opened {
                    log::warn!(host = uid.as_str(); "{cloned}");
                }
                if answer.send(opened).is_err() {
                    self.leases.closed(&uid, session);
                    self.sessions.remove(&session);
                }
            }
            Event::Beat(uid, session) => {
                // A session that was replaced was told to end already.
                self.leases.beat(&uid, session, now);
            }
            Event::Closed(uid, session) => {
                self.leases.closed(&uid, session);
                self.sessions.remove(&session);
            }
        }
    }

    fn drop_removed(&mut self) {
        let now = Arc::clone(&self.catalogue.borrow_and_update());
        let seen = std::mem::replace(&mut self.seen, now.revision);
        for gone in now.revoked_hosts_since(seen) {
            let session = self.leases.removed(&gone.uid);
            if let Some(end) = session.and_then(|s| self.sessions.remove(&s)) {
                end.cancel();
            }
        }
    }

    /// Tells the catalogue of all transitions at once: they share a commit.
    async fn tell(&mut self) {
        let mut asked = Vec::new();
        while let Some(transition) = self.leases.poll_transition() {
            match transition {
                Transition::Live(uid) => asked.push(self.ask(uid, true)),
                Transition::Stale(uid) => asked.push(self.ask(uid, false)),
                Transition::Held { count, fleet } => log::error!(
                    count, fleet;
                    "{count} of {fleet} hosts fell silent at once; none is called stale yet: is control cut off?"
                ),
                Transition::Released => log::warn!("no silent host is held any more"),
            }
        }
        self.held
            .store(self.leases.held().len() as u64, Ordering::Relaxed);
        futures_util::future::join_all(asked).await;
    }

    fn ask(&self, uid: HostUid, live: bool) -> impl Future<Output = ()> + use<> {
        let writer = self.writer.clone();
        async move {
            let host = uid.to_string();
            let command = Command::Lease { uid, live };
            // A host that was removed meanwhile has no lease.
            if let Err(refusal) = writer.ask(Actor::control(), command).await {
                log::debug!(host; "lease: {refusal}");
            }
        }
    }
}
