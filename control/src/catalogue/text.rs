//! Names as text in stored JSON, for `#[serde(with = …)]`.

use std::fmt::Display;
use std::str::FromStr;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serializer};

pub(crate) fn serialize<T: Display, S: Serializer>(value: &T, to: S) -> Result<S::Ok, S::Error> {
    to.collect_str(value)
}

pub(crate) fn deserialize<'de, T, D>(from: D) -> Result<T, D::Error>
where
    T: FromStr<Err: Display>,
    D: Deserializer<'de>,
{
    String::deserialize(from)?.parse().map_err(D::Error::custom)
}

/// A list of things that are text.
pub(crate) mod list {
    use super::*;

    pub(crate) fn serialize<T: Display, S: Serializer>(
        values: &[T],
        to: S,
    ) -> Result<S::Ok, S::Error> {
        to.collect_seq(values.iter().map(T::to_string))
    }

    pub(crate) fn deserialize<'de, T, D>(from: D) -> Result<Vec<T>, D::Error>
    where
        T: FromStr<Err: Display>,
        D: Deserializer<'de>,
    {
        let texts = Vec::<String>::deserialize(from)?;
        let values = texts.iter().map(|text| text.parse());
        values.collect::<Result<_, _>>().map_err(D::Error::custom)
    }
}

/// Makes a module for a type whose parser is a function.
macro_rules! by_function {
    ($module:ident, $type:ty, $parse:expr) => {
        pub(crate) mod $module {
            use super::*;

            pub(crate) fn serialize<S: Serializer>(
                value: &$type,
                to: S,
            ) -> Result<S::Ok, S::Error> {
                to.collect_str(value)
            }

            pub(crate) fn deserialize<'de, D: Deserializer<'de>>(
                from: D,
            ) -> Result<$type, D::Error> {
                let text = String::deserialize(from)?;
                $parse(&text).map_err(D::Error::custom)
            }
        }
    };
}

by_function!(
    account,
    mesh_core::names::Account,
    mesh_core::names::Account::parse
);
by_function!(
    service,
    mesh_core::names::ServiceName,
    mesh_core::names::ServiceName::parse
);
by_function!(transport, mesh_core::service::Transport, |text: &str| {
    mesh_core::service::Transport::parse(text).ok_or_else(|| format!("`{text}` is no transport"))
});

by_function!(capture, mesh_core::service::Capture, |text: &str| {
    mesh_core::service::Capture::parse(text).ok_or_else(|| format!("`{text}` is no capture"))
});

/// A list of address ranges.
pub(crate) mod ranges {
    use mesh_core::policy::Cidr;

    use super::*;

    pub(crate) fn serialize<S: Serializer>(values: &[Cidr], to: S) -> Result<S::Ok, S::Error> {
        list::serialize(values, to)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<Cidr>, D::Error> {
        let texts = Vec::<String>::deserialize(from)?;
        let values = texts.iter().map(|text| {
            Cidr::parse(text).ok_or_else(|| D::Error::custom(format!("`{text}` is no range")))
        });
        values.collect()
    }
}

/// An account where there is one.
pub(crate) mod account_or_none {
    use mesh_core::names::Account;

    use super::*;

    pub(crate) fn serialize<S: Serializer>(
        value: &Option<Account>,
        to: S,
    ) -> Result<S::Ok, S::Error> {
        match value {
            Some(account) => to.collect_str(account),
            None => to.serialize_none(),
        }
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(
        from: D,
    ) -> Result<Option<Account>, D::Error> {
        let text = Option::<String>::deserialize(from)?;
        let account = text.map(|text| Account::parse(&text).map_err(D::Error::custom));
        account.transpose()
    }
}

/// A list of patterns.
pub(crate) mod patterns {
    use mesh_core::service::Pattern;

    use super::*;

    pub(crate) fn serialize<S: Serializer>(values: &[Pattern], to: S) -> Result<S::Ok, S::Error> {
        list::serialize(values, to)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(
        from: D,
    ) -> Result<Vec<Pattern>, D::Error> {
        let texts = Vec::<String>::deserialize(from)?;
        let values = texts.iter().map(|text| Pattern::parse(text));
        values.collect::<Result<_, _>>().map_err(D::Error::custom)
    }
}

/// Ports as `[number, protocol]`.
pub(crate) mod ports {
    use mesh_core::service::{Port, Protocol};

    use super::*;

    pub(crate) fn serialize<S: Serializer>(values: &[Port], to: S) -> Result<S::Ok, S::Error> {
        to.collect_seq(values.iter().map(|p| (p.number, p.protocol.as_str())))
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<Port>, D::Error> {
        let pairs = Vec::<(u16, String)>::deserialize(from)?;
        let ports = pairs.into_iter().map(|(number, text)| {
            let protocol = Protocol::parse(&text)
                .ok_or_else(|| D::Error::custom(format!("`{text}` is no protocol")))?;
            Ok(Port { number, protocol })
        });
        ports.collect()
    }
}

/// Both addresses as a pair.
pub(crate) mod vip {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use mesh_core::service::Vip;
    use serde::Serialize as _;

    use super::*;

    pub(crate) fn serialize<S: Serializer>(vip: &Vip, to: S) -> Result<S::Ok, S::Error> {
        (vip.v4, vip.v6).serialize(to)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vip, D::Error> {
        let (v4, v6) = <(Ipv4Addr, Ipv6Addr)>::deserialize(from)?;
        Ok(Vip { v4, v6 })
    }
}
