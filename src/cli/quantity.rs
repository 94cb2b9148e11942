//! Numbers with units, such as `10s` and `32MiB`, within limits.

use std::ops::RangeInclusive;
use std::time::Duration;

use postbox::duration::{self, in_words};
use postbox::{Error, ErrorKind};

/// What may follow a number, and what each is in the first of them.
type Units = [(&'static str, u64)];

const TIMES: &Units = &duration::UNITS;

/// Without a unit: bytes.
const SIZES: &Units = &[
    ("", 1),
    ("KiB", 1 << 10),
    ("MiB", 1 << 20),
    ("GiB", 1 << 30),
];

/// Reads a time: a whole number of `ms`, `s`, `m`, `h` or `d`.
pub(super) fn time(
    allowed: RangeInclusive<Duration>,
) -> impl Fn(&str) -> Result<Duration, String> + Clone {
    let millis = |time: &Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
    let allowed = millis(allowed.start())..=millis(allowed.end());
    move |text| read(text, TIMES, &allowed).map(Duration::from_millis)
}

/// Reads a size: a whole number of bytes, `KiB`, `MiB` or `GiB`.
pub(super) fn size(allowed: RangeInclusive<u32>) -> impl Fn(&str) -> Result<u32, String> + Clone {
    move |text| {
        let allowed = u64::from(*allowed.start())..=u64::from(*allowed.end());
        let bytes = read(text, SIZES, &allowed)?;
        Ok(u32::try_from(bytes).expect("the limits are of this type"))
    }
}

/// Refuses a least time that is longer than the most, each with the name of its flag.
pub(super) fn check_order(
    (least_flag, least): (&str, Duration),
    (most_flag, most): (&str, Duration),
) -> postbox::Result<()> {
    if least <= most {
        return Ok(());
    }
    let (least, most) = (in_words(least), in_words(most));
    let message = format!("{least_flag} {least} is longer than {most_flag} {most}");
    Err(Error::new(ErrorKind::Settings, message))
}

fn read(text: &str, units: &Units, allowed: &RangeInclusive<u64>) -> Result<u64, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit());
    let (number, unit) = text.split_at(digits.unwrap_or(text.len()));
    if number.is_empty() {
        return Err(format!(
            "not a number with a unit: use {}",
            range(allowed, units)
        ));
    }
    if unit.starts_with(['.', ',']) {
        return Err("not a whole number: use a smaller unit".to_owned());
    }
    let Some((_, scale)) = units.iter().find(|(name, _)| *name == unit) else {
        let wrong = if unit.is_empty() {
            "no unit"
        } else {
            "an unknown unit"
        };
        return Err(format!("{wrong}: use {}", names(units)));
    };
    // Digits that do not parse are too many.
    let number = number.parse().unwrap_or(u64::MAX).saturating_mul(*scale);
    if !allowed.contains(&number) {
        return Err(format!("out of range: use {}", range(allowed, units)));
    }
    Ok(number)
}

fn range(allowed: &RangeInclusive<u64>, units: &Units) -> String {
    let [least, most] = [allowed.start(), allowed.end()].map(|number| write(*number, units));
    format!("{least} to {most}")
}

/// In the largest unit that leaves no fraction.
fn write(number: u64, units: &Units) -> String {
    let fits = |scale: u64| number >= scale && number.is_multiple_of(scale);
    let unit = units.iter().rev().find(|(_, scale)| fits(*scale));
    let (name, scale) = unit.unwrap_or(&units[0]);
    format!("{}{name}", number / scale)
}

fn names(units: &Units) -> String {
    let named = units.iter().map(|(name, _)| *name);
    let names: Vec<_> = named.filter(|name| !name.is_empty()).collect();
    let (last, names) = names.split_last().expect("there are units");
    format!("{} or {last}", names.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_time(text: &str) -> Result<Duration, String> {
        time(Duration::from_millis(10)..=Duration::from_secs(30 * 86_400))(text)
    }

    #[test]
    fn a_time_is_read_in_any_unit_and_written_in_its_largest() {
        for (text, millis) in [
            ("10ms", 10),
            ("50s", 50_000),
            ("90m", 5_400_000),
            ("1h", 3_600_000),
            ("7d", 604_800_000),
        ] {
            let time = Duration::from_millis(millis);
            assert_eq!(read_time(text), Ok(time));
            assert_eq!(in_words(time), text);
        }
    }

    #[test]
    fn what_is_wrong_with_a_time_is_said() {
        for (text, wrong) in [
            ("50", "no unit: use ms, s, m, h or d"),
            ("50y", "an unknown unit: use ms, s, m, h or d"),
            ("1 s", "an unknown unit: use ms, s, m, h or d"),
            ("1m30s", "an unknown unit: use ms, s, m, h or d"),
            ("0.5s", "not a whole number: use a smaller unit"),
            ("0,5s", "not a whole number: use a smaller unit"),
            ("", "not a number with a unit: use 10ms to 30d"),
            ("-1s", "not a number with a unit: use 10ms to 30d"),
            ("9ms", "out of range: use 10ms to 30d"),
            ("31d", "out of range: use 10ms to 30d"),
            ("99999999999999999999d", "out of range: use 10ms to 30d"),
        ] {
            assert_eq!(read_time(text), Err(wrong.to_owned()), "{text}");
        }
    }

    #[test]
    fn a_size_is_in_bytes_unless_it_says_otherwise() {
        let size = size(1..=1 << 30);
        for (text, bytes) in [("1", 1), ("64KiB", 65_536), ("1GiB", 1 << 30)] {
            assert_eq!(size(text), Ok(bytes));
        }
        for (text, wrong) in [
            ("0", "out of range: use 1 to 1GiB"),
            ("1073741825", "out of range: use 1 to 1GiB"),
            ("32MB", "an unknown unit: use KiB, MiB or GiB"),
            ("1.5MiB", "not a whole number: use a smaller unit"),
        ] {
            assert_eq!(size(text), Err(wrong.to_owned()), "{text}");
        }
    }
}
