//! Taking over the traffic of local programs: who calls is decided by the kernel at the SYN, and nothing of it is ever
//! answered by another program.
//!
//! `rules` is the packet filter, `real` its part for real addresses, `bridged` for containers, `door` its part for what comes from elsewhere in plaintext, `guard` what is left of that
//! when the agent is gone, `routes` the link, routes and policy rules, `sockdiag` asks whose a socket is,
//! `cgroup` follows the owners, `app_socket` is the way to a local app. Only the holder opens [`Capture`]; the worker uses
//! the last three.

mod advice;
pub(crate) mod app_socket;
mod bridged;
pub(crate) mod bypass;
pub(crate) mod cgroup;
pub(crate) mod containers;
pub(crate) mod door;
pub(crate) mod gateways;
mod guard;
pub(crate) mod inspect;
mod netlink;
mod nft;
pub(crate) mod peer;
pub(crate) mod real;
mod routes;
pub(crate) mod rules;
pub(crate) mod sockdiag;
mod table;
mod vips;

use std::io;
use std::net::IpAddr;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use advice::{advice, delete_advice, table_advice};
use door::{Arm, DoorPort, Seen};
use gateways::Gateway;
use guard::Guard;
use real::Real;
use rules::Shed;
pub(crate) use table::{Contents, LeftTable};
pub(crate) use vips::VipRanges;

/// The number of listeners that workloads may have; twelve bits of the mark.
pub(crate) const NUMBER_MAX: u16 = 4095;

/// What the kernel is told, and what may clash with other software on the host. All of it is settable.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct CaptureSettings {
    /// Whether calls are taken over at all. Without it the agent needs no privileges, serves no local program, and is called
    /// by local ports and sockets only.
    pub(crate) enabled: bool,
    /// Name of the nftables table (family `inet`).
    pub(crate) table: String,
    /// Upper half of our packet marks; the lower 16 bits are ours and must be zero here.
    pub(crate) mark_base: u32,
    /// Priority of the policy rule by mark; the next number is the rule for answers of apps on 127.0.0.0/8 and ::1.
    pub(crate) rule_priority: u32,
    /// Number of the routing table that the policy rules lead to.
    pub(crate) route_table: u32,
    /// The link that the virtual addresses are routed to.
    pub(crate) link: String,
    /// Priority of the chain (type route) in the output hook.
    pub(crate) output_priority: i32,
    /// Priority of the chain in the prerouting hook.
    pub(crate) prerouting_priority: i32,
    /// Priority of the chain in the input hook: after the host's firewall, so that only what that lets in is seen. The
    /// next number is the guard's.
    pub(crate) input_priority: i32,
    /// Ports that the door never looks at, whatever a workload declares.
    pub(crate) keep_open: Vec<u16>,
    /// Bridges whose containers' calls to virtual addresses are taken over.
    pub(crate) bridges: Vec<String>,
}

const SSH: u16 = 22;
/// Two rules each, which every packet that comes in passes.
const BRIDGES_MAX: usize = 16;

impl Default for CaptureSettings {
    fn default() -> Self {
        Self {
            enabled: true,
            table: "meshwork".to_owned(),
            mark_base: 0x4d00_0000,
            rule_priority: 744,
            route_table: 7441,
            link: "mesh0".to_owned(),
            output_priority: -150,
            prerouting_priority: -150,
            input_priority: 10,
            keep_open: vec![SSH],
            bridges: Vec::new(),
        }
    }
}

impl CaptureSettings {
    /// Checks what the kernel would refuse later, or worse, take.
    pub(crate) fn check(&self) -> Result<(), CaptureError> {
        let wrong = |field, rule| Err(CaptureError::Settings { field, rule });
        let is_word = |text: &str| {
            text.starts_with(|c: char| c.is_ascii_alphabetic())
                && text
                    .chars()
                    .all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '-')
        };
        if !is_word(&self.table) || self.table.len() > 64 {
            return wrong(
                "table",
                "a letter, then letters, digits, `_`; at most 64 bytes",
            );
        }
        if !is_word(&self.link) || self.link.len() >= libc::IFNAMSIZ || self.link == "lo" {
            return wrong(
                "link",
                "a letter, then letters, digits, `-`; at most 15 bytes; not `lo`",
            );
        }
        if self.mark_base == 0 || self.mark_base & 0xffff != 0 {
            return wrong("mark_base", "not 0, and its lower 16 bits must be 0");
        }
        if !(1..32_765).contains(&self.rule_priority) {
            return wrong("rule_priority", "1 to 32764: before the host's main table");
        }
        if self.route_table == 0 || (252..=255).contains(&self.route_table) {
            return wrong(
                "route_table",
                "not 0 or 252 to 255, which are the kernel's own",
            );
        }
        // Connection tracking and the security tables stand at other priorities; a chain after them sees rewritten
        // packets.
        if !(-199..=-101).contains(&self.output_priority)
            || !(-199..=-101).contains(&self.prerouting_priority)
        {
            return wrong(
                "output_priority or prerouting_priority",
                "-199 to -101: before address translation",
            );
        }
        if !(1..=200).contains(&self.input_priority) {
            return wrong("input_priority", "1 to 200: after the host's firewall");
        }
        let is_bridge = |name: &String| {
            (1..libc::IFNAMSIZ).contains(&name.len())
                && !["lo", ".", "..", self.link.as_str()].contains(&name.as_str())
                && name
                    .chars()
                    .all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
        };
        if self.bridges.len() > BRIDGES_MAX || !self.bridges.iter().all(is_bridge) {
            return wrong(
                "bridges",
                "at most 16 names of links of at most 15 bytes: letters, digits, `-`, `_`, `.`; not `lo` or `link`",
            );
        }
        Ok(())
    }

    pub(crate) const fn marks(&self) -> Marks {
        Marks {
            base: self.mark_base,
        }
    }
}

/// The packet marks, `base | kind | number`:
///
/// | lower 16 bits | set by | meaning |
/// |---|---|---|
/// | `0x8nnn` | output | SYN of workload `nnn` (0: common); to `lo`, then to its listener |
/// | `0x9000` | output | later packet of a captured connection; to `lo` |
/// | `0x9001` | output | answer of an app to an address that we showed it; to `lo` |
/// | `0x9002` | the worker, on its sockets to apps | remember this flow; to `lo` |
/// | `0x9003` | output | later packet of a captured connection to a real address; to `lo` |
/// | `0x9004` | output | the same, of one that is over |
///
/// One bit, `0x8000`, is what the policy rule looks at. `0x2000` and `0x4000` are never set: by them podman and Kubernetes
/// mark what they translate, and they look at nothing else of a mark.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Marks {
    base: u32,
}

impl Marks {
    /// All but the number.
    const KIND_MASK: u32 = 0xffff_f000;

    const fn captured(self, number: u16) -> u32 {
        self.base | 0x8000 | number as u32
    }

    const fn established(self) -> u32 {
        self.base | 0x9000
    }

    const fn way_back(self) -> u32 {
        self.base | 0x9001
    }

    const fn carried(self) -> u32 {
        self.base | 0x9003
    }

    const fn carried_over(self) -> u32 {
        self.base | 0x9004
    }

    /// The mark of the worker's sockets to apps.
    pub(crate) const fn app(self) -> u32 {
        self.base | 0x9002
    }

    /// What the policy rule matches: value and mask.
    const fn to_loopback(self) -> (u32, u32) {
        (self.base | 0x8000, 0xffff_8000)
    }
}

/// A directory of the cgroup tree, as the kernel knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct CgroupRef {
    /// The directory's inode.
    pub(crate) id: u64,
    /// Its depth below the root, 1 for `system.slice`.
    pub(crate) level: u8,
}

/// What the kernel needs to know of a workload. Number 0 is the common listener and has no owner.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Workload {
    pub(crate) number: u16,
    pub(crate) cgroups: Vec<CgroupRef>,
    pub(crate) uids: Vec<u32>,
    /// Of its containers on the bridges that the settings name.
    pub(crate) addresses: Vec<IpAddr>,
    /// Ports of its listeners on 127.0.0.1 and ::1.
    pub(crate) port4: Option<u16>,
    pub(crate) port6: Option<u16>,
}

/// Why traffic can not be taken over. All of it is this host's.
#[derive(Debug, Error)]
pub(crate) enum CaptureError {
    #[error("the capture setting `{field}` is wrong: {rule}")]
    Settings {
        field: &'static str,
        rule: &'static str,
    },
    #[error("the range of virtual addresses `{range}` can not be used: {rule}")]
    Range { range: String, rule: String },
    #[error("could not {operation}{}", advice(.source))]
    Route {
        operation: String,
        #[source]
        source: io::Error,
    },
    #[error("could not make the nftables table `inet {table}`{}", table_advice(.source))]
    MakeTable {
        table: String,
        #[source]
        source: io::Error,
    },
    #[error("could not write {workloads} workloads into the nftables table `inet {table}`")]
    FillTable {
        table: String,
        workloads: usize,
        #[source]
        source: io::Error,
    },
    #[error("could not {operation} in the nftables tables `inet {table}` and `inet {table}_guard`")]
    Door {
        operation: &'static str,
        table: String,
        #[source]
        source: io::Error,
    },
    #[error("could not delete the nftables table `inet {table}`{}", delete_advice(.source))]
    DeleteTable {
        table: String,
        #[source]
        source: io::Error,
    },
}

/// The name of the table that nobody owns.
fn guard_table(settings: &CaptureSettings) -> String {
    format!("{}_guard", settings.table)
}

/// The host's traffic to virtual addresses, taken over. It ends with this value: the kernel takes the table with the
/// socket, and what is left (link and routes) lets nothing out.
#[derive(Debug)]
pub(crate) struct Capture {
    settings: CaptureSettings,
    ranges: VipRanges,
    /// `None`: nothing is taken over, and the kernel is left alone.
    tables: Option<Tables>,
}

#[derive(Debug)]
struct Tables {
    own: table::Table,
    guard: Guard,
}

impl Tables {
    fn both(
        settings: &CaptureSettings,
        own: io::Result<table::Table>,
        guard: Guard,
    ) -> Result<Self, CaptureError> {
        let own = own.map_err(|source| CaptureError::MakeTable {
            table: settings.table.clone(),
            source,
        })?;
        Ok(Self { own, guard })
    }

    /// True if it was gone. What it knew of connections under way our own table knows.
    fn repair_guard(&mut self) -> io::Result<bool> {
        let gone = self.guard.repair()?;
        if gone {
            for names in &real::FAMILIES {
                let flows = self.own.flows(names.carried)?;
                self.guard.learn(names.carried, &flows)?;
            }
        }
        Ok(gone)
    }
}

impl Capture {
    /// Makes link, routes, policy rules and the tables; what stands already is kept. The guard refuses what is `strict`
    /// of `confirmed` and `reals` from now on.
    pub(crate) fn open(
        settings: &CaptureSettings,
        ranges: &VipRanges,
        confirmed: &[DoorPort],
        reals: &[Real],
    ) -> Result<Self, CaptureError> {
        let make = || -> Result<Tables, CaptureError> {
            let guard = prepare_guard(settings, ranges, confirmed, reals)?;
            let own = table::Table::create(settings, ranges);
            Tables::both(settings, own, guard)
        };
        Ok(Self {
            settings: settings.clone(),
            ranges: *ranges,
            tables: settings.enabled.then(make).transpose()?,
        })
    }

    /// Takes on what another program left; the guard refuses what is `strict` of `confirmed` and is so in `contents`, too.
    pub(crate) fn take_on(
        settings: &CaptureSettings,
        ranges: &VipRanges,
        left: Option<LeftTable>,
        confirmed: &[DoorPort],
        contents: Contents<'_>,
    ) -> Result<Self, CaptureError> {
        let make = |left| -> Result<Tables, CaptureError> {
            let between = match contents.arm {
                Arm::ForGood => confirmed.to_vec(),
                Arm::For(_) | Arm::Not => guard::meanwhile(confirmed, contents.doors),
            };
            let guard = prepare_guard(settings, ranges, &between, contents.reals)?;
            let own = table::Table::take_on(settings, ranges, left, contents);
            Tables::both(settings, own, guard)
        };
        Ok(Self {
            settings: settings.clone(),
            ranges: *ranges,
            tables: left.map(make).transpose()?,
        })
    }

    /// For the program that takes our place: the socket that owns the table, its last request, and the levels in it.
    pub(crate) fn to_hand_over(&self) -> Option<(BorrowedFd<'_>, u32, &[u8])> {
        let tables = self.tables.as_ref();
        tables.map(|tables| tables.own.to_hand_over())
    }

    /// Makes the kernel know exactly these workloads, real addresses and doors, all at once.
    pub(crate) fn apply(
        &mut self,
        workloads: &[Workload],
        reals: &[Real],
        doors: &[DoorPort],
        arm: Arm,
    ) -> Result<(), CaptureError> {
        let Some(tables) = &mut self.tables else {
            return Ok(());
        };
        tables
            .own
            .apply(workloads, reals, doors, arm)
            .map_err(|source| CaptureError::FillTable {
                table: self.settings.table.clone(),
                workloads: workloads.len(),
                source,
            })
    }

    /// The door that is applied was confirmed: it refuses for good, and what is `strict` outlives us.
    pub(crate) fn confirm(&mut self, doors: &[DoorPort]) -> Result<(), CaptureError> {
        let Some(Tables { own, guard }) = &mut self.tables else {
            return Ok(());
        };
        let armed = own.arm().and_then(|()| guard.write(doors, None));
        armed.map_err(|source| self.door_error("make the input door refuse", source))
    }

    /// The gateways of the host's default routes that answer.
    pub(crate) fn gateways(&self) -> io::Result<Vec<Gateway>> {
        let enabled = self.tables.is_some();
        enabled.then(gateways::answering).unwrap_or(Ok(Vec::new()))
    }

    /// Before others are applied: the guard must not refuse what the door then lets in, and must refuse plaintext to
    /// what is `strict` of these real addresses.
    pub(crate) fn prepare_guard(
        &mut self,
        confirmed: &[DoorPort],
        next: &[DoorPort],
        reals: &[Real],
    ) -> Result<(), CaptureError> {
        let between = guard::meanwhile(confirmed, next);
        let Some(tables) = &mut self.tables else {
            return Ok(());
        };
        let written = tables.guard.write(&between, Some(reals));
        written.map_err(|source| self.door_error("prepare the guard", source))
    }

    /// Plaintext callers of late, and what users sent beyond their shares.
    pub(crate) fn seen(&mut self) -> Result<(Seen, Shed), CaptureError> {
        let Some(tables) = &mut self.tables else {
            return Ok(Default::default());
        };
        let seen = tables.own.seen();
        seen.map_err(|source| self.door_error("read plaintext callers", source))
    }

    /// Lets plaintext pass for so long from now on, or no longer.
    pub(crate) fn bypass(&mut self, left: Option<Duration>) -> Result<(), CaptureError> {
        let Some(Tables { own, guard }) = &mut self.tables else {
            return Ok(());
        };
        let done = own.bypass(left).and_then(|()| guard.bypass(left));
        done.map_err(|source| self.door_error("open the host to plaintext, or close it", source))
    }

    /// Puts back what other programs took away, and names it.
    pub(crate) fn repair(&mut self) -> Result<Vec<String>, CaptureError> {
        let Some(tables) = &mut self.tables else {
            return Ok(Vec::new());
        };
        let mut missing = routes::repair(&self.settings, &self.ranges)?;
        let guard = tables.repair_guard();
        if guard.map_err(|source| self.door_error("put back the guard", source))? {
            missing.push(format!("the table `inet {}`", guard_table(&self.settings)));
        }
        Ok(missing)
    }

    fn door_error(&self, operation: &'static str, source: io::Error) -> CaptureError {
        CaptureError::Door {
            operation,
            table: self.settings.table.clone(),
            source,
        }
    }

    /// Ends the capture. The guard stays, and the link stays where `keep_link` says so: calls by name then fail instead of going elsewhere.
    pub(crate) fn close(self, keep_link: bool) -> Result<(), CaptureError> {
        let Self {
            settings, tables, ..
        } = self;
        let Some(tables) = tables else {
            return Ok(());
        };
        // The service manager may have the socket, too: the table does not go by itself then.
        match tables.own.remove() {
            Err(source) if netlink::errno_of(&source) != Some(libc::ENOENT) => {
                return Err(CaptureError::DeleteTable {
                    table: settings.table,
                    source,
                });
            }
            _ => {}
        }
        routes::remove_rules(&settings)?;
        if !keep_link {
            routes::remove_link(&settings)?;
        }
        Ok(())
    }
}

/// What must stand before the network does, with or without an agent: link, routes and guard.
pub(crate) fn prepare(
    settings: &CaptureSettings,
    ranges: &VipRanges,
    confirmed: &[DoorPort],
    reals: &[Real],
) -> Result<(), CaptureError> {
    prepare_guard(settings, ranges, confirmed, reals).map(drop)
}

fn prepare_guard(
    settings: &CaptureSettings,
    ranges: &VipRanges,
    confirmed: &[DoorPort],
    reals: &[Real],
) -> Result<Guard, CaptureError> {
    settings.check()?;
    routes::ensure(settings, ranges)?;
    let make = || {
        let mut guard = Guard::open(settings)?;
        guard.write(confirmed, Some(reals))?;
        Ok(guard)
    };
    make().map_err(|source| CaptureError::MakeTable {
        table: guard_table(settings),
        source,
    })
}

/// Removes every trace, whoever left it. A running holder must have ended before.
pub(crate) fn remove_all(settings: &CaptureSettings) -> Result<(), CaptureError> {
    settings.check()?;
    match table::delete(settings) {
        Err(source) if netlink::errno_of(&source) != Some(libc::ENOENT) => {
            return Err(CaptureError::DeleteTable {
                table: settings.table.clone(),
                source,
            });
        }
        _ => {}
    }
    guard::delete(settings).map_err(|source| CaptureError::DeleteTable {
        table: guard_table(settings),
        source,
    })?;
    routes::remove_rules(settings)?;
    routes::remove_link(settings)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_disjoint_and_the_policy_rule_knows_them_all() {
        let marks = CaptureSettings::default().marks();
        let (value, mask) = marks.to_loopback();
        let all = [
            marks.captured(0),
            marks.captured(NUMBER_MAX),
            marks.established(),
            marks.way_back(),
            marks.app(),
            marks.carried(),
            marks.carried_over(),
        ];
        for (index, mark) in all.iter().enumerate() {
            assert_eq!(mark & mask, value);
            assert_eq!(mark & 0x6000, 0, "podman and Kubernetes translate by it");
            assert!(!all[..index].contains(mark));
        }
        assert_eq!(
            marks.captured(NUMBER_MAX) & Marks::KIND_MASK,
            marks.captured(0)
        );
        assert_ne!(marks.established() & Marks::KIND_MASK, marks.captured(0));
    }

    #[test]
    fn ranges_that_could_take_other_traffic_are_refused() {
        let good6 = "fd6d:6573:6800::/64";
        assert!(VipRanges::new("252.64.0.0/16", good6).is_ok());
        for bad in [
            "0.0.0.0/0",
            "8.8.0.0/16",
            "127.0.0.0/16",
            "252.64.0.0/8",
            "252.64.0.0/31",
            "252.64.0.1/16",
            "240.0.0.0/3",
            good6,
            "",
        ] {
            assert!(VipRanges::new(bad, good6).is_err(), "{bad}");
        }
        for bad in [
            "::/0",
            "2001:db8::/64",
            "fe80::/64",
            "fd00::1/64",
            "10.0.0.0/16",
        ] {
            assert!(VipRanges::new("10.7.0.0/16", bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn settings_that_would_harm_the_host_are_refused() {
        assert!(CaptureSettings::default().check().is_ok());
        let with = |change: fn(&mut CaptureSettings)| {
            let mut settings = CaptureSettings::default();
            change(&mut settings);
            settings.check().is_err()
        };
        assert!(with(|s| s.route_table = 254));
        assert!(with(|s| s.mark_base = 0x4d00_0001));
        assert!(with(|s| s.link = "lo".to_owned()));
        assert!(with(|s| s.link = "a-name-too-long-for-a-link".to_owned()));
        assert!(with(|s| s.table = "x y".to_owned()));
        assert!(with(|s| s.output_priority = 0));
        assert!(with(|s| s.input_priority = 0));
        for bridge in ["", "lo", "mesh0", "a/b", "a-name-too-long-for-a-link"] {
            let settings = CaptureSettings {
                bridges: vec!["podman0".to_owned(), bridge.to_owned()],
                ..CaptureSettings::default()
            };
            assert!(settings.check().is_err(), "{bridge}");
        }
        assert!(with(|s| s.bridges = vec!["podman0".to_owned(); 17]));
    }
}
