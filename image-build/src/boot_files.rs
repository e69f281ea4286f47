//! The files that firmware loads before the kernel: iPXE for BIOS and UEFI, as Debian's package ipxe has them, and a small
//! GRUB image that sends a UEFI machine on to its own disk (iPXE itself cannot do that; BIOS machines need no such help).

use anyhow::{Context, Result};
use ka_initrd::manifest::{BIOS_LOADER, LOCAL_BOOT, UEFI_LOADER, UEFI_LOADER_DRIVERS};
use ka_initrd::root::Root;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// Every file that may be made here.
pub const NAMES: [&str; 4] = [BIOS_LOADER, UEFI_LOADER, UEFI_LOADER_DRIVERS, LOCAL_BOOT];

/// Where iPXE's files are looked for in a root.
const IPXE_PLACES: [&str; 3] = ["/usr/lib/ipxe", "/usr/share/ipxe", "/boot"];
/// GRUB's modules for UEFI in a root.
const GRUB_MODULES: &str = "/usr/lib/grub/x86_64-efi";
/// Making a GRUB image takes less than a second; ten times that in a slow virtual machine.
const GRUB_LIMIT: Duration = Duration::from_secs(120);

/// The modules of the image: what reads a disk's EFI partition, and what shows that something happens.
const GRUB_PARTS: [&str; 16] = [
    "memdisk",
    "tar",
    "normal",
    "part_gpt",
    "part_msdos",
    "fat",
    "search",
    "search_fs_file",
    "chain",
    "serial",
    "terminal",
    "echo",
    "test",
    "configfile",
    "minicmd",
    "sleep",
];

/// Tries the boot loaders that installations leave on an EFI partition, of local disks only. When there is none it goes
/// back to iPXE, whose script says what comes next.
const GRUB_CONFIG: &str = "\
for file in /EFI/debian/shimx64.efi /EFI/debian/grubx64.efi /EFI/ubuntu/shimx64.efi /EFI/ubuntu/grubx64.efi /EFI/BOOT/BOOTX64.EFI /EFI/Microsoft/Boot/bootmgfw.efi; do
  if search --no-floppy --set=root --file $file; then
    echo \"Booting $file from ($root)\"
    chainloader $file
    boot
  fi
done
echo \"No boot loader found on a local disk.\"
sleep 3
exit
";

/// Puts the boot files into `stage`; returns warnings about those that could not be had.
pub fn place(stage: &Path, root: &Root, boot_tools: Option<&Path>) -> Result<Vec<String>> {
    let host = Root::new(Path::new("/"));
    let mut warnings = Vec::new();
    for (name, needed_by) in [
        (BIOS_LOADER, Some("BIOS nodes whose network card does not bring iPXE cannot boot")),
        (UEFI_LOADER, Some("UEFI nodes cannot boot")),
        (UEFI_LOADER_DRIVERS, None),
    ] {
        let given = boot_tools.map(|dir| dir.join(name)).filter(|path| path.is_file());
        let found = given.or_else(|| {
            [root, &host]
                .into_iter()
                .find_map(|root| IPXE_PLACES.iter().find_map(|place| root.file(&format!("{place}/{name}"))))
        });
        match (found, needed_by) {
            (Some(path), _) => {
                fs::copy(&path, stage.join(name)).with_context(|| format!("copying {}", path.display()))?;
            }
            (None, Some(consequence)) => {
                warnings.push(format!("{name} not found (package ipxe): {consequence}"));
            }
            (None, None) => {}
        }
    }
    if let Err(why) = local_boot(&stage.join(LOCAL_BOOT), root, &host)? {
        warnings.push(format!(
            "no {LOCAL_BOOT}: {why}; UEFI nodes that are installed cannot be sent to their disk"
        ));
    }
    Ok(warnings)
}

/// Makes the image at `path`; the inner error says what is not installed.
fn local_boot(path: &Path, root: &Root, host: &Root) -> Result<Result<(), String>> {
    let modules =
        [root, host].into_iter().find(|root| root.file(&format!("{GRUB_MODULES}/normal.mod")).is_some());
    let Some(modules) = modules else {
        return Ok(Err("GRUB's modules for UEFI are not installed (package grub-efi-amd64-bin)".to_owned()));
    };
    let directory = modules.resolve(GRUB_MODULES).context("finding GRUB's modules")?;
    let Some(mut command) = grub_mkimage(root, host) else {
        return Ok(Err("grub-mkimage is not installed (package grub-common)".to_owned()));
    };
    let work = tempfile::tempdir().context("creating a temporary directory")?;
    let disk = work.path().join("memdisk.tar");
    fs::write(&disk, memdisk()?).with_context(|| format!("writing {}", disk.display()))?;
    command.args(["-O", "x86_64-efi", "-p", "(memdisk)/boot/grub", "-d"]).arg(directory);
    command.arg("-o").arg(path).arg("-m").arg(&disk).args(GRUB_PARTS);
    ka_sys::process::run(&mut command, GRUB_LIMIT).context("making the GRUB image")?;
    Ok(Ok(()))
}

/// The command: this machine's own, or that of the root, run by the root's dynamic linker with the root's libraries so
/// that nothing in the root has to be entered or changed.
fn grub_mkimage(root: &Root, host: &Root) -> Option<Command> {
    let name = "/usr/bin/grub-mkimage";
    if let Some(path) = host.file(name) {
        return Some(Command::new(path));
    }
    let program = root.file(name)?;
    let found = ka_initrd::elf::dynamic(&fs::read(&program).ok()?).ok()?;
    let Some(interpreter) = found.interpreter else { return Some(Command::new(program)) };
    let mut command = Command::new(root.file(&interpreter)?);
    let libraries: Vec<PathBuf> =
        ["/usr/lib/x86_64-linux-gnu", "/lib/x86_64-linux-gnu", "/usr/lib64", "/lib64", "/usr/lib"]
            .iter()
            .filter_map(|dir| root.resolve(dir).ok())
            .collect();
    command.arg("--library-path").arg(std::env::join_paths(libraries).ok()?).arg(program);
    Some(command)
}

/// A tar archive with GRUB's configuration, always the same bytes.
fn memdisk() -> Result<Vec<u8>> {
    let mut archive = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_ustar();
    header.set_path("boot/grub/grub.cfg").context("naming grub.cfg")?;
    header.set_size(GRUB_CONFIG.len() as u64);
    header.set_mode(0o644);
    header.set_cksum();
    archive.append(&header, GRUB_CONFIG.as_bytes()).context("packing grub.cfg")?;
    archive.into_inner().context("packing grub.cfg")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_memdisk_is_a_tar_archive() {
        let bytes = memdisk().unwrap();
        let mut archive = tar::Archive::new(&bytes[..]);
        let names: Vec<_> =
            archive.entries().unwrap().map(|e| e.unwrap().path().unwrap().into_owned()).collect();
        assert_eq!(names, [Path::new("boot/grub/grub.cfg")]);
    }

    #[test]
    fn nothing_installed_gives_warnings_and_no_files() {
        let dir = tempfile::tempdir().unwrap();
        let empty = Root::new(dir.path());
        let why = local_boot(&dir.path().join("x"), &empty, &empty).unwrap().unwrap_err();
        assert!(why.contains("grub-efi-amd64-bin"), "{why}");
    }

    #[test]
    fn the_image_is_an_efi_program_and_always_the_same() {
        let host = Root::new(Path::new("/"));
        let dir = tempfile::tempdir().unwrap();
        let mut images = Vec::new();
        for name in ["a", "b"] {
            let path = dir.path().join(name);
            if let Err(why) = local_boot(&path, &host, &host).unwrap() {
                println!("SKIPPED: {why}");
                return;
            }
            images.push(fs::read(path).unwrap());
        }
        assert!(images[0].starts_with(b"MZ"));
        assert!(images[0] == images[1], "two builds differ");
    }
}
