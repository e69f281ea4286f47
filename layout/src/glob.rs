//! Matching disk models, serial numbers and paths with `*` and `?`, without regard to case.

/// Whether `text` is what `pattern` describes: `*` any run of characters, `?` any one; case does not matter.
#[must_use]
pub fn matches(pattern: &str, text: &str) -> bool {
    let pattern: Vec<char> = pattern.trim().to_lowercase().chars().collect();
    let text: Vec<char> = text.trim().to_lowercase().chars().collect();
    // Greedy with one way back: on a mismatch the last `*` takes one character more. Time is at most product of lengths.
    let (mut p, mut t) = (0, 0);
    let mut back: Option<(usize, usize)> = None;
    while t < text.len() {
        match pattern.get(p) {
            Some('*') => {
                back = Some((p, t));
                p += 1;
            }
            Some(&c) if c == '?' || c == text[t] => {
                p += 1;
                t += 1;
            }
            _ => match back {
                Some((star, taken)) => {
                    back = Some((star, taken + 1));
                    p = star + 1;
                    t = taken + 1;
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|c| *c == '*')
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn patterns_match() {
        for (pattern, text) in [
            ("Samsung*", "SAMSUNG SSD 980  "),
            ("*", ""),
            ("a*b*c", "axxbxbxc"),
            ("QEMU ?ARDDISK", "QEMU HARDDISK"),
            ("/dev/sd?", "/dev/sda"),
            ("", ""),
        ] {
            assert!(matches(pattern, text), "{pattern} {text}");
        }
        for (pattern, text) in [("a*b", "abc"), ("", "x"), ("?", ""), ("/dev/sd?", "/dev/sdaa"), ("ab", "a")]
        {
            assert!(!matches(pattern, text), "{pattern} {text}");
        }
    }

    proptest! {
        #[test]
        fn a_text_matches_itself_and_stars_around_any_part(a in "[a-z]{0,6}", b in "[a-z]{0,6}", c in "[a-z]{0,6}") {
            let text = format!("{a}{b}{c}");
            prop_assert!(matches(&text, &text));
            let pattern = format!("*{b}*");
            prop_assert!(matches(&pattern, &text));
            let pattern = format!("{a}*{c}");
            prop_assert!(matches(&pattern, &text));
        }
    }
}
