//! The traps of the `gpt` and `mbrman` crates, pinned: when one of these tests fails, the crate has changed and our way
//! around it can be looked at again.

use gpt::GptConfig;
use gpt::disk::LogicalBlockSize;
use gpt::mbr::ProtectiveMBR;
use mbrman::{CHS, LogicalPartition, MBR, MBRPartitionEntry};
use std::fs::File;
use std::io::Cursor;
use std::panic::catch_unwind;

fn gpt_disk(file: &File) -> gpt::GptDisk<File> {
    let mut file = file.try_clone().unwrap();
    ProtectiveMBR::with_lb_size(u32::MAX).overwrite_lba0(&mut file).unwrap();
    GptConfig::new()
        .writable(true)
        .logical_block_size(LogicalBlockSize::Lb512)
        .create_from_device(file, None)
        .unwrap()
}

fn sparse(bytes: u64) -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(bytes).unwrap();
    file
}

#[test]
fn gpt_write_renumbers() {
    let file = sparse(64 << 20);
    let mut disk = gpt_disk(&file);
    for (number, first) in [(14, 2048), (15, 4096), (1, 8192)] {
        disk.add_partition_at("x", number, first, 2048, gpt::partition_types::LINUX_FS, 0).unwrap();
    }
    drop(disk.write().unwrap());
    let read = GptConfig::new().open_from_device(file).unwrap();
    let numbers: Vec<u32> = read.partitions().keys().copied().collect();
    assert_eq!(numbers, [1, 2, 3], "gpt keeps numbers now: gpt_table.rs could be simpler");
}

#[test]
fn gpt_accepts_overlaps_and_what_lies_beyond_the_end() {
    let file = sparse(64 << 20);
    let mut disk = gpt_disk(&file);
    let kind = gpt::partition_types::LINUX_FS;
    disk.add_partition_at("a", 1, 2048, 4096, kind.clone(), 0).unwrap();
    // Short enough for the free sectors before the first partition, it is accepted wherever it shall begin behind them.
    assert!(disk.add_partition_at("b", 2, 2048, 1000, kind.clone(), 0).is_ok());
    assert!(disk.add_partition_at("c", 3, 1 << 30, 1000, kind, 0).is_ok());
}

#[test]
fn mbrman_cannot_write_an_ebr_above_4_gib() {
    let entry = |first, count, kind| MBRPartitionEntry {
        boot: 0,
        first_chs: CHS::empty(),
        sys: kind,
        last_chs: CHS::empty(),
        starting_lba: first,
        sectors: count,
    };
    let far = (5_u32 << 30) / 512;
    let written = catch_unwind(|| {
        let mut memory = Cursor::new(vec![0_u8; 1 << 20]);
        let mut mbr = MBR::new_from(&mut memory, 512, [1, 2, 3, 4]).unwrap();
        mbr[1] = entry(far, 1 << 20, 0x05);
        mbr.logical_partitions.push(LogicalPartition {
            partition: entry(far + 2048, 4096, 0x83),
            absolute_ebr_lba: far,
            ebr_sectors: None,
            ebr_first_chs: CHS::empty(),
            ebr_last_chs: None,
            bootstrap_code: [0; 446],
        });
        mbr.write_into(&mut memory).map(|()| memory.into_inner().len())
    });
    // Our profiles check overflows, so the wrong offset is a panic; without them it would land at 1 GiB instead of 5.
    match written {
        Err(_) => {}
        Ok(Ok(length)) => assert!(length < 5 << 30, "mbrman writes EBRs in the right place now"),
        Ok(Err(_)) => {}
    }
}
