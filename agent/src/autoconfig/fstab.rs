//! `/etc/fstab` of the clone: lines whose names still hold stay byte for byte; names that changed are rewritten in their
//! column; what the layout mounts and fstab lacks is added. A local device that this node does not have is an error,
//! unless a machine starts without it, as without swap, an EFI system partition that the layout does not have, and what says
//! `noauto` or `nofail`: then the line is commented out, with the reason.

use super::names::{Meaning, Spec, name_like};
use super::root::from_bytes;
use super::{Change, Context, Piece, subvolumes};
use anyhow::{Result, bail};
use ka_layout::model::Fs;
use ka_layout::order::Volume;
use std::path::Path;

/// The file.
pub const PATH: &str = "/etc/fstab";
/// Drives of removable media: they belong to the machine and not to the clone.
const REMOVABLE: &[&str] = &["/dev/sr", "/dev/scd", "/dev/cdrom", "/dev/dvd", "/dev/fd0", "/dev/floppy"];

/// Options that mount(8) lists as independent of the file system.
const FOR_EVERY_KIND: &[&str] = &[
    "async",
    "atime",
    "auto",
    "defaults",
    "dev",
    "diratime",
    "dirsync",
    "exec",
    "group",
    "iversion",
    "lazytime",
    "mand",
    "noatime",
    "noauto",
    "nodev",
    "nodiratime",
    "noexec",
    "nofail",
    "noiversion",
    "nolazytime",
    "nomand",
    "norelatime",
    "nostrictatime",
    "nosuid",
    "nosymfollow",
    "nouser",
    "owner",
    "relatime",
    "ro",
    "rw",
    "silent",
    "strictatime",
    "suid",
    "sync",
    "user",
    "users",
    "_netdev",
];

/// The piece.
pub struct Fstab;

impl Piece for Fstab {
    fn name(&self) -> &'static str {
        "fstab"
    }

    fn apply(&self, context: &Context) -> Result<Vec<Change>> {
        let old = context.root.read_text(PATH)?.unwrap_or_default();
        let mut changes = Vec::new();
        let mut lines = Vec::new();
        let mut problems = Vec::new();
        for line in old.lines() {
            match with_subvolume(context, line, rewrite(context, line)) {
                Outcome::Keep => lines.push(line.to_owned()),
                Outcome::Replace(new, what) => {
                    changes.push(Change::new("fstab", PATH, what));
                    lines.push(new);
                }
                Outcome::Drop(what) => changes.push(Change::new("fstab", PATH, what)),
                Outcome::Fail(problem) => problems.push(problem),
            }
        }
        if !problems.is_empty() {
            bail!(
                "checking {PATH} of the clone: {}; give the layout a partition for it, mark the line nofail, or drop it \
                 by policy",
                problems.join("; ")
            );
        }
        for line in missing(context, &lines) {
            changes.push(Change::new("fstab", PATH, format!("added: {line}")));
            let at = place_for(&lines, &line);
            lines.insert(at, line);
        }
        if !changes.is_empty() {
            let mut text = lines.join("\n");
            text.push('\n');
            if !context.root.write_text(PATH, &text, 0o644)? {
                let wanted: Vec<&str> = changes.iter().map(|c| c.what.as_str()).collect();
                let what = format!("kept by policy; else: {}", wanted.join("; "));
                return Ok(vec![Change::warning("fstab", PATH, what)]);
            }
        }
        Ok(changes)
    }
}

/// What becomes of a line.
enum Outcome {
    Keep,
    Replace(String, String),
    Drop(String),
    Fail(String),
}

/// The fields of a line of fstab.
#[derive(Debug, Clone, Copy)]
pub struct Line<'a> {
    /// What is mounted, as written.
    pub spec: &'a str,
    /// Where, as written (`\040` stands for a space).
    pub dir: &'a str,
    /// The kind of file system.
    pub kind: &'a str,
    /// The options, separated by commas.
    pub options: &'a str,
}

impl<'a> Line<'a> {
    /// Reads a line; none when it is empty, a comment or no fstab line.
    pub fn parse(line: &'a str) -> Option<Self> {
        let mut fields = line.split_ascii_whitespace();
        let spec = fields.next().filter(|s| !s.starts_with('#'))?;
        let (dir, kind) = (fields.next()?, fields.next()?);
        Some(Self { spec, dir, kind, options: fields.next().unwrap_or("defaults") })
    }

    /// Whether one of the options is `word`.
    pub fn has(&self, word: &str) -> bool {
        self.options.split(',').any(|o| o == word)
    }

    /// Whether the machine boots without it.
    pub fn is_optional(&self) -> bool {
        self.has("noauto") || self.has("nofail")
    }

    /// The block device that it names; none for network and pseudo file systems, bind mounts, files, removable drives.
    pub fn device(&self) -> Option<Spec> {
        if REMOVABLE.iter().any(|r| self.spec.starts_with(r)) {
            return None;
        }
        Spec::parse(&unescape_octal(self.spec))
    }

    pub fn mount_path(&self) -> String {
        let path = unescape_octal(self.dir);
        if path.len() > 1 { path.trim_end_matches('/').to_owned() } else { path }
    }

    pub fn is_swap(&self) -> bool {
        self.kind == "swap"
    }

    /// Whether it is an EFI system partition, which a machine that BIOS starts need not have; where UEFI starts it, the
    /// layout has one.
    fn is_esp(&self) -> bool {
        self.kind == "vfat" && ["/boot/efi", "/efi"].contains(&self.mount_path().as_str())
    }

    /// Whether its kind is that of what was made on `volume`: one of a list, or any.
    pub fn is_kind_of(&self, volume: &Volume) -> bool {
        let Some(fs) = volume.fs else { return true };
        self.kind.split(',').any(|kind| {
            // One driver mounts these three.
            let is_ext = kind == "ext4" && matches!(fs, Fs::Ext2 | Fs::Ext3);
            kind == fs.name() || kind == "auto" || is_ext
        })
    }

    fn contains(&self, word: &str) -> bool {
        [self.spec, self.dir, self.kind].contains(&word) || self.has(word)
    }
}

fn rewrite(context: &Context, line: &str) -> Outcome {
    let Some(fields) = Line::parse(line) else { return Outcome::Keep };
    if let Some(word) = context.order.policy.drop_fstab.iter().find(|w| fields.contains(w)) {
        return Outcome::Drop(format!("dropped by policy ({word}): {line}"));
    }
    if fields.is_swap() && fields.spec.starts_with('/') && !fields.spec.starts_with("/dev/") {
        // Swap files are not copied, so the clone may not have it.
        return if context.root.exists(unescape_octal(fields.spec)) {
            Outcome::Keep
        } else {
            comment_out(line, &format!("the swap file {} was not cloned", fields.spec))
        };
    }
    let Some(spec) = fields.device() else { return Outcome::Keep };
    let volume = match context.names().meaning(&spec) {
        Meaning::Kept(kept) => match by_place(context, &fields) {
            // Subvolumes share a UUID; the layout gives this one a file system of its own.
            Some(volume) if kept.fs == Some(Fs::Btrfs) && volume.device != kept.device => volume,
            _ => return with_kind(line, &fields, kept),
        },
        Meaning::Renamed(volume) => volume,
        Meaning::NotHere(_) | Meaning::Unknown => match by_place(context, &fields) {
            Some(volume) if spec.is_stable() && spec.names(volume) => {
                return with_kind(line, &fields, volume);
            }
            Some(volume) => volume,
            None if fields.is_optional() || fields.is_swap() || fields.is_esp() => {
                return comment_out(line, &format!("{} does not exist on this node", fields.spec));
            }
            None => {
                return Outcome::Fail(format!(
                    "{} (mounted at {}) does not exist on this node",
                    fields.spec, fields.dir
                ));
            }
        },
    };
    let Some(name) = name_like(volume, fields.spec) else {
        return Outcome::Fail(format!("{} ({}) has no stable name on this node", fields.spec, volume.device));
    };
    match replace_spec_and_kind(line, &fields, &name, volume) {
        Some(new) => Outcome::Replace(new, format!("{} is now {name} ({})", fields.spec, fields.dir)),
        None => Outcome::Fail(format!("{} cannot be rewritten", fields.spec)),
    }
}

/// The line whose name holds; its kind may not, where the layout makes another file system of that name.
fn with_kind(line: &str, fields: &Line, volume: &Volume) -> Outcome {
    let Some(fs) = volume.fs.filter(|_| !fields.is_kind_of(volume)) else { return Outcome::Keep };
    let reason = format!("{} is {} on this node", fields.spec, fs.name());
    if fields.is_swap() || (fs == Fs::Swap && fields.is_optional()) {
        return comment_out(line, &reason);
    }
    match replace_spec_and_kind(line, fields, fields.spec, volume).filter(|_| fs != Fs::Swap) {
        Some(new) => Outcome::Replace(new, format!("{reason} ({})", fields.dir)),
        None => Outcome::Fail(format!("{reason} and cannot be mounted at {} as {}", fields.dir, fields.kind)),
    }
}

/// The same with the subvolume that the layout mounts there; a line without the field of options has none.
fn with_subvolume(context: &Context, line: &str, outcome: Outcome) -> Outcome {
    let (now, what) = match &outcome {
        Outcome::Keep => (line, None),
        Outcome::Replace(new, what) => (new.as_str(), Some(what)),
        Outcome::Drop(_) | Outcome::Fail(_) => return outcome,
    };
    let Some(fields) = Line::parse(now).filter(|f| !f.is_swap()) else { return outcome };
    let volume = by_place(context, &fields).filter(|v| fields.device().is_some_and(|s| s.names(v)));
    let options = volume.and_then(|v| subvolumes::options(&fields, v));
    let Some((new, options)) = options.and_then(|o| Some((subvolumes::replace_options(now, &o)?, o))) else {
        return outcome;
    };
    let changed = format!("the options of {} are now {options}", fields.dir);
    Outcome::Replace(new, what.map_or_else(|| changed.clone(), |what| format!("{what}, {changed}")))
}

/// The volume that the line must mean because of where it is mounted; for swap, the node's only one.
fn by_place<'a>(context: &'a Context, fields: &Line) -> Option<&'a Volume> {
    if fields.is_swap() {
        let mut swaps = context.volumes.iter().filter(|v| v.fs == Some(Fs::Swap));
        return swaps.next().filter(|_| swaps.next().is_none());
    }
    let path = fields.mount_path();
    context.volumes.iter().find(|v| v.mount.as_ref().is_some_and(|m| from_bytes(m.path.as_bytes()) == path))
}

fn comment_out(line: &str, reason: &str) -> Outcome {
    Outcome::Replace(format!("# ka: {reason}:\n#{line}"), format!("commented out, {reason}: {line}"))
}

/// Replaces the first field, and the third where the volume has another kind of file system, with the options that this
/// does not know; all else stays in place.
fn replace_spec_and_kind(line: &str, fields: &Line, name: &str, volume: &Volume) -> Option<String> {
    let start = line.find(fields.spec)?;
    let mut new = format!("{}{name}{}", &line[..start], &line[start + fields.spec.len()..]);
    // Blocks bring the kind that they have.
    let kind = volume.fs.map_or(fields.kind, |fs| fs.name());
    if fields.kind != kind && fields.kind != "auto" {
        let dir = new.find(fields.dir).filter(|&at| at >= start + name.len());
        // The mount point may occur within the new name; then it is looked for behind it.
        let dir =
            dir.or_else(|| new[start + name.len()..].find(fields.dir).map(|at| at + start + name.len()))?;
        let after = dir + fields.dir.len();
        let at = after + new[after..].find(fields.kind)?;
        new.replace_range(at..at + fields.kind.len(), kind);
        let said = volume.mount.as_ref().and_then(|m| m.options.as_deref());
        // A line without a fourth field has none to be wrong.
        new = subvolumes::replace_options(&new, &portable(fields.options, said)).unwrap_or(new);
    }
    Some(new)
}

/// What is left of `options` on another kind of file system, and what the layout says of that: an option that it does not know
/// would make every remount fail, and `/` stay read-only.
fn portable(options: &str, said: Option<&str>) -> String {
    let every = |word: &&str| FOR_EVERY_KIND.contains(word) || word.starts_with("x-");
    let mut words: Vec<&str> = options.split(',').filter(every).collect();
    for word in said.into_iter().flat_map(|said| said.split(',')) {
        if !words.contains(&word) {
            words.push(word);
        }
    }
    if words.is_empty() { "defaults".to_owned() } else { words.join(",") }
}

/// Lines for what the layout mounts, and for swap, where no line does yet.
fn missing(context: &Context, lines: &[String]) -> Vec<String> {
    let present: Vec<Line> = lines.iter().flat_map(|l| l.split('\n')).filter_map(Line::parse).collect();
    let mut volumes: Vec<&Volume> = context.volumes.iter().collect();
    // In the order in which they must be mounted.
    volumes.sort_by_key(|v| v.mount.as_ref().map_or(usize::MAX, |m| m.path.trim_matches('/').len()));
    let mut added = Vec::new();
    for volume in volumes {
        let (Some(fs), Some(name)) = (volume.fs, name_like(volume, "UUID=")) else { continue };
        if let Some(mount) = &volume.mount {
            let path = from_bytes(mount.path.as_bytes());
            if present.iter().any(|l| !l.is_swap() && l.mount_path() == path) {
                continue;
            }
            let default = match fs {
                Fs::Ext2 | Fs::Ext3 | Fs::Ext4 if mount.path == "/" => "errors=remount-ro",
                Fs::Vfat => "umask=0077",
                _ => "defaults",
            };
            let options = mount.options.as_deref().unwrap_or(default);
            let pass = match fs {
                Fs::Xfs | Fs::Btrfs => 0,
                _ if mount.path == "/" => 1,
                _ => 2,
            };
            added.push(format!("{name} {} {} {options} 0 {pass}", escape_octal(&mount.path), fs.name()));
        } else if fs == Fs::Swap {
            let named = |l: &Line| l.is_swap() && l.device().is_some_and(|s| s.names(volume));
            if !present.iter().any(named) {
                added.push(format!("{name} none swap sw 0 0"));
            }
        }
    }
    added
}

/// Where in `lines` a new line goes: before what is mounted below its mount point, for `mount -a` goes from top to bottom,
/// else at the end.
fn place_for(lines: &[String], new: &str) -> usize {
    let path = Line::parse(new).filter(|l| !l.is_swap()).map(|l| l.mount_path()).unwrap_or_default();
    let is_below = |line: &String| {
        // A line may be two: one that was commented out has its reason before it.
        line.lines().filter_map(Line::parse).any(|l| {
            let own = l.mount_path();
            !l.is_swap() && own != path && Path::new(&own).starts_with(&path)
        })
    };
    let first = lines.iter().position(is_below).filter(|_| !path.is_empty());
    first.unwrap_or(lines.len())
}

/// fstab writes blanks as `\040`.
fn unescape_octal(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('\\') {
        out.push_str(&rest[..at]);
        let code = rest.get(at + 1..at + 4).and_then(|octal| u8::from_str_radix(octal, 8).ok());
        if let Some(code) = code {
            out.push(char::from(code));
            rest = &rest[at + 4..];
        } else {
            out.push('\\');
            rest = &rest[at + 1..];
        }
    }
    out + rest
}

fn escape_octal(path: &str) -> String {
    let mut out = String::with_capacity(path.len());
    for c in from_bytes(path.as_bytes()).chars() {
        match c {
            ' ' | '\t' | '\n' | '\\' | '#' => out.push_str(&format!("\\{:03o}", u32::from(c))),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::super::testing::{ESP_UUID, Lab, ROOT_UUID, SWAP_UUID};
    use super::*;
    use ka_layout::model::{Mount, Subvolume};
    use proptest::prelude::*;

    fn kept() -> String {
        format!(
            "# /etc/fstab: static file system information.\n\
             \n\
             UUID={ROOT_UUID} /               ext4    errors=remount-ro 0       1\n\
             UUID={ESP_UUID}\t/boot/efi vfat umask=0077 0 1\n\
             /dev/disk/by-uuid/{SWAP_UUID} none swap sw 0 0\n\
             /dev/sr0        /media/cdrom0   udf,iso9660 user,noauto     0       0\n\
             proc /proc proc defaults 0 0\n\
             tmpfs /tmp tmpfs size=1G 0 0\n\
             server:/home /home nfs4 _netdev 0 0\n\
             //server/share /srv cifs guest 0 0\n\
             /srv/a /srv/b none bind 0 0\n"
        )
    }

    #[test]
    fn what_still_holds_is_not_touched() {
        let lab = Lab::new();
        lab.file(PATH, &kept());
        assert!(Fstab.apply(&lab.context()).unwrap().is_empty());
        assert_eq!(lab.read(PATH), kept());
    }

    #[test]
    fn a_new_line_comes_before_what_is_mounted_below_it() {
        let mut lab = Lab::new();
        let mut boot = lab.volumes[2].clone();
        boot.mount = Some(Mount { path: "/boot".into(), options: None });
        boot.uuid = Some("b007".into());
        lab.volumes.push(boot);
        lab.file(PATH, &kept());
        Fstab.apply(&lab.context()).unwrap();
        let text = lab.read(PATH);
        let at = |dir: &str| text.lines().position(|l| l.split_whitespace().nth(1) == Some(dir)).unwrap();
        assert!(at("/") < at("/boot") && at("/boot") + 1 == at("/boot/efi"), "{text}");
        assert_eq!(text.lines().count(), kept().lines().count() + 1);
    }

    #[test]
    fn kernel_names_and_ids_become_uuids_and_columns_stay() {
        let lab = Lab::new();
        lab.file(
            PATH,
            "# root\n/dev/sda3    /    ext4  defaults  0 1 # not a comment in fstab\n\
             /dev/disk/by-id/ata-GOLDEN_1-part1 /boot/efi vfat umask=0077 0 1\n/dev/sda2 none swap sw 0 0\n",
        );
        Fstab.apply(&lab.context()).unwrap();
        assert_eq!(
            lab.read(PATH),
            format!(
                "# root\nUUID={ROOT_UUID}    /    ext4  defaults  0 1 # not a comment in fstab\n\
                 UUID={ESP_UUID} /boot/efi vfat umask=0077 0 1\nUUID={SWAP_UUID} none swap sw 0 0\n"
            )
        );
    }

    #[test]
    fn suses_list_of_subvolumes_follows_the_root() {
        let mut lab = Lab::new();
        let new = "11111111-2222-4333-8444-555555555555";
        lab.renew(3, new);
        lab.volumes[2].fs = Some(Fs::Btrfs);
        lab.order.golden.filesystems[0].fs = Fs::Btrfs;
        let list = format!(
            "UUID={ROOT_UUID}  /            btrfs  defaults              0  0\n\
             UUID={ROOT_UUID}  /var         btrfs  subvol=/@/var         0  0\n\
             UUID={ROOT_UUID}  /.snapshots  btrfs  subvol=/@/.snapshots  0  0\n\
             UUID={SWAP_UUID}  swap         swap   defaults              0  0\n\
             UUID={ESP_UUID}  /boot/efi  vfat  utf8  0  2\n"
        );
        lab.file(PATH, &list);
        assert_eq!(Fstab.apply(&lab.context()).unwrap().len(), 3);
        assert_eq!(lab.read(PATH), list.replace(ROOT_UUID, new));
    }

    #[test]
    fn new_uuids_are_written_and_so_is_another_file_system() {
        let mut lab = Lab::new();
        let new = "11111111-2222-4333-8444-555555555555";
        lab.renew(3, new);
        lab.volumes[2].fs = Some(Fs::Xfs);
        lab.file(PATH, &kept());
        let changes = Fstab.apply(&lab.context()).unwrap();
        assert_eq!(changes.len(), 1, "{changes:?}");
        let wanted = kept()
            .replace(&format!("UUID={ROOT_UUID} /  "), &format!("UUID={new} /  "))
            .replace(" ext4    errors=remount-ro", " xfs    defaults");
        assert_eq!(lab.read(PATH), wanted);
        // What the layout says of it, and what every kind knows.
        lab.volumes[2].mount = Some(Mount { path: "/".into(), options: Some("noatime,pquota".into()) });
        lab.file(
            PATH,
            &kept().replace("errors=remount-ro", "nodiratime,errors=remount-ro,noatime,x-systemd.growfs"),
        );
        Fstab.apply(&lab.context()).unwrap();
        assert!(
            lab.read(PATH).contains(" xfs    nodiratime,noatime,x-systemd.growfs,pquota 0"),
            "{}",
            lab.read(PATH)
        );
    }

    #[test]
    fn another_kind_under_the_same_name_is_written() {
        let mut lab = Lab::new();
        lab.volumes[2].fs = Some(Fs::Xfs);
        // By the golden facts, and by what the volume bears where they are silent.
        for facts in [true, false] {
            if !facts {
                lab.order.golden.filesystems.clear();
            }
            for name in [format!("UUID={ROOT_UUID}"), "LABEL=label3".into()] {
                lab.file(PATH, &format!("{name}  / ext4  errors=remount-ro,noatime 0 1\nUUID={ESP_UUID} /boot/efi auto umask=0077 0 1\nUUID={SWAP_UUID} none swap sw 0 0\n"));
                assert_eq!(Fstab.apply(&lab.context()).unwrap().len(), 1);
                assert!(
                    lab.read(PATH).starts_with(&format!("{name}  / xfs  noatime 0 1\n")),
                    "{}",
                    lab.read(PATH)
                );
                assert!(Fstab.apply(&lab.context()).unwrap().is_empty(), "a second run changes nothing");
            }
        }
        // One driver for ext2, ext3 and ext4.
        lab.volumes[2].fs = Some(Fs::Ext3);
        lab.file(PATH, &kept());
        assert!(Fstab.apply(&lab.context()).unwrap().is_empty());
        // What is swap on one side only cannot be set right by its kind.
        lab.file(PATH, &format!("{}LABEL=label3 none swap sw 0 0\n", kept()));
        Fstab.apply(&lab.context()).unwrap();
        assert!(
            lab.read(PATH).contains("\n# ka: LABEL=label3 is ext3 on this node:\n#LABEL=label3 none swap")
        );
        lab.file(PATH, &format!("{}LABEL=label2 /srv ext4 defaults 0 0\n", kept()));
        let error = Fstab.apply(&lab.context()).unwrap_err().to_string();
        assert!(error.contains("LABEL=label2 is swap on this node and cannot be mounted at /srv"), "{error}");
    }

    #[test]
    fn an_empty_fstab_gets_all_mounts() {
        let mut lab = Lab::new();
        let mut data = lab.volumes[2].clone();
        data.mount = Some(Mount { path: "/srv/my data".into(), options: Some("noatime".into()) });
        data.uuid = Some("dddddddd-0000-4000-8000-000000000004".into());
        data.fs = Some(Fs::Xfs);
        lab.volumes.push(data);
        std::fs::create_dir(lab.target.join("etc")).unwrap();
        Fstab.apply(&lab.context()).unwrap();
        assert_eq!(
            lab.read(PATH),
            format!(
                "UUID={ROOT_UUID} / ext4 errors=remount-ro 0 1\n\
                 UUID={ESP_UUID} /boot/efi vfat umask=0077 0 2\n\
                 UUID=dddddddd-0000-4000-8000-000000000004 /srv/my\\040data xfs noatime 0 0\n\
                 UUID={SWAP_UUID} none swap sw 0 0\n"
            )
        );
        assert!(Fstab.apply(&lab.context()).unwrap().is_empty(), "a second run changes nothing");
    }

    #[test]
    fn a_device_that_is_not_here_is_an_error() {
        let lab = Lab::new();
        lab.file(PATH, "UUID=dead /data ext4 defaults 0 2\n/dev/mapper/vg-x /x ext4 defaults 0 2\n");
        let error = Fstab.apply(&lab.context()).unwrap_err().to_string();
        assert!(
            error.contains("UUID=dead (mounted at /data)") && error.contains("/dev/mapper/vg-x"),
            "{error}"
        );
        assert_eq!(lab.read(PATH).lines().count(), 2, "nothing was written");
    }

    #[test]
    fn swap_and_esp_that_the_layout_does_not_have_are_commented_out() {
        let mut lab = Lab::new();
        lab.volumes.retain(|v| v.mount.as_ref().is_some_and(|m| m.path == "/"));
        lab.file(PATH, &kept());
        Fstab.apply(&lab.context()).unwrap();
        let now = lab.read(PATH);
        for name in [format!("UUID={ESP_UUID}"), format!("/dev/disk/by-uuid/{SWAP_UUID}")] {
            let reason = format!("\n# ka: {name} does not exist on this node:\n#{name}");
            assert!(now.contains(&reason), "{now}");
        }
        assert!(now.contains(&format!("\nUUID={ROOT_UUID} / ")), "{now}");
        assert!(Fstab.apply(&lab.context()).unwrap().is_empty(), "a second run changes nothing");
    }

    #[test]
    fn what_came_block_for_block_keeps_its_lines() {
        let mut lab = Lab::new();
        // An NTFS, of which the golden facts know nothing, and an ext4 that was mounted on the golden machine.
        for (number, uuid, label) in
            [(7, "7A3C5E6F01020304", "Recovery"), (8, "eeeeeeee-0000-4000-8000-000000000008", "tools")]
        {
            let mut sent = lab.volumes[2].clone();
            (sent.number, sent.fs, sent.mount) = (number, None, None);
            sent.device = format!("/dev/nvme0n1p{number}");
            (sent.uuid, sent.label) = (Some(uuid.into()), Some(label.into()));
            sent.partuuid = Some(format!("aaaaaaaa-0000-4000-8000-00000000000{number}"));
            lab.volumes.push(sent);
        }
        let mut golden = lab.order.golden.filesystems[0].clone();
        (golden.path, golden.device) = (Some("/tools".into()), "/dev/sda8".into());
        golden.uuid = lab.volumes[4].uuid.clone();
        golden.label = Some("tools".into());
        golden.partuuid = lab.volumes[4].partuuid.clone();
        golden.aliases.clear();
        lab.order.golden.filesystems.push(golden);
        let lines = "UUID=7A3C5E6F01020304 /recovery ntfs ro 0 0\nLABEL=Recovery /r ntfs ro 0 0\n\
            PARTUUID=aaaaaaaa-0000-4000-8000-000000000007 /r2 ntfs ro 0 0\nLABEL=tools /tools ext4 ro 0 0\n\
            UUID=eeeeeeee-0000-4000-8000-000000000008 /tools2 ext4 ro 0 0\n";
        lab.file(PATH, &format!("{}{lines}/dev/sda8 /tools ext4 ro 0 0\n", kept()));
        let changes = Fstab.apply(&lab.context()).unwrap();
        assert_eq!(changes.len(), 1, "{changes:?}");
        let now = format!("{}{lines}UUID=eeeeeeee-0000-4000-8000-000000000008 /tools ext4 ro 0 0\n", kept());
        assert_eq!(lab.read(PATH), now);
        // What is on no node is an error as before.
        lab.volumes.pop();
        assert!(Fstab.apply(&lab.context()).unwrap_err().to_string().contains("LABEL=tools"));
    }

    #[test]
    fn an_optional_one_is_commented_out_with_the_reason() {
        let lab = Lab::new();
        lab.file(PATH, &format!("{}UUID=dead /data ext4 nofail 0 2\n/swapfile none swap sw 0 0\n", kept()));
        Fstab.apply(&lab.context()).unwrap();
        assert_eq!(
            lab.read(PATH),
            format!(
                "{}# ka: UUID=dead does not exist on this node:\n#UUID=dead /data ext4 nofail 0 2\n\
                 # ka: the swap file /swapfile was not cloned:\n#/swapfile none swap sw 0 0\n",
                kept()
            )
        );
    }

    #[test]
    fn lines_are_dropped_by_word_and_not_by_part_of_a_word() {
        let mut lab = Lab::new();
        lab.order.policy.drop_fstab = vec!["nfs".into(), "_netdev".into()];
        lab.file(PATH, &kept().replace("/srv cifs", "/mnt/nfs cifs"));
        let changes = Fstab.apply(&lab.context()).unwrap();
        assert_eq!(changes.len(), 1, "{changes:?}");
        assert!(!lab.read(PATH).contains("server:/home") && lab.read(PATH).contains("/mnt/nfs cifs"));
    }

    #[test]
    fn without_golden_facts_the_mount_path_decides() {
        let mut lab = Lab::new();
        lab.order.golden.filesystems.clear();
        lab.file(PATH, "/dev/vda1 / ext4 defaults 0 1\nLABEL=old-efi /boot/efi vfat defaults 0 1\n/dev/vda5 none swap sw 0 0\n");
        Fstab.apply(&lab.context()).unwrap();
        assert_eq!(
            lab.read(PATH),
            format!(
                "UUID={ROOT_UUID} / ext4 defaults 0 1\nLABEL=label1 /boot/efi vfat defaults 0 1\nUUID={SWAP_UUID} none swap sw 0 0\n"
            )
        );
    }

    proptest! {
        #[test]
        fn no_line_breaks_it_and_a_second_run_changes_nothing(
            lines in proptest::collection::vec("(UUID=|/dev/|sda3|sda2|\\\\|040|/|none|swap|ext4|nofail|#|é| |\t|[ -~]){0,12} nofail", 0..6)
        ) {
            let lab = Lab::new();
            lab.file(PATH, &lines.join("\n"));
            if Fstab.apply(&lab.context()).is_ok() {
                let once = std::fs::read(lab.target.join("etc/fstab")).unwrap();
                Fstab.apply(&lab.context()).unwrap();
                prop_assert_eq!(once, std::fs::read(lab.target.join("etc/fstab")).unwrap());
            }
        }
    }

    #[test]
    fn subvolumes_are_set_right() {
        let mut lab = Lab::new();
        let subvolume = |name: &str, path: &str| Subvolume {
            name: name.into(),
            path: Some(path.into()),
            options: None,
            default: false,
        };
        lab.volumes[2].fs = Some(Fs::Btrfs);
        lab.order.golden.filesystems[0].fs = Fs::Btrfs;
        let mut home = lab.volumes[2].clone();
        for (volume, sub) in
            [(&mut lab.volumes[2], subvolume("@", "/")), (&mut home, subvolume("@home", "/home"))]
        {
            volume.mount = sub.mount();
            volume.subvolume = Some(sub);
        }
        lab.volumes.push(home);
        let mut golden_home = lab.order.golden.filesystems[0].clone();
        golden_home.path = Some("/home".into());
        lab.order.golden.filesystems.push(golden_home);
        let kept = format!("UUID={ROOT_UUID} / btrfs noatime,subvol=@ 0 0\n");
        lab.file(PATH, &format!("{kept}UUID={ROOT_UUID} /home btrfs subvolid=257 0 0\n"));
        Fstab.apply(&lab.context()).unwrap();
        let rest = lab.read(PATH);
        let rest = rest.strip_prefix(&kept).unwrap_or_else(|| panic!("{rest}"));
        assert!(rest.starts_with(&format!("UUID={ROOT_UUID} /home btrfs subvol=@home 0 0\n")), "{rest}");
        assert!(Fstab.apply(&lab.context()).unwrap().is_empty(), "a second run changes nothing");

        // The layout gives /home a file system of its own.
        let own = "eeeeeeee-0000-4000-8000-000000000004";
        let home = lab.volumes.last_mut().unwrap();
        (home.device, home.fs, home.uuid) = ("/dev/nvme0n1p4".into(), Some(Fs::Ext4), Some(own.into()));
        (home.subvolume, home.partuuid, home.label) = (None, None, None);
        home.mount = Some(Mount { path: "/home".into(), options: None });
        lab.file(PATH, &format!("{kept}UUID={ROOT_UUID} /home btrfs subvol=@home 0 0\n"));
        Fstab.apply(&lab.context()).unwrap();
        assert!(
            lab.read(PATH).contains(&format!("\nUUID={own} /home ext4 defaults 0 0\n")),
            "{}",
            lab.read(PATH)
        );
    }

    #[test]
    fn octal_escapes_go_both_ways() {
        assert_eq!(unescape_octal("/a\\040b\\134c\\9"), "/a b\\c\\9");
        assert_eq!(escape_octal("/a b\\c"), "/a\\040b\\134c");
    }
}
