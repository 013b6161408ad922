//! The catalogue as keys and values: what the store keeps and an export lists. Keys are `kind/name`, values are
//! JSON. The derived parts are computed again when it is read.

use std::sync::Arc;

use mesh_core::names::{HostUid, Label, ServiceName};
use mesh_core::revocation::Subject;
use mesh_core::vip::{self, Allocator};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::objects::{
    Host, Operator, Policy, PolicyKey, Revoked, Service, Settings, Token, Tombstone,
};
use super::{CHANGES_MAX, Catalogue};

/// The form of keys and values; a store of a newer one is not read.
pub(crate) const FORMAT: u32 = 1;
pub(crate) const META_KEY: &str = "meta";
pub(crate) const SETTINGS_KEY: &str = "settings";

/// What is known of the catalogue as a whole. Written in each commit.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Meta {
    pub format: u32,
    pub epoch: u64,
    pub revision: u64,
    pub changes_floor: u64,
    pub policies_revision: u64,
}

/// A key and its value.
pub(crate) type Item = (String, Vec<u8>);

/// Why stored items are no catalogue.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LoadError {
    #[error("the store has no item `{0}`")]
    Missing(&'static str),
    #[error("item `{key}` can not be read: {cause}")]
    Item { key: String, cause: String },
    #[error(
        "the store has format {0}; this version reads {FORMAT}: run the newer mesh-control that wrote it"
    )]
    Format(u32),
}

pub(crate) fn host_key(uid: &HostUid) -> String {
    format!("host/{uid}")
}

pub(crate) fn revoked_key(subject: &Subject) -> String {
    match &subject.account {
        None => format!("revoked/{}", subject.host),
        Some(account) => format!("revoked/{}/{account}", subject.host),
    }
}

pub(crate) fn token_key(id: &str) -> String {
    format!("token/{id}")
}

pub(crate) fn operator_key(name: &Label) -> String {
    format!("operator/{name}")
}

pub(crate) fn service_key(name: &ServiceName) -> String {
    format!("service/{name}")
}

pub(crate) fn tombstone_key(name: &ServiceName) -> String {
    format!("tombstone/{name}")
}

pub(crate) fn policy_key((namespace, name): &PolicyKey) -> String {
    let namespace = namespace.as_ref().map_or("-", Label::as_str);
    format!("policy/{namespace}/{name}")
}

/// Our own objects always are JSON: their maps have text keys.
pub(crate) fn encode(object: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(object).unwrap_or_default()
}

fn decode<T: DeserializeOwned>(key: &str, value: &[u8]) -> Result<T, LoadError> {
    serde_json::from_slice(value).map_err(|cause| LoadError::Item {
        key: key.to_owned(),
        cause: cause.to_string(),
    })
}

impl Catalogue {
    pub(crate) fn meta(&self) -> Meta {
        Meta {
            format: FORMAT,
            epoch: self.epoch,
            revision: self.revision,
            changes_floor: self.changes_floor,
            policies_revision: self.policies_revision,
        }
    }

    /// Everything, in the order of the keys within each kind.
    pub(crate) fn items(&self) -> Vec<Item> {
        let mut items = vec![
            (META_KEY.to_owned(), encode(&self.meta())),
            (SETTINGS_KEY.to_owned(), encode(&*self.settings)),
        ];
        let mut add = |key: String, value: Vec<u8>| items.push((key, value));
        self.hosts
            .values()
            .for_each(|o| add(host_key(&o.uid), encode(&**o)));
        self.revoked
            .values()
            .for_each(|o| add(revoked_key(&o.subject()), encode(&**o)));
        self.tokens
            .values()
            .for_each(|o| add(token_key(&o.id), encode(&**o)));
        self.operators
            .values()
            .for_each(|o| add(operator_key(&o.name), encode(&**o)));
        self.services
            .values()
            .for_each(|o| add(service_key(&o.name), encode(&**o)));
        self.tombstones
            .values()
            .for_each(|o| add(tombstone_key(&o.name), encode(&**o)));
        self.policies
            .iter()
            .for_each(|(key, o)| add(policy_key(key), encode(&**o)));
        items
    }

    /// Reads what [`Catalogue::items`] wrote, in any order.
    pub(crate) fn load(items: &[Item]) -> Result<Self, LoadError> {
        let find = |wanted: &'static str| {
            let item = items.iter().find(|(key, _)| key == wanted);
            item.ok_or(LoadError::Missing(wanted))
        };
        let (key, value) = find(META_KEY)?;
        let meta: Meta = decode(key, value)?;
        if meta.format != FORMAT {
            return Err(LoadError::Format(meta.format));
        }
        let (key, value) = find(SETTINGS_KEY)?;
        let settings: Settings = decode(key, value)?;
        let mut catalogue = Self::new(meta.epoch, settings);
        catalogue.revision = meta.revision;
        catalogue.changes_floor = meta.changes_floor;
        catalogue.policies_revision = meta.policies_revision;
        for (key, value) in items {
            catalogue.load_item(key, value)?;
        }
        catalogue.rebuild();
        Ok(catalogue)
    }

    fn load_item(&mut self, key: &str, value: &[u8]) -> Result<(), LoadError> {
        match key.split_once('/').map_or(key, |(kind, _)| kind) {
            META_KEY | SETTINGS_KEY => {}
            "host" => self.index_host(&Arc::new(decode::<Host>(key, value)?)),
            "revoked" => {
                let revoked: Revoked = decode(key, value)?;
                self.index_revoked(&Arc::new(revoked));
            }
            "token" => {
                let token: Token = decode(key, value)?;
                self.tokens.insert(token.id.clone(), Arc::new(token));
            }
            "operator" => {
                let operator: Operator = decode(key, value)?;
                let name = operator.name.clone();
                self.operators.insert(name, Arc::new(operator));
            }
            "service" => {
                let service: Service = decode(key, value)?;
                self.services
                    .insert(service.name.clone(), Arc::new(service));
            }
            "tombstone" => {
                let tombstone: Tombstone = decode(key, value)?;
                let name = tombstone.name.clone();
                self.tombstones.insert(name, Arc::new(tombstone));
            }
            "policy" => {
                let policy: Policy = decode(key, value)?;
                let bad = |e: mesh_core::names::NameError| LoadError::Item {
                    key: key.to_owned(),
                    cause: e.to_string(),
                };
                let key = super::policy::key_of(&policy.object.metadata).map_err(bad)?;
                self.policies.insert(key, Arc::new(policy));
            }
            _ => {
                return Err(LoadError::Item {
                    key: key.to_owned(),
                    cause: "this version knows no such kind".to_owned(),
                });
            }
        }
        Ok(())
    }

    /// Computes what is derived: the ring of changes and every list of endpoints.
    fn rebuild(&mut self) {
        let living = self.services.values().map(|s| (s.revision, s.name.clone()));
        let gone = self.tombstones.values();
        let gone = gone.map(|t| (t.revision, t.name.clone()));
        let mut changes: Vec<_> = living.chain(gone).collect();
        changes.sort();
        self.index_revision = self.changes_floor;
        let spare = changes.len().saturating_sub(CHANGES_MAX);
        for (dropped, _) in changes.drain(..spare) {
            self.changes_floor = self.changes_floor.max(dropped);
        }
        for (revision, name) in changes {
            self.note_change(revision, name);
        }
        let served: Vec<ServiceName> = self.servers.keys().cloned().collect();
        for service in served {
            self.relist(&service, self.revision);
        }
    }

    /// The allocator that knows all that is allotted.
    pub(crate) fn allocator(&self) -> Result<Allocator, String> {
        let living = self.services.values().map(|s| (s.name.clone(), s.vip));
        let resting = self.tombstones.values().map(|t| vip::Tombstone {
            name: t.name.clone(),
            vip: t.vip,
            released_s: t.released_s,
        });
        let (allocator, conflicts) = Allocator::new(self.settings.vip_ranges()?, living, resting);
        match conflicts.as_slice() {
            [] => Ok(allocator),
            [first, ..] => Err(format!(
                "{} services share a virtual address with others, {first} for one: restore an export",
                conflicts.len()
            )),
        }
    }
}
