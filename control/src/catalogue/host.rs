//! Hosts: how they join, what they report, how they go.

use std::net::IpAddr;
use std::sync::Arc;

use mesh_core::names::{Account, HostUid, Label, Network};
use mesh_core::reason::Reason;
use mesh_core::revocation::{REVOCATIONS_MAX, Revocation, Subject};

use super::command::{Join, Outcome};
use super::draft::Draft;
use super::objects::{Host, Revoked, Token, Workload};
use super::{HOSTS_MAX, service, token, whole};
use crate::refusal::Refusal;

/// Enrols a host. Whoever has the token's secret and the key of a host that joined with it is that host, as
/// often as it asks: its first answer may have been lost.
pub(super) fn join(draft: &mut Draft<'_>, join: &Join) -> Result<Outcome, Refusal> {
    let token = token::known(draft, join)?;
    let known = draft.next.host_by_key(&join.key).cloned();
    if let Some(host) = &known {
        if host.name != join.host_name {
            return Err(Refusal::invalid(format!(
                "the key is that of host {}; join as that, or with a new key",
                host.name
            )));
        }
        if host.token == token.id {
            return rejoin(draft, host, &token, join);
        }
    }
    let gone = |r: &Arc<Revoked>| {
        let joined = r.joined.as_ref().filter(|_| r.account.is_none());
        joined.is_some_and(|j| j.key == join.key && j.token == token.id)
    };
    if draft.next.revoked.values().any(gone) {
        return Err(Reason::HostRevoked.into());
    }
    token::usable(&token, draft.now_s)?;
    let network = network(join, &token)?;
    make_room(draft, join, &token, &network)?;
    let mut used = Token::clone(&token);
    used.used += 1;
    draft.put_token(used);
    let old = known.as_deref();
    let mut host = Host {
        uid: old.map_or_else(|| join.uid.clone(), |h| h.uid.clone()),
        name: join.host_name.clone(),
        network,
        address: join.address,
        mesh_port: join.mesh_port,
        version: join.version.clone(),
        proven: false,
        doubted: false,
        key: join.key,
        token: token.id.clone(),
        scope: token.scope.clone(),
        bundle: old.map_or(0, |h| h.bundle),
        live: old.is_some_and(|h| h.live),
        since_s: old.map_or(draft.now_s, |h| h.since_s),
        workloads: old.map_or_else(Vec::new, |h| h.workloads.clone()),
        created_s: old.map_or(draft.now_s, |h| h.created_s),
        revision: draft.revision,
    };
    host.proven = old.is_some_and(|old| old.proven && old.same_place(&host));
    draft.put_host(host.clone());
    Ok(Outcome::Joined(Arc::new(host)))
}

/// The network that the host will be in, if its token allows it.
fn network(join: &Join, token: &Token) -> Result<Network, Refusal> {
    let only = match token.scope.networks.as_slice() {
        [only] => only.clone(),
        _ => Network::default_network(),
    };
    let network = join.network.clone().unwrap_or(only);
    if token.scope.allows_network(&network) {
        return Ok(network);
    }
    let message = format!(
        "the join token {} does not allow the network {network}; make one with `--network {network}`",
        token.id
    );
    Err(Refusal::new(Reason::OutOfScope, message))
}

/// Checks that name and address are free, or frees them where the token says so.
fn make_room(
    draft: &mut Draft<'_>,
    join: &Join,
    token: &Token,
    network: &Network,
) -> Result<(), Refusal> {
    if let Some(taken) = draft.next.host_by_name(&join.host_name).cloned()
        && taken.key != join.key
    {
        if !token.replace {
            let message = format!(
                "a host named {} is in the mesh since {}; use another name or a token made with `--replace`",
                taken.name,
                crate::clock::rfc3339(taken.created_s)
            );
            return Err(Refusal::new(Reason::HostNameTaken, message));
        }
        draft.revoke(&whole(&taken.uid), draft.now_s);
    }
    address_is_free(draft, network, join.address, |h| h.key == join.key)?;
    if HOSTS_MAX <= draft.next.hosts.len() {
        let message = format!("there are {HOSTS_MAX} hosts; remove those that are gone");
        return Err(Refusal::new(Reason::Overloaded, message));
    }
    Ok(())
}

fn address_is_free(
    draft: &Draft<'_>,
    network: &Network,
    address: IpAddr,
    own: impl Fn(&Host) -> bool,
) -> Result<(), Refusal> {
    let settings = &draft.next.settings;
    // Control dials what a host claims: not what is nobody's, everybody's or the mesh's own.
    let ours = settings
        .vip_ranges()
        .is_ok_and(|ranges| ranges.contains(address));
    let local = match address {
        IpAddr::V4(v4) => v4.is_link_local() || v4.is_broadcast(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    };
    if address.is_unspecified() || address.is_multicast() || local || ours {
        let message = format!("{address} is no address of a host; say one with --address");
        return Err(Refusal::invalid(message));
    }
    match draft.next.host_at(network, address) {
        Some(other) if !own(other) => {
            let message = format!(
                "in the network {network} the address {address} belongs to host {}; say another with --address, \
                 or remove that host",
                other.name
            );
            Err(Refusal::new(Reason::AddressTaken, message))
        }
        _ => Ok(()),
    }
}

/// The same key and token again: the same host, at the address that it has now.
fn rejoin(
    draft: &mut Draft<'_>,
    host: &Arc<Host>,
    token: &Token,
    join: &Join,
) -> Result<Outcome, Refusal> {
    let network = match &join.network {
        None => host.network.clone(),
        Some(_) => network(join, token)?,
    };
    address_is_free(draft, &network, join.address, |h| h.uid == host.uid)?;
    let mut next = Host::clone(host);
    next.network = network;
    next.address = join.address;
    next.mesh_port = join.mesh_port;
    next.version.clone_from(&join.version);
    Ok(Outcome::Joined(put_if_changed(draft, host, next)))
}

/// What moved must be proven again.
fn put_if_changed(draft: &mut Draft<'_>, old: &Arc<Host>, mut next: Host) -> Arc<Host> {
    let same_place = old.same_place(&next);
    next.proven &= same_place;
    next.doubted &= same_place;
    if **old != next {
        draft.put_host(next.clone());
    }
    Arc::new(next)
}

fn get(draft: &Draft<'_>, uid: &HostUid) -> Result<Arc<Host>, Refusal> {
    let host = draft.next.hosts.get(uid).cloned();
    host.ok_or_else(|| Reason::HostRevoked.into())
}

pub(super) fn hello(
    draft: &mut Draft<'_>,
    uid: &HostUid,
    version: &str,
    address: Option<IpAddr>,
    mesh_port: Option<u16>,
) -> Result<Outcome, Refusal> {
    let host = get(draft, uid)?;
    let mut next = Host::clone(&host);
    version.clone_into(&mut next.version);
    if let Some(address) = address {
        address_is_free(draft, &host.network, address, |h| h.uid == *uid)?;
        next.address = address;
    }
    next.mesh_port = mesh_port.unwrap_or(next.mesh_port);
    put_if_changed(draft, &host, next);
    Ok(Outcome::Done)
}

pub(super) fn lease(draft: &mut Draft<'_>, uid: &HostUid, live: bool) -> Result<Outcome, Refusal> {
    let host = get(draft, uid)?;
    if host.live != live {
        let mut next = Host::clone(&host);
        next.live = live;
        next.doubted = false;
        next.since_s = draft.now_s;
        draft.put_host(next);
    }
    Ok(Outcome::Done)
}

/// The host has a trust bundle on disk and in use. An older one than before is one of a restored host.
pub(super) fn acked(draft: &mut Draft<'_>, uid: &HostUid, bundle: u64) -> Result<Outcome, Refusal> {
    let host = get(draft, uid)?;
    let mut next = Host::clone(&host);
    next.bundle = bundle;
    put_if_changed(draft, &host, next);
    Ok(Outcome::Done)
}

/// Control reached the host's agent at `place`, or failed to. The host may have moved since.
pub(super) fn judged(
    draft: &mut Draft<'_>,
    uid: &HostUid,
    place: (IpAddr, u16),
    reached: bool,
) -> Result<Outcome, Refusal> {
    let host = get(draft, uid)?;
    if (host.address, host.mesh_port) == place && !host.proven && (reached || !host.doubted) {
        let mut next = Host::clone(&host);
        next.proven = reached;
        next.doubted = !reached;
        draft.put_host(next);
    }
    Ok(Outcome::Done)
}

/// Takes over a report and makes the services that it names first. What can not be listed stays in the report:
/// the host is told why, and it is listed when the reason goes away.
pub(super) fn report(
    draft: &mut Draft<'_>,
    uid: &HostUid,
    workloads: &[Workload],
) -> Result<Outcome, Refusal> {
    let host = get(draft, uid)?;
    let mut next = Host::clone(&host);
    next.workloads = workloads.to_vec();
    let next = put_if_changed(draft, &host, next);
    for (account, offer) in next.offers() {
        if next.scope.allows_account(account) && next.scope.allows_service(&offer.service) {
            service::register(draft, &next, offer);
        }
    }
    Ok(Outcome::Done)
}

/// Removes a host: its uid is revoked, its endpoints go, its services stay with whoever else serves them.
pub(super) fn remove(draft: &mut Draft<'_>, name: &Label) -> Result<Outcome, Refusal> {
    let host = draft.next.host_by_name(name);
    let host = host.ok_or_else(|| Refusal::not_found(&format!("host {name}")))?;
    let subject = whole(&host.uid);
    room_for_revocations(draft, 1)?;
    draft.revoke(&subject, draft.now_s);
    Ok(Outcome::Done)
}

/// Revokes one workload of a host: it gets no certificate for it any more, and those that it has are worth nothing.
/// Whether the host serves it now is no matter: it may hold a certificate all the same.
pub(super) fn revoke_workload(
    draft: &mut Draft<'_>,
    account: &Account,
    name: &Label,
) -> Result<Outcome, Refusal> {
    let host = draft.next.host_by_name(name).cloned();
    let host = host.ok_or_else(|| Refusal::not_found(&format!("host {name}")))?;
    if !host.scope.allows_account(account) {
        let message = format!(
            "the token of host {name} does not allow the identity {account}: it never had one"
        );
        return Err(Refusal::new(Reason::NotFound, message));
    }
    room_for_revocations(draft, 1)?;
    let subject = Subject {
        host: host.uid.clone(),
        account: Some(account.clone()),
    };
    draft.revoke(&subject, draft.now_s);
    Ok(Outcome::Done)
}

/// What agents know of an earlier epoch and this one has forgotten.
pub(super) fn merge(draft: &mut Draft<'_>, known: &[Revocation]) -> Result<Outcome, Refusal> {
    room_for_revocations(draft, known.len())?;
    for one in known {
        draft.revoke(&one.subject, one.at_s);
    }
    Ok(Outcome::Done)
}

/// Agents bear so many at most.
pub(super) fn room_for_revocations(draft: &Draft<'_>, more: usize) -> Result<(), Refusal> {
    if draft.next.revoked.len() + more <= REVOCATIONS_MAX {
        return Ok(());
    }
    let message = format!(
        "there are {} revocations of the last year, and agents bear {REVOCATIONS_MAX}; a new trust domain forgets them",
        draft.next.revoked.len()
    );
    Err(Refusal::new(Reason::Overloaded, message))
}
