//! What the server tells a node to become: everything about an installation but the stream itself. The control
//! connection carries it as opaque bytes (postcard), so that the chain need not know it.

use crate::model::Fs;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The fact by which a node that does not install says that it unpacks into a directory: blocks have no place there.
pub const INTO_DIRECTORY: (&str, &str) = ("sink", "directory");

/// An installation, as ordered by the server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstallOrder {
    /// The deployment's id.
    pub deployment: String,
    /// Who the node becomes.
    pub node: Identity,
    /// The layout file's text.
    pub layout: String,
    /// What is known of the golden node.
    pub golden: Golden,
    /// What autoconfig may do.
    pub policy: Policy,
    /// The operator's hooks, in the order in which they run.
    pub hooks: Vec<Hook>,
    /// The keys of the layout's encrypted containers, by name; this node's alone.
    pub keys: BTreeMap<String, Secret>,
}

/// Bytes that no log may show.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Secret(Vec<u8>);

impl Secret {
    /// Takes the bytes.
    #[must_use]
    pub const fn new(bytes: Vec<u8>) -> Self {
        Self(bytes)
    }

    /// The bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret(..)")
    }
}

impl InstallOrder {
    /// The order as the control connection carries it (postcard).
    ///
    /// # Errors
    /// When it cannot be written; no order that the server makes is like that.
    pub fn to_bytes(&self) -> Result<Vec<u8>, postcard::Error> {
        postcard::to_stdvec(self)
    }

    /// Reads an order.
    ///
    /// # Errors
    /// When `bytes` are no order of this version.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, postcard::Error> {
        postcard::from_bytes(bytes)
    }
}

/// Who a node becomes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Its host name, perhaps with a domain.
    pub name: String,
    /// Its number in the deployment, from 1.
    pub index: u32,
    /// The MAC address by which it booted, `52:54:00:12:34:56`.
    pub mac: Option<String>,
    /// Its group in the nodes file.
    pub group: Option<String>,
}

/// What is known of the golden node.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Golden {
    /// Its host name, as its tree has it.
    pub hostname: String,
    /// Its `/etc/os-release`, key by key, unquoted.
    pub os_release: BTreeMap<String, String>,
    /// Machine architecture as `uname -m` says.
    pub arch: String,
    /// The file systems that are sent or made anew, `/` first; empty when the tree is not that of a running machine.
    pub filesystems: Vec<GoldenFs>,
    /// Total bytes of content per mount path of the layout, for the check that it fits.
    pub used: BTreeMap<String, Used>,
    /// What comes into the layout's `raw` partitions, in the layout's order.
    pub raw: Vec<RawContent>,
}

/// The content of a partition that is sent block for block.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RawContent {
    /// Which `[[partition]]` of the layout it is for, from 0.
    pub index: usize,
    /// The name of its part in the stream.
    pub part: String,
    /// Its length in bytes.
    pub bytes: u64,
    /// UUID of the file system that it brings, as blkid prints it.
    pub uuid: Option<String>,
    /// Label of that file system.
    pub label: Option<String>,
}

/// How much a tree below one mount path needs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Used {
    /// Bytes of file content, sparse holes not counted, each file rounded up to 4 KiB.
    pub bytes: u64,
    /// Files, directories, links and all else that takes an inode.
    pub inodes: u64,
}

/// A file system or swap space of the golden node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GoldenFs {
    /// Where it is mounted; none for swap.
    pub path: Option<String>,
    /// Its kind.
    pub fs: Fs,
    /// The kernel's name of the device, `/dev/sda1`.
    pub device: String,
    /// Every other name by which udev knows the device: `/dev/disk/by-uuid/...`, `/dev/disk/by-id/...`.
    pub aliases: Vec<String>,
    /// The same for the whole disk that it lies on.
    pub disk_aliases: Vec<String>,
    /// UUID of the file system.
    pub uuid: Option<String>,
    /// Its label.
    pub label: Option<String>,
    /// GUID of the partition.
    pub partuuid: Option<String>,
    /// Name of the partition.
    pub partlabel: Option<String>,
}

/// What autoconfig may do.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Policy {
    /// Pieces that are left out, by name.
    pub skip: Vec<String>,
    /// What happens to ssh host keys.
    pub ssh_keys: SshKeys,
    /// fstab lines that contain one of these words are dropped.
    pub drop_fstab: Vec<String>,
    /// Where the clone's entry goes in the firmware's boot order.
    pub efi_boot: EfiBoot,
    /// Whether the initramfs is built anew on the node.
    pub initramfs: Initramfs,
    /// Only these pieces run; all when it is empty.
    pub only: Vec<String>,
    /// Files and directories of the clone that no piece changes, as absolute paths.
    pub keep: Vec<String>,
    /// What is removed from the clone on top of its identity, by name (see [`crate::pieces::WIPES`]).
    pub wipe: Vec<String>,
}

/// What happens to ssh host keys.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SshKeys {
    /// New ones are made on each node.
    #[default]
    Generate,
    /// The golden node's are kept.
    Keep,
}

/// Where the clone's entry goes in the firmware's boot order.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EfiBoot {
    /// The clone's disk first.
    #[default]
    DiskFirst,
    /// The network stays first; the boot service sends the node to its disk.
    PxeFirst,
    /// The boot order stays; only the next boot goes to the clone's disk.
    #[serde(rename = "bootnext")]
    BootNext,
}

/// Whether the initramfs is built anew on the node.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Initramfs {
    /// When a driver that the node's disk needs is missing from it, or something that it has baked in changed.
    #[default]
    Auto,
    /// Always.
    Always,
    /// Never.
    Never,
}

/// A program of the operator, run on each node after autoconfig.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hook {
    /// Its file name in `hooks.d/`; hooks run in the order of these.
    pub name: String,
    /// The program: an ELF file, or a script with `#!`.
    pub program: Vec<u8>,
    /// Whether it runs inside the target root (chroot) or in the initramfs.
    pub place: HookPlace,
}

/// Where a hook runs. Named by the end of the file name: `50-name.host` runs in the initramfs, all else in the target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum HookPlace {
    /// Inside the target root.
    Target,
    /// In the initramfs, with `KA_TARGET` naming the target root.
    Host,
}

/// How a node's firmware booted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Firmware {
    /// BIOS, or UEFI in compatibility mode.
    Bios,
    /// UEFI.
    Uefi,
}

/// A file system or swap space that was made on a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Volume {
    /// The partition's device, as the kernel names it: `/dev/nvme0n1p2`.
    pub device: String,
    /// The whole disk: `/dev/nvme0n1`.
    pub disk: String,
    /// The partition's number.
    pub number: u32,
    /// The partition's type, as in the layout (`esp`, `linux`, ...).
    pub kind: String,
    /// The kind of file system, if one was made (a bios-boot partition has none).
    pub fs: Option<Fs>,
    /// UUID of the file system as blkid prints it (vfat: `ABCD-1234`). Where there is one without `fs`, it came with content
    /// that was sent block for block, whatever kind that is.
    pub uuid: Option<String>,
    /// Label of the file system.
    pub label: Option<String>,
    /// GUID of the partition (on MBR the kernel's `disk signature-number` form).
    pub partuuid: Option<String>,
    /// Name of the partition.
    pub partlabel: Option<String>,
    /// Where the clone mounts it.
    pub mount: Option<crate::model::Mount>,
    /// The subvolume of a btrfs that is mounted there; such a file system comes once for each.
    pub subvolume: Option<crate::model::Subvolume>,
    /// What it is when it is no partition; then it has no number, and its disk is the first below it.
    pub layer: Option<Layer>,
    /// What that lies on in turn, each once; disks and partitions are not among them.
    pub below: Vec<Layer>,
    /// The other disks below it.
    pub more_disks: Vec<String>,
    /// It stood there before and was kept with its content, which is not the golden tree's.
    pub preserved: bool,
}

/// A volume on top of partitions.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Layer {
    /// An array of md.
    Raid {
        /// Its name: `/dev/md/NAME`.
        name: String,
        /// Its UUID as mdadm writes it.
        uuid: String,
        /// The version of its superblock.
        metadata: String,
    },
    /// An encrypted container, open.
    Luks {
        /// Its name: `/dev/mapper/NAME`.
        name: String,
        /// UUID of the container.
        uuid: String,
        /// Its options in crypttab.
        options: String,
    },
    /// A logical volume.
    Lvm {
        /// The name of its group.
        group: String,
        /// Its own.
        name: String,
    },
}
