//! The worker: assembles what the agent does on the sockets that its holder gave it. It has the keys, and of all
//! privileges only the one to show apps the peer's address.
//!
//! The main thread runs everything here; calls have threads of their own (`data.rs`). Each part is one task with a name;
//! when one fails the worker ends, and the holder starts another.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, bail};
use mesh_api::proto;
use mesh_api::workload_file::HostAddresses;
use mesh_runtime::mux::Budget;
use mesh_runtime::tls::trust::TrustStore;
use mesh_runtime::{admin as admin_socket, signals};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::admin;
use crate::capture::sockdiag::SockDiag;
use crate::config::Config;
use crate::containers::Containers;
use crate::control::{self, SessionStatus};
use crate::data::{DataPlane, DataShared, Ending};
use crate::dns::keeper::{self, Keeper};
use crate::dns::{self, Dns, wiring};
use crate::door::Door;
use crate::drained::Drained;
use crate::explicit::Explicit;
use crate::handing::{Hander, Handing};
use crate::health::{self, Listening, Verdicts};
use crate::holder::client::{HolderLink, HolderSender};
use crate::holder::protocol::{FromHolder, Sockets};
use crate::leaves::{self, Standings};
use crate::metrics::{CertificateLives, FrontedServices, Metrics};
use crate::owners::{self, OwnerStatus, Owners};
use crate::reals::Spared;
use crate::state::{Kept, Membership, State};
use crate::status::NamesStatus;
use crate::view::{Leaves, View, ViewReader, ViewWriter};
use crate::workloads::{Watch, WorkloadSet};

/// Services that wait to be asked for: a full queue only delays the asking to the next call.
const WANTS_MAX: usize = 1_024;
/// How long the tasks may take to end after the calls have.
const END_MAX: Duration = Duration::from_secs(3);

/// Runs until SIGTERM, or until the holder is gone.
pub(crate) fn run(config: Config) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let outcome = runtime.block_on(async {
        let worker = Worker::assemble(config).await?;
        worker.serve().await
    });
    // A blocking task may hang on a slow disk.
    runtime.shutdown_timeout(END_MAX);
    outcome.map(|()| ExitCode::SUCCESS)
}

/// The parts, running.
#[derive(Debug)]
struct Worker {
    config: Config,
    plane: Arc<DataPlane>,
    tasks: Tasks,
    hander: Hander,
}

/// Named tasks that all end by one token.
#[derive(Debug, Default)]
struct Tasks {
    set: JoinSet<(&'static str, anyhow::Result<()>)>,
    /// No new calls from now on; only what must end before the open calls do listens to it.
    draining: CancellationToken,
    stop: CancellationToken,
}

impl Tasks {
    fn spawn<E: Into<anyhow::Error> + Send + 'static>(
        &mut self,
        name: &'static str,
        task: impl Future<Output = Result<(), E>> + Send + 'static,
    ) {
        self.set
            .spawn(async move { (name, task.await.map_err(Into::into)) });
    }

    /// The first task that ended, which none may before `stop`.
    async fn failed(&mut self) -> anyhow::Error {
        match self.set.join_next().await {
            Some(Ok((name, Err(error)))) => error.context(format!("the task `{name}` failed")),
            Some(Ok((name, Ok(())))) => anyhow::anyhow!("the task `{name}` ended"),
            Some(Err(error)) => anyhow::Error::new(error).context("a task panicked"),
            None => anyhow::anyhow!("there are no tasks"),
        }
    }

    /// The first that failed. One that ended has let go of what it did.
    async fn broke(&mut self) -> anyhow::Error {
        loop {
            match self.set.join_next().await {
                Some(Ok((_, Ok(())))) => {}
                Some(Ok((name, Err(error)))) => {
                    return error.context(format!("the task `{name}` failed"));
                }
                Some(Err(error)) => return anyhow::Error::new(error).context("a task panicked"),
                None => std::future::pending().await,
            }
        }
    }

    async fn end(mut self) {
        self.stop.cancel();
        let all = async { while self.set.join_next().await.is_some() {} };
        if tokio::time::timeout(END_MAX, all).await.is_err() {
            log::warn!("a task did not end in time and is cut");
        }
    }
}

impl Worker {
    async fn assemble(config: Config) -> anyhow::Result<Self> {
        let (mut holder, sender) =
            HolderLink::connect_from_fd3().context("the link to the holder can not be taken")?;
        let FromHolder::Sockets { sockets, standby } = holder
            .recv()
            .await
            .context("no sockets came from the holder")?
        else {
            bail!("the holder's first message was not its sockets");
        };
        let state = State::new(&config.state_dir);
        let Some(membership) = state.membership()? else {
            bail!("this host has not joined a mesh; run `mesh-agent join <token>`");
        };
        let parts = Parts::load(&config, state, membership)?;
        parts
            .start(config, (sockets, standby), holder, sender)
            .await
    }

    async fn serve(mut self) -> anyhow::Result<()> {
        // A reload is the holder's, and must not end us.
        let mut reload = signal(SignalKind::hangup())?;
        let mut taken_over = signal(SignalKind::user_defined2())?;
        let shutdown = signals::shutdown();
        tokio::pin!(shutdown);
        loop {
            tokio::select! {
                ended = &mut shutdown => {
                    ended?;
                    break;
                }
                _ = reload.recv() => {}
                _ = taken_over.recv() => {
                    self.hand_over().await;
                    let carried = tokio::select! {
                        () = self.plane.drain(Ending::HandOver, self.config.handover()) => Ok(()),
                        ended = &mut shutdown => {
                            ended?;
                            self.plane.drain(Ending::HandOver, self.config.drain()).await;
                            Ok(())
                        }
                        // Without it a change of policy would not reach what is open.
                        error = self.tasks.broke() => Err(error),
                    };
                    self.tasks.end().await;
                    return carried;
                }
                error = self.tasks.failed() => return Err(error),
            }
        }
        log::info!("the worker takes no new calls and lets the open ones end");
        // The resolver first: names must go where they went before.
        self.tasks.draining.cancel();
        keeper::pause(&self.config);
        self.plane.drain(Ending::Stop, self.config.drain()).await;
        self.tasks.end().await;
        Ok(())
    }

    /// Another worker takes over: what is new is its own from now on.
    async fn hand_over(&mut self) {
        log::info!("another worker takes over; what is open here goes on");
        self.tasks.draining.cancel();
        self.plane.stop_accepting().await;
        self.hander.hand_over().await;
    }
}

/// What is loaded from disk before anything is served.
struct Parts {
    state: State,
    membership: Membership,
    view: ViewWriter,
    files: Watch,
    sets: watch::Receiver<Arc<WorkloadSet>>,
    trust: mesh_runtime::tls::trust::SharedTrust,
    bundle: proto::TrustBundle,
}

impl Parts {
    fn load(config: &Config, state: State, membership: Membership) -> anyhow::Result<Self> {
        let bundle: proto::TrustBundle = state.kept(Kept::Bundle).context(
            "the roots that the join gave this host are missing; `mesh-agent leave`, then join again",
        )?;
        let trust = TrustStore::from_bundle(&bundle)?.shared();
        let place = HostAddresses {
            vips: Some(membership.host.vips),
            calls_only: !config.capture.enabled,
            ..HostAddresses::default()
        };
        let (files, sets) = Watch::new(config.services_dir.clone(), place)
            .with_context(|| format!("cannot follow {}", config.services_dir.display()))?;
        let view = ViewWriter::new(View {
            host: Arc::new(membership.host.clone()),
            index: None,
            policies: None,
            endpoints: Arc::default(),
            workloads: Arc::clone(&sets.borrow()),
            unfit: Arc::default(),
            owners: Arc::default(),
            reals: Arc::new(state.reals()),
            leaves: Arc::new(Leaves::default()),
            revoked: Some(Arc::default()),
            live: true,
            unreached: false,
        });
        Ok(Self {
            state,
            membership,
            view,
            files,
            sets,
            trust,
            bundle,
        })
    }

    #[expect(
        clippy::too_many_lines,
        reason = "every part, once, in the order in which they need each other"
    )]
    async fn start(
        self,
        config: Config,
        (sockets, standby): (Sockets, bool),
        mut holder: HolderLink,
        mut sender: HolderSender,
    ) -> anyhow::Result<Worker> {
        let mut tasks = Tasks::default();
        let hander = Hander::new();
        let (wants_by, wants) = mpsc::channel(WANTS_MAX);
        let (verdicts_by, verdicts) = watch::channel(Arc::new(Verdicts::new()));
        let (session_by, session) = watch::channel(Arc::new(SessionStatus::default()));
        let (standings_by, standings) = watch::channel(Arc::new(Standings::new()));
        let (owners_by, owner_status) = watch::channel(Arc::new(OwnerStatus::default()));
        let (credential_by, credential) = watch::channel(None);
        let (channel_by, channel) = watch::channel(None);
        let (judged_by, judged) = watch::channel(0);
        let (edges_by, edges) = watch::channel(Arc::default());
        let (rejoined_by, rejoined) = mpsc::channel(1);
        let (calls_by, calls) = health::channel();

        // All that is on disk is in use before the first call is taken.
        let keeper = leaves::Keeper::new(
            leaves::Links {
                state: self.state.clone(),
                view: self.view.clone(),
                trust: Arc::clone(&self.trust),
                sets: self.sets.clone(),
                channel: channel.clone(),
                rejoined,
                judged,
                credential: credential_by,
                standings: standings_by,
                handing: hander.holding(),
            },
            &self.membership,
        )?;
        let mut shell = control::Shell::new(
            control::Links {
                state: self.state.clone(),
                view: self.view.clone(),
                trust: Arc::clone(&self.trust),
                bundle: self.bundle,
                wants,
                sets: self.sets.clone(),
                verdicts: verdicts.clone(),
                edges,
                owners: owner_status.clone(),
                credential,
                rejoined: rejoined_by,
                channel: channel_by,
                judged: judged_by,
                status: session_by,
                mesh_port: config.mesh.listen_port,
                handing: hander.holding(),
            },
            self.membership.clone(),
        )?;

        let metrics = make_metrics(&config, &self.sets, &standings);
        let shared = DataShared {
            view: self.view.reader(),
            wants: wants_by.clone(),
            calls: calls_by,
            trust: self.trust,
            metrics: Arc::clone(&metrics),
            settings: config.data(),
            turns: Arc::default(),
        };
        let plane = DataPlane::start(&shared)?;
        if standby {
            stand_by(&mut holder, &mut sender).await?;
            shell.catch_up();
        }
        for listener in sockets.mesh {
            plane.add_mesh_listener(listener).await?;
        }
        let plane = Arc::new(plane);
        let owners = Owners::new(
            owners::Links {
                view: self.view.clone(),
                sets: self.sets.clone(),
                holder: Some((holder, sender)),
                handing: hander.watching(),
                plane: Arc::clone(&plane),
                status: owners_by,
                door: Door::new(self.state.clone(), &metrics, edges_by, config.keep_open()),
                state: self.state,
                metrics: Arc::clone(&metrics),
                containers: Containers::new(config.capture.bridges.clone()),
                spared: Spared {
                    everything: !config.capture.enabled,
                    keep_open: config.keep_open(),
                    control: self.membership.control.clone(),
                },
            },
            self.membership.host.vips,
        )?;
        let names = dns::Sockets {
            udp: sockets.dns_udp,
            tcp: sockets.dns_tcp,
        };
        let watching = hander.watching();
        let found = (self.view.reader(), &metrics);
        let names = start_dns(&config, names, found, &watching, &mut tasks).await?;
        let stop = tasks.stop.clone();
        let (closed_by, closed) = watch::channel(Arc::default());
        let explicit = Explicit::new(self.sets.clone(), Arc::clone(&plane), closed_by);
        tasks.spawn(
            "local ports and sockets",
            explicit.run(watching.clone(), stop.clone()),
        );
        tasks.spawn("control", shell.run(stop.clone()));
        tasks.spawn("leaves", keeper.run(stop.clone()));
        tasks.spawn("owners", owners.run(stop.clone()));
        tasks.spawn("workload files", self.files.run(stop));
        let verdicts_file = config.runtime_dir.join(health::KEPT);
        let drained = Drained::load(&config.state_dir, &config.runtime_dir);
        let publish = publish(self.view.clone(), verdicts_by, verdicts_file, &drained);
        let sources = health::Sources {
            listening: listening()?,
            calls,
            results: health::Results::register(&metrics),
            pipes: config.runtime_dir.join(health::PIPES),
        };
        let checks = health::run(self.sets.clone(), sources, publish, tasks.stop.clone());
        tasks.spawn("health", checks);
        start_admin(
            admin::Sources {
                config: config.clone(),
                membership: self.membership,
                view: self.view.reader(),
                metrics,
                sets: self.sets,
                verdicts,
                session,
                standings,
                owners: owner_status,
                drained,
                closed,
                dns: names.counters,
                names: names.status,
                diag: Mutex::new(sockdiag()?),
                wants: wants_by,
                channel,
            },
            watching,
            &mut tasks,
        )?;
        Ok(Worker {
            config,
            plane,
            tasks,
            hander,
        })
    }
}

fn make_metrics(
    config: &Config,
    sets: &watch::Receiver<Arc<WorkloadSet>>,
    standings: &watch::Receiver<Arc<Standings>>,
) -> Arc<Metrics> {
    let metrics = Metrics::new(Budget::new(config.buffer_max()));
    metrics.register(|registry| {
        registry.register_collector(Box::new(FrontedServices(sets.clone())));
        registry.register_collector(Box::new(CertificateLives(standings.clone())));
    });
    metrics
}

/// All is loaded and nothing is served yet: returns when the worker before this one has let go.
async fn stand_by(holder: &mut HolderLink, sender: &mut HolderSender) -> anyhow::Result<()> {
    sender
        .stands_by()
        .await
        .context("the holder takes no messages")?;
    match holder.recv().await.context("the holder is gone")? {
        FromHolder::Serve => Ok(()),
        _ => bail!("the holder did not say when to serve"),
    }
}

/// What there is to say of names, if they are answered.
#[derive(Debug, Default)]
struct Names {
    counters: Option<Arc<dns::Counters>>,
    status: Option<watch::Receiver<NamesStatus>>,
}

/// Answers names, and then lets the host's resolver ask.
async fn start_dns(
    config: &Config,
    sockets: dns::Sockets,
    (view, metrics): (ViewReader, &Arc<Metrics>),
    handing: &Handing,
    tasks: &mut Tasks,
) -> anyhow::Result<Names> {
    let port = sockets.udp.first().and_then(|s| s.local_addr().ok());
    let port = port.map_or(0, |address| address.port());
    if !config.dns.enabled {
        keeper::undo_others(config, wiring::Way::Off);
        return Ok(Names::default());
    }
    let host = Arc::clone(&view.borrow().host);
    let chosen = wiring::choose_at(&config.dns, port);
    let found = (&sockets, host.dns_suffix.as_str(), &host.vips);
    let keeper = Keeper::new(config, &chosen, found, Arc::clone(metrics));
    let dns = Dns::new(
        dns::Config {
            suffix: host.dns_suffix.clone(),
            ranges: host.vips,
            upstreams: match config.dns.upstreams.is_empty() {
                true => dns::upstreams(&config.dns.resolv_conf),
                false => config.dns.upstreams.clone(),
            },
        },
        Box::new(move || view.borrow().index.clone()),
    )?;
    let counters = Some(dns.counters());
    let task = dns.run(sockets, handing.clone(), tasks.stop.clone());
    tasks.spawn("dns", task);
    let mut status = None;
    if let Some((mut keeper, seen)) = keeper {
        keeper.begin(config).await;
        tasks.spawn("resolver", keeper.keep(tasks.draining.clone()));
        status = Some(seen);
    }
    Ok(Names { counters, status })
}

fn publish(
    view: ViewWriter,
    verdicts: watch::Sender<Arc<Verdicts>>,
    file: PathBuf,
    drained: &Drained,
) -> health::Publish {
    health::Publish {
        verdicts,
        file,
        drained: drained.watch(),
        unfit: Box::new(move |unfit| view.change(|view| view.unfit = unfit)),
    }
}

fn start_admin(sources: admin::Sources, handing: Handing, tasks: &mut Tasks) -> anyhow::Result<()> {
    let path = sources.config.admin_socket();
    let listener = admin_socket::bind(&path)
        .with_context(|| format!("cannot serve the admin socket {}", path.display()))?;
    let handler = admin::handler(sources);
    let stop = tasks.stop.clone();
    tasks.spawn("admin socket", async move {
        tokio::select! {
            () = admin_socket::serve(listener, handler) => bail!("it takes no more connections"),
            () = stop.cancelled() => Ok(()),
            // The other worker binds its own.
            () = handing.begun() => Ok(()),
        }
    });
    Ok(())
}

fn sockdiag() -> anyhow::Result<SockDiag> {
    SockDiag::open().context("cannot ask the kernel for its listening sockets")
}

/// Where programs listen, as the kernel says. Asked a few times a second at most.
fn listening() -> anyhow::Result<Listening> {
    let diag = Mutex::new(sockdiag()?);
    Ok(Arc::new(move |port| {
        let found = diag
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .listeners(port)?;
        Ok(found.iter().map(|l| l.address.ip()).collect())
    }))
}
