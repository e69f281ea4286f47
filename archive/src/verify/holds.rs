//! What the file system of the tree can hold, by the magic number that it goes by: only that is compared. A clone may have
//! other file systems than its golden node, and none of what they lack is its fault.

use rustix::fs::{IFlags, Statx};
use rustix::io::Errno;

use crate::attributes::{Attributes, NOCOMP};
use crate::target::{Feature, FsKind};

/// `statfs` magic numbers.
const EXT: u32 = 0xef53;
const XFS: u32 = 0x5846_5342;
const BTRFS: u32 = 0x9123_683e;
const F2FS: u32 = 0xf2f5_2010;

/// What can be compared on a file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Holds {
    /// Modes, owners, extended attributes, links, and times to the nanosecond: all but FAT and exFAT.
    pub unix: bool,
    flags: IFlags,
    /// Project ids.
    pub projects: bool,
    kind: FsKind,
}

impl Holds {
    /// As the magic number says; where that is none of those known here, `stat` of something on it does.
    pub(super) fn new(magic: u32, stat: &Statx) -> Self {
        let common = IFlags::APPEND | IFlags::IMMUTABLE | IFlags::NODUMP | IFlags::NOATIME | IFlags::SYNC;
        let ext = IFlags::DIRSYNC
            | IFlags::JOURNALING
            | IFlags::NOTAIL
            | IFlags::SECURE_REMOVAL
            | IFlags::UNRM
            | IFlags::TOPDIR
            | IFlags::COMPRESSED
            | IFlags::PROJECT_INHERIT;
        let (flags, projects) = match magic {
            EXT => (common | ext, true),
            XFS => (common | IFlags::PROJECT_INHERIT, true),
            // It sets `nocompress` by itself, on files that its mount option could not make smaller.
            BTRFS => (common | IFlags::DIRSYNC | IFlags::NOCOW | IFlags::COMPRESSED, false),
            F2FS => (
                common
                    | IFlags::DIRSYNC
                    | IFlags::NOCOW
                    | IFlags::COMPRESSED
                    | NOCOMP
                    | IFlags::PROJECT_INHERIT,
                true,
            ),
            _ => (told(stat), false),
        };
        let kind = FsKind::from_magic(magic.into());
        Self { unix: kind != FsKind::Fat, flags, projects, kind }
    }

    /// That of `attributes` which the file system can hold.
    pub(super) fn part(self, attributes: Attributes) -> Attributes {
        let mut held = attributes.only(self.flags);
        if !self.projects {
            held.project = 0;
        }
        held
    }

    /// Whether it can hold the extended attribute `name`.
    pub(super) fn has_xattr(self, name: &[u8]) -> bool {
        !self.kind.cannot_hold(Feature::Xattr(name), Errno::OPNOTSUPP)
    }

    /// Whether a time is the golden tree's. FAT counts in steps of two seconds.
    pub(super) fn same_time(self, golden: (i64, u32), here: (i64, u32)) -> bool {
        golden == here || (!self.unix && golden.0.abs_diff(here.0) <= 2)
    }
}

/// The flags that `statx` says the file system has.
fn told(stat: &Statx) -> IFlags {
    // STATX_ATTR_*, which the kernel has made equal to the flags of the inode.
    let all = IFlags::COMPRESSED | IFlags::IMMUTABLE | IFlags::APPEND | IFlags::NODUMP;
    let low = stat.stx_attributes_mask.bits() & u64::from(all.bits());
    IFlags::from_bits_retain(u32::try_from(low).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{AtFlags, CWD, StatxFlags, statx};

    fn attributes(words: &str) -> Attributes {
        let mut attributes = Attributes::default();
        attributes.project = 42;
        assert!(attributes.take_words(words.as_bytes()));
        attributes
    }

    #[test]
    fn each_file_system_holds_what_its_driver_knows() {
        let proc = statx(CWD, c"/proc/self/status", AtFlags::empty(), StatxFlags::BASIC_STATS).unwrap();
        let all = attributes("sappnd,schg,nodump,compress,nocow,journal-data,projinherit");
        for (magic, unix, words, project) in [
            (EXT, true, "sappnd,schg,nodump,compress,journal-data,projinherit", 42),
            (XFS, true, "sappnd,schg,nodump,projinherit", 42),
            (BTRFS, true, "sappnd,schg,nodump,compress,nocow", 0),
            (F2FS, true, "sappnd,schg,nodump,compress,nocow,projinherit", 42),
            // vfat and exfat.
            (0x4d44, false, "", 0),
            (0x2011_bab0, false, "", 0),
            // procfs, as something that is not known here.
            (0x9fa0, true, "", 0),
        ] {
            let holds = Holds::new(magic, &proc);
            let part = holds.part(all);
            assert_eq!((holds.unix, &part.words()[..], part.project), (unix, words, project), "{magic:x}");
        }
        let tmp = statx(CWD, c"/", AtFlags::empty(), StatxFlags::BASIC_STATS).unwrap();
        let own = attributes("nocompress,nodump");
        assert_eq!(Holds::new(BTRFS, &proc).part(own).words(), "nodump", "btrfs sets the other by itself");
        let unknown = Holds::new(1, &tmp).part(all).words();
        assert!(unknown.contains("sappnd,schg,nodump"), "the root's file system has these: {unknown}");
    }

    #[test]
    fn times_on_fat_are_near_and_elsewhere_the_same() {
        let stat = statx(CWD, c"/", AtFlags::empty(), StatxFlags::BASIC_STATS).unwrap();
        let (fat, ext) = (Holds::new(0x4d44, &stat), Holds::new(EXT, &stat));
        for (golden, here, near) in
            [((7, 5), (6, 0), true), ((7, 5), (5, 0), true), ((7, 5), (4, 0), false), ((-1, 5), (1, 0), true)]
        {
            assert_eq!((fat.same_time(golden, here), ext.same_time(golden, here)), (near, false));
        }
        assert!(ext.same_time((7, 5), (7, 5)));
    }
}
