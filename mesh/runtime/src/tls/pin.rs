//! Judging control before any root is known: by the pins of a join token.

use std::sync::Arc;

use mesh_core::identity::Identity;
use mesh_core::reason::Reason;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::verify_tls13_signature;
use rustls::{DigitallySignedStruct, SignatureScheme};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use webpki::KeyUsage;

use super::leaf::{read_leaf, spki_sha256};
use super::provider;
use super::verify::{refused, verify_chain};

/// Accepts a control whose chain ends in a root that a token pins. Control sends that root with its chain.
#[derive(Debug)]
pub struct PinVerifier {
    pins: Vec<[u8; 32]>,
}

impl PinVerifier {
    pub fn new(pins: Vec<[u8; 32]>) -> Arc<Self> {
        Arc::new(Self { pins })
    }

    fn judge(
        &self,
        leaf: &CertificateDer<'_>,
        chain: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), Reason> {
        if read_leaf(leaf)?.id.identity != Identity::Control {
            return Err(Reason::IdentityKind);
        }
        let pinned = |root: &&CertificateDer<'_>| {
            spki_sha256(root).is_ok_and(|pin| self.pins.contains(&pin))
        };
        let root = chain.iter().find(pinned).ok_or(Reason::UntrustedIssuer)?;
        let anchor = webpki::anchor_from_trusted_cert(root).map_err(|_| Reason::UntrustedIssuer)?;
        verify_chain(leaf, chain, &[anchor], now, KeyUsage::server_auth())
    }
}

impl ServerCertVerifier for PinVerifier {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        chain: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.judge(leaf, chain, now).map_err(refused)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General(
            "TLS 1.2 is not spoken here".to_owned(),
        ))
    }

    fn verify_tls13_signature(
        &self,
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

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider()
            .signature_verification_algorithms
            .supported_schemes()
    }
}
