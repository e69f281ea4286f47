//! Reading back what mkfs wrote: kind, UUID, label and state, straight from the superblock. Works without blkid, which the
//! initramfs need not have.

use ka_layout::model::Fs;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use uuid::Uuid;

/// Bytes from the beginning in which all superblocks lie that are known here (btrfs: 64 KiB + 4 KiB).
pub const HEAD: usize = 68 << 10;

/// What a superblock says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// The kind of file system; the ext family is told apart by its features.
    pub fs: Fs,
    /// Its UUID as blkid prints it.
    pub uuid: String,
    /// Its label, if it has one.
    pub label: Option<String>,
    /// Whether it says that it was not unmounted cleanly (ext family only; the others do not say it here).
    pub dirty: bool,
}

/// The superblock of the file system on `device`.
///
/// # Errors
/// When the device cannot be read.
pub fn read(device: &File) -> io::Result<Option<Found>> {
    let mut head = vec![0; HEAD];
    let mut filled = 0;
    while filled < head.len() {
        match device.read_at(&mut head[filled..], filled as u64)? {
            0 => break,
            n => filled += n,
        }
    }
    Ok(parse(&head[..filled]))
}

/// [`read`] from bytes: the first [`HEAD`] of a device, or all of a smaller one.
#[must_use]
pub fn parse(head: &[u8]) -> Option<Found> {
    ext(head).or_else(|| xfs(head)).or_else(|| btrfs(head)).or_else(|| swap(head)).or_else(|| vfat(head))
}

fn at<const N: usize>(head: &[u8], offset: usize) -> Option<[u8; N]> {
    head.get(offset..offset + N)?.try_into().ok()
}

fn uuid(head: &[u8], offset: usize) -> Option<String> {
    Some(Uuid::from_bytes(at(head, offset)?).to_string())
}

fn label(head: &[u8], offset: usize, length: usize) -> Option<String> {
    let bytes = head.get(offset..offset + length)?;
    let end = bytes.iter().position(|b| *b == 0).unwrap_or(length);
    let text = String::from_utf8_lossy(&bytes[..end]).into_owned();
    (!text.is_empty()).then_some(text)
}

fn ext(head: &[u8]) -> Option<Found> {
    let sb = head.get(1024..2048)?;
    if at(sb, 0x38)? != [0x53, 0xef] {
        return None;
    }
    let word = |offset| at(sb, offset).map(u32::from_le_bytes);
    let (compatible, incompatible, read_only) = (word(0x5c)?, word(0x60)?, word(0x64)?);
    const HAS_JOURNAL: u32 = 4;
    const NEEDS_RECOVERY: u32 = 4;
    // filetype, needs_recovery, meta_bg and sparse_super, large_file, btree_dir are all that ext3 knows.
    let ext4 = incompatible & !0x16 != 0 || read_only & !0x7 != 0;
    let state = at(sb, 0x3a).map(u16::from_le_bytes)?;
    Some(Found {
        fs: match (ext4, compatible & HAS_JOURNAL != 0) {
            (true, _) => Fs::Ext4,
            (false, true) => Fs::Ext3,
            (false, false) => Fs::Ext2,
        },
        uuid: uuid(sb, 0x68)?,
        label: label(sb, 0x78, 16),
        dirty: state & 1 == 0 || state & 2 != 0 || incompatible & NEEDS_RECOVERY != 0,
    })
}

fn xfs(head: &[u8]) -> Option<Found> {
    (at(head, 0)? == *b"XFSB").then_some(())?;
    Some(Found { fs: Fs::Xfs, uuid: uuid(head, 32)?, label: label(head, 108, 12), dirty: false })
}

fn btrfs(head: &[u8]) -> Option<Found> {
    let sb = head.get(64 << 10..)?;
    (at(sb, 0x40)? == *b"_BHRfS_M").then_some(())?;
    Some(Found { fs: Fs::Btrfs, uuid: uuid(sb, 0x20)?, label: label(sb, 0x12b, 256), dirty: false })
}

fn swap(head: &[u8]) -> Option<Found> {
    // The magic lies at the end of the first page, whose size depends on the machine.
    let magic = [4096, 8192, 16384, 65536].iter().any(|page| at(head, page - 10) == Some(*b"SWAPSPACE2"));
    magic.then_some(())?;
    Some(Found { fs: Fs::Swap, uuid: uuid(head, 0x40c)?, label: label(head, 0x41c, 16), dirty: false })
}

fn vfat(head: &[u8]) -> Option<Found> {
    (at(head, 510)? == [0x55, 0xaa]).then_some(())?;
    let (id, name) = match (at(head, 0x52)? == *b"FAT32   ", at::<5>(head, 0x36)?) {
        (true, _) => (0x43, 0x47),
        (false, kind) if kind == *b"FAT16" || kind == *b"FAT12" => (0x27, 0x2b),
        _ => return None,
    };
    let id = u32::from_le_bytes(at(head, id)?);
    let name = label(head, name, 11).map(|l| l.trim_end().to_owned());
    Some(Found {
        fs: Fs::Vfat,
        uuid: format!("{:04X}-{:04X}", id >> 16, id & 0xffff),
        label: name.filter(|l| !l.is_empty() && l != "NO NAME"),
        dirty: false,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn emptiness_is_nothing() {
        assert_eq!(parse(&vec![0; HEAD]), None);
        assert_eq!(parse(&[]), None);
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..4096), kind in 0..5) {
            let magics: [(usize, &[u8]); 5] =
                [(1080, &[0x53, 0xef]), (0, b"XFSB"), (510, &[0x55, 0xaa]), (0x52, b"FAT32   "), (4086, b"SWAPSPACE2")];
            let (offset, magic) = magics[usize::try_from(kind).unwrap()];
            if bytes.len() >= offset + magic.len() {
                bytes[offset..offset + magic.len()].copy_from_slice(magic);
            }
            if let Some(found) = parse(&bytes) {
                prop_assert!(found.uuid.len() == 36 || found.uuid.len() == 9);
            }
        }
    }
}
