//! The whole mesh on hosts that are network namespaces: real binaries, real servers and clients. Needs root.
//! A refused case is proven by its reason code and counter, never by mere failure.

#![expect(clippy::unwrap_used, reason = "a test helper may panic")]

#[path = "namespaces/authz.rs"]
mod authz;
#[path = "namespaces/bench.rs"]
mod bench;
#[path = "namespaces/bounds.rs"]
mod bounds;
#[path = "namespaces/bridge.rs"]
mod bridge;
#[path = "namespaces/bypass.rs"]
mod bypass;
#[path = "namespaces/capture.rs"]
mod capture;
#[path = "namespaces/certificates.rs"]
mod certificates;
#[path = "namespaces/check.rs"]
mod check;
#[path = "namespaces/control_down.rs"]
mod control_down;
#[path = "namespaces/denial.rs"]
mod denial;
#[path = "namespaces/door.rs"]
mod door;
#[path = "namespaces/drain.rs"]
mod drain;
#[path = "namespaces/edges.rs"]
mod edges;
#[path = "namespaces/explain.rs"]
mod explain;
#[path = "namespaces/explicit.rs"]
mod explicit;
#[path = "namespaces/failures.rs"]
mod failures;
#[path = "namespaces/firewalls.rs"]
mod firewalls;
#[path = "namespaces/greedy.rs"]
mod greedy;
#[path = "namespaces/grpc.rs"]
mod grpc;
#[path = "namespaces/half_close.rs"]
mod half_close;
#[path = "namespaces/harness.rs"]
mod harness;
#[path = "namespaces/health.rs"]
mod health;
#[path = "namespaces/hostile.rs"]
mod hostile;
#[path = "namespaces/http.rs"]
mod http;
#[path = "namespaces/http1.rs"]
mod http1;
#[path = "namespaces/http1_login.rs"]
mod http1_login;
#[path = "namespaces/http1_smuggling.rs"]
mod http1_smuggling;
#[path = "namespaces/http2.rs"]
mod http2;
#[path = "namespaces/http2_agents.rs"]
mod http2_agents;
#[path = "namespaces/identity.rs"]
mod identity;
#[path = "namespaces/join.rs"]
mod join;
#[path = "namespaces/keepalive.rs"]
mod keepalive;
#[path = "namespaces/limits.rs"]
mod limits;
#[path = "namespaces/local_attackers.rs"]
mod local_attackers;
#[path = "namespaces/mishaps.rs"]
mod mishaps;
#[path = "namespaces/packet_capture.rs"]
mod packet_capture;
#[path = "namespaces/pair.rs"]
mod pair;
#[path = "namespaces/real_addresses.rs"]
mod real_addresses;
#[path = "namespaces/real_flows.rs"]
mod real_flows;
#[path = "namespaces/real_servers.rs"]
mod real_servers;
#[path = "namespaces/removal.rs"]
mod removal;
#[path = "namespaces/revocation.rs"]
mod revocation;
#[path = "namespaces/services.rs"]
mod services;
#[path = "namespaces/shapes.rs"]
mod shapes;
#[path = "namespaces/soak.rs"]
mod soak;
#[path = "namespaces/sources.rs"]
mod sources;
#[path = "namespaces/ssh.rs"]
mod ssh;
#[path = "namespaces/store.rs"]
mod store;
#[path = "namespaces/tcp.rs"]
mod tcp;
#[path = "namespaces/tcp_exact.rs"]
mod tcp_exact;
#[path = "namespaces/tokens.rs"]
mod tokens;
#[path = "namespaces/torture.rs"]
mod torture;
#[path = "namespaces/torture_cuts.rs"]
mod torture_cuts;
#[path = "namespaces/torture_http2.rs"]
mod torture_http2;
#[path = "namespaces/torture_many.rs"]
mod torture_many;
#[path = "namespaces/unjoined.rs"]
mod unjoined;
#[path = "namespaces/upgrade.rs"]
mod upgrade;
