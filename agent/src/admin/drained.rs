//! Taking services of this host out of the mesh and back, and what is open to them.

use http::StatusCode;
use mesh_api::workload_file::Owner;
use mesh_core::names::ServiceName;
use mesh_runtime::admin::Answer;

use super::Sources;
use crate::drained::{By, OpenCalls, Set};
use crate::workloads::WorkloadSet;

impl Sources {
    /// All that is drained, with the calls of other hosts that are open.
    pub(super) fn open_calls(&self) -> OpenCalls {
        let open = self.metrics.open_inbound();
        let drained = self.drained.watch();
        let drained = drained.borrow();
        let names = drained.iter().map(ToString::to_string);
        names
            .map(|name| {
                let calls = open.get(&name).copied().unwrap_or_default();
                (name, calls)
            })
            .collect()
    }

    /// Takes the service of the query, or all of this host, out or back. Answers with their names.
    pub(super) fn drain(&self, query: &str, out: bool) -> Answer {
        let wrong = |message: String| Answer::error(StatusCode::BAD_REQUEST, &message);
        let sets = self.sets.borrow();
        let own = sets
            .workloads
            .iter()
            .flat_map(|workload| &workload.services);
        let own: Set = own.map(|service| service.name.clone()).collect();
        if let Some(unit) = query.strip_prefix("unit=") {
            return self.change(&of_unit(&sets, unit), out, By::Unit);
        }
        let services = match query.strip_prefix("service=") {
            None if query.is_empty() => own,
            None => return wrong("use ?service=NAMESPACE/SERVICE or ?unit=UNIT".to_owned()),
            Some(name) => match ServiceName::parse(name) {
                // What was drained can be put back also when its file is gone.
                Ok(name) if own.contains(&name) || !out => Set::from([name]),
                Ok(name) => return wrong(format!("{name} is no service of this host")),
                Err(error) => return wrong(format!("`{name}` is no NAMESPACE/SERVICE: {error}")),
            },
        };
        self.change(&services, out, By::Operator)
    }

    fn change(&self, services: &Set, out: bool, by: By) -> Answer {
        match self.drained.change(services, out, by) {
            Ok(()) => {
                let names: Vec<String> = services.iter().map(ToString::to_string).collect();
                Answer::json(&names)
            }
            Err(error) => Answer::error(
                StatusCode::INTERNAL_SERVER_ERROR,
                &format!("it can not be kept, and nothing was changed: {error:#}"),
            ),
        }
    }
}

/// What the programs of a unit serve. A user may have programs of other units as well: their services are not meant.
fn of_unit(set: &WorkloadSet, unit: &str) -> Set {
    let is_its = |owner: &Owner| match owner {
        Owner::Unit(name) => name == unit,
        Owner::Cgroup(path) => path.rsplit('/').next() == Some(unit),
        Owner::User(_) => false,
    };
    let own = set.workloads.iter();
    let own = own.filter(|workload| workload.owner.as_ref().is_some_and(is_its));
    let services = own.flat_map(|workload| &workload.services);
    let served = services.filter(|service| !service.is_fronted());
    served.map(|service| service.name.clone()).collect()
}
