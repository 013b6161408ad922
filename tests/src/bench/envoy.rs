//! A pair of Envoy: HTTP and gRPC with HTTP/2 between the two, and TCP with a TLS connection each. One worker thread, as
//! the agents have; no access log, request id or admin port.

use std::fs;

use serde_json::{Value, json};

use super::certificates::{Files, NAME};
use super::subjects::{Sides, Way};
use crate::host::Host;
use crate::process::Process;
use crate::wait::SOON;

/// The cgroup of its processes.
pub(super) const CGROUP: &str = "envoy";

const WAYS: [Way; 3] = [Way::Http, Way::Tcp, Way::Grpc];

/// Where its caller's side listens.
pub(super) const fn port(way: Way) -> u16 {
    9000 + way.app_port()
}

const fn port_between(way: Way) -> u16 {
    9400 + way.app_port()
}

pub(super) fn start(sides: &Sides) -> Vec<Process> {
    let between = sides.server.v4().to_string();
    let server = WAYS.map(|way| Proxy {
        way,
        listen: (between.clone(), port_between(way)),
        listen_tls: Some(tls("Downstream", way, &sides.server_files)),
        to: ("127.0.0.1".to_owned(), way.app_port()),
        to_tls: None,
    });
    let client = WAYS.map(|way| Proxy {
        way,
        listen: (sides.client.v4().to_string(), port(way)),
        listen_tls: None,
        to: (between.clone(), port_between(way)),
        to_tls: Some(tls("Upstream", way, &sides.client_files)),
    });
    [(&sides.server, server), (&sides.client, client)]
        .map(|(host, proxies)| spawn(host, &proxies))
        .into()
}

/// One listener and its upstream cluster.
struct Proxy {
    way: Way,
    listen: (String, u16),
    listen_tls: Option<Value>,
    to: (String, u16),
    to_tls: Option<Value>,
}

impl Proxy {
    fn listener(&self) -> Value {
        let name = self.way.name();
        let router = typed("router", "filters.http.router.v3.Router", json!({}));
        let filter = match self.way {
            Way::Tcp => {
                let what = json!({ "stat_prefix": name, "cluster": name });
                typed("tcp", "filters.network.tcp_proxy.v3.TcpProxy", what)
            }
            Way::Http | Way::Grpc => {
                let kind = "filters.network.http_connection_manager.v3.HttpConnectionManager";
                let route = json!({ "cluster": name, "timeout": "0s" });
                let what = json!({
                    "stat_prefix": name,
                    "generate_request_id": false,
                    "http_filters": [router],
                    "route_config": { "virtual_hosts": [{
                        "name": name,
                        "domains": ["*"],
                        "routes": [{ "match": { "prefix": "/" }, "route": route }],
                    }] },
                });
                typed("http", kind, what)
            }
        };
        let mut chain = json!({ "filters": [filter] });
        if let Some(tls) = &self.listen_tls {
            chain["transport_socket"] = tls.clone();
        }
        json!({
            "name": name,
            "address": address(&self.listen),
            "filter_chains": [chain],
        })
    }

    fn cluster(&self) -> Value {
        let name = self.way.name();
        let endpoint = json!({ "endpoint": { "address": address(&self.to) } });
        let mut cluster = json!({
            "name": name,
            "type": "STATIC",
            "load_assignment": {
                "cluster_name": name,
                "endpoints": [{ "lb_endpoints": [endpoint] }],
            },
        });
        if let Some(tls) = &self.to_tls {
            cluster["transport_socket"] = tls.clone();
        }
        let http2 = match self.way {
            Way::Http => self.to_tls.is_some(),
            Way::Grpc => true,
            Way::Tcp => false,
        };
        if http2 {
            let kind = "extensions.upstreams.http.v3.HttpProtocolOptions";
            let what = json!({
                "@type": format!("type.googleapis.com/envoy.{kind}"),
                "explicit_http_config": { "http2_protocol_options": {} },
            });
            cluster["typed_extension_protocol_options"] = json!({ format!("envoy.{kind}"): what });
        }
        cluster
    }
}

fn typed(name: &str, kind: &str, mut what: Value) -> Value {
    what["@type"] = format!("type.googleapis.com/envoy.extensions.{kind}").into();
    json!({ "name": name, "typed_config": what })
}

fn address((ip, port): &(String, u16)) -> Value {
    json!({ "socket_address": { "address": ip, "port_value": port } })
}

/// TLS 1.3 with our certificate, and the other side's verified by authority and name.
fn tls(side: &str, way: Way, files: &Files) -> Value {
    let alpn: &[&str] = match way {
        Way::Http | Way::Grpc => &["h2"],
        Way::Tcp => &[],
    };
    let common = json!({
        "alpn_protocols": alpn,
        "tls_params": {
            "tls_minimum_protocol_version": "TLSv1_3",
            "tls_maximum_protocol_version": "TLSv1_3",
        },
        "tls_certificates": [{
            "certificate_chain": { "filename": files.certificate() },
            "private_key": { "filename": files.key() },
        }],
        "validation_context": {
            "trusted_ca": { "filename": files.authority() },
            "match_typed_subject_alt_names": [{
                "san_type": "DNS",
                "matcher": { "exact": NAME },
            }],
        },
    });
    let mut what = json!({ "common_tls_context": common });
    if side == "Upstream" {
        what["sni"] = NAME.into();
    } else {
        what["require_client_certificate"] = true.into();
    }
    let kind = format!("transport_sockets.tls.v3.{side}TlsContext");
    typed("envoy.transport_sockets.tls", &kind, what)
}

fn spawn(host: &Host, proxies: &[Proxy]) -> Process {
    let listeners: Vec<Value> = proxies.iter().map(Proxy::listener).collect();
    let clusters: Vec<Value> = proxies.iter().map(Proxy::cluster).collect();
    let config = json!({ "static_resources": { "listeners": listeners, "clusters": clusters } });
    let path = host.dir().join("envoy.json");
    fs::write(&path, config.to_string()).expect("a configuration");
    let program = std::env::var("MESH_ENVOY");
    let program = program.expect("MESH_ENVOY names the program, as `cargo xtask bench` sets it");
    let words = [
        "-c",
        &path.display().to_string(),
        "--concurrency",
        "1",
        "--log-level",
        "error",
        "--disable-hot-restart",
    ];
    let command = host.program([&[program.as_str()], words.as_slice()].concat());
    let process = command.cgroup(CGROUP).spawn("envoy");
    for proxy in proxies {
        host.wait_listening(proxy.listen.1, SOON);
    }
    process
}
