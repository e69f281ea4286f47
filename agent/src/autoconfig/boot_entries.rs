//! Boot entries that are files of their own, and what else on the boot partitions names the golden node's devices or its
//! machine id: entries of the Boot Loader Specification, extlinux's menu, GRUB's environment block, the stubs on the ESP
//! by which a signed GRUB finds its menu. Names that carry the golden machine id get the clone's.

use super::grubenv;
use super::{Change, Context, Piece, entries, esp_files, grub_cfg, kernel_cmdline};
use anyhow::{Context as _, Result};
use std::path::Path;

const NAME: &str = "boot-entries";
/// What tells `kernel-install` how entries are to be named.
const TOKENS: &[&str] = &["/etc/kernel/entry-token", "/etc/kernel/install.conf", "/etc/machine-info"];

/// The piece.
pub struct BootEntries;

impl Piece for BootEntries {
    fn name(&self) -> &'static str {
        NAME
    }

    fn apply(&self, context: &Context) -> Result<Vec<Change>> {
        let mut changes = Vec::new();
        entries_of_bls(context, &mut changes)?;
        for file in entries::extlinux_files(context) {
            rewrite(context, &file, &mut changes)?;
        }
        environment_blocks(context, &mut changes)?;
        for stub in esp_files::stubs(context)? {
            let text = context.root.read_text(&stub)?.unwrap_or_default();
            // A whole menu is made anew by the boot loader step; a stub has no tool.
            if context.root.write_text(&stub, &grub_cfg::retarget(context, &text), 0o600)? {
                changes.push(Change::new(NAME, stub, "searches for this node's file system"));
            }
        }
        rename_all(context, &mut changes)?;
        Ok(changes)
    }
}

/// `text` with the golden node's machine id replaced by the clone's.
fn with_new_id(context: &Context, text: &str) -> String {
    match &*context.machine_ids.borrow() {
        Some((old, new)) => text.replace(old, new),
        None => text.to_owned(),
    }
}

/// Rewrites devices and the machine id in a file of the clone.
fn rewrite(context: &Context, file: &str, changes: &mut Vec<Change>) -> Result<()> {
    let Some(old) = context.root.read_text(file)? else { return Ok(()) };
    let mut done = Vec::new();
    let new = kernel_cmdline::rewrite_text(context, &old, &mut done)?;
    let renamed = with_new_id(context, &new);
    if renamed != new {
        done.push("the clone's machine id".to_owned());
    }
    if context.root.write_text(file, &renamed, 0o644)? {
        changes.push(Change::new(NAME, file, done.join(", ")));
    }
    Ok(())
}

fn entries_of_bls(context: &Context, changes: &mut Vec<Change>) -> Result<()> {
    for (dir, file) in entries::bls_files(context)? {
        let name = file.to_string_lossy().into_owned();
        let mut text = context.root.read_text(&file)?.unwrap_or_default();
        if let Some(new) = entries::relocated(context, &dir, &text)
            && context.root.write_text(&file, &new, 0o644)?
        {
            changes.push(Change::new(
                NAME,
                name.clone(),
                "its files are named from where /boot is on this node",
            ));
            text = new;
        }
        let entry = entries::parse_bls(&text);
        let lost = entry.kernel.as_ref().filter(|kernel| entries::in_clone(context, &dir, kernel).is_none());
        if let Some(kernel) = lost {
            // An entry whose kernel was removed without it: the menu would offer what cannot boot.
            if context.root.remove(&file)? {
                changes.push(Change::new(NAME, name, format!("deleted: its kernel {kernel} does not exist")));
            }
            continue;
        }
        rewrite(context, &name, changes)?;
    }
    for dir in entries::boot_dirs(context) {
        rewrite(context, &format!("{dir}/loader/loader.conf"), changes)?;
    }
    for file in TOKENS {
        let Some(old) = context.root.read_text(file)? else { continue };
        if context.root.write_text(file, &with_new_id(context, &old), 0o644)? {
            changes.push(Change::new(NAME, *file, "the clone's machine id"));
        }
    }
    Ok(())
}

fn environment_blocks(context: &Context, changes: &mut Vec<Change>) -> Result<()> {
    let mut files = vec!["/boot/grub/grubenv".to_owned(), "/boot/grub2/grubenv".to_owned()];
    for stub in esp_files::stubs(context)? {
        files.push(Path::new(&stub).with_file_name("grubenv").to_string_lossy().into_owned());
    }
    for file in files {
        let Some(old) = context.root.read_text(&file)? else { continue };
        let mut done = Vec::new();
        let new = grubenv::rewrite(&old, |line| {
            let Some((key, value)) = line.split_once('=') else { return Ok(line.to_owned()) };
            let value = kernel_cmdline::rewrite(context, value, &mut done)?;
            Ok(with_new_id(context, &format!("{key}={value}")))
        })
        .with_context(|| format!("rewriting {file} of the clone"))?;
        if let Some(new) = new
            && context.root.write_text(&file, &new, 0o600)?
        {
            if done.is_empty() {
                done.push("the clone's machine id".to_owned());
            }
            changes.push(Change::new(NAME, file, done.join(", ")));
        }
    }
    Ok(())
}

/// Files and directories whose names carry the golden machine id: entries, rescue kernels, `kernel-install`'s directories
/// and unified kernel images.
fn rename_all(context: &Context, changes: &mut Vec<Change>) -> Result<()> {
    let Some((old, new)) = context.machine_ids.borrow().clone() else { return Ok(()) };
    for dir in entries::boot_dirs(context) {
        for place in [dir.clone(), format!("{dir}/loader/entries"), format!("{dir}/EFI/Linux")] {
            for name in context.root.list(&place)? {
                let Some(name) = name.to_str().filter(|n| n.contains(&old)) else { continue };
                let renamed = name.replace(&old, &new);
                if context.root.rename(Path::new(&place).join(name), &renamed)? {
                    changes.push(Change::new(NAME, format!("{place}/{name}"), format!("is now {renamed}")));
                }
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::machine_id::MachineId;
    use super::super::testing::{Lab, ROOT_UUID, SWAP_UUID};
    use super::*;

    const OLD: &str = "0123456789abcdef0123456789abcdef";
    const KERNEL: &str = "5.14.0-362.8.1.el9_3.x86_64";
    const NEW_ROOT: &str = "11111111-2222-4333-8444-555555555555";

    /// As Anaconda leaves Rocky Linux 9 with UEFI.
    fn rocky() -> Lab {
        let lab = Lab::new();
        lab.file("/etc/machine-id", &format!("{OLD}\n"))
            .file(&format!("/boot/vmlinuz-{KERNEL}"), "kernel")
            .file(&format!("/boot/initramfs-{KERNEL}.img"), "initramfs")
            .file(&format!("/boot/vmlinuz-0-rescue-{OLD}"), "kernel")
            .file(&format!("/boot/initramfs-0-rescue-{OLD}.img"), "initramfs");
        for (name, kernel) in
            [(KERNEL.to_owned(), KERNEL.to_owned()), ("0-rescue".to_owned(), format!("0-rescue-{OLD}"))]
        {
            lab.file(
                &format!("/boot/loader/entries/{OLD}-{name}.conf"),
                &format!(
                    "title Rocky Linux ({kernel}) 9.3 (Blue Onyx)\nversion {kernel}\nlinux /boot/vmlinuz-{kernel}\n\
                     initrd /boot/initramfs-{kernel}.img\noptions root=UUID={ROOT_UUID} ro crashkernel=1G-4G:192M \
                     resume=UUID={SWAP_UUID} rd.lvm.lv=rl/swap rhgb quiet $tuned_params\ngrub_users $grub_users\n\
                     grub_arg --unrestricted\ngrub_class rocky\n"
                ),
            );
        }
        let block = format!(
            "# GRUB Environment Block\n# WARNING: Do not edit this file by tools other than grub-editenv!!!\nsaved_entry={OLD}-{KERNEL}\nkernelopts=root=UUID={ROOT_UUID} ro resume=UUID={SWAP_UUID} \n"
        );
        lab.file("/boot/grub2/grubenv", &format!("{block}{}", "#".repeat(1024 - block.len())));
        lab.file(
            "/boot/efi/EFI/rocky/grub.cfg",
            &format!("search --no-floppy --fs-uuid --set=dev {ROOT_UUID}\nset prefix=($dev)/boot/grub2\nexport $prefix\nconfigfile $prefix/grub.cfg\n"),
        );
        lab
    }

    fn id(lab: &Lab) -> String {
        lab.read("/etc/machine-id").trim_end().to_owned()
    }

    #[test]
    fn entries_of_rhel_bear_the_clones_machine_id_and_devices() {
        let mut lab = rocky();
        lab.renew(3, NEW_ROOT);
        let context = lab.context();
        MachineId.apply(&context).unwrap();
        let changes = BootEntries.apply(&context).unwrap();
        let id = id(&lab);
        let entry = lab.read(&format!("/boot/loader/entries/{id}-{KERNEL}.conf"));
        assert!(entry.contains(&format!("options root=UUID={NEW_ROOT} ro crashkernel=1G-4G:192M resume=UUID={SWAP_UUID} rhgb quiet $tuned_params\n")), "{entry}");
        assert!(entry.contains("grub_arg --unrestricted\n"), "{entry}");
        let rescue = lab.read(&format!("/boot/loader/entries/{id}-0-rescue.conf"));
        assert!(rescue.contains(&format!("linux /boot/vmlinuz-0-rescue-{id}\n")), "{rescue}");
        assert!(
            lab.exists(&format!("/boot/vmlinuz-0-rescue-{id}"))
                && lab.exists(&format!("/boot/initramfs-0-rescue-{id}.img"))
        );
        let env = lab.read("/boot/grub2/grubenv");
        assert_eq!(env.len(), 1024);
        assert!(
            env.contains(&format!(
                "saved_entry={id}-{KERNEL}\nkernelopts=root=UUID={NEW_ROOT} ro resume=UUID={SWAP_UUID} \n#"
            )),
            "{env}"
        );
        assert!(lab.read("/boot/efi/EFI/rocky/grub.cfg").contains(&format!("--set=dev {NEW_ROOT}\n")));
        assert_eq!(changes.iter().filter(|c| c.what.starts_with("is now")).count(), 4, "{changes:#?}");
        // What still holds is not touched again.
        context.machine_ids.replace(None);
        assert!(BootEntries.apply(&context).unwrap().is_empty());
    }

    #[test]
    fn a_kept_machine_id_renames_nothing() {
        let lab = rocky();
        let context = lab.context();
        let changes = BootEntries.apply(&context).unwrap();
        assert!(lab.exists(&format!("/boot/loader/entries/{OLD}-{KERNEL}.conf")));
        // The logical volume that does not exist here is all that changes.
        assert_eq!(changes.len(), 2, "{changes:#?}");
    }

    #[test]
    fn an_entry_without_its_kernel_goes() {
        let lab = rocky();
        std::fs::remove_file(lab.target.join(format!("boot/vmlinuz-0-rescue-{OLD}"))).unwrap();
        let changes = BootEntries.apply(&lab.context()).unwrap();
        assert!(
            changes[0].to_string().contains("deleted: its kernel /boot/vmlinuz-0-rescue-"),
            "{changes:#?}"
        );
        assert!(!lab.exists(&format!("/boot/loader/entries/{OLD}-0-rescue.conf")));
    }

    #[test]
    fn directories_of_kernel_install_on_the_esp_are_renamed() {
        let lab = Lab::new();
        lab.file("/etc/machine-id", &format!("{OLD}\n"))
            .file("/etc/kernel/entry-token", &format!("{OLD}\n"))
            .file(&format!("/boot/efi/{OLD}/6.9.1/linux"), "k")
            .file(&format!("/boot/efi/{OLD}/6.9.1/initrd"), "i")
            .file(
                &format!("/boot/efi/loader/entries/{OLD}-6.9.1.conf"),
                &format!("title Fedora\nmachine-id {OLD}\nlinux /{OLD}/6.9.1/linux\ninitrd /{OLD}/6.9.1/initrd\noptions root=/dev/sda3 rw\n"),
            )
            .file("/boot/efi/loader/loader.conf", &format!("timeout 3\ndefault {OLD}-*\n"));
        let context = lab.context();
        MachineId.apply(&context).unwrap();
        BootEntries.apply(&context).unwrap();
        let id = id(&lab);
        let path = format!("/boot/efi/loader/entries/{id}-6.9.1.conf");
        assert_eq!(
            lab.read(&path),
            format!(
                "title Fedora\nmachine-id {id}\nlinux /{id}/6.9.1/linux\ninitrd /{id}/6.9.1/initrd\noptions root=UUID={ROOT_UUID} rw\n"
            )
        );
        assert_eq!(lab.read("/boot/efi/loader/loader.conf"), format!("timeout 3\ndefault {id}-*\n"));
        assert_eq!(lab.read("/etc/kernel/entry-token"), format!("{id}\n"));
        assert!(lab.exists(&format!("/boot/efi/{id}/6.9.1/linux")));
        let entry = entries::parse_bls(&lab.read(&path));
        assert_eq!(entries::problems(&context, "e", "/boot/efi", &entry), [""; 0]);
    }

    #[test]
    fn a_dry_run_sees_what_it_would_have_written() {
        let mut lab = rocky();
        lab.renew(3, NEW_ROOT);
        let context = lab.context().dry();
        MachineId.apply(&context).unwrap();
        let changes = BootEntries.apply(&context).unwrap();
        assert!(changes.len() >= 8, "{changes:#?}");
        let (_, id) = context.machine_ids.borrow().clone().unwrap();
        let entry =
            context.root.read_text(format!("/boot/loader/entries/{id}-{KERNEL}.conf")).unwrap().unwrap();
        assert!(entry.contains(NEW_ROOT));
        assert!(
            !context.root.exists(format!("/boot/vmlinuz-0-rescue-{OLD}"))
                && context.root.exists(format!("/boot/vmlinuz-0-rescue-{id}"))
        );
        assert!(
            lab.exists(&format!("/boot/vmlinuz-0-rescue-{OLD}"))
                && lab.read("/etc/machine-id").starts_with(OLD)
        );
    }

    #[test]
    fn extlinux_boots_this_nodes_root() {
        let lab = Lab::new();
        lab.file(
            "/boot/extlinux/extlinux.conf",
            "label l0\n\tlinux /boot/vmlinuz\n\tappend root=/dev/sda3 ro quiet\n",
        );
        BootEntries.apply(&lab.context()).unwrap();
        assert_eq!(
            lab.read("/boot/extlinux/extlinux.conf"),
            format!("label l0\n\tlinux /boot/vmlinuz\n\tappend root=UUID={ROOT_UUID} ro quiet\n")
        );
    }
}
