//! A member of the mesh that takes all it can get: the last quarter is for hosts that have few.

use std::net::SocketAddr;

use mesh_api::header::{Header, StreamKind};
use mesh_core::reason::Reason;
use meshwork_tests::agent::MESH_PORT;
use meshwork_tests::control::TRUST_DOMAIN;
use meshwork_tests::mesh::{Authority, Greedy};
use meshwork_tests::wait::{SOON, check, wait_until};

use crate::bounds::{reached, used};
use crate::limits::{ECHO, Rig};
use crate::pair::spiffe;

/// Of 32 connections, and as many calls, one host has 24; others that come then have theirs.
#[test]
fn a_greedy_host_leaves_room_for_others() {
    const LINES: &str = "[limits]\nthreads = 1\nconnections = 32\n";
    let rig = Rig::new("greedy", "", LINES);
    let (client, server) = (&rig.pair.client, &rig.pair.server);
    let ours = Authority::of_control(&rig.pair.control.state_dir());
    let uid = "00112233445566778899aabbccddeeff";
    let greedy = ours.leaf(&[&spiffe("greedy")], (-1, 1), Some(uid));
    let address = SocketAddr::from((server.host.v4(), MESH_PORT));
    let sni = format!("app.shop.{TRUST_DOMAIN}");
    let mut header = Vec::new();
    Header {
        kind: StreamKind::Tcp,
        service: "app".parse().unwrap(),
        port: ECHO,
    }
    .encode(&mut header);
    rig.wait_once("client");
    for limit in ["peers", "calls"] {
        // What others hold counts too: nobody does.
        wait_until("no call", SOON, || {
            let calls = used(server, "calls");
            check(calls == 0.0, format!("{calls}"))
        });
        let before = reached(server, limit);
        let others = match limit {
            "peers" => used(server, "peers"),
            _ => 0.0,
        };
        let take = || match limit {
            "peers" => Greedy::connections(address, &sni, &greedy, &header),
            _ => Greedy::streams(address, &sni, &greedy, &header),
        };
        let (held, open, reason) = client.host.inside(take);
        assert_eq!(reason, Reason::Overloaded, "{limit}");
        assert_eq!(open as f64 + others, 24.0, "{limit}");
        assert_eq!(reached(server, limit), before + 1.0, "{limit}");
        // An identity that has no connection yet, of a host that has few.
        assert_eq!(rig.once("client", "app", ECHO), "open", "{limit}");
        assert_eq!(rig.get("/"), "server", "{limit}");
        held.leave();
    }
}
