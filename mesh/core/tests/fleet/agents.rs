//! The shell of an agent: it obeys its session, keeps what it is told, crashes and starts again.

use super::*;

impl World {
    pub(super) fn obey(&mut self, n: usize) {
        while let Some(command) = self.agents[n].session.poll_command() {
            match command {
                Command::Connect { attempt, .. } => {
                    let delay = self.within_ms(DELAY_MS);
                    self.at(delay, Event::Dialled(n, attempt));
                }
                Command::Disconnect { attempt, .. } => {
                    if let Some((of, connection)) = self.agents[n].connection
                        && of == attempt
                    {
                        self.agents[n].connection = None;
                        let delay = self.within_ms(DELAY_MS);
                        if !self.connections[connection].deaf {
                            self.at(delay, Event::Closed(connection));
                        }
                        self.connections[connection].over = true;
                    }
                }
                Command::Send(what) => self.send(n, what),
                Command::NewEpoch { .. } => {}
                Command::Install {
                    installed,
                    snapshot,
                } => self.install(n, installed, snapshot),
                Command::Ignore { .. } => self.agents[n].pending = None,
            }
        }
        let wake = self.agents[n].session.poll_timeout();
        self.at_moment(wake.max(self.now), Event::AgentWakes(n));
    }

    pub(super) fn send(&mut self, n: usize, what: Outgoing) {
        let agent = &mut self.agents[n];
        let Some((_, connection)) = agent.connection else {
            return;
        };
        let message = match what {
            Outgoing::Hello(index) => ToControl::Hello {
                boot: agent.boot,
                index,
                revocations: agent.known.at(),
            },
            Outgoing::Beat { .. } => ToControl::Beat,
            Outgoing::Report | Outgoing::Subscribe | Outgoing::Ack | Outgoing::Edges => {
                ToControl::Other
            }
            Outgoing::Revocations => {
                let (part, more) = agent.known.take_forgotten(PART);
                if more {
                    agent.session.handle_revocations_forgotten();
                }
                ToControl::Revocations(part)
            }
        };
        self.send_up(connection, message);
    }

    pub(super) fn install(&mut self, n: usize, installed: Installed, snapshot: bool) {
        let agent = &mut self.agents[n];
        let update = agent.pending.take();
        let update = update.expect("what is to be installed is at hand");
        assert_eq!(update.revision, installed.revision);
        if snapshot {
            agent.index.clear();
        }
        for (service, now) in update.services {
            match now {
                Some(value) => agent.index.insert(service, value),
                None => agent.index.remove(&service),
            };
        }
        self.persist(n);
    }

    pub(super) fn persist(&mut self, n: usize) {
        let agent = &self.agents[n];
        let kept = Box::new(Kept {
            installed: agent.session.installed(),
            index: agent.index.clone(),
            revoked: Revocations::clone(agent.known.all()),
            revoked_at: agent.known.at(),
        });
        self.at(PERSIST, Event::Persist(n, agent.life, kept));
    }

    pub(super) fn deliver_to_agent(&mut self, connection: usize, message: ToAgent) {
        let Connection {
            agent: n, attempt, ..
        } = self.connections[connection];
        let now = self.now;
        let agent = &mut self.agents[n];
        if !agent.up {
            return;
        }
        // The attempts of a process begin anew: only its own messages can be late to it.
        let ours = agent.connection == Some((attempt, connection));
        if !ours && agent.connection.is_some_and(|(now, _)| now <= attempt) {
            return;
        }
        let before = agent.session.installed();
        match message {
            ToAgent::Welcome { epoch } => {
                agent.session.handle_welcome(attempt, epoch, now);
                if ours && agent.session.is_live() {
                    agent.known.begin();
                }
            }
            ToAgent::Beat => agent.session.handle_beat(attempt, now),
            ToAgent::Index(update) => {
                let (revision, snapshot) = (update.revision, update.snapshot);
                if ours {
                    agent.pending = Some(update);
                }
                agent.session.handle_index(attempt, revision, snapshot, now);
            }
            ToAgent::Revocations(named) => {
                agent.session.handle_other(attempt, now);
                if ours && agent.session.is_live() {
                    let known = Arc::clone(agent.known.all());
                    if agent.known.handle(named, 0) {
                        agent.session.handle_revocations_forgotten();
                    }
                    let lost = known.since(agent.known.all()).count();
                    assert_eq!(lost, 0, "one was taken back");
                    self.persist(n);
                }
            }
            ToAgent::Refused => agent.session.handle_lost(attempt, Lost::Refused, now),
        }
        let after = self.agents[n].session.installed();
        if let (Some(before), Some(after)) = (before, after)
            && before.epoch == after.epoch
        {
            assert!(before.revision <= after.revision, "agent {n} went back");
        }
        self.obey(n);
    }

    pub(super) fn agent_crashes(&mut self, n: usize, reboot: bool) {
        let agent = &mut self.agents[n];
        if !agent.up {
            return;
        }
        agent.up = false;
        agent.life += 1;
        agent.boot += u64::from(reboot);
        if let Some((_, connection)) = agent.connection.take() {
            self.connections[connection].deaf = true;
            self.connections[connection].over = true;
            // The death of a process is heard; that of a machine is not.
            if !reboot {
                self.at(Duration::from_millis(1), Event::Closed(connection));
            }
        }
        let back = self.within_ms(20_000);
        self.at(back, Event::AgentStarts(n));
    }

    pub(super) fn agent_starts(&mut self, n: usize) {
        let (seed, now) = (self.rng.next_u64(), self.now);
        let agent = &mut self.agents[n];
        let disk = agent.disk.clone();
        agent.up = true;
        agent.session = Session::new(2, disk.installed, seed, now);
        agent.index = disk.index;
        agent.known = Known::new(disk.revoked, disk.revoked_at);
        agent.pending = None;
        self.obey(n);
    }
}
