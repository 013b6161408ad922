//! A check by connecting: to the program of this host that listens on the port, wherever it does.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use tokio::net::TcpStream;

use super::Listening;

/// Connects to the first of the addresses on which the port is listened that takes it.
pub(super) async fn connect(port: u16, listening: &Listening) -> io::Result<TcpStream> {
    let addresses = candidates(&listening(port)?);
    let mut last = io::Error::new(
        io::ErrorKind::ConnectionRefused,
        format!("nothing listens on port {port}"),
    );
    for address in addresses {
        match TcpStream::connect(SocketAddr::new(address, port)).await {
            Ok(stream) => return Ok(stream),
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// Where to connect to, loopback first: what listens on all addresses is reached there.
fn candidates(listening: &[IpAddr]) -> Vec<IpAddr> {
    let (v4, v6) = (
        IpAddr::from(Ipv4Addr::LOCALHOST),
        IpAddr::from(Ipv6Addr::LOCALHOST),
    );
    let mut found = Vec::new();
    let mut add = |address| {
        if !found.contains(&address) {
            found.push(address);
        }
    };
    if listening
        .iter()
        .any(|a| *a == v4 || *a == Ipv4Addr::UNSPECIFIED)
    {
        add(v4);
    }
    if listening.contains(&v6) {
        add(v6);
    }
    if listening.contains(&Ipv6Addr::UNSPECIFIED.into()) {
        add(v6);
        // It takes IPv4 too unless it says otherwise, and the host may be without IPv6.
        add(v4);
    }
    for address in listening.iter().filter(|a| !a.is_unspecified()) {
        add(*address);
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_comes_first() {
        let ips =
            |list: &[&str]| -> Vec<IpAddr> { list.iter().map(|a| a.parse().unwrap()).collect() };
        for (listening, expected) in [
            (&[][..], &[][..]),
            (&["0.0.0.0"], &["127.0.0.1"]),
            (&["::"], &["::1", "127.0.0.1"]),
            (&["0.0.0.0", "::"], &["127.0.0.1", "::1"]),
            (&["10.0.0.5"], &["10.0.0.5"]),
            (&["10.0.0.5", "127.0.0.1"], &["127.0.0.1", "10.0.0.5"]),
        ] {
            assert_eq!(candidates(&ips(listening)), ips(expected), "{listening:?}");
        }
    }
}
