//! Partition types: the names that the layout file uses, and the codes that stand in the tables.

use crate::model::TableKind;
use uuid::{Uuid, uuid};

/// A partition type as it stands in a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TypeCode {
    /// In a GPT.
    Gpt(Uuid),
    /// In an MBR.
    Mbr(u8),
}

/// The EFI system partition.
pub const ESP: Uuid = uuid!("C12A7328-F81F-11D2-BA4B-00A0C93EC93B");
/// GRUB's place on a GPT disk that BIOS boots from.
pub const BIOS_BOOT: Uuid = uuid!("21686148-6449-6E6F-744E-656564454649");

/// Name, GUID, MBR code (0: there is none).
const NAMES: &[(&str, Uuid, u8)] = &[
    ("linux", uuid!("0FC63DAF-8483-4772-8E79-3D69D8477DE4"), 0x83),
    ("swap", uuid!("0657FD6D-A4AB-43C4-84E5-0933C84B4F4F"), 0x82),
    ("esp", ESP, 0xef),
    ("bios-boot", BIOS_BOOT, 0),
    ("linux-root-x86", uuid!("44479540-F297-41B2-9AF7-D131D5F0458A"), 0),
    ("linux-root-x86-64", uuid!("4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709"), 0),
    ("linux-root-arm64", uuid!("B921B045-1DF0-41C3-AF44-4C6F280D3FAE"), 0),
    ("linux-usr-x86-64", uuid!("8484680C-9521-48C6-9C11-B0720656F69E"), 0),
    ("linux-home", uuid!("933AC7E1-2EB4-4F13-B844-0E14E2AEF915"), 0),
    ("linux-srv", uuid!("3B8F8425-20E0-4F3B-907F-1A25A76F98E8"), 0),
    ("linux-var", uuid!("4D21B016-B534-45C2-A9FB-5C16E091FD2D"), 0),
    ("linux-tmp", uuid!("7EC6F557-3BC5-4ACA-B293-16EF5DF639D1"), 0),
    ("xbootldr", uuid!("BC13C2FF-59E6-4262-A352-B275FD6F7172"), 0xea),
    ("linux-lvm", uuid!("E6D6D379-F507-44C2-A23C-238F2A3DF928"), 0x8e),
    ("linux-raid", uuid!("A19D880F-05FC-4D3B-A006-743F0F84911E"), 0xfd),
    ("prep", uuid!("9E1A2D38-C612-4316-AA26-8B49521E5A8B"), 0x41),
    ("data", uuid!("EBD0A0A2-B9E5-4433-87C0-68B6B72699C7"), 0x07),
    ("fat32", uuid!("EBD0A0A2-B9E5-4433-87C0-68B6B72699C7"), 0x0c),
];

/// The code of the type `kind` in a table of `table`'s kind.
///
/// # Errors
/// In words, when there is no such type or it cannot stand in such a table.
pub fn code(kind: &str, table: TableKind) -> Result<TypeCode, String> {
    let names = || {
        let fits = |mbr: u8| table == TableKind::Gpt || mbr != 0;
        let names: Vec<&str> = NAMES.iter().filter(|n| fits(n.2)).map(|n| n.0).collect();
        names.join(", ")
    };
    match (table, NAMES.iter().find(|n| n.0 == kind)) {
        (TableKind::Gpt, Some((_, guid, _))) => Ok(TypeCode::Gpt(*guid)),
        (TableKind::Mbr, Some((_, _, 0))) => Err(format!("type `{kind}` does not exist on mbr")),
        (TableKind::Mbr, Some((_, _, code))) => Ok(TypeCode::Mbr(*code)),
        (TableKind::Gpt, None) => match Uuid::try_parse(kind) {
            Ok(guid) if !guid.is_nil() => Ok(TypeCode::Gpt(guid)),
            _ => Err(format!("`{kind}` is no partition type on gpt (a GUID, or one of {})", names())),
        },
        (TableKind::Mbr, None) => {
            let number = kind.strip_prefix("0x").and_then(|hex| u8::from_str_radix(hex, 16).ok());
            match number {
                Some(0x05 | 0x0f | 0x85) => {
                    Err("the extended partition is made by itself: leave it out".into())
                }
                Some(0 | 0xee) | None => Err(format!(
                    "`{kind}` is no partition type on mbr (0x83 or the like, or one of {})",
                    names()
                )),
                Some(code) => Ok(TypeCode::Mbr(code)),
            }
        }
    }
}

/// The name that the layout file uses for a code: the shortest that means exactly it.
#[must_use]
pub fn name(code: TypeCode) -> String {
    match code {
        TypeCode::Gpt(guid) => NAMES
            .iter()
            .find(|n| n.1 == guid)
            .map_or_else(|| guid.to_string().to_uppercase(), |n| n.0.to_owned()),
        TypeCode::Mbr(code) => NAMES
            .iter()
            .find(|n| n.2 == code && code != 0)
            .map_or_else(|| format!("{code:#04x}"), |n| n.0.to_owned()),
    }
}

/// Whether `kind` means the EFI system partition, by whatever name.
#[must_use]
pub fn is_esp(kind: &str, table: TableKind) -> bool {
    matches!(code(kind, table), Ok(TypeCode::Gpt(ESP) | TypeCode::Mbr(0xef)))
}

/// Whether `kind` means GRUB's BIOS boot partition, by whatever name.
#[must_use]
pub fn is_bios_boot(kind: &str, table: TableKind) -> bool {
    matches!(code(kind, table), Ok(TypeCode::Gpt(BIOS_BOOT)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_codes_agree() {
        for (text, guid, mbr) in NAMES {
            assert_eq!(code(text, TableKind::Gpt), Ok(TypeCode::Gpt(*guid)));
            let back = name(TypeCode::Gpt(*guid));
            assert_eq!(code(&back, TableKind::Gpt), Ok(TypeCode::Gpt(*guid)));
            if *mbr != 0 {
                assert_eq!(code(text, TableKind::Mbr), Ok(TypeCode::Mbr(*mbr)));
                assert_eq!(name(TypeCode::Mbr(*mbr)), *text);
            }
        }
        assert_eq!(code("0x27", TableKind::Mbr), Ok(TypeCode::Mbr(0x27)));
        assert_eq!(name(TypeCode::Mbr(0x27)), "0x27");
        assert!(
            is_esp("c12a7328-f81f-11d2-ba4b-00a0c93ec93b", TableKind::Gpt) && is_esp("0xef", TableKind::Mbr)
        );
    }

    #[test]
    fn wrong_types_are_named() {
        assert_eq!(code("bios-boot", TableKind::Mbr).unwrap_err(), "type `bios-boot` does not exist on mbr");
        assert_eq!(
            code("0x05", TableKind::Mbr).unwrap_err(),
            "the extended partition is made by itself: leave it out"
        );
        for (text, table) in [
            ("0x83", TableKind::Gpt),
            ("0x00", TableKind::Mbr),
            ("0xee", TableKind::Mbr),
            ("0x123", TableKind::Mbr),
            ("00000000-0000-0000-0000-000000000000", TableKind::Gpt),
            ("lunix", TableKind::Gpt),
            ("C12A7328-F81F-11D2-BA4B-00A0C93EC93B", TableKind::Mbr),
        ] {
            assert!(code(text, table).is_err(), "{text}");
        }
    }
}
