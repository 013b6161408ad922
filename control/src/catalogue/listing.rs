//! Which of what hosts report is listed as an endpoint, and why not.

use std::sync::Arc;

use mesh_core::names::{Account, ServiceName};
use mesh_core::reason::Reason;
use mesh_core::service::{Endpoint, Health};

use super::objects::{Host, Offer, Service, show_ports};
use super::{Catalogue, Endpoints};

/// Why an offer of a host is not listed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Problem {
    pub account: Account,
    /// `None`: the whole workload.
    pub service: Option<ServiceName>,
    pub reason: Reason,
    pub message: String,
}

impl Catalogue {
    /// All that is wrong with a host's report. That its address is being proven is not.
    pub(crate) fn problems_of(&self, host: &Host) -> Vec<Problem> {
        let mut problems = Vec::new();
        for workload in &host.workloads {
            if !host.scope.allows_account(&workload.account) {
                problems.push(Problem {
                    account: workload.account.clone(),
                    service: None,
                    reason: Reason::OutOfScope,
                    message: format!(
                        "the token of host {} does not allow the identity {}; make one that does",
                        host.name, workload.account
                    ),
                });
                continue;
            }
            for offer in &workload.offers {
                if let Err((reason, message)) = self.judge(host, &workload.account, offer) {
                    // The first proof is mostly lost to an agent that is about to be ready: no problem yet.
                    if reason == Reason::AddressUnproven && !host.doubted {
                        continue;
                    }
                    problems.push(Problem {
                        account: workload.account.clone(),
                        service: Some(offer.service.clone()),
                        reason,
                        message,
                    });
                }
            }
        }
        problems
    }

    /// Whether an offer is an endpoint of its service.
    fn judge(&self, host: &Host, account: &Account, offer: &Offer) -> Result<(), (Reason, String)> {
        let name = &offer.service;
        if self.is_revoked(&host.uid, account) {
            let message = format!("the identity {account} was revoked on host {}", host.name);
            return Err((Reason::IdentityRevoked, message));
        }
        if !host.scope.allows_account(account) || !host.scope.allows_service(name) {
            let message = format!(
                "the token of host {} does not allow to serve {name} as {account}; make one that does",
                host.name
            );
            return Err((Reason::OutOfScope, message));
        }
        let service = self.services.get(name).ok_or_else(|| {
            let message = format!(
                "{name} was not made: the range of virtual addresses or the number of services is used up"
            );
            (Reason::VipExhausted, message)
        })?;
        if service.ports != offer.ports {
            return Err((Reason::ServiceConflict, self.conflict(service, offer)));
        }
        let mut all = host.offers();
        if let Some((first, _)) = all.find(|(_, o)| o.service == *name)
            && first != account
        {
            let message = format!("on this host {name} is served by {first} already");
            return Err((Reason::ServiceConflict, message));
        }
        if !host.proven {
            let message = format!(
                "control has not reached the agent of host {} at {} port {} yet; is the port open to it?",
                host.name, host.address, host.mesh_port
            );
            return Err((Reason::AddressUnproven, message));
        }
        if !offer.healthy {
            let message = format!("the health check of {name} fails on host {}", host.name);
            return Err((Reason::Unhealthy, message));
        }
        Ok(())
    }

    /// What a host offers as this service, if it may: such a host can own it.
    pub(super) fn offer_of<'a>(&self, host: &'a Host, name: &ServiceName) -> Option<&'a Offer> {
        let allowed = |account: &Account| {
            host.scope.allows_account(account)
                && host.scope.allows_service(name)
                && !self.is_revoked(&host.uid, account)
        };
        let mut offers = host.offers().filter(|(_, o)| o.service == *name);
        offers
            .find(|(account, _)| allowed(account))
            .map(|(_, offer)| offer)
    }

    fn conflict(&self, service: &Service, offer: &Offer) -> String {
        let owner = match &service.source {
            super::objects::Source::Operator => "the operator".to_owned(),
            super::objects::Source::Host(uid) => self.host_label(uid),
        };
        format!(
            "{} has ports {} (decided by {owner}), this host says {}",
            service.name,
            show_ports(&service.ports),
            show_ports(&offer.ports)
        )
    }

    /// Computes the endpoints of one service again. They get `revision` if they are others than before.
    pub(super) fn relist(&mut self, service: &ServiceName, revision: u64) {
        let mut list = Vec::new();
        if self.services.contains_key(service) {
            for host in self.servers_of(service) {
                let offers = host.offers().filter(|(_, o)| o.service == *service);
                let listed =
                    offers.filter(|(account, offer)| self.judge(host, account, offer).is_ok());
                list.extend(listed.map(|(account, _)| endpoint(host, account)));
            }
        }
        list.sort();
        let old = self.endpoints.get(service).map(|e| e.list.as_slice());
        if old.unwrap_or_default() == list {
            return;
        }
        self.endpoints_revision = self.endpoints_revision.max(revision);
        if list.is_empty() {
            self.endpoints.remove(service);
        } else {
            let endpoints = Arc::new(Endpoints { revision, list });
            self.endpoints.insert(service.clone(), endpoints);
        }
    }
}

fn endpoint(host: &Host, account: &Account) -> Endpoint {
    Endpoint {
        network: host.network.clone(),
        address: host.address,
        mesh_port: host.mesh_port,
        account: account.clone(),
        host: host.uid.clone(),
        health: if host.live {
            Health::Healthy
        } else {
            Health::Stale
        },
    }
}
