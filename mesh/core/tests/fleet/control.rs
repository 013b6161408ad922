//! Control: its sessions and leases, what it tells them, and what is left of it after a crash.

use super::*;

impl World {
    pub(super) fn deliver_to_control(&mut self, connection: usize, message: ToControl) {
        if !self.control.up {
            return;
        }
        let n = self.connections[connection].agent;
        let session = SessionId(connection as u64);
        if let ToControl::Hello {
            boot,
            index,
            revocations,
        } = message
        {
            return self.hello(connection, boot, index, revocations);
        }
        let known = self.control.sessions.contains_key(&connection);
        let beaten = self.control.leases.beat(&uid(n), session, self.now);
        assert_eq!(beaten, known, "a session that is over extends no lease");
        if !known {
            return;
        }
        self.control.heard.insert(n, self.now);
        self.transitions();
        match message {
            ToControl::Beat => self.send_down(connection, ToAgent::Beat),
            ToControl::Revocations(known) => {
                for one in known {
                    self.revoke(one);
                }
            }
            ToControl::Hello { .. } | ToControl::Other => {}
        }
    }

    pub(super) fn hello(
        &mut self,
        connection: usize,
        boot: u64,
        index: Option<Installed>,
        revocations: Option<Installed>,
    ) {
        // One that comes once more belongs to a stream that is over.
        if self.connections[connection].over || self.control.sessions.contains_key(&connection) {
            return;
        }
        let n = self.connections[connection].agent;
        if !self.store.hosts.contains(&n) {
            return self.refuse(connection);
        }
        let (session, boot) = (SessionId(connection as u64), boot.to_string());
        let opened = self
            .control
            .leases
            .opened(&uid(n), session, &boot, self.now);
        match opened {
            Err(_) => return self.refuse(connection),
            Ok(Some(replaced)) => {
                let replaced = replaced.0 as usize;
                self.control.sessions.remove(&replaced);
                self.refuse(replaced);
            }
            Ok(None) => {}
        }
        self.control.heard.insert(n, self.now);
        self.transitions();
        let epoch = self.store.epoch;
        let of = |at: Option<Installed>| at.filter(|at| at.epoch == epoch).map(|at| at.revision);
        let told = (of(index), of(revocations));
        self.control.sessions.insert(connection, told);
        self.send_down(connection, ToAgent::Welcome { epoch });
        self.tell(connection);
    }

    pub(super) fn refuse(&mut self, connection: usize) {
        self.send_down(connection, ToAgent::Refused);
        self.connections[connection].over = true;
    }

    /// What the agent of a session lacks: first what must no more be believed.
    pub(super) fn tell(&mut self, connection: usize) {
        let Some(&(index, revocations)) = self.control.sessions.get(&connection) else {
            return;
        };
        let last = self.store.in_turn.last();
        let last = last.map_or(0, |(revision, _)| *revision);
        let mut messages = Vec::new();
        if revocations.is_none_or(|told| told < last) {
            messages = self.named(revocations, last);
        }
        if index != Some(self.store.revision) {
            messages.push(ToAgent::Index(self.update(index)));
        }
        let told = (Some(self.store.revision), Some(last));
        self.control.sessions.insert(connection, told);
        for message in messages {
            self.send_down(connection, message);
        }
    }

    pub(super) fn named(&self, told: Option<u64>, last: u64) -> Vec<ToAgent> {
        let newer = self.store.in_turn.iter();
        let newer = newer.filter(|(at, _)| told.is_none_or(|told| told < *at));
        let newer: Vec<Revocation> = newer.map(|(_, one)| one.clone()).collect();
        let mut parts: Vec<_> = newer.chunks(PART).map(<[_]>::to_vec).collect();
        if parts.is_empty() {
            parts.push(Vec::new());
        }
        let count = parts.len();
        let parts = parts.into_iter().zip(1..).map(|(revoked, part)| {
            ToAgent::Revocations(Named {
                at: Installed {
                    epoch: self.store.epoch,
                    revision: last,
                },
                snapshot: told.is_none(),
                more: part < count,
                revoked,
            })
        });
        parts.collect()
    }

    pub(super) fn update(&self, have: Option<u64>) -> Update {
        let store = &self.store;
        let newer = |at: u64| have.is_none_or(|have| have < at);
        let services = store.services.iter().filter(|(_, (at, _))| newer(*at));
        let mut services: BTreeMap<u64, Option<u64>> =
            services.map(|(n, (_, value))| (*n, Some(*value))).collect();
        if have.is_some() {
            let gone = store.gone.iter().filter(|(_, at)| newer(**at));
            services.extend(gone.map(|(n, _)| (*n, None)));
        }
        Update {
            revision: store.revision,
            snapshot: have.is_none(),
            services,
        }
    }

    pub(super) fn tell_all(&mut self) {
        let sessions: Vec<usize> = self.control.sessions.keys().copied().collect();
        for connection in sessions {
            self.tell(connection);
        }
    }

    pub(super) fn closed(&mut self, connection: usize) {
        if self.control.up && self.control.sessions.remove(&connection).is_some() {
            let host = uid(self.connections[connection].agent);
            let session = SessionId(connection as u64);
            self.control.leases.closed(&host, session);
        }
    }

    pub(super) fn transitions(&mut self) {
        while let Some(transition) = self.control.leases.poll_transition() {
            match transition {
                Transition::Live(uid) => {
                    self.store.live.insert(number_of(&uid));
                }
                Transition::Stale(uid) => {
                    self.store.live.remove(&number_of(&uid));
                }
                Transition::Held { .. } | Transition::Released => {}
            }
        }
        if let Some(wake) = self.control.leases.poll_timeout() {
            self.at_moment(wake.max(self.now), Event::ControlWakes);
        }
    }

    pub(super) fn revoke(&mut self, revocation: Revocation) {
        if !self.store.revoked.add(revocation.clone()) {
            return;
        }
        let subject = revocation.subject.clone();
        self.store.revision += 1;
        self.store.in_turn.push((self.store.revision, revocation));
        if subject.account.is_none() {
            let n = number_of(&subject.host);
            self.store.hosts.remove(&n);
            self.store.live.remove(&n);
            if let Some(SessionId(connection)) = self.control.leases.removed(&subject.host) {
                let connection = connection as usize;
                self.control.sessions.remove(&connection);
                self.refuse(connection);
            }
        }
        self.tell_all();
        let sessions: Vec<usize> = self.control.sessions.keys().copied().collect();
        for connection in sessions {
            self.at(SECOND, Event::Check(connection, subject.clone()));
        }
    }

    pub(super) fn control_crashes(&mut self, restored: Option<Box<Store>>) {
        if !self.control.up {
            return;
        }
        self.control.up = false;
        for connection in 0..self.connections.len() {
            if !self.connections[connection].over {
                // A half of the agents hears it, the others find out.
                let heard = self.rng.below(2) == 0;
                self.cut(connection, heard);
                self.connections[connection].over = true;
            }
        }
        let back = self.within_ms(20_000);
        self.at(back, Event::ControlStarts(restored));
    }

    pub(super) fn control_starts(&mut self, restored: Option<Box<Store>>) {
        if let Some(store) = restored {
            let epoch = self.store.epoch + 1;
            self.store = *store;
            self.store.epoch = epoch;
            self.restores += 1;
        }
        let live = self.store.live.iter().map(|n| uid(*n));
        let stale = self.store.hosts.difference(&self.store.live);
        let stale = stale.map(|n| uid(*n));
        self.control = Control {
            up: true,
            leases: Leases::new(Settings::default(), live, stale, self.now),
            sessions: BTreeMap::new(),
            heard: BTreeMap::new(),
            started: self.now,
        };
        self.transitions();
    }
}
