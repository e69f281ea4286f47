//! Sizes in the layout file as typed values: how big a partition shall be ([`Size`]), and how big a disk may be
//! ([`Bounds`]).

use ka_cli::units::parse_size;
use std::fmt;
use std::str::FromStr;

/// The unit to which partitions are aligned and rounded: 1 MiB.
pub const MIB: u64 = 1 << 20;
/// The least that `fill` takes: 16 MiB. A file system would not work in less.
pub const FILL_MIN: u64 = 16 * MIB;

/// How big a partition shall be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Size {
    /// So many bytes.
    Exact(u64),
    /// At least `min`, and as much more of what is left over as it can get, up to `max`.
    Range {
        /// The least, in bytes.
        min: u64,
        /// The most, in bytes; none: no limit.
        max: Option<u64>,
    },
    /// Hundredths of what the disk has for partitions, 1 to 100.
    Percent(u32),
    /// All that is left over; several share it by weight.
    Fill,
}

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("`{text}` is not a size (examples: 512M, 4G-20G, 4G-, 10%, fill)");
        let trimmed = text.trim();
        if trimmed == "fill" {
            return Ok(Self::Fill);
        }
        if let Some(number) = trimmed.strip_suffix('%') {
            let percent = number.trim().parse().map_err(|_| wrong())?;
            return if (1..=100).contains(&percent) { Ok(Self::Percent(percent)) } else { Err(wrong()) };
        }
        let size = match trimmed.split_once('-') {
            None => Self::Exact(parse_size(trimmed).map_err(|_| wrong())?),
            Some((min, max)) => {
                let min = parse_size(min).map_err(|_| wrong())?;
                let max = match max.trim() {
                    "" => None,
                    max => Some(parse_size(max).map_err(|_| wrong())?),
                };
                if max.is_some_and(|max| max < min) {
                    return Err(format!("`{text}`: the upper bound is below the lower"));
                }
                Self::Range { min, max }
            }
        };
        if size.min() == Some(0) {
            return Err(format!("`{text}`: a partition of no bytes"));
        }
        if size.min().is_some_and(|min| min > 1 << 60) {
            return Err(format!("`{text}` is more than any disk has"));
        }
        Ok(size)
    }
}

impl Size {
    /// The least number of bytes that satisfies it; none for a percentage, which depends on the disk.
    #[must_use]
    pub const fn min(self) -> Option<u64> {
        match self {
            Self::Exact(bytes) => Some(bytes),
            Self::Range { min, .. } => Some(min),
            Self::Percent(_) => None,
            Self::Fill => Some(FILL_MIN),
        }
    }

    /// Whether it takes part in sharing what is left over.
    #[must_use]
    pub const fn is_flexible(self) -> bool {
        matches!(self, Self::Range { .. } | Self::Fill)
    }
}

/// Writes `bytes` exactly and as short as possible: `512M`, `1G`, `1025K`, `77`.
#[must_use]
pub fn exact_text(bytes: u64) -> String {
    for (shift, unit) in [(40, 'T'), (30, 'G'), (20, 'M'), (10, 'K')] {
        if bytes > 0 && bytes.trailing_zeros() >= shift {
            return format!("{}{unit}", bytes >> shift);
        }
    }
    bytes.to_string()
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exact(bytes) => f.write_str(&exact_text(*bytes)),
            Self::Range { min, max: None } => write!(f, "{}-", exact_text(*min)),
            Self::Range { min, max: Some(max) } => write!(f, "{}-{}", exact_text(*min), exact_text(*max)),
            Self::Percent(percent) => write!(f, "{percent}%"),
            Self::Fill => f.write_str("fill"),
        }
    }
}

/// How big a disk may be: `8G-`, `-2T`, `100G-500G`, or an exact size. Both ends belong to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    /// The least, in bytes.
    pub min: Option<u64>,
    /// The most, in bytes.
    pub max: Option<u64>,
}

impl Bounds {
    /// Whether `bytes` lies within.
    #[must_use]
    pub fn holds(self, bytes: u64) -> bool {
        self.min.is_none_or(|min| bytes >= min) && self.max.is_none_or(|max| bytes <= max)
    }
}

impl FromStr for Bounds {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("`{text}` is not a range of disk sizes (examples: 8G-, -2T, 100G-500G)");
        let end = |text: &str| match text.trim() {
            "" => Ok(None),
            text => parse_size(text).map(Some).map_err(|_| wrong()),
        };
        let bounds = match text.trim().split_once('-') {
            None => {
                let size = Some(parse_size(text).map_err(|_| wrong())?);
                Self { min: size, max: size }
            }
            Some((min, max)) => Self { min: end(min)?, max: end(max)? },
        };
        if bounds.min.is_none() && bounds.max.is_none() {
            return Err(wrong());
        }
        if let (Some(min), Some(max)) = (bounds.min, bounds.max)
            && max < min
        {
            return Err(format!("`{text}`: the upper bound is below the lower"));
        }
        Ok(bounds)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sizes_are_read() {
        for (text, size) in [
            ("512M", Size::Exact(512 << 20)),
            (" 4G-20G", Size::Range { min: 4 << 30, max: Some(20 << 30) }),
            ("4G-", Size::Range { min: 4 << 30, max: None }),
            ("10%", Size::Percent(10)),
            ("fill", Size::Fill),
        ] {
            assert_eq!(text.parse(), Ok(size), "{text}");
        }
        for text in
            ["", "0", "0%", "101%", "1.5%", "5G-4G", "-4G", "all", "Fill", "-", "8P-9000000P", "2048P"]
        {
            assert!(text.parse::<Size>().is_err(), "{text}");
        }
        assert_eq!("5G-4G".parse::<Size>().unwrap_err(), "`5G-4G`: the upper bound is below the lower");
        assert_eq!("0".parse::<Size>().unwrap_err(), "`0`: a partition of no bytes");
    }

    #[test]
    fn bounds_are_read() {
        let bounds = |text: &str| text.parse::<Bounds>().unwrap();
        assert!(bounds("8G-").holds(8 << 30) && !bounds("8G-").holds((8 << 30) - 1));
        assert!(bounds("-2T").holds(2 << 40) && !bounds("-2T").holds((2 << 40) + 1));
        assert!(
            bounds("1G-2G").holds(3 << 29) && bounds("1G").holds(1 << 30) && !bounds("1G").holds(2 << 30)
        );
        for text in ["", "-", "x", "2G-1G", "1G-2G-3G"] {
            assert!(text.parse::<Bounds>().is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_read_without_panic(text in "\\PC{0,20}") {
            // Only that they return is of interest here.
            let _ = (text.parse::<Size>(), text.parse::<Bounds>());
        }

        #[test]
        fn what_is_written_reads_back(min in 1_u64..1 << 60, more in proptest::option::of(0_u64..1 << 50), kind in 0..4) {
            let size = match kind {
                0 => Size::Exact(min),
                1 => Size::Range { min, max: more.map(|more| min + more) },
                2 => Size::Percent(u32::try_from(min % 100).unwrap() + 1),
                _ => Size::Fill,
            };
            prop_assert_eq!(size.to_string().parse::<Size>(), Ok(size));
        }
    }
}
