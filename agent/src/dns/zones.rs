//! The names that a resolver is to ask the agent for: the mesh's suffix, and the reverse zones of the virtual ranges.

use std::net::IpAddr;

use mesh_core::policy::Cidr;
use mesh_core::vip::VipRanges;

/// Zones of one range. A range that does not end between two labels is several: 16 at the default of 252.64.0.0/12.
const ZONES_MAX: usize = 32;

/// The suffix first. Zones of a range that would be too many are left out: addresses then have no names, and names work.
pub(crate) fn all(suffix: &str, ranges: &VipRanges) -> Vec<String> {
    let suffix = suffix.trim_end_matches('.').to_owned();
    let reverse = [ranges.v4(), ranges.v6()].into_iter().map(reverse);
    let reverse = reverse.filter(|zones| zones.len() <= ZONES_MAX);
    std::iter::once(suffix).chain(reverse.flatten()).collect()
}

/// RFC 1035 §3.5 and RFC 3596 §2.5: a label is a byte of an IPv4 address, and half a byte of an IPv6 address.
fn reverse(range: Cidr) -> Vec<String> {
    let (labels, bits, end): (Vec<u8>, u8, &str) = match range.address {
        IpAddr::V4(v4) => (v4.octets().to_vec(), 8, "in-addr.arpa"),
        IpAddr::V6(v6) => {
            let halves = v6.octets().into_iter().flat_map(|b| [b >> 4, b & 15]);
            (halves.collect(), 4, "ip6.arpa")
        }
    };
    let write = |label: u8| match bits {
        8 => label.to_string(),
        _ => format!("{label:x}"),
    };
    let whole = usize::from(range.prefix / bits);
    let rest = range.prefix % bits;
    let mut base = end.to_owned();
    for label in labels.iter().take(whole) {
        base = format!("{}.{base}", write(*label));
    }
    match labels.get(whole) {
        Some(first) if 0 < rest => {
            let last = first | (u8::MAX >> (8 - bits + rest));
            (*first..=last)
                .map(|label| format!("{}.{base}", write(label)))
                .collect()
        }
        _ => vec![base],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(text: &str) -> Cidr {
        let (address, prefix) = text.split_once('/').unwrap();
        Cidr {
            address: address.parse().unwrap(),
            prefix: prefix.parse().unwrap(),
        }
    }

    fn zones(text: &str) -> Vec<String> {
        reverse(range(text))
    }

    #[test]
    fn ranges_become_whole_zones() {
        assert_eq!(zones("10.0.0.0/8"), ["10.in-addr.arpa"]);
        assert_eq!(zones("10.1.0.0/16"), ["1.10.in-addr.arpa"]);
        assert_eq!(
            zones("10.1.4.0/22"),
            ["4", "5", "6", "7"].map(|l| format!("{l}.1.10.in-addr.arpa"))
        );
        assert_eq!(
            zones("fd6d:6573:6800::/64"),
            ["0.0.0.0.0.0.8.6.3.7.5.6.d.6.d.f.ip6.arpa"]
        );
        assert_eq!(
            zones("fd00::/14"),
            ["0", "1", "2", "3"].map(|l| format!("{l}.0.d.f.ip6.arpa"))[..4]
        );
    }

    #[test]
    fn the_default_ranges_are_few_and_the_suffix_comes_first() {
        let all = all("mesh.internal.", &VipRanges::default());
        assert_eq!(all[0], "mesh.internal");
        assert_eq!(all[1], "64.252.in-addr.arpa");
        assert_eq!(all[16], "79.252.in-addr.arpa");
        assert_eq!(all.len(), 18);
        let wide = VipRanges::new(range("10.128.0.0/9"), range("fd6d:6573:6800::/64"));
        assert_eq!(super::all("mesh.internal", &wide.unwrap()).len(), 2);
    }
}
