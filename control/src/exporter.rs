//! Writes exports beside the store while the catalogue changes.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::catalogue::Catalogue;
use crate::export;

/// At most one export in this time: what a broken store loses at most.
const EVERY: Duration = Duration::from_secs(60);

/// Runs until `stopping`, and then writes the last one. The first is written at once if the newest file is of
/// another moment: the last control may have been killed.
pub(crate) async fn run(
    state: PathBuf,
    mut catalogue: watch::Receiver<Arc<Catalogue>>,
    stopping: CancellationToken,
) {
    let mut written = export::last(&state);
    let mut next = Instant::now();
    loop {
        let now = Arc::clone(&catalogue.borrow_and_update());
        if written != Some((now.epoch, now.revision)) {
            tokio::select! {
                () = tokio::time::sleep_until(next) => {}
                () = stopping.cancelled() => break,
            }
            // What changed while it waited goes into the same one.
            let now = Arc::clone(&catalogue.borrow_and_update());
            if write(&state, &now).await {
                written = Some((now.epoch, now.revision));
            }
            next = Instant::now() + EVERY;
        }
        tokio::select! {
            changed = catalogue.changed() => if changed.is_err() {
                break;
            },
            () = stopping.cancelled() => break,
        }
    }
    let now = Arc::clone(&catalogue.borrow());
    if written != Some((now.epoch, now.revision)) {
        write(&state, &now).await;
    }
}

async fn write(state: &Path, now: &Arc<Catalogue>) -> bool {
    let (state, now) = (state.to_owned(), Arc::clone(now));
    let written = tokio::task::spawn_blocking(move || export::write(&state, &now)).await;
    match written {
        Ok(Ok(())) => true,
        Ok(Err(error)) => {
            log::error!("cannot write an export: {error}");
            false
        }
        Err(error) => {
            log::error!("cannot write an export: {error}");
            false
        }
    }
}
