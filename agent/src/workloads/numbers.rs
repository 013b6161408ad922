//! The number by which the kernel knows a workload: it stands in packet marks and maps.

use std::collections::{BTreeMap, BTreeSet};

use mesh_core::names::Account;

use crate::capture::NUMBER_MAX;

/// Twelve bits of the mark. 0 is what no workload owns.
pub(crate) type Number = u16;

/// Keeps the number of each workload for as long as it is there. A number that became free is given out
/// again as late as can be, since marks of its connections may live on.
#[derive(Clone, Debug, Default)]
pub(crate) struct Numbers {
    by_account: BTreeMap<Account, Number>,
    last: Number,
}

impl Numbers {
    /// Makes these the accounts that have a number. Those for which none is left get none; there are far
    /// fewer workloads than numbers.
    pub(crate) fn keep<'a>(&mut self, accounts: impl IntoIterator<Item = &'a Account>) {
        let accounts: BTreeSet<&Account> = accounts.into_iter().collect();
        self.by_account.retain(|a, _| accounts.contains(a));
        for account in accounts {
            if !self.by_account.contains_key(account)
                && let Some(number) = self.next_free()
            {
                self.last = number;
                self.by_account.insert(account.clone(), number);
            }
        }
    }

    pub(crate) fn of(&self, account: &Account) -> Option<Number> {
        self.by_account.get(account).copied()
    }

    fn next_free(&self) -> Option<Number> {
        let used: BTreeSet<Number> = self.by_account.values().copied().collect();
        (self.last + 1..=NUMBER_MAX)
            .chain(1..=self.last)
            .find(|number| !used.contains(number))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_kept_unique_and_reused_late() {
        let mut numbers = Numbers::default();
        numbers.keep(&[account(0)]);
        assert_eq!(numbers.of(&account(0)), Some(1));
        for n in 1..u64::from(NUMBER_MAX) * 2 {
            numbers.keep(&[account(0), account(n)]);
            let number = numbers.of(&account(n)).unwrap();
            assert!((2..=NUMBER_MAX).contains(&number));
            if n < u64::from(NUMBER_MAX) {
                assert_eq!(u64::from(number), n + 1, "no number comes back early");
            }
        }
        assert_eq!(numbers.of(&account(0)), Some(1));
    }

    fn account(n: u64) -> Account {
        Account::parse(&format!("shop/a{n}")).unwrap()
    }
}
