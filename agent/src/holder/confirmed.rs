//! The input door that is wanted, and the last one with which control was reached.
//!
//! A new door refuses for [`TRIAL`]; if control is reached meanwhile by a connection opened after the change, it refuses
//! for good and is kept on disk, else it disarms. What was confirmed once needs no second trial, so that a host that
//! starts without control refuses what it refused before.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use mesh_runtime::files;

use super::HolderConfig;
use super::desired;
use super::protocol::{Arming, DesiredDoor, FRAME_MAX};
use crate::capture::Capture;
use crate::capture::door::{Arm, DoorPort};

/// How long a new door refuses before control is reached. A dial of control takes 6 s at most, and is tried again after 5.
const TRIAL: Duration = Duration::from_secs(20);

#[derive(Debug)]
pub(crate) struct Confirmed {
    file: PathBuf,
    doors: Vec<DoorPort>,
    wanted: Vec<DoorPort>,
    /// Of the message that `wanted` came with.
    generation: u64,
    /// When `wanted` disarms; `None`: it is confirmed.
    trial_until: Option<Instant>,
    applied: bool,
}

impl Confirmed {
    /// What is kept. A file that can not be read is as none: then only the agent says what is refused.
    pub(crate) fn load(config: &HolderConfig) -> Self {
        let doors = read(&config.door_file, &config.keep_open()).unwrap_or_else(|error| {
            log::warn!("{error:#}; plaintext callers are refused when the agent knows again which");
            Vec::new()
        });
        Self {
            file: config.door_file.clone(),
            wanted: doors.clone(),
            doors,
            generation: 0,
            trial_until: None,
            applied: false,
        }
    }

    /// What was confirmed last.
    pub(crate) fn doors(&self) -> &[DoorPort] {
        &self.doors
    }

    pub(super) fn wanted(&self) -> &[DoorPort] {
        &self.wanted
    }

    /// Another door is wanted. The same again keeps its trial: what is repeated must not refuse for ever.
    pub(super) fn next(&mut self, generation: u64, wanted: Vec<DoorPort>) {
        self.generation = generation;
        self.applied = false;
        if wanted == self.doors {
            self.trial_until = None;
        } else if wanted != self.wanted || self.trial_until.is_none() {
            self.trial_until = Some(Instant::now() + TRIAL);
        }
        self.wanted = wanted;
    }

    pub(super) fn applied(&mut self) {
        self.applied = true;
    }

    /// For how long what is wanted may refuse.
    pub(super) fn arm(&self) -> Arm {
        let Some(until) = self.trial_until else {
            return Arm::ForGood;
        };
        match until.saturating_duration_since(Instant::now()) {
            Duration::ZERO => Arm::Not,
            left => Arm::For(left),
        }
    }

    pub(super) fn arming(&self) -> Arming {
        match self.arm() {
            Arm::ForGood => Arming::Armed,
            Arm::For(_) => Arming::Trying,
            Arm::Not => Arming::Disarmed,
        }
    }

    /// Control was reached with what was applied.
    pub(super) fn reached(&mut self, generation: u64, capture: &mut Capture) -> anyhow::Result<()> {
        if generation != self.generation || !self.applied {
            return Ok(());
        }
        capture.confirm(&self.wanted)?;
        self.trial_until = None;
        if self.doors != self.wanted {
            self.doors.clone_from(&self.wanted);
            let text = serde_json::to_vec(&written(&self.doors))?;
            files::write_private(&self.file, &text)
                .context("cannot keep the input door for the next start")?;
        }
        Ok(())
    }
}

fn read(file: &Path, keep_open: &[u16]) -> anyhow::Result<Vec<DoorPort>> {
    let name = || format!("cannot read the input door that {} keeps", file.display());
    let text = match files::read_bounded(file, FRAME_MAX as u64) {
        Ok(text) => text,
        Err(error) if error.cause.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).with_context(name),
    };
    let doors: Vec<DesiredDoor> = serde_json::from_slice(&text).with_context(name)?;
    desired::doors(&doors, keep_open).with_context(name)
}

fn written(doors: &[DoorPort]) -> Vec<DesiredDoor> {
    let texts =
        |ranges: &[mesh_core::policy::Cidr]| ranges.iter().map(ToString::to_string).collect();
    let doors = doors.iter().map(|door| DesiredDoor {
        port: door.port,
        open: texts(&door.open),
        audited: texts(&door.audited),
        strict: door.strict.as_deref().map(texts),
    });
    doors.collect()
}
