//! The boot loader: GRUB, put on the disk by the clone's own `grub-install`, for BIOS or UEFI as the node booted. For
//! UEFI it goes to its own directory with a boot entry in the firmware, and to the path that every firmware tries. The
//! menu is made anew only when it names what this node does not have, for that is slow.

use super::efi::{self, BootEntries};
use super::{Change, Context, Piece, grub_cfg, root::Root};
use anyhow::{Context as _, Result, anyhow, bail};
use ka_layout::model::Fs;
use ka_layout::order::{Firmware, Volume};
use ka_sys::process::run_in;
use std::path::{Path, PathBuf};
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(900);
/// Where the firmware's variables are, in the clone as here.
pub const EFIVARS: &str = "/sys/firmware/efi/efivars";

/// The piece.
pub struct Grub;

/// What UEFI calls an architecture.
pub struct EfiArch {
    /// GRUB's name of the platform.
    pub platform: &'static str,
    /// The file that firmware boots when no entry says otherwise.
    pub removable: &'static str,
}

/// UEFI's names for `uname -m`.
///
/// # Errors
/// For machines that GRUB's UEFI port is not known for.
pub fn efi_arch(machine: &str) -> Result<EfiArch> {
    match machine {
        "" | "x86_64" => Ok(EfiArch { platform: "x86_64-efi", removable: "EFI/BOOT/BOOTX64.EFI" }),
        "aarch64" => Ok(EfiArch { platform: "arm64-efi", removable: "EFI/BOOT/BOOTAA64.EFI" }),
        other => bail!("choosing the boot loader: UEFI on {other} is not supported"),
    }
}

/// The clone's EFI system partition and where it is mounted.
pub fn esp<'a>(context: &'a Context) -> Result<(&'a Volume, &'a str)> {
    let mounted = context.volumes.iter().filter_map(|v| Some((v, v.mount.as_ref()?.path.as_str())));
    let mut esps = mounted.filter(|(v, path)| {
        v.fs == Some(Fs::Vfat) && (v.kind == "esp" || ["/boot/efi", "/efi", "/boot"].contains(path))
    });
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

impl Piece for Grub {
    fn name(&self) -> &'static str {
        "bootloader"
    }

    fn apply(&self, context: &Context) -> Result<Vec<Change>> {
        let root = &context.root;
        if !root.exists("/usr/sbin/grub-install") {
            let package = match context.firmware {
                Firmware::Bios => "grub-pc",
                Firmware::Uefi => "grub-efi-amd64",
            };
            bail!(
                "installing the boot loader: the clone has no grub-install; install {package} on the golden node, or skip \
                 the piece bootloader and install another one by a hook"
            );
        }
        let links = DevLinks::make(Path::new("/dev"), context.volumes)?;
        let mut changes = match context.firmware {
            Firmware::Bios => install_bios(context)?,
            Firmware::Uefi => install_uefi(context)?,
        };
        if let Some(reason) = menu_is_stale(context)? {
            run_in(context.target, "grub-mkconfig", &["-o", grub_cfg::PATH], LIMIT)
                .with_context(|| format!("making {} ({reason})", grub_cfg::PATH))?;
            changes.push(Change::new("bootloader", grub_cfg::PATH, format!("made anew: {reason}")));
            if let Some(reason) = menu_is_stale(context)? {
                bail!("making {}: it is still of no use: {reason}", grub_cfg::PATH);
            }
        }
        drop(links);
        Ok(changes)
    }
}

/// Why `grub.cfg` cannot serve this node; none when it can.
fn menu_is_stale(context: &Context) -> Result<Option<String>> {
    let Some(text) = context.root.read_text(grub_cfg::PATH)? else {
        return Ok(Some("there was none".into()));
    };
    let found = grub_cfg::parse(&text);
    if found.kernels.is_empty() {
        return Ok(Some("it boots no kernel".into()));
    }
    if let Some(kernel) = grub_cfg::outside_subvolume(context, &found) {
        return Ok(Some(format!("{kernel} is not how GRUB finds it in this node's subvolume")));
    }
    let lost = grub_cfg::unresolved(context, &found);
    if let Some(line) = lost.first() {
        return Ok(Some(format!("it names what is not on this node: {line}")));
    }
    let files = found.kernels.iter().chain(&found.initrds);
    let missing = files.into_iter().find(|path| grub_cfg::in_clone(&context.root, path).is_none());
    Ok(missing.map(|path| format!("{path} does not exist")))
}

fn install_bios(context: &Context) -> Result<Vec<Change>> {
    if !context.root.is_dir("/usr/lib/grub/i386-pc") {
        bail!(
            "installing GRUB for BIOS: the clone has no /usr/lib/grub/i386-pc; install grub-pc-bin on the golden node"
        );
    }
    let boot = context.boot_volume()?;
    let mut changes = Vec::new();
    // Every disk of an array: the machine boots from whichever is left.
    for disk in std::iter::once(&boot.disk).chain(&boot.more_disks) {
        run_in(context.target, "grub-install", &["--target=i386-pc", disk], LIMIT)
            .with_context(|| format!("installing GRUB for BIOS on {disk}"))?;
        changes.push(Change::new("bootloader", disk, "GRUB for BIOS installed"));
    }
    Ok(changes)
}

fn install_uefi(context: &Context) -> Result<Vec<Change>> {
    let arch = efi_arch(&context.order.golden.arch)?;
    let modules = format!("/usr/lib/grub/{}", arch.platform);
    if !context.root.is_dir(&modules) {
        bail!(
            "installing GRUB for UEFI: the clone has no {modules}; install grub-efi-amd64-bin on the golden node"
        );
    }
    let (esp, mount) = esp(context)?;
    let id = bootloader_id(context);
    let common =
        [format!("--target={}", arch.platform), format!("--efi-directory={mount}"), "--recheck".into()];
    let own = [format!("--bootloader-id={id}")];
    let nvram = !context.root.list(EFIVARS)?.is_empty();
    let no_nvram: &[String] = if nvram { &[] } else { &["--no-nvram".to_owned()] };
    let arguments = [&common[..], &own, no_nvram].concat();
    let on = |what: &str| format!("installing GRUB for UEFI {what} on {} ({mount})", esp.device);
    run_in(context.target, "grub-install", &arguments, LIMIT).with_context(|| on("with its own name"))?;
    let mut changes = vec![Change::new("bootloader", format!("{mount}/EFI/{id}"), "GRUB for UEFI installed")];
    let arguments = [&common[..], &own, &["--removable".to_owned()]].concat();
    run_in(context.target, "grub-install", &arguments, LIMIT).with_context(|| on("at the removable path"))?;
    changes.push(Change::new("bootloader", format!("{mount}/{}", arch.removable), "GRUB for UEFI installed"));
    if nvram {
        changes.extend(order_entries(context, &id, esp)?);
    } else {
        changes.push(Change::warning(
            "bootloader",
            "NVRAM",
            format!(
                "no boot entry was made: {EFIVARS} is out of reach; the firmware must boot {}",
                arch.removable
            ),
        ));
    }
    Ok(changes)
}

/// The firmware's boot entries, read by the clone's `efibootmgr`; none when it has none.
pub fn boot_entries(context: &Context) -> Result<Option<BootEntries>> {
    if !["/usr/bin/efibootmgr", "/usr/sbin/efibootmgr", "/bin/efibootmgr"]
        .iter()
        .any(|p| context.root.exists(p))
    {
        return Ok(None);
    }
    let output = run_in(context.target, "efibootmgr", &["-v"], LIMIT)
        .context("reading the firmware's boot entries")?;
    Ok(Some(efi::parse(&output.text())))
}

/// Removes older entries of the same name and sets the order that policy wants.
fn order_entries(context: &Context, id: &str, esp: &Volume) -> Result<Vec<Change>> {
    let Some(found) = boot_entries(context)? else {
        let what =
            "the clone has no efibootmgr: old boot entries and the boot order are as grub-install left them";
        return Ok(vec![Change::warning("bootloader", "NVRAM", what)]);
    };
    let policy = context.order.policy.efi_boot;
    let (own, plan) = efi::plan(&found, id, esp.partuuid.as_deref(), policy).ok_or_else(|| {
        anyhow!("checking the boot entry: grub-install made none called {id} for {}", esp.device)
    })?;
    let mut changes =
        vec![Change::new("bootloader", "NVRAM", format!("entry {own} ({id}) boots {}", esp.device))];
    for number in &plan.delete {
        run_in(context.target, "efibootmgr", &["-q", "-b", number, "-B"], LIMIT)
            .with_context(|| format!("deleting the old boot entry {number}"))?;
        changes.push(Change::new("bootloader", "NVRAM", format!("older entry {number} ({id}) deleted")));
    }
    if let Some(order) = &plan.order {
        let order = order.join(",");
        run_in(context.target, "efibootmgr", &["-q", "-o", &order], LIMIT)
            .with_context(|| format!("setting the boot order to {order}"))?;
        changes.push(Change::new("bootloader", "NVRAM", format!("boot order {order}")));
    }
    if let Some(problem) = plan.problem {
        changes.push(Change::warning(
            "bootloader",
            "NVRAM",
            format!("the network is not put first: {problem}"),
        ));
    }
    Ok(changes)
}

/// The links under `/dev/disk` by which GRUB finds UUIDs. The initramfs has no udev to make them, and without them GRUB
/// writes `root=/dev/nvme0n1p2`. Those that were made go when this is dropped.
struct DevLinks(Vec<PathBuf>);

impl DevLinks {
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

#[cfg(test)]
mod tests {
    use super::super::testing::{Lab, ROOT_UUID};
    use super::*;

    #[test]
    fn what_is_missing_is_named_by_package() {
        let mut lab = Lab::new();
        lab.firmware = Firmware::Bios;
        let error = Grub.apply(&lab.context()).unwrap_err().to_string();
        assert!(error.contains("install grub-pc on the golden node"), "{error}");
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
        lab.file(grub_cfg::PATH, &cfg);
        assert_eq!(stale().unwrap(), "/boot/k does not exist");
        lab.file("/boot/k", "k").file("/boot/i", "i");
        assert_eq!(stale(), None);
        lab.file(grub_cfg::PATH, &cfg.replace("root=UUID=", "root=UUID=dead"));
        assert!(stale().unwrap().contains("not on this node"));
        lab.file(grub_cfg::PATH, "# nothing\n");
        assert_eq!(stale().unwrap(), "it boots no kernel");
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
