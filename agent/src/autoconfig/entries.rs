//! Boot entries that are text files: those of the Boot Loader Specification (systemd-boot; GRUB on Fedora, RHEL and
//! their kin) and those of extlinux and syslinux, which U-Boot reads too. Which kernels they boot, and with which options.

use super::{Context, boot_paths, grub, grub_cfg};
use anyhow::Result;
use std::path::PathBuf;

/// The directory of entries below a boot partition's root.
const BLS: &str = "loader/entries";
/// Where extlinux and syslinux have their menus.
const EXTLINUX: &[&str] = &[
    "/boot/extlinux/extlinux.conf",
    "/boot/extlinux.conf",
    "/boot/syslinux/extlinux.conf",
    "/boot/syslinux/syslinux.cfg",
];

/// One boot entry.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BootEntry {
    /// The kernel, as the entry names it.
    pub kernel: Option<String>,
    /// Files beside it: initramfs, microcode.
    pub initrds: Vec<String>,
    /// The kernel's command line.
    pub options: String,
}

/// Where entries may lie: below `/boot`, and on the ESP.
pub fn boot_dirs(context: &Context) -> Vec<String> {
    let mut dirs = vec!["/boot".to_owned()];
    if let Ok((_, mount)) = grub::esp(context)
        && mount != "/boot"
    {
        dirs.push(mount.to_owned());
    }
    dirs
}

/// Entries of the Boot Loader Specification, with the directory that their paths begin at.
///
/// # Errors
/// When a directory cannot be listed.
pub fn bls_files(context: &Context) -> Result<Vec<(String, PathBuf)>> {
    let mut files = Vec::new();
    for dir in boot_dirs(context) {
        for file in context.root.matching(&format!("{dir}/{BLS}"), "", ".conf")? {
            files.push((dir.clone(), file));
        }
    }
    Ok(files)
}

/// The menus of extlinux and syslinux that the clone has.
pub fn extlinux_files(context: &Context) -> Vec<String> {
    EXTLINUX.iter().filter(|path| context.root.exists(path)).map(|&path| path.to_owned()).collect()
}

/// Reads an entry of the Boot Loader Specification.
pub fn parse_bls(text: &str) -> BootEntry {
    let mut entry = BootEntry::default();
    for line in text.lines().map(str::trim).filter(|l| !l.starts_with('#')) {
        let (key, value) = line.split_once(|c: char| c.is_ascii_whitespace()).unwrap_or((line, ""));
        let value = value.trim();
        match key {
            "linux" | "efi" => entry.kernel = Some(value.to_owned()),
            // RHEL writes a variable behind the name, for its tuning.
            "initrd" => entry
                .initrds
                .extend(value.split_ascii_whitespace().filter(|w| !w.starts_with('$')).map(str::to_owned)),
            "options" => {
                entry.options.push_str(value);
                entry.options.push(' ');
            }
            _ => {}
        }
    }
    entry.options.truncate(entry.options.trim_end().len());
    entry
}

/// Reads the entries of an `extlinux.conf` or `syslinux.cfg`.
pub fn parse_extlinux(text: &str) -> Vec<BootEntry> {
    let mut entries: Vec<BootEntry> = Vec::new();
    for line in text.lines().map(str::trim).filter(|l| !l.starts_with('#')) {
        let (key, value) = line.split_once(|c: char| c.is_ascii_whitespace()).unwrap_or((line, ""));
        let value = value.trim();
        let key = key.to_ascii_lowercase();
        if key == "label" {
            entries.push(BootEntry::default());
        }
        let Some(entry) = entries.last_mut() else { continue };
        match key.as_str() {
            // Modules of syslinux's own end so.
            "kernel" | "linux" if !value.ends_with(".c32") => entry.kernel = Some(value.to_owned()),
            "initrd" => entry.initrds.extend(value.split(',').map(|v| v.trim().to_owned())),
            "append" => {
                let inside = value.split_ascii_whitespace().filter_map(|w| w.strip_prefix("initrd="));
                entry.initrds.extend(inside.flat_map(|v| v.split(',')).map(str::to_owned));
                value.clone_into(&mut entry.options);
            }
            _ => {}
        }
    }
    entries.retain(|e| e.kernel.is_some());
    entries
}

/// The file of the clone that an entry in `dir` means: from the top of the file system that `dir` lies on; one without a
/// slash at its beginning from `dir`, as extlinux has it.
pub fn in_clone(context: &Context, dir: &str, path: &str) -> Option<String> {
    let mount = boot_paths::mount_of(context, dir);
    if !path.starts_with('/') {
        return boot_paths::there(context, &format!("{dir}/{path}"), mount);
    }
    let mut volumes = context.volumes.iter();
    let volume = volumes.find(|v| v.mount.as_ref().is_some_and(|m| m.path == mount))?;
    // Who reads entries on a btrfs begins at its top or at its default subvolume.
    let both = [false, true].into_iter();
    let found = both.filter_map(|default| boot_paths::on_volume(context, volume, path, default)).next();
    // Which subvolume such paths begin at, loaders do not agree on.
    found.or_else(|| {
        boot_paths::there(context, &format!("{mount}/{path}"), mount).filter(|_| volume.subvolume.is_some())
    })
}

/// The text of an entry of the Boot Loader Specification in `dir` with its files named as they are found on this node, where
/// `/boot` was cut off the root file system or joined to it; none when nothing changes.
pub fn relocated(context: &Context, dir: &str, text: &str) -> Option<String> {
    let mut new = String::with_capacity(text.len());
    for line in text.split_inclusive('\n') {
        let key = line.split_ascii_whitespace().next().unwrap_or_default();
        let names_files = ["linux", "efi", "initrd", "devicetree"].contains(&key);
        let mut line = line.to_owned();
        for path in
            line.clone().split_ascii_whitespace().skip(1).filter(|w| names_files && w.starts_with('/'))
        {
            if in_clone(context, dir, path).is_none() {
                let ways = [Some(format!("/boot{path}")), path.strip_prefix("/boot").map(str::to_owned)];
                let right = ways.into_iter().flatten().find(|way| in_clone(context, dir, way).is_some());
                if let Some(right) = right {
                    line = line.replace(path, &right);
                }
            }
        }
        new.push_str(&line);
    }
    (new != text).then_some(new)
}

/// What is wrong with an entry: the files that are not there, and the devices that are not this node's.
pub fn problems(context: &Context, file: &str, dir: &str, entry: &BootEntry) -> Vec<String> {
    let mut problems = Vec::new();
    for path in entry.kernel.iter().chain(&entry.initrds) {
        if in_clone(context, dir, path).is_none() {
            problems.push(format!(
                "{file} boots {path}, which does not exist or is empty, or is not on the file system of the entry"
            ));
        }
    }
    for (key, spec) in grub_cfg::command_line_names(&entry.options) {
        if context.names().bearer(&spec).is_none() {
            problems.push(format!("{file} has {key}= with what is not on this node: {}", entry.options));
        }
    }
    problems
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Lab, ROOT_UUID};
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn entries_of_rhel_and_of_systemd_are_read() {
        let rhel = "title Rocky Linux (5.14.0-362.el9.x86_64) 9.3 (Blue Onyx)\nversion 5.14.0-362.el9.x86_64\n\
                    linux /vmlinuz-5.14.0-362.el9.x86_64\ninitrd /initramfs-5.14.0-362.el9.x86_64.img $tuned_initrd\n\
                    options root=/dev/mapper/rl-root ro crashkernel=1G-4G:192M $tuned_params\ngrub_users $grub_users\n";
        let entry = parse_bls(rhel);
        assert_eq!(entry.kernel.as_deref(), Some("/vmlinuz-5.14.0-362.el9.x86_64"));
        assert_eq!(entry.initrds, ["/initramfs-5.14.0-362.el9.x86_64.img"]);
        assert!(entry.options.starts_with("root=/dev/mapper/rl-root ro"));
        let arch = parse_bls(
            "title\tArch Linux\nlinux\t/vmlinuz-linux\ninitrd\t/intel-ucode.img\ninitrd /initramfs-linux.img\n# options x\noptions root=UUID=1\noptions rw\n",
        );
        assert_eq!((arch.initrds.len(), arch.options.as_str()), (2, "root=UUID=1 rw"));
    }

    #[test]
    fn entries_of_extlinux_are_read() {
        let text = "DEFAULT l0\nMENU TITLE x\nLABEL l0\n\tMENU LABEL Debian\n\tLINUX /boot/vmlinuz-6.1\n\tINITRD /boot/initrd.img-6.1\n\
                    \tAPPEND root=UUID=1 ro\n# LABEL x\nlabel old\n kernel ../vmlinuz\n append initrd=../a.img,../b.img root=/dev/sda1\n\
                    LABEL hdt\n COM32 hdt.c32\nLABEL menu\n KERNEL vesamenu.c32\n";
        let found = parse_extlinux(text);
        assert_eq!(found.len(), 2);
        assert_eq!(found[0].kernel.as_deref(), Some("/boot/vmlinuz-6.1"));
        assert_eq!(
            (&found[0].initrds[..], found[0].options.as_str()),
            (&["/boot/initrd.img-6.1".to_owned()][..], "root=UUID=1 ro")
        );
        assert_eq!(found[1].initrds, ["../a.img", "../b.img"]);
    }

    #[test]
    fn what_is_missing_is_said() {
        let lab = Lab::new();
        lab.file("/boot/vmlinuz-linux", "k")
            .file("/boot/extlinux/extlinux.conf", "")
            .file("/boot/efi/u", "u");
        let context = lab.context();
        let good = BootEntry {
            kernel: Some("/boot/vmlinuz-linux".into()),
            options: format!("root=UUID={ROOT_UUID}"),
            ..BootEntry::default()
        };
        assert_eq!(problems(&context, "e", "/boot", &good), [""; 0]);
        // No loader of an ESP reads the root file system, nor the other way round.
        assert_eq!(problems(&context, "e", "/boot/efi", &good).len(), 1);
        let on_esp = BootEntry { kernel: Some("/u".into()), ..good.clone() };
        assert_eq!(problems(&context, "e", "/boot/efi", &on_esp), [""; 0]);
        assert_eq!(problems(&context, "e", "/boot", &on_esp).len(), 1);
        let relative = BootEntry { kernel: Some("../vmlinuz-linux".into()), ..BootEntry::default() };
        assert_eq!(problems(&context, "e", "/boot/extlinux", &relative), [""; 0]);
        let bad = BootEntry { initrds: vec!["/none".into()], options: "root=UUID=dead".into(), ..good };
        let found = problems(&context, "e", "/boot", &bad);
        assert!(
            found.len() == 2 && found[0].contains("/none") && found[1].contains("not on this node"),
            "{found:?}"
        );
        assert_eq!(boot_dirs(&context), ["/boot", "/boot/efi"]);
        assert_eq!(extlinux_files(&context), ["/boot/extlinux/extlinux.conf"]);
    }

    #[test]
    fn files_are_named_from_the_top_of_the_file_system_that_holds_them() {
        let mut lab = Lab::new();
        lab.file("/boot/k", "k").file("/boot/i", "i").file("/boot/dtb/a.dtb", "d");
        let together = "title k\nlinux /boot/k\ninitrd /boot/i $tuned_initrd\ndevicetree /boot/dtb/a.dtb\noptions x=/k\n";
        let apart = "title k\nlinux /k\ninitrd /i $tuned_initrd\ndevicetree /dtb/a.dtb\noptions x=/k\n";
        assert_eq!(relocated(&lab.context(), "/boot", apart).unwrap(), together);
        assert_eq!(relocated(&lab.context(), "/boot", together), None);
        let mut boot = lab.volumes[2].clone();
        boot.mount = Some(ka_layout::model::Mount { path: "/boot".into(), options: None });
        lab.volumes.push(boot);
        assert_eq!(relocated(&lab.context(), "/boot", together).unwrap(), apart);
        assert_eq!(relocated(&lab.context(), "/boot", apart), None);
        assert_eq!(relocated(&lab.context(), "/boot", "linux /none\n"), None);
    }

    proptest! {
        #[test]
        fn no_text_breaks_the_readers(text in "(label |linux |initrd |append |options |\\.c32|,|=|\\$|\n|\t|é|[ -~]){0,60}") {
            let _ = parse_bls(&text);
            let _ = relocated(&Lab::new().context(), "/boot", &text);
            prop_assert!(parse_extlinux(&text).iter().all(|e| e.kernel.is_some()));
        }
    }
}
