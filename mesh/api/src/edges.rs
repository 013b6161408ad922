//! The report of a host's callers ([`EdgeReport`]) as an agent writes it and control reads it.

use std::collections::BTreeSet;
use std::net::IpAddr;

use mesh_core::edge::{
    EDGES_MAX, EdgeCaller, EdgeKey, EdgeReport, EdgeUse, EdgeVerdict, WATCHED_MAX, WatchedPort,
};
use mesh_core::identity::SpiffeId;
use mesh_core::names::ServiceName;

use crate::proto;
use crate::sync::{SyncError, service_name, service_ref};

fn bad(object: &str, message: impl std::fmt::Display) -> SyncError {
    SyncError {
        object: object.to_owned(),
        message: message.to_string(),
    }
}

impl From<&EdgeReport> for proto::Edges {
    fn from(report: &EdgeReport) -> Self {
        let edges = report.edges.iter().map(|(key, used)| {
            let (identity, address) = match &key.caller {
                EdgeCaller::Identity(id) => (id.to_string(), String::new()),
                EdgeCaller::Plaintext(address) => (String::new(), address.to_string()),
            };
            proto::Edge {
                service: Some(service_ref(&key.service)),
                port: key.port.into(),
                identity,
                address,
                verdict: key.verdict.to_string(),
                calls: used.calls,
                first_ms: used.first_ms,
                last_ms: used.last_ms,
            }
        });
        let watched = report.watched.iter().map(|port| proto::WatchedPort {
            service: Some(service_ref(&port.service)),
            port: port.port.into(),
            since_ms: port.since_ms,
        });
        Self {
            edges: edges.collect(),
            watched: watched.collect(),
            overflowed: report.overflowed,
        }
    }
}

impl TryFrom<&proto::Edges> for EdgeReport {
    type Error = SyncError;

    fn try_from(wire: &proto::Edges) -> Result<Self, SyncError> {
        for (object, count, max) in [
            ("edges", wire.edges.len(), EDGES_MAX),
            ("watched ports", wire.watched.len(), WATCHED_MAX),
        ] {
            if count > max {
                return Err(bad(object, format!("{count} of at most {max}")));
            }
        }
        let mut seen = BTreeSet::new();
        let mut edges = Vec::with_capacity(wire.edges.len());
        for one in &wire.edges {
            let key = EdgeKey {
                service: service("an edge", one.service.as_ref())?,
                port: port("an edge", one.port)?,
                caller: caller(one)?,
                verdict: EdgeVerdict::parse(&one.verdict)
                    .ok_or_else(|| bad("an edge", "its verdict is not known to this version"))?,
            };
            let used = EdgeUse {
                calls: one.calls,
                first_ms: one.first_ms,
                last_ms: one.last_ms,
            };
            if !seen.insert(key.clone()) {
                return Err(bad("an edge", "is listed twice"));
            }
            edges.push((key, used));
        }
        let mut seen = BTreeSet::new();
        let mut watched = Vec::with_capacity(wire.watched.len());
        for one in &wire.watched {
            let port = WatchedPort {
                service: service("a watched port", one.service.as_ref())?,
                port: port("a watched port", one.port)?,
                since_ms: one.since_ms,
            };
            // Who says it twice would count as two hosts that saw nobody.
            if !seen.insert((port.service.clone(), port.port)) {
                return Err(bad("a watched port", "is listed twice"));
            }
            watched.push(port);
        }
        Ok(Self {
            edges,
            watched,
            overflowed: wire.overflowed,
        })
    }
}

fn service(object: &str, wire: Option<&proto::ServiceRef>) -> Result<ServiceName, SyncError> {
    service_name(wire.ok_or_else(|| bad(object, "of no service"))?)
}

fn port(object: &str, number: u32) -> Result<u16, SyncError> {
    let port = u16::try_from(number).ok().filter(|port| *port != 0);
    port.ok_or_else(|| bad(object, format!("{number} is no port")))
}

fn caller(edge: &proto::Edge) -> Result<EdgeCaller, SyncError> {
    match (edge.identity.as_str(), edge.address.as_str()) {
        (identity, "") => SpiffeId::parse(identity)
            .map(EdgeCaller::Identity)
            .map_err(|e| bad("an edge", e)),
        ("", address) => address
            .parse::<IpAddr>()
            .map(|ip| EdgeCaller::Plaintext(ip.to_canonical()))
            .map_err(|e| bad("an edge", e)),
        _ => Err(bad("an edge", "has an identity and an address")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> EdgeReport {
        let key = |caller, verdict| EdgeKey {
            service: ServiceName::parse("shop/web").unwrap(),
            port: 80,
            caller,
            verdict,
        };
        let used = EdgeUse {
            calls: 3,
            first_ms: 1,
            last_ms: 2,
        };
        let id = SpiffeId::parse("spiffe://corp.test/ns/shop/sa/client").unwrap();
        let address = "10.0.0.1".parse().unwrap();
        EdgeReport {
            edges: vec![
                (key(EdgeCaller::Identity(id), EdgeVerdict::Passed), used),
                (
                    key(EdgeCaller::Plaintext(address), EdgeVerdict::Refused),
                    used,
                ),
            ],
            watched: vec![WatchedPort {
                service: ServiceName::parse("shop/web").unwrap(),
                port: 80,
                since_ms: 7,
            }],
            overflowed: true,
        }
    }

    #[test]
    fn a_report_reads_back_as_it_was_written() {
        let wire = proto::Edges::from(&report());
        assert_eq!(EdgeReport::try_from(&wire).unwrap(), report());
    }

    #[test]
    fn what_is_out_of_bounds_is_refused() {
        let changes: [fn(&mut proto::Edges); 9] = [
            |e| e.edges[0].service = None,
            |e| e.edges[0].port = 70_000,
            |e| e.edges[0].identity = "spiffe://x".to_owned(),
            |e| e.edges[0].address = "10.0.0.1".to_owned(),
            |e| e.edges[1].address = "here".to_owned(),
            |e| e.edges[1].verdict = "maybe".to_owned(),
            |e| e.edges[1] = e.edges[0].clone(),
            |e| e.watched[0].port = 0,
            |e| {
                let again = proto::WatchedPort {
                    since_ms: 8,
                    ..e.watched[0].clone()
                };
                e.watched.push(again);
            },
        ];
        for change in changes {
            let mut wire = proto::Edges::from(&report());
            change(&mut wire);
            assert!(EdgeReport::try_from(&wire).is_err(), "{wire:?}");
        }
        let mut wire = proto::Edges::from(&report());
        wire.edges = vec![wire.edges[0].clone(); EDGES_MAX + 1];
        assert!(EdgeReport::try_from(&wire).is_err());
    }
}
