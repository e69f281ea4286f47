//! The clone's entry among the firmware's boot entries: made where the boot loader's own installer does not make it,
//! freed of what is left of earlier systems of the same name, and put where policy wants it.

use super::efi::{self, BootEntries};
use super::grub::EFIVARS;
use super::{Change, Context};
use anyhow::{Context as _, Result, anyhow};
use ka_layout::order::Volume;
use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(120);
const PIECE: &str = "bootloader";
const TOOL: &[&str] = &["/usr/bin/efibootmgr", "/usr/sbin/efibootmgr", "/bin/efibootmgr"];

/// Whether the firmware's variables can be reached from the clone.
pub fn in_reach(context: &Context) -> Result<bool> {
    Ok(!context.root.list(EFIVARS)?.is_empty())
}

/// The firmware's boot entries, read by the clone's `efibootmgr`; none when it has none.
pub fn read(context: &Context) -> Result<Option<BootEntries>> {
    if context.first_of(TOOL).is_none() {
        return Ok(None);
    }
    let output = context.ask("efibootmgr", &["-v"], LIMIT).context("reading the firmware's boot entries")?;
    Ok(Some(efi::parse(&output.text())))
}

/// Makes an entry `label` for `file` on the ESP where there is none yet, then does what [`arrange`] does.
///
/// # Errors
/// When an entry cannot be made, deleted or put in its place.
pub fn ensure(
    context: &Context,
    label: &str,
    file: &str,
    esp: &Volume,
    removable: &str,
) -> Result<Vec<Change>> {
    if context.is_dry() {
        return Ok(vec![Change::new(
            PIECE,
            "NVRAM",
            format!("an entry {label:?} for {file} is to be made or kept"),
        )]);
    }
    let warning = |why: String| {
        let what = format!("no boot entry was made: {why}; the firmware must boot {removable}");
        Ok(vec![Change::warning(PIECE, "NVRAM", what)])
    };
    if !in_reach(context)? {
        return warning(format!("{EFIVARS} is out of reach"));
    }
    let Some(found) = read(context)? else { return warning("the clone has no efibootmgr".into()) };
    let path = format!("\\{}", file.replace('/', "\\"));
    let ours = |e: &&efi::Entry| {
        e.label == label
            && e.file.as_ref().is_some_and(|f| f.eq_ignore_ascii_case(&path))
            && e.partuuid.as_ref().zip(esp.partuuid.as_ref()).is_some_and(|(a, b)| a.eq_ignore_ascii_case(b))
    };
    if !found.entries.iter().any(|e| ours(&e)) {
        let number = esp.number.to_string();
        let words = ["-q", "-c", "-d", &esp.disk, "-p", &number, "-L", label, "-l", &path];
        context
            .run("efibootmgr", &words, LIMIT)
            .with_context(|| format!("making the boot entry {label} for {path}"))?;
    }
    arrange(context, label, Some(&path), esp)
}

/// Removes stale entries and sets the order that policy wants, for the entry `label` on the ESP, which must be there.
///
/// # Errors
/// When it is not there, or `efibootmgr` fails.
pub fn arrange(context: &Context, label: &str, file: Option<&str>, esp: &Volume) -> Result<Vec<Change>> {
    let Some(found) = read(context)? else {
        let what = "the clone has no efibootmgr: old boot entries and the boot order are as the boot loader's installer left them";
        return Ok(vec![Change::warning(PIECE, "NVRAM", what)]);
    };
    let policy = context.order.policy.efi_boot;
    let present = present_partitions(Path::new("/sys/class/block"), Path::new("/dev"));
    let here = efi::Here { label, file, partuuid: esp.partuuid.as_deref(), present: present.as_ref() };
    let (own, plan) = efi::plan(&found, &here, policy)
        .ok_or_else(|| anyhow!("checking the boot entry: there is none called {label} for {}", esp.device))?;
    let mut changes =
        vec![Change::new(PIECE, "NVRAM", format!("entry {own} ({label}) boots {}", esp.device))];
    for number in &plan.delete {
        context
            .run("efibootmgr", &["-q", "-b", number, "-B"], LIMIT)
            .with_context(|| format!("deleting the old boot entry {number}"))?;
        changes.push(Change::new(PIECE, "NVRAM", format!("stale entry {number} deleted")));
    }
    if let Some(order) = &plan.order {
        let order = order.join(",");
        context
            .run("efibootmgr", &["-q", "-o", &order], LIMIT)
            .with_context(|| format!("setting the boot order to {order}"))?;
        changes.push(Change::new(PIECE, "NVRAM", format!("boot order {order}")));
    }
    if let Some(next) = &plan.next {
        context
            .run("efibootmgr", &["-q", "-n", next], LIMIT)
            .with_context(|| format!("setting the next boot to {next}"))?;
        changes.push(Change::new(PIECE, "NVRAM", format!("the next boot is {next}, once")));
    }
    if let Some(problem) = plan.problem {
        changes.push(Change::warning(PIECE, "NVRAM", format!("the network is not put first: {problem}")));
    }
    Ok(changes)
}

/// The GUIDs of all GPT partitions of this machine, in lower case; none when a disk cannot be read, for then nothing can
/// be said of what is not there.
fn present_partitions(class_block: &Path, dev: &Path) -> Option<BTreeSet<String>> {
    let mut present = BTreeSet::new();
    for entry in std::fs::read_dir(class_block).ok()?.flatten() {
        let sysfs = entry.path();
        let size = std::fs::read_to_string(sysfs.join("size")).unwrap_or_default();
        // Disks have a device behind them; partitions, loop devices and arrays have none.
        if !sysfs.join("device").exists() || sysfs.join("partition").exists() || size.trim() == "0" {
            continue;
        }
        let disk = dev.join(entry.file_name());
        let sector = std::fs::read_to_string(sysfs.join("queue/logical_block_size")).ok()?;
        let sector = match sector.trim() {
            "4096" => gpt::disk::LogicalBlockSize::Lb4096,
            _ => gpt::disk::LogicalBlockSize::Lb512,
        };
        let file = match std::fs::File::open(&disk) {
            Ok(file) => file,
            // A drive without a medium.
            Err(e) if e.raw_os_error() == Some(rustix::io::Errno::NOMEDIUM.raw_os_error()) => continue,
            Err(_) => return None,
        };
        // A disk with another table, or none, has no GPT partitions.
        if let Ok(table) =
            gpt::GptConfig::new().writable(false).logical_block_size(sector).open_from_device(file)
        {
            present.extend(table.partitions().values().map(|p| p.part_guid.to_string().to_ascii_lowercase()));
        }
    }
    Some(present)
}

#[cfg(test)]
mod tests {
    use super::super::testing::Lab;
    use super::*;
    use ka_layout::order::EfiBoot;
    use std::cell::RefCell;

    const OWN: &str = "bbbbbbbb-0000-4000-8000-000000000001";

    /// A firmware of which `efibootmgr` tells and which it changes.
    fn firmware(first: &'static str) -> impl Fn(&str) -> anyhow::Result<String> + 'static {
        let entries = RefCell::new(first.to_owned());
        move |line: &str| {
            if line.contains(" -c ") {
                let label = line.split(" -L ").nth(1).unwrap().split(" -l ").next().unwrap();
                let file = line.split(" -l ").nth(1).unwrap();
                let mut text = entries.borrow_mut();
                *text = text.replace("BootOrder: ", "BootOrder: 0009,");
                text.push_str(&format!("Boot0009* {label}\tHD(1,GPT,{OWN},0x800,0x40000)/{file}\n"));
            }
            Ok(entries.borrow().clone())
        }
    }

    const OLD: &str = "BootCurrent: 0003\nBootOrder: 0003,0005,0006\n\
        Boot0003* UEFI PXEv4\tPciRoot(0x0)/MAC(525400123456,1)\n\
        Boot0005* Rocky Linux\tHD(1,GPT,11111111-1111-4111-8111-111111111111,0x800,0x40000)/\\EFI\\rocky\\shimx64.efi\n\
        Boot0006* Windows Boot Manager\tHD(1,GPT,22222222-1111-4111-8111-111111111111,0x800,0x40000)/\\EFI\\Microsoft\\Boot\\bootmgfw.efi\n";

    fn ran(policy: EfiBoot) -> Vec<String> {
        let mut lab = Lab::new();
        lab.order.policy.efi_boot = policy;
        lab.file("/usr/sbin/efibootmgr", "").file("/sys/firmware/efi/efivars/BootOrder", "");
        let context = lab.pretending(firmware(OLD));
        let esp = context.mounted_at("/boot/efi").unwrap();
        let changes =
            ensure(&context, "Rocky Linux", "EFI/rocky/shimx64.efi", esp, "EFI/BOOT/BOOTX64.EFI").unwrap();
        assert!(changes.iter().all(|c| !c.warning), "{changes:?}");
        context.ran().into_iter().filter(|line| line != "efibootmgr -v").collect()
    }

    #[test]
    fn an_entry_is_made_and_the_older_one_goes() {
        assert_eq!(
            ran(EfiBoot::DiskFirst),
            [
                "efibootmgr -q -c -d /dev/nvme0n1 -p 1 -L Rocky Linux -l \\EFI\\rocky\\shimx64.efi",
                "efibootmgr -q -b 0005 -B",
            ]
        );
    }

    #[test]
    fn the_boot_order_follows_the_policy() {
        assert_eq!(ran(EfiBoot::PxeFirst)[2..], ["efibootmgr -q -o 0003,0009,0006"]);
        assert_eq!(ran(EfiBoot::BootNext)[2..], ["efibootmgr -q -o 0003,0006,0009", "efibootmgr -q -n 0009"]);
    }

    #[test]
    fn without_variables_or_tool_the_removable_path_must_do() {
        let lab = Lab::new();
        let context = lab.pretending(|_| Ok(String::new()));
        let esp = context.mounted_at("/boot/efi").unwrap();
        let said = |lab: &Lab| {
            ensure(&lab.context(), "x", "EFI/x/shimx64.efi", esp, "EFI/BOOT/BOOTX64.EFI").unwrap()
        };
        assert!(
            said(&lab)[0].to_string().contains("out of reach; the firmware must boot EFI/BOOT/BOOTX64.EFI")
        );
        lab.file("/sys/firmware/efi/efivars/BootOrder", "");
        assert!(said(&lab)[0].warning && said(&lab)[0].what.contains("no efibootmgr"));
    }

    #[test]
    fn partitions_of_gpt_disks_are_known_and_a_disk_that_cannot_be_read_leaves_all_open() {
        let lab = Lab::new();
        lab.file("/class/sda/device/x", "")
            .file("/class/sda/size", "2048\n")
            .file("/class/sda/queue/logical_block_size", "512\n");
        lab.file("/class/loop0/size", "2048\n").file("/class/sdb/size", "0\n");
        let dev = lab.target.join("dev");
        assert_eq!(present_partitions(&lab.target.join("class"), &dev), None);
        std::fs::create_dir(&dev).unwrap();
        let image = std::fs::File::create_new(dev.join("sda")).unwrap();
        image.set_len(1 << 20).unwrap();
        assert_eq!(present_partitions(&lab.target.join("class"), &dev).unwrap().len(), 0);
        let mut table = gpt::GptConfig::new().writable(true).create(dev.join("sda")).unwrap();
        table.add_partition("x", 64 << 10, gpt::partition_types::EFI, 0, None).unwrap();
        let guid = table.partitions().values().next().unwrap().part_guid.to_string();
        table.write().unwrap();
        let found = present_partitions(&lab.target.join("class"), &dev).unwrap();
        assert_eq!(found.into_iter().collect::<Vec<_>>(), [guid.to_ascii_lowercase()]);
    }
}
