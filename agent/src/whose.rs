//! Whose a socket is: of the workloads of this host, the one with the deepest cgroup that holds it, else the one
//! of its user. The nftables maps decide alike at the SYN; this serves where they can not: for a caller that came
//! by the common listener, and for the program that listens on a declared port.

use mesh_core::names::Account;

use crate::capture::cgroup::{CgroupError, CgroupTree, Directory};

/// What is known of the owners of all workloads, kept by `crate::owners`.
#[derive(Debug, Default)]
pub(crate) struct OwnerTable {
    pub(crate) workloads: Vec<Owned>,
    /// `None` on a host without cgroup2, where only users count.
    pub(crate) tree: Option<CgroupTree>,
}

/// One workload, resolved.
#[derive(Debug)]
pub(crate) struct Owned {
    pub(crate) account: Account,
    /// The directories of its unit (and of its socket unit) or cgroup, as they are now.
    pub(crate) directories: Vec<Directory>,
    pub(crate) uids: Vec<u32>,
}

impl OwnerTable {
    /// The workload that a socket of `uid` in the cgroup of that id belongs to.
    ///
    /// # Errors
    /// When it can not be told: then it is nobody's, and not its user's.
    pub(crate) fn find(
        &self,
        uid: u32,
        cgroup: Option<u64>,
    ) -> Result<Option<&Account>, CgroupError> {
        let by_cgroup = cgroup.map(|id| self.by_cgroup(id)).transpose()?.flatten();
        Ok(by_cgroup.or_else(|| {
            let by_user = self
                .workloads
                .iter()
                .find(|owned| owned.uids.contains(&uid));
            by_user.map(|owned| &owned.account)
        }))
    }

    fn by_cgroup(&self, id: u64) -> Result<Option<&Account>, CgroupError> {
        let all = || {
            let pairs = self.workloads.iter();
            pairs.flat_map(|owned| owned.directories.iter().map(move |dir| (owned, dir)))
        };
        // Most sockets are in the directory itself: no system call for those.
        if let Some((owned, _)) = all().find(|(_, directory)| directory.cgroup.id == id) {
            return Ok(Some(&owned.account));
        }
        let Some(tree) = &self.tree else {
            return Ok(None);
        };
        let mut deepest: Option<(&Owned, &Directory)> = None;
        for (owned, directory) in all() {
            let deeper = deepest.is_none_or(|(_, best)| best.cgroup.level < directory.cgroup.level);
            if deeper && tree.contains(&directory.path, id)? {
                deepest = Some((owned, directory));
            }
        }
        Ok(deepest.map(|(owned, _)| &owned.account))
    }
}
