//! Identities as SPIFFE ids (SPIFFE-ID §2). The kinds are never mixed: each is accepted only where its kind is
//! expected, and a certificate carries exactly one.

use std::fmt;

use crate::names::{Account, HostUid, Label, NameError, TrustDomain};

/// Longest SPIFFE id we read, in bytes (SPIFFE-ID §2.3 allows 2,048; ours are far shorter).
pub const SPIFFE_ID_MAX: usize = 512;

/// Who a certificate speaks for, without its trust domain.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Identity {
    /// `/ns/<namespace>/sa/<account>`: a workload. Calls and is called on the data port.
    Workload(Account),
    /// `/host/<name>`: a process of that host that matches no workload. Calls, is never called.
    Host(Label),
    /// `/agent/<host-uid>`: the agent's credential for control. Not accepted on the data port.
    Agent(HostUid),
    /// `/control`: the control server.
    Control,
    /// `/operator/<name>`: a person at the operator API.
    Operator(Label),
}

/// A whole SPIFFE id.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SpiffeId {
    pub trust_domain: TrustDomain,
    pub identity: Identity,
}

/// Why a URI is not one of our SPIFFE ids.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SpiffeIdError {
    #[error("the URI has {0} bytes; a SPIFFE id of the mesh has at most {SPIFFE_ID_MAX}")]
    TooLong(usize),
    #[error("`{0}` is not a SPIFFE id of the mesh")]
    Form(String),
    #[error(transparent)]
    Name(#[from] NameError),
}

impl SpiffeId {
    /// Parses `spiffe://<trust domain>/<path>`.
    pub fn parse(uri: &str) -> Result<Self, SpiffeIdError> {
        if uri.len() > SPIFFE_ID_MAX {
            return Err(SpiffeIdError::TooLong(uri.len()));
        }
        let form = || SpiffeIdError::Form(uri.chars().flat_map(char::escape_default).collect());
        let rest = uri.strip_prefix("spiffe://").ok_or_else(form)?;
        let (trust_domain, path) = rest.split_once('/').ok_or_else(form)?;
        let trust_domain = trust_domain.parse()?;
        let parts: Vec<&str> = path.splitn(6, '/').collect();
        let identity = match parts.as_slice() {
            ["ns", namespace, "sa", account] => Identity::Workload(Account {
                namespace: namespace.parse()?,
                name: account.parse()?,
            }),
            ["host", name] => Identity::Host(name.parse()?),
            ["agent", uid] => Identity::Agent(uid.parse()?),
            ["control"] => Identity::Control,
            ["operator", name] => Identity::Operator(name.parse()?),
            _ => return Err(form()),
        };
        Ok(Self {
            trust_domain,
            identity,
        })
    }

    /// The SNI that asks for this identity, for a workload: `<account>.<namespace>.<trust domain>`.
    pub fn sni(&self) -> Option<String> {
        match &self.identity {
            Identity::Workload(account) => Some(format!(
                "{}.{}.{}",
                account.name, account.namespace, self.trust_domain
            )),
            _ => None,
        }
    }

    /// The workload that an SNI asks for, in `trust_domain`.
    pub fn account_of_sni(sni: &str, trust_domain: &TrustDomain) -> Option<Account> {
        let rest = sni.strip_suffix(trust_domain.as_str())?.strip_suffix('.')?;
        let (name, namespace) = rest.split_once('.')?;
        Some(Account {
            namespace: namespace.parse().ok()?,
            name: name.parse().ok()?,
        })
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "spiffe://{}/{}", self.trust_domain, self.identity)
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Workload(account) => write!(f, "ns/{}/sa/{}", account.namespace, account.name),
            Self::Host(name) => write!(f, "host/{name}"),
            Self::Agent(uid) => write!(f, "agent/{uid}"),
            Self::Control => f.write_str("control"),
            Self::Operator(name) => write!(f, "operator/{name}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_reads_back_as_it_was_written() {
        for uri in [
            "spiffe://corp.example.com/ns/shop/sa/web",
            "spiffe://corp.example.com/host/vm-1",
            "spiffe://corp.example.com/agent/00112233445566778899aabbccddeeff",
            "spiffe://corp.example.com/control",
            "spiffe://corp.example.com/operator/admin",
        ] {
            assert_eq!(SpiffeId::parse(uri).unwrap().to_string(), uri);
        }
    }

    #[test]
    fn what_is_not_exactly_an_id_is_refused() {
        for uri in [
            "",
            "spiffe://",
            "spiffe://corp.example.com",
            "spiffe://corp.example.com/",
            "spiffe://corp.example.com/ns/shop/sa/web/",
            "spiffe://corp.example.com/ns/shop/sa/web/x/y",
            "spiffe://corp.example.com/ns//sa/web",
            "spiffe://corp.example.com/NS/shop/sa/web",
            "SPIFFE://corp.example.com/control",
            "spiffe://corp.example.com:443/control",
            "spiffe://user@corp.example.com/control",
            "spiffe://corp.example.com/control?x",
            "spiffe://corp.example.com/agent/0011",
        ] {
            assert!(SpiffeId::parse(uri).is_err(), "{uri}");
        }
    }

    #[test]
    fn sni_selects_the_workload() {
        let id = SpiffeId::parse("spiffe://corp.example.com/ns/shop/sa/web").unwrap();
        let sni = id.sni().unwrap();
        assert_eq!(sni, "web.shop.corp.example.com");
        let account = SpiffeId::account_of_sni(&sni, &id.trust_domain).unwrap();
        assert_eq!(Identity::Workload(account), id.identity);
        for other in [
            "web.shop.evil.com",
            "webXcorp.example.com",
            "corp.example.com",
            "a.web.shop.corp.example.com",
        ] {
            assert_eq!(
                SpiffeId::account_of_sni(other, &id.trust_domain),
                None,
                "{other}"
            );
        }
    }
}
