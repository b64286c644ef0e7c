//! Parses and formats durations, rates and shares.

use std::time::Duration;

/// Parses `250us`, `50ms`, `2s`, `1.5m` or `1h`. The unit is required, because a bare number is usually a mistake.
///
/// # Errors
/// A sentence that explains the syntax.
pub fn duration(text: &str) -> Result<Duration, String> {
    let text = text.trim();
    let split = text.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let factor = match unit {
        "us" | "µs" => 1e-6,
        "ms" => 1e-3,
        "s" => 1.0,
        "m" | "min" => 60.0,
        "h" => 3600.0,
        _ => return Err(format!("{text:?} is not a duration; write it like 50ms, 10s or 1m")),
    };
    let number: f64 =
        number.parse().map_err(|_| format!("{text:?} is not a duration; write it like 50ms, 10s or 1m"))?;
    Duration::try_from_secs_f64(number * factor).map_err(|_| format!("{text:?} is too long"))
}

/// Parses `500` or `500/s`: releases a second, above zero.
///
/// # Errors
/// A sentence that explains the syntax.
pub fn rate(text: &str) -> Result<f64, String> {
    let number = text.trim();
    let number = number.strip_suffix("/s").unwrap_or(number);
    match number.parse::<f64>() {
        Ok(rate) if rate.is_finite() && rate > 0.0 => Ok(rate),
        _ => Err(format!("{text:?} is not a rate; write a number of releases a second, like 500 or 500/s")),
    }
}

/// Parses a share from 0 to 1, written as `0.1` or `10%`.
///
/// # Errors
/// A sentence that explains the syntax.
pub fn share(text: &str) -> Result<f64, String> {
    let wrong = || format!("{text:?} is not a share; write it like 0.1 or 10%");
    let (number, factor) = text.trim().strip_suffix('%').map_or((text.trim(), 1.0), |number| (number, 0.01));
    let share = number.trim().parse::<f64>().map_err(|_| wrong())? * factor;
    if (0.0..=1.0).contains(&share) { Ok(share) } else { Err(wrong()) }
}

/// Formats a time with three digits and a suitable unit: `3.21 ms`.
#[must_use]
pub fn seconds(seconds: f64) -> String {
    match seconds {
        s if !s.is_finite() => "-".to_owned(),
        s if s >= 100.0 => format!("{s:.0} s"),
        s if s >= 10.0 => format!("{s:.1} s"),
        s if s >= 1.0 => format!("{s:.2} s"),
        s if s >= 0.1 => format!("{:.0} ms", s * 1e3),
        s if s >= 0.01 => format!("{:.1} ms", s * 1e3),
        s if s >= 0.001 => format!("{:.2} ms", s * 1e3),
        s => format!("{:.0} µs", s * 1e6),
    }
}

/// Formats a whole number with a thin space between thousands: `12 345`.
#[must_use]
pub fn count(number: f64) -> String {
    if !number.is_finite() {
        return "-".to_owned();
    }
    let digits = format!("{:.0}", number.abs());
    let mut out = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            out.push('\u{202f}');
        }
        out.push(digit);
    }
    if number < 0.0 { format!("-{out}") } else { out }
}

/// Formats a rate: as a whole number, or with one decimal below 100.
#[must_use]
pub fn per_second(rate: f64) -> String {
    if rate < 100.0 { format!("{rate:.1}") } else { count(rate) }
}

/// Formats a share in percent.
#[must_use]
pub(crate) fn percent(share: f64) -> String {
    let percent = share * 100.0;
    if percent == 0.0 {
        "0 %".to_owned()
    } else if percent < 0.1 {
        format!("{percent:.3} %")
    } else {
        format!("{percent:.1} %")
    }
}

/// Formats seconds since 1970 as date and time of day in UTC, for people.
#[must_use]
pub fn date(unix: u64) -> String {
    let (date, rest) = (day(unix), unix % 86_400);
    format!("{date} {:02}:{:02} UTC", rest / 3600, rest / 60 % 60)
}

/// Formats seconds since 1970 as in RFC 3339.
#[must_use]
pub fn timestamp(unix: u64) -> String {
    let (date, rest) = (day(unix), unix % 86_400);
    format!("{date}T{:02}:{:02}:{:02}Z", rest / 3600, rest / 60 % 60, rest % 60)
}

/// The date of seconds since 1970. The algorithm is `civil_from_days` by Howard Hinnant.
fn day(unix: u64) -> String {
    let days = unix / 86_400 + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    format!("{year}-{month:02}-{day:02}")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn people_write_and_read_units() {
        assert_eq!(duration("50ms").unwrap(), Duration::from_millis(50));
        assert_eq!(duration("1.5m").unwrap(), Duration::from_secs(90));
        assert_eq!(duration("250us").unwrap(), Duration::from_micros(250));
        for wrong in ["", "5", "ms", "5 parsecs", "-1s", "1e9s", "1..2s"] {
            assert!(duration(wrong).unwrap_err().contains("duration"), "{wrong}");
        }
        assert_eq!(rate("3000/s").unwrap(), 3000.0);
        for wrong in ["", "0", "-5", "inf", "many"] {
            assert!(rate(wrong).is_err(), "{wrong}");
        }
        assert_eq!(share("10%").unwrap(), 0.1);
        assert_eq!(share("0.25").unwrap(), 0.25);
        assert!(share("110%").is_err());
        assert_eq!(seconds(0.003_214), "3.21 ms");
        assert_eq!(seconds(12.34), "12.3 s");
        assert_eq!(seconds(0.000_05), "50 µs");
        assert_eq!(count(1_234_567.0), "1\u{202f}234\u{202f}567");
        assert_eq!(percent(0.000_5), "0.050 %");
        assert_eq!(date(0), "1970-01-01 00:00 UTC");
        assert_eq!(date(951_827_696), "2000-02-29 12:34 UTC");
        assert_eq!(timestamp(951_827_696), "2000-02-29T12:34:56Z");
    }
}
