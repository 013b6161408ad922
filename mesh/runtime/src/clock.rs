//! Wall-clock time, and how people and files are told it.

use std::io;
use std::time::{SystemTime, UNIX_EPOCH};

/// Unix time, milliseconds. Before 1970 it is 0, which makes everything look valid for longer, never expired.
pub fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX))
}

/// Where the kernel says which boot this is.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// The kernel's name for this boot: another after each.
///
/// # Errors
/// When `/proc` is not mounted.
pub fn boot_id() -> io::Result<String> {
    let id = std::fs::read_to_string(BOOT_ID)
        .map_err(|error| io::Error::new(error.kind(), format!("cannot read {BOOT_ID}: {error}")))?;
    Ok(id.trim().to_owned())
}

/// RFC 3339, UTC, whole seconds.
pub fn rfc3339(unix_s: u64) -> String {
    format!("{}Z", date_and_time(unix_s))
}

/// RFC 3339, UTC, with milliseconds.
pub fn rfc3339_ms(unix_ms: u64) -> String {
    format!("{}.{:03}Z", date_and_time(unix_ms / 1000), unix_ms % 1000)
}

fn date_and_time(unix_s: u64) -> String {
    let (days, second) = (unix_s / 86_400, unix_s % 86_400);
    let (year, month, day) = civil(days);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}")
}

/// The Gregorian date of a day since 1970-01-01, counted in 400-year eras that begin on 1 March.
fn civil(days: u64) -> (u64, u64, u64) {
    const ERA: u64 = 146_097;
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / ERA, shifted % ERA);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * from_march + 2) / 5 + 1;
    let month = if from_march < 10 {
        from_march + 3
    } else {
        from_march - 9
    };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    (year, month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_told_as_people_read_them() {
        for (unix_s, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_827_696, "2000-02-29T12:34:56Z"),
            (1_704_067_199, "2023-12-31T23:59:59Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
        ] {
            assert_eq!(rfc3339(unix_s), text);
        }
        assert_eq!(rfc3339_ms(951_827_696_007), "2000-02-29T12:34:56.007Z");
    }
}
