//! Partitions that are kept: what the disk's own table says of them, read before anything is written, and an image of a
//! table that holds them alone. That stands on the disk while it is being installed, and again after a failure: it boots no
//! clone, and what was to be kept is found.

use super::gpt_table::block_size;
use anyhow::{Context, Result, bail};
use gpt::partition::PartitionAttributes;
use ka_layout::fit::Kept;
use ka_layout::model::TableKind;
use ka_layout::types::TypeCode;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use uuid::Uuid;

/// A partition as the disk's table has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Number and sectors.
    pub place: Kept,
    /// Its type.
    pub code: TypeCode,
    /// Its name (GPT).
    pub name: Option<String>,
    /// Its GUID (GPT).
    pub guid: Option<Uuid>,
    /// The attributes of a GPT entry.
    pub attributes: u64,
    /// Active flag, or the legacy-BIOS-bootable attribute.
    pub bootable: bool,
}

/// The table that stands on a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Standing {
    /// GUID of a GPT, or the signature of an MBR in its first four bytes.
    pub id: Uuid,
    /// Its partitions by number; an extended one is not among them.
    pub entries: Vec<Entry>,
}

/// Reads the table of the disk `device`, which must be of the given kind.
///
/// # Errors
/// When there is no such table or it cannot be read.
pub fn read(device: &Path, sector: u32, table: TableKind) -> Result<Standing> {
    let mut file = File::open(device).with_context(|| format!("opening {}", device.display()))?;
    match table {
        TableKind::Gpt => {
            let disk = gpt::GptConfig::new()
                .writable(false)
                .logical_block_size(block_size(sector)?)
                .open_from_device(file)
                .with_context(|| format!("reading the gpt of {}", device.display()))?;
            let entry = |(number, p): (&u32, &gpt::partition::Partition)| Entry {
                place: Kept { number: *number, first: p.first_lba, last: p.last_lba },
                code: TypeCode::Gpt(p.part_type_guid.guid),
                name: Some(p.name.clone()).filter(|n| !n.is_empty()),
                guid: Some(p.part_guid),
                attributes: p.flags,
                bootable: p.flags & PartitionAttributes::BOOTABLE.bits() != 0,
            };
            Ok(Standing { id: *disk.guid(), entries: disk.partitions().iter().map(entry).collect() })
        }
        TableKind::Mbr => {
            let read = mbrman::MBR::read_from(&mut file, sector)
                .with_context(|| format!("reading the mbr of {}", device.display()))?;
            let used: Vec<(usize, &mbrman::MBRPartitionEntry)> =
                read.iter().filter(|(_, e)| e.is_used()).collect();
            if used.iter().any(|(_, e)| e.sys == 0xee) {
                bail!("{} has a gpt, not an mbr", device.display());
            }
            let entry = |(number, e): &(usize, &mbrman::MBRPartitionEntry)| {
                Some(Entry {
                    place: Kept {
                        number: u32::try_from(*number).ok()?,
                        first: e.starting_lba.into(),
                        last: (u64::from(e.starting_lba) + u64::from(e.sectors)).checked_sub(1)?,
                    },
                    code: TypeCode::Mbr(e.sys),
                    name: None,
                    guid: None,
                    attributes: 0,
                    bootable: e.is_active(),
                })
            };
            let [a, b, c, d] = read.header.disk_signature;
            let mut id = [0; 16];
            // On the disk it is little-endian; people write it the other way round.
            id[..4].copy_from_slice(&[d, c, b, a]);
            let entries = used.iter().filter(|(_, e)| !e.is_extended()).filter_map(entry).collect();
            Ok(Standing { id: Uuid::from_bytes(id), entries })
        }
    }
}

/// Bytes of a disk, and where they stand.
pub type Piece = (u64, Vec<u8>);

/// Writes `pieces` as a file for [`load`]: offset and length, 8 bytes each, little-endian, then the bytes.
///
/// # Errors
/// When it cannot be written.
pub fn save(path: &Path, pieces: &[Piece]) -> Result<()> {
    let mut bytes = Vec::new();
    for (offset, data) in pieces {
        bytes.extend(offset.to_le_bytes());
        bytes.extend((data.len() as u64).to_le_bytes());
        bytes.extend(data);
    }
    fs::write(path, bytes).with_context(|| format!("writing {}", path.display()))
}

/// Reads what [`save`] wrote.
///
/// # Errors
/// When it cannot be read or is cut off.
pub fn load(path: &Path) -> Result<Vec<Piece>> {
    let bytes = fs::read(path).with_context(|| format!("reading {}", path.display()))?;
    pieces(&bytes).with_context(|| format!("{} is cut off", path.display()))
}

fn pieces(mut bytes: &[u8]) -> Option<Vec<Piece>> {
    let mut found = Vec::new();
    while !bytes.is_empty() {
        let (head, rest) = bytes.split_at_checked(16)?;
        let offset = u64::from_le_bytes(head[..8].try_into().ok()?);
        let length = usize::try_from(u64::from_le_bytes(head[8..].try_into().ok()?)).ok()?;
        let (data, rest) = rest.split_at_checked(length)?;
        found.push((offset, data.to_vec()));
        bytes = rest;
    }
    Some(found)
}

/// Puts `pieces` back onto a disk, each synced before the next: of two copies of a table one is whole whenever the power is
/// cut.
///
/// # Errors
/// When the disk cannot be written.
pub fn restore(disk: &File, pieces: &[Piece]) -> Result<()> {
    for (offset, data) in pieces {
        disk.write_all_at(data, *offset).with_context(|| format!("writing the kept table at {offset}"))?;
        disk.sync_all().context("syncing the kept table")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_is_saved_loads(pieces in proptest::collection::vec((any::<u64>(), proptest::collection::vec(any::<u8>(), 0..40)), 0..4),
            cut in 1_usize..16) {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("x");
            save(&path, &pieces).unwrap();
            prop_assert_eq!(load(&path).unwrap(), pieces.clone());
            let bytes = fs::read(&path).unwrap();
            if let Some((_, last)) = pieces.last() {
                // Cut within the last piece, it is refused.
                let cut = cut.min(16 + last.len() - 1);
                fs::write(&path, &bytes[..bytes.len() - cut]).unwrap();
                prop_assert!(load(&path).is_err());
            }
        }

        #[test]
        fn any_bytes_are_read_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..80)) {
            let _ = pieces(&bytes);
        }
    }
}
