//! Leaving the mesh: every trace of the agent goes from this host, but for what its package and its operator put there.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use mesh_api::proto::mesh_client::MeshClient;
use mesh_api::{proto, sync};
use mesh_core::reason::Reason;
use mesh_runtime::tls::client_config;
use mesh_runtime::tls::trust::TrustStore;
use mesh_runtime::tls::verify::{Accept, Verifier};
use rustls::ClientConfig;

use crate::alone::{self, Alone};
use crate::capture;
use crate::config::Config;
use crate::control::{ALPN_H2, channel, dial, reason_of};
use crate::dns::keeper;
use crate::keys;
use crate::state::{Kept, Membership, State};

/// How long control may take for its answer.
const CALL_MAX: Duration = Duration::from_secs(6);

/// What this host was before it left.
#[derive(Debug)]
pub(crate) enum Left {
    /// A member, under this name; and whether control has heard of it.
    Host(String, anyhow::Result<()>),
    /// A member that can not be told by name: its file is damaged.
    Unnamed,
    /// No member; leftovers of an agent are gone too.
    Nothing,
}

impl fmt::Display for Left {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const LEFT: &str = "nothing of the mesh is left on this host";
        let by_hand = |f: &mut fmt::Formatter<'_>, name: &str, why: String| {
            writeln!(
                f,
                "{LEFT}; control still lists it, for it could not be told: {why}"
            )?;
            writeln!(
                f,
                "the operator removes it with\n  meshctl delete host {name}"
            )
        };
        match self {
            Self::Nothing => writeln!(
                f,
                "nothing to leave: this host is in no mesh; nothing of an agent is left on it"
            ),
            Self::Host(_, Ok(())) => writeln!(f, "{LEFT}, and control has forgotten it"),
            Self::Host(name, Err(error)) => by_hand(f, name, format!("{error:#}")),
            Self::Unnamed => by_hand(f, "NAME", "what it was can not be read".to_owned()),
        }
    }
}

/// Removes rules, routes, link, what the host's resolver was told, and all state, and tells control, which forgets this host. May be
/// repeated. Where control is not reached the host leaves all the same.
pub(crate) fn leave(config: &Config) -> anyhow::Result<Left> {
    let _alone = stopped(config)?;
    let state = State::new(&config.state_dir);
    let membership = state.membership();
    undo(config)?;
    let left = match membership {
        Ok(Some(membership)) => {
            let told = tell(&state, &membership);
            Left::Host(membership.host.name.to_string(), told)
        }
        Ok(None) => Left::Nothing,
        Err(_) => Left::Unnamed,
    };
    state.clear()?;
    alone::remove_runtime_dir(config);
    Ok(left)
}

/// Tells control that this host has left.
fn tell(state: &State, membership: &Membership) -> anyhow::Result<()> {
    let pair = state.agent()?.context("its credential is not there")?;
    let (key, _) = keys::read(&pair)?;
    let bundle: proto::TrustBundle = state
        .kept(Kept::Bundle)
        .context("its roots are not there")?;
    let control = Accept::Control(membership.host.trust_domain.clone());
    let verifier = Verifier::new(TrustStore::from_bundle(&bundle)?.shared(), control);
    let tls = Arc::new(client_config(Some(key), verifier, &[ALPN_H2])?);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let mut last = anyhow::anyhow!("no address of control is known");
        for address in &membership.control {
            match tell_one(address, &tls).await {
                Ok(()) => return Ok(()),
                Err(error) => last = error,
            }
        }
        Err(last)
    })
}

async fn tell_one(address: &str, tls: &Arc<ClientConfig>) -> anyhow::Result<()> {
    let stream = dial(address, Arc::clone(tls)).await;
    let stream = stream.map_err(|error| anyhow::anyhow!(error.text))?;
    let channel = channel(stream).await.map_err(anyhow::Error::msg)?;
    let mut client = MeshClient::new(channel);
    let answer = tokio::time::timeout(CALL_MAX, client.leave(proto::LeaveRequest {})).await;
    match answer.with_context(|| format!("control at {address} does not answer"))? {
        Ok(_) => Ok(()),
        // The operator was first.
        Err(status) if reason_of(&status).as_deref() == Some(Reason::HostRevoked.code()) => Ok(()),
        Err(status) => bail!(
            "control at {address} refused it: {}",
            sync::printable(status.message())
        ),
    }
}

/// Removes rules, routes, link and what the host's resolver was told, and keeps what the join gave this host. May be repeated.
pub(crate) fn open(config: &Config) -> anyhow::Result<()> {
    let _alone = stopped(config)?;
    undo(config)
}

/// The lock of the one agent. Where there is no such directory no agent runs.
fn stopped(config: &Config) -> anyhow::Result<Option<Alone>> {
    let lock = (config.runtime_dir.exists()).then(|| alone::alone(config));
    lock.transpose()
        .context("stop the agent first: `systemctl stop mesh-agent`, or end `mesh-agent run`")
}

/// What an agent did to the kernel and the resolver. None may run.
pub(crate) fn undo(config: &Config) -> anyhow::Result<()> {
    if config.capture.enabled {
        capture::remove_all(&config.capture)?;
    }
    keeper::undo(config)?;
    Ok(())
}
