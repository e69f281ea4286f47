//! How much room the tree needs on each of its file systems, found without opening any file: the answer to "does it fit"
//! before anything is written.

use std::collections::{BTreeMap, HashSet};

use rustix::fs::FileType;

use crate::pack::{PackError, PackOptions};
use crate::shown;
use crate::walk::{Event, Walker, file_type, inode};

const GRAIN: u64 = 4096;

/// What the tree takes on one file system.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Used {
    /// Bytes of content: holes not counted, each file rounded up to 4 KiB, hard links once.
    pub bytes: u64,
    /// Files, directories and all else that takes an inode.
    pub inodes: u64,
}

/// Walks what [`crate::pack`] would send with the same options and sums it up by mount path (absolute, `/` for the root).
///
/// # Errors
/// As [`crate::pack`], for what concerns the walk.
pub fn measure(options: &PackOptions) -> Result<BTreeMap<String, Used>, PackError> {
    let mut walker = Walker::new(options)?;
    let mut used = vec![Used::default(); 1 + options.mounts.as_ref().map_or(0, Vec::len)];
    let mut links = HashSet::new();
    let mut names = vec!["/".to_owned()];
    for mount in options.mounts.iter().flatten() {
        let name = shown(mount.trim_matches('/').as_bytes());
        if !names.contains(&name) {
            names.push(name);
        }
    }
    while let Some(event) = walker.next()? {
        let item = match event {
            Event::Entry(item) => item,
            Event::Vanished(_) | Event::LeftOut => continue,
            Event::Unreadable(..) if options.skip_unreadable => continue,
            Event::Unreadable(path, operation, errno) => {
                return Err(PackError::File { operation, path: shown(path), source: errno.into() });
            }
        };
        let kind = file_type(&item.stat);
        if kind == FileType::Socket {
            continue;
        }
        if kind != FileType::Directory && item.stat.stx_nlink > 1 && !links.insert(inode(&item.stat)) {
            continue;
        }
        let sum = &mut used[item.mount];
        sum.inodes += 1;
        sum.bytes += match kind {
            FileType::RegularFile if item.other_mount => 0,
            FileType::RegularFile => content(item.stat.stx_size, item.stat.stx_blocks),
            FileType::Directory if item.other_mount => GRAIN,
            FileType::Directory => item.stat.stx_size.next_multiple_of(GRAIN).max(GRAIN),
            FileType::Symlink if item.stat.stx_size >= 60 => GRAIN,
            _ => 0,
        };
    }
    Ok(names.into_iter().zip(used).collect())
}

fn content(size: u64, blocks: u64) -> u64 {
    // Small files may stand in the inode on the one file system and take a block on the other.
    let data = if size <= GRAIN { size } else { size.min(blocks.saturating_mul(512)) };
    data.checked_next_multiple_of(GRAIN).unwrap_or(data)
}
