//! The certificate authority: a root that may be kept offline, an issuer that signs, and the leaves of agents,
//! workloads, operators and control itself. Its keys are files (0600) under `ca/`, never in the store.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use aws_lc_rs::rand;
use base64::Engine as _;
use mesh_api::proto;
use mesh_core::identity::SpiffeId;
use mesh_core::names::{HostUid, TrustDomain};
use mesh_core::reason::Reason;
use mesh_runtime::files::{self, FileError};
use mesh_runtime::tls::leaf;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName,
    DnType, DnValue, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    PublicKeyData, SanType, SerialNumber, SigningKey as _,
};
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, CertificateSigningRequestDer};

use crate::catalogue::objects::Digest;

const DAY_S: u64 = 24 * 3600;
const ROOT_LIFE_S: u64 = 10 * 365 * DAY_S;
const ISSUER_LIFE_S: u64 = 365 * DAY_S;
/// Clocks of hosts may be behind by this much, in seconds.
const BACKDATED_S: u64 = 300;
/// Largest certificate or key file, in bytes.
const PEM_MAX: u64 = 64 * 1024;
/// Largest certificate request, in bytes: ours have about 200.
const CSR_MAX: usize = 8 * 1024;

#[derive(Debug, thiserror::Error)]
pub(crate) enum CaError {
    #[error(transparent)]
    File(#[from] FileError),
    #[error("cannot make {what}: {source}")]
    Make {
        what: &'static str,
        source: rcgen::Error,
    },
    #[error("{path} can not be used: {cause}")]
    Given { path: String, cause: String },
}

/// Where a new authority comes from.
#[derive(Clone, Debug)]
pub(crate) enum Origin {
    /// Root and issuer are made here.
    New,
    /// The operator's root, which signs our issuer once.
    Root { cert: PathBuf, key: PathBuf },
    /// The operator's issuer; the root's key stays elsewhere.
    Issuer {
        root: PathBuf,
        cert: PathBuf,
        key: PathBuf,
    },
}

/// Where another issuer under the same root comes from.
#[derive(Clone, Debug)]
pub(crate) enum NewIssuer {
    /// It is made here and signed by this key of the root.
    Signed { root_key: PathBuf },
    /// The operator's.
    Given { cert: PathBuf, key: PathBuf },
}

/// What a leaf is for.
#[derive(Clone, Debug)]
pub(crate) struct LeafOrder<'a> {
    pub id: &'a SpiffeId,
    /// The host that it is given to.
    pub source: Option<&'a HostUid>,
    /// DNS names and addresses, for control's own.
    pub names: &'a [String],
    pub life_s: u64,
}

pub(crate) struct Ca {
    pub root: CertificateDer<'static>,
    chain: CertificateDer<'static>,
    /// [`Self::chain`], as revocations carry it.
    shared: Arc<[u8]>,
    issuer: Issuer<'static, KeyPair>,
    root_life: Life,
    issuer_life: Life,
}

/// From when until when a certificate is good, in Unix seconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Life {
    pub not_before_s: i64,
    pub not_after_s: i64,
}

impl std::fmt::Debug for Ca {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ca").finish_non_exhaustive()
    }
}

fn make(what: &'static str) -> impl Fn(rcgen::Error) -> CaError {
    move |source| CaError::Make { what, source }
}

impl Ca {
    /// Makes the authority of a new mesh under `state`.
    pub(crate) fn create(
        state: &Path,
        trust_domain: &TrustDomain,
        origin: &Origin,
        now_s: u64,
    ) -> Result<Self, CaError> {
        let directory = state.join("ca");
        files::create_private_dir(&directory)?;
        let write =
            |name: &str, pem: &str| files::write_private(&directory.join(name), pem.as_bytes());
        match origin {
            Origin::New => {
                let key = KeyPair::generate().map_err(make("the root's key"))?;
                let params = ca_params(trust_domain, "root", 1, ROOT_LIFE_S, now_s);
                let root = params.self_signed(&key).map_err(make("the root"))?;
                write("root.key", &key.serialize_pem())?;
                write("root.pem", &root.pem())?;
                make_issuer(trust_domain, &root.pem(), key, now_s)?.write(&directory)?;
            }
            Origin::Root { cert, key } => {
                let root = read_pem(cert)?;
                let key = read_key(key)?;
                write("root.pem", &root)?;
                make_issuer(trust_domain, &root, key, now_s)?.write(&directory)?;
            }
            Origin::Issuer { root, cert, key } => {
                write("root.pem", &read_pem(root)?)?;
                given_issuer(cert, key)?.write(&directory)?;
            }
        }
        Self::load(state)
    }

    /// Puts another issuer in the place of the one in `state`, if it is one of the same root. What the old one signed is
    /// good until its own end.
    pub(crate) fn renew_issuer(
        state: &Path,
        trust_domain: &TrustDomain,
        new: &NewIssuer,
        now_s: u64,
    ) -> Result<Self, CaError> {
        let directory = state.join("ca");
        let root = directory.join("root.pem");
        let (pair, origin) = match new {
            NewIssuer::Signed { root_key } => {
                let key = read_key(root_key)?;
                let pair = make_issuer(trust_domain, &read_pem(&root)?, key, now_s)?;
                (pair, root_key)
            }
            NewIssuer::Given { cert, key } => (given_issuer(cert, key)?, cert),
        };
        pair.check(&read_certificate(&root)?)
            .map_err(|cause| CaError::Given {
                path: origin.display().to_string(),
                cause,
            })?;
        pair.write(&directory)?;
        Self::load(state)
    }

    /// Reads the authority of `state` and checks that its parts belong together.
    pub(crate) fn load(state: &Path) -> Result<Self, CaError> {
        let directory = state.join("ca");
        let root = read_certificate(&directory.join("root.pem"))?;
        let issuer_path = directory.join("issuer.pem");
        let chain = read_certificate(&issuer_path)?;
        let key = read_key(&directory.join("issuer.key"))?;
        let lives = check_pair(&chain, &key, &root);
        let (issuer_life, root_life) = lives.map_err(|cause| CaError::Given {
            path: issuer_path.display().to_string(),
            cause,
        })?;
        let issuer = Issuer::from_ca_cert_der(&chain, key).map_err(make("the issuer"))?;
        Ok(Self {
            root,
            shared: chain.as_ref().into(),
            chain,
            issuer,
            root_life,
            issuer_life,
        })
    }

    /// SHA-256 of the root's SubjectPublicKeyInfo: what tokens pin.
    pub(crate) fn pin(&self) -> Result<[u8; 32], Reason> {
        leaf::spki_sha256(&self.root)
    }

    /// The roots that hosts trust.
    pub(crate) fn bundle(&self, trust_domain: &TrustDomain, number: u64) -> proto::TrustBundle {
        proto::TrustBundle {
            number,
            domains: vec![proto::TrustDomainRoots {
                trust_domain: trust_domain.to_string(),
                roots: vec![self.root.to_vec().into()],
            }],
        }
    }

    /// Signs a leaf. Its chain, leaf first, without the root.
    pub(crate) fn sign(
        &self,
        order: &LeafOrder<'_>,
        key: &impl PublicKeyData,
        now_s: u64,
    ) -> Result<Vec<CertificateDer<'static>>, CaError> {
        let failed = make("a leaf");
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        if let Some(uid) = order.source {
            let value = DnValue::PrintableString(uid.as_str().try_into().map_err(&failed)?);
            let source = DnType::CustomDnType(leaf::SOURCE_OID.to_vec());
            params.distinguished_name.push(source, value);
        }
        let uri = order.id.to_string().try_into().map_err(&failed)?;
        params.subject_alt_names = vec![SanType::URI(uri)];
        for name in order.names {
            params.subject_alt_names.push(match name.parse::<IpAddr>() {
                Ok(address) => SanType::IpAddress(address),
                Err(_) => SanType::DnsName(name.as_str().try_into().map_err(&failed)?),
            });
        }
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ClientAuth,
            ExtendedKeyUsagePurpose::ServerAuth,
        ];
        params.is_ca = IsCa::ExplicitNoCa;
        params.use_authority_key_identifier_extension = true;
        params.serial_number = Some(serial());
        let ends_s = (now_s + order.life_s).min(self.issuer_ends_s());
        set_life(&mut params, now_s, ends_s);
        let leaf = params.signed_by(key, &self.issuer).map_err(failed)?;
        Ok(vec![leaf.der().clone(), self.chain.clone()])
    }

    /// The issuing certificate.
    pub(crate) fn issuer(&self) -> Arc<[u8]> {
        Arc::clone(&self.shared)
    }

    /// Signs what this mesh states, for itself to believe later.
    pub(crate) fn sign_statement(&self, statement: &str) -> Result<Vec<u8>, CaError> {
        let signed = self.issuer.key().sign(statement.as_bytes());
        signed.map_err(make("a signature"))
    }

    /// Whether this certificate is an issuer of this mesh, or was: the root signed it. Its time may be over, for what it
    /// stated outlives it.
    pub(crate) fn has_issued(&self, issuer: &[u8]) -> bool {
        *issuer == *self.shared || check_issuer(issuer, &self.root).is_ok()
    }

    /// When the issuer, or the root, ends: no leaf lives longer.
    pub(crate) fn issuer_ends_s(&self) -> u64 {
        let ends_s = self.issuer_life.not_after_s.min(self.root_life.not_after_s);
        ends_s.max(0).cast_unsigned()
    }

    pub(crate) fn root_life(&self) -> Life {
        self.root_life
    }

    pub(crate) fn issuer_life(&self) -> Life {
        self.issuer_life
    }
}

/// A certificate with its key, as PEM.
struct IssuerPair {
    cert: String,
    key: String,
}

impl IssuerPair {
    /// Whether they belong together, and to this root.
    fn check(&self, root: &[u8]) -> Result<(), String> {
        let cert = CertificateDer::from_pem_slice(self.cert.as_bytes());
        let key = KeyPair::from_pem(&self.key).map_err(|e| e.to_string())?;
        check_pair(&cert.map_err(|e| e.to_string())?, &key, root)?;
        Ok(())
    }

    fn write(&self, directory: &Path) -> Result<(), FileError> {
        files::write_private(&directory.join("issuer.key"), self.key.as_bytes())?;
        files::write_private(&directory.join("issuer.pem"), self.cert.as_bytes())
    }
}

fn make_issuer(
    trust_domain: &TrustDomain,
    root_pem: &str,
    root_key: KeyPair,
    now_s: u64,
) -> Result<IssuerPair, CaError> {
    let failed = make("the issuer");
    let root = Issuer::from_ca_cert_pem(root_pem, root_key).map_err(&failed)?;
    let key = KeyPair::generate().map_err(&failed)?;
    let params = ca_params(trust_domain, "issuer", 0, ISSUER_LIFE_S, now_s);
    let issuer = params.signed_by(&key, &root).map_err(&failed)?;
    Ok(IssuerPair {
        cert: issuer.pem(),
        key: key.serialize_pem(),
    })
}

fn given_issuer(cert: &Path, key: &Path) -> Result<IssuerPair, CaError> {
    Ok(IssuerPair {
        cert: read_pem(cert)?,
        key: read_key(key)?.serialize_pem(),
    })
}

fn ca_params(
    trust_domain: &TrustDomain,
    role: &str,
    path_len: u8,
    life_s: u64,
    now_s: u64,
) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params
        .distinguished_name
        .push(DnType::OrganizationName, format!("Meshwork {trust_domain}"));
    // Root and issuer must not have equal names: a chain is built by them.
    params
        .distinguished_name
        .push(DnType::CommonName, format!("Meshwork {role}"));
    // X509-SVID §3.2: a signing certificate has the id of the trust domain itself.
    if let Ok(uri) = format!("spiffe://{trust_domain}").try_into() {
        params.subject_alt_names = vec![SanType::URI(uri)];
    }
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(path_len));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.use_authority_key_identifier_extension = true;
    params.serial_number = Some(serial());
    set_life(&mut params, now_s, now_s + life_s);
    params
}

fn set_life(params: &mut CertificateParams, now_s: u64, ends_s: u64) {
    let epoch = rcgen::date_time_ymd(1970, 1, 1);
    params.not_before = epoch + Duration::from_secs(now_s.saturating_sub(BACKDATED_S));
    params.not_after = epoch + Duration::from_secs(ends_s);
}

/// 127 random bits: positive in DER, never seen twice (CA/B baseline §7.1 asks for 64).
fn serial() -> SerialNumber {
    let mut bytes = random::<16>();
    bytes[0] = bytes[0] & 0x7f | 0x40;
    SerialNumber::from_slice(&bytes)
}

/// Random bytes. Without a source of randomness no secret could be made, so that ends the process.
pub(crate) fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    if rand::fill(&mut bytes).is_err() {
        log::error!("the system gives no random bytes");
        std::process::abort();
    }
    bytes
}

/// The key of a certificate request that is signed by that key. Only ECDSA P-256 is issued.
pub(crate) fn requested_key(csr: &[u8]) -> Result<(rcgen::PublicKey, Digest), Reason> {
    if CSR_MAX < csr.len() {
        return Err(Reason::BadRequestKey);
    }
    let csr = CertificateSigningRequestDer::from(csr);
    let request =
        CertificateSigningRequestParams::from_der(&csr).map_err(|_| Reason::BadRequestKey)?;
    let key = request.public_key;
    if *key.algorithm() != rcgen::PKCS_ECDSA_P256_SHA256 {
        return Err(Reason::BadRequestKey);
    }
    let digest = Digest::of(&key.subject_public_key_info());
    Ok((key, digest))
}

/// A certificate in the text form of RFC 7468.
pub(crate) fn to_pem(der: &CertificateDer<'_>) -> String {
    let text = base64::engine::general_purpose::STANDARD.encode(der);
    let mut pem = "-----BEGIN CERTIFICATE-----\n".to_owned();
    for line in text.as_bytes().chunks(64) {
        pem.push_str(&String::from_utf8_lossy(line));
        pem.push('\n');
    }
    pem + "-----END CERTIFICATE-----\n"
}

fn read_pem(path: &Path) -> Result<String, CaError> {
    let bytes = files::read_bounded(path, PEM_MAX)?;
    String::from_utf8(bytes).map_err(|_| CaError::Given {
        path: path.display().to_string(),
        cause: "it is not PEM".to_owned(),
    })
}

fn read_key(path: &Path) -> Result<KeyPair, CaError> {
    KeyPair::from_pem(&read_pem(path)?).map_err(|e| CaError::Given {
        path: path.display().to_string(),
        cause: e.to_string(),
    })
}

fn read_certificate(path: &Path) -> Result<CertificateDer<'static>, CaError> {
    let pem = read_pem(path)?;
    CertificateDer::from_pem_slice(pem.as_bytes()).map_err(|e| CaError::Given {
        path: path.display().to_string(),
        cause: e.to_string(),
    })
}

/// Whether `issuer` is a CA under `root` and `key` its key. Returns the lives of both.
fn check_pair(issuer: &[u8], key: &KeyPair, root: &[u8]) -> Result<(Life, Life), String> {
    let certified = leaf::spki_sha256(issuer).map_err(|e| e.text().to_owned())?;
    if certified != Digest::of(&key.subject_public_key_info()).0 {
        return Err("the key is not its key".to_owned());
    }
    check_issuer(issuer, root)
}

/// Whether `issuer` is a CA under `root`. Returns the lives of both.
fn check_issuer(issuer: &[u8], root: &[u8]) -> Result<(Life, Life), String> {
    let read = |der| {
        x509_parser::parse_x509_certificate(der)
            .map(|(_, certificate)| certificate)
            .map_err(|e| e.to_string())
    };
    let (issuer, root) = (read(issuer)?, read(root)?);
    if !issuer.is_ca() || !root.is_ca() {
        return Err("it, or its root, is no certificate authority".to_owned());
    }
    issuer
        .verify_signature(Some(root.public_key()))
        .map_err(|_| "it was not signed by the root".to_owned())?;
    let life = |c: &x509_parser::certificate::X509Certificate<'_>| Life {
        not_before_s: c.validity().not_before.timestamp(),
        not_after_s: c.validity().not_after.timestamp(),
    };
    Ok((life(&issuer), life(&root)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_authority_is_read_back_and_signs_what_the_mesh_reads() {
        let state = std::env::temp_dir().join(format!("meshwork-ca-{}", std::process::id()));
        let domain: TrustDomain = "corp.example.com".parse().unwrap();
        let now_s = crate::clock::now_s();
        Ca::create(&state, &domain, &Origin::New, now_s).unwrap();
        let ca = Ca::load(&state).unwrap();
        let key = KeyPair::generate().unwrap();
        let csr = CertificateParams::default()
            .serialize_request(&key)
            .unwrap();
        let (key, digest) = requested_key(csr.der()).unwrap();
        let uid: HostUid = "00112233445566778899aabbccddeeff".parse().unwrap();
        let id = SpiffeId::parse("spiffe://corp.example.com/ns/shop/sa/web").unwrap();
        let order = LeafOrder {
            id: &id,
            source: Some(&uid),
            names: &[],
            life_s: 3600,
        };
        let chain = ca.sign(&order, &key, now_s).unwrap();
        let facts = leaf::read_leaf(&chain[0]).unwrap();
        assert_eq!((facts.id, facts.host), (id, Some(uid)));
        assert_eq!(facts.spki_sha256, digest.0);
        assert_eq!(facts.not_after_s, (now_s + 3600).cast_signed());
        assert_eq!(facts.not_before_s, (now_s - BACKDATED_S).cast_signed());

        let mut broken = csr.der().to_vec();
        let last = broken.len() - 1;
        broken[last] ^= 1;
        assert_eq!(requested_key(&broken).unwrap_err(), Reason::BadRequestKey);
        std::fs::remove_dir_all(&state).unwrap();
    }

    #[test]
    fn a_given_root_signs_our_issuer_and_a_given_issuer_needs_no_root_key() {
        let base = std::env::temp_dir().join(format!("meshwork-ca-given-{}", std::process::id()));
        let domain: TrustDomain = "corp.example.com".parse().unwrap();
        let now_s = crate::clock::now_s();
        let first = base.join("first");
        Ca::create(&first, &domain, &Origin::New, now_s).unwrap();
        let file = |name: &str| first.join("ca").join(name);
        let origin = Origin::Root {
            cert: file("root.pem"),
            key: file("root.key"),
        };
        let second = Ca::create(&base.join("second"), &domain, &origin, now_s).unwrap();
        assert_eq!(second.pin(), Ca::load(&first).unwrap().pin());
        assert!(!base.join("second/ca/root.key").exists());
        let origin = Origin::Issuer {
            root: file("root.pem"),
            cert: file("issuer.pem"),
            key: file("issuer.key"),
        };
        Ca::create(&base.join("third"), &domain, &origin, now_s).unwrap();
        let origin = Origin::Issuer {
            root: file("root.pem"),
            cert: base.join("second/ca/issuer.pem"),
            key: file("issuer.key"),
        };
        assert!(Ca::create(&base.join("fourth"), &domain, &origin, now_s).is_err());
        std::fs::remove_dir_all(&base).unwrap();
    }
}
