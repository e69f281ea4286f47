//! Files that say on which disk GRUB is to be installed when its package is updated: SUSE's
//! `/etc/default/grub_installdevice`, and `device.map`. They get the clone's disk, by a name that stays. (Debian asks
//! debconf: see the piece `debconf`.)

use super::debconf::stable_name;
use super::{Change, Context, Piece};
use anyhow::Result;
use ka_layout::order::Firmware;
use std::path::Path;

const SUSE: &str = "/etc/default/grub_installdevice";
const MAPS: &[&str] = &["/boot/grub2/device.map", "/boot/grub/device.map"];

/// The piece.
pub struct GrubDevices;

impl Piece for GrubDevices {
    fn name(&self) -> &'static str {
        "grub-devices"
    }

    fn apply(&self, context: &Context) -> Result<Vec<Change>> {
        let root = &context.root;
        let mut changes = Vec::new();
        let disks: Vec<String> =
            context.boot_disks()?.map(|disk| stable_name(context, Path::new("/sys"), disk)).collect();
        if let Some(old) = root.read_text(SUSE)?
            && context.firmware == Firmware::Bios
            && old.lines().any(|l| l.trim().starts_with("/dev/"))
        {
            // Besides devices it says what else is to be done: activate, generic_mbr.
            let rest = old.lines().filter(|l| !l.trim().starts_with("/dev/"));
            let new: String =
                disks.iter().map(String::as_str).chain(rest).map(|l| format!("{l}\n")).collect();
            if root.write_text(SUSE, &new, 0o644)? {
                changes.push(Change::new("grub-devices", SUSE, disks.join(", ")));
            }
        }
        for map in MAPS {
            let lines: String = disks.iter().enumerate().map(|(n, d)| format!("(hd{n})\t{d}\n")).collect();
            if root.exists(map) && root.write_text(map, &lines, 0o644)? {
                changes.push(Change::new("grub-devices", *map, disks.join(", ")));
            }
        }
        Ok(changes)
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::Lab;
    use super::*;

    #[test]
    fn the_clones_disk_takes_the_golden_ones_place() {
        let mut lab = Lab::new();
        lab.firmware = Firmware::Bios;
        lab.volumes.iter_mut().for_each(|v| v.disk = "/dev/ka-none".into());
        lab.file(
            SUSE,
            "/dev/disk/by-id/ata-GOLDEN_1\n/dev/disk/by-id/ata-GOLDEN_1-part3\nactivate\ngeneric_mbr\n",
        )
        .file("/boot/grub2/device.map", "(hd0)\t/dev/disk/by-id/ata-GOLDEN_1\n(hd1)\t/dev/sdb\n");
        let context = lab.pretending(|line| {
            assert!(line.starts_with("/lib/udev/ata_id"), "{line}");
            Ok("ID_SERIAL=DISK_9\n".to_owned())
        });
        assert_eq!(GrubDevices.apply(&context).unwrap().len(), 2);
        assert_eq!(lab.read(SUSE), "/dev/disk/by-id/ata-DISK_9\nactivate\ngeneric_mbr\n");
        assert_eq!(lab.read("/boot/grub2/device.map"), "(hd0)\t/dev/disk/by-id/ata-DISK_9\n");
        assert!(GrubDevices.apply(&context).unwrap().is_empty());
        drop(context);
        // Both disks of an array.
        lab.volumes.iter_mut().for_each(|v| v.more_disks = vec!["/dev/ka-other".into()]);
        let context = lab.pretending(|_| anyhow::bail!("no"));
        assert_eq!(GrubDevices.apply(&context).unwrap().len(), 2);
        assert_eq!(lab.read(SUSE), "/dev/ka-none\n/dev/ka-other\nactivate\ngeneric_mbr\n");
        assert_eq!(lab.read("/boot/grub2/device.map"), "(hd0)\t/dev/ka-none\n(hd1)\t/dev/ka-other\n");
    }

    #[test]
    fn nothing_is_made_where_nothing_was() {
        let lab = Lab::new();
        lab.file("/etc/hostname", "x");
        let context = lab.pretending(|_| anyhow::bail!("no"));
        assert!(GrubDevices.apply(&context).unwrap().is_empty());
        lab.file(SUSE, "(none)\n");
        assert!(GrubDevices.apply(&context).unwrap().is_empty(), "UEFI installs nowhere else");
    }
}
