//! PAX extended header records, `LENGTH KEY=VALUE\n`, written and parsed by their length alone: a value may hold any
//! byte, newlines included, and nothing inside a value is ever taken for another record.

use std::io::Write as _;

/// Longest extended header that is written or read, in bytes. The xattrs of one file fit many times over.
pub(crate) const MAX_EXTENDED: usize = 8 << 20;

/// Appends one record.
pub(crate) fn put(out: &mut Vec<u8>, key: &[u8], value: &[u8]) {
    let rest = key.len() + value.len() + 3;
    let mut length = rest + digits(rest);
    if digits(length) > digits(rest) {
        length += 1;
    }
    // Writing to memory cannot fail, nor does it take memory of its own.
    let _ = write!(out, "{length} ");
    out.extend_from_slice(key);
    out.push(b'=');
    out.extend_from_slice(value);
    out.push(b'\n');
}

fn digits(mut number: usize) -> usize {
    let mut count = 1;
    while number >= 10 {
        number /= 10;
        count += 1;
    }
    count
}

/// A record's key, its value, and what follows it.
pub(crate) type Record<'a> = (&'a [u8], &'a [u8], &'a [u8]);

/// Splits off the first record of `data`.
pub(crate) fn next(data: &[u8]) -> Result<Record<'_>, &'static str> {
    let space = data.iter().take(10).position(|&b| b == b' ').ok_or("a record without a length")?;
    let length = decimal(&data[..space]).ok_or("a record whose length is no number")?;
    let length = usize::try_from(length).map_err(|_| "a record longer than its header")?;
    if length > data.len() {
        return Err("a record longer than its header");
    }
    // Room for the length, the space, an equals sign and the newline.
    if length < space + 3 {
        return Err("a record shorter than its own length field");
    }
    let body = &data[space + 1..length - 1];
    if data[length - 1] != b'\n' {
        return Err("a record that does not end with a newline where its length says");
    }
    let equals = body.iter().position(|&b| b == b'=').ok_or("a record without an equals sign")?;
    if equals == 0 {
        return Err("a record without a key");
    }
    Ok((&body[..equals], &body[equals + 1..], &data[length..]))
}

/// A plain decimal number without sign; none when it is anything else or above `u64::MAX`.
pub(crate) fn decimal(text: &[u8]) -> Option<u64> {
    if text.is_empty() || text.len() > 20 {
        return None;
    }
    text.iter().try_fold(0u64, |sum, &b| {
        if b.is_ascii_digit() { sum.checked_mul(10)?.checked_add(u64::from(b - b'0')) } else { None }
    })
}

const NANOS: u32 = 1_000_000_000;

/// Appends a time as PAX writes it: decimal seconds, a fraction only where there is one, negative before 1970.
pub(crate) fn put_time(out: &mut Vec<u8>, key: &[u8], seconds: i64, nanos: u32) {
    let mut text = [0; 40];
    let mut rest = &mut text[..];
    let (sign, whole, fraction) = if seconds < 0 {
        let carried = i128::from(seconds) + i128::from(nanos > 0);
        ("-", -carried, if nanos > 0 { NANOS - nanos } else { 0 })
    } else {
        ("", i128::from(seconds), nanos)
    };
    // 31 bytes at most, so that writing cannot fail.
    let _ = write!(rest, "{sign}{whole}");
    if fraction > 0 {
        let _ = write!(rest, ".{fraction:09}");
    }
    let left = rest.len();
    let text = &text[..text.len() - left];
    let end =
        if fraction > 0 { text.iter().rposition(|&b| b != b'0').map_or(0, |at| at + 1) } else { text.len() };
    put(out, key, &text[..end]);
}

/// Reads what [`put_time`] writes; digits beyond nanoseconds are cut off.
pub(crate) fn parse_time(text: &[u8]) -> Option<(i64, u32)> {
    let (negative, text) = match text.strip_prefix(b"-") {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let (whole, fraction) = match text.iter().position(|&b| b == b'.') {
        Some(dot) => (&text[..dot], &text[dot + 1..]),
        None => (text, &b""[..]),
    };
    let whole = i64::try_from(decimal(whole)?).ok()?;
    if !fraction.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let nanos = (0..9).fold(0, |sum, i| sum * 10 + fraction.get(i).map_or(0, |b| u32::from(b - b'0')));
    match (negative, nanos) {
        (false, nanos) => Some((whole, nanos)),
        (true, 0) => Some((-whole, 0)),
        (true, nanos) => Some((-whole - 1, NANOS - nanos)),
    }
}

/// An xattr name as part of a key: `=` would end the key, so it is escaped the way GNU tar does it.
pub(crate) fn escape_name(name: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(name.len());
    for &byte in name {
        match byte {
            b'=' => out.extend_from_slice(b"%3D"),
            b'%' => out.extend_from_slice(b"%25"),
            byte => out.push(byte),
        }
    }
    out
}

/// Undoes [`escape_name`]; other percent signs stay as they are.
pub(crate) fn unescape_name(mut name: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(name.len());
    while let Some((&first, rest)) = name.split_first() {
        let (byte, after) = match name {
            [b'%', b'3', b'D', after @ ..] => (b'=', after),
            [b'%', b'2', b'5', after @ ..] => (b'%', after),
            _ => (first, rest),
        };
        out.push(byte);
        name = after;
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn time(seconds: i64, nanos: u32) -> Vec<u8> {
        let mut out = Vec::new();
        put_time(&mut out, b"mtime", seconds, nanos);
        next(&out).unwrap().1.to_vec()
    }

    #[test]
    fn lengths_that_change_their_own_digits() {
        for size in [0, 1, 3, 4, 5, 6, 92, 93, 94, 95, 96, 991, 992, 993, 994, 995, 9_988, 9_990, 99_990] {
            let mut out = Vec::new();
            put(&mut out, b"k", &vec![b'v'; size]);
            let length = decimal(out.split(|&b| b == b' ').next().unwrap()).unwrap();
            assert_eq!(length, out.len() as u64, "value of {size} bytes");
        }
    }

    #[test]
    fn a_newline_in_a_value_smuggles_nothing() {
        let mut out = Vec::new();
        put(&mut out, b"SCHILY.xattr.user.a", b"x\n23 linkpath=/etc/evil\n");
        let (key, value, rest) = next(&out).unwrap();
        assert_eq!(key, b"SCHILY.xattr.user.a");
        assert_eq!(value, b"x\n23 linkpath=/etc/evil\n");
        assert!(rest.is_empty());
    }

    #[test]
    fn broken_records_are_errors() {
        for bad in [
            &b""[..],
            b"x",
            b"5",
            b"99 a=b\n",
            b"6 a=b",
            b"6 a=bc",
            b"3 \n",
            b"5 ab\n",
            b"5 =b\n",
            b"-6 a=b\n",
            b"+6 a=b\n",
            b"99999999999999999999 a=b\n",
            b" a=b\n",
            b"2 a=b\n",
            b"0 a=b\n",
        ] {
            assert!(next(bad).is_err(), "{}", bad.escape_ascii());
        }
    }

    #[test]
    fn times_before_1970_and_with_ns() {
        for (seconds, nanos, text) in [
            (0, 0, "0"),
            (1, 5, "1.000000005"),
            (-1, 0, "-1"),
            (-1, 500_000_000, "-0.5"),
            (-2, 1, "-1.999999999"),
            (i64::MIN, 0, "-9223372036854775808"),
        ] {
            assert_eq!(time(seconds, nanos), text.as_bytes());
            if seconds > i64::MIN {
                assert_eq!(parse_time(text.as_bytes()), Some((seconds, nanos)));
            }
        }
        for bad in ["", "-", ".5", "1.x", "1e9", " 1", "--1", "9223372036854775808"] {
            assert_eq!(parse_time(bad.as_bytes()), None, "{bad}");
        }
    }

    proptest! {
        #[test]
        fn records_round_trip(records in proptest::collection::vec(
            ("[^=]{1,40}", proptest::collection::vec(any::<u8>(), 0..1200)), 0..8)) {
            let mut out = Vec::new();
            for (key, value) in &records {
                put(&mut out, key.as_bytes(), value);
            }
            let (mut data, mut seen) = (&out[..], Vec::new());
            while !data.is_empty() {
                let (key, value, rest) = next(data).unwrap();
                seen.push((String::from_utf8(key.to_vec()).unwrap(), value.to_vec()));
                data = rest;
            }
            prop_assert_eq!(seen, records);
        }

        #[test]
        fn any_bytes_parse_without_panic(data in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut data = &data[..];
            while let Ok((_, _, rest)) = next(data) {
                prop_assert!(rest.len() < data.len());
                data = rest;
            }
        }

        #[test]
        fn times_round_trip(seconds in -(1i64 << 55)..(1i64 << 55), nanos in 0u32..1_000_000_000) {
            prop_assert_eq!(parse_time(&time(seconds, nanos)), Some((seconds, nanos)));
        }

        #[test]
        fn names_round_trip(name in proptest::collection::vec(any::<u8>(), 0..60)) {
            let escaped = escape_name(&name);
            prop_assert!(!escaped.contains(&b'='));
            prop_assert_eq!(unescape_name(&escaped), name);
        }
    }
}
