//! From a layout and the size of a disk to the first and last sector of every partition. Pure: nothing is read or
//! written. Partitions begin and end on 1 MiB boundaries, lie in the layout's order, never overlap and leave room for both
//! copies of a GPT; logical partitions have 1 MiB before them for their EBR.

use crate::model::{Layout, Partition, TableKind};
use crate::size::{MIB, Size, exact_text};
use ka_cli::units::show_size;

/// What must be known of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// Its size in bytes.
    pub bytes: u64,
    /// Its logical sector size in bytes, 512 or 4096.
    pub sector: u32,
}

/// Where one partition lies, in logical sectors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Its index in the layout's `partitions`.
    pub index: usize,
    /// Its number.
    pub number: u32,
    /// Its first sector.
    pub first: u64,
    /// Its last sector.
    pub last: u64,
}

impl Extent {
    /// Its length in bytes.
    #[must_use]
    pub const fn bytes(&self, sector: u32) -> u64 {
        (self.last + 1 - self.first) * sector as u64
    }
}

/// A partition that stands on the disk already and is kept as it is, in logical sectors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kept {
    /// Its number.
    pub number: u32,
    /// Its first sector.
    pub first: u64,
    /// Its last sector.
    pub last: u64,
}

/// The extended partition of an MBR, in logical sectors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extended {
    /// Its number, 1 to 4.
    pub number: u32,
    /// Its first sector, that of the first EBR.
    pub first: u64,
    /// Its last sector, that of the last logical partition.
    pub last: u64,
}

/// A layout fitted to a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fitted {
    /// The kind of table.
    pub table: TableKind,
    /// The disk.
    pub geometry: Geometry,
    /// The partitions in the order in which they lie on the disk.
    pub extents: Vec<Extent>,
    /// The extended partition, where there are logical ones.
    pub extended: Option<Extended>,
}

impl Fitted {
    /// The sector of the EBR that describes a logical partition: 1 MiB before it.
    #[must_use]
    pub fn ebr_of(&self, logical: &Extent) -> u64 {
        logical.first - MIB / u64::from(self.geometry.sector)
    }
}

/// Why a layout does not fit.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FitError {
    /// The layout says something that no disk can satisfy.
    #[error("{0}")]
    Layout(String),
    /// The sector size is neither 512 nor 4096.
    #[error("disk `{disk}` has sectors of {sector} bytes; 512 and 4096 are supported")]
    Sector {
        /// The disk's name in the layout.
        disk: String,
        /// Its sector size.
        sector: u32,
    },
    /// More sectors than an MBR can address.
    #[error("disk `{disk}` has {}, more than the {} that a table of kind mbr can address: use gpt", show_size(*has), show_size(*limit))]
    MbrLimit {
        /// The disk's name in the layout.
        disk: String,
        /// Its size in bytes.
        has: u64,
        /// What an MBR can address with its sectors.
        limit: u64,
    },
    /// The disk is too small.
    #[error("disk `{disk}` is too small: it has {}, the layout needs at least {}, {} are missing ({list})", show_size(*has), show_size(*needs), show_size(needs - has))]
    TooSmall {
        /// The disk's name in the layout.
        disk: String,
        /// Its size in bytes.
        has: u64,
        /// The size that would do, in bytes.
        needs: u64,
        /// The partitions' least sizes.
        list: String,
    },
    /// Two partitions want the same place.
    #[error("{second} starts at {start}, but {first} before it reaches to {end}: they overlap")]
    Overlap {
        /// The one before.
        first: String,
        /// The one whose `start` lies within it.
        second: String,
        /// That start.
        start: String,
        /// The least end of the one before.
        end: String,
    },
}

/// The numbers of the partitions of disk `disk`, in the layout's order: those that are given, and the lowest free ones
/// for the rest. On an MBR, more than four make the fourth and later ones logical (5, 6, ...).
///
/// # Errors
/// In words, with the index of the partition at fault.
pub fn numbers(layout: &Layout, disk: usize) -> Result<Vec<(usize, u32)>, (usize, String)> {
    let table = layout.disks[disk].table;
    let all: Vec<(usize, &Partition)> = layout.partitions_of(disk).collect();
    let limit = if table == TableKind::Gpt { 128 } else { 60 };
    let mut taken = std::collections::BTreeSet::new();
    for (index, partition) in &all {
        if let Some(number) = partition.number {
            if number == 0 || number > limit {
                return Err((*index, format!("number {number} is not between 1 and {limit}")));
            }
            if !taken.insert(number) {
                return Err((
                    *index,
                    format!("number {number} is used twice on disk `{}`", layout.disks[disk].name),
                ));
            }
        }
    }
    let has_logical = table == TableKind::Mbr && (all.len() > 4 || taken.iter().any(|n| *n > 4));
    let primaries_given = taken.iter().filter(|n| **n <= 4).count();
    if has_logical && primaries_given > 3 {
        let (index, _) = all.iter().find(|(_, p)| p.number == Some(4)).unwrap_or(&all[0]);
        return Err((*index, "numbers 1 to 4 are all taken: none is left for the extended partition".into()));
    }
    let mut primaries_left = if has_logical { 3 - primaries_given } else { 4 };
    let mut result: Vec<(usize, u32)> = Vec::new();
    for (index, partition) in &all {
        let number = match partition.number {
            Some(number) => number,
            None => {
                let from = if !has_logical {
                    1
                } else if primaries_left > 0 && !result.iter().any(|(_, n)| *n > 4) {
                    primaries_left -= 1;
                    1
                } else {
                    5
                };
                let Some(number) = (from..=limit).find(|n| !taken.contains(n)) else {
                    return Err((*index, "no number is left for it".into()));
                };
                taken.insert(number);
                number
            }
        };
        result.push((*index, number));
    }
    if table == TableKind::Mbr {
        check_logical(&result)?;
    }
    Ok(result)
}

/// The kernel counts logical partitions along their chain, so their numbers must be 5, 6, ... in the order in which they
/// lie on the disk, and nothing else may lie between them.
fn check_logical(numbers: &[(usize, u32)]) -> Result<(), (usize, String)> {
    let mut expected = 5;
    let mut ended = false;
    for (index, number) in numbers {
        if *number <= 4 {
            ended = expected > 5;
        } else if ended {
            return Err((
                *index,
                "logical partitions must lie together: a primary one lies between them".into(),
            ));
        } else if *number != expected {
            return Err((
                *index,
                format!(
                    "logical partitions are numbered 5, 6, ... in the order in which they lie on the disk: \
                     number {number} should be {expected}"
                ),
            ));
        } else {
            expected += 1;
        }
    }
    Ok(())
}

/// One partition while it is being fitted; all in MiB.
struct Item {
    index: usize,
    number: u32,
    /// Room for the EBR before it.
    lead: u64,
    start: Option<u64>,
    /// The least, then the final size.
    size: u64,
    max: u64,
    weight: u64,
    /// Where it stands already.
    kept: Option<Kept>,
}

const fn to_mib(bytes: u64) -> u64 {
    bytes.div_ceil(MIB)
}

/// Fits the partitions of disk number `disk` of `layout` to a disk of the given size. Those with `preserve` stay where
/// `kept` has them, to the sector; the others lie before, between and behind them as the layout's order says.
///
/// # Errors
/// See [`FitError`].
pub fn fit_keeping(
    layout: &Layout,
    disk: usize,
    geometry: Geometry,
    kept: &[Kept],
) -> Result<Fitted, FitError> {
    let rule = &layout.disks[disk];
    let sector = u64::from(geometry.sector);
    if sector != 512 && sector != 4096 {
        return Err(FitError::Sector { disk: rule.name.clone(), sector: geometry.sector });
    }
    let limit = u64::from(u32::MAX) * sector;
    if rule.table == TableKind::Mbr && geometry.bytes > limit {
        return Err(FitError::MbrLimit { disk: rule.name.clone(), has: geometry.bytes, limit });
    }
    // Behind the last usable sector of a GPT lie 16 KiB of entries and one header.
    let tail = if rule.table == TableKind::Gpt { 16384 + sector } else { 0 };
    let end = geometry.bytes.saturating_sub(tail) / MIB;
    let mut items = items(layout, disk, end.saturating_sub(1))?;
    for item in items.iter_mut().filter(|i| layout.partitions[i.index].preserve) {
        let wrong =
            |message: String| FitError::Layout(format!("{}: {message}", layout.partition_text(item.index)));
        let Some(kept) = kept.iter().find(|k| k.number == item.number) else {
            return Err(wrong(format!("preserve: the disk has no partition {}", item.number)));
        };
        // It comes from the disk, which can say anything.
        if kept.first > kept.last || kept.last >= geometry.bytes / sector {
            return Err(wrong(format!("preserve: partition {} lies outside of the disk", item.number)));
        }
        let bytes = (kept.last + 1 - kept.first) * sector;
        // What it takes of the MiB grid; it need not be aligned to it.
        let first = (kept.first * sector / MIB).max(1);
        let stop = (kept.last + 1) * sector;
        // It may reach into the last MiB, which is not whole; then nothing lies behind it.
        let whole = if stop + tail <= geometry.bytes { end.max(first) } else { u64::MAX };
        let size = to_mib(stop).min(whole).saturating_sub(first);
        let fits = match layout.partitions[item.index].size.parse() {
            Ok(Size::Exact(wanted)) => bytes == wanted,
            Ok(Size::Range { min, max }) => bytes >= min && max.is_none_or(|max| bytes <= max),
            _ => true,
        };
        if !fits {
            let size = &layout.partitions[item.index].size;
            return Err(wrong(format!(
                "preserve: partition {} has {}, not {size}",
                item.number,
                exact_text(bytes)
            )));
        }
        (item.start, item.size, item.max, item.kept) = (Some(first), size, size, Some(*kept));
    }
    let too_small = |needs: u64, items: &[Item]| {
        let list: Vec<String> = items
            .iter()
            .map(|i| format!("{}: {}", layout.partition_text(i.index), exact_text(i.size * MIB)))
            .collect();
        FitError::TooSmall {
            disk: rule.name.clone(),
            has: geometry.bytes,
            needs: (needs * MIB + tail).max(geometry.bytes + 1),
            list: list.join(", "),
        }
    };
    let least = least_end(layout, &items)?;
    if least > end {
        return Err(too_small(least, &items));
    }

    // Each run of partitions between two given starts shares what its own stretch has left over.
    let mut begin = 0;
    let mut extents = Vec::new();
    while begin < items.len() {
        let next = (begin + 1..items.len()).find(|i| items[*i].start.is_some()).unwrap_or(items.len());
        let from = items[begin].start.map_or(1, |start| start - items[begin].lead);
        let to = items.get(next).map_or(end, |i| i.start.unwrap_or(end) - i.lead);
        share(&mut items[begin..next], to - from);
        let mut at = from;
        for item in &items[begin..next] {
            let first = at + item.lead;
            at = first + item.size;
            let (first, last) = match item.kept {
                Some(kept) => (kept.first, kept.last),
                None => (first * (MIB / sector), at * (MIB / sector) - 1),
            };
            extents.push(Extent { index: item.index, number: item.number, first, last });
        }
        begin = next;
    }
    let extended = extended(rule.table, &extents, MIB / sector);
    Ok(Fitted { table: rule.table, geometry, extents, extended })
}

/// [`fit_keeping`] for a disk on which nothing is preserved.
///
/// # Errors
/// See [`FitError`].
pub fn fit(layout: &Layout, disk: usize, geometry: Geometry) -> Result<Fitted, FitError> {
    fit_keeping(layout, disk, geometry, &[])
}

fn extended(table: TableKind, extents: &[Extent], lead: u64) -> Option<Extended> {
    let logical = || extents.iter().filter(|e| table == TableKind::Mbr && e.number > 4);
    let (first, last) = (logical().next()?, logical().next_back()?);
    let number = (1..=4).find(|n| extents.iter().all(|e| e.number != *n))?;
    Some(Extended { number, first: first.first - lead, last: last.last })
}

fn items(layout: &Layout, disk: usize, usable: u64) -> Result<Vec<Item>, FitError> {
    let numbers = numbers(layout, disk).map_err(|(index, message)| {
        FitError::Layout(format!("{}: {message}", layout.partition_text(index)))
    })?;
    let mut items = Vec::new();
    for (index, number) in numbers {
        let partition = &layout.partitions[index];
        let wrong =
            |message: String| FitError::Layout(format!("{}: {message}", layout.partition_text(index)));
        let size: Size = partition.size.parse().map_err(wrong)?;
        let start = partition.start.as_deref().map(start_mib).transpose().map_err(wrong)?;
        let (size, max) = match size {
            Size::Exact(bytes) => (to_mib(bytes), to_mib(bytes)),
            Size::Range { min, max } => (to_mib(min), max.map_or(u64::MAX, to_mib)),
            Size::Fill => (to_mib(crate::size::FILL_MIN), u64::MAX),
            Size::Percent(percent) => {
                let part = (usable * u64::from(percent) / 100).max(1);
                (part, part)
            }
        };
        let lead = u64::from(layout.disks[disk].table == TableKind::Mbr && number > 4);
        let weight = u64::from(partition.weight.unwrap_or(1).max(1));
        items.push(Item { index, number, lead, start, size, max, weight, kept: None });
    }
    Ok(items)
}

/// A `start` in MiB.
///
/// # Errors
/// In words.
pub fn start_mib(text: &str) -> Result<u64, String> {
    let bytes = ka_cli::units::parse_size(text).map_err(|e| format!("start: {e}"))?;
    if bytes == 0 || bytes % MIB != 0 {
        return Err(format!("start: `{text}` is not a multiple of 1M above 0"));
    }
    Ok(bytes / MIB)
}

/// Where the last partition ends at the least, in MiB, when each takes as little as it may.
fn least_end(layout: &Layout, items: &[Item]) -> Result<u64, FitError> {
    let mut at = 1;
    for (i, item) in items.iter().enumerate() {
        if let Some(start) = item.start {
            if start < at + item.lead {
                return Err(FitError::Overlap {
                    first: if i == 0 {
                        "the partition table".into()
                    } else {
                        layout.partition_text(items[i - 1].index)
                    },
                    second: layout.partition_text(item.index),
                    start: exact_text(start * MIB),
                    end: exact_text((at + item.lead) * MIB),
                });
            }
            at = start - item.lead;
        }
        at = at.saturating_add(item.lead).saturating_add(item.size);
    }
    Ok(at)
}

/// Checks on its own whether given starts collide with what lies before them, on a disk of any size.
///
/// # Errors
/// [`FitError::Overlap`] or [`FitError::Layout`].
pub fn check_overlap(layout: &Layout, disk: usize) -> Result<(), FitError> {
    least_end(layout, &items(layout, disk, 0)?).map(|_| ())
}

/// Shares `room` units of `unit` bytes among `wanted` sizes with their weights; how many units each gets.
///
/// # Errors
/// How many units are needed at least, when that is more than there is room.
pub fn share_out(wanted: &[(Size, u32)], room: u64, unit: u64) -> Result<Vec<u64>, u64> {
    let mut items = Vec::new();
    for (index, (size, weight)) in wanted.iter().enumerate() {
        let units = |bytes: u64| bytes.div_ceil(unit);
        let (size, max) = match *size {
            Size::Exact(bytes) => (units(bytes), units(bytes)),
            Size::Range { min, max } => (units(min), max.map_or(u64::MAX, units)),
            Size::Fill => (units(crate::size::FILL_MIN), u64::MAX),
            Size::Percent(percent) => {
                let part = (room * u64::from(percent) / 100).max(1);
                (part, part)
            }
        };
        let weight = u64::from((*weight).max(1));
        items.push(Item { index, number: 0, lead: 0, start: None, size, max, weight, kept: None });
    }
    let needs = items.iter().fold(0_u64, |sum, i| sum.saturating_add(i.size));
    if needs > room {
        return Err(needs);
    }
    share(&mut items, room);
    Ok(items.iter().map(|i| i.size).collect())
}

/// Shares what `room` (MiB) has left over among the items that can grow, by weight, none above its limit.
fn share(items: &mut [Item], room: u64) {
    let used: u64 = items.iter().map(|i| i.lead + i.size).sum();
    let mut left = room.saturating_sub(used);
    loop {
        let growing: u64 = items.iter().filter(|i| i.size < i.max).map(|i| i.weight).sum();
        if growing == 0 || left == 0 {
            return;
        }
        // Those whose share would carry them over their limit get the limit; the rest is shared anew without them.
        let unit = left / growing;
        let mut given = 0;
        let mut capped = false;
        for item in items.iter_mut().filter(|i| i.size < i.max) {
            if item.max - item.size <= unit * item.weight {
                given += item.max - item.size;
                item.size = item.max;
                capped = true;
            }
        }
        left -= given;
        if capped {
            continue;
        }
        for item in items.iter_mut().filter(|i| i.size < i.max) {
            // `growing` units fit, and what remains is less than one unit for each: the first ones take a MiB more.
            item.size += unit * item.weight;
            left -= unit * item.weight;
        }
        while left > 0 {
            let mut grew = false;
            for item in items.iter_mut().filter(|i| i.size < i.max) {
                if left > 0 {
                    item.size += 1;
                    left -= 1;
                    grew = true;
                }
            }
            if !grew {
                return;
            }
        }
    }
}

#[cfg(test)]
#[path = "fit_tests.rs"]
mod tests;
