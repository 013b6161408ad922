//! At which real addresses calls are taken over: those of the hosts that serve what asks for it, as control lists them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use mesh_core::names::ServiceName;
use mesh_core::service::{Capture, Service, Transport};

use crate::capture::real::{REALS_MAX, Real};
use crate::view::View;

/// Whose calls are taken over at a real address.
pub(crate) type Reals = BTreeMap<SocketAddr, ServiceName>;

/// What is to be taken over.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Wanted {
    pub(crate) reals: Reals,
    /// The same, for the kernel.
    pub(crate) told: Vec<Real>,
    /// How many more there are than can be.
    pub(crate) left_out: usize,
}

/// Takes ports out that must stay as they are.
#[derive(Clone, Debug, Default)]
pub(crate) struct Spared {
    /// Nothing is taken over at all.
    pub(crate) everything: bool,
    pub(crate) keep_open: Vec<u16>,
    /// Where control answers, `host:port`: the mesh must not need itself.
    pub(crate) control: Vec<String>,
}

impl Spared {
    fn spares(&self, address: SocketAddr) -> bool {
        self.keep_open.contains(&address.port())
            || self.control.iter().any(|control| is_at(control, address))
    }
}

/// Whether `control` may be at this address: behind a name there may be any.
fn is_at(control: &str, address: SocketAddr) -> bool {
    if let Ok(known) = control.parse::<SocketAddr>() {
        return known == address;
    }
    let port = control.rsplit_once(':').map(|(_, port)| port);
    port.and_then(|port| port.parse().ok()) == Some(address.port())
}

/// `None` while it is not known of all: then what stands is kept, since silence must open nothing.
///
/// Not among them: this host's own addresses, whose programs are reached without leaving it, and servers without an agent
/// to which this host itself goes on in plaintext.
pub(crate) fn wanted(view: &View, spared: &Spared) -> Option<Wanted> {
    if spared.everything {
        return Some(Wanted::default());
    }
    let index = view.index.as_ref()?;
    let workloads = view.workloads.workloads.iter();
    let beyond: BTreeSet<SocketAddr> = workloads
        .flat_map(|workload| &workload.services)
        .flat_map(|service| service.endpoints.iter().copied())
        .collect();
    let mut wanted = Wanted::default();
    let asking = index.services();
    for service in asking.filter(|service| service.capture == Capture::VipAndReal) {
        let endpoints = view.endpoints.get(&service.name)?;
        let here = endpoints
            .iter()
            .filter(|e| e.network == view.host.network && e.host != view.host.uid);
        for endpoint in here {
            for port in &service.ports {
                let address = SocketAddr::new(endpoint.address, port.number);
                if !spared.spares(address) && !beyond.contains(&address) {
                    wanted.take(address, service);
                }
            }
        }
    }
    // What a strict service had: a host that is revoked, ill or gone is not to be called in plaintext for that.
    for (address, name) in view.reals.iter() {
        if let Some(service) = index.get(name)
            && service.capture == Capture::VipAndReal
            && service.transport == Transport::Strict
            && service.port(address.port()).is_some()
            && !wanted.reals.contains_key(address)
            && !is_ours(view, name, *address)
            && !spared.spares(*address)
            && !beyond.contains(address)
        {
            wanted.take(*address, service);
        }
    }
    Some(wanted)
}

/// Whether this host serves it there itself by now.
fn is_ours(view: &View, name: &ServiceName, address: SocketAddr) -> bool {
    let endpoints = view
        .endpoints
        .get(name)
        .into_iter()
        .flat_map(|all| all.iter());
    let mut here = endpoints.filter(|e| e.host == view.host.uid);
    here.any(|e| e.address == address.ip())
}

impl Wanted {
    /// Where two services are at one address, calls are the first one's, and as strict as either is.
    fn take(&mut self, address: SocketAddr, service: &Service) {
        let strict = service.transport == Transport::Strict;
        let real = Real {
            address: address.ip(),
            port: address.port(),
            strict,
        };
        if self.reals.contains_key(&address) {
            let told = self.told.iter_mut();
            let mut same = told.filter(|r| (r.address, r.port) == (real.address, real.port));
            if let Some(same) = same.next() {
                same.strict |= strict;
            }
        } else if self.reals.len() == REALS_MAX {
            self.left_out += 1;
        } else {
            self.reals.insert(address, service.name.clone());
            self.told.push(real);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_is_never_reached_by_the_mesh() {
        let at = |text: &str| text.parse::<SocketAddr>().unwrap();
        assert!(is_at("10.0.0.1:7440", at("10.0.0.1:7440")));
        assert!(!is_at("10.0.0.1:443", at("10.0.0.2:443")));
        assert!(is_at("[fd00::1]:443", at("[fd00::1]:443")));
        assert!(is_at("control.example.com:443", at("10.0.0.2:443")));
        assert!(!is_at("control.example.com:443", at("10.0.0.2:80")));
    }
}
