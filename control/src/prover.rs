//! Proves that hosts are where they say: opens TLS to the claimed address as `spiffe://<trust domain>/control`,
//! asks for a workload that the host reported, and requires a leaf that was given to that host. Until then
//! nothing of the host is listed.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use mesh_core::identity::{Identity, SpiffeId};
use mesh_core::names::HostUid;
use mesh_core::reason::Reason;
use mesh_runtime::tls::trust::SharedTrust;
use mesh_runtime::tls::verify::{Accept, Verifier, handshake_reason};
use mesh_runtime::tls::{self, ALPN_MESH, leaf};
use rustls_pki_types::ServerName;
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};
use tokio_rustls::TlsConnector;

use crate::audit::Actor;
use crate::catalogue::Catalogue;
use crate::catalogue::command::Command;
use crate::catalogue::objects::Host;
use crate::control::Control;
use crate::server::Own;

/// Hosts that are tried at once.
const ATTEMPTS_MAX: usize = 32;
/// How long one may take to accept and shake hands.
const ATTEMPT_MAX: Duration = Duration::from_secs(5);
/// Waits between the attempts at one host: the first is mostly lost to an agent that is about to be ready.
const RETRY_MIN: Duration = Duration::from_millis(500);
const RETRY_MAX: Duration = Duration::from_secs(30);
/// Failures at a place before the host is told.
const FAILURES_TOLD: u32 = 2;
/// How long to sleep when nothing is to be tried.
const IDLE: Duration = Duration::from_secs(3600);

pub(crate) struct Prover {
    control: Arc<Control>,
    own: Arc<Own>,
    trust: SharedTrust,
    /// Without proof: where control can not reach the hosts.
    trusting: bool,
    waiting: BTreeMap<HostUid, Turn>,
    running: BTreeSet<HostUid>,
    attempts: JoinSet<(HostUid, Result<(), Reason>)>,
}

/// When a host is tried next.
#[derive(Clone, Copy, Debug)]
struct Turn {
    at: Instant,
    /// The wait after the next failure.
    retry: Duration,
    failures: u32,
}

impl Prover {
    pub(crate) fn new(
        control: Arc<Control>,
        own: Arc<Own>,
        trust: SharedTrust,
        trusting: bool,
    ) -> Self {
        Self {
            control,
            own,
            trust,
            trusting,
            waiting: BTreeMap::new(),
            running: BTreeSet::new(),
            attempts: JoinSet::new(),
        }
    }

    /// Runs until the catalogue is no more published.
    pub(crate) async fn run(mut self) {
        let mut catalogue = self.control.writer.watch();
        catalogue.mark_changed();
        loop {
            let first = self.waiting.values().map(|turn| turn.at).min();
            let wake = first.filter(|_| self.attempts.len() < ATTEMPTS_MAX);
            let wake = wake.unwrap_or_else(|| Instant::now() + IDLE);
            tokio::select! {
                changed = catalogue.changed() => match changed {
                    Ok(()) => self.look(&mut catalogue),
                    Err(_) => return,
                },
                Some(done) = self.attempts.join_next() => if let Ok((uid, result)) = done {
                    self.tried(&uid, result);
                },
                () = tokio::time::sleep_until(wake) => self.start(),
            }
        }
    }

    /// Who is to be proven: hosts that are heard of, serve something, and were not proven where they are.
    fn look(&mut self, catalogue: &mut watch::Receiver<Arc<Catalogue>>) {
        let now = Arc::clone(&catalogue.borrow_and_update());
        let wanted = |host: &Host| host.live && !host.proven && sni(&now, host).is_some();
        self.waiting
            .retain(|uid, _| now.hosts.get(uid).is_some_and(|h| wanted(h)));
        for host in now.hosts.values().filter(|h| wanted(h)) {
            if !self.running.contains(&host.uid) {
                let turn = Turn {
                    at: Instant::now(),
                    retry: RETRY_MIN,
                    failures: 0,
                };
                self.waiting.entry(host.uid.clone()).or_insert(turn);
            }
        }
    }

    fn start(&mut self) {
        let now = Instant::now();
        let due = self.waiting.iter_mut().filter(|(_, turn)| turn.at <= now);
        let room = ATTEMPTS_MAX.saturating_sub(self.attempts.len());
        let catalogue = self.control.writer.now();
        for (uid, turn) in due.take(room) {
            turn.at = now + turn.retry;
            turn.retry = (turn.retry * 2).min(RETRY_MAX);
            if let Some(host) = catalogue.hosts.get(uid)
                && let Some(name) = sni(&catalogue, host)
                && self.running.insert(uid.clone())
            {
                let attempt = Attempt {
                    control: Arc::clone(&self.control),
                    own: Arc::clone(&self.own),
                    trust: Arc::clone(&self.trust),
                    host: Arc::clone(host),
                    name,
                    tell: FAILURES_TOLD <= turn.failures + 1,
                };
                let trusting = self.trusting;
                self.attempts.spawn(async move {
                    let uid = attempt.host.uid.clone();
                    (uid, attempt.run(trusting).await)
                });
            }
        }
    }

    fn tried(&mut self, uid: &HostUid, result: Result<(), Reason>) {
        self.running.remove(uid);
        if let Err(reason) = result {
            if let Some(turn) = self.waiting.get_mut(uid) {
                turn.failures = turn.failures.saturating_add(1);
            }
            self.control.metrics.refused(Reason::AddressUnproven);
            let host = self.control.writer.now().host_label(uid);
            log::info!(host, reason = reason.code(); "could not prove the host's address; trying again");
        } else {
            self.waiting.remove(uid);
        }
    }
}

/// The server name of a workload that the host may have and reported.
fn sni(now: &Catalogue, host: &Host) -> Option<ServerName<'static>> {
    let accounts = host.workloads.iter().map(|w| &w.account);
    let account = accounts.filter(|a| host.scope.allows_account(a)).min()?;
    let id = SpiffeId {
        trust_domain: now.settings.trust_domain.clone(),
        identity: Identity::Workload(account.clone()),
    };
    ServerName::try_from(id.sni()?).ok()
}

struct Attempt {
    control: Arc<Control>,
    own: Arc<Own>,
    trust: SharedTrust,
    host: Arc<Host>,
    name: ServerName<'static>,
    /// Whether a failure is told to the host.
    tell: bool,
}

impl Attempt {
    async fn run(self, trusting: bool) -> Result<(), Reason> {
        let (uid, address) = (self.host.uid.clone(), self.host.address);
        let mesh_port = self.host.mesh_port;
        let proof = if trusting {
            Ok(())
        } else {
            let proof = timeout(ATTEMPT_MAX, self.prove()).await;
            proof.unwrap_or(Err(Reason::PeerUnreachable))
        };
        let command = match proof {
            Err(reason) if !self.tell => return Err(reason),
            Err(_) => Command::Doubted {
                uid,
                address,
                mesh_port,
            },
            Ok(()) => Command::Proven {
                uid,
                address,
                mesh_port,
            },
        };
        let told = self.control.writer.ask(Actor::control(), command).await;
        let told = told.map(drop).map_err(|refusal| refusal.reason);
        proof.and(told)
    }

    async fn prove(&self) -> Result<(), Reason> {
        let at = SocketAddr::new(self.host.address, self.host.mesh_port);
        let tcp = TcpStream::connect(at).await;
        let tcp = tcp.map_err(|_| Reason::PeerUnreachable)?;
        let verifier = Verifier::new(Arc::clone(&self.trust), Accept::NamedWorkload);
        let config = tls::client_config(Some(self.own.now()), verifier, &[ALPN_MESH]);
        let connector = TlsConnector::from(Arc::new(config.map_err(|_| Reason::Internal)?));
        let stream = connector.connect(self.name.clone(), tcp).await;
        let stream = stream.map_err(|error| handshake_reason(&error))?;
        let shown = stream.get_ref().1.peer_certificates();
        let shown = shown.and_then(|chain| chain.first());
        let facts = leaf::read_leaf(shown.ok_or(Reason::NoCertificate)?)?;
        if facts.host.as_ref() == Some(&self.host.uid) {
            return Ok(());
        }
        Err(Reason::PeerIdentity)
    }
}
