//! A pair of HAProxy: HTTP with HTTP/2 between the two and connections reused by all, and TCP with a TLS connection each.
//! One thread, as the agents have.

use std::fs;

use super::certificates::{Files, NAME};
use super::subjects::{Sides, Way};
use crate::host::Host;
use crate::process::Process;
use crate::wait::SOON;

/// The cgroup of its processes.
pub(super) const CGROUP: &str = "haproxy";

const COMMON: &str = "global\n    nbthread 1\n    maxconn 8192\n\
                      defaults\n    timeout connect 5s\n    timeout client 1h\n    timeout server 1h\n    \
                      http-reuse always\n";

/// Where its caller's side listens.
pub(super) const fn port(way: Way) -> u16 {
    8000 + way.app_port()
}

const fn port_between(way: Way) -> u16 {
    8400 + way.app_port()
}

/// What it takes part in: it would have to be told to speak HTTP/2 to plain servers, and gRPC is compared with Envoy.
const WAYS: [Way; 2] = [Way::Http, Way::Tcp];

pub(super) fn start(sides: &Sides) -> Vec<Process> {
    let server: String = WAYS
        .map(|way| {
            let bind = format!(
                "bind {}:{} {}",
                sides.server.v4(),
                port_between(way),
                tls(way, &sides.server_files)
            );
            let to = format!("server app 127.0.0.1:{}", way.app_port());
            section(way, &bind, &to)
        })
        .concat();
    let client: String = WAYS
        .map(|way| {
            let bind = format!("bind {}:{}", sides.client.v4(), port(way));
            let to = format!(
                "server peer {}:{} {} sni str({NAME}) verifyhost {NAME}",
                sides.server.v4(),
                port_between(way),
                tls(way, &sides.client_files)
            );
            section(way, &bind, &to)
        })
        .concat();
    let server = spawn(&sides.server, &server, WAYS.map(port_between));
    let client = spawn(&sides.client, &client, WAYS.map(port));
    vec![server, client]
}

fn tls(way: Way, files: &Files) -> String {
    let alpn = match way {
        Way::Http | Way::Grpc => " alpn h2",
        Way::Tcp => "",
    };
    format!(
        "ssl crt {} ca-file {} verify required ssl-min-ver TLSv1.3{alpn}",
        files.both(),
        files.authority()
    )
}

fn section(way: Way, bind: &str, server: &str) -> String {
    let mode = way.name();
    format!(
        "frontend in_{mode}\n    mode {mode}\n    {bind}\n    default_backend out_{mode}\n\
         backend out_{mode}\n    mode {mode}\n    {server}\n"
    )
}

fn spawn(host: &Host, sections: &str, ports: [u16; 2]) -> Process {
    let path = host.dir().join("haproxy.cfg");
    fs::write(&path, format!("{COMMON}{sections}")).expect("a configuration");
    let words = ["haproxy", "-db", "-f", &path.display().to_string()];
    let process = host.program(words).cgroup(CGROUP).spawn("haproxy");
    for port in ports {
        host.wait_listening(port, SOON);
    }
    process
}
