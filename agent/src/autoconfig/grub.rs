//! GRUB, put on the disk by the clone's own `grub-install` (or `grub2-install`), for BIOS or UEFI as the node booted. For
//! UEFI it goes to its own directory with a boot entry in the firmware, and to the path that every firmware tries. The
//! menu is made anew only when it names what this node does not have, for that is slow.

use super::programs::Programs;
use super::{Change, Context, entries, grub_cfg, nvram, root::Root};
use anyhow::{Context as _, Result, bail};
use ka_layout::model::Fs;
use ka_layout::order::{Firmware, Volume};
use std::path::{Path, PathBuf};
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(900);
/// Where the firmware's variables are, in the clone as here.
pub const EFIVARS: &str = "/sys/firmware/efi/efivars";

/// Where distributions mount the EFI system partition.
pub const ESPS: [&str; 3] = ["/boot/efi", "/efi", "/boot"];

/// What UEFI calls an architecture.
pub struct EfiArch {
    /// GRUB's name of the platform.
    pub platform: &'static str,
    /// The file that firmware boots when no entry says otherwise.
    pub removable: &'static str,
    /// What file names of loaders end with, before `.efi`.
    pub short: &'static str,
}

/// UEFI's names for `uname -m`.
///
/// # Errors
/// For machines that GRUB's UEFI port is not known for.
pub fn efi_arch(machine: &str) -> Result<EfiArch> {
    match machine {
        "" | "x86_64" => {
            Ok(EfiArch { platform: "x86_64-efi", removable: "EFI/BOOT/BOOTX64.EFI", short: "x64" })
        }
        "aarch64" => Ok(EfiArch { platform: "arm64-efi", removable: "EFI/BOOT/BOOTAA64.EFI", short: "aa64" }),
        other => bail!("choosing the boot loader: UEFI on {other} is not supported"),
    }
}

/// The clone's EFI system partition and where it is mounted.
pub fn esp<'a>(context: &'a Context) -> Result<(&'a Volume, &'a str)> {
    let mounted = context.volumes.iter().filter_map(|v| Some((v, v.mount.as_ref()?.path.as_str())));
    let mut esps =
        mounted.filter(|(v, path)| v.fs == Some(Fs::Vfat) && (v.kind == "esp" || ESPS.contains(path)));
    esps.next().context(
        "finding the EFI system partition: this node boots by UEFI and the layout mounts no vfat partition of type esp",
    )
}

/// The name of the clone's directory on the ESP and of its boot entry: the distribution's id.
pub fn bootloader_id(context: &Context) -> String {
    let id = context.order.golden.os_release.get("ID").map_or("debian", String::as_str);
    let safe = !id.is_empty() && id.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
    if safe && !id.starts_with('.') { id.to_owned() } else { "linux".to_owned() }
}

/// The clone's program `grub-WHAT`, which some distributions call `grub2-WHAT`.
pub fn program(context: &Context, what: &str) -> Option<&'static str> {
    let names: [&'static str; 2] = match what {
        "install" => ["grub-install", "grub2-install"],
        _ => ["grub-mkconfig", "grub2-mkconfig"],
    };
    let places = ["/usr/sbin", "/usr/bin", "/sbin"];
    names.into_iter().find(|name| places.iter().any(|dir| context.root.exists(format!("{dir}/{name}"))))
}

fn installer(context: &Context) -> Result<&'static str> {
    let package = match context.firmware {
        Firmware::Bios => "grub-pc (or grub2-pc)",
        Firmware::Uefi => "grub-efi-amd64 (or the signed loader, on the ESP)",
    };
    program(context, "install").with_context(|| {
        format!(
            "installing the boot loader: the clone has no grub-install; install {package} on the golden node, or skip \
             the piece bootloader and install another one by a hook"
        )
    })
}

/// Makes the menu anew where it cannot serve this node.
///
/// # Errors
/// When it cannot be made, or is of no use even then.
pub fn make_menu(context: &Context) -> Result<Vec<Change>> {
    let Some(reason) = menu_is_stale(context)? else { return Ok(Vec::new()) };
    let path = grub_cfg::path(context)?;
    let mkconfig = program(context, "mkconfig")
        .with_context(|| format!("making {path} ({reason}): the clone has no grub-mkconfig"))?;
    let links = DevLinks::for_programs(context)?;
    context.run(mkconfig, &["-o", &path], LIMIT).with_context(|| format!("making {path} ({reason})"))?;
    drop(links);
    if !context.is_dry()
        && let Some(reason) = menu_is_stale(context)?
    {
        bail!("making {path}: it is still of no use: {reason}");
    }
    Ok(vec![Change::new("bootloader", path, format!("made anew: {reason}"))])
}

/// Why the menu cannot serve this node; none when it can.
fn menu_is_stale(context: &Context) -> Result<Option<String>> {
    let Some(text) = context.root.read_text(grub_cfg::path(context)?)? else {
        return Ok(Some("there was none".into()));
    };
    let found = grub_cfg::parse(&text);
    // With entries in files of their own it names no kernel itself, and the files are what counts.
    let has_entries = found.blscfg && !entries::bls_files(context)?.is_empty();
    if found.kernels.is_empty() && !has_entries {
        return Ok(Some("it boots no kernel".into()));
    }
    let lost = grub_cfg::unresolved(context, &found);
    if let Some(line) = lost.first() {
        return Ok(Some(format!("it names what is not on this node: {line}")));
    }
    let missing = grub_cfg::missing(context, &found).into_iter().next();
    Ok(missing.map(|path| format!("GRUB would not find {path} on this node")))
}

/// Puts it on the disk that holds `/boot`.
///
/// # Errors
/// Says which package is missing on the golden node, or what `grub-install` said.
pub fn install_bios(context: &Context) -> Result<Vec<Change>> {
    let program = installer(context)?;
    if !context.root.is_dir("/usr/lib/grub/i386-pc") {
        bail!(
            "installing GRUB for BIOS: the clone has no /usr/lib/grub/i386-pc; install grub-pc-bin (or grub2-pc) on the \
             golden node"
        );
    }
    let links = DevLinks::for_programs(context)?;
    let mut changes = Vec::new();
    // Every disk of an array: the machine boots from whichever is left.
    for disk in context.boot_disks()? {
        context
            .run(program, &["--target=i386-pc", disk], LIMIT)
            .with_context(|| format!("installing GRUB for BIOS on {disk}"))?;
        changes.push(Change::new("bootloader", disk, "GRUB for BIOS installed"));
    }
    drop(links);
    Ok(changes)
}

/// Puts it on the ESP, under the distribution's name and at the removable path, and sees to the boot entry.
///
/// # Errors
/// Says which package is missing on the golden node, or what `grub-install` said.
pub fn install_uefi(context: &Context) -> Result<Vec<Change>> {
    let program = installer(context)?;
    let arch = efi_arch(&context.order.golden.arch)?;
    let modules = format!("/usr/lib/grub/{}", arch.platform);
    if !context.root.is_dir(&modules) {
        bail!(
            "installing GRUB for UEFI: the clone has no {modules}; install grub-efi-amd64-bin (or grub2-efi) on the \
             golden node"
        );
    }
    let (esp, mount) = esp(context)?;
    let id = bootloader_id(context);
    let (target, directory) = (format!("--target={}", arch.platform), format!("--efi-directory={mount}"));
    let own = format!("--bootloader-id={id}");
    let nvram = nvram::in_reach(context)?;
    let mut words = vec![target.as_str(), &directory, "--recheck", &own];
    if !nvram {
        words.push("--no-nvram");
    }
    let links = DevLinks::for_programs(context)?;
    let on = |what: &str| format!("installing GRUB for UEFI {what} on {} ({mount})", esp.device);
    context.run(program, &words, LIMIT).with_context(|| on("with its own name"))?;
    let mut changes = vec![Change::new("bootloader", format!("{mount}/EFI/{id}"), "GRUB for UEFI installed")];
    let words = [target.as_str(), &directory, "--recheck", &own, "--removable"];
    context.run(program, &words, LIMIT).with_context(|| on("at the removable path"))?;
    changes.push(Change::new("bootloader", format!("{mount}/{}", arch.removable), "GRUB for UEFI installed"));
    drop(links);
    if !nvram {
        let what = format!(
            "no boot entry was made: {EFIVARS} is out of reach; the firmware must boot {}",
            arch.removable
        );
        changes.push(Change::warning("bootloader", "NVRAM", what));
    } else if !context.is_dry() {
        changes.extend(nvram::arrange(context, &id, None, esp)?);
    }
    Ok(changes)
}

/// The links under `/dev/disk` by which GRUB finds UUIDs. The initramfs has no udev to make them, and without them GRUB
/// writes `root=/dev/nvme0n1p2`. Those that were made go when this is dropped.
struct DevLinks(Vec<PathBuf>);

impl DevLinks {
    /// Those that GRUB's programs need, when they are really run.
    fn for_programs(context: &Context) -> Result<Option<Self>> {
        let real = matches!(context.programs, Programs::Inside);
        real.then(|| Self::make(Path::new("/dev"), context.volumes)).transpose()
    }

    fn make(dev: &Path, volumes: &[Volume]) -> Result<Self> {
        let mut links = Self(Vec::new());
        for volume in volumes {
            let names = [("by-uuid", &volume.uuid), ("by-partuuid", &volume.partuuid)];
            for (dir, name) in names {
                let Some(name) = name.as_ref().filter(|n| !n.contains('/')) else { continue };
                let dir = dev.join("disk").join(dir);
                let making = || format!("making {}/{name}", dir.display());
                std::fs::create_dir_all(&dir).with_context(making)?;
                let target = Path::new("../..").join(volume.device.trim_start_matches("/dev/"));
                match std::os::unix::fs::symlink(target, dir.join(name)) {
                    Ok(()) => links.0.push(dir.join(name)),
                    Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {}
                    Err(e) => return Err(e).with_context(making),
                }
            }
        }
        Ok(links)
    }
}

impl Drop for DevLinks {
    fn drop(&mut self) {
        for link in &self.0 {
            if let Err(e) = std::fs::remove_file(link) {
                log::warn!("removing {}: {e}", link.display());
            }
        }
    }
}

/// A path on a vfat file system, found as firmware does, without regard to case.
pub fn on_esp(root: &Root, mount: &str, path: &str) -> Option<PathBuf> {
    let mut place = PathBuf::from(mount);
    for part in path.split(['\\', '/']).filter(|p| !p.is_empty()) {
        let names = root.list(&place).ok()?;
        let name = names.into_iter().find(|n| n.to_str().is_some_and(|n| n.eq_ignore_ascii_case(part)))?;
        place.push(name);
    }
    Some(place)
}

/// Where a file is to be put on the ESP: in the directories that are there already, however they are written; those that
/// are not are made.
///
/// # Errors
/// When a directory cannot be made.
pub fn esp_path(context: &Context, mount: &str, path: &str) -> Result<PathBuf> {
    let mut place = PathBuf::from(mount);
    for part in path.split('/') {
        let there = on_esp(&context.root, &place.to_string_lossy(), part);
        place = there.unwrap_or_else(|| place.join(part));
    }
    if let Some(dir) = place.parent() {
        context.root.make_dir(dir)?;
    }
    Ok(place)
}

#[cfg(test)]
mod tests {
    use super::super::testing::{ESP_UUID, Lab, ROOT_UUID};
    use super::*;

    #[test]
    fn what_is_missing_is_named_by_package() {
        let mut lab = Lab::new();
        lab.firmware = Firmware::Bios;
        let error = install_bios(&lab.context()).unwrap_err().to_string();
        assert!(error.contains("install grub-pc (or grub2-pc) on the golden node"), "{error}");
        lab.file("/usr/sbin/grub-install", "");
        assert!(install_bios(&lab.context()).unwrap_err().to_string().contains("grub-pc-bin"));
        assert!(install_uefi(&lab.context()).unwrap_err().to_string().contains("grub-efi-amd64-bin"));
        lab.volumes.retain(|v| v.kind != "esp");
        lab.file("/usr/lib/grub/x86_64-efi/x", "");
        assert!(install_uefi(&lab.context()).unwrap_err().to_string().contains("EFI system partition"));
    }

    #[test]
    fn the_menu_is_made_anew_only_when_it_must() {
        let lab = Lab::new();
        let stale = || menu_is_stale(&lab.context()).unwrap();
        assert_eq!(stale().unwrap(), "there was none");
        let cfg = format!(
            "search --no-floppy --fs-uuid --set=root {ROOT_UUID}\nlinux /boot/k root=UUID={ROOT_UUID}\ninitrd /boot/i\n"
        );
        lab.file("/boot/grub/grub.cfg", &cfg);
        assert_eq!(stale().unwrap(), "GRUB would not find /boot/k on this node");
        lab.file("/boot/k", "k").file("/boot/i", "i");
        assert_eq!(stale(), None);
        lab.file("/boot/grub/grub.cfg", &cfg.replace("root=UUID=", "root=UUID=dead"));
        assert!(stale().unwrap().contains("not on this node"));
        lab.file("/boot/grub/grub.cfg", "# nothing\n");
        assert_eq!(stale().unwrap(), "it boots no kernel");
    }

    #[test]
    fn red_hats_names_are_used_and_its_entries_count() {
        let mut lab = Lab::new();
        lab.firmware = Firmware::Bios;
        lab.distribution("rocky", "rhel centos fedora");
        lab.file("/usr/sbin/grub2-install", "")
            .file("/usr/sbin/grub2-mkconfig", "")
            .file("/usr/lib/grub/i386-pc/x", "");
        lab.file("/boot/grub2/grub.cfg", "search --no-floppy --fs-uuid --set=root dead\nblscfg\n");
        let target = lab.target.clone();
        let context = lab.pretending(move |line| {
            if line.starts_with("grub2-mkconfig") {
                let text = format!("search --no-floppy --fs-uuid --set=root {ROOT_UUID}\nsearch --fs-uuid --set=boot {ESP_UUID}\nblscfg\n");
                std::fs::write(target.join("boot/grub2/grub.cfg"), text)?;
            }
            Ok(String::new())
        });
        install_bios(&context).unwrap();
        assert_eq!(menu_is_stale(&context).unwrap().unwrap(), "it boots no kernel");
        lab.file("/boot/loader/entries/x.conf", "linux /boot/k\n");
        make_menu(&context).unwrap();
        assert_eq!(
            context.ran(),
            ["grub2-install --target=i386-pc /dev/nvme0n1", "grub2-mkconfig -o /boot/grub2/grub.cfg"]
        );
        assert!(make_menu(&context).unwrap().is_empty());
    }

    #[test]
    fn every_disk_of_an_array_boots() {
        let mut lab = Lab::new();
        lab.firmware = Firmware::Bios;
        lab.file("/usr/sbin/grub-install", "").file("/usr/lib/grub/i386-pc/x", "");
        lab.volumes[2].more_disks = vec!["/dev/sdb".into()];
        let context = lab.pretending(|_| Ok(String::new()));
        assert_eq!(install_bios(&context).unwrap().len(), 2);
        assert_eq!(
            context.ran(),
            ["grub-install --target=i386-pc /dev/nvme0n1", "grub-install --target=i386-pc /dev/sdb"]
        );
    }

    #[test]
    fn links_are_made_and_go() {
        let lab = Lab::new();
        let dev = lab.target.join("dev");
        let links = DevLinks::make(&dev, &lab.volumes).unwrap();
        let link = dev.join("disk/by-uuid").join(ROOT_UUID);
        assert_eq!(std::fs::read_link(&link).unwrap(), Path::new("../../nvme0n1p3"));
        drop(links);
        assert!(!link.is_symlink());
    }

    #[test]
    fn the_esp_is_searched_without_regard_to_case() {
        let lab = Lab::new();
        lab.file("/boot/efi/efi/Debian/grubx64.efi", "MZ");
        let context = lab.context();
        let found = on_esp(&context.root, "/boot/efi", "\\EFI\\debian\\GRUBX64.EFI");
        assert_eq!(found.unwrap(), Path::new("/boot/efi/efi/Debian/grubx64.efi"));
        assert_eq!(on_esp(&context.root, "/boot/efi", "\\EFI\\x"), None);
    }
}
