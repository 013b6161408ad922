//! What changes and what befalls: by the seed.

use super::*;

impl World {
    pub(super) fn change(&mut self) {
        if !self.control.up {
            return;
        }
        match self.rng.below(12) {
            0 | 3 => {
                let account = (self.rng.below(4) != 0).then(|| {
                    let n = self.rng.below(5);
                    Account::parse(&format!("shop/a{n}")).unwrap()
                });
                let host = uid(self.below(AGENTS));
                // A tenth of the fleet at most: the rest is to be looked at.
                let removed = AGENTS - self.store.hosts.len();
                if account.is_some() || removed < AGENTS / 10 {
                    self.revoke(Revocation {
                        subject: Subject { host, account },
                        at_s: 1,
                        signature: Arc::default(),
                        issuer: Arc::default(),
                    });
                }
                return;
            }
            1 => self.backups.push(self.store.clone()),
            2 => {
                let service = self.rng.below(40);
                if self.store.services.remove(&service).is_some() {
                    self.store.revision += 1;
                    self.store.gone.insert(service, self.store.revision);
                }
            }
            _ => {
                let (service, value) = (self.rng.below(40), self.rng.next_u64());
                self.store.revision += 1;
                self.store.gone.remove(&service);
                let revision = self.store.revision;
                self.store.services.insert(service, (revision, value));
            }
        }
        self.tell_all();
    }

    pub(super) fn fault(&mut self) {
        let open: Vec<usize> = self.control.sessions.keys().copied().collect();
        let some = self.below(open.len().max(1));
        let some = open.get(some).copied().unwrap_or_default();
        let there = self.connections.get(some).is_some_and(|c| !c.over);
        let agent = self.below(AGENTS);
        match self.rng.below(400) {
            0 => self.control_crashes(None),
            1 => {
                let backup = self.below(self.backups.len());
                let backup = Box::new(self.backups[backup].clone());
                self.control_crashes(Some(backup));
            }
            2..=60 if there => self.cut(some, true),
            61..=120 if there => self.cut(some, false),
            121..=160 if there => self.connections[some].crawls = true,
            161..=190 => self.agent_crashes(agent, false),
            191..=200 => self.agent_crashes(agent, true),
            201.. if !self.echoes.is_empty() => {
                let echo = self.below(self.echoes.len());
                let echo = self.echoes.swap_remove(echo);
                let (Event::ToControl(connection, _) | Event::ToAgent(connection, _)) = &echo
                else {
                    return;
                };
                // Only of connections that are over: in one that stands there is an order.
                if self.connections[*connection].over {
                    let late = self.within_ms(20_000);
                    self.at(late, echo);
                }
            }
            _ => {}
        }
    }
}
