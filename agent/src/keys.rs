//! Keys, certificate requests and chains, as the agent makes and keeps them: PEM on disk, DER on the wire.

use std::sync::Arc;

use anyhow::{Context, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use mesh_core::identity::SpiffeId;
use mesh_runtime::tls;
use mesh_runtime::tls::leaf::{LeafFacts, read_leaf};
use rcgen::{CertificateParams, DistinguishedName, KeyPair, SanType, SigningKey as _};
use rustls::sign::CertifiedKey;
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};

use crate::state::Pair;

/// Certificates in one chain, leaf included; the verifier looks at no more.
const CHAIN_MAX: usize = 6;
/// Letters in a line of PEM (RFC 7468 §2).
const PEM_LINE: usize = 64;

/// A new private key as PEM: ECDSA P-256, what the mesh's certificates are issued for.
pub(crate) fn generate() -> anyhow::Result<String> {
    let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256);
    Ok(key.context("cannot make a private key")?.serialize_pem())
}

/// A certificate request (PKCS#10, DER) signed by `key`; control takes nothing but the key from it.
pub(crate) fn request(key: &str, id: Option<&SpiffeId>) -> anyhow::Result<Vec<u8>> {
    let key = KeyPair::from_pem(key).context("cannot read a private key that was kept")?;
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    if let Some(id) = id {
        let uri = id.to_string().try_into()?;
        params.subject_alt_names = vec![SanType::URI(uri)];
    }
    let request = params.serialize_request(&key);
    let request = request.context("cannot make a certificate request")?;
    Ok(request.der().to_vec())
}

/// A signature by `key`: ECDSA with SHA-256, ASN.1.
pub(crate) fn sign(key: &str, text: &str) -> anyhow::Result<Vec<u8>> {
    let key = KeyPair::from_pem(key).context("cannot read a private key that was kept")?;
    key.sign(text.as_bytes()).context("cannot sign")
}

/// A chain of the wire as PEM.
pub(crate) fn chain_to_pem(chain: &[impl AsRef<[u8]>]) -> anyhow::Result<String> {
    ensure!(
        (1..=CHAIN_MAX).contains(&chain.len()),
        "control sent a chain of {} certificates; 1 to {CHAIN_MAX} are understood",
        chain.len()
    );
    let mut pem = String::new();
    for der in chain {
        pem.push_str("-----BEGIN CERTIFICATE-----\n");
        let text = STANDARD.encode(der);
        for line in text.as_bytes().chunks(PEM_LINE) {
            // Base64 is ASCII, so a piece of it is text.
            pem.push_str(&String::from_utf8_lossy(line));
            pem.push('\n');
        }
        pem.push_str("-----END CERTIFICATE-----\n");
    }
    Ok(pem)
}

/// A key with its chain, ready to sign, and what its leaf says.
pub(crate) fn read(pair: &Pair) -> anyhow::Result<(Arc<CertifiedKey>, LeafFacts)> {
    let chain: Vec<CertificateDer<'static>> =
        CertificateDer::pem_slice_iter(pair.chain.as_bytes()).collect::<Result<_, _>>()?;
    ensure!(
        (1..=CHAIN_MAX).contains(&chain.len()),
        "the chain has {} certificates; 1 to {CHAIN_MAX} are understood",
        chain.len()
    );
    let facts = read_leaf(&chain[0])
        .map_err(|reason| anyhow::anyhow!("the certificate is {reason}: {}", reason.text()))?;
    let key = PrivateKeyDer::from_pem_slice(pair.key.as_bytes())?;
    let key = tls::certified_key(chain, key).context("key and certificate do not match")?;
    Ok((Arc::new(key), facts))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A pair for `id`, signed by itself.
    pub(crate) fn pair(id: &str) -> Pair {
        let key = generate().unwrap();
        let chain = chain_to_pem(&[signed(&key, id, 4000)]).unwrap();
        Pair { key, chain }
    }

    /// A certificate for `key`, signed by itself, that ends with the year before `year`.
    pub(crate) fn signed(key: &str, id: &str, year: i32) -> Vec<u8> {
        signed_for(key, id, 1975..year)
    }

    /// The same for these years.
    pub(crate) fn signed_for(key: &str, id: &str, years: std::ops::Range<i32>) -> Vec<u8> {
        let signer = KeyPair::from_pem(key).unwrap();
        let mut params = CertificateParams::default();
        params.not_before = rcgen::date_time_ymd(years.start, 1, 1);
        params.not_after = rcgen::date_time_ymd(years.end, 1, 1);
        params.subject_alt_names = vec![SanType::URI(id.try_into().unwrap())];
        params.self_signed(&signer).unwrap().der().to_vec()
    }

    #[test]
    fn a_chain_reads_back_with_its_key_and_with_no_other() {
        let id = "spiffe://corp.example.com/ns/shop/sa/web";
        let one = pair(id);
        let (_, facts) = read(&one).unwrap();
        assert_eq!(facts.id.to_string(), id);
        let other = Pair {
            key: pair(id).key,
            chain: one.chain,
        };
        let error = format!("{:#}", read(&other).unwrap_err());
        assert!(error.contains("do not match"), "{error}");
        let none: [&[u8]; 0] = [];
        assert!(chain_to_pem(&none).is_err());
        assert!(chain_to_pem(&vec![vec![0_u8]; CHAIN_MAX + 1]).is_err());
    }

    #[test]
    fn a_request_is_made_with_the_key_that_was_kept() {
        let key = generate().unwrap();
        let id = SpiffeId::parse("spiffe://corp.example.com/host/vm-1").unwrap();
        assert!(!request(&key, Some(&id)).unwrap().is_empty());
        assert!(!request(&key, None).unwrap().is_empty());
        assert!(request("nonsense", None).is_err());
    }
}
