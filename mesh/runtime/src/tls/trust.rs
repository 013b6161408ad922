//! The roots of each trust domain. Never one pool: a root vouches for its own trust domain only.

use std::collections::BTreeMap;
use std::sync::Arc;

use arc_swap::ArcSwap;
use mesh_api::proto;
use mesh_core::names::TrustDomain;
use mesh_core::revocation::Revocations;
use rustls_pki_types::{CertificateDer, TrustAnchor};

/// Most trust domains, and most roots of one.
const DOMAINS_MAX: usize = 1024;
const ROOTS_MAX: usize = 16;

/// The trust store that is in force, exchanged whole.
pub type SharedTrust = Arc<ArcSwap<TrustStore>>;

/// Who is believed: root sets by trust domain, and what was revoked of what they vouch for.
#[derive(Clone, Debug)]
pub struct TrustStore {
    number: u64,
    domains: BTreeMap<TrustDomain, Vec<TrustAnchor<'static>>>,
    /// `None`: it is not known. Then no host is believed.
    revoked: Option<Arc<Revocations>>,
}

/// Why a bundle can not be used.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum TrustError {
    #[error("the trust bundle names `{0}`, which is not a trust domain")]
    Domain(String),
    #[error("a root of `{0}` is not a certificate that can be trusted")]
    Root(TrustDomain),
    #[error("the trust bundle has too many domains or roots")]
    TooMany,
}

/// Nobody is believed, for want of a root.
impl Default for TrustStore {
    fn default() -> Self {
        Self {
            number: 0,
            domains: BTreeMap::new(),
            revoked: Some(Arc::default()),
        }
    }
}

impl TrustStore {
    /// Reads control's bundle; all of it must be good.
    pub fn from_bundle(bundle: &proto::TrustBundle) -> Result<Self, TrustError> {
        if bundle.domains.len() > DOMAINS_MAX {
            return Err(TrustError::TooMany);
        }
        let mut domains = BTreeMap::new();
        for domain in &bundle.domains {
            let name = domain.trust_domain.parse();
            let name: TrustDomain =
                name.map_err(|_| TrustError::Domain(domain.trust_domain.clone()))?;
            if domain.roots.len() > ROOTS_MAX {
                return Err(TrustError::TooMany);
            }
            let roots = domain.roots.iter().map(|der| anchor(der));
            let roots = roots.collect::<Option<Vec<_>>>();
            domains.insert(name.clone(), roots.ok_or(TrustError::Root(name))?);
        }
        Ok(Self {
            number: bundle.number,
            domains,
            revoked: Some(Arc::default()),
        })
    }

    /// A store of one trust domain.
    pub fn of_root(domain: TrustDomain, root: &[u8]) -> Result<Self, TrustError> {
        let root = anchor(root).ok_or_else(|| TrustError::Root(domain.clone()))?;
        Ok(Self {
            number: 0,
            domains: BTreeMap::from([(domain, vec![root])]),
            revoked: Some(Arc::default()),
        })
    }

    /// The same roots with other revocations; `None`: what was revoked is not known.
    pub fn with_revoked(self, revoked: Option<Arc<Revocations>>) -> Self {
        Self { revoked, ..self }
    }

    /// What was revoked, if that is known.
    pub fn revoked(&self) -> Option<&Arc<Revocations>> {
        self.revoked.as_ref()
    }

    /// Shares it.
    pub fn shared(self) -> SharedTrust {
        Arc::new(ArcSwap::from_pointee(self))
    }

    /// The bundle's number.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// The roots of `domain`, if any is known.
    pub fn roots(&self, domain: &TrustDomain) -> Option<&[TrustAnchor<'static>]> {
        self.domains.get(domain).map(Vec::as_slice)
    }
}

fn anchor(der: &[u8]) -> Option<TrustAnchor<'static>> {
    let der = CertificateDer::from(der);
    webpki::anchor_from_trusted_cert(&der)
        .ok()
        .map(|anchor| anchor.to_owned())
}
