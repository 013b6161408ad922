//! When the end of a certificate's life becomes somebody's business. A root or an issuer is replaced by people, who need
//! weeks; what is renewed by itself is late when a third of its life is left.

/// Lives from here on are counted in days, shorter ones in thirds, in seconds: three times the first of [`DAYS`].
const LONG_S: i64 = 180 * DAY_S;
const DAY_S: i64 = 24 * 3600;
/// Days that are left of a long life at each alarm, first to last.
pub const DAYS: [i64; 3] = [60, 30, 7];

/// How pressing it is; later ones are more so.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Alarm {
    /// 60 days are left: plan its replacement.
    Plan,
    /// 30 days are left, or a third of a short life.
    Act,
    /// 7 days are left.
    Urgent,
    /// It has ended.
    Over,
}

/// Whether a certificate of this life needs somebody now. All in Unix seconds.
pub const fn alarm(not_before_s: i64, not_after_s: i64, now_s: i64) -> Option<Alarm> {
    let life_s = not_after_s.saturating_sub(not_before_s);
    let left_s = not_after_s.saturating_sub(now_s);
    let [plan, act, urgent] = DAYS;
    if left_s <= 0 {
        Some(Alarm::Over)
    } else if life_s < LONG_S {
        if left_s <= life_s / 3 {
            Some(Alarm::Act)
        } else {
            None
        }
    } else if left_s <= urgent * DAY_S {
        Some(Alarm::Urgent)
    } else if left_s <= act * DAY_S {
        Some(Alarm::Act)
    } else if left_s <= plan * DAY_S {
        Some(Alarm::Plan)
    } else {
        None
    }
}

impl Alarm {
    /// The stable word, for labels and JSON.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Plan => "plan",
            Self::Act => "act",
            Self::Urgent => "urgent",
            Self::Over => "over",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_life_alarms_by_days_and_a_short_one_at_a_third() {
        let year = |left_days: i64| alarm(0, 365 * DAY_S, (365 - left_days) * DAY_S);
        for (left, expected) in [
            (365, None),
            (61, None),
            (60, Some(Alarm::Plan)),
            (31, Some(Alarm::Plan)),
            (30, Some(Alarm::Act)),
            (8, Some(Alarm::Act)),
            (7, Some(Alarm::Urgent)),
            (1, Some(Alarm::Urgent)),
            (0, Some(Alarm::Over)),
            (-9, Some(Alarm::Over)),
        ] {
            assert_eq!(year(left), expected, "{left} days");
        }
        let hours = |left: i64| alarm(0, 48 * 3600, (48 - left) * 3600);
        assert_eq!(hours(17), None);
        assert_eq!(hours(16), Some(Alarm::Act));
        assert_eq!(hours(1), Some(Alarm::Act));
        assert_eq!(hours(0), Some(Alarm::Over));
    }

    #[test]
    fn no_clock_and_no_certificate_overflows() {
        for (from, to, now) in [
            (i64::MIN, i64::MAX, 0),
            (i64::MAX, i64::MIN, 0),
            (0, 0, i64::MIN),
            (0, i64::MAX, i64::MIN),
        ] {
            let _ = alarm(from, to, now);
        }
    }
}
