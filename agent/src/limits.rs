//! Every bound of the data path by its name: what is counted when one bites, and what an operator can do about it.
//! docs/reference.md has the table with defaults and reasons.

use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_core::reason::Reason;
use mesh_runtime::mux::{Bound, Budget, Mux};
use nix::sys::resource::{Resource, getrlimit};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

macro_rules! limits {
    ($($variant:ident = $name:literal, $remedy:literal;)*) => {
        /// A bound.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(crate) enum Limit { $($variant,)* }

        impl Limit {
            const ALL: &[Self] = &[$(Self::$variant,)*];

            /// The label of metrics.
            pub(crate) const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }

            /// What to do when it bites too often.
            const fn remedy(self) -> &'static str {
                match self { $(Self::$variant => $remedy,)* }
            }
        }
    };
}

limits! {
    // How many and how much.
    Callers = "callers", "raise limits.connections, and LimitNOFILE of the agent's unit with it";
    Peers = "peers", "raise limits.connections, and LimitNOFILE of the agent's unit with it";
    Dialled = "dialled", "raise limits.connections, and LimitNOFILE of the agent's unit with it";
    Calls = "calls", "raise limits.connections, and LimitNOFILE of the agent's unit with it";
    Streams = "streams", "the called host can not follow, or raise limits.streams there";
    Held = "held", "control answers too slowly; see `mesh-agent status`, or raise limits.held";
    Handshakes = "handshakes", "somebody floods the mesh port; find and block the addresses";
    Buffers = "buffers", "programs do not read what they asked for; find them, or raise limits.buffer_mib";
    Heads = "heads", "somebody begins HTTP requests and does not end them; find and stop it";
    Descriptors = "descriptors", "raise LimitNOFILE of the agent's unit, or lower limits.connections";
    Http2Apps = "http2_apps", "the app allows too few requests on a connection, or answers too slowly";
    Floods = "floods", "a program asks for work without end; find it by the lines `http_flood` of the log";
    ControlFrames = "control_frames", "another agent asks and does not read; look at it";
    Dials = "dials", "a user's programs open connections to real addresses without end; let them keep connections open";
    Names = "names", "a user's programs ask for names without end; find them";
    KeptApps = "kept_apps", "nothing: apps get new connections";
    // How long.
    Connect = "connect", "the host or program does not answer, or raise timeouts.connect_s";
    Handshake = "handshake", "the peer is too slow, or raise timeouts.handshake_s";
    Head = "head", "the sender is too slow, or raise timeouts.head_s";
    Idle = "idle", "raise timeouts.idle_s where programs are silent for longer";
    TcpIdle = "tcp_idle", "raise timeouts.tcp_idle_s where programs are silent for longer, or set it to 0";
    HalfClosed = "half_closed", "raise timeouts.half_closed_s where answers take longer";
    Hold = "hold", "control answers too slowly; see `mesh-agent status`";
    PeerSilence = "peer_silence", "the other host, or the network to it, is gone or stands still";
    Drain = "drain", "raise timeouts.drain_s where calls take longer";
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Labels {
    limit: &'static str,
}

/// How often each bound was reached, and how much of some is in use, by all threads.
#[derive(Debug)]
pub(crate) struct Limits {
    reached: Vec<Counter>,
    /// What the buffers of all mesh connections count against.
    pub(crate) budget: Arc<Budget>,
    pub(crate) callers: Gauge,
    pub(crate) peers: Gauge,
    pub(crate) dialled: Gauge,
    pub(crate) calls: Gauge,
    pub(crate) held: Gauge,
    buffers: Gauge,
    descriptors: Gauge,
    most: Family<Labels, Gauge>,
}

impl Limits {
    pub(crate) fn register(registry: &mut Registry, budget: Arc<Budget>) -> Self {
        let reached = Family::<Labels, Counter>::default();
        let used = Family::<Labels, Gauge>::default();
        let most = Family::<Labels, Gauge>::default();
        let labels = |limit: &Limit| Labels {
            limit: limit.name(),
        };
        let gauge = |limit: Limit| used.get_or_create(&labels(&limit)).clone();
        let limits = Self {
            reached: Limit::ALL
                .iter()
                .map(|limit| reached.get_or_create(&labels(limit)).clone())
                .collect(),
            budget,
            callers: gauge(Limit::Callers),
            peers: gauge(Limit::Peers),
            dialled: gauge(Limit::Dialled),
            calls: gauge(Limit::Calls),
            held: gauge(Limit::Held),
            buffers: gauge(Limit::Buffers),
            descriptors: gauge(Limit::Descriptors),
            most: most.clone(),
        };
        registry.register(
            "limit_reached",
            "How often a bound was reached: something was refused, closed or put off",
            reached,
        );
        registry.register(
            "limit_used",
            "What is in use of a bound, by all threads",
            used,
        );
        registry.register("limit_max", "What may be in use of it at most", most);
        limits
    }

    /// Counts that a bound did its work.
    pub(crate) fn reached(&self, limit: Limit) {
        self.reached_by(limit, 1);
    }

    /// Counts that it did so often.
    pub(crate) fn reached_by(&self, limit: Limit, times: u64) {
        if let Some(counter) = self.reached.get(limit as usize) {
            counter.inc_by(times);
        }
    }

    /// Counts the bound that ended a connection with another agent, if one did.
    pub(crate) fn note_end(&self, mux: &Mux) {
        match mux.ended_by() {
            Some(Bound::Silence) => self.reached(Limit::PeerSilence),
            Some(Bound::Control) => self.reached(Limit::ControlFrames),
            Some(Bound::Buffers) => self.reached(Limit::Buffers),
            None => (),
        }
    }

    /// Tells how much of a bound there is.
    pub(crate) fn set_max(&self, limit: Limit, max: usize) {
        self.most
            .get_or_create(&Labels {
                limit: limit.name(),
            })
            .set(i64::try_from(max).unwrap_or(i64::MAX));
    }

    /// Looks at what is not counted as it changes. Descriptors are listed, which takes a while when they are many:
    /// not for the threads that carry calls.
    pub(crate) fn refresh(&self) {
        let gauge = |number: usize| i64::try_from(number).unwrap_or(i64::MAX);
        self.buffers.set(gauge(self.budget.held()));
        self.set_max(Limit::Buffers, self.budget.max());
        if let Ok(descriptors) = fs::read_dir("/proc/self/fd") {
            self.descriptors.set(gauge(descriptors.count()));
        }
        if let Ok((soft, _)) = getrlimit(Resource::RLIMIT_NOFILE) {
            let soft = usize::try_from(soft).unwrap_or(usize::MAX);
            self.set_max(Limit::Descriptors, soft);
        }
    }

    /// What is in use of each bound and how much there is: `(limit, used, max)`.
    pub(crate) fn in_use(&self) -> Vec<(Limit, u64, u64)> {
        let used = [
            (Limit::Callers, &self.callers),
            (Limit::Peers, &self.peers),
            (Limit::Dialled, &self.dialled),
            (Limit::Calls, &self.calls),
            (Limit::Held, &self.held),
            (Limit::Buffers, &self.buffers),
            (Limit::Descriptors, &self.descriptors),
        ];
        let number = |gauge: &Gauge| u64::try_from(gauge.get()).unwrap_or(0);
        used.map(|(limit, gauge)| {
            let most = self.most.get_or_create(&Labels {
                limit: limit.name(),
            });
            (limit, number(gauge), number(&most))
        })
        .to_vec()
    }
}

/// Says that new work is shed, at most once a second for each bound: what a stranger causes must not fill the log.
#[derive(Debug, Default)]
pub(crate) struct ShedLog {
    said: Vec<(Limit, Instant)>,
}

impl ShedLog {
    const EVERY: Duration = Duration::from_secs(1);

    pub(crate) fn say(&mut self, limit: Limit) {
        if self.passes(limit, Instant::now()) {
            log::warn!(
                limit = limit.name(), reason:% = Reason::Overloaded;
                "a limit is reached: new calls are refused, those that are open go on; {}", limit.remedy()
            );
        }
    }

    fn passes(&mut self, limit: Limit, now: Instant) -> bool {
        match self.said.iter_mut().find(|(said, _)| *said == limit) {
            Some((_, at)) if now.duration_since(*at) < Self::EVERY => return false,
            Some((_, at)) => *at = now,
            None => self.said.push((limit, now)),
        }
        true
    }
}

/// Descriptors that the data path leaves to the rest of the agent: the admin socket, which says what is wrong, names,
/// the session with control, health checks, files.
const RESERVED_DESCRIPTORS: u64 = 32;

/// Whether a new descriptor is one of those that are reserved. The kernel gives the lowest free number, so it says how
/// many are in use; the limit may have been changed from outside.
pub(crate) fn is_reserved(descriptor: &impl AsRawFd) -> bool {
    let number = u64::try_from(descriptor.as_raw_fd()).unwrap_or(0);
    getrlimit(Resource::RLIMIT_NOFILE)
        .is_ok_and(|(soft, _)| number.saturating_add(RESERVED_DESCRIPTORS) >= soft)
}

/// Whether this process, or its host, has no descriptor left.
pub(crate) fn out_of_descriptors(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE))
}

/// Whether a socket could not be had for want of something of this host: its other side is not to blame, and
/// trying another does not help.
pub(crate) fn is_shortage(error: &io::Error) -> bool {
    out_of_descriptors(error)
        || matches!(
            error.raw_os_error(),
            Some(libc::ENOBUFS | libc::ENOMEM | libc::EADDRNOTAVAIL)
        )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_bound_is_counted_under_its_name() {
        let mut registry = Registry::default();
        let limits = Limits::register(&mut registry, Budget::new(1));
        for limit in Limit::ALL {
            limits.reached(*limit);
        }
        limits.callers.set(3);
        limits.set_max(Limit::Callers, 10);
        assert!(limits.in_use().contains(&(Limit::Callers, 3, 10)));
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        for limit in Limit::ALL {
            let line = format!("limit_reached_total{{limit=\"{}\"}} 1\n", limit.name());
            assert!(text.contains(&line), "{line}{text}");
            let documented = include_str!("../../docs/reference.md");
            let row = format!("| `{}` |", limit.name());
            assert!(documented.contains(&row), "docs/reference.md: {row}");
        }
    }

    #[test]
    fn a_flood_says_a_line_a_second_for_each_bound() {
        let mut log = ShedLog::default();
        let start = Instant::now();
        assert!(log.passes(Limit::Buffers, start));
        assert!(log.passes(Limit::Callers, start));
        for ms in 0..1000 {
            assert!(!log.passes(Limit::Buffers, start + Duration::from_millis(ms)));
        }
        assert!(log.passes(Limit::Buffers, start + Duration::from_secs(1)));
    }
}
