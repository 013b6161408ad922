//! `Challenge` and `Rejoin`: a host that was away for longer than its credential lives proves by the key that joined
//! that it is still that host. It needs no token for a year, unless it was removed meanwhile.

use std::net::IpAddr;

use aws_lc_rs::hmac;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1, UnparsedPublicKey};
use mesh_api::{proto, sync};
use mesh_core::identity::{Identity, SpiffeId};
use mesh_core::names::HostUid;
use mesh_core::reason::Reason;
use rcgen::PublicKeyData as _;

use super::name;
use crate::audit::Actor;
use crate::ca::{self, LeafOrder};
use crate::catalogue::objects::Host;
use crate::clock;
use crate::control::Control;
use crate::refusal::Refusal;

/// How long a nonce is good, in seconds: one answer of a slow host.
const NONCE_LIFE_S: u64 = 60;
/// How long a host may have been away, in seconds: a year.
const AWAY_MAX_S: u64 = 365 * 24 * 3600;
/// Bytes of the time in a nonce.
const TIME_LEN: usize = 8;

/// Makes the nonces of this process. They are not kept: each names its time and proves that it is one of ours.
#[derive(Debug)]
pub(crate) struct Nonces(hmac::Key);

impl Default for Nonces {
    fn default() -> Self {
        Self(hmac::Key::new(hmac::HMAC_SHA256, &ca::random::<32>()))
    }
}

impl Nonces {
    fn make(&self, host: &HostUid, now_s: u64) -> Vec<u8> {
        let tag = hmac::sign(&self.0, &Self::text(host, now_s));
        let mut nonce = now_s.to_be_bytes().to_vec();
        nonce.extend_from_slice(tag.as_ref());
        nonce
    }

    fn is_fresh(&self, host: &HostUid, nonce: &[u8], now_s: u64) -> bool {
        let Some((time, tag)) = nonce.split_first_chunk::<TIME_LEN>() else {
            return false;
        };
        let made_s = u64::from_be_bytes(*time);
        hmac::verify(&self.0, &Self::text(host, made_s), tag).is_ok()
            && now_s.abs_diff(made_s) <= NONCE_LIFE_S
    }

    fn text(host: &HostUid, made_s: u64) -> Vec<u8> {
        format!("{host} {made_s}").into_bytes()
    }
}

/// Answers every host alike: who asks learns nothing of who is in the mesh.
pub(super) fn challenge(
    control: &Control,
    request: &proto::ChallengeRequest,
) -> Result<proto::ChallengeResponse, Refusal> {
    let host = name::<HostUid>(&request.host_uid)?;
    let nonce = control.nonces.make(&host, clock::now_s());
    Ok(proto::ChallengeResponse {
        nonce: nonce.into(),
    })
}

pub(super) fn rejoin(
    control: &Control,
    from: IpAddr,
    request: &proto::RejoinRequest,
) -> Result<proto::RejoinResponse, Refusal> {
    let now = control.writer.now();
    let uid = name::<HostUid>(&request.host_uid)?;
    let actor = Actor {
        who: now.host_label(&uid),
        from: from.to_string(),
    };
    let chain = prove(control, &uid, request)
        .inspect_err(|refusal| control.refused(&actor, "rejoin", uid.as_str(), refusal))?;
    control.audited(&actor, "rejoin", uid.as_str());
    Ok(proto::RejoinResponse {
        certificate_chain: chain,
    })
}

fn prove(
    control: &Control,
    uid: &HostUid,
    request: &proto::RejoinRequest,
) -> Result<Vec<bytes::Bytes>, Refusal> {
    let now = control.writer.now();
    let host = now.hosts.get(uid).ok_or(Reason::HostRevoked)?;
    let now_s = clock::now_s();
    if !control.nonces.is_fresh(uid, &request.nonce, now_s) {
        return Err(Refusal::new(
            Reason::NotAuthenticated,
            "the nonce is none of this control, or older than a minute; ask for another",
        ));
    }
    let (key, digest) = ca::requested_key(&request.csr)?;
    let statement = sync::rejoin_statement(uid, &request.nonce);
    let signer = UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, key.der_bytes());
    let signed = signer.verify(statement.as_bytes(), &request.signature);
    if !digest.matches(&host.key) || signed.is_err() {
        return Err(Refusal::new(
            Reason::NotAuthenticated,
            "that is not signed by the key with which the host joined",
        ));
    }
    within_a_year(host, now_s)?;
    let id = SpiffeId {
        trust_domain: control.settings.trust_domain.clone(),
        identity: Identity::Agent(uid.clone()),
    };
    let order = LeafOrder {
        id: &id,
        source: Some(uid),
        names: &[],
        life_s: control.leaves.agent().as_secs(),
    };
    log::info!(host = host.name.as_str(); "a host that was away proved its key and has a new credential");
    control.sign(&order, &key)
}

/// A host is away since its lease was lost.
fn within_a_year(host: &Host, now_s: u64) -> Result<(), Refusal> {
    if host.live || now_s <= host.since_s.saturating_add(AWAY_MAX_S) {
        return Ok(());
    }
    let message = format!(
        "host {} was away since {}, more than a year; join it anew with a token",
        host.name,
        clock::rfc3339(host.since_s)
    );
    Err(Refusal::new(Reason::CertificateExpired, message))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_nonce_is_of_one_host_one_control_and_one_minute() {
        let (ours, other) = (Nonces::default(), Nonces::default());
        let host = |n: u64| -> HostUid { format!("{n:032x}").parse().unwrap() };
        let nonce = ours.make(&host(1), 1000);
        assert!(ours.is_fresh(&host(1), &nonce, 1000 + NONCE_LIFE_S));
        assert!(!ours.is_fresh(&host(1), &nonce, 1001 + NONCE_LIFE_S));
        assert!(!ours.is_fresh(&host(2), &nonce, 1000));
        assert!(!other.is_fresh(&host(1), &nonce, 1000));
        for cut in 0..nonce.len() {
            assert!(!ours.is_fresh(&host(1), &nonce[..cut], 1000), "{cut}");
        }
        for at in 0..nonce.len() {
            let mut changed = nonce.clone();
            changed[at] ^= 1;
            assert!(!ours.is_fresh(&host(1), &changed, 1000), "{at}");
        }
    }
}
