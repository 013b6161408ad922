//! What strangers may make a thread do before they have shown who they are.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::{Duration, Instant};

/// TLS handshakes under way: who has not shown who it is gets little.
#[derive(Debug, Default)]
pub(crate) struct Handshakes {
    all: usize,
    by_source: HashMap<IpAddr, usize>,
}

impl Handshakes {
    /// At once, a thread: half a second's work of a core.
    const MAX: usize = 1024;
    /// At once from one source: a gateway that brings many peers has so many new ones at once.
    const PER_SOURCE_MAX: usize = 256;
    /// The last quarter is for sources that have no more than this.
    const FEW: usize = 8;

    pub(crate) fn begin(&mut self, from: IpAddr) -> bool {
        let from = source(from);
        let here = self.by_source.get(&from).copied().unwrap_or(0);
        let most = if self.all < Self::MAX / 4 * 3 {
            Self::PER_SOURCE_MAX
        } else {
            Self::FEW
        };
        if self.all >= Self::MAX || here >= most {
            return false;
        }
        self.all += 1;
        self.by_source.insert(from, here + 1);
        true
    }

    pub(crate) fn end(&mut self, from: IpAddr) {
        let from = source(from);
        self.all -= 1;
        if let Some(here) = self.by_source.get_mut(&from) {
            *here -= 1;
            if *here == 0 {
                self.by_source.remove(&from);
            }
        }
    }
}

/// Addresses of which whoever has one may have all count as one: those of an IPv6 subnet (RFC 4291, 64 bits), and this
/// host's loopback.
fn source(address: IpAddr) -> IpAddr {
    match address {
        _ if address.is_loopback() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(v6) => Ipv6Addr::from_bits(v6.to_bits() & !u128::from(u64::MAX)).into(),
        IpAddr::V4(_) => address,
    }
}

/// Lets some log lines pass a second; what a stranger causes must not fill the log.
#[derive(Debug, Default)]
pub(crate) struct LogGate {
    second: Option<Instant>,
    passed: u32,
}

impl LogGate {
    const A_SECOND: u32 = 10;

    pub(crate) fn passes(&mut self) -> bool {
        let fresh = self
            .second
            .is_none_or(|at| at.elapsed() >= Duration::from_secs(1));
        if fresh {
            (self.second, self.passed) = (Some(Instant::now()), 0);
        }
        self.passed += 1;
        self.passed <= Self::A_SECOND
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fill(handshakes: &mut Handshakes, from: &str) -> usize {
        let from = from.parse().unwrap();
        (0..2_000).filter(|_| handshakes.begin(from)).count()
    }

    #[test]
    fn sources_that_have_many_leave_room_for_others() {
        let mut handshakes = Handshakes::default();
        for from in ["192.0.2.1", "192.0.2.2", "192.0.2.3"] {
            assert_eq!(fill(&mut handshakes, from), 256);
        }
        for from in ["192.0.2.4", "2001:db8::1", "127.0.0.1"] {
            assert_eq!(fill(&mut handshakes, from), 8);
        }
        for from in ["192.0.2.1", "2001:db8::2:1", "127.0.0.2", "::1"] {
            assert_eq!(fill(&mut handshakes, from), 0, "{from}");
        }
        assert!(handshakes.begin("2001:db8:0:1::1".parse().unwrap()));
        for _ in 0..8 {
            handshakes.end("2001:db8::5".parse().unwrap());
        }
        assert_eq!(fill(&mut handshakes, "2001:db8::7"), 8);
    }
}
