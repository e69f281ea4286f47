//! Fitting: sizes, numbers, what is preserved, and that nothing ever overlaps.

use super::*;
use crate::model::{DiskRule, Match, Pick};
use proptest::prelude::*;

fn partition(number: Option<u32>, size: &str) -> Partition {
    Partition {
        disk: None,
        id: None,
        number,
        kind: "linux".into(),
        size: size.into(),
        start: None,
        weight: None,
        name: None,
        uuid: None,
        bootable: false,
        format: None,
        subvolumes: Vec::new(),
        mount: None,
        preserve: false,
        raw: false,
    }
}

/// A preserved partition, and where it stands, by its first and last MiB.
fn preserved(number: u32, size: &str, first: u64, last: u64) -> (Partition, Kept) {
    let mut kept = partition(Some(number), size);
    kept.preserve = true;
    (kept, Kept { number, first: first * 2048, last: (last + 1) * 2048 - 1 })
}

#[test]
fn what_is_preserved_stays_to_the_sector() {
    let (mut keep, mut place) = preserved(2, "fill", 300, 399);
    place.first += 7;
    place.last -= 9;
    let fit = |keep: &Partition, first: &str| {
        let parts = vec![partition(None, first), keep.clone(), partition(None, "fill")];
        fit_keeping(&layout(TableKind::Gpt, parts), 0, Geometry { bytes: G, sector: 512 }, &[place])
    };
    let fitted = fit(&keep, "fill").unwrap();
    assert_eq!((fitted.extents[1].first, fitted.extents[1].last), (place.first, place.last));
    assert_eq!((fitted.extents[0].first, fitted.extents[0].last), (2048, 300 * 2048 - 1));
    assert_eq!(fitted.extents[2].first, 400 * 2048);
    // What lies before it must have room there.
    let error = fit(&keep, "300M").unwrap_err().to_string();
    assert!(
        error.ends_with(
            "starts at 300M, but [[partition]] #1 (linux) before it reaches to 301M: they overlap"
        ),
        "{error}"
    );
    keep.size = "200M-".into();
    let error = fit(&keep, "fill").unwrap_err().to_string();
    assert!(
        error.starts_with("[[partition]] #2 (linux): preserve: partition 2 has ")
            && error.ends_with(", not 200M-"),
        "{error}"
    );
    keep.number = Some(5);
    let error = fit(&keep, "fill").unwrap_err().to_string();
    assert_eq!(error, "[[partition]] #2 (linux): preserve: the disk has no partition 5");
}

#[test]
fn a_preserved_partition_of_the_old_kind_begins_before_the_first_mib() {
    let (keep, mut place) = preserved(1, "fill", 0, 99);
    place.first = 63;
    let parts = vec![keep, partition(None, "fill")];
    let fitted =
        fit_keeping(&layout(TableKind::Mbr, parts), 0, Geometry { bytes: G, sector: 512 }, &[place]).unwrap();
    assert_eq!((fitted.extents[0].first, fitted.extents[1].first), (63, 100 * 2048));
}

fn layout(table: TableKind, partitions: Vec<Partition>) -> Layout {
    let disk =
        DiskRule { name: "system".into(), matching: Match::default(), pick: Pick::Only, table, uuid: None };
    Layout { version: 1, disks: vec![disk], partitions, ..Layout::default() }
}

fn gpt(sizes: &[&str]) -> Layout {
    layout(TableKind::Gpt, sizes.iter().map(|s| partition(None, s)).collect())
}

const G: u64 = 1 << 30;

fn mib(fitted: &Fitted) -> Vec<(u32, u64, u64)> {
    let unit = MIB / u64::from(fitted.geometry.sector);
    fitted.extents.iter().map(|e| (e.number, e.first / unit, (e.last + 1) / unit)).collect()
}

#[test]
fn sizes_are_shared() {
    let at = |sizes: &[&str], bytes| mib(&fit(&gpt(sizes), 0, Geometry { bytes, sector: 512 }).unwrap());
    assert_eq!(at(&["1M", "512M", "fill"], G), [(1, 1, 2), (2, 2, 514), (3, 514, 1023)]);
    assert_eq!(at(&["fill", "fill"], G), [(1, 1, 512), (2, 512, 1023)]);
    // Both grow alike until the range has reached its limit.
    assert_eq!(at(&["100M-200M", "fill"], G), [(1, 1, 201), (2, 201, 1023)]);
    assert_eq!(at(&["10%", "100M-", "1000K"], G), [(1, 1, 103), (2, 103, 1022), (3, 1022, 1023)]);
    // What nobody wants stays free.
    assert_eq!(at(&["100M-200M"], G), [(1, 1, 201)]);
    let mut weighted = gpt(&["fill", "fill"]);
    weighted.partitions[0].weight = Some(3);
    let fitted = fit(&weighted, 0, Geometry { bytes: G, sector: 512 }).unwrap();
    assert_eq!(mib(&fitted), [(1, 1, 759), (2, 759, 1023)]);
}

#[test]
fn numbers_out_of_order_are_kept() {
    let parts = vec![partition(Some(14), "3M"), partition(Some(15), "124M"), partition(Some(1), "fill")];
    let fitted = fit(&layout(TableKind::Gpt, parts), 0, Geometry { bytes: 2 * G, sector: 512 }).unwrap();
    assert_eq!(mib(&fitted), [(14, 1, 4), (15, 4, 128), (1, 128, 2047)]);
}

#[test]
fn starts_are_obeyed() {
    let mut pinned = gpt(&["fill", "100M", "fill"]);
    pinned.partitions[1].start = Some("500M".into());
    let fitted = fit(&pinned, 0, Geometry { bytes: G, sector: 512 }).unwrap();
    assert_eq!(mib(&fitted), [(1, 1, 500), (2, 500, 600), (3, 600, 1023)]);
    pinned.partitions[1].start = Some("16M".into());
    assert_eq!(
        fit(&pinned, 0, Geometry { bytes: G, sector: 512 }).unwrap_err().to_string(),
        "[[partition]] #2 (linux) starts at 16M, but [[partition]] #1 (linux) before it reaches to 17M: they overlap"
    );
}

#[test]
fn mbr_gets_an_extended_partition_around_logical_ones() {
    let parts = vec![partition(Some(1), "100M"), partition(Some(5), "200M"), partition(Some(6), "fill")];
    let fitted = fit(&layout(TableKind::Mbr, parts), 0, Geometry { bytes: G, sector: 512 }).unwrap();
    assert_eq!(mib(&fitted), [(1, 1, 101), (5, 102, 302), (6, 303, 1024)]);
    assert_eq!(fitted.extended, Some(Extended { number: 2, first: 101 * 2048, last: 1024 * 2048 - 1 }));
    assert_eq!(fitted.ebr_of(&fitted.extents[2]), 302 * 2048);
}

#[test]
fn mbr_numbers_are_given_by_themselves() {
    let numbers_of = |count: usize| -> Vec<u32> {
        let parts = (0..count).map(|_| partition(None, "10M")).collect();
        numbers(&layout(TableKind::Mbr, parts), 0).unwrap().into_iter().map(|n| n.1).collect()
    };
    assert_eq!(numbers_of(4), [1, 2, 3, 4]);
    assert_eq!(numbers_of(6), [1, 2, 3, 5, 6, 7]);
}

#[test]
fn impossible_mbr_numbers_are_refused() {
    let wrong = |wanted: &[u32]| {
        let parts = wanted.iter().map(|n| partition(Some(*n), "10M")).collect();
        numbers(&layout(TableKind::Mbr, parts), 0).unwrap_err().1
    };
    assert_eq!(
        wrong(&[1, 6]),
        "logical partitions are numbered 5, 6, ... in the order in which they lie on the disk: number 6 should be 5"
    );
    assert_eq!(
        wrong(&[1, 2, 3, 4, 5]),
        "numbers 1 to 4 are all taken: none is left for the extended partition"
    );
    assert_eq!(wrong(&[5, 1, 6]), "logical partitions must lie together: a primary one lies between them");
    assert_eq!(wrong(&[61]), "number 61 is not between 1 and 60");
    assert_eq!(wrong(&[0]), "number 0 is not between 1 and 60");
}

#[test]
fn a_small_disk_is_refused_with_figures() {
    assert_eq!(
        fit(&gpt(&["512M", "600M-"]), 0, Geometry { bytes: G, sector: 512 }).unwrap_err().to_string(),
        "disk `system` is too small: it has 1.00 GiB, the layout needs at least 1.09 GiB, 89.0 MiB are missing \
         ([[partition]] #1 (linux): 512M, [[partition]] #2 (linux): 600M)"
    );
}

#[test]
fn what_a_table_cannot_address_is_refused() {
    let big = Geometry { bytes: 3 << 40, sector: 512 };
    assert_eq!(
        fit(&layout(TableKind::Mbr, vec![partition(None, "fill")]), 0, big).unwrap_err().to_string(),
        "disk `system` has 3.00 TiB, more than the 2.00 TiB that a table of kind mbr can address: use gpt"
    );
    assert!(fit(&gpt(&["fill"]), 0, big).is_ok());
    let odd = Geometry { bytes: G, sector: 2048 };
    assert!(matches!(fit(&gpt(&["fill"]), 0, odd), Err(FitError::Sector { .. })));
}

fn size() -> impl Strategy<Value = String> {
    prop_oneof![
        (1_u64..3000).prop_map(|m| format!("{m}M")),
        (1_u64..3_000_000).prop_map(|k| format!("{k}K")),
        (1_u64..2000, 0_u64..9000).prop_map(|(a, b)| format!("{a}M-{}M", a + b)),
        (1_u64..2000).prop_map(|m| format!("{m}M-")),
        (1_u32..40).prop_map(|p| format!("{p}%")),
        Just("fill".to_owned()),
    ]
}

#[test]
fn a_preserved_partition_may_reach_to_the_very_end() {
    // As some tools make the last one of a gpt: up to the last usable sector.
    let (keep, mut place) = preserved(2, "fill", 300, 399);
    let sectors = G / 512;
    place.last = sectors - 34;
    let fit = |place: Kept| {
        let parts = vec![partition(None, "fill"), keep.clone()];
        fit_keeping(&layout(TableKind::Gpt, parts), 0, Geometry { bytes: G, sector: 512 }, &[place])
    };
    let fitted = fit(place).unwrap();
    assert_eq!((fitted.extents[1].first, fitted.extents[1].last), (300 * 2048, sectors - 34));
    assert_eq!(fitted.extents[0].last, 300 * 2048 - 1);
    place.last += 1;
    assert!(matches!(fit(place), Err(FitError::TooSmall { .. })), "that is the table's");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]
    #[test]
    fn a_table_can_say_anything(first in prop_oneof![any::<u64>(), 0_u64..5_000_000], last in prop_oneof![any::<u64>(), 0_u64..5_000_000],
        logical in any::<bool>()) {
        let table = if logical { TableKind::Mbr } else { TableKind::Gpt };
        let number = if logical { 5 } else { 1 };
        let (keep, _) = preserved(number, "fill", 1, 2);
        let place = Kept { number, first, last };
        let fitted = fit_keeping(&layout(table, vec![keep, partition(None, "1M")]), 0, Geometry { bytes: G, sector: 512 }, &[place]);
        if let Ok(fitted) = fitted {
            prop_assert!(first <= last && last < G / 512);
            prop_assert_eq!((fitted.extents[0].first, fitted.extents[0].last), (first, last));
        }
    }

    #[test]
    fn nothing_comes_near_what_is_preserved(
        parts in proptest::collection::vec((proptest::option::weighted(0.5, (0_u64..300_000, 1_u64..300_000)), size()), 1..7),
        mbr in any::<bool>(),
    ) {
        let table = if mbr { TableKind::Mbr } else { TableKind::Gpt };
        let sectors = G / 512;
        // What is kept lies behind the last, with any gap, aligned to nothing.
        let mut at = 34;
        let mut kept = Vec::new();
        let mut partitions = Vec::new();
        for (i, (place, size)) in parts.iter().enumerate() {
            let number = u32::try_from(i).unwrap() + if mbr && i > 2 { 2 } else { 1 };
            let mut one = partition(Some(number), size);
            if let Some((gap, length)) = place {
                (one.preserve, one.size) = (true, "fill".into());
                kept.push(Kept { number, first: at + gap, last: at + gap + length - 1 });
                at += gap + length;
            }
            partitions.push(one);
        }
        let geometry = Geometry { bytes: G, sector: 512 };
        let Ok(fitted) = fit_keeping(&layout(table, partitions), 0, geometry, &kept) else { return Ok(()) };
        let mut free = if mbr { 1 } else { 34 };
        for extent in &fitted.extents {
            if let Some(kept) = kept.iter().find(|k| k.number == extent.number) {
                prop_assert_eq!((kept.first, kept.last), (extent.first, extent.last));
            }
            let from = if mbr && extent.number > 4 { fitted.ebr_of(extent) } else { extent.first };
            prop_assert!(from >= free, "{:?} or its record lies before {free}", extent);
            free = extent.last + 1;
        }
        let end = if mbr { sectors } else { sectors - 33 };
        prop_assert!(free <= end);
    }

    #[test]
    fn partitions_never_overlap_nor_leave_the_disk(
        parts in proptest::collection::vec((size(), 1_u32..9, proptest::option::weighted(0.15, 1_u64..20_000)), 1..10),
        bytes in (10 * MIB)..(40 * G), big in any::<bool>(), mbr in any::<bool>(),
    ) {
        let sector = if big { 4096 } else { 512 };
        let bytes = bytes / u64::from(sector) * u64::from(sector);
        let table = if mbr { TableKind::Mbr } else { TableKind::Gpt };
        let partitions: Vec<Partition> = parts.iter().map(|(size, weight, start)| Partition {
            weight: Some(*weight),
            start: start.map(|m| format!("{m}M")),
            ..partition(None, size)
        }).collect();
        let wanted: Vec<Size> = parts.iter().map(|p| p.0.parse().unwrap()).collect();
        let layout = layout(table, partitions);
        let Ok(fitted) = fit(&layout, 0, Geometry { bytes, sector }) else { return Ok(()) };
        let unit = MIB / u64::from(sector);
        let sectors = bytes / u64::from(sector);
        // GPT: one MBR, one header and 128 entries of 128 bytes before, the same without the MBR behind.
        let table_sectors = if mbr { 0 } else { 1 + 16384 / u64::from(sector) };
        let mut at = unit;
        prop_assert_eq!(fitted.extents.len(), parts.len());
        for (i, extent) in fitted.extents.iter().enumerate() {
            prop_assert_eq!(extent.index, i);
            prop_assert!(extent.first >= at, "{:?} before {at}", extent);
            prop_assert!(extent.last >= extent.first);
            prop_assert_eq!(extent.first % unit, 0);
            prop_assert_eq!((extent.last + 1) % unit, 0);
            let logical = mbr && extent.number > 4;
            if logical {
                prop_assert!(fitted.ebr_of(extent) >= at);
            }
            at = extent.last + 1;
            let size = extent.bytes(sector);
            match wanted[i] {
                Size::Exact(b) => prop_assert_eq!(size, b.div_ceil(MIB) * MIB),
                Size::Range { min, max } => {
                    prop_assert!(size >= min);
                    prop_assert!(max.is_none_or(|m| size <= m.div_ceil(MIB) * MIB));
                }
                Size::Percent(p) => prop_assert!(size <= (bytes * u64::from(p) / 100).max(MIB)),
                Size::Fill => prop_assert!(size >= crate::size::FILL_MIN),
            }
            if let Some(start) = &layout.partitions[i].start {
                prop_assert_eq!(extent.first / unit, start_mib(start).unwrap());
            }
        }
        prop_assert!(at <= sectors - table_sectors, "{at} of {sectors}");
        if let Some(extended) = fitted.extended {
            let logical: Vec<_> = fitted.extents.iter().filter(|e| e.number > 4).collect();
            prop_assert!(extended.first < logical[0].first && extended.last == logical[logical.len() - 1].last);
            for primary in fitted.extents.iter().filter(|e| e.number <= 4) {
                prop_assert!(primary.last < extended.first || primary.first > extended.last);
                prop_assert!(primary.number != extended.number);
            }
        }
        // Nothing is left over while somebody could still grow behind the last given start.
        if wanted.iter().any(|s| matches!(s, Size::Fill | Size::Range { max: None, .. }))
            && layout.partitions.iter().all(|p| p.start.is_none()) {
            prop_assert!(sectors - table_sectors - at < unit);
        }
    }
}
