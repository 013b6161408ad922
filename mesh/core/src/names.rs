//! The names of things. Each is checked once, when it is made, and cheap to clone afterwards.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

/// Longest DNS label (RFC 1035 §2.3.4), in bytes.
pub const LABEL_MAX: usize = 63;
/// Longest trust domain, in bytes: leaves room for `<account>.<namespace>.` in a 253-byte SNI.
pub const TRUST_DOMAIN_MAX: usize = 125;

/// Why a name is not one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is no {kind}: {rule}")]
pub struct NameError {
    pub kind: &'static str,
    pub text: String,
    pub rule: &'static str,
}

const LABEL_RULE: &str =
    "use 1 to 63 lower-case letters, digits and `-`, beginning and ending with a letter or digit";

fn is_label(text: &str) -> bool {
    let bytes = text.as_bytes();
    !bytes.is_empty()
        && bytes.len() <= LABEL_MAX
        && bytes
            .iter()
            .all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-'))
        && bytes[0] != b'-'
        && bytes[bytes.len() - 1] != b'-'
}

macro_rules! name {
    ($(#[$doc:meta])* $type:ident, $kind:literal, $rule:expr, $valid:expr) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $type(Arc<str>);

        impl $type {
            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $type {
            type Err = NameError;
            fn from_str(text: &str) -> Result<Self, NameError> {
                let valid: fn(&str) -> bool = $valid;
                if valid(text) {
                    Ok(Self(text.into()))
                } else {
                    // The text may come from a peer: keep only what a log line can bear.
                    let text = text.chars().take(80).flat_map(char::escape_default).collect();
                    Err(NameError { kind: $kind, text, rule: $rule })
                }
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:?}", &self.0)
            }
        }
    };
}

name!(
    /// A DNS label (RFC 1035 §2.3.1, digits allowed first as in RFC 1123): a namespace, an account, a service,
    /// a port's name, a host's name.
    Label, "DNS label", LABEL_RULE, is_label
);
name!(
    /// A SPIFFE trust domain that is also a DNS name of at most [`TRUST_DOMAIN_MAX`] bytes.
    TrustDomain, "trust domain", "use a DNS name of at most 125 bytes in lower case",
    |text| text.len() <= TRUST_DOMAIN_MAX && text.split('.').all(is_label)
);
name!(
    /// The unique id that control gave a host at its join: 32 hexadecimal digits.
    HostUid, "host uid", "it has 32 hexadecimal digits in lower case",
    |text| text.len() == 32 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
);
name!(
    /// A set of hosts that reach each other's addresses. Endpoints are keyed by (network, address).
    Network, "network", LABEL_RULE, is_label
);

impl Network {
    /// The network of a site that never named one.
    pub fn default_network() -> Self {
        Self("default".into())
    }
}

/// A service's full name. Ordered by namespace, then name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServiceName {
    pub namespace: Label,
    pub name: Label,
}

impl ServiceName {
    /// Parses `namespace/name`.
    pub fn parse(text: &str) -> Result<Self, NameError> {
        let (namespace, name) = split_pair(text, "service name")?;
        Ok(Self { namespace, name })
    }
}

impl fmt::Display for ServiceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// A workload's identity within its trust domain: what a leaf certificate speaks for.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Account {
    pub namespace: Label,
    pub name: Label,
}

impl Account {
    /// Parses `namespace/account`.
    pub fn parse(text: &str) -> Result<Self, NameError> {
        let (namespace, name) = split_pair(text, "account")?;
        Ok(Self { namespace, name })
    }
}

impl fmt::Display for Account {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

fn split_pair(text: &str, kind: &'static str) -> Result<(Label, Label), NameError> {
    let (namespace, name) = text.split_once('/').ok_or_else(|| NameError {
        kind,
        text: text.chars().take(130).collect(),
        rule: "write it as `namespace/name`",
    })?;
    Ok((namespace.parse()?, name.parse()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_follow_the_rfc() {
        for good in ["a", "0", "web-1", "x".repeat(63).as_str()] {
            assert!(good.parse::<Label>().is_ok(), "{good}");
        }
        for bad in [
            "",
            "-a",
            "a-",
            "A",
            "a.b",
            "a_b",
            "ä",
            "x".repeat(64).as_str(),
        ] {
            assert!(bad.parse::<Label>().is_err(), "{bad}");
        }
    }

    #[test]
    fn trust_domains_are_bounded_dns_names() {
        assert!("corp.example.com".parse::<TrustDomain>().is_ok());
        assert!("corp..com".parse::<TrustDomain>().is_err());
        let long = format!("{}.{}", "a".repeat(63), "b".repeat(63));
        assert!(long.parse::<TrustDomain>().is_err(), "127 bytes");
    }

    #[test]
    fn a_wrong_name_is_told_in_plain_words() {
        let text = Account::parse("web").unwrap_err().to_string();
        assert_eq!(text, "`web` is no account: write it as `namespace/name`");
    }

    #[test]
    fn a_bad_name_is_shown_without_control_characters() {
        let error = "a\nb".parse::<Label>().unwrap_err();
        assert_eq!(error.text, "a\\nb");
    }
}
