//! What an initramfs of Arch's mkinitcpio opens before it mounts the root: `/etc/crypttab` is not its concern. The hook
//! `sd-encrypt` goes by `/etc/crypttab.initramfs` and the kernel's command line, the hook `encrypt` by the latter alone.

use super::initramfs_tools::Builder;
use super::names::Spec;
use super::{Context, crypttab, entries, grub_cfg, uki};
use anyhow::Result;
use ka_layout::order::Layer;

/// Whether the clone has mkinitcpio with the hook `sd-encrypt`.
///
/// # Errors
/// When its configuration cannot be read.
pub fn has_sd_encrypt(context: &Context) -> Result<bool> {
    Ok(Builder::find(context) == Some(Builder::Mkinitcpio)
        && hooks(context)?.iter().any(|hook| hook == "sd-encrypt"))
}

/// The containers that the initramfs must open, by name and UUID.
pub fn early_containers<'c>(context: &'c Context<'_>) -> Vec<(&'c str, &'c str)> {
    let mut found = Vec::new();
    for layer in context.early_volumes().flat_map(|v| v.layer.iter().chain(&v.below)) {
        if let Layer::Luks { name, uuid, .. } = layer
            && !found.contains(&(name.as_str(), uuid.as_str()))
        {
            found.push((name, uuid));
        }
    }
    found
}

/// Which of them nothing tells mkinitcpio's initramfs to open.
///
/// # Errors
/// When a file cannot be read.
pub fn problems(context: &Context) -> Result<Vec<String>> {
    if Builder::find(context) != Some(Builder::Mkinitcpio) {
        return Ok(Vec::new());
    }
    let by_systemd = has_sd_encrypt(context)?;
    let table = context.root.read_text(crypttab::ARCH)?.unwrap_or_default();
    let lines = command_lines(context)?;
    let mut problems = Vec::new();
    for (name, uuid) in early_containers(context) {
        let own = Spec::Uuid(uuid.to_owned());
        let in_table = || {
            let mut lines = table.lines().filter_map(crypttab::Line::parse);
            lines.any(|l| Spec::parse(l.device).as_ref() == Some(&own))
        };
        let is_named = |word: &str| match word.split_once('=') {
            Some(("cryptdevice", value)) if !by_systemd => {
                value.split(':').next().and_then(Spec::parse).as_ref() == Some(&own)
            }
            Some(("rd.luks.uuid" | "rd.luks.name", value)) if by_systemd => {
                let value = value.split('=').next().unwrap_or_default();
                value.strip_prefix("luks-").unwrap_or(value) == uuid
            }
            _ => false,
        };
        if (by_systemd && in_table()) || lines.iter().any(|l| l.split_ascii_whitespace().any(is_named)) {
            continue;
        }
        let what = if by_systemd {
            format!(
                "neither {} nor a kernel command line names the container {name} ({uuid})",
                crypttab::ARCH
            )
        } else {
            format!(
                "no kernel command line has cryptdevice=UUID={uuid}:{name}, by which alone mkinitcpio's hook encrypt opens it: \
                 the golden node needs the hooks systemd and sd-encrypt in /etc/mkinitcpio.conf, or a cryptdevice= that Ka \
                 can set right"
            )
        };
        problems.push(format!("/ or /usr lies on {name}, and {what}"));
    }
    Ok(problems)
}

/// What the kernel is told, by whichever loader.
fn command_lines(context: &Context) -> Result<Vec<String>> {
    let root = &context.root;
    let mut lines = Vec::new();
    for (_, file) in entries::bls_files(context)? {
        lines.push(entries::parse_bls(&root.read_text(&file)?.unwrap_or_default()).options);
    }
    for file in entries::extlinux_files(context) {
        let found = entries::parse_extlinux(&root.read_text(&file)?.unwrap_or_default());
        lines.extend(found.into_iter().map(|entry| entry.options));
    }
    lines.extend(uki::images(context)?.into_iter().map(|(_, options)| options));
    let menu = root.read_text(grub_cfg::path(context)?)?.unwrap_or_default();
    lines.extend(menu.lines().filter(|l| !l.trim_start().starts_with('#')).map(str::to_owned));
    Ok(lines)
}

/// The hooks of `/etc/mkinitcpio.conf` and what adds to it, in order.
fn hooks(context: &Context) -> Result<Vec<String>> {
    let mut hooks = Vec::new();
    let mut files = vec!["/etc/mkinitcpio.conf".into()];
    files.extend(context.root.matching("/etc/mkinitcpio.conf.d", "", ".conf")?);
    for file in files {
        read_hooks(&context.root.read_text(file)?.unwrap_or_default(), &mut hooks);
    }
    Ok(hooks)
}

/// Reads `HOOKS=(a b)`, `HOOKS+=(c)`, also over several lines, and the older `HOOKS="a b"`.
fn read_hooks(text: &str, hooks: &mut Vec<String>) {
    let lines: Vec<&str> = text.lines().map(|l| l.split('#').next().unwrap_or_default()).collect();
    let text = lines.join("\n");
    let mut rest = text.as_str();
    while let Some((before, after)) = rest.split_once("HOOKS") {
        rest = after;
        if before.ends_with(|c: char| c.is_ascii_alphanumeric() || c == '_') {
            continue;
        }
        let (adds, value) = match after.strip_prefix("+=") {
            Some(value) => (true, value),
            None => (false, after.strip_prefix('=').unwrap_or_default()),
        };
        let Some(open) = value.chars().next().filter(|c| ['(', '"', '\''].contains(c)) else { continue };
        let close = if open == '(' { ')' } else { open };
        let inner = value[1..].split(close).next().unwrap_or_default();
        if !adds {
            hooks.clear();
        }
        hooks.extend(inner.split_ascii_whitespace().map(|w| w.trim_matches(['"', '\'']).to_owned()));
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Lab, ROOT_UUID};
    use super::*;
    use crate::autoconfig::{Piece, storage::Storage, verify};
    use proptest::prelude::*;

    const CONF: &str = "/etc/mkinitcpio.conf";

    /// Arch with its root in a container, of which nothing in the golden tree knows.
    fn arch(hooks: &str) -> Lab {
        let mut lab = Lab::new();
        lab.distribution("arch", "");
        lab.volumes[2].layer =
            Some(Layer::Luks { name: "crypt".into(), uuid: "c1".into(), options: "luks".into() });
        lab.file("/usr/bin/mkinitcpio", "")
            .file(CONF, &format!("# HOOKS=(x)\nHOOKS=({hooks})\n"))
            .file("/boot/grub/grub.cfg", &format!("linux /boot/k root=UUID={ROOT_UUID} rw\n"));
        lab
    }

    #[test]
    fn sd_encrypt_finds_the_root_in_its_own_table() {
        let lab = arch("base systemd\n  autodetect sd-encrypt # x\n filesystems");
        assert!(problems(&lab.context()).unwrap()[0].contains("neither /etc/crypttab.initramfs nor"));
        let context = lab.context();
        Storage.apply(&context).unwrap();
        assert_eq!(context.stale_initramfs.borrow().len(), 1);
        assert_eq!(lab.read(crypttab::ARCH), "crypt UUID=c1 none luks\n");
        assert!(!lab.exists("/etc/crypttab"));
        assert_eq!(problems(&lab.context()).unwrap(), [""; 0]);
        assert!(Storage.apply(&lab.context()).unwrap().is_empty(), "a second run changes nothing");
        // A container that the initramfs need not open is the system's own concern.
        let mut lab = arch("systemd sd-encrypt");
        lab.volumes[1].layer = lab.volumes[2].layer.take();
        Storage.apply(&lab.context()).unwrap();
        assert_eq!(lab.read("/etc/crypttab"), "crypt UUID=c1 none luks\n");
        assert!(!lab.exists(crypttab::ARCH));
        assert_eq!(problems(&lab.context()).unwrap(), [""; 0]);
    }

    #[test]
    fn the_hook_encrypt_needs_the_command_line() {
        let lab = arch("base udev encrypt filesystems");
        Storage.apply(&lab.context()).unwrap();
        assert!(!lab.exists(crypttab::ARCH));
        let wanted = "no kernel command line has cryptdevice=UUID=c1:crypt";
        assert!(problems(&lab.context()).unwrap()[0].contains(wanted));
        assert!(
            format!("{:#}", verify(&lab.context()).unwrap_err()).contains(wanted),
            "the clone is no success"
        );
        lab.file(
            "/boot/loader/entries/a.conf",
            "linux /k\noptions cryptdevice=UUID=c1:crypt:allow-discards rw\n",
        );
        assert_eq!(problems(&lab.context()).unwrap(), [""; 0]);
        std::fs::remove_file(lab.target.join("usr/bin/mkinitcpio")).unwrap();
        lab.file("/boot/loader/entries/a.conf", "");
        assert_eq!(problems(&lab.context()).unwrap(), [""; 0], "another builder has other ways");
    }

    #[test]
    fn hooks_are_read() {
        let read = |text: &str| {
            let mut hooks = Vec::new();
            read_hooks(text, &mut hooks);
            hooks.join(" ")
        };
        assert_eq!(read("HOOKS=(a b)\nHOOKS=(c\n'd' #e\n)\nHOOKS+=(f)\n"), "c d f");
        assert_eq!(read("NOHOOKS=(a)\nHOOKS=\"b c\"\nHOOKS\n"), "b c");
    }

    proptest! {
        #[test]
        fn no_text_breaks_the_reader(text in "(HOOKS|=|\\+=|\\(|\\)|\"|'|#|é| |\n|[ -~]){0,60}") {
            read_hooks(&text, &mut Vec::new());
        }
    }
}
