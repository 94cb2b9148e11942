//! Points in time as Postgres prints them and as the wire contract wants them.
//!
//! A `timestamptz` leaves a session with `datestyle = ISO` and `timezone = UTC`
//! as `2026-03-01 12:00:00.5+00`: trailing zeros dropped, years above 9999 and
//! `BC` possible, `infinity` too. A Kafka record needs milliseconds since 1970,
//! the envelope ISO 8601. Both need the same microseconds.

use std::fmt;
use std::time::SystemTime;

const MICROS_PER_SECOND: i64 = 1_000_000;
const SECONDS_PER_DAY: i64 = 86_400;

/// Microseconds since 1970-01-01 00:00:00 UTC.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Timestamp(i64);

/// The text is not a point in time that a record can carry.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("\"{0}\" is not a timestamp in UTC between the years 1 and 9999")]
pub struct TimestampError(String);

impl Timestamp {
    /// The first of the year 1: no event's is before it.
    pub const MIN: Self = Self(-62_135_596_800 * MICROS_PER_SECOND);

    /// From microseconds since 1970.
    pub const fn from_unix_micros(micros: i64) -> Self {
        Self(micros)
    }

    /// From microseconds since 2000, the epoch of the replication protocol.
    pub const fn from_postgres_micros(micros: i64) -> Self {
        const POSTGRES_EPOCH_SECONDS: i64 = 946_684_800;
        Self(micros.saturating_add(POSTGRES_EPOCH_SECONDS * MICROS_PER_SECOND))
    }

    /// Microseconds since 1970.
    pub const fn unix_micros(self) -> i64 {
        self.0
    }

    /// Milliseconds since 1970, rounded down.
    pub const fn unix_millis(self) -> i64 {
        self.0.div_euclid(1000)
    }

    /// Reads `YYYY-MM-DD HH:MM:SS[.f…]+00`, what Postgres prints in UTC.
    ///
    /// # Errors
    /// If the text is anything else: another zone, `infinity`, a year before 1
    /// or after 9999.
    pub fn parse(text: &str) -> Result<Self, TimestampError> {
        parse(text.as_bytes()).ok_or_else(|| TimestampError(text.to_owned()))
    }
}

impl From<SystemTime> for Timestamp {
    fn from(time: SystemTime) -> Self {
        let since_epoch = time.duration_since(SystemTime::UNIX_EPOCH);
        let micros = since_epoch.map_or(0, |since| since.as_micros());
        Self(i64::try_from(micros).unwrap_or(i64::MAX))
    }
}

/// `YYYY-MM-DDTHH:MM:SS[.ffffff]+00:00`, the fraction left out when it is zero.
impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.0.div_euclid(MICROS_PER_SECOND);
        let micros = self.0.rem_euclid(MICROS_PER_SECOND);
        let (year, month, day) = civil_from_days(seconds.div_euclid(SECONDS_PER_DAY));
        let second_of_day = seconds.rem_euclid(SECONDS_PER_DAY);
        let (hour, minute, second) = (
            second_of_day / 3600,
            second_of_day / 60 % 60,
            second_of_day % 60,
        );
        // Each event has one: by `write!` it costs ten times as much.
        let mut text = *b"YYYY-MM-DDTHH:MM:SS.ffffff";
        if !(0..=9999).contains(&year) {
            return write!(
                f,
                "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{micros:06}+00:00"
            );
        }
        for (field, number) in [
            (0..4, year),
            (5..7, month),
            (8..10, day),
            (11..13, hour),
            (14..16, minute),
            (17..19, second),
            (20..26, micros),
        ] {
            print(&mut text[field], number);
        }
        let text = if micros == 0 { &text[..19] } else { &text };
        f.write_str(std::str::from_utf8(text).map_err(|_| fmt::Error)?)?;
        f.write_str("+00:00")
    }
}

/// The decimal digits of a number that has no more than fit.
fn print(field: &mut [u8], number: i64) {
    let mut rest = number;
    for digit in field.iter_mut().rev() {
        *digit = b'0' + u8::try_from(rest % 10).unwrap_or_default();
        rest /= 10;
    }
}

fn parse(text: &[u8]) -> Option<Timestamp> {
    let text = text.strip_suffix(b"+00")?;
    let (whole, fraction) = match text.get(19) {
        None => (text, None),
        Some(b'.') => (&text[..19], Some(&text[20..])),
        Some(_) => return None,
    };
    let &[
        y0,
        y1,
        y2,
        y3,
        b'-',
        m0,
        m1,
        b'-',
        d0,
        d1,
        b' ',
        h0,
        h1,
        b':',
        n0,
        n1,
        b':',
        s0,
        s1,
    ] = whole
    else {
        return None;
    };
    let year = digits(&[y0, y1, y2, y3])?;
    let month = digits(&[m0, m1]).filter(|month| (1..=12).contains(month))?;
    let day = digits(&[d0, d1]).filter(|day| (1..=31).contains(day))?;
    let hour = digits(&[h0, h1]).filter(|hour| *hour < 24)?;
    let minute = digits(&[n0, n1]).filter(|minute| *minute < 60)?;
    let second = digits(&[s0, s1]).filter(|second| *second < 60)?;
    let micros = fraction.map_or(Some(0), micros)?;
    if year == 0 {
        return None;
    }
    let days = days_from_civil(year, month, day);
    let seconds = days * SECONDS_PER_DAY + hour * 3600 + minute * 60 + second;
    Some(Timestamp(seconds * MICROS_PER_SECOND + micros))
}

fn digits(text: &[u8]) -> Option<i64> {
    text.iter().try_fold(0, |number, byte| {
        byte.is_ascii_digit()
            .then(|| number * 10 + i64::from(byte - b'0'))
    })
}

/// One to six digits after the point, in microseconds.
fn micros(fraction: &[u8]) -> Option<i64> {
    let missing = 6usize.checked_sub(fraction.len()).filter(|n| *n < 6)?;
    let scale = 10i64.pow(u32::try_from(missing).ok()?);
    Some(digits(fraction)? * scale)
}

/// Days since 1970-01-01 of a date in the proleptic Gregorian calendar.
///
/// Source: H. Hinnant, "chrono-Compatible Low-Level Date Algorithms"
/// (<https://howardhinnant.github.io/date_algorithms.html>): count years from 1
/// March, so that the leap day comes last.
fn days_from_civil(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let era = year.div_euclid(400);
    let year_of_era = year.rem_euclid(400);
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
    era * 146_097 + day_of_era - 719_468
}

/// The inverse of [`days_from_civil`].
fn civil_from_days(days: i64) -> (i64, i64, i64) {
    let days = days + 719_468;
    let era = days.div_euclid(146_097);
    let day_of_era = days.rem_euclid(146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 {
        month_from_march + 3
    } else {
        month_from_march - 9
    };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    (year, month, day)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn prints_what_the_wire_contract_says() {
        for (postgres, wire, millis) in [
            ("1970-01-01 00:00:00+00", "1970-01-01T00:00:00+00:00", 0),
            (
                "2026-03-01 12:34:56.5+00",
                "2026-03-01T12:34:56.500000+00:00",
                1_772_368_496_500,
            ),
            (
                "2024-02-29 23:59:59.000001+00",
                "2024-02-29T23:59:59.000001+00:00",
                1_709_251_199_000,
            ),
            (
                "1969-12-31 23:59:59.999999+00",
                "1969-12-31T23:59:59.999999+00:00",
                -1,
            ),
        ] {
            let timestamp = Timestamp::parse(postgres).unwrap();
            assert_eq!(timestamp.to_string(), wire);
            assert_eq!(timestamp.unix_millis(), millis);
        }
    }

    #[test]
    fn the_protocol_counts_from_2000() {
        let timestamp = Timestamp::from_postgres_micros(0);
        assert_eq!(timestamp.to_string(), "2000-01-01T00:00:00+00:00");
    }

    #[test]
    fn refuses_what_a_record_cannot_carry() {
        for text in [
            "infinity",
            "-infinity",
            "10000-01-01 00:00:00+00",
            "0044-03-15 00:00:00+00 BC",
            "2026-03-01 12:00:00+01",
            "2026-03-01 12:00:00.1234567+00",
            "2026-03-01 12:00:00.+00",
            "2026-13-01 12:00:00+00",
            "",
        ] {
            assert!(Timestamp::parse(text).is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn what_is_printed_reads_back(micros in -62_135_596_800_000_000i64..253_402_300_800_000_000) {
            let timestamp = Timestamp::from_unix_micros(micros);
            let postgres = timestamp.to_string().replace('T', " ").replace("+00:00", "+00");
            prop_assert_eq!(Timestamp::parse(&postgres), Ok(timestamp));
        }
    }
}
