//! A load that a host's unit puts on a service until it is told to end.

use std::time::Duration;

use crate::machine::Machine;
use crate::process::Process;
use crate::wait::{SOON, check, wait_until};

/// Connections that it keeps.
const CONNECTIONS: usize = 8;
/// It is told to end before that.
const LONGEST: Duration = Duration::from_secs(1800);

#[derive(Debug)]
pub struct Load {
    process: Process,
}

/// What wrk says at its end.
#[derive(Clone, Debug)]
pub struct Report {
    pub text: String,
    pub requests: u64,
}

impl Load {
    /// What is typed on the host.
    pub fn line(url: &str) -> String {
        format!(
            "wrk -t1 -c{CONNECTIONS} -d{}s --timeout {}s {url}",
            LONGEST.as_secs(),
            SOON.as_secs()
        )
    }

    /// wrk as a program of the unit; returns when it has its connections.
    #[track_caller]
    pub fn start(machine: &Machine, unit: &str, url: &str) -> Self {
        let line = format!("exec {}", Self::line(url));
        let mut process = machine.in_unit(unit, &line).spawn("wrk");
        wait_until("the load's connections", SOON, || {
            process.is_alive()?;
            let open = machine.ok("ss -Htnp state established");
            let open = open.lines().filter(|l| l.contains("\"wrk\"")).count();
            check(CONNECTIONS <= open, format!("{open} are open"))
        });
        Self { process }
    }

    /// Whether it goes on.
    #[track_caller]
    pub fn is_alive(&mut self) {
        self.process.is_alive().unwrap_or_else(|e| panic!("{e}"));
    }

    /// Ends it by Ctrl-C.
    #[track_caller]
    pub fn end(self, machine: &Machine) -> Report {
        machine.ok("pkill -INT -x wrk");
        let text = wait_until("the load's report", SOON, || {
            let text = self.process.log();
            check(text.contains("Requests/sec"), text.clone()).map(|()| text)
        });
        let line = text.lines().find(|line| line.contains(" requests in "));
        let requests = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
        let requests = requests.unwrap_or_else(|| panic!("no count: {text}"));
        Report { text, requests }
    }
}

impl Report {
    /// It names failures only where there were some.
    #[track_caller]
    pub fn assert_good(&self) {
        assert!(0 < self.requests, "{}", self.text);
        for failure in ["Socket errors", "Non-2xx"] {
            assert!(!self.text.contains(failure), "{}", self.text);
        }
    }
}
