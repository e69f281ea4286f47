//! Sizes and times as people write them: `512M`, `1.5G`, `90s`, `10m`. Sizes are powers of 1024.

use std::time::Duration;

/// What is wrong with a size or a time.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UnitError {
    /// It is not a size.
    #[error("`{0}` is not a size (examples: 4096, 512M, 1.5G)")]
    Size(String),
    /// It is not a time.
    #[error("`{0}` is not a time (examples: 8, 90s, 10m, 2h)")]
    Time(String),
}

/// Bytes of a size such as `4096`, `512M`, `1.5G` or `1GiB` (powers of 1024).
///
/// # Errors
/// When `text` is not such a size or exceeds 2^63.
pub fn parse_size(text: &str) -> Result<u64, UnitError> {
    let wrong = || UnitError::Size(text.to_owned());
    let trimmed = text.trim();
    let split = trimmed.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(trimmed.len());
    let (number, unit) = trimmed.split_at(split);
    let shift = match unit.trim().to_ascii_lowercase().trim_end_matches("ib").trim_end_matches('b') {
        "" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        "p" => 50,
        _ => return Err(wrong()),
    };
    if let Ok(whole) = number.parse::<u64>() {
        let bytes = whole.checked_mul(1 << shift).ok_or_else(wrong)?;
        return if bytes < 1 << 63 { Ok(bytes) } else { Err(wrong()) };
    }
    // A fraction: kept exact by counting in millionths, as floating point would round large sizes.
    let (whole, fraction) = number.split_once('.').ok_or_else(wrong)?;
    if fraction.is_empty() || fraction.len() > 6 || !fraction.bytes().all(|b| b.is_ascii_digit()) {
        return Err(wrong());
    }
    let whole: u128 = whole.parse().map_err(|_| wrong())?;
    let millionths: u128 = format!("{fraction:0<6}").parse().map_err(|_| wrong())?;
    let bytes = ((whole * 1_000_000 + millionths) << shift) / 1_000_000;
    u64::try_from(bytes).ok().filter(|b| *b < 1 << 63).ok_or_else(wrong)
}

/// A size for people: three significant digits, powers of 1024 (`1.50 GiB`).
#[must_use]
pub fn show_size(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    #[allow(clippy::cast_precision_loss)]
    let mut value = bytes as f64 / 1024.0;
    let mut unit = 0;
    while value >= 1023.5 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let digits = if value < 9.995 { 2 } else { usize::from(value < 99.95) };
    format!("{value:.digits$} {}", UNITS[unit])
}

/// A time such as `8`, `90s`, `10m`, `2h` or `250ms`; a bare number is seconds.
///
/// # Errors
/// When `text` is not such a time or exceeds a year.
pub fn parse_time(text: &str) -> Result<Duration, UnitError> {
    let wrong = || UnitError::Time(text.to_owned());
    let trimmed = text.trim();
    let split = trimmed.find(|c: char| !c.is_ascii_digit()).unwrap_or(trimmed.len());
    let (number, unit) = trimmed.split_at(split);
    let number: u64 = number.parse().map_err(|_| wrong())?;
    let millis = match unit.trim() {
        "ms" => 1,
        "" | "s" => 1000,
        "m" | "min" => 60_000,
        "h" => 3_600_000,
        "d" => 86_400_000,
        _ => return Err(wrong()),
    };
    let time = number.checked_mul(millis).map(Duration::from_millis).ok_or_else(wrong)?;
    if time <= Duration::from_secs(366 * 86_400) { Ok(time) } else { Err(wrong()) }
}

/// A time for people: `4.2 s`, `3 min 07 s`, `2 h 05 min`.
#[must_use]
pub fn show_time(time: Duration) -> String {
    let s = time.as_secs();
    match s {
        0..60 => format!("{:.1} s", time.as_secs_f64()),
        60..3600 => format!("{} min {:02} s", s / 60, s % 60),
        _ => format!("{} h {:02} min", s / 3600, s / 60 % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("512M", 512 << 20),
            ("1GiB", 1 << 30),
            ("1.5G", 3 << 29),
            ("2 t", 2 << 40),
            ("3kb", 3 << 10),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for text in ["", "M", "1..5G", "-1", "1.G", "1X", "99999999999999999999", "9000000P", "1.5.2M", "1e3"]
        {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_are_shown() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.00 KiB"),
            (3 << 29, "1.50 GiB"),
            (20 << 20, "20.0 MiB"),
            (u64::MAX, "16.0 EiB"),
        ] {
            assert_eq!(show_size(bytes), text);
        }
    }

    #[test]
    fn times_are_read_and_shown() {
        for (text, ms) in [("8", 8000), ("90s", 90_000), ("10m", 600_000), ("250ms", 250), ("2h", 7_200_000)]
        {
            assert_eq!(parse_time(text), Ok(Duration::from_millis(ms)));
        }
        for text in ["", "s", "1y", "-1", "99999999999999d"] {
            assert!(parse_time(text).is_err(), "{text}");
        }
        assert_eq!(show_time(Duration::from_millis(4210)), "4.2 s");
        assert_eq!(show_time(Duration::from_secs(187)), "3 min 07 s");
        assert_eq!(show_time(Duration::from_secs(7500)), "2 h 05 min");
    }
}
