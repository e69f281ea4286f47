//! Taking away what a disk was before: tables, RAID, LVM, LUKS and file-system signatures at both ends of the disk and of
//! every old and new partition. `wipefs` knows signatures in odd places and is used where it exists; zeros are written and
//! read back in any case.

use super::{kept, tool};
use anyhow::{Context, Result, ensure};
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// Zeroed at the beginning of each area: LUKS 2 keeps its second header at up to 4 MiB.
const HEAD: u64 = 5 << 20;
/// Zeroed at the end of each area: md 0.90 lies up to 128 KiB before it, ZFS labels 512 KiB, some fake RAIDs 1 MiB.
const TAIL: u64 = 2 << 20;
/// Written and read at a time.
const BLOCK: usize = 1 << 20;

/// A range of bytes of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Area {
    /// Where it begins.
    pub start: u64,
    /// Its length.
    pub bytes: u64,
}

impl Area {
    /// The two ends that are zeroed; one when they would meet.
    fn ends(self) -> Vec<Self> {
        if self.bytes <= HEAD + TAIL {
            return vec![self];
        }
        let tail = Self { start: self.start + self.bytes - TAIL, bytes: TAIL };
        vec![Self { start: self.start, bytes: HEAD }, tail]
    }

    /// Whether they have a byte in common.
    #[must_use]
    pub const fn overlaps(self, other: Self) -> bool {
        self.start < other.start + other.bytes && other.start < self.start + self.bytes
    }

    /// What is left of it when `other` is taken out: nothing, one or two areas.
    fn without(self, other: Self) -> Vec<Self> {
        let (end, other_end) = (self.start + self.bytes, other.start + other.bytes);
        let before = Self { start: self.start, bytes: other.start.min(end).saturating_sub(self.start) };
        let from = other_end.max(self.start);
        let behind = Self { start: from, bytes: end.saturating_sub(from) };
        if !self.overlaps(other) {
            return vec![self];
        }
        [before, behind].into_iter().filter(|a| a.bytes > 0).collect()
    }
}

/// Runs `wipefs --all` on a device if it is there.
///
/// # Errors
/// When it is there and fails.
pub fn wipefs(device: &Path) -> Result<()> {
    let Some(program) = tool::find("wipefs") else {
        log::debug!("wipefs is not there; zeros alone are written");
        return Ok(());
    };
    ka_sys::process::run(
        Command::new(program).args(["--all", "--force", "--quiet"]).arg(device),
        Duration::from_secs(120),
    )
    .with_context(|| format!("wiping signatures from {}", device.display()))?;
    Ok(())
}

/// The ends of `areas` without what belongs to `keep`.
fn parts(areas: &[Area], keep: &[Area]) -> Vec<Area> {
    let mut parts: Vec<Area> = areas.iter().flat_map(|a| a.ends()).collect();
    for kept in keep {
        parts = parts.into_iter().flat_map(|part| part.without(*kept)).collect();
    }
    parts
}

/// Zeroes both ends of each area of `disk` but what belongs to `keep`, and syncs.
///
/// # Errors
/// When the disk cannot be written.
pub fn zero_ends(disk: &File, areas: &[Area], keep: &[Area]) -> Result<()> {
    let zeros = vec![0; BLOCK];
    for end in parts(areas, keep) {
        let mut at = end.start;
        let stop = end.start + end.bytes;
        while at < stop {
            let length = usize::try_from(stop - at).unwrap_or(BLOCK).min(BLOCK);
            disk.write_all_at(&zeros[..length], at)
                .with_context(|| format!("zeroing {length} bytes at {at}"))?;
            at += length as u64;
        }
    }
    disk.sync_all().context("syncing the zeros")
}

/// Reads what [`zero_ends`] wrote back, from the disk and not from the cache.
///
/// # Errors
/// When a byte is not zero: the disk did not take the writes.
pub fn verify_empty(disk: &File, areas: &[Area], keep: &[Area]) -> Result<()> {
    ka_sys::block::flush_buffers(disk).context("dropping the disk's cache")?;
    let mut buffer = vec![0; BLOCK];
    for end in parts(areas, keep) {
        let mut at = end.start;
        let stop = end.start + end.bytes;
        while at < stop {
            let length = usize::try_from(stop - at).unwrap_or(BLOCK).min(BLOCK);
            disk.read_exact_at(&mut buffer[..length], at).with_context(|| format!("reading back at {at}"))?;
            ensure!(
                buffer[..length].iter().all(|b| *b == 0),
                "the disk did not keep the zeros written at {at}: is it failing or write-protected?"
            );
            at += length as u64;
        }
    }
    Ok(())
}

/// Makes a disk unbootable: MBR with its boot code, primary and backup GPT are zeroed.
///
/// # Errors
/// When the disk cannot be written.
pub fn clear_table(disk: &File) -> Result<()> {
    let bytes = ka_sys::block::size(disk).context("asking the disk's size")?;
    let sector = u64::from(ka_sys::block::sector_size(disk).context("asking the sector size")?);
    // MBR, header and 128 entries; the backup is the same without the MBR.
    let table = 16384 + 2 * sector;
    let zeros = vec![0; usize::try_from(table).context("the table's size")?];
    ensure!(bytes > 2 * table, "the disk is smaller than two partition tables");
    disk.write_all_at(&zeros, 0).context("zeroing the table")?;
    disk.write_all_at(&zeros, bytes - table).context("zeroing the backup table")?;
    disk.sync_all().context("syncing the cleared table")?;
    ka_sys::block::flush_buffers(disk).context("dropping the disk's cache")
}

/// Clears the table of every disk that is listed in the file `record` and removes the list. A line holds a path, and for a
/// disk with preserved partitions, behind a tab, the file with the table that holds them alone: that is put back. For the
/// supervisor, after a worker that died. A missing file lists nothing.
///
/// # Errors
/// When a disk could not be cleared, after all were tried.
pub fn clear_listed(record: &Path) -> Result<Vec<PathBuf>> {
    let mut text = String::new();
    match File::open(record) {
        Ok(mut file) => {
            file.read_to_string(&mut text).with_context(|| format!("reading {}", record.display()))?
        }
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(e).with_context(|| format!("opening {}", record.display())),
    };
    let mut cleared = Vec::new();
    let mut failed = Vec::new();
    for line in text.lines().filter(|l| !l.is_empty()) {
        let (path, kept) = line.split_once('\t').map_or((line, None), |(path, kept)| (path, Some(kept)));
        let path = PathBuf::from(path);
        let open = || File::options().read(true).write(true).open(&path).context("opening it");
        let done = match kept {
            None => open().and_then(|disk| clear_table(&disk)),
            Some(kept) => kept::load(Path::new(kept)).and_then(|pieces| kept::restore(&open()?, &pieces)),
        };
        match done {
            Ok(()) => cleared.push(path),
            Err(e) => failed.push(format!("{}: {e:#}", path.display())),
        }
    }
    ensure!(failed.is_empty(), "clearing the partition table: {}", failed.join("; "));
    std::fs::remove_file(record).with_context(|| format!("removing {}", record.display()))?;
    Ok(cleared)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_stay_within_and_meet() {
        for bytes in [1_u64, HEAD, HEAD + TAIL, HEAD + TAIL + 1, 100 << 20] {
            let area = Area { start: 7 << 20, bytes };
            let ends = area.ends();
            assert_eq!(ends[0].start, area.start);
            let last = ends[ends.len() - 1];
            assert_eq!(last.start + last.bytes, area.start + bytes);
            assert!(ends.len() == 1 || ends[0].start + ends[0].bytes <= last.start);
        }
    }

    proptest::proptest! {
        #[test]
        fn what_is_kept_is_never_touched(start in 0_u64..40, bytes in 1_u64..40, from in 0_u64..40, length in 0_u64..40) {
            let (area, kept) = (Area { start, bytes }, Area { start: from, bytes: length });
            let left = area.without(kept);
            for at in 0..100 {
                let within = |a: &Area| at >= a.start && at < a.start + a.bytes;
                proptest::prop_assert_eq!(
                    left.iter().filter(|a| within(a)).count(),
                    usize::from(within(&area) && !within(&kept))
                );
            }
        }
    }

    #[test]
    fn a_missing_record_lists_nothing() {
        assert_eq!(clear_listed(Path::new("/no/such/record")).unwrap(), Vec::<PathBuf>::new());
    }

    #[test]
    fn a_disk_that_cannot_be_cleared_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let record = dir.path().join("disks");
        std::fs::write(&record, "/no/such/disk\n").unwrap();
        let text = format!("{:#}", clear_listed(&record).unwrap_err());
        assert!(
            text.starts_with("clearing the partition table: /no/such/disk: opening it: No such file"),
            "{text}"
        );
    }
}
