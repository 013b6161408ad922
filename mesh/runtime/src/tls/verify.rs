//! The one verifier of the mesh, for both sides of a handshake.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use mesh_core::identity::Identity;
use mesh_core::names::TrustDomain;
use mesh_core::reason::Reason;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::verify_tls13_signature;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, OtherError, SignatureScheme,
};
use rustls_pki_types::{CertificateDer, ServerName, TrustAnchor, UnixTime};
use webpki::{EndEntityCert, KeyUsage};

use super::leaf::{LeafFacts, read_leaf};
use super::provider;
use super::trust::SharedTrust;

/// Longest chain that is looked at, leaf included.
const CHAIN_MAX: usize = 6;

/// Whom this end of a connection accepts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Accept {
    /// At the mesh port: workloads, hosts' own processes, and control, which proves addresses.
    Callers,
    /// Behind the mesh port of a peer: the workload that the SNI names.
    NamedWorkload,
    /// The control of this trust domain.
    Control(TrustDomain),
    /// At control: agents and operators of this trust domain, or no certificate at all.
    AgentsAndOperators(TrustDomain),
}

/// Verifies chains against the roots of the leaf's trust domain only.
#[derive(Debug)]
pub struct Verifier {
    trust: SharedTrust,
    accept: Accept,
}

/// Carries a [`Reason`] through rustls.
#[derive(Debug)]
struct Refused(Reason);

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.text())
    }
}

impl std::error::Error for Refused {}

impl Verifier {
    pub fn new(trust: SharedTrust, accept: Accept) -> Arc<Self> {
        Arc::new(Self { trust, accept })
    }

    /// Judges a chain.
    ///
    /// # Errors
    /// The reason for the refusal.
    pub fn judge(
        &self,
        leaf: &CertificateDer<'_>,
        chain: &[CertificateDer<'_>],
        name: Option<&ServerName<'_>>,
        now: UnixTime,
    ) -> Result<LeafFacts, Reason> {
        let facts = read_leaf(leaf)?;
        self.accept.check(&facts, name)?;
        let trust = self.trust.load();
        let roots = trust
            .roots(&facts.id.trust_domain)
            .ok_or(Reason::UnknownTrustDomain)?;
        let usage = match self.accept {
            Accept::Callers | Accept::AgentsAndOperators(_) => KeyUsage::client_auth(),
            Accept::NamedWorkload | Accept::Control(_) => KeyUsage::server_auth(),
        };
        verify_chain(leaf, chain, roots, now, usage)?;
        // Last: only of what is proven is it worth saying that it was revoked, or can not be.
        facts.check_source()?;
        if let Some(host) = &facts.host {
            let revoked = trust.revoked().ok_or(Reason::RevocationsUnknown)?;
            if revoked.cover(host, &facts.id.identity) {
                return Err(Reason::PeerRevoked);
            }
        }
        Ok(facts)
    }
}

impl Accept {
    fn check(&self, facts: &LeafFacts, name: Option<&ServerName<'_>>) -> Result<(), Reason> {
        let identity = &facts.id.identity;
        let kind = match self {
            Self::Callers => {
                matches!(
                    identity,
                    Identity::Workload(_) | Identity::Host(_) | Identity::Control
                )
            }
            Self::NamedWorkload => matches!(identity, Identity::Workload(_)),
            Self::Control(own) => *identity == Identity::Control && facts.id.trust_domain == *own,
            Self::AgentsAndOperators(own) => {
                matches!(identity, Identity::Agent(_) | Identity::Operator(_))
                    && facts.id.trust_domain == *own
            }
        };
        if !kind {
            return Err(Reason::IdentityKind);
        }
        if *self == Self::NamedWorkload {
            let wanted = match name {
                Some(ServerName::DnsName(name)) => Some(name.as_ref()),
                _ => None,
            };
            if wanted.is_none() || facts.id.sni().as_deref() != wanted {
                return Err(Reason::PeerIdentity);
            }
        }
        Ok(())
    }
}

/// Verifies a chain against `roots` and nothing else.
pub(super) fn verify_chain(
    leaf: &CertificateDer<'_>,
    chain: &[CertificateDer<'_>],
    roots: &[TrustAnchor<'_>],
    now: UnixTime,
    usage: KeyUsage,
) -> Result<(), Reason> {
    if chain.len() >= CHAIN_MAX {
        return Err(Reason::UntrustedIssuer);
    }
    let leaf = EndEntityCert::try_from(leaf).map_err(|_| Reason::CertificateMalformed)?;
    let algorithms = webpki::ALL_VERIFICATION_ALGS;
    match leaf.verify_for_usage(algorithms, roots, chain, now, usage, None, None) {
        Ok(_) => Ok(()),
        Err(webpki::Error::CertExpired { .. } | webpki::Error::CertNotValidYet { .. }) => {
            Err(Reason::CertificateExpired)
        }
        Err(_) => Err(Reason::UntrustedIssuer),
    }
}

/// Whether the key of `certificate` signed `message`.
pub fn has_signed(certificate: &CertificateDer<'_>, message: &[u8], signature: &[u8]) -> bool {
    let Ok(certificate) = EndEntityCert::try_from(certificate) else {
        return false;
    };
    let all = webpki::ALL_VERIFICATION_ALGS.iter();
    all.into_iter().any(|algorithm| {
        certificate
            .verify_signature(*algorithm, message, signature)
            .is_ok()
    })
}

pub(super) fn refused(reason: Reason) -> rustls::Error {
    rustls::Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(Refused(
        reason,
    )))))
}

/// The reason behind a failed handshake, as this side knows it.
pub fn handshake_reason(error: &io::Error) -> Reason {
    if error.kind() == io::ErrorKind::TimedOut {
        return Reason::Timeout;
    }
    let inner = error
        .get_ref()
        .and_then(|e| e.downcast_ref::<rustls::Error>());
    match inner {
        Some(rustls::Error::InvalidCertificate(CertificateError::Other(OtherError(cause)))) => {
            cause
                .downcast_ref::<Refused>()
                .map_or(Reason::UntrustedIssuer, |r| r.0)
        }
        Some(rustls::Error::InvalidCertificate(_)) => Reason::UntrustedIssuer,
        Some(rustls::Error::NoCertificatesPresented) => Reason::NoCertificate,
        Some(rustls::Error::General(text))
            if text.contains("no server certificate chain resolved") =>
        {
            Reason::UnknownServerName
        }
        Some(rustls::Error::InvalidMessage(_) | rustls::Error::PeerIncompatible(_)) => {
            Reason::NotTls
        }
        Some(rustls::Error::InappropriateMessage { .. }) => Reason::NotTls,
        Some(_) => Reason::PeerHandshake,
        None => Reason::PeerUnreachable,
    }
}

fn schemes() -> Vec<SignatureScheme> {
    provider()
        .signature_verification_algorithms
        .supported_schemes()
}

fn signature(
    message: &[u8],
    certificate: &CertificateDer<'_>,
    signed: &DigitallySignedStruct,
) -> Result<HandshakeSignatureValid, rustls::Error> {
    verify_tls13_signature(
        message,
        certificate,
        signed,
        &provider().signature_verification_algorithms,
    )
}

fn no_tls12() -> rustls::Error {
    rustls::Error::General("TLS 1.2 is not spoken here".to_owned())
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        chain: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.judge(leaf, chain, Some(name), now).map_err(refused)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(no_tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        schemes()
    }
}

impl ClientCertVerifier for Verifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn client_auth_mandatory(&self) -> bool {
        self.accept == Accept::Callers
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        chain: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.judge(leaf, chain, None, now).map_err(refused)?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(no_tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        schemes()
    }
}

/// Unix time now, as certificates count it.
pub fn unix_now() -> UnixTime {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    UnixTime::since_unix_epoch(now.unwrap_or(Duration::ZERO))
}
