//! The layout as typed values. The file's keys have the same names; see `docs/layout.md`.

use serde::{Deserialize, Serialize};

/// A whole layout file.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
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
    /// RAID arrays.
    #[serde(rename = "raid", default, skip_serializing_if = "Vec::is_empty")]
    pub raids: Vec<Raid>,
    /// Encrypted containers.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub luks: Vec<Luks>,
    /// LVM volume groups.
    #[serde(rename = "vg", default, skip_serializing_if = "Vec::is_empty")]
    pub vgs: Vec<Group>,
    /// LVM logical volumes.
    #[serde(rename = "lv", default, skip_serializing_if = "Vec::is_empty")]
    pub lvs: Vec<Logical>,
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
    /// The name by which arrays, containers and volume groups refer to it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
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
    /// The subvolumes of a btrfs.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub subvolumes: Vec<Subvolume>,
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

/// An array of md.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Raid {
    /// Its name: `/dev/md/NAME` in the clone.
    pub name: String,
    /// The level; 1, the only one that is made.
    #[serde(default = "one")]
    pub level: u32,
    /// The ids of the partitions that it lies on.
    pub members: Vec<String>,
    /// The version of its superblock: `1.2`, or `1.0` (at the end, so that firmware sees the file system in a member).
    #[serde(default = "metadata")]
    pub metadata: String,
    /// The file system to make.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub format: Option<Format>,
    /// The subvolumes of a btrfs.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub subvolumes: Vec<Subvolume>,
    /// Where it is mounted in the clone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mount: Option<Mount>,
}

const fn one() -> u32 {
    1
}

const fn two() -> u32 {
    2
}

fn metadata() -> String {
    "1.2".to_owned()
}

/// An encrypted container. Its keys are new on every node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Luks {
    /// Its name: `/dev/mapper/NAME` when it is open, and in crypttab.
    pub name: String,
    /// What it lies on.
    pub on: String,
    /// The version of LUKS: 2, or 1.
    #[serde(default = "two")]
    pub version: u32,
    /// The fourth field of crypttab; `luks` when left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub crypttab: Option<String>,
    /// More words for luksFormat.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub options: Vec<String>,
    /// The file system to make.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub format: Option<Format>,
    /// The subvolumes of a btrfs.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub subvolumes: Vec<Subvolume>,
    /// Where it is mounted in the clone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mount: Option<Mount>,
}

/// A volume group of LVM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Group {
    /// Its name.
    pub name: String,
    /// What its physical volumes lie on.
    pub on: Vec<String>,
}

/// A logical volume of LVM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Logical {
    /// The name of its group.
    pub vg: String,
    /// Its name.
    pub name: String,
    /// As a partition's; a percentage is of the group.
    pub size: String,
    /// As a partition's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weight: Option<u32>,
    /// The file system to make.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub format: Option<Format>,
    /// The subvolumes of a btrfs.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub subvolumes: Vec<Subvolume>,
    /// Where it is mounted in the clone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mount: Option<Mount>,
}

/// What can hold a file system.
macro_rules! holds_content {
    ($($kind:ty),*) => {$(
        impl $kind {
            /// What lies in it.
            #[must_use]
            pub fn content(&self) -> Content<'_> {
                Content {
                    format: self.format.as_ref(),
                    subvolumes: &self.subvolumes,
                    mount: self.mount.as_ref(),
                    kept: false,
                }
            }
        }
    )*};
}
holds_content!(Raid, Luks, Logical);

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

/// A subvolume of a btrfs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Subvolume {
    /// Its path from the top of the file system, without a slash at the beginning: `@`, `@/.snapshots/1/snapshot`.
    pub name: String,
    /// Where it is mounted; nowhere when left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// Mount options beside `subvol=`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub options: Option<String>,
    /// Whether it is what a mount without `subvol=` shows.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub default: bool,
}

impl Subvolume {
    /// How it is mounted, if it is: its options begin with `subvol=`.
    #[must_use]
    pub fn mount(&self) -> Option<Mount> {
        let path = self.path.clone()?;
        let own = self.options.as_deref().map_or_else(String::new, |o| format!(",{o}"));
        Some(Mount { path, options: Some(format!("subvol={}{own}", self.name)) })
    }
}

/// What lies in a partition or another block device.
#[derive(Debug, Clone, Copy)]
pub struct Content<'a> {
    /// The file system to make.
    pub format: Option<&'a Format>,
    /// Its subvolumes.
    pub subvolumes: &'a [Subvolume],
    /// Where the file system itself is mounted.
    pub mount: Option<&'a Mount>,
    /// It is not made here: preserved, or sent as it is.
    pub kept: bool,
}

impl Content<'_> {
    /// Every place where it, or a subvolume of it, is mounted.
    #[must_use]
    pub fn mounts(&self) -> Vec<Mount> {
        let mut top = self.mount.cloned();
        if let Some(Mount { options, .. }) = &mut top
            && self.subvolumes.iter().any(|s| s.default)
        {
            // A mount that names no subvolume would show the default one.
            let own = options.take().filter(|o| o != "defaults");
            let named = own.as_ref().is_some_and(|o| o.split(',').any(|w| w.starts_with("subvol")));
            *options = match own {
                Some(own) if named => Some(own),
                Some(own) => Some(format!("subvolid=5,{own}")),
                None => Some("subvolid=5".to_owned()),
            };
        }
        top.into_iter().chain(self.subvolumes.iter().filter_map(Subvolume::mount)).collect()
    }
}

impl Partition {
    /// What lies in it.
    #[must_use]
    pub fn content(&self) -> Content<'_> {
        Content {
            format: self.format.as_ref(),
            subvolumes: &self.subvolumes,
            mount: self.mount.as_ref(),
            kept: self.preserve || self.raw,
        }
    }
}

impl Layout {
    /// The content of every partition and volume, in the layout's order.
    pub fn contents(&self) -> impl Iterator<Item = Content<'_>> {
        let partitions = self.partitions.iter().map(Partition::content);
        let raids = self.raids.iter().map(Raid::content);
        let luks = self.luks.iter().map(Luks::content);
        partitions.chain(raids).chain(luks).chain(self.lvs.iter().map(Logical::content))
    }

    /// Where preserved partitions are mounted: what lies there is not the golden tree's.
    pub fn preserved_paths(&self) -> impl Iterator<Item = &str> {
        self.partitions.iter().filter(|p| p.preserve).filter_map(|p| Some(p.mount.as_ref()?.path.as_str()))
    }

    /// The partitions that are sent block for block, with their indices in `partitions`.
    pub fn raw_partitions(&self) -> impl Iterator<Item = (usize, &Partition)> {
        self.partitions.iter().enumerate().filter(|(_, p)| p.raw)
    }

    /// The number that the partition at `index` gets; none when the layout is not sound.
    #[must_use]
    pub fn number_of(&self, index: usize) -> Option<u32> {
        let numbers = crate::fit::numbers(self, self.disk_of(self.partitions.get(index)?)?).ok()?;
        numbers.into_iter().find(|(i, _)| *i == index).map(|(_, number)| number)
    }

    /// Every path that is mounted in the clone.
    pub fn mount_paths(&self) -> impl Iterator<Item = String> {
        self.contents().flat_map(|c| c.mounts()).map(|m| m.path)
    }

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
        let what =
            self.partitions.get(index).map(|p| match (p.content().mounts().first(), &p.name, &p.format) {
                (Some(mount), ..) => mount.path.clone(),
                (_, Some(name), _) => name.clone(),
                (_, _, Some(format)) => format.fs.name().to_owned(),
                _ => p.kind.clone(),
            });
        format!("[[partition]] #{} ({})", index + 1, what.unwrap_or_default())
    }
}
