//! Reading what the system's own tools and `/proc` say: mountinfo, fstab, `sfdisk --json`, `blkid --output export`,
//! `dumpe2fs`, `xfs_info`, `btrfs inspect-internal dump-super`. Pure: text in, values out.

use crate::model::Fs;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

impl Fs {
    /// The kind that the kernel, `mount` or `blkid` calls `name`.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        use Fs::{Btrfs, Ext2, Ext3, Ext4, Swap, Vfat, Xfs};
        [Ext2, Ext3, Ext4, Xfs, Btrfs, Vfat, Swap].into_iter().find(|fs| fs.name() == name)
    }
}

/// A line of `/proc/self/mountinfo`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountEntry {
    /// `major:minor`; btrfs has a made-up one.
    pub device: String,
    /// What of the file system is mounted: `/`, or a directory or subvolume.
    pub root: String,
    /// Where.
    pub place: PathBuf,
    /// The type of file system.
    pub kind: String,
    /// The device by name, or whatever the file system calls its source.
    pub source: String,
    /// The subvolume of a btrfs in which `root` lies, without a slash at the beginning; none for its top.
    pub subvolume: Option<String>,
}

/// Undoes the octal escapes of mountinfo, fstab and swaps (`\040` is a space).
#[must_use]
pub fn unescape(text: &str) -> Vec<u8> {
    let mut out = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        let octal = (first == b'\\')
            .then(|| tail.get(..3))
            .flatten()
            .filter(|digits| digits.iter().all(|d| (b'0'..=b'7').contains(d)))
            .and_then(|d| u8::from_str_radix(std::str::from_utf8(d).ok()?, 8).ok());
        out.push(octal.unwrap_or(first));
        rest = if octal.is_some() { &tail[3..] } else { tail };
    }
    out
}

/// Reads mountinfo; lines that are none are skipped.
#[must_use]
pub fn mountinfo(text: &str) -> Vec<MountEntry> {
    let entry = |line: &str| {
        let (left, right) = line.split_once(" - ")?;
        let left: Vec<&str> = left.split(' ').collect();
        let right: Vec<&str> = right.split(' ').collect();
        Some(MountEntry {
            device: (*left.get(2)?).to_owned(),
            root: String::from_utf8_lossy(&unescape(left.get(3)?)).into_owned(),
            place: std::ffi::OsString::from_vec(unescape(left.get(4)?)).into(),
            kind: (*right.first()?).to_owned(),
            source: String::from_utf8_lossy(&unescape(right.get(1)?)).into_owned(),
            subvolume: right
                .get(2)
                .and_then(|o| o.split(',').find_map(|w| w.strip_prefix("subvol=/")))
                .filter(|name| !name.is_empty())
                .map(|name| String::from_utf8_lossy(&unescape(name)).into_owned()),
        })
    };
    text.lines().filter_map(entry).collect()
}

/// The mount options of an fstab, by mount point.
#[must_use]
pub fn fstab(text: &str) -> BTreeMap<String, String> {
    let mut options = BTreeMap::new();
    for line in text.lines().filter(|l| !l.trim_start().starts_with('#')) {
        let words: Vec<&str> = line.split_whitespace().collect();
        if let [_, place, _, mount_options, ..] = words[..] {
            let place = String::from_utf8_lossy(&unescape(place)).into_owned();
            options.insert(place, mount_options.to_owned());
        }
    }
    options
}

/// The block devices in `/proc/swaps`.
#[must_use]
pub fn swaps(text: &str) -> Vec<String> {
    let device = |line: &str| {
        let mut words = line.split_whitespace();
        let name = words.next()?;
        (words.next()? == "partition").then(|| String::from_utf8_lossy(&unescape(name)).into_owned())
    };
    text.lines().filter_map(device).collect()
}

/// Mount options without those that choose a subvolume; none when nothing is left but `defaults`.
#[must_use]
pub fn without_subvolume(options: &str) -> Option<String> {
    let chooses = |w: &&str| !w.starts_with("subvol=") && !w.starts_with("subvolid=");
    let left: Vec<&str> = options.split(',').filter(|w| !w.is_empty()).filter(chooses).collect();
    (!left.is_empty() && left != ["defaults"]).then(|| left.join(","))
}

/// The paths in what `btrfs subvolume list` or `get-default` prints: `ID 257 gen 9 top level 5 path @home`.
#[must_use]
pub fn subvolume_paths(text: &str) -> Vec<String> {
    text.lines()
        .filter_map(|l| l.strip_prefix("ID ")?.split_once(" path "))
        .map(|(_, path)| path.to_owned())
        .collect()
}

/// A partition table as `sfdisk --json` tells it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Table {
    /// `gpt`, `dos`, or another kind.
    pub label: String,
    /// GUID, or `0x` and eight hex digits.
    #[serde(default)]
    pub id: String,
    /// The logical sector size.
    #[serde(default = "sector_default", rename = "sectorsize")]
    pub sector: u64,
    /// The partitions.
    #[serde(default)]
    pub partitions: Vec<TablePartition>,
}

fn sector_default() -> u64 {
    512
}

/// A partition in such a table; sectors are logical.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct TablePartition {
    /// Its first sector.
    pub start: u64,
    /// Its length in sectors.
    pub size: u64,
    /// GUID, or hex digits without `0x`.
    #[serde(rename = "type")]
    pub kind: String,
    /// Its GUID.
    pub uuid: Option<String>,
    /// Its name.
    pub name: Option<String>,
    /// `LegacyBIOSBootable` and others.
    pub attrs: Option<String>,
    /// The active flag of an MBR.
    #[serde(default)]
    pub bootable: bool,
}

/// Reads the output of `sfdisk --json`.
///
/// # Errors
/// When it is not what sfdisk prints.
pub fn sfdisk(json: &str) -> Result<Table, serde_json::Error> {
    #[derive(Deserialize)]
    struct Whole {
        partitiontable: Table,
    }
    serde_json::from_str::<Whole>(json).map(|w| w.partitiontable)
}

/// Reads `blkid --output export`.
#[must_use]
pub fn blkid(text: &str) -> BTreeMap<String, String> {
    let line = |l: &str| {
        let (key, value) = l.split_once('=')?;
        // The export format escapes for the shell.
        let mut plain = String::new();
        let mut chars = value.chars();
        while let Some(c) = chars.next() {
            plain.push(if c == '\\' { chars.next().unwrap_or(c) } else { c });
        }
        Some((key.to_owned(), plain))
    };
    text.lines().filter_map(line).collect()
}

/// Features that say what state a file system is in, not how it was made.
const EXT_STATES: [&str; 4] = ["needs_recovery", "orphan_present", "shared_blocks", "snapshot"];

/// Words for mke2fs that give the features of a file system of which `dumpe2fs -h` printed `text`.
#[must_use]
pub fn ext_options(text: &str) -> Vec<String> {
    let value = |key: &str| {
        text.lines().find_map(|l| l.strip_prefix(key)).and_then(|v| v.strip_prefix(':')).map(str::trim)
    };
    let mut words = Vec::new();
    if let Some(features) = value("Filesystem features").filter(|f| !f.is_empty() && *f != "(none)") {
        let known =
            features.split_whitespace().filter(|f| !EXT_STATES.contains(f) && !f.starts_with("FEATURE_"));
        let list: Vec<&str> = std::iter::once("none").chain(known).collect();
        words.extend(["-O".to_owned(), list.join(",")]);
    }
    for (key, option) in [("Block size", "-b"), ("Inode size", "-I")] {
        if let Some(number) = value(key).filter(|n| n.parse::<u32>().is_ok()) {
            words.extend([option.to_owned(), number.to_owned()]);
        }
    }
    words
}

/// Words for mkfs.xfs that give the features of a file system of which `xfs_info` printed `text`.
#[must_use]
pub fn xfs_options(text: &str) -> Vec<String> {
    let mut values: BTreeMap<&str, &str> = BTreeMap::new();
    for token in text.split(|c: char| c.is_whitespace() || c == ',') {
        if let Some((key, value)) = token.split_once('=')
            && value.parse::<u32>().is_ok()
        {
            values.entry(key).or_insert(value);
        }
    }
    let mut words = Vec::new();
    for (option, keys) in [
        ("-m", &["crc", "finobt", "rmapbt", "reflink", "bigtime", "inobtcount"][..]),
        ("-i", &["sparse", "nrext64", "exchange"]),
        ("-n", &["ftype", "parent"]),
    ] {
        let mut list: Vec<String> =
            keys.iter().filter_map(|k| values.get(k).map(|v| format!("{k}={v}"))).collect();
        if option == "-i"
            && let Some(size) = values.get("isize")
        {
            list.push(format!("size={size}"));
        }
        if !list.is_empty() {
            words.extend([option.to_owned(), list.join(",")]);
        }
    }
    words
}

/// Words for mkfs.btrfs that give the features of a file system of which `dump-super` printed `text`.
#[must_use]
pub fn btrfs_options(text: &str) -> Vec<String> {
    let value = |key: &str| {
        text.lines().find(|l| l.split_whitespace().next() == Some(key)).map(|l| l[key.len()..].trim())
    };
    let mut words = Vec::new();
    let checksum = value("csum_type").and_then(|v| v.split_once('(')?.1.strip_suffix(')'));
    if let Some(checksum) = checksum {
        words.extend(["--csum".to_owned(), checksum.trim().replace("xxhash64", "xxhash")]);
    }
    if let Some(size) = value("nodesize").filter(|v| v.parse::<u32>().is_ok()) {
        words.extend(["--nodesize".to_owned(), size.to_owned()]);
    }
    if value("incompat_flags").is_some() {
        let holes = text.contains("NO_HOLES");
        words.extend(["-O".to_owned(), if holes { "no-holes" } else { "^no-holes" }.to_owned()]);
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn mounts_are_read() {
        let text = "27 1 254:2 / / rw,relatime - ext4 /dev/vda2 rw,discard\n\
                    40 27 0:35 /@home /home\\040dir rw shared:5 - btrfs /dev/sda3 rw,subvol=/@home\nnonsense\n";
        let entries = mountinfo(text);
        assert_eq!(entries.len(), 2);
        assert_eq!(entries[1].place, PathBuf::from("/home dir"));
        assert_eq!((entries[1].root.as_str(), entries[1].source.as_str()), ("/@home", "/dev/sda3"));
    }

    #[test]
    fn an_fstab_is_read() {
        let table =
            fstab("# x\nUUID=1 / ext4 errors=remount-ro 0 1\n/dev/sda2 none swap sw 0 0\n\nbroken /x\n");
        assert_eq!(table.get("/").map(String::as_str), Some("errors=remount-ro"));
        assert_eq!(table.len(), 2);
    }

    #[test]
    fn swap_in_use_is_read() {
        let text = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n\
            /dev/dm-1                               partition\t999420\t0\t-2\n\
            /swap\\040file                           file\t\t999420\t0\t-3\n";
        assert_eq!(swaps(text), ["/dev/dm-1"]);
    }

    #[test]
    fn features_of_ext_are_kept_but_not_its_state() {
        let text = "Filesystem volume name:   <none>\nFilesystem features:      has_journal ext_attr needs_recovery \
                    extent 64bit FEATURE_C12\nBlock size:               4096\nInode size:\t          256\n";
        assert_eq!(
            ext_options(text),
            ["-O", "none,has_journal,ext_attr,extent,64bit", "-b", "4096", "-I", "256"]
        );
        assert_eq!(ext_options(""), [""; 0]);
    }

    #[test]
    fn features_of_xfs_are_kept() {
        let text = "meta-data=/dev/loop0p1 isize=512 agcount=4, agsize=19200 blks\n = sectsz=512 attr=2, projid32bit=1\n \
                    = crc=1 finobt=1, sparse=1, rmapbt=0\n = reflink=1 bigtime=1 inobtcount=1 nrext64=0\n\
                    data = bsize=4096 blocks=76800, imaxpct=25\nnaming =version 2 bsize=4096 ascii-ci=0, ftype=1\n";
        assert_eq!(
            xfs_options(text),
            [
                "-m",
                "crc=1,finobt=1,rmapbt=0,reflink=1,bigtime=1,inobtcount=1",
                "-i",
                "sparse=1,nrext64=0,size=512",
                "-n",
                "ftype=1"
            ]
        );
    }

    #[test]
    fn features_of_btrfs_are_kept() {
        let text = "superblock: bytenr=65536\ncsum_type\t\t0 (crc32c)\nincompat_flags\t\t0x341\n\t\t\t( MIXED_BACKREF |\n\
                    \t\t\t  NO_HOLES )\nnodesize\t\t16384\n";
        assert_eq!(btrfs_options(text), ["--csum", "crc32c", "--nodesize", "16384", "-O", "no-holes"]);
    }

    #[test]
    fn subvolumes_are_understood() {
        let text = "27 1 0:30 /@rootfs / rw,noatime - btrfs /dev/sda1 rw,ssd,subvolid=256,subvol=/@rootfs\n\
                    28 1 0:30 / /top rw - btrfs /dev/sda1 rw,subvolid=5,subvol=/\n";
        let read = mountinfo(text);
        assert_eq!(read[0].subvolume.as_deref(), Some("@rootfs"));
        assert_eq!(read[1].subvolume, None);
        assert_eq!(
            subvolume_paths("ID 256 gen 7 top level 5 path @\nID 258 gen 9 top level 256 path @/a b\n"),
            ["@", "@/a b"]
        );
        assert_eq!(subvolume_paths("ID 5 (FS_TREE)\n"), [""; 0]);
        assert_eq!(without_subvolume("noatime,subvol=@,subvolid=7").as_deref(), Some("noatime"));
        assert_eq!(without_subvolume("defaults,subvol=@"), None);
    }

    #[test]
    fn tools_are_understood() {
        let table = sfdisk(
            r#"{"partitiontable":{"label":"gpt","id":"A","device":"/dev/x","unit":"sectors","firstlba":34,"sectorsize":512,
            "partitions":[{"node":"/dev/x1","start":2048,"size":100,"type":"B","uuid":"C","name":"n"}]}}"#,
        )
        .unwrap();
        assert_eq!(table.partitions[0].start, 2048);
        assert!(sfdisk("{}").is_err());
        let facts = blkid("DEVNAME=/dev/x\nLABEL=my\\ disk\nUUID=1-2\n");
        assert_eq!(facts["LABEL"], "my disk");
    }

    proptest! {
        #[test]
        fn any_text_is_read_without_panic(text in "\\PC{0,80}", lines in "([a-z_ :=()0-9,\\\\\n/.-]{0,60})") {
            for text in [&text, &lines] {
                let _ = (mountinfo(text), fstab(text), sfdisk(text).is_ok(), blkid(text), ext_options(text));
                let _ = (xfs_options(text), btrfs_options(text), unescape(text));
                let _ = (subvolume_paths(text), without_subvolume(text), swaps(text));
            }
        }
    }
}
