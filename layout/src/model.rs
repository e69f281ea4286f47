//! The layout as typed values. The file's keys have the same names; see `docs/layout.md`.

use serde::{Deserialize, Serialize};

/// A whole layout file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Layout {
    /// The version of the format; 1.
    pub version: u32,
    /// The disks, by rule.
    #[serde(rename = "disk")]
    pub disks: Vec<DiskRule>,
    /// The partitions, in the order in which they lie on their disks.
    #[serde(rename = "partition", default)]
    pub partitions: Vec<Partition>,
}

/// A disk, chosen by rule and never by guess.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskRule {
    /// The name by which partitions refer to it.
    pub name: String,
    /// What a disk must be to be meant.
    #[serde(rename = "match", default)]
    pub matching: Match,
    /// Which one, when several match.
    #[serde(default)]
    pub pick: Pick,
    /// The kind of partition table.
    pub table: TableKind,
    /// The GUID of the table (GPT), or its signature as eight hex digits (MBR); a new one when left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub uuid: Option<String>,
}

/// Conditions on a disk; all that are given must hold.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Match {
    /// `8G-`, `-2T`, `100G-500G` or an exact size.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size: Option<String>,
    /// One of these transports: `sata`, `nvme`, `virtio`, `ide`, `scsi`, `sas`, `usb`, `mmc`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub transport: Option<Vec<String>>,
    /// A glob on the model.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// A glob on the serial number.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub serial: Option<String>,
    /// The world-wide name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub wwn: Option<String>,
    /// A glob on the by-path name or the device's own (`/dev/sda`).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// Whether it rotates.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rotational: Option<bool>,
    /// Whether it is removable; without this key removable disks never match.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub removable: Option<bool>,
}

/// Which of several matching disks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Pick {
    /// Exactly one may match.
    #[default]
    Only,
    /// The smallest; a tie is refused.
    Smallest,
    /// The largest; a tie is refused.
    Largest,
}

/// The kind of partition table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TableKind {
    /// GUID partition table.
    Gpt,
    /// Master boot record, with logical partitions in an extended one where there are more than four.
    Mbr,
}

/// A partition and what lies in it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Partition {
    /// The name of its disk; may be left out when there is one only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk: Option<String>,
    /// Its number; the next free one when left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub number: Option<u32>,
    /// `esp`, `bios-boot`, `swap`, `linux`, ..., a GUID, or `0x83` on mbr.
    #[serde(rename = "type")]
    pub kind: String,
    /// `512M`, `4G-20G`, `10%` or `fill`.
    pub size: String,
    /// Where it begins on the disk, `1M`; right behind the one before when left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub start: Option<String>,
    /// Its share of what is left over, compared with the other ranges and `fill`s; 1 when left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weight: Option<u32>,
    /// Its name in the table (GPT only).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Its unique GUID in the table (GPT only); a new one when left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub uuid: Option<String>,
    /// MBR only: the active flag; GPT: the legacy-BIOS-bootable attribute.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub bootable: bool,
    /// The file system to make.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub format: Option<Format>,
    /// Where it is mounted in the clone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mount: Option<Mount>,
    /// Keep an existing partition and its content.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub preserve: bool,
    /// Its content is sent block for block.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub raw: bool,
}

/// A file system (or swap) to make.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Format {
    /// Its kind.
    pub fs: Fs,
    /// Its label.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub label: Option<String>,
    /// `keep` (the golden node's), `new`, or a UUID. `keep` when left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub uuid: Option<String>,
    /// More options for its mkfs, as separate words.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub options: Vec<String>,
}

/// The file systems that can be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)]
pub enum Fs {
    Ext2,
    Ext3,
    Ext4,
    Xfs,
    Btrfs,
    Vfat,
    Swap,
}

impl Fs {
    /// Its name as `mount -t` and the layout file write it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ext2 => "ext2",
            Self::Ext3 => "ext3",
            Self::Ext4 => "ext4",
            Self::Xfs => "xfs",
            Self::Btrfs => "btrfs",
            Self::Vfat => "vfat",
            Self::Swap => "swap",
        }
    }
}

/// Where and how a file system is mounted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mount {
    /// An absolute path.
    pub path: String,
    /// Mount options, as in fstab; `defaults` when left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub options: Option<String>,
}

impl Layout {
    /// The index of the disk on which a partition lies: by name, or the only one when it names none.
    #[must_use]
    pub fn disk_of(&self, partition: &Partition) -> Option<usize> {
        match &partition.disk {
            Some(name) => self.disks.iter().position(|d| d.name == *name),
            None => (self.disks.len() == 1).then_some(0),
        }
    }

    /// The partitions of one disk in the order in which they lie on it, with their indices in `partitions`.
    pub fn partitions_of(&self, disk: usize) -> impl Iterator<Item = (usize, &Partition)> {
        self.partitions.iter().enumerate().filter(move |(_, p)| self.disk_of(p) == Some(disk))
    }

    /// The `[[partition]]` at `index` as messages call it: `[[partition]] #2 (/boot)`.
    #[must_use]
    pub fn partition_text(&self, index: usize) -> String {
        let what = self.partitions.get(index).map(|p| match (&p.mount, &p.name, &p.format) {
            (Some(mount), ..) => mount.path.clone(),
            (_, Some(name), _) => name.clone(),
            (_, _, Some(format)) => format.fs.name().to_owned(),
            _ => p.kind.clone(),
        });
        format!("[[partition]] #{} ({})", index + 1, what.unwrap_or_default())
    }
}
