//! The files on the EFI system partition that came with the golden tree: which directory is the distribution's, whether a
//! signed boot loader (Secure Boot) lies in it, and what its firmware entry is to be called. They are kept as they are:
//! nothing but the distribution's own signed files passes Secure Boot.

use super::grub::{self, EfiArch, on_esp};
use super::{Change, Context};
use anyhow::{Context as _, Result, bail};
use std::path::{Path, PathBuf};

/// Directories that are no distribution's.
const COMMON: &[&str] = &["boot", "systemd", "linux", "memtest86", "tools"];

/// Distributions whose directory has another name than the `ID` in `/etc/os-release`.
const DIRECTORIES: &[(&str, &str)] = &[
    ("rhel", "redhat"),
    ("ol", "redhat"),
    ("opensuse-leap", "opensuse"),
    ("opensuse-tumbleweed", "opensuse"),
    ("sled", "sles"),
    ("linuxmint", "ubuntu"),
];

/// A boot loader that lies on the ESP already.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Loader {
    /// What its boot entry is called.
    pub label: String,
    /// The file that the firmware starts, from the ESP's root: `EFI/rocky/shimx64.efi`.
    pub file: String,
    /// Files beside it that belong at the removable path too, by the names that they have there.
    beside: Vec<(String, String)>,
}

/// All `grub.cfg` below `EFI` on the ESP, as the clone names them.
pub fn stubs(context: &Context) -> Result<Vec<String>> {
    let Ok((_, mount)) = grub::esp(context) else { return Ok(Vec::new()) };
    let mut found = Vec::new();
    let Some(efi) = on_esp(&context.root, mount, "EFI") else { return Ok(found) };
    for dir in context.root.list(&efi)? {
        let stub = efi.join(dir).join("grub.cfg");
        if context.root.exists(&stub) {
            found.push(stub.to_string_lossy().into_owned());
        }
    }
    Ok(found)
}

/// The distribution's boot loader on the ESP, if it is one that Secure Boot accepts or that only the distribution can
/// make; none where the ESP holds none.
///
/// # Errors
/// When several distributions have one there and none is the clone's.
pub fn signed(context: &Context, arch: &EfiArch) -> Result<Option<Loader>> {
    let (_, mount) = grub::esp(context)?;
    let root = &context.root;
    let Some(efi) = on_esp(root, mount, "EFI") else { return Ok(None) };
    // There `grub-install` refuses to work for UEFI, signed or not.
    let only_copied = is_red_hat(context);
    let mut with_shim = Vec::new();
    for dir in root.list(&efi)? {
        let Some(name) = dir.to_str().map(str::to_owned) else { continue };
        let has = |file: &str| on_esp(root, &efi.join(&name).to_string_lossy(), file).is_some();
        let fits = has(&shim(arch)) || has("shim.efi") || (only_copied && has(&grub_file(arch)));
        if !COMMON.contains(&name.to_ascii_lowercase().as_str()) && fits {
            with_shim.push(name);
        }
    }
    let id = grub::bootloader_id(context);
    let known = DIRECTORIES.iter().find(|(from, _)| *from == id).map_or(id.as_str(), |(_, to)| to);
    let own = with_shim.iter().find(|d| d.eq_ignore_ascii_case(known) || d.eq_ignore_ascii_case(&id));
    let dir = match (own, &with_shim[..]) {
        (Some(dir), _) => dir.clone(),
        (None, []) => return Ok(None),
        (None, [only]) => only.clone(),
        (None, several) => bail!(
            "choosing the boot loader: {} on the ESP ({mount}) have one, and none is called {known}",
            several.join(", ")
        ),
    };
    let at = efi.join(&dir);
    let find = |file: &str| on_esp(root, &at.to_string_lossy(), file);
    let name_of = |path: &Path| path.file_name().and_then(|n| n.to_str()).unwrap_or_default().to_owned();
    let file = find(&shim(arch))
        .or_else(|| find("shim.efi"))
        .or_else(|| find(&grub_file(arch)))
        .map(|p| name_of(&p))
        .unwrap_or_default();
    let removable = arch.removable.rsplit('/').next().unwrap_or_default().to_owned();
    let mut beside = vec![(file.clone(), removable)];
    for other in
        [grub_file(arch), "grub.efi".into(), format!("mm{}.efi", arch.short), "MokManager.efi".into()]
    {
        beside.extend(find(&other).map(|p| (name_of(&p), name_of(&p))).filter(|(name, _)| *name != file));
    }
    let csv = find(&format!("BOOT{}.CSV", arch.short)).map(|p| root.read(p)).transpose()?.flatten();
    let label = csv.and_then(|bytes| csv_label(&bytes, &file)).unwrap_or(id);
    Ok(Some(Loader { label, file: format!("EFI/{dir}/{file}"), beside }))
}

fn shim(arch: &EfiArch) -> String {
    format!("shim{}.efi", arch.short)
}

fn grub_file(arch: &EfiArch) -> String {
    format!("grub{}.efi", arch.short)
}

/// Whether the clone is Fedora, RHEL or one of their kin.
fn is_red_hat(context: &Context) -> bool {
    let release = &context.order.golden.os_release;
    let words = ["ID", "ID_LIKE"]
        .into_iter()
        .filter_map(|key| release.get(key))
        .flat_map(|v| v.split_ascii_whitespace());
    words.into_iter().any(|word| word == "rhel" || word == "fedora")
}

/// The label that shim's own table of boot entries (UTF-16, lines `file,label,arguments,comment`) gives the file.
fn csv_label(bytes: &[u8], file: &str) -> Option<String> {
    let units: Vec<u16> = bytes.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]])).collect();
    let text = String::from_utf16(&units).ok()?;
    let mut lines = text.trim_start_matches('\u{feff}').lines();
    let label =
        lines.find_map(|line| line.split_once(',').filter(|(name, _)| name.eq_ignore_ascii_case(file)))?.1;
    let label = label.split(',').next()?.trim();
    (!label.is_empty() && label.chars().all(|c| !c.is_control())).then(|| label.to_owned())
}

/// Sees to it that the path which every firmware tries leads somewhere: where the ESP has nothing there, the boot loader
/// is copied to it.
///
/// # Errors
/// When a file cannot be read or written.
pub fn fill_removable(context: &Context, arch: &EfiArch, loader: &Loader) -> Result<Vec<Change>> {
    let (_, mount) = grub::esp(context)?;
    let root = &context.root;
    let mut changes = Vec::new();
    if on_esp(root, mount, arch.removable).is_some() {
        return Ok(changes);
    }
    let from = PathBuf::from(mount).join(&loader.file);
    let from = from.parent().unwrap_or(Path::new(mount));
    for (name, there) in &loader.beside {
        let content =
            root.read(from.join(name))?.with_context(|| format!("reading {name} on the ESP: it is gone"))?;
        let to = grub::esp_path(context, mount, &format!("EFI/BOOT/{there}"))?;
        if root.write(&to, &content, 0o644)? {
            changes.push(Change::new(
                "bootloader",
                to.to_string_lossy(),
                format!("a copy of {}", from.join(name).display()),
            ));
        }
    }
    Ok(changes)
}

#[cfg(test)]
mod tests {
    use super::super::testing::Lab;
    use super::*;

    fn rocky() -> Lab {
        let mut lab = Lab::new();
        lab.order.golden.os_release.insert("ID".into(), "rocky".into());
        lab.file("/boot/efi/EFI/rocky/shimx64.efi", "MZ shim")
            .file("/boot/efi/EFI/rocky/grubx64.efi", "MZ grub")
            .file("/boot/efi/EFI/rocky/mmx64.efi", "MZ mok");
        let csv: Vec<u8> = "\u{feff}shimx64.efi,Rocky Linux,,This is the boot entry\n"
            .encode_utf16()
            .flat_map(u16::to_le_bytes)
            .collect();
        std::fs::write(lab.target.join("boot/efi/EFI/rocky/BOOTX64.CSV"), csv).unwrap();
        lab
    }

    #[test]
    fn the_distributions_directory_is_found_and_its_entry_is_named_as_it_names_it() {
        let lab = rocky();
        let context = lab.context();
        let arch = grub::efi_arch("x86_64").unwrap();
        let found = signed(&context, &arch).unwrap().unwrap();
        assert_eq!((found.label.as_str(), found.file.as_str()), ("Rocky Linux", "EFI/rocky/shimx64.efi"));
        lab.file("/boot/efi/EFI/ubuntu/shimx64.efi", "MZ");
        assert_eq!(signed(&context, &arch).unwrap().unwrap(), found);
    }

    #[test]
    fn a_directory_of_another_name_is_found_and_two_are_refused() {
        let mut lab = Lab::new();
        lab.order.golden.os_release.insert("ID".into(), "rhel".into());
        let arch = grub::efi_arch("x86_64").unwrap();
        assert_eq!(signed(&lab.context(), &arch).unwrap(), None);
        lab.file("/boot/efi/EFI/custom/SHIMX64.EFI", "MZ");
        let found = signed(&lab.context(), &arch).unwrap().unwrap();
        assert_eq!((found.label.as_str(), found.file.as_str()), ("rhel", "EFI/custom/SHIMX64.EFI"));
        lab.file("/boot/efi/EFI/other/shimx64.efi", "MZ");
        assert!(signed(&lab.context(), &arch).unwrap_err().to_string().contains("custom, other"));
        lab.file("/boot/efi/EFI/redhat/shimx64.efi", "MZ");
        assert_eq!(signed(&lab.context(), &arch).unwrap().unwrap().file, "EFI/redhat/shimx64.efi");
    }

    #[test]
    fn the_removable_path_is_filled_only_where_it_is_empty() {
        let lab = rocky();
        let context = lab.context();
        let arch = grub::efi_arch("x86_64").unwrap();
        let loader = signed(&context, &arch).unwrap().unwrap();
        assert_eq!(fill_removable(&context, &arch, &loader).unwrap().len(), 3);
        assert_eq!(lab.read("/boot/efi/EFI/BOOT/BOOTX64.EFI"), "MZ shim");
        assert_eq!(lab.read("/boot/efi/EFI/BOOT/grubx64.efi"), "MZ grub");
        lab.file("/boot/efi/EFI/BOOT/BOOTX64.EFI", "MZ mine");
        assert!(fill_removable(&context, &arch, &loader).unwrap().is_empty());
        assert_eq!(lab.read("/boot/efi/EFI/BOOT/BOOTX64.EFI"), "MZ mine");
    }

    #[test]
    fn red_hat_without_shim_keeps_its_grub() {
        let mut lab = Lab::new();
        let arch = grub::efi_arch("x86_64").unwrap();
        lab.file("/boot/efi/EFI/almalinux/grubx64.efi", "MZ");
        assert_eq!(signed(&lab.context(), &arch).unwrap(), None);
        lab.distribution("almalinux", "rhel centos fedora");
        let found = signed(&lab.context(), &arch).unwrap().unwrap();
        assert_eq!((found.file.as_str(), found.beside.len()), ("EFI/almalinux/grubx64.efi", 1));
    }

    #[test]
    fn a_table_that_is_none_names_nothing() {
        assert_eq!(csv_label(b"odd", "shimx64.efi"), None);
        assert_eq!(csv_label(&[0xff, 0xd8, 0x00, 0xd8], "shimx64.efi"), None);
    }
}
