//! TLS 1.3 between SPIFFE identities. Trust is chosen by trust domain: the verifier reads exactly one URI SAN,
//! picks the roots of its trust domain and verifies against those only.

use std::sync::Arc;

use rustls::client::{ResolvesClientCert, Resumption};
use rustls::crypto::CryptoProvider;
use rustls::server::{NoServerSessionStorage, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, ServerConfig};
use rustls_pki_types::{CertificateDer, PrivateKeyDer};

pub mod handshake;
pub mod leaf;
pub mod pin;
pub mod record;
pub mod stream;
pub mod trust;
pub mod verify;

use verify::Verifier;

/// ALPN of the stream layer on the mesh port.
pub const ALPN_MESH: &[u8] = b"meshwork/1";

/// The one crypto provider: aws-lc-rs, X25519MLKEM768 preferred.
pub fn provider() -> Arc<CryptoProvider> {
    static PROVIDER: std::sync::LazyLock<Arc<CryptoProvider>> =
        std::sync::LazyLock::new(|| Arc::new(rustls::crypto::aws_lc_rs::default_provider()));
    Arc::clone(&PROVIDER)
}

/// A server that shows what `resolver` picks and judges clients by `verifier`.
///
/// # Errors
/// When the provider can not do TLS 1.3.
pub fn server_config(
    resolver: Arc<dyn ResolvesServerCert>,
    verifier: Arc<Verifier>,
    alpn: &[&[u8]],
) -> Result<ServerConfig, rustls::Error> {
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(resolver);
    config.alpn_protocols = alpn.iter().map(|p| p.to_vec()).collect();
    // A ticket would outlive the certificate it was given for.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config.enable_secret_extraction = extracts(alpn);
    Ok(config)
}

/// A client that shows `key`, if any, and judges the server by `verifier`.
///
/// # Errors
/// When the provider can not do TLS 1.3.
pub fn client_config(
    key: Option<Arc<CertifiedKey>>,
    verifier: Arc<Verifier>,
    alpn: &[&[u8]],
) -> Result<ClientConfig, rustls::Error> {
    client_config_with(key, verifier, alpn)
}

/// As [`client_config`], before any root is known: the server is judged by the pins of a join token.
///
/// # Errors
/// When the provider can not do TLS 1.3.
pub fn pinned_client_config(
    pins: Arc<pin::PinVerifier>,
    alpn: &[&[u8]],
) -> Result<ClientConfig, rustls::Error> {
    client_config_with(None, pins, alpn)
}

fn client_config_with(
    key: Option<Arc<CertifiedKey>>,
    verifier: Arc<dyn rustls::client::danger::ServerCertVerifier>,
    alpn: &[&[u8]],
) -> Result<ClientConfig, rustls::Error> {
    let builder = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(verifier);
    let mut config = match key {
        Some(key) => builder.with_client_cert_resolver(Arc::new(OneKey(key))),
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = alpn.iter().map(|p| p.to_vec()).collect();
    config.resumption = Resumption::disabled();
    config.enable_secret_extraction = extracts(alpn);
    Ok(config)
}

/// On the mesh port the records are ours ([`stream`]), and so are the keys that rustls made.
fn extracts(alpn: &[&[u8]]) -> bool {
    alpn.contains(&ALPN_MESH)
}

/// A chain (leaf first) with its key, ready to sign.
///
/// # Errors
/// When the key can not be read or is not the leaf's.
pub fn certified_key(
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
) -> Result<CertifiedKey, rustls::Error> {
    CertifiedKey::from_der(chain, key, &provider())
}

#[derive(Debug)]
struct OneKey(Arc<CertifiedKey>);

impl ResolvesClientCert for OneKey {
    fn resolve(&self, _: &[&[u8]], _: &[rustls::SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.0))
    }

    fn has_certs(&self) -> bool {
        true
    }
}
