//! Hundreds of agents and one control for minutes of a clock of their own, over the machines that decide: sessions, leases,
//! revocations. Everything that can fail does, by a seed: connections break, fall silent, crawl; what an old one still
//! said comes late and twice; agents and control crash, hosts boot anew, control is restored from an old backup.
//! What control has besides (its catalogue, its store and what it sends next) is a model of it here.
//!
//! Within one connection there is an order, as TCP keeps it: a lost message is one that all later ones wait for, so the
//! connection is silent from there on. Between connections there is none.
//!
//! What holds in every step: an agent never goes back within an epoch; its revocations only grow; a revocation is in
//! force a second later wherever a connection is sound; no host counts as live for longer than its lease. What holds in
//! the end: all have the last catalogue and know of every revocation that any of them knew, control first; the dead are
//! stale.
//!
//! A failure prints its seed; with `MESHWORK_SEED` set only that one is run.

#![expect(clippy::unwrap_used, reason = "a test")]
#![expect(
    clippy::print_stderr,
    clippy::disallowed_methods,
    reason = "a test says how to run it again, and begins its time somewhere"
)]

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_core::lease::{LEASE, Leases, SessionId, Settings, Transition};
use mesh_core::names::{Account, HostUid};
use mesh_core::revocation::{Known, Named, Revocation, Revocations, Subject};
use mesh_core::rng::Rng;
use mesh_core::session::{Attempt, Command, Installed, Lost, Outgoing, Session};

#[path = "fleet/agents.rs"]
mod agents;
#[path = "fleet/control.rs"]
mod control;
#[path = "fleet/invariants.rs"]
mod invariants;
#[path = "fleet/misfortune.rs"]
mod misfortune;
#[path = "fleet/network.rs"]
mod network;

const AGENTS: usize = 300;
const SEEDS: u64 = 2;
/// While everything fails.
const STORM: Duration = Duration::from_secs(180);
/// The longest wait of an agent, a lease, and what control grants after a start, with room.
const CALM: Duration = Duration::from_secs(240);
/// A message on a sound connection takes so long at most.
const DELAY_MS: u64 = 150;
/// One of a crawling connection.
const CRAWL_MS: u64 = 4_000;
/// Between two of the world's misfortunes.
const FAULT_EVERY: Duration = Duration::from_millis(60);
/// Between two changes of the catalogue.
const CHANGE_EVERY: Duration = Duration::from_millis(400);
/// What an agent has is on disk so much later.
const PERSIST: Duration = Duration::from_millis(250);
/// Within which a revocation is in force.
const SECOND: Duration = Duration::from_secs(1);
/// Sent messages that may come once more.
const ECHOES_MAX: usize = 500;
/// Parts of a long list, so that lists have several.
const PART: usize = 3;
/// The dead of the end: fewer than would be held.
const DEAD: usize = AGENTS / 10;

#[derive(Clone, Debug)]
enum ToControl {
    Hello {
        boot: u64,
        index: Option<Installed>,
        revocations: Option<Installed>,
    },
    Beat,
    Revocations(Vec<Revocation>),
    Other,
}

#[derive(Clone, Debug)]
enum ToAgent {
    Welcome { epoch: u64 },
    Beat,
    Index(Update),
    Revocations(Named),
    Refused,
}

/// Services by their number: what they are now, or that they are gone.
#[derive(Clone, Debug)]
struct Update {
    revision: u64,
    snapshot: bool,
    services: BTreeMap<u64, Option<u64>>,
}

#[derive(Debug)]
enum Event {
    Dialled(usize, Attempt),
    /// The agent hears that its connection is over.
    Broken(usize, Attempt, Lost),
    /// Control hears it.
    Closed(usize),
    ToControl(usize, ToControl),
    ToAgent(usize, ToAgent),
    AgentWakes(usize),
    ControlWakes,
    Persist(usize, u64, Box<Kept>),
    AgentStarts(usize),
    ControlStarts(Option<Box<Store>>),
    Fault,
    Change,
    /// A second after a revocation: on this connection, if nothing befell it.
    Check(usize, Subject),
    Tick,
}

#[derive(Clone, Debug)]
struct Connection {
    agent: usize,
    attempt: Attempt,
    /// Nothing that is sent from now on arrives.
    deaf: bool,
    crawls: bool,
    over: bool,
    /// The latest arrival each way: order is kept.
    up: Instant,
    down: Instant,
}

/// What survives an agent's crash.
#[derive(Clone, Debug, Default)]
struct Kept {
    installed: Option<Installed>,
    index: BTreeMap<u64, u64>,
    revoked: Revocations,
    revoked_at: Option<Installed>,
}

#[derive(Debug)]
struct Agent {
    boot: u64,
    /// Of the process.
    life: u64,
    up: bool,
    session: Session,
    /// By its number.
    connection: Option<(Attempt, usize)>,
    pending: Option<Update>,
    index: BTreeMap<u64, u64>,
    known: Known,
    disk: Kept,
}

/// What survives control's crash.
#[derive(Clone, Debug)]
struct Store {
    epoch: u64,
    revision: u64,
    hosts: BTreeSet<usize>,
    live: BTreeSet<usize>,
    /// Revision and value.
    services: BTreeMap<u64, (u64, u64)>,
    gone: BTreeMap<u64, u64>,
    revoked: Revocations,
    in_turn: Vec<(u64, Revocation)>,
}

#[derive(Debug)]
struct Control {
    up: bool,
    leases: Leases,
    /// By the number of their connection: what they were told of index and revocations.
    sessions: BTreeMap<usize, (Option<u64>, Option<u64>)>,
    heard: BTreeMap<usize, Instant>,
    started: Instant,
}

struct World {
    rng: Rng,
    now: Instant,
    start: Instant,
    order: BinaryHeap<Reverse<(Instant, u64)>>,
    events: BTreeMap<u64, Event>,
    number: u64,
    agents: Vec<Agent>,
    connections: Vec<Connection>,
    control: Control,
    store: Store,
    backups: Vec<Store>,
    echoes: Vec<Event>,
    storm: bool,
    checked: u64,
    restores: u32,
}

fn uid(agent: usize) -> HostUid {
    format!("{agent:032x}").parse().unwrap()
}

fn number_of(uid: &HostUid) -> usize {
    usize::from_str_radix(uid.as_str(), 16).unwrap()
}

impl World {
    fn new(seed: u64) -> Self {
        let now = Instant::now();
        let mut rng = Rng::new(seed);
        let agents = (0..AGENTS).map(|_| Agent {
            boot: 1,
            life: 1,
            up: true,
            session: Session::new(2, None, rng.next_u64(), now),
            connection: None,
            pending: None,
            index: BTreeMap::new(),
            known: Known::default(),
            disk: Kept::default(),
        });
        let agents = agents.collect();
        let mut world = Self {
            rng,
            now,
            start: now,
            order: BinaryHeap::new(),
            events: BTreeMap::new(),
            number: 0,
            agents,
            connections: Vec::new(),
            control: Control {
                up: true,
                leases: Leases::new(Settings::default(), [], (0..AGENTS).map(uid), now),
                sessions: BTreeMap::new(),
                heard: BTreeMap::new(),
                started: now,
            },
            store: Store {
                epoch: 1,
                revision: 1,
                hosts: (0..AGENTS).collect(),
                live: BTreeSet::new(),
                services: (0..20).map(|n| (n, (1, n))).collect(),
                gone: BTreeMap::new(),
                revoked: Revocations::default(),
                in_turn: Vec::new(),
            },
            backups: Vec::new(),
            echoes: Vec::new(),
            storm: true,
            checked: 0,
            restores: 0,
        };
        for n in 0..AGENTS {
            world.at(Duration::ZERO, Event::AgentWakes(n));
        }
        world.backups.push(world.store.clone());
        for event in [Event::Fault, Event::Change, Event::Tick] {
            world.at(Duration::from_millis(500), event);
        }
        world
    }

    fn at(&mut self, after: Duration, event: Event) {
        self.at_moment(self.now + after, event);
    }

    fn at_moment(&mut self, moment: Instant, event: Event) {
        self.number += 1;
        self.order.push(Reverse((moment, self.number)));
        self.events.insert(self.number, event);
    }

    fn below(&mut self, n: usize) -> usize {
        self.rng.below(n as u64) as usize
    }

    fn within_ms(&mut self, most: u64) -> Duration {
        Duration::from_millis(1 + self.rng.below(most))
    }

    fn run_until(&mut self, end: Instant) {
        while let Some(Reverse((moment, number))) = self.order.peek().copied()
            && moment <= end
        {
            self.order.pop();
            self.now = moment;
            let event = self.events.remove(&number).unwrap();
            self.handle(event);
        }
        self.now = end;
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Dialled(n, attempt) => self.dialled(n, attempt),
            Event::Broken(n, attempt, why) => {
                if self.agents[n].up {
                    let now = self.now;
                    self.agents[n].session.handle_lost(attempt, why, now);
                    self.obey(n);
                }
            }
            Event::Closed(connection) => self.closed(connection),
            Event::ToControl(connection, message) => self.deliver_to_control(connection, message),
            Event::ToAgent(connection, message) => self.deliver_to_agent(connection, message),
            Event::AgentWakes(n) => {
                // Others were set meanwhile: only the one that is due counts.
                if self.agents[n].up && self.agents[n].session.poll_timeout() <= self.now {
                    let now = self.now;
                    self.agents[n].session.handle_timeout(now);
                    self.obey(n);
                }
            }
            Event::ControlWakes => {
                let due = self.control.leases.poll_timeout();
                if self.control.up && due.is_some_and(|due| due <= self.now) {
                    self.control.leases.handle_timeout(self.now);
                    self.transitions();
                }
            }
            Event::Persist(n, life, kept) => {
                let agent = &mut self.agents[n];
                if agent.life == life {
                    let lost = agent.disk.revoked.since(&kept.revoked).count();
                    assert_eq!(lost, 0, "the disk of agent {n} forgot");
                    agent.disk = *kept;
                }
            }
            Event::AgentStarts(n) => self.agent_starts(n),
            Event::ControlStarts(restored) => self.control_starts(restored),
            Event::Fault => {
                if self.storm {
                    self.fault();
                    self.at(FAULT_EVERY, Event::Fault);
                }
            }
            Event::Change => {
                if self.storm {
                    self.change();
                    self.at(CHANGE_EVERY, Event::Change);
                }
            }
            Event::Check(connection, subject) => self.check_second(connection, &subject),
            Event::Tick => {
                self.check_leases();
                self.at(Duration::from_secs(1), Event::Tick);
            }
        }
    }
}

fn run(seed: u64) {
    let mut world = World::new(seed);
    world.run_until(world.start + STORM);
    world.storm = false;
    for connection in &mut world.connections {
        connection.crawls = false;
    }
    // All that is broken is found, and who crashed is up again.
    let calm = world.now + CALM;
    world.run_until(calm);
    let mut dead = BTreeSet::new();
    let members: Vec<usize> = world.store.hosts.iter().copied().take(DEAD).collect();
    for n in members {
        let agent = &mut world.agents[n];
        agent.up = false;
        agent.life += 1;
        if let Some((_, connection)) = agent.connection.take() {
            world.connections[connection].over = true;
        }
        dead.insert(n);
    }
    world.run_until(calm + LEASE + Duration::from_secs(2));
    world.check_end(&dead);
    assert!(
        100 < world.checked,
        "only {} revocations were timed",
        world.checked
    );
    eprintln!(
        "{} connections, {} restores, {} revocations; {} looks at a sound connection after a second",
        world.connections.len(),
        world.restores,
        world.store.revoked.len(),
        world.checked
    );
}

#[test]
fn a_fleet_converges_whatever_befalls_it() {
    let one = std::env::var("MESHWORK_SEED").ok();
    let one = one.and_then(|text| text.parse().ok());
    let seeds = one.map_or(0..SEEDS, |seed: u64| seed..seed + 1);
    for seed in seeds {
        eprintln!("MESHWORK_SEED={seed}");
        run(seed);
    }
}
