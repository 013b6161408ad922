//! What this host tells control that it serves.

use mesh_api::proto;
use mesh_api::sync::{self, SyncError};
use mesh_core::health::Verdict;

use super::Shell;
use crate::health::Verdicts;
use crate::owners::OwnerStatus;
use crate::workloads::WorkloadSet;

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

impl Shell {
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
