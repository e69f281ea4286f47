//! The `Range` header of HTTP (RFC 9110), as far as boot firmware uses it: one range of bytes.

/// Which bytes of a file are wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted {
    /// All of them.
    All,
    /// From the first to the last, both included.
    Part(u64, u64),
    /// None that the file has.
    Unsatisfiable,
}

/// Reads the header's value for a file of `length` bytes. What is not a single well-formed range of bytes means the whole
/// file, as the standard has it.
#[must_use]
pub fn wanted(header: Option<&str>, length: u64) -> Wanted {
    let Some((first, last)) =
        header.and_then(|h| h.trim().strip_prefix("bytes=")).and_then(|r| r.split_once('-'))
    else {
        return Wanted::All;
    };
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    // A number too large for 64 bits lies behind the end of any file.
    let number = |text: &str| text.parse().unwrap_or(u64::MAX);
    let (first, last) = (first.trim(), last.trim());
    match (digits(first), digits(last)) {
        (true, true) if number(first) > number(last) => Wanted::All,
        (true, true) if number(first) < length => Wanted::Part(number(first), number(last).min(length - 1)),
        (true, false) if last.is_empty() && number(first) < length => Wanted::Part(number(first), length - 1),
        (false, true) if first.is_empty() && number(last) > 0 && length > 0 => {
            Wanted::Part(length.saturating_sub(number(last)), length - 1)
        }
        (true, true) => Wanted::Unsatisfiable,
        (true, false) | (false, true) if first.is_empty() || last.is_empty() => Wanted::Unsatisfiable,
        _ => Wanted::All,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn ranges_are_read() {
        for (header, wanted_part) in [
            (None, Wanted::All),
            (Some("bytes=0-0"), Wanted::Part(0, 0)),
            (Some("bytes=2-5"), Wanted::Part(2, 5)),
            (Some("bytes=2-"), Wanted::Part(2, 9)),
            (Some("bytes=2-500"), Wanted::Part(2, 9)),
            (Some("bytes=-3"), Wanted::Part(7, 9)),
            (Some("bytes=-30"), Wanted::Part(0, 9)),
            (Some("bytes=10-"), Wanted::Unsatisfiable),
            (Some("bytes=10-20"), Wanted::Unsatisfiable),
            (Some("bytes=-0"), Wanted::Unsatisfiable),
            (Some("bytes=99999999999999999999999-"), Wanted::Unsatisfiable),
            (Some("bytes=5-2"), Wanted::All),
            (Some("bytes=0-1,4-5"), Wanted::All),
            (Some("bytes=-"), Wanted::All),
            (Some("bytes=x-"), Wanted::All),
            (Some("lines=0-1"), Wanted::All),
        ] {
            assert_eq!(wanted(header, 10), wanted_part, "{header:?}");
        }
        assert_eq!(wanted(Some("bytes=0-"), 0), Wanted::Unsatisfiable);
    }

    proptest! {
        #[test]
        fn a_part_lies_within_the_file(header in "(bytes=)?[0-9\\-, ]{0,30}", length in 0u64..1000) {
            if let Wanted::Part(first, last) = wanted(Some(&header), length) {
                prop_assert!(first <= last && last < length);
            }
        }
    }
}
