//! The input door that is wanted, the last one with which control was reached, and the real addresses that are taken
//! over.
//!
//! A new door refuses for [`TRIAL`]; if control is reached meanwhile by a connection opened after the change, and the
//! gateways of the default routes answer as they did before it, it refuses for good and is kept on disk, else it disarms. What was confirmed once needs no second trial, so that a host that
//! starts without control refuses what it refused before.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use mesh_runtime::files;
use serde::{Deserialize, Serialize};

use super::HolderConfig;
use super::desired;
use super::protocol::{Arming, DesiredDoor, FRAME_MAX};
use crate::capture::Capture;
use crate::capture::door::{Arm, DoorPort};
use crate::capture::gateways::{self, Gateway};
use crate::capture::real::Real;

/// How long a new door refuses before control is reached. A dial of control takes 6 s at most, and is tried again after 5.
const TRIAL: Duration = Duration::from_secs(20);

#[derive(Debug)]
pub(crate) struct Confirmed {
    file: PathBuf,
    doors: Vec<DoorPort>,
    wanted: Vec<DoorPort>,
    /// As they are applied: they need no trial, since neither control nor what a host needs to be reached is among them.
    reals: Vec<Real>,
    /// Of the message that `wanted` came with.
    generation: u64,
    /// When `wanted` disarms; `None`: it is confirmed.
    trial_until: Option<Instant>,
    /// Control was reached with what is wanted, and that does not refuse for good yet.
    reached: bool,
    /// They answered before what is on trial was applied, and were asked again since.
    gateways: Vec<Gateway>,
    /// What is kept on disk is older than this.
    unwritten: bool,
}

/// What the file has.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    doors: Vec<DesiredDoor>,
    reals: Vec<Real>,
}

/// How it stands, for the program that takes our place.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Standing {
    doors: Vec<DesiredDoor>,
    wanted: Vec<DesiredDoor>,
    reals: Vec<Real>,
    /// What is left of the trial, in milliseconds; `None`: what is wanted is confirmed.
    trial_left_ms: Option<u64>,
    gateways: Vec<Gateway>,
    unwritten: bool,
}

impl Confirmed {
    pub(super) fn to_hand_over(&self) -> Standing {
        let left = |until: Instant| until.saturating_duration_since(Instant::now()).as_millis();
        Standing {
            doors: written(&self.doors),
            wanted: written(&self.wanted),
            reals: self.reals.clone(),
            trial_left_ms: self
                .trial_until
                .map(|until| u64::try_from(left(until)).unwrap_or(u64::MAX)),
            gateways: self.gateways.clone(),
            unwritten: self.unwritten,
        }
    }

    /// As the program before this one left it.
    pub(super) fn handed_over(config: &HolderConfig, standing: &Standing) -> anyhow::Result<Self> {
        let keep_open = config.keep_open();
        let left = standing.trial_left_ms.map(Duration::from_millis);
        Ok(Self {
            file: config.door_file.clone(),
            doors: desired::doors(&standing.doors, &keep_open)?,
            wanted: desired::doors(&standing.wanted, &keep_open)?,
            reals: desired::reals(&standing.reals, &keep_open, &config.ranges)?,
            generation: 0,
            trial_until: left.map(|left| Instant::now() + left.min(TRIAL)),
            reached: false,
            gateways: standing.gateways.clone(),
            unwritten: standing.unwritten,
        })
    }

    /// What is kept. A file that can not be read is as none: then only the agent says what is refused.
    pub(crate) fn load(config: &HolderConfig) -> Self {
        let kept = read(&config.door_file, config).unwrap_or_else(|error| {
            log::warn!("{error:#}; plaintext is refused when the agent knows again which");
            Default::default()
        });
        let (doors, reals) = kept;
        Self {
            file: config.door_file.clone(),
            wanted: doors.clone(),
            doors,
            reals,
            generation: 0,
            trial_until: None,
            reached: false,
            gateways: Vec::new(),
            unwritten: false,
        }
    }

    /// What was confirmed last.
    pub(crate) fn doors(&self) -> &[DoorPort] {
        &self.doors
    }

    pub(crate) fn reals(&self) -> &[Real] {
        &self.reals
    }

    pub(super) fn wanted(&self) -> &[DoorPort] {
        &self.wanted
    }

    /// For how long another door may refuse, once it is applied. The same again keeps its trial: what is repeated must
    /// not refuse for ever.
    pub(super) fn arm_of(&self, wanted: &[DoorPort]) -> Arm {
        if wanted == self.doors {
            Arm::ForGood
        } else if wanted != self.wanted || self.trial_until.is_none() {
            Arm::For(TRIAL)
        } else {
            self.arm()
        }
    }

    /// Who must answer when another door was applied, armed like that: who answers before, and who did before a door that is
    /// on trial still.
    pub(super) fn gateways(&self, arm: Arm, capture: &Capture) -> Vec<Gateway> {
        if arm != Arm::For(TRIAL) {
            return self.gateways.clone();
        }
        let mut gateways = capture.gateways().unwrap_or_else(|error| {
            log::warn!("cannot see whether the default gateways answer: {error}; the new door is not tried by them");
            Vec::new()
        });
        if self.trial_until.is_some() {
            let before = self.gateways.iter().copied();
            gateways.extend(
                before
                    .filter(|old| !gateways.contains(old))
                    .collect::<Vec<_>>(),
            );
        }
        gateways
    }

    /// The kernel has them now, armed like that.
    pub(super) fn applied(
        &mut self,
        generation: u64,
        wanted: Vec<DoorPort>,
        reals: Vec<Real>,
        arm: Arm,
        gateways: Vec<Gateway>,
    ) {
        if arm == Arm::For(TRIAL)
            && let Err(error) = gateways::ask(&gateways)
        {
            // They are asked again when it is looked whether they answered.
            log::warn!("cannot ask the default gateways whether they answer: {error}");
        }
        self.gateways = gateways;
        self.generation = generation;
        self.reached = false;
        self.trial_until = match arm {
            Arm::ForGood => None,
            Arm::For(time) => Some(Instant::now() + time),
            Arm::Not => self.trial_until,
        };
        self.wanted = wanted;
        self.unwritten |= self.reals != reals;
        self.reals = reals;
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
    pub(super) fn reached(&mut self, generation: u64) {
        self.reached |= generation == self.generation;
    }

    /// Makes what control was reached with refuse for good, and keeps it. Does nothing where that is done. A gateway that
    /// does not answer is an error when the trial is over.
    pub(super) fn settle(&mut self, capture: &mut Capture) -> anyhow::Result<()> {
        let silent = match self.reached {
            true => gateways::silent(&self.gateways)
                .context("cannot ask the kernel whether the default gateway answers")?,
            false => None,
        };
        if self.reached && silent.is_none() {
            capture.confirm(&self.wanted)?;
            self.reached = false;
            self.trial_until = None;
            self.unwritten |= self.doors != self.wanted;
            self.doors.clone_from(&self.wanted);
        }
        if self.unwritten {
            let written = Written {
                doors: written(&self.doors),
                reals: self.reals.clone(),
            };
            let text = serde_json::to_vec(&written)?;
            files::write_private(&self.file, &text)
                .context("cannot keep for the next start what plaintext must be refused")?;
            self.unwritten = false;
        }
        match silent {
            Some(gateway) if self.arm() == Arm::Not => anyhow::bail!(
                "the default gateway {gateway} has not answered since the input door was changed: the door refuses \
                 nothing new until it does"
            ),
            _ => Ok(()),
        }
    }
}

fn read(file: &Path, config: &HolderConfig) -> anyhow::Result<(Vec<DoorPort>, Vec<Real>)> {
    let name = || format!("cannot read what {} keeps", file.display());
    let text = match files::read_bounded(file, FRAME_MAX as u64) {
        Ok(text) => text,
        Err(error) if error.cause.kind() == std::io::ErrorKind::NotFound => {
            return Ok(Default::default());
        }
        Err(error) => return Err(error).with_context(name),
    };
    let kept: Written = serde_json::from_slice(&text).with_context(name)?;
    let keep_open = config.keep_open();
    let doors = desired::doors(&kept.doors, &keep_open).with_context(name)?;
    let reals = desired::reals(&kept.reals, &keep_open, &config.ranges).with_context(name)?;
    Ok((doors, reals))
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::capture::{CaptureSettings, VipRanges};

    fn config(directory: &Path) -> HolderConfig {
        HolderConfig {
            dns: crate::config::Dns::default(),
            capture: CaptureSettings {
                enabled: false,
                ..CaptureSettings::default()
            },
            ranges: VipRanges::new("252.64.0.0/16", "fd6d::/64").unwrap(),
            mesh: Vec::new(),
            worker_arguments: Vec::new(),
            drain: Duration::ZERO,
            handover: Duration::ZERO,
            config: None,
            config_text: String::new(),
            config_copy: directory.join("agent.toml"),
            outcome_file: directory.join("reload.json"),
            door_file: directory.join("door.json"),
            bypass_file: directory.join("bypass.json"),
            keep_link: true,
        }
    }

    fn door(port: u16) -> Vec<DoorPort> {
        vec![DoorPort {
            port,
            strict: Some(Vec::new()),
            ..DoorPort::default()
        }]
    }

    fn reals() -> Vec<Real> {
        vec![Real {
            address: [10, 0, 0, 2].into(),
            port: 80,
            strict: true,
        }]
    }

    /// Applies a door as the holder does.
    fn apply(
        confirmed: &mut Confirmed,
        generation: u64,
        doors: Vec<DoorPort>,
        capture: &Capture,
    ) -> Arm {
        let arm = confirmed.arm_of(&doors);
        let gateways = confirmed.gateways(arm, capture);
        confirmed.applied(generation, doors, reals(), arm, gateways);
        arm
    }

    #[test]
    fn a_trial_begins_when_the_door_is_applied_and_ends_when_control_is_reached_with_it() {
        let directory = std::env::temp_dir().join(format!("door-{}-a", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let config = config(&directory);
        let mut capture = Capture::open(&config.capture, &config.ranges, &[], &[]).unwrap();
        let mut confirmed = Confirmed::load(&config);
        assert_eq!(confirmed.arming(), Arming::Armed);
        // Wanted and not applied: nothing is on trial yet.
        assert_eq!(confirmed.arm_of(&door(80)), Arm::For(TRIAL));
        assert_eq!(confirmed.arming(), Arming::Armed);
        assert_eq!(
            apply(&mut confirmed, 1, door(80), &capture),
            Arm::For(TRIAL)
        );
        assert_eq!(confirmed.arming(), Arming::Trying);
        // The same again keeps its trial.
        assert!(
            matches!(apply(&mut confirmed, 2, door(80), &capture), Arm::For(left) if left < TRIAL)
        );
        confirmed.reached(1);
        confirmed.settle(&mut capture).unwrap();
        assert_eq!(confirmed.arming(), Arming::Trying, "of an older message");
        confirmed.reached(2);
        confirmed.settle(&mut capture).unwrap();
        assert_eq!(confirmed.arming(), Arming::Armed);
        let again = Confirmed::load(&config);
        assert_eq!(
            (again.doors(), again.reals()),
            (&door(80)[..], &reals()[..])
        );
        assert_eq!(again.arm_of(&door(80)), Arm::ForGood);
        std::fs::remove_dir_all(&directory).unwrap();
    }

    #[test]
    fn what_could_not_be_kept_is_kept_later() {
        let directory = std::env::temp_dir().join(format!("door-{}-b", std::process::id()));
        let config = config(&directory);
        let mut capture = Capture::open(&config.capture, &config.ranges, &[], &[]).unwrap();
        let mut confirmed = Confirmed::load(&config);
        apply(&mut confirmed, 1, door(80), &capture);
        confirmed.reached(1);
        assert!(confirmed.settle(&mut capture).is_err(), "no directory");
        assert_eq!(confirmed.arming(), Arming::Armed);
        assert!(confirmed.settle(&mut capture).is_err(), "tried again");
        std::fs::create_dir_all(&directory).unwrap();
        confirmed.settle(&mut capture).unwrap();
        assert_eq!(Confirmed::load(&config).doors(), door(80));
        std::fs::remove_dir_all(&directory).unwrap();
    }
}
