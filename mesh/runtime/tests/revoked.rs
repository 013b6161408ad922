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
        self.leaf_of(path, Some(host.as_str()))
    }

    fn leaf_of(&self, path: &str, source: Option<&str>) -> CertificateDer<'static> {
        let mut params = CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        if let Some(text) = source {
            let source = DnType::CustomDnType(SOURCE_OID.to_vec());
            let value = DnValue::PrintableString(text.try_into().unwrap());
            params.distinguished_name.push(source, value);
        }
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
        signature: Arc::default(),
        issuer: Arc::default(),
    };
    let all: Revocations = [revoked(1, None), revoked(2, Some("shop/web"))]
        .into_iter()
        .collect();
    let now = TrustStore::clone(&trust.load()).with_revoked(Some(Arc::new(all)));
    trust.store(Arc::new(now));
    let refused = Err(Reason::PeerRevoked);
    assert_eq!(judge(web, 1), [refused, refused], "the host");
    assert_eq!(judge(web, 2), [refused, refused], "the workload");
    assert_eq!(judge(web, 3), [Ok(()), Ok(())], "another host");
    assert_eq!(judge("ns/shop/sa/api", 2)[0], Ok(()), "another workload");
    assert_eq!(judge("host/vm-1", 1)[0], refused, "the host's own");
    // Not to know is no reason to believe.
    let now = TrustStore::clone(&trust.load()).with_revoked(None);
    trust.store(Arc::new(now));
    let unknown = Err(Reason::RevocationsUnknown);
    assert_eq!(judge(web, 3), [unknown, unknown]);
    let control = authority.leaf_of("control", None);
    let proving = caller.judge(&control, &[], None, unix_now());
    assert!(proving.is_ok(), "control is the one who can tell");
}

/// A leaf without its Source would be covered by no revocation.
#[test]
fn a_leaf_that_names_no_host_is_refused_unless_it_is_of_none() {
    let authority = authority();
    let domain: TrustDomain = "corp.test".parse().unwrap();
    let trust = TrustStore::of_root(domain.clone(), &authority.root).unwrap();
    let trust = trust.shared();
    let judge = |accept: Accept, path: &str, source: Option<&str>| {
        let leaf = authority.leaf_of(path, source);
        let name = ServerName::try_from("web.shop.corp.test").unwrap();
        let verifier = Verifier::new(Arc::clone(&trust), accept);
        verifier
            .judge(&leaf, &[], Some(&name), unix_now())
            .map(drop)
    };
    let (own, other) = (host(1), host(2));
    let agent = format!("agent/{own}");
    let control = Accept::Control(domain.clone());
    let people = Accept::AgentsAndOperators(domain);
    let (missing, malformed) = (
        Err(Reason::SourceMissing),
        Err(Reason::CertificateMalformed),
    );
    let web = "ns/shop/sa/web";
    for (accept, path, source, expected) in [
        (Accept::Callers, web, Some(own.as_str()), Ok(())),
        (Accept::Callers, web, None, missing),
        (Accept::NamedWorkload, web, None, missing),
        (Accept::Callers, "host/vm-1", None, missing),
        (Accept::Callers, web, Some("a host"), malformed),
        (Accept::Callers, "control", None, Ok(())),
        (control, "control", None, Ok(())),
        (people.clone(), "operator/admin", None, Ok(())),
        (people.clone(), &agent, Some(own.as_str()), Ok(())),
        (people.clone(), &agent, None, missing),
        (people, &agent, Some(other.as_str()), missing),
    ] {
        assert_eq!(judge(accept, path, source), expected, "{path} {source:?}");
    }
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
