//! The certificates that people must replace, and how long that is still not urgent.

use std::sync::Arc;
use std::time::Duration;

use mesh_core::expiry::{Alarm, alarm};

use crate::ca::{Ca, Life};
use crate::clock;
use crate::control::Control;

/// How often it is said in the log while somebody is needed.
const SAID_EVERY: Duration = Duration::from_secs(24 * 3600);

/// A certificate and what is left of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Certificate {
    pub name: &'static str,
    pub life: Life,
    pub left_s: i64,
    pub alarm: Option<Alarm>,
}

/// The root and the issuer, as they are now.
pub(crate) fn certificates(control: &Control) -> [Certificate; 2] {
    lives(&control.ca, clock::now_s().cast_signed())
}

pub(crate) fn lives(ca: &Ca, now_s: i64) -> [Certificate; 2] {
    let lives = [("root", ca.root_life()), ("issuer", ca.issuer_life())];
    lives.map(|(name, life)| Certificate::at(name, life, now_s))
}

impl Certificate {
    pub(crate) const fn at(name: &'static str, life: Life, now_s: i64) -> Self {
        Self {
            name,
            life,
            left_s: life.not_after_s.saturating_sub(now_s),
            alarm: alarm(life.not_before_s, life.not_after_s, now_s),
        }
    }
}

/// Says at the start and every day who needs somebody. Never completes.
pub(crate) async fn watch(control: Arc<Control>) {
    loop {
        for one in certificates(&control) {
            let ends = clock::rfc3339(one.life.not_after_s.max(0).cast_unsigned());
            let days = one.left_s / (24 * 3600);
            match one.alarm {
                None => {}
                Some(Alarm::Plan | Alarm::Act) => log::warn!(
                    certificate = one.name, ends;
                    "the {} ends in {days} days; have a new one made", one.name
                ),
                Some(Alarm::Urgent | Alarm::Over) => log::error!(
                    certificate = one.name, ends;
                    "the {} ends in {days} days: no certificate lives longer; have a new one made now", one.name
                ),
            }
        }
        tokio::time::sleep(SAID_EVERY).await;
    }
}
