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
use std::io::{Seek, SeekFrom, Write};

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

/// Writes backup, primary and protective MBR, in this order, so that a power cut leaves either no table or a whole one.
///
/// # Errors
/// When a partition lies outside the usable sectors or overlaps another, or the disk cannot be written.
pub fn write(disk: &mut File, plan: &DiskPlan) -> Result<()> {
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
    for header in [&backup, &primary] {
        Partition::write_zero_entries_to_device(
            disk,
            0,
            u64::from(ENTRIES),
            header.part_start,
            block,
            ENTRY_BYTES,
        )
        .context("clearing the partition entries")?;
        for (number, entry) in &entries {
            entry
                .write_to_device(disk, u64::from(number - 1), header.part_start, block, ENTRY_BYTES)
                .with_context(|| format!("writing partition entry {number}"))?;
        }
    }
    backup.write_backup(disk, block).context("writing the backup GPT header")?;
    disk.sync_all().context("syncing the backup GPT")?;
    primary.write_primary(disk, block).context("writing the primary GPT header")?;
    // The protective MBR says one sector less than the disk has, or all ones when that does not fit.
    let covered = u32::try_from(sectors - 1).unwrap_or(u32::MAX);
    let mut sector = ProtectiveMBR::with_lb_size(covered).to_bytes().to_vec();
    sector.resize(block.as_usize(), 0);
    disk.seek(SeekFrom::Start(0)).context("seeking to the MBR")?;
    disk.write_all(&sector).context("writing the protective MBR")?;
    disk.sync_all().context("syncing the GPT")
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
