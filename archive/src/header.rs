//! Single 512-byte headers: as the `tar` crate makes them, and reading them strictly. The numbers are
//! parsed here because the crate's own parser cuts large base-256 numbers off without an error.

use tar::{EntryType, Header};

/// The unit of a tar stream, in bytes.
pub(crate) const BLOCK: usize = 512;
/// Room for a name in a plain header.
pub(crate) const NAME_ROOM: usize = 100;

/// What a header of ours says beside its names and type.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Meta {
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    /// Whole seconds; a time before 1970 stands in a PAX record and is 0 here.
    pub seconds: i64,
    pub device: (u32, u32),
}

/// A finished header. Names beyond 100 bytes are cut: the full ones stand in PAX records. The same as the `tar` crate's,
/// which allocates memory for each number, too much where readers work at once.
pub(crate) fn build(kind: EntryType, name: &[u8], link: &[u8], meta: &Meta, size: u64) -> [u8; BLOCK] {
    let mut block = [0; BLOCK];
    fill(&mut block[..100], name);
    octal(&mut block[100..108], u64::from(meta.mode));
    put_number(&mut block[108..116], u64::from(meta.uid));
    put_number(&mut block[116..124], u64::from(meta.gid));
    put_number(&mut block[124..136], size);
    put_number(&mut block[136..148], u64::try_from(meta.seconds).unwrap_or(0));
    block[156] = kind.as_byte();
    fill(&mut block[157..257], link);
    block[257..265].copy_from_slice(b"ustar\x0000");
    octal(&mut block[329..337], u64::from(meta.device.0));
    octal(&mut block[337..345], u64::from(meta.device.1));
    block[148..156].fill(b' ');
    let sum = block.iter().map(|&b| u64::from(b)).sum();
    octal(&mut block[148..156], sum);
    block
}

fn fill(field: &mut [u8], bytes: &[u8]) {
    let count = field.len().min(bytes.len());
    field[..count].copy_from_slice(&bytes[..count]);
}

/// Octal digits that fill the field but for a NUL at its end.
fn octal(field: &mut [u8], mut value: u64) {
    if let [digits @ .., end] = field {
        *end = 0;
        for digit in digits.iter_mut().rev() {
            *digit = b'0' | (value & 7).to_le_bytes()[0];
            value >>= 3;
        }
    }
}

/// Octal, or base-256 where that has too few digits.
fn put_number(field: &mut [u8], value: u64) {
    if value >> (3 * (field.len() - 1)) == 0 {
        return octal(field, value);
    }
    let bytes = value.to_be_bytes();
    let start = field.len() - bytes.len();
    field[start..].copy_from_slice(&bytes);
    field[0] |= 0x80;
}

/// A header as it was read.
#[derive(Debug)]
pub(crate) struct Parsed {
    pub kind: EntryType,
    pub name: Vec<u8>,
    pub link: Vec<u8>,
    pub mode: u32,
    pub uid: u64,
    pub gid: u64,
    pub seconds: i64,
    pub size: u64,
    pub device: (u64, u64),
}

/// Reads a header; the error says which field is wrong.
pub(crate) fn parse(block: &[u8; BLOCK]) -> Result<Parsed, &'static str> {
    let sum = number(&block[148..156]).ok_or("its checksum is no number")?;
    let with_blanks = |i: usize, b: u8| if (148..156).contains(&i) { b' ' } else { b };
    let unsigned: i64 = block.iter().enumerate().map(|(i, &b)| i64::from(with_blanks(i, b))).sum();
    // Some old tars summed signed bytes.
    let signed: i64 =
        block.iter().enumerate().map(|(i, &b)| i64::from(with_blanks(i, b).cast_signed())).sum();
    if sum != unsigned && sum != signed {
        return Err("its checksum is wrong");
    }
    let header = Header::from_byte_slice(block);
    let kind = header.entry_type();
    let mut name = text(&block[..100]).to_vec();
    // The other dialects keep other things where ustar has the prefix.
    if &block[257..265] == b"ustar\x0000" {
        let prefix = text(&block[345..500]);
        if !prefix.is_empty() {
            name = [prefix, b"/", &name].concat();
        }
    }
    let positive = |field: &[u8], error| number(field).and_then(|n| u64::try_from(n).ok()).ok_or(error);
    let device = if matches!(kind, EntryType::Char | EntryType::Block) {
        (
            positive(&block[329..337], "its device number is wrong")?,
            positive(&block[337..345], "its device number is wrong")?,
        )
    } else {
        (0, 0)
    };
    Ok(Parsed {
        kind,
        name,
        link: text(&block[157..257]).to_vec(),
        // Masked to 12 bits, so that the conversion cannot fail.
        mode: u32::try_from(number(&block[100..108]).ok_or("its mode is no number")? & 0o7777).unwrap_or(0),
        uid: positive(&block[108..116], "its uid is wrong")?,
        gid: positive(&block[116..124], "its gid is wrong")?,
        size: positive(&block[124..136], "its size is wrong")?,
        seconds: number(&block[136..148]).ok_or("its mtime is wrong")?,
        device,
    })
}

/// A field up to its first NUL.
pub(crate) fn text(field: &[u8]) -> &[u8] {
    let end = field.iter().position(|&b| b == 0).unwrap_or(field.len());
    &field[..end]
}

/// A number: octal text (blank means 0), or base-256 when the top bit of the first byte is set.
pub(crate) fn number(field: &[u8]) -> Option<i64> {
    match field {
        [first, rest @ ..] if first & 0x80 != 0 => {
            // The bit after the marker is the sign; the others extend to any width.
            let negative = first & 0x40 != 0;
            let start = if negative { i128::from(first | 0x80) - 256 } else { i128::from(first & 0x7f) };
            let value =
                rest.iter().try_fold(start, |sum, &b| sum.checked_mul(256).map(|sum| sum + i128::from(b)))?;
            i64::try_from(value).ok()
        }
        _ => {
            let digits = field.trim_ascii_start();
            let end = digits.iter().position(|&b| b == b' ' || b == 0).unwrap_or(digits.len());
            if digits[end..].iter().any(|&b| b != b' ' && b != 0) {
                return None;
            }
            digits[..end].iter().try_fold(0i64, |sum, &b| {
                if !(b'0'..=b'7').contains(&b) {
                    return None;
                }
                sum.checked_mul(8)?.checked_add(i64::from(b - b'0'))
            })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn numbers_in_both_notations() {
        assert_eq!(number(b"0000644\0"), Some(0o644));
        assert_eq!(number(b"   644 \0"), Some(0o644));
        assert_eq!(number(b"\0\0\0\0\0\0\0\0"), Some(0));
        assert_eq!(number(b"77777777"), Some(0o7777_7777));
        assert_eq!(number(b"\x80\0\0\0\xee\x6b\x28\0"), Some(4_000_000_000));
        assert_eq!(number(b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"), Some(-1));
        assert_eq!(number(b"00000x4\0"), None);
        assert_eq!(number(b"0644\0\0x\0"), None);
        assert_eq!(number(b"-000001\0"), None);
        assert_eq!(number(b"0000008\0"), None);
    }

    #[test]
    fn a_size_beyond_64_bits_is_an_error_not_a_small_size() {
        // The low eight bytes say 0; the tar crate reads just those.
        let field = b"\x80\0\0\x01\0\0\0\0\0\0\0\0";
        assert_eq!(number(field), None);
        let block = build(EntryType::Regular, b"f", b"", &Meta::default(), 0);
        let mut header = Header::from_byte_slice(&block).clone();
        header.as_old_mut().size = *field;
        header.set_cksum();
        assert_eq!(header.size().unwrap(), 0, "the tar crate has learned to check; this note can go");
        assert_eq!(parse(header.as_bytes()).unwrap_err(), "its size is wrong");
    }

    #[test]
    fn what_is_built_is_read_back() {
        let meta =
            Meta { mode: 0o6755, uid: 4_000_000_000, gid: 7, seconds: 1 << 40, device: (8, 1_000_000) };
        let header = build(EntryType::Block, &[0xff; 100], &[0xfe; 100], &meta, 20 << 30);
        let parsed = parse(&header).unwrap();
        assert_eq!(parsed.kind, EntryType::Block);
        assert_eq!((parsed.name, parsed.link), (vec![0xff; 100], vec![0xfe; 100]));
        assert_eq!((parsed.mode, parsed.uid, parsed.gid), (0o6755, 4_000_000_000, 7));
        assert_eq!((parsed.seconds, parsed.size, parsed.device), (1 << 40, 20 << 30, (8, 1_000_000)));
    }

    #[test]
    fn a_flipped_bit_is_noticed() {
        let header = build(EntryType::Regular, b"name", b"", &Meta::default(), 5);
        for position in 0..BLOCK {
            let mut block = header;
            block[position] ^= 1;
            // A changed digit of the checksum is a wrong checksum; a changed terminator of it may still read the same.
            if !(154..156).contains(&position) {
                assert!(parse(&block).is_err(), "byte {position}");
            }
        }
    }

    proptest! {
        #[test]
        fn headers_are_those_of_the_tar_crate(
            name in proptest::collection::vec(1u8.., 0..120),
            link in proptest::collection::vec(1u8.., 0..120),
            mode in 0u32..0o10000,
            ids: (u32, u32),
            seconds in 0i64..1 << 40,
            size in 0u64..1 << 62,
            device in (0u32..1 << 12, 0u32..1 << 20),
        ) {
            let meta = Meta { mode, uid: ids.0, gid: ids.1, seconds, device };
            let ours = build(EntryType::Char, &name, &link, &meta, size);
            let mut theirs = Header::new_ustar();
            fill(&mut theirs.as_old_mut().name, &name);
            fill(&mut theirs.as_old_mut().linkname, &link);
            theirs.set_entry_type(EntryType::Char);
            theirs.set_mode(mode);
            theirs.set_uid(ids.0.into());
            theirs.set_gid(ids.1.into());
            theirs.set_mtime(seconds.cast_unsigned());
            theirs.set_size(size);
            theirs.set_device_major(device.0).unwrap();
            theirs.set_device_minor(device.1).unwrap();
            theirs.set_cksum();
            prop_assert_eq!(&ours[..], &theirs.as_bytes()[..]);
        }

        #[test]
        fn any_block_parses_without_panic(mut block in proptest::collection::vec(any::<u8>(), BLOCK)) {
            let bytes: &mut [u8; BLOCK] = (&mut block[..]).try_into().unwrap();
            let mut header = Header::from_byte_slice(bytes).clone();
            header.set_cksum();
            // Only the result's absence of panics matters.
            drop(parse(header.as_bytes()));
        }
    }
}
