//! `image.json`: what an image consists of, for the server that hands it out and for people. Written last, so that its
//! digests tell whether the files beside it belong together. Nothing of the time or place of the build is in it.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The name of the manifest in the image's directory.
pub const MANIFEST: &str = "image.json";
/// The kernel.
pub const KERNEL: &str = "vmlinuz";
/// The initramfs.
pub const INITRD: &str = "initrd.img";
/// iPXE for BIOS machines.
pub const BIOS_LOADER: &str = "undionly.kpxe";
/// iPXE for UEFI machines, using the firmware's own network driver.
pub const UEFI_LOADER: &str = "snponly.efi";
/// iPXE for UEFI machines, with drivers of its own.
pub const UEFI_LOADER_DRIVERS: &str = "ipxe.efi";
/// A boot loader for UEFI machines that starts what is installed on the disk.
pub const LOCAL_BOOT: &str = "localboot.efi";

/// The version of this format.
pub const FORMAT: u32 = 1;

/// An image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// [`FORMAT`].
    pub format: u32,
    /// The version of Ka that made it.
    pub ka_version: String,
    /// As `uname -r` will say on the node.
    pub kernel: String,
    /// What is to be added to the kernel's command line.
    pub append: String,
    /// How the initramfs is compressed.
    pub compress: String,
    /// Bytes of the initramfs before compression.
    pub initrd_unpacked: u64,
    /// What was asked for as modules.
    pub modules: String,
    /// How many there are.
    pub module_count: usize,
    /// Programs, as paths in the image.
    pub programs: Vec<String>,
    /// Firmware files in the image.
    pub firmware: Vec<String>,
    /// Firmware that is installed but was left out for its size.
    pub firmware_left_out: Vec<String>,
    /// Firmware that modules name and that is not installed.
    pub firmware_missing: Vec<String>,
    /// The files beside the manifest.
    pub files: BTreeMap<String, FileInfo>,
    /// What was warned of.
    pub warnings: Vec<String>,
}

/// A file of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileInfo {
    /// Bytes.
    pub size: u64,
    /// SHA-256, as `sha256sum` prints it.
    pub sha256: String,
}
