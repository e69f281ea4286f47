//! debconf's memory of where GRUB was installed: the package `grub-pc` installs itself there on its next upgrade, which
//! fails when the golden node's disk is named. It is set to the clone's disk, by a name that stays.

use super::{Change, Context, Piece};
use anyhow::{Context as _, Result};
use ka_layout::order::Firmware;
use std::path::Path;
use std::time::Duration;

const DATABASE: &str = "/var/cache/debconf/config.dat";
const QUESTION: &str = "grub-pc/install_devices";
const LIMIT: Duration = Duration::from_secs(120);

/// The piece.
pub struct Debconf;

impl Piece for Debconf {
    fn name(&self) -> &'static str {
        "debconf"
    }

    fn apply(&self, context: &Context) -> Result<Vec<Change>> {
        let Some(database) = context.root.read_text(DATABASE)? else { return Ok(Vec::new()) };
        let Some(old) = value_of(&database, QUESTION).filter(|v| !v.is_empty()) else {
            return Ok(Vec::new());
        };
        let names = context.boot_disks()?.map(|disk| stable_name(context, Path::new("/sys"), disk));
        let (devices, empty) = match context.firmware {
            Firmware::Bios => (names.collect::<Vec<_>>().join(", "), false),
            // Nothing boots from the disk's first sector here, so the package must not try.
            Firmware::Uefi => (String::new(), true),
        };
        if old == devices {
            return Ok(Vec::new());
        }
        if !context.root.exists("/usr/bin/debconf-set-selections") {
            return Ok(vec![Change::warning(
                "debconf",
                QUESTION,
                format!("still names {old}: there is no debconf-set-selections"),
            )]);
        }
        let input =
            format!("grub-pc {QUESTION} multiselect {devices}\ngrub-pc {QUESTION}_empty boolean {empty}\n");
        context
            .run_with_input("debconf-set-selections", &[], input.as_bytes(), LIMIT)
            .context("setting where GRUB is installed")?;
        let what = if empty { "none: this node boots by UEFI".to_owned() } else { devices };
        Ok(vec![Change::new("debconf", QUESTION, format!("{what} (was {old})"))])
    }
}

/// The value of a question in debconf's database, which is paragraphs of `Key: value` lines.
fn value_of<'a>(database: &'a str, question: &str) -> Option<&'a str> {
    let mut paragraphs = database.split("\n\n");
    let name = |p: &str| p.lines().find_map(|l| l.strip_prefix("Name: ").map(str::to_owned));
    let paragraph = paragraphs.find(|p| name(p).as_deref() == Some(question))?;
    paragraph.lines().find_map(|l| l.strip_prefix("Value:")).map(str::trim)
}

/// The name under `/dev/disk/by-id` that udev will give the whole disk in the clone; the kernel's name where the disk
/// has no identifier.
pub fn stable_name(context: &Context, sysfs: &Path, disk: &str) -> String {
    let name = disk.trim_start_matches("/dev/");
    let attribute = |file: &str| {
        let text = std::fs::read_to_string(sysfs.join("class/block").join(name).join(file)).ok()?;
        Some(text.trim().to_owned()).filter(|t| !t.is_empty() && t.bytes().all(|b| b.is_ascii_graphic()))
    };
    let by_id = |id: String| format!("/dev/disk/by-id/{id}");
    // As udev's 60-persistent-storage.rules make them.
    if let Some(wwid) = attribute("wwid").filter(|_| name.starts_with("nvme")) {
        return by_id(format!("nvme-{wwid}"));
    }
    if let Some(serial) = attribute("serial").filter(|_| name.starts_with("vd")) {
        return by_id(format!("virtio-{serial}"));
    }
    if let Some(wwn) = attribute("device/wwid").and_then(|w| w.strip_prefix("naa.").map(str::to_owned)) {
        return by_id(format!("wwn-0x{wwn}"));
    }
    if let Ok(output) = context.ask("/lib/udev/ata_id", &["--export", disk], LIMIT)
        && let Some(serial) = output.text().lines().find_map(|l| l.strip_prefix("ID_SERIAL="))
    {
        return by_id(format!("ata-{serial}"));
    }
    disk.to_owned()
}

#[cfg(test)]
mod tests {
    use super::super::testing::Lab;
    use super::*;

    const DB: &str = "Name: a/b\nTemplate: a/b\nValue: x\n\nName: grub-pc/install_devices\nTemplate: \
                      grub-pc/install_devices\nValue: /dev/disk/by-id/ata-GOLDEN\nOwners: grub-pc\n\nName: c/d\n";

    #[test]
    fn the_answer_is_read() {
        assert_eq!(value_of(DB, QUESTION), Some("/dev/disk/by-id/ata-GOLDEN"));
        assert_eq!(value_of(DB, "c/d"), None);
        assert_eq!(value_of("", QUESTION), None);
    }

    #[test]
    fn disks_get_the_names_that_udev_will_give() {
        let lab = Lab::new();
        let sys = lab.target.join("sys");
        lab.file("/sys/class/block/nvme0n1/wwid", "eui.0025385b71b0a1b2\n")
            .file("/sys/class/block/vda/serial", "DISK7\n")
            .file("/sys/class/block/vdb/serial", "\n")
            .file("/sys/class/block/sda/device/wwid", "naa.5000c500a1b2c3d4\n");
        let context = lab.context();
        let name = |disk: &str| stable_name(&context, &sys, disk);
        assert_eq!(name("/dev/nvme0n1"), "/dev/disk/by-id/nvme-eui.0025385b71b0a1b2");
        assert_eq!(name("/dev/vda"), "/dev/disk/by-id/virtio-DISK7");
        assert_eq!(name("/dev/vdb"), "/dev/vdb");
        assert_eq!(name("/dev/sda"), "/dev/disk/by-id/wwn-0x5000c500a1b2c3d4");
    }

    #[test]
    fn without_the_tool_it_is_said() {
        let lab = Lab::new();
        lab.file(DATABASE, DB);
        let changes = Debconf.apply(&lab.context()).unwrap();
        assert!(changes.len() == 1 && changes[0].warning, "{changes:?}");
        lab.file(DATABASE, "");
        assert!(Debconf.apply(&lab.context()).unwrap().is_empty());
    }
}
