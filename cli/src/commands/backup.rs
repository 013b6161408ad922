//! `meshctl backup`: streams what control knows into a private file.

use std::fs::OpenOptions;
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::time::Duration;

use http::Method;
use http_body_util::BodyExt as _;
use tokio::time::timeout;

use crate::client::{Ask, Client};
use crate::failure::Failure;
use crate::output;

/// How long control may be silent in the middle of a backup.
const SILENCE_MAX: Duration = Duration::from_secs(30);

pub(crate) async fn run(client: &Client, out: &Path) -> Result<(), Failure> {
    let name = out.display().to_string();
    let local = |cause: &dyn std::fmt::Display| {
        Failure::local(
            "write",
            &name,
            cause,
            "name a file that does not exist yet, with room",
        )
    };
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(out)
        .map_err(|e| local(&e))?;
    let result = fill(client, &mut file, &local).await;
    if result.is_err() {
        // Half a backup must not look like one.
        drop(std::fs::remove_file(out));
    }
    let bytes = result?;
    output::print(&format!("{bytes} bytes written to {name}\n"));
    Ok(())
}

async fn fill(
    client: &Client,
    file: &mut std::fs::File,
    local: &dyn Fn(&dyn std::fmt::Display) -> Failure,
) -> Result<u64, Failure> {
    let (address, response) = client
        .stream(&Ask {
            operation: "back up",
            object: "control",
            method: Method::GET,
            path: "/v1/backup",
            body: None,
        })
        .await?;
    let lost = |cause: &dyn std::fmt::Display| {
        Failure::unreachable(&address, cause, "the file was removed; try again")
    };
    let mut body = response.into_body();
    let mut bytes = 0;
    loop {
        let frame = timeout(SILENCE_MAX, body.frame()).await;
        let Some(frame) = frame.map_err(|_| lost(&"it fell silent in the middle"))? else {
            break;
        };
        if let Some(data) = frame.map_err(|e| lost(&e))?.data_ref() {
            file.write_all(data).map_err(|e| local(&e))?;
            bytes += data.len() as u64;
        }
    }
    file.sync_all().map_err(|e| local(&e))?;
    Ok(bytes)
}
