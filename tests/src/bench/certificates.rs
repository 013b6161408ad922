//! One authority and one certificate for each side, for the proxies that the mesh is compared with: the same kind of key
//! and the same verification on both sides as the agents'.

use std::fs;
use std::path::{Path, PathBuf};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};

/// The name in every leaf, which the other side asks for.
pub(super) const NAME: &str = "proxy.bench.test";

/// Where the files of one side are.
#[derive(Clone, Debug)]
pub(super) struct Files {
    dir: PathBuf,
}

impl Files {
    pub(super) fn authority(&self) -> String {
        self.named("ca.pem")
    }

    pub(super) fn certificate(&self) -> String {
        self.named("leaf.crt")
    }

    pub(super) fn key(&self) -> String {
        self.named("leaf.key")
    }

    /// Certificate and key in one file.
    pub(super) fn both(&self) -> String {
        self.named("leaf.pem")
    }

    fn named(&self, name: &str) -> String {
        self.dir.join(name).display().to_string()
    }
}

/// Makes an authority and puts a leaf of it and its own certificate into each directory.
pub(super) fn make<const N: usize>(dirs: [&Path; N]) -> [Files; N] {
    let key = KeyPair::generate().expect("a key");
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    let name = "the authority of the benchmark";
    params.distinguished_name.push(DnType::CommonName, name);
    let authority = params.self_signed(&key).expect("an authority");
    let issuer = Issuer::new(params, key);
    dirs.map(|dir| {
        let (certificate, key) = leaf(&issuer);
        fs::create_dir_all(dir).expect("a directory");
        let both = format!("{certificate}{key}");
        let authority = authority.pem();
        for (name, text) in [
            ("ca.pem", &authority),
            ("leaf.crt", &certificate),
            ("leaf.key", &key),
            ("leaf.pem", &both),
        ] {
            fs::write(dir.join(name), text).expect("a file of certificates");
        }
        let dir = dir.to_owned();
        Files { dir }
    })
}

fn leaf(issuer: &Issuer<'_, KeyPair>) -> (String, String) {
    let key = KeyPair::generate().expect("a key");
    let mut params = CertificateParams::default();
    let name = NAME.try_into().expect("a name in ASCII");
    params.subject_alt_names = vec![SanType::DnsName(name)];
    params.extended_key_usages = vec![
        ExtendedKeyUsagePurpose::ClientAuth,
        ExtendedKeyUsagePurpose::ServerAuth,
    ];
    let certificate = params.signed_by(&key, issuer).expect("a leaf");
    (certificate.pem(), key.serialize_pem())
}
