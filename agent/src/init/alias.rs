//! Matching module aliases. The kernel's aliases are file-name patterns (`pci:v00008086d00001000sv*sd*bc*sc*i*`); names of
//! modules count `-` and `_` as the same.

/// Whether `text` matches the pattern: `*` any characters, `?` one character, `[a-f0-9]` or `[!x]` one of a set, all else
/// itself; `-` equals `_`.
#[must_use]
pub fn matches(pattern: &str, text: &str) -> bool {
    glob(pattern.as_bytes(), text.as_bytes())
}

fn glob(pattern: &[u8], text: &[u8]) -> bool {
    let (mut p, mut t) = (0, 0);
    // Where to go on after the last star: the pattern behind it, and one more character taken by it. Only the last star
    // ever needs another try, so the time is bounded by the product of the lengths.
    let mut retry: Option<(usize, usize)> = None;
    while t < text.len() {
        let step = match pattern.get(p) {
            Some(b'*') => {
                retry = Some((p + 1, t));
                p += 1;
                continue;
            }
            Some(b'?') => Some(1),
            Some(b'[') => one_of(&pattern[p..], text[t]),
            Some(&c) => (normal(c) == normal(text[t])).then_some(1),
            None => None,
        };
        match (step, retry) {
            (Some(n), _) => {
                p += n;
                t += 1;
            }
            (None, Some((after, taken))) => {
                retry = Some((after, taken + 1));
                p = after;
                t = taken + 1;
            }
            (None, None) => return false,
        }
    }
    pattern[p..].iter().all(|c| *c == b'*')
}

fn normal(c: u8) -> u8 {
    if c == b'-' { b'_' } else { c }
}

/// For a set at the start of `pattern`: its length if `c` is in it. A set that is not closed is a plain `[`.
fn one_of(pattern: &[u8], c: u8) -> Option<usize> {
    let negated = matches!(pattern.get(1), Some(b'!' | b'^'));
    let start = 1 + usize::from(negated);
    // A `]` right at the start is a member.
    let Some(end) = (start + 1..pattern.len()).find(|i| pattern[*i] == b']') else {
        return (c == b'[').then_some(1);
    };
    let members = &pattern[start..end];
    let mut found = false;
    let mut i = 0;
    while i < members.len() {
        if i + 2 < members.len() && members[i + 1] == b'-' {
            found |= (members[i]..=members[i + 2]).contains(&c);
            i += 3;
        } else {
            found |= normal(members[i]) == normal(c);
            i += 1;
        }
    }
    (found != negated).then_some(end + 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn patterns_of_the_kernel() {
        let e1000 = "pci:v00008086d0000100Esv*sd*bc*sc*i*";
        assert!(matches(e1000, "pci:v00008086d0000100Esv00001AF4sd00001100bc02sc00i00"));
        assert!(!matches(e1000, "pci:v00008086d0000100Fsv00001AF4sd00001100bc02sc00i00"));
        assert!(matches("pci:v*d*sv*sd*bc01sc06i01*", "pci:v00008086d00002922sv0sd0bc01sc06i01"));
        assert!(matches("usb:v*p*d*dc*dsc*dp*ic08isc06ip50in*", "usb:v1p2d3dc00dsc00dp00ic08isc06ip50in00"));
        assert!(matches("scsi:t-0x00*", "scsi:t-0x00"));
        assert!(matches("acpi*:PNP0F13:*", "acpi:PNP0F03:PNP0F13:"));
        assert!(matches("usb:v045Ep[0-9a-c]00*", "usb:v045Epb00d"));
        assert!(!matches("usb:v045Ep[!0-9a-c]00*", "usb:v045Epb00d"));
        assert!(matches("fs-ext4", "fs_ext4") && matches("", "") && !matches("", "a") && matches("**", ""));
        assert!(matches("[]x]", "]") && matches("a[", "a[") && !matches("[a", "a"));
    }

    /// The definition of a pattern, slow and simple.
    fn slow(pattern: &[u8], text: &[u8]) -> bool {
        match (pattern.first(), text.first()) {
            (None, None) => true,
            (Some(b'*'), _) => slow(&pattern[1..], text) || (!text.is_empty() && slow(pattern, &text[1..])),
            (Some(b'?'), Some(_)) => slow(&pattern[1..], &text[1..]),
            (Some(a), Some(b)) if normal(*a) == normal(*b) => slow(&pattern[1..], &text[1..]),
            _ => false,
        }
    }

    proptest! {
        #[test]
        fn equals_its_definition(pattern in "[ab*?_-]{0,10}", text in "[ab_-]{0,12}") {
            prop_assert_eq!(matches(&pattern, &text), slow(pattern.as_bytes(), text.as_bytes()));
        }

        #[test]
        fn no_pattern_panics(pattern in "[\\[\\]!^a-c*?-]{0,20}", text in ".{0,20}") {
            let _ = matches(&pattern, &text); // any answer, but no panic
        }

        #[test]
        fn a_text_matches_itself_with_any_part_starred(text in "[a-zA-Z0-9:]{1,40}", from in 0usize..40, to in 0usize..40) {
            let (from, to) = (from.min(text.len()), to.min(text.len()));
            let (from, to) = (from.min(to), from.max(to));
            let pattern = format!("{}*{}", &text[..from], &text[to..]);
            prop_assert!(matches(&pattern, &text));
        }
    }
}
