//! A real `mesh-control` on a host of its own, and `meshctl` beside it.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use crate::host::Host;
use crate::metrics::Metrics;
use crate::process::{Cmd, Output, Process};
use crate::site::Site;
use crate::wait::{SOON, check, wait_until};
use crate::{agent, binary, clock};

/// The trust domain of every site.
pub const TRUST_DOMAIN: &str = "corp.test";

#[derive(Debug)]
pub struct Control {
    pub host: Host,
    process: Option<Process>,
}

/// What a join token allows; the default is everything in namespace `shop`, once.
#[derive(Clone, Debug)]
pub struct TokenOptions(pub String);

impl Default for TokenOptions {
    fn default() -> Self {
        Self("--namespace shop".to_owned())
    }
}

impl Control {
    /// Makes a mesh and starts its control on a new host `control`.
    #[track_caller]
    pub fn start(site: &Site) -> Self {
        let host = site.host("control");
        let mut control = Self {
            host,
            process: None,
        };
        let init = control.host.program([
            control.program(),
            "init".to_owned(),
            "--trust-domain".to_owned(),
            TRUST_DOMAIN.to_owned(),
            "--state-dir".to_owned(),
            control.state_dir().display().to_string(),
            "--address".to_owned(),
            control.address(),
        ]);
        init.ok();
        control.run();
        control
    }

    /// Starts it again after it was stopped or killed.
    #[track_caller]
    pub fn run(&mut self) {
        self.run_as(|command, _| command);
    }

    /// The same with a wall clock that [`Self::step_clock`] steps; nothing else of the host sees it.
    #[track_caller]
    pub fn run_off_clock(&mut self, seconds: i64) {
        self.step_clock(seconds);
        self.run_as(clock::off);
    }

    /// From now on the wall clock of a control that was started off the clock is so many seconds off.
    #[track_caller]
    pub fn step_clock(&self, seconds: i64) {
        clock::step(&self.host, seconds);
    }

    fn to_run(&self) -> Cmd {
        let command = self.host.program([
            self.program(),
            "run".to_owned(),
            "--state-dir".to_owned(),
            self.state_dir().display().to_string(),
            "--listen".to_owned(),
            self.address(),
            "--listen".to_owned(),
            format!("[{}]:7440", self.host.v6()),
        ]);
        command.cgroup("control")
    }

    #[track_caller]
    fn run_as(&mut self, clock: impl Fn(Cmd, &Host) -> Cmd) {
        let mut process = clock(self.to_run(), &self.host).spawn("control");
        wait_until("control to answer", SOON, || {
            process.is_alive().unwrap_or_else(|e| panic!("{e}"));
            let status = clock(self.to_meshctl("status"), &self.host).output();
            check(status.status.success(), status.to_string())
        });
        self.process = Some(process);
    }

    /// The same control, to be run again by another thread than the one that asks it.
    pub fn same(&self) -> Self {
        Self {
            host: self.host.clone(),
            process: None,
        }
    }

    #[track_caller]
    pub fn stop(&mut self) {
        let process = self.take();
        assert!(process.stop().success(), "control did not end well");
    }

    #[track_caller]
    pub fn kill9(&mut self) {
        self.take().kill9();
    }

    /// The running process, to be killed from elsewhere; [`Control::run`] starts another.
    #[track_caller]
    pub fn take(&mut self) -> Process {
        self.process.take().expect("control runs")
    }

    /// Runs `meshctl` as the administrator that `init` made.
    #[track_caller]
    pub fn meshctl(&self, words: &str) -> Output {
        self.to_meshctl(words).output()
    }

    /// The same by the wall clock of a control that was started off the clock.
    #[track_caller]
    pub fn meshctl_off_clock(&self, words: &str) -> Output {
        clock::off(self.to_meshctl(words), &self.host).output()
    }

    fn to_meshctl(&self, words: &str) -> Cmd {
        let meshctl = binary("meshctl").display().to_string();
        let context = self.state_dir().join("admin.yaml");
        let context = context.display();
        self.host
            .cmd(&format!("{meshctl} --context {context} {words}"))
    }

    /// A list of `meshctl get … -o json`.
    #[track_caller]
    pub fn get(&self, words: &str) -> Vec<serde_json::Value> {
        let text = self.meshctl(&format!("get {words} -o json")).ok();
        let value: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        match value {
            serde_json::Value::Array(list) => list,
            serde_json::Value::Object(mut object) => match object.remove("items") {
                Some(serde_json::Value::Array(list)) => list,
                _ => vec![object.into()],
            },
            other => vec![other],
        }
    }

    /// Applies a document.
    #[track_caller]
    pub fn apply(&self, yaml: &str) -> Output {
        let file = self.host.dir().join("apply.yaml");
        fs::write(&file, yaml).expect("a file to apply");
        self.meshctl(&format!("apply -f {}", file.display()))
    }

    /// A join token with these options of `meshctl token create`.
    #[track_caller]
    pub fn token(&self, options: &str) -> String {
        let text = self.meshctl(&format!("token create {options}")).ok();
        text.trim().to_owned()
    }

    /// Joins `host` by a token of these options and starts its agent.
    #[track_caller]
    pub fn join(&self, host: &Host, options: &TokenOptions) -> agent::Agent {
        let agent = agent::Agent::new(host);
        agent.join(&self.token(&options.0)).ok();
        agent.started()
    }

    /// Waits until control lists this many answering endpoints of a service.
    #[track_caller]
    pub fn wait_endpoints(&self, service: &str, count: usize) {
        wait_until(&format!("{count} endpoints of {service}"), SOON, || {
            has_endpoints(
                &self.meshctl(&format!("get services {service} -o json")),
                count,
            )
        });
    }

    /// What it has logged since it was first started.
    pub fn log(&self) -> String {
        self.process.as_ref().map(Process::log).unwrap_or_default()
    }

    #[track_caller]
    pub fn metrics(&self) -> Metrics {
        let socket = self.state_dir().join("control.sock");
        wait_until("the metrics of control", SOON, || {
            let (status, body) = agent::get(&socket, "/metrics")?;
            check(status == 200, format!("{status} {body}")).map(|()| Metrics::parse(&body))
        })
    }

    /// How often it refused for this reason.
    #[track_caller]
    pub fn refused(&self, reason: &str) -> f64 {
        self.metrics()
            .sum("mesh_control_refused_total", &[("reason", reason)])
    }

    pub fn address(&self) -> String {
        format!("{}:7440", self.host.v4())
    }

    pub fn state_dir(&self) -> PathBuf {
        self.host.dir().join("state")
    }

    /// How long an agent may take to notice that control is gone: its silence and some more.
    pub const NOTICED: Duration = Duration::from_secs(40);

    #[expect(clippy::unused_self, reason = "reads as what it is at the call")]
    fn program(&self) -> String {
        binary("mesh-control").display().to_string()
    }
}

/// Whether a service, as `meshctl get services NAME -o json` shows it, has this many endpoints that answer.
pub(crate) fn has_endpoints(shown: &Output, count: usize) -> Result<(), String> {
    let value: serde_json::Value =
        serde_json::from_str(&shown.stdout).map_err(|_| shown.to_string())?;
    let endpoints = value.pointer("/status/endpoints");
    let endpoints = endpoints.and_then(|e| e.as_array()).cloned();
    let healthy = endpoints.unwrap_or_default();
    let healthy = healthy.iter().filter(|e| is_healthy(e)).count();
    check(healthy == count, format!("{healthy} of {value}"))
}

fn is_healthy(endpoint: &serde_json::Value) -> bool {
    endpoint.get("state").and_then(|s| s.as_str()) == Some("healthy")
}
