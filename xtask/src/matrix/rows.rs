//! The rows of the matrix: what is cloned onto what, and what must be true of the clone beside what holds for each.

use crate::golden::{DEBIAN_12, DEBIAN_13, Guest};
use crate::lab::vm::Board;

/// Where a row's layout comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// A layout file's text.
    File(&'static str),
    /// What `ka-server layout` wrote on the clone of the row before.
    Captured,
}

/// One deployment to one bare machine.
#[derive(Debug, Clone, Copy)]
pub struct Row {
    /// Its name, which is the clone's host name.
    pub name: &'static str,
    /// What is cloned.
    pub guest: Guest,
    /// How its disks are laid out, for the table.
    pub about: &'static str,
    /// The layout.
    pub layout: Layout,
    /// Bytes of each of its new disks; `None`: those of the row before, as that left them.
    pub disks: Option<&'static [u64]>,
    /// The container that asks for its passphrase at the console.
    pub unlock: Option<&'static str>,
    /// The partition that is sent block for block: its id, and the bytes of [`RAW`] in it.
    pub raw: Option<(&'static str, usize)>,
    /// Commands on the clone, and what each must print.
    pub checks: &'static [(&'static str, &'static str)],
}

/// Rows that run one after the other on one machine.
#[derive(Debug, Clone, Copy)]
pub struct Series {
    /// The machine.
    pub board: Board,
    /// Its rows, in order.
    pub rows: &'static [Row],
}

const GIB: u64 = 1 << 30;
const ONE: Option<&[u64]> = Some(&[3 * GIB]);
/// The layouts tell the two apart by their sizes.
const TWO: Option<&[u64]> = Some(&[3 * GIB, 4 * GIB]);

macro_rules! layout {
    ($name:literal) => {
        Layout::File(include_str!(concat!("layouts/", $name, ".toml")))
    };
}

const fn row(
    name: &'static str,
    guest: Guest,
    about: &'static str,
    layout: Layout,
    disks: Option<&'static [u64]>,
) -> Row {
    Row { name, guest, about, layout, disks, unlock: None, raw: None, checks: &[] }
}

/// What raw partitions hold, over and over, as `yes` prints it.
pub const RAW: &str = "block for block\n";

const PLAIN: Layout = Layout::File(crate::golden::LAYOUT);
const ROOT: &str = "findmnt -no FSTYPE /";
const SUBVOLUMES: &[(&str, &str)] = &[
    ("findmnt -no FSTYPE,FSROOT /", "btrfs /@"),
    ("findmnt -no FSROOT /home", "/@home"),
    ("findmnt -no FSROOT /var", "/@var"),
    // systemd makes some of its own.
    ("btrfs subvolume list / | grep -cE 'path @(home|var|snapshots)?$'", "4"),
];

/// All of them.
pub const SERIES: [Series; 11] = [
    Series {
        board: Board::BiosIde,
        rows: &[
            Row {
                checks: &[
                    ("blkid -po value -s PTTYPE /dev/sda", "dos"),
                    (ROOT, "ext4"),
                    ("findmnt -no SOURCE /home", "/dev/sda6"),
                    ("tail -n +2 /proc/swaps | wc -l", "1"),
                    ("echo mine > /home/mine", ""),
                ],
                ..row(
                    "mbr-logical",
                    DEBIAN_12,
                    "MBR with logical partitions, /home apart",
                    layout!("mbr-logical"),
                    ONE,
                )
            },
            Row {
                checks: &[
                    (ROOT, "xfs"),
                    ("findmnt -no SOURCE /home", "/dev/sda6"),
                    ("cat /home/mine", "mine"),
                ],
                ..row(
                    "preserve",
                    DEBIAN_12,
                    "/home of the row before preserved, the root anew as xfs",
                    layout!("preserve"),
                    None,
                )
            },
        ],
    },
    Series {
        board: Board::BiosAhci,
        rows: &[
            Row {
                checks: &[
                    ("grep -c '^md.*active.*raid1' /proc/mdstat", "2"),
                    ("findmnt -no SOURCE / | grep -c ^/dev/md", "1"),
                    ("findmnt -no SOURCE /boot | grep -c ^/dev/md", "1"),
                ],
                ..row("raid1", DEBIAN_12, "RAID 1 of two disks, /boot and / on arrays", layout!("raid1"), TWO)
            },
            Row {
                checks: &[
                    ("findmnt -no SOURCE /", "/dev/mapper/vg0-root"),
                    ("findmnt -no FSTYPE /home", "xfs"),
                    ("tail -n +2 /proc/swaps | wc -l", "1"),
                    ("vgs --noheadings -o pv_count vg0 | tr -d ' '", "2"),
                    ("grep -c ^md /proc/mdstat", "0"),
                ],
                ..row(
                    "lvm",
                    DEBIAN_12,
                    "LVM across two disks, over the arrays of the row before",
                    layout!("lvm"),
                    None,
                )
            },
            Row {
                checks: &[(ROOT, "xfs"), ("findmnt -no FSTYPE /boot", "ext4")],
                ..row(
                    "boot-xfs",
                    DEBIAN_13,
                    "/boot apart, / on xfs, over half of the row before's LVM",
                    layout!("boot-xfs"),
                    None,
                )
            },
        ],
    },
    Series {
        board: Board::UefiNvme,
        rows: &[
            Row {
                unlock: Some("crypt"),
                checks: &[
                    ("findmnt -no SOURCE /", "/dev/mapper/crypt"),
                    ("cryptsetup status crypt | grep -c 'type: *LUKS2'", "1"),
                    ("findmnt -no FSTYPE /boot/efi", "vfat"),
                ],
                ..row("luks", DEBIAN_12, "LUKS 2 root, /boot apart", layout!("luks"), ONE)
            },
            Row {
                checks: SUBVOLUMES,
                ..row(
                    "btrfs",
                    DEBIAN_12,
                    "btrfs subvolumes, over the LUKS of the row before",
                    layout!("subvolumes"),
                    None,
                )
            },
        ],
    },
    Series {
        board: Board::UefiNvme4096,
        rows: &[
            Row {
                unlock: Some("crypt"),
                checks: &[
                    ("findmnt -no SOURCE /", "/dev/mapper/vg0-root"),
                    ("grep -c '^md.*active.*raid1' /proc/mdstat", "1"),
                    ("cryptsetup status crypt | grep -c 'device: */dev/md'", "1"),
                    ("tail -n +2 /proc/swaps | wc -l", "1"),
                ],
                ..row(
                    "stack",
                    DEBIAN_12,
                    "LVM on LUKS on RAID 1 of two disks",
                    layout!("raid1-luks-lvm"),
                    TWO,
                )
            },
            Row {
                checks: &[(ROOT, "ext4"), ("cat /sys/block/nvme0n1/queue/logical_block_size", "4096")],
                ..row(
                    "plain-4096",
                    DEBIAN_13,
                    "ext4, over half of the row before's stack",
                    layout!("plain-4096"),
                    None,
                )
            },
        ],
    },
    Series {
        board: Board::BiosVirtio,
        rows: &[
            Row {
                checks: &[(ROOT, "ext4")],
                ..row("big", DEBIAN_12, "ext4, swap, ESP on 8 GiB", PLAIN, Some(&[8 * GIB]))
            },
            Row {
                checks: &[
                    (ROOT, "ext4"),
                    ("blockdev --getsize64 /dev/vda", "2147483648"),
                    ("tail -n +2 /proc/swaps | wc -l", "1"),
                ],
                ..row(
                    "smaller",
                    DEBIAN_12,
                    "the row before's captured layout on 2 GiB",
                    Layout::Captured,
                    Some(&[2 * GIB]),
                )
            },
        ],
    },
    Series {
        board: Board::BiosScsi,
        rows: &[Row {
            checks: &[
                (
                    "for d in / /boot /var /home /srv; do findmnt -no FSTYPE $d; done | tr '\\n' ' '",
                    "ext4 ext2 btrfs xfs ext4",
                ),
                ("tail -n +2 /proc/swaps | wc -l", "1"),
            ],
            ..row(
                "file-systems",
                DEBIAN_12,
                "/boot ext2, /var btrfs, /home xfs, /srv ext4, odd numbers",
                layout!("file-systems"),
                Some(&[4 * GIB]),
            )
        }],
    },
    Series {
        board: Board::UefiAhci,
        rows: &[
            Row {
                checks: &[
                    ("findmnt -no SOURCE,FSTYPE /", "/dev/mapper/system--vg-root xfs"),
                    ("findmnt -no FSTYPE /var", "ext4"),
                ],
                ..row(
                    "lvm-uefi",
                    DEBIAN_13,
                    "LVM on one disk, / on xfs, /var apart",
                    layout!("lvm-uefi"),
                    ONE,
                )
            },
            Row {
                unlock: Some("crypt"),
                checks: &[("findmnt -no SOURCE /", "/dev/mapper/crypt")],
                ..row("luks-13", DEBIAN_13, "LUKS 2 root over the row before's LVM", layout!("luks"), None)
            },
        ],
    },
    Series {
        board: Board::UefiNvme,
        rows: &[Row {
            checks: SUBVOLUMES,
            ..row("btrfs-13", DEBIAN_13, "btrfs subvolumes", layout!("subvolumes"), ONE)
        }],
    },
    Series {
        board: Board::BiosVirtio,
        rows: &[Row {
            checks: &[(ROOT, "ext4"), ("tail -n +2 /proc/swaps | wc -l", "1")],
            ..row("plain-13", DEBIAN_13, "ext4, swap, ESP", PLAIN, ONE)
        }],
    },
    Series {
        board: Board::BiosAhci,
        rows: &[Row {
            checks: &[("grep -c '^md.*active.*raid1' /proc/mdstat", "2")],
            ..row("raid1-13", DEBIAN_13, "RAID 1 of two disks, /boot and / on arrays", layout!("raid1"), TWO)
        }],
    },
    Series {
        board: Board::BiosIde,
        rows: &[
            Row { checks: &[(ROOT, "ext4")], ..row("plain-ide", DEBIAN_12, "ext4, swap, ESP", PLAIN, ONE) },
            Row {
                raw: Some(("vendor", 5_000_001)),
                checks: &[
                    (ROOT, "ext4"),
                    ("yes 'block for block' | cmp -n 5000001 - /dev/sda5 && echo same", "same"),
                ],
                ..row(
                    "raw",
                    DEBIAN_12,
                    "a raw partition, over the row before's file systems",
                    layout!("raw"),
                    None,
                )
            },
        ],
    },
];

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn every_layout_is_sound() {
        for row in SERIES.iter().flat_map(|series| series.rows) {
            if let Layout::File(text) = row.layout
                && let Err(e) = ka_layout::parse(text)
            {
                panic!("{}: {e}", row.name);
            }
        }
    }

    #[test]
    fn rows_are_told_apart_and_build_on_rows() {
        let mut names = BTreeSet::new();
        for series in &SERIES {
            for (i, row) in series.rows.iter().enumerate() {
                assert!(names.insert(row.name), "{} stands twice", row.name);
                assert!(i > 0 || (row.disks.is_some() && row.layout != Layout::Captured), "{}", row.name);
            }
        }
        assert!(names.len() >= 16, "{}", names.len());
    }
}
