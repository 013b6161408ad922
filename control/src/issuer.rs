//! `mesh-control renew-issuer`: another issuing certificate under the same root, before the old one ends or when its key
//! may be known to others. Nothing has to be told to hosts: they trust the root.

use std::path::Path;

use anyhow::Context as _;

use crate::audit::{Actor, Audit};
use crate::ca::{Ca, NewIssuer};
use crate::store::Store;
use crate::{clock, expiry};

/// Puts it in place and returns what to tell the operator.
pub(crate) fn renew(state: &Path, new: &NewIssuer) -> anyhow::Result<String> {
    // It also tells whether control runs: it would go on signing by the old one.
    let catalogue = Store::peek(state).context("is mesh-control stopped?")?;
    let now_s = clock::now_s();
    let ca = Ca::renew_issuer(state, &catalogue.settings.trust_domain, new, now_s)?;
    let audit = Audit::open(state).context("cannot open the audit log")?;
    let actor = Actor::control();
    audit.append(&actor, "renew issuer", "issuer", None, catalogue.revision);
    let [root, issuer] = expiry::lives(&ca, now_s.cast_signed());
    let ends =
        |one: &expiry::Certificate| clock::rfc3339(one.life.not_after_s.max(0).cast_unsigned());
    Ok(format!(
        "the issuer lives until {}, its root until {}\n\
         what the old issuer signed stays good until its own end, and so does what it revoked\n\
         next: start mesh-control again\n",
        ends(&issuer),
        ends(&root),
    ))
}
