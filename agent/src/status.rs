//! How the agent stands: what the admin socket answers at `/state`, and the same for people (`mesh-agent status`).

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use mesh_core::reason::Reason;
use mesh_runtime::clock;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::Mistyped;
use crate::bypass::Open;
use crate::limits::Limit;

/// How long the daemon may take to answer: it may ask others meanwhile.
const ANSWER_MAX: Duration = Duration::from_secs(20);
/// Largest answer: 256 workloads of 64 services.
const BYTES_MAX: u64 = 16 * 1024 * 1024;

/// Everything that an operator may ask of an agent. Times are Unix seconds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Status {
    pub(crate) version: String,
    pub(crate) host: String,
    pub(crate) host_uid: String,
    pub(crate) trust_domain: String,
    pub(crate) network: String,
    pub(crate) address: String,
    pub(crate) control: ControlStatus,
    pub(crate) index: Option<IndexStatus>,
    /// Revision of the policies in use; none were ever received: nobody is let in.
    pub(crate) policies: Option<u64>,
    /// The list of what was revoked can not be read: nobody is believed.
    #[serde(default)]
    pub(crate) revocations_unknown: bool,
    /// Services whose endpoints are known.
    pub(crate) endpoints_known: usize,
    pub(crate) capture: CaptureStatus,
    pub(crate) door: DoorStatus,
    /// Workers of before, which carry what was open when another took over.
    #[serde(default)]
    pub(crate) draining_workers: usize,
    /// Why the last reload was given up: then the program of before runs.
    #[serde(default)]
    pub(crate) reload_given_up: Option<String>,
    /// Root opened this host to plaintext.
    #[serde(default)]
    pub(crate) bypass: Option<Open>,
    /// Identity of programs that match no workload.
    pub(crate) host_leaf: LeafStatus,
    pub(crate) workloads: Vec<WorkloadStatus>,
    /// Files of services.d that are wrong, with line and remedy.
    pub(crate) file_problems: Vec<String>,
    /// How long everything goes on without control: the shortest life left of a certificate.
    pub(crate) autonomy_s: Option<i64>,
    pub(crate) dns: BTreeMap<String, u64>,
    /// How the host's resolver comes to ask the agent; `None`: names are not answered.
    #[serde(default)]
    pub(crate) names: Option<NamesStatus>,
    /// What is in use of the bounds of the data path.
    pub(crate) in_use: Vec<UsageStatus>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct UsageStatus {
    /// The bound's name in metrics and docs.
    pub(crate) limit: String,
    pub(crate) used: u64,
    pub(crate) max: u64,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ControlStatus {
    /// live, greeting, connecting or waiting
    pub(crate) session: String,
    pub(crate) address: String,
    pub(crate) version: String,
    /// This host's clock less control's, milliseconds, as the last beat of control told it.
    pub(crate) clock_offset_ms: Option<i64>,
    /// Set while the session is not live: what is in use is as old as this.
    pub(crate) stale_since_s: Option<u64>,
    pub(crate) last_error: Option<String>,
    pub(crate) last_reason: Option<String>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct IndexStatus {
    pub(crate) epoch: u64,
    pub(crate) revision: u64,
    pub(crate) services: usize,
    /// One of them, whose name `check` asks the host's resolver for.
    pub(crate) example: Option<ExampleStatus>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ExampleStatus {
    pub(crate) dns_name: String,
    pub(crate) vip4: String,
    pub(crate) vip6: String,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct CaptureStatus {
    /// Whether the kernel knows exactly what the files say.
    pub(crate) applied: bool,
    pub(crate) error: Option<String>,
    /// Whether anything is taken over at all.
    pub(crate) enabled: bool,
    /// Local ports and sockets that could not be opened, and why.
    pub(crate) closed: Vec<String>,
    /// Real addresses at which calls are taken over, and how many more there are than can be.
    pub(crate) reals: usize,
    pub(crate) reals_left_out: usize,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct NamesStatus {
    /// resolved, dnsmasq, resolv_conf or off
    pub(crate) wiring: String,
    /// Why this one.
    pub(crate) why: String,
    /// Where the agent answers.
    pub(crate) server: String,
    /// Why it is not in place.
    pub(crate) error: Option<String>,
    /// How often it was put back.
    pub(crate) repaired: u64,
}

/// How the input door stands, which looks at plaintext callers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct DoorStatus {
    /// Ports at which plaintext callers are looked for.
    pub(crate) ports: usize,
    /// Control was not reached after a change: it refuses nothing new.
    pub(crate) disarmed: bool,
    /// There were more callers than can be told apart.
    pub(crate) overflowed: bool,
    /// How often what other programs took away was put back.
    pub(crate) repaired: u64,
    pub(crate) error: Option<String>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LeafStatus {
    pub(crate) identity: String,
    pub(crate) left_s: Option<i64>,
    pub(crate) refused: Option<RefusalStatus>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct RefusalStatus {
    pub(crate) reason: String,
    pub(crate) message: String,
    pub(crate) remedy: String,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct WorkloadStatus {
    pub(crate) account: String,
    pub(crate) owner: String,
    pub(crate) number: u16,
    pub(crate) leaf: LeafStatus,
    pub(crate) problem: Option<String>,
    pub(crate) refused: Option<RefusalStatus>,
    pub(crate) services: Vec<ServiceStatus>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ServiceStatus {
    pub(crate) name: String,
    pub(crate) ports: Vec<u16>,
    /// healthy, unhealthy, unknown, draining, not checked or not served
    pub(crate) health: String,
    /// Servers without an agent to which this host goes on in plaintext.
    #[serde(default)]
    pub(crate) plaintext: Vec<String>,
    /// What is wrong with its ports on this host, or with servers beyond it.
    pub(crate) problems: Vec<String>,
    /// Why control does not list it.
    pub(crate) refused: Option<RefusalStatus>,
}

impl Status {
    /// The status as a page for people, at a moment.
    pub(crate) fn render(&self, now_s: u64) -> String {
        let mut page = String::new();
        // Writing to a string does not fail.
        let _ = self.write(&mut page, now_s);
        page
    }

    /// Only what of this host is in the mesh.
    pub(crate) fn render_workloads(&self) -> String {
        let mut page = String::new();
        let _ = self.write_workloads(&mut page);
        for problem in &self.file_problems {
            let _ = writeln!(page, "\nfile {problem}");
        }
        page
    }

    fn write(&self, page: &mut String, now_s: u64) -> std::fmt::Result {
        writeln!(
            page,
            "host         {} ({}) in {}",
            self.host, self.address, self.trust_domain
        )?;
        writeln!(page, "agent        {}", self.version)?;
        writeln!(page, "network      {}", self.network)?;
        self.write_control(page, now_s)?;
        match &self.index {
            Some(index) => writeln!(
                page,
                "mesh         {} services known, revision {}; endpoints of {} services in use",
                index.services, index.revision, self.endpoints_known
            )?,
            None => writeln!(page, "mesh         no services known yet")?,
        }
        if self.policies.is_none() {
            writeln!(
                page,
                "policies     none were received yet: nobody is let in"
            )?;
        }
        if self.revocations_unknown {
            writeln!(
                page,
                "revocations  CAN NOT BE READ from disk: all calls are refused until control is reached"
            )?;
        }
        match &self.capture.error {
            Some(error) => writeln!(
                page,
                "capture      FAILED, what was before stays in force: {error}"
            )?,
            None if !self.capture.enabled => {
                writeln!(
                    page,
                    "capture      off: only local ports and sockets lead into the mesh"
                )?;
            }
            None if self.capture.applied => writeln!(page, "capture      in force")?,
            None => writeln!(page, "capture      being set up")?,
        }
        self.write_names(page)?;
        if let Some(why) = &self.reload_given_up {
            writeln!(
                page,
                "reload       GIVEN UP, the program of before runs: {why}"
            )?;
        }
        if let Some(open) = &self.bypass {
            writeln!(
                page,
                "bypass       OPEN TO PLAINTEXT {open}; `mesh-agent bypass --end` closes it"
            )?;
        }
        if self.draining_workers > 0 {
            let workers = self.draining_workers;
            writeln!(
                page,
                "draining     {workers} workers of before carry what was open then"
            )?;
        }
        if let Some(left) = self.autonomy_s
            && !self.is_removed()
        {
            writeln!(page, "autonomy     {} without control", span(left))?;
        }
        for service in self.workloads.iter().flat_map(|w| &w.services) {
            if !service.plaintext.is_empty() {
                let servers = service.plaintext.join(", ");
                let name = &service.name;
                writeln!(page, "plaintext    {name} beyond this host: {servers}")?;
            }
        }
        for problem in &self.file_problems {
            writeln!(page, "file         {problem}")?;
        }
        self.write_in_use(page)?;
        match self.problems() {
            0 => writeln!(page, "problems     none")?,
            count => writeln!(page, "problems     {count}")?,
        }
        writeln!(page)?;
        self.write_workloads(page)
    }

    /// Whether control said that this host is out of the mesh.
    pub(crate) fn is_removed(&self) -> bool {
        let reason = self.control.last_reason.as_deref();
        reason == Some(Reason::HostRevoked.code())
    }

    /// How many things somebody should look at.
    fn problems(&self) -> usize {
        let host = self.file_problems.len()
            + usize::from(self.control.stale_since_s.is_some())
            + usize::from(self.capture.error.is_some())
            + usize::from(self.policies.is_none())
            + usize::from(self.revocations_unknown)
            + usize::from(self.reload_given_up.is_some())
            + usize::from(
                self.names
                    .as_ref()
                    .is_some_and(|names| names.error.is_some()),
            )
            + usize::from(self.bypass.is_some())
            + usize::from(self.host_leaf.refused.is_some());
        let workloads = self.workloads.iter().map(|w| w.problems().len());
        host + workloads.sum::<usize>()
    }

    fn write_names(&self, page: &mut String) -> std::fmt::Result {
        let Some(names) = &self.names else {
            return writeln!(page, "names        not answered");
        };
        match &names.error {
            Some(error) => writeln!(
                page,
                "names        NOT WIRED IN by {}: {error}",
                names.wiring
            ),
            None => writeln!(
                page,
                "names        by {} at {}: {}",
                names.wiring, names.server, names.why
            ),
        }
    }

    fn write_control(&self, page: &mut String, now_s: u64) -> std::fmt::Result {
        let control = &self.control;
        let address = &control.address;
        if self.is_removed() {
            return writeln!(
                page,
                "control      REMOVED: the operator took this host out of the mesh ({}); to join it again:\n             \
                 1. stop the agent  2. `mesh-agent leave`  3. `mesh-agent join <token>` with a new token",
                Reason::HostRevoked
            );
        }
        match control.stale_since_s {
            None => writeln!(page, "control      live at {address}")?,
            Some(0) => writeln!(
                page,
                "control      {} {address}, never reached",
                control.session
            )?,
            Some(since) => {
                let ago = i64::try_from(now_s.saturating_sub(since)).unwrap_or(i64::MAX);
                writeln!(
                    page,
                    "control      NOT REACHED ({} {address}); what is in use is stale since {} ({})",
                    control.session,
                    span(ago) + " ago",
                    clock::rfc3339(since)
                )?;
            }
        }
        if let Some(error) = &control.last_error {
            let reason = control.last_reason.as_deref();
            let reason = reason.map(|r| format!("{r}: ")).unwrap_or_default();
            writeln!(page, "             {reason}{error}")?;
        }
        Ok(())
    }

    fn write_in_use(&self, page: &mut String) -> std::fmt::Result {
        let words = self.in_use.iter().map(|usage| {
            let UsageStatus { limit, used, max } = usage;
            if limit == Limit::Buffers.name() {
                let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
                return format!("{limit} {:.1} of {:.0} MiB", mib(*used), mib(*max));
            }
            format!("{limit} {used} of {max}")
        });
        let words: Vec<String> = words.collect();
        // As many as fit into a line of a terminal.
        for (line, words) in words.chunks(4).enumerate() {
            let title = if line == 0 { "in use" } else { "" };
            writeln!(page, "{title:<12} {}", words.join(", "))?;
        }
        Ok(())
    }

    fn write_workloads(&self, page: &mut String) -> std::fmt::Result {
        let mut rows =
            vec![["WORKLOAD", "OWNER", "CERTIFICATE", "SERVICE", "HEALTH"].map(str::to_owned)];
        rows.push([
            self.host_leaf.identity.clone(),
            "all others".to_owned(),
            self.host_leaf.word(),
            "-".to_owned(),
            "-".to_owned(),
        ]);
        for workload in &self.workloads {
            let mut first = [
                workload.account.clone(),
                workload.owner.clone(),
                workload.leaf.word(),
            ];
            if workload.services.is_empty() {
                let [account, owner, leaf] = first.clone();
                rows.push([account, owner, leaf, "-".to_owned(), "-".to_owned()]);
            }
            for service in &workload.services {
                let [account, owner, leaf] = std::mem::take(&mut first);
                let ports: Vec<String> = service.ports.iter().map(u16::to_string).collect();
                let name = format!("{}:{}", service.name, ports.join(","));
                let health = match &service.refused {
                    Some(refused) if refused.reason != service.health => {
                        format!("{}, {}", service.health, refused.reason)
                    }
                    _ => service.health.clone(),
                };
                rows.push([account, owner, leaf, name, health]);
            }
        }
        table(page, &rows)?;
        for workload in &self.workloads {
            for problem in workload.problems() {
                writeln!(page, "\n{problem}")?;
            }
        }
        Ok(())
    }
}

impl WorkloadStatus {
    /// Each a line. What control says twice, of the certificate and of the report, is one.
    fn problems(&self) -> Vec<String> {
        let account = &self.account;
        let mut problems = Vec::new();
        problems.extend(self.problem.iter().map(|p| format!("{account}: {p}")));
        let own: Vec<&RefusalStatus> = self.leaf.refused.iter().chain(&self.refused).collect();
        let mut told: Vec<&str> = Vec::new();
        for refused in own {
            if !told.contains(&refused.reason.as_str()) {
                told.push(&refused.reason);
                problems.push(format!("{account}: {}", refused.line()));
            }
        }
        for service in &self.services {
            let name = &service.name;
            let found = service.problems.iter();
            problems.extend(found.map(|p| format!("{account} {name}: {p}")));
            if let Some(refused) = &service.refused
                && !told.contains(&refused.reason.as_str())
            {
                problems.push(format!("{account} {name}: {}", refused.line()));
            }
        }
        problems
    }
}

impl LeafStatus {
    fn word(&self) -> String {
        match (&self.refused, self.left_s) {
            (Some(refused), None) => format!("refused: {}", refused.reason),
            (_, None) => "none yet".to_owned(),
            (_, Some(left)) if left <= 0 => "EXPIRED".to_owned(),
            (_, Some(left)) => format!("{} left", span(left)),
        }
    }
}

impl RefusalStatus {
    fn line(&self) -> String {
        let of_reason = Reason::ALL.iter().find(|r| r.code() == self.reason);
        // Control's message is the reason's text or a more exact one; behind it that text says nothing new.
        if of_reason.is_some_and(|reason| reason.text() == self.remedy) {
            return format!("{}: {}", self.reason, self.message);
        }
        format!("{}: {}; {}", self.reason, self.message, self.remedy)
    }
}

/// A length of time in its two largest units.
pub(crate) fn span(seconds: i64) -> String {
    let (days, hours, minutes) = (seconds / 86_400, seconds / 3_600 % 24, seconds / 60 % 60);
    match seconds {
        ..0 => "0 s".to_owned(),
        0..60 => format!("{seconds} s"),
        60..3_600 => format!("{minutes} min"),
        3_600..86_400 => format!("{hours} h {minutes} min"),
        _ => format!("{days} d {hours} h"),
    }
}

pub(crate) fn table<const N: usize>(page: &mut String, rows: &[[String; N]]) -> std::fmt::Result {
    let mut widths = [0; N];
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = cell.chars().count().max(*width);
        }
    }
    for row in rows {
        let cells = row.iter().zip(widths);
        let line: Vec<String> = cells.map(|(cell, w)| format!("{cell:w$}")).collect();
        writeln!(page, "{}", line.join("  ").trim_end())?;
    }
    Ok(())
}

/// Asks the running daemon for what it answers at `path`; `None` when none runs.
pub(crate) fn ask<T: DeserializeOwned>(socket: &Path, path: &str) -> anyhow::Result<Option<T>> {
    request(socket, "GET", path)
}

/// The same by another method.
pub(crate) fn request<T: DeserializeOwned>(
    socket: &Path,
    method: &str,
    path: &str,
) -> anyhow::Result<Option<T>> {
    let name = socket.display();
    let mut stream = match UnixStream::connect(socket) {
        Ok(stream) => stream,
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => {
            bail!("only root may ask the agent at {name}; mesh-agent needs root, run it with sudo")
        }
        Err(_) => return Ok(None),
    };
    let mut get = || -> std::io::Result<String> {
        stream.set_read_timeout(Some(ANSWER_MAX))?;
        // HTTP/1.0: the answer ends with the connection and is never chunked.
        write!(stream, "{method} {path} HTTP/1.0\r\nHost: agent\r\n\r\n")?;
        let mut text = String::new();
        (&stream).take(BYTES_MAX).read_to_string(&mut text)?;
        Ok(text)
    };
    let answer = get().with_context(|| format!("the agent at {name} does not answer"))?;
    let (head, body) = answer
        .split_once("\r\n\r\n")
        .with_context(|| format!("{name} does not speak HTTP"))?;
    let first = head.lines().next().unwrap_or_default();
    // What was asked for is what somebody typed.
    ensure!(
        first.split(' ').nth(1) != Some("400"),
        Mistyped(body.trim().to_owned())
    );
    ensure!(
        first.split(' ').nth(1) == Some("200"),
        "the agent at {name} answered `{first}`: {}",
        body.trim()
    );
    let answer = serde_json::from_str(body)
        .with_context(|| format!("the agent at {name} is of another version"))?;
    Ok(Some(answer))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status() -> Status {
        Status {
            host: "vm-1".to_owned(),
            control: ControlStatus {
                session: "live".to_owned(),
                address: "10.0.0.9:7440".to_owned(),
                ..ControlStatus::default()
            },
            autonomy_s: Some(47 * 3600 + 60),
            in_use: vec![
                UsageStatus {
                    limit: "callers".to_owned(),
                    used: 12,
                    max: 100,
                },
                UsageStatus {
                    limit: "buffers".to_owned(),
                    used: 3 << 19,
                    max: 256 << 20,
                },
            ],
            workloads: vec![WorkloadStatus {
                account: "shop/web".to_owned(),
                owner: "unit nginx.service".to_owned(),
                leaf: LeafStatus {
                    left_s: Some(47 * 3600 + 60),
                    ..LeafStatus::default()
                },
                services: vec![ServiceStatus {
                    name: "shop/web".to_owned(),
                    ports: vec![80],
                    health: "healthy".to_owned(),
                    plaintext: vec!["10.9.0.5:5432".to_owned(), "[fd00::5]:5432".to_owned()],
                    problems: vec!["nothing listens on port 80".to_owned()],
                    refused: Some(RefusalStatus {
                        reason: "out_of_scope".to_owned(),
                        message: "not in the token".to_owned(),
                        remedy: "ask".to_owned(),
                    }),
                }],
                ..WorkloadStatus::default()
            }],
            ..Status::default()
        }
    }

    #[test]
    fn the_page_says_what_an_operator_needs() {
        let page = status().render(1_000_000);
        for expected in [
            "live at 10.0.0.9:7440",
            "autonomy     1 d 23 h",
            "shop/web:80",
            "plaintext    shop/web beyond this host: 10.9.0.5:5432, [fd00::5]:5432\n",
            "healthy, out_of_scope",
            "not in the token; ask",
            "in use       callers 12 of 100, buffers 1.5 of 256 MiB\n",
            "problems     3\n",
            "shop/web shop/web: nothing listens on port 80",
        ] {
            assert!(page.contains(expected), "{expected} is missing:\n{page}");
        }
        let mut stale = status();
        stale.control.stale_since_s = Some(1_000_000 - 720);
        let page = stale.render(1_000_000);
        assert!(
            page.contains("stale since 12 min ago (1970-01-12T13:34:40Z)"),
            "{page}"
        );
        stale.control.last_reason = Some("host_revoked".to_owned());
        let page = stale.render(1_000_000);
        assert!(
            page.contains("REMOVED") && !page.contains("NOT REACHED"),
            "{page}"
        );
        assert!(!page.contains("autonomy"), "{page}");
    }

    #[test]
    fn it_reads_back_as_the_socket_writes_it() {
        let text = serde_json::to_string(&status()).unwrap();
        assert_eq!(serde_json::from_str::<Status>(&text).unwrap(), status());
    }
}
