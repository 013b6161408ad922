//! What must hold, in each step and in the end.

use super::*;

impl World {
    pub(super) fn check_second(&mut self, connection: usize, subject: &Subject) {
        let state = &self.connections[connection];
        let agent = &self.agents[state.agent];
        let sound = !state.deaf && !state.over && !state.crawls;
        let same = agent.up && agent.connection == Some((state.attempt, connection));
        if sound && same && self.control.sessions.contains_key(&connection) {
            self.checked += 1;
            let knows = agent.known.all().contains(subject);
            assert!(
                knows,
                "agent {} serves {subject:?} after its second",
                state.agent
            );
        }
    }

    pub(super) fn check_leases(&self) {
        if !self.control.up {
            return;
        }
        let control = &self.control;
        let held: BTreeSet<&HostUid> = control.leases.held().collect();
        let grace = Settings::default().start_grace.max(LEASE);
        for n in &self.store.hosts {
            let host = uid(*n);
            let live = control.leases.is_live(&host);
            assert_eq!(live, self.store.live.contains(n), "host {n}");
            let until = match control.heard.get(n) {
                Some(heard) => *heard + LEASE,
                None => control.started + grace,
            };
            let allowed = self.now <= until || held.contains(&host);
            assert!(!live || allowed, "the lease of host {n} outlives it");
        }
    }

    pub(super) fn check_end(&self, dead: &BTreeSet<usize>) {
        let store = &self.store;
        let services = store.services.iter();
        let expected: BTreeMap<u64, u64> = services.map(|(n, (_, value))| (*n, *value)).collect();
        for (n, agent) in self.agents.iter().enumerate() {
            if dead.contains(&n) {
                assert!(!store.live.contains(&n), "{n} is dead and not stale");
            } else if store.hosts.contains(&n) {
                assert!(agent.session.is_live(), "agent {n} did not come back");
                assert!(store.live.contains(&n), "host {n} is not live");
                assert_eq!(agent.index, expected, "agent {n}");
                let forgotten = agent.known.all().since(&store.revoked).count();
                assert_eq!(forgotten, 0, "control forgot what agent {n} knows");
                let lacks = store.revoked.since(agent.known.all()).count();
                assert_eq!(lacks, 0, "agent {n} does not know what is revoked");
            } else {
                assert!(!agent.session.is_live(), "agent {n} was removed");
            }
        }
        for one in store.revoked.iter() {
            let member = store.hosts.contains(&number_of(&one.subject.host));
            let whole = one.subject.account.is_none();
            assert!(!(whole && member), "{:?} is a member", one.subject);
        }
    }
}
