//! What is healthy, kept for the worker that takes this one's place.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;

use mesh_core::health::Verdict;
use mesh_core::names::{Account, ServiceName};
use mesh_runtime::files;
use serde::{Deserialize, Serialize};

use super::Asked;

/// Every service of a host with its verdict.
const KEPT_BYTES_MAX: u64 = 4 * 1024 * 1024;

/// What the file has.
#[derive(Debug, Serialize, Deserialize)]
struct KeptVerdicts {
    /// Process number of the holder.
    holder: u32,
    /// By workload, service and, if it is another's, the server.
    verdicts: Vec<(String, String, Option<SocketAddr>, bool)>,
}

pub(super) fn read(file: &Path) -> BTreeMap<Asked, Verdict> {
    let kept = || -> anyhow::Result<BTreeMap<Asked, Verdict>> {
        let text = files::read_bounded(file, KEPT_BYTES_MAX)?;
        let kept: KeptVerdicts = serde_json::from_slice(&text)?;
        if kept.holder != std::os::unix::process::parent_id() {
            return Ok(BTreeMap::new());
        }
        let verdicts = kept.verdicts.into_iter();
        let verdicts = verdicts.map(|(account, service, beyond, healthy)| {
            let asked = Asked {
                served: (Account::parse(&account)?, ServiceName::parse(&service)?),
                beyond,
            };
            let verdict = match healthy {
                true => Verdict::Healthy,
                false => Verdict::Unhealthy,
            };
            Ok((asked, verdict))
        });
        verdicts.collect()
    };
    // The first worker of a holder finds none, or one of before.
    kept().unwrap_or_default()
}

pub(super) fn write(file: &Path, verdicts: &BTreeMap<Asked, Verdict>) {
    let known = verdicts.iter().filter(|(_, v)| **v != Verdict::Unknown);
    let verdicts = known.map(|(asked, verdict)| {
        let (account, service) = &asked.served;
        let (account, service) = (account.to_string(), service.to_string());
        (account, service, asked.beyond, verdict.is_healthy())
    });
    let kept = KeptVerdicts {
        holder: std::os::unix::process::parent_id(),
        verdicts: verdicts.collect(),
    };
    let written = serde_json::to_vec(&kept)
        .map_err(anyhow::Error::from)
        .and_then(|text| Ok(files::write_private(file, &text)?));
    if let Err(error) = written {
        log::warn!("what is healthy can not be kept for the next worker: {error:#}");
    }
}
