//! Reading what a host says it serves.

use std::collections::BTreeSet;

use mesh_api::proto;
use mesh_core::names::{Account, NameError, ServiceName};
use mesh_core::reason::Reason;
use mesh_core::service::{Port, Protocol, Transport};

// By way of the parent: the fuzz target has others of these.
use super::{Offer, Refusal, Workload};

/// Most workloads of a host.
const WORKLOADS_MAX: usize = 256;
/// Most services of a workload.
const SERVICES_MAX: usize = 64;
/// Most services of all workloads together: a report is compared with itself.
const OFFERS_MAX: usize = 1024;
/// Most ports of a service.
const PORTS_MAX: usize = 64;
/// Most servers without an agent that one host goes on to for a service.
const PLAINTEXT_MAX: usize = 16;
/// Longest texts of a bypass, in bytes.
const BY_MAX: usize = 64;
const WHY_MAX: usize = 800;

/// A report, read: what can be read, and what is wrong with the rest.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Read {
    pub workloads: Vec<Workload>,
    pub bypass: Option<proto::Bypass>,
    pub problems: Vec<proto::Problem>,
}

/// Reads a report. One over its bounds is refused whole; a bad part leaves the others alone.
pub(super) fn read(report: &proto::Report) -> Result<Read, Refusal> {
    let bound = |what: &str, len: usize, max: usize| {
        if len <= max {
            return Ok(());
        }
        let message = format!("the report has {len} {what}; at most {max} may be");
        Err(Refusal::invalid(message))
    };
    bound("workloads", report.workloads.len(), WORKLOADS_MAX)?;
    let offered = report.workloads.iter().map(|w| w.services.len()).sum();
    bound("services", offered, OFFERS_MAX)?;
    if let Some(bypass) = &report.bypass {
        bound("bytes in who opened it", bypass.by.len(), BY_MAX)?;
        bound("bytes in why it was opened", bypass.why.len(), WHY_MAX)?;
        if (bypass.by.chars().chain(bypass.why.chars())).any(char::is_control) {
            let message = "who opened the host, or why, has control characters";
            return Err(Refusal::invalid(message));
        }
    }
    let mut read = Read {
        bypass: report.bypass.clone(),
        ..Read::default()
    };
    let mut seen = BTreeSet::new();
    for reported in &report.workloads {
        bound(
            "services in one workload",
            reported.services.len(),
            SERVICES_MAX,
        )?;
        let account = match account(reported) {
            Ok(account) if seen.insert(account.clone()) => account,
            Ok(_) => {
                read.problems
                    .push(problem(reported, "", "the workload is reported twice"));
                continue;
            }
            Err(error) => {
                read.problems
                    .push(problem(reported, "", &error.to_string()));
                continue;
            }
        };
        let mut offers = Vec::new();
        for service in &reported.services {
            bound("ports in one service", service.ports.len(), PORTS_MAX)?;
            match offer(&account, service) {
                Ok(offer) if offers.iter().any(|o: &Offer| o.service == offer.service) => {
                    let message = "the service is reported twice";
                    read.problems
                        .push(problem(reported, &service.name, message));
                }
                Ok(offer) => offers.push(offer),
                Err(message) => {
                    read.problems
                        .push(problem(reported, &service.name, &message));
                }
            }
        }
        read.workloads.push(Workload { account, offers });
    }
    read.workloads.sort_by(|a, b| a.account.cmp(&b.account));
    Ok(read)
}

fn account(reported: &proto::ReportedWorkload) -> Result<Account, NameError> {
    Ok(Account {
        namespace: reported.namespace.parse()?,
        name: reported.account.parse()?,
    })
}

fn offer(account: &Account, reported: &proto::ReportedService) -> Result<Offer, String> {
    let name = reported
        .name
        .parse()
        .map_err(|e: NameError| e.to_string())?;
    let ports = reported.ports.iter().map(|port| {
        let number = u16::try_from(port.number).ok().filter(|n| *n != 0);
        let number = number.ok_or_else(|| format!("{} is no port", port.number))?;
        let protocol = Protocol::parse(&port.protocol)
            .ok_or_else(|| format!("port {number} has no protocol that this version knows"))?;
        Ok(Port { number, protocol })
    });
    let mut ports = ports.collect::<Result<Vec<Port>, String>>()?;
    ports.sort();
    if ports.is_empty() || ports.windows(2).any(|p| p[0].number == p[1].number) {
        return Err("a service has at least one port, and each only once".to_owned());
    }
    let transport = match reported.transport.as_str() {
        "" => Transport::default(),
        text => Transport::parse(text).ok_or("transport is not permissive or strict")?,
    };
    let plaintext = &reported.plaintext_endpoints;
    if PLAINTEXT_MAX < plaintext.len() {
        let count = plaintext.len();
        return Err(format!(
            "it has {count} plaintext endpoints; at most {PLAINTEXT_MAX} may be"
        ));
    }
    let plaintext = plaintext.iter().map(|text| {
        let short = || text.chars().take(64).collect::<String>();
        text.parse()
            .map_err(|_| format!("plaintext endpoint `{}` is no address with a port", short()))
    });
    Ok(Offer {
        service: ServiceName {
            namespace: account.namespace.clone(),
            name,
        },
        ports,
        transport,
        healthy: reported.healthy,
        plaintext: plaintext.collect::<Result<_, String>>()?,
    })
}

fn problem(workload: &proto::ReportedWorkload, service: &str, message: &str) -> proto::Problem {
    let cut = |text: &str| text.chars().take(63).collect();
    proto::Problem {
        namespace: cut(&workload.namespace),
        account: cut(&workload.account),
        service: cut(service),
        reason: Reason::Invalid.to_wire().into(),
        message: message.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn workload(namespace: &str, service: &str, port: u32) -> proto::ReportedWorkload {
        proto::ReportedWorkload {
            namespace: namespace.to_owned(),
            account: "web".to_owned(),
            services: vec![proto::ReportedService {
                name: service.to_owned(),
                ports: vec![proto::ReportedPort {
                    number: port,
                    protocol: "http".to_owned(),
                }],
                transport: String::new(),
                healthy: true,
                plaintext_endpoints: Vec::new(),
            }],
        }
    }

    #[test]
    fn plaintext_endpoints_are_kept_or_the_service_is_a_problem() {
        let with = |endpoints: &[&str]| {
            let mut workload = workload("shop", "db", 5432);
            workload.services[0].plaintext_endpoints =
                endpoints.iter().map(|e| (*e).to_owned()).collect();
            let report = proto::Report {
                generation: 1,
                workloads: vec![workload],
                bypass: None,
            };
            read(&report).unwrap()
        };
        let good = with(&["10.9.0.5:5432", "[fd00::5]:5432"]);
        assert_eq!(good.problems, []);
        let expected: Vec<std::net::SocketAddr> = vec![
            "10.9.0.5:5432".parse().unwrap(),
            "[fd00::5]:5432".parse().unwrap(),
        ];
        assert_eq!(good.workloads[0].offers[0].plaintext, expected);
        for bad in [&["db:5432"][..], &["10.9.0.5:5432"; PLAINTEXT_MAX + 1]] {
            let read = with(bad);
            assert_eq!(read.problems.len(), 1, "{bad:?}");
            assert_eq!(read.workloads[0].offers, [], "it would pass for encrypted");
        }
    }

    #[test]
    fn a_bad_part_leaves_the_others_alone() {
        let report = proto::Report {
            generation: 1,
            workloads: vec![
                workload("shop", "web", 80),
                workload("Shop", "web", 80),
                workload("data", "web", 70_000),
                workload("shop", "other", 80),
            ],
            bypass: None,
        };
        let read = read(&report).unwrap();
        assert_eq!(read.workloads.len(), 2);
        assert_eq!(read.problems.len(), 3);
        assert!(
            read.workloads
                .iter()
                .all(|w| w.account.name.as_str() == "web")
        );
    }

    #[test]
    fn a_report_over_its_bounds_is_refused() {
        let report = proto::Report {
            generation: 1,
            workloads: vec![workload("shop", "web", 80); WORKLOADS_MAX + 1],
            bypass: None,
        };
        assert_eq!(read(&report).unwrap_err().reason, Reason::Invalid);
    }
}
