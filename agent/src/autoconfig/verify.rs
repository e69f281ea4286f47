//! The check before success: everything that the clone's boot relies on is looked up once more as it now is. Every device
//! that fstab, crypttab and the kernel command lines name must be a volume of this node, the kernels and initramfs of the
//! menu must exist, and the boot loader must be where the firmware will look for it. Nothing is changed here.

use super::fstab::Line;
use super::grub::{EFIVARS, efi_arch, esp, on_esp};
use super::loader::{self, Loader};
use super::{
    Context, chroot::Chroot, crypttab, entries, esp_files, extlinux, grub_cfg, grubenv, kernel_cmdline,
};
use super::{machine_id, mkinitcpio, nvram, uki};
use anyhow::{Context as _, Result, bail};
use ka_layout::model::Fs;
use ka_layout::order::Firmware;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

const CORES: &[&str] = &["/boot/grub/i386-pc/core.img", "/boot/grub2/i386-pc/core.img"];
/// The last bytes of core.img's first sector are a list of sectors, filled in when it is installed.
const CORE_FIXED: usize = 0x1f4;

/// Checks the clone; all that is wrong comes in one error.
///
/// # Errors
/// When something that the clone needs to boot does not resolve or is not there.
pub fn verify(context: &Context) -> Result<()> {
    if context.skips("verify") {
        log::warn!("verify: skipped by policy");
        return Ok(());
    }
    let mut problems = Vec::new();
    let mut check = |result: Result<Vec<String>>| match result {
        Ok(found) => problems.extend(found),
        Err(e) => problems.push(format!("{e:#}")),
    };
    check(fstab(context));
    check(crypttab(context));
    check(command_lines(context));
    check(machine_id(context));
    check(boot_files(context));
    // Who skips this brings another boot loader by a hook, which only its author can check.
    if !context.skips("bootloader") {
        check(mkinitcpio::problems(context));
        match loader::detect(context) {
            Ok(loader) => {
                check(menu(context, &loader));
                check(match (&loader, context.firmware) {
                    (Loader::Extlinux(dir), _) => extlinux::problems(context, dir),
                    (Loader::MenuOnly, _) => Ok(Vec::new()),
                    (_, Firmware::Bios) => bios_loader(context),
                    (_, Firmware::Uefi) => uefi_loader(context, &loader),
                });
            }
            Err(e) => check(Err(e)),
        }
    }
    if problems.is_empty() {
        return Ok(());
    }
    bail!("{}", problems.join("; "));
}

fn fstab(context: &Context) -> Result<Vec<String>> {
    let text = context.root.read_text("/etc/fstab")?.unwrap_or_default();
    let names = context.names();
    let mut problems = Vec::new();
    let mut has_root = false;
    for line in text.lines().filter_map(Line::parse) {
        has_root |= line.mount_path() == "/" && !line.is_swap();
        if let Some(spec) = line.device().filter(|_| !line.is_optional()) {
            match names.bearer(&spec) {
                None => problems.push(format!("/etc/fstab names {}, which is not on this node", line.spec)),
                Some(volume) => {
                    if !line.is_kind_of(volume) {
                        let found = volume.fs.map_or("nothing", Fs::name);
                        problems.push(format!(
                            "/etc/fstab has {} for {}, which is {found} on this node",
                            line.kind, line.spec
                        ));
                    }
                    let right =
                        volume.mount.as_ref().is_none_or(|m| m.path != "/") || line.mount_path() == "/";
                    if !right && !line.has("bind") && !line.options.contains("subvol") {
                        problems.push(format!("/etc/fstab mounts the root file system at {}", line.dir));
                    }
                }
            }
        }
    }
    if !has_root {
        problems.push("/etc/fstab does not mount /".into());
    }
    Ok(problems)
}

fn crypttab(context: &Context) -> Result<Vec<String>> {
    let mut problems = Vec::new();
    for path in crypttab::FILES {
        let text = context.root.read_text(path)?.unwrap_or_default();
        for line in text.lines().filter_map(crypttab::Line::parse) {
            let (device, name) = (line.device, line.name);
            match crypttab::Device::of(context, &line)? {
                crypttab::Device::Missing(_) if !line.is_optional() => {
                    problems.push(format!("{path} names {device} ({name}), which is not on this node"));
                }
                crypttab::Device::Lost(why) => problems.push(format!("{path} would open {name}: {why}")),
                crypttab::Device::Missing(_) | crypttab::Device::Fit => {}
            }
        }
    }
    Ok(problems)
}

fn command_lines(context: &Context) -> Result<Vec<String>> {
    let mut problems = Vec::new();
    for file in kernel_cmdline::files(context)? {
        let Some(text) = context.root.read_text(&file)? else { continue };
        for line in text.lines().filter(|l| !l.trim_start().starts_with('#')) {
            for (key, spec) in grub_cfg::command_line_names(line) {
                if context.names().bearer(&spec).is_none() {
                    problems
                        .push(format!("{file} has {key}= with what is not on this node: {}", line.trim()));
                }
            }
        }
    }
    Ok(problems)
}

fn machine_id(context: &Context) -> Result<Vec<String>> {
    if context.skips("machine-id") {
        return Ok(Vec::new());
    }
    let id = context.root.read_text("/etc/machine-id")?.unwrap_or_default();
    let id = id.trim_end();
    Ok(if machine_id::is_valid(id) {
        Vec::new()
    } else {
        vec![format!("/etc/machine-id is no machine id: {id:?}")]
    })
}

/// Boot entries that are files of their own, whoever reads them, and what GRUB's environment adds to them.
fn boot_files(context: &Context) -> Result<Vec<String>> {
    let root = &context.root;
    let mut problems = Vec::new();
    for (dir, file) in entries::bls_files(context)? {
        let entry = entries::parse_bls(&root.read_text(&file)?.unwrap_or_default());
        problems.extend(entries::problems(context, &file.to_string_lossy(), &dir, &entry));
    }
    for file in entries::extlinux_files(context) {
        let dir = file.rsplit_once('/').map_or("/boot", |(dir, _)| dir);
        for entry in entries::parse_extlinux(&root.read_text(&file)?.unwrap_or_default()) {
            problems.extend(entries::problems(context, &file, dir, &entry));
        }
    }
    for (file, options) in uki::images(context)? {
        let entry = entries::BootEntry { options, ..entries::BootEntry::default() };
        problems.extend(entries::problems(context, &file, "/", &entry));
    }
    for file in ["/boot/grub/grubenv", "/boot/grub2/grubenv"] {
        let text = root.read_text(file)?.unwrap_or_default();
        for line in grubenv::lines(&text).unwrap_or_default() {
            let Some(options) = line.strip_prefix("kernelopts=") else { continue };
            let entry = entries::BootEntry { options: options.to_owned(), ..entries::BootEntry::default() };
            problems.extend(entries::problems(context, file, "/", &entry));
        }
    }
    Ok(problems)
}

/// The menu of the clone's boot loader must boot something.
fn menu(context: &Context, loader: &Loader) -> Result<Vec<String>> {
    let root = &context.root;
    match loader {
        Loader::SystemdBoot => {
            let none = entries::bls_files(context)?.is_empty() && uki::images(context)?.is_empty();
            return Ok(none
                .then(|| "systemd-boot has no boot entry and no unified kernel image".to_owned())
                .into_iter()
                .collect());
        }
        Loader::Extlinux(_) | Loader::MenuOnly => {
            let mut kernels = 0;
            for file in entries::extlinux_files(context) {
                kernels += entries::parse_extlinux(&root.read_text(&file)?.unwrap_or_default()).len();
            }
            return Ok((kernels == 0)
                .then(|| "extlinux's menu boots no kernel".to_owned())
                .into_iter()
                .collect());
        }
        _ => {}
    }
    let path = grub_cfg::path(context)?;
    let Some(text) = root.read_text(&path)? else { return Ok(vec![format!("{path} does not exist")]) };
    let found = grub_cfg::parse(&text);
    let mut problems: Vec<String> = grub_cfg::unresolved(context, &found)
        .into_iter()
        .map(|line| format!("{path} names what is not on this node: {line}"))
        .collect();
    let has_entries = found.blscfg && !entries::bls_files(context)?.is_empty();
    if found.kernels.is_empty() && !has_entries {
        problems.push(format!("{path} boots no kernel"));
    }
    let files = found.kernels.iter().chain(&found.initrds);
    let missing = files.filter(|f| grub_cfg::in_clone(root, f).is_none());
    problems.extend(missing.map(|f| format!("{path} boots {f}, which does not exist or is empty")));
    problems.dedup();
    Ok(problems)
}

/// GRUB's first sector on the disk, the sector that it loads, and the clone's own copy of that must fit together.
fn bios_loader(context: &Context) -> Result<Vec<String>> {
    let path = context.first_of(CORES).unwrap_or(CORES[0]);
    let Some(core) = context.root.read(path)?.filter(|c| c.len() > 4 * 512) else {
        return Ok(vec![format!("{path} does not exist")]);
    };
    let mut problems = Vec::new();
    for disk in context.boot_disks()? {
        let problem =
            check_bios_disk(Path::new(disk), path, &core).with_context(|| format!("reading {disk}"))?;
        problems.extend(problem.map(|p| format!("the boot loader on {disk} is not usable: {p}")));
    }
    Ok(problems)
}

fn check_bios_disk(disk: &Path, path: &str, core: &[u8]) -> Result<Option<String>> {
    let file = File::open(disk)?;
    let mut mbr = [0; 512];
    file.read_exact_at(&mut mbr, 0)?;
    if mbr[510..] != [0x55, 0xaa] {
        return Ok(Some("the first sector has no boot signature".into()));
    }
    if !mbr[..440].windows(5).any(|w| w == b"GRUB ") {
        return Ok(Some("the first sector is not GRUB's".into()));
    }
    let mut sector = [0; 8];
    sector.copy_from_slice(&mbr[0x5c..0x64]);
    let Some(at) = u64::from_le_bytes(sector).checked_mul(512).filter(|&at| at > 0) else {
        return Ok(Some("the first sector leads nowhere".into()));
    };
    // The first sector is compared but for its list; the second has settings filled in; the third is code.
    let mut installed = [0; 3 * 512];
    if let Err(e) = file.read_exact_at(&mut installed, at) {
        return Ok(Some(format!("what the first sector leads to cannot be read: {e}")));
    }
    let same = installed[..CORE_FIXED] == core[..CORE_FIXED] && installed[1024..] == core[1024..1536];
    Ok((!same).then(|| format!("the sectors at {at} are not {path}")))
}

fn uefi_loader(context: &Context, loader: &Loader) -> Result<Vec<String>> {
    let root = &context.root;
    let (esp, mount) = esp(context)?;
    let mut problems = Vec::new();
    let mut is_program = |path: &str| -> Result<()> {
        let found = on_esp(root, mount, path);
        let found = found.map(|p| root.read(p)).transpose()?.flatten();
        if !found.is_some_and(|content| content.starts_with(b"MZ")) {
            problems.push(format!("{path} is no UEFI program on {} ({mount})", esp.device));
        }
        Ok(())
    };
    let arch = efi_arch(&context.order.golden.arch)?;
    is_program(arch.removable)?;
    let entry = loader.entry(context, &arch);
    if let Some((_, Some(file))) = &entry {
        is_program(file)?;
    }
    // Where the firmware's variables are out of reach, the boot loader step has warned that there is no entry.
    if Path::new(EFIVARS).is_dir() {
        let chroot = Chroot::enter(context)?;
        let entries = if nvram::in_reach(context)? { nvram::read(context) } else { Ok(None) };
        chroot.leave()?;
        if let (Some(entries), Some((label, _))) = (entries?, &entry) {
            let own = entries.entries.iter().filter(|e| e.label == *label);
            match own.filter_map(|e| e.file.as_deref()).next() {
                Some(file) => is_program(file)?,
                None => problems.push(format!("the firmware has no boot entry called {label}")),
            }
        }
    }
    for stub in esp_files::stubs(context)? {
        // The stub by which a signed GRUB finds its menu.
        if let Some(text) = root.read_text(&stub)? {
            let lost = grub_cfg::unresolved(context, &grub_cfg::parse(&text));
            problems.extend(lost.into_iter().map(|l| format!("{stub} names what is not on this node: {l}")));
        }
    }
    Ok(problems)
}

#[cfg(test)]
mod tests {
    use super::super::testing::{ESP_UUID, Lab, ROOT_UUID, SWAP_UUID};
    use super::*;

    fn good() -> Lab {
        let lab = Lab::new();
        lab.file(
            "/etc/fstab",
            &format!("UUID={ROOT_UUID} / ext4 defaults 0 1\nUUID={ESP_UUID} /boot/efi vfat defaults 0 1\nUUID=dead /x ext4 nofail 0 2\n"),
        )
        .file("/etc/machine-id", "0123456789abcdef0123456789abcdef\n")
        .file("/etc/default/grub", &format!("GRUB_CMDLINE_LINUX=\"resume=UUID={SWAP_UUID}\"\n"))
        .file(
            "/boot/grub/grub.cfg",
            &format!("search --fs-uuid --set=root {ROOT_UUID}\nlinux /boot/k root=UUID={ROOT_UUID} ro\ninitrd /boot/i\n"),
        )
        .file("/boot/k", "k")
        .file("/boot/i", "i")
        .file("/boot/efi/EFI/debian/grub.cfg", &format!("search.fs_uuid {ROOT_UUID} root\n"))
        .file("/boot/efi/EFI/BOOT/BOOTX64.EFI", "MZ");
        lab
    }

    fn problem(lab: &Lab) -> String {
        // Where the machine that runs the tests has UEFI variables, the boot entry is missing as well.
        format!("{:#}", verify(&lab.context()).unwrap_err())
    }

    #[test]
    fn a_good_clone_passes() {
        if Path::new(EFIVARS).is_dir() {
            eprintln!("SKIPPED: this machine's own boot entries would be read");
            return;
        }
        verify(&good().context()).unwrap();
    }

    #[test]
    fn each_name_that_does_not_resolve_fails_it() {
        let cases = [
            ("/etc/fstab", "UUID=dead / ext4 defaults 0 1\n", "/etc/fstab names UUID=dead"),
            (
                "/etc/fstab",
                "LABEL=label3 / xfs defaults 0 1\n",
                "/etc/fstab has xfs for LABEL=label3, which is ext4",
            ),
            ("/etc/fstab", "# empty\n", "/etc/fstab does not mount /"),
            ("/etc/fstab", "/dev/disk/by-id/x / ext4 defaults 0 1\n", "/etc/fstab names /dev/disk/by-id/x"),
            ("/etc/crypttab", "c UUID=dead none luks\n", "/etc/crypttab names UUID=dead (c)"),
            (
                "/etc/crypttab",
                "c /dev/nvme0n1p3 /dev/urandom swap,nofail\n",
                "/etc/crypttab would open c: /dev/nvme0n1p3 has ext4",
            ),
            ("/etc/default/grub", "A=\"resume=/dev/sda2\"\n", "/etc/default/grub has resume="),
            ("/etc/kernel/cmdline", "root=LABEL=x\n", "/etc/kernel/cmdline has root="),
            ("/etc/machine-id", "\n", "/etc/machine-id is no machine id"),
            (
                "/boot/grub/grub.cfg",
                "linux /boot/k root=/dev/sda3\n",
                "/boot/grub/grub.cfg names what is not",
            ),
            ("/boot/grub/grub.cfg", "linux /boot/none\n", "boots /boot/none, which does not exist"),
            ("/boot/grub/grub.cfg", "", "boots no kernel"),
            ("/boot/i", "", "boots /boot/i, which does not exist or is empty"),
            ("/boot/efi/EFI/BOOT/BOOTX64.EFI", "", "EFI/BOOT/BOOTX64.EFI is no UEFI program"),
            ("/boot/efi/EFI/debian/grub.cfg", "search.fs_uuid dead root\n", "names what is not on this node"),
        ];
        for (path, content, wanted) in cases {
            let lab = good();
            lab.file(path, content);
            let problem = problem(&lab);
            assert!(problem.contains(wanted), "{path}: {problem}");
        }
    }

    #[test]
    fn boot_entries_are_checked_whatever_the_loader() {
        let cases = [
            (
                "/boot/loader/entries/a.conf",
                "linux /boot/none\noptions root=LABEL=label3\n",
                "a.conf boots /boot/none",
            ),
            (
                "/boot/efi/loader/entries/a.conf",
                "linux /boot/k\noptions root=UUID=dead\n",
                "a.conf has root=",
            ),
            (
                "/boot/extlinux/extlinux.conf",
                "label x\nlinux /boot/k\ninitrd /boot/none\n",
                "boots /boot/none",
            ),
            (
                "/boot/grub2/grubenv",
                "# GRUB Environment Block\nkernelopts=root=UUID=dead\n",
                "grubenv has root=",
            ),
        ];
        for (path, content, wanted) in cases {
            let mut lab = good();
            lab.file(path, content);
            let found = problem(&lab);
            assert!(found.contains(wanted), "{path}: {found}");
            lab.order.policy.skip = vec!["bootloader".into()];
            let found = problem(&lab);
            assert!(found.contains(wanted), "{path}: {found}");
        }
        let lab = good();
        lab.file("/boot/efi/EFI/Linux/x", "");
        std::fs::write(lab.target.join("boot/efi/EFI/Linux/a.efi"), uki::image(".cmdline", "root=UUID=dead"))
            .unwrap();
        assert!(problem(&lab).contains("a.efi has root="));
    }

    #[test]
    fn systemd_boot_needs_an_entry_and_its_files() {
        if Path::new(EFIVARS).is_dir() {
            eprintln!("SKIPPED: this machine's own boot entries would be read");
            return;
        }
        let lab = good();
        std::fs::remove_file(lab.target.join("boot/grub/grub.cfg")).unwrap();
        lab.file("/boot/efi/EFI/systemd/systemd-bootx64.efi", "MZ");
        assert!(problem(&lab).contains("systemd-boot has no boot entry"));
        lab.file(
            "/boot/efi/loader/entries/a.conf",
            &format!("linux /boot/k\noptions root=UUID={ROOT_UUID}\n"),
        );
        verify(&lab.context()).unwrap();
        lab.file("/boot/efi/EFI/systemd/systemd-bootx64.efi", "");
        assert!(problem(&lab).contains("EFI/systemd/systemd-bootx64.efi is no UEFI program"));
    }

    #[test]
    fn rhel_with_secure_boot_passes_and_a_missing_shim_is_found() {
        if Path::new(EFIVARS).is_dir() {
            eprintln!("SKIPPED: this machine's own boot entries would be read");
            return;
        }
        let mut lab = good();
        lab.distribution("rocky", "rhel centos fedora");
        std::fs::remove_file(lab.target.join("boot/grub/grub.cfg")).unwrap();
        lab.file("/boot/grub2/grub.cfg", &format!("search --fs-uuid --set=root {ROOT_UUID}\nblscfg\n"))
            .file(
                "/boot/loader/entries/a.conf",
                &format!("linux /boot/k\ninitrd /boot/i $tuned_initrd\noptions root=UUID={ROOT_UUID} ro\n"),
            )
            .file("/boot/efi/EFI/rocky/shimx64.efi", "MZ")
            .file(
                "/boot/efi/EFI/rocky/grub.cfg",
                &format!("search --fs-uuid --set=dev {ROOT_UUID}\nconfigfile x\n"),
            );
        verify(&lab.context()).unwrap();
        lab.file("/boot/efi/EFI/rocky/shimx64.efi", "torn");
        assert!(problem(&lab).contains("EFI/rocky/shimx64.efi is no UEFI program"));
        lab.file("/boot/efi/EFI/rocky/shimx64.efi", "MZ");
        std::fs::remove_file(lab.target.join("boot/loader/entries/a.conf")).unwrap();
        assert!(problem(&lab).contains("/boot/grub2/grub.cfg boots no kernel"));
    }

    #[test]
    fn two_volumes_of_one_uuid_do_not_resolve() {
        let mut lab = good();
        let mut twin = lab.volumes[2].clone();
        twin.device = "/dev/nvme0n1p9".into();
        lab.volumes.push(twin);
        assert!(problem(&lab).contains("/etc/fstab names UUID="));
    }

    #[test]
    fn a_disk_without_grub_is_found_out() {
        let lab = good();
        let disk = lab.target.join("disk");
        let core: Vec<u8> = (0..4096u32).map(|i| u8::try_from(i * 7 % 251).unwrap()).collect();
        let mut image = vec![0; 64 << 10];
        let check = |image: &[u8]| {
            std::fs::write(&disk, image).unwrap();
            check_bios_disk(&disk, CORES[0], &core).unwrap()
        };
        assert!(check(&image).unwrap().contains("no boot signature"));
        image[510..512].copy_from_slice(&[0x55, 0xaa]);
        assert!(check(&image).unwrap().contains("not GRUB's"));
        image[0x180..0x185].copy_from_slice(b"GRUB ");
        assert!(check(&image).unwrap().contains("leads nowhere"));
        image[0x5c] = 1;
        assert!(check(&image).unwrap().contains("are not"));
        image[512..512 + core.len()].copy_from_slice(&core);
        assert_eq!(check(&image), None);
        image[0x5c..0x64].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(check(&image).unwrap().contains("leads nowhere"));
        image[0x5c..0x64].copy_from_slice(&1_000_000u64.to_le_bytes());
        assert!(check(&image).unwrap().contains("cannot be read"));
    }
}
