//! What an older state of a mesh may still say when it takes the place of a newer one: a new epoch begins, what was
//! revoked stays revoked, and no join token that may have been used since can be used again.

use std::path::Path;

use anyhow::Context as _;

use crate::audit::{Actor, Audit};
use crate::catalogue::Catalogue;
use crate::catalogue::command::{Command, Outcome, State};
use crate::store::{Store, StoreError};
use crate::{clock, export, init};

/// What became of an older state.
#[derive(Debug)]
pub(crate) struct Renewed {
    pub catalogue: Catalogue,
    /// Revocations that only the newer state had.
    pub revocations: usize,
    /// Join tokens that could have been used.
    pub tokens: usize,
}

/// Lets `old` take the place of `newer`, as far as anything is known of that.
pub(crate) fn renew(
    old: Catalogue,
    newer: &[Catalogue],
    epoch: u64,
    now_s: u64,
) -> Result<Renewed, String> {
    let before = old.revoked.len();
    let domain = old.settings.trust_domain.clone();
    let same = newer.iter().filter(|c| c.settings.trust_domain == domain);
    let revoked = same.flat_map(|c| c.revoked.values().cloned()).collect();
    let revision = old.revision + 1;
    let mut state = State::new(old)?;
    let command = Command::Restore { revoked };
    let (outcome, _) = state
        .apply(&command, revision, now_s)
        .map_err(|refusal| refusal.to_string())?;
    let Outcome::Restored { tokens } = outcome else {
        return Err("it can not be brought up to date".to_owned());
    };
    let mut catalogue = state.catalogue;
    catalogue.epoch = epoch;
    let revocations = catalogue.revoked.len().saturating_sub(before);
    Ok(Renewed {
        catalogue,
        revocations,
        tokens,
    })
}

/// `mesh-control restore`: puts a backup in the place of a store, under a new epoch.
pub(crate) fn restore(file: &Path, state: &Path, force: bool) -> anyhow::Result<String> {
    let old = export::read(file)?;
    let mut newer: Vec<Catalogue> = export::all(state).collect();
    let mut broken = String::new();
    if Store::exists(state) {
        if !force {
            anyhow::bail!(
                "{} has a store; stop mesh-control and say --force to put the backup in its place",
                state.display()
            );
        }
        match Store::peek(state) {
            Ok(there) => newer.push(there),
            // A broken one is why people restore; its exports and the agents know what it knew.
            Err(StoreError::Unreadable { cause, .. }) => {
                broken = format!(
                    "\nthe store that was replaced can not be read ({cause}): what it had revoked comes from its exports, and \
                     from agents once they connect"
                );
            }
            Err(error) => return Err(error.into()),
        }
        Store::set_aside(state)?;
    }
    let renewed =
        renew(old, &newer, init::new_epoch(), clock::now_s()).map_err(anyhow::Error::msg)?;
    let catalogue = &renewed.catalogue;
    mesh_runtime::files::create_private_dir(state)?;
    drop(Store::create(state, catalogue)?);
    export::write(state, catalogue)?;
    let audit = Audit::open(state).context("cannot open the audit log")?;
    let name = file.display().to_string();
    audit.append(
        &Actor::control(),
        "restore",
        &name,
        None,
        catalogue.revision,
    );
    let ca = if state.join("ca/issuer.key").exists() {
        ""
    } else {
        "\nits certificate authority is not in a backup: copy the directory ca/ here before you start control"
    };
    Ok(format!(
        "restored revision {} of the mesh {}: {} hosts, {} services, {} policies\n\
         {} revocations that it did not have were kept, {} join tokens that could have been used were revoked{broken}{ca}\n",
        catalogue.revision,
        catalogue.settings.trust_domain,
        catalogue.hosts.len(),
        catalogue.services.len(),
        catalogue.policies.len(),
        renewed.revocations,
        renewed.tokens,
    ))
}
