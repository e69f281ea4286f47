//! How big the parts of a captured layout shall be on other disks. Pure. The file systems decide: small ones stay as they
//! are, `/` and bigger ones need what is used now plus a fifth, and the biggest grows without limit. What they lie on
//! follows.

use crate::model::{Fs, Layout};
use crate::size::{MIB, Size, exact_text};
use crate::stack::{Base, EXTENT, luks_offset};
use std::collections::BTreeMap;

/// A file system up to this size is made as big as it was; bigger ones follow the node's disk.
const SMALL: u64 = 2 << 30;

/// How big something shall be, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Want {
    min: u64,
    /// None: no limit.
    max: Option<u64>,
    /// As big as it was, whatever lies on it takes.
    fixed: bool,
}

/// The least member of an array of `bytes`: what [`crate::stack::sizes`] counts, the other way round.
const fn member(bytes: u64) -> u64 {
    let bytes = bytes.div_ceil(MIB) * MIB;
    let share = (bytes / 511 + 1).div_ceil(MIB) * MIB;
    bytes + if share > 4 * MIB { share } else { 4 * MIB }
}

/// What the mounted file system in `base` wants, or what holds no mounted one.
fn own(layout: &Layout, base: Base, bytes: u64, used: &BTreeMap<String, u64>) -> Option<Want> {
    let content = layout.content_of(base)?;
    let fixed = Want { min: bytes, max: Some(bytes), fixed: true };
    let Some(format) = content.format else {
        return matches!(base, Base::Partition(_)).then_some(fixed);
    };
    let mounts = content.mounts();
    let root = mounts.iter().any(|m| m.path == "/");
    let used = mounts.first().and_then(|m| used.get(&m.path));
    let Some(used) = used.filter(|_| format.fs != Fs::Vfat && (root || bytes > SMALL)) else {
        return Some(fixed);
    };
    // A fifth more than is used now, and some room for the file system itself.
    let least = (used + used / 5 + 128 * MIB).div_ceil(MIB) * MIB;
    Some(Want { min: least.min(bytes), max: Some(bytes), fixed: false })
}

/// Sets the sizes of partitions and logical volumes, and the sizes of disks that have no rule for them yet. `golden` has
/// the bytes of everything on the golden machine, `used` those in use by mount point. The base that grows without limit.
pub fn choose(
    layout: &mut Layout,
    golden: &BTreeMap<Base, u64>,
    used: &BTreeMap<String, u64>,
) -> Option<Base> {
    let bytes_of = |base: Base| golden.get(&base).copied().unwrap_or_default();
    let mut wants: BTreeMap<Base, Want> =
        golden.iter().filter_map(|(base, bytes)| Some((*base, own(layout, *base, *bytes, used)?))).collect();
    let mut biggest: Option<Base> = None;
    for (base, _) in wants.iter().filter(|(_, want)| !want.fixed) {
        if biggest.is_none_or(|b| bytes_of(*base) > bytes_of(b)) {
            biggest = Some(*base);
        }
    }
    if let Some(want) = biggest.and_then(|b| wants.get_mut(&b)) {
        want.max = None;
    }
    // From the top down: each says what it needs of what it lies on. A layout in a circle has no captured machine.
    for base in layout.volumes_in_order().unwrap_or_default().into_iter().rev() {
        let Some(want) = wants.get(&base).copied() else { continue };
        let below = layout.bases_of(base);
        let total: u64 = below.iter().map(|b| bytes_of(*b)).sum();
        for under in &below {
            let whole = bytes_of(*under);
            let min = match base {
                Base::Raid(_) => member(want.min),
                Base::Luks(i) => want.min + luks_offset(layout.luks[i].version),
                Base::Vg(_) => {
                    // Each physical volume takes its share.
                    let share = (u128::from(want.min) * u128::from(whole)).div_ceil(u128::from(total.max(1)));
                    u64::try_from(share).unwrap_or(u64::MAX / 2).div_ceil(EXTENT) * EXTENT + MIB
                }
                Base::Lv(_) | Base::Partition(_) => want.min.div_ceil(EXTENT) * EXTENT,
            };
            let next = if let Base::Lv(_) = base {
                // A group has what its volumes need, and may be as big as it was.
                let before = wants.get(under).copied();
                let limit = before.map_or(Some(whole), |b| b.max);
                let min = min + before.map_or(0, |b| b.min);
                Want { min, max: want.max.and(limit).map(|max| max.max(min)), fixed: false }
            } else if want.fixed {
                Want { min: whole, max: Some(whole), fixed: true }
            } else {
                Want { min, max: want.max.map(|_| whole.max(min)), fixed: false }
            };
            wants.insert(*under, next);
        }
    }
    let mut needs = vec![0; layout.disks.len()];
    for (base, want) in &wants {
        let size = match want {
            Want { min, max: Some(max), .. } if min == max => Size::Exact(min.div_ceil(MIB) * MIB),
            Want { min, max, .. } => Size::Range { min: min.div_ceil(MIB) * MIB, max: *max },
        };
        match base {
            Base::Partition(i) => {
                layout.partitions[*i].size = size.to_string();
                if let Some(disk) = layout.disk_of(&layout.partitions[*i]) {
                    needs[disk] += want.min;
                }
            }
            Base::Lv(i) => layout.lvs[*i].size = size.to_string(),
            Base::Raid(_) | Base::Luks(_) | Base::Vg(_) => {}
        }
    }
    for (disk, needs) in layout.disks.iter_mut().zip(needs) {
        if disk.matching.size.is_none() {
            // Rounded down: whether it really fits is told with figures when the layout is fitted.
            let gib = needs >> 30;
            disk.matching.size = Some(if gib > 0 {
                format!("{gib}G-")
            } else {
                format!("{}-", exact_text(needs / MIB * MIB))
            });
        }
    }
    biggest
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stack::sizes;
    use proptest::prelude::*;

    const GIB: u64 = 1 << 30;

    /// A layout whose root lies on what is asked for: an array, a container, a group over two of those.
    fn tower(raid: bool, version: Option<u32>, group: bool) -> Layout {
        let mut text = "version = 1\n".to_owned();
        for disk in ["a", "b"] {
            text.push_str(&format!("[[disk]]\nname = '{disk}'\ntable = 'gpt'\n"));
        }
        for disk in ["a", "b"] {
            text.push_str(&format!(
                "[[partition]]\ndisk = '{disk}'\nid = '{disk}1'\ntype = 'linux'\nsize = '1G'\n"
            ));
        }
        let mut top = "a1".to_owned();
        if raid {
            top = "r".into();
            text.push_str("[[raid]]\nname = 'r'\nmembers = ['a1', 'b1']\n");
        }
        if let Some(version) = version {
            text.push_str(&format!("[[luks]]\nname = 'l'\non = '{top}'\nversion = {version}\n"));
            top = "l".into();
        }
        if group {
            let on = if raid { format!("['{top}']") } else { format!("['{top}', 'b1']") };
            text.push_str(&format!(
                "[[vg]]\nname = 'g'\non = {on}\n\
                 [[lv]]\nvg = 'g'\nname = 'swap'\nsize = '1G'\nformat = {{ fs = 'swap' }}\n\
                 [[lv]]\nvg = 'g'\nname = 'home'\nsize = '1G'\nformat = {{ fs = 'xfs' }}\nmount = {{ path = '/home' }}\n\
                 [[lv]]\nvg = 'g'\nname = 'root'\nsize = '1G'\n"
            ));
        }
        text.push_str("format = { fs = 'ext4' }\nmount = { path = '/' }\n");
        crate::parse(&text).unwrap_or_else(|e| panic!("{e}\n{text}"))
    }

    fn golden(layout: &Layout, partitions: u64, root: u64, home: u64, swap: u64) -> BTreeMap<Base, u64> {
        let mut golden: BTreeMap<Base, u64> =
            (0..layout.partitions.len()).map(|i| (Base::Partition(i), partitions)).collect();
        golden.extend((0..layout.raids.len()).map(|i| (Base::Raid(i), partitions - 8 * MIB)));
        golden.extend((0..layout.luks.len()).map(|i| (Base::Luks(i), partitions - 24 * MIB)));
        golden.extend((0..layout.vgs.len()).map(|i| (Base::Vg(i), partitions - 32 * MIB)));
        golden.extend(
            [swap, home, root].into_iter().take(layout.lvs.len()).enumerate().map(|(i, b)| (Base::Lv(i), b)),
        );
        golden
    }

    fn least(size: &str) -> u64 {
        size.parse::<Size>().unwrap().min().unwrap()
    }

    #[test]
    fn what_carries_the_biggest_grows_with_it() {
        let mut layout = tower(true, Some(2), true);
        let golden = golden(&layout, 100 * GIB, 60 * GIB, 30 * GIB, GIB);
        let used = [("/".to_owned(), 10 * GIB), ("/home".to_owned(), 5 * GIB)].into();
        assert_eq!(choose(&mut layout, &golden, &used), Some(Base::Lv(2)));
        let texts: Vec<&str> = layout.lvs.iter().map(|l| l.size.as_str()).collect();
        assert_eq!(texts, ["1G", "6272M-30G", "12416M-"]);
        // 1024 + 6272 + 12416, LVM's 1, the container's 16, and a 511th of all that for the array.
        assert_eq!(layout.partitions[0].size, "19768M-");
        assert_eq!(layout.partitions[1].size, "19768M-");
        assert_eq!(layout.disks[0].matching.size.as_deref(), Some("19G-"));
    }

    #[test]
    fn what_is_small_stays_as_it_is() {
        let mut layout = tower(true, None, false);
        layout.raids[0].mount.as_mut().unwrap().path = "/boot".into();
        let golden = golden(&layout, GIB, 0, 0, 0);
        assert_eq!(choose(&mut layout, &golden, &[("/boot".to_owned(), 100 * MIB)].into()), None);
        assert_eq!((layout.partitions[0].size.as_str(), layout.partitions[1].size.as_str()), ("1G", "1G"));
        // A root that is small all the same grows, for it must hold the tree.
        let mut layout = tower(false, Some(1), false);
        let golden = golden_of(&layout);
        assert_eq!(choose(&mut layout, &golden, &[("/".to_owned(), 100 * MIB)].into()), Some(Base::Luks(0)));
        assert_eq!(layout.partitions[0].size, "250M-");
    }

    fn golden_of(layout: &Layout) -> BTreeMap<Base, u64> {
        golden(layout, GIB, 0, 0, 0)
    }

    #[test]
    fn a_group_without_the_biggest_may_be_as_big_as_it_was() {
        let mut layout = tower(false, None, true);
        let mut golden = golden(&layout, 100 * GIB, 20 * GIB, 40 * GIB, GIB);
        golden.insert(Base::Vg(0), 190 * GIB);
        // The biggest is elsewhere: a file system in a partition of its own.
        let mut data = layout.partitions[0].clone();
        (data.id, data.format) = (None, layout.lvs[1].format.clone());
        data.mount = Some(crate::model::Mount { path: "/data".into(), options: None });
        layout.partitions.push(data);
        golden.insert(Base::Partition(2), 500 * GIB);
        let used = ["/", "/home", "/data"].map(|p| (p.to_owned(), GIB)).into();
        assert_eq!(choose(&mut layout, &golden, &used), Some(Base::Partition(2)));
        assert_eq!(layout.partitions[2].size, "1357M-");
        // 1024 + 1360 + 1360 MiB in halves, and LVM's 1 in each.
        assert_eq!(layout.partitions[0].size, "1873M-100G");
        assert_eq!(layout.partitions[1].size, "1873M-100G");
    }

    proptest! {
        /// Whatever lies on what: partitions of the least size hold the least of everything.
        #[test]
        fn the_least_partitions_are_enough(raid in any::<bool>(), version in proptest::option::of(1_u32..3),
            group in any::<bool>(), gib in 20_u64..5000, shares in (1_u64..40, 1_u64..40, 1_u64..20), full in (0_u64..120, 0_u64..120))
        {
            let mut layout = tower(raid, version, group);
            let whole = gib * GIB;
            let of = |share: u64| whole / 100 * share / EXTENT * EXTENT;
            let golden = golden(&layout, whole, of(shares.0), of(shares.1), of(shares.2));
            let root = if group { of(shares.0) } else { whole };
            let used = [("/".to_owned(), root / 120 * full.0), ("/home".to_owned(), of(shares.1) / 120 * full.1)].into();
            choose(&mut layout, &golden, &used);
            let partitions: BTreeMap<usize, u64> =
                layout.partitions.iter().enumerate().map(|(i, p)| (i, least(&p.size))).collect();
            let made = sizes(&layout, &partitions);
            prop_assert!(made.is_ok(), "{:?}\n{}", made, crate::to_toml(&layout, &[]));
            let made = made.unwrap();
            let needed = |used: u64, had: u64| (used + used / 5 + 128 * MIB).min(had);
            let top = *made.iter().filter(|(b, _)| layout.content_of(**b).is_some_and(|c| c.mount.is_some()))
                .find(|(b, _)| layout.content_of(**b).unwrap().mount.unwrap().path == "/").unwrap().1;
            let had = if group { root } else { golden.iter().next_back().map_or(0, |(_, b)| *b) };
            prop_assert!(top >= needed(root / 120 * full.0, had), "{top} of {had}");
            prop_assert!(crate::check::check(&layout).is_empty());
        }
    }
}
