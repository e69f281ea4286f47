//! Reading `grub.cfg` and kernel command lines: which devices they name and which kernels and initramfs they boot.

use super::names::{Meaning, Spec};
use super::{Context, esp_files, root::Root};
use anyhow::Result;
use ka_layout::model::Subvolume;
use ka_layout::order::Firmware;

/// GRUB's configuration as it stands where GRUB has its usual name.
const PATH: &str = "/boot/grub/grub.cfg";
/// The same where the distribution calls it grub2.
const PATH2: &str = "/boot/grub2/grub.cfg";

/// Where the clone's menu is: on UEFI it may be the file on the ESP itself, as up to RHEL 8.
pub fn path(context: &Context) -> Result<String> {
    if context.firmware == Firmware::Uefi {
        for stub in esp_files::stubs(context)? {
            let text = context.root.read_text(&stub)?.unwrap_or_default();
            let found = parse(&text);
            if !found.leads_on && (found.blscfg || !found.kernels.is_empty()) {
                return Ok(stub);
            }
        }
    }
    let grub2 =
        context.root.exists(PATH2) || (context.root.is_dir("/boot/grub2") && !context.root.exists(PATH));
    Ok(if grub2 { PATH2 } else { PATH }.to_owned())
}

/// What a `grub.cfg` relies on.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct GrubCfg {
    /// Device names, with the line in which each stands.
    pub names: Vec<(Spec, String)>,
    /// Kernels, as GRUB names them.
    pub kernels: Vec<String>,
    /// Initramfs files, as GRUB names them.
    pub initrds: Vec<String>,
    /// Whether the entries are files of their own (Boot Loader Specification).
    pub blscfg: bool,
    /// Whether it leads to another configuration file.
    pub leads_on: bool,
    /// Whether paths begin at a btrfs's default subvolume and not at its top, as SUSE has it.
    pub from_default: bool,
}

/// Reads a `grub.cfg`.
pub fn parse(text: &str) -> GrubCfg {
    let mut found = GrubCfg::default();
    for line in text.lines() {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        let Some((&command, arguments)) = words.split_first() else { continue };
        match command {
            "search" | "search.fs_uuid" | "search.fs_label" => {
                let has = |short: &str, long: &str| arguments.iter().any(|a| *a == short || *a == long);
                let value = match command {
                    "search" => arguments.iter().rev().find(|a| !a.starts_with('-')),
                    _ => arguments.first(),
                };
                let Some(value) = value.map(|v| v.trim_matches(['"', '\'']).to_owned()) else { continue };
                if value.contains('$') {
                    continue;
                }
                let spec = if command == "search.fs_uuid" || has("-u", "--fs-uuid") {
                    Spec::Uuid(value)
                } else if command == "search.fs_label" || has("-l", "--label") {
                    Spec::Label(value)
                } else {
                    continue;
                };
                found.names.push((spec, line.trim().to_owned()));
            }
            "linux" | "linux16" | "linuxefi" => {
                found.kernels.extend(arguments.first().map(|a| (*a).to_owned()));
                let names = command_line_names(line).into_iter();
                found.names.extend(names.map(|(_, spec)| (spec, line.trim().to_owned())));
            }
            "initrd" | "initrd16" | "initrdefi" => {
                let files = arguments.iter().filter(|a| !a.starts_with("$") || a.starts_with("($root)"));
                found.initrds.extend(files.map(|a| (*a).to_owned()));
            }
            "blscfg" => found.blscfg = true,
            "configfile" => found.leads_on = true,
            "set" if arguments.first().is_some_and(|a| a.starts_with("btrfs_relative_path=")) => {
                found.from_default = true;
            }
            "set" if arguments.first().is_some_and(|a| a.starts_with("kernelopts=")) => {
                let names = command_line_names(line.split_once("kernelopts=").map_or("", |(_, rest)| rest))
                    .into_iter();
                found.names.extend(names.map(|(_, spec)| (spec, line.trim().to_owned())));
            }
            _ => {}
        }
    }
    found
}

/// The devices that a kernel command line (or a line of `/etc/default/grub`) names, with the key of each.
pub fn command_line_names(line: &str) -> Vec<(&str, Spec)> {
    let words = line.split(|c: char| c.is_ascii_whitespace() || c == '"' || c == '\'');
    let pairs = words.filter_map(|word| word.split_once('='));
    let named = pairs.filter(|(key, _)| *key == "root" || *key == "resume");
    named.filter_map(|(key, value)| Some((key, Spec::parse(value)?))).collect()
}

/// A configuration with the file systems for which it searches named as they are on this node.
pub fn retarget(context: &Context, text: &str) -> String {
    let mut new = String::with_capacity(text.len());
    for line in text.split_inclusive('\n') {
        let searched =
            parse(line).names.into_iter().next().filter(|_| line.trim_start().starts_with("search"));
        let names = context.names();
        let renamed = searched.and_then(|(spec, _)| match (names.meaning(&spec), spec) {
            (Meaning::Renamed(volume), Spec::Uuid(old)) => Some((old, volume.uuid.clone()?)),
            (Meaning::Renamed(volume), Spec::Label(old)) => Some((old, volume.label.clone()?)),
            _ => None,
        });
        match renamed {
            Some((old, now)) => new.push_str(&line.replace(&old, &now)),
            None => new.push_str(line),
        }
    }
    new
}

/// The names in `found` that mean nothing on this node, each with its line.
pub fn unresolved(context: &Context, found: &GrubCfg) -> Vec<String> {
    let names = context.names();
    let lost = found.names.iter().filter(|(spec, _)| names.bearer(spec).is_none());
    lost.map(|(_, line)| line.clone()).collect()
}

/// The kernel whose path does not begin with the subvolume that holds `/boot`, or begins with one although there is none:
/// GRUB sees a btrfs from its top, and SUSE's from its default subvolume.
pub fn outside_subvolume(context: &Context, found: &GrubCfg) -> Option<String> {
    let boot = context.boot_volume().ok()?;
    let seen_whole = |s: &&Subvolume| !(s.default && found.from_default);
    let prefix = boot.subvolume.as_ref().filter(seen_whole).map(|s| format!("/{}/", s.name));
    let plain = |path: &str| path.strip_prefix("($root)").unwrap_or(path).to_owned();
    let right = |path: &str| match &prefix {
        Some(prefix) => path.starts_with(prefix),
        None => boot.subvolume.is_some() || !path.starts_with("/@"),
    };
    found.kernels.iter().find(|k| !right(&plain(k))).cloned()
}

/// The file of the clone that GRUB's `path` means: below `/` or, where `/boot` is a file system of its own, below that;
/// a btrfs subvolume (`/@`) may come first.
pub fn in_clone(root: &Root, path: &str) -> Option<String> {
    let plain = path.strip_prefix("($root)").unwrap_or(path);
    let plain = if plain.starts_with("/@") {
        plain[1..].find('/').map_or(plain, |at| &plain[at + 1..])
    } else {
        plain
    };
    let mut places = vec![plain.to_owned(), format!("/boot{plain}")];
    // Other names of btrfs subvolumes: /root/boot/vmlinuz.
    places.extend(plain.rfind("/boot/").filter(|&at| at > 0).map(|at| plain[at..].to_owned()));
    places.into_iter().find(|p| root.size(p).is_some_and(|size| size > 0))
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Lab, ROOT_UUID};
    use super::*;
    use proptest::prelude::*;

    const CFG: &str = r#"
if [ x$feature_platform_search_hint = xy ]; then
  search --no-floppy --fs-uuid --set=root --hint-bios=hd0,gpt3  UUID
else
  search --no-floppy --fs-uuid --set=root UUID
fi
menuentry 'Debian' --class debian $menuentry_id_option 'gnulinux-simple-UUID' {
	linux	/boot/vmlinuz-6.1 root=UUID=UUID ro quiet resume=/dev/sda2
	initrd	/boot/initrd.img-6.1
}
	search --no-floppy --label 'my-root' --set=root
	search --file /x --set=root
"#;

    #[test]
    fn kernels_are_sought_in_the_subvolume_that_holds_them() {
        let mut lab = Lab::new();
        let of = |kernel: &str| GrubCfg { kernels: vec![kernel.into()], ..GrubCfg::default() };
        assert_eq!(outside_subvolume(&lab.context(), &of("/boot/vmlinuz")), None);
        assert_eq!(
            outside_subvolume(&lab.context(), &of("/@/boot/vmlinuz")).as_deref(),
            Some("/@/boot/vmlinuz")
        );
        lab.volumes[2].subvolume = Some(ka_layout::model::Subvolume {
            name: "@root".into(),
            path: Some("/".into()),
            options: None,
            default: false,
        });
        assert_eq!(outside_subvolume(&lab.context(), &of("($root)/@root/boot/vmlinuz")), None);
        assert!(outside_subvolume(&lab.context(), &of("/@/boot/vmlinuz")).is_some());
        assert!(outside_subvolume(&lab.context(), &of("/boot/vmlinuz")).is_some());
        // That it is the default one means nothing to GRUB, but for SUSE's.
        lab.volumes[2].subvolume.as_mut().unwrap().default = true;
        assert!(outside_subvolume(&lab.context(), &of("/boot/vmlinuz")).is_some());
        let suse = parse("set btrfs_relative_path=\"y\"\nlinux /boot/vmlinuz ro\n");
        assert_eq!(outside_subvolume(&lab.context(), &suse), None);
    }

    #[test]
    fn names_kernels_and_initrds_are_found() {
        let found = parse(&CFG.replace("UUID\n", &format!("{ROOT_UUID}\n")));
        assert_eq!(found.kernels, ["/boot/vmlinuz-6.1"]);
        assert_eq!(found.initrds, ["/boot/initrd.img-6.1"]);
        let specs: Vec<Spec> = found.names.into_iter().map(|(spec, _)| spec).collect();
        assert_eq!(
            specs,
            [
                Spec::Uuid(ROOT_UUID.into()),
                Spec::Uuid(ROOT_UUID.into()),
                Spec::Uuid("UUID".into()),
                Spec::Device("/dev/sda2".into()),
                Spec::Label("my-root".into()),
            ]
        );
    }

    #[test]
    fn what_does_not_resolve_is_quoted() {
        let lab = Lab::new();
        let text =
            CFG.replace("UUID\n", &format!("{ROOT_UUID}\n")).replace("root=UUID=UUID", "root=/dev/nvme0n1p3");
        let lost = unresolved(&lab.context(), &parse(&text));
        assert_eq!(lost.len(), 2, "{lost:?}");
        assert!(lost[0].contains("resume=/dev/sda2") && lost[1].contains("my-root"));
    }

    #[test]
    fn boot_may_be_a_file_system_of_its_own() {
        let lab = Lab::new();
        lab.file("/boot/vmlinuz-6.1", "MZ").file("/boot/empty", "");
        let root = &lab.context().root;
        assert_eq!(in_clone(root, "/boot/vmlinuz-6.1").unwrap(), "/boot/vmlinuz-6.1");
        assert_eq!(in_clone(root, "/vmlinuz-6.1").unwrap(), "/boot/vmlinuz-6.1");
        assert_eq!(in_clone(root, "/@/boot/vmlinuz-6.1").unwrap(), "/boot/vmlinuz-6.1");
        assert_eq!(in_clone(root, "/@rootfs/boot/vmlinuz-6.1").unwrap(), "/boot/vmlinuz-6.1");
        assert_eq!(in_clone(root, "/root/boot/vmlinuz-6.1").unwrap(), "/boot/vmlinuz-6.1");
        assert_eq!(in_clone(root, "/@/.snapshots/1/snapshot/boot/vmlinuz-6.1").unwrap(), "/boot/vmlinuz-6.1");
        assert_eq!(in_clone(root, "/boot/empty"), None);
    }

    #[test]
    fn red_hats_menu_leads_to_boot_entries() {
        let text = "set kernelopts=\"root=UUID=dead ro resume=UUID=beef\"\nblscfg\n";
        let found = parse(text);
        assert!(found.blscfg && found.kernels.is_empty() && !found.leads_on);
        assert_eq!(found.names.len(), 2);
        assert_eq!(
            parse("linux ($root)/vmlinuz root=$x\ninitrd ($root)/i.img $tuned_initrd\n").initrds,
            ["($root)/i.img"]
        );
    }

    #[test]
    fn the_menu_is_where_the_distribution_has_it() {
        let lab = Lab::new();
        assert_eq!(path(&lab.context()).unwrap(), PATH);
        lab.file("/boot/grub2/grubenv", "");
        assert_eq!(path(&lab.context()).unwrap(), PATH2);
        lab.file(
            "/boot/efi/EFI/rocky/grub.cfg",
            "search --fs-uuid --set=dev x\nconfigfile $prefix/grub.cfg\n",
        );
        assert_eq!(path(&lab.context()).unwrap(), PATH2);
        lab.file("/boot/efi/EFI/rocky/grub.cfg", "insmod blscfg\nblscfg\n");
        assert_eq!(path(&lab.context()).unwrap(), "/boot/efi/EFI/rocky/grub.cfg");
    }

    #[test]
    fn a_stub_searches_for_what_is_here() {
        let mut lab = Lab::new();
        let stub = format!(
            "search --no-floppy --root-dev-only --fs-uuid --set=dev {ROOT_UUID}\nset prefix=($dev)/boot/grub2\n\
             export $prefix\nconfigfile $prefix/grub.cfg\n"
        );
        assert_eq!(retarget(&lab.context(), &stub), stub);
        let new = "11111111-2222-4333-8444-555555555555";
        lab.renew(3, new);
        assert_eq!(retarget(&lab.context(), &stub), stub.replace(ROOT_UUID, new));
        assert_eq!(
            retarget(&lab.context(), &format!("search.fs_uuid {ROOT_UUID} root hd0,gpt2 \n")),
            format!("search.fs_uuid {new} root hd0,gpt2 \n")
        );
    }

    proptest! {
        #[test]
        fn no_text_breaks_the_reader(text in "(search|linux|initrd|--fs-uuid|root=|resume=|UUID=|/dev/disk/by-label/|\\\\x|/@|é|'|\"| |\n|[ -~]){0,60}") {
            let lab = Lab::new();
            let context = lab.context();
            let found = parse(&text);
            let lost = unresolved(&context, &found);
            prop_assert!(lost.len() <= found.names.len());
            for path in found.kernels.iter().chain(&found.initrds) {
                prop_assert_eq!(in_clone(&context.root, path), None);
            }
        }
    }
}
