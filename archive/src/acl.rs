//! POSIX ACLs as GNU tar and bsdtar write and read them (`SCHILY.acl.access`, text), from and to the xattr that the
//! kernel takes. Our own streams carry both, and the xattr is what counts here. Names of users and groups are not looked
//! up: they belong to the machine that was packed, so an entry needs a number, in place of the name or as a fourth field.

const VERSION: u32 = 2;
const NO_ID: u32 = u32::MAX;

/// The value of `system.posix_acl_access` or `_default` for `text`.
pub(crate) fn from_text(text: &[u8]) -> Result<Vec<u8>, String> {
    let text = std::str::from_utf8(text).map_err(|_| "an ACL that is not UTF-8".to_owned())?;
    let mut entries = Vec::new();
    let lines = text
        .split(['\n', ','])
        .map(|line| line.split('#').next().unwrap_or("").trim_matches([' ', '\t', '\0']));
    for line in lines.filter(|line| !line.is_empty()) {
        entries.push(entry(line).ok_or_else(|| {
            format!(
                "the ACL entry {line:?} has no number (GNU tar sends numbers with --xattrs --xattrs-include='*', bsdtar always)"
            )
        })?);
    }
    entries.sort_unstable();
    let mut value = VERSION.to_le_bytes().to_vec();
    for (tag, id, permissions) in entries {
        value.extend_from_slice(&tag.to_le_bytes());
        value.extend_from_slice(&permissions.to_le_bytes());
        value.extend_from_slice(&id.to_le_bytes());
    }
    Ok(value)
}

/// Tag, id, permissions: the order in which the kernel wants entries sorted.
fn entry(line: &str) -> Option<(u16, u32, u16)> {
    let fields: Vec<&str> = line.split(':').map(str::trim).collect();
    let (kind, name, permissions, number) = match fields[..] {
        [kind, name, permissions] => (kind, name, permissions, None),
        [kind, name, permissions, number] => (kind, name, permissions, Some(number)),
        // "mask:rwx" and "other:r--" may come without the empty name.
        [kind @ ("mask" | "m" | "other" | "o"), permissions] => (kind, "", permissions, None),
        _ => return None,
    };
    let (plain, named) = match kind {
        "user" | "u" => (0x01, Some(0x02)),
        "group" | "g" => (0x04, Some(0x08)),
        "mask" | "m" => (0x10, None),
        "other" | "o" => (0x20, None),
        _ => return None,
    };
    let (tag, id) = if name.is_empty() {
        (plain, NO_ID)
    } else {
        let number = number.unwrap_or(name);
        if !number.bytes().all(|b| b.is_ascii_digit()) {
            return None;
        }
        (named?, number.parse().ok().filter(|&id| id != NO_ID)?)
    };
    let mut bits = 0;
    for letter in permissions.chars() {
        bits |= match letter {
            'r' => 4,
            'w' => 2,
            'x' => 1,
            '-' => 0,
            _ => return None,
        };
    }
    Some((tag, id, bits))
}

/// The text for the value of such an xattr; none when it is not of the kind that is known.
pub(crate) fn to_text(value: &[u8]) -> Option<String> {
    let entries = value.strip_prefix(&VERSION.to_le_bytes())?;
    let mut lines = Vec::new();
    for entry in entries.chunks(8) {
        let &[t0, t1, p0, p1, i0, i1, i2, i3] = entry else { return None };
        let id = u32::from_le_bytes([i0, i1, i2, i3]);
        let who = match u16::from_le_bytes([t0, t1]) {
            0x01 => "user:".to_owned(),
            0x02 => format!("user:{id}"),
            0x04 => "group:".to_owned(),
            0x08 => format!("group:{id}"),
            0x10 => "mask:".to_owned(),
            0x20 => "other:".to_owned(),
            _ => return None,
        };
        let bits = u16::from_le_bytes([p0, p1]);
        let letter = |bit, letter| if bits & bit == 0 { '-' } else { letter };
        lines.push(format!("{who}:{}{}{}", letter(4, 'r'), letter(2, 'w'), letter(1, 'x')));
    }
    Some(lines.join(","))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn text_and_value_are_the_same(ids in proptest::collection::btree_set(0..u32::MAX, 0..9), bits in 0u16..8) {
            let mut entries = vec![(0x01, NO_ID, bits), (0x04, NO_ID, 7 - bits), (0x20, NO_ID, 0), (0x10, NO_ID, 7)];
            entries.extend(ids.iter().flat_map(|&id| [(0x02, id, bits), (0x08, id, bits)]));
            entries.sort_unstable();
            let mut value = VERSION.to_le_bytes().to_vec();
            for (tag, id, bits) in entries {
                value.extend([&u16::to_le_bytes(tag)[..], &u16::to_le_bytes(bits), &u32::to_le_bytes(id)].concat());
            }
            prop_assert_eq!(from_text(to_text(&value).unwrap().as_bytes()).unwrap(), value);
        }

        #[test]
        fn any_bytes_give_no_panic(bytes in proptest::collection::vec(any::<u8>(), 0..60), text in ".{0,60}") {
            // What they give does not matter.
            drop((to_text(&bytes), from_text(&bytes), from_text(text.as_bytes())));
        }
    }

    #[test]
    fn gnu_and_bsd_texts() {
        let gnu = from_text(b"user::rwx\nuser:1000:r--\ngroup::r-x\ngroup:10:rw-\nmask::rwx\nother::---\n")
            .unwrap();
        let bsd =
            from_text(b"user::rwx,group::r-x,other::---,user:lisa:r--:1000,group:wheel:rw-:10,mask::rwx")
                .unwrap();
        assert_eq!(gnu, bsd);
        assert_eq!(gnu.len(), 4 + 6 * 8);
        assert_eq!(&gnu[..20], b"\x02\0\0\0\x01\0\x07\0\xff\xff\xff\xff\x02\0\x04\0\xe8\x03\0\0");
    }

    #[test]
    fn names_without_numbers_are_refused() {
        for bad in [
            "user:lisa:rwx",
            "user::rwz",
            "everyone::rwx",
            "user",
            "mask:5:rwx",
            "user:4294967295:r",
            "user:+5:r",
        ] {
            assert!(from_text(bad.as_bytes()).is_err(), "{bad}");
        }
    }
}
