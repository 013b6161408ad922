//! Join tokens: made, checked, used, revoked.

use std::sync::Arc;

use mesh_core::reason::Reason;
use mesh_core::revocation::Subject;

use super::command::{Join, NewToken, Outcome};
use super::draft::Draft;
use super::objects::Token;
use super::{TOKENS_MAX, host, whole};
use crate::clock;
use crate::refusal::Refusal;

/// Longest life of a token, in seconds: a year. A token is for now, not for a template.
const LIFE_MAX_S: u64 = 365 * 24 * 3600;
/// How long a token that can no more be used stays in lists, in seconds: 30 days.
const KEPT_S: u64 = 30 * 24 * 3600;
/// Most patterns of each kind in a scope.
const PATTERNS_MAX: usize = 64;

pub(super) fn create(draft: &mut Draft<'_>, new: &NewToken) -> Result<Outcome, Refusal> {
    let scope = &new.scope;
    let longest = [
        scope.identities.len(),
        scope.services.len(),
        scope.networks.len(),
    ];
    if longest.iter().any(|len| PATTERNS_MAX < *len) {
        return Err(Refusal::invalid(format!(
            "a token has at most {PATTERNS_MAX} identities, services and networks each; use patterns"
        )));
    }
    if new.uses == 0 {
        return Err(Refusal::invalid("a token needs at least one use"));
    }
    if new.expires_s <= draft.now_s || draft.now_s + LIFE_MAX_S < new.expires_s {
        return Err(Refusal::invalid(
            "a token lives for one second to one year; say how long with `--expires`, e.g. `--expires 30d`",
        ));
    }
    prune(draft);
    if TOKENS_MAX <= draft.next.tokens.len() {
        let message = format!("there are {TOKENS_MAX} tokens; wait until some expire");
        return Err(Refusal::new(Reason::Overloaded, message));
    }
    let token = Token {
        id: new.id.clone(),
        name: new.name.clone(),
        secret: new.secret,
        scope: new.scope.clone(),
        uses: new.uses,
        used: 0,
        replace: new.replace,
        revoked: false,
        created_s: draft.now_s,
        expires_s: new.expires_s,
        revision: draft.revision,
    };
    draft.put_token(token);
    Ok(Outcome::Done)
}

fn prune(draft: &mut Draft<'_>) {
    let now_s = draft.now_s;
    let old = |token: &&Arc<Token>| token.expires_s + KEPT_S < now_s;
    let ids: Vec<String> = draft
        .next
        .tokens
        .values()
        .filter(old)
        .map(|t| t.id.clone())
        .collect();
    ids.iter().for_each(|id| draft.remove_token(id));
}

/// Revokes a token; where it was stolen, all hosts that joined with it too.
pub(super) fn revoke(draft: &mut Draft<'_>, id: &str, hosts: bool) -> Result<Outcome, Refusal> {
    if hosts {
        let of_token = draft.next.hosts.values().filter(|h| h.token == id);
        let of_token: Vec<Subject> = of_token.map(|h| whole(&h.uid)).collect();
        host::room_for_revocations(draft, of_token.len())?;
        for subject in of_token {
            draft.revoke(&subject, draft.now_s);
        }
    }
    let token = draft.next.tokens.get(id);
    let token = token.ok_or_else(|| Refusal::not_found(&format!("token {id}")))?;
    if !token.revoked {
        let mut token = Token::clone(token);
        token.revoked = true;
        draft.put_token(token);
    }
    Ok(Outcome::Done)
}

/// Revokes all that could still be used: how often they were used since is not known. Returns how many.
pub(super) fn revoke_usable(draft: &mut Draft<'_>) -> usize {
    let now_s = draft.now_s;
    let usable = |token: &&Arc<Token>| !token.revoked && usable(token, now_s).is_ok();
    let usable: Vec<_> = draft.next.tokens.values().filter(usable).cloned().collect();
    for token in &usable {
        let mut token = Token::clone(token);
        token.revoked = true;
        draft.put_token(token);
    }
    usable.len()
}

/// The token of a join whose secret is right and that was not revoked. Whether it may be used once more is
/// asked by [`usable`]: a repeated join needs no new use.
pub(super) fn known(draft: &Draft<'_>, join: &Join) -> Result<Arc<Token>, Refusal> {
    let token = draft.next.tokens.get(&join.token);
    let token = token.filter(|token| token.secret.matches(&join.secret));
    let token = token.ok_or(Reason::TokenUnknown)?;
    if token.revoked {
        let message = format!(
            "the join token {} was revoked; make a new one with `meshctl token create`",
            token.id
        );
        return Err(Refusal::new(Reason::TokenRevoked, message));
    }
    Ok(Arc::clone(token))
}

pub(super) fn usable(token: &Token, now_s: u64) -> Result<(), Refusal> {
    if token.expires_s <= now_s {
        let message = format!(
            "the join token {} expired at {}; make a new one with `meshctl token create`",
            token.id,
            clock::rfc3339(token.expires_s)
        );
        return Err(Refusal::new(Reason::TokenExpired, message));
    }
    if token.uses <= token.used {
        let message = format!(
            "the join token {} was used {} of {} times; make a new one with `meshctl token create`",
            token.id, token.used, token.uses
        );
        return Err(Refusal::new(Reason::TokenUsed, message));
    }
    Ok(())
}
