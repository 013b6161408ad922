//! Connections: dialled, crawling, broken, and what late messages of theirs are.

use super::*;

impl World {
    pub(super) fn dialled(&mut self, n: usize, attempt: Attempt) {
        if !self.agents[n].up {
            return;
        }
        if !self.control.up {
            // Refused at once, or nobody says anything.
            if self.rng.below(2) == 0 {
                self.at(Duration::ZERO, Event::Broken(n, attempt, Lost::Broken));
            }
            return;
        }
        let crawls = self.storm && self.rng.below(20) == 0;
        self.agents[n].connection = Some((attempt, self.connections.len()));
        self.connections.push(Connection {
            agent: n,
            attempt,
            deaf: false,
            crawls,
            over: false,
            up: self.now,
            down: self.now,
        });
        let now = self.now;
        self.agents[n].session.handle_connected(attempt, now);
        self.obey(n);
    }

    pub(super) fn send_up(&mut self, connection: usize, message: ToControl) {
        if let Some(moment) = self.arrival(connection, |c| &mut c.up) {
            self.echo(Event::ToControl(connection, message.clone()));
            self.at_moment(moment, Event::ToControl(connection, message));
        }
    }

    pub(super) fn send_down(&mut self, connection: usize, message: ToAgent) {
        if let Some(moment) = self.arrival(connection, |c| &mut c.down) {
            self.echo(Event::ToAgent(connection, message.clone()));
            self.at_moment(moment, Event::ToAgent(connection, message));
        }
    }

    pub(super) fn arrival(
        &mut self,
        connection: usize,
        way: fn(&mut Connection) -> &mut Instant,
    ) -> Option<Instant> {
        let crawls = self.connections[connection].crawls;
        let delay = self.within_ms(if crawls { CRAWL_MS } else { DELAY_MS });
        let (now, state) = (self.now, &mut self.connections[connection]);
        if state.deaf || state.over {
            return None;
        }
        let last = way(state);
        *last = (*last).max(now + delay);
        Some(*last)
    }

    /// Remembers a message, which may come once more long after.
    pub(super) fn echo(&mut self, event: Event) {
        if self.rng.below(10) == 0 {
            if ECHOES_MAX <= self.echoes.len() {
                let oldest = self.below(ECHOES_MAX);
                self.echoes.swap_remove(oldest);
            }
            self.echoes.push(event);
        }
    }

    /// A connection breaks: both ends hear it, or find out by silence.
    pub(super) fn cut(&mut self, connection: usize, heard: bool) {
        let Connection { agent, attempt, .. } = self.connections[connection];
        self.connections[connection].deaf = true;
        if heard {
            self.connections[connection].over = true;
            let (first, second) = (self.within_ms(DELAY_MS), self.within_ms(DELAY_MS));
            self.at(first, Event::Broken(agent, attempt, Lost::Broken));
            self.at(second, Event::Closed(connection));
        }
    }
}
