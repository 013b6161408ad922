//! What a leaf certificate says: one SPIFFE id, its Source and its life.

use aws_lc_rs::digest;
use mesh_core::identity::{Identity, SpiffeId};
use mesh_core::names::HostUid;
use mesh_core::reason::Reason;
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;
use x509_parser::oid_registry::OID_X509_SERIALNUMBER;
use x509_parser::prelude::FromDer as _;

/// The subject attribute that names the Source host of a leaf: `serialNumber` (X.520 §6.2.9).
pub const SOURCE_OID: &[u64] = &[2, 5, 4, 5];

/// A leaf, read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeafFacts {
    pub id: SpiffeId,
    /// The host that the leaf was given to, so that it can be revoked as a whole.
    pub host: Option<HostUid>,
    /// Unix time, seconds.
    pub not_before_s: i64,
    /// Unix time, seconds.
    pub not_after_s: i64,
    /// SHA-256 of the SubjectPublicKeyInfo.
    pub spki_sha256: [u8; 32],
    pub serial: Vec<u8>,
}

impl LeafFacts {
    /// Whether what a host was given names it. Without its Source a leaf would be covered by no revocation. Control and
    /// operators are no host's.
    pub(super) fn check_source(&self) -> Result<(), Reason> {
        let named = match &self.id.identity {
            Identity::Workload(_) | Identity::Host(_) => self.host.is_some(),
            Identity::Agent(uid) => self.host.as_ref() == Some(uid),
            Identity::Control | Identity::Operator(_) => true,
        };
        if named {
            Ok(())
        } else {
            Err(Reason::SourceMissing)
        }
    }
}

/// Reads a leaf of the mesh.
///
/// # Errors
/// [`Reason::CertificateMalformed`] when it is no certificate, has not exactly one URI name, that is not a SPIFFE id of
/// the mesh, or its Source can not be read.
pub fn read_leaf(der: &[u8]) -> Result<LeafFacts, Reason> {
    let malformed = Reason::CertificateMalformed;
    let (rest, certificate) = X509Certificate::from_der(der).map_err(|_| malformed)?;
    if !rest.is_empty() || certificate.is_ca() {
        return Err(malformed);
    }
    let names = certificate
        .subject_alternative_name()
        .map_err(|_| malformed)?
        .ok_or(malformed)?;
    let mut uris = names
        .value
        .general_names
        .iter()
        .filter_map(|name| match name {
            GeneralName::URI(uri) => Some(*uri),
            _ => None,
        });
    let (Some(uri), None) = (uris.next(), uris.next()) else {
        return Err(malformed);
    };
    let id = SpiffeId::parse(uri).map_err(|_| malformed)?;
    let mut sources = certificate.subject().iter_by_oid(&OID_X509_SERIALNUMBER);
    let host = match (sources.next(), sources.next()) {
        (None, _) => None,
        (Some(source), None) => {
            let text = source.as_str().map_err(|_| malformed)?;
            Some(text.parse().map_err(|_| malformed)?)
        }
        // Which of them a revocation would have to name is not to be guessed.
        (Some(_), Some(_)) => return Err(malformed),
    };
    Ok(LeafFacts {
        id,
        host,
        not_before_s: certificate.validity().not_before.timestamp(),
        not_after_s: certificate.validity().not_after.timestamp(),
        spki_sha256: sha256(certificate.public_key().raw),
        serial: certificate.raw_serial().to_vec(),
    })
}

/// When any certificate, of an issuer too, begins and ends, Unix seconds.
///
/// # Errors
/// [`Reason::CertificateMalformed`] when it is no certificate.
pub fn validity(der: &[u8]) -> Result<(i64, i64), Reason> {
    let (_, certificate) =
        X509Certificate::from_der(der).map_err(|_| Reason::CertificateMalformed)?;
    let validity = certificate.validity();
    Ok((
        validity.not_before.timestamp(),
        validity.not_after.timestamp(),
    ))
}

/// SHA-256 of the SubjectPublicKeyInfo of any certificate: what a pin pins.
///
/// # Errors
/// [`Reason::CertificateMalformed`] when it is no certificate.
pub fn spki_sha256(der: &[u8]) -> Result<[u8; 32], Reason> {
    let (_, certificate) =
        X509Certificate::from_der(der).map_err(|_| Reason::CertificateMalformed)?;
    Ok(sha256(certificate.public_key().raw))
}

fn sha256(bytes: &[u8]) -> [u8; 32] {
    let mut out = [0; 32];
    out.copy_from_slice(digest::digest(&digest::SHA256, bytes).as_ref());
    out
}
