//! extlinux on BIOS machines: the clone's own `extlinux` puts its loader beside the menu, and the boot code that looks for
//! the active partition goes into the disk's first sector. Without that program (U-Boot reads the same menu) nothing is
//! installed, and only what the menu boots is checked.

use super::{Change, Context, entries};
use anyhow::{Context as _, Result, bail};
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(120);
/// Bytes of boot code in the first sector; behind them are the disk's signature and the table.
const CODE: usize = 440;
/// Where distributions put syslinux's boot code.
const DIRS: &[&str] = &[
    "/usr/lib/EXTLINUX",
    "/usr/lib/syslinux/mbr",
    "/usr/lib/syslinux/bios",
    "/usr/share/syslinux",
    "/usr/lib/syslinux",
];

/// The directory of the clone's menu; none when it has none.
pub fn dir(context: &Context) -> Option<String> {
    let menu = entries::extlinux_files(context).into_iter().next()?;
    Some(menu.rsplit_once('/')?.0.to_owned())
}

/// Whether the clone has the program.
pub fn is_installable(context: &Context) -> bool {
    context.first_of(&["/usr/bin/extlinux", "/usr/sbin/extlinux", "/sbin/extlinux"]).is_some()
}

/// What the partition table of a disk is, as far as boot code differs by it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Table {
    Mbr,
    /// With the bytes of a sector.
    Gpt(u64),
}

fn table(disk: &File) -> Result<Table> {
    for sector in [512, 4096] {
        let mut magic = [0; 8];
        disk.read_exact_at(&mut magic, sector)?;
        if magic == *b"EFI PART" {
            return Ok(Table::Gpt(sector));
        }
    }
    Ok(Table::Mbr)
}

/// The boot code of the clone's syslinux for such a table.
fn boot_code(context: &Context, table: Table) -> Result<(String, Vec<u8>)> {
    let name = if table == Table::Mbr { "mbr.bin" } else { "gptmbr.bin" };
    for dir in DIRS {
        let path = format!("{dir}/{name}");
        if let Some(code) = context.root.read(&path)? {
            if code.is_empty() || code.len() > CODE {
                bail!("reading {path} of the clone: {} bytes are no boot code", code.len());
            }
            return Ok((path, code));
        }
    }
    bail!(
        "installing extlinux: the clone has no {name}; install syslinux-common (or syslinux) on the golden node"
    )
}

/// Installs it on the disk that holds the menu.
///
/// # Errors
/// When the program fails, or the boot code is missing or cannot be written.
pub fn install(context: &Context, dir: &str) -> Result<Vec<Change>> {
    context
        .run("extlinux", &["--install", dir], LIMIT)
        .with_context(|| format!("installing extlinux in {dir}"))?;
    let mut changes = vec![Change::new("bootloader", dir, "extlinux installed")];
    let disk = &context.boot_volume()?.disk;
    let writing = || format!("writing the boot code of {disk}");
    let (path, code) =
        boot_code(context, table(&File::open(disk).with_context(writing)?).with_context(writing)?)?;
    if !context.is_dry() {
        let file = OpenOptions::new().write(true).open(disk).with_context(writing)?;
        file.write_all_at(&code, 0).with_context(writing)?;
        file.sync_all().with_context(writing)?;
    }
    changes.push(Change::new("bootloader", disk, format!("boot code from {path}")));
    Ok(changes)
}

/// What is wrong with it; nothing is changed.
///
/// # Errors
/// When the disk cannot be read.
pub fn problems(context: &Context, dir: &str) -> Result<Vec<String>> {
    let mut problems = Vec::new();
    if context.root.size(format!("{dir}/ldlinux.sys")).is_none_or(|size| size == 0) {
        problems.push(format!("{dir}/ldlinux.sys does not exist"));
    }
    let volume = context.boot_volume()?;
    let found = disk_problem(context, Path::new(&volume.disk), volume.number)
        .with_context(|| format!("checking the boot code of {}", volume.disk))?;
    problems.extend(found.map(|what| format!("the boot loader on {} is not usable: {what}", volume.disk)));
    Ok(problems)
}

fn disk_problem(context: &Context, disk: &Path, number: u32) -> Result<Option<String>> {
    let file = File::open(disk)?;
    let mut first = [0; 512];
    file.read_exact_at(&mut first, 0)?;
    if first[510..] != [0x55, 0xaa] {
        return Ok(Some("the first sector has no boot signature".into()));
    }
    let table = table(&file)?;
    let (path, code) = boot_code(context, table)?;
    if !first.starts_with(&code) {
        return Ok(Some(format!("the first sector is not {path}")));
    }
    let is_marked = match table {
        Table::Mbr => (1..=4).contains(&number) && first[446 + 16 * (number as usize - 1)] == 0x80,
        Table::Gpt(sector) => {
            let mut attributes = [0; 8];
            file.read_exact_at(&mut attributes, 2 * sector + 128 * u64::from(number.max(1) - 1) + 48)?;
            attributes[0] & 4 != 0
        }
    };
    let how = if table == Table::Mbr { "active" } else { "marked bootable by BIOS (legacy_boot)" };
    Ok((!is_marked).then(|| format!("partition {number} is not {how}")))
}

#[cfg(test)]
mod tests {
    use super::super::testing::Lab;
    use super::*;

    fn lab() -> Lab {
        let mut lab = Lab::new();
        lab.file("/boot/extlinux/extlinux.conf", "label x\n").file("/usr/bin/extlinux", "");
        lab.file("/usr/lib/EXTLINUX/mbr.bin", "mbr code").file("/usr/lib/EXTLINUX/gptmbr.bin", "gpt code");
        let disk = lab.target.join("disk").to_string_lossy().into_owned();
        lab.volumes.iter_mut().for_each(|v| v.disk.clone_from(&disk));
        let mut image = vec![0; 64 << 10];
        image[510..512].copy_from_slice(&[0x55, 0xaa]);
        std::fs::write(&disk, image).unwrap();
        lab
    }

    fn set(lab: &Lab, at: u64, bytes: &[u8]) {
        let file = OpenOptions::new().write(true).open(lab.target.join("disk")).unwrap();
        file.write_all_at(bytes, at).unwrap();
    }

    #[test]
    fn the_boot_code_fits_the_table_and_the_partition_must_be_marked() {
        for (gpt, code) in [(false, "mbr code"), (true, "gpt code")] {
            let lab = lab();
            if gpt {
                set(&lab, 512, b"EFI PART");
            }
            let context = lab.pretending(|_| Ok(String::new()));
            let dir = dir(&context).unwrap();
            assert!(
                problems(&context, &dir)
                    .unwrap()
                    .join(" ")
                    .contains("the first sector is not /usr/lib/EXTLINUX")
            );
            install(&context, &dir).unwrap();
            assert_eq!(context.ran(), ["extlinux --install /boot/extlinux"]);
            assert!(std::fs::read(lab.target.join("disk")).unwrap().starts_with(code.as_bytes()));
            lab.file("/boot/extlinux/ldlinux.sys", "x");
            let problem = problems(&context, &dir).unwrap().join(" ");
            assert!(problem.contains("partition 3 is not "), "{problem}");
            if gpt {
                set(&lab, 1024 + 2 * 128 + 48, &[4]);
            } else {
                set(&lab, 446 + 2 * 16, &[0x80]);
            }
            assert_eq!(problems(&context, &dir).unwrap(), [""; 0]);
        }
    }

    #[test]
    fn a_dry_run_writes_no_boot_code() {
        let lab = lab();
        let context = lab.context().dry();
        assert_eq!(install(&context, "/boot/extlinux").unwrap().len(), 2);
        assert_eq!(context.take_notes(), ["extlinux --install /boot/extlinux"]);
        assert!(std::fs::read(lab.target.join("disk")).unwrap().starts_with(&[0; 16]));
    }

    #[test]
    fn missing_boot_code_names_the_package() {
        let lab = lab();
        std::fs::remove_file(lab.target.join("usr/lib/EXTLINUX/mbr.bin")).unwrap();
        let context = lab.pretending(|_| Ok(String::new()));
        let error = install(&context, "/boot/extlinux").unwrap_err().to_string();
        assert!(error.contains("no mbr.bin; install syslinux-common"), "{error}");
    }
}
