//! Under which names control is reached: what its certificate carries.

use std::net::SocketAddr;

use mesh_core::names::TrustDomain;

/// The host's name, as the kernel has it.
pub(crate) fn host_name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname");
    let name = name.unwrap_or_default().trim().to_owned();
    if name.is_empty() {
        return "localhost".to_owned();
    }
    name
}

/// All names and addresses for the certificate, none twice. `addresses` are those of tokens.
pub(crate) fn all(
    configured: &[String],
    listen: &[SocketAddr],
    addresses: &[String],
) -> Vec<String> {
    let mut names: Vec<String> = configured.to_vec();
    names.push(host_name());
    names.extend(["localhost", "127.0.0.1", "::1"].map(str::to_owned));
    let own = listen.iter().map(|a| a.ip());
    names.extend(
        own.filter(|ip| !ip.is_unspecified())
            .map(|ip| ip.to_string()),
    );
    let hosts = addresses.iter().filter_map(|a| a.rsplit_once(':'));
    names.extend(hosts.map(|(host, _)| host.trim_matches(['[', ']']).to_owned()));
    names.sort();
    names.dedup();
    names.retain(|name| {
        let good = name.parse::<std::net::IpAddr>().is_ok() || is_dns_name(name);
        if !good {
            log::warn!("`{name}` is no DNS name and stays out of control's certificate");
        }
        good
    });
    names
}

/// The rule of a trust domain is that of DNS names, in lower case.
fn is_dns_name(name: &str) -> bool {
    name.to_ascii_lowercase().parse::<TrustDomain>().is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_listened_on_and_what_tokens_say_is_named() {
        let listen: Vec<SocketAddr> = vec!["10.0.0.1:7440".parse().unwrap()];
        let addresses = ["[fd00::1]:7440", "control.example.com:7440"].map(str::to_owned);
        let names = all(&["extra".to_owned(), "a b".to_owned()], &listen, &addresses);
        for wanted in ["10.0.0.1", "fd00::1", "control.example.com", "extra", "::1"] {
            assert!(names.iter().any(|n| n == wanted), "{wanted}");
        }
        assert!(!names.iter().any(|n| n == "a b" || n == "0.0.0.0"));
    }
}
