//! Writing an MBR with logical partitions. `mbrman` reads well and writes the four primary entries; its EBR chain is wrong
//! above 4 GiB (offsets are computed in 32 bits), so the chain is written here. `traps` in the tests pins that.

use super::plan::DiskPlan;
use anyhow::{Context, Result, bail, ensure};
use ka_layout::fit::Extent;
use ka_layout::types::TypeCode;
use mbrman::{CHS, MBRHeader, MBRPartitionEntry};
use std::fs::File;
use std::io::{Cursor, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;

/// The type of an extended partition, as Linux installers write it.
const EXTENDED: u8 = 0x05;

fn sectors32(value: u64, what: &str) -> Result<u32> {
    u32::try_from(value).with_context(|| format!("{what} {value} is more than an MBR can hold"))
}

fn entry(code: u8, bootable: bool, first: u64, count: u64) -> Result<MBRPartitionEntry> {
    // Nothing reads CHS any more; this is the usual "use the LBA" value.
    let beyond = CHS::new(1023, 254, 63);
    Ok(MBRPartitionEntry {
        boot: if bootable { mbrman::BOOT_ACTIVE } else { mbrman::BOOT_INACTIVE },
        first_chs: beyond,
        sys: code,
        last_chs: beyond,
        starting_lba: sectors32(first, "the sector")?,
        sectors: sectors32(count, "the length")?,
    })
}

/// 16 bytes as they stand in a boot record; the crate's own way to write one is by a whole header.
fn raw(entry: MBRPartitionEntry) -> Result<[u8; 16]> {
    let mut header = MBRHeader::new([0; 4]);
    header.partition_1 = entry;
    let mut sector = Cursor::new(vec![0; 512]);
    header.write_into(&mut sector).context("encoding a partition entry")?;
    sector.into_inner()[446..462].try_into().context("encoding a partition entry")
}

fn code(plan: &DiskPlan, number: u32) -> Result<(u8, bool)> {
    let p = plan.partitions.iter().find(|p| p.extent.number == number);
    match p.map(|p| (p.code, p.bootable)) {
        Some((TypeCode::Mbr(code), bootable)) => Ok((code, bootable)),
        _ => bail!("partition {number} has no type for an MBR"),
    }
}

fn check(plan: &DiskPlan) -> Result<()> {
    let sectors = plan.fitted.geometry.bytes / u64::from(plan.fitted.geometry.sector);
    let mut end = 0;
    for e in &plan.fitted.extents {
        ensure!(
            e.first > end && e.last >= e.first && e.last < sectors,
            "partition {} overlaps or leaves the disk",
            e.number
        );
        end = e.last;
    }
    Ok(())
}

/// Writes the EBR chain, then the MBR, so that a power cut leaves no table or a whole one. Boot code is left empty.
///
/// # Errors
/// When a sector does not fit into 32 bits, partitions overlap, or the disk cannot be written.
pub fn write(disk: &mut File, plan: &DiskPlan) -> Result<()> {
    check(plan)?;
    let sector_bytes = usize::try_from(plan.fitted.geometry.sector).context("the sector size")?;
    let logical: Vec<&Extent> = plan.fitted.extents.iter().filter(|e| e.number > 4).collect();
    if let Some(extended) = &plan.fitted.extended {
        for (i, e) in logical.iter().enumerate() {
            let ebr = plan.fitted.ebr_of(e);
            let (kind, bootable) = code(plan, e.number)?;
            let mut record = vec![0; sector_bytes];
            // The first entry counts from this EBR, the second from the beginning of the extended partition.
            record[446..462].copy_from_slice(&raw(entry(
                kind,
                bootable,
                e.first - ebr,
                e.last + 1 - e.first,
            )?)?);
            if let Some(next) = logical.get(i + 1) {
                let at = plan.fitted.ebr_of(next);
                record[462..478].copy_from_slice(&raw(entry(
                    EXTENDED,
                    false,
                    at - extended.first,
                    next.last + 1 - at,
                )?)?);
            }
            record[510..512].copy_from_slice(&[0x55, 0xaa]);
            // In 64 bits: this is where mbrman goes wrong.
            disk.write_all_at(&record, ebr * sector_bytes as u64)
                .with_context(|| format!("writing the EBR of partition {}", e.number))?;
        }
        disk.sync_all().context("syncing the EBRs")?;
    }
    let mut header = MBRHeader::new(plan.signature());
    for e in plan.fitted.extents.iter().filter(|e| e.number <= 4) {
        let (kind, bootable) = code(plan, e.number)?;
        let slot = usize::try_from(e.number).context("the number")?;
        header[slot] = entry(kind, bootable, e.first, e.last + 1 - e.first)?;
    }
    if let Some(e) = &plan.fitted.extended {
        let slot = usize::try_from(e.number).context("the number")?;
        header[slot] = entry(EXTENDED, false, e.first, e.last + 1 - e.first)?;
    }
    let mut sector = Cursor::new(vec![0; sector_bytes]);
    header.write_into(&mut sector).context("encoding the MBR")?;
    disk.seek(SeekFrom::Start(0)).context("seeking to the MBR")?;
    disk.write_all(&sector.into_inner()).context("writing the MBR")?;
    disk.sync_all().context("syncing the MBR")
}

/// Reads the table back, with mbrman's reader, and compares it with the plan.
///
/// # Errors
/// When anything differs.
pub fn verify(disk: &File, plan: &DiskPlan) -> Result<()> {
    let mut disk = disk.try_clone().context("duplicating the disk's descriptor")?;
    let table =
        mbrman::MBR::read_from(&mut disk, plan.fitted.geometry.sector).context("reading the MBR back")?;
    ensure!(table.header.disk_signature == plan.signature(), "the MBR's signature reads back differently");
    let used = table.iter().filter(|(_, e)| e.is_used() && !e.is_extended()).count();
    ensure!(used == plan.fitted.extents.len(), "the MBR reads back with {used} partitions");
    for e in &plan.fitted.extents {
        let (kind, bootable) = code(plan, e.number)?;
        let have = table.get(usize::try_from(e.number).context("the number")?);
        let same = have.is_some_and(|have| {
            have.sys == kind
                && have.is_active() == bootable
                && u64::from(have.starting_lba) == e.first
                && u64::from(have.sectors) == e.last + 1 - e.first
        });
        ensure!(same, "partition {} reads back as {have:?}", e.number);
    }
    Ok(())
}
