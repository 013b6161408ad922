//! Notices changes of `services.d` and publishes what it says then.
//!
//! Whatever happened, everything is read again: the files are few and small, and no change can be missed by
//! being misunderstood. All events that wait are taken before that, so a package that writes ten files
//! causes one or two readings. While the directory is not there, the nearest one above it is watched.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use futures_util::StreamExt;
use futures_util::stream::ReadyChunks;
use inotify::{EventMask, EventOwned, EventStream, Inotify, WatchDescriptor, WatchMask};
use mesh_api::workload_file::HostAddresses;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{Loader, WorkloadSet};

/// Room for the events of one read, in bytes: some hundred with their names.
const EVENTS_BUFFER: usize = 16 * 1024;
/// Events taken together, if so many wait: a batch is one reading of the directory.
const BATCH_MAX: usize = 1_000;

/// The owner of the workload set.
#[derive(Debug)]
pub(crate) struct Watch {
    loader: Loader,
    events: ReadyChunks<EventStream<Vec<u8>>>,
    publish: watch::Sender<Arc<WorkloadSet>>,
    watched: Option<Watched>,
}

/// The directory we watch: `services.d`, or the nearest one above it that exists.
#[derive(Debug)]
struct Watched {
    path: PathBuf,
    descriptor: WatchDescriptor,
}

/// What a batch of events asks for.
#[derive(Clone, Copy, Debug, Default)]
struct Wanted {
    reading: bool,
    watching_anew: bool,
}

impl Watch {
    /// Reads the directory once and begins to watch it. Needs a tokio runtime.
    pub(crate) fn new(
        directory: PathBuf,
        place: HostAddresses,
    ) -> io::Result<(Self, watch::Receiver<Arc<WorkloadSet>>)> {
        let (publish, receiver) = watch::channel(Arc::default());
        let mut watch = Self {
            loader: Loader::new(directory, place),
            events: Inotify::init()?
                .into_event_stream(vec![0; EVENTS_BUFFER])?
                .ready_chunks(BATCH_MAX),
            publish,
            watched: None,
        };
        // Watch first, read then: a change between the two is read twice, never missed.
        watch.watch_anew()?;
        let set = watch.loader.load();
        watch.publish(set);
        Ok((watch, receiver))
    }

    /// Publishes each change until `stop`.
    pub(crate) async fn run(mut self, stop: CancellationToken) -> io::Result<()> {
        loop {
            let wanted = tokio::select! {
                () = stop.cancelled() => return Ok(()),
                wanted = self.next_events() => wanted?,
            };
            let watching_anew = wanted.watching_anew || !self.is_nearest();
            if watching_anew {
                self.watch_anew()?;
            }
            // Above the directory much may happen that is not ours.
            if watching_anew || (wanted.reading && self.watches_directory()) {
                self = self.read().await?;
            }
        }
    }

    /// Waits for events and takes all that are there.
    async fn next_events(&mut self) -> io::Result<Wanted> {
        let ended = || io::Error::from(io::ErrorKind::UnexpectedEof);
        let events = self.events.next().await.ok_or_else(ended)?;
        let mut wanted = Wanted::default();
        for event in events {
            let now = want(&event?, self.watched.as_ref());
            wanted.reading |= now.reading;
            wanted.watching_anew |= now.watching_anew;
        }
        Ok(wanted)
    }

    /// Reads all files beside the runtime's threads: a directory may lie on a slow disk.
    async fn read(mut self) -> io::Result<Self> {
        let (watch, set) = tokio::task::spawn_blocking(move || {
            let set = self.loader.load();
            (self, set)
        })
        .await
        .map_err(io::Error::other)?;
        watch.publish(set);
        Ok(watch)
    }

    fn publish(&self, set: WorkloadSet) {
        self.publish.send_if_modified(|current| {
            let changed = **current != set;
            if changed {
                for problem in set
                    .problems
                    .iter()
                    .filter(|p| !current.problems.contains(p))
                {
                    log::warn!("{problem}");
                }
                *current = Arc::new(set);
            }
            changed
        });
    }

    /// Watches the directory, or what is nearest above it. Begins again when something appeared meanwhile.
    fn watch_anew(&mut self) -> io::Result<()> {
        loop {
            let path = nearest(self.loader.directory());
            let mask = if path == self.loader.directory() {
                WatchMask::CLOSE_WRITE | WatchMask::DELETE | WatchMask::MOVED_FROM
            } else {
                WatchMask::empty()
            };
            let mask = mask
                | WatchMask::CREATE
                | WatchMask::MOVED_TO
                | WatchMask::ATTRIB
                | WatchMask::DELETE_SELF
                | WatchMask::MOVE_SELF
                | WatchMask::ONLYDIR;
            let mut watches = self.events.get_ref().watches();
            let descriptor = match watches.add(&path, mask) {
                Ok(descriptor) => descriptor,
                // It went away, or was replaced by a file: look again from above.
                Err(error) if is_gone(&error) => continue,
                Err(error) => {
                    let message = format!("can not watch {}: {error}", path.display());
                    return Err(io::Error::new(error.kind(), message));
                }
            };
            if let Some(old) = self.watched.take()
                && old.descriptor != descriptor
            {
                // Fails when the kernel dropped it already, with its directory.
                drop(watches.remove(old.descriptor));
            }
            self.watched = Some(Watched { path, descriptor });
            if self.is_nearest() {
                return Ok(());
            }
        }
    }

    fn is_nearest(&self) -> bool {
        let watched = self.watched.as_ref();
        watched.is_some_and(|w| w.path == nearest(self.loader.directory()))
    }

    fn watches_directory(&self) -> bool {
        let watched = self.watched.as_ref();
        watched.is_some_and(|w| w.path == self.loader.directory())
    }
}

fn want(event: &EventOwned, watched: Option<&Watched>) -> Wanted {
    let mask = event.mask;
    if mask.contains(EventMask::Q_OVERFLOW) {
        return Wanted {
            reading: true,
            watching_anew: true,
        };
    }
    let Some(watched) = watched.filter(|w| w.descriptor == event.wd) else {
        return Wanted::default(); // Of a watch that we gave up.
    };
    let gone = EventMask::DELETE_SELF | EventMask::MOVE_SELF | EventMask::IGNORED;
    if mask.intersects(gone) {
        return Wanted {
            reading: true,
            watching_anew: true,
        };
    }
    // A file that was just made is empty, and its end of writing comes; a link has no such end.
    let unfinished = mask.contains(EventMask::CREATE)
        && event
            .name
            .as_ref()
            .is_some_and(|name| is_plain_file(&watched.path.join(name)));
    Wanted {
        reading: !unfinished,
        watching_anew: false,
    }
}

fn is_gone(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
    )
}

fn is_plain_file(path: &Path) -> bool {
    path.symlink_metadata()
        .is_ok_and(|m| m.is_file() && m.nlink() == 1)
}

/// The directory itself if it is there, else the nearest one above that is.
fn nearest(directory: &Path) -> PathBuf {
    let there = directory.ancestors().find(|path| path.is_dir());
    there.map_or_else(
        || Path::new(".").to_owned(),
        |path| {
            if path.as_os_str().is_empty() {
                Path::new(".").to_owned()
            } else {
                path.to_owned()
            }
        },
    )
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use std::fs;
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::time::Duration;

    const WAIT: Duration = Duration::from_secs(20);

    #[tokio::test]
    async fn changes_are_published() {
        let directory = Directory::new();
        directory.write("a.toml", &file("a.service"));
        let mut watched = Running::start(directory.path.clone());
        assert_eq!(watched.accounts(), ["shop/a"]);

        directory.write("b.toml", &file("b.service"));
        watched.until(&["shop/a", "shop/b"]).await;

        // As editors and package managers write: beside, then renamed over.
        directory.write("b.tmp", &file("b.service").replace("shop", "store"));
        directory.rename("b.tmp", "b.toml");
        watched.until(&["shop/a", "store/b"]).await;

        directory.rename("b.toml", "b.off");
        watched.until(&["shop/a"]).await;

        std::os::unix::fs::symlink("b.off", directory.path.join("b.toml")).unwrap();
        watched.until(&["shop/a", "store/b"]).await;

        directory.write("a.toml", "nonsense");
        watched.wait(|set| set.problems.len() == 1).await;
        assert_eq!(watched.accounts(), ["shop/a", "store/b"]);

        directory.remove("a.toml");
        watched.until(&["store/b"]).await;
        watched.stop().await;
    }

    #[tokio::test]
    async fn a_directory_may_come_and_go_and_come_again() {
        let directory = Directory::new();
        let deep = directory.path.join("etc/meshwork/services.d");
        let mut watched = Running::start(deep.clone());
        assert!(watched.accounts().is_empty());
        for _ in 0..3 {
            fs::create_dir_all(&deep).unwrap();
            closed(&deep);
            fs::write(deep.join("a.toml"), file("a.service")).unwrap();
            closed(&deep.join("a.toml"));
            watched.until(&["shop/a"]).await;
            fs::remove_dir_all(directory.path.join("etc")).unwrap();
            watched.until(&[]).await;
        }
        // Moved into place as a whole.
        let beside = directory.path.join("beside/meshwork/services.d");
        fs::create_dir_all(&beside).unwrap();
        closed(&beside);
        fs::write(beside.join("a.toml"), file("a.service")).unwrap();
        closed(&beside.join("a.toml"));
        fs::rename(directory.path.join("beside"), directory.path.join("etc")).unwrap();
        watched.until(&["shop/a"]).await;
        watched.stop().await;
    }

    struct Running {
        receiver: watch::Receiver<Arc<WorkloadSet>>,
        stop: CancellationToken,
        task: tokio::task::JoinHandle<io::Result<()>>,
    }

    impl Running {
        fn start(directory: PathBuf) -> Self {
            let (watch, receiver) = Watch::new(directory, HostAddresses::default()).unwrap();
            let stop = CancellationToken::new();
            Self {
                receiver,
                task: tokio::spawn(watch.run(stop.clone())),
                stop,
            }
        }

        fn accounts(&self) -> Vec<String> {
            accounts(&self.receiver.borrow())
        }

        async fn until(&mut self, expected: &[&str]) {
            self.wait(|set| accounts(set) == expected).await;
        }

        async fn wait(&mut self, condition: impl Fn(&WorkloadSet) -> bool) {
            let waited = tokio::time::timeout(WAIT, self.receiver.wait_for(|set| condition(set)));
            if waited.await.is_err() {
                panic!("it stays {:?}", self.receiver.borrow());
            }
        }

        async fn stop(self) {
            self.stop.cancel();
            self.task.await.unwrap().unwrap();
        }
    }

    fn accounts(set: &WorkloadSet) -> Vec<String> {
        set.workloads
            .iter()
            .map(|w| w.account.to_string())
            .collect()
    }

    /// Whatever the umask: what others can write is refused.
    fn closed(path: &Path) {
        use std::os::unix::fs::PermissionsExt as _;
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    /// A workload file whose account is the file's name.
    pub(in crate::workloads) fn file(unit: &str) -> String {
        format!("namespace = \"shop\"\n[owner]\nunit = \"{unit}\"\n")
    }

    /// A directory that goes with the test.
    pub(in crate::workloads) struct Directory {
        pub(in crate::workloads) path: PathBuf,
    }

    impl Directory {
        pub(in crate::workloads) fn new() -> Self {
            static NEXT: AtomicU32 = AtomicU32::new(0);
            let number = NEXT.fetch_add(1, Ordering::Relaxed);
            let name = format!("meshwork-workloads-{}-{number}", std::process::id());
            let path = std::env::temp_dir().join(name);
            fs::create_dir(&path).unwrap();
            closed(&path);
            Self { path }
        }

        pub(in crate::workloads) fn loader(&self) -> Loader {
            let place = HostAddresses {
                vips: Some(mesh_core::vip::VipRanges::default()),
                ..HostAddresses::default()
            };
            Loader::new(self.path.clone(), place)
        }

        pub(in crate::workloads) fn write(&self, name: &str, text: &str) {
            fs::write(self.path.join(name), text).unwrap();
            closed(&self.path.join(name));
        }

        pub(in crate::workloads) fn rename(&self, from: &str, to: &str) {
            fs::rename(self.path.join(from), self.path.join(to)).unwrap();
        }

        pub(in crate::workloads) fn remove(&self, name: &str) {
            fs::remove_file(self.path.join(name)).unwrap();
        }
    }

    impl Drop for Directory {
        fn drop(&mut self) {
            drop(fs::remove_dir_all(&self.path));
        }
    }
}
