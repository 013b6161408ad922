//! On a host on which all is well every check is ok; each thing that is wrong is found by its check, and by no other.

use std::collections::BTreeMap;

use mesh_api::check::Verdict;
use mesh_core::vip::VipRanges;

use super::*;
use crate::capture::inspect::Inspection;
use crate::capture::sockdiag::Listener;
use crate::check::{Disk, Resolved};
use crate::probe::Probed;
use crate::state::Membership;
use crate::status::{
    CaptureStatus, ControlStatus, ExampleStatus, IndexStatus, NamesStatus, RefusalStatus,
    ServiceStatus, UsageStatus, WorkloadStatus,
};
use crate::view::HostFacts;

const NOW_S: i64 = 1_000_000_000;
const DAY_S: i64 = 86_400;

fn membership() -> Membership {
    let cidr = |text| mesh_core::policy::Cidr::parse(text).unwrap();
    Membership {
        host: HostFacts {
            uid: "00112233445566778899aabbccddeeff".parse().unwrap(),
            name: "vm-1".parse().unwrap(),
            trust_domain: "corp.test".parse().unwrap(),
            network: mesh_core::names::Network::default_network(),
            vips: VipRanges::new(cidr("252.64.0.0/16"), cidr("fd6d:6573:6800::/64")).unwrap(),
            dns_suffix: "mesh.internal".to_owned(),
        },
        address: "10.0.0.1".to_owned(),
        moves: true,
        control: vec!["10.0.0.9:7440".to_owned()],
        token_id: "t-1".to_owned(),
    }
}

fn status() -> Status {
    Status {
        control: ControlStatus {
            clock_offset_ms: Some(12),
            ..ControlStatus::default()
        },
        index: Some(IndexStatus {
            services: 1,
            example: Some(ExampleStatus::default()),
            ..IndexStatus::default()
        }),
        policies: Some(3),
        capture: CaptureStatus {
            applied: true,
            enabled: true,
            ..CaptureStatus::default()
        },
        workloads: vec![WorkloadStatus {
            account: "shop/web".to_owned(),
            services: vec![ServiceStatus {
                name: "shop/web".to_owned(),
                ..ServiceStatus::default()
            }],
            ..WorkloadStatus::default()
        }],
        autonomy_s: Some(DAY_S),
        names: Some(NamesStatus {
            wiring: "resolved".to_owned(),
            server: "252.64.0.1:7453".to_owned(),
            ..NamesStatus::default()
        }),
        in_use: vec![UsageStatus {
            limit: "callers".to_owned(),
            used: 1,
            max: 100,
        }],
        ..Status::default()
    }
}

fn facts() -> Facts {
    Facts {
        now_s: NOW_S,
        membership: Ok(Some(membership())),
        status: Ok(Some(status())),
        peers: Ok(vec![Probed {
            health: "healthy".to_owned(),
            took_ms: Some(2),
            ..Probed::default()
        }]),
        captures: true,
        kernel: Ok(Inspection::default()),
        bypass: Ok(None),
        mesh_port: Ok(vec![Listener {
            address: "0.0.0.0:7441".parse().unwrap(),
            uid: 0,
            inode: 1,
            cgroup: None,
            v6only: false,
        }]),
        mesh_port_number: 7441,
        name: Some(Resolved {
            name: "web.shop.mesh.internal".to_owned(),
            expected: vec!["252.64.0.2".parse().unwrap()],
            answer: Ok(vec!["252.64.0.2".parse().unwrap()]),
        }),
        tracked: None,
        disk: Ok(Disk {
            directory: "/var/lib/meshwork/agent".into(),
            free: 1 << 30,
            files: Some(1000),
            read_only: false,
        }),
        certificates: vec![Certificate {
            what: "the certificate of host".to_owned(),
            not_before_s: NOW_S - DAY_S,
            not_after_s: NOW_S + DAY_S,
        }],
    }
}

fn verdicts(facts: &Facts) -> BTreeMap<String, Verdict> {
    let checks = judge(facts).checks;
    for check in &checks {
        let wrong = matches!(check.verdict, Verdict::Warning | Verdict::Failed);
        assert_eq!(wrong, !check.remedy.is_empty(), "{check:?}");
        assert!(!check.found.is_empty(), "{check:?}");
    }
    checks.into_iter().map(|c| (c.name, c.verdict)).collect()
}

#[test]
fn where_all_is_well_nothing_is_said() {
    for (name, verdict) in verdicts(&facts()) {
        assert_eq!(verdict, Verdict::Ok, "{name}");
    }
}

fn of(facts: &mut Facts) -> &mut Status {
    match &mut facts.status {
        Ok(Some(status)) => status,
        other => panic!("{other:?}"),
    }
}

fn kernel(facts: &mut Facts) -> &mut Inspection {
    facts.kernel.as_mut().unwrap()
}

fn disk(facts: &mut Facts) -> &mut Disk {
    facts.disk.as_mut().unwrap()
}

fn refused(reason: Reason) -> Option<RefusalStatus> {
    Some(RefusalStatus {
        reason: reason.code().to_owned(),
        message: "no".to_owned(),
        remedy: "ask".to_owned(),
    })
}

#[test]
#[expect(clippy::too_many_lines, reason = "one row a wrong")]
fn each_wrong_is_found_by_its_check_alone() {
    type Change = fn(&mut Facts);
    let wrongs: &[(&[&str], Verdict, Change)] = &[
        (&["routes"], Verdict::Failed, |f| {
            kernel(f).missing.link = true
        }),
        (&["routes"], Verdict::Failed, |f| {
            kernel(f).missing.table = true
        }),
        (&["routes"], Verdict::Failed, |f| {
            kernel(f).missing.routes.push("the rule".to_owned());
        }),
        (&["clashes"], Verdict::Failed, |f| {
            kernel(f).clashes.push("a rule".to_owned());
        }),
        (&["conntrack"], Verdict::Warning, |f| {
            f.tracked = Some((80, 100))
        }),
        (&["conntrack"], Verdict::Failed, |f| {
            f.tracked = Some((100, 100))
        }),
        (&["disk"], Verdict::Failed, |f| disk(f).read_only = true),
        (&["disk"], Verdict::Failed, |f| disk(f).free = 1 << 20),
        (&["disk"], Verdict::Failed, |f| disk(f).files = Some(0)),
        (&["disk"], Verdict::Warning, |f| disk(f).free = 1 << 25),
        (&["certificates"], Verdict::Failed, |f| {
            f.certificates[0].not_after_s = NOW_S;
        }),
        (&["certificates"], Verdict::Failed, |f| {
            f.certificates[0].not_before_s = NOW_S + 1;
        }),
        (&["certificates"], Verdict::Warning, |f| {
            f.certificates[0].not_after_s = NOW_S + DAY_S / 3;
        }),
        (&["certificates"], Verdict::Failed, |f| {
            of(f).host_leaf.refused = refused(Reason::OutOfScope);
        }),
        (&["clock"], Verdict::Warning, |f| {
            of(f).control.clock_offset_ms = Some(-6_000);
        }),
        (&["clock"], Verdict::Failed, |f| {
            of(f).control.clock_offset_ms = Some(300_000);
        }),
        (&["index"], Verdict::Failed, |f| of(f).index = None),
        (&["index"], Verdict::Failed, |f| of(f).policies = None),
        (&["names"], Verdict::Failed, |f| {
            f.name.as_mut().unwrap().answer = Err("no such host".to_owned());
        }),
        (&["names"], Verdict::Failed, |f| {
            f.name.as_mut().unwrap().answer = Ok(vec!["10.0.0.1".parse().unwrap()]);
        }),
        (&["capture"], Verdict::Failed, |f| {
            of(f).capture.error = Some("EPERM".to_owned());
        }),
        (&["capture"], Verdict::Warning, |f| {
            of(f).capture.applied = false
        }),
        (&["door"], Verdict::Failed, |f| of(f).door.disarmed = true),
        (&["door"], Verdict::Failed, |f| {
            of(f).door.error = Some("EPERM".to_owned());
        }),
        (&["door"], Verdict::Warning, |f| {
            of(f).door.overflowed = true
        }),
        (&["mesh_port"], Verdict::Failed, |f| {
            f.mesh_port = Ok(vec![])
        }),
        (&["mesh_port"], Verdict::Failed, |f| {
            of(f).workloads[0].services[0].refused = refused(Reason::AddressUnproven);
        }),
        (&["firewall", "mesh_port"], Verdict::Failed, |f| {
            of(f).workloads[0].services[0].refused = refused(Reason::AddressUnproven);
            kernel(f).input_drops.push("chain `input`".to_owned());
        }),
        (&["peers"], Verdict::Failed, |f| {
            f.peers.as_mut().unwrap()[0].took_ms = None;
        }),
        (&["peers"], Verdict::Warning, |f| {
            let peer = &mut f.peers.as_mut().unwrap()[0];
            peer.took_ms = None;
            "stale".clone_into(&mut peer.health);
        }),
        (&["files"], Verdict::Failed, |f| {
            of(f).file_problems.push("web.toml:1".to_owned());
        }),
        (&["workloads", "ports"], Verdict::Failed, |f| {
            of(f).workloads[0].problem = Some("no such unit".to_owned());
        }),
        (&["workloads"], Verdict::Failed, |f| {
            of(f).workloads[0].services[0].refused = refused(Reason::ServiceConflict);
        }),
        (&["ports"], Verdict::Failed, |f| {
            let problems = &mut of(f).workloads[0].services[0].problems;
            problems.push("a stranger".to_owned());
        }),
        (&["plaintext"], Verdict::Warning, |f| {
            let plaintext = &mut of(f).workloads[0].services[0].plaintext;
            plaintext.push("10.9.0.5:5432".to_owned());
        }),
        (&["limits"], Verdict::Warning, |f| of(f).in_use[0].used = 90),
    ];
    for (at, (names, expected, change)) in wrongs.iter().enumerate() {
        let mut facts = facts();
        change(&mut facts);
        for (name, verdict) in verdicts(&facts) {
            let expected = match names.contains(&name.as_str()) {
                true => *expected,
                false => Verdict::Ok,
            };
            assert_eq!(verdict, expected, "{name}, by change {at} ({names:?})");
        }
    }
}

/// Control away: the index grows old with it.
#[test]
fn an_index_grows_old_with_control_away() {
    let at = |since_s: u64| {
        let mut facts = facts();
        of(&mut facts).control.stale_since_s = Some(since_s);
        let verdicts = verdicts(&facts);
        assert_eq!(verdicts["control"], Verdict::Failed);
        verdicts["index"]
    };
    let now_s = NOW_S.unsigned_abs();
    assert_eq!(at(now_s - 60), Verdict::Warning);
    assert_eq!(at(now_s - 86_400), Verdict::Failed);
}

#[test]
fn without_an_agent_the_kernel_is_still_looked_at() {
    let mut facts = facts();
    facts.status = Ok(None);
    kernel(&mut facts).missing.link = true;
    let found = verdicts(&facts);
    assert_eq!(found["agent"], Verdict::Failed);
    assert_eq!(found["routes"], Verdict::Failed);
    assert_eq!(found["control"], Verdict::Skipped);
    // Somebody listens, and it is not an agent.
    assert_eq!(found["clashes"], Verdict::Failed);
    facts.membership = Ok(None);
    facts.kernel = Err("this host has not joined a mesh".to_owned());
    let found = verdicts(&facts);
    assert_eq!(found["agent"], Verdict::Failed);
    assert_eq!(found["routes"], Verdict::Skipped);
}

#[test]
fn the_check_of_names_says_which_wiring_and_what_is_wrong_with_it() {
    let mut facts = facts();
    let check = |facts: &Facts| {
        let mut checks = judge(facts).checks.into_iter();
        checks.find(|check| check.name == "names").unwrap()
    };
    assert!(check(&facts).found.contains("`dns.wiring` resolved"));
    facts.name.as_mut().unwrap().answer = Err("no such name".to_owned());
    for (wiring, remedy) in [
        ("resolved", "stub-resolv.conf"),
        ("dnsmasq", "systemctl restart dnsmasq"),
        ("resolv_conf", "first server"),
        ("off", "252.64.0.1:7453"),
    ] {
        let names = of(&mut facts).names.as_mut().unwrap();
        names.wiring = wiring.to_owned();
        let check = check(&facts);
        assert_eq!(check.verdict, Verdict::Failed);
        assert!(check.remedy.contains(remedy), "{check:?}");
    }
    of(&mut facts).names.as_mut().unwrap().error = Some("no carrier".to_owned());
    assert!(check(&facts).found.contains("no carrier"));
    of(&mut facts).names = None;
    assert_eq!(check(&facts).verdict, Verdict::Skipped);
}
