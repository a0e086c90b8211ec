//! Times as texts: ISO 8601 as clients write it, read leniently, and the one form that all of
//! them read.
//!
//! .NET clients parse the times of a property bag in their "round-trip" form alone, with seven
//! digits after the second; another form makes them drop the connection (spec/mqtt.md 4.4). Node
//! writes three digits, Python none or six and sometimes no zone.

use std::fmt;

const TICKS_PER_SECOND: u32 = 10_000_000;
const SECONDS_PER_DAY: i64 = 86_400;
/// 0001-01-01 and the last second of 9999-12-31, as .NET's `DateTime`.
const SECONDS_MIN: i64 = -62_135_596_800;
const SECONDS_MAX: i64 = 253_402_300_799;

/// A moment between the years 1 and 9999, in steps of 100 ns. Its text is the round-trip form:
/// `2030-01-31T12:00:00.0000000Z`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp {
    /// Since 1970-01-01 UTC.
    seconds: i64,
    /// Of 100 ns, below [`TICKS_PER_SECOND`].
    ticks: u32,
}

impl Timestamp {
    /// Reads `YYYY-MM-DD`, then `T` or a space and `hh:mm`, then perhaps `:ss`, a fraction of any
    /// length (cut after seven digits) and a zone (`Z`, `±hh`, `±hhmm`, `±hh:mm`); without a zone
    /// it is UTC. A date alone is its midnight. Anything else is none.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let mut rest = Scanner(text.trim().as_bytes());
        let year = rest.digits(4)?;
        rest.byte(b'-')?;
        let month = rest.digits(2)?;
        rest.byte(b'-')?;
        let day = rest.digits(2)?;
        let days = days_since_1970(year, month, day)?;
        let mut time = (0, 0);
        let mut zone_s = 0;
        if !rest.is_empty() {
            rest.one_of(b"Tt ")?;
            time = rest.time()?;
            zone_s = rest.zone()?;
        }
        if !rest.is_empty() {
            return None;
        }
        let (second_of_day, ticks) = time;
        let seconds = days * SECONDS_PER_DAY + second_of_day - zone_s;
        (SECONDS_MIN..=SECONDS_MAX)
            .contains(&seconds)
            .then_some(Self { seconds, ticks })
    }

    /// The moment of Unix milliseconds; what lies after the year 9999 is its end.
    #[must_use]
    pub fn from_unix_ms(unix_ms: u64) -> Self {
        let seconds = i64::try_from(unix_ms / 1000).unwrap_or(i64::MAX);
        if seconds > SECONDS_MAX {
            return Self {
                seconds: SECONDS_MAX,
                ticks: TICKS_PER_SECOND - 1,
            };
        }
        let ms = u32::try_from(unix_ms % 1000).unwrap_or(0);
        Self {
            seconds,
            ticks: ms * (TICKS_PER_SECOND / 1000),
        }
    }

    /// Unix milliseconds, rounded down; a moment before 1970 is 0.
    #[must_use]
    pub fn unix_ms(self) -> u64 {
        let seconds = u64::try_from(self.seconds).unwrap_or(0);
        let ms = u64::from(self.ticks / (TICKS_PER_SECOND / 1000));
        if self.seconds < 0 {
            0
        } else {
            seconds * 1000 + ms
        }
    }
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let days = self.seconds.div_euclid(SECONDS_PER_DAY);
        let second = self.seconds.rem_euclid(SECONDS_PER_DAY);
        let (year, month, day) = date_of(days);
        let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
        let ticks = self.ticks;
        write!(
            f,
            "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{ticks:07}Z"
        )
    }
}

/// Days of a date of the Gregorian calendar since 1970-01-01; none when there is no such date.
fn days_since_1970(year: i64, month: i64, day: i64) -> Option<i64> {
    let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    let length = match month {
        2 if leap => 29,
        2 => 28,
        4 | 6 | 9 | 11 => 30,
        1..=12 => 31,
        _ => return None,
    };
    if year < 1 || !(1..=length).contains(&day) {
        return None;
    }
    // Years from March on, so that the leap day is the last of its year.
    let (year, month) = if month > 2 {
        (year, month - 3)
    } else {
        (year - 1, month + 9)
    };
    let of_years = year * 365 + year / 4 - year / 100 + year / 400;
    let of_months = (153 * month + 2) / 5;
    // 719,468 days lie between 0000-03-01 and 1970-01-01.
    Some(of_years + of_months + day - 1 - 719_468)
}

/// The inverse of [`days_since_1970`].
fn date_of(days: i64) -> (i64, i64, i64) {
    let days = days + 719_468;
    let era = days.div_euclid(146_097);
    let of_era = days.rem_euclid(146_097);
    let year_of_era = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month + 2) / 5 + 1;
    let year = year_of_era + era * 400;
    if month < 10 {
        (year, month + 3, day)
    } else {
        (year + 1, month - 9, day)
    }
}

/// What is left of the text.
struct Scanner<'a>(&'a [u8]);

impl Scanner<'_> {
    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn one_of(&mut self, bytes: &[u8]) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        if !bytes.contains(first) {
            return None;
        }
        self.0 = rest;
        Some(*first)
    }

    fn byte(&mut self, byte: u8) -> Option<u8> {
        self.one_of(&[byte])
    }

    /// A number of exactly so many digits.
    fn digits(&mut self, count: usize) -> Option<i64> {
        let mut value = 0;
        for _ in 0..count {
            value = value * 10 + i64::from(self.one_of(b"0123456789")? - b'0');
        }
        Some(value)
    }

    /// `hh:mm[:ss[.f…]]`: seconds of the day and ticks.
    fn time(&mut self) -> Option<(i64, u32)> {
        let hour = self.digits(2)?;
        self.byte(b':')?;
        let minute = self.digits(2)?;
        let mut second = 0;
        let mut ticks = 0;
        if self.byte(b':').is_some() {
            second = self.digits(2)?;
            if self.one_of(b".,").is_some() {
                ticks = self.fraction()?;
            }
        }
        let legal = hour < 24 && minute < 60 && second < 60;
        legal.then_some((hour * 3600 + minute * 60 + second, ticks))
    }

    fn fraction(&mut self) -> Option<u32> {
        let mut unit = TICKS_PER_SECOND;
        let mut ticks = 0;
        let mut count = 0;
        while let Some(digit) = self.one_of(b"0123456789") {
            unit /= 10;
            ticks += u32::from(digit - b'0') * unit;
            count += 1;
        }
        (count > 0).then_some(ticks)
    }

    /// Seconds that the zone is ahead of UTC.
    fn zone(&mut self) -> Option<i64> {
        if self.is_empty() || self.one_of(b"Zz").is_some() {
            return Some(0);
        }
        let sign = if self.one_of(b"+-")? == b'+' { 1 } else { -1 };
        let hours = self.digits(2)?;
        let mut minutes = 0;
        if !self.is_empty() {
            let _ = self.byte(b':');
            minutes = self.digits(2)?;
        }
        (hours < 24 && minutes < 60).then_some(sign * (hours * 3600 + minutes * 60))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn normal(text: &str) -> Option<String> {
        Timestamp::parse(text).map(|time| time.to_string())
    }

    #[test]
    fn what_every_sdk_writes_is_read() {
        for (text, expected) in [
            // .NET, Node, Python with and without fraction and zone.
            (
                "2030-01-31T12:00:00.0000000Z",
                "2030-01-31T12:00:00.0000000Z",
            ),
            ("2030-01-31T12:00:00.123Z", "2030-01-31T12:00:00.1230000Z"),
            ("2030-01-31T12:00:00.123456", "2030-01-31T12:00:00.1234560Z"),
            ("2030-01-31T12:00:00", "2030-01-31T12:00:00.0000000Z"),
            ("2030-01-31 12:00:00+00:00", "2030-01-31T12:00:00.0000000Z"),
            (
                "2030-01-31T12:00:00.1234567+02:00",
                "2030-01-31T10:00:00.1234567Z",
            ),
            ("2030-01-01T00:30:00-0930", "2030-01-01T10:00:00.0000000Z"),
            ("2030-01-01T00:30+01", "2029-12-31T23:30:00.0000000Z"),
            (
                "2030-01-31T12:00:00.12345678901",
                "2030-01-31T12:00:00.1234567Z",
            ),
            ("2030-01-31T12:00:00,5z", "2030-01-31T12:00:00.5000000Z"),
            ("2030-01-31", "2030-01-31T00:00:00.0000000Z"),
            (" 2030-01-31t12:00 ", "2030-01-31T12:00:00.0000000Z"),
            ("2028-02-29T00:00:00Z", "2028-02-29T00:00:00.0000000Z"),
            ("2000-02-29T23:59:59Z", "2000-02-29T23:59:59.0000000Z"),
            ("0001-01-01T00:00:00Z", "0001-01-01T00:00:00.0000000Z"),
            (
                "9999-12-31T23:59:59.9999999Z",
                "9999-12-31T23:59:59.9999999Z",
            ),
        ] {
            assert_eq!(normal(text).as_deref(), Some(expected), "{text}");
        }
    }

    #[test]
    fn what_is_no_time_is_none() {
        for text in [
            "",
            "tomorrow",
            "1735689600",
            "01/31/2030 12:00:00",
            "2030-1-31",
            "2030-01-32",
            "2030-02-29",
            "1900-02-29",
            "2030-13-01",
            "2030-00-10",
            "0000-01-01",
            "2030-01-31T",
            "2030-01-31T12",
            "2030-01-31T12:60",
            "2030-01-31T24:00:00",
            "2030-01-31T12:00:60",
            "2030-01-31T12:00:00.",
            "2030-01-31T12:00:00+2",
            "2030-01-31T12:00:00+24:00",
            "2030-01-31T12:00:00ZZ",
            "2030-01-31T12:00:00Z+01",
            "+2030-01-31",
            "0001-01-01T00:00:00+01:00",
            "9999-12-31T23:59:59-01:00",
            "２０３０-01-31",
        ] {
            assert_eq!(normal(text), None, "{text}");
        }
    }

    #[test]
    fn unix_milliseconds_go_both_ways() {
        let text = |ms| Timestamp::from_unix_ms(ms).to_string();
        assert_eq!(text(0), "1970-01-01T00:00:00.0000000Z");
        assert_eq!(text(1_787_300_000_042), "2026-08-21T08:13:20.0420000Z");
        assert_eq!(text(u64::MAX), "9999-12-31T23:59:59.9999999Z");
        assert_eq!(
            Timestamp::parse("1969-12-31").map(Timestamp::unix_ms),
            Some(0)
        );
    }

    proptest! {
        #[test]
        fn a_moment_survives_its_text(ms in 0..=253_402_300_799_999u64) {
            let time = Timestamp::from_unix_ms(ms);
            prop_assert_eq!(time.unix_ms(), ms);
            prop_assert_eq!(Timestamp::parse(&time.to_string()), Some(time));
        }

        #[test]
        fn days_follow_one_another(days in -719_162i64..2_932_896) {
            let (year, month, day) = date_of(days);
            prop_assert_eq!(days_since_1970(year, month, day), Some(days));
            let (next_year, next_month, next_day) = date_of(days + 1);
            let same_month = (year, month) == (next_year, next_month);
            prop_assert_eq!(next_day, if same_month { day + 1 } else { 1 });
        }

        #[test]
        fn a_zone_only_shifts(ms in 0..4_000_000_000_000u64, minutes in -1439i64..1440) {
            let time = Timestamp::from_unix_ms(ms);
            let text = time.to_string();
            let sign = if minutes < 0 { '-' } else { '+' };
            let (hours, rest) = (minutes.abs() / 60, minutes.abs() % 60);
            let zoned = text.replace('Z', &format!("{sign}{hours:02}:{rest:02}"));
            if let Some(shifted) = Timestamp::parse(&zoned) {
                prop_assert_eq!(shifted.seconds + minutes * 60, time.seconds);
                prop_assert_eq!(shifted.ticks, time.ticks);
            }
        }

        #[test]
        fn no_text_makes_the_parser_panic(text in "[0-9T:. +Zä-]{0,40}") {
            if let Some(time) = Timestamp::parse(&text) {
                prop_assert_eq!(Timestamp::parse(&time.to_string()), Some(time));
            }
        }
    }
}
