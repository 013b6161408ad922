//! What an agent can call and say, with everything that a field can be.

use std::collections::BTreeSet;

use mesh_api::proto;
use mesh_api::proto::from_agent::Message as Say;
use mesh_core::rng::Rng;

/// What can be called and said is read from where it is defined: one more, of which no attack is known, fails the test.
const DEFINITION: &str = include_str!("../../../mesh/api/proto/mesh.proto");

pub(super) fn methods() -> Vec<&'static str> {
    let lines = DEFINITION.lines();
    let calls = lines.filter_map(|line| line.trim().strip_prefix("rpc ")?.split_once('('));
    calls.map(|(name, _)| name).collect()
}

/// What an agent can say in a session.
pub(super) fn messages() -> Vec<&'static str> {
    let (_, rest) = DEFINITION
        .split_once("message FromAgent {\n  oneof message {\n")
        .unwrap();
    let (oneof, _) = rest.split_once('}').unwrap();
    let names = oneof.lines().map(|line| line.split_whitespace().nth(1));
    names.flatten().collect()
}

/// Everything that a field can be: what is right for somebody else, and what is right for nobody.
pub(super) struct Fields {
    pub(super) rng: Rng,
    pub(super) own: String,
    pub(super) other: String,
    pub(super) tried: Tried,
}

/// What all runs came to.
#[derive(Default)]
pub(super) struct Tried {
    pub(super) calls: BTreeSet<&'static str>,
    pub(super) messages: BTreeSet<&'static str>,
    pub(super) refused: u64,
    /// What the audit says was refused.
    pub(super) trail: BTreeSet<String>,
}

impl Fields {
    pub(super) fn pick<'a>(&mut self, all: &[&'a str]) -> &'a str {
        all[self.rng.below(all.len() as u64) as usize]
    }

    pub(super) fn text(&mut self) -> String {
        let long = "x".repeat(300);
        let huge = "y".repeat(70_000);
        let all = [
            "",
            "shop",
            "data",
            "web",
            "db",
            "-",
            "*",
            "shop/*",
            "..",
            "\0",
            "\n",
            "é",
            "UP",
            "a.b",
            "10.0.0.1",
            "10.0.0.2",
            "127.0.0.1",
            "::",
            "255.255.255.255",
            "252.64.0.2",
            "strict",
            "permissive",
            "http",
            "tcp",
            "control",
            &long,
            &huge,
        ];
        self.pick(&all).to_owned()
    }

    pub(super) fn uid(&mut self) -> String {
        match self.rng.below(4) {
            0 => self.own.clone(),
            1 => self.other.clone(),
            2 => "0".repeat(32),
            _ => self.text(),
        }
    }

    pub(super) fn number(&mut self) -> u64 {
        let all = [
            0,
            1,
            80,
            5432,
            65_535,
            65_536,
            u64::from(u32::MAX),
            u64::MAX - 1,
            u64::MAX,
        ];
        match self.rng.below(2) {
            0 => all[self.rng.below(all.len() as u64) as usize],
            _ => self.rng.next_u64() >> self.rng.below(64),
        }
    }

    pub(super) fn port(&mut self) -> u32 {
        self.number() as u32
    }

    pub(super) fn bytes(&mut self) -> bytes::Bytes {
        let len = self.rng.below(200);
        (0..len).map(|_| self.rng.next_u64() as u8).collect()
    }

    pub(super) fn many<T>(&mut self, most: u64, mut make: impl FnMut(&mut Self) -> T) -> Vec<T> {
        let count = self.rng.below(most + 1);
        (0..count).map(|_| make(self)).collect()
    }

    pub(super) fn namespace(&mut self) -> String {
        match self.rng.below(3) {
            0 => "shop".to_owned(),
            1 => "data".to_owned(),
            _ => self.text(),
        }
    }

    pub(super) fn service(&mut self) -> proto::ReportedService {
        proto::ReportedService {
            name: ["web", "db"].map(str::to_owned)[self.rng.below(2) as usize].clone(),
            ports: self.many(3, |f| proto::ReportedPort {
                number: f.port(),
                protocol: f.text(),
            }),
            transport: self.text(),
            healthy: self.rng.below(2) == 0,
            plaintext_endpoints: self.many(20, |f| match f.rng.below(2) {
                0 => "10.9.0.5:80".to_owned(),
                _ => f.text(),
            }),
        }
    }

    pub(super) fn message(&mut self) -> Option<Say> {
        let known = messages();
        // One more is no message at all.
        let name = known.get(self.rng.below(known.len() as u64 + 1) as usize)?;
        self.tried.messages.insert(name);
        Some(match *name {
            "hello" => Say::Hello(self.hello()),
            "beat" => Say::Beat(proto::Beat {
                sequence: self.number(),
                time_ms: self.number(),
            }),
            "report" => Say::Report(proto::Report {
                generation: self.number(),
                workloads: self.many(300, |f| proto::ReportedWorkload {
                    namespace: f.namespace(),
                    account: f.namespace(),
                    services: f.many(3, Self::service),
                }),
                bypass: (self.rng.below(2) == 0).then(|| proto::Bypass {
                    begun_ms: self.number(),
                    until_ms: self.number(),
                    by: self.text(),
                    why: self.text(),
                }),
            }),
            "subscribe" => Say::Subscribe(proto::Subscribe {
                services: self.many(30, Self::service_ref),
            }),
            "ack" => Say::Ack(proto::Ack {
                index_revision: self.number(),
                bundle_number: self.number(),
                policy_revision: self.number(),
                revocations_revision: self.number(),
            }),
            "revocations" => Say::Revocations(proto::Revocations {
                revision: self.number(),
                snapshot: self.rng.below(2) == 0,
                more: self.rng.below(2) == 0,
                // Such as can be read: it is the signature that is to refuse them.
                revoked: self.many(2, |f| proto::Revocation {
                    host_uid: [&f.own, &f.other][f.rng.below(2) as usize].clone(),
                    namespace: "shop".to_owned(),
                    account: "web".to_owned(),
                    at_s: f.number(),
                    signature: f.bytes(),
                    issuer: 0,
                }),
                issuers: vec![],
            }),
            "edges" => Say::Edges(proto::Edges {
                edges: self.many(30, Self::edge),
                watched: self.many(30, |f| proto::WatchedPort {
                    service: Some(f.service_ref()),
                    port: f.port(),
                    since_ms: f.number(),
                }),
                overflowed: self.rng.below(2) == 0,
            }),
            unknown => panic!("no attack says `{unknown}`"),
        })
    }

    pub(super) fn service_ref(&mut self) -> proto::ServiceRef {
        proto::ServiceRef {
            namespace: self.namespace(),
            name: self.text(),
        }
    }

    pub(super) fn edge(&mut self) -> proto::Edge {
        proto::Edge {
            service: (self.rng.below(8) != 0).then(|| self.service_ref()),
            port: self.port(),
            identity: self.identity(),
            address: self.text(),
            verdict: self.text(),
            calls: self.number(),
            first_ms: self.number(),
            last_ms: self.number(),
        }
    }

    pub(super) fn hello(&mut self) -> proto::Hello {
        proto::Hello {
            boot_id: self.text(),
            version: self.text(),
            capabilities: self.many(5, Self::text),
            epoch: self.number(),
            index_revision: self.number(),
            address: self.text(),
            mesh_port: self.port(),
            revocations_epoch: self.number(),
            revocations_revision: self.number(),
        }
    }

    pub(super) fn identity(&mut self) -> String {
        let uid = self.uid();
        let (namespace, name) = (self.namespace(), self.text());
        let path = match self.rng.below(6) {
            0 => format!("agent/{uid}"),
            1 => format!("ns/{namespace}/sa/{name}"),
            2 => "host/vm-2".to_owned(),
            3 => "operator/admin".to_owned(),
            4 => "control".to_owned(),
            _ => name,
        };
        format!("spiffe://corp.example.com/{path}")
    }
}
