//! Taking connections from the listeners of one thread. When there is no descriptor left for one more, it is taken and
//! reset with one that was kept for this: its caller knows at once, and what is open goes on.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use mesh_api::workload_file::CallAt;
use mesh_core::names::Account;
use tokio::net::{TcpListener, TcpStream, UnixListener};
use tokio::sync::watch;
use tokio::task::{AbortHandle, spawn_local};

use crate::data::Thread;
use crate::explicit::LocalListener;
use crate::limits::{self, Limit};
use crate::metrics::Direction;
use crate::{inbound, outbound, relay};

/// After an accept that failed for want of descriptors or memory, and shed nothing.
const PAUSE: Duration = Duration::from_millis(50);

/// Begins to serve connections to a local port or socket.
pub(crate) fn locally(
    thread: &Rc<Thread>,
    at: &CallAt,
    listener: LocalListener,
) -> io::Result<AbortHandle> {
    let (thread, at) = (Rc::clone(thread), at.clone());
    let task = match listener {
        LocalListener::Port(listener) => {
            relay::prepare_listener(&listener, &thread.settings.keepalive)?;
            spawn_local(at_port(thread, at, TcpListener::from_std(listener)?))
        }
        LocalListener::Socket(listener) => {
            spawn_local(at_socket(thread, at, UnixListener::from_std(listener)?))
        }
    };
    Ok(task.abort_handle())
}

/// Serves captured connections; `whose` is `None` for the common listener.
pub(crate) async fn callers(thread: Rc<Thread>, whose: Option<Account>, listener: TcpListener) {
    let mut door = Door::new(&thread, listener, Direction::Outbound);
    while let Some((socket, from)) = door.next().await {
        let Some(admission) = thread.admit(Direction::Outbound) else {
            relay::abort(socket);
            continue;
        };
        let (thread, whose) = (Rc::clone(&thread), whose.clone());
        spawn_local(async move {
            outbound::serve(&thread, whose, socket, from).await;
            drop(admission);
        });
    }
}

/// Serves a local port that leads to a service.
pub(crate) async fn at_port(thread: Rc<Thread>, at: CallAt, listener: TcpListener) {
    let mut door = Door::new(&thread, listener, Direction::Outbound);
    while let Some((socket, from)) = door.next().await {
        let Some(admission) = thread.admit(Direction::Outbound) else {
            relay::abort(socket);
            continue;
        };
        let (thread, at) = (Rc::clone(&thread), at.clone());
        spawn_local(async move {
            outbound::serve_port(&thread, &at, socket, from).await;
            drop(admission);
        });
    }
}

/// Serves a unix socket that leads to a service. It knows no reset: who is turned away sees an end.
pub(crate) async fn at_socket(thread: Rc<Thread>, at: CallAt, listener: UnixListener) {
    let mut draining = thread.draining.subscribe();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = draining.wait_for(|draining| *draining) => return,
        };
        let socket = match accepted {
            Ok((socket, _)) => socket,
            Err(error) => {
                if limits::out_of_descriptors(&error) && !thread.give_up_idle() {
                    thread.shed(Limit::Descriptors, Direction::Outbound);
                }
                tokio::time::sleep(PAUSE).await;
                continue;
            }
        };
        if limits::is_reserved(&socket) {
            thread.give_up_idle();
            thread.shed(Limit::Descriptors, Direction::Outbound);
            continue;
        }
        let Some(admission) = thread.admit(Direction::Outbound) else {
            continue;
        };
        let (thread, at) = (Rc::clone(&thread), at.clone());
        spawn_local(async move {
            outbound::serve_socket(&thread, &at, socket).await;
            drop(admission);
        });
    }
}

/// Serves peers. Those who come during a drain are told to go elsewhere: in the queue of a listener that nobody reads
/// they would wait.
pub(crate) async fn peers(thread: Rc<Thread>, listener: TcpListener) {
    let mut door = Door::new(&thread, listener, Direction::Inbound);
    while let Some((socket, from)) = door.next().await {
        let Some(admission) = thread.admit(Direction::Inbound) else {
            relay::abort(socket);
            continue;
        };
        let thread = Rc::clone(&thread);
        spawn_local(async move {
            inbound::serve(&thread, socket, from).await;
            drop(admission);
        });
    }
}

/// One listener.
struct Door {
    thread: Rc<Thread>,
    listener: TcpListener,
    direction: Direction,
    draining: watch::Receiver<bool>,
}

impl Door {
    fn new(thread: &Rc<Thread>, listener: TcpListener, direction: Direction) -> Self {
        Self {
            thread: Rc::clone(thread),
            listener,
            direction,
            draining: thread.draining.subscribe(),
        }
    }

    /// The next connection; `None` when the thread takes no more of this direction.
    async fn next(&mut self) -> Option<(TcpStream, SocketAddr)> {
        loop {
            let accepted = tokio::select! {
                accepted = self.listener.accept() => accepted,
                _ = self.draining.wait_for(|draining| *draining), if self.direction == Direction::Outbound => {
                    return None;
                }
            };
            match accepted {
                Ok((socket, _)) if limits::is_reserved(&socket) => {
                    self.thread.give_up_idle();
                    self.thread.shed(Limit::Descriptors, self.direction);
                    relay::abort(socket);
                }
                Ok((socket, from)) => {
                    if let Err(error) = socket.set_nodelay(true) {
                        // The connection is gone already.
                        log::debug!("an accepted connection is gone: {error}");
                        continue;
                    }
                    return Some((socket, from));
                }
                Err(error) if limits::out_of_descriptors(&error) => self.shed().await,
                // It was gone before it was taken.
                Err(error)
                    if matches!(
                        error.kind(),
                        ErrorKind::ConnectionAborted | ErrorKind::ConnectionReset
                    ) => {}
                Err(error) => {
                    if self.thread.refusals.borrow_mut().passes() {
                        log::warn!("accept failed: {error}; what is open goes on");
                    }
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
    }

    /// Makes room, else resets the connection that there is no descriptor for.
    async fn shed(&mut self) {
        if self.thread.give_up_idle() {
            return;
        }
        self.thread.shed(Limit::Descriptors, self.direction);
        let spare = self.thread.spare.take();
        let had_one = spare.is_some();
        drop(spare);
        // That a connection waits is still known: the answer is there at once, and may be taken by another thread.
        let taken = tokio::time::timeout(Duration::ZERO, self.listener.accept()).await;
        if let Ok(Ok((socket, _))) = taken {
            relay::abort(socket);
        }
        self.thread.spare.replace(spare_descriptor());
        if !had_one {
            tokio::time::sleep(PAUSE).await;
        }
    }
}

/// A descriptor to be given up for a moment, to take a connection that there is none for.
pub(crate) fn spare_descriptor() -> Option<File> {
    File::open("/dev/null").ok()
}
