//! Holes: which regions of a file hold data, and how that map stands in a tar stream (PAX GNU.sparse 1.0, which we write;
//! the older GNU forms are read only, see entry.rs).

use rustix::fd::BorrowedFd;
use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

use crate::header::BLOCK;
use crate::pax::decimal;

/// Data regions, ascending, as (offset, length) in bytes.
pub(crate) type Map = Vec<(u64, u64)>;

/// Most regions of one file. A file with more gets its smallest holes filled with zeros until they fit.
pub(crate) const MAX_REGIONS: usize = 1 << 16;

/// The data regions of an open file of `size` bytes. A file system that cannot tell says that all is data.
pub(crate) fn data_regions(fd: BorrowedFd<'_>, size: u64) -> Result<Map, Errno> {
    let mut map = Map::new();
    let mut smallest_hole = 1;
    let mut position = 0;
    while position < size {
        let start = match seek(fd, SeekFrom::Data(position)) {
            Ok(start) => start.min(size),
            // Nothing but a hole from here to the end.
            Err(Errno::NXIO) => break,
            Err(Errno::INVAL | Errno::OPNOTSUPP) if map.is_empty() => return Ok(vec![(0, size)]),
            Err(e) => return Err(e),
        };
        if start >= size {
            break;
        }
        let end = match seek(fd, SeekFrom::Hole(start)) {
            Ok(end) => end.min(size),
            // The file was cut off between the two calls.
            Err(Errno::NXIO) => size,
            Err(e) => return Err(e),
        };
        // A file that changes meanwhile must not hold us here for ever.
        let end = end.max(start + 1);
        append(&mut map, start, end, smallest_hole);
        while map.len() >= MAX_REGIONS {
            smallest_hole *= 2;
            let old = std::mem::take(&mut map);
            for (offset, length) in old {
                append(&mut map, offset, offset + length, smallest_hole);
            }
        }
        position = end;
    }
    Ok(map)
}

fn append(map: &mut Map, start: u64, end: u64, smallest_hole: u64) {
    match map.last_mut() {
        Some((offset, length)) if start - (*offset + *length) < smallest_hole => *length = end - *offset,
        _ => map.push((start, end - start)),
    }
}

/// The map as it stands in front of the data in format 1.0, padded to whole blocks.
pub(crate) fn encode(map: &Map, size: u64) -> Vec<u8> {
    // GNU tar marks a hole at the end by a region of length 0.
    let ends_in_hole = map.last().is_none_or(|(offset, length)| offset + length < size);
    let count = map.len() + usize::from(ends_in_hole);
    let mut text = format!("{count}\n");
    for (offset, length) in map {
        text.push_str(&format!("{offset}\n{length}\n"));
    }
    if ends_in_hole {
        text.push_str(&format!("{size}\n0\n"));
    }
    let mut bytes = text.into_bytes();
    bytes.resize(bytes.len().next_multiple_of(BLOCK), 0);
    bytes
}

/// Reads a 1.0 map that arrives block by block; returns it and the number of bytes that it took.
pub(crate) fn decode<E>(
    mut next_block: impl FnMut() -> Result<[u8; BLOCK], E>,
) -> Result<Result<(Map, u64), &'static str>, E> {
    let mut text = Vec::new();
    let mut taken = 0;
    let mut numbers: Vec<u64> = Vec::new();
    loop {
        text.extend_from_slice(&next_block()?);
        taken += BLOCK as u64;
        let mut rest = &text[..];
        while let Some(newline) = rest.iter().position(|&b| b == b'\n') {
            let Some(number) = decimal(&rest[..newline]) else {
                return Ok(Err("a sparse map with a wrong number"));
            };
            numbers.push(number);
            rest = &rest[newline + 1..];
            if numbers[0] > MAX_REGIONS as u64 {
                return Ok(Err("a sparse map with too many regions"));
            }
            if numbers.len() as u64 == numbers[0] * 2 + 1 {
                let map = numbers[1..].chunks_exact(2).map(|pair| (pair[0], pair[1])).collect();
                return Ok(Ok((map, taken)));
            }
        }
        if rest.len() > 20 {
            return Ok(Err("a sparse map with a wrong number"));
        }
        text = rest.to_vec();
    }
}

/// Checks a map that came from outside: ascending, inside `size`, together as long as `stored`, the data that follows.
pub(crate) fn check(map: &Map, size: u64, stored: u64) -> Result<(), &'static str> {
    let (mut position, mut sum) = (0u64, 0u64);
    for &(offset, length) in map {
        let end = offset.checked_add(length).ok_or("a sparse map beyond 64 bits")?;
        if offset < position || end > size {
            return Err("a sparse map with regions that overlap or leave the file");
        }
        position = end;
        sum += length;
    }
    if sum == stored { Ok(()) } else { Err("a sparse map that does not match its data") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::fd::AsFd;
    use std::os::unix::fs::FileExt;

    fn reread(bytes: &[u8]) -> Result<(Map, u64), &'static str> {
        let mut blocks = bytes.chunks_exact(BLOCK);
        decode(|| blocks.next().map(|b| b.try_into().unwrap()).ok_or("short")).and_then(|inner| inner)
    }

    #[test]
    fn holes_of_a_real_file() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(10 << 30).unwrap();
        file.write_all_at(b"x", 1 << 20).unwrap();
        file.write_all_at(b"y", 5 << 30).unwrap();
        let map = data_regions(file.as_fd(), 10 << 30).unwrap();
        assert_eq!(map.len(), 2, "{map:?}");
        assert!(map.iter().map(|r| r.1).sum::<u64>() < 1 << 20, "{map:?}");
        check(&map, 10 << 30, map.iter().map(|r| r.1).sum()).unwrap();
    }

    #[test]
    fn too_many_regions_fill_their_smallest_holes() {
        let mut map = Map::new();
        for (start, end) in [(0, 1), (3, 4), (100, 101)] {
            append(&mut map, start, end, 4);
        }
        assert_eq!(map, [(0, 4), (100, 1)]);
    }

    #[test]
    fn hostile_maps_are_refused() {
        for (map, size, stored) in [
            (vec![(0, 10)], 5, 10),
            (vec![(4, 2), (0, 2)], 10, 4),
            (vec![(0, 4), (2, 4)], 10, 8),
            (vec![(u64::MAX, 2)], 10, 2),
            (vec![(0, 4)], 10, 5),
        ] {
            assert!(check(&map, size, stored).is_err(), "{map:?}");
        }
        for text in [&b"x\n"[..], b"99999999\n1\n", b"1\n-1\n2\n", b"111111111111111111111111111111111"] {
            let mut block = text.to_vec();
            block.resize(BLOCK, 0);
            assert!(reread(&block).is_err(), "{}", text.escape_ascii());
        }
    }

    proptest! {
        #[test]
        fn maps_round_trip(parts in proptest::collection::vec((0u64..1 << 40, 1u64..1 << 40), 0..300), tail in 0u64..9) {
            let (mut map, mut position) = (Map::new(), 0);
            for (gap, length) in parts {
                map.push((position + gap, length));
                position += gap + length;
            }
            let size = position + tail;
            let bytes = encode(&map, size);
            let (mut back, taken) = reread(&bytes).unwrap();
            prop_assert_eq!(taken, bytes.len() as u64);
            check(&back, size, map.iter().map(|r| r.1).sum()).unwrap();
            back.retain(|region| region.1 > 0);
            prop_assert_eq!(back, map);
        }
    }
}
