//! What must no more be believed, though its certificate is whole and in its time: a host with all that it was given,
//! or one workload of it. Certificates name the host that they were given to (their Source), so this is a question to
//! a small set and not to a list of serial numbers.
//!
//! Revocation is monotonic: there is no way to take one back. Control signs each, so that a control which was restored
//! from an older backup can believe agents what it has forgotten, and a host can not make them up.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::identity::Identity;
use crate::names::{Account, HostUid, TrustDomain};
use crate::session::Installed;

/// How long a revocation is kept, in seconds: no leaf that was given before lives longer. A year is the longest life that
/// can be set, and clocks differ.
pub const KEPT_S: u64 = 366 * 24 * 3600;
/// Most revocations of a mesh at once: five fleets of the largest size in [`KEPT_S`].
pub const REVOCATIONS_MAX: usize = 100_000;

/// Who is revoked.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Subject {
    pub host: HostUid,
    /// `None`: the host with everything that it was given.
    pub account: Option<Account>,
}

/// A revocation, as control signed it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Revocation {
    pub subject: Subject,
    /// Unix time, seconds.
    pub at_s: u64,
    /// Of [`Subject::statement`] by the mesh's issuer of that day.
    pub signature: Arc<[u8]>,
    /// The certificate of that issuer: a later control knows only its root. Empty where there is no signature.
    pub issuer: Arc<[u8]>,
}

/// A set of revocations.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Revocations(BTreeMap<HostUid, BTreeMap<Option<Account>, Revocation>>);

impl Subject {
    /// What control signs. It begins with what it is, so that no other signature of the issuer can be one.
    pub fn statement(&self, trust_domain: &TrustDomain, at_s: u64) -> String {
        let account = self.account.as_ref();
        let account = account.map_or_else(|| "*".to_owned(), Account::to_string);
        format!(
            "meshwork revocation 1\n{trust_domain}\n{}\n{account}\n{at_s}\n",
            self.host
        )
    }
}

impl Revocation {
    /// Whether all that it speaks of has ended by itself.
    pub fn is_over(&self, now_s: u64) -> bool {
        self.at_s.saturating_add(KEPT_S) < now_s
    }
}

impl Revocations {
    /// Adds one. False if it was there.
    pub fn add(&mut self, revocation: Revocation) -> bool {
        let Subject { host, account } = revocation.subject.clone();
        let of_host = self.0.entry(host).or_default();
        if of_host.contains_key(&account) {
            return false;
        }
        of_host.insert(account, revocation);
        true
    }

    /// Takes one out of a list of what is still to be done.
    pub fn remove(&mut self, subject: &Subject) {
        if let Some(of_host) = self.0.get_mut(&subject.host) {
            of_host.remove(&subject.account);
            if of_host.is_empty() {
                self.0.remove(&subject.host);
            }
        }
    }

    pub fn contains(&self, subject: &Subject) -> bool {
        let of_host = self.0.get(&subject.host);
        of_host.is_some_and(|all| all.contains_key(&subject.account))
    }

    /// Whether a leaf of `identity` that was given to `host` must not be believed.
    pub fn cover(&self, host: &HostUid, identity: &Identity) -> bool {
        let Some(of_host) = self.0.get(host) else {
            return false;
        };
        let alone = match identity {
            Identity::Workload(account) => of_host.contains_key(&Some(account.clone())),
            _ => false,
        };
        alone || of_host.contains_key(&None)
    }

    /// Those that `before` has not.
    pub fn since<'a>(&'a self, before: &'a Self) -> impl Iterator<Item = &'a Revocation> {
        self.iter().filter(|one| !before.contains(&one.subject))
    }

    /// Forgets what has no more effect by this time.
    pub fn forget_over(&mut self, now_s: u64) {
        self.0.retain(|_, of_host| {
            of_host.retain(|_, one| !one.is_over(now_s));
            !of_host.is_empty()
        });
    }

    pub fn iter(&self) -> impl Iterator<Item = &Revocation> {
        self.0.values().flat_map(BTreeMap::values)
    }

    pub fn len(&self) -> usize {
        self.0.values().map(BTreeMap::len).sum()
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// What an agent knows of revocations, and how it learns more.
///
/// Invariant: the set only grows, whoever says what, until all that one speaks of is over.
#[derive(Clone, Debug, Default)]
pub struct Known {
    all: Arc<Revocations>,
    at: Option<Installed>,
    /// While control names all that it has: those of ours that it has not named yet.
    unnamed: Option<Revocations>,
    /// Those that control has forgotten, to be told.
    forgotten: Vec<Revocation>,
}

/// A part of what control says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Named {
    /// Of control's epoch; reached with the last part.
    pub at: Installed,
    /// Control names all that it has.
    pub snapshot: bool,
    /// Another part follows.
    pub more: bool,
    pub revoked: Vec<Revocation>,
}

impl Known {
    /// What was on disk.
    pub fn new(all: Revocations, at: Option<Installed>) -> Self {
        Self {
            all: Arc::new(all),
            at,
            unnamed: None,
            forgotten: Vec::new(),
        }
    }

    pub fn all(&self) -> &Arc<Revocations> {
        &self.all
    }

    /// What of which epoch is whole.
    pub fn at(&self) -> Option<Installed> {
        self.at
    }

    /// A session begins: what was half said in the last one is said again.
    pub fn begin(&mut self) {
        self.unnamed = None;
        self.forgotten.clear();
    }

    /// Takes what control names. True when control must be told of some that it has forgotten: its store may be of an
    /// older day.
    pub fn handle(&mut self, named: Named, now_s: u64) -> bool {
        let mut all = Revocations::clone(&self.all);
        if named.snapshot && self.unnamed.is_none() {
            self.unnamed = Some(all.clone());
        }
        for one in named.revoked {
            if let Some(unnamed) = &mut self.unnamed {
                unnamed.remove(&one.subject);
            }
            all.add(one);
        }
        if REVOCATIONS_MAX < all.len() {
            // Only then: a clock that is wrong for a while must not make us forget.
            all.forget_over(now_s);
        }
        self.all = Arc::new(all);
        if !named.more {
            self.at = Some(named.at);
            if let Some(unnamed) = self.unnamed.take() {
                let lasting = unnamed.iter().filter(|one| !one.is_over(now_s));
                self.forgotten = lasting.cloned().collect();
            }
        }
        !self.forgotten.is_empty()
    }

    /// Of what control has forgotten so many, each once, and whether there are more.
    pub fn take_forgotten(&mut self, most: usize) -> (Vec<Revocation>, bool) {
        let rest = self.forgotten.split_off(self.forgotten.len().min(most));
        let part = std::mem::replace(&mut self.forgotten, rest);
        (part, !self.forgotten.is_empty())
    }
}

impl FromIterator<Revocation> for Revocations {
    fn from_iter<T: IntoIterator<Item = Revocation>>(all: T) -> Self {
        let mut set = Self::default();
        for one in all {
            set.add(one);
        }
        set
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn revocation(host: u64, account: Option<&str>, at_s: u64) -> Revocation {
        Revocation {
            subject: Subject {
                host: format!("{host:032x}").parse().unwrap(),
                account: account.map(|text| Account::parse(text).unwrap()),
            },
            at_s,
            signature: Arc::default(),
            issuer: Arc::default(),
        }
    }

    #[test]
    fn a_host_is_all_that_it_was_given_and_a_workload_only_itself() {
        let set: Revocations = [revocation(1, None, 5), revocation(2, Some("shop/web"), 5)]
            .into_iter()
            .collect();
        let uid = |n: u64| -> HostUid { format!("{n:032x}").parse().unwrap() };
        let account = |text: &str| Identity::Workload(Account::parse(text).unwrap());
        let host = Identity::Host("vm-1".parse().unwrap());
        for (n, identity, covered) in [
            (1, account("shop/web"), true),
            (1, host.clone(), true),
            (2, account("shop/web"), true),
            (2, account("shop/api"), false),
            (2, host, false),
            (3, account("shop/web"), false),
        ] {
            assert_eq!(set.cover(&uid(n), &identity), covered, "{n} {identity}");
        }
    }

    #[test]
    fn one_is_kept_until_no_leaf_can_live() {
        let mut set = Revocations::default();
        assert!(set.add(revocation(1, None, 100)));
        assert!(!set.add(revocation(1, None, 200)), "the first stands");
        assert!(set.add(revocation(1, Some("shop/web"), 200)));
        let before = set.clone();
        assert!(set.add(revocation(2, None, 300)));
        assert_eq!(set.since(&before).count(), 1);
        set.forget_over(100 + KEPT_S);
        assert_eq!(set.len(), 3);
        set.forget_over(101 + KEPT_S);
        assert_eq!(set.len(), 2);
        set.forget_over(u64::MAX);
        assert!(set.is_empty());
    }

    #[test]
    fn statements_differ_in_all_that_they_say() {
        let domain: TrustDomain = "corp.test".parse().unwrap();
        let other: TrustDomain = "corp.tes".parse().unwrap();
        let (host, web) = (revocation(1, None, 5), revocation(1, Some("a/b"), 5));
        let all = [
            host.subject.statement(&domain, 5),
            host.subject.statement(&domain, 55),
            host.subject.statement(&other, 5),
            web.subject.statement(&domain, 5),
            revocation(2, None, 5).subject.statement(&domain, 5),
        ];
        let unique: std::collections::BTreeSet<_> = all.iter().collect();
        assert_eq!(unique.len(), all.len());
    }
}
