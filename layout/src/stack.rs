//! Volumes on top of partitions: RAID arrays, encrypted containers, LVM. What lies on what, in which order they are made,
//! and how big each becomes. Pure: nothing is read or written.

use crate::check::Place;
use crate::fit;
use crate::model::{Content, Layout};
use crate::size::{MIB, Size, exact_text};
use std::collections::BTreeMap;

/// The unit in which LVM gives space.
pub const EXTENT: u64 = 4 * MIB;

/// Something that others can lie on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Base {
    /// The `[[partition]]` of this index.
    Partition(usize),
    /// The `[[raid]]` of this index.
    Raid(usize),
    /// The `[[luks]]` of this index.
    Luks(usize),
    /// The `[[vg]]` of this index; only logical volumes lie on it.
    Vg(usize),
    /// The `[[lv]]` of this index.
    Lv(usize),
}

impl Layout {
    /// Whether there are volumes on top of partitions.
    #[must_use]
    pub fn has_volumes(&self) -> bool {
        !(self.raids.is_empty() && self.luks.is_empty() && self.vgs.is_empty() && self.lvs.is_empty())
    }

    /// What `name` means in `members` and `on`: a partition's id, an array, a container, or `GROUP/VOLUME`.
    #[must_use]
    pub fn base(&self, name: &str) -> Option<Base> {
        if let Some((vg, lv)) = name.split_once('/') {
            return self.lvs.iter().position(|l| l.vg == vg && l.name == lv).map(Base::Lv);
        }
        let partition =
            self.partitions.iter().position(|p| p.id.as_deref() == Some(name)).map(Base::Partition);
        let raid = || self.raids.iter().position(|r| r.name == name).map(Base::Raid);
        let luks = || self.luks.iter().position(|l| l.name == name).map(Base::Luks);
        partition.or_else(raid).or_else(luks)
    }

    /// The names of what `base` lies on.
    #[must_use]
    pub fn below(&self, base: Base) -> Vec<&str> {
        match base {
            Base::Partition(_) => Vec::new(),
            Base::Raid(i) => self.raids[i].members.iter().map(String::as_str).collect(),
            Base::Luks(i) => vec![&self.luks[i].on],
            Base::Vg(i) => self.vgs[i].on.iter().map(String::as_str).collect(),
            Base::Lv(i) => vec![&self.lvs[i].vg],
        }
    }

    /// [`Layout::below`] as what those names mean; unknown names are left out.
    #[must_use]
    pub fn bases_of(&self, base: Base) -> Vec<Base> {
        match base {
            Base::Lv(i) => {
                self.vgs.iter().position(|v| v.name == self.lvs[i].vg).map(Base::Vg).into_iter().collect()
            }
            _ => self.below(base).iter().filter_map(|name| self.base(name)).collect(),
        }
    }

    /// What lies in `base`; nothing in a volume group.
    #[must_use]
    pub fn content_of(&self, base: Base) -> Option<Content<'_>> {
        match base {
            Base::Partition(i) => Some(self.partitions[i].content()),
            Base::Raid(i) => Some(self.raids[i].content()),
            Base::Luks(i) => Some(self.luks[i].content()),
            Base::Vg(_) => None,
            Base::Lv(i) => Some(self.lvs[i].content()),
        }
    }

    /// As messages call it: `[[lv]] vg0/root`.
    #[must_use]
    pub fn base_text(&self, base: Base) -> String {
        match base {
            Base::Partition(i) => self.partition_text(i),
            Base::Raid(i) => format!("[[raid]] `{}`", self.raids[i].name),
            Base::Luks(i) => format!("[[luks]] `{}`", self.luks[i].name),
            Base::Vg(i) => format!("[[vg]] `{}`", self.vgs[i].name),
            Base::Lv(i) => format!("[[lv]] `{}/{}`", self.lvs[i].vg, self.lvs[i].name),
        }
    }

    fn volumes(&self) -> impl Iterator<Item = Base> {
        let raids = (0..self.raids.len()).map(Base::Raid);
        let luks = (0..self.luks.len()).map(Base::Luks);
        let vgs = (0..self.vgs.len()).map(Base::Vg);
        raids.chain(luks).chain(vgs).chain((0..self.lvs.len()).map(Base::Lv))
    }

    /// All volumes, each behind what it lies on.
    ///
    /// # Errors
    /// The volumes that lie on each other in a circle.
    pub fn volumes_in_order(&self) -> Result<Vec<Base>, Vec<Base>> {
        let mut left: Vec<Base> = self.volumes().collect();
        let mut done: Vec<Base> = Vec::new();
        while !left.is_empty() {
            let ready = |base: &Base| {
                self.bases_of(*base).iter().all(|b| matches!(b, Base::Partition(_)) || done.contains(b))
            };
            let Some(next) = left.iter().position(ready) else { return Err(left) };
            done.push(left.remove(next));
        }
        Ok(done)
    }
}

/// What an array of md takes of each member for itself: more than mdadm's own reserve for any size.
const fn raid_reserve(bytes: u64) -> u64 {
    let share = bytes / 512;
    if share > 4 * MIB { share } else { 4 * MIB }
}

/// Where the data of an encrypted container begin.
#[must_use]
pub const fn luks_offset(version: u32) -> u64 {
    if version == 1 { 2 * MIB } else { 16 * MIB }
}

/// How many bytes every volume has, when the partitions have `partitions` (by index). Volume groups have what they give
/// out.
///
/// # Errors
/// In words, when something does not fit.
pub fn sizes(layout: &Layout, partitions: &BTreeMap<usize, u64>) -> Result<BTreeMap<Base, u64>, String> {
    let order = layout.volumes_in_order().map_err(|_| "volumes lie on each other in a circle".to_owned())?;
    let mut sizes: BTreeMap<Base, u64> = partitions.iter().map(|(i, b)| (Base::Partition(*i), *b)).collect();
    for base in order {
        let below: Vec<u64> =
            layout.bases_of(base).iter().map(|b| sizes.get(b).copied().unwrap_or_default()).collect();
        let least = below.iter().copied().min().unwrap_or_default();
        let bytes = match base {
            Base::Raid(_) => least.saturating_sub(raid_reserve(least)) / MIB * MIB,
            Base::Luks(i) => least.saturating_sub(luks_offset(layout.luks[i].version)),
            Base::Vg(_) => below.iter().map(|b| b.saturating_sub(MIB) / EXTENT * EXTENT).sum(),
            // With its group.
            Base::Lv(_) | Base::Partition(_) => continue,
        };
        if bytes == 0 {
            return Err(format!("{}: what it lies on is too small", layout.base_text(base)));
        }
        sizes.insert(base, bytes);
        if let Base::Vg(group) = base {
            let volumes: Vec<usize> =
                (0..layout.lvs.len()).filter(|i| layout.lvs[*i].vg == layout.vgs[group].name).collect();
            let wanted = volumes
                .iter()
                .map(|i| Ok((layout.lvs[*i].size.parse::<Size>()?, layout.lvs[*i].weight.unwrap_or(1))))
                .collect::<Result<Vec<_>, String>>()?;
            let given = fit::share_out(&wanted, bytes / EXTENT, EXTENT).map_err(|needs| {
                format!(
                    "{} is too small: it has {}, its volumes need at least {}",
                    layout.base_text(base),
                    exact_text(bytes),
                    exact_text(needs * EXTENT)
                )
            })?;
            sizes.extend(volumes.iter().zip(given).map(|(i, extents)| (Base::Lv(*i), extents * EXTENT)));
        }
    }
    Ok(sizes)
}

/// Everything that is wrong with the volumes of a layout, but for their contents.
pub fn check(layout: &Layout, say: &mut dyn FnMut(Place, String)) {
    let mut names: Vec<&str> = Vec::new();
    let mut holders: BTreeMap<Base, String> = BTreeMap::new();
    let ids = layout
        .partitions
        .iter()
        .enumerate()
        .filter_map(|(i, p)| Some((Place::Partition(i), p.id.as_deref()?)));
    let raids = layout.raids.iter().enumerate().map(|(i, r)| (Place::Volume(Base::Raid(i)), r.name.as_str()));
    let luks = layout.luks.iter().enumerate().map(|(i, l)| (Place::Volume(Base::Luks(i)), l.name.as_str()));
    let vgs = layout.vgs.iter().enumerate().map(|(i, v)| (Place::Volume(Base::Vg(i)), v.name.as_str()));
    for (place, name) in ids.chain(raids).chain(luks).chain(vgs) {
        check_name(name, &mut |message| say(place, message));
        if names.contains(&name) {
            say(place, format!("the name `{name}` is used twice"));
        }
        names.push(name);
    }
    for (i, lv) in layout.lvs.iter().enumerate() {
        let mut say = |message| say(Place::Volume(Base::Lv(i)), message);
        check_name(&lv.name, &mut say);
        if LV_BEGINNINGS.iter().any(|word| lv.name.starts_with(word))
            || LV_PARTS.iter().any(|word| lv.name.contains(word))
        {
            say(format!("LVM keeps the name `{}` for itself", lv.name));
        }
        if layout.lvs[..i].iter().any(|l| l.vg == lv.vg && l.name == lv.name) {
            say("the name is used twice".into());
        }
        if !layout.vgs.iter().any(|v| v.name == lv.vg) {
            say(format!("there is no [[vg]] named `{}`", lv.vg));
        }
        match lv.size.parse::<Size>() {
            Err(e) => say(format!("size: {e}")),
            Ok(size) if lv.weight.is_some() && !size.is_flexible() => {
                say("weight: only a range or fill has a share of what is left over".into());
            }
            Ok(_) => {}
        }
        if lv.weight.is_some_and(|w| w == 0 || w > 1000) {
            say("weight: it is not between 1 and 1000".into());
        }
    }
    for base in layout.volumes() {
        let mut say = |message| say(Place::Volume(base), message);
        match base {
            Base::Raid(i) => {
                let raid = &layout.raids[i];
                if raid.level != 1 {
                    say(format!("level {} is not known; 1 is", raid.level));
                }
                if raid.members.len() < 2 {
                    say("an array has at least two members".into());
                }
                if raid.name.len() > 32 {
                    say("its name is longer than 32 bytes".into());
                }
                // As POSIX has it for file names; mdadm refuses any other since 4.3.
                if raid.name.contains('+') {
                    say("mdadm allows no `+` in its name".into());
                }
                if !["1.0", "1.2"].contains(&raid.metadata.as_str()) {
                    say(format!("metadata: `{}` is not 1.0 or 1.2", raid.metadata));
                }
                if raid.members.iter().any(|m| !matches!(layout.base(m), Some(Base::Partition(_)) | None)) {
                    say("members: only partitions can be members".into());
                }
            }
            Base::Luks(i) => {
                let luks = &layout.luks[i];
                if !(1..=2).contains(&luks.version) {
                    say(format!("version {} is not 1 or 2", luks.version));
                }
                if luks
                    .crypttab
                    .as_ref()
                    .is_some_and(|c| c.is_empty() || c.contains(|c: char| !c.is_ascii_graphic()))
                {
                    say("crypttab: it is one field, options separated by commas".into());
                }
                for word in &luks.options {
                    if word.contains(['/', '\0']) || FORBIDDEN.iter().any(|f| word.starts_with(f)) {
                        say(format!(
                            "options: `{}` names a device or a file, or what Ka sets",
                            word.escape_debug()
                        ));
                    }
                }
            }
            Base::Vg(i) if layout.vgs[i].on.is_empty() => say("on: it lies on nothing".into()),
            _ => {}
        }
        if let Base::Lv(_) = base {
            continue;
        }
        for name in layout.below(base) {
            let Some(below) = layout.base(name) else {
                say(format!(
                    "there is nothing named `{name}` (the id of a partition, an array, a container, GROUP/VOLUME)"
                ));
                continue;
            };
            if layout.content_of(below).is_some_and(|c| c.format.is_some() || c.mount.is_some() || c.kept) {
                say(format!("{} holds something else already", layout.base_text(below)));
            }
            if let Some(other) = holders.insert(below, layout.base_text(base)) {
                say(format!("{} lies under {other} already", layout.base_text(below)));
            }
        }
    }
    if let Err(circle) = layout.volumes_in_order() {
        let names: Vec<String> = circle.iter().map(|b| layout.base_text(*b)).collect();
        say(Place::File, format!("these lie on each other in a circle: {}", names.join(", ")));
    }
}

/// What names of logical volumes must not begin with, and not contain: lvm(8), "VALID NAMES".
const LV_BEGINNINGS: [&str; 2] = ["snapshot", "pvmove"];
const LV_PARTS: [&str; 15] = [
    "_cdata", "_cmeta", "_corig", "_cvol", "_imeta", "_iorig", "_mimage", "_mlog", "_pmspare", "_rimage",
    "_rmeta", "_tdata", "_tmeta", "_vdata", "_vorigin",
];

/// Words for luksFormat that Ka gives itself, or that read a file.
const FORBIDDEN: [&str; 9] = [
    "--key-file",
    "-d",
    "--master-key",
    "--volume-key",
    "--header",
    "--uuid",
    "--type",
    "--offset",
    "--batch",
];

fn check_name(name: &str, say: &mut dyn FnMut(String)) {
    let fits = |b: u8| b.is_ascii_alphanumeric() || b"_.+-".contains(&b);
    if name.is_empty() || name.len() > 100 || name.starts_with(['-', '.']) || !name.bytes().all(fits) {
        say(format!(
            "the name `{}` must be made of letters, digits, `_`, `.`, `+` and `-`, and not begin with `-` or `.`",
            name.escape_debug()
        ));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// RAID 1 of two disks, encrypted, with LVM in it.
    const TALL: &str = r#"version = 1
[[disk]]
name = "a"
match = { path = "/dev/vda" }
table = "gpt"
[[disk]]
name = "b"
match = { path = "/dev/vdb" }
table = "gpt"
[[partition]]
disk = "a"
id = "a1"
type = "linux-raid"
size = "fill"
[[partition]]
disk = "b"
id = "b1"
type = "linux-raid"
size = "fill"
[[raid]]
name = "md0"
members = ["a1", "b1"]
[[luks]]
name = "crypt"
on = "md0"
[[vg]]
name = "vg0"
on = ["crypt"]
[[lv]]
vg = "vg0"
name = "root"
size = "fill"
weight = 3
format = { fs = "ext4" }
mount = { path = "/" }
[[lv]]
vg = "vg0"
name = "home"
size = "100M-"
format = { fs = "xfs" }
mount = { path = "/home" }
"#;

    fn sized(mib: [u64; 2]) -> Result<BTreeMap<Base, u64>, String> {
        let layout = crate::parse(TALL).unwrap_or_else(|e| panic!("{e}"));
        sizes(&layout, &mib.iter().enumerate().map(|(i, m)| (i, m * MIB)).collect())
    }

    #[test]
    fn each_lies_behind_what_it_lies_on() {
        let layout = crate::parse(TALL).unwrap();
        assert_eq!(
            layout.volumes_in_order().unwrap(),
            [Base::Raid(0), Base::Luks(0), Base::Vg(0), Base::Lv(0), Base::Lv(1)]
        );
        assert_eq!(crate::parse(&crate::to_toml(&layout, &[])).unwrap(), layout);
    }

    #[test]
    fn what_each_layer_takes_is_counted() {
        let sizes = sized([1000, 900]).unwrap();
        // The smaller member less 4 MiB, less 16 for LUKS, less 1 for LVM, in extents of 4 MiB.
        assert_eq!(sizes[&Base::Raid(0)], 896 * MIB);
        assert_eq!(sizes[&Base::Luks(0)], 880 * MIB);
        assert_eq!(sizes[&Base::Vg(0)], 876 * MIB);
        // 4 and 25 extents are the least; the 190 left over are shared 3 to 1, and two that do not divide go to both.
        assert_eq!((sizes[&Base::Lv(0)], sizes[&Base::Lv(1)]), (584 * MIB, 292 * MIB));
        assert_eq!(
            sized([130, 900]).unwrap_err(),
            "[[vg]] `vg0` is too small: it has 108M, its volumes need at least 116M"
        );
        assert_eq!(sized([19, 900]).unwrap_err(), "[[luks]] `crypt`: what it lies on is too small");
    }

    #[test]
    fn nonsense_is_refused() {
        let error = |from: &str, to: &str| {
            assert!(TALL.contains(from), "{from}");
            crate::parse(&TALL.replacen(from, to, 1)).unwrap_err().to_string()
        };
        for (from, to, message) in [
            ("\"a1\", \"b1\"", "\"a1\"", "an array has at least two members"),
            ("\"a1\", \"b1\"", "\"a1\", \"c1\"", "there is nothing named `c1`"),
            (
                "\"a1\", \"b1\"",
                "\"a1\", \"a1\"",
                "[[partition]] #1 (linux-raid) lies under [[raid]] `md0` already",
            ),
            ("on = \"md0\"", "on = \"vg0/root\"", "in a circle: [[luks]] `crypt`, [[vg]] `vg0`"),
            ("on = \"md0\"", "on = \"vg0/root\"", "[[lv]] `vg0/root` holds something else already"),
            ("vg = \"vg0\"", "vg = \"vg1\"", "[[lv]] `vg1/root`: there is no [[vg]] named `vg1`"),
            ("name = \"home\"", "name = \"root\"", "[[lv]] `vg0/root`: the name is used twice"),
            ("name = \"crypt\"", "name = \"../x\"", "must be made of letters"),
            ("name = \"crypt\"", "name = \"md0\"", "the name `md0` is used twice"),
            ("name = \"home\"", "name = \"snapshots\"", "LVM keeps the name `snapshots` for itself"),
            ("name = \"home\"", "name = \"my_rimage\"", "LVM keeps the name `my_rimage` for itself"),
            ("name = \"md0\"", "name = \"md+0\"", "mdadm allows no `+`"),
            (
                "on = \"md0\"",
                "on = \"md0\"\ncrypttab = \"luks,discard\\nevil /dev/x\"",
                "crypttab: it is one field",
            ),
            (
                "name = \"crypt\"",
                "name = \"crypt\"\noptions = [\"--key-file=/x\"]",
                "names a device or a file",
            ),
            ("name = \"crypt\"", "name = \"crypt\"\nversion = 3", "version 3 is not 1 or 2"),
            ("name = \"md0\"", "name = \"md0\"\nlevel = 5", "level 5 is not known; 1 is"),
            (
                "id = \"a1\"",
                "id = \"a1\"\nformat = { fs = \"ext4\" }",
                "#1 (ext4) holds something else already",
            ),
            ("\"/home\"", "\"/\"", "[[lv]] `vg0/home`: mount.path: / is used twice"),
        ] {
            let text = error(from, to);
            assert!(text.contains(message), "{text}\nshould say: {message}");
        }
    }

    proptest! {
        #[test]
        fn nothing_is_given_out_twice(a in 1_u64..5000, b in 1_u64..5000) {
            if let Ok(sizes) = sized([a, b]) {
                let given = sizes[&Base::Lv(0)] + sizes[&Base::Lv(1)];
                prop_assert!(given <= sizes[&Base::Vg(0)]);
                prop_assert!(sizes[&Base::Vg(0)] < sizes[&Base::Luks(0)]);
                prop_assert!(sizes[&Base::Luks(0)] < sizes[&Base::Raid(0)]);
                prop_assert!(sizes[&Base::Raid(0)] < a.min(b) * MIB);
            }
        }
    }
}
