//! Whether a layout makes sense, before any disk is looked at. Every problem is found, not the first only.

use crate::fit;
use crate::model::{Content, Format, Fs, Layout, Partition, Subvolume, TableKind};
use crate::size::{Bounds, Size};
use crate::stack::{self, Base};
use crate::types;
use uuid::Uuid;

/// What a problem is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// The whole file.
    File,
    /// The `[[disk]]` of this index.
    Disk(usize),
    /// The `[[partition]]` of this index.
    Partition(usize),
    /// This volume.
    Volume(Base),
}

/// Something that is wrong with a layout.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Where.
    pub place: Place,
    /// What, in words; it names the disk or partition.
    pub message: String,
}

/// The transports that a rule can name.
pub const TRANSPORTS: &[&str] =
    &["sata", "nvme", "virtio", "ide", "scsi", "sas", "usb", "mmc", "xen", "loop", "other"];

/// Words in mkfs options that make it use another device.
const DEVICE_WORDS: &[&str] = &["device=", "logdev=", "rtdev=", "name="];

/// Everything that is wrong with `layout`; empty when it can be used.
#[must_use]
pub fn check(layout: &Layout) -> Vec<Problem> {
    let mut problems = Vec::new();
    let mut say = |place: Place, message: String| {
        let message = match place {
            Place::File => message,
            Place::Disk(i) => format!("[[disk]] `{}`: {message}", layout.disks[i].name),
            Place::Partition(i) => format!("{}: {message}", layout.partition_text(i)),
            Place::Volume(base) => format!("{}: {message}", layout.base_text(base)),
        };
        problems.push(Problem { place, message });
    };
    if layout.version != 1 {
        say(Place::File, format!("version {} is not known; this program reads version 1", layout.version));
    }
    if layout.disks.is_empty() {
        say(Place::File, "there is no [[disk]]".into());
    }
    for (i, disk) in layout.disks.iter().enumerate() {
        let mut say = |message| say(Place::Disk(i), message);
        if disk.name.is_empty() {
            say("its name is empty".into());
        }
        if layout.disks[..i].iter().any(|d| d.name == disk.name) {
            say("another has the same name".into());
        }
        if let Some(Err(e)) = disk.matching.size.as_deref().map(str::parse::<Bounds>) {
            say(format!("match.size: {e}"));
        }
        for transport in disk.matching.transport.iter().flatten() {
            if !TRANSPORTS.contains(&transport.as_str()) {
                say(format!("match.transport: `{transport}` is not known ({})", TRANSPORTS.join(", ")));
            }
        }
        if let Some(uuid) = &disk.uuid {
            let fits = match disk.table {
                TableKind::Gpt => is_uuid(uuid),
                TableKind::Mbr => uuid.len() == 8 && uuid.bytes().all(|b| b.is_ascii_hexdigit()),
            };
            if !fits {
                say(match disk.table {
                    TableKind::Gpt => format!("uuid: `{uuid}` is not a UUID"),
                    TableKind::Mbr => format!("uuid: `{uuid}` is not eight hex digits"),
                });
            }
        }
    }
    for (i, partition) in layout.partitions.iter().enumerate() {
        check_partition(layout, i, partition, &mut |message| say(Place::Partition(i), message));
    }
    for disk in 0..layout.disks.len() {
        check_disk(layout, disk, &mut say);
    }
    stack::check(layout, &mut say);
    check_contents(layout, &mut say);
    problems
}

fn is_uuid(text: &str) -> bool {
    text.len() == 36 && Uuid::try_parse(text).is_ok_and(|u| !u.is_nil())
}

/// What needs all partitions of a disk together.
fn check_disk(layout: &Layout, disk: usize, say: &mut dyn FnMut(Place, String)) {
    let rule = &layout.disks[disk];
    let of_disk = || layout.partitions_of(disk);
    let percent: u32 = of_disk()
        .filter_map(|(_, p)| match p.size.parse() {
            Ok(Size::Percent(percent)) => Some(percent),
            _ => None,
        })
        .sum();
    if percent > 100 {
        say(Place::Disk(disk), format!("its partitions ask for {percent} % of it: they overlap"));
    }
    if rule.table == TableKind::Mbr
        && let Some((second, _)) = of_disk().filter(|(_, p)| p.bootable).nth(1)
    {
        say(Place::Partition(second), "only one partition can be bootable on mbr".into());
    }
    match fit::numbers(layout, disk) {
        Err((index, message)) => say(Place::Partition(index), message),
        // A size or start that does not parse was reported with its partition.
        Ok(_) => {
            if let Err(e @ fit::FitError::Overlap { .. }) = fit::check_overlap(layout, disk) {
                say(Place::Disk(disk), e.to_string());
            }
        }
    }
}

fn check_partition(layout: &Layout, index: usize, partition: &Partition, say: &mut dyn FnMut(String)) {
    let disk = layout.disk_of(partition).map(|i| &layout.disks[i]);
    match (&partition.disk, disk) {
        (Some(name), None) => say(format!("there is no [[disk]] named `{name}`")),
        (None, None) if layout.disks.len() > 1 => {
            say("it must name its disk, as there are several".into());
        }
        _ => {}
    }
    let size = partition.size.parse::<Size>();
    match &size {
        Err(e) => say(format!("size: {e}")),
        Ok(size) if partition.weight.is_some() && !size.is_flexible() => {
            say("weight: only a range or fill has a share of what is left over".into());
        }
        Ok(_) => {}
    }
    if partition.weight.is_some_and(|w| w == 0 || w > 1000) {
        say("weight: it is not between 1 and 1000".into());
    }
    if let Some(Err(e)) = partition.start.as_deref().map(fit::start_mib) {
        say(e);
    }
    let before = &layout.partitions[..index];
    if let Some(disk) = disk {
        if let Err(e) = types::code(&partition.kind, disk.table) {
            say(e);
        }
        if disk.table == TableKind::Mbr {
            if partition.name.is_some() {
                say("name: partitions have names on gpt only".into());
            }
            if partition.uuid.is_some() {
                say("uuid: partitions have UUIDs of their own on gpt only".into());
            }
        }
        if types::is_bios_boot(&partition.kind, disk.table) && partition.format.is_some() {
            say("format: a bios-boot partition holds no file system".into());
        }
        let fs = partition.format.as_ref().map(|f| f.fs);
        if types::is_bios_boot(&partition.kind, disk.table) && partition.raw {
            say("raw: the boot loader writes into a bios-boot partition by itself".into());
        }
        if types::is_esp(&partition.kind, disk.table) && fs.is_some_and(|fs| fs != Fs::Vfat) {
            say("format: an EFI system partition must be vfat".into());
        }
    }
    if let Some(name) = &partition.name
        && (name.encode_utf16().count() > 36 || name.chars().any(char::is_control))
    {
        say("name: it has control characters or is longer than 36 UTF-16 units".into());
    }
    if let Some(uuid) = &partition.uuid {
        if !is_uuid(uuid) {
            say(format!("uuid: `{uuid}` is not a UUID"));
        }
        if before.iter().filter_map(|p| p.uuid.as_ref()).any(|u| u.eq_ignore_ascii_case(uuid)) {
            say(format!("uuid: {uuid} is used twice"));
        }
    }
    check_kept(partition, say);
}

/// The file system and the mount points of every partition and volume.
fn check_contents(layout: &Layout, say: &mut dyn FnMut(Place, String)) {
    let partitions = (0..layout.partitions.len()).map(Base::Partition);
    let raids = (0..layout.raids.len()).map(Base::Raid);
    let luks = (0..layout.luks.len()).map(Base::Luks);
    let lvs = (0..layout.lvs.len()).map(Base::Lv);
    let (mut uuids, mut paths) = (Vec::new(), Vec::new());
    for base in partitions.chain(raids).chain(luks).chain(lvs) {
        let Some(content) = layout.content_of(base) else { continue };
        let place = match base {
            Base::Partition(i) => Place::Partition(i),
            other => Place::Volume(other),
        };
        let mut say = |message: String| say(place, message);
        if let Some(format) = content.format {
            check_format(format, &mut say);
            if let Some(own) = format.uuid.as_deref().filter(|u| !is_word(u)).map(str::to_ascii_lowercase) {
                if uuids.contains(&own) {
                    say(format!("format.uuid: {own} is used twice"));
                }
                uuids.push(own);
            }
        }
        if let Some(mount) = content.mount {
            if content.format.is_none() && !content.kept {
                say("mount: there is no file system to mount (no format or preserve)".into());
            }
            if content.format.is_some_and(|f| f.fs == Fs::Swap) {
                say("mount: swap is not mounted".into());
            }
            check_mount("mount", &mount.path, mount.options.as_deref(), &mut say);
        }
        check_subvolumes(content, &mut say);
        for mount in content.mounts() {
            if paths.contains(&mount.path) {
                say(format!("mount.path: {} is used twice", mount.path));
            }
            paths.push(mount.path);
        }
    }
}

/// Preserve and raw.
fn check_kept(partition: &Partition, say: &mut dyn FnMut(String)) {
    if partition.format.is_some() {
        if partition.preserve {
            say("preserve keeps what is there: it cannot be formatted as well".into());
        }
        if partition.raw {
            say("raw content brings its own file system: it cannot be formatted as well".into());
        }
    }
    if partition.preserve && partition.raw {
        say("preserve and raw exclude each other".into());
    }
    if partition.raw && partition.mount.is_some() {
        say("raw: mount cannot be given: it is not mounted while the node is installed, and a line of the golden /etc/fstab that \
             names what the content brings (UUID=, LABEL=) holds without it"
            .into());
    }
    if partition.preserve {
        check_preserved(partition, say);
    }
}

fn check_mount(key: &str, path: &str, options: Option<&str>, say: &mut dyn FnMut(String)) {
    if let Err(e) = check_path(path) {
        say(format!("{key}.path: {e}"));
    }
    if options.is_some_and(|o| o.is_empty() || o.contains(|c: char| c.is_whitespace() || c.is_control())) {
        say(format!("{key}.options: they are empty or contain white space"));
    }
}

/// A preserved partition is named by its number and checked against what is given; nothing of it can be set.
fn check_preserved(partition: &Partition, say: &mut dyn FnMut(String)) {
    if partition.number.is_none() {
        say("preserve: the number of the partition must be given".into());
    }
    if matches!(partition.size.parse(), Ok(Size::Percent(_))) {
        say("preserve: size is what the partition must have; a percentage says nothing".into());
    }
    if partition.mount.as_ref().is_some_and(|mount| mount.path == "/") {
        say("preserve: the golden tree is restored at /, so what is mounted there cannot be kept".into());
    }
    let given = [
        ("start", partition.start.is_some()),
        ("weight", partition.weight.is_some()),
        ("name", partition.name.is_some()),
        ("bootable", partition.bootable),
    ];
    for (key, _) in given.iter().filter(|(_, given)| *given) {
        say(format!("preserve keeps the partition as it is: {key} cannot be set"));
    }
}

/// The subvolumes of a btrfs: names as the kernel takes them in `subvol=`, no name twice, one default.
fn check_subvolumes(content: Content<'_>, say: &mut dyn FnMut(String)) {
    let subvolumes = content.subvolumes;
    if !subvolumes.is_empty() && content.format.is_none_or(|f| f.fs != Fs::Btrfs) {
        say("subvolumes: only a btrfs that is made here (format) has them".into());
    }
    for (i, subvolume) in subvolumes.iter().enumerate() {
        let Subvolume { name, path, options, default } = subvolume;
        let mut say = |message: String| say(format!("subvolumes: `{}`: {message}", name.escape_debug()));
        let bad = |c: char| c.is_whitespace() || c.is_control() || c == ',' || c == '\\';
        if name.contains(bad) || name.split('/').any(|p| p.is_empty() || p == "." || p == "..") {
            say("its name is empty, begins or ends with `/`, or contains `..`, white space, `,` or a backslash".into());
        }
        if name.split('/').any(|part| part.len() > 255) {
            say("a part of its name is longer than 255 bytes".into());
        }
        if subvolumes[..i].iter().any(|s| s.name == *name) {
            say("another has the same name".into());
        }
        if *default && subvolumes[..i].iter().any(|s| s.default) {
            say("only one can be the default".into());
        }
        match path {
            Some(path) => check_mount("mount", path, options.as_deref(), &mut say),
            None if options.is_some() => say("options: it is not mounted (no path)".into()),
            None => {}
        }
        let names_one = |word: &str| word.starts_with("subvol=") || word.starts_with("subvolid=");
        if options.as_ref().is_some_and(|o| o.split(',').any(names_one)) {
            say("options: subvol= comes from its name".into());
        }
    }
}

fn is_word(uuid: &str) -> bool {
    uuid == "keep" || uuid == "new"
}

fn check_path(path: &str) -> Result<(), String> {
    if !path.starts_with('/') {
        return Err(format!("`{path}` is not absolute"));
    }
    if path.contains(|c: char| c.is_whitespace() || c.is_control()) {
        return Err(format!("`{}` contains white space", path.escape_debug()));
    }
    let mut parts = path[1..].split('/');
    if path != "/" && parts.any(|p| p.is_empty() || p == "." || p == "..") {
        return Err(format!("`{path}` contains `..`, `.`, `//` or ends with `/`"));
    }
    Ok(())
}

fn check_format(format: &Format, say: &mut dyn FnMut(String)) {
    if let Some(uuid) = format.uuid.as_deref().filter(|u| !is_word(u)) {
        let fits = match format.fs {
            Fs::Vfat => is_fat_id(uuid),
            _ => is_uuid(uuid),
        };
        if !fits {
            say(match format.fs {
                Fs::Vfat => format!("format.uuid: `{uuid}` is not keep, new or a vfat id like ABCD-1234"),
                _ => format!("format.uuid: `{uuid}` is not keep, new or a UUID"),
            });
        }
    }
    if let Some(label) = &format.label {
        let limit = label_limit(format.fs);
        if label.is_empty() || label.len() > limit || label.chars().any(char::is_control) {
            say(format!(
                "format.label: `{}` is empty, has control characters or is longer than the {limit} bytes that {} allows",
                label.escape_debug(),
                format.fs.name()
            ));
        }
    }
    for word in &format.options {
        // A further device on mkfs's command line would be written as well, though no rule chose it.
        if word.contains('/') || word.contains('\0') || DEVICE_WORDS.iter().any(|w| word.contains(w)) {
            say(format!("format.options: `{}` names a device or a file", word.escape_debug()));
        }
    }
}

/// Whether `text` is a vfat volume id as blkid prints it: `ABCD-1234`.
#[must_use]
pub fn is_fat_id(text: &str) -> bool {
    let bytes = text.as_bytes();
    bytes.len() == 9
        && bytes.iter().enumerate().all(|(i, b)| if i == 4 { *b == b'-' } else { b.is_ascii_hexdigit() })
}

/// The longest label of a file system, in bytes.
#[must_use]
pub const fn label_limit(fs: Fs) -> usize {
    match fs {
        Fs::Ext2 | Fs::Ext3 | Fs::Ext4 => 16,
        Fs::Xfs => 12,
        Fs::Btrfs => 255,
        Fs::Vfat => 11,
        Fs::Swap => 15,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Mount;
    use std::collections::BTreeSet;

    const BASE: &str = r#"version = 1
[[disk]]
name = "system"
table = "gpt"
[[partition]]
type = "linux"
size = "fill"
format = { fs = "ext4" }
mount = { path = "/" }
"#;

    fn messages(change: impl FnOnce(&mut Layout)) -> BTreeSet<String> {
        let mut layout: Layout = toml::from_str(BASE).unwrap();
        change(&mut layout);
        check(&layout).into_iter().map(|p| p.message).collect()
    }

    fn only(change: impl FnOnce(&mut Layout)) -> String {
        let messages = messages(change);
        assert_eq!(messages.len(), 1, "{messages:?}");
        messages.into_iter().next().unwrap()
    }

    #[test]
    fn subvolumes_make_sense() {
        let with = |subvolumes: &str| {
            let text = BASE.replace("\"ext4\" }", &format!("\"btrfs\" }}\nsubvolumes = {subvolumes}"));
            let layout: Layout = toml::from_str(&text).unwrap();
            check(&layout)
                .into_iter()
                .map(|p| p.message.replace("[[partition]] #1 (/): ", ""))
                .collect::<Vec<_>>()
        };
        let none: [&str; 0] = [];
        assert_eq!(
            with(
                r#"[{ name = "@a/b", path = "/a", options = "compress=zstd" }, { name = "c", default = true }]"#
            ),
            none
        );
        assert_eq!(with(r#"[{ name = "@", path = "/" }]"#), ["mount.path: / is used twice"]);
        for name in ["", "/a", "a/", "a/../b", "a b", "a,b", "."] {
            let found = with(&format!("[{{ name = \"{name}\" }}]"));
            assert!(
                found.len() == 1 && found[0].contains("its name is empty, begins or ends with"),
                "{found:?}"
            );
        }
        assert_eq!(
            with(r#"[{ name = "a", default = true }, { name = "a", default = true }]"#),
            ["subvolumes: `a`: another has the same name", "subvolumes: `a`: only one can be the default"]
        );
        assert_eq!(
            with(r#"[{ name = "a", options = "x" }, { name = "b", path = "/b", options = "subvolid=5" }]"#),
            [
                "subvolumes: `a`: options: it is not mounted (no path)",
                "subvolumes: `b`: options: subvol= comes from its name"
            ]
        );
        assert_eq!(
            only(|l| l.partitions[0].subvolumes.push(Subvolume {
                name: "a".into(),
                path: None,
                options: None,
                default: false
            })),
            "[[partition]] #1 (/): subvolumes: only a btrfs that is made here (format) has them"
        );
    }

    #[test]
    fn the_base_is_sound() {
        assert!(messages(|_| {}).is_empty());
    }

    #[test]
    fn each_mistake_is_named() {
        assert_eq!(only(|l| l.version = 2), "version 2 is not known; this program reads version 1");
        assert_eq!(
            only(|l| l.disks[0].matching.size = Some("8".repeat(30))),
            "[[disk]] `system`: match.size: `888888888888888888888888888888` is not a range of disk sizes (examples: 8G-, \
             -2T, 100G-500G)"
        );
        assert_eq!(
            only(|l| l.disks[0].matching.transport = Some(vec!["sta".into()])),
            "[[disk]] `system`: match.transport: `sta` is not known (sata, nvme, virtio, ide, scsi, sas, usb, mmc, xen, \
             loop, other)"
        );
        assert_eq!(
            only(|l| l.disks[0].uuid = Some("x".into())),
            "[[disk]] `system`: uuid: `x` is not a UUID"
        );
        assert_eq!(
            only(|l| l.partitions[0].disk = Some("sytem".into())),
            "[[partition]] #1 (/): there is no [[disk]] named `sytem`"
        );
        assert_eq!(
            only(|l| l.disks.push({
                let mut d = l.disks[0].clone();
                d.name = "data".into();
                d
            })),
            "[[partition]] #1 (/): it must name its disk, as there are several"
        );
        assert_eq!(
            only(|l| l.partitions[0].start = Some("1000".into())),
            "[[partition]] #1 (/): start: `1000` is not a multiple of 1M above 0"
        );
        for path in ["boot", "/a/../b", "/a//b", "/a/", "/.", "/a b", ""] {
            let text = only(|l| l.partitions[0].mount = Some(Mount { path: path.into(), options: None }));
            assert!(text.contains("mount.path: `"), "{text}");
        }
        for (fs, uuid, sound) in [
            (Fs::Ext4, "5c8ba1a8-9d6f-4d21-8b6b-2a0a1f9e1a11", true),
            (Fs::Ext4, "ABCD-1234", false),
            (Fs::Vfat, "ABCD-1234", true),
            (Fs::Vfat, "5c8ba1a8-9d6f-4d21-8b6b-2a0a1f9e1a11", false),
            (Fs::Vfat, "ABCD1-234", false),
            (Fs::Vfat, "keep", true),
            (Fs::Xfs, "new", true),
            (Fs::Xfs, "5c8ba1a89d6f4d218b6b2a0a1f9e1a11", false),
        ] {
            let found = messages(|l| {
                let format = l.partitions[0].format.as_mut().unwrap();
                format.fs = fs;
                format.uuid = Some(uuid.into());
            });
            assert_eq!(found.is_empty(), sound, "{fs:?} {uuid}: {found:?}");
        }
        assert_eq!(
            only(|l| l.partitions[0].kind = "esp".into()),
            "[[partition]] #1 (/): format: an EFI system partition must be vfat"
        );
        assert_eq!(
            only(|l| l.partitions[0].format = None),
            "[[partition]] #1 (/): mount: there is no file system to mount (no format or preserve)"
        );
        assert_eq!(
            only(|l| l.partitions[0].weight = Some(0)),
            "[[partition]] #1 (/): weight: it is not between 1 and 1000"
        );
        assert_eq!(
            only(|l| {
                l.disks[0].table = TableKind::Mbr;
                l.partitions[0].name = Some("root".into());
            }),
            "[[partition]] #1 (/): name: partitions have names on gpt only"
        );
    }

    #[test]
    fn raw_content_is_neither_made_nor_mounted_nor_written_into() {
        let raw = |change: &dyn Fn(&mut Partition)| {
            let found = messages(|l| {
                let mut sent = l.partitions[0].clone();
                (sent.format, sent.mount, sent.raw, sent.size) = (None, None, true, "1G".into());
                change(&mut sent);
                l.partitions.push(sent);
            });
            Vec::from_iter(found)
        };
        assert_eq!(raw(&|_| ()), [""; 0]);
        let mount = raw(&|p| p.mount = Some(Mount { path: "/recovery".into(), options: None }));
        assert!(
            mount.len() == 1 && mount[0].contains("(/recovery): raw: mount cannot be given"),
            "{mount:?}"
        );
        let boot = raw(&|p| p.kind = "bios-boot".into());
        assert!(boot.len() == 1 && boot[0].contains("writes into a bios-boot partition"), "{boot:?}");
        let both = raw(&|p| (p.preserve, p.number) = (true, Some(5)));
        assert!(both.iter().any(|m| m.ends_with("preserve and raw exclude each other")), "{both:?}");
    }

    #[test]
    fn the_root_is_not_preserved() {
        let preserve = |path: &str| {
            let path = path.to_owned();
            messages(move |l| {
                let mut kept = l.partitions[0].clone();
                (kept.format, kept.preserve, kept.number) = (None, true, Some(5));
                kept.mount = Some(Mount { path: path.clone(), options: None });
                l.partitions[0].mount = (path != "/").then(|| Mount { path: "/".into(), options: None });
                l.partitions.push(kept);
            })
        };
        assert_eq!(preserve("/home"), BTreeSet::new());
        let found = preserve("/");
        assert!(
            found.len() == 1 && found.first().unwrap().contains("the golden tree is restored at /"),
            "{found:?}"
        );
    }

    #[test]
    fn mkfs_is_never_given_another_device() {
        for option in ["/dev/sdb", "-J device=UUID=1", "logdev=sdb", "../x", "rtdev=x", "name=img"] {
            let text = only(|l| l.partitions[0].format.as_mut().unwrap().options = vec![option.into()]);
            assert_eq!(
                text,
                format!("[[partition]] #1 (/): format.options: `{option}` names a device or a file")
            );
        }
    }

    #[test]
    fn uuids_are_used_once() {
        let id = "5c8ba1a8-9d6f-4d21-8b6b-2a0a1f9e1a11";
        let text = only(|l| {
            l.partitions[0].format.as_mut().unwrap().uuid = Some(id.into());
            let mut second = l.partitions[0].clone();
            second.mount = None;
            second.format.as_mut().unwrap().uuid = Some(id.to_uppercase());
            l.partitions.push(second);
        });
        assert_eq!(text, format!("[[partition]] #2 (ext4): format.uuid: {id} is used twice"));
    }

    #[test]
    fn labels_have_limits() {
        for (fs, longest) in [(Fs::Ext4, 16), (Fs::Xfs, 12), (Fs::Vfat, 11), (Fs::Swap, 15)] {
            for (length, sound) in [(longest, true), (longest + 1, false), (0, false)] {
                let found = messages(|l| {
                    l.partitions[0].mount = None;
                    let format = l.partitions[0].format.as_mut().unwrap();
                    format.fs = fs;
                    format.label = Some("x".repeat(length));
                });
                assert_eq!(found.is_empty(), sound, "{fs:?} {length}: {found:?}");
            }
        }
    }
}
