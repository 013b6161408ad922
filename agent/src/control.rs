//! The session with control: a shell of sockets and clocks around `mesh_core::session`, which decides.
//!
//! The life of a change: it comes by the Sync stream (`control/dial.rs`), is read and checked (`mesh_api::sync`), is
//! shown in the view (`control/mirror.rs`), is written to disk (`control/keep.rs`) and then acknowledged. The other way,
//! workloads and their health become a report (`control/report.rs`), and services that programs want to reach become a
//! subscription.

mod dial;
mod followers;
mod heed;
mod keep;
mod mirror;
mod rejoin;
mod report;
mod status;

use std::convert::Infallible;
use std::hash::{BuildHasher as _, Hasher as _, RandomState};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use bytes::Bytes;
use mesh_api::proto::from_agent::Message as Ours;
use mesh_api::proto::from_control::Message as Theirs;
use mesh_api::sync::{IndexChange, MeshSettings, SyncError};
use mesh_api::{proto, sync};
use mesh_core::edge::EdgeReport;
use mesh_core::names::ServiceName;
use mesh_core::session::{Attempt, Command, Installed, Lost, Outgoing, Phase, Session};
use mesh_runtime::clock;
use mesh_runtime::tls::client_config;
use mesh_runtime::tls::trust::SharedTrust;
use mesh_runtime::tls::verify::{Accept, Verifier};
use rustls::sign::CertifiedKey;
use tokio::sync::{mpsc, watch};
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;

pub(crate) use dial::{ALPN_H2, DialError, Ended, channel, dial, own_address, reason_of};
use dial::{Connection, Event};
use followers::Follower;
use heed::HEED_EVERY;
use keep::Persisted;
use mirror::Mirror;
pub(crate) use status::SessionStatus;

use crate::handing::Handing;
use crate::health::Verdicts;
use crate::leaves::now_ms;
use crate::owners::OwnerStatus;
use crate::state::{Kept, Membership, Stamp, State};
use crate::view::ViewWriter;
use crate::workloads::WorkloadSet;

/// Events of a connection that wait: control sends far slower than they are taken.
const EVENTS_MAX: usize = 64;
/// How often the moment of the last contact is kept, and what nobody uses is given up.
const TIDY_EVERY: Duration = Duration::from_secs(300);
/// A difference of clocks at which certificates may be judged wrongly: they are backdated by some minutes.
const SKEW_MAX_MS: u64 = 60_000;

/// What the session works with.
#[derive(Debug)]
pub(crate) struct Links {
    pub(crate) state: State,
    pub(crate) view: ViewWriter,
    pub(crate) trust: SharedTrust,
    pub(crate) bundle: proto::TrustBundle,
    pub(crate) wants: mpsc::Receiver<ServiceName>,
    pub(crate) sets: watch::Receiver<Arc<WorkloadSet>>,
    pub(crate) verdicts: watch::Receiver<Arc<Verdicts>>,
    /// Who calls what this host serves; not replaced oftener than control wants to hear it.
    pub(crate) edges: watch::Receiver<Arc<EdgeReport>>,
    pub(crate) owners: watch::Receiver<Arc<OwnerStatus>>,
    pub(crate) credential: watch::Receiver<Option<Arc<CertifiedKey>>>,
    /// A new credential of this host, for the owner of the certificates.
    pub(crate) rejoined: mpsc::Sender<Vec<Bytes>>,
    /// The way to control for renewals, while the session is live.
    pub(crate) channel: watch::Sender<Option<Channel>>,
    /// Grows when control has judged a report.
    pub(crate) judged: watch::Sender<u64>,
    pub(crate) status: watch::Sender<Arc<SessionStatus>>,
    pub(crate) mesh_port: u16,
    /// Another worker may take over: only one talks to control and writes.
    pub(crate) handing: Handing,
}

/// The owner of the session.
#[derive(Debug)]
pub(crate) struct Shell {
    links: Links,
    membership: Membership,
    boot_id: String,
    session: Session,
    mirror: Mirror,
    connection: Option<Connection>,
    /// Of the connection, whichever it is; a connection gets the sending end.
    events: mpsc::Receiver<(Attempt, Event)>,
    events_by: mpsc::Sender<(Attempt, Event)>,
    /// The update that was handed to the session and not yet installed.
    pending: Option<IndexChange>,
    /// Without its generation.
    reported: proto::Report,
    generation: u64,
    status: SessionStatus,
    skewed: bool,
    /// What was there of another worker's files at the last look.
    heeded: [Option<Stamp>; Kept::ALL.len()],
    /// Of a worker that another has taken over from.
    follower: Option<Follower>,
    /// The newest bundle that control was told to be in use.
    acknowledged: u64,
    /// Such a worker does not use yet what this one has on disk.
    followed: bool,
    /// Of what could not be used, and was said.
    unheeded: [Option<Stamp>; Kept::ALL.len()],
}

impl Shell {
    /// Takes what is on disk into use; nothing is dialled yet.
    pub(crate) fn new(links: Links, membership: Membership) -> anyhow::Result<Self> {
        let boot_id = clock::boot_id().context("which boot this is can not be told")?;
        // What is written from here on may not be in what is read.
        let heeded = links.state.stamps();
        let mirror = Mirror::load(
            &links.state,
            &membership.host,
            links.view.clone(),
            Arc::clone(&links.trust),
            links.bundle.clone(),
        );
        let (events_by, events) = mpsc::channel(EVENTS_MAX);
        let seed = RandomState::new().build_hasher().finish();
        let installed = mirror.installed();
        let addresses = membership.control.len();
        let shell = Self {
            session: Session::new(addresses, installed, seed, Instant::now()),
            status: SessionStatus {
                heard_ms: mirror.known_until_ms(),
                installed,
                ..SessionStatus::default()
            },
            boot_id,
            mirror,
            connection: None,
            events,
            events_by,
            pending: None,
            reported: proto::Report::default(),
            generation: 0,
            skewed: false,
            heeded,
            follower: None,
            acknowledged: links.trust.load().number(),
            followed: true,
            unheeded: Default::default(),
            links,
            membership,
        };
        shell
            .links
            .status
            .send_replace(Arc::new(shell.status.clone()));
        if let Some(installed) = installed {
            log::info!(
                revision = installed.revision, known_until = clock::rfc3339(shell.status.heard_ms / 1000);
                "serving from the last good state on disk until control is reached"
            );
        }
        Ok(shell)
    }

    /// Runs until `stop`, and keeps the last state then.
    pub(crate) async fn run(mut self, stop: CancellationToken) -> anyhow::Result<()> {
        let (persisted_by, persisted) = watch::channel(Persisted::default());
        let keep_stop = CancellationToken::new();
        let mut keeping = tokio::spawn(keep::run(
            self.links.state.clone(),
            self.mirror.wanted(),
            persisted_by,
            keep_stop.clone(),
        ));
        let handing = self.links.handing.clone();
        let mut handed = false;
        tokio::select! {
            // First: those whom we follow end with us, and that would look like a failure.
            biased;
            () = stop.cancelled() => (),
            () = handing.begun() => handed = true,
            ended = &mut keeping => {
                ended??;
                anyhow::bail!("the task that keeps control's state ended");
            }
            outcome = self.follow(persisted) => return outcome.map(|never| match never {}),
        }
        if self.session.is_live() {
            self.mirror.contact(now_ms());
        }
        keep_stop.cancel();
        if !handed {
            return keeping.await?;
        }
        drop(handing);
        self.hand_over(keeping).await?;
        self.heed(stop).await;
        Ok(())
    }

    async fn follow(
        &mut self,
        mut persisted: watch::Receiver<Persisted>,
    ) -> anyhow::Result<Infallible> {
        let mut tidy = tokio::time::interval(TIDY_EVERY);
        let mut look = tokio::time::interval(HEED_EVERY);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            self.obey(&persisted);
            self.publish();
            let timeout = tokio::time::Instant::from_std(self.session.poll_timeout());
            tokio::select! {
                Some((attempt, event)) = self.events.recv() => self.handle(attempt, event),
                Some(service) = self.links.wants.recv() => {
                    if self.mirror.want(&service, now_ms()) {
                        self.session.handle_subscriptions_changed();
                    }
                }
                changed = self.links.sets.changed() => {
                    changed.context("the owner of the workloads is gone")?;
                    self.report_changed();
                }
                changed = self.links.verdicts.changed() => {
                    changed.context("the owner of the health checks is gone")?;
                    self.report_changed();
                }
                changed = self.links.owners.changed() => {
                    changed.context("the owner of the owners is gone")?;
                    self.report_changed();
                }
                changed = self.links.edges.changed() => {
                    changed.context("the owner of the edges is gone")?;
                    self.session.handle_edges_changed();
                }
                changed = persisted.changed() => {
                    changed.context("the task that keeps control's state is gone")?;
                    self.session.handle_applied();
                }
                _ = tidy.tick() => self.tidy(),
                _ = look.tick(), if !self.followed => {
                    if persisted.borrow().bundle_number <= self.oldest_bundle() {
                        self.session.handle_applied();
                    }
                }
                () = tokio::time::sleep_until(timeout) => self.session.handle_timeout(Instant::now()),
            }
        }
    }

    fn handle(&mut self, attempt: Attempt, event: Event) {
        let now = Instant::now();
        if self
            .connection
            .as_ref()
            .is_none_or(|c| c.attempt != attempt)
        {
            return;
        }
        match event {
            Event::Connected {
                outgoing,
                channel,
                from,
            } => {
                self.moved(from);
                if let Some(connection) = &mut self.connection {
                    connection.outgoing = Some(outgoing);
                    connection.channel = Some(channel);
                }
                self.session.handle_connected(attempt, now);
            }
            Event::Message(message) => {
                if let Err(error) = self.message(attempt, *message, now) {
                    self.failed(Ended {
                        why: Lost::Protocol,
                        reason: None,
                        text: format!("control sent what can not be used: {error:#}"),
                    });
                    self.session.handle_lost(attempt, Lost::Protocol, now);
                }
            }
            Event::Rejoined(chain) => {
                log::info!("this host's credential had ended; control gave it another");
                // Full: the last one was not even taken yet.
                let _ = self.links.rejoined.try_send(chain);
                self.session.handle_lost(attempt, Lost::Broken, now);
            }
            Event::Lost(ended) => {
                let why = ended.why;
                self.failed(ended);
                self.session.handle_lost(attempt, why, now);
            }
        }
    }

    /// Takes a message. An error means that nothing of it was used.
    fn message(&mut self, attempt: Attempt, message: Theirs, now: Instant) -> anyhow::Result<()> {
        match message {
            Theirs::Welcome(welcome) => {
                self.session.handle_welcome(attempt, welcome.epoch, now);
                if self.session.is_live() {
                    self.mirror.begin_epoch(welcome.epoch);
                    self.welcomed(&welcome)?;
                }
                return Ok(());
            }
            Theirs::Beat(beat) => {
                self.session.handle_beat(attempt, now);
                self.compare_clocks(beat.time_ms);
                return Ok(());
            }
            Theirs::Index(update) => {
                let change = self.mirror.read_index(&update)?;
                let (revision, snapshot) = (change.revision, change.snapshot);
                self.pending = Some(change);
                self.session.handle_index(attempt, revision, snapshot, now);
                return Ok(());
            }
            other => {
                self.session.handle_other(attempt, now);
                if self.session.is_live() {
                    self.apply(other)?;
                }
            }
        }
        Ok(())
    }

    fn apply(&mut self, message: Theirs) -> anyhow::Result<()> {
        let used = match message {
            Theirs::Endpoints(update) => self.mirror.endpoints(update, now_ms())?,
            Theirs::Policies(update) => self.mirror.policies(update, now_ms())?,
            Theirs::Bundle(bundle) => self.mirror.bundle(bundle)?,
            Theirs::Revocations(update) => {
                if self.mirror.revocations(&update, now_ms())? {
                    log::warn!(
                        "control has forgotten revocations that this host knows; it is told"
                    );
                    self.session.handle_revocations_forgotten();
                }
                true
            }
            Theirs::ReportStatus(status) => {
                self.report_status(&status)?;
                true
            }
            Theirs::Welcome(_) | Theirs::Beat(_) | Theirs::Index(_) => true,
        };
        if !used {
            log::debug!(
                "control sent an older revision, or what was not asked for; it is left out"
            );
        }
        Ok(())
    }

    fn welcomed(&mut self, welcome: &proto::Welcome) -> Result<(), SyncError> {
        self.status.control_version = sync::printable(&welcome.version);
        self.status.last_error = None;
        log::info!(
            control = self.status.address.as_str(), epoch = welcome.epoch;
            "the session with control is live"
        );
        self.session.handle_edges_changed();
        let Some(mesh) = &welcome.mesh else {
            return Ok(());
        };
        let mesh = MeshSettings::try_from(mesh)?;
        let host = &mut self.membership.host;
        if mesh.vips != host.vips || mesh.dns_suffix != host.dns_suffix {
            log::warn!(
                "the mesh's address ranges or DNS suffix are others now; restart the agent to use them"
            );
            host.vips = mesh.vips;
            host.dns_suffix = mesh.dns_suffix;
            if let Err(error) = self.links.state.set_membership(&self.membership) {
                log::warn!(error:% = error; "the mesh's new settings can not be kept");
            }
        }
        Ok(())
    }

    fn compare_clocks(&mut self, control_ms: u64) {
        let now = now_ms();
        let skew = now.abs_diff(control_ms);
        let offset = i64::try_from(skew).unwrap_or(i64::MAX);
        self.status.clock_offset_ms = Some(if now < control_ms { -offset } else { offset });
        let skewed = skew > SKEW_MAX_MS;
        if skewed && !self.skewed {
            log::warn!(skew_s = skew / 1000; "this host's clock and control's differ; certificates may be refused");
        }
        self.skewed = skewed;
    }

    /// Does what the session commands.
    fn obey(&mut self, persisted: &watch::Receiver<Persisted>) {
        while let Some(command) = self.session.poll_command() {
            match command {
                Command::Connect { attempt, address } => self.connect(attempt, address),
                Command::Disconnect { attempt, why } => self.disconnect(attempt, why),
                Command::Send(what) => self.send(what, *persisted.borrow()),
                Command::NewEpoch { epoch } => {
                    log::warn!(epoch = epoch; "control began a new epoch: everything is sent anew");
                }
                Command::Install { installed, .. } => self.install(installed),
                Command::Ignore { offered } => {
                    self.pending = None;
                    log::warn!(revision = offered.revision; "control sent an index that is not newer; it is left out");
                }
            }
        }
    }

    fn install(&mut self, installed: Installed) {
        let Some(change) = self.pending.take() else {
            return;
        };
        match self.mirror.install_index(change, installed, now_ms()) {
            Ok(true) => self.session.handle_subscriptions_changed(),
            Ok(false) => (),
            Err(error) => {
                self.failed(Ended {
                    why: Lost::Protocol,
                    reason: None,
                    text: format!("control sent an index that can not be used: {error}"),
                });
                self.session.handle_installed_lost(Instant::now());
            }
        }
    }

    fn connect(&mut self, attempt: Attempt, address: usize) {
        let address = self.membership.control.get(address).cloned();
        self.status.address = address.unwrap_or_default();
        let verifier = Verifier::new(
            Arc::clone(&self.links.trust),
            Accept::Control(self.membership.host.trust_domain.clone()),
        );
        let credential = self.links.credential.borrow_and_update().clone();
        if credential.as_deref().is_none_or(rejoin::is_over)
            && let Ok(Some(key)) = self.links.state.agent_key()
        {
            let who = (self.membership.host.uid.clone(), key);
            let address = self.status.address.clone();
            let events = self.events_by.clone();
            let task = tokio::spawn(rejoin::run(attempt, address, verifier, who, events));
            self.connection = Some(Connection::of(attempt, task.abort_handle()));
            return;
        }
        let tls = match client_config(credential, verifier, &[ALPN_H2]) {
            Ok(tls) => Arc::new(tls),
            Err(error) => {
                self.failed(Ended {
                    why: Lost::Broken,
                    reason: None,
                    text: format!("TLS can not be set up: {error}"),
                });
                self.session
                    .handle_lost(attempt, Lost::Broken, Instant::now());
                return;
            }
        };
        let address = self.status.address.clone();
        let task = tokio::spawn(dial::run(attempt, address, tls, self.events_by.clone()));
        self.connection = Some(Connection::of(attempt, task.abort_handle()));
    }

    fn disconnect(&mut self, attempt: Attempt, why: Lost) {
        if self
            .connection
            .as_ref()
            .is_none_or(|c| c.attempt != attempt)
        {
            return;
        }
        self.connection = None;
        if why == Lost::Silent {
            self.failed(Ended {
                why,
                reason: None,
                text: "control was silent".to_owned(),
            });
        }
    }

    /// Remembers why there is no session, and says so once for each cause.
    fn failed(&mut self, ended: Ended) {
        if self.status.last_error.as_ref() != Some(&ended) {
            log::warn!(
                control = self.status.address.as_str(), reason = ended.reason.as_deref().unwrap_or("");
                "no session with control: {}; what is in use stays in use, and it is tried again", ended.text
            );
        }
        self.status.last_error = Some(ended);
        // The first that is dialled in vain: until then calls wait for the answer.
        if !self.session.is_live() && self.links.view.now().live {
            self.links.view.change(|view| {
                view.live = false;
                view.unreached = true;
            });
        }
    }

    fn send(&mut self, what: Outgoing, persisted: Persisted) {
        let message = match what {
            Outgoing::Hello(installed) => Ours::Hello(self.hello(installed)),
            Outgoing::Beat { sequence } => Ours::Beat(proto::Beat {
                sequence,
                time_ms: now_ms(),
            }),
            Outgoing::Report => Ours::Report(self.report()),
            Outgoing::Subscribe => Ours::Subscribe(self.mirror.subscribe()),
            Outgoing::Edges => Ours::Edges((&**self.links.edges.borrow_and_update()).into()),
            Outgoing::Ack => Ours::Ack(self.ack(persisted)),
            Outgoing::Revocations => match self.mirror.take_forgotten() {
                Some(part) => {
                    if part.more {
                        self.session.handle_revocations_forgotten();
                    }
                    Ours::Revocations(part)
                }
                None => return,
            },
        };
        let Some(connection) = &self.connection else {
            return;
        };
        let message = proto::FromAgent {
            message: Some(message),
        };
        let outgoing = connection.outgoing.as_ref();
        if outgoing.is_none_or(|o| o.try_send(message).is_err()) {
            // Full: control takes nothing. Closed: the connection's own end is on its way here.
            let attempt = connection.attempt;
            self.session
                .handle_lost(attempt, Lost::Broken, Instant::now());
        }
    }

    fn tidy(&mut self) {
        if !self.session.is_live() {
            return;
        }
        let now = now_ms();
        self.mirror.contact(now);
        if self.mirror.forget_unused(now) {
            self.session.handle_subscriptions_changed();
        }
    }

    /// Shows where the session stands.
    fn publish(&mut self) {
        let live = self.session.is_live();
        let was_live = self.status.phase == Phase::Live;
        let now = now_ms();
        if live || was_live {
            self.status.heard_ms = now;
        }
        if live != was_live {
            self.mirror.contact(now);
            self.links.view.change(|view| {
                view.live = live;
                view.unreached &= !live;
            });
            let channel = self.connection.as_ref().and_then(|c| c.channel.clone());
            self.links.channel.send_replace(channel.filter(|_| live));
        }
        self.status.phase = self.session.phase();
        self.status.installed = self.session.installed();
        self.links.status.send_if_modified(|shown| {
            let changed = **shown != self.status;
            if changed {
                *shown = Arc::new(self.status.clone());
            }
            changed
        });
    }
}
