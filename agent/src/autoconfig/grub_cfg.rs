//! Reading `grub.cfg` and kernel command lines: which devices they name and which kernels and initramfs they boot.

use super::names::{Meaning, Spec};
use super::{Context, boot_paths, esp_files};
use anyhow::Result;
use ka_layout::order::{Firmware, Volume};

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

/// A file that a menu loads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BootFile {
    /// As GRUB names it.
    pub path: String,
    /// The file system that was searched for last, if it was by a name.
    pub on: Option<Spec>,
}

/// What a `grub.cfg` relies on.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct GrubCfg {
    /// Device names, with the line in which each stands.
    pub names: Vec<(Spec, String)>,
    /// Kernels.
    pub kernels: Vec<BootFile>,
    /// Initramfs files.
    pub initrds: Vec<BootFile>,
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
    let mut on: Option<Spec> = None;
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
                let by_uuid = command == "search.fs_uuid" || has("-u", "--fs-uuid");
                let by_label = command == "search.fs_label" || has("-l", "--label");
                let spec = match (by_uuid, by_label) {
                    _ if value.contains('$') => None,
                    (true, _) => Some(Spec::Uuid(value)),
                    (false, true) => Some(Spec::Label(value)),
                    (false, false) => None,
                };
                if has("--set", "--set=root") || has("-s", "root") {
                    on.clone_from(&spec);
                }
                found.names.extend(spec.map(|spec| (spec, line.trim().to_owned())));
            }
            "linux" | "linux16" | "linuxefi" => {
                let file = |a: &&str| BootFile { path: (*a).to_owned(), on: on.clone() };
                found.kernels.extend(arguments.first().map(file));
                let names = command_line_names(line).into_iter();
                found.names.extend(names.map(|(_, spec)| (spec, line.trim().to_owned())));
            }
            "initrd" | "initrd16" | "initrdefi" => {
                let files = arguments.iter().filter(|a| !a.starts_with("$") || a.starts_with("($root)"));
                found.initrds.extend(files.map(|a| BootFile { path: (*a).to_owned(), on: on.clone() }));
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

/// A configuration with the file systems for which it searches named as they are on this node. One that only leads to the
/// menu, as a signed GRUB has it on the ESP, leads to where the menu is here.
pub fn retarget(context: &Context, text: &str) -> String {
    let whole = parse(text);
    let is_stub = whole.kernels.is_empty() && !whole.blscfg;
    let boot = context.boot_volume().ok().filter(|_| is_stub);
    let mut new = String::with_capacity(text.len());
    for line in text.split_inclusive('\n') {
        let change =
            searched_instead(context, boot, line).or_else(|| prefix_instead(boot?, line, whole.from_default));
        match change {
            Some((old, now)) => new.push_str(&line.replace(&old, &now)),
            None => new.push_str(line),
        }
    }
    new
}

/// What a line that searches for a file system names, and what it must name on this node: the same file system, or that of
/// `/boot` when it is given.
fn searched_instead(context: &Context, boot: Option<&Volume>, line: &str) -> Option<(String, String)> {
    let (spec, _) = parse(line).names.into_iter().next()?;
    if !line.trim_start().starts_with("search") {
        return None;
    }
    let volume = match (context.names().meaning(&spec), boot) {
        (Meaning::Kept(_) | Meaning::Renamed(_) | Meaning::NotHere(_), Some(boot)) => boot,
        (Meaning::Renamed(volume), None) => volume,
        _ => return None,
    };
    match spec {
        Spec::Uuid(old) => Some((old, volume.uuid.clone()?)),
        Spec::Label(old) => Some((old, volume.label.clone()?)),
        _ => None,
    }
}

/// The directory of the menu that a line sets as GRUB's prefix, and where that is on `boot`.
fn prefix_instead(boot: &Volume, line: &str, from_default: bool) -> Option<(String, String)> {
    let (_, value) = line.trim().strip_prefix("set prefix=")?.split_once(')')?;
    let old = value.trim_matches(['"', '\'']);
    let name = old.rsplit('/').next().filter(|name| *name == "grub" || *name == "grub2")?;
    let now = boot_paths::named(boot, &format!("/boot/{name}"), from_default)?;
    // A path that ends in the other would be found in it: both are replaced with what stands before them.
    Some((value.to_owned(), value.replace(old, &now)))
}

/// The names in `found` that mean nothing on this node, each with its line.
pub fn unresolved(context: &Context, found: &GrubCfg) -> Vec<String> {
    let names = context.names();
    let lost = found.names.iter().filter(|(spec, _)| names.bearer(spec).is_none());
    lost.map(|(_, line)| line.clone()).collect()
}

/// The files that GRUB would not find on this node where the menu has them, or find empty.
pub fn missing(context: &Context, found: &GrubCfg) -> Vec<String> {
    let files = found.kernels.iter().chain(&found.initrds);
    files
        .filter(|file| in_clone(context, file, found.from_default).is_none())
        .map(|f| f.path.clone())
        .collect()
}

/// The file of the clone that is meant: on the file system that the menu searched for, else on that of `/boot`.
fn in_clone(context: &Context, file: &BootFile, from_default: bool) -> Option<String> {
    let path = file.path.strip_prefix("($root)").unwrap_or(&file.path);
    let boot = &context.boot_volume().ok()?.device;
    let holds = |volume: &&Volume| match &file.on {
        Some(spec) => spec.names(volume),
        None => volume.device == *boot,
    };
    // Subvolumes share a name: each is looked into.
    context.volumes.iter().filter(holds).find_map(|v| boot_paths::on_volume(context, v, path, from_default))
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
        lab.file("/boot/vmlinuz", "MZ");
        let lost = |lab: &Lab, kernel: &str| missing(&lab.context(), &parse(&format!("linux {kernel} ro\n")));
        assert_eq!(lost(&lab, "/boot/vmlinuz"), [""; 0]);
        assert_eq!(lost(&lab, "/@/boot/vmlinuz"), ["/@/boot/vmlinuz"]);
        lab.volumes[2].subvolume = Some(ka_layout::model::Subvolume {
            name: "@root".into(),
            path: Some("/".into()),
            options: None,
            default: false,
        });
        assert_eq!(lost(&lab, "($root)/@root/boot/vmlinuz"), [""; 0]);
        assert_eq!(lost(&lab, "/@/boot/vmlinuz").len(), 1);
        assert_eq!(lost(&lab, "/boot/vmlinuz").len(), 1);
        // That it is the default one means nothing to GRUB, but for SUSE's.
        lab.volumes[2].subvolume.as_mut().unwrap().default = true;
        assert_eq!(lost(&lab, "/boot/vmlinuz").len(), 1);
        let suse = parse("set btrfs_relative_path=\"y\"\nlinux /boot/vmlinuz ro\n");
        assert_eq!(missing(&lab.context(), &suse), [""; 0]);
    }

    /// The node's `/boot` as a file system of its own.
    fn with_boot(lab: &mut Lab) {
        let mut boot = lab.volumes[2].clone();
        boot.device = "/dev/nvme0n1p4".into();
        boot.uuid = Some(BOOT_UUID.into());
        boot.label = None;
        boot.mount = Some(ka_layout::model::Mount { path: "/boot".into(), options: None });
        lab.volumes.push(boot);
    }

    const BOOT_UUID: &str = "22222222-3333-4444-8555-666666666666";

    #[test]
    fn a_menu_of_one_tree_is_of_no_use_where_boot_is_apart() {
        let mut lab = Lab::new();
        lab.file("/boot/vmlinuz-6.1", "MZ").file("/boot/initrd.img-6.1", "i");
        let together = parse(&CFG.replace("UUID\n", &format!("{ROOT_UUID}\n")));
        assert_eq!(missing(&lab.context(), &together), [""; 0]);
        let apart = CFG.replace("UUID\n", &format!("{BOOT_UUID}\n")).replace("\t/boot/", "\t/");
        assert_eq!(missing(&lab.context(), &parse(&apart)).len(), 2);
        with_boot(&mut lab);
        assert_eq!(missing(&lab.context(), &together), ["/boot/vmlinuz-6.1", "/boot/initrd.img-6.1"]);
        assert_eq!(missing(&lab.context(), &parse(&apart)), [""; 0]);
        // The right paths, sought in the wrong place.
        assert_eq!(missing(&lab.context(), &parse(&apart.replace(BOOT_UUID, ROOT_UUID))).len(), 2);
    }

    #[test]
    fn a_stub_leads_to_where_the_menu_is() {
        let mut lab = Lab::new();
        let debian = |uuid: &str, path: &str| {
            format!(
                "search.fs_uuid {uuid} root hd0,gpt2 \nset prefix=($root)'{path}'\nconfigfile $prefix/grub.cfg\n"
            )
        };
        let rhel = |uuid: &str, path: &str| {
            format!(
                "search --no-floppy --fs-uuid --set=dev {uuid}\nset prefix=($dev){path}\nexport $prefix\nconfigfile $prefix/grub.cfg\n"
            )
        };
        let old = lab.order.golden.filesystems.len();
        let mut boot = lab.order.golden.filesystems[0].clone();
        boot.path = Some("/boot".into());
        boot.uuid = Some("dead".into());
        lab.order.golden.filesystems.push(boot);
        // `/boot` was apart and no longer is.
        assert_eq!(retarget(&lab.context(), &debian("dead", "/grub")), debian(ROOT_UUID, "/boot/grub"));
        assert_eq!(retarget(&lab.context(), &rhel("dead", "/grub2")), rhel(ROOT_UUID, "/boot/grub2"));
        lab.order.golden.filesystems.truncate(old);
        with_boot(&mut lab);
        // It was not, and is.
        assert_eq!(retarget(&lab.context(), &debian(ROOT_UUID, "/boot/grub")), debian(BOOT_UUID, "/grub"));
        assert_eq!(retarget(&lab.context(), &rhel(ROOT_UUID, "/boot/grub2")), rhel(BOOT_UUID, "/grub2"));
        for right in [debian(BOOT_UUID, "/grub"), rhel(BOOT_UUID, "/grub2")] {
            assert_eq!(retarget(&lab.context(), &right), right);
        }
        // A whole menu is made anew elsewhere.
        let menu = format!("{}linux /boot/k\n", debian(ROOT_UUID, "/boot/grub"));
        assert_eq!(retarget(&lab.context(), &menu), menu);
    }

    fn file(path: &str, on: Option<Spec>) -> BootFile {
        BootFile { path: path.into(), on }
    }

    #[test]
    fn names_kernels_and_initrds_are_found() {
        let found = parse(&CFG.replace("UUID\n", &format!("{ROOT_UUID}\n")));
        assert_eq!(found.kernels, [file("/boot/vmlinuz-6.1", Some(Spec::Uuid(ROOT_UUID.into())))]);
        assert_eq!(found.initrds, [file("/boot/initrd.img-6.1", Some(Spec::Uuid(ROOT_UUID.into())))]);
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
    fn red_hats_menu_leads_to_boot_entries() {
        let text = "set kernelopts=\"root=UUID=dead ro resume=UUID=beef\"\nblscfg\n";
        let found = parse(text);
        assert!(found.blscfg && found.kernels.is_empty() && !found.leads_on);
        assert_eq!(found.names.len(), 2);
        assert_eq!(
            parse("linux ($root)/vmlinuz root=$x\ninitrd ($root)/i.img $tuned_initrd\n").initrds,
            [file("($root)/i.img", None)]
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
            prop_assert_eq!(missing(&context, &found).len(), found.kernels.len() + found.initrds.len());
            let _ = retarget(&context, &text);
        }
    }
}
