//! Tells the kernel, by way of the holder, whose processes are which workload, and takes the listeners that come for
//! it. Follows the workload files and the cgroups of their owners: a unit that restarts is another directory.

mod found;

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use mesh_api::workload_file::Owner;
use mesh_core::names::Account;
use mesh_core::policy::PolicySet;
use mesh_core::service::Index;
use mesh_core::vip::VipRanges;
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use crate::bypass::Bypass;
use crate::capture::cgroup::{CgroupError, CgroupTree, CgroupWatch};
use crate::capture::real::Real;
use crate::containers::Containers;
use crate::data::DataPlane;
use crate::door::{Door, DoorStatus, WantedDoors};
use crate::handing::Handing;
use crate::holder::client::{HolderLink, HolderSender};
use crate::holder::protocol::{Desired, DesiredWorkload, FromHolder, WorkloadListener};
use crate::leaves::now_ms;
use crate::metrics::Metrics;
use crate::reals::{self, Spared};
use crate::state::State;
use crate::view::{Endpoints, View, ViewWriter};
use crate::whose::{Owned, OwnerTable};
use crate::workloads::WorkloadSet;
use found::{Resolved, Seen, missing, path, uid};

/// How often plaintext callers are read: far oftener than the kernel forgets them.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// How long control's machine may take to take a connection.
const REACH_MAX: Duration = Duration::from_secs(6);
/// How often containers are looked for: the kernel tells nobody that one has its address now.
const CONTAINERS_EVERY: Duration = Duration::from_secs(1);
/// How often what failed is tried again: a user that is not there yet, rules that the kernel refused.
const RETRY: Duration = Duration::from_secs(5);

/// What the kernel knows, for `status` and readiness.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct OwnerStatus {
    /// Whether the kernel knows exactly what the files say.
    pub(crate) applied: bool,
    /// Why the last wish was not fulfilled.
    pub(crate) error: Option<String>,
    /// Workloads whose owner can not be told.
    pub(crate) problems: BTreeMap<Account, String>,
    /// Workloads whose owner is not there now; it may come at any time.
    pub(crate) absent: BTreeMap<Account, String>,
    pub(crate) door: DoorStatus,
    /// Workers that this one or others have taken over from, and what became of the last reload.
    pub(crate) draining: usize,
    pub(crate) given_up: Option<String>,
    /// The last time that this host was opened to plaintext.
    pub(crate) bypass: Option<Bypass>,
    /// Real addresses at which calls are taken over, and how many more there are than can be.
    pub(crate) reals: usize,
    pub(crate) reals_left_out: usize,
}

/// What the kernel is told, all but its envelope.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Wish {
    workloads: Vec<DesiredWorkload>,
    doors: Option<WantedDoors>,
    reals: Option<Vec<Real>>,
}

/// What the owner of the owners works with.
#[derive(Debug)]
pub(crate) struct Links {
    pub(crate) view: ViewWriter,
    pub(crate) sets: watch::Receiver<Arc<WorkloadSet>>,
    /// `None` when another worker has taken over.
    pub(crate) holder: Option<(HolderLink, HolderSender)>,
    pub(crate) handing: Handing,
    pub(crate) plane: Arc<DataPlane>,
    pub(crate) status: watch::Sender<Arc<OwnerStatus>>,
    pub(crate) door: Door,
    pub(crate) state: State,
    pub(crate) metrics: Arc<Metrics>,
    /// Where control answers, and what else is never taken over.
    pub(crate) spared: Spared,
    pub(crate) containers: Containers,
}

#[derive(Debug)]
pub(crate) struct Owners {
    links: Links,
    vips: VipRanges,
    tree: Option<CgroupTree>,
    cgroups: Option<CgroupWatch>,
    set: Arc<WorkloadSet>,
    /// Of the last wish.
    generation: u64,
    sent: Wish,
    /// What the door was made of last.
    index: Option<Arc<Index>>,
    policies: Option<Arc<PolicySet>>,
    /// What the real addresses were made of last.
    endpoints: Arc<Endpoints>,
    /// Whether a look at the door was not answered yet.
    looking: bool,
    /// Another worker takes over: owners are followed, and the holder is told nothing.
    follows_only: bool,
    /// The generation with which control is being reached.
    reaching: Option<AbortOnDropHandle<u64>>,
    status: OwnerStatus,
}

impl Owners {
    pub(crate) fn new(links: Links, vips: VipRanges) -> anyhow::Result<Self> {
        let tree = match CgroupTree::find() {
            Ok(tree) => Some(tree),
            Err(error) => {
                log::warn!("{error}; only workloads owned by a user can be told apart");
                None
            }
        };
        let cgroups = tree.clone().map(CgroupWatch::new).transpose()?;
        Ok(Self {
            links,
            vips,
            tree,
            cgroups,
            set: Arc::default(),
            generation: 0,
            sent: Wish::default(),
            index: None,
            policies: None,
            endpoints: Arc::default(),
            looking: false,
            follows_only: false,
            reaching: None,
            status: OwnerStatus::default(),
        })
    }

    /// Follows files and cgroups until `stop`, or until the holder is gone.
    pub(crate) async fn run(mut self, stop: CancellationToken) -> anyhow::Result<()> {
        let mut view = self.links.view.reader();
        let mut look = tokio::time::interval(LOOK_EVERY);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut containers = tokio::time::interval(CONTAINERS_EVERY);
        containers.set_missed_tick_behavior(MissedTickBehavior::Delay);
        self.follow_set().await?;
        loop {
            self.publish();
            let retry = self.status.error.is_some() || !self.status.problems.is_empty();
            tokio::select! {
                () = stop.cancelled() => return Ok(()),
                changed = self.links.sets.changed() => {
                    changed.context("the owner of the workloads is gone")?;
                    self.follow_set().await?;
                }
                moved = moved(self.cgroups.as_mut()) => {
                    moved?;
                    self.tell(false).await?;
                }
                () = self.links.handing.begun(), if !self.follows_only => {
                    self.follows_only = true;
                    self.reaching = None;
                }
                () = self.links.handing.done(), if self.links.holder.is_some() => {
                    self.links.holder = None;
                }
                message = heard(self.links.holder.as_mut()) => {
                    let message = message.context("the holder is gone")?;
                    self.heard(message).await?;
                }
                changed = view.changed() => {
                    changed.context("the owner of the view is gone")?;
                    let seen = view.borrow_and_update().clone();
                    if !same(self.index.as_ref(), seen.index.as_ref())
                        || !same(self.policies.as_ref(), seen.policies.as_ref())
                        || self.reals_moved(&seen)
                    {
                        self.tell(false).await?;
                    }
                }
                _ = look.tick(), if !self.looking && !self.follows_only => {
                    self.looking = true;
                    if let Some((_, sender)) = &mut self.links.holder {
                        sender.look().await.context("the holder takes no messages")?;
                    }
                }
                _ = containers.tick(), if self.links.containers.is_looking() && !self.follows_only => {
                    if self.containers_moved() {
                        self.tell(false).await?;
                    }
                }
                reached = finished(self.reaching.as_mut()) => {
                    self.reaching = None;
                    if let Some((_, sender)) = &mut self.links.holder {
                        let sent = sender.reached(reached?).await;
                        sent.context("the holder takes no messages")?;
                    }
                }
                () = tokio::time::sleep(RETRY), if retry => {
                    let again = self.status.error.is_some();
                    self.tell(again).await?;
                }
            }
        }
    }

    /// Takes the workloads as the files say them now.
    async fn follow_set(&mut self) -> anyhow::Result<()> {
        self.set = Arc::clone(&self.links.sets.borrow_and_update());
        let mut paths = Vec::new();
        for workload in &self.set.workloads {
            if let Some(Ok(Some(path))) = workload.owner.as_ref().map(path) {
                paths.extend(path.socket_unit());
                paths.push(path);
            }
        }
        if let Some(cgroups) = &mut self.cgroups {
            cgroups.follow(paths)?;
        }
        self.tell(false).await
    }

    /// Resolves all owners, shows them to the data path, and tells the holder what changed; `again`: in any case.
    async fn tell(&mut self, again: bool) -> anyhow::Result<()> {
        let (mut desired, table, mut problems, absent) = self.resolve()?;
        self.links.containers.look(&table, &mut desired);
        for (account, problem) in self.links.containers.problems() {
            problems
                .entry(account.clone())
                .or_insert_with(|| problem.clone());
        }
        for (account, problem) in &problems {
            if self.status.problems.get(account) != Some(problem) {
                log::warn!(workload:% = account; "{problem}");
            }
        }
        self.status.problems = problems;
        self.status.absent = absent;
        let set = Arc::clone(&self.set);
        self.links.view.change(|view| {
            view.workloads = set;
            view.owners = Arc::new(table);
        });
        let view = self.links.view.now();
        self.index.clone_from(&view.index);
        self.policies.clone_from(&view.policies);
        self.endpoints.clone_from(&view.endpoints);
        let reals = reals::wanted(&view, &self.links.spared);
        if let Some(wanted) = &reals {
            self.status.reals = wanted.reals.len();
            self.status.reals_left_out = wanted.left_out;
            if *view.reals != wanted.reals {
                let reals = Arc::new(wanted.reals.clone());
                if !self.follows_only
                    && let Err(error) = self.links.state.set_reals(&reals)
                {
                    log::error!(
                        "cannot keep for the next start which real addresses are taken over: {error:#}"
                    );
                }
                self.links.view.change(|view| view.reals = reals);
            }
        }
        let wish = Wish {
            workloads: desired,
            doors: self.links.door.wanted(&view, now_ms()),
            reals: reals.map(|wanted| wanted.told),
        };
        if self.follows_only || (self.generation != 0 && !again && wish == self.sent) {
            return Ok(());
        }
        let Some((_, sender)) = &mut self.links.holder else {
            return Ok(());
        };
        self.generation += 1;
        self.status.applied = false;
        self.sent.clone_from(&wish);
        let (doors, kept_doors) = match wish.doors {
            Some(wanted) => (Some(wanted.doors), wanted.kept),
            None => (None, Vec::new()),
        };
        let desired = Desired {
            generation: self.generation,
            workloads: wish.workloads,
            doors,
            kept_doors,
            reals: wish.reals,
            vip4: self.vips.v4().to_string(),
            vip6: self.vips.v6().to_string(),
        };
        match sender.send(desired).await {
            // Not sent at all: what was before goes on.
            Err(error) if error.kind() == ErrorKind::InvalidData => {
                let error = error.to_string();
                self.failed(error);
                Ok(())
            }
            sent => sent.context("the holder takes no messages"),
        }
    }

    fn failed(&mut self, error: String) {
        if self.status.error.as_ref() != Some(&error) {
            log::error!(error = error.as_str(); "the workloads could not be told to the kernel; what was before stays, and it is tried again");
        }
        self.status.error = Some(error);
    }

    /// Whether containers came, went, or have other addresses.
    fn containers_moved(&mut self) -> bool {
        let view = self.links.view.now();
        let mut workloads = self.sent.workloads.clone();
        self.links.containers.look(&view.owners, &mut workloads)
    }

    /// Whether other real addresses are to be taken over, now that endpoints changed.
    fn reals_moved(&mut self, view: &View) -> bool {
        if Arc::ptr_eq(&self.endpoints, &view.endpoints) {
            return false;
        }
        self.endpoints.clone_from(&view.endpoints);
        match reals::wanted(view, &self.links.spared) {
            Some(wanted) => {
                wanted.reals != *view.reals || Some(&wanted.told) != self.sent.reals.as_ref()
            }
            None => self.sent.reals.is_some(),
        }
    }

    #[expect(
        clippy::type_complexity,
        reason = "four results of one pass, named at the call"
    )]
    fn resolve(
        &self,
    ) -> Result<
        (
            Vec<DesiredWorkload>,
            OwnerTable,
            BTreeMap<Account, String>,
            BTreeMap<Account, String>,
        ),
        CgroupError,
    > {
        let mut desired = Vec::new();
        let mut table = OwnerTable {
            workloads: Vec::new(),
            tree: self.tree.clone(),
        };
        let mut problems = BTreeMap::new();
        let mut absent = BTreeMap::new();
        let mut seen = Seen::default();
        for workload in &self.set.workloads {
            let account = &workload.account;
            let Some(number) = self.set.number(account) else {
                continue;
            };
            // Without processes here there is nothing that the kernel could tell apart.
            let Some(owner) = &workload.owner else {
                continue;
            };
            let resolved = self.resolve_one(owner)?;
            if let Some(problem) = resolved.problem.or_else(|| seen.claim(&resolved.owner)) {
                problems.insert(account.clone(), problem);
                continue;
            }
            let found = resolved.owner;
            if let Some(missing) = missing(owner, &found) {
                absent.insert(account.clone(), missing);
            }
            desired.push(DesiredWorkload {
                number,
                label: account.to_string(),
                cgroups: found.own.iter().map(|d| d.cgroup).collect(),
                root: found.uids.contains(&0),
                uids: found.uids.clone(),
                addresses: Vec::new(),
            });
            let mut directories = found.own;
            directories.extend(found.sockets);
            table.workloads.push(Owned {
                account: account.clone(),
                directories,
                uids: found.uids,
            });
        }
        Ok((desired, table, problems, absent))
    }

    fn resolve_one(&self, owner: &Owner) -> Result<Resolved, CgroupError> {
        let mut resolved = Resolved::default();
        match path(owner) {
            Err(problem) => resolved.problem = Some(problem),
            Ok(Some(path)) => match &self.tree {
                None => resolved.problem = Some(CgroupError::NotMounted.to_string()),
                Some(tree) => {
                    resolved.owner.own = tree.resolve(&path)?;
                    if let Some(socket) = path.socket_unit() {
                        resolved.owner.sockets = tree.resolve(&socket)?;
                    }
                }
            },
            Ok(None) => match uid(owner) {
                Ok(uid) => resolved.owner.uids.push(uid),
                Err(problem) => resolved.problem = Some(problem),
            },
        }
        Ok(resolved)
    }

    async fn heard(&mut self, message: FromHolder) -> anyhow::Result<()> {
        match message {
            // Sent once, before this task begins.
            FromHolder::Sockets { .. } | FromHolder::Serve => {
                anyhow::bail!("the holder sent its sockets twice")
            }
            FromHolder::Listeners(listeners) => {
                take_listeners(&self.links.plane, listeners).await?
            }
            FromHolder::Applied { generation, trial } if generation == self.generation => {
                self.status.applied = true;
                self.status.error = None;
                let view = self.links.view.now();
                let known = view.owners.workloads.iter();
                let accounts = known.map(|owned| owned.account.clone()).collect();
                self.links.plane.keep(accounts).await;
                log::info!(workloads = self.sent.workloads.len(); "the kernel knows the workloads");
                self.reaching = trial.then(|| self.reach());
            }
            FromHolder::Failed { generation, error } if generation == self.generation => {
                self.failed(error);
            }
            FromHolder::Applied { .. } | FromHolder::Failed { .. } => (),
            FromHolder::Looked(looked) => {
                self.looking = false;
                self.status.draining = looked.draining;
                self.status.given_up.clone_from(&looked.given_up);
                self.status.bypass.clone_from(&looked.bypass);
                self.links.metrics.reloaded(&looked);
                self.links.door.looked(looked, now_ms());
                self.status.door = self.links.door.status.clone();
            }
        }
        Ok(())
    }

    /// Begins to reach control by new connections. Only when that was possible the door refuses for good.
    fn reach(&self) -> AbortOnDropHandle<u64> {
        let (addresses, generation) = (self.links.spared.control.clone(), self.generation);
        AbortOnDropHandle::new(tokio::spawn(async move {
            loop {
                for address in &addresses {
                    let connect = TcpStream::connect(address.as_str());
                    if matches!(timeout(REACH_MAX, connect).await, Ok(Ok(_))) {
                        return generation;
                    }
                }
                tokio::time::sleep(RETRY).await;
            }
        }))
    }

    fn publish(&self) {
        self.links.status.send_if_modified(|shown| {
            let changed = **shown != self.status;
            if changed {
                *shown = Arc::new(self.status.clone());
            }
            changed
        });
    }
}

/// Whose listeners these are is said by their labels: a worker before this one may have counted otherwise.
pub(crate) async fn take_listeners(
    plane: &DataPlane,
    listeners: Vec<WorkloadListener>,
) -> anyhow::Result<()> {
    for listener in listeners {
        let whose = match listener.number {
            0 => None,
            _ => Some(Account::parse(&listener.label)?),
        };
        for socket in [listener.v4, listener.v6].into_iter().flatten() {
            plane.add_listener(whose.clone(), socket).await?;
        }
    }
    Ok(())
}

/// The next word of the holder; none comes where another worker has taken over.
async fn heard(holder: Option<&mut (HolderLink, HolderSender)>) -> std::io::Result<FromHolder> {
    match holder {
        Some((link, _)) => link.recv().await,
        None => std::future::pending().await,
    }
}

/// Waits for the task that reaches control; for ever where there is none.
async fn finished(task: Option<&mut AbortOnDropHandle<u64>>) -> anyhow::Result<u64> {
    match task {
        Some(task) => task.await.context("the task that reaches control failed"),
        None => std::future::pending().await,
    }
}

fn same<T>(a: Option<&Arc<T>>, b: Option<&Arc<T>>) -> bool {
    match (a, b) {
        (Some(a), Some(b)) => Arc::ptr_eq(a, b),
        (None, None) => true,
        _ => false,
    }
}

/// Waits for a change of the owners' directories; for ever where there are no cgroups.
async fn moved(cgroups: Option<&mut CgroupWatch>) -> Result<(), CgroupError> {
    match cgroups {
        Some(cgroups) => cgroups.changed().await.map(drop),
        None => std::future::pending().await,
    }
}
