//! What this host tells control of itself and of what it serves.

use std::net::IpAddr;

use mesh_api::proto;
use mesh_api::sync::{self, SyncError};
use mesh_core::health::Verdict;
use mesh_core::session::Installed;

use super::Shell;
use crate::health::Verdicts;
use crate::owners::OwnerStatus;
use crate::workloads::{WorkloadSet, own_addresses};

/// The report of these workloads, each service with its health, all but its generation. A service whose health is not known
/// yet is not healthy.
fn report(set: &WorkloadSet, verdicts: &Verdicts, owners: &OwnerStatus) -> proto::Report {
    proto::Report {
        generation: 0,
        workloads: workloads(set, verdicts),
        bypass: owners.bypass.as_ref().map(Into::into),
    }
}

fn workloads(set: &WorkloadSet, verdicts: &Verdicts) -> Vec<proto::ReportedWorkload> {
    let workloads = set.workloads.iter().map(|workload| {
        let services = workload.services.iter().map(|service| {
            let served = (workload.account.clone(), service.name.clone());
            proto::ReportedService {
                name: service.name.name.to_string(),
                ports: service.ports.iter().map(sync::reported_port).collect(),
                transport: service.transport.to_string(),
                healthy: verdicts
                    .get(&served)
                    .copied()
                    .is_some_and(Verdict::is_healthy),
                plaintext_endpoints: service.endpoints.iter().map(ToString::to_string).collect(),
            }
        });
        proto::ReportedWorkload {
            namespace: workload.account.namespace.to_string(),
            account: workload.account.name.to_string(),
            services: services.collect(),
        }
    });
    workloads.collect()
}

/// Where that can not be told, nothing has changed.
fn has_address(address: IpAddr) -> bool {
    own_addresses().map_or(true, |own| own.contains(&address))
}

impl Shell {
    /// Control was reached from this address. The host moves there if it is not at home any more where peers sought it.
    pub(super) fn moved(&mut self, from: Option<IpAddr>) {
        let Some(from) = from.filter(|_| self.membership.moves) else {
            return;
        };
        let known = self.status.own_address;
        let known = known.or_else(|| self.membership.address.parse().ok());
        let stays = known.filter(|known| has_address(*known));
        if stays.is_none() {
            let before = known.map(|known| known.to_string()).unwrap_or_default();
            log::warn!(before = before.as_str(), now:% = from; "this host's address changed; control is told");
        }
        self.status.own_address = Some(stays.unwrap_or(from));
    }

    pub(super) fn hello(&self, installed: Option<Installed>) -> proto::Hello {
        let revocations = self.mirror.revocations_at();
        let moved = self.status.own_address.map(|ip| ip.to_string());
        proto::Hello {
            boot_id: self.boot_id.clone(),
            version: mesh_runtime::version().to_owned(),
            capabilities: Vec::new(),
            epoch: installed.map_or(0, |i| i.epoch),
            index_revision: installed.map_or(0, |i| i.revision),
            address: moved.unwrap_or_else(|| self.membership.address.clone()),
            mesh_port: self.links.mesh_port.into(),
            revocations_epoch: revocations.map_or(0, |at| at.epoch),
            revocations_revision: revocations.map_or(0, |at| at.revision),
        }
    }

    pub(super) fn report_changed(&mut self) {
        let set = self.links.sets.borrow_and_update();
        let verdicts = self.links.verdicts.borrow_and_update();
        let owners = self.links.owners.borrow_and_update();
        if report(&set, &verdicts, &owners) != self.reported {
            drop((set, verdicts, owners));
            self.session.handle_report_changed();
        }
    }

    pub(super) fn report_status(&mut self, status: &proto::ReportStatus) -> Result<(), SyncError> {
        let (generation, problems) = sync::report_status(status)?;
        // A word on an older report may name what is mended already.
        if generation == self.generation {
            for problem in problems
                .iter()
                .filter(|p| !self.status.problems.contains(p))
            {
                log::warn!(
                    workload:% = problem.account, service = problem.service.as_ref().map_or("", |s| s.as_str()),
                    reason:% = problem.reason;
                    "control does not list what this host serves: {}", problem.message
                );
            }
            self.status.problems = problems;
        }
        self.links.judged.send_modify(|count| *count += 1);
        Ok(())
    }

    pub(super) fn report(&mut self) -> proto::Report {
        let set = self.links.sets.borrow_and_update();
        let verdicts = self.links.verdicts.borrow_and_update();
        let owners = self.links.owners.borrow_and_update();
        self.reported = report(&set, &verdicts, &owners);
        self.generation += 1;
        proto::Report {
            generation: self.generation,
            ..self.reported.clone()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_api::workload_file::Workload;
    use std::sync::Arc;

    #[test]
    fn where_it_goes_on_in_plaintext_is_said() {
        let text = "namespace = \"shop\"\n[[service]]\nports = [{ port = 5432 }]\n\
             endpoints = [\"10.9.0.5:5432\", \"[fd00::5]:5432\"]\n";
        let set = WorkloadSet {
            workloads: vec![Arc::new(Workload::parse("db", text).unwrap())],
            ..WorkloadSet::default()
        };
        let reported = workloads(&set, &Verdicts::new());
        let service = &reported[0].services[0];
        assert_eq!(
            service.plaintext_endpoints,
            ["10.9.0.5:5432", "[fd00::5]:5432"]
        );
    }

    #[test]
    fn a_service_is_healthy_only_when_it_is_known_to_be() {
        let text =
            "namespace = \"shop\"\n[owner]\nuser = \"1\"\n[[service]]\nports = [{ port = 80 }]\n";
        let workload = Workload::parse("web", text).unwrap();
        let served = (workload.account.clone(), workload.services[0].name.clone());
        let set = WorkloadSet {
            workloads: vec![Arc::new(workload)],
            ..WorkloadSet::default()
        };
        let healthy = |verdicts: &Verdicts| workloads(&set, verdicts)[0].services[0].healthy;
        assert!(!healthy(&Verdicts::new()));
        for (verdict, expected) in [
            (Verdict::Unknown, false),
            (Verdict::Healthy, true),
            (Verdict::Unhealthy, false),
            (Verdict::Draining, false),
        ] {
            let verdicts = Verdicts::from([(served.clone(), verdict)]);
            assert_eq!(healthy(&verdicts), expected, "{verdict:?}");
        }
    }
}
