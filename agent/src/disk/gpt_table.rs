//! Writing a GPT so that every partition keeps its number. `GptDisk::write` of the `gpt` crate renumbers (1, 14, 15 became
//! 1, 2, 3) and `add_partition_at` accepts overlaps, so only its headers and entries are used here, one by one; overlaps
//! and bounds are checked first. `traps` at the bottom pins both.

use super::plan::DiskPlan;
use anyhow::{Context, Result, bail, ensure};
use gpt::disk::LogicalBlockSize;
use gpt::header::HeaderBuilder;
use gpt::mbr::ProtectiveMBR;
use gpt::partition::Partition;
use gpt::partition_types::{OperatingSystem, Type};
use ka_layout::types::TypeCode;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};

const ENTRIES: u32 = 128;
const ENTRY_BYTES: u32 = 128;

/// The logical sector size as the `gpt` crate has it.
///
/// # Errors
/// When it is neither 512 nor 4096.
pub fn block_size(sector: u32) -> Result<LogicalBlockSize> {
    match sector {
        512 => Ok(LogicalBlockSize::Lb512),
        4096 => Ok(LogicalBlockSize::Lb4096),
        other => bail!("sectors of {other} bytes are not supported"),
    }
}

fn entries(plan: &DiskPlan) -> Result<BTreeMap<u32, Partition>> {
    let mut entries = BTreeMap::new();
    for p in &plan.partitions {
        let (TypeCode::Gpt(kind), Some(guid)) = (p.code, p.guid) else {
            bail!("partition {} has no type or GUID for a GPT", p.extent.number)
        };
        let entry = Partition {
            part_type_guid: Type { guid: kind, os: OperatingSystem::None },
            part_guid: guid,
            first_lba: p.extent.first,
            last_lba: p.extent.last,
            flags: p.attributes,
            name: p.name.clone().unwrap_or_default(),
        };
        ensure!(
            (1..=ENTRIES).contains(&p.extent.number) && entries.insert(p.extent.number, entry).is_none(),
            "partition number {} is impossible or used twice",
            p.extent.number
        );
    }
    Ok(entries)
}

/// Where a table is written.
trait Target: Read + Write + Seek + std::fmt::Debug {
    fn sync(&self) -> std::io::Result<()>;
}

impl Target for File {
    fn sync(&self) -> std::io::Result<()> {
        self.sync_all()
    }
}

/// Writes backup, primary and protective MBR, each synced before the next, so that a power cut leaves either no table or a
/// whole one: where one stood before, one of its copies is whole until one of the new is.
///
/// # Errors
/// When a partition lies outside the usable sectors or overlaps another, or the disk cannot be written.
pub fn write(disk: &mut File, plan: &DiskPlan) -> Result<()> {
    write_to(disk, plan)
}

fn write_to(disk: &mut impl Target, plan: &DiskPlan) -> Result<()> {
    let block = block_size(plan.fitted.geometry.sector)?;
    let sectors = plan.fitted.geometry.bytes / block.as_u64();
    let entries = entries(plan)?;
    let header = |primary: bool| {
        HeaderBuilder::new()
            .primary(primary)
            .disk_guid(plan.id)
            .backup_lba(sectors.saturating_sub(1))
            .num_parts(ENTRIES)
            .part_size(ENTRY_BYTES)
            .build(block)
            .context("laying out the GPT header")
    };
    let (mut primary, mut backup) = (header(true)?, header(false)?);
    check(&entries, primary.first_usable, primary.last_usable)?;
    write_entries(disk, &entries, backup.part_start, block)?;
    backup.write_backup(disk, block).context("writing the backup GPT header")?;
    disk.sync().context("syncing the backup GPT")?;
    write_entries(disk, &entries, primary.part_start, block)?;
    primary.write_primary(disk, block).context("writing the primary GPT header")?;
    // The protective MBR says one sector less than the disk has, or all ones when that does not fit.
    let covered = u32::try_from(sectors - 1).unwrap_or(u32::MAX);
    let mut sector = ProtectiveMBR::with_lb_size(covered).to_bytes().to_vec();
    sector.resize(block.as_usize(), 0);
    disk.seek(SeekFrom::Start(0)).context("seeking to the MBR")?;
    disk.write_all(&sector).context("writing the protective MBR")?;
    disk.sync().context("syncing the GPT")
}

fn write_entries(
    disk: &mut impl Target,
    entries: &BTreeMap<u32, Partition>,
    start: u64,
    block: LogicalBlockSize,
) -> Result<()> {
    Partition::write_zero_entries_to_device(disk, 0, u64::from(ENTRIES), start, block, ENTRY_BYTES)
        .context("clearing the partition entries")?;
    for (number, entry) in entries {
        entry
            .write_to_device(disk, u64::from(number - 1), start, block, ENTRY_BYTES)
            .with_context(|| format!("writing partition entry {number}"))?;
    }
    Ok(())
}

fn check(entries: &BTreeMap<u32, Partition>, first: u64, last: u64) -> Result<()> {
    let mut sorted: Vec<(&u32, &Partition)> = entries.iter().collect();
    sorted.sort_by_key(|(_, p)| p.first_lba);
    let mut end: Option<(u32, u64)> = None;
    for (number, p) in sorted {
        ensure!(
            p.first_lba >= first && p.last_lba <= last && p.first_lba <= p.last_lba,
            "partition {number} ({} to {}) lies outside the usable sectors {first} to {last}",
            p.first_lba,
            p.last_lba
        );
        if let Some((other, end)) = end {
            ensure!(p.first_lba > end, "partitions {other} and {number} overlap");
        }
        end = Some((*number, p.last_lba));
    }
    Ok(())
}

/// Reads the table back and compares it with the plan: both headers, every entry by number.
///
/// # Errors
/// When anything differs.
pub fn verify(disk: &File, plan: &DiskPlan) -> Result<()> {
    let block = block_size(plan.fitted.geometry.sector)?;
    let wanted = entries(plan)?;
    let mut disk = disk.try_clone().context("duplicating the disk's descriptor")?;
    let sectors = plan.fitted.geometry.bytes / block.as_u64();
    for lba in [1, sectors - 1] {
        let which = if lba == 1 { "primary" } else { "backup" };
        let header =
            read_header(&mut disk, lba, block).with_context(|| format!("reading the {which} GPT back"))?;
        ensure!(header.disk_guid == plan.id, "the {which} GPT has the GUID {}", header.disk_guid);
        let found = gpt::partition::file_read_partitions(&mut disk, &header, block)
            .with_context(|| format!("reading the {which} GPT's entries back"))?;
        ensure!(found.len() == wanted.len(), "the {which} GPT has {} partitions", found.len());
        for (number, want) in &wanted {
            let same = found.get(number).is_some_and(|have| {
                have.first_lba == want.first_lba
                    && have.last_lba == want.last_lba
                    && have.part_guid == want.part_guid
                    && have.part_type_guid.guid == want.part_type_guid.guid
                    && have.flags == want.flags
                    && have.name == want.name
            });
            ensure!(same, "partition {number} of the {which} GPT reads back as {:?}", found.get(number));
        }
    }
    Ok(())
}

/// One header with its checksum and place checked, by the crate's own reader.
fn read_header(disk: &mut File, lba: u64, block: LogicalBlockSize) -> Result<gpt::header::Header> {
    if lba == 1 {
        return gpt::header::read_header_from_arbitrary_device(disk, block).context("parsing it");
    }
    let opened = gpt::GptConfig::new()
        .writable(false)
        .logical_block_size(block)
        .only_valid_headers(true)
        .open_from_device(&mut *disk)
        .context("parsing it")?;
    let header = opened.backup_header().map_err(|e| anyhow::anyhow!("the backup header: {e}"))?.clone();
    ensure!(header.current_lba == lba, "the backup header lies at {}", header.current_lba);
    Ok(header)
}

#[cfg(test)]
mod tests {
    use super::super::discover::Disk;
    use super::super::plan::compute;
    use super::*;
    use ka_layout::order::Golden;
    use std::io::Cursor;

    const BYTES: usize = 8 << 20;

    /// A disk whose power is cut after some writes.
    struct Torn {
        disk: Cursor<Vec<u8>>,
        writes: usize,
    }

    impl std::fmt::Debug for Torn {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("Torn")
        }
    }

    impl Read for Torn {
        fn read(&mut self, bytes: &mut [u8]) -> std::io::Result<usize> {
            self.disk.read(bytes)
        }
    }

    impl Seek for Torn {
        fn seek(&mut self, to: SeekFrom) -> std::io::Result<u64> {
            self.disk.seek(to)
        }
    }

    impl Write for Torn {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            let Some(left) = self.writes.checked_sub(1) else {
                return Err(std::io::Error::other("the power is cut"));
            };
            self.writes = left;
            self.disk.write(bytes)
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    impl Target for Torn {
        fn sync(&self) -> std::io::Result<()> {
            Ok(())
        }
    }

    fn planned(sizes: &[&str]) -> DiskPlan {
        let mut text = "version = 1\n[[disk]]\nname = 'd'\nmatch = { path = '/dev/x' }\ntable = 'gpt'\n\
                        uuid = '5c8ba1a8-9d6f-4d21-8b6b-2a0a1f9e1a11'\n"
            .to_owned();
        for size in sizes {
            text.push_str(&format!("[[partition]]\ntype = 'linux'\nsize = '{size}'\n"));
        }
        let disk = Disk {
            name: "x".into(),
            device: "/dev/x".into(),
            bytes: BYTES as u64,
            sector: 512,
            transport: "sata".into(),
            ..Disk::default()
        };
        let layout = ka_layout::parse::parse(&text).unwrap();
        compute(&layout, &[disk], &Golden::default()).unwrap().disks.remove(0)
    }

    fn written(on: Vec<u8>, plan: &DiskPlan, writes: usize) -> (Vec<u8>, bool) {
        let mut torn = Torn { disk: Cursor::new(on), writes };
        let whole = write_to(&mut torn, plan).is_ok();
        (torn.disk.into_inner(), whole)
    }

    #[test]
    fn one_copy_is_whole_wherever_the_power_is_cut() {
        let (old, done) = written(vec![0; BYTES], &planned(&["1M", "2M"]), usize::MAX);
        assert!(done);
        let new_plan = planned(&["2M"]);
        let (new, _) = written(old.clone(), &new_plan, usize::MAX);
        // Header and entries of both copies.
        let copies = [512..34 * 512, BYTES - 33 * 512..BYTES];
        assert!(copies.iter().all(|c| old[c.clone()] != new[c.clone()]));
        let mut writes = 0;
        loop {
            let (now, done) = written(old.clone(), &new_plan, writes);
            let whole = |c: &std::ops::Range<usize>| {
                now[c.clone()] == old[c.clone()] || now[c.clone()] == new[c.clone()]
            };
            assert!(copies.iter().any(whole), "after {writes} writes no table is left");
            if done {
                break;
            }
            writes += 1;
        }
        assert!(writes > 4, "{writes}");
    }
}
