//! systemd-boot: it came with the golden tree's ESP and is kept as it is; where the ESP has none (a golden node that
//! booted by BIOS), the clone's own `bootctl` puts it there.

use super::grub::{self, EfiArch, on_esp};
use super::{Change, Context};
use anyhow::{Context as _, Result};
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(120);
/// What `bootctl` calls its entry.
pub const LABEL: &str = "Linux Boot Manager";

/// The file, from the ESP's root.
pub fn file(arch: &EfiArch) -> String {
    format!("EFI/systemd/systemd-boot{}.efi", arch.short)
}

/// Whether the clone boots by it: it lies on the ESP, or `bootctl` is there and GRUB is not, and GRUB has no menu.
///
/// # Errors
/// When the node has no ESP.
pub fn is_used(context: &Context, arch: &EfiArch) -> Result<bool> {
    let (_, mount) = grub::esp(context)?;
    let root = &context.root;
    let has_menu = root.exists("/boot/grub/grub.cfg") || root.exists("/boot/grub2/grub.cfg");
    let on_esp = on_esp(root, mount, &file(arch)).is_some();
    let could = root.exists("/usr/bin/bootctl") && grub::program(context, "install").is_none();
    Ok(!has_menu && (on_esp || could))
}

/// Sees to it that it lies on the ESP, under its own name and at the removable path.
///
/// # Errors
/// When it can neither be found nor installed.
pub fn install(context: &Context, arch: &EfiArch) -> Result<Vec<Change>> {
    let (esp, mount) = grub::esp(context)?;
    let root = &context.root;
    let Some(own) = on_esp(root, mount, &file(arch)) else {
        let path = format!("--esp-path={mount}");
        context
            .run("bootctl", &["install", "--no-variables", &path], LIMIT)
            .with_context(|| format!("installing systemd-boot on {} ({mount})", esp.device))?;
        return Ok(vec![Change::new(
            "bootloader",
            format!("{mount}/{}", file(arch)),
            "systemd-boot installed",
        )]);
    };
    let mut changes = Vec::new();
    if on_esp(root, mount, arch.removable).is_none() {
        let content = root.read(&own)?.context("reading systemd-boot on the ESP: it is gone")?;
        let to = grub::esp_path(context, mount, arch.removable)?;
        if root.write(&to, &content, 0o644)? {
            changes.push(Change::new(
                "bootloader",
                to.to_string_lossy(),
                format!("a copy of {}", own.display()),
            ));
        }
    }
    Ok(changes)
}

#[cfg(test)]
mod tests {
    use super::super::testing::Lab;
    use super::*;

    #[test]
    fn what_came_with_the_tree_is_kept_and_put_at_the_removable_path() {
        let lab = Lab::new();
        let arch = grub::efi_arch("x86_64").unwrap();
        assert!(!is_used(&lab.context(), &arch).unwrap());
        lab.file("/boot/efi/EFI/systemd/systemd-bootx64.efi", "MZ signed");
        let context = lab.pretending(|line| anyhow::bail!("not to be run: {line}"));
        assert!(is_used(&context, &arch).unwrap());
        assert_eq!(install(&context, &arch).unwrap().len(), 1);
        assert_eq!(lab.read("/boot/efi/EFI/BOOT/BOOTX64.EFI"), "MZ signed");
        assert!(install(&context, &arch).unwrap().is_empty());
        lab.file("/boot/grub/grub.cfg", "");
        assert!(!is_used(&context, &arch).unwrap(), "GRUB's menu is there");
    }

    #[test]
    fn bootctl_installs_it_where_the_esp_has_none() {
        let lab = Lab::new();
        lab.file("/usr/bin/bootctl", "");
        let arch = grub::efi_arch("x86_64").unwrap();
        let context = lab.pretending(|_| Ok(String::new()));
        assert!(is_used(&context, &arch).unwrap());
        install(&context, &arch).unwrap();
        assert_eq!(context.ran(), ["bootctl install --no-variables --esp-path=/boot/efi"]);
        lab.file("/usr/sbin/grub-install", "");
        assert!(!is_used(&context, &arch).unwrap());
    }
}
