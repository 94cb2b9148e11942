//! Lengths of time as people write them: `50ms`, `90m`, `7d`.

use std::time::Duration;

/// The units, from the smallest on, and the milliseconds of each.
pub const UNITS: [(&str, u64); 5] = [
    ("ms", 1),
    ("s", 1000),
    ("m", 60_000),
    ("h", 3_600_000),
    ("d", 86_400_000),
];

/// In the largest unit that leaves no fraction, as flags have it.
pub fn in_words(time: Duration) -> String {
    write(millis(time), |millis, unit| millis.is_multiple_of(unit))
}

/// An age: in the largest unit of which there is one, rounded down to it, and in whole seconds at least.
pub fn rounded(time: Duration) -> String {
    match time.as_secs() {
        0 => "0s".to_owned(),
        seconds => write(millis(Duration::from_secs(seconds)), |_, _| true),
    }
}

/// Reads a whole number of one of the [`UNITS`].
pub fn parse(text: &str) -> Option<Duration> {
    let (number, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit())?);
    let (_, scale) = UNITS.iter().find(|(name, _)| *name == unit)?;
    let millis = number.parse::<u64>().ok()?.checked_mul(*scale)?;
    Some(Duration::from_millis(millis))
}

fn write(millis: u64, fits: impl Fn(u64, u64) -> bool) -> String {
    let fits = |unit: u64| millis >= unit && fits(millis, unit);
    let unit = UNITS.iter().rev().find(|(_, unit)| fits(*unit));
    let (name, unit) = unit.unwrap_or(&UNITS[0]);
    format!("{}{name}", millis / unit)
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_written_as_flags_have_it_and_an_age_is_rounded_down() {
        for (millis, exact, age) in [
            (0, "0ms", "0s"),
            (999, "999ms", "0s"),
            (59_999, "59999ms", "59s"),
            (60_000, "1m", "1m"),
            (90_000, "90s", "1m"),
            (7_199_000, "7199s", "1h"),
            (86_399_000, "86399s", "23h"),
            (691_200_000, "8d", "8d"),
        ] {
            let time = Duration::from_millis(millis);
            assert_eq!(
                (&*in_words(time), &*rounded(time)),
                (exact, age),
                "{millis}"
            );
        }
    }
}
