//! The ranges of virtual addresses, and which of them may be taken over.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use mesh_core::policy::Cidr;

use super::CaptureError;

/// The ranges of virtual addresses, as the mesh fixed them at `init`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct VipRanges {
    pub(crate) v4: Cidr,
    pub(crate) v6: Cidr,
}

impl VipRanges {
    /// Checks that the ranges can not take traffic that is not the mesh's: they come from the network.
    pub(crate) fn new(v4: &str, v6: &str) -> Result<Self, CaptureError> {
        let private4 = [
            "10.0.0.0/8",
            "100.64.0.0/10",
            "172.16.0.0/12",
            "192.168.0.0/16",
            "198.18.0.0/15",
            "240.0.0.0/4",
        ];
        Ok(Self {
            v4: checked_range(v4, &private4, 12..=30)?,
            v6: checked_range(v6, &["fc00::/7"], 32..=126)?,
        })
    }

    /// The link's own address in a range: the first after the network's.
    pub(crate) fn own(&self, range: Cidr) -> IpAddr {
        match range.address {
            IpAddr::V4(v4) => Ipv4Addr::from_bits(v4.to_bits() | 1).into(),
            IpAddr::V6(v6) => Ipv6Addr::from_bits(v6.to_bits() | 1).into(),
        }
    }

    /// The addresses at which the agent answers DNS.
    pub(crate) fn own_addresses(&self) -> [IpAddr; 2] {
        [self.own(self.v4), self.own(self.v6)]
    }
}

fn checked_range(
    text: &str,
    within: &[&str],
    prefixes: std::ops::RangeInclusive<u8>,
) -> Result<Cidr, CaptureError> {
    let wrong = |rule: String| CaptureError::Range {
        range: text.chars().take(64).collect(),
        rule,
    };
    let range = Cidr::parse(text).ok_or_else(|| wrong("it is not address/prefix".to_owned()))?;
    if !prefixes.contains(&range.prefix) {
        let (least, most) = (prefixes.start(), prefixes.end());
        return Err(wrong(format!("its prefix must be {least} to {most}")));
    }
    let inside = |outer: &&str| {
        Cidr::parse(outer).is_some_and(|o| o.prefix <= range.prefix && o.contains(range.address))
    };
    if !within.iter().any(inside) {
        return Err(wrong(format!(
            "it must lie in one of {}",
            within.join(", ")
        )));
    }
    let host_bits = match range.address {
        IpAddr::V4(v4) => u128::from(v4.to_bits().wrapping_shl(range.prefix.into())),
        IpAddr::V6(v6) => v6.to_bits().wrapping_shl(range.prefix.into()),
    };
    if host_bits != 0 {
        return Err(wrong("the address has bits outside the prefix".to_owned()));
    }
    Ok(range)
}
