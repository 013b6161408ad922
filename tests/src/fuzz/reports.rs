//! What control reads of a host's report, by its own file: no other knows what it makes of it.

#[path = "../../../control/src/rpc/report.rs"]
mod report;

use std::net::SocketAddr;

use mesh_api::proto::Report;
use mesh_core::names::{Account, ServiceName};
use mesh_core::reason::Reason;
use mesh_core::service::{Port, Transport};

/// As control has it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Workload {
    account: Account,
    offers: Vec<Offer>,
}

/// As control has it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Offer {
    service: ServiceName,
    ports: Vec<Port>,
    transport: Transport,
    healthy: bool,
    plaintext: Vec<SocketAddr>,
}

/// As control has it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Refusal {
    reason: Reason,
    message: String,
}

impl Refusal {
    fn invalid(message: impl Into<String>) -> Self {
        Self {
            reason: Reason::Invalid,
            message: message.into(),
        }
    }
}

/// The report of a host: each workload and each service of it once, in order, in a namespace of its own, with ports; and nothing
/// is lost without a word.
pub fn report(wire: &Report) {
    let read = match report::read(wire) {
        Ok(read) => read,
        Err(Refusal { reason, message }) => {
            return assert!(reason == Reason::Invalid && !message.is_empty());
        }
    };
    let services = |workload: &mesh_api::proto::ReportedWorkload| workload.services.len();
    let reported: usize = wire.workloads.iter().map(services).sum();
    let mut offered = 0;
    for pair in read.workloads.windows(2) {
        assert!(pair[0].account < pair[1].account, "twice, or in disorder");
    }
    for Workload { account, offers } in &read.workloads {
        offered += offers.len();
        for (number, offer) in offers.iter().enumerate() {
            assert_eq!(offer.service.namespace, account.namespace);
            assert!(offers[..number].iter().all(|o| o.service != offer.service));
            assert!(!offer.ports.is_empty());
            assert!(offer.ports.iter().all(|port| port.number != 0));
            let mut numbers = offer.ports.windows(2);
            assert!(numbers.all(|p| p[0].number < p[1].number));
        }
    }
    let told = read.problems.len();
    assert!(read.workloads.len() + told >= wire.workloads.len());
    let whole = read.workloads.len() == wire.workloads.len();
    assert!(!whole || offered + told >= reported, "lost without a word");
}
