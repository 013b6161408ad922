//! Policies: the operator's alone.

use std::sync::Arc;

use mesh_api::resource::{Metadata, Object, PolicySpec};
use mesh_core::names::NameError;
use mesh_core::reason::Reason;

use super::command::{Action, Applied, Outcome};
use super::draft::Draft;
use super::objects::{Policy, PolicyKey};
use super::{POLICIES_BYTES_MAX, POLICIES_MAX};
use crate::refusal::Refusal;

/// The key of a policy's metadata.
pub(crate) fn key_of(metadata: &Metadata) -> Result<PolicyKey, NameError> {
    let namespace = metadata.namespace.as_deref().map(str::parse).transpose()?;
    Ok((namespace, metadata.name.parse()?))
}

pub(super) fn apply(
    draft: &mut Draft<'_>,
    object: &Object<PolicySpec>,
) -> Result<Applied, Refusal> {
    let invalid = |e: &dyn std::fmt::Display| Refusal::invalid(e.to_string());
    object
        .to_core(&draft.next.settings.trust_domain)
        .map_err(|e| invalid(&e))?;
    let key = key_of(&object.metadata).map_err(|e| invalid(&e))?;
    let label = match &key.0 {
        Some(namespace) => format!("Policy {namespace}/{}", key.1),
        None => format!("Policy {}", key.1),
    };
    let mut object = object.clone();
    object.status = None;
    object.metadata.resource_version = None;
    object.metadata.creation_timestamp = None;
    let old = draft.next.policies.get(&key).map(Arc::clone);
    let action = match &old {
        Some(old) if old.object == object => Action::Unchanged,
        Some(_) => Action::Configured,
        None => Action::Created,
    };
    if action == Action::Created && POLICIES_MAX <= draft.next.policies.len() {
        let message = format!("there are {POLICIES_MAX} policies; delete those that are unused");
        return Err(Refusal::new(Reason::Overloaded, message));
    }
    if action != Action::Unchanged {
        fits(draft, &object)?;
        let policy = Policy {
            object,
            created_s: old.map_or(draft.now_s, |p| p.created_s),
            revision: draft.revision,
        };
        draft.put_policy(key, policy);
    }
    Ok(Applied {
        object: label,
        action,
        message: None,
        warnings: Vec::new(),
    })
}

/// Whether all policies, with this one, still fit the message that carries them.
fn fits(draft: &Draft<'_>, object: &Object<PolicySpec>) -> Result<(), Refusal> {
    let size = |object: &Object<PolicySpec>| super::items::encode(object).len();
    let others = draft.next.policies.values().map(|p| size(&p.object));
    if others.sum::<usize>() + size(object) <= POLICIES_BYTES_MAX {
        return Ok(());
    }
    let message = format!(
        "all policies together would have more than {POLICIES_BYTES_MAX} bytes; use patterns instead of lists"
    );
    Err(Refusal::new(Reason::Overloaded, message))
}

pub(super) fn delete(draft: &mut Draft<'_>, key: &PolicyKey) -> Result<Outcome, Refusal> {
    if !draft.next.policies.contains_key(key) {
        let name = super::items::policy_key(key);
        return Err(Refusal::not_found(&name));
    }
    draft.remove_policy(key);
    Ok(Outcome::Done)
}
