//! Whose the containers of this host are: the addresses by which the kernel tells their workloads.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use mesh_core::names::Account;

use crate::capture::containers::addresses;
use crate::holder::protocol::DesiredWorkload;
use crate::whose::OwnerTable;

/// Addresses and workloads that one line names.
const NAMED_MAX: usize = 4;

/// Finds the containers on some bridges.
#[derive(Debug)]
pub(crate) struct Containers {
    /// Empty: there are none to look for.
    bridges: Vec<String>,
    /// What was found last: why some addresses are nobody's.
    problems: BTreeMap<Account, String>,
    /// Why the last look failed.
    failed: Option<String>,
}

impl Containers {
    pub(crate) const fn new(bridges: Vec<String>) -> Self {
        Self {
            bridges,
            problems: BTreeMap::new(),
            failed: None,
        }
    }

    pub(crate) const fn is_looking(&self) -> bool {
        !self.bridges.is_empty()
    }

    /// Why some addresses of these workloads are nobody's.
    pub(crate) const fn problems(&self) -> &BTreeMap<Account, String> {
        &self.problems
    }

    /// Gives `desired` the addresses that their containers have now. True if anything is other than at the look before.
    pub(crate) fn look(&mut self, table: &OwnerTable, desired: &mut [DesiredWorkload]) -> bool {
        let Some(tree) = table.tree.as_ref().filter(|_| self.is_looking()) else {
            return false;
        };
        let owners: Vec<_> = table.workloads.iter().map(|o| &o.directories[..]).collect();
        let found = match addresses(&self.bridges, tree, &owners) {
            Ok(found) => {
                self.failed = None;
                found
            }
            Err(error) => {
                let error = error.to_string();
                if self.failed.as_ref() != Some(&error) {
                    log::warn!(error = error.as_str(); "the containers on bridges can not be looked for; their calls are refused meanwhile");
                }
                self.failed = Some(error);
                vec![BTreeSet::new(); owners.len()]
            }
        };
        let accounts = table.workloads.iter().map(|owned| &owned.account);
        let (own, problems) = settle(&accounts.zip(found).collect::<Vec<_>>());
        let mut changed = problems != self.problems;
        self.problems = problems;
        for workload in desired {
            let found = own.get(&workload.label);
            let found: Vec<_> = found.into_iter().flatten().copied().collect();
            changed |= workload.addresses != found;
            workload.addresses = found;
        }
        changed
    }
}

/// What two workloads have is neither's.
fn settle(
    found: &[(&Account, BTreeSet<IpAddr>)],
) -> (
    BTreeMap<String, BTreeSet<IpAddr>>,
    BTreeMap<Account, String>,
) {
    let mut claims: BTreeMap<IpAddr, Vec<&Account>> = BTreeMap::new();
    for (account, addresses) in found {
        for address in addresses {
            claims.entry(*address).or_default().push(account);
        }
    }
    let mut own: BTreeMap<String, BTreeSet<IpAddr>> = BTreeMap::new();
    let mut shared: BTreeMap<&Account, (Vec<IpAddr>, BTreeSet<&Account>)> = BTreeMap::new();
    for (address, accounts) in claims {
        if let [only] = accounts[..] {
            own.entry(only.to_string()).or_default().insert(address);
            continue;
        }
        for account in &accounts {
            let (addresses, others) = shared.entry(*account).or_default();
            addresses.push(address);
            others.extend(accounts.iter().filter(|other| other != &account));
        }
    }
    let problem = |(account, (addresses, others)): (
        &Account,
        (Vec<IpAddr>, BTreeSet<&Account>),
    )| {
        let problem = format!(
            "addresses of its containers are those of {} too, so calls from there are refused: {}; give each workload network \
             namespaces of its own",
            first(others),
            first(addresses)
        );
        (account.clone(), problem)
    };
    (own, shared.into_iter().map(problem).collect())
}

/// Some of them, for a line.
fn first(all: impl IntoIterator<Item: ToString>) -> String {
    let all = all.into_iter().take(NAMED_MAX);
    all.map(|one| one.to_string())
        .collect::<Vec<_>>()
        .join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_of_two_workloads_is_neithers() {
        let account = |name| Account::parse(name).unwrap();
        let (a, b, c) = (account("shop/a"), account("shop/b"), account("shop/c"));
        let addresses = |all: &[&str]| all.iter().map(|text| text.parse().unwrap()).collect();
        let (own, problems) = settle(&[
            (&a, addresses(&["10.88.0.2", "10.88.0.3"])),
            (&b, addresses(&["10.88.0.3"])),
            (&c, addresses(&["fd88::2"])),
        ]);
        assert_eq!(own.len(), 2);
        assert_eq!(own["shop/a"], addresses(&["10.88.0.2"]));
        assert_eq!(own["shop/c"], addresses(&["fd88::2"]));
        assert!(problems[&a].contains("10.88.0.3") && problems[&a].contains("shop/b"));
        assert!(problems[&b].contains("shop/a"));
        assert_eq!(problems.len(), 2);
    }
}
