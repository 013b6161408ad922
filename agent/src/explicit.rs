//! Local ports and unix sockets that lead to a service, as workload files say: for programs that can not be captured, and
//! for hosts whose agent has no privileges. Each belongs to one workload: who calls is told by the kernel at each
//! connection, and nobody else is let through (`outbound.rs`).

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::FileTypeExt as _;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use mesh_api::workload_file::CallAt;
use nix::sys::stat::{Mode, fchmod, umask};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::data::DataPlane;
use crate::handing::Handing;
use crate::workloads::WorkloadSet;

/// How often what could not be opened is tried again: a directory that is not there yet, a port that another has.
const RETRY: Duration = Duration::from_secs(5);
const BACKLOG: i32 = 1_024;
/// The kernel says who connects: that, and not the mode, decides who may call. Who may reach the socket at all is for the
/// mode of its directory to say.
const SOCKET_MODE: u32 = 0o666;

/// What could not be opened, and why.
pub(crate) type Closed = BTreeMap<CallAt, String>;

/// Where a workload calls without capture.
#[derive(Debug)]
pub(crate) enum LocalListener {
    Port(std::net::TcpListener),
    Socket(UnixListener),
}

/// The owner of all of them.
#[derive(Debug)]
pub(crate) struct Explicit {
    sets: watch::Receiver<Arc<WorkloadSet>>,
    plane: Arc<DataPlane>,
    status: watch::Sender<Arc<Closed>>,
    open: BTreeSet<CallAt>,
}

impl Explicit {
    pub(crate) fn new(
        sets: watch::Receiver<Arc<WorkloadSet>>,
        plane: Arc<DataPlane>,
        status: watch::Sender<Arc<Closed>>,
    ) -> Self {
        Self {
            sets,
            plane,
            status,
            open: BTreeSet::new(),
        }
    }

    /// Follows the workload files until `stop`.
    pub(crate) async fn run(
        mut self,
        handing: Handing,
        stop: CancellationToken,
    ) -> anyhow::Result<()> {
        loop {
            self.follow().await?;
            let retry = !self.status.borrow().is_empty();
            tokio::select! {
                () = stop.cancelled() => break,
                // The other worker opens its own in their places.
                () = handing.begun() => return Ok(()),
                changed = self.sets.changed() => match changed {
                    Ok(()) => (),
                    // All end at once, and it may be the first.
                    Err(_) if stop.is_cancelled() => break,
                    Err(error) => return Err(error).context("the owner of the workloads is gone"),
                },
                () = tokio::time::sleep(RETRY), if retry => (),
            }
        }
        for at in &self.open {
            forget(at);
        }
        Ok(())
    }

    async fn follow(&mut self) -> anyhow::Result<()> {
        let set = Arc::clone(&self.sets.borrow_and_update());
        let calls = set.workloads.iter().flat_map(|workload| &workload.calls);
        let wanted: BTreeSet<CallAt> = calls.map(|call| call.at.clone()).collect();
        if self.open.iter().any(|at| !wanted.contains(at)) {
            let kept: BTreeSet<CallAt> = self.open.intersection(&wanted).cloned().collect();
            self.plane.keep_local(kept.clone()).await;
            for gone in self.open.difference(&kept) {
                forget(gone);
            }
            self.open = kept;
        }
        let before = Arc::clone(&self.status.borrow());
        let mut closed = Closed::new();
        for at in wanted.difference(&self.open.clone()) {
            match listen(at) {
                Ok(listener) => {
                    self.plane.add_local(at, listener).await?;
                    self.open.insert(at.clone());
                }
                Err(error) => {
                    let error = error.to_string();
                    if before.get(at) != Some(&error) {
                        log::error!(at:% = at; "a local port or socket could not be opened: {error}; it is tried again");
                    }
                    closed.insert(at.clone(), error);
                }
            }
        }
        if *before != closed {
            self.status.send_replace(Arc::new(closed));
        }
        Ok(())
    }
}

fn listen(at: &CallAt) -> io::Result<LocalListener> {
    match at {
        CallAt::Port(address) => port(*address).map(LocalListener::Port),
        CallAt::Socket(path) => socket(path).map(LocalListener::Socket),
    }
}

fn port(address: SocketAddr) -> io::Result<std::net::TcpListener> {
    let socket = Socket::new(
        Domain::for_address(address),
        Type::STREAM.nonblocking().cloexec(),
        Some(Protocol::TCP),
    )?;
    // After a restart old connections still stand in TIME_WAIT.
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

fn socket(path: &Path) -> io::Result<UnixListener> {
    let address = SockAddr::unix(path)?;
    match std::fs::symlink_metadata(path) {
        Ok(found) if found.file_type().is_socket() && is_left_over(&address)? => {
            std::fs::remove_file(path)?;
        }
        _ => {}
    }
    let socket = unix_socket()?;
    // Before it has a name: whoever owns the directory could put something else in its place.
    fchmod(&socket, Mode::from_bits_truncate(SOCKET_MODE))?;
    // Nothing else of this process relies on it: what it writes has a mode of its own.
    let masked = umask(Mode::empty());
    let bound = socket.bind(&address);
    umask(masked);
    bound?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// Whether a worker before this one left it and nobody listens there. Who listens and is busy is not waited for.
fn is_left_over(address: &SockAddr) -> io::Result<bool> {
    let refused = unix_socket()?.connect(address).err();
    Ok(refused.is_some_and(|error| error.kind() == io::ErrorKind::ConnectionRefused))
}

fn unix_socket() -> io::Result<Socket> {
    Socket::new(Domain::UNIX, Type::STREAM.nonblocking().cloexec(), None)
}

/// Takes a socket out of its directory. A port needs nothing.
fn forget(at: &CallAt) {
    if let CallAt::Socket(path) = at
        && let Err(error) = std::fs::remove_file(path)
        && error.kind() != io::ErrorKind::NotFound
    {
        log::warn!(
            "{} stays, and nobody answers there: {error}",
            path.display()
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_that_was_left_is_replaced_and_a_file_is_not() {
        let dir = std::env::temp_dir().join(format!("explicit-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let path = dir.join("a.sock");
        drop(socket(&path).unwrap());
        let living = socket(&path).unwrap();
        assert!(socket(&path).is_err(), "somebody answers there");
        drop(living);
        forget(&CallAt::Socket(path.clone()));
        std::fs::write(&path, "a file").unwrap();
        assert!(socket(&path).is_err());
        assert_eq!(std::fs::read(&path).unwrap(), b"a file");
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
