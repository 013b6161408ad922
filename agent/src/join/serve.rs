//! After the enrolment, on a host with systemd: the unit is enabled and started, and the join is whole when it serves.
//! One that does not come to that is taken back, so that the host is as it was and the same command may be repeated.

use std::net::{SocketAddr, TcpListener};
use std::time::Duration;

use anyhow::Context as _;
use mesh_api::check::Checks;

use crate::capture::cgroup::CgroupTree;
use crate::config::Config;
use crate::state::State;
use crate::status::{self, Status};
use crate::units::{self, Before};
use crate::{check, leave};

/// How long what the checks look at may take to be so: control lists a host after it has reached it. A check that fails
/// for another reason holds a join up for as long.
const CHECKS_MAX: Duration = Duration::from_secs(10);

/// How this host stands after a join.
#[derive(Debug)]
pub(crate) struct Serving {
    pub(crate) checks: Checks,
    /// `None` where the agent ended meanwhile, which a check says too.
    pub(crate) status: Option<Status>,
}

impl Serving {
    /// What of this host is in the mesh now, for people.
    pub(crate) fn in_the_mesh(&self, services_dir: &str) -> String {
        let Some(status) = &self.status else {
            return String::new();
        };
        let page = status.render_workloads();
        if status.workloads.is_empty() && status.file_problems.is_empty() {
            return format!(
                "{page}\nno workload of this host is named yet: its programs call the mesh as the host; name them in {services_dir}\n"
            );
        }
        page
    }
}

/// Looks before control is asked whether the agent can be started by its unit here; `None` where it is not ours to start.
///
/// # Errors
/// When it would not come to serve.
pub(crate) fn servable(config: &Config, by_unit: bool) -> anyhow::Result<Option<Before>> {
    if !by_unit || !nix::unistd::geteuid().is_root() || !units::there() {
        return Ok(None);
    }
    let before = Before::of(units::AGENT);
    if !before.is_active() {
        for address in &config.mesh.listen {
            let address = SocketAddr::new(*address, config.mesh.listen_port);
            match TcpListener::bind(address) {
                Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => {
                    Err(error).with_context(|| {
                        format!(
                            "other agents could not reach this host: {address} is taken by another program (`ss -lntp` \
                             shows which); end it, or set mesh.listen_port"
                        )
                    })?;
                }
                // As on a host without IPv6: the agent says it.
                _ => {}
            }
        }
    }
    Ok(Some(before))
}

/// What an operator should know of a host before it is a member.
pub(crate) fn lacking() -> Vec<String> {
    let kernel =
        nix::sys::utsname::uname().map(|name| name.release().to_string_lossy().into_owned());
    units::lacking(&kernel.unwrap_or_default(), CgroupTree::find().is_ok())
}

/// Starts the agent and looks until it and the host are well. A host that was no member before is none again when the
/// agent can not be started.
pub(crate) fn serve(config: &Config, before: Before, new: bool) -> anyhow::Result<Serving> {
    if let Err(error) = units::start() {
        if !new {
            return Err(
                error.context("this host is a member as before, but its agent does not run")
            );
        }
        let undone = take_back(config, before);
        return Err(match undone {
            Ok(()) => error.context(
                "the agent did not come to serve, and this host is as it was; when the cause is gone the same command \
                 joins it by the same token",
            ),
            Err(left) => error.context(format!(
                "the agent did not come to serve, and not all of it could be taken back ({left:#}); `mesh-agent leave` \
                 does that"
            )),
        });
    }
    let checks = check::run(config, Some(CHECKS_MAX));
    let status = status::ask::<Status>(&config.admin_socket(), "/state");
    Ok(Serving {
        checks,
        status: status.ok().flatten(),
    })
}

fn take_back(config: &Config, before: Before) -> anyhow::Result<()> {
    units::stop(Some(before))?;
    leave::undo(config)?;
    State::new(&config.state_dir).take_back()
}
