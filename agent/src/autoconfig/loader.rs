//! The piece `bootloader`: which boot loader the clone has, and what puts it where the firmware looks. Files that came with
//! the golden tree's ESP are kept where only the distribution can make them (Secure Boot); else the clone's own tools
//! install the loader anew. Whatever it is, UEFI gets a boot entry and something at the path that every firmware tries.

use super::esp_files;
use super::grub::{self, EfiArch};
use super::{Change, Context, Piece, extlinux, nvram, systemd_boot};
use anyhow::{Context as _, Result};
use ka_layout::order::Firmware;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(900);
/// SUSE's installer for its signed loader.
const SHIM_INSTALL: &[&str] = &["/usr/sbin/shim-install", "/usr/bin/shim-install"];
/// SUSE's signed shim, which that installer takes.
const SUSE_SHIM: &[&str] = &["/usr/share/efi/x86_64/shim.efi", "/usr/lib64/efi/shim.efi"];

/// The piece.
pub struct BootLoader;

/// The boot loader of a clone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Loader {
    /// GRUB, put on the disk by `grub-install` for BIOS.
    GrubBios,
    /// extlinux, whose menu is in this directory, put on the disk by `extlinux`.
    Extlinux(String),
    /// A menu of extlinux that something else reads (U-Boot, a hypervisor).
    MenuOnly,
    /// The distribution's own signed loader, as it came with the ESP.
    Copied(esp_files::Loader),
    /// systemd-boot.
    SystemdBoot,
    /// SUSE's signed loader, which is not on the ESP yet.
    ShimInstall,
    /// GRUB, put on the ESP by `grub-install`.
    GrubEfi,
}

/// Finds out which boot loader the clone has.
///
/// # Errors
/// When UEFI is not supported on this architecture, there is no ESP, or several distributions have a loader on it.
pub fn detect(context: &Context) -> Result<Loader> {
    if context.firmware == Firmware::Bios {
        let grub = grub::program(context, "install").is_some();
        let has_menu =
            context.root.exists("/boot/grub/grub.cfg") || context.root.exists("/boot/grub2/grub.cfg");
        return Ok(match extlinux::dir(context) {
            Some(dir) if !(grub && has_menu) && extlinux::is_installable(context) => Loader::Extlinux(dir),
            Some(_) if !grub => Loader::MenuOnly,
            _ => Loader::GrubBios,
        });
    }
    // A board whose firmware reads extlinux's menu may have no ESP at all.
    if grub::esp(context).is_err() && extlinux::dir(context).is_some() {
        return Ok(Loader::MenuOnly);
    }
    let arch = grub::efi_arch(&context.order.golden.arch)?;
    if systemd_boot::is_used(context, &arch)? {
        return Ok(Loader::SystemdBoot);
    }
    if let Some(loader) = esp_files::signed(context, &arch)? {
        return Ok(Loader::Copied(loader));
    }
    let suse = context.first_of(SHIM_INSTALL).is_some() && context.first_of(SUSE_SHIM).is_some();
    Ok(if suse { Loader::ShimInstall } else { Loader::GrubEfi })
}

impl Loader {
    /// Whether GRUB's menu is what the machine boots by.
    pub const fn has_grub_menu(&self) -> bool {
        matches!(self, Self::GrubBios | Self::GrubEfi | Self::Copied(_) | Self::ShimInstall)
    }

    /// The label of its boot entry, and the file that it boots where that is known beforehand.
    pub fn entry(&self, context: &Context, arch: &EfiArch) -> Option<(String, Option<String>)> {
        match self {
            Self::GrubBios | Self::Extlinux(_) | Self::MenuOnly => None,
            Self::Copied(loader) => Some((loader.label.clone(), Some(loader.file.clone()))),
            Self::SystemdBoot => Some((systemd_boot::LABEL.to_owned(), Some(systemd_boot::file(arch)))),
            Self::ShimInstall | Self::GrubEfi => Some((grub::bootloader_id(context), None)),
        }
    }
}

impl Piece for BootLoader {
    fn name(&self) -> &'static str {
        "bootloader"
    }

    fn apply(&self, context: &Context) -> Result<Vec<Change>> {
        let loader = detect(context)?;
        log::info!("the clone's boot loader: {loader:?}");
        let mut changes = match &loader {
            Loader::GrubBios => grub::install_bios(context)?,
            Loader::Extlinux(dir) => extlinux::install(context, dir)?,
            Loader::MenuOnly => {
                let what = "nothing was installed: the clone has a menu for extlinux and no program that installs it";
                vec![Change::warning("bootloader", "/boot", what)]
            }
            Loader::Copied(_) | Loader::SystemdBoot | Loader::ShimInstall => uefi(context, &loader)?,
            Loader::GrubEfi => grub::install_uefi(context)?,
        };
        if loader.has_grub_menu() {
            changes.extend(grub::make_menu(context)?);
        }
        Ok(changes)
    }
}

fn uefi(context: &Context, loader: &Loader) -> Result<Vec<Change>> {
    let arch = grub::efi_arch(&context.order.golden.arch)?;
    let mut changes = match loader {
        Loader::Copied(files) => {
            let what = "kept as it came, for Secure Boot";
            let mut changes = esp_files::fill_removable(context, &arch, files)?;
            let mount = grub::esp(context)?.1;
            changes.insert(0, Change::new("bootloader", format!("{mount}/{}", files.file), what));
            changes
        }
        Loader::SystemdBoot => systemd_boot::install(context, &arch)?,
        _ => shim_install(context)?,
    };
    let (esp, _) = grub::esp(context)?;
    // What was installed just now lies there as it would have been copied.
    let now = if *loader == Loader::ShimInstall {
        esp_files::signed(context, &arch)?.map(Loader::Copied)
    } else {
        None
    };
    let loader = now.as_ref().unwrap_or(loader);
    if let (Loader::Copied(files), Some(_)) = (loader, &now) {
        changes.extend(esp_files::fill_removable(context, &arch, files)?);
    }
    if let Some((label, Some(file))) = loader.entry(context, &arch) {
        changes.extend(nvram::ensure(context, &label, &file, esp, arch.removable)?);
    }
    Ok(changes)
}

/// SUSE: GRUB's own files first, then the signed loader, which `shim-install` puts beside them with its stub.
fn shim_install(context: &Context) -> Result<Vec<Change>> {
    let (esp, mount) = grub::esp(context)?;
    let on = || format!("installing the signed boot loader on {} ({mount})", esp.device);
    let efi = format!("--efi-directory={mount}");
    let words = [efi.as_str(), "--no-nvram", "--config-file=/boot/grub2/grub.cfg"];
    context.run("shim-install", &words, LIMIT).with_context(on)?;
    Ok(vec![Change::new("bootloader", format!("{mount}/EFI"), "installed by shim-install")])
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Lab, ROOT_UUID};
    use super::*;

    fn grub_menu(lab: &Lab, path: &str) {
        lab.file(
            path,
            &format!("search --fs-uuid --set=root {ROOT_UUID}\nlinux /boot/k root=UUID={ROOT_UUID}\ninitrd /boot/i\n"),
        );
        lab.file("/boot/k", "k").file("/boot/i", "i");
    }

    #[test]
    fn secure_boot_files_are_kept_on_every_distribution() {
        for (id, dir) in [
            ("rocky", "rocky"),
            ("rhel", "redhat"),
            ("fedora", "fedora"),
            ("debian", "debian"),
            ("ubuntu", "ubuntu"),
            ("opensuse-leap", "opensuse"),
        ] {
            let mut lab = Lab::new();
            lab.distribution(id, "");
            // grub-install would write unsigned files over these.
            lab.file("/usr/sbin/grub2-install", "")
                .file("/usr/sbin/grub-install", "")
                .file("/usr/sbin/efibootmgr", "");
            lab.file(&format!("/boot/efi/EFI/{dir}/shimx64.efi"), "MZ signed shim");
            lab.file(&format!("/boot/efi/EFI/{dir}/grubx64.efi"), "MZ signed grub");
            grub_menu(
                &lab,
                if id == "debian" || id == "ubuntu" { "/boot/grub/grub.cfg" } else { "/boot/grub2/grub.cfg" },
            );
            let context = lab.pretending(|line| anyhow::bail!("not to be run: {line}"));
            let changes = BootLoader.apply(&context).unwrap();
            assert!(
                changes[0].to_string().contains(&format!("{dir}/shimx64.efi: kept as it came")),
                "{changes:?}"
            );
            assert_eq!(lab.read(&format!("/boot/efi/EFI/{dir}/grubx64.efi")), "MZ signed grub");
            assert_eq!(lab.read("/boot/efi/EFI/BOOT/BOOTX64.EFI"), "MZ signed shim");
            assert_eq!(lab.read("/boot/efi/EFI/BOOT/grubx64.efi"), "MZ signed grub");
        }
    }

    #[test]
    fn suse_without_files_on_the_esp_gets_them_by_shim_install() {
        let mut lab = Lab::new();
        lab.distribution("sles", "suse");
        lab.file("/usr/sbin/shim-install", "")
            .file("/usr/share/efi/x86_64/shim.efi", "MZ")
            .file("/usr/sbin/grub2-install", "");
        grub_menu(&lab, "/boot/grub2/grub.cfg");
        let target = lab.target.clone();
        let context = lab.pretending(move |line| {
            if line.starts_with("shim-install ") {
                std::fs::create_dir_all(target.join("boot/efi/EFI/sles"))?;
                std::fs::write(target.join("boot/efi/EFI/sles/shim.efi"), "MZ shim")?;
                std::fs::write(target.join("boot/efi/EFI/sles/grub.efi"), "MZ grub")?;
            }
            Ok(String::new())
        });
        assert_eq!(detect(&context).unwrap(), Loader::ShimInstall);
        BootLoader.apply(&context).unwrap();
        assert_eq!(
            context.ran(),
            ["shim-install --efi-directory=/boot/efi --no-nvram --config-file=/boot/grub2/grub.cfg"]
        );
        assert_eq!(lab.read("/boot/efi/EFI/BOOT/BOOTX64.EFI"), "MZ shim");
        assert_eq!(lab.read("/boot/efi/EFI/BOOT/grub.efi"), "MZ grub");
    }

    #[test]
    fn each_loader_is_recognized() {
        let mut lab = Lab::new();
        assert_eq!(detect(&lab.context()).unwrap(), Loader::GrubEfi);
        lab.file("/boot/efi/EFI/systemd/systemd-bootx64.efi", "MZ");
        assert_eq!(detect(&lab.context()).unwrap(), Loader::SystemdBoot);
        lab.firmware = Firmware::Bios;
        assert_eq!(detect(&lab.context()).unwrap(), Loader::GrubBios);
        lab.file("/boot/extlinux/extlinux.conf", "");
        assert_eq!(detect(&lab.context()).unwrap(), Loader::MenuOnly);
        lab.file("/usr/bin/extlinux", "");
        assert_eq!(detect(&lab.context()).unwrap(), Loader::Extlinux("/boot/extlinux".into()));
        lab.file("/usr/sbin/grub-install", "").file("/boot/grub/grub.cfg", "");
        assert_eq!(detect(&lab.context()).unwrap(), Loader::GrubBios);
        lab.firmware = Firmware::Uefi;
        lab.volumes.retain(|v| v.kind != "esp");
        assert_eq!(detect(&lab.context()).unwrap(), Loader::MenuOnly);
    }

    #[test]
    fn a_menu_that_something_else_reads_is_left_to_it() {
        let mut lab = Lab::new();
        lab.firmware = Firmware::Bios;
        lab.file("/boot/extlinux/extlinux.conf", "");
        let changes = BootLoader.apply(&lab.context()).unwrap();
        assert!(changes.len() == 1 && changes[0].warning, "{changes:?}");
    }
}
