//! What was revoked is refused at both ends of a handshake, and only that.

#![expect(clippy::unwrap_used, reason = "a test")]

use std::sync::Arc;

use mesh_core::names::{Account, HostUid, TrustDomain};
use mesh_core::reason::Reason;
use mesh_core::revocation::{Revocation, Revocations, Subject};
use mesh_runtime::tls::leaf::SOURCE_OID;
use mesh_runtime::tls::trust::TrustStore;
use mesh_runtime::tls::verify::{Accept, Verifier, has_signed, unix_now};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, DnValue, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, SanType, SigningKey as _,
};
use rustls_pki_types::{CertificateDer, ServerName};

struct Authority {
    root: CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
}

fn authority() -> Authority {
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let root = params.self_signed(&key).unwrap().der().clone();
    let issuer = Issuer::new(params, key);
    Authority { root, issuer }
}

impl Authority {
    fn leaf(&self, path: &str, host: &HostUid) -> CertificateDer<'static> {
        let mut params = CertificateParams::default();
        let source = DnType::CustomDnType(SOURCE_OID.to_vec());
        let value = DnValue::PrintableString(host.as_str().try_into().unwrap());
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(source, value);
        let uri = format!("spiffe://corp.test/{path}");
        params.subject_alt_names = vec![SanType::URI(uri.try_into().unwrap())];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ClientAuth,
            ExtendedKeyUsagePurpose::ServerAuth,
        ];
        let key = KeyPair::generate().unwrap();
        let leaf = params.signed_by(&key, &self.issuer).unwrap();
        leaf.der().clone()
    }
}

fn host(n: u64) -> HostUid {
    format!("{n:032x}").parse().unwrap()
}

#[test]
fn a_revoked_source_is_refused_as_caller_and_as_server() {
    let authority = authority();
    let domain: TrustDomain = "corp.test".parse().unwrap();
    let trust = TrustStore::of_root(domain, &authority.root).unwrap();
    let trust = trust.shared();
    let caller = Verifier::new(Arc::clone(&trust), Accept::Callers);
    let server = Verifier::new(Arc::clone(&trust), Accept::NamedWorkload);
    let name = ServerName::try_from("web.shop.corp.test").unwrap();
    let judge = |path: &str, n: u64| {
        let leaf = authority.leaf(path, &host(n));
        let as_caller = caller.judge(&leaf, &[], None, unix_now());
        let as_server = server.judge(&leaf, &[], Some(&name), unix_now());
        [as_caller.map(drop), as_server.map(drop)]
    };
    let web = "ns/shop/sa/web";
    assert_eq!(judge(web, 1), [Ok(()), Ok(())]);
    let revoked = |n: u64, account: Option<&str>| Revocation {
        subject: Subject {
            host: host(n),
            account: account.map(|a| Account::parse(a).unwrap()),
        },
        at_s: 1,
        signature: [][..].into(),
    };
    let all: Revocations = [revoked(1, None), revoked(2, Some("shop/web"))]
        .into_iter()
        .collect();
    let now = TrustStore::clone(&trust.load()).with_revoked(Arc::new(all));
    trust.store(Arc::new(now));
    let refused = Err(Reason::PeerRevoked);
    assert_eq!(judge(web, 1), [refused, refused], "the host");
    assert_eq!(judge(web, 2), [refused, refused], "the workload");
    assert_eq!(judge(web, 3), [Ok(()), Ok(())], "another host");
    assert_eq!(judge("ns/shop/sa/api", 2)[0], Ok(()), "another workload");
    assert_eq!(judge("host/vm-1", 1)[0], refused, "the host's own");
}

#[test]
fn a_statement_is_believed_by_the_certificate_whose_key_signed_it() {
    let (ours, theirs) = (authority(), authority());
    let signature = ours.issuer.key().sign(b"a statement").unwrap();
    assert!(has_signed(&ours.root, b"a statement", &signature));
    assert!(!has_signed(&theirs.root, b"a statement", &signature));
    assert!(!has_signed(&ours.root, b"another", &signature));
    assert!(!has_signed(&ours.root, b"a statement", &signature[1..]));
    assert!(!has_signed(&ours.root, b"a statement", &[]));
    let nonsense = CertificateDer::from(&b"no certificate"[..]);
    assert!(!has_signed(&nonsense, b"a statement", &signature));
}
