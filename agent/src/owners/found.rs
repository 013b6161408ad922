//! What an owner's words mean on this host now: its cgroups and users, and whether another workload has them already.

use std::collections::BTreeSet;

use mesh_api::workload_file::Owner;

use crate::capture::CgroupRef;
use crate::capture::cgroup::{Directory, OwnerPath, uid_of};

#[derive(Debug, Default)]
pub(super) struct Resolved {
    pub(super) owner: Found,
    pub(super) problem: Option<String>,
}

#[derive(Debug, Default)]
pub(super) struct Found {
    pub(super) own: Vec<Directory>,
    /// Of the socket unit, which may listen in the place of the service.
    pub(super) sockets: Vec<Directory>,
    pub(super) uids: Vec<u32>,
}

/// What is claimed already: two owners may name one thing by two names.
#[derive(Debug, Default)]
pub(super) struct Seen {
    cgroups: BTreeSet<CgroupRef>,
    uids: BTreeSet<u32>,
}

impl Seen {
    pub(super) fn claim(&mut self, found: &Found) -> Option<String> {
        if let Some(twice) = found.own.iter().find(|d| self.cgroups.contains(&d.cgroup)) {
            let path = twice.path.display();
            return Some(format!(
                "its cgroup {path} belongs to another workload too; give each an owner of its own"
            ));
        }
        if let Some(uid) = found.uids.iter().find(|uid| self.uids.contains(uid)) {
            return Some(format!(
                "its user {uid} belongs to another workload too; give each an owner of its own"
            ));
        }
        self.cgroups.extend(found.own.iter().map(|d| d.cgroup));
        self.uids.extend(&found.uids);
        None
    }
}

/// The owner as a place in the cgroup tree; `None` for a user.
pub(super) fn path(owner: &Owner) -> Result<Option<OwnerPath>, String> {
    let path = match owner {
        Owner::Unit(name) => OwnerPath::unit(name),
        Owner::Cgroup(path) => OwnerPath::cgroup(path),
        Owner::User(_) => return Ok(None),
    };
    path.map(Some).map_err(|error| error.to_string())
}

/// What is to be said of an owner without processes.
pub(super) fn missing(owner: &Owner, found: &Found) -> Option<String> {
    if !found.own.is_empty() || !found.sockets.is_empty() {
        return None;
    }
    match owner {
        Owner::Unit(name) => Some(format!(
            "the unit {name} does not run or is none; see `systemctl status {name}`"
        )),
        Owner::Cgroup(path) => Some(format!(
            "there is no cgroup {path}; start its program, or correct the path"
        )),
        Owner::User(_) => None,
    }
}

pub(super) fn uid(owner: &Owner) -> Result<u32, String> {
    match owner {
        Owner::User(name) => uid_of(name).map_err(|error| error.to_string()),
        _ => Err("its owner is no user".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_are_found_by_name_or_number() {
        assert_eq!(uid(&Owner::User("4711".to_owned())), Ok(4711));
        assert_eq!(uid(&Owner::User("root".to_owned())), Ok(0));
        let error = uid(&Owner::User("no-such-user-here".to_owned())).unwrap_err();
        assert!(error.contains("no-such-user-here"), "{error}");
    }

    #[test]
    fn an_owner_that_is_not_there_is_told() {
        let unit = Owner::Unit("no-such.service".to_owned());
        let told = missing(&unit, &Found::default()).unwrap();
        assert!(told.contains("no-such.service"), "{told}");
        let user = Owner::User("33".to_owned());
        assert_eq!(missing(&user, &Found::default()), None);
    }

    #[test]
    fn one_thing_under_two_names_belongs_to_the_first() {
        let mut seen = Seen::default();
        let user = |uid| Found {
            uids: vec![uid],
            ..Found::default()
        };
        assert_eq!(seen.claim(&user(33)), None);
        assert!(seen.claim(&user(33)).unwrap().contains("33"));
        assert_eq!(seen.claim(&user(34)), None);
    }
}
