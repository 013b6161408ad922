//! Wires the agent into the host's resolver, keeps it so when other programs take that away, and undoes it.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use mesh_core::vip::VipRanges;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::wiring::{Chosen, Way};
use super::{Sockets, dnsmasq, resolv_conf, resolved, zones};
use crate::config::Config;
use crate::metrics::Metrics;
use crate::status::NamesStatus;

/// How often it is looked whether all stands as it was wired.
const EVERY: Duration = Duration::from_secs(5);
/// In how many of these looks a program is asked that is not when nothing seems to have changed: once a minute.
const CLOSER: u32 = 12;

#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error(transparent)]
    ResolvConf(#[from] resolv_conf::Error),
    #[error(transparent)]
    Resolved(#[from] resolved::Error),
    #[error(transparent)]
    Dnsmasq(#[from] dnsmasq::Error),
    #[error(
        "names are answered at port {port}, where resolvers of the way `{way}` do not ask; restart the agent \
         (`systemctl restart mesh-agent`): a reload keeps the port"
    )]
    Port { way: Way, port: u16 },
}

/// One way, with all that it needs.
#[derive(Clone, Debug)]
pub(crate) enum Wired {
    ResolvConf { path: PathBuf, server: SocketAddr },
    Resolved(resolved::Wish),
    Dnsmasq(dnsmasq::Place, dnsmasq::Wish),
    Off,
}

impl Wired {
    fn of(way: Way, config: &Config, server: SocketAddr, domains: Vec<String>) -> Self {
        match way {
            Way::ResolvConf => Self::ResolvConf {
                path: config.dns.resolv_conf.clone(),
                server,
            },
            Way::Resolved => Self::Resolved(resolved::Wish {
                link: config.capture.link.clone(),
                server,
                domains,
            }),
            Way::Dnsmasq => Self::Dnsmasq(place(config), dnsmasq::Wish { server, domains }),
            Way::Off => Self::Off,
        }
    }

    const fn way(&self) -> Way {
        match self {
            Self::ResolvConf { .. } => Way::ResolvConf,
            Self::Resolved(_) => Way::Resolved,
            Self::Dnsmasq(..) => Way::Dnsmasq,
            Self::Off => Way::Off,
        }
    }

    /// True if anything was changed.
    fn wire(&self) -> Result<bool, Error> {
        match self {
            Self::ResolvConf { path, server } => {
                needs(Way::ResolvConf, server.port())?;
                let wired = resolv_conf::wire(path, server.ip())?;
                if wired.changed && wired.displaced > 0 {
                    log::warn!(
                        file:% = path.display(), servers = wired.displaced;
                        "resolvers read three servers only: these are reached through the agent alone"
                    );
                }
                Ok(wired.changed)
            }
            Self::Resolved(wish) => Ok(resolved::wire(wish)?),
            Self::Dnsmasq(place, wish) => {
                needs(Way::Dnsmasq, wish.server.port())?;
                Ok(place.wire(wish)?)
            }
            Self::Off => Ok(false),
        }
    }

    /// Whether it stands, as far as that is told at no cost.
    fn is_wired(&self) -> Result<bool, Error> {
        match self {
            Self::ResolvConf { path, server } => Ok(resolv_conf::is_wired(path, server.ip())?),
            Self::Dnsmasq(place, wish) => Ok(place.is_wired(wish)?),
            Self::Resolved(_) | Self::Off => Ok(true),
        }
    }

    fn trace(&self) -> Option<resolved::Trace> {
        match self {
            Self::Resolved(wish) => Some(resolved::Trace::of(&wish.link)),
            _ => None,
        }
    }
}

fn needs(way: Way, port: u16) -> Result<(), Error> {
    match way.works_at(port) {
        true => Ok(()),
        false => Err(Error::Port { way, port }),
    }
}

/// How the agent is wired in, for as long as a worker serves.
#[derive(Debug)]
pub(crate) struct Keeper {
    wired: Arc<Wired>,
    metrics: Arc<Metrics>,
    status: watch::Sender<NamesStatus>,
    trace: Option<resolved::Trace>,
    looks: u32,
}

impl Keeper {
    /// `None` if names are answered at no address.
    pub(crate) fn new(
        config: &Config,
        chosen: &Chosen,
        (sockets, suffix, ranges): (&Sockets, &str, &VipRanges),
        metrics: Arc<Metrics>,
    ) -> Option<(Self, watch::Receiver<NamesStatus>)> {
        let server = own_address(sockets)?;
        let domains = zones::all(suffix, ranges);
        let (status, seen) = watch::channel(NamesStatus {
            wiring: chosen.way.name().to_owned(),
            why: chosen.why.clone(),
            server: server.to_string(),
            ..NamesStatus::default()
        });
        let keeper = Self {
            wired: Arc::new(Wired::of(chosen.way, config, server, domains)),
            metrics,
            status,
            trace: None,
            looks: 0,
        };
        Some((keeper, seen))
    }

    /// Undoes what other ways left, and wires this one.
    pub(crate) async fn begin(&mut self, config: &Config) {
        let (way, config) = (self.wired.way(), config.clone());
        blocking(move || undo_others(&config, way)).await;
        let done = self.wire().await;
        let status = self.status.borrow().clone();
        match done {
            Ok(_) => {
                log::info!(wiring = status.wiring, server = status.server; "mesh names are wired in: {}", status.why);
            }
            Err(error) => log::warn!("mesh names are not wired in: {error}"),
        }
    }

    async fn wire(&mut self) -> Result<bool, String> {
        let wired = Arc::clone(&self.wired);
        let done = blocking(move || wired.wire()).await;
        let done = done.map_err(|error| error.to_string());
        self.trace = self.wired.trace();
        let error = done.as_ref().err().cloned();
        self.status.send_modify(|status| status.error = error);
        done
    }

    /// Puts back what other programs take away.
    pub(crate) async fn keep(mut self, draining: CancellationToken) -> Result<(), Infallible> {
        loop {
            tokio::select! {
                // Once it was taken away at the end it must not come back.
                biased;
                () = draining.cancelled() => return Ok(()),
                () = tokio::time::sleep(EVERY) => (),
            }
            self.look().await;
        }
    }

    async fn look(&mut self) {
        let before = self.status.borrow().error.clone();
        self.looks = self.looks.wrapping_add(1);
        let changed = self.wired.trace() != self.trace || self.looks.is_multiple_of(CLOSER);
        let seems_well = !(self.trace.is_some() && changed);
        if before.is_none() && seems_well && self.wired.is_wired().is_ok_and(|wired| wired) {
            return;
        }
        match self.wire().await {
            Ok(false) => {}
            Ok(true) if before.is_none() => {
                self.metrics.names_repaired();
                self.status.send_modify(|status| status.repaired += 1);
                log::warn!(
                    wiring = self.wired.way().name();
                    "another program took mesh names out of the host's resolver; they are wired in again"
                );
            }
            Ok(true) => log::info!("mesh names are wired in"),
            Err(error) if before.as_ref() != Some(&error) => {
                log::warn!(
                    "mesh names are not wired in: {error}; it is tried again every {} s",
                    EVERY.as_secs()
                );
            }
            Err(_) => {}
        }
    }
}

/// Files and programs of the host, which may be slow.
async fn blocking<T: Send + 'static>(step: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(step).await {
        Ok(done) => done,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}

/// Where resolvers of this host reach us: IPv4 where there is one.
fn own_address(sockets: &Sockets) -> Option<SocketAddr> {
    let addresses = sockets.udp.iter().filter_map(|s| s.local_addr().ok());
    addresses.min_by_key(SocketAddr::is_ipv6)
}

fn place(config: &Config) -> dnsmasq::Place {
    dnsmasq::Place {
        dir: config.dns.dnsmasq_dir.clone(),
        state_dir: config.state_dir.clone(),
        runtime_dir: config.runtime_dir.clone(),
    }
}

/// The file, where there is one to change.
fn file(config: &Config) -> Option<&Path> {
    let path = config.dns.resolv_conf.as_path();
    (!path.as_os_str().is_empty()).then_some(path)
}

/// What an agent wired in another way before. What can not be undone is said.
pub(crate) fn undo_others(config: &Config, way: Way) {
    let mut done: Vec<Result<bool, Error>> = Vec::new();
    if way != Way::ResolvConf
        && let Some(path) = file(config)
    {
        done.push(resolv_conf::unwire(path).map_err(Error::from));
    }
    if way != Way::Dnsmasq {
        done.push(place(config).unwire().map_err(Error::from));
    }
    if way != Way::Resolved {
        done.push(resolved::unwire(&config.capture.link).map_err(Error::from));
    }
    for error in done.into_iter().filter_map(Result::err) {
        log::warn!("how mesh names were wired in before is not undone: {error}");
    }
}

/// When the agent stops: resolvers ask it no more, but for dnsmasq, which would have to be started anew each time.
pub(crate) fn pause(config: &Config) {
    let file = file(config).map(|path| resolv_conf::unwire(path).map_err(Error::from));
    let link = resolved::unwire(&config.capture.link).map_err(Error::from);
    for error in file.into_iter().chain([link]).filter_map(Result::err) {
        log::warn!("mesh names stay wired in, and resolvers pass over them after a time: {error}");
    }
}

/// When this host leaves the mesh, also what an agent left that was killed, whichever way it had.
pub(crate) fn undo(config: &Config) -> Result<(), Error> {
    if let Some(path) = file(config) {
        resolv_conf::unwire(path)?;
    }
    resolved::unwire(&config.capture.link)?;
    place(config).unwire_and_restart()?;
    Ok(())
}
